// How many live rows weigh how much: counts by size of weight, from which the largest and the smallest live weight are
// known without a search.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>

#include "core/layout.h"

namespace angle {

// Weights by size in buckets of 1/32 octave, so that the largest live one is known to 3.2 %.
struct WeightBuckets {
  // 1 <= weight < 2**62. O(1).
  static constexpr size_t of(uint64_t weight) {
    const int octave = 63 - __builtin_clzll(weight);
    return static_cast<size_t>(octave) * 32 + ((weight << (63 - octave)) >> 58 & 31);
  }
  // The least and the largest weight of a bucket. O(1).
  static constexpr uint64_t lower_edge(size_t bucket) {
    const size_t octave = bucket / 32;
    const uint64_t lead = 32 + bucket % 32;
    return octave >= 5 ? lead << (octave - 5) : (lead + (1ull << (5 - octave)) - 1) >> (5 - octave);
  }
  static constexpr uint64_t upper_edge(size_t bucket) {
    const size_t octave = bucket / 32;
    const uint64_t lead = 32 + bucket % 32;
    return octave >= 5 ? ((lead + 1) << (octave - 5)) - 1 : lead >> (5 - octave);
  }
};

// Rows of two kinds are counted: those of default and those of computed weight. A thread adds to a set of counts of its
// own as long as nobody else has claimed it, without locked operations; else to the last set, which all share. So
// nobody waits, and a claim that a dead process left costs speed alone.
template <class Access>
class WeightCounts {
 public:
  explicit WeightCounts(SegmentHeader* header) : header_(header) {}

  // Rows of one kind in one bucket. Any thread.
  int64_t rows(bool computed, size_t bucket) const {
    int64_t sum = 0;
    for (CountSet& set : header_->counts) {
      sum += word(set.rows[place_of(computed, bucket)]).load(std::memory_order_seq_cst);  // partner: highest
    }
    return sum;
  }

  // No bucket of computed weights above this one holds a row; 0 where none does. Any thread.
  size_t highest() const {
    const Word<uint64_t> highest = word(header_->highest_bucket);
    uint64_t mark = highest.load(std::memory_order_seq_cst);
    for (;;) {
      uint64_t found = mark;
      while (found > 0 && rows(true, found) <= 0) --found;
      if (found == mark) return found;
      const uint64_t lowered_from = mark;
      if (!highest.compare_exchange_strong(mark, found, std::memory_order_seq_cst, std::memory_order_seq_cst)) continue;
      // Whoever gives a claim up after this sees the lowered mark; of whoever did before, the counts are seen below.
      for (size_t set = 0; set < kShared; ++set) {
        word(header_->counts[set].claimed).fetch_add(0, std::memory_order_acq_rel);
      }
      for (uint64_t bucket = lowered_from; bucket > found; --bucket) {
        if (rows(true, bucket) > 0) {
          raise_highest(bucket);
          return bucket;
        }
      }
      return found;
    }
  }

  // No live row weighs less; `none` where there is none. O(buckets). Any thread.
  uint64_t lowest_weight(uint64_t none) const {
    for (size_t bucket = 0; bucket < kBuckets; ++bucket) {
      if (rows(false, bucket) > 0 || rows(true, bucket) > 0) return WeightBuckets::lower_edge(bucket);
    }
    return none;
  }

  // Adds what makes a count right. Only at rest.
  void correct(bool computed, size_t bucket, int64_t by) const {
    word(header_->counts[kShared].rows[place_of(computed, bucket)]).fetch_add(by, std::memory_order_acq_rel);
  }

  // What a thread has still to add; all zeros between calls.
  struct Pending {
    uint64_t groups = 0;                  // bit g: some of marks[g]
    uint64_t marks[2 * kBuckets / 64]{};  // bit p % 64 of marks[p / 64]: by[p] was changed
    int32_t by[2 * kBuckets]{};
  };

  // Collects changes of counts and adds them at its end. One thread's own, over its `pending`; `lane` is any number,
  // best one of few threads.
  class Changes {
   public:
    Changes(const WeightCounts& counts, Pending& pending, size_t lane)
        : counts_(counts), pending_(pending), lane_(lane % kShared) {}
    ~Changes() { flush(); }
    Changes(const Changes&) = delete;
    Changes& operator=(const Changes&) = delete;

    // O(1). Weight 0 is not counted.
    __attribute__((always_inline)) void add(bool computed, uint64_t weight, int32_t by) {
      if (weight == 0) return;
      const size_t place = place_of(computed, WeightBuckets::of(weight));
      pending_.by[place] += by;
      pending_.marks[place / 64] |= 1ull << place % 64;
      pending_.groups |= 1ull << place / 64;
    }

   private:
    void flush() {
      if (pending_.groups == 0) return;
      uint64_t free = 0;
      const bool own = word(counts_.header_->counts[lane_].claimed)
                           .compare_exchange_strong(free, 1, std::memory_order_acquire, std::memory_order_relaxed);
      CountSet& set = counts_.header_->counts[own ? lane_ : kShared];
      size_t highest = 0;
      for (; pending_.groups != 0; pending_.groups &= pending_.groups - 1) {
        const size_t group = static_cast<size_t>(__builtin_ctzll(pending_.groups));
        for (uint64_t& marks = pending_.marks[group]; marks != 0; marks &= marks - 1) {
          const size_t place = 64 * group + static_cast<size_t>(__builtin_ctzll(marks));
          const int64_t by = std::exchange(pending_.by[place], 0);
          const Word<int64_t> count = word(set.rows[place]);
          if (own) {
            count.store(count.load(std::memory_order_relaxed) + by, std::memory_order_relaxed);
          } else {
            count.fetch_add(by, std::memory_order_seq_cst);  // partner: highest
          }
          if (by > 0 && place >= kBuckets) highest = std::max(highest, place - kBuckets);
        }
      }
      if (own) word(set.claimed).exchange(0, std::memory_order_acq_rel);  // partner: highest, and the next claim
      counts_.raise_highest(highest);
    }

    const WeightCounts& counts_;
    Pending& pending_;
    const size_t lane_;
  };

 private:
  static constexpr size_t kShared = kCountSets - 1;
  template <class T>
  using Word = typename Access::template Word<T>;
  template <class T>
  static Word<T> word(T& at) {
    return {&at};
  }
  static size_t place_of(bool computed, size_t bucket) { return (computed ? kBuckets : 0) + bucket; }

  void raise_highest(size_t bucket) const {
    const Word<uint64_t> highest = word(header_->highest_bucket);
    uint64_t mark = highest.load(std::memory_order_seq_cst);
    while (mark < bucket &&
           !highest.compare_exchange_weak(mark, bucket, std::memory_order_seq_cst, std::memory_order_seq_cst)) {
    }
  }

  SegmentHeader* const header_;
};

}  // namespace angle
