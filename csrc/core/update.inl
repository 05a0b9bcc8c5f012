// ReplayT: weights and what follows from them. Included by replay.cpp and by the scheduled tests.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>

#include "core/replay.h"
#include "core/scratch.inl"

namespace angle {

template <class Access>
double ReplayT<Access>::priority_exponent() const {
  return std::bit_cast<double>(word(header().exponent).load(std::memory_order_acquire));
}

template <class Access>
PriorityMap ReplayT<Access>::priority_map() const {
  return {priority_exponent(), header().priority_epsilon, tree_.code.weight_mask};
}

// ---- what new rows weigh ----

template <class Access>
void ReplayT<Access>::raise_historic(float priority) {
  const Word<uint64_t> historic = word(header().historic_maximum);
  uint64_t seen = historic.load(std::memory_order_relaxed);
  while (priority > std::bit_cast<float>(static_cast<uint32_t>(seen)) &&
         !historic.compare_exchange_weak(seen, std::bit_cast<uint32_t>(priority), std::memory_order_relaxed,
                                         std::memory_order_relaxed)) {
  }
}

template <class Access>
typename ReplayT<Access>::Default ReplayT<Access>::default_weight() const {
  SegmentHeader& h = header();
  if (h.prioritized == 0) return {1.0f, 1};
  const PriorityMap map = priority_map();
  uint64_t source = 0;  // what the default follows from, beside the map
  const auto kind = static_cast<DefaultPriority>(h.default_kind);
  if (kind == DefaultPriority::kLiveMaximum) {
    source = counts_.highest();
    if (counts_.rows(true, source) <= 0) source = ~0ull;
  } else if (kind == DefaultPriority::kHistoricMaximum) {
    source = word(h.historic_maximum).load(std::memory_order_relaxed);
  }
  struct Known {
    double exponent, epsilon, given;
    uint64_t kind, source, largest;
    Default found;
  };
  static thread_local Known known{-1.0, 0.0, 0.0, 0, 0, 0, {}};
  if (known.exponent == map.exponent && known.epsilon == map.epsilon && known.given == h.default_priority &&
      known.kind == h.default_kind && known.source == source && known.largest == map.largest) {
    return known.found;
  }
  float priority = static_cast<float>(h.default_priority);
  if (kind == DefaultPriority::kLiveMaximum) {
    priority = source == ~0ull ? 1.0f : map.priority(std::min(WeightBuckets::upper_edge(source), map.largest));
  } else if (kind == DefaultPriority::kHistoricMaximum) {
    priority = source == 0 ? 1.0f : std::bit_cast<float>(static_cast<uint32_t>(source));
  }
  known = {map.exponent,
           map.epsilon,
           h.default_priority,
           h.default_kind,
           source,
           map.largest,
           {priority, map.weight(priority)}};
  return known.found;
}

// ---- one row ----

// A leaf went from one word to another: the sums and the counts follow.
template <class Access>
void ReplayT<Access>::change_weight(uint64_t slot, uint64_t old_leaf, uint64_t new_leaf) {
  if (prioritized()) WeightChanges(*this).add(slot, old_leaf, new_leaf);
}

// Makes the leaf's weight follow the priority and the exponent as they are now, whoever set them. The last to change
// the leaf has seen every priority stored before an earlier change of the leaf, so whoever comes last leaves the two in
// accord.
template <class Access>
void ReplayT<Access>::sync_leaf(const Place& at, bool computed) {
  const LeafCode& code = tree_.code;
  const Word<uint64_t> leaf = tree_.leaf(at.slot), priority = word_at(at.slot, RecordLayout::kPriority);
  for (;;) {
    uint64_t seen = priority.load(std::memory_order_acquire);
    const PriorityMap map = priority_map();
    uint64_t found = leaf.load(std::memory_order_acquire), next = 0;
    if (!RecordPriority::has_lap(seen, at.lap)) {  // a store that came too late for the slot's row before
      if (!code.has_lap(found, at.lap) || !code.is_row(found)) return;
      const uint64_t mended = RecordPriority::of(map.priority(code.weight(found)), at.lap);
      // Swapped, as a newer priority may be on its way.
      if (!priority.compare_exchange_strong(seen, mended, std::memory_order_acq_rel, std::memory_order_acquire)) {
        continue;
      }
      seen = mended;
    }
    const uint64_t weight = map.weight(RecordPriority::value(seen));
    do {
      if (!code.has_lap(found, at.lap) || !code.is_row(found)) return;
      next = code.make(at.lap, computed ? LeafCode::kComputed : code.state(found), weight);
    } while (!leaf.compare_exchange_weak(found, next, std::memory_order_acq_rel, std::memory_order_relaxed));
    change_weight(at.slot, found, next);
    if (priority.load(std::memory_order_acquire) == seen && priority_exponent() == map.exponent) return;
  }
}

// Takes a row out of the draws: its record stays, held like an observation. False when it is gone or held already.
template <class Access>
bool ReplayT<Access>::retire(const Place& at) {
  const LeafCode& code = tree_.code;
  const Word<uint64_t> leaf = tree_.leaf(at.slot);
  const uint64_t held = code.make(at.lap, LeafCode::kHeld, 0);
  uint64_t found = leaf.load(std::memory_order_acquire);
  do {
    if (!code.has_lap(found, at.lap) || !code.is_row(found)) return false;
  } while (!leaf.compare_exchange_weak(found, held, std::memory_order_acq_rel, std::memory_order_acquire));
  change_weight(at.slot, found, held);
  if (shares()) word(header().rows).fetch_sub(1, std::memory_order_relaxed);
  return true;
}

// ---- many rows ----

namespace {

inline void require_issued(const int64_t* handles, size_t n, uint64_t issued) {
  if (kernels().replay.are_below(handles, n, issued)) return;
  for (size_t i = 0; i < n; ++i) {
    if (handles[i] >= 0 && static_cast<uint64_t>(handles[i]) < issued) continue;
    throw std::invalid_argument("handles[" + std::to_string(i) + "] is " + std::to_string(handles[i]) +
                                ", which was never issued; handles so far lie in [0, " + std::to_string(issued) + ")");
  }
}

}  // namespace

template <class Access>
template <class Real>
size_t ReplayT<Access>::update(const int64_t* handles, const Real* td_errors, size_t n) {
  SegmentHeader& h = header();
  const Place issued = place_of(next_ticket());
  require_priorities("td_errors", td_errors, n);
  require_issued(handles, n, issued.ticket);
  const PriorityMap map = priority_map();
  Scratch& s = scratch(n, 0);
  const float* const priorities = narrowed(td_errors, n, s.priorities);
  const uint64_t saturated =
      kernels().replay.weigh(priorities, n, map.epsilon, map.exponent, map.largest, s.weights.data());
  for (size_t i = 0; i < n; ++i) follow(issued, static_cast<uint64_t>(handles[i]), &s.slots[i], &s.words[i]);

  const LeafCode& code = tree_.code;
  // Of rows older than this the lap bits alone might have come round to the same value again.
  const uint64_t laps_told_apart = code.lap_mask / 2;
  constexpr size_t kAhead = 16;
  size_t refused = 0;
  const auto prefetch = [&](size_t i) __attribute__((always_inline)) {
    tree_.prefetch(s.slots[i]);
    __builtin_prefetch(record_at(s.slots[i]), 1);
  };
  for (size_t i = 0; i < std::min(kAhead, n); ++i) prefetch(i);
  {
    WeightChanges changes(*this, n);
    for (size_t i = 0; i < n; ++i) {
      if (i + kAhead < n) prefetch(i + kAhead);
      const Place at{static_cast<uint64_t>(handles[i]), s.slots[i], s.words[i]};
      const Word<uint64_t> leaf = tree_.leaf(at.slot), priority = word_at(at.slot, RecordLayout::kPriority);
      const uint64_t own = RecordPriority::of(priorities[i], at.lap);
      const uint64_t next = code.make(at.lap, LeafCode::kComputed, s.weights[i]);
      uint64_t found = leaf.load(std::memory_order_acquire);
      bool written = false;
      if (at.lap + laps_told_apart >= issued.lap && code.has_lap(found, at.lap) && code.is_row(found)) {
        priority.store(own, std::memory_order_release);  // partner: sync_leaf and the load below
        while (code.has_lap(found, at.lap) && code.is_row(found)) {
          // release: a compare-and-swap goes on with the publisher's release sequence, too. acquire: as in sync_leaf.
          if (leaf.compare_exchange_weak(found, next, std::memory_order_acq_rel, std::memory_order_relaxed)) {
            written = true;
            break;
          }
        }
      }
      if (!written) {
        ++refused;
        continue;
      }
      changes.add(at.slot, found, next);
      uint64_t now = priority.load(std::memory_order_acquire);
      if (now != own) [[unlikely]] {  // another update of this row came in between, or one too late for the row before
        // Not where the slot's next row is there already: its priority stays.
        if (RecordPriority::is_before(now, at.lap)) {
          priority.compare_exchange_strong(now, own, std::memory_order_acq_rel, std::memory_order_relaxed);
        }
        sync_leaf(at, true);
      }
    }
  }
  raise_historic(largest_of(priorities, n));
  if (refused != 0) word(h.refused_updates).fetch_add(refused, std::memory_order_relaxed);
  if (saturated != 0) word(h.saturated_weights).fetch_add(saturated, std::memory_order_relaxed);
  // acq_rel: partner of set_priority_exponent. Either it sees these weights, or this sees its exponent.
  word(h.updates).fetch_add(n - refused, std::memory_order_acq_rel);
  if (priority_exponent() != map.exponent) {
    for (size_t i = 0; i < n; ++i) sync_leaf(place_of(static_cast<uint64_t>(handles[i])), true);
  }
  return refused;
}

template <class Access>
size_t ReplayT<Access>::remove(const int64_t* handles, size_t n) {
  SegmentHeader& h = header();
  const uint64_t issued = next_ticket(), issued_lap = place_of(issued).lap;
  const uint64_t laps_told_apart = tree_.code.lap_mask / 2;
  require_issued(handles, n, issued);
  size_t refused = 0;
  for (size_t i = 0; i < n; ++i) {
    const Place at = place_of(static_cast<uint64_t>(handles[i]));
    refused += at.lap + laps_told_apart < issued_lap || !retire(at);
  }
  word(h.removed).fetch_add(n - refused, std::memory_order_relaxed);
  if (refused != 0) word(h.refused_updates).fetch_add(refused, std::memory_order_relaxed);
  return refused;
}

template <class Access>
void ReplayT<Access>::set_priority_exponent(double exponent) {
  if (!(exponent >= 0.0) || std::isinf(exponent)) {
    throw std::invalid_argument("priority_exponent is " + std::to_string(exponent) +
                                "; it must be finite and not negative");
  }
  SegmentHeader& h = header();
  const PriorityMap before = priority_map();
  word(h.exponent).store(std::bit_cast<uint64_t>(exponent), std::memory_order_release);
  if (!prioritized()) return;
  constexpr size_t kBlock = 512;
  Scratch& s = scratch(kBlock, 0);
  const LeafCode& code = tree_.code;
  do {
    // acq_rel: partners of the ends of insert and update.
    word(h.inserts).fetch_add(0, std::memory_order_acq_rel);
    word(h.updates).fetch_add(0, std::memory_order_acq_rel);
    const PriorityMap map = priority_map();
    exponent = map.exponent;
    for (uint64_t first = 0; first < layout_.capacity; first += kBlock) {
      const size_t n = std::min<uint64_t>(kBlock, layout_.capacity - first);
      for (size_t i = 0; i < n; ++i) {
        s.words[i] = tree_.leaf(first + i).load(std::memory_order_acquire);
        s.slots[i] = 0;
        s.priorities[i] = 0.0f;
        if (code.lap(s.words[i]) == 0 || !code.is_row(s.words[i])) continue;
        s.bits[i] = word_at(first + i, RecordLayout::kPriority).load(std::memory_order_acquire);
        s.slots[i] = RecordHead::lap(word_at(first + i, RecordLayout::kHead).load(std::memory_order_acquire));
        // Lost to a store too late for the row before. The leaf was read first, so what is there came after the row's
        // own priority; and it is swapped, as a newer priority may be on its way.
        while (code.has_lap(s.words[i], s.slots[i]) && !RecordPriority::has_lap(s.bits[i], s.slots[i])) {
          const uint64_t mended = RecordPriority::of(before.priority(code.weight(s.words[i])), s.slots[i]);
          if (word_at(first + i, RecordLayout::kPriority)
                  .compare_exchange_strong(s.bits[i], mended, std::memory_order_acq_rel, std::memory_order_acquire)) {
            s.bits[i] = mended;
          }
        }
        s.priorities[i] = RecordPriority::value(s.bits[i]);
      }
      kernels().replay.weigh(s.priorities.data(), n, map.epsilon, exponent, map.largest, s.weights.data());
      WeightChanges changes(*this);
      for (size_t i = 0; i < n; ++i) {
        const Place at{0, first + i, s.slots[i]};
        if (at.lap == 0 || !code.has_lap(s.words[i], at.lap)) continue;
        uint64_t found = s.words[i];
        const uint64_t next = code.make(at.lap, code.state(found), s.weights[i]);
        if (next == found && tree_.leaf(at.slot).load(std::memory_order_acquire) == found) continue;
        if (tree_.leaf(at.slot).compare_exchange_strong(found, next, std::memory_order_acq_rel,
                                                        std::memory_order_relaxed)) {
          changes.add(at.slot, s.words[i], next);
          if (word_at(at.slot, RecordLayout::kPriority).load(std::memory_order_acquire) == s.bits[i]) continue;
        }
        sync_leaf(at, false);
      }
    }
  } while (priority_exponent() != exponent);
}

}  // namespace angle
