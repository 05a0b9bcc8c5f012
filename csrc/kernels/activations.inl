// Activations and their gradients, and what the learner's kernels have in common.

// Says of the next loop that no pass reads what another wrote: its pointers are far apart or equal.
#if defined(__clang__)
#define ANGLE_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define ANGLE_INDEPENDENT _Pragma("GCC ivdep")
#endif

// a * b + c, rounded once where the ISA can.
inline float fused(float a, float b, float c) { return Fused::sum(a, b, c); }
inline double fused(double a, double b, double c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

inline size_t at_most(size_t n, size_t limit) { return n < limit ? n : limit; }

template <typename T>
inline T sigmoid(T x) {
  return T(1) / (T(1) + exponential<Fused>(-x));
}

template <typename T>
inline T hyperbolic_tangent(T x) {
  T power;
  const T fall = decay<Fused>(T(-2) * magnitude(x), &power);
  return sign_of(-fall / (T(2) + fall), x);
}

// How much of a standard normal lies below x, and e^(-x^2 / 2). The tail beyond |x| is that power times a polynomial in
// t = 1 / (1 + 0.35 |x|), fitted to 3e-8 of itself.
inline float normal_share(float x, float* power) {
  const float size = magnitude(x);
  *power = exponential<Fused>(-0.5f * x * x);
  const float t = 1.0f / fused(0.35f, size, 1.0f);
  float p = -0.02915805688f;
  p = fused(p, t, 0.1440316977f);
  p = fused(p, t, -0.2558404861f);
  p = fused(p, t, 0.1593212327f);
  p = fused(p, t, -0.02321329887f);
  p = fused(p, t, 0.1055528537f);
  p = fused(p, t, 0.1198212108f);
  p = fused(p, t, 0.1398635245f);
  p = fused(p, t, 0.1396213064f);
  const float tail = *power * (t * p);
  return x < 0.0f ? tail : 1.0f - tail;
}
inline double normal_share(double x, double* power) {
  *power = exponential<Fused>(-0.5 * x * x);
  return 0.5 * erfc(x * -0.70710678118654752440);
}

template <typename T, typename Function>
inline void each(const T* x, T* out, size_t n, const Function& f) {
  ANGLE_INDEPENDENT
  for (size_t i = 0; i < n; ++i) out[i] = f(x[i]);
}

template <typename T>
void activate(Activation kind, const T* x, T* out, size_t n) {
  switch (kind) {
    case Activation::kNone:
      if (out != x) memcpy(out, x, n * sizeof(T));
      break;
    case Activation::kRelu:
      each(x, out, n, [](T v) { return v < T(0) ? T(0) : v; });
      break;
    case Activation::kTanh:
      each(x, out, n, [](T v) { return hyperbolic_tangent(v); });
      break;
    case Activation::kSilu:
      each(x, out, n, [](T v) { return v * sigmoid(v); });
      break;
    case Activation::kGelu:
      each(x, out, n, [](T v) {
        T power;
        return v * normal_share(v, &power);
      });
      break;
  }
}

// gradient[i] *= f(x[i]).
template <typename T, typename Function>
inline void scale_each(const T* __restrict x, T* __restrict gradient, size_t n, const Function& f) {
  for (size_t i = 0; i < n; ++i) gradient[i] *= f(x[i]);
}

template <typename T>
void activate_gradient(Activation kind, const T* x, T* gradient, size_t n) {
  switch (kind) {
    case Activation::kNone:
      break;
    case Activation::kRelu: {
      const T* const __restrict given = x;
      T* const __restrict changed = gradient;
      for (size_t i = 0; i < n; ++i) changed[i] = given[i] > T(0) ? changed[i] : T(0);
      break;
    }
    case Activation::kTanh:
      scale_each(x, gradient, n, [](T v) {
        const T y = hyperbolic_tangent(v);
        return T(1) - y * y;
      });
      break;
    case Activation::kSilu:
      scale_each(x, gradient, n, [](T v) {
        const T power = exponential<Fused>(-magnitude(v)), share = T(1) / (T(1) + power), rest = power * share;
        const bool negative = v < T(0);  // the sigmoid and 1 - sigmoid, both to their last places
        return (negative ? rest : share) * (T(1) + v * (negative ? share : rest));
      });
      break;
    case Activation::kGelu:
      scale_each(x, gradient, n, [](T v) {
        T power;
        const T share = normal_share(v, &power);
        return share + v * (T(0.39894228040143267794) * power);
      });
      break;
  }
}
