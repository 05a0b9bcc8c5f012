// The fused operations. Loops are written so that the compiler vectorises them for the ISA of this unit.

constexpr size_t kLanes = 16;   // partial sums of a reduction: the same number and order on every ISA
constexpr size_t kBlock = 512;  // elements worked on in one piece of stack

template <typename T>
void twin_q_target(const TwinTarget<T>& a) {
  T* const out = a.td_target;
  for (size_t i = 0; i < a.batch; ++i) out[i] = a.next_q[i];
  for (size_t k = 1; k < a.critics; ++k) {
    const T* const q = a.next_q + k * a.batch;
    for (size_t i = 0; i < a.batch; ++i) out[i] = (q[i] < out[i]) | (q[i] != q[i]) ? q[i] : out[i];
  }
  if (a.next_log_prob != nullptr) {
    for (size_t i = 0; i < a.batch; ++i) out[i] = out[i] - a.entropy_coefficient * a.next_log_prob[i];
  }
  for (size_t i = 0; i < a.batch; ++i) out[i] = a.rewards[i] + a.discounts[i] * out[i];
}

// One critic's error over n rows, up to kLanes of them: adds weighted errors to `sums` and |difference| to `td_error`.
template <bool Huber, bool Weighted, typename T>
inline void twin_q_loss_rows(size_t n, const T* __restrict q, const T* __restrict target, const T* __restrict weight,
                             T delta, T scale, double* __restrict sums, T* __restrict td_error,
                             T* __restrict gradient) {
  for (size_t j = 0; j < n; ++j) {
    const T difference = q[j] - target[j];
    const T size = magnitude(difference);
    T slope = difference, error;
    if constexpr (Huber) {
      slope = slope < -delta ? -delta : slope;
      slope = slope > delta ? delta : slope;
      const T inside = T(0.5) * difference * difference, outside = delta * (size - T(0.5) * delta);
      error = size <= delta ? inside : outside;
    } else {
      error = difference * difference;
    }
    if constexpr (Weighted) {
      slope = slope * weight[j];
      error = error * weight[j];
    }
    sums[j] += static_cast<double>(error);
    td_error[j] += size;
    gradient[j] = slope * scale;
  }
}

template <bool Huber, bool Weighted, typename T>
void twin_q_loss_of(const TwinLoss<T>& a) {
  const T scale = static_cast<T>((Huber ? 1.0 : 2.0) / static_cast<double>(a.batch));
  double sums[kLanes] = {};
  for (size_t i = 0; i < a.batch; ++i) a.td_error[i] = T(0);
  for (size_t k = 0; k < a.critics; ++k) {
    const T* const q = a.q + k * a.batch;
    T* const gradient = a.q_gradient + k * a.batch;
    size_t i = 0;
    for (; i + kLanes <= a.batch; i += kLanes) {
      twin_q_loss_rows<Huber, Weighted>(kLanes, q + i, a.td_target + i, a.importance_weights + (Weighted ? i : 0),
                                        a.huber_delta, scale, sums, a.td_error + i, gradient + i);
    }
    twin_q_loss_rows<Huber, Weighted>(a.batch - i, q + i, a.td_target + i, a.importance_weights + (Weighted ? i : 0),
                                      a.huber_delta, scale, sums, a.td_error + i, gradient + i);
  }
  double total = 0.0;
  for (size_t j = 0; j < kLanes; ++j) total += sums[j];
  *a.loss = static_cast<T>(total / static_cast<double>(a.batch));
  const T critics = static_cast<T>(a.critics);
  for (size_t i = 0; i < a.batch; ++i) a.td_error[i] = a.td_error[i] / critics;
}

template <typename T>
void twin_q_loss(const TwinLoss<T>& a) {
  const bool huber = a.huber_delta > T(0), weighted = a.importance_weights != nullptr;
  if (huber && weighted)
    twin_q_loss_of<true, true>(a);
  else if (huber)
    twin_q_loss_of<true, false>(a);
  else if (weighted)
    twin_q_loss_of<false, true>(a);
  else
    twin_q_loss_of<false, false>(a);
}

// With u = mean + spread: tanh u, and per element the log-density of tanh u,
//   -noise^2/2 - log_std - log(2 pi)/2 - 2 (log 2 - u - softplus(-2u)),   where u + softplus(-2u) = |u| + log(1 +
//   e^-2|u|).
template <typename T>
inline void squashed_gaussian_block(size_t n, const T* __restrict mean, const T* __restrict log_std,
                                    const T* __restrict noise, T* __restrict actions, T* __restrict spread,
                                    T* __restrict density) {
  constexpr T kConstant = T(0.91893853320467274178 + 2 * 0.69314718055994530942);  // log(2 pi)/2 + 2 log 2
  for (size_t i = 0; i < n; ++i) {
    const T s = exponential(log_std[i]) * noise[i];
    const T u = mean[i] + s;
    const T size = magnitude(u);
    T power;
    const T fall = decay(T(-2) * size, &power);
    spread[i] = s;
    actions[i] = sign_of(-fall / (T(2) + fall), u);
    density[i] = T(2) * (size + log_one_plus(power)) - (T(0.5) * noise[i] * noise[i] + log_std[i]) - kConstant;
  }
}

template <typename T>
void squashed_gaussian(const SquashedGaussian<T>& a) {
  T density[kBlock];
  const size_t total = a.rows * a.columns;
  double sum = 0.0;
  size_t row = 0, column = 0;
  for (size_t start = 0; start < total; start += kBlock) {
    const size_t n = total - start < kBlock ? total - start : kBlock;
    squashed_gaussian_block(n, a.mean + start, a.log_std + start, a.noise + start, a.actions + start, a.spread + start,
                            density);
    for (size_t i = 0; i < n; ++i) {
      sum += static_cast<double>(density[i]);
      if (++column == a.columns) {
        a.log_prob[row++] = static_cast<T>(sum);
        sum = 0.0;
        column = 0;
      }
    }
  }
}

// d tanh(u)/du = 1 - actions^2, d log_prob/du = 2 actions, du/dlog_std = spread, and log_prob holds -log_std.
template <typename T>
void squashed_gaussian_gradient(const SquashedGaussianGradient<T>& a) {
  T by_density[kBlock];
  const size_t total = a.rows * a.columns;
  size_t row = 0, column = 0;
  for (size_t start = 0; start < total; start += kBlock) {
    const size_t n = total - start < kBlock ? total - start : kBlock;
    for (size_t i = 0; i < n; ++i) {
      by_density[i] = a.log_prob_gradient != nullptr ? a.log_prob_gradient[row] : T(0);
      if (++column == a.columns) {
        ++row;
        column = 0;
      }
    }
    const T* const actions = a.actions + start;
    const T* const spread = a.spread + start;
    T* const mean_gradient = a.mean_gradient + start;
    T* const log_std_gradient = a.log_std_gradient + start;
    for (size_t i = 0; i < n; ++i) mean_gradient[i] = T(2) * actions[i] * by_density[i];
    if (a.actions_gradient != nullptr) {
      const T* const given = a.actions_gradient + start;
      for (size_t i = 0; i < n; ++i) mean_gradient[i] += given[i] * (T(1) - actions[i] * actions[i]);
    }
    for (size_t i = 0; i < n; ++i) log_std_gradient[i] = mean_gradient[i] * spread[i] - by_density[i];
  }
}

template <typename T>
void update_targets(T* target, const T* online, size_t n, double tau) {
  const T take = static_cast<T>(tau), keep = static_cast<T>(1.0 - tau);
  for (size_t i = 0; i < n; ++i) target[i] = take * online[i] + keep * target[i];
}

template <typename T>
constexpr OpsKernelsOf<T> ops_kernels_of = {
    .twin_q_target = twin_q_target<T>,
    .twin_q_loss = twin_q_loss<T>,
    .squashed_gaussian = squashed_gaussian<T>,
    .squashed_gaussian_gradient = squashed_gaussian_gradient<T>,
    .update_targets = update_targets<T>,
};

constexpr OpsKernels ops_kernels = {.f32 = ops_kernels_of<float>, .f64 = ops_kernels_of<double>};
