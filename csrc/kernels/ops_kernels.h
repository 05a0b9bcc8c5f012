// Signatures of the fused operations' kernels.
//
// Arrays are dense and row-major; an argument said to be optional may be null. Inputs and outputs do not
// overlap. No multiply-add is fused and every sum has a fixed order, so float32 results are equal on every
// ISA. NaN in, NaN out.
#pragma once
#include <cstddef>
#include <cstdint>

namespace angle {

template <typename T>
struct TwinTarget {
  const T* rewards;        // [batch]
  const T* discounts;      // [batch]
  const T* next_q;         // [critics, batch]
  const T* next_log_prob;  // [batch], optional
  T entropy_coefficient;   // read only with next_log_prob
  T* td_target;            // [batch], written
  size_t critics;          // >= 1
  size_t batch;
};

template <typename T>
struct TwinLoss {
  const T* q;                   // [critics, batch]
  const T* td_target;           // [batch]
  const T* importance_weights;  // [batch], optional: ones
  T huber_delta;                // > 0: Huber error; <= 0: squared error
  T* loss;                      // [1], written: mean over batch of weight * sum over critics of error
  T* td_error;                  // [batch], written: mean over critics of |td_target - q|
  T* q_gradient;                // [critics, batch], written: d loss / d q
  size_t critics;               // >= 1
  size_t batch;                 // >= 1
};

template <typename T>
struct SquashedGaussian {
  const T* mean;     // [rows, columns]
  const T* log_std;  // [rows, columns]
  const T* noise;    // [rows, columns]
  T* actions;        // [rows, columns], written: tanh(mean + spread)
  T* spread;         // [rows, columns], written: exp(log_std) * noise
  T* log_prob;       // [rows], written: log-density of the actions, summed over columns
  size_t rows;
  size_t columns;  // >= 1
};

template <typename T>
struct SquashedGaussianGradient {
  const T* actions_gradient;   // [rows, columns], optional: zeros
  const T* log_prob_gradient;  // [rows], optional: zeros
  const T* actions;            // [rows, columns], from the forward kernel
  const T* spread;             // [rows, columns], from the forward kernel
  T* mean_gradient;            // [rows, columns], written
  T* log_std_gradient;         // [rows, columns], written
  size_t rows;
  size_t columns;  // >= 1
};

// All: cost proportional to the elements read. Any thread. No allocation.
template <typename T>
struct OpsKernelsOf {
  void (*twin_q_target)(const TwinTarget<T>&);
  void (*twin_q_loss)(const TwinLoss<T>&);
  void (*squashed_gaussian)(const SquashedGaussian<T>&);
  void (*squashed_gaussian_gradient)(const SquashedGaussianGradient<T>&);
  // target[i] = tau * online[i] + (1 - tau) * target[i], i in [0, n); target may be online.
  void (*update_targets)(T* target, const T* online, size_t n, double tau);
};

struct OpsKernels {
  OpsKernelsOf<float> f32;
  OpsKernelsOf<double> f64;
};

}  // namespace angle
