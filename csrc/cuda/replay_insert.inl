// The replay's kernels: rows that come in.
#pragma once
#include "cuda/replay_view.inl"

namespace angle::device {

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
    uint64_t nan[kWarps][kLanes];  // whether an observation of the warp's row holds a NaN
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
      uint64_t* const nan = shared.nan[warp.index];
      warp.each([&](int lane) {
        nan[lane] = 0;
        if (static_cast<uint32_t>(lane) < rows) {
          slots[lane] = write_header(view, p, shared, base + static_cast<uint64_t>(lane));
        }
      });
      for (uint32_t f = 0; f < p.field_count; ++f) {
        const FieldIn& field = p.fields[f];
        uint8_t* const column = const_cast<uint8_t*>(field.rows) + base * field.bytes;
        move_field<true>(warp, view, column, slots, rows, field.offset, field.bytes, field.bytes);
        if (field.looked_at == FieldReal::kNone) continue;
        const uint32_t width = field.bytes / (field.looked_at == FieldReal::kFloat ? 4 : 8);
        warp.each([&](int lane) {
          for (uint32_t at = static_cast<uint32_t>(lane); at < rows * width; at += kLanes) {
            const double value = real_at(column, at, field.looked_at);
            if (value != value) raise(&nan[at / width], uint64_t{1});
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

}  // namespace angle::device
