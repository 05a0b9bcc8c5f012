// Threads that go through one piece of work in step.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace angle {

// The caller and size() - 1 threads of the team's own. Between calls they spin for a moment, then sleep.
class Team {
 public:
  // size >= 1. Starts no thread before the first run.
  explicit Team(size_t size) : size_(size) {}
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  size_t size() const { return size_; }
  // Runs work(0) here and work(1), … on the others; returns when all are done. `work` must not throw. One caller at a
  // time. After a fork the child's first run starts threads of its own.
  void run(const std::function<void(size_t)>& work);
  // Inside work, by every thread: waits for all the others. What each wrote before is seen by all after.
  void meet();

 private:
  void start();
  void stop();
  void serve(size_t index, uint32_t seen);

  const size_t size_;
  std::vector<std::thread> threads_;
  int64_t owner_ = 0;  // the process that started them
  const std::function<void(size_t)>* work_ = nullptr;
  bool leave_ = false;
  alignas(64) std::atomic<uint32_t> call_{0};     // counts runs
  alignas(64) std::atomic<uint32_t> arrived_{0};  // at the present meeting
  alignas(64) std::atomic<uint32_t> meeting_{0};  // counts meetings
};

}  // namespace angle
