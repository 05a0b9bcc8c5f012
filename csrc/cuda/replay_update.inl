// The replay's kernels: priorities, rows taken out, another exponent.
#pragma once
#include "cuda/replay_view.inl"

namespace angle::device {

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
  if (view.holds(view.leaves()[at.slot], at, view.place_of(issued).lap)) claims.claim(at.slot, i);
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
  // The same for all threads of the call: which word each finds depends on when it looks, but laps do not change and
  // rows stay rows.
  const uint64_t old_leaf = fresh(&view.leaves()[at.slot]);
  if (!view.holds(old_leaf, at, view.place_of(view.header().next_ticket).lap)) {
    add(&shared.refused, uint64_t{1});
    return;
  }
  if (!claims.is_last(at.slot, i)) return;
  const uint64_t leaf = view.code.make(at.lap, LeafCode::kComputed, weight);
  *view.word(at.slot, RecordLayout::kPriority) = RecordPriority::of(priority, at.lap);
  set(&view.leaves()[at.slot], leaf);
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
        const uint64_t leaf = fresh(&view.leaves()[at.slot]), held = view.code.make(at.lap, LeafCode::kHeld, 0);
        // Of equal handles one takes the row out, and the others find it gone.
        if (!view.holds(leaf, at, issued_lap) || swap_if(&view.leaves()[at.slot], leaf, held) != leaf) {
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
      if (view.parts.shares_successors != 0) h.rows -= p.n - shared.refused;
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
