// One thread's working memory, kept from call to call so that a steady state allocates nothing.
#pragma once
#include <unistd.h>

#include <atomic>
#include <vector>

#include "core/replay.h"

namespace angle {
namespace {

// Threads take the sets of counts in turn; processes begin at different ones.
inline size_t next_count_set() {
  static std::atomic<size_t> taken{0};
  return (taken.fetch_add(1, std::memory_order_relaxed) + static_cast<size_t>(getpid())) % kCountSets;
}

}  // namespace

template <class Access>
struct ReplayT<Access>::Scratch {
  const size_t count_set = next_count_set();
  std::vector<int64_t> prefix, targets;
  std::vector<int64_t> tops;  // zeros between calls: an update's own changes of the top
  std::vector<uint64_t> bits, slots, words, headers, weights;
  std::vector<double> reals, rewards;
  std::vector<uint8_t> whole;                             // [n] the row was copied whole
  std::vector<uint64_t> ends, end_laps, walk, walk_laps;  // [n] slots and laps along a window or a stack
  std::vector<uint64_t> walked;                           // [4 n] headers met on the way
  std::vector<int32_t> bucket_changes[2] = {std::vector<int32_t>(kBuckets, 0), std::vector<int32_t>(kBuckets, 0)};
  std::vector<uint32_t> touched;
  std::vector<FieldCopy> fields;
  std::vector<uint64_t> rows;  // slots that a uniform batch may still draw, once it had to list them
  std::vector<uint8_t> shown;  // a piece of a record to compare
};

template <class Access>
typename ReplayT<Access>::Scratch& ReplayT<Access>::scratch(size_t n, size_t top) {
  Scratch& s = Access::template own<Scratch>();
  if (s.targets.size() < n) {
    for (auto* const words : {&s.bits, &s.slots, &s.words, &s.weights, &s.ends, &s.end_laps, &s.walk, &s.walk_laps}) {
      words->resize(n);
    }
    s.targets.resize(n);
    s.headers.resize(4 * n);
    s.walked.resize(4 * n);
    s.reals.resize(n);
    s.rewards.resize(n);
    s.whole.resize(n);
  }
  if (s.prefix.size() < top + 8) s.prefix.resize(top + 8);
  return s;
}

}  // namespace angle
