// What a learner's update does besides products and activations.

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
inline void take_one_by_one(const T* __restrict row, T* __restrict out, const uint32_t* columns, size_t n) {
  for (size_t j = 0; j < n; ++j) out[j] = row[columns[j]];
}

#if defined(__AVX512F__)

// Up to a vector of columns, in any order, from within two vectors' width: one permutation takes them.
template <typename Lane>
struct ColumnPiece {
  alignas(64) Lane lanes[64 / sizeof(Lane)];
  uint32_t low, high;  // which elements of either vector are read
  uint32_t from, count;
  size_t to;
};

inline __m512 taken(const ColumnPiece<uint32_t>& p, const float* row) {
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(p.low), row + p.from);
  const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(p.high), row + p.from + 16);
  return _mm512_permutex2var_ps(low, _mm512_load_si512(p.lanes), high);
}
inline __m512d taken(const ColumnPiece<uint64_t>& p, const double* row) {
  const __m512d low = _mm512_maskz_loadu_pd(static_cast<__mmask8>(p.low), row + p.from);
  const __m512d high = _mm512_maskz_loadu_pd(static_cast<__mmask8>(p.high), row + p.from + 8);
  return _mm512_permutex2var_pd(low, _mm512_load_si512(p.lanes), high);
}
inline void store(float* out, __m512 value) { _mm512_storeu_ps(out, value); }
inline void store(double* out, __m512d value) { _mm512_storeu_pd(out, value); }
inline void store_first(float* out, __m512 value, size_t n) {
  _mm512_mask_storeu_ps(out, static_cast<__mmask16>((1u << n) - 1), value);
}
inline void store_first(double* out, __m512d value, size_t n) {
  _mm512_mask_storeu_pd(out, static_cast<__mmask8>((1u << n) - 1), value);
}

// The longest piece that begins with columns[0].
template <typename Lane>
inline ColumnPiece<Lane> first_piece(const uint32_t* columns, size_t n) {
  constexpr uint32_t kWidth = 64 / sizeof(Lane);
  ColumnPiece<Lane> piece = {};
  uint32_t low = columns[0], high = columns[0];
  for (; piece.count < kWidth && piece.count < n; ++piece.count) {
    const uint32_t at = columns[piece.count], least = at < low ? at : low, most = at > high ? at : high;
    if (most - least >= 2 * kWidth) break;
    low = least;
    high = most;
  }
  piece.from = low;
  for (uint32_t j = 0; j < piece.count; ++j) {
    const uint32_t lane = columns[j] - low;
    piece.lanes[j] = lane;
    piece.low |= lane < kWidth ? 1u << lane : 0u;
    piece.high |= lane < kWidth ? 0u : 1u << (lane - kWidth);
  }
  return piece;
}

// What a store leaves behind its columns is overwritten by the next; one that would reach beyond the row stores no more
// than it took. Columns all over the place are taken one by one.
template <typename T, typename Lane>
inline void take_columns_by(const T* in, size_t in_row, T* out, size_t out_row, size_t rows, const uint32_t* columns,
                            size_t n) {
  constexpr size_t kWidth = 64 / sizeof(T), kPieces = 64;
  for (size_t start = 0, end = 0; start < n; start = end) {
    ColumnPiece<Lane> pieces[kPieces];
    size_t count = 0, whole = 0;
    for (; end < n && count < kPieces; ++count) {
      pieces[count] = first_piece<Lane>(columns + end, n - end);
      pieces[count].to = end;
      whole += end + kWidth <= n;
      end += pieces[count].count;
    }
    const bool scattered = 3 * count > end - start + kWidth;
    for (size_t i = 0; i < rows; ++i) {
      const T* const row = in + i * in_row;
      T* const out_of_row = out + i * out_row;
      if (scattered) {
        take_one_by_one(row, out_of_row + start, columns + start, end - start);
        continue;
      }
      for (size_t p = 0; p < whole; ++p) store(out_of_row + pieces[p].to, taken(pieces[p], row));
      for (size_t p = whole; p < count; ++p) {
        store_first(out_of_row + pieces[p].to, taken(pieces[p], row), pieces[p].count);
      }
    }
  }
}

inline void take_columns(const float* in, size_t in_row, float* out, size_t out_row, size_t rows,
                         const uint32_t* columns, size_t n) {
  take_columns_by<float, uint32_t>(in, in_row, out, out_row, rows, columns, n);
}
inline void take_columns(const double* in, size_t in_row, double* out, size_t out_row, size_t rows,
                         const uint32_t* columns, size_t n) {
  take_columns_by<double, uint64_t>(in, in_row, out, out_row, rows, columns, n);
}

#else

template <typename T>
void take_columns(const T* in, size_t in_row, T* out, size_t out_row, size_t rows, const uint32_t* columns, size_t n) {
  for (size_t i = 0; i < rows; ++i) take_one_by_one(in + i * in_row, out + i * out_row, columns, n);
}

#endif

// --- Layer norm. ----------------------------------------------------------------------------------------------------

constexpr size_t kNormColumns = 256;  // worked on at a time: their sums stay in the first cache
constexpr size_t kNormRows = 16;      // added up among themselves first, which keeps rounding small

// means[j] and squares[j], of differences from the mean, over the rows of n columns. Parts of a few rows are put
// together (Chan, Golub and LeVeque 1979), so that memory is read once and a large mean costs no digits.
template <typename T>
inline void column_moments(const T* __restrict x, size_t x_row, size_t rows, size_t n, T* __restrict means,
                           T* __restrict squares) {
  T part_means[kNormColumns], part_squares[kNormColumns];
  for (size_t j = 0; j < n; ++j) means[j] = squares[j] = T(0);
  for (size_t first = 0; first < rows; first += kNormRows) {
    const size_t count = at_most(rows - first, kNormRows);
    const T* const part = x + first * x_row;
    const T inverse = T(1) / static_cast<T>(count);
    for (size_t j = 0; j < n; ++j) part_means[j] = part_squares[j] = T(0);
    for (size_t i = 0; i < count; ++i) {
      const T* const row = part + i * x_row;
      for (size_t j = 0; j < n; ++j) part_means[j] += row[j];
    }
    for (size_t j = 0; j < n; ++j) part_means[j] *= inverse;
    for (size_t i = 0; i < count; ++i) {
      const T* const row = part + i * x_row;
      for (size_t j = 0; j < n; ++j) {
        const T difference = row[j] - part_means[j];
        part_squares[j] = fused(difference, difference, part_squares[j]);
      }
    }
    const T share = static_cast<T>(count) / static_cast<T>(first + count), weight = share * static_cast<T>(first);
    for (size_t j = 0; j < n; ++j) {
      const T difference = part_means[j] - means[j];
      means[j] = fused(difference, share, means[j]);
      squares[j] += fused(difference * difference, weight, part_squares[j]);
    }
  }
}

template <typename T>
void layer_norm(const LayerNorm<T>& a) {
  const T share = T(1) / static_cast<T>(a.features), epsilon = static_cast<T>(a.epsilon);
  for (size_t start = 0; start < a.batch; start += kNormColumns) {
    const size_t n = at_most(a.batch - start, kNormColumns);
    T means[kNormColumns], squares[kNormColumns], inverses[kNormColumns];
    column_moments(a.x + start, a.x_row, a.features, n, means, squares);
    for (size_t j = 0; j < n; ++j) inverses[j] = T(1) / square_root(squares[j] * share + epsilon);
    memcpy(a.inverse + start, inverses, n * sizeof(T));
    for (size_t i = 0; i < a.features; ++i) {
      const T* const x = a.x + i * a.x_row + start;
      T* const y = a.y + i * a.y_row + start;
      T* const normal = a.normal + i * a.normal_row + start;
      const T scale = a.scale != nullptr ? a.scale[i] : T(1), shift = a.shift != nullptr ? a.shift[i] : T(0);
      ANGLE_INDEPENDENT
      for (size_t j = 0; j < n; ++j) {
        const T value = (x[j] - means[j]) * inverses[j];
        normal[j] = value;
        y[j] = fused(value, scale, shift);
      }
    }
  }
}

// With g = y_gradient * scale: x_gradient = inverse * (g - mean of g - normal * mean of (g * normal)).
template <typename T>
void layer_norm_gradient(const LayerNormGradient<T>& a) {
  const T share = T(1) / static_cast<T>(a.features);
  for (size_t start = 0; start < a.batch; start += kNormColumns) {
    const size_t n = at_most(a.batch - start, kNormColumns);
    T means[kNormColumns] = {}, along[kNormColumns] = {}, inverses[kNormColumns];
    for (size_t i = 0; i < a.features; ++i) {
      const T* const given = a.y_gradient + i * a.y_row + start;
      const T* const normal = a.normal + i * a.normal_row + start;
      const T scale = a.scale != nullptr ? a.scale[i] : T(1);
      T by_scale[kLanes] = {}, by_shift[kLanes] = {};
      size_t j = 0;
      for (; j + kLanes <= n; j += kLanes) {
        for (size_t lane = 0; lane < kLanes; ++lane) {
          const T product = given[j + lane] * normal[j + lane];
          by_shift[lane] += given[j + lane];
          by_scale[lane] += product;
          means[j + lane] = fused(scale, given[j + lane], means[j + lane]);
          along[j + lane] = fused(scale, product, along[j + lane]);
        }
      }
      for (size_t lane = 0; j < n; ++j, ++lane) {
        const T product = given[j] * normal[j];
        by_shift[lane] += given[j];
        by_scale[lane] += product;
        means[j] = fused(scale, given[j], means[j]);
        along[j] = fused(scale, product, along[j]);
      }
      T scale_sum = T(0), shift_sum = T(0);
      for (size_t lane = 0; lane < kLanes; ++lane) {
        scale_sum += by_scale[lane];
        shift_sum += by_shift[lane];
      }
      if (a.scale_gradient != nullptr) a.scale_gradient[i] = start == 0 ? scale_sum : a.scale_gradient[i] + scale_sum;
      if (a.shift_gradient != nullptr) a.shift_gradient[i] = start == 0 ? shift_sum : a.shift_gradient[i] + shift_sum;
    }
    memcpy(inverses, a.inverse + start, n * sizeof(T));
    for (size_t j = 0; j < n; ++j) {
      means[j] *= share;
      along[j] *= share;
    }
    for (size_t i = 0; i < a.features; ++i) {
      const T* const given = a.y_gradient + i * a.y_row + start;
      const T* const normal = a.normal + i * a.normal_row + start;
      T* const out = a.x_gradient + i * a.x_row + start;
      const T scale = a.scale != nullptr ? a.scale[i] : T(1);
      ANGLE_INDEPENDENT
      for (size_t j = 0; j < n; ++j) {
        out[j] = inverses[j] * (fused(given[j], scale, -means[j]) - normal[j] * along[j]);
      }
    }
  }
}

// --- The squashed Gaussian, feature by feature. ---------------------------------------------------------------------

template <typename T>
inline T clamped(T x, T low, T high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// One action of n rows; its part of the log-density is added. In steps, each a chain of operations short enough that
// several vectors are under way at once.
template <typename T>
inline void gaussian_column(size_t n, T low, T high, const T* __restrict mean, const T* __restrict log_std,
                            const T* __restrict noise, T* __restrict actions, T* __restrict spread,
                            T* __restrict log_prob) {
  constexpr T kConstant = T(0.91893853320467274178 + 2 * 0.69314718055994530942);  // log(2 pi)/2 + 2 log 2
  T powers_of_size[kBlock];
  for (size_t j = 0; j < n; ++j) {
    const T log_of_std = clamped(log_std[j], low, high);
    spread[j] = exponential<Fused>(log_of_std) * noise[j];
    log_prob[j] -= fused(T(0.5) * noise[j], noise[j], log_of_std) + kConstant;
  }
  for (size_t j = 0; j < n; ++j) {
    const T u = mean[j] + spread[j], size = magnitude(u);
    const T fall = decay<Fused>(T(-2) * size, &powers_of_size[j]);
    actions[j] = sign_of(-fall / (T(2) + fall), u);
    log_prob[j] = fused(T(2), size, log_prob[j]);
  }
  for (size_t j = 0; j < n; ++j) {
    log_prob[j] = fused(T(2), log_one_plus<Fused>(powers_of_size[j]), log_prob[j]);
  }
}

template <typename T>
void gaussian_columns(const GaussianColumns<T>& a) {
  for (size_t start = 0; start < a.batch; start += kBlock) {
    const size_t n = at_most(a.batch - start, kBlock);
    T noise[kBlock], log_prob[kBlock];
    for (size_t j = 0; j < n; ++j) log_prob[j] = T(0);
    for (size_t i = 0; i < a.columns; ++i) {
      const T* const given = a.noise + start * a.columns + i;
      for (size_t j = 0; j < n; ++j) noise[j] = given[j * a.columns];
      const size_t in = i * a.row + start, out = i * a.out_row + start;
      gaussian_column(n, a.log_std_low, a.log_std_high, a.mean + in, a.log_std + in, noise, a.actions + out,
                      a.spread + out, log_prob);
    }
    memcpy(a.log_prob + start, log_prob, n * sizeof(T));
  }
}

template <typename T>
inline void gaussian_column_gradient(size_t n, T low, T high, T by_log_prob, const T* __restrict given,
                                     const T* __restrict actions, const T* __restrict spread,
                                     const T* __restrict log_std, T* __restrict mean_gradient,
                                     T* __restrict log_std_gradient) {
  for (size_t j = 0; j < n; ++j) {
    const T by_mean = T(2) * actions[j] * by_log_prob + given[j] * (T(1) - actions[j] * actions[j]);
    const bool inside = (log_std[j] >= low) & (log_std[j] <= high);
    mean_gradient[j] = by_mean;
    log_std_gradient[j] = inside ? by_mean * spread[j] - by_log_prob : T(0);
  }
}

template <typename T>
void gaussian_columns_gradient(const GaussianColumnsGradient<T>& a) {
  for (size_t i = 0; i < a.columns; ++i) {
    gaussian_column_gradient(a.batch, a.log_std_low, a.log_std_high, a.log_prob_gradient,
                             a.actions_gradient + i * a.gradient_row, a.actions + i * a.out_row,
                             a.spread + i * a.out_row, a.log_std + i * a.row, a.mean_gradient + i * a.row,
                             a.log_std_gradient + i * a.row);
  }
}

// --- Adam. ----------------------------------------------------------------------------------------------------------

template <typename T>
struct AdamFactors {
  T gradient, decay_gradient, decay_parameter, beta1_left, beta2, beta2_left, step, root, epsilon, tau, tau_left;
};

template <bool kTargets, typename T>
inline void adam_elements(const AdamFactors<T>& f, size_t n, const T* __restrict gradients, T* __restrict parameters,
                          T* __restrict first, T* __restrict second, T* __restrict targets) {
  for (size_t i = 0; i < n; ++i) {
    const T before = parameters[i];
    const T gradient = fused(f.decay_gradient, before, gradients[i] * f.gradient);
    const T mean = fused(f.beta1_left, gradient - first[i], first[i]);
    const T square = fused(f.beta2, second[i], f.beta2_left * gradient * gradient);
    const T kept = fused(-f.decay_parameter, before, before);
    const T after = kept - f.step * mean / fused(square_root(square), f.root, f.epsilon);
    first[i] = mean;
    second[i] = square;
    parameters[i] = after;
    if constexpr (kTargets) targets[i] = fused(f.tau_left, targets[i], f.tau * after);
  }
}

template <typename T>
void adam(const AdamStep<T>& a) {
  const double first_correction = 1.0 - __builtin_pow(a.beta1, a.step);
  const double second_correction = 1.0 - __builtin_pow(a.beta2, a.step);
  const AdamFactors<T> factors = {
      .gradient = static_cast<T>(a.gradient_scale),
      .decay_gradient = static_cast<T>(a.decoupled ? 0.0 : a.weight_decay),
      .decay_parameter = static_cast<T>(a.decoupled ? a.learning_rate * a.weight_decay : 0.0),
      .beta1_left = static_cast<T>(1.0 - a.beta1),
      .beta2 = static_cast<T>(a.beta2),
      .beta2_left = static_cast<T>(1.0 - a.beta2),
      .step = static_cast<T>(a.learning_rate / first_correction),
      .root = static_cast<T>(1.0 / __builtin_sqrt(second_correction)),
      .epsilon = static_cast<T>(a.epsilon),
      .tau = static_cast<T>(a.tau),
      .tau_left = static_cast<T>(1.0 - a.tau),
  };
  if (a.targets != nullptr) {
    adam_elements<true>(factors, a.n, a.gradients, a.parameters, a.first, a.second, a.targets);
  } else {
    adam_elements<false>(factors, a.n, a.gradients, a.parameters, a.first, a.second, a.targets);
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
    .few_rows = few_rows<T>,
    .transpose = transpose<T>,
    .row_sums = row_sums<T>,
    .take_columns = take_columns,
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
