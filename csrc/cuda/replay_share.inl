// The replay's kernels: rows that come in where a row's successor is the observation of its stream's next record, and
// where a record keeps one frame of a stack. How many records a row takes depends on what the stream holds, so tickets
// are given out row by row: first all that takes bytes to see is seen, by a warp a row; then one thread goes through
// the rows as core/insert.inl does, without their bytes; then these are written, by a warp a record.
#pragma once
#include "cuda/replay_view.inl"

namespace angle::device {

// Whether two stretches of memory hold the same bytes, told to all lanes.
template <class Word>
ANGLE_DEVICE bool same_words(const Warp& warp, const uint8_t* one, const uint8_t* other, uint32_t count) {
  const Word *const ones = reinterpret_cast<const Word*>(one), *const others = reinterpret_cast<const Word*>(other);
  Lanes<uint32_t> differ;
  warp.each([&](int lane) {
    Word bits = 0;
    for (uint32_t at = static_cast<uint32_t>(lane); at < count; at += kLanes) bits |= ones[at] ^ others[at];
    differ[lane] = bits != 0;
  });
  return warp.sum(differ) == 0;
}

ANGLE_DEVICE bool same_bytes(const Warp& warp, const uint8_t* one, const uint8_t* other, uint32_t bytes) {
  const uint64_t all = reinterpret_cast<uintptr_t>(one) | reinterpret_cast<uintptr_t>(other) | bytes;
  if (all % 8 == 0) return same_words<uint64_t>(warp, one, other, bytes / 8);
  if (all % 4 == 0) return same_words<uint32_t>(warp, one, other, bytes / 4);
  return same_words<uint8_t>(warp, one, other, bytes);
}

ANGLE_DEVICE uint32_t kept_of(const FieldIn& field) { return field.bytes / field.frames; }

// The field that holds the successor of observation field f.
ANGLE_DEVICE const FieldIn& successor_of(const InsertParams& p, uint32_t f) {
  return p.fields[p.field_count - p.observations + f];
}

// ---- what takes bytes to see ----

// A warp a row.
struct LookAtRows {
  using Params = InsertParams;
  static constexpr uint32_t kThreads = 256, kWarps = kThreads / kLanes;
  struct Shared {
    uint64_t nan_rows;
  };

  ANGLE_DEVICE static void run(Block<Shared>& block, const InsertParams& p) {
    if (p.scratch->bad != 0) return;
    const View view(p.view);
    Shared& shared = block.shared;
    block.each_thread([&](uint32_t thread) {
      if (thread == 0) shared.nan_rows = 0;
    });
    block.each_warp([&](const Warp& warp) {
      const uint64_t i = uint64_t{block.index} * kWarps + warp.index;
      if (i >= p.n) return;
      const int64_t before = p.streams == nullptr ? static_cast<int64_t>(i) - 1 : p.previous[i];
      const bool shows = before >= 0 ? follows(warp, p, i, static_cast<uint64_t>(before)) : is_shown(warp, view, p, i);
      const bool goes_on = continues(warp, p, i);
      const uint32_t own = first_frame(warp, view, p, i, false), next = first_frame(warp, view, p, i, true);
      const bool nan = holds_nan(warp, p, i);
      warp.each([&](int lane) {
        if (lane != 0) return;
        p.looks[i] = {shows, goes_on, static_cast<uint8_t>(own), static_cast<uint8_t>(next)};
        if (nan) add(&shared.nan_rows, uint64_t{1});
      });
    });
    block.each_thread([&](uint32_t thread) {
      if (thread == 0 && shared.nan_rows != 0) add(&view.header().nan_observations, shared.nan_rows);
    });
  }

  // Whether row i's observation is the successor of a row before it in this call.
  ANGLE_DEVICE static bool follows(const Warp& warp, const InsertParams& p, uint64_t i, uint64_t before) {
    for (uint32_t f = 0; f < p.observations; ++f) {
      const uint32_t bytes = p.fields[f].bytes;
      if (!same_bytes(warp, p.fields[f].rows + i * bytes, successor_of(p, f).rows + before * bytes, bytes)) {
        return false;
      }
    }
    return true;
  }

  // Whether it is what the stream's newest record shows, of an earlier call, if that is still there: see is_open.
  ANGLE_DEVICE static bool is_shown(const Warp& warp, const View& view, const InsertParams& p, uint64_t i) {
    const uint64_t open = *view.stream_tail(p.streams == nullptr ? 0 : static_cast<uint64_t>(p.streams[i]));
    if (open == 0) return false;
    Place at = view.place_of(open - 1);
    for (uint32_t frame = view.parts.stack; frame-- > 0;) {
      for (uint32_t f = 0; f < p.observations; ++f) {
        const FieldIn& field = p.fields[f];
        if (field.frames == 1 && frame + 1 < view.parts.stack) continue;
        const uint8_t* const own = field.rows + i * field.bytes + (field.frames > 1 ? frame * kept_of(field) : 0);
        if (!same_bytes(warp, view.record(at.slot) + field.offset, own, kept_of(field))) return false;
      }
      if (frame > 0) at = view.place_of(*view.word(at.slot, RecordLayout::kPrevious));
    }
    return true;
  }

  ANGLE_DEVICE static bool continues(const Warp& warp, const InsertParams& p, uint64_t i) {
    for (uint32_t f = 0; f < p.observations; ++f) {
      const FieldIn& field = p.fields[f];
      if (field.frames == 1) continue;
      const uint32_t kept = kept_of(field);
      const uint8_t* const next = successor_of(p, f).rows + i * field.bytes;
      if (!same_bytes(warp, next, field.rows + i * field.bytes + kept, field.bytes - kept)) return false;
    }
    return true;
  }

  // The first frame of a stack that those before it only repeat, as after a reset.
  ANGLE_DEVICE static uint32_t first_frame(const Warp& warp, const View& view, const InsertParams& p, uint64_t i,
                                           bool successor) {
    uint32_t first = view.parts.stack - 1;
    for (uint32_t f = 0; f < p.observations; ++f) {
      const FieldIn& field = successor ? successor_of(p, f) : p.fields[f];
      if (field.frames == 1) continue;
      const uint8_t* const stack = field.rows + i * field.bytes;
      const uint32_t kept = kept_of(field);
      uint32_t repeats = 0;
      while (repeats < first && same_bytes(warp, stack, stack + (repeats + 1) * kept, kept)) ++repeats;
      first = repeats;
    }
    return first;
  }

  ANGLE_DEVICE static bool holds_nan(const Warp& warp, const InsertParams& p, uint64_t i) {
    Lanes<uint32_t> found;
    for (uint32_t f = 0; f < p.field_count; ++f) {
      const FieldIn& field = p.fields[f];
      if (field.looked_at == FieldReal::kNone) continue;
      const uint32_t width = field.bytes / (field.looked_at == FieldReal::kFloat ? 4 : 8);
      warp.each([&](int lane) {
        for (uint32_t at = static_cast<uint32_t>(lane); at < width; at += kLanes) {
          const double value = real_at(field.rows + i * field.bytes, at, field.looked_at);
          found[lane] |= value != value ? 1 : 0;
        }
      });
    }
    return warp.sum(found) != 0;
  }
};

// ---- which records ----

// One block, one thread of which goes through the rows.
struct PlaceRows {
  using Params = InsertParams;
  static constexpr uint32_t kThreads = 256;
  struct Shared {
    CountChanges counts;
  };

  ANGLE_DEVICE static void run(Block<Shared>& block, const InsertParams& p) {
    const View view(p.view);
    Shared& shared = block.shared;
    block.each_thread([&](uint32_t thread) {
      shared.counts.clear(thread, block.threads);
      if (thread == 0) p.scratch->writes = 0;
    });
    if (p.scratch->bad != 0) {
      block.each_thread([&](uint32_t thread) {
        for (uint64_t i = thread; i < p.n; i += block.threads) p.handles[i] = -1;
      });
      return;
    }
    block.each_thread([&](uint32_t thread) {
      if (thread == 0) Rows(view, p, shared.counts).place_all();
    });
    block.each_thread([&](uint32_t thread) { shared.counts.flush(view.header(), thread, block.threads); });
  }

  // The rows of one call, in order; as core/insert.inl where nobody else is at work.
  struct Rows {
    ANGLE_DEVICE Rows(const View& view_in, const InsertParams& p_in, CountChanges& counts_in)
        : view(view_in), p(p_in), counts(counts_in), issued(view_in.header().next_ticket) {}

    ANGLE_DEVICE void place_all() {
      SegmentHeader& h = view.header();
      uint64_t largest = 0;
      for (uint64_t i = 0; i < p.n; ++i) {
        p.handles[i] = static_cast<int64_t>(place(i));
        if (p.priorities != nullptr && bits_of(p.priorities[i]) > largest) largest = bits_of(p.priorities[i]);
      }
      if (largest > h.historic_maximum) h.historic_maximum = largest;
      h.next_ticket = issued;
      h.busy_slots += given_up;
      h.saturated_weights += saturated;
      h.opened += opened;
      h.rows += static_cast<uint64_t>(rows);
      h.inserts += p.n;
      p.scratch->writes = writes;
    }

    ANGLE_DEVICE uint64_t place(uint64_t i) {
      const RowLooks looks = p.looks[i];
      const uint64_t stream = stream_of(i);
      const uint64_t flags = (p.terminated[i] != 0 ? RecordHead::kTerminated : 0) |
                             (p.truncated != nullptr && p.truncated[i] != 0 ? RecordHead::kTruncated : 0);
      uint64_t* const tail = view.stream_tail(stream);
      Place at = view.place_of(*tail == 0 ? 0 : *tail - 1);
      if (*tail != 0 && looks.shows != 0 && is_open(at)) {
        view.leaves()[at.slot] = view.code.make(at.lap, LeafCode::kBusy, 0);
      } else {
        at = hold_stack(i, RecordWrite::kObservation, looks.own_first, false);
      }
      float priority = p.scratch->default_priority;
      uint64_t weight = p.scratch->default_weight;
      const bool graded = p.priorities != nullptr && view.header().prioritized != 0;
      if (graded) {
        bool cut = false;
        priority = p.priorities[i];
        weight = view.weigh(priority, &cut);
        saturated += cut;
      }
      write(at, i, 0, RecordWrite::kRest);
      *view.word(at.slot, RecordLayout::kPriority) = RecordPriority::of(priority, at.lap);
      const Place next = looks.continues != 0 ? hold(i, RecordWrite::kSuccessor, view.parts.stack - 1, at.ticket, true)
                                              : hold_stack(i, RecordWrite::kSuccessor, looks.next_first, true);
      *view.word(at.slot, RecordLayout::kNext) = next.ticket;
      *view.word(at.slot, RecordLayout::kHead) = RecordHead::of(at.lap, stream, RecordHead::kRow | flags);
      *tail = flags != 0 ? 0 : next.ticket + 1;
      const uint64_t leaf = view.code.make(at.lap, graded ? LeafCode::kComputed : LeafCode::kDefault, weight);
      view.leaves()[at.slot] = leaf;
      ++rows;
      change_weight(view, counts, at.slot, 0, leaf);
      // The ring may have passed the record while it was busy: nobody would overwrite this row before its successor.
      if (issued > at.ticket + view.parts.capacity || !frames_live(at)) retire(at);
      return at.ticket;
    }

    ANGLE_DEVICE uint64_t stream_of(uint64_t i) const {
      return p.streams == nullptr ? 0 : static_cast<uint64_t>(p.streams[i]);
    }

    // Whether a record keeps an observation alone, and all frames of that are there.
    ANGLE_DEVICE bool is_open(Place at) const {
      const uint64_t leaf = view.leaves()[at.slot];
      if (!view.code.has_lap(leaf, at.lap) || view.code.state(leaf) != LeafCode::kHeld) return false;
      for (uint32_t frame = 1; frame < view.parts.stack; ++frame) {
        at = view.place_of(*view.word(at.slot, RecordLayout::kPrevious));
        if (!view.code.has_lap(view.leaves()[at.slot], at.lap)) return false;
      }
      return true;
    }

    // The next ticket whose slot is not being written by this very row.
    ANGLE_DEVICE Place claim() {
      for (;; ++given_up) {
        const Place at = view.place_of(issued++);
        const uint64_t old_leaf = view.leaves()[at.slot];
        if (view.code.state(old_leaf) == LeafCode::kBusy) continue;
        view.leaves()[at.slot] = view.code.make(at.lap, LeafCode::kBusy, 0);
        if (view.code.lap(old_leaf) == 0) return at;
        rows -= view.code.is_row(old_leaf);
        change_weight(view, counts, at.slot, old_leaf, 0);
        if (view.parts.stack > 1) {
          const uint64_t old_lap = RecordHead::lap(*view.word(at.slot, RecordLayout::kHead));
          forget_dependents(view.ticket_of(at.slot, old_lap), *view.word(at.slot, RecordLayout::kNext));
        }
        return at;
      }
    }

    // A record for an observation alone, or for one frame of it.
    ANGLE_DEVICE Place hold(uint64_t i, RecordWrite::What what, uint32_t frame, uint64_t previous, bool published) {
      const Place at = claim();
      write(at, i, frame, what);
      *view.word(at.slot, RecordLayout::kHead) = RecordHead::of(at.lap, stream_of(i), 0);
      *view.word(at.slot, RecordLayout::kNext) = at.ticket;
      *view.word(at.slot, RecordLayout::kPriority) = RecordPriority::of(0.0f, at.lap);
      if (view.parts.stack > 1) {
        *view.word(at.slot, RecordLayout::kPrevious) = previous == kNowhere ? at.ticket : previous;
      }
      ++opened;
      if (published) view.leaves()[at.slot] = view.code.make(at.lap, LeafCode::kHeld, 0);
      return at;
    }

    // Records for a whole stack from frame `first` on; the last one is left busy where it is not to be published.
    ANGLE_DEVICE Place hold_stack(uint64_t i, RecordWrite::What what, uint32_t first, bool published) {
      Place at = hold(i, what, first, kNowhere, published || first + 1 < view.parts.stack);
      for (uint32_t frame = first + 1; frame < view.parts.stack; ++frame) {
        const Place before = at;
        at = hold(i, what, frame, before.ticket, published || frame + 1 < view.parts.stack);
        // On a small ring the frame before may have made way already.
        uint64_t* const next = view.word(before.slot, RecordLayout::kNext);
        if (*next == before.ticket) *next = at.ticket;
      }
      return at;
    }

    // Takes a row out of the draws, if it is one.
    ANGLE_DEVICE void retire(const Place& at) {
      const uint64_t leaf = view.leaves()[at.slot], held = view.code.make(at.lap, LeafCode::kHeld, 0);
      if (!view.code.has_lap(leaf, at.lap) || !view.code.is_row(leaf)) return;
      view.leaves()[at.slot] = held;
      change_weight(view, counts, at.slot, leaf, held);
      --rows;
    }

    // Whether the older frames of a row are all there.
    ANGLE_DEVICE bool frames_live(Place at) const {
      for (uint32_t frame = 1; frame < view.parts.stack; ++frame) {
        const Place before = view.place_of(*view.word(at.slot, RecordLayout::kPrevious));
        if (before.ticket == at.ticket) return true;
        if (!view.code.has_lap(view.leaves()[before.slot], before.lap)) return false;
        at = before;
      }
      return true;
    }

    // The record of this ticket makes way: rows whose stacks need its frame can no longer be drawn.
    ANGLE_DEVICE void forget_dependents(uint64_t ticket, uint64_t next) {
      for (uint32_t frame = 1; frame < view.parts.stack && next != ticket; ++frame) {
        const Place at = view.place_of(next);
        if (*view.word(at.slot, RecordLayout::kPrevious) != ticket) return;
        if (!view.code.has_lap(view.leaves()[at.slot], at.lap)) return;
        retire(at);
        ticket = next;
        next = *view.word(at.slot, RecordLayout::kNext);
      }
    }

    ANGLE_DEVICE void write(const Place& at, uint64_t i, uint32_t frame, RecordWrite::What what) {
      p.writes[writes++] = {at.slot, at.lap, i, frame, what};
    }

    const View& view;
    const InsertParams& p;
    CountChanges& counts;
    uint64_t issued, given_up = 0, opened = 0, saturated = 0, writes = 0;
    int64_t rows = 0;
  };
};

// ---- their bytes ----

// A warp a record, but for those that this very call overwrote.
struct WriteRecords {
  using Params = InsertParams;
  static constexpr uint32_t kThreads = 256, kWarps = kThreads / kLanes;
  struct Shared {};

  ANGLE_DEVICE static void run(Block<Shared>& block, const InsertParams& p) {
    const View view(p.view);
    const uint64_t writes = p.scratch->writes;
    block.each_warp([&](const Warp& warp) {
      for (uint64_t w = uint64_t{block.index} * kWarps + warp.index; w < writes; w += uint64_t{block.blocks} * kWarps) {
        const RecordWrite& write = p.writes[w];
        if (!view.code.has_lap(view.leaves()[write.slot], write.lap)) continue;
        const bool rest = write.what == RecordWrite::kRest, successor = write.what == RecordWrite::kSuccessor;
        const uint32_t first = rest ? p.observations : 0;
        const uint32_t end = rest ? p.field_count - p.observations : p.observations;
        for (uint32_t f = first; f < end; ++f) {
          const FieldIn& field = successor ? successor_of(p, f) : p.fields[f];
          const uint32_t kept = kept_of(field), skipped = field.frames > 1 ? write.frame * kept : 0;
          uint8_t* const row = const_cast<uint8_t*>(field.rows) + write.row * field.bytes + skipped;
          move_field<true>(warp, view, row, &write.slot, 1, field.offset, kept, kept);
        }
      }
    });
  }
};

}  // namespace angle::device
