// The fused operations' kernels. What they compute is in kernels/ops.inl, term by term; T is what they calculate in.
#pragma once
#include "cuda/arithmetic.h"
#include "cuda/ops_params.h"
#include "cuda/portable.h"

namespace angle::device {

template <class T>
ANGLE_DEVICE T number(const NumbersIn& x, uint64_t i) {
  if (x.kind == Number::kDouble) return static_cast<T>(static_cast<const double*>(x.at)[i]);
  if (x.kind == Number::kFloat) return static_cast<T>(static_cast<const float*>(x.at)[i]);
  return static_cast<T>(of_bfloat16(static_cast<const uint16_t*>(x.at)[i]));
}

template <class T>
ANGLE_DEVICE void put(const NumbersOut& x, uint64_t i, T value) {
  if (x.kind == Number::kDouble) {
    static_cast<double*>(x.at)[i] = static_cast<double>(value);
  } else if (x.kind == Number::kFloat) {
    static_cast<float*>(x.at)[i] = static_cast<float>(value);
  } else {
    static_cast<uint16_t*>(x.at)[i] = to_bfloat16(static_cast<float>(value));
  }
}

// ---- the target: a thread a row ----

template <class T>
struct TwinTargetRows {
  using Params = TwinTargetParams;
  static constexpr uint32_t kThreads = 128;
  struct Shared {};

  ANGLE_DEVICE static void run(Block<Shared>& block, const TwinTargetParams& p) {
    block.each_thread([&](uint32_t thread) {
      const uint64_t i = uint64_t{block.index} * block.threads + thread;
      if (i >= p.batch) return;
      T value = number<T>(p.next_q, i);
      for (uint64_t k = 1; k < p.critics; ++k) {
        const T q = number<T>(p.next_q, k * p.batch + i);
        value = q < value || q != q ? q : value;
      }
      if (p.next_log_prob.at != nullptr) {
        const bool given = p.entropy_coefficient.at != nullptr;
        const T coefficient = given ? number<T>(p.entropy_coefficient, 0) : static_cast<T>(p.coefficient);
        value = value - coefficient * number<T>(p.next_log_prob, i);
      }
      put(p.td_target, i, number<T>(p.rewards, i) + number<T>(p.discounts, i) * value);
    });
  }
};

// ---- the loss: its rows by blocks, whose sums are added in order ----

// The sum over the threads of a block, by warps, which thread 0 then adds in order.
template <uint32_t kWarps>
struct BlockSum {
  double of_warps[kWarps];

  ANGLE_DEVICE void take(const Warp& warp, const Lanes<double>& values) {
    const double sum = warp.sum(values);
    warp.each([&](int lane) {
      if (lane == 0) of_warps[warp.index] = sum;
    });
  }
  ANGLE_DEVICE double total() const {
    double sum = 0.0;
    for (uint32_t warp = 0; warp < kWarps; ++warp) sum += of_warps[warp];
    return sum;
  }
};

template <class T>
struct TwinLossRows {
  using Params = TwinLossParams;
  static constexpr uint32_t kThreads = 512;
  struct Shared {
    BlockSum<kThreads / kLanes> sum;
  };

  ANGLE_DEVICE static void run(Block<Shared>& block, const TwinLossParams& p) {
    const uint64_t first = block.index * kLossRows;
    const uint64_t end = first + kLossRows < p.batch ? first + kLossRows : p.batch;
    block.each_warp([&](const Warp& warp) {
      Lanes<double> sums;
      warp.each([&](int lane) {
        const uint64_t start = first + warp.index * kLanes + static_cast<uint64_t>(lane);
        for (uint64_t i = start; i < end; i += kThreads) sums[lane] += row(p, i);
      });
      block.shared.sum.take(warp, sums);
    });
    block.each_thread([&](uint32_t thread) {
      if (thread != 0) return;
      const double sum = block.shared.sum.total();
      if (block.blocks == 1) {
        put(p.loss, 0, sum / static_cast<double>(p.batch));
      } else {
        p.sums[block.index] = sum;
      }
    });
  }

  // The weighted error of one row, whose other outputs it writes.
  ANGLE_DEVICE static double row(const TwinLossParams& p, uint64_t i) {
    const bool huber = p.huber_delta > 0.0;
    const T delta = static_cast<T>(p.huber_delta);
    const T scale = static_cast<T>((huber ? 1.0 : 2.0) / static_cast<double>(p.batch));
    const T target = number<T>(p.td_target, i);
    const T weight = p.importance_weights.at != nullptr ? number<T>(p.importance_weights, i) : T(1);
    double errors = 0.0;
    T sizes = T(0);
    for (uint64_t k = 0; k < p.critics; ++k) {
      const T difference = number<T>(p.q, k * p.batch + i) - target;
      const T size = magnitude(difference);
      T slope = difference, error = difference * difference;
      if (huber) {
        slope = slope < -delta ? -delta : slope;
        slope = slope > delta ? delta : slope;
        error = size <= delta ? T(0.5) * difference * difference : delta * (size - T(0.5) * delta);
      }
      errors += static_cast<double>(error * weight);
      sizes += size;
      put(p.q_gradient, k * p.batch + i, slope * weight * scale);
    }
    put(p.td_error, i, sizes / static_cast<T>(p.critics));
    return errors;
  }
};

// One block, after TwinLossRows of several.
struct AddLoss {
  using Params = TwinLossParams;
  static constexpr uint32_t kThreads = 256;
  struct Shared {
    BlockSum<kThreads / kLanes> sum;
  };

  ANGLE_DEVICE static void run(Block<Shared>& block, const TwinLossParams& p) {
    const uint64_t count = (p.batch + kLossRows - 1) / kLossRows;
    block.each_warp([&](const Warp& warp) {
      Lanes<double> sums;
      warp.each([&](int lane) {
        const uint64_t start = warp.index * kLanes + static_cast<uint64_t>(lane);
        for (uint64_t i = start; i < count; i += kThreads) sums[lane] += p.sums[i];
      });
      block.shared.sum.take(warp, sums);
    });
    block.each_thread([&](uint32_t thread) {
      if (thread == 0) put(p.loss, 0, block.shared.sum.total() / static_cast<double>(p.batch));
    });
  }
};

// ---- the squashed Gaussian ----

// How many lanes share a row: a power of two.
constexpr uint32_t lanes_a_row(uint64_t columns) {
  uint32_t lanes = 1;
  while (lanes < kLanes && lanes < columns) lanes *= 2;
  return lanes;
}

template <class T>
struct SquashedGaussianRows {
  using Params = SquashedGaussianParams;
  static constexpr uint32_t kThreads = 128;
  struct Shared {};

  ANGLE_DEVICE static void run(Block<Shared>& block, const SquashedGaussianParams& p) {
    const uint32_t width = lanes_a_row(p.columns);
    block.each_warp([&](const Warp& warp) {
      const uint64_t warp_of = uint64_t{block.index} * (kThreads / kLanes) + warp.index;
      const uint64_t first = warp_of * (kLanes / width);
      Lanes<double> densities;
      warp.each([&](int lane) {
        const uint32_t own = static_cast<uint32_t>(lane);
        const uint64_t row = first + own / width;
        if (row >= p.rows) return;
        for (uint64_t column = own % width; column < p.columns; column += width) {
          densities[lane] += static_cast<double>(element(p, row * p.columns + column));
        }
      });
      const Lanes<double> sums = warp.sums_of(densities, width);
      warp.each([&](int lane) {
        const uint32_t own = static_cast<uint32_t>(lane);
        const uint64_t row = first + own / width;
        if (own % width == 0 && row < p.rows) put(p.log_prob, row, sums[lane]);
      });
    });
  }

  // One action's log-density; the action and its spread are written.
  ANGLE_DEVICE static T element(const SquashedGaussianParams& p, uint64_t i) {
    constexpr T kConstant = T(0.91893853320467274178 + 2 * 0.69314718055994530942);  // log(2 pi)/2 + 2 log 2
    const T log_std = number<T>(p.log_std, i), noise = number<T>(p.noise, i);
    const T spread = exponential(log_std) * noise;
    const T u = number<T>(p.mean, i) + spread;
    const T size = magnitude(u);
    T power;
    const T fall = decay(T(-2) * size, &power);
    put(p.spread, i, spread);
    put(p.actions, i, sign_of(-fall / (T(2) + fall), u));
    return T(2) * (size + log_one_plus(power)) - (T(0.5) * noise * noise + log_std) - kConstant;
  }
};

// A thread an element: d tanh(u)/du = 1 - actions^2, d log_prob/du = 2 actions, du/dlog_std = spread, and log_prob
// holds -log_std.
template <class T>
struct SquashedGaussianGradients {
  using Params = SquashedGaussianGradientParams;
  static constexpr uint32_t kThreads = 128;
  struct Shared {};

  ANGLE_DEVICE static void run(Block<Shared>& block, const SquashedGaussianGradientParams& p) {
    block.each_thread([&](uint32_t thread) {
      const uint64_t i = uint64_t{block.index} * block.threads + thread;
      if (i >= p.rows * p.columns) return;
      const T by_density = p.log_prob_gradient.at != nullptr ? number<T>(p.log_prob_gradient, i / p.columns) : T(0);
      const T action = number<T>(p.actions, i);
      T by_mean = T(2) * action * by_density;
      if (p.actions_gradient.at != nullptr) by_mean += number<T>(p.actions_gradient, i) * (T(1) - action * action);
      put(p.mean_gradient, i, by_mean);
      put(p.log_std_gradient, i, by_mean * number<T>(p.spread, i) - by_density);
    });
  }
};

// ---- the targets ----

// How numbers are kept and calculated with.
struct AsFloat {
  using Kept = float;
  using Real = float;
  ANGLE_DEVICE static float read(float x) { return x; }
  ANGLE_DEVICE static float kept(float x) { return x; }
};
struct AsDouble {
  using Kept = double;
  using Real = double;
  ANGLE_DEVICE static double read(double x) { return x; }
  ANGLE_DEVICE static double kept(double x) { return x; }
};
struct AsBfloat16 {
  using Kept = uint16_t;
  using Real = float;
  ANGLE_DEVICE static float read(uint16_t x) { return of_bfloat16(x); }
  ANGLE_DEVICE static uint16_t kept(float x) { return to_bfloat16(x); }
};

// Every block sees to kNumbersOfBlock numbers of one tensor, 16 bytes at a time where they lie so.
template <class As>
struct UpdateTargets {
  using Params = UpdateTargetsParams;
  using Kept = typename As::Kept;
  using Real = typename As::Real;
  static constexpr uint32_t kThreads = 256;
  static constexpr uint32_t kTogether = 16 / sizeof(Kept);
  struct Shared {};
  struct alignas(16) Several {
    Kept number[kTogether];
  };

  ANGLE_DEVICE static void run(Block<Shared>& block, const UpdateTargetsParams& p) {
    uint32_t tensor = 0, above = p.tensors;  // the last tensor whose first block is not above this one
    while (above - tensor > 1) {
      const uint32_t middle = (tensor + above) / 2;
      (p.first_block[middle] <= block.index ? tensor : above) = middle;
    }
    const uint64_t first = (block.index - p.first_block[tensor]) * kNumbersOfBlock;
    const uint64_t left = p.sizes[tensor] - first;
    const uint64_t n = left < kNumbersOfBlock ? left : kNumbersOfBlock;
    Kept* const target = static_cast<Kept*>(p.targets[tensor]) + first;
    const Kept* const online = static_cast<const Kept*>(p.online[tensor]) + first;
    const Real take = static_cast<Real>(p.tau), keep = static_cast<Real>(1.0 - p.tau);
    const bool lie_so = (reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(online)) % 16 == 0;
    const uint64_t whole = lie_so ? n / kTogether : 0;
    block.each_thread([&](uint32_t thread) {
      for (uint64_t i = thread; i < whole; i += kThreads) {
        const Several given = reinterpret_cast<const Several*>(online)[i];
        Several moved = reinterpret_cast<const Several*>(target)[i];
        for (uint32_t j = 0; j < kTogether; ++j) moved.number[j] = mixed(take, given.number[j], keep, moved.number[j]);
        reinterpret_cast<Several*>(target)[i] = moved;
      }
      for (uint64_t i = whole * kTogether + thread; i < n; i += kThreads) {
        target[i] = mixed(take, online[i], keep, target[i]);
      }
    });
  }

  ANGLE_DEVICE static Kept mixed(Real take, Kept online, Real keep, Kept target) {
    return As::kept(take * As::read(online) + keep * As::read(target));
  }
};

}  // namespace angle::device
