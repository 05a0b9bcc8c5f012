// The replay's kernels: which rows a batch without replacement draws.
//
// The rows that the host's draws come to one after the other (core/choose.inl). Few draws of a batch mostly meet a row
// that is taken, so all choose side by side as if none did; then those that met one are made again, in order, each
// among what the draws before it have left.
#pragma once
#include "cuda/replay_choose.inl"

namespace angle::device {

// What a batch has taken: pairs of key and value, by open addressing. A slot's value is n - i of the first draw i that
// came to it, so that the largest stays; that of a node above is what rows below it took of its sum.
struct Taken {
  uint64_t* entries;
  uint64_t mask;

  // Level 0: the leaves. 0 where nothing is kept.
  ANGLE_DEVICE uint64_t value(uint32_t level, uint64_t node) const {
    const uint64_t key = key_of(level, node);
    for (uint64_t at = first_of(key);; at = (at + 1) & mask) {
      const uint64_t found = entries[2 * at];
      if (found == key) return entries[2 * at + 1];
      if (found == 0) return 0;
    }
  }
  ANGLE_DEVICE uint64_t* keep(uint32_t level, uint64_t node) const {
    const uint64_t key = key_of(level, node);
    for (uint64_t at = first_of(key);; at = (at + 1) & mask) {
      const uint64_t found = swap_if(&entries[2 * at], 0, key);
      if (found == 0 || found == key) return &entries[2 * at + 1];
    }
  }

 private:
  ANGLE_DEVICE static uint64_t key_of(uint32_t level, uint64_t node) { return (uint64_t{level} + 1) << 48 | node; }
  ANGLE_DEVICE uint64_t first_of(uint64_t key) const { return (key * 0x9E3779B97F4A7C15ull) >> 32 & mask; }
};

struct ChooseDistinct {
  using Params = SampleParams;
  static constexpr uint32_t kThreads = 512, kWarps = kThreads / kLanes;
  static constexpr uint32_t kRuns = kLanes, kInRun = kTopGroups / kRuns;
  struct Shared {
    TopSums<kThreads> top;
    int64_t left[kTopGroups];  // of the top's groups, less what the batch has taken
    int64_t whole[kRuns];      // sums of runs of those
    uint64_t first, slot;      // a draw that has to be made again, and what it comes to
    uint64_t listed;           // rows in p.rows
    uint64_t found[kWarps];    // rows that each warp lists
  };

  // What the batch is drawn from, and how.
  struct Draws {
    ANGLE_DEVICE Draws(const View& view_in, const SampleParams& p_in)
        : view(view_in), p(p_in), bits(view_in, p_in), taken{p_in.taken, p_in.taken_places - 1} {}

    ANGLE_DEVICE bool usable(uint64_t slot) const { return slot != kNowhere && view.usable(view.leaves()[slot]); }
    // Whether the row is still there after the draws before i.
    ANGLE_DEVICE bool is_left(uint64_t slot, uint64_t i) const {
      return usable(slot) && (i == 0 || taken.value(0, slot) <= p.n - i);
    }
    ANGLE_DEVICE void claim(uint64_t i) const { raise(taken.keep(0, p.chosen[i]), p.n - i); }
    ANGLE_DEVICE bool stands(uint64_t i) const { return usable(p.chosen[i]) && taken.value(0, p.chosen[i]) == p.n - i; }

    const View& view;
    const SampleParams& p;
    const DrawBits bits;
    const Taken taken;
  };

  ANGLE_DEVICE static void run(Block<Shared>& block, const SampleParams& p) {
    if (is_left_out(p)) return;
    const View view(p.view);
    const Draws draws(view, p);
    Shared& shared = block.shared;
    const bool prioritized = view.header().prioritized != 0;
    const uint64_t slots = view.slots_in_use();
    if (prioritized) add_up_top(block, shared.top, view);
    const uint64_t total = total_of(view, shared.top);
    if (total == 0) {
      refuse(block, p, ReplayFlags::kNothingToSample, 0);
      return;
    }
    const uint64_t rows = view.parts.shares_successors != 0 ? view.header().rows : slots;
    if (!prioritized && 2 * p.n > rows) {
      permute(block, draws, slots);
      return;
    }
    block.each_thread([&](uint32_t thread) {
      for (uint64_t i = thread; i < p.n; i += block.threads) {
        const uint64_t place = first_place(p, draws.bits, total, i);
        p.chosen[i] = prioritized ? descend(view, shared.top.prefix, static_cast<int64_t>(place)) : place;
      }
    });
    if (prioritized) begin_with_all(block);

    bool has_list = false;
    for (uint64_t begin = 0; begin < p.n; begin += block.threads) {
      const uint64_t end = p.n - begin < block.threads ? p.n : begin + block.threads;
      block.each_thread([&](uint32_t thread) {
        const uint64_t i = begin + thread;
        if (thread == 0) shared.first = end;
        if (i < end && draws.usable(p.chosen[i])) draws.claim(i);
      });
      for (uint64_t from = begin;;) {
        block.each_thread([&](uint32_t thread) {
          const uint64_t i = begin + thread;
          if (i >= from && i < end && !draws.stands(i)) lower(&shared.first, i);
        });
        const uint64_t first = shared.first;
        block.each_thread([&](uint32_t thread) {
          const uint64_t i = begin + thread;
          if (prioritized && i >= from && i < first) take(shared, draws, p.chosen[i]);
        });
        if (first == end) break;
        block.each_warp([&](const Warp& warp) {
          if (warp.index != 0) return;
          const uint64_t slot =
              prioritized ? choose_left(warp, shared, draws, slots, first) : choose_any(warp, draws, slots, first);
          warp.each([&](int lane) {
            if (lane == 0) shared.slot = slot == kNowhere && has_list ? choose_listed(shared, draws, first) : slot;
          });
        });
        if (shared.slot == kNowhere && !prioritized && !has_list) {
          list_rows(block, draws, slots, first);
          has_list = true;
          block.each_thread([&](uint32_t thread) {
            if (thread == 0) shared.slot = choose_listed(shared, draws, first);
          });
        }
        if (shared.slot == kNowhere) {
          refuse(block, p, ReplayFlags::kTooFew, first);
          return;
        }
        block.each_thread([&](uint32_t thread) {
          if (thread != 0) return;
          p.chosen[first] = shared.slot;
          draws.claim(first);
          if (prioritized) take(shared, draws, shared.slot);
          shared.first = end;
        });
        from = first + 1;
      }
    }
  }

  // Nothing is drawn: the batch is that of no rows.
  ANGLE_DEVICE static void refuse(Block<Shared>& block, const SampleParams& p, ReplayFlags::Code code, uint64_t found) {
    block.each_thread([&](uint32_t thread) {
      if (thread == 0) tell(p.flags, code, static_cast<int64_t>(found), static_cast<int64_t>(p.n), 0.0);
      for (uint64_t i = thread; i < p.n; i += block.threads) p.chosen[i] = kNowhere;
    });
  }

  // ---- with priorities ----

  // All weight is left.
  ANGLE_DEVICE static void begin_with_all(Block<Shared>& block) {
    Shared& shared = block.shared;
    block.each_thread([&](uint32_t thread) {
      for (uint32_t group = thread; group < kTopGroups; group += block.threads) {
        shared.left[group] = shared.top.prefix[group] - (group == 0 ? 0 : shared.top.prefix[group - 1]);
      }
    });
    block.each_thread([&](uint32_t thread) {
      if (thread >= kRuns) return;
      int64_t sum = 0;
      for (uint32_t group = 0; group < kInRun; ++group) sum += shared.left[thread * kInRun + group];
      shared.whole[thread] = sum;
    });
  }

  // A row's weight goes from all that is above it.
  ANGLE_DEVICE static void take(Shared& shared, const Draws& draws, uint64_t slot) {
    const View& view = draws.view;
    const uint64_t weight = view.code.weight(view.leaves()[slot]);
    uint64_t node = slot;
    for (uint32_t level = 0; level < view.parts.levels; ++level) {
      node >>= view.parts.shift[level];
      add(draws.taken.keep(level + 1, node), weight);
    }
    node >>= TreeShape::kTopShift;
    add(&shared.left[node], -static_cast<int64_t>(weight));
    add(&shared.whole[node / kInRun], -static_cast<int64_t>(weight));
  }

  // Which of `count` children holds the target, which becomes what is left within that child; `count`: none. By all
  // lanes of a warp.
  template <class ShareOf>
  ANGLE_DEVICE static uint32_t find_child(const Warp& warp, uint32_t count, int64_t* target, ShareOf&& share_of) {
    for (uint32_t base = 0; base < count; base += kLanes) {
      Lanes<int64_t> shares;
      warp.each([&](int lane) {
        const uint32_t child = base + static_cast<uint32_t>(lane);
        const int64_t share = child < count ? share_of(child) : 0;
        shares[lane] = share > 0 ? share : 0;
      });
      const Lanes<int64_t> running = warp.scan(shares);
      Lanes<bool> beyond;
      warp.each([&](int lane) { beyond[lane] = *target < running[lane]; });
      const uint32_t found = warp.ballot(beyond);
      if (found != 0) {
        const int lane = lowest_bit(found);
        *target -= warp.broadcast(running, lane) - warp.broadcast(shares, lane);
        return base + static_cast<uint32_t>(lane);
      }
      *target -= warp.broadcast(running, kLanes - 1);
    }
    return count;
  }

  // Draw i by what is left of each row's weight after the draws before it; kNowhere: nothing.
  ANGLE_DEVICE static uint64_t choose_left(const Warp& warp, const Shared& shared, const Draws& draws, uint64_t slots,
                                           uint64_t i) {
    Lanes<int64_t> wholes;
    warp.each([&](int lane) { wholes[lane] = shared.whole[lane] > 0 ? shared.whole[lane] : 0; });
    const int64_t total = warp.sum(wholes);
    for (uint64_t attempt = 1; attempt <= kAttempts && total > 0; ++attempt) {
      const uint64_t target = target_of(draws.bits.of(attempt, i), static_cast<uint64_t>(total), false, i, draws.p.n);
      const uint64_t slot = descend_left(warp, shared, draws, static_cast<int64_t>(target), i);
      if (slot != kNowhere) return slot;
    }
    // Where sums are off.
    const uint64_t first = draws.bits.of(kScan, i) % slots;
    for (uint64_t base = 0; base < slots; base += kLanes) {
      Lanes<bool> fits;
      warp.each([&](int lane) {
        const uint64_t step = base + static_cast<uint64_t>(lane);
        fits[lane] = step < slots && draws.is_left((first + step) % slots, i);
      });
      const uint32_t found = warp.ballot(fits);
      if (found != 0) return (first + base + static_cast<uint64_t>(lowest_bit(found))) % slots;
    }
    return kNowhere;
  }

  ANGLE_DEVICE static uint64_t descend_left(const Warp& warp, const Shared& shared, const Draws& draws, int64_t target,
                                            uint64_t i) {
    const View& view = draws.view;
    const uint32_t run = find_child(warp, kRuns, &target, [&](uint32_t child) { return shared.whole[child]; });
    if (run == kRuns) return kNowhere;
    const uint32_t group =
        find_child(warp, kInRun, &target, [&](uint32_t child) { return shared.left[run * kInRun + child]; });
    if (group == kInRun) return kNowhere;
    uint64_t node = run * kInRun + group;
    uint32_t fan = 1u << TreeShape::kTopShift;
    for (uint32_t level = view.parts.levels; level-- > 0;) {
      const uint64_t first = node * fan;
      const uint32_t found = find_child(warp, fan, &target, [&](uint32_t child) {
        return view.sums(level)[first + child] - static_cast<int64_t>(draws.taken.value(level + 1, first + child));
      });
      if (found == fan) return kNowhere;
      node = first + found;
      fan = 1u << view.parts.shift[level];
    }
    const uint64_t first = node * fan;
    const uint32_t found = find_child(warp, fan, &target, [&](uint32_t child) {
      const int64_t weight = static_cast<int64_t>(view.code.weight(view.leaves()[first + child]));
      return weight > 0 && draws.is_left(first + child, i) ? weight : 0;
    });
    return found == fan ? kNowhere : first + found;
  }

  // ---- of a uniform buffer ----

  // The first attempt of draw i that meets a row which is left; kNowhere: none of them.
  ANGLE_DEVICE static uint64_t choose_any(const Warp& warp, const Draws& draws, uint64_t slots, uint64_t i) {
    for (uint64_t attempt = 1; attempt <= kAttempts; attempt += kLanes) {
      Lanes<uint64_t> met;
      Lanes<bool> fits;
      warp.each([&](int lane) {
        met[lane] = target_of(draws.bits.of(attempt + static_cast<uint64_t>(lane), i), slots, false, i, draws.p.n);
        fits[lane] = draws.is_left(met[lane], i);
      });
      const uint32_t found = warp.ballot(fits);
      if (found != 0) return warp.broadcast(met, lowest_bit(found));
    }
    return kNowhere;
  }

  // Lists, in their order, the slots that the draws before i have left. Each warp those of a part of its own.
  ANGLE_DEVICE static void list_rows(Block<Shared>& block, const Draws& draws, uint64_t slots, uint64_t i) {
    Shared& shared = block.shared;
    const uint64_t share = (slots + kThreads - 1) / kThreads * kLanes;
    const auto each_row = [&](const Warp& warp, auto&& f) {
      const uint64_t begin = warp.index * share, end = begin + share < slots ? begin + share : slots;
      for (uint64_t base = begin; base < end; base += kLanes) {
        Lanes<uint64_t> rows;
        warp.each([&](int lane) {
          const uint64_t slot = base + static_cast<uint64_t>(lane);
          rows[lane] = slot < end && draws.is_left(slot, i) ? 1 : 0;
        });
        f(base, rows);
      }
    };
    block.each_warp([&](const Warp& warp) {
      Lanes<uint64_t> counts;
      each_row(warp, [&](uint64_t, const Lanes<uint64_t>& rows) {
        warp.each([&](int lane) { counts[lane] += rows[lane]; });
      });
      const uint64_t count = warp.sum(counts);
      warp.each([&](int lane) {
        if (lane == 0) shared.found[warp.index] = count;
      });
    });
    block.each_warp([&](const Warp& warp) {
      uint64_t before = 0;
      for (uint32_t index = 0; index < warp.index; ++index) before += shared.found[index];
      each_row(warp, [&](uint64_t base, const Lanes<uint64_t>& rows) {
        const Lanes<uint64_t> running = warp.scan(rows);
        warp.each([&](int lane) {
          if (rows[lane] != 0) draws.p.rows[before + running[lane] - 1] = base + static_cast<uint64_t>(lane);
        });
        before += warp.broadcast(running, kLanes - 1);
      });
      warp.each([&](int lane) {
        if (lane == 0 && warp.index == kWarps - 1) shared.listed = before;
      });
    });
  }

  // Draw i from the list, by one thread. Draws that met a row elsewhere left it there.
  ANGLE_DEVICE static uint64_t choose_listed(Shared& shared, const Draws& draws, uint64_t i) {
    for (uint64_t attempt = kScan; shared.listed > 0; ++attempt) {
      uint64_t* const at = &draws.p.rows[target_of(draws.bits.of(attempt, i), shared.listed, false, 0, 1)];
      const uint64_t slot = *at;
      *at = draws.p.rows[--shared.listed];
      if (draws.is_left(slot, i)) return slot;
    }
    return kNowhere;
  }

  // A batch of most rows: the beginning of a random permutation of them all.
  ANGLE_DEVICE static void permute(Block<Shared>& block, const Draws& draws, uint64_t slots) {
    const SampleParams& p = draws.p;
    list_rows(block, draws, slots, 0);
    const uint64_t rows = block.shared.listed;
    if (rows < p.n) {
      refuse(block, p, ReplayFlags::kTooFew, rows);
      return;
    }
    block.each_thread([&](uint32_t thread) {
      for (uint64_t i = thread; i < p.n; i += block.threads) {
        p.chosen[i] = target_of(draws.bits.of(kScan, i), rows - i, false, 0, 1);
      }
    });
    block.each_thread([&](uint32_t thread) {
      for (uint64_t i = 0; thread == 0 && i < p.n; ++i) {
        uint64_t* const at = &p.rows[p.chosen[i]];
        p.chosen[i] = *at;
        *at = p.rows[rows - 1 - i];
      }
    });
  }
};

}  // namespace angle::device
