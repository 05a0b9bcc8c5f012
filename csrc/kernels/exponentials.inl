// float32 exponentials, accurate to 2 units in the last place and equal to the last bit on every ISA and device where
// no product is fused; float64 calls the C library. Needs bits.inl.

template <typename T>
ANGLE_KERNEL_FUNCTION T magnitude(T x) {
  return x < T(0) ? -x : x;
}
ANGLE_KERNEL_FUNCTION float sign_of(float size, float x) { return copysignf(size, x); }
ANGLE_KERNEL_FUNCTION double sign_of(double size, double x) { return copysign(size, x); }

// How they add a product: rounded twice, as every ISA can, or once where the ISA can, which is faster.
struct Apart {
  ANGLE_KERNEL_FUNCTION static float sum(float a, float b, float c) { return a * b + c; }
};
struct Fused {
  ANGLE_KERNEL_FUNCTION static float sum(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return fmaf(a, b, c);
#else
    return a * b + c;
#endif
  }
};

// x = n * log 2 + r with |r| <= log(2) / 2. Returns e^r - 1 and stores n. Needs |x| < 2^20; a NaN passes through.
template <class By = Apart>
ANGLE_KERNEL_FUNCTION float reduced_expm1(float x, int32_t* n) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  const float shifted = By::sum(x, 1.44269504f, kRound);
  *n = static_cast<int32_t>(as_bits(shifted) - as_bits(kRound));
  const float count = shifted - kRound;
  float r = By::sum(count, -0.693359375f, x);  // log 2 in two parts; the first has 9 bits, so this product is exact
  r = By::sum(count, 2.12194440e-4f, r);
  // (e^r - 1 - r) / r^2, fitted to 1.5e-8 of r
  float p = 1.39475986e-3f;
  p = By::sum(p, r, 8.36724695e-3f);
  p = By::sum(p, r, 4.16662656e-2f);
  p = By::sum(p, r, 1.66665375e-1f);
  p = By::sum(p, r, 0.5f);
  return By::sum(r * r, p, r);
}

ANGLE_KERNEL_FUNCTION float power_of_two(int32_t n) {  // -126 <= n <= 127
  return as_float((static_cast<uint32_t>(n) + 127u) << 23);
}

template <class By = Apart>
ANGLE_KERNEL_FUNCTION float exponential(float x) {
  x = x > 89.0f ? 89.0f : x;
  x = x < -104.0f ? -104.0f : x;
  int32_t n;
  const float p = 1.0f + reduced_expm1<By>(x, &n);
  const int32_t half = n >> 1;  // in two steps, so that the results overflow and underflow as they should
  return p * power_of_two(half) * power_of_two(n - half);
}
template <class By = Apart>
ANGLE_KERNEL_FUNCTION double exponential(double x) {
  return exp(x);
}

// e^x - 1 for x <= 0, and e^x.
template <class By = Apart>
ANGLE_KERNEL_FUNCTION float decay(float x, float* power) {
  x = x < -60.0f ? -60.0f : x;
  int32_t n;
  const float p = reduced_expm1<By>(x, &n);
  const float scale = power_of_two(n);
  *power = By::sum(scale, p, scale);
  return By::sum(scale, p, scale - 1.0f);
}
template <class By = Apart>
ANGLE_KERNEL_FUNCTION double decay(double x, double* power) {
  *power = exp(x);
  return expm1(x);
}

// log(1 + x) for 0 <= x <= 1.
template <class By = Apart>
ANGLE_KERNEL_FUNCTION float log_one_plus(float x) {
  const bool large = x > 0.414213562f;
  const float f = large ? 0.5f * (x - 1.0f) : x;  // 1 + x = (1 + f) * (large ? 2 : 1), exactly
  // (log(1 + f) - f + f^2 / 2) / f^3, fitted to 6e-9 of f
  float p = -7.86162317e-2f;
  p = By::sum(p, f, 1.28838211e-1f);
  p = By::sum(p, f, -1.31290108e-1f);
  p = By::sum(p, f, 1.41809076e-1f);
  p = By::sum(p, f, -1.66245028e-1f);
  p = By::sum(p, f, 2.00022966e-1f);
  p = By::sum(p, f, -2.50008106e-1f);
  p = By::sum(p, f, 3.33333164e-1f);
  const float square = f * f;
  const float result = f + By::sum(square * f, p, -0.5f * square);
  return large ? result + 0.693147181f : result;
}
template <class By = Apart>
ANGLE_KERNEL_FUNCTION double log_one_plus(double x) {
  return log1p(x);
}
