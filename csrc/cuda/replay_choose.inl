// The replay's kernels: which row a draw comes to.
#pragma once
#include "cuda/replay_view.inl"

namespace angle::device {

constexpr uint64_t kAttempts = 64, kScan = 2 * kAttempts + 1;  // as core/choose.inl has them
constexpr uint32_t kTopGroups = TreeShape::kMaxTop >> TreeShape::kTopShift;

ANGLE_DEVICE bool is_left_out(const SampleParams& p) { return p.where != nullptr && *p.where == 0; }

// What a batch's random bits come from.
struct DrawBits {
  ANGLE_DEVICE DrawBits(const View& view, const SampleParams& p) {
    const bool keyed = (p.how & SampleParams::kKeyed) != 0;
    key = keyed ? p.key : view.header().seed;
    call = keyed ? 0 : view.header().sample_calls;
  }
  // Those of draw i's attempt; attempt 0 is the batch's own.
  ANGLE_DEVICE uint64_t of(uint64_t attempt, uint64_t i) const {
    const PhiloxBlock block = philox(key, call, (kSample | attempt << 8) + (i / 2 << 32));
    return i % 2 == 0 ? block.low() : block.high();
  }

  uint64_t key, call;
};

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

// The top's groups of nodes, as each block adds them up itself.
template <uint32_t kThreads>
struct TopSums {
  static_assert(kTopGroups % kThreads == 0);
  int64_t prefix[kTopGroups];  // their running sums
  int64_t parts[kThreads];     // sums of each thread's groups, then what is before them
};

ANGLE_DEVICE uint32_t top_groups(const View& view) {
  return static_cast<uint32_t>((view.parts.top_nodes + (1u << TreeShape::kTopShift) - 1) >> TreeShape::kTopShift);
}

template <uint32_t kThreads, class Shared>
ANGLE_DEVICE void add_up_top(Block<Shared>& block, TopSums<kThreads>& top, const View& view) {
  constexpr uint32_t kEach = kTopGroups / kThreads, kFan = 1u << TreeShape::kTopShift;
  const uint32_t groups = top_groups(view);
  const int64_t* const nodes = view.sums(view.parts.levels - 1);
  block.each_thread([&](uint32_t thread) {
    for (uint32_t group = thread; group < kTopGroups; group += block.threads) {
      int64_t sum = 0;
      for (uint32_t node = 0; group < groups && node < kFan; ++node) sum += nodes[group * kFan + node];
      top.prefix[group] = sum > 0 ? sum : 0;
    }
  });
  block.each_thread([&](uint32_t thread) {
    int64_t sum = 0;
    for (uint32_t group = thread * kEach; group < (thread + 1) * kEach; ++group) {
      sum += top.prefix[group];
      top.prefix[group] = sum;
    }
    top.parts[thread] = sum;
  });
  block.each_warp([&](const Warp& warp) {
    if (warp.index != 0) return;
    int64_t before = 0;
    for (uint32_t first = 0; first < kThreads; first += kLanes) {
      Lanes<int64_t> sums;
      warp.each([&](int lane) { sums[lane] = top.parts[first + static_cast<uint32_t>(lane)]; });
      const Lanes<int64_t> running = warp.scan(sums);
      const int64_t own = warp.broadcast(running, kLanes - 1);
      warp.each(
          [&](int lane) { top.parts[first + static_cast<uint32_t>(lane)] = before + running[lane] - sums[lane]; });
      before += own;
    }
  });
  block.each_thread([&](uint32_t thread) {
    for (uint32_t group = thread * kEach; group < (thread + 1) * kEach; ++group) {
      top.prefix[group] += top.parts[thread];
    }
  });
}

// What there is to draw from: weight, or slots.
template <uint32_t kThreads>
ANGLE_DEVICE uint64_t total_of(const View& view, const TopSums<kThreads>& top) {
  return view.header().prioritized != 0 ? static_cast<uint64_t>(top.prefix[top_groups(view) - 1]) : view.slots_in_use();
}

// One of the rows among so many slots, all of the same chance. Where nearly all were removed.
ANGLE_DEVICE uint64_t any_row(const View& view, uint64_t bits, uint64_t slots) {
  uint64_t rows = 0;
  for (uint64_t slot = 0; slot < slots; ++slot) rows += view.usable(view.leaves()[slot]);
  if (rows == 0) return kNowhere;
  uint64_t left = target_of(bits, rows, false, 0, 1);
  for (uint64_t slot = 0; slot < slots; ++slot) {
    if (view.usable(view.leaves()[slot]) && left-- == 0) return slot;
  }
  return kNowhere;
}

// The slot whose weight holds the target; kNowhere where the sums promised more than there is.
ANGLE_DEVICE uint64_t descend(const View& view, const int64_t* prefix, int64_t target) {
  const uint32_t groups = top_groups(view);
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
  const uint32_t child = child_of(view.leaves() + node * fan, fan, view.code.weight_mask, &target);
  return child == fan ? kNowhere : node * fan + child;
}

// Where draw i of a batch comes to first, in [0, total).
ANGLE_DEVICE uint64_t first_place(const SampleParams& p, const DrawBits& bits, uint64_t total, uint64_t i) {
  return target_of(bits.of(0, i), total, (p.how & SampleParams::kStratified) != 0, i, p.n);
}

// The slot of draw i, with replacement; kNowhere where there is no row.
ANGLE_DEVICE uint64_t choose(const View& view, const SampleParams& p, const int64_t* prefix, uint64_t total,
                             uint64_t i) {
  if (total == 0) return kNowhere;
  const DrawBits bits(view, p);
  const uint64_t place = first_place(p, bits, total, i);
  if (view.header().prioritized != 0) return descend(view, prefix, static_cast<int64_t>(place));
  uint64_t slot = place;
  for (uint64_t attempt = 1; attempt <= kAttempts; ++attempt) {
    if (view.usable(view.leaves()[slot])) return slot;
    // From all slots, not from the stratum: else the rows beside one that holds none would get its share.
    add(&p.scratch->retries, uint64_t{1});
    slot = target_of(bits.of(attempt, i), total, false, i, p.n);
  }
  return view.usable(view.leaves()[slot]) ? slot : any_row(view, bits.of(kScan, i), total);
}

}  // namespace angle::device
