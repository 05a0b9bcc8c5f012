// Lock-free prioritised replay: a ring of records under a tree of integer weights.
//
// A row's handle is its ticket, counted up from 0: slot = ticket % capacity, lap = ticket / capacity + 1. The slot's
// leaf word holds lap, busy flag and weight, and only compare-and-swap changes it, so that
//   - a writer claims a slot by swapping in (its lap, busy, 0), writes the record, and publishes by storing the weight;
//   - a sampler reads the leaf, copies the record, reads the leaf again, and drops the row if lap or busy changed;
//   - an update whose row is gone finds another lap and is refused, even between its check and its write.
// Nobody waits for anybody: a writer that meets a busy slot takes another ticket, a sampler that loses a row draws
// again.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "core/access.h"
#include "core/layout.h"
#include "core/tree.h"

namespace angle {

struct ReplayOptions {
  uint64_t capacity;               // rows, >= 1
  bool prioritized = true;         // false: every row weighs the same and no sums are kept
  bool stratified = true;          // one draw from each of n equal shares of the weight; false: independent draws
  double priority_exponent = 0.6;  // weight = (td_error + priority_epsilon) ** priority_exponent
  double priority_epsilon = 1e-6;
  uint64_t seed = 0;
};

// Rows to insert. fields[f] points to n rows of field f, side by side.
struct InsertRows {
  size_t n;
  const uint8_t* const* fields;
  const uint8_t* terminated;           // [n], 0 or 1
  const uint8_t* truncated = nullptr;  // [n], 0 or 1; nullptr: none
  const int64_t* streams = nullptr;    // [n], 0 <= stream < kStreams; nullptr: all 0
  size_t nan_rows = 0;                 // how many hold a NaN observation, for the statistics
};

// Where a batch goes. fields[f] has room for n rows of field f, or is nullptr to leave that field out.
struct SampleOut {
  uint8_t* const* fields;
  float* discounts;           // [n] discount * (1 - terminated)
  float* importance_weights;  // [n]
  int64_t* handles;           // [n]
  int64_t* steps;             // [n] rewards summed
};

struct ReplayStats {
  uint64_t inserts, samples, updates, refused_updates, busy_slots, retries, saturated_weights, nan_observations;
};

// There is no row to draw.
struct NothingToSample : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class Access>
class ReplayT {
 public:
  // Unit of the fixed-point weights.
  static constexpr double kUnit = 1048576.0;

  // Throws std::invalid_argument for options out of range, std::bad_alloc when the memory is not to be had.
  ReplayT(const ReplayOptions& options, RecordLayout record);

  // Adds n <= capacity rows and writes their handles, ascending. O(n * record). Any thread. Lock-free.
  // Rows of one stream must come from one thread at a time. Throws std::invalid_argument before anything is changed.
  void insert(const InsertRows& rows, int64_t* handles);

  // Draws n rows. importance_weights = (P(i) / min P) ** -importance_exponent, 1 without priorities.
  // O(n * (levels + record) + top). Any thread. Lock-free. Throws NothingToSample, and then nothing counts as drawn.
  void sample(size_t n, double discount, double importance_exponent, const SampleOut& out);

  // Sets the rows' weights to (td_error + epsilon) ** exponent and returns how many handles were refused because their
  // row has been overwritten; of equal handles the last wins. O(n * levels). Any thread. Lock-free.
  // Throws std::invalid_argument, naming the first bad index, before anything is changed.
  template <class Real>
  size_t update(const int64_t* handles, const Real* td_errors, size_t n);

  // Rows held. O(1). Any thread.
  uint64_t size() const;
  uint64_t capacity() const { return options_.capacity; }
  uint64_t bytes() const { return layout_.total_bytes; }
  uint64_t next_ticket() const { return header().next_ticket.load(std::memory_order_acquire); }
  const RecordLayout& record() const { return record_; }
  const SegmentLayout& layout() const { return layout_; }
  ReplayStats stats() const;

  // The integer weight of each slot, [capacity]. Exact when no call is under way. O(capacity). Any thread.
  void read_weights(int64_t* out) const;
  // Whether every sum equals its children's. Only at rest. O(capacity).
  bool sums_are_exact() const;
  // The weight that new rows get: the largest computed one among live rows (at most 3.2 % high), or that of priority 1.
  uint64_t default_weight() const;

  // The whole segment, for saving and restoring at rest.
  uint8_t* segment() const { return memory_.data(); }
  // Whether `saved`, the first bytes of a segment, describe one of this shape; if not, says what differs.
  void check_header(const SegmentHeader& saved) const;
  // After the segment's bytes were replaced: go on with the seed in its header.
  void adopt_seed() { options_.seed = header().seed; }

 private:
  struct Scratch;
  SegmentHeader& header() const { return *reinterpret_cast<SegmentHeader*>(memory_.data()); }
  uint8_t* record_at(uint64_t slot) const { return memory_.data() + layout_.records_at + slot * layout_.record_bytes; }
  std::atomic<uint64_t>& word_at(uint64_t slot, uint32_t offset) const {
    return *reinterpret_cast<std::atomic<uint64_t>*>(record_at(slot) + offset);
  }
  std::atomic<uint64_t>& stream_tail(int64_t stream) const {
    return reinterpret_cast<std::atomic<uint64_t>*>(memory_.data() + layout_.streams_at)[stream];
  }
  uint64_t lap_of(uint64_t ticket) const { return (ticket / options_.capacity + 1) & tree_.code.lap_mask; }

  bool claim(uint64_t ticket, uint64_t* old_leaf);
  void write_record(uint64_t ticket, const InsertRows& rows, size_t row);
  void link(uint64_t previous, uint64_t ticket);
  uint64_t weight_of(double priority, uint64_t* saturated) const;
  uint64_t to_fixed(double weight, uint64_t* saturated) const;
  void raise_highest(size_t bucket);
  size_t highest_bucket() const;
  static Scratch& scratch(size_t n, size_t top);
  uint64_t target_of(uint64_t bits, uint64_t total, size_t i, size_t n) const;
  bool still_whole(uint64_t slot, uint64_t word) const;
  void draw_again(size_t i, size_t n, uint64_t call, Scratch& s, const std::vector<FieldCopy>& fields);
  bool take_row(size_t i, Scratch& s, const std::vector<FieldCopy>& fields);

  ReplayOptions options_;
  RecordLayout record_;
  SegmentLayout layout_;
  Memory memory_;
  PriorityTree<Access> tree_;
};

using Replay = ReplayT<DefaultAccess>;

}  // namespace angle
