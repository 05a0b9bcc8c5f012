// Where everything lies: fields within a record, parts within the segment. Offsets only, never pointers, so that a
// segment can be mapped anywhere and by several processes.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace angle {

constexpr size_t kLine = 64;

struct Field {
  std::string name;
  uint32_t itemsize;    // bytes of one element: 1, 2, 4 or 8
  uint32_t bytes;       // bytes of the whole field in one row, as callers see it
  uint32_t frames = 1;  // above 1: a stack of as many frames, oldest first, of which a record keeps the newest
  uint32_t offset = 0;

  uint32_t kept() const { return bytes / frames; }  // bytes in a record
};

// Which fields the replay itself reads.
struct RowRoles {
  size_t observations = 0;        // the first fields; as many last ones are their successors, in the same order
  size_t reward = SIZE_MAX;       // one float32 or float64, summed over n steps; SIZE_MAX: none
  bool share_successors = false;  // successors are not kept but read from the stream's next record
};

// A record: header, then the fields, widest elements first, padded to whole cache lines.
struct RecordLayout {
  // Header, 64-bit words: RecordHead; next: ticket of the stream's next record, its own while there is none;
  // RecordPriority; previous, only with stacks: ticket of the record with the frame before, its own where the oldest
  // frame repeats.
  static constexpr uint32_t kHead = 0, kNext = 8, kPriority = 16, kPrevious = 24;

  // Fields keep their order in `fields`; only their offsets follow the alignment.
  // Throws std::invalid_argument for an empty field, an itemsize that is no power of two up to 8, a row over 1 GiB,
  // successors unlike their observations, or stacks without shared successors.
  explicit RecordLayout(std::vector<Field> fields_in, const RowRoles& roles_in = {});

  // The field that holds the successor of observation field f, in callers' rows.
  size_t successor_of(size_t f) const { return fields.size() - roles.observations + f; }
  // Bytes of one row as callers see it.
  size_t row_bytes() const {
    size_t bytes = 0;
    for (const Field& field : fields) bytes += field.bytes;
    return bytes;
  }
  bool is_successor(size_t f) const { return f >= fields.size() - roles.observations; }

  std::vector<Field> fields;
  RowRoles roles;
  uint32_t stack = 1;  // most frames of any field
  uint32_t header_bytes = 24;
  size_t record_bytes = 0;
  uint64_t schema_hash = 0;  // FNV-1a over roles, names, itemsizes, bytes and frames
};

// A record's first word: lap << 20 | flags << 16 | stream. Only the row's writer changes it, before it publishes.
struct RecordHead {
  static constexpr uint64_t kTerminated = 1, kTruncated = 2, kRow = 4;  // kRow: more than an observation

  static constexpr uint64_t of(uint64_t lap, uint64_t stream, uint64_t flags) {
    return lap << 20 | flags << 16 | stream;
  }
  static constexpr uint64_t lap(uint64_t head) { return head >> 20; }
  static constexpr uint64_t stream(uint64_t head) { return head & 0xFFFF; }
  static constexpr bool has(uint64_t head, uint64_t flags) { return (head >> 16 & flags) != 0; }
  static constexpr uint64_t without(uint64_t head, uint64_t flags) { return head & ~(flags << 16); }
};

// The priority that a row's weight follows: float32 << 32 | lap's low 32 bits. Whoever updates a row stores it
// outright; a store that comes too late and meets the slot's next row shows by its lap.
struct RecordPriority {
  static constexpr uint64_t of(float priority, uint64_t lap) {
    return static_cast<uint64_t>(std::bit_cast<uint32_t>(priority)) << 32 | (lap & 0xFFFFFFFF);
  }
  static constexpr float value(uint64_t word) { return std::bit_cast<float>(static_cast<uint32_t>(word >> 32)); }
  static constexpr bool has_lap(uint64_t word, uint64_t lap) { return (word & 0xFFFFFFFF) == (lap & 0xFFFFFFFF); }
  static constexpr bool is_before(uint64_t word, uint64_t lap) {
    return static_cast<int32_t>((lap - word) & 0xFFFFFFFF) > 0;
  }
};

// The tree's shape: leaves in groups of 2**shift[0], those in groups of 2**shift[1], ... up to at most kMaxTop nodes,
// which samplers add up in groups of 2**kTopShift themselves.
struct TreeShape {
  static constexpr size_t kMaxLevels = 10, kMaxTop = 16384;
  static constexpr uint32_t kTopShift = 3;
  explicit TreeShape(uint64_t capacity);

  size_t levels = 0;              // arrays of sums above the leaves, at least 1
  uint32_t shift[kMaxLevels]{};   // log2 of the fan below level i's nodes
  uint64_t nodes[kMaxLevels]{};   // nodes of level i that carry rows; level levels - 1 is the top
  uint64_t padded[kMaxLevels]{};  // length of level i's array
  uint64_t leaves_padded = 0;
  uint32_t weight_bits = 0;  // a leaf is lap | state | weight; capacity * 2**weight_bits < 2**62
};

// A leaf word: lap | state | weight. The lap is the row's generation (0: never written) and its sequence lock. States:
// a row whose weight is the default or was computed by update_priorities; busy: the row is being written and weighs
// nothing; held: the record keeps an observation alone, is whole, and weighs nothing.
struct LeafCode {
  enum State : uint64_t { kDefault = 0, kComputed = 1, kBusy = 2, kHeld = 3 };

  explicit constexpr LeafCode(uint32_t weight_bits_in)
      : weight_bits(weight_bits_in),
        weight_mask((1ull << weight_bits_in) - 1),
        lap_mask(~0ull >> (weight_bits_in + 2)) {}

  constexpr uint64_t weight(uint64_t leaf) const { return leaf & weight_mask; }
  constexpr uint64_t lap(uint64_t leaf) const { return leaf >> (weight_bits + 2); }
  constexpr State state(uint64_t leaf) const { return static_cast<State>(leaf >> weight_bits & 3); }
  constexpr bool is_row(uint64_t leaf) const { return state(leaf) <= kComputed; }
  constexpr uint64_t make(uint64_t lap_in, State state_in, uint64_t weight_in) const {
    return (lap_in & lap_mask) << (weight_bits + 2) | state_in << weight_bits | weight_in;
  }
  constexpr bool has_lap(uint64_t leaf, uint64_t lap_in) const { return lap(leaf) == (lap_in & lap_mask); }

  uint32_t weight_bits;
  uint64_t weight_mask, lap_mask;
};

constexpr uint32_t kStreams = 1u << 16;
constexpr size_t kBuckets = 62 * 32, kCountSets = 8;

// What new rows weigh.
enum class DefaultPriority : uint64_t { kLiveMaximum, kHistoricMaximum, kGiven };

// Live rows of positive weight by weight: first those of default weight, then those of computed.
struct CountSet {
  alignas(kLine) uint64_t claimed;  // 1 while a thread adds to the rows of this set; never of the last set
  alignas(kLine) int64_t rows[2 * kBuckets];
};

// First bytes of a segment, plain words: whatever changes after creation is touched through the Access's atomic words.
// The first part never changes; each group of counters that threads write has a line.
struct SegmentHeader {
  static constexpr uint64_t kMagic = 0x59414C5045524C41ull;  // "ALREPLAY"
  static constexpr uint64_t kVersion = 3;

  uint64_t magic;
  uint64_t version;
  uint64_t prioritized;
  uint64_t schema_hash;
  uint64_t capacity;
  uint64_t record_bytes;
  uint64_t segment_bytes;
  uint64_t meta_bytes;
  uint64_t seed;
  double priority_epsilon;
  uint64_t default_kind;    // a DefaultPriority
  double default_priority;  // of kGiven
  uint64_t ready;           // 1 once all of the above is written

  alignas(kLine) uint64_t next_ticket;
  alignas(kLine) uint64_t sample_calls;
  alignas(kLine) uint64_t inserts;         // rows published
  uint64_t busy_slots;                     // tickets given up because their slot was being written
  uint64_t opened;                         // records begun with an observation alone, where successors are shared
  uint64_t nan_observations;               // rows whose observations hold a NaN
  uint64_t rows;                           // rows that live, kept with shared successors only
  alignas(kLine) uint64_t samples;         // rows returned
  uint64_t retries;                        // draws repeated
  uint64_t ages;                           // sum over rows returned of tickets issued since their own
  alignas(kLine) uint64_t updates;         // priorities written
  uint64_t refused_updates;                // handles whose row was overwritten or removed
  uint64_t saturated_weights;              // weights cut to the largest that a leaf holds
  uint64_t removed;                        // rows removed
  alignas(kLine) uint64_t exponent;        // bits of the priority exponent, a float64
  alignas(kLine) uint64_t highest_bucket;  // no bucket of computed weights above this one holds a row
  uint64_t historic_maximum;               // bits of the largest priority ever computed, a float32
  CountSet counts[kCountSets];             // a count is the sum over the sets; one alone may be negative
};

// The parts of a segment, in bytes from its start, each on a cache line of its own.
struct SegmentLayout {
  // Throws std::invalid_argument when capacity is 0 or so large that offsets would pass 2**62 bytes.
  SegmentLayout(uint64_t capacity, const RecordLayout& record, uint64_t meta_bytes = 0);

  TreeShape tree;
  uint64_t capacity;
  size_t record_bytes;
  uint64_t meta_at;     // text of the caller
  uint64_t streams_at;  // uint64 ticket + 1 of the newest record of each stream, 0 for none
  uint64_t leaves_at;
  uint64_t sums_at[TreeShape::kMaxLevels];
  uint64_t records_at;
  uint64_t total_bytes;
};

}  // namespace angle
