// Signatures of the replay's kernels. The functions that read shared memory (prefix_sums, descend, descend_leaves,
// gather) may race with writers: each 64-bit lane is read once, so a value is some value that was stored, and what a
// function returns follows from the values as it read them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace angle {

constexpr double kWeightUnit = 0x1p20;  // the integer weight that stands for 1

constexpr uint64_t kLost = ~0ull;  // index of a draw that met fewer weight than the sums above promised

// One field of a record on its way out: `bytes` at `offset` of row i go to out + i * stride.
struct FieldCopy {
  uint8_t* out;
  uint32_t offset;
  uint32_t bytes;
  uint64_t stride;
};

struct ReplayKernels {
  // How many of the n rows of `width` values each hold a NaN. Cost n * width. Any thread.
  size_t (*nan_rows_f32)(const float* values, size_t n, size_t width);
  size_t (*nan_rows_f64)(const double* values, size_t n, size_t width);

  // out[0..n): 64 random bits each, draw i from Philox block (key, counter, stream + (i / 2 << 32)). Cost n.
  void (*philox_draws)(uint64_t key, uint64_t counter, uint64_t stream, uint64_t* out, size_t n);

  // Running sums over groups of 8 nodes, a group whose sum is negative read as 0; pads prefix with INT64_MAX to a
  // multiple of 8. Returns the total. Cost 8 * groups. `nodes` lie on a cache line.
  int64_t (*prefix_sums)(const int64_t* nodes, size_t groups, int64_t* prefix);

  // For each target, index = how many of the n prefix sums are <= target, and the target becomes what is left within
  // that node. Targets below prefix[n - 1]; ascending ones cost count + n / 8, others count * log n.
  void (*locate)(const int64_t* prefix, size_t n, int ascending, size_t count, uint64_t* index, int64_t* target);

  // One level down for each draw: index becomes that of the child whose share of the sums holds the target, or kLost.
  // `fan` is 8 or 16. Cost count * fan.
  void (*descend)(const int64_t* level, size_t fan, size_t count, uint64_t* index, int64_t* target);

  // The same on leaf words, whose weight is word & weight_mask; words[i] is the leaf as it was read.
  void (*descend_leaves)(const uint64_t* leaves, size_t fan, uint64_t weight_mask, size_t count, uint64_t* index,
                         int64_t* target, uint64_t* words);

  // Copies the fields of each row out of the records; rows with slot kLost are left alone. Cost: the bytes.
  void (*gather)(const uint8_t* records, size_t record_bytes, const uint64_t* slots, size_t count,
                 const FieldCopy* fields, size_t field_count);

  // Whether all of n priorities are finite and not negative. Cost n. Any thread.
  bool (*are_priorities_f32)(const float* priorities, size_t n);
  bool (*are_priorities_f64)(const double* priorities, size_t n);
  // Whether all of n values lie in [0, limit). Cost n. Any thread.
  bool (*are_below)(const int64_t* values, size_t n, uint64_t limit);

  // Priorities to integer weights: weights[i] = (priorities[i] + epsilon) ** exponent, as powers has it, times
  // kWeightUnit and rounded; a positive one never becomes 0, and one beyond `largest` is cut to it. Returns how many
  // were cut. Equal on every ISA. Cost n. Any thread.
  uint64_t (*weigh)(const float* priorities, size_t n, double epsilon, double exponent, uint64_t largest,
                    uint64_t* weights);

  // values[i] = values[i] ** exponent for finite values >= 0 by fixed float64 arithmetic, equal on every ISA to the
  // last bit; 0 ** 0 is 1. Relative error below 1e-13 for results in float64's normal range. Cost n.
  void (*powers)(double* values, size_t n, double exponent);
};

}  // namespace angle
