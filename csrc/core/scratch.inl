// One thread's working memory, kept from call to call so that a steady state allocates nothing.
#pragma once
#include <vector>

#include "core/replay.h"

namespace angle {

template <class Access>
struct ReplayT<Access>::Scratch {
  const size_t lane = Access::lane();
  typename WeightCounts<Access>::Pending counts;
  std::vector<int64_t> prefix, targets;
  std::vector<int64_t> tops;  // zeros between calls: one call's own changes of the top
  std::vector<uint64_t> bits, slots, words, headers, weights;
  std::vector<double> reals, rewards;
  std::vector<float> priorities;
  std::vector<uint8_t> whole;                             // [n] the row was copied whole
  std::vector<uint64_t> ends, end_laps, walk, walk_laps;  // [n] slots and laps along a window or a stack
  std::vector<uint64_t> walked;                           // [4 n] headers met on the way
  std::vector<Place> frames;                              // [2 stack n] records of a row's frames, its successor's last
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
    s.priorities.resize(n);
    s.rewards.resize(n);
    s.whole.resize(n);
  }
  if (s.prefix.size() < top + 8) s.prefix.resize(top + 8);
  return s;
}

// What changed leaves owe to the sums and the counts, collected and added at its end. One thread's own.
template <class Access>
class ReplayT<Access>::WeightChanges {
 public:
  // `rows`: about how many leaves will change, from anywhere.
  explicit WeightChanges(const ReplayT& replay, size_t rows = 0)
      : code_(replay.tree_.code),
        counts_(replay.counts_, scratch(0, 0).counts, scratch(0, 0).lane),
        deltas_(replay.tree_, own_top(replay, rows)) {}

  // A leaf went from one word to another. Inlined by force, as it is in the loops over rows.
  __attribute__((always_inline)) void add(uint64_t slot, uint64_t old_leaf, uint64_t new_leaf) {
    const uint64_t before = code_.weight(old_leaf), after = code_.weight(new_leaf);
    deltas_.add(slot, static_cast<int64_t>(after) - static_cast<int64_t>(before));
    counts_.add(code_.state(old_leaf) == LeafCode::kComputed, before, -1);
    counts_.add(code_.state(new_leaf) == LeafCode::kComputed, after, +1);
  }

 private:
  static int64_t* own_top(const ReplayT& replay, size_t rows) {
    const size_t nodes = replay.tree_.top_nodes();
    if (rows < 512 || 2 * rows < nodes) return nullptr;
    std::vector<int64_t>& tops = scratch(0, 0).tops;
    if (tops.size() < nodes) tops.resize(nodes, 0);
    return tops.data();
  }

  const LeafCode code_;
  typename WeightCounts<Access>::Changes counts_;
  typename PriorityTree<Access>::Deltas deltas_;
};

}  // namespace angle
