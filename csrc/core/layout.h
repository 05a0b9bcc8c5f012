// Where everything lies: fields within a record, parts within the segment. Offsets only, never pointers, so that a
// segment can be mapped anywhere and by several processes.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace angle {

constexpr size_t kLine = 64;

struct Field {
  std::string name;
  uint32_t itemsize;  // bytes of one element: 1, 2, 4 or 8
  uint32_t bytes;     // bytes of the whole field in one row
  uint32_t offset = 0;
};

// A record: header (ticket, next, stream and end flags: three 64-bit words), then the fields, widest elements first,
// padded to whole cache lines.
struct RecordLayout {
  static constexpr uint32_t kTicket = 0, kNext = 8, kStreamAndEnd = 16, kHeader = 24;

  // Fields keep their order in `fields`; only their offsets follow the alignment.
  // Throws std::invalid_argument for an empty field, an itemsize that is no power of two up to 8, a row over 1 GiB.
  explicit RecordLayout(std::vector<Field> fields_in);

  std::vector<Field> fields;
  size_t record_bytes = 0;
  uint64_t schema_hash = 0;  // FNV-1a over names, itemsizes and bytes
};

// The tree's shape: leaves in groups of 2**shift[0], those in groups of 2**shift[1], ... up to at most kMaxTop nodes.
struct TreeShape {
  static constexpr size_t kMaxLevels = 10, kMaxTop = 2048;
  explicit TreeShape(uint64_t capacity);

  size_t levels = 0;              // arrays of sums above the leaves, at least 1
  uint32_t shift[kMaxLevels]{};   // log2 of the fan below level i's nodes
  uint64_t nodes[kMaxLevels]{};   // nodes of level i that carry rows; level levels - 1 is the top
  uint64_t padded[kMaxLevels]{};  // length of level i's array
  uint64_t leaves_padded = 0;
  uint32_t weight_bits = 0;  // a leaf is lap | computed | busy | weight; capacity * 2**weight_bits < 2**62
};

constexpr uint32_t kStreams = 1u << 16;
constexpr size_t kBuckets = 62 * 32;

// First bytes of a segment. The first part never changes after creation; each counter that threads write has a line.
struct SegmentHeader {
  static constexpr uint64_t kMagic = 0x59414C5045524C41ull;  // "ALREPLAY"
  static constexpr uint32_t kVersion = 1;

  uint64_t magic;
  uint32_t version;
  uint32_t prioritized;
  uint64_t schema_hash;
  uint64_t capacity;
  uint64_t record_bytes;
  uint64_t segment_bytes;
  uint64_t seed;

  alignas(kLine) std::atomic<uint64_t> next_ticket;
  alignas(kLine) std::atomic<uint64_t> sample_calls;
  alignas(kLine) std::atomic<uint64_t> inserts;           // rows published
  std::atomic<uint64_t> busy_slots;                       // tickets given up because their slot was being written
  std::atomic<uint64_t> nan_observations;                 // rows whose observations hold a NaN
  alignas(kLine) std::atomic<uint64_t> samples;           // rows returned
  std::atomic<uint64_t> retries;                          // draws repeated
  alignas(kLine) std::atomic<uint64_t> updates;           // priorities written
  std::atomic<uint64_t> refused_updates;                  // handles whose row was overwritten
  std::atomic<uint64_t> saturated_weights;                // weights cut to the largest that a leaf holds
  alignas(kLine) std::atomic<uint64_t> highest_bucket;    // no bucket above this one holds a row
  alignas(kLine) std::atomic<int64_t> buckets[kBuckets];  // live rows by computed weight, 32 buckets an octave
};

// The parts of a segment, in bytes from its start, each on a cache line of its own.
struct SegmentLayout {
  // Throws std::invalid_argument when capacity is 0 or so large that offsets would pass 2**62 bytes.
  SegmentLayout(uint64_t capacity, const RecordLayout& record);

  TreeShape tree;
  uint64_t capacity;
  size_t record_bytes;
  uint64_t streams_at;  // uint64 ticket + 1 of the newest row of each stream, 0 for none
  uint64_t leaves_at;
  uint64_t sums_at[TreeShape::kMaxLevels];
  uint64_t records_at;
  uint64_t total_bytes;
};

// Owns zeroed anonymous memory on whole pages. Throws std::bad_alloc when the system refuses.
class Memory {
 public:
  explicit Memory(size_t bytes);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  uint8_t* data_;
  size_t bytes_;
};

}  // namespace angle
