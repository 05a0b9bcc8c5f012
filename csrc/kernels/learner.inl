// What a learner's update does besides products.

template <typename T>
void row_sums(const T* in, size_t in_row, T* out, size_t rows, size_t columns) {
  for (size_t i = 0; i < rows; ++i) {
    const T* const row = in + i * in_row;
    T sums[kLanes] = {};
    size_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) {
      for (size_t lane = 0; lane < kLanes; ++lane) sums[lane] += row[j + lane];
    }
    T total = T(0);
    for (; j < columns; ++j) total += row[j];
    for (size_t lane = 0; lane < kLanes; ++lane) total += sums[lane];
    out[i] = total;
  }
}

template <typename T>
void take_columns(const T* in, size_t in_row, T* out, size_t out_row, size_t rows, const uint32_t* columns, size_t n) {
  for (size_t i = 0; i < rows; ++i) {
    for (size_t j = 0; j < n; ++j) out[i * out_row + j] = in[i * in_row + columns[j]];
  }
}

inline float error_function(float x) { return erff(x); }
inline double error_function(double x) { return erf(x); }

template <typename T>
inline T sigmoid(T x) {
  return T(1) / (T(1) + exponential(-x));
}
template <typename T>
inline T hyperbolic_tangent(T x) {
  T power;
  const T fall = decay(T(-2) * magnitude(x), &power);
  return sign_of(-fall / (T(2) + fall), x);
}
template <typename T>
inline T normal_share(T x) {  // of a standard normal below x
  return T(0.5) * (T(1) + error_function(x * T(0.70710678118654752440)));
}

template <typename T>
void activate(Activation kind, const T* x, T* out, size_t n) {
  switch (kind) {
    case Activation::kNone:
      for (size_t i = 0; i < n; ++i) out[i] = x[i];
      break;
    case Activation::kRelu:
      for (size_t i = 0; i < n; ++i) out[i] = x[i] < T(0) ? T(0) : x[i];
      break;
    case Activation::kTanh:
      for (size_t i = 0; i < n; ++i) out[i] = hyperbolic_tangent(x[i]);
      break;
    case Activation::kSilu:
      for (size_t i = 0; i < n; ++i) out[i] = x[i] * sigmoid(x[i]);
      break;
    case Activation::kGelu:
      for (size_t i = 0; i < n; ++i) out[i] = x[i] * normal_share(x[i]);
      break;
  }
}

template <typename T>
void activate_gradient(Activation kind, const T* x, T* gradient, size_t n) {
  switch (kind) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
      for (size_t i = 0; i < n; ++i) gradient[i] = x[i] > T(0) ? gradient[i] : T(0);
      break;
    case Activation::kTanh:
      for (size_t i = 0; i < n; ++i) {
        const T y = hyperbolic_tangent(x[i]);
        gradient[i] *= T(1) - y * y;
      }
      break;
    case Activation::kSilu:
      for (size_t i = 0; i < n; ++i) {
        const T s = sigmoid(x[i]);
        gradient[i] *= s * (T(1) + x[i] * (T(1) - s));
      }
      break;
    case Activation::kGelu:
      for (size_t i = 0; i < n; ++i) {
        const T density = T(0.39894228040143267794) * exponential(T(-0.5) * x[i] * x[i]);
        gradient[i] *= normal_share(x[i]) + x[i] * density;
      }
      break;
  }
}

template <typename T>
void layer_norm(const LayerNorm<T>& a) {
  const T count = static_cast<T>(a.features);
  for (size_t j = 0; j < a.batch; ++j) {
    T sum = T(0), squares = T(0);
    for (size_t i = 0; i < a.features; ++i) sum += a.x[i * a.x_row + j];
    const T mean = sum / count;
    for (size_t i = 0; i < a.features; ++i) {
      const T difference = a.x[i * a.x_row + j] - mean;
      squares += difference * difference;
    }
    const T inverse = T(1) / static_cast<T>(__builtin_sqrt(static_cast<double>(squares / count) + a.epsilon));
    a.inverse[j] = inverse;
    for (size_t i = 0; i < a.features; ++i) {
      const T normal = (a.x[i * a.x_row + j] - mean) * inverse;
      a.normal[i * a.normal_row + j] = normal;
      a.y[i * a.y_row + j] =
          (a.scale != nullptr ? a.scale[i] : T(1)) * normal + (a.shift != nullptr ? a.shift[i] : T(0));
    }
  }
}

template <typename T>
void layer_norm_gradient(const LayerNormGradient<T>& a) {
  const T count = static_cast<T>(a.features);
  for (size_t i = 0; i < a.features; ++i) {
    T by_scale = T(0), by_shift = T(0);
    for (size_t j = 0; j < a.batch; ++j) {
      const T given = a.y_gradient[i * a.y_row + j];
      by_scale += given * a.normal[i * a.normal_row + j];
      by_shift += given;
    }
    if (a.scale_gradient != nullptr) a.scale_gradient[i] = by_scale;
    if (a.shift_gradient != nullptr) a.shift_gradient[i] = by_shift;
  }
  for (size_t j = 0; j < a.batch; ++j) {
    T sum = T(0), along = T(0);
    for (size_t i = 0; i < a.features; ++i) {
      const T given = a.y_gradient[i * a.y_row + j] * (a.scale != nullptr ? a.scale[i] : T(1));
      sum += given;
      along += given * a.normal[i * a.normal_row + j];
    }
    for (size_t i = 0; i < a.features; ++i) {
      const T given = a.y_gradient[i * a.y_row + j] * (a.scale != nullptr ? a.scale[i] : T(1));
      a.x_gradient[i * a.x_row + j] =
          a.inverse[j] * (given - sum / count - a.normal[i * a.normal_row + j] * along / count);
    }
  }
}

template <typename T>
inline T clamped(T x, T low, T high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

template <typename T>
void gaussian_columns(const GaussianColumns<T>& a) {
  constexpr T kConstant = T(0.91893853320467274178 + 2 * 0.69314718055994530942);  // log(2 pi)/2 + 2 log 2
  for (size_t j = 0; j < a.batch; ++j) a.log_prob[j] = T(0);
  for (size_t i = 0; i < a.columns; ++i) {
    for (size_t j = 0; j < a.batch; ++j) {
      const T log_std = clamped(a.log_std[i * a.row + j], a.log_std_low, a.log_std_high);
      const T noise = a.noise[j * a.columns + i];
      const T s = exponential(log_std) * noise;
      const T u = a.mean[i * a.row + j] + s;
      const T size = magnitude(u);
      T power;
      const T fall = decay(T(-2) * size, &power);
      a.spread[i * a.out_row + j] = s;
      a.actions[i * a.out_row + j] = sign_of(-fall / (T(2) + fall), u);
      a.log_prob[j] += T(2) * (size + log_one_plus(power)) - (T(0.5) * noise * noise + log_std) - kConstant;
    }
  }
}

template <typename T>
void gaussian_columns_gradient(const GaussianColumnsGradient<T>& a) {
  for (size_t i = 0; i < a.columns; ++i) {
    for (size_t j = 0; j < a.batch; ++j) {
      const T action = a.actions[i * a.out_row + j], log_std = a.log_std[i * a.row + j];
      const T by_mean = T(2) * action * a.log_prob_gradient +
                        a.actions_gradient[i * a.gradient_row + j] * (T(1) - action * action);
      a.mean_gradient[i * a.row + j] = by_mean;
      const bool inside = (log_std >= a.log_std_low) & (log_std <= a.log_std_high);
      a.log_std_gradient[i * a.row + j] =
          inside ? by_mean * a.spread[i * a.out_row + j] - a.log_prob_gradient : T(0);
    }
  }
}

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

template <typename T>
void adam(const AdamStep<T>& a) {
  const double first_correction = 1.0 - __builtin_pow(a.beta1, a.step);
  const double second_correction = 1.0 - __builtin_pow(a.beta2, a.step);
  const T scale = static_cast<T>(a.gradient_scale), keep = static_cast<T>(1.0 - a.beta1);
  const T beta2 = static_cast<T>(a.beta2), take = static_cast<T>(1.0 - a.beta2);
  const T step = static_cast<T>(a.learning_rate / first_correction);
  const T root = static_cast<T>(__builtin_sqrt(second_correction)), epsilon = static_cast<T>(a.epsilon);
  const T decay_share = static_cast<T>(a.decoupled ? a.learning_rate * a.weight_decay : 0.0);
  const T decay_gradient = static_cast<T>(a.decoupled ? 0.0 : a.weight_decay);
  for (size_t i = 0; i < a.n; ++i) {
    T parameter = a.parameters[i];
    const T gradient = a.gradients[i] * scale + decay_gradient * parameter;
    parameter = parameter - decay_share * parameter;
    const T first = a.first[i] + keep * (gradient - a.first[i]);
    const T second = beta2 * a.second[i] + take * gradient * gradient;
    a.first[i] = first;
    a.second[i] = second;
    a.parameters[i] = parameter - step * first / (square_root(second) / root + epsilon);
  }
}

template <typename T>
double squared_norm(const T* x, size_t n) {
  double sums[kLanes] = {};
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const double value = static_cast<double>(x[i + lane]);
      sums[lane] += value * value;
    }
  }
  double total = 0.0;
  for (; i < n; ++i) total += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  for (size_t lane = 0; lane < kLanes; ++lane) total += sums[lane];
  return total;
}

template <typename T>
constexpr LearnerKernelsOf<T> learner_kernels_of = {
    .product = product<T>,
    .transpose = transpose<T>,
    .row_sums = row_sums<T>,
    .take_columns = take_columns<T>,
    .activate = activate<T>,
    .activate_gradient = activate_gradient<T>,
    .layer_norm = layer_norm<T>,
    .layer_norm_gradient = layer_norm_gradient<T>,
    .gaussian_columns = gaussian_columns<T>,
    .gaussian_columns_gradient = gaussian_columns_gradient<T>,
    .adam = adam<T>,
    .squared_norm = squared_norm<T>,
};

constexpr LearnerKernels learner_kernels = {.f32 = learner_kernels_of<float>, .f64 = learner_kernels_of<double>};
