// ReplayT: making, opening, counting, checking and mending. Included by replay.cpp and by the scheduled tests.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <new>

#include "core/replay.h"
#include "core/scratch.inl"

namespace angle {
namespace {

inline const ReplayOptions& checked(const ReplayOptions& options, const RecordLayout& record) {
  if (record.roles.share_successors && options.capacity < 2) {
    throw std::invalid_argument("capacity is " + std::to_string(options.capacity) +
                                "; with shared successors it must be at least 2");
  }
  const auto require = [](bool holds, const char* name, double value) {
    if (!holds) {
      throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) +
                                  "; it must be finite and not negative");
    }
  };
  const auto fits = [](double value) { return value >= 0.0 && !std::isinf(value); };
  require(fits(options.priority_exponent), "priority_exponent", options.priority_exponent);
  require(fits(options.priority_epsilon), "priority_epsilon", options.priority_epsilon);
  require(fits(options.default_priority), "default_priority", options.default_priority);
  return options;
}

// The first bytes of memory that another process may have made.
inline const SegmentHeader& opened(const Memory& memory) {
  const auto refuse = [](const std::string& why) { throw std::invalid_argument("this is no replay segment: " + why); };
  if (memory.bytes() < sizeof(SegmentHeader)) refuse("it has only " + std::to_string(memory.bytes()) + " bytes");
  const auto& h = *reinterpret_cast<const SegmentHeader*>(memory.data());
  if (h.magic != SegmentHeader::kMagic) refuse("its first bytes are others");
  if (h.version != SegmentHeader::kVersion) {
    refuse("its format version is " + std::to_string(h.version) + ", this library's is " +
           std::to_string(SegmentHeader::kVersion));
  }
  if (__atomic_load_n(&h.ready, __ATOMIC_ACQUIRE) != 1) refuse("its maker has not finished it");
  if (h.segment_bytes != memory.bytes() || h.meta_bytes > h.segment_bytes - sizeof(SegmentHeader)) {
    refuse("it has " + std::to_string(memory.bytes()) + " bytes, and its header says " +
           std::to_string(h.segment_bytes));
  }
  return h;
}

}  // namespace

template <class Access>
uint64_t ReplayT<Access>::bytes_needed(const ReplayOptions& options, const RecordLayout& record, size_t meta_bytes) {
  return SegmentLayout(checked(options, record).capacity, record, meta_bytes).total_bytes;
}

template <class Access>
std::string_view ReplayT<Access>::read_meta(const Memory& memory) {
  const SegmentHeader& h = opened(memory);
  return {reinterpret_cast<const char*>(memory.data()) + (sizeof(SegmentHeader) + kLine - 1) / kLine * kLine,
          h.meta_bytes};
}

template <class Access>
ReplayT<Access>::ReplayT(const ReplayOptions& options, RecordLayout record)
    : ReplayT(options, record, Memory::anonymous(bytes_needed(options, record)), {}) {}

template <class Access>
ReplayT<Access>::ReplayT(const ReplayOptions& options, RecordLayout record, Memory memory, std::string_view meta)
    : record_(std::move(record)),
      layout_(checked(options, record_).capacity, record_, meta.size()),
      memory_(std::move(memory)),
      tree_(memory_.data(), layout_),
      counts_(&header()) {
  if (memory_.bytes() < layout_.total_bytes) {
    throw std::invalid_argument("the memory has " + std::to_string(memory_.bytes()) + " bytes; the segment needs " +
                                std::to_string(layout_.total_bytes));
  }
  SegmentHeader& h = header();
  h.magic = SegmentHeader::kMagic;
  h.version = SegmentHeader::kVersion;
  h.prioritized = options.prioritized;
  h.schema_hash = record_.schema_hash;
  h.capacity = layout_.capacity;
  h.record_bytes = record_.record_bytes;
  h.segment_bytes = layout_.total_bytes;
  h.meta_bytes = meta.size();
  h.seed = options.seed;
  h.priority_epsilon = options.priority_epsilon;
  h.default_kind = static_cast<uint64_t>(options.default_kind);
  h.default_priority = options.default_priority;
  h.exponent = std::bit_cast<uint64_t>(options.priority_exponent);
  std::copy(meta.begin(), meta.end(), memory_.data() + layout_.meta_at);
  __atomic_store_n(&h.ready, 1, __ATOMIC_RELEASE);  // partner: opened
}

template <class Access>
ReplayT<Access>::ReplayT(RecordLayout record, Memory memory)
    : record_(std::move(record)),
      layout_(opened(memory).capacity, record_, opened(memory).meta_bytes),
      memory_(std::move(memory)),
      tree_(memory_.data(), layout_),
      counts_(&header()) {
  SegmentHeader& h = header();
  if (word(h.highest_bucket).load(std::memory_order_relaxed) >= kBuckets) {
    throw std::invalid_argument("this is no replay segment: its counts of rows by weight are damaged");
  }
  if (h.schema_hash != record_.schema_hash || h.record_bytes != record_.record_bytes ||
      h.segment_bytes != layout_.total_bytes) {
    throw std::invalid_argument("this is no replay segment of these rows: its schema hash is " +
                                std::to_string(h.schema_hash) + ", theirs is " + std::to_string(record_.schema_hash));
  }
}

// ---- counting ----

template <class Access>
uint64_t ReplayT<Access>::next_ticket() const {
  return word(header().next_ticket).load(std::memory_order_acquire);
}

template <class Access>
uint64_t ReplayT<Access>::size() const {
  return shares() ? word(header().rows).load(std::memory_order_relaxed) : slots_in_use();
}

template <class Access>
bool ReplayT<Access>::inserts_are_done() const {
  SegmentHeader& h = header();
  return next_ticket() == word(shares() ? h.opened : h.inserts).load(std::memory_order_relaxed) +
                              word(h.busy_slots).load(std::memory_order_relaxed);
}

template <class Access>
ReplayStats ReplayT<Access>::stats() const {
  SegmentHeader& h = header();
  const auto read = [](uint64_t& counter) { return word(counter).load(std::memory_order_relaxed); };
  const uint64_t inserts = read(h.inserts), opened_records = read(h.opened);
  return {inserts,
          read(h.samples),
          read(h.updates),
          read(h.refused_updates),
          read(h.removed),
          read(h.busy_slots),
          read(h.retries),
          read(h.saturated_weights),
          read(h.nan_observations),
          opened_records > inserts ? opened_records - inserts : 0,
          read(h.ages)};
}

template <class Access>
bool ReplayT<Access>::return_call(uint64_t call, size_t n, uint64_t ages) {
  SegmentHeader& h = header();
  uint64_t next = call + 1;
  if (!word(h.sample_calls).compare_exchange_strong(next, call, std::memory_order_relaxed, std::memory_order_relaxed)) {
    return false;
  }
  word(h.samples).fetch_sub(n, std::memory_order_relaxed);
  word(h.ages).fetch_sub(ages, std::memory_order_relaxed);
  return true;
}

template <class Access>
void ReplayT<Access>::read_weights(int64_t* out) const {
  for (uint64_t slot = 0; slot < layout_.capacity; ++slot) {
    out[slot] = static_cast<int64_t>(tree_.code.weight(tree_.leaf(slot).load(std::memory_order_relaxed)));
  }
}

template <class Access>
void ReplayT<Access>::read_histogram(int64_t* counts) const {
  for (size_t bucket = 0; bucket < kBuckets; ++bucket) {
    counts[bucket] = counts_.rows(false, bucket) + counts_.rows(true, bucket);
  }
}

template <class Access>
void ReplayT<Access>::read_rows(uint64_t first, size_t n, uint8_t* const* fields, RowFacts* facts) {
  Scratch& s = scratch(n, 0);
  std::vector<float> discounts(n), weights(n);
  std::vector<int64_t> handles(n), steps(n);
  const SampleOut out{fields, discounts.data(), weights.data(), handles.data(), steps.data()};
  SampleRequest request;
  request.n = n;
  for (size_t i = 0; i < n; ++i) {
    s.slots[i] = first + i;
    s.words[i] = tree_.leaf(first + i).load(std::memory_order_acquire);
    // complete() leaves out what cannot be drawn; a row of weight 0 is to be read all the same.
    const LeafCode& code = tree_.code;
    if (code.is_row(s.words[i]) && code.lap(s.words[i]) != 0 && code.weight(s.words[i]) == 0) s.words[i] |= 1;
  }
  complete(request, out, 0, n, s);
  for (size_t i = 0; i < n; ++i) {
    const uint64_t head = s.headers[4 * i], priority = s.headers[4 * i + 2];
    const float known = RecordPriority::has_lap(priority, RecordHead::lap(head))
                            ? RecordPriority::value(priority)
                            : priority_map().priority(tree_.code.weight(s.words[i]));
    facts[i] = {s.whole[i] != 0 ? handles[i] : -1, static_cast<int64_t>(RecordHead::stream(head)),
                RecordHead::has(head, RecordHead::kTerminated), RecordHead::has(head, RecordHead::kTruncated), known};
  }
}

// ---- checking and mending ----

// What sums, buckets and the count of rows must be, from the leaves.
template <class Access>
struct ReplayT<Access>::Truth {
  explicit Truth(const ReplayT& replay)
      : buckets{std::vector<int64_t>(kBuckets, 0), std::vector<int64_t>(kBuckets, 0)} {
    const TreeShape& shape = replay.tree_.shape();
    const LeafCode& code = replay.tree_.code;
    for (size_t level = 0; level < shape.levels; ++level) sums.emplace_back(shape.padded[level], 0);
    for (uint64_t slot = 0; slot < replay.layout_.capacity; ++slot) {
      const uint64_t leaf = replay.tree_.leaf(slot).load(std::memory_order_relaxed), weight = code.weight(leaf);
      rows += code.is_row(leaf) && code.lap(leaf) != 0;
      if (weight == 0 || !replay.prioritized()) continue;
      sums[0][slot >> shape.shift[0]] += static_cast<int64_t>(weight);
      ++buckets[code.state(leaf) == LeafCode::kComputed][WeightBuckets::of(weight)];
    }
    for (size_t level = 1; level < shape.levels; ++level) {
      for (size_t child = 0; child < shape.nodes[level - 1]; ++child) {
        sums[level][child >> shape.shift[level]] += sums[level - 1][child];
      }
    }
  }
  std::vector<std::vector<int64_t>> sums;
  std::vector<int64_t> buckets[2];
  uint64_t rows = 0;
};

// Whether everything that a row is put together from is there: its successor and the older frames of both. At rest it
// is, unless a writer died between a claim and what it owed to the rows that needed the record. Only at rest.
template <class Access>
bool ReplayT<Access>::is_complete(uint64_t slot) const {
  if (!shares()) return true;
  const uint64_t lap = RecordHead::lap(word_at(slot, RecordLayout::kHead).load(std::memory_order_acquire));
  const Place next = place_of(word_at(slot, RecordLayout::kNext).load(std::memory_order_acquire));
  if (!has_lap(next)) return false;
  for (Place at : {Place{ticket_of(slot, lap), slot, lap}, next}) {
    for (uint32_t frame = 1; frame < record_.stack; ++frame) {
      const uint64_t before = word_at(at.slot, RecordLayout::kPrevious).load(std::memory_order_acquire);
      if (before == at.ticket) break;
      at = place_of(before);
      if (!has_lap(at)) return false;
    }
  }
  return true;
}

// Whether a row's leaf has another weight than its priority asks for.
template <class Access>
bool ReplayT<Access>::weight_is_off(uint64_t slot, uint64_t leaf, const PriorityMap& map, uint64_t* due) const {
  const LeafCode& code = tree_.code;
  if (code.lap(leaf) == 0 || !code.is_row(leaf)) return false;
  *due = 1;
  if (prioritized()) {
    const uint64_t priority = word_at(slot, RecordLayout::kPriority).load(std::memory_order_acquire);
    const uint64_t head = word_at(slot, RecordLayout::kHead).load(std::memory_order_acquire);
    if (!RecordPriority::has_lap(priority, RecordHead::lap(head))) return false;  // unknown: the weight stands
    *due = map.weight(RecordPriority::value(priority));
  }
  return *due != code.weight(leaf);
}

template <class Access>
bool ReplayT<Access>::sums_are_exact() const {
  const Truth truth(*this);
  for (size_t level = 0; level < truth.sums.size(); ++level) {
    for (size_t node = 0; node < truth.sums[level].size(); ++node) {
      if (tree_.sum(level, node).load(std::memory_order_relaxed) != truth.sums[level][node]) return false;
    }
  }
  return true;
}

template <class Access>
std::vector<std::string> ReplayT<Access>::audit() const {
  std::vector<std::string> findings;
  const auto report = [&](uint64_t count, const std::string& what) {
    if (count != 0) findings.push_back(std::to_string(count) + " " + what);
  };
  const PriorityMap map = priority_map();
  uint64_t busy = 0, off = 0, lacking = 0, due = 0;
  for (uint64_t slot = 0; slot < layout_.capacity; ++slot) {
    const uint64_t leaf = tree_.leaf(slot).load(std::memory_order_acquire);
    busy += tree_.code.state(leaf) == LeafCode::kBusy;
    off += weight_is_off(slot, leaf, map, &due);
    lacking += tree_.code.is_row(leaf) && tree_.code.weight(leaf) != 0 && !is_complete(slot);
  }
  report(busy, "slots are being written, or their writers died");
  report(off, "rows have another weight than their priority asks for");
  report(lacking, "rows lack a successor or a frame that was overwritten");
  const Truth truth(*this);
  for (size_t level = 0; level < truth.sums.size(); ++level) {
    uint64_t wrong = 0;
    for (size_t node = 0; node < truth.sums[level].size(); ++node) {
      wrong += tree_.sum(level, node).load(std::memory_order_relaxed) != truth.sums[level][node];
    }
    report(wrong, "sums of level " + std::to_string(level) + " differ from their rows' weights");
  }
  uint64_t buckets = 0;
  for (size_t kind = 0; kind < 2; ++kind) {
    for (size_t bucket = 0; bucket < kBuckets; ++bucket) {
      buckets += counts_.rows(kind != 0, bucket) != truth.buckets[kind][bucket];
    }
  }
  report(buckets, "counts of rows by weight are off");
  uint64_t claimed = 0;
  for (CountSet& set : header().counts) claimed += word(set.claimed).load(std::memory_order_relaxed);
  report(claimed, "sets of counts are being added to, or who did died");
  if (shares() && size() != truth.rows) {
    findings.push_back("the count of rows is " + std::to_string(size()) + ", there are " + std::to_string(truth.rows));
  }
  return findings;
}

template <class Access>
uint64_t ReplayT<Access>::repair() {
  SegmentHeader& h = header();
  const auto counters = [&h] {
    std::vector<uint64_t> read;
    for (uint64_t* counter : {&h.next_ticket, &h.inserts, &h.updates, &h.refused_updates, &h.removed, &h.exponent}) {
      read.push_back(word(*counter).load(std::memory_order_acquire));
    }
    return read;
  };
  const auto before = counters();
  const auto require_rest = [&] {
    if (counters() != before) {
      throw std::runtime_error(
          "the replay is not at rest: rows are being inserted, updated or removed; "
          "repair when no other call is under way");
    }
  };
  audit();  // takes about as long as what follows: whoever is still at work shows
  require_rest();
  const LeafCode& code = tree_.code;
  const PriorityMap map = priority_map();
  uint64_t mended = 0, due = 0;
  for (uint64_t slot = 0; slot < layout_.capacity; ++slot) {
    const Word<uint64_t> leaf = tree_.leaf(slot);
    const uint64_t found = leaf.load(std::memory_order_acquire);
    if (code.state(found) == LeafCode::kBusy) {
      // Whatever its writer came to, it is an observation at most: windows of n steps end before it.
      const Word<uint64_t> head = word_at(slot, RecordLayout::kHead);
      head.store(RecordHead::without(head.load(std::memory_order_relaxed), RecordHead::kRow),
                 std::memory_order_release);
      leaf.store(code.make(code.lap(found), LeafCode::kHeld, 0), std::memory_order_release);
      ++mended;
    }
  }
  for (uint64_t slot = 0; slot < layout_.capacity; ++slot) {
    const Word<uint64_t> leaf = tree_.leaf(slot);
    const uint64_t found = leaf.load(std::memory_order_acquire);
    if (code.is_row(found) && code.weight(found) != 0 && !is_complete(slot)) {
      leaf.store(code.make(code.lap(found), LeafCode::kHeld, 0), std::memory_order_release);
      ++mended;
    } else if (weight_is_off(slot, found, map, &due)) {
      leaf.store(code.make(code.lap(found), code.state(found), due), std::memory_order_release);
      ++mended;
    }
  }
  const Truth truth(*this);
  const auto put = [&mended](auto cell, auto value) {
    mended += cell.exchange(value, std::memory_order_acq_rel) != value;
  };
  for (size_t level = 0; level < truth.sums.size(); ++level) {
    for (size_t node = 0; node < truth.sums[level].size(); ++node) put(tree_.sum(level, node), truth.sums[level][node]);
  }
  for (CountSet& set : h.counts) put(word(set.claimed), uint64_t{0});
  size_t highest = 0;
  for (size_t kind = 0; kind < 2; ++kind) {
    for (size_t bucket = 0; bucket < kBuckets; ++bucket) {
      const int64_t off = truth.buckets[kind][bucket] - counts_.rows(kind != 0, bucket);
      if (off != 0) counts_.correct(kind != 0, bucket, off);
      mended += off != 0;
      if (kind == 1 && truth.buckets[1][bucket] != 0) highest = bucket;
    }
  }
  word(h.highest_bucket).store(highest, std::memory_order_seq_cst);
  if (shares()) put(word(h.rows), truth.rows);
  word(h.busy_slots)
      .store(before[0] - word(shares() ? h.opened : h.inserts).load(std::memory_order_relaxed),
             std::memory_order_relaxed);  // tickets whose takers died count as given up
  require_rest();
  return mended;
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

}  // namespace angle
