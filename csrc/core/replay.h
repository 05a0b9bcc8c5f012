// Lock-free prioritised replay: a ring of records under a tree of integer weights.
//
// A row's handle is its ticket, counted up from 0: slot = ticket % capacity, lap = ticket / capacity + 1. The slot's
// leaf word holds lap, state and weight, and only compare-and-swap changes it, so that
//   - a writer claims a slot by swapping in (its lap, busy, 0), writes the record, and publishes by storing the weight;
//   - a sampler reads the leaf, copies the record, reads the leaf again, and drops the row if lap or state changed;
//   - an update whose row is gone finds another lap and is refused, even between its check and its write.
// Nobody waits for anybody: a writer that meets a busy slot takes another ticket, a sampler that loses a row draws
// again.
//
// Where successors are shared, a record is "an observation and what was done there": inserting a row completes the
// stream's open record and opens the next one with the row's successor. An open record, an episode's final observation
// and the older frames of a stack are held: whole, linked to, and never drawn.
//
// The members are defined in insert.inl, sample.inl, update.inl and care.inl.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "core/access.h"
#include "core/counts.h"
#include "core/layout.h"
#include "core/memory.h"
#include "core/priorities.h"
#include "core/tree.h"

namespace angle {

struct ReplayOptions {
  uint64_t capacity;               // records, >= 1; >= 2 where successors are shared
  bool prioritized = true;         // false: every row weighs the same and no sums are kept
  double priority_exponent = 0.6;  // weight = (td_error + priority_epsilon) ** priority_exponent
  double priority_epsilon = 1e-6;
  DefaultPriority default_kind = DefaultPriority::kLiveMaximum;
  double default_priority = 1.0;  // of DefaultPriority::kGiven
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
  const float* priorities = nullptr;   // [n], finite, >= 0; nullptr: the default
};

struct SampleRequest {
  size_t n;
  double discount = 0.99;
  double importance_exponent = 0.4;
  uint32_t n_step = 1;           // rewards summed, up to the end of the episode or the stream's newest row
  bool stratified = true;        // one draw from each of n equal shares of the weight; false: independent draws
  bool replacement = true;       // false: no row twice in this batch
  bool bound_by_buffer = false;  // divide importance weights by the buffer's largest (at most 3.2 % high)
  // Decides the draws in place of the buffer's seed and its count of calls; such a call is not counted.
  std::optional<uint64_t> key = std::nullopt;
};

// What a call's random bits come from.
struct DrawSource {
  uint64_t seed, call;
};

// Where a batch goes. fields[f] has room for n rows of field f, or is nullptr to leave that field out.
struct SampleOut {
  uint8_t* const* fields;
  float* discounts;           // [n] discount ** steps * (1 - terminated)
  float* importance_weights;  // [n]
  int64_t* handles;           // [n]
  int64_t* steps;             // [n] rewards summed
  uint64_t* ages = nullptr;   // one number: the tickets issued since each row's own, added up; for return_call
};

// What one row holds beside its fields.
struct RowFacts {
  int64_t handle;  // -1: the slot holds no row
  int64_t stream;
  bool terminated, truncated;
  float priority;
};

struct ReplayStats {
  uint64_t inserts, samples, updates, refused_updates, removed, busy_slots, retries, saturated_weights,
      nan_observations, held, ages;
};

// There is no row to draw, or there are too few.
struct NothingToSample : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class Access>
class ReplayT {
 public:
  // Bytes that a segment needs.
  static uint64_t bytes_needed(const ReplayOptions& options, const RecordLayout& record, size_t meta_bytes = 0);
  // The caller's text in a segment made elsewhere. Throws std::invalid_argument where the memory holds no segment of
  // this version, naming what differs.
  static std::string_view read_meta(const Memory& memory);

  // A new replay in memory of its own. Throws std::invalid_argument for options out of range, std::bad_alloc when the
  // memory is not to be had.
  ReplayT(const ReplayOptions& options, RecordLayout record);
  // The same in given memory, zeroed and of bytes_needed(); `meta` is kept for read_meta.
  ReplayT(const ReplayOptions& options, RecordLayout record, Memory memory, std::string_view meta);
  // A replay that another one made. Throws std::invalid_argument when it is not of this record, naming what differs.
  ReplayT(RecordLayout record, Memory memory);

  // Adds n <= capacity rows and writes their handles, ascending within a stream. O(n * record). Any thread. Lock-free.
  // Rows of one stream must come from one thread at a time. Throws std::invalid_argument before anything is changed.
  void insert(const InsertRows& rows, int64_t* handles);

  // Draws n rows. importance_weights = (P(i) / min P) ** -importance_exponent, 1 without priorities.
  // Returns the call's number, counted up from 0, which decides its draws together with the seed; 0 where the request
  // has a key.
  // O(n * (levels + n_step * record) + top). Any thread. Lock-free. Throws NothingToSample.
  uint64_t sample(const SampleRequest& request, const SampleOut& out);

  // Sets the rows' weights to (td_error + epsilon) ** exponent and returns how many handles were refused because their
  // row has been overwritten or removed; of equal handles the last wins. O(n * levels). Any thread. Lock-free.
  // Throws std::invalid_argument, naming the first bad index, before anything is changed.
  template <class Real>
  size_t update(const int64_t* handles, const Real* td_errors, size_t n);

  // Takes rows out of the draws for good. Returns how many were refused, as update does. Any thread. Lock-free.
  size_t remove(const int64_t* handles, size_t n);

  // Weighs every row anew by its kept priority. O(capacity). Any thread; others go on meanwhile, and once all calls are
  // done every weight follows the exponent set last.
  void set_priority_exponent(double exponent);
  double priority_exponent() const;

  // Rows held. O(1). Any thread.
  uint64_t size() const;
  uint64_t capacity() const { return layout_.capacity; }
  uint64_t bytes() const { return layout_.total_bytes; }
  uint64_t next_ticket() const;
  bool prioritized() const { return header().prioritized != 0; }
  const RecordLayout& record() const { return record_; }
  const SegmentLayout& layout() const { return layout_; }
  const Memory& memory() const { return memory_; }
  ReplayStats stats() const;
  // Whether every ticket issued has become a record or been given up: false while rows are being inserted, and after a
  // process died doing so. O(1). Any thread.
  bool inserts_are_done() const;

  // Takes back the sample call of this number, whose n rows nobody has seen, so that the next call draws in its place.
  // ages: as the call wrote it.
  // Returns false, and changes nothing, when a later call has drawn. O(1). Any thread. Wait-free.
  bool return_call(uint64_t call, size_t n, uint64_t ages = 0);

  // The integer weight of each slot, [capacity]. Exact when no call is under way. O(capacity). Any thread.
  void read_weights(int64_t* out) const;
  // Rows by weight: counts[bucket] of WeightBuckets, both kinds together. O(buckets). Any thread.
  void read_histogram(int64_t* counts) const;
  // The rows of slots [first, first + n), all fields as inserted; facts[i].handle is -1 and the fields are untouched
  // where a slot holds no whole row. O(n * record). Any thread.
  void read_rows(uint64_t first, size_t n, uint8_t* const* fields, RowFacts* facts);

  // Whether every sum equals its children's. Only at rest. O(capacity).
  bool sums_are_exact() const;
  // What does not add up, one sentence each. At rest exact; else calls under way show as findings. O(capacity).
  std::vector<std::string> audit() const;
  // Frees slots that a killed writer left busy, removes rows that lack a part, weighs every row by its priority, and
  // adds all sums up anew. Returns how many sums and weights it changed. Only at rest: throws std::runtime_error if a
  // counter moves meanwhile.
  uint64_t repair();

  // The weight that new rows get now, and the priority it stands for.
  struct Default {
    float priority;
    uint64_t weight;
  };
  Default default_weight() const;

  // The whole segment, for saving and restoring at rest.
  uint8_t* segment() const { return memory_.data(); }
  // Whether `saved`, the first bytes of a segment, describe one of this shape; if not, says what differs.
  void check_header(const SegmentHeader& saved) const;

 private:
  template <class T>
  using Word = typename Access::template Word<T>;
  static constexpr uint64_t kNone = ~0ull;  // no ticket
  struct RowWeight {
    float priority;
    uint64_t weight;
    bool computed;
  };
  struct Scratch;
  class WeightChanges;
  struct Writer;
  struct Truth;
  class Overlay;

  SegmentHeader& header() const { return *reinterpret_cast<SegmentHeader*>(memory_.data()); }
  template <class T>
  static Word<T> word(T& at) {
    return {&at};
  }
  uint8_t* records() const { return memory_.data() + layout_.records_at; }
  uint8_t* record_at(uint64_t slot) const { return records() + slot * layout_.record_bytes; }
  Word<uint64_t> word_at(uint64_t slot, uint32_t offset) const {
    return {reinterpret_cast<uint64_t*>(record_at(slot) + offset)};
  }
  Word<uint64_t> stream_tail(uint64_t stream) const {
    return {reinterpret_cast<uint64_t*>(memory_.data() + layout_.streams_at) + stream};
  }
  // Where a ticket's record lies. One division; pass it on rather than ask again.
  struct Place {
    uint64_t ticket, slot, lap;
  };
  Place place_of(uint64_t ticket) const {
    const uint64_t laps = ticket / layout_.capacity;
    return {ticket, ticket - laps * layout_.capacity, laps + 1};
  }
  uint64_t ticket_of(uint64_t slot, uint64_t lap) const { return (lap - 1) * layout_.capacity + slot; }
  bool has_lap(const Place& at) const {
    return tree_.code.has_lap(tree_.leaf(at.slot).load(std::memory_order_acquire), at.lap);
  }
  bool shares() const { return record_.roles.share_successors; }
  PriorityMap priority_map() const;
  static Scratch& scratch(size_t n, size_t top);

  // insert.inl
  bool claim(const Place& at, uint64_t* old_leaf);
  void write_header(const Place& at, uint64_t head, uint64_t previous, float priority);
  void write_fields(uint64_t slot, const InsertRows& rows, size_t row);
  void write_observation(uint64_t slot, const InsertRows& rows, size_t row, bool successor, uint32_t frame);
  void link(const Place& previous, uint64_t ticket);
  RowWeight weigh(Writer& writer, const InsertRows& rows, size_t row) const;
  void publish(Writer& writer, const Place& at, const RowWeight& own);
  uint64_t add_row(Writer& writer, const InsertRows& rows, size_t row);
  uint64_t add_sharing_row(Writer& writer, const InsertRows& rows, size_t row);
  bool continues(const InsertRows& rows, size_t row) const;
  Place hold(Writer& writer, const InsertRows& rows, size_t row, bool successor, uint32_t frame, uint64_t previous,
             bool published);
  Place hold_stack(Writer& writer, const InsertRows& rows, size_t row, bool successor, bool published);
  bool resume(const Place& at, const InsertRows& rows, size_t row);
  bool still_shows(const Place& at, const InsertRows& rows, size_t row);
  bool frames_live(uint64_t ticket);
  void forget_dependents(uint64_t ticket, uint64_t next);

  // sample.inl
  static uint64_t target_of(uint64_t bits, uint64_t total, bool stratified, size_t i, size_t n);
  uint64_t slots_in_use() const;
  void choose(const SampleRequest& request, uint64_t total, Scratch& s);
  bool choose_again(const SampleRequest& request, size_t i, uint64_t bits, Overlay* overlay, Scratch& s);
  bool choose_listed(size_t i, DrawSource source, uint64_t& attempt, Overlay* overlay, Scratch& s);
  bool choose_by_scan(size_t i, DrawSource source, uint64_t& attempt, Overlay* overlay, Scratch& s);
  void choose_distinct(const SampleRequest& request, DrawSource source, Overlay& overlay, Scratch& s);
  void draw(const SampleRequest& request, const SampleOut& out, uint64_t total, DrawSource source, Scratch& s);
  void draw_again(const SampleRequest& request, const SampleOut& out, size_t i, DrawSource source, Overlay* overlay,
                  Scratch& s);
  bool complete(const SampleRequest& request, const SampleOut& out, size_t first, size_t count, Scratch& s);
  bool complete_all(const SampleRequest& request, const SampleOut& out, Scratch& s);
  void walk_windows(const SampleRequest& request, const SampleOut& out, size_t first, size_t count, Scratch& s);
  void fetch_successors(const SampleOut& out, size_t first, size_t count, Scratch& s);
  void find_frames(const SampleOut& out, bool successors, size_t first, size_t count, Scratch& s);
  void copy_frames(const SampleOut& out, size_t first, size_t count, Scratch& s);
  void gather(const uint64_t* slots, size_t count, const std::vector<FieldCopy>& fields) const;
  void write_weights(const SampleRequest& request, const SampleOut& out, Scratch& s) const;
  bool usable(uint64_t slot, uint64_t leaf) const {
    return slot != kLost && tree_.code.weight(leaf) != 0 && tree_.code.is_row(leaf);
  }
  // Where the record of ticket `to` lies, seen from one that names it.
  void follow(const Place& from, uint64_t to, uint64_t* slot, uint64_t* lap) const;

  // update.inl
  void raise_historic(float priority);
  void sync_leaf(const Place& at, bool computed);
  void change_weight(uint64_t slot, uint64_t old_leaf, uint64_t new_leaf);
  bool retire(const Place& at);

  // care.inl
  bool is_complete(uint64_t slot) const;
  bool weight_is_off(uint64_t slot, uint64_t leaf, const PriorityMap& map, uint64_t* due) const;

  RecordLayout record_;
  SegmentLayout layout_;
  Memory memory_;
  PriorityTree<Access> tree_;
  WeightCounts<Access> counts_;
};

using Replay = ReplayT<DefaultAccess>;

}  // namespace angle
