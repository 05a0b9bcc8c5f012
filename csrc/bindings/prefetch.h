// A thread that draws batches ahead into memory that it is given. Knows no Python.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "bindings/draw.h"

namespace angle {

class Prefetch {
 public:
  // Starts the thread, which waits for work.
  explicit Prefetch(std::shared_ptr<Replay> replay);
  // Stops as `stop` does. In a child of fork, where the thread does not exist, the shared state is left alone for ever.
  ~Prefetch();
  Prefetch(const Prefetch&) = delete;
  Prefetch& operator=(const Prefetch&) = delete;

  // Asks for one more batch, drawn into addresses (as in draw.h), which must live until `take` named this one or `stop`
  // returned. Batches are drawn and taken in the order of the calls. O(1). Any thread.
  void submit(uint64_t name, const SampleRequest& request, std::vector<uint8_t*> addresses);

  // The name of the oldest batch, if it is ready. O(1). Any thread; never waits for a draw.
  std::optional<uint64_t> take_ready();
  // The same, waiting until it is ready; nothing once stopped. Throws what the draw threw: the batch then stays first
  // in line and is tried again by the next take, so that an error is never older than the call that it comes out of.
  // There must be a batch to wait for. Any thread, without the interpreter's lock.
  std::optional<uint64_t> take();

  // Ends the thread after the draw that it is in, wakes all who wait in take, and gives the calls of batches that were
  // not taken back to the replay, the newest first, as far as nobody else has drawn since. Any thread, any number of
  // times; returns when it is done. In a child of fork: without effect, while the others throw std::runtime_error.
  void stop();

 private:
  struct State;
  State& state() const;
  // Apart, so that a child of fork can leave it alone.
  std::unique_ptr<State> state_;
};

}  // namespace angle
