// ReplayT: drawing rows. Included by replay.cpp and by the scheduled tests.
//
// A batch is drawn in passes over all its rows, so that the memory of many rows is on its way at once: choose slots,
// copy the rows, walk their windows, fetch successors and older frames. Each pass marks the rows that were overwritten
// under its hands; those are drawn again one by one through the same passes.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/choose.inl"
#include "core/replay.h"
#include "core/scratch.inl"

namespace angle {

template <class Access>
uint64_t ReplayT<Access>::slots_in_use() const {
  return std::min(next_ticket(), layout_.capacity);
}

template <class Access>
void ReplayT<Access>::follow(const Place& from, uint64_t to, uint64_t* slot, uint64_t* lap) const {
  // Nearly always within a ring of here, which spares the division; farther where busy slots were passed over.
  const uint64_t ahead = to - from.ticket, behind = from.ticket - to;
  if (ahead < layout_.capacity) {
    const bool wraps = from.slot + ahead >= layout_.capacity;
    *slot = from.slot + ahead - (wraps ? layout_.capacity : 0);
    *lap = from.lap + wraps;
  } else if (behind < layout_.capacity) {
    const bool wraps = from.slot < behind;
    *slot = from.slot - behind + (wraps ? layout_.capacity : 0);
    *lap = from.lap - wraps;
  } else {
    const Place at = place_of(to);
    *slot = at.slot;
    *lap = at.lap;
  }
}

template <class Access>
void ReplayT<Access>::gather(const uint64_t* slots, size_t count, const std::vector<FieldCopy>& fields) const {
  Access::barrier();
  Access::gather(records(), layout_.record_bytes, slots, count, fields.data(), fields.size());
  Access::barrier();
}

// Copies rows [first, first + count) of the batch, which slots and words name, and notes in s.whole which stayed whole;
// true if all did.
template <class Access>
bool ReplayT<Access>::complete(const SampleRequest& request, const SampleOut& out, size_t first, size_t count,
                               Scratch& s) {
  const LeafCode& code = tree_.code;
  const bool windows = request.n_step > 1;
  const float discount = static_cast<float>(request.discount);
  s.fields.clear();
  s.fields.push_back({reinterpret_cast<uint8_t*>(&s.headers[4 * first]), 0, record_.header_bytes, 32});
  for (size_t f = 0; f < record_.fields.size(); ++f) {
    const Field& field = record_.fields[f];
    if (out.fields[f] == nullptr || field.frames > 1 || ((windows || shares()) && record_.is_successor(f))) continue;
    s.fields.push_back({out.fields[f] + first * field.bytes, field.offset, field.bytes, field.bytes});
  }
  if (windows) {
    const Field& reward = record_.fields[record_.roles.reward];
    s.fields.push_back({reinterpret_cast<uint8_t*>(&s.rewards[first]), reward.offset, reward.bytes, 8});
  }
  gather(&s.slots[first], count, s.fields);
  size_t lost = 0;
  for (size_t i = first; i < first + count; ++i) {
    const uint64_t word = s.words[i];
    s.whole[i] = 1;
    if (!usable(s.slots[i], word)) [[unlikely]] {
      s.whole[i] = 0;
      s.slots[i] = kLost;
      ++lost;
      continue;
    }
    // The copy's own loads acquire (WordAccess) or are kept in place by the barrier (VectorAccess). The weight may have
    // changed, the lap and that it is a row may not.
    const uint64_t now = tree_.leaf(s.slots[i]).load(std::memory_order_acquire);
    if (code.lap(now) != code.lap(word) || !code.is_row(now)) [[unlikely]] {
      s.whole[i] = 0;
      ++lost;
    }
    const uint64_t head = s.headers[4 * i];
    out.handles[i] = static_cast<int64_t>(ticket_of(s.slots[i], RecordHead::lap(head)));
    out.discounts[i] = RecordHead::has(head, RecordHead::kTerminated) ? 0.0f : discount;
    out.steps[i] = 1;
  }
  if (!windows && !shares()) return lost == 0;
  for (size_t i = first; i < first + count; ++i) {
    s.ends[i] = s.whole[i] != 0 ? s.slots[i] : kLost;
    s.end_laps[i] = RecordHead::lap(s.headers[4 * i]);
    std::copy_n(&s.headers[4 * i], 4, &s.walked[4 * i]);
  }
  if (record_.stack > 1) find_frames(out, false, first, count, s);
  if (windows) walk_windows(request, out, first, count, s);
  fetch_successors(out, first, count, s);
  if (record_.stack > 1) {
    find_frames(out, true, first, count, s);
    copy_frames(out, first, count, s);
  }
  return std::find(&s.whole[first], &s.whole[first] + count, 0) == &s.whole[first] + count;
}

// Sums the rewards of up to n_step rows of the stream. Leaves each window's last row in s.ends, s.end_laps and
// s.walked.
template <class Access>
void ReplayT<Access>::walk_windows(const SampleRequest& request, const SampleOut& out, size_t first, size_t count,
                                   Scratch& s) {
  const LeafCode& code = tree_.code;
  const Field& reward = record_.fields[record_.roles.reward];
  const auto read_reward = [&](size_t i) {
    double value = 0.0;
    if (reward.bytes == 4) {
      float narrow = 0.0f;
      std::memcpy(&narrow, &s.rewards[i], sizeof narrow);
      value = static_cast<double>(narrow);
    } else {
      value = s.rewards[i];
    }
    return value;
  };
  for (size_t i = first; i < first + count; ++i) {
    s.reals[i] = read_reward(i);
    s.bits[i] = std::bit_cast<uint64_t>(request.discount);  // the factor of the next reward
    s.walk[i] = s.ends[i];
  }
  s.fields.clear();
  s.fields.push_back({reinterpret_cast<uint8_t*>(&s.headers[4 * first]), 0, record_.header_bytes, 32});
  s.fields.push_back({reinterpret_cast<uint8_t*>(&s.rewards[first]), reward.offset, reward.bytes, 8});
  for (uint32_t step = 1; step < request.n_step; ++step) {
    size_t going = 0;
    for (size_t i = first; i < first + count; ++i) {
      if (s.walk[i] == kLost) continue;
      const uint64_t* const header = &s.walked[4 * i];
      const Place at{ticket_of(s.ends[i], s.end_laps[i]), s.ends[i], s.end_laps[i]};
      s.walk[i] = kLost;
      if (RecordHead::has(header[0], RecordHead::kTerminated | RecordHead::kTruncated) || header[1] == at.ticket) {
        continue;
      }
      uint64_t slot = 0;
      follow(at, header[1], &slot, &s.walk_laps[i]);
      const uint64_t leaf = tree_.leaf(slot).load(std::memory_order_acquire);
      if (!code.has_lap(leaf, s.walk_laps[i])) {
        s.whole[i] = 0;
      } else if (code.state(leaf) != LeafCode::kBusy) {
        s.walk[i] = slot;
        ++going;
      }
    }
    if (going == 0) break;
    gather(&s.walk[first], count, s.fields);
    for (size_t i = first; i < first + count; ++i) {
      if (s.walk[i] == kLost) continue;
      const Place at{0, s.walk[i], s.walk_laps[i]};
      if (!has_lap(at)) {
        s.whole[i] = 0;
        s.walk[i] = kLost;
        continue;
      }
      // The stream's newest observation, or one that nothing was done at.
      if (!RecordHead::has(s.headers[4 * i], RecordHead::kRow)) {
        s.walk[i] = kLost;
        continue;
      }
      const double factor = std::bit_cast<double>(s.bits[i]);
      s.reals[i] += factor * read_reward(i);
      s.bits[i] = std::bit_cast<uint64_t>(factor * request.discount);
      s.ends[i] = at.slot;
      s.end_laps[i] = at.lap;
      std::copy_n(&s.headers[4 * i], 4, &s.walked[4 * i]);
      ++out.steps[i];
    }
  }
  uint8_t* const rewards = out.fields[record_.roles.reward];
  for (size_t i = first; i < first + count; ++i) {
    if (s.whole[i] == 0) {
      s.ends[i] = kLost;
      continue;
    }
    const bool terminated = RecordHead::has(s.walked[4 * i], RecordHead::kTerminated);
    out.discounts[i] = terminated ? 0.0f : static_cast<float>(std::bit_cast<double>(s.bits[i]));
    if (rewards == nullptr) continue;
    if (reward.bytes == 4) {
      const float narrow = static_cast<float>(s.reals[i]);
      std::memcpy(rewards + i * 4, &narrow, sizeof narrow);
    } else {
      std::memcpy(rewards + i * 8, &s.reals[i], sizeof(double));
    }
  }
}

// The successors of the windows' last rows: their own fields, or the observations of the next records. Those are left
// in s.ends, s.end_laps and s.walked.
template <class Access>
void ReplayT<Access>::fetch_successors(const SampleOut& out, size_t first, size_t count, Scratch& s) {
  if (shares()) {
    for (size_t i = first; i < first + count; ++i) {
      if (s.ends[i] == kLost) continue;
      const Place at{ticket_of(s.ends[i], s.end_laps[i]), s.ends[i], s.end_laps[i]};
      follow(at, s.walked[4 * i + 1], &s.ends[i], &s.end_laps[i]);
    }
  }
  s.fields.clear();
  s.fields.push_back({reinterpret_cast<uint8_t*>(&s.walked[4 * first]), 0, record_.header_bytes, 32});
  for (size_t f = record_.fields.size() - record_.roles.observations; f < record_.fields.size(); ++f) {
    const Field& field = record_.fields[f];
    if (out.fields[f] == nullptr || field.frames > 1) continue;
    s.fields.push_back({out.fields[f] + first * field.bytes, field.offset, field.bytes, field.bytes});
  }
  gather(&s.ends[first], count, s.fields);
  for (size_t i = first; i < first + count; ++i) {
    // A linked record's observation was whole before the link, and stays so while the lap stands.
    if (s.ends[i] != kLost && !has_lap({0, s.ends[i], s.end_laps[i]})) {
      s.whole[i] = 0;
      s.ends[i] = kLost;
    }
  }
}

// Which records hold the frames of the stacks whose newest are in s.ends; where a chain ends, its oldest repeats.
template <class Access>
void ReplayT<Access>::find_frames(const SampleOut& out, bool successors, size_t first, size_t count, Scratch& s) {
  const size_t stack = record_.stack;
  if (s.frames.size() < 2 * stack * (first + count)) s.frames.resize(2 * stack * (first + count));
  const auto frames_of = [&](size_t i) { return &s.frames[(2 * i + (successors ? 1 : 0)) * stack]; };
  for (size_t i = first; i < first + count; ++i) {
    s.walk[i] = s.whole[i] != 0 ? s.ends[i] : kLost;
    if (s.walk[i] == kLost) continue;
    Place* const frames = frames_of(i);
    frames[stack - 1] = {0, s.ends[i], s.end_laps[i]};
    s.walk_laps[i] = s.end_laps[i];
    s.bits[i] = s.walked[4 * i + 3];                                         // the ticket before
    if (successors && s.bits[i] == static_cast<uint64_t>(out.handles[i])) {  // mostly: the observation's own record
      std::copy_n(frames - stack + 1, stack - 1, frames);
      s.walk[i] = kLost;
    }
  }
  s.fields.assign(1, {reinterpret_cast<uint8_t*>(&s.bits[first]), RecordLayout::kPrevious, 8, 8});
  for (size_t frame = stack - 1; frame-- > 0;) {
    for (size_t i = first; i < first + count; ++i) {
      if (s.walk[i] == kLost) continue;
      const Place at{ticket_of(s.walk[i], s.walk_laps[i]), s.walk[i], s.walk_laps[i]};
      follow(at, s.bits[i], &s.walk[i], &s.walk_laps[i]);
      frames_of(i)[frame] = {0, s.walk[i], s.walk_laps[i]};
    }
    if (frame == 0) break;
    gather(&s.walk[first], count, s.fields);
    for (size_t i = first; i < first + count; ++i) {
      if (s.walk[i] == kLost) continue;
      if (!has_lap({0, s.walk[i], s.walk_laps[i]})) {
        s.whole[i] = 0;
        s.walk[i] = kLost;
      }
    }
  }
}

// The stacks themselves, row by row and oldest frame first: a row's frames mostly lie side by side, and those that its
// two stacks share are read once.
template <class Access>
void ReplayT<Access>::copy_frames(const SampleOut& out, size_t first, size_t count, Scratch& s) {
  const size_t stack = record_.stack;
  bool wanted = true;  // all stacks of observations, of which the successors' could be copied
  for (size_t f = 0; f < record_.roles.observations; ++f)
    wanted &= record_.fields[f].frames == 1 || out.fields[f] != nullptr;
  const auto copy = [&](size_t i, bool successor, size_t frame) {
    s.fields.clear();
    for (size_t f = 0; f < record_.roles.observations; ++f) {
      const Field& field = record_.fields[f];
      uint8_t* const to = out.fields[successor ? record_.successor_of(f) : f];
      if (field.frames == 1 || to == nullptr) continue;
      s.fields.push_back({to + i * field.bytes + frame * field.kept(), field.offset, field.kept(), field.bytes});
    }
    gather(&s.frames[(2 * i + (successor ? 1 : 0)) * stack + frame].slot, 1, s.fields);
  };
  for (size_t i = first; i < first + count; ++i) {
    if (s.whole[i] == 0) continue;
    if (i + 1 < first + count && s.whole[i + 1] != 0) {
      const uint8_t* const next = record_at(s.frames[2 * (i + 1) * stack].slot);
      for (size_t at = 0; at < std::min<size_t>(layout_.record_bytes, 1024); at += kLine) __builtin_prefetch(next + at);
    }
    const Place* const frames = &s.frames[2 * i * stack];
    for (size_t frame = 0; frame < stack; ++frame) copy(i, false, frame);
    const auto same = [](const Place& a, const Place& b) { return a.slot == b.slot && a.lap == b.lap; };
    const bool shared = wanted && std::equal(frames + 1, frames + stack, frames + stack, same);
    for (size_t f = 0; shared && f < record_.roles.observations; ++f) {
      const Field& field = record_.fields[f];
      uint8_t* const to = out.fields[record_.successor_of(f)];
      if (field.frames == 1 || to == nullptr) continue;
      std::memcpy(to + i * field.bytes, out.fields[f] + i * field.bytes + field.kept(), field.bytes - field.kept());
    }
    for (size_t frame = shared ? stack - 1 : 0; frame < stack; ++frame) copy(i, true, frame);
    for (size_t frame = 0; frame < 2 * stack; ++frame) s.whole[i] &= has_lap(frames[frame]);
  }
}

// The whole batch, in blocks of rows that stay in the core's caches from pass to pass.
template <class Access>
bool ReplayT<Access>::complete_all(const SampleRequest& request, const SampleOut& out, Scratch& s) {
  constexpr size_t kBlockBytes = size_t{1} << 18;
  size_t bytes = 1;  // of a row, but for stacks, which are copied row by row
  for (const Field& field : record_.fields) bytes += field.frames == 1 ? field.bytes : 0;
  const size_t block = std::max<size_t>(1, kBlockBytes / bytes);
  bool whole = true;
  for (size_t first = 0; first < request.n; first += block) {
    whole &= complete(request, out, first, std::min(block, request.n - first), s);
  }
  return whole;
}

// The slow path: under weight in flight the sums promised more than the leaves held, or the row was overwritten.
template <class Access>
void ReplayT<Access>::draw_again(const SampleRequest& request, const SampleOut& out, size_t i, DrawSource source,
                                 Overlay* overlay, Scratch& s) {
  const auto taken = [&] {
    complete(request, out, i, 1, s);
    if (s.whole[i] != 0 && overlay != nullptr) overlay->take(s.slots[i], tree_.code.weight(s.words[i]));
    return s.whole[i] != 0;
  };
  for (uint64_t attempt = 1; attempt <= kAttempts; ++attempt) {
    word(header().retries).fetch_add(1, std::memory_order_relaxed);
    const uint64_t bits = bits_of(source, attempt + (overlay == nullptr ? 0 : kAttempts), i);
    if (choose_again(request, i, bits, overlay, s) && taken()) return;
  }
  // From ever new places on: a row met may be overwritten before it is copied.
  uint64_t scans = overlay == nullptr ? kScan : kRescan;
  for (uint64_t step = 0, slots = slots_in_use(); step < slots; ++step) {
    if (!choose_by_scan(i, source, scans, overlay, s)) break;
    if (taken()) return;
  }
  if (overlay != nullptr) too_few(request.n, i);
  throw NothingToSample("no row of the buffer has positive weight; nothing can be sampled");
}

// One batch, all but its importance weights.
template <class Access>
void ReplayT<Access>::draw(const SampleRequest& request, const SampleOut& out, uint64_t total, DrawSource source,
                           Scratch& s) {
  const size_t n = request.n;
  kernels().replay.philox_draws(source.seed, source.call, kSample, s.bits.data(), n);
  choose(request, total, s);
  if (request.replacement) {
    const bool whole = complete_all(request, out, s);
    for (size_t i = 0; !whole && i < n; ++i) {
      if (s.whole[i] == 0) draw_again(request, out, i, source, nullptr, s);
    }
  } else {
    Overlay overlay(2 * n, tree_.shape());
    choose_distinct(request, source, overlay, s);
    complete_all(request, out, s);
    for (size_t i = 0; i < n; ++i) {
      if (s.whole[i] == 0) draw_again(request, out, i, source, &overlay, s);
    }
  }
}

template <class Access>
uint64_t ReplayT<Access>::sample(const SampleRequest& request, const SampleOut& out) {
  SegmentHeader& h = header();
  const size_t n = request.n;
  if (request.n_step > 1 && record_.roles.reward == SIZE_MAX) {
    throw std::invalid_argument("n_step is " + std::to_string(request.n_step) + "; rows without a reward have 1");
  }
  const uint64_t slots = slots_in_use();
  if (slots == 0) throw NothingToSample("the buffer is empty; insert rows before sampling");
  Scratch& s = scratch(n, tree_.top_groups());
  s.rows.clear();
  const int64_t total = prioritized() ? tree_.top_prefix(s.prefix.data()) : static_cast<int64_t>(slots);
  // The total may have gone to 0 under an update that adds later; only the leaves can tell.
  uint64_t scans = 0;
  if (total <= 0 && inserts_are_done() && !choose_by_scan(0, {}, scans, nullptr, s)) {
    throw NothingToSample("no row of the buffer has positive weight; nothing can be sampled");
  }
  const uint64_t weight = static_cast<uint64_t>(std::max<int64_t>(total, 0));
  if (request.key.has_value()) {
    draw(request, out, weight, {*request.key, 0}, s);
    write_weights(request, out, s);
    return 0;
  }
  const uint64_t call = word(h.sample_calls).fetch_add(1, std::memory_order_relaxed);
  try {
    draw(request, out, weight, {h.seed, call}, s);
  } catch (...) {
    return_call(call, 0);  // nothing was drawn, so the next batch is the one that this would have been
    throw;
  }
  write_weights(request, out, s);
  const uint64_t issued = next_ticket();
  uint64_t ages = issued * n;
  for (size_t i = 0; i < n; ++i) ages -= static_cast<uint64_t>(out.handles[i]);
  if (out.ages != nullptr) *out.ages = ages;
  word(h.ages).fetch_add(ages, std::memory_order_relaxed);
  word(h.samples).fetch_add(n, std::memory_order_relaxed);
  return call;
}

// (N P)^-b over the largest of the batch, or of the buffer: N and the total cancel, which leaves the smallest weight
// over each.
template <class Access>
void ReplayT<Access>::write_weights(const SampleRequest& request, const SampleOut& out, Scratch& s) const {
  const size_t n = request.n;
  if (!prioritized() || request.importance_exponent == 0.0) {
    std::fill_n(out.importance_weights, n, 1.0f);
    return;
  }
  uint64_t smallest = request.bound_by_buffer ? counts_.lowest_weight(tree_.code.weight_mask) : ~0ull;
  for (size_t i = 0; i < n; ++i) {
    const uint64_t weight = tree_.code.weight(s.words[i]);
    smallest = std::min(smallest, weight);
    s.reals[i] = static_cast<double>(weight);
  }
  const double least = static_cast<double>(smallest);
  for (size_t i = 0; i < n; ++i) s.reals[i] = least / s.reals[i];
  kernels().replay.powers(s.reals.data(), n, request.importance_exponent);
  for (size_t i = 0; i < n; ++i) out.importance_weights[i] = static_cast<float>(s.reals[i]);
}

}  // namespace angle
