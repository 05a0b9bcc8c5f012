// Signatures of the replay's kernels.
#pragma once
#include <cstddef>
#include <cstdint>

namespace angle {

struct ReplayKernels {
  // Whether any of n floats is NaN. Cost n. Any thread.
  bool (*any_nan_f32)(const float* values, size_t n);
};

}  // namespace angle
