// What the replay's kernels share: the segment's parts, weights that change, rows between records and columns. They
// give the same integers, draws and rows as core/ does, by calls that never run side by side. So no word is read while
// somebody changes it but by the adds below, which commute: sums and counts come out the same whatever the order of
// threads.
#pragma once
#include "core/counts.h"
#include "core/layout.h"
#include "core/philox.h"
#include "cuda/arithmetic.h"
#include "cuda/portable.h"
#include "cuda/replay_params.h"

namespace angle::device {

// ---- where things are ----

struct Place {
  uint64_t ticket, slot, lap;
};

// Reads the parts where they are, in the kernel's parameters: a copy would be indexed in local memory.
struct View {
  ANGLE_DEVICE explicit View(const ReplayView& parts_in) : parts(parts_in), code(parts_in.weight_bits) {}

  ANGLE_DEVICE SegmentHeader& header() const { return *reinterpret_cast<SegmentHeader*>(parts.segment); }
  ANGLE_DEVICE uint64_t* leaves() const { return reinterpret_cast<uint64_t*>(parts.segment + parts.leaves_at); }
  ANGLE_DEVICE int64_t* sums(uint32_t level) const {
    return reinterpret_cast<int64_t*>(parts.segment + parts.sums_at[level]);
  }
  ANGLE_DEVICE uint8_t* record(uint64_t slot) const {
    return parts.segment + parts.records_at + slot * parts.record_bytes;
  }
  ANGLE_DEVICE uint64_t* word(uint64_t slot, uint32_t offset) const {
    return reinterpret_cast<uint64_t*>(record(slot) + offset);
  }
  ANGLE_DEVICE uint64_t* stream_tail(uint64_t stream) const {
    return reinterpret_cast<uint64_t*>(parts.segment + parts.streams_at) + stream;
  }
  ANGLE_DEVICE Place place_of(uint64_t ticket) const {
    const uint64_t laps = ticket / parts.capacity;
    return {ticket, ticket - laps * parts.capacity, laps + 1};
  }
  ANGLE_DEVICE uint64_t ticket_of(uint64_t slot, uint64_t lap) const { return (lap - 1) * parts.capacity + slot; }
  ANGLE_DEVICE uint64_t slots_in_use() const {
    const uint64_t issued = header().next_ticket;
    return issued < parts.capacity ? issued : parts.capacity;
  }
  // A row that can be drawn.
  ANGLE_DEVICE bool usable(uint64_t leaf) const { return code.weight(leaf) != 0 && code.is_row(leaf); }
  // Whether a leaf, of the place's slot, is that of the place's row.
  ANGLE_DEVICE bool holds(uint64_t leaf, const Place& at, uint64_t issued_lap) const {
    // Of rows older than this the lap bits alone might have come round to the same value again.
    return at.lap + code.lap_mask / 2 >= issued_lap && code.has_lap(leaf, at.lap) && code.is_row(leaf);
  }
  ANGLE_DEVICE uint64_t weigh(float priority, bool* cut) const {
    const SegmentHeader& h = header();
    const double power = power_of(static_cast<double>(priority) + h.priority_epsilon, as_double(h.exponent));
    return weight_of(power, code.weight_mask, cut);
  }

  const ReplayView& parts;
  const LeafCode code;
};

ANGLE_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

ANGLE_DEVICE double real_at(const uint8_t* values, uint64_t i, FieldReal kind) {
  if (kind == FieldReal::kFloat) return static_cast<double>(reinterpret_cast<const float*>(values)[i]);
  return reinterpret_cast<const double*>(values)[i];
}

// Neither NaN nor infinite.
ANGLE_DEVICE bool is_finite(double value) { return value - value == 0.0; }

ANGLE_DEVICE void tell(ReplayFlags* flags, ReplayFlags::Code code, int64_t index, int64_t integer, double real) {
  if (flags->code != ReplayFlags::kNone) return;
  flags->index = index;
  flags->integer = integer;
  flags->real = real;
  fence_for_host();
  flags->code = code;
}

// ---- weights that change ----

// Rows by weight that a block has gained or lost, as WeightCounts counts them: default weights first, then computed
// ones.
struct CountChanges {
  int32_t by[2 * kBuckets];

  ANGLE_DEVICE void clear(uint32_t thread, uint32_t threads) {
    for (uint32_t place = thread; place < 2 * kBuckets; place += threads) by[place] = 0;
  }
  ANGLE_DEVICE void count(const LeafCode& code, uint64_t leaf, int32_t change) {
    if (code.weight(leaf) == 0) return;
    const size_t kind = code.state(leaf) == LeafCode::kComputed ? kBuckets : 0;
    add(&by[kind + WeightBuckets::of(code.weight(leaf))], change);
  }
  // To the set that all threads share.
  ANGLE_DEVICE void flush(SegmentHeader& h, uint32_t thread, uint32_t threads) {
    uint64_t highest = 0;
    for (uint32_t place = thread; place < 2 * kBuckets; place += threads) {
      if (by[place] == 0) continue;
      add(&h.counts[kCountSets - 1].rows[place], static_cast<int64_t>(by[place]));
      if (by[place] > 0 && place >= kBuckets) highest = place - kBuckets;
    }
    if (highest != 0) raise(&h.highest_bucket, highest);
  }
};

ANGLE_DEVICE int64_t rows_counted(const SegmentHeader& h, bool computed, size_t bucket) {
  int64_t sum = 0;
  for (size_t set = 0; set < kCountSets; ++set) sum += h.counts[set].rows[(computed ? kBuckets : 0) + bucket];
  return sum;
}

// A leaf went from one word to another: the sums above it and the counts follow.
ANGLE_DEVICE void change_weight(const View& view, CountChanges& counts, uint64_t slot, uint64_t old_leaf,
                                uint64_t new_leaf) {
  if (view.header().prioritized == 0) return;
  const int64_t delta =
      static_cast<int64_t>(view.code.weight(new_leaf)) - static_cast<int64_t>(view.code.weight(old_leaf));
  counts.count(view.code, old_leaf, -1);
  counts.count(view.code, new_leaf, +1);
  if (delta == 0) return;
  uint64_t node = slot;
  for (uint32_t level = 0; level < view.parts.levels; ++level) {
    node >>= view.parts.shift[level];
    add(view.sums(level) + node, delta);
  }
}

// ---- rows between records and columns ----

constexpr uint64_t kNowhere = ~0ull;

// `rows` rows of one field between a column, where they begin `pitch` bytes apart, and the records of these slots, by
// all lanes of a warp. A lane has many loads under way before its first store: what they wait for is memory. From a
// record that is nowhere come zeros.
template <class Word, bool kIntoRecords>
ANGLE_DEVICE void move_words(const Warp& warp, const View& view, uint8_t* column, const uint64_t* slots, uint32_t rows,
                             uint32_t offset, uint32_t bytes, uint32_t pitch) {
  constexpr uint32_t kAhead = 8, kWord = static_cast<uint32_t>(sizeof(Word));
  const uint32_t width = bytes / kWord, between = pitch / kWord, total = rows * width;
  Word* const words = reinterpret_cast<Word*>(column);
  const auto in_column = [&](uint32_t at) {
    const uint32_t row = at / width;
    return words + row * between + (at - row * width);
  };
  const auto in_record = [&](uint32_t at) {
    const uint32_t row = at / width;
    return reinterpret_cast<Word*>(view.record(slots[row]) + offset) + (at - row * width);
  };
  warp.each([&](int lane) {
    for (uint32_t first = static_cast<uint32_t>(lane); first < total; first += kLanes * kAhead) {
      Word kept[kAhead];
      ANGLE_UNROLL
      for (uint32_t ahead = 0; ahead < kAhead; ++ahead) {
        const uint32_t at = first + ahead * kLanes;
        if (at >= total) continue;
        if (kIntoRecords) {
          kept[ahead] = *in_column(at);
        } else {
          kept[ahead] = slots[at / width] == kNowhere ? Word{0} : *in_record(at);
        }
      }
      ANGLE_UNROLL
      for (uint32_t ahead = 0; ahead < kAhead; ++ahead) {
        const uint32_t at = first + ahead * kLanes;
        if (at >= total) continue;
        *(kIntoRecords ? in_record(at) : in_column(at)) = kept[ahead];
      }
    }
  });
}

template <bool kIntoRecords>
ANGLE_DEVICE void move_field(const Warp& warp, const View& view, uint8_t* column, const uint64_t* slots, uint32_t rows,
                             uint32_t offset, uint32_t bytes, uint32_t pitch) {
  const uint64_t all = reinterpret_cast<uintptr_t>(column) | offset | bytes | pitch;  // records lie on cache lines
  if (all % 8 == 0) {
    move_words<uint64_t, kIntoRecords>(warp, view, column, slots, rows, offset, bytes, pitch);
  } else if (all % 4 == 0) {
    move_words<uint32_t, kIntoRecords>(warp, view, column, slots, rows, offset, bytes, pitch);
  } else {
    move_words<uint8_t, kIntoRecords>(warp, view, column, slots, rows, offset, bytes, pitch);
  }
}

}  // namespace angle::device
