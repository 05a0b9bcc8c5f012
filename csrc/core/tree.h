// The priority tree: integer weights in leaves that only compare-and-swap changes, and sums above them that only
// relaxed adds change. Integer adds commute, so the sums equal the leaves' whenever no call is under way, whatever came
// before.
#pragma once
#include <atomic>
#include <cstdint>

#include "core/access.h"
#include "core/layout.h"

namespace angle {

template <class Access>
class PriorityTree {
 public:
  PriorityTree(uint8_t* segment, const SegmentLayout& layout)
      : shape_(layout.tree), code(layout.tree.weight_bits), leaves_(segment + layout.leaves_at) {
    for (size_t level = 0; level < shape_.levels; ++level) sums_[level] = segment + layout.sums_at[level];
  }

  // The leaf of a slot. Any thread.
  typename Access::template Word<uint64_t> leaf(uint64_t slot) const {
    return {reinterpret_cast<uint64_t*>(leaves_) + slot};
  }
  // Inlined by force: gcc takes a function that only prefetches for one without effect and drops the calls.
  __attribute__((always_inline)) void prefetch(uint64_t slot) const {
    __builtin_prefetch(leaves_ + slot * sizeof(uint64_t), 1);
    __builtin_prefetch(sums_[0] + (slot >> shape_.shift[0]) * sizeof(int64_t), 1);
  }

  // Collects changes of neighbouring leaves, so that rows inserted side by side share their adds. One thread's own.
  class Deltas {
   public:
    // own_top: zeros for the top's nodes, whose changes are then collected there and added once each in the end; pays
    // where a call changes most of them.
    explicit Deltas(const PriorityTree& tree, int64_t* own_top = nullptr) : tree_(tree), own_top_(own_top) {}
    ~Deltas() {
      flush();
      if (own_top_ == nullptr) return;
      for (size_t node = 0; node < tree_.top_nodes(); ++node) {
        if (own_top_[node] == 0) continue;
        tree_.sum(tree_.shape_.levels - 1, node).fetch_add(own_top_[node], std::memory_order_relaxed);
        own_top_[node] = 0;
      }
    }
    Deltas(const Deltas&) = delete;
    Deltas& operator=(const Deltas&) = delete;

    // The leaf's weight has changed by delta. O(levels). Wait-free.
    void add(uint64_t slot, int64_t delta) {
      if (delta == 0) return;
      const uint64_t node = slot >> tree_.shape_.shift[0];
      if (node != node_) {
        flush();
        node_ = node;
      }
      pending_ += delta;
    }

   private:
    // Adds what is pending to the node of each level.
    void flush() {
      if (pending_ == 0) return;
      const size_t top = tree_.shape_.levels - 1;
      uint64_t node = node_;
      for (size_t level = 0; level < top; ++level) {
        tree_.sum(level, node).fetch_add(pending_, std::memory_order_relaxed);
        node >>= tree_.shape_.shift[level + 1];
      }
      if (own_top_ == nullptr) {
        tree_.sum(top, node).fetch_add(pending_, std::memory_order_relaxed);
      } else {
        own_top_[node] += pending_;
      }
      pending_ = 0;
    }

    const PriorityTree& tree_;
    int64_t* const own_top_;
    uint64_t node_ = 0;
    int64_t pending_ = 0;
  };

  size_t top_nodes() const { return shape_.nodes[shape_.levels - 1]; }

  // The top level's nodes are added up in groups, at most 2,048 of them.
  size_t top_groups() const { return (top_nodes() + (1ull << TreeShape::kTopShift) - 1) >> TreeShape::kTopShift; }

  // Running sums of the top's groups, negative sums read as 0. Returns the total. `prefix` holds top_groups() rounded
  // up to 8.
  int64_t top_prefix(int64_t* prefix) const {
    return Access::prefix_sums(sums(shape_.levels - 1), top_groups(), prefix);
  }

  // From targets in [0, total) to slots, all draws a level at a time. slots[i] is kLost where the sums promised weight
  // that the leaves did not hold (it was in flight); words[i] is the leaf as read, of positive weight. O(count * levels
  // * fan).
  void find(const int64_t* prefix, bool ascending, size_t count, int64_t* targets, uint64_t* slots,
            uint64_t* words) const {
    kernels().replay.locate(prefix, top_groups(), ascending, count, slots, targets);
    Access::descend(sums(shape_.levels - 1), 1ull << TreeShape::kTopShift, count, slots, targets);
    for (size_t level = shape_.levels - 1; level > 0; --level) {
      for (size_t i = 0; i < count; ++i) prefetch_node(sums_[level - 1], slots[i], shape_.shift[level]);
      Access::descend(sums(level - 1), 1ull << shape_.shift[level], count, slots, targets);
    }
    for (size_t i = 0; i < count; ++i) prefetch_node(leaves_, slots[i], shape_.shift[0]);
    Access::descend_leaves(reinterpret_cast<const uint64_t*>(leaves_), 1ull << shape_.shift[0], code.weight_mask, count,
                           slots, targets, words);
  }

  const TreeShape& shape() const { return shape_; }
  // A node's sum. Any thread.
  typename Access::template Word<int64_t> sum(size_t level, uint64_t node) const {
    return {reinterpret_cast<int64_t*>(sums_[level]) + node};
  }
  const int64_t* sums(size_t level) const { return reinterpret_cast<const int64_t*>(sums_[level]); }

 private:
  const TreeShape shape_;

 public:
  const LeafCode code;

 private:
  __attribute__((always_inline)) static void prefetch_node(const uint8_t* children, uint64_t node, uint32_t shift) {
    if (node == kLost) return;
    const uint8_t* first = children + (node << shift) * sizeof(uint64_t);
    for (size_t at = 0; at < (sizeof(uint64_t) << shift); at += kLine) __builtin_prefetch(first + at);
  }

  uint8_t* leaves_;
  uint8_t* sums_[TreeShape::kMaxLevels]{};
};

}  // namespace angle
