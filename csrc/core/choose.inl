// ReplayT: which rows a batch draws. Included by sample.inl.
#pragma once
#include <algorithm>
#include <string>

#include "core/replay.h"
#include "core/scratch.inl"

namespace angle {

namespace {

// Of a draw: kAttempts by choose_distinct, as many by draw_again, then scans, by the first to draw from kScan on and by
// draw_again after choose_distinct from kRescan on. Each has bits of its own, as those of an attempt that failed are no
// longer uniform.
constexpr uint64_t kAttempts = 64, kScan = 2 * kAttempts + 1, kRescan = 1ull << 23;

// Bits of draw i's attempt, counted from 1; attempt 0 is the batch's own.
inline uint64_t bits_of(DrawSource source, uint64_t attempt, size_t i) {
  const PhiloxBlock block =
      philox(source.seed, source.call, (kSample | attempt << 8) + (static_cast<uint64_t>(i / 2) << 32));
  return i % 2 == 0 ? block.low() : block.high();
}

[[noreturn]] inline void too_few(size_t n, size_t found) {
  throw NothingToSample("batch_size is " + std::to_string(n) + ", but only " + std::to_string(found) +
                        " rows have positive weight; draw fewer, or with replacement");
}

}  // namespace

// The rows that a batch without replacement has taken, and what they weighed, by node: private, so that the shared sums
// stay as they are.
template <class Access>
class ReplayT<Access>::Overlay {
 public:
  Overlay(size_t n, const TreeShape& shape_in) : shape(shape_in) {
    size_t places = 16;
    while (places < 2 * n * (shape.levels + 2)) places *= 2;
    keys.assign(places, 0);
    taken.assign(places, 0);
  }
  bool has(uint64_t slot) const { return keys[place(0, slot)] != 0; }
  // What rows below this node have taken of its sum. Level 0: the leaves; shape.levels + 1: the top's groups.
  int64_t at(size_t level, uint64_t node) const { return taken[place(level, node)]; }
  void take(uint64_t slot, uint64_t weight) {
    add(0, slot, weight);
    uint64_t node = slot;
    for (size_t level = 0; level < shape.levels; ++level) {
      node >>= shape.shift[level];
      add(level + 1, node, weight);
    }
    add(shape.levels + 1, node >> TreeShape::kTopShift, weight);
  }

 private:
  size_t place(size_t level, uint64_t node) const {
    const uint64_t key = key_of(level, node);
    size_t at = (key * 0x9E3779B97F4A7C15ull) >> 20 & (keys.size() - 1);
    while (keys[at] != 0 && keys[at] != key) at = (at + 1) & (keys.size() - 1);
    return at;
  }
  void add(size_t level, uint64_t node, uint64_t weight) {
    const size_t at = place(level, node);
    keys[at] = key_of(level, node);
    taken[at] += static_cast<int64_t>(weight);
  }
  static uint64_t key_of(size_t level, uint64_t node) { return (static_cast<uint64_t>(level) + 1) << 48 | node; }

  const TreeShape& shape;
  std::vector<uint64_t> keys;
  std::vector<int64_t> taken;
};

// Draw i's place in [0, total): with strata floor((i + u) * total / n), else floor(u * total), u = bits / 2**64. A row
// of weight w owns w consecutive places, so its chance differs from w / total by less than 2**-63.
template <class Access>
uint64_t ReplayT<Access>::target_of(uint64_t bits, uint64_t total, bool stratified, size_t i, size_t n) {
  const uint64_t within = static_cast<uint64_t>((static_cast<unsigned __int128>(bits) * total) >> 64);
  if (!stratified) return within;
  const unsigned __int128 start = static_cast<unsigned __int128>(total) * i;
  return static_cast<uint64_t>(start / n) + (static_cast<uint64_t>(start % n) + within) / n;
}

template <class Access>
void ReplayT<Access>::choose(const SampleRequest& request, uint64_t total, Scratch& s) {
  const size_t n = request.n;
  if (total == 0) {
    std::fill_n(s.slots.begin(), n, kLost);
    return;
  }
  if (request.stratified) {
    // target_of, with the strata's starts carried along instead of divided anew.
    const uint64_t whole = total / n, rest = total % n;
    const int shift = (n & (n - 1)) == 0 ? __builtin_ctzll(n) : -1;
    uint64_t start = 0, remainder = 0;
    for (size_t i = 0; i < n; ++i) {
      const uint64_t within =
          remainder + static_cast<uint64_t>((static_cast<unsigned __int128>(s.bits[i]) * total) >> 64);
      s.targets[i] = static_cast<int64_t>(start + (shift >= 0 ? within >> shift : within / n));
      start += whole;
      remainder += rest;
      if (remainder >= n) {
        remainder -= n;
        ++start;
      }
    }
  } else {
    for (size_t i = 0; i < n; ++i) s.targets[i] = static_cast<int64_t>(target_of(s.bits[i], total, false, i, n));
  }
  if (prioritized()) {
    tree_.find(s.prefix.data(), request.stratified, n, s.targets.data(), s.slots.data(), s.words.data());
  } else {
    for (size_t i = 0; i < n; ++i) s.slots[i] = static_cast<uint64_t>(s.targets[i]);
    for (size_t i = 0; i < n; ++i) {
      if (i + 16 < n) tree_.prefetch(s.slots[i + 16]);
      s.words[i] = tree_.leaf(s.slots[i]).load(std::memory_order_acquire);
    }
  }
}

// One draw anew: false where it met no row, as under weight in flight.
template <class Access>
bool ReplayT<Access>::choose_again(const SampleRequest& request, size_t i, uint64_t bits, Overlay* overlay,
                                   Scratch& s) {
  if (!prioritized()) {
    // From all slots, not from the stratum: else the rows beside one that holds none would get its share.
    s.slots[i] = target_of(bits, slots_in_use(), false, i, request.n);
    s.words[i] = tree_.leaf(s.slots[i]).load(std::memory_order_acquire);
    return usable(s.slots[i], s.words[i]) && (overlay == nullptr || !overlay->has(s.slots[i]));
  }
  if (overlay == nullptr) {
    const int64_t total = tree_.top_prefix(s.prefix.data());
    if (total <= 0) return false;
    s.targets[i] =
        static_cast<int64_t>(target_of(bits, static_cast<uint64_t>(total), request.stratified, i, request.n));
    tree_.find(s.prefix.data(), false, 1, &s.targets[i], &s.slots[i], &s.words[i]);
    return usable(s.slots[i], s.words[i]);
  }
  const TreeShape& shape = tree_.shape();
  const auto left = [&](size_t level, uint64_t node) {  // of a node's sum, when the rows taken are left out
    const int64_t sum =
        level == 0
            ? static_cast<int64_t>(tree_.code.weight(s.words[i] = tree_.leaf(node).load(std::memory_order_acquire)))
            : tree_.sum(level - 1, node).load(std::memory_order_relaxed);
    return std::max<int64_t>(sum - overlay->at(level, node), 0);
  };
  const size_t groups = tree_.top_groups();
  tree_.top_prefix(s.prefix.data());
  int64_t total = 0, whole = 0;
  for (size_t group = 0; group < groups; ++group) {
    const int64_t sum = s.prefix[group] - whole;
    whole = s.prefix[group];
    total += std::max<int64_t>(sum - overlay->at(shape.levels + 1, group), 0);
    s.prefix[group] = total;
  }
  if (total <= 0) return false;
  int64_t target = static_cast<int64_t>(target_of(bits, static_cast<uint64_t>(total), false, i, request.n));
  uint64_t node = static_cast<uint64_t>(
      std::upper_bound(s.prefix.begin(), s.prefix.begin() + static_cast<ptrdiff_t>(groups), target) - s.prefix.begin());
  if (node > 0) target -= s.prefix[node - 1];
  for (size_t level = shape.levels + 1; level-- > 0;) {
    const uint32_t shift = level == shape.levels ? TreeShape::kTopShift : shape.shift[level];
    const uint64_t first = node << shift, end = first + (1ull << shift);
    for (node = first; node < end; ++node) {
      const int64_t share = left(level, node);
      if (target < share) break;
      target -= share;
    }
    if (node == end) return false;
  }
  s.slots[i] = node;
  return usable(node, s.words[i]) && !overlay->has(node);
}

// One of the rows that are left, all of the same chance, from a list that a batch makes once. Draws that found a row
// elsewhere leave the list as it is, so it may name what is taken.
template <class Access>
bool ReplayT<Access>::choose_listed(size_t i, DrawSource source, uint64_t& attempt, Overlay* overlay, Scratch& s) {
  const auto is_left = [&](uint64_t slot) {
    s.words[i] = tree_.leaf(slot).load(std::memory_order_acquire);
    return usable(slot, s.words[i]) && (overlay == nullptr || !overlay->has(slot));
  };
  if (s.rows.empty()) {
    for (uint64_t slot = 0, slots = slots_in_use(); slot < slots; ++slot) {
      if (is_left(slot)) s.rows.push_back(slot);
    }
  }
  while (!s.rows.empty()) {
    const uint64_t place = target_of(bits_of(source, attempt++, i), s.rows.size(), false, 0, 1);
    s.slots[i] = s.rows[place];
    const bool found = is_left(s.slots[i]);
    if (!found || overlay != nullptr) {
      s.rows[place] = s.rows.back();
      s.rows.pop_back();
    }
    if (found) return true;
  }
  return false;
}

// Any row at all, with priorities from a random place on. Takes the bits of as many attempts as it needs.
template <class Access>
bool ReplayT<Access>::choose_by_scan(size_t i, DrawSource source, uint64_t& attempt, Overlay* overlay, Scratch& s) {
  if (!prioritized()) return choose_listed(i, source, attempt, overlay, s);
  const uint64_t slots = slots_in_use(), first = bits_of(source, attempt++, i) % slots;
  for (uint64_t step = 0; step < slots; ++step) {
    s.slots[i] = (first + step) % slots;
    s.words[i] = tree_.leaf(s.slots[i]).load(std::memory_order_acquire);
    if (usable(s.slots[i], s.words[i]) && (overlay == nullptr || !overlay->has(s.slots[i]))) return true;
  }
  return false;
}

// Without replacement: a draw that met a row already taken is made again among the others. That is the same as drawing
// one after the other from what is left.
template <class Access>
void ReplayT<Access>::choose_distinct(const SampleRequest& request, DrawSource source, Overlay& overlay, Scratch& s) {
  // A uniform batch of most rows: the beginning of a random permutation of them all.
  const bool most = !prioritized() && 2 * request.n > size();
  for (size_t i = 0; i < request.n; ++i) {
    bool found = !most && usable(s.slots[i], s.words[i]) && !overlay.has(s.slots[i]);
    for (uint64_t attempt = 1; !found && !most && attempt <= kAttempts; ++attempt) {
      found = choose_again(request, i, bits_of(source, attempt, i), &overlay, s);
    }
    uint64_t scans = kScan;
    if (!found && !choose_by_scan(i, source, scans, &overlay, s)) too_few(request.n, i);
    overlay.take(s.slots[i], tree_.code.weight(s.words[i]));
  }
}

}  // namespace angle
