#include "core/replay.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <new>
#include <string>

namespace angle {

// One thread's working memory, kept from call to call so that a steady state allocates nothing.
template <class Access>
struct ReplayT<Access>::Scratch {
  std::vector<int64_t> prefix, targets;
  std::vector<uint64_t> bits, slots, words, headers;
  std::vector<double> reals;
  std::vector<uint64_t> weights;
  std::vector<int32_t> bucket_changes = std::vector<int32_t>(kBuckets, 0);
  std::vector<size_t> touched;
  std::vector<FieldCopy> fields;
};

template <class Access>
typename ReplayT<Access>::Scratch& ReplayT<Access>::scratch(size_t n, size_t top) {
  static thread_local Scratch s;
  if (s.targets.size() < n) {
    s.targets.resize(n);
    s.bits.resize(n);
    s.slots.resize(n);
    s.words.resize(n);
    s.headers.resize(3 * n);
    s.reals.resize(n);
    s.weights.resize(n);
  }
  if (s.prefix.size() < top + 8) s.prefix.resize(top + 8);
  return s;
}

template <class Access>
ReplayT<Access>::ReplayT(const ReplayOptions& options, RecordLayout record)
    : options_(options),
      record_(std::move(record)),
      layout_(options.capacity, record_),
      memory_(layout_.total_bytes),
      tree_(memory_.data(), layout_) {
  static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<int64_t>::is_always_lock_free);
  SegmentHeader* const h = new (memory_.data()) SegmentHeader();  // zeroed counters
  h->magic = SegmentHeader::kMagic;
  h->version = SegmentHeader::kVersion;
  h->prioritized = options_.prioritized;
  h->schema_hash = record_.schema_hash;
  h->capacity = options_.capacity;
  h->record_bytes = record_.record_bytes;
  h->segment_bytes = layout_.total_bytes;
  h->seed = options_.seed;
}

template <class Access>
uint64_t ReplayT<Access>::size() const {
  return std::min(header().next_ticket.load(std::memory_order_acquire), options_.capacity);
}

// ---- weights ----

template <class Access>
uint64_t ReplayT<Access>::to_fixed(double weight, uint64_t* saturated) const {
  const double scaled = weight * kUnit;
  if (!(scaled < static_cast<double>(tree_.code.weight_mask))) {
    ++*saturated;
    return tree_.code.weight_mask;
  }
  const uint64_t rounded = static_cast<uint64_t>(scaled + 0.5);
  return rounded == 0 && weight > 0.0 ? 1 : rounded;
}

template <class Access>
uint64_t ReplayT<Access>::weight_of(double priority, uint64_t* saturated) const {
  double value = priority + options_.priority_epsilon;
  kernels().replay.powers(&value, 1, options_.priority_exponent);
  return to_fixed(value, saturated);
}

template <class Access>
void ReplayT<Access>::raise_highest(size_t bucket) {
  // seq_cst: partner of highest_bucket. Either it sees the count that went up before, or this sees the mark it lowered.
  uint64_t mark = header().highest_bucket.load(std::memory_order_seq_cst);
  while (mark < bucket && !header().highest_bucket.compare_exchange_weak(mark, bucket, std::memory_order_seq_cst)) {
  }
}

template <class Access>
size_t ReplayT<Access>::highest_bucket() const {
  SegmentHeader& h = header();
  uint64_t mark = h.highest_bucket.load(std::memory_order_seq_cst);
  for (;;) {
    uint64_t found = mark;
    while (found > 0 && h.buckets[found].load(std::memory_order_relaxed) <= 0) --found;
    if (found == mark) return found;
    const uint64_t lowered_from = mark;
    if (!h.highest_bucket.compare_exchange_strong(mark, found, std::memory_order_seq_cst)) continue;
    for (uint64_t bucket = lowered_from; bucket > found; --bucket) {
      if (h.buckets[bucket].load(std::memory_order_seq_cst) > 0) {
        const_cast<ReplayT*>(this)->raise_highest(bucket);
        return bucket;
      }
    }
    return found;
  }
}

template <class Access>
uint64_t ReplayT<Access>::default_weight() const {
  if (!options_.prioritized) return 1;
  const size_t bucket = highest_bucket();
  if (header().buckets[bucket].load(std::memory_order_relaxed) > 0) {
    return std::min(WeightBuckets::upper_edge(bucket), tree_.code.weight_mask);
  }
  uint64_t saturated = 0;
  return weight_of(1.0, &saturated);
}

// ---- insert ----

template <class Access>
bool ReplayT<Access>::claim(uint64_t ticket, uint64_t* old_leaf) {
  const LeafCode& code = tree_.code;
  std::atomic<uint64_t>& leaf = tree_.leaf(ticket % options_.capacity);
  const uint64_t lap = lap_of(ticket);
  uint64_t word = leaf.load(std::memory_order_relaxed);
  for (;;) {
    const uint64_t ahead = (lap - code.lap(word)) & code.lap_mask;
    const bool passed = ahead == 0 || ahead > code.lap_mask / 2;  // a later writer was here already
    if (code.is_busy(word) || passed) return false;
    // acquire: no byte of the record is written before the mark. release: whoever reads such a byte sees the mark.
    if (leaf.compare_exchange_weak(word, code.with_lap(lap) | code.busy, std::memory_order_acq_rel,
                                   std::memory_order_relaxed)) {
      *old_leaf = word;
      return true;
    }
  }
}

template <class Access>
void ReplayT<Access>::write_record(uint64_t ticket, const InsertRows& rows, size_t row) {
  const uint64_t slot = ticket % options_.capacity;
  uint8_t* const record = record_at(slot);
  for (size_t f = 0; f < record_.fields.size(); ++f) {
    const Field& field = record_.fields[f];
    Access::store_field(record + field.offset, rows.fields[f] + row * field.bytes, field.bytes);
  }
  const uint64_t stream = rows.streams == nullptr ? 0 : static_cast<uint64_t>(rows.streams[row]);
  const uint64_t terminated = rows.terminated[row] != 0;
  const uint64_t truncated = rows.truncated != nullptr && rows.truncated[row] != 0;
  // release: as in store_field.
  word_at(slot, RecordLayout::kTicket).store(ticket, std::memory_order_release);
  word_at(slot, RecordLayout::kNext).store(ticket, std::memory_order_release);  // itself: no next row yet
  word_at(slot, RecordLayout::kStreamAndEnd)
      .store(stream | terminated << 32 | truncated << 33, std::memory_order_release);
}

template <class Access>
void ReplayT<Access>::link(uint64_t previous, uint64_t ticket) {
  // Fails, as it should, when the previous row is gone: its successor in the slot links to its own ticket.
  uint64_t expected = previous;
  word_at(previous % options_.capacity, RecordLayout::kNext)
      .compare_exchange_strong(expected, ticket, std::memory_order_release, std::memory_order_relaxed);
}

template <class Access>
void ReplayT<Access>::insert(const InsertRows& rows, int64_t* handles) {
  SegmentHeader& h = header();
  if (rows.n > options_.capacity) {
    throw std::invalid_argument("observations hold " + std::to_string(rows.n) + " rows; the buffer's capacity is " +
                                std::to_string(options_.capacity));
  }
  if (rows.streams != nullptr) {
    for (size_t i = 0; i < rows.n; ++i) {
      if (rows.streams[i] < 0 || rows.streams[i] >= static_cast<int64_t>(kStreams)) {
        throw std::invalid_argument("streams[" + std::to_string(i) + "] is " + std::to_string(rows.streams[i]) +
                                    "; it must be between 0 and " + std::to_string(kStreams - 1));
      }
    }
  }
  if (rows.n == 0) return;
  const LeafCode& code = tree_.code;
  const uint64_t weight = default_weight();
  uint64_t ticket = 0, tickets_left = 0, given_up = 0;
  int64_t linked_stream = -1;
  uint64_t linked_ticket = 0;
  {
    typename PriorityTree<Access>::Deltas deltas(tree_);
    for (size_t row = 0; row < rows.n; ++row) {
      uint64_t old_leaf = 0;
      for (;;) {
        if (tickets_left == 0) {
          tickets_left = rows.n - row;
          ticket = h.next_ticket.fetch_add(tickets_left, std::memory_order_acq_rel);
        }
        if (claim(ticket, &old_leaf)) break;
        ++given_up;
        ++ticket;
        --tickets_left;
      }
      const uint64_t slot = ticket % options_.capacity;
      write_record(ticket, rows, row);
      // release: partner of the samplers' acquire load of the leaf.
      tree_.leaf(slot).store(code.with_lap(lap_of(ticket)) | weight, std::memory_order_release);
      if (options_.prioritized) {
        const uint64_t old_weight = code.weight(old_leaf);
        deltas.add(slot, static_cast<int64_t>(weight) - static_cast<int64_t>(old_weight));
        if (code.is_computed(old_leaf) && old_weight != 0) {
          h.buckets[WeightBuckets::of(old_weight)].fetch_sub(1, std::memory_order_relaxed);
        }
      }
      const int64_t stream = rows.streams == nullptr ? 0 : rows.streams[row];
      if (stream == linked_stream) {
        link(linked_ticket, ticket);
      } else {
        if (linked_stream >= 0) stream_tail(linked_stream).store(linked_ticket + 1, std::memory_order_release);
        const uint64_t tail = stream_tail(stream).load(std::memory_order_acquire);
        if (tail != 0) link(tail - 1, ticket);
        linked_stream = stream;
      }
      linked_ticket = ticket;
      handles[row] = static_cast<int64_t>(ticket);
      ++ticket;
      --tickets_left;
    }
  }
  stream_tail(linked_stream).store(linked_ticket + 1, std::memory_order_release);
  h.inserts.fetch_add(rows.n, std::memory_order_relaxed);
  if (given_up != 0) h.busy_slots.fetch_add(given_up, std::memory_order_relaxed);
  if (rows.nan_rows != 0) h.nan_observations.fetch_add(rows.nan_rows, std::memory_order_relaxed);
}

// ---- sample ----

// Draw i's place in [0, total): with strata floor((i + u) * total / n), else floor(u * total), u = bits / 2**64. A row
// of weight w owns w consecutive places, so its chance differs from w / total by less than 2**-63.
template <class Access>
uint64_t ReplayT<Access>::target_of(uint64_t bits, uint64_t total, size_t i, size_t n) const {
  const uint64_t within = static_cast<uint64_t>((static_cast<unsigned __int128>(bits) * total) >> 64);
  if (!options_.stratified) return within;
  const unsigned __int128 start = static_cast<unsigned __int128>(total) * i;
  return static_cast<uint64_t>(start / n) + (static_cast<uint64_t>(start % n) + within) / n;
}

template <class Access>
bool ReplayT<Access>::still_whole(uint64_t slot, uint64_t word) const {
  const LeafCode& code = tree_.code;
  // The copy's own loads acquire (WordAccess) or are kept in place by the barrier before this (VectorAccess).
  const uint64_t now = tree_.leaf(slot).load(std::memory_order_acquire);
  return code.lap(now) == code.lap(word) && !code.is_busy(now);
}

// Copies the row that slots[i] and words[i] name and looks whether it stayed whole.
template <class Access>
bool ReplayT<Access>::take_row(size_t i, Scratch& s, const std::vector<FieldCopy>& fields) {
  if (tree_.code.weight(s.words[i]) == 0 || tree_.code.is_busy(s.words[i])) return false;
  std::vector<FieldCopy> moved = fields;
  for (FieldCopy& field : moved) field.out += i * field.bytes;
  Access::barrier();
  Access::gather(memory_.data() + layout_.records_at, layout_.record_bytes, &s.slots[i], 1, moved.data(), moved.size());
  Access::barrier();
  return still_whole(s.slots[i], s.words[i]);
}

// The slow path: under weight in flight the sums promised more than the leaves held, or the row was overwritten.
template <class Access>
void ReplayT<Access>::draw_again(size_t i, size_t n, uint64_t call, Scratch& s, const std::vector<FieldCopy>& fields) {
  constexpr uint64_t kAttempts = 64;
  uint64_t bits = 0;
  for (uint64_t attempt = 1; attempt <= kAttempts; ++attempt) {
    header().retries.fetch_add(1, std::memory_order_relaxed);
    const PhiloxBlock block =
        philox(options_.seed, call, (kSample | attempt << 8) + (static_cast<uint64_t>(i / 2) << 32));
    bits = i % 2 == 0 ? block.low() : block.high();
    if (options_.prioritized) {
      const int64_t total = tree_.top_prefix(s.prefix.data());
      if (total <= 0) continue;
      s.targets[i] = static_cast<int64_t>(target_of(bits, static_cast<uint64_t>(total), i, n));
      tree_.find(s.prefix.data(), false, 1, &s.targets[i], &s.slots[i], &s.words[i]);
      if (s.slots[i] == kLost) continue;
    } else {
      s.slots[i] = target_of(bits, size(), i, n);
      s.words[i] = tree_.leaf(s.slots[i]).load(std::memory_order_acquire);
    }
    if (take_row(i, s, fields)) return;
  }
  const uint64_t rows = size(), first = bits % rows;
  for (uint64_t step = 0; step < rows; ++step) {
    s.slots[i] = (first + step) % rows;
    s.words[i] = tree_.leaf(s.slots[i]).load(std::memory_order_acquire);
    if (take_row(i, s, fields)) return;
  }
  throw NothingToSample("no row of the buffer has positive weight; nothing can be sampled");
}

template <class Access>
void ReplayT<Access>::sample(size_t n, double discount, double importance_exponent, const SampleOut& out) {
  SegmentHeader& h = header();
  const uint64_t rows = size();
  if (rows == 0) throw NothingToSample("the buffer is empty; insert rows before sampling");
  Scratch& s = scratch(n, tree_.top_nodes());
  const int64_t total = options_.prioritized ? tree_.top_prefix(s.prefix.data()) : static_cast<int64_t>(rows);
  if (total <= 0 && next_ticket() == h.inserts.load(std::memory_order_relaxed)) {
    throw NothingToSample("no row of the buffer has positive weight; nothing can be sampled");
  }
  const uint64_t call = h.sample_calls.fetch_add(1, std::memory_order_relaxed);
  kernels().replay.philox_draws(options_.seed, call, kSample, s.bits.data(), n);
  const uint64_t range = static_cast<uint64_t>(std::max<int64_t>(total, 0));
  if (options_.stratified) {
    // target_of, with the strata's starts carried along instead of divided anew.
    const uint64_t whole = range / n, rest = range % n;
    const int shift = (n & (n - 1)) == 0 ? __builtin_ctzll(n) : -1;
    uint64_t start = 0, remainder = 0;
    for (size_t i = 0; i < n; ++i) {
      const uint64_t within =
          remainder + static_cast<uint64_t>((static_cast<unsigned __int128>(s.bits[i]) * range) >> 64);
      s.targets[i] = static_cast<int64_t>(start + (shift >= 0 ? within >> shift : within / n));
      start += whole;
      remainder += rest;
      if (remainder >= n) {
        remainder -= n;
        ++start;
      }
    }
  } else {
    for (size_t i = 0; i < n; ++i) s.targets[i] = static_cast<int64_t>(target_of(s.bits[i], range, i, n));
  }
  if (total <= 0) {
    std::fill_n(s.slots.begin(), n, kLost);
  } else if (options_.prioritized) {
    tree_.find(s.prefix.data(), options_.stratified, n, s.targets.data(), s.slots.data(), s.words.data());
  } else {
    for (size_t i = 0; i < n; ++i) s.slots[i] = static_cast<uint64_t>(s.targets[i]);
    for (size_t i = 0; i < n; ++i) {
      if (i + 16 < n) tree_.prefetch(s.slots[i + 16]);
      s.words[i] = tree_.leaf(s.slots[i]).load(std::memory_order_acquire);
    }
  }

  s.fields.clear();
  s.fields.push_back({reinterpret_cast<uint8_t*>(s.headers.data()), 0, RecordLayout::kHeader});
  for (size_t f = 0; f < record_.fields.size(); ++f) {
    if (out.fields[f] != nullptr)
      s.fields.push_back({out.fields[f], record_.fields[f].offset, record_.fields[f].bytes});
  }
  Access::barrier();
  Access::gather(memory_.data() + layout_.records_at, layout_.record_bytes, s.slots.data(), n, s.fields.data(),
                 s.fields.size());
  Access::barrier();

  const LeafCode& code = tree_.code;
  uint64_t smallest = ~0ull;
  for (size_t i = 0; i < n; ++i) {
    const uint64_t slot = s.slots[i];
    const bool whole =
        slot != kLost && code.weight(s.words[i]) != 0 && !code.is_busy(s.words[i]) && still_whole(slot, s.words[i]);
    if (!whole) [[unlikely]] {
      draw_again(i, n, call, s, s.fields);
    }
    const uint64_t weight = code.weight(s.words[i]);
    smallest = std::min(smallest, weight);
    out.handles[i] = static_cast<int64_t>(s.headers[3 * i]);
    out.discounts[i] = (s.headers[3 * i + 2] >> 32 & 1) != 0 ? 0.0f : static_cast<float>(discount);
    out.steps[i] = 1;
    s.reals[i] = static_cast<double>(weight);
  }
  // (N P)^-b over the batch's largest: N and the total cancel, which leaves the smallest weight over each.
  if (options_.prioritized && importance_exponent != 0.0) {
    const double least = static_cast<double>(smallest);
    for (size_t i = 0; i < n; ++i) s.reals[i] = least / s.reals[i];
    kernels().replay.powers(s.reals.data(), n, importance_exponent);
    for (size_t i = 0; i < n; ++i) out.importance_weights[i] = static_cast<float>(s.reals[i]);
  } else {
    std::fill_n(out.importance_weights, n, 1.0f);
  }
  h.samples.fetch_add(n, std::memory_order_relaxed);
}

// ---- update ----

template <class Access>
template <class Real>
size_t ReplayT<Access>::update(const int64_t* handles, const Real* td_errors, size_t n) {
  SegmentHeader& h = header();
  const uint64_t issued = h.next_ticket.load(std::memory_order_acquire);
  Scratch& s = scratch(n, 0);
  for (size_t i = 0; i < n; ++i) {
    const double td_error = static_cast<double>(td_errors[i]);
    if (!(td_error >= 0.0) || std::isinf(td_error)) {
      throw std::invalid_argument("td_errors[" + std::to_string(i) + "] is " + std::to_string(td_error) +
                                  "; priorities must be finite and not negative");
    }
    if (handles[i] < 0 || static_cast<uint64_t>(handles[i]) >= issued) {
      throw std::invalid_argument("handles[" + std::to_string(i) + "] is " + std::to_string(handles[i]) +
                                  ", which was never issued; handles so far lie in [0, " + std::to_string(issued) +
                                  ")");
    }
    s.reals[i] = td_error + options_.priority_epsilon;
  }
  kernels().replay.powers(s.reals.data(), n, options_.priority_exponent);
  uint64_t saturated = 0;
  for (size_t i = 0; i < n; ++i) s.weights[i] = to_fixed(s.reals[i], &saturated);
  for (size_t i = 0; i < n; ++i) {
    const uint64_t ticket = static_cast<uint64_t>(handles[i]), lap = ticket / options_.capacity;
    s.slots[i] = ticket - lap * options_.capacity;
    s.words[i] = (lap + 1) & tree_.code.lap_mask;  // as in lap_of
  }

  const LeafCode& code = tree_.code;
  constexpr size_t kAhead = 8;
  size_t refused = 0;
  const auto change_bucket = [&s](uint64_t weight, int32_t by) {
    const size_t bucket = WeightBuckets::of(weight);
    if (s.bucket_changes[bucket] == 0) s.touched.push_back(bucket);
    s.bucket_changes[bucket] += by;
  };
  for (size_t i = 0; i < std::min(kAhead, n); ++i) tree_.prefetch(s.slots[i]);
  {
    typename PriorityTree<Access>::Deltas deltas(tree_);
    for (size_t i = 0; i < n; ++i) {
      if (i + kAhead < n) tree_.prefetch(s.slots[i + kAhead]);
      const uint64_t ticket = static_cast<uint64_t>(handles[i]);
      const uint64_t lap = s.words[i], next = code.with_lap(lap) | code.computed | s.weights[i];
      std::atomic<uint64_t>& leaf = tree_.leaf(s.slots[i]);
      uint64_t word = leaf.load(std::memory_order_relaxed);
      bool written = false;
      // Older than a whole ring: the lap bits alone might have come round to the same value again.
      while (ticket + options_.capacity >= issued && code.lap(word) == lap && !code.is_busy(word)) {
        // relaxed: a compare-and-swap goes on with the publisher's release sequence.
        if (leaf.compare_exchange_weak(word, next, std::memory_order_relaxed, std::memory_order_relaxed)) {
          written = true;
          break;
        }
      }
      if (!written) {
        ++refused;
        continue;
      }
      const uint64_t old_weight = code.weight(word);
      deltas.add(s.slots[i], static_cast<int64_t>(s.weights[i]) - static_cast<int64_t>(old_weight));
      if (code.is_computed(word) && old_weight != 0) change_bucket(old_weight, -1);
      if (s.weights[i] != 0) change_bucket(s.weights[i], +1);
    }
  }
  for (const size_t bucket : s.touched) {
    const int32_t by = s.bucket_changes[bucket];
    s.bucket_changes[bucket] = 0;
    if (by == 0) continue;
    h.buckets[bucket].fetch_add(by, std::memory_order_seq_cst);  // partner: highest_bucket
    if (by > 0) raise_highest(bucket);
  }
  s.touched.clear();
  h.updates.fetch_add(n - refused, std::memory_order_relaxed);
  if (refused != 0) h.refused_updates.fetch_add(refused, std::memory_order_relaxed);
  if (saturated != 0) h.saturated_weights.fetch_add(saturated, std::memory_order_relaxed);
  return refused;
}

// ---- looking in ----

template <class Access>
ReplayStats ReplayT<Access>::stats() const {
  const SegmentHeader& h = header();
  const auto read = [](const std::atomic<uint64_t>& counter) { return counter.load(std::memory_order_relaxed); };
  return {read(h.inserts),    read(h.samples), read(h.updates),           read(h.refused_updates),
          read(h.busy_slots), read(h.retries), read(h.saturated_weights), read(h.nan_observations)};
}

template <class Access>
void ReplayT<Access>::read_weights(int64_t* out) const {
  for (uint64_t slot = 0; slot < options_.capacity; ++slot) {
    out[slot] = static_cast<int64_t>(tree_.code.weight(tree_.leaf(slot).load(std::memory_order_relaxed)));
  }
}

template <class Access>
bool ReplayT<Access>::sums_are_exact() const {
  const TreeShape& shape = tree_.shape();
  std::vector<int64_t> below(shape.leaves_padded);
  read_weights(below.data());
  for (size_t level = 0; level < shape.levels; ++level) {
    const auto* sums = reinterpret_cast<const std::atomic<int64_t>*>(memory_.data() + layout_.sums_at[level]);
    std::vector<int64_t> expected(shape.padded[level], 0);
    for (size_t child = 0; child < below.size() && child >> shape.shift[level] < expected.size(); ++child) {
      expected[child >> shape.shift[level]] += below[child];
    }
    for (size_t node = 0; node < expected.size(); ++node) {
      if (sums[node].load(std::memory_order_relaxed) != expected[node]) return false;
    }
    below = std::move(expected);
  }
  return true;
}

template <class Access>
void ReplayT<Access>::check_header(const SegmentHeader& saved) const {
  const SegmentHeader& own = header();
  const auto require = [](bool equal, const char* what, uint64_t theirs, uint64_t ours) {
    if (!equal) {
      throw std::invalid_argument(std::string("the saved replay does not fit: its ") + what + " is " +
                                  std::to_string(theirs) + ", this buffer's is " + std::to_string(ours));
    }
  };
  require(saved.magic == own.magic, "magic number", saved.magic, own.magic);
  require(saved.version == own.version, "format version", saved.version, own.version);
  require(saved.prioritized == own.prioritized, "prioritised flag", saved.prioritized, own.prioritized);
  require(saved.capacity == own.capacity, "capacity", saved.capacity, own.capacity);
  require(saved.schema_hash == own.schema_hash, "schema hash", saved.schema_hash, own.schema_hash);
  require(saved.record_bytes == own.record_bytes, "record size", saved.record_bytes, own.record_bytes);
}

#define ANGLE_INSTANTIATE(Access)                                                       \
  template class ReplayT<Access>;                                                       \
  template size_t ReplayT<Access>::update<float>(const int64_t*, const float*, size_t); \
  template size_t ReplayT<Access>::update<double>(const int64_t*, const double*, size_t);

ANGLE_INSTANTIATE(WordAccess)
#if !defined(ANGLE_WORD_ACCESS)
ANGLE_INSTANTIATE(VectorAccess)
#endif

}  // namespace angle
