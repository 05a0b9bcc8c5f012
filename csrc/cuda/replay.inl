// The replay's kernels: the same integers, draws and rows as core/ has them, by calls that never run side by side. So
// no word is read while somebody changes it but by the adds below, which commute: sums and counts come out the same
// whatever the order of threads.
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
  ANGLE_DEVICE bool holds(const Place& at, uint64_t issued_lap) const {
    const uint64_t leaf = leaves()[at.slot];
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

// `rows` rows of one field between a column, where they lie side by side, and the records of these slots, by all lanes
// of a warp. A lane has many loads under way before its first store: what they wait for is memory. From a record that
// is nowhere come zeros.
template <class Word, bool kIntoRecords>
ANGLE_DEVICE void move_words(const Warp& warp, const View& view, uint8_t* column, const uint64_t* slots, uint32_t rows,
                             uint32_t offset, uint32_t bytes) {
  constexpr uint32_t kAhead = 8;
  const uint32_t width = bytes / static_cast<uint32_t>(sizeof(Word)), total = rows * width;
  Word* const words = reinterpret_cast<Word*>(column);
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
          kept[ahead] = words[at];
        } else {
          kept[ahead] = slots[at / width] == kNowhere ? Word{0} : *in_record(at);
        }
      }
      ANGLE_UNROLL
      for (uint32_t ahead = 0; ahead < kAhead; ++ahead) {
        const uint32_t at = first + ahead * kLanes;
        if (at >= total) continue;
        *(kIntoRecords ? in_record(at) : words + at) = kept[ahead];
      }
    }
  });
}

template <bool kIntoRecords>
ANGLE_DEVICE void move_field(const Warp& warp, const View& view, uint8_t* column, const uint64_t* slots, uint32_t rows,
                             uint32_t offset, uint32_t bytes) {
  const uint64_t all = reinterpret_cast<uintptr_t>(column) | offset | bytes;  // records lie on cache lines
  if (all % 8 == 0) {
    move_words<uint64_t, kIntoRecords>(warp, view, column, slots, rows, offset, bytes);
  } else if (all % 4 == 0) {
    move_words<uint32_t, kIntoRecords>(warp, view, column, slots, rows, offset, bytes);
  } else {
    move_words<uint8_t, kIntoRecords>(warp, view, column, slots, rows, offset, bytes);
  }
}

// ---- insert ----

// What new rows weigh, and whether any row has to be refused. One block, before the rows.
struct PrepareInsert {
  using Params = InsertParams;
  static constexpr uint32_t kThreads = 1024;
  struct Shared {
    uint64_t highest, bad_reward, bad_priority, bad_stream;
  };

  ANGLE_DEVICE static void run(Block<Shared>& block, const InsertParams& p) {
    const View view(p.view);
    SegmentHeader& h = view.header();
    Shared& shared = block.shared;
    block.each_thread([&](uint32_t thread) {
      if (thread == 0) shared.highest = shared.bad_reward = shared.bad_priority = shared.bad_stream = 0;
    });
    block.each_thread([&](uint32_t thread) {
      for (size_t bucket = thread; bucket < kBuckets; bucket += block.threads) {
        if (rows_counted(h, true, bucket) > 0) raise(&shared.highest, bucket + 1);
      }
      // n - i, so that the largest belongs to the first bad row.
      for (uint64_t i = thread; i < p.n; i += block.threads) {
        if (p.rewards != nullptr && p.reward != FieldReal::kNone && !is_finite(real_at(p.rewards, i, p.reward))) {
          raise(&shared.bad_reward, p.n - i);
        }
        if (p.priorities != nullptr && !(p.priorities[i] >= 0.0f && is_finite(static_cast<double>(p.priorities[i])))) {
          raise(&shared.bad_priority, p.n - i);
        }
        if (p.streams != nullptr && (p.streams[i] < 0 || p.streams[i] >= static_cast<int64_t>(kStreams))) {
          raise(&shared.bad_stream, p.n - i);
        }
      }
    });
    block.each_thread([&](uint32_t thread) {
      if (thread != 0) return;
      ReplayScratch& scratch = *p.scratch;
      scratch.bad = 1;
      if (shared.bad_stream != 0) {
        const uint64_t i = p.n - shared.bad_stream;
        tell(p.flags, ReplayFlags::kBadStream, static_cast<int64_t>(i), p.streams[i], 0.0);
      } else if (shared.bad_priority != 0) {
        const uint64_t i = p.n - shared.bad_priority;
        tell(p.flags, ReplayFlags::kBadInsertPriority, static_cast<int64_t>(i), 0,
             static_cast<double>(p.priorities[i]));
      } else if (shared.bad_reward != 0) {
        const uint64_t i = p.n - shared.bad_reward;
        tell(p.flags, ReplayFlags::kBadReward, static_cast<int64_t>(i), 0, real_at(p.rewards, i, p.reward));
      } else {
        scratch.bad = 0;
      }
      if (h.prioritized == 0) {
        scratch.default_priority = 1.0f;
        scratch.default_weight = 1;
        return;
      }
      float priority = static_cast<float>(h.default_priority);
      if (h.default_kind == static_cast<uint64_t>(DefaultPriority::kLiveMaximum)) {
        priority = shared.highest == 0 ? 1.0f : scratch.bucket_priority[shared.highest - 1];
        h.highest_bucket = shared.highest == 0 ? 0 : shared.highest - 1;
      } else if (h.default_kind == static_cast<uint64_t>(DefaultPriority::kHistoricMaximum)) {
        const uint32_t bits = static_cast<uint32_t>(h.historic_maximum);
        if (bits == 0) {
          priority = 1.0f;
        } else {
          memcpy(&priority, &bits, sizeof bits);
        }
      }
      bool cut = false;
      scratch.default_priority = priority;
      scratch.default_weight = view.weigh(priority, &cut);
    });
  }
};

// The rows: each lane sees to one row's header, leaf and links, then the warp moves the fields of all of them.
struct InsertRowsKernel {
  using Params = InsertParams;
  static constexpr uint32_t kThreads = 256, kWarps = kThreads / kLanes;
  struct Shared {
    CountChanges counts;
    uint64_t largest, saturated, nan_rows;
    uint64_t slots[kWarps][kLanes];
    uint32_t nan[kWarps][kLanes];  // whether an observation of the warp's row holds a NaN
  };

  ANGLE_DEVICE static void run(Block<Shared>& block, const InsertParams& p) {
    const View view(p.view);
    SegmentHeader& h = view.header();
    Shared& shared = block.shared;
    if (p.scratch->bad != 0) {
      // The tickets are given up, as those of slots that are being written are: whatever was there stays.
      block.each_thread([&](uint32_t thread) {
        if (thread != 0 || block.index != 0) return;
        h.next_ticket = p.first_ticket + p.n;
        h.busy_slots += p.n;
      });
      return;
    }
    block.each_thread([&](uint32_t thread) {
      shared.counts.clear(thread, block.threads);
      if (thread == 0) shared.largest = shared.saturated = shared.nan_rows = 0;
    });
    block.each_warp([&](const Warp& warp) {
      const uint64_t base = (uint64_t{block.index} * kWarps + warp.index) * p.rows_per_warp;
      if (base >= p.n) return;
      const uint32_t rows = static_cast<uint32_t>(p.n - base < p.rows_per_warp ? p.n - base : p.rows_per_warp);
      uint64_t* const slots = shared.slots[warp.index];
      uint32_t* const nan = shared.nan[warp.index];
      warp.each([&](int lane) {
        nan[lane] = 0;
        if (static_cast<uint32_t>(lane) < rows) {
          slots[lane] = write_header(view, p, shared, base + static_cast<uint64_t>(lane));
        }
      });
      for (uint32_t f = 0; f < p.field_count; ++f) {
        const FieldIn& field = p.fields[f];
        uint8_t* const column = const_cast<uint8_t*>(field.rows) + base * field.bytes;
        move_field<true>(warp, view, column, slots, rows, field.offset, field.bytes);
        if (field.looked_at == FieldReal::kNone) continue;
        const uint32_t width = field.bytes / (field.looked_at == FieldReal::kFloat ? 4 : 8);
        warp.each([&](int lane) {
          for (uint32_t at = static_cast<uint32_t>(lane); at < rows * width; at += kLanes) {
            const double value = real_at(column, at, field.looked_at);
            if (value != value) nan[at / width] = 1;
          }
        });
      }
      warp.each([&](int lane) {
        if (nan[lane] != 0) add(&shared.nan_rows, uint64_t{1});
      });
    });
    block.each_thread([&](uint32_t thread) {
      shared.counts.flush(h, thread, block.threads);
      if (thread != 0) return;
      if (shared.saturated != 0) add(&h.saturated_weights, shared.saturated);
      if (shared.nan_rows != 0) add(&h.nan_observations, shared.nan_rows);
      if (p.priorities != nullptr) raise(&h.historic_maximum, shared.largest);
      if (block.index != 0) return;
      h.next_ticket = p.first_ticket + p.n;
      add(&h.inserts, p.n);
    });
  }

  // All of row i but its fields; its slot.
  ANGLE_DEVICE static uint64_t write_header(const View& view, const InsertParams& p, Shared& shared, uint64_t i) {
    const Place at = view.place_of(p.first_ticket + i);
    const uint64_t stream = p.streams == nullptr ? 0 : static_cast<uint64_t>(p.streams[i]);
    const uint64_t flags = RecordHead::kRow | (p.terminated[i] != 0 ? RecordHead::kTerminated : 0) |
                           (p.truncated != nullptr && p.truncated[i] != 0 ? RecordHead::kTruncated : 0);
    float priority = p.scratch->default_priority;
    uint64_t weight = p.scratch->default_weight;
    const bool graded = p.priorities != nullptr && view.header().prioritized != 0;
    if (graded) {
      bool cut = false;
      priority = p.priorities[i];
      weight = view.weigh(priority, &cut);
      if (cut) add(&shared.saturated, uint64_t{1});
    }
    if (p.priorities != nullptr) raise(&shared.largest, uint64_t{bits_of(p.priorities[i])});
    // The stream's next row of this call; the one behind the call's last is linked to when it comes.
    const int64_t last = static_cast<int64_t>(p.n) - 1;
    const int64_t own = static_cast<int64_t>(i);
    const int64_t next = p.streams == nullptr ? (own == last ? -1 : own + 1) : p.next[i];
    *view.word(at.slot, RecordLayout::kHead) = RecordHead::of(at.lap, stream, flags);
    *view.word(at.slot, RecordLayout::kNext) = next < 0 ? at.ticket : p.first_ticket + static_cast<uint64_t>(next);
    *view.word(at.slot, RecordLayout::kPriority) = RecordPriority::of(priority, at.lap);
    const uint64_t old_leaf = view.leaves()[at.slot];
    const uint64_t leaf = view.code.make(at.lap, graded ? LeafCode::kComputed : LeafCode::kDefault, weight);
    view.leaves()[at.slot] = leaf;
    change_weight(view, shared.counts, at.slot, old_leaf, leaf);
    // The stream's first row of this call links its newest row of an earlier one, and moves the stream's end.
    const int64_t end = p.streams == nullptr ? (own == 0 ? last : -1) : p.last[i];
    if (end >= 0) {
      uint64_t* const tail = view.stream_tail(stream);
      if (*tail != 0 && *tail - 1 + view.parts.capacity >= p.first_ticket + p.n) {  // not overwritten by this very call
        const Place before = view.place_of(*tail - 1);
        // Of a record that is gone, what took its place links to a ticket of its own.
        swap_if(view.word(before.slot, RecordLayout::kNext), before.ticket, at.ticket);
      }
      *tail = p.first_ticket + static_cast<uint64_t>(end) + 1;
    }
    return at.slot;
  }
};

// ---- sample ----

constexpr uint64_t kAttempts = 64;  // as core/choose.inl has it, after which rows are counted

// Bits of draw i's attempt; attempt 0 is the batch's own.
ANGLE_DEVICE uint64_t draw_bits(uint64_t key, uint64_t call, uint64_t attempt, uint64_t i) {
  const PhiloxBlock block = philox(key, call, (kSample | attempt << 8) + (i / 2 << 32));
  return i % 2 == 0 ? block.low() : block.high();
}

// Draw i's place in [0, total), as ReplayT::target_of has it; total * i / n without 128 bits.
ANGLE_DEVICE uint64_t target_of(uint64_t bits, uint64_t total, bool stratified, uint64_t i, uint64_t n) {
  const uint64_t within = static_cast<uint64_t>((static_cast<unsigned __int128>(bits) * total) >> 64);
  if (!stratified) return within;
  const uint64_t whole = total / n, rest = total % n;  // rest * i < 2**62
  return whole * i + rest * i / n + (rest * i % n + within) / n;
}

// Which of a node's children holds the target, which becomes what is left within that child.
template <class Value>
ANGLE_DEVICE uint32_t child_of(const Value* children, uint32_t fan, uint64_t mask, int64_t* target) {
  uint32_t found = fan;
  int64_t left = *target;
  for (uint32_t child = 0; child < fan; ++child) {
    const int64_t share = static_cast<int64_t>(static_cast<uint64_t>(children[child]) & mask);
    if (found == fan) {
      if (left < share) {
        found = child;
      } else {
        left -= share > 0 ? share : 0;
      }
    }
  }
  *target = left;
  return found;
}

struct SampleRows {
  using Params = SampleParams;
  static constexpr uint32_t kThreads = 256, kWarps = kThreads / kLanes;
  static constexpr uint64_t kAtOnce =
      4096;  // batches up to this are weighed by the last block, without a second launch
  static constexpr uint32_t kGroups = TreeShape::kMaxTop >> TreeShape::kTopShift;
  struct Shared {
    int64_t prefix[kGroups];  // running sums of the top's groups
    int64_t parts[kThreads];  // sums of each thread's groups, then what is before them
    uint64_t ages, lowest;
    uint32_t last;
    uint64_t slots[kWarps][kLanes], ends[kWarps][kLanes];  // of each draw its row and its window's last
  };
  static_assert(kGroups % kThreads == 0);

  ANGLE_DEVICE static void run(Block<Shared>& block, const SampleParams& p) {
    const View view(p.view);
    SegmentHeader& h = view.header();
    Shared& shared = block.shared;
    const bool prioritized = h.prioritized != 0;
    const uint32_t groups =
        static_cast<uint32_t>((view.parts.top_nodes + (1u << TreeShape::kTopShift) - 1) >> TreeShape::kTopShift);
    if (prioritized) add_up_top(block, view, groups);
    block.each_thread([&](uint32_t thread) {
      if (thread != 0) return;
      shared.ages = 0;
      shared.lowest = ~0ull;
    });
    const uint64_t total = prioritized ? static_cast<uint64_t>(shared.prefix[groups - 1]) : view.slots_in_use();
    const double discount = p.live == nullptr ? p.discount : p.live[0];

    block.each_warp([&](const Warp& warp) {
      const uint64_t base = (uint64_t{block.index} * kWarps + warp.index) * p.draws_per_warp;
      if (base >= p.n) return;
      const uint32_t draws = static_cast<uint32_t>(p.n - base < p.draws_per_warp ? p.n - base : p.draws_per_warp);
      uint64_t *const slots = shared.slots[warp.index], *const ends = shared.ends[warp.index];
      Lanes<uint64_t> weights, ages;
      warp.each([&](int lane) {
        weights[lane] = ~0ull;
        ages[lane] = 0;
        if (static_cast<uint32_t>(lane) >= draws) return;
        const uint64_t i = base + static_cast<uint64_t>(lane);
        uint64_t leaf = 0;
        const uint64_t slot = choose(view, p, shared.prefix, groups, total, i, &leaf);
        slots[lane] = ends[lane] = slot;
        if (slot == kNowhere) {
          tell(p.flags, ReplayFlags::kNothingToSample, 0, 0, 0.0);
          p.handles[i] = -1;
          p.discounts[i] = 0.0f;
          p.steps[i] = 0;
          p.drawn[i] = 1;
          return;
        }
        weights[lane] = view.code.weight(leaf);
        p.drawn[i] = weights[lane];
        const uint64_t lap = RecordHead::lap(*view.word(slot, RecordLayout::kHead));
        const Place at{view.ticket_of(slot, lap), slot, lap};
        p.handles[i] = static_cast<int64_t>(at.ticket);
        ages[lane] = h.next_ticket - at.ticket;
        ends[lane] = walk_window(view, p, at, discount, i);
      });
      const uint64_t smallest = warp.least(weights), age = warp.sum(ages);
      warp.each([&](int lane) {
        if (lane != 0) return;
        lower(&p.scratch->smallest, smallest);
        add(&shared.ages, age);
      });
      for (uint32_t f = 0; f < p.field_count; ++f) {
        const FieldOut& field = p.fields[f];
        move_field<false>(warp, view, field.rows + base * field.bytes, field.successor != 0 ? ends : slots, draws,
                          field.offset, field.bytes);
      }
    });

    // The last block to come here finishes the batch.
    block.each_thread([&](uint32_t thread) {
      if (thread != 0) return;
      if ((p.how & SampleParams::kKeyed) == 0) add(&h.ages, shared.ages);
      fence();
      shared.last = add_and_tell(&p.scratch->finished, 1) + 1 == block.blocks;
      fence();
    });
    if (shared.last == 0) return;
    if ((p.how & SampleParams::kBoundByBuffer) != 0) {
      block.each_thread([&](uint32_t thread) {
        for (size_t bucket = thread; bucket < kBuckets; bucket += block.threads) {
          if (rows_counted(h, false, bucket) > 0 || rows_counted(h, true, bucket) > 0) {
            lower(&shared.lowest, WeightBuckets::lower_edge(bucket));
          }
        }
      });
    }
    block.each_thread([&](uint32_t thread) {
      if (thread != 0) return;
      const uint64_t smallest = fresh(&p.scratch->smallest);
      p.scratch->least = shared.lowest < smallest ? shared.lowest : smallest;
      p.scratch->smallest = ~0ull;
      p.scratch->finished = 0;
      if (total == 0 || (p.how & SampleParams::kKeyed) != 0) return;
      ++h.sample_calls;
      h.samples += p.n;
    });
    if (p.n > kAtOnce) return;
    block.each_thread([&](uint32_t thread) {
      for (uint64_t i = thread; i < p.n; i += block.threads) weigh(view, p, i);
    });
  }

  // Running sums of the top's groups, in shared.prefix.
  ANGLE_DEVICE static void add_up_top(Block<Shared>& block, const View& view, uint32_t groups) {
    Shared& shared = block.shared;
    constexpr uint32_t kEach = kGroups / kThreads, kFan = 1u << TreeShape::kTopShift;
    const int64_t* const top = view.sums(view.parts.levels - 1);
    block.each_thread([&](uint32_t thread) {
      for (uint32_t group = thread; group < kGroups; group += block.threads) {
        int64_t sum = 0;
        for (uint32_t node = 0; group < groups && node < kFan; ++node) sum += top[group * kFan + node];
        shared.prefix[group] = sum > 0 ? sum : 0;
      }
    });
    block.each_thread([&](uint32_t thread) {
      int64_t sum = 0;
      for (uint32_t group = thread * kEach; group < (thread + 1) * kEach; ++group) {
        sum += shared.prefix[group];
        shared.prefix[group] = sum;
      }
      shared.parts[thread] = sum;
    });
    block.each_warp([&](const Warp& warp) {
      if (warp.index != 0) return;
      int64_t before = 0;
      for (uint32_t first = 0; first < kThreads; first += kLanes) {
        Lanes<int64_t> sums;
        warp.each([&](int lane) { sums[lane] = shared.parts[first + static_cast<uint32_t>(lane)]; });
        const Lanes<int64_t> running = warp.scan(sums);
        const int64_t own = warp.broadcast(running, kLanes - 1);
        warp.each(
            [&](int lane) { shared.parts[first + static_cast<uint32_t>(lane)] = before + running[lane] - sums[lane]; });
        before += own;
      }
    });
    block.each_thread([&](uint32_t thread) {
      for (uint32_t group = thread * kEach; group < (thread + 1) * kEach; ++group) {
        shared.prefix[group] += shared.parts[thread];
      }
    });
  }

  // The slot of draw i and its leaf; kNowhere where there is no row to draw.
  ANGLE_DEVICE static uint64_t choose(const View& view, const SampleParams& p, const int64_t* prefix, uint32_t groups,
                                      uint64_t total, uint64_t i, uint64_t* leaf) {
    if (total == 0) return kNowhere;
    SegmentHeader& h = view.header();
    const bool keyed = (p.how & SampleParams::kKeyed) != 0, stratified = (p.how & SampleParams::kStratified) != 0;
    const uint64_t key = keyed ? p.key : h.seed, call = keyed ? 0 : h.sample_calls;
    const uint64_t place = target_of(draw_bits(key, call, 0, i), total, stratified, i, p.n);
    if (h.prioritized != 0) return descend(view, prefix, groups, static_cast<int64_t>(place), leaf);
    uint64_t slot = place;
    for (uint64_t attempt = 1; attempt <= kAttempts; ++attempt) {
      *leaf = view.leaves()[slot];
      if (view.usable(*leaf)) return slot;
      // From all slots, not from the stratum: else the rows beside one that holds none would get its share.
      add(&h.retries, uint64_t{1});
      slot = target_of(draw_bits(key, call, attempt, i), total, false, i, p.n);
    }
    *leaf = view.leaves()[slot];
    return view.usable(*leaf) ? slot : any_row(view, draw_bits(key, call, kAttempts + 1, i), total, leaf);
  }

  // One of the rows among so many slots, all of the same chance. Where nearly all were removed.
  ANGLE_DEVICE static uint64_t any_row(const View& view, uint64_t bits, uint64_t slots, uint64_t* leaf) {
    uint64_t rows = 0;
    for (uint64_t slot = 0; slot < slots; ++slot) rows += view.usable(view.leaves()[slot]);
    if (rows == 0) return kNowhere;
    uint64_t left = target_of(bits, rows, false, 0, 1);
    for (uint64_t slot = 0; slot < slots; ++slot) {
      *leaf = view.leaves()[slot];
      if (view.usable(*leaf) && left-- == 0) return slot;
    }
    return kNowhere;
  }

  ANGLE_DEVICE static uint64_t descend(const View& view, const int64_t* prefix, uint32_t groups, int64_t target,
                                       uint64_t* leaf) {
    uint32_t low = 0;  // how many running sums are <= target
    for (uint32_t span = groups; span > 0;) {
      const uint32_t half = span / 2;
      if (prefix[low + half] <= target) {
        low += half + 1;
        span -= half + 1;
      } else {
        span = half;
      }
    }
    if (low == groups) return kNowhere;
    if (low > 0) target -= prefix[low - 1];
    uint64_t node = low;
    uint32_t fan = 1u << TreeShape::kTopShift;
    for (uint32_t level = view.parts.levels; level-- > 0;) {
      const uint32_t child = child_of(view.sums(level) + node * fan, fan, ~0ull, &target);
      if (child == fan) return kNowhere;
      node = node * fan + child;
      fan = 1u << view.parts.shift[level];
    }
    const uint64_t* const leaves = view.leaves() + node * fan;
    const uint32_t child = child_of(leaves, fan, view.code.weight_mask, &target);
    if (child == fan) return kNowhere;
    *leaf = leaves[child];
    return node * fan + child;
  }

  // Sums the rewards of up to n_step rows of the stream, writes what follows from that, and returns the slot of the
  // last.
  ANGLE_DEVICE static uint64_t walk_window(const View& view, const SampleParams& p, Place at, double discount,
                                           uint64_t i) {
    uint64_t head = *view.word(at.slot, RecordLayout::kHead);
    int64_t steps = 1;
    double factor = discount;
    if (p.n_step > 1) {
      double sum = reward_at(view, p, at.slot);
      for (; steps < static_cast<int64_t>(p.n_step); ++steps) {
        const uint64_t next = *view.word(at.slot, RecordLayout::kNext);
        if (RecordHead::has(head, RecordHead::kTerminated | RecordHead::kTruncated) || next == at.ticket) break;
        const Place then = view.place_of(next);
        if (!view.code.has_lap(view.leaves()[then.slot], then.lap)) break;
        at = then;
        head = *view.word(at.slot, RecordLayout::kHead);
        sum += factor * reward_at(view, p, at.slot);
        factor *= discount;
      }
      if (p.reward == FieldReal::kFloat) {
        reinterpret_cast<float*>(p.rewards)[i] = static_cast<float>(sum);
      } else {
        reinterpret_cast<double*>(p.rewards)[i] = sum;
      }
    }
    p.steps[i] = steps;
    p.discounts[i] = RecordHead::has(head, RecordHead::kTerminated) ? 0.0f : static_cast<float>(factor);
    return at.slot;
  }

  ANGLE_DEVICE static double reward_at(const View& view, const SampleParams& p, uint64_t slot) {
    return real_at(view.record(slot) + p.reward_offset, 0, p.reward);
  }

  // (N P)^-b over the largest of the batch, or of the buffer: the smallest weight over each, to the power of b.
  ANGLE_DEVICE static void weigh(const View& view, const SampleParams& p, uint64_t i) {
    const double exponent = p.live == nullptr ? p.importance_exponent : p.live[1];
    const double least = static_cast<double>(p.scratch->least);
    const bool all_one = view.header().prioritized == 0 || exponent == 0.0;
    p.importance_weights[i] =
        all_one ? 1.0f : static_cast<float>(power_of(least / static_cast<double>(p.drawn[i]), exponent));
  }
};

// The importance weights of a batch that is too large for the last block alone.
struct WeighSample {
  using Params = SampleParams;
  static constexpr uint32_t kThreads = 256;
  struct Shared {};

  ANGLE_DEVICE static void run(Block<Shared>& block, const SampleParams& p) {
    const View view(p.view);
    block.each_thread([&](uint32_t thread) {
      const uint64_t i = uint64_t{block.index} * block.threads + thread;
      if (i < p.n) SampleRows::weigh(view, p, i);
    });
  }
};

// ---- update ----

// Which of equal handles comes last: a table from slots to the last index that named them. Open addressing; an entry is
// (slot + 1) << 24 | index, and only its index ever grows.
struct Claims {
  uint64_t* entries;
  uint64_t mask;

  ANGLE_DEVICE uint64_t first_of(uint64_t slot) const { return (slot * 0x9E3779B97F4A7C15ull) >> 32 & mask; }
  ANGLE_DEVICE void claim(uint64_t slot, uint64_t i) {
    const uint64_t own = (slot + 1) << 24 | i;
    for (uint64_t at = first_of(slot);; at = (at + 1) & mask) {
      const uint64_t found = swap_if(&entries[at], 0, own);
      if (found == 0) return;
      if (found >> 24 == slot + 1) {
        raise(&entries[at], own);
        return;
      }
    }
  }
  ANGLE_DEVICE bool is_last(uint64_t slot, uint64_t i) const {
    uint64_t at = first_of(slot);
    while (entries[at] >> 24 != slot + 1) at = (at + 1) & mask;
    return entries[at] == ((slot + 1) << 24 | i);
  }
};

// n - i of the first td error and of the first handle that are refused; 0: none.
struct FirstBad {
  uint64_t td_error, handle;
};

ANGLE_DEVICE double td_error_at(const UpdateParams& p, uint64_t i) {
  return p.is_double != 0 ? static_cast<const double*>(p.td_errors)[i]
                          : static_cast<double>(static_cast<const float*>(p.td_errors)[i]);
}

// PriorityMap::narrow.
ANGLE_DEVICE float narrow(double td_error) {
  constexpr double kLargest = 0x1.fffffep+127;
  if (td_error >= kLargest) return static_cast<float>(kLargest);
  const float nearest = static_cast<float>(td_error);
  return nearest == 0.0f && td_error > 0.0 ? 0x1p-149f : nearest;
}

// What stands against handle and td error i; if nothing, and the row still lives, it claims the row's slot.
ANGLE_DEVICE void claim_one(const View& view, const UpdateParams& p, Claims claims, FirstBad* bad, uint64_t i) {
  const double td_error = td_error_at(p, i);
  if (!(td_error >= 0.0 && is_finite(td_error))) raise(&bad->td_error, p.n - i);
  const uint64_t issued = view.header().next_ticket;
  if (p.handles[i] < 0 || static_cast<uint64_t>(p.handles[i]) >= issued) {
    raise(&bad->handle, p.n - i);
    return;
  }
  const Place at = view.place_of(static_cast<uint64_t>(p.handles[i]));
  if (view.holds(at, view.place_of(issued).lap)) claims.claim(at.slot, i);
}

struct UpdateShared {
  CountChanges counts;
  uint64_t largest, saturated, refused;

  ANGLE_DEVICE void clear(uint32_t thread, uint32_t threads) {
    counts.clear(thread, threads);
    if (thread == 0) largest = saturated = refused = 0;
  }
};

ANGLE_DEVICE void update_one(const View& view, const UpdateParams& p, Claims claims, UpdateShared& shared, uint64_t i) {
  const float priority = narrow(td_error_at(p, i));
  bool cut = false;
  const uint64_t weight = view.weigh(priority, &cut);
  if (cut) add(&shared.saturated, uint64_t{1});
  raise(&shared.largest, uint64_t{bits_of(priority)});
  const Place at = view.place_of(static_cast<uint64_t>(p.handles[i]));
  // The same for all threads of the call, as laps do not change and rows stay rows.
  if (!view.holds(at, view.place_of(view.header().next_ticket).lap)) {
    add(&shared.refused, uint64_t{1});
    return;
  }
  if (!claims.is_last(at.slot, i)) return;
  const uint64_t old_leaf = view.leaves()[at.slot];
  const uint64_t leaf = view.code.make(at.lap, LeafCode::kComputed, weight);
  *view.word(at.slot, RecordLayout::kPriority) = RecordPriority::of(priority, at.lap);
  view.leaves()[at.slot] = leaf;
  change_weight(view, shared.counts, at.slot, old_leaf, leaf);
}

ANGLE_DEVICE bool is_left_out(const UpdateParams& p) { return p.where != nullptr && *p.where == 0; }

// Tells what was bad, if anything was: nothing of the call is applied then.
ANGLE_DEVICE bool is_refused(const UpdateParams& p, const FirstBad& bad, bool tells) {
  if (is_left_out(p)) return true;
  if (bad.td_error == 0 && bad.handle == 0) return false;
  if (!tells) return true;
  const uint64_t i = p.n - (bad.td_error != 0 ? bad.td_error : bad.handle);
  tell(p.flags, bad.td_error != 0 ? ReplayFlags::kBadPriority : ReplayFlags::kUnknownHandle, static_cast<int64_t>(i),
       p.handles[i], td_error_at(p, i));
  return true;
}

// A block's share of the counters; `rows` handles were its.
ANGLE_DEVICE void count_update(const View& view, const UpdateParams& p, const UpdateShared& shared, uint64_t rows) {
  SegmentHeader& h = view.header();
  raise(&h.historic_maximum, shared.largest);
  if (shared.saturated != 0) add(&h.saturated_weights, shared.saturated);
  if (shared.refused != 0) {
    add(&h.refused_updates, shared.refused);
    add(p.refused, static_cast<int64_t>(shared.refused));
  }
  add(&h.updates, rows - shared.refused);
}

// Few handles: everything in one block.
struct UpdateFew {
  using Params = UpdateParams;
  static constexpr uint32_t kThreads = 512;
  struct Shared {
    UpdateShared update;
    FirstBad bad;
    uint64_t entries[2 * kFewHandles];
  };

  ANGLE_DEVICE static void run(Block<Shared>& block, const UpdateParams& p) {
    const View view(p.view);
    Shared& shared = block.shared;
    const Claims claims{shared.entries, 2 * kFewHandles - 1};
    block.each_thread([&](uint32_t thread) {
      shared.update.clear(thread, block.threads);
      for (uint64_t at = thread; at < 2 * kFewHandles; at += block.threads) shared.entries[at] = 0;
      if (thread == 0) shared.bad = {0, 0};
    });
    block.each_thread([&](uint32_t thread) {
      if (is_left_out(p)) return;
      for (uint64_t i = thread; i < p.n; i += block.threads) claim_one(view, p, claims, &shared.bad, i);
    });
    block.each_thread([&](uint32_t thread) {
      if (is_refused(p, shared.bad, thread == 0)) return;
      for (uint64_t i = thread; i < p.n; i += block.threads) update_one(view, p, claims, shared.update, i);
    });
    block.each_thread([&](uint32_t thread) {
      if (is_refused(p, shared.bad, false)) return;
      shared.update.counts.flush(view.header(), thread, block.threads);
      if (thread == 0) count_update(view, p, shared.update, p.n);
    });
  }
};

// Many handles: first all claims, then, in a launch of its own, all updates. p.claims begins with the FirstBad.
struct ClaimMany {
  using Params = UpdateParams;
  static constexpr uint32_t kThreads = 256;
  struct Shared {};

  ANGLE_DEVICE static void run(Block<Shared>& block, const UpdateParams& p) {
    const View view(p.view);
    const Claims claims{p.claims + 2, p.claim_count - 1};
    block.each_thread([&](uint32_t thread) {
      const uint64_t i = uint64_t{block.index} * block.threads + thread;
      if (i < p.n && !is_left_out(p)) claim_one(view, p, claims, reinterpret_cast<FirstBad*>(p.claims), i);
    });
  }
};

struct UpdateMany {
  using Params = UpdateParams;
  static constexpr uint32_t kThreads = 256;
  static constexpr uint64_t kRows = 1024;  // of a block, so that clearing its counts does not take longer than they do
  using Shared = UpdateShared;

  ANGLE_DEVICE static void run(Block<Shared>& block, const UpdateParams& p) {
    const View view(p.view);
    Shared& shared = block.shared;
    const Claims claims{p.claims + 2, p.claim_count - 1};
    const FirstBad& bad = *reinterpret_cast<const FirstBad*>(p.claims);
    const uint64_t first = block.index * kRows, end = first + kRows < p.n ? first + kRows : p.n;
    block.each_thread([&](uint32_t thread) {
      if (!is_refused(p, bad, block.index == 0 && thread == 0)) shared.clear(thread, block.threads);
    });
    if (is_refused(p, bad, false)) return;
    block.each_thread([&](uint32_t thread) {
      for (uint64_t i = first + thread; i < end; i += block.threads) update_one(view, p, claims, shared, i);
    });
    block.each_thread([&](uint32_t thread) {
      shared.counts.flush(view.header(), thread, block.threads);
      if (thread == 0) count_update(view, p, shared, end - first);
    });
  }
};

// ---- rare calls ----

// Takes rows out of the draws. One block.
struct RemoveRows {
  using Params = RemoveParams;
  static constexpr uint32_t kThreads = 512;
  struct Shared {
    CountChanges counts;
    uint64_t bad, refused;
  };

  ANGLE_DEVICE static void run(Block<Shared>& block, const RemoveParams& p) {
    const View view(p.view);
    SegmentHeader& h = view.header();
    Shared& shared = block.shared;
    block.each_thread([&](uint32_t thread) {
      shared.counts.clear(thread, block.threads);
      if (thread == 0) shared.bad = shared.refused = 0;
    });
    block.each_thread([&](uint32_t thread) {
      for (uint64_t i = thread; i < p.n; i += block.threads) {
        if (p.handles[i] < 0 || static_cast<uint64_t>(p.handles[i]) >= h.next_ticket) raise(&shared.bad, p.n - i);
      }
    });
    block.each_thread([&](uint32_t thread) {
      if (shared.bad != 0) {
        const uint64_t i = p.n - shared.bad;
        if (thread == 0) tell(p.flags, ReplayFlags::kUnknownHandle, static_cast<int64_t>(i), p.handles[i], 0.0);
        return;
      }
      const uint64_t issued_lap = view.place_of(h.next_ticket).lap;
      for (uint64_t i = thread; i < p.n; i += block.threads) {
        const Place at = view.place_of(static_cast<uint64_t>(p.handles[i]));
        const uint64_t leaf = view.leaves()[at.slot], held = view.code.make(at.lap, LeafCode::kHeld, 0);
        // Of equal handles one takes the row out, and the others find it gone.
        if (!view.holds(at, issued_lap) || swap_if(&view.leaves()[at.slot], leaf, held) != leaf) {
          add(&shared.refused, uint64_t{1});
          continue;
        }
        change_weight(view, shared.counts, at.slot, leaf, held);
      }
    });
    block.each_thread([&](uint32_t thread) {
      if (shared.bad != 0) return;
      shared.counts.flush(h, thread, block.threads);
      if (thread != 0) return;
      h.removed += p.n - shared.refused;
      h.refused_updates += shared.refused;
      *p.refused = static_cast<int64_t>(shared.refused);
    });
  }
};

// Weighs every row anew by its kept priority, after the exponent was changed.
struct ReweighRows {
  using Params = ReweighParams;
  static constexpr uint32_t kThreads = 256;
  static constexpr uint64_t kRows = 4096;  // of a block
  struct Shared {
    CountChanges counts;
  };

  ANGLE_DEVICE static void run(Block<Shared>& block, const ReweighParams& p) {
    const View view(p.view);
    Shared& shared = block.shared;
    const uint64_t first = block.index * kRows;
    const uint64_t end = first + kRows < view.parts.capacity ? first + kRows : view.parts.capacity;
    block.each_thread([&](uint32_t thread) { shared.counts.clear(thread, block.threads); });
    block.each_thread([&](uint32_t thread) {
      for (uint64_t slot = first + thread; slot < end; slot += block.threads) {
        const uint64_t leaf = view.leaves()[slot];
        if (view.code.lap(leaf) == 0 || !view.code.is_row(leaf)) continue;
        bool cut = false;
        const uint64_t weight = view.weigh(RecordPriority::value(*view.word(slot, RecordLayout::kPriority)), &cut);
        const uint64_t next = view.code.make(view.code.lap(leaf), view.code.state(leaf), weight);
        view.leaves()[slot] = next;
        change_weight(view, shared.counts, slot, leaf, next);
      }
    });
    block.each_thread([&](uint32_t thread) { shared.counts.flush(view.header(), thread, block.threads); });
  }
};

}  // namespace angle::device
