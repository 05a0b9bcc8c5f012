// What the replay's launchers take: addresses on the device and numbers. The memory is a segment as core/layout.h has
// it, so that it goes to the host and back as it is; calls on it follow each other on streams, and never run side by
// side.
#pragma once
#include <cstdint>

#include "core/layout.h"

namespace angle::device {

constexpr uint32_t kMostFields = 32;
constexpr uint64_t kMostAtOnce = 1u << 24;  // rows of one insert, handles of one update, draws without replacement
constexpr uint64_t kFewHandles = 1024;      // of one update, which then needs no memory to work with

// Where the parts of a segment are.
struct ReplayView {
  uint8_t* segment;
  uint64_t capacity, record_bytes;
  uint64_t streams_at, leaves_at, records_at;
  uint64_t sums_at[TreeShape::kMaxLevels];
  uint64_t top_nodes;
  uint32_t shift[TreeShape::kMaxLevels];
  uint32_t levels, weight_bits;
  uint32_t stack;              // frames of a stack of which a record keeps one; 1: none
  uint32_t shares_successors;  // 1: a row's successor is the observation of its stream's next record
};

// What kernels of one buffer leave for one another, beside the segment. All zeros at first, but for `smallest`.
struct ReplayScratch {
  uint64_t smallest;  // weight of the batch that is being drawn; ~0 between calls
  uint64_t least;     // smallest, or the buffer's, of the batch drawn last
  uint64_t retries;   // of the batch that is being drawn; 0 between calls
  uint64_t nothing;   // 1: a draw of it found no row; 0 between calls
  uint32_t finished;  // blocks of the running kernel; 0 between calls
  float default_priority;
  uint64_t default_weight;
  uint64_t bad;                     // of the insert under way: 1 + the index of the first bad row counted from the end
  uint64_t writes;                  // of the insert under way, where successors are shared
  float bucket_priority[kBuckets];  // what PriorityMap::priority says of each bucket's upper edge
};

// What went wrong, for the host to raise at its next call; in host memory that the device writes. The first one stays.
struct ReplayFlags {
  enum Code : uint64_t {
    kNone = 0,
    kNothingToSample = 1,
    kBadPriority = 2,
    kUnknownHandle = 3,
    kBadReward = 4,
    kBadInsertPriority = 5,
    kBadStream = 6,
    kTooFew = 7,  // index: how many rows there are; integer: how many were to be drawn
  };
  uint64_t code;
  int64_t index, integer;  // of the first bad one, and its value where that is an integer
  double real;             // its value where it is a real number
};

enum class FieldReal : uint32_t { kNone = 0, kFloat = 1, kDouble = 2 };

struct FieldIn {
  const uint8_t* rows;
  uint32_t offset, bytes;
  uint32_t frames;      // above 1: a stack of so many, of which a record keeps one
  FieldReal looked_at;  // for NaN, if it is an observation
};

// A row that shares its successor, beside what its stream holds.
struct RowLooks {
  uint8_t shows;                  // its observation is what the stream's newest record shows
  uint8_t continues;              // its successor's older frames are its observation's newer ones
  uint8_t own_first, next_first;  // first frames to be kept of its observation and its successor: those before repeat
};

// What goes into a record: one frame of a row's observation or of its successor, or all that is neither.
struct RecordWrite {
  enum What : uint32_t { kObservation, kSuccessor, kRest };
  uint64_t slot, lap;
  uint64_t row;
  uint32_t frame, what;
};

struct InsertParams {
  ReplayView view;
  ReplayScratch* scratch;
  ReplayFlags* flags;
  FieldIn fields[kMostFields];
  uint32_t field_count, rows_per_warp;
  uint32_t observations;  // the first fields; as many last ones are their successors
  uint64_t n, first_ticket;
  const uint8_t* terminated;  // [n]
  const uint8_t* truncated;   // [n], or null: none
  const int64_t* streams;     // [n], or null: all 0
  const int32_t* next;        // [n], index of the stream's next row in this call, -1: none; null where streams is
  const int32_t* last;        // [n], of a stream's first row here the index of its last, else -1; null where streams is
  const float* priorities;    // [n], or null: the default
  const uint8_t* rewards;     // [n], looked at where `reward` says how, else null
  FieldReal reward;
  // Where successors are shared, in place of first_ticket, next and last:
  const int32_t* previous;  // [n], index of the stream's row before in this call, -1: none; null where streams is
  RowLooks* looks;          // [n]
  RecordWrite* writes;      // [n * (1 + 2 * stack)]
  int64_t* handles;         // [n]
};

struct FieldOut {
  uint8_t* rows;
  uint32_t offset, bytes;
  uint32_t frames;     // above 1: a stack of so many, of which a record keeps one
  uint32_t successor;  // 1: read from the window's last record, or from the one after where successors are shared
};

struct SampleParams {
  enum Flags : uint32_t { kStratified = 1, kBoundByBuffer = 4, kKeyed = 8 };
  ReplayView view;
  ReplayScratch* scratch;
  ReplayFlags* flags;
  FieldOut fields[kMostFields];  // but for a reward that is summed
  uint32_t field_count, draws_per_warp;
  uint64_t n, key;
  double discount, importance_exponent;
  const double* live;  // discount and importance exponent to read instead; null: none
  uint32_t n_step, how;
  uint8_t* rewards;  // summed rewards; null where n_step is 1
  uint32_t reward_offset;
  FieldReal reward;
  float* discounts;
  float* importance_weights;
  int64_t* handles;
  int64_t* steps;
  uint64_t* drawn;       // [n], the rows' weights
  const uint8_t* where;  // one truth value: 0: nothing is drawn, written or counted; null: as if it were 1
  // Of draws without replacement; null with it.
  uint64_t* chosen;       // [n], their slots; all kNowhere where there are too few rows
  uint64_t* taken;        // [2 * taken_places] zeros
  uint64_t taken_places;  // a power of two, at least 2 n, with priorities 2 n (levels + 1)
  uint64_t* rows;         // [slots in use] of a uniform buffer
};

struct UpdateParams {
  ReplayView view;
  ReplayScratch* scratch;
  ReplayFlags* flags;
  const int64_t* handles;
  const void* td_errors;
  uint64_t n;
  uint64_t* claims;      // [2 + claim_count] zeros, not read where n is small
  uint64_t claim_count;  // a power of two, at least 2 n
  int64_t* refused;      // one number, 0
  const uint8_t* where;  // one truth value: 0: nothing is looked at or changed; null: as if it were 1
  uint32_t is_double;
};

struct RemoveParams {
  ReplayView view;
  ReplayFlags* flags;
  const int64_t* handles;
  uint64_t n;
  int64_t* refused;  // one number, 0
};

struct ReweighParams {
  ReplayView view;
};

// Each returns 0 or the device's error code, in which case nothing was launched. Any thread; on `stream`, whatever that
// is to the device (not read by the host's build).
extern "C" {
int angle_replay_insert(const InsertParams* p, void* stream);
int angle_replay_sample(const SampleParams* p, void* stream);
int angle_replay_update(const UpdateParams* p, void* stream);
int angle_replay_remove(const RemoveParams* p, void* stream);
int angle_replay_reweigh(const ReweighParams* p, void* stream);
const char* angle_device_error(int code);
}

}  // namespace angle::device
