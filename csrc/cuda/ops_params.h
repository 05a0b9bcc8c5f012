// What the fused operations' launchers take: addresses on the device, numbers, and of what kind they are. The arrays
// are dense and row-major; one said to be optional may be null. Inputs and outputs do not overlap. The arithmetic is
// float32 (sums are float64), or float64 where `wide`, whatever the arrays hold; no multiply-add is fused and every sum
// has a fixed order. NaN in, NaN out.
#pragma once
#include <cstdint>

namespace angle::device {

enum class Number : uint32_t { kFloat = 0, kDouble = 1, kBfloat16 = 2 };

struct NumbersIn {
  const void* at;
  Number kind;
};

struct NumbersOut {
  void* at;
  Number kind;
};

struct TwinTargetParams {
  NumbersIn rewards;              // [batch]
  NumbersIn discounts;            // [batch]
  NumbersIn next_q;               // [critics, batch]
  NumbersIn next_log_prob;        // [batch], optional
  NumbersIn entropy_coefficient;  // [1], optional: `coefficient` instead; both are read only with next_log_prob
  NumbersOut td_target;           // [batch], written
  double coefficient;
  uint64_t critics;  // >= 1
  uint64_t batch;
  uint32_t wide;
};

constexpr uint64_t kLossRows = 4096;  // of the batch that a block takes

struct TwinLossParams {
  NumbersIn q;                   // [critics, batch]
  NumbersIn td_target;           // [batch]
  NumbersIn importance_weights;  // [batch], optional: ones
  NumbersOut loss;               // [1], written: mean over batch of weight * sum over critics of error
  NumbersOut td_error;           // [batch], written: mean over critics of |td_target - q|
  NumbersOut q_gradient;         // [critics, batch], written: d loss / d q
  double* sums;                  // [blocks] to work with where the batch is above kLossRows, else not read
  double huber_delta;            // > 0: Huber error; <= 0: squared error
  uint64_t critics;              // >= 1
  uint64_t batch;                // >= 1
  uint32_t wide;
};

struct SquashedGaussianParams {
  NumbersIn mean;       // [rows, columns]
  NumbersIn log_std;    // [rows, columns]
  NumbersIn noise;      // [rows, columns]
  NumbersOut actions;   // [rows, columns], written: tanh(mean + spread)
  NumbersOut spread;    // [rows, columns], written: exp(log_std) * noise
  NumbersOut log_prob;  // [rows], written: log-density of the actions, summed over columns
  uint64_t rows;
  uint64_t columns;  // >= 1
  uint32_t wide;
};

struct SquashedGaussianGradientParams {
  NumbersIn actions_gradient;   // [rows, columns], optional: zeros
  NumbersIn log_prob_gradient;  // [rows], optional: zeros
  NumbersIn actions;            // [rows, columns], as they were written
  NumbersIn spread;             // [rows, columns], as it was written
  NumbersOut mean_gradient;     // [rows, columns], written
  NumbersOut log_std_gradient;  // [rows, columns], written
  uint64_t rows;
  uint64_t columns;  // >= 1
  uint32_t wide;
};

constexpr uint32_t kTensorsAtOnce = 120;    // so that the parameters stay below the 4 KB that every device takes
constexpr uint64_t kNumbersOfBlock = 2048;  // of one tensor that a block of UpdateTargets takes

// The tensors are numbered from 0; tensor t is seen to by blocks first_block[t] to first_block[t + 1].
struct UpdateTargetsParams {
  void* targets[kTensorsAtOnce];
  const void* online[kTensorsAtOnce];  // may be the target
  uint64_t sizes[kTensorsAtOnce];      // none is 0
  uint32_t first_block[kTensorsAtOnce + 1];
  uint32_t tensors;  // <= kTensorsAtOnce
  Number kind;       // of all of them
  double tau;        // target = tau * online + (1 - tau) * target
};
static_assert(sizeof(UpdateTargetsParams) <= 4096);

// Each returns 0 or the device's error code, in which case nothing more was launched. Cost: the elements read. Any
// thread; on `stream`, whatever that is to the device (not read by the host's build). None waits for the device.
extern "C" {
int angle_op_twin_q_target(const TwinTargetParams* p, void* stream);
int angle_op_twin_q_loss(const TwinLossParams* p, void* stream);
int angle_op_squashed_gaussian(const SquashedGaussianParams* p, void* stream);
int angle_op_squashed_gaussian_gradient(const SquashedGaussianGradientParams* p, void* stream);
int angle_op_update_targets(const UpdateTargetsParams* p, void* stream);
}

}  // namespace angle::device
