// The replay's kernels: rows that are drawn.
#pragma once
#include "cuda/replay_view.inl"

namespace angle::device {

constexpr uint64_t kAttempts = 64, kScan = 2 * kAttempts + 1;  // as core/choose.inl has them

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
    return view.usable(*leaf) ? slot : any_row(view, draw_bits(key, call, kScan, i), total, leaf);
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

}  // namespace angle::device
