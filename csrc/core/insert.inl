// ReplayT: writing rows. Included by replay.cpp and by the scheduled tests.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/replay.h"
#include "core/scratch.inl"

namespace angle {

// One call's tickets and what it owes to the sums, the buckets and the counters. One thread's own.
template <class Access>
struct ReplayT<Access>::Writer {
  Writer(ReplayT& replay_in, const Default& standard_in)
      : replay(replay_in), standard(standard_in), changes(replay_in) {}

  // Takes tickets until one's slot is free, and marks the slot busy. `wanted`: tickets that this call still needs.
  Place claim(uint64_t wanted) {
    uint64_t old_leaf = 0;
    for (;; ++given_up) {
      if (left == 0) {
        left = wanted;
        next = replay.place_of(word(replay.header().next_ticket).fetch_add(left, std::memory_order_acq_rel));
      }
      --left;
      const Place at = next;
      ++next.ticket;
      if (++next.slot == replay.layout_.capacity) {
        next.slot = 0;
        ++next.lap;
      }
      if (!replay.claim(at, &old_leaf)) continue;
      forget(at.slot, old_leaf);
      if (replay.record_.stack > 1 && replay.tree_.code.lap(old_leaf) != 0) {
        const uint64_t old_lap =
            RecordHead::lap(replay.word_at(at.slot, RecordLayout::kHead).load(std::memory_order_relaxed));
        replay.forget_dependents(replay.ticket_of(at.slot, old_lap),
                                 replay.word_at(at.slot, RecordLayout::kNext).load(std::memory_order_relaxed));
      }
      return at;
    }
  }

  // The row that made way for a claim.
  void forget(uint64_t slot, uint64_t old_leaf) {
    const LeafCode& code = replay.tree_.code;
    rows -= code.is_row(old_leaf) && code.lap(old_leaf) != 0;
    if (replay.prioritized()) changes.add(slot, old_leaf, 0);
  }

  void finish() {
    SegmentHeader& h = replay.header();
    if (given_up != 0) word(h.busy_slots).fetch_add(given_up, std::memory_order_relaxed);
    if (saturated != 0) word(h.saturated_weights).fetch_add(saturated, std::memory_order_relaxed);
    if (opened != 0) word(h.opened).fetch_add(opened, std::memory_order_relaxed);
    if (replay.shares() && rows != 0) word(h.rows).fetch_add(static_cast<uint64_t>(rows), std::memory_order_relaxed);
  }

  ReplayT& replay;
  const Default standard;
  WeightChanges changes;
  Place next{};
  uint64_t left = 0, given_up = 0, opened = 0, saturated = 0;
  int64_t rows = 0;
  int64_t linked_stream = -1;
  Place linked{};  // newest row of linked_stream in this call
};

template <class Access>
bool ReplayT<Access>::claim(const Place& at, uint64_t* old_leaf) {
  const LeafCode& code = tree_.code;
  const Word<uint64_t> leaf = tree_.leaf(at.slot);
  uint64_t found = leaf.load(std::memory_order_relaxed);
  for (;;) {
    const uint64_t ahead = (at.lap - code.lap(found)) & code.lap_mask;
    const bool passed = ahead == 0 || ahead > code.lap_mask / 2;  // a later writer was here already
    if (code.state(found) == LeafCode::kBusy || passed) return false;
    // acquire: no byte of the record is written before the mark. release: whoever reads such a byte sees the mark.
    if (leaf.compare_exchange_weak(found, code.make(at.lap, LeafCode::kBusy, 0), std::memory_order_acq_rel,
                                   std::memory_order_relaxed)) {
      *old_leaf = found;
      return true;
    }
  }
}

template <class Access>
void ReplayT<Access>::write_header(const Place& at, uint64_t head, uint64_t previous, float priority) {
  // release, as in store_field: whoever sees a new word sees the slot marked busy.
  word_at(at.slot, RecordLayout::kHead).store(head, std::memory_order_release);
  word_at(at.slot, RecordLayout::kNext).store(at.ticket, std::memory_order_release);  // itself: no next record yet
  word_at(at.slot, RecordLayout::kPriority).store(RecordPriority::of(priority, at.lap), std::memory_order_release);
  if (record_.stack > 1) word_at(at.slot, RecordLayout::kPrevious).store(previous, std::memory_order_release);
}

namespace {

inline uint64_t end_flags(const InsertRows& rows, size_t row) {
  return (rows.terminated[row] != 0 ? RecordHead::kTerminated : 0) |
         (rows.truncated != nullptr && rows.truncated[row] != 0 ? RecordHead::kTruncated : 0);
}

inline uint64_t stream_of(const InsertRows& rows, size_t row) {
  return rows.streams == nullptr ? 0 : static_cast<uint64_t>(rows.streams[row]);
}

}  // namespace

// All fields but shared observations, which are written with write_observation.
template <class Access>
void ReplayT<Access>::write_fields(uint64_t slot, const InsertRows& rows, size_t row) {
  uint8_t* const record = record_at(slot);
  const size_t count = record_.fields.size(), first = shares() ? record_.roles.observations : 0;
  for (size_t f = first; f < count; ++f) {
    if (shares() && record_.is_successor(f)) break;
    const Field& field = record_.fields[f];
    Access::store_field(record + field.offset, rows.fields[f] + row * field.bytes, field.bytes);
  }
}

template <class Access>
void ReplayT<Access>::write_observation(uint64_t slot, const InsertRows& rows, size_t row, bool successor,
                                        uint32_t frame) {
  for (size_t f = 0; f < record_.roles.observations; ++f) {
    const Field& field = record_.fields[f];
    const uint8_t* const from = rows.fields[successor ? record_.successor_of(f) : f] + row * field.bytes;
    Access::store_field(record_at(slot) + field.offset, from + (field.frames > 1 ? frame * field.kept() : 0),
                        field.kept());
  }
}

template <class Access>
void ReplayT<Access>::link(const Place& previous, uint64_t ticket) {
  // Fails, as it should, when the previous record is gone: its successor in the slot links to its own ticket.
  uint64_t expected = previous.ticket;
  word_at(previous.slot, RecordLayout::kNext)
      .compare_exchange_strong(expected, ticket, std::memory_order_release, std::memory_order_relaxed);
}

// What a row about to be published weighs.
template <class Access>
typename ReplayT<Access>::RowWeight ReplayT<Access>::weigh(Writer& writer, const InsertRows& rows, size_t row) const {
  if (rows.priorities == nullptr || !prioritized()) {
    return {writer.standard.priority, writer.standard.weight, false};
  }
  return {rows.priorities[row], priority_map().weight(rows.priorities[row], &writer.saturated), true};
}

template <class Access>
void ReplayT<Access>::publish(Writer& writer, const Place& at, const RowWeight& own) {
  // release: partner of the samplers' acquire load of the leaf.
  const uint64_t leaf = tree_.code.make(at.lap, own.computed ? LeafCode::kComputed : LeafCode::kDefault, own.weight);
  tree_.leaf(at.slot).store(leaf, std::memory_order_release);
  ++writer.rows;
  if (prioritized()) writer.changes.add(at.slot, 0, leaf);
}

template <class Access>
void ReplayT<Access>::insert(const InsertRows& rows, int64_t* handles) {
  SegmentHeader& h = header();
  if (rows.n > layout_.capacity) {
    throw std::invalid_argument("observations hold " + std::to_string(rows.n) + " rows; the buffer's capacity is " +
                                std::to_string(layout_.capacity));
  }
  for (size_t i = 0; i < rows.n && rows.streams != nullptr; ++i) {
    if (rows.streams[i] < 0 || rows.streams[i] >= static_cast<int64_t>(kStreams)) {
      throw std::invalid_argument("streams[" + std::to_string(i) + "] is " + std::to_string(rows.streams[i]) +
                                  "; it must be between 0 and " + std::to_string(kStreams - 1));
    }
  }
  if (rows.priorities != nullptr) require_priorities("priorities", rows.priorities, rows.n);
  if (rows.n == 0) return;
  const uint64_t exponent = word(h.exponent).load(std::memory_order_acquire);
  {
    Writer writer(*this, default_weight());
    for (size_t row = 0; row < rows.n; ++row) {
      handles[row] = static_cast<int64_t>(shares() ? add_sharing_row(writer, rows, row) : add_row(writer, rows, row));
    }
    if (writer.linked_stream >= 0) {
      stream_tail(static_cast<uint64_t>(writer.linked_stream))
          .store(writer.linked.ticket + 1, std::memory_order_release);
    }
    writer.finish();
  }
  if (rows.priorities != nullptr) raise_historic(largest_of(rows.priorities, rows.n));
  if (rows.nan_rows != 0) word(h.nan_observations).fetch_add(rows.nan_rows, std::memory_order_relaxed);
  // acq_rel: partner of set_priority_exponent. Either it sees these rows, or this sees its exponent.
  word(h.inserts).fetch_add(rows.n, std::memory_order_acq_rel);
  if (prioritized() && word(h.exponent).load(std::memory_order_acquire) != exponent) {
    for (size_t row = 0; row < rows.n; ++row) {
      sync_leaf(place_of(static_cast<uint64_t>(handles[row])), false);
    }
  }
}

template <class Access>
uint64_t ReplayT<Access>::add_row(Writer& writer, const InsertRows& rows, size_t row) {
  const Place at = writer.claim(rows.n - row);
  const uint64_t stream = stream_of(rows, row);
  const RowWeight own = weigh(writer, rows, row);
  write_fields(at.slot, rows, row);
  write_header(at, RecordHead::of(at.lap, stream, RecordHead::kRow | end_flags(rows, row)), at.ticket, own.priority);
  publish(writer, at, own);
  if (static_cast<int64_t>(stream) == writer.linked_stream) {
    link(writer.linked, at.ticket);
  } else {
    if (writer.linked_stream >= 0) {
      stream_tail(static_cast<uint64_t>(writer.linked_stream))
          .store(writer.linked.ticket + 1, std::memory_order_release);
    }
    const uint64_t tail = stream_tail(stream).load(std::memory_order_acquire);
    if (tail != 0) link(place_of(tail - 1), at.ticket);
    writer.linked_stream = static_cast<int64_t>(stream);
  }
  writer.linked = at;
  return at.ticket;
}

// ---- shared successors ----

template <class Access>
uint64_t ReplayT<Access>::add_sharing_row(Writer& writer, const InsertRows& rows, size_t row) {
  const uint64_t stream = stream_of(rows, row), flags = end_flags(rows, row);
  const Word<uint64_t> tail = stream_tail(stream);
  const uint64_t open = tail.load(std::memory_order_acquire);
  const Place found = place_of(open == 0 ? 0 : open - 1);
  const Place at = open != 0 && resume(found, rows, row) ? found : hold_stack(writer, rows, row, false, false);
  const RowWeight own = weigh(writer, rows, row);
  write_fields(at.slot, rows, row);
  word_at(at.slot, RecordLayout::kPriority).store(RecordPriority::of(own.priority, at.lap), std::memory_order_release);
  const Place next = continues(rows, row) ? hold(writer, rows, row, true, record_.stack - 1, at.ticket, true)
                                          : hold_stack(writer, rows, row, true, true);
  word_at(at.slot, RecordLayout::kNext).store(next.ticket, std::memory_order_release);
  // Last of the record, release: a window that meets the row before it is published, and reads here first that it is
  // one, finds its reward and its link.
  word_at(at.slot, RecordLayout::kHead)
      .store(RecordHead::of(at.lap, stream, RecordHead::kRow | flags), std::memory_order_release);
  tail.store(flags != 0 ? 0 : next.ticket + 1, std::memory_order_release);
  publish(writer, at, own);
  // The ring may have passed the record while it was busy and then taken the successor's: nobody would overwrite this
  // row before that. acq_rel, with the add in claim: either this sees the ticket that passed, or its taker the
  // published row.
  const bool passed = word(header().next_ticket).fetch_add(0, std::memory_order_acq_rel) > at.ticket + layout_.capacity;
  if (passed || (record_.stack > 1 && !frames_live(at.ticket))) retire(at);
  return at.ticket;
}

// Whether the successor's older frames are the observation's newer ones, as when nothing but time has passed.
template <class Access>
bool ReplayT<Access>::continues(const InsertRows& rows, size_t row) const {
  for (size_t f = 0; f < record_.roles.observations; ++f) {
    const Field& field = record_.fields[f];
    if (field.frames == 1) continue;
    const uint8_t* const own = rows.fields[f] + row * field.bytes;
    const uint8_t* const next = rows.fields[record_.successor_of(f)] + row * field.bytes;
    if (std::memcmp(next, own + field.kept(), field.bytes - field.kept()) != 0) return false;
  }
  return true;
}

// A record for an observation alone, or one frame of it. Published as held, or left busy for the caller to complete.
template <class Access>
typename ReplayT<Access>::Place ReplayT<Access>::hold(Writer& writer, const InsertRows& rows, size_t row,
                                                      bool successor, uint32_t frame, uint64_t previous,
                                                      bool published) {
  const Place at = writer.claim(1);
  write_observation(at.slot, rows, row, successor, frame);
  write_header(at, RecordHead::of(at.lap, stream_of(rows, row), 0), previous == kNone ? at.ticket : previous, 0.0f);
  ++writer.opened;
  if (published) tree_.leaf(at.slot).store(tree_.code.make(at.lap, LeafCode::kHeld, 0), std::memory_order_release);
  return at;
}

// Records for a whole stack, oldest frame first; frames that repeat at its beginning, as after a reset, are kept once.
template <class Access>
typename ReplayT<Access>::Place ReplayT<Access>::hold_stack(Writer& writer, const InsertRows& rows, size_t row,
                                                            bool successor, bool published) {
  uint32_t first = record_.stack - 1;
  for (size_t f = 0; f < record_.roles.observations; ++f) {
    const Field& field = record_.fields[f];
    if (field.frames == 1) continue;
    const uint8_t* const stack = rows.fields[successor ? record_.successor_of(f) : f] + row * field.bytes;
    uint32_t repeats = 0;
    while (repeats + 1 < field.frames && std::memcmp(stack, stack + (repeats + 1) * field.kept(), field.kept()) == 0) {
      ++repeats;
    }
    first = std::min(first, repeats);
  }
  Place previous{kNone, 0, 0};
  for (uint32_t frame = first; frame < record_.stack; ++frame) {
    const bool last = frame + 1 == record_.stack;
    const Place at = hold(writer, rows, row, successor, frame, previous.ticket, !last || published);
    if (previous.ticket != kNone) link(previous, at.ticket);
    previous = at;
  }
  return previous;
}

// Makes the stream's open record busy again if it still shows this row's observation.
template <class Access>
bool ReplayT<Access>::resume(const Place& at, const InsertRows& rows, size_t row) {
  const LeafCode& code = tree_.code;
  const Word<uint64_t> leaf = tree_.leaf(at.slot);
  uint64_t found = leaf.load(std::memory_order_acquire);
  if (!code.has_lap(found, at.lap) || code.state(found) != LeafCode::kHeld) return false;
  if (!still_shows(at, rows, row)) return false;
  return leaf.compare_exchange_strong(found, code.make(at.lap, LeafCode::kBusy, 0), std::memory_order_acq_rel,
                                      std::memory_order_relaxed);
}

template <class Access>
bool ReplayT<Access>::still_shows(const Place& at, const InsertRows& rows, size_t row) {
  std::vector<uint8_t>& copy = scratch(0, 0).shown;
  Place current = at;
  for (uint32_t frame = record_.stack; frame-- > 0;) {
    for (size_t f = 0; f < record_.roles.observations; ++f) {
      const Field& field = record_.fields[f];
      if (field.frames == 1 && frame + 1 < record_.stack) continue;
      copy.resize(std::max<size_t>(copy.size(), field.kept()));
      const FieldCopy piece{copy.data(), field.offset, field.kept(), field.kept()};
      Access::barrier();
      Access::gather(records(), layout_.record_bytes, &current.slot, 1, &piece, 1);
      Access::barrier();
      const uint8_t* const shown = rows.fields[f] + row * field.bytes + (field.frames > 1 ? frame * field.kept() : 0);
      if (std::memcmp(copy.data(), shown, field.kept()) != 0) return false;
    }
    if (record_.stack == 1) return has_lap(current);
    const uint64_t before = word_at(current.slot, RecordLayout::kPrevious).load(std::memory_order_acquire);
    if (!has_lap(current)) return false;
    current = place_of(before);
  }
  return true;
}

// Whether the older frames of a row just published are all there. Partner of forget_dependents: the add of nothing
// stands either before the claim of a frame's slot, whose writer then sees the row, or after it, and then sees the
// claim.
template <class Access>
bool ReplayT<Access>::frames_live(uint64_t ticket) {
  uint64_t slot = place_of(ticket).slot;
  for (uint32_t frame = 1; frame < record_.stack; ++frame) {
    const uint64_t before = word_at(slot, RecordLayout::kPrevious).load(std::memory_order_acquire);
    if (before == ticket) return true;
    const Place at = place_of(before);
    const uint64_t leaf = tree_.leaf(at.slot).fetch_add(0, std::memory_order_acq_rel);
    if (!tree_.code.has_lap(leaf, at.lap)) return false;
    ticket = before;
    slot = at.slot;
  }
  return true;
}

// The record of this ticket has been claimed: rows whose stacks need its frame can no longer be drawn.
template <class Access>
void ReplayT<Access>::forget_dependents(uint64_t ticket, uint64_t next) {
  for (uint32_t frame = 1; frame < record_.stack && next != ticket; ++frame) {
    const Place at = place_of(next);
    const uint64_t before = word_at(at.slot, RecordLayout::kPrevious).load(std::memory_order_acquire);
    const uint64_t after = word_at(at.slot, RecordLayout::kNext).load(std::memory_order_acquire);
    if (before != ticket || !has_lap(at)) return;
    retire(at);
    ticket = next;
    next = after;
  }
}

}  // namespace angle
