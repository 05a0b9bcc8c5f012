// Threads that insert and threads that learn on one replay at the same time, without an interpreter, for benchmarks:
// how many calls a second, and how long the slowest take.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/replay.h"

namespace angle {

// Durations in logarithmic buckets, 16 an octave, so that noting one costs next to nothing. One thread.
class LatencyHistogram {
 public:
  // Notes a duration in any unit. O(1).
  void add(uint64_t duration);
  // Adds another's durations. O(buckets).
  void merge(const LatencyHistogram& other);
  // The duration that a share of all, in [0, 1], do not exceed: at most 6.3 % high; 0 when there are none. O(buckets).
  double quantile(double share) const;
  uint64_t longest() const { return longest_; }
  uint64_t count() const { return count_; }

 private:
  static constexpr size_t kPart = 16;
  std::vector<uint64_t> buckets_ = std::vector<uint64_t>(64 * kPart, 0);
  uint64_t count_ = 0, longest_ = 0;
};

struct RaceOptions {
  size_t inserters = 1;      // threads that insert row after row
  size_t learners = 1;       // threads that sample a batch and update its priorities
  size_t batch = 256;        // rows a learner's batch holds, >= 1
  double seconds = 1.0;      // how long, > 0
  uint64_t first_row = 0;    // the inserted rows are this one and the kRaceRows - 1 after it, over and over
  int64_t first_stream = 0;  // of the first inserter; each has a stream of its own
  size_t check_every = 256;  // a learner checks each row of one batch in so many, >= 1
};

constexpr size_t kRaceRows = 1024;

// What the threads of one kind did together; microseconds a call.
struct RaceSide {
  uint64_t calls = 0;
  double per_second = 0.0;  // all threads together
  double mean_us = 0.0, p50_us = 0.0, p99_us = 0.0, p999_us = 0.0, max_us = 0.0;
};

struct RaceResult {
  RaceSide inserts, cycles;
  uint64_t checked_rows = 0;  // sampled rows whose every number was compared
  uint64_t refused = 0;       // priorities whose row had been overwritten
};

// Lets options.inserters + options.learners threads loose on `replay` for options.seconds. It must hold rows of 17 and
// 6 float32 (observations, actions, rewards, next observations), each made from its number as `race_row` says, and at
// least one where there are learners. Any thread; others may use the replay meanwhile, but no other thread may insert
// into the streams used. Throws std::invalid_argument for other rows or options out of range, NothingToSample, and
// std::runtime_error when a sampled row's numbers do not belong together.
template <class Access>
RaceResult race(ReplayT<Access>& replay, const RaceOptions& options);

// A HalfCheetah-sized transition whose every number follows from its own number, below 2**36.
struct RaceRow {
  float observation[17], action[6], reward, next_observation[17];
  uint8_t terminated;
};

// O(1). Any thread.
RaceRow race_row(uint64_t number);

}  // namespace angle
