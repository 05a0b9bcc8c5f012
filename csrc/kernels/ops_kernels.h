// Signatures of the fused operations' kernels.
#pragma once
#include <cstddef>
#include <cstdint>

namespace angle {

struct OpsKernels {
  // target[i] = tau * online[i] + (1 - tau) * target[i], i in [0, n). Cost n. Any thread.
  void (*update_targets_f32)(float* target, const float* online, size_t n, float tau);
};

}  // namespace angle
