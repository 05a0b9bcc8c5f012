// One vector register of floats or doubles, as wide as this unit's ISA has them. multiply_add rounds once where the
// ISA can; on the baseline it rounds twice.

template <typename T>
struct Vector;

#if defined(__AVX512F__)

template <>
struct Vector<float> {
  using Type = __m512;
  static constexpr size_t kWidth = 16;
  static Type zero() { return _mm512_setzero_ps(); }
  static Type load(const float* from) { return _mm512_loadu_ps(from); }
  static Type all(const float* from) { return _mm512_set1_ps(*from); }
  static void store(float* to, Type x) { _mm512_storeu_ps(to, x); }
  static Type load_some(const float* from, size_t n) { return _mm512_maskz_loadu_ps(mask(n), from); }
  static void store_some(float* to, Type x, size_t n) { _mm512_mask_storeu_ps(to, mask(n), x); }
  static Type add(Type x, Type y) { return _mm512_add_ps(x, y); }
  static Type multiply_add(Type x, Type y, Type sum) { return _mm512_fmadd_ps(x, y, sum); }
  static Type relu(Type x) { return _mm512_max_ps(zero(), x); }  // a NaN stays: the second operand wins
  static Type gated(Type x, Type gate) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(gate, zero(), _CMP_GT_OQ), x); }
  static Type low_pairs(Type x, Type y) {
    return _mm512_permutex2var_ps(x, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23), y);
  }
  static Type high_pairs(Type x, Type y) {
    return _mm512_permutex2var_ps(x, _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31),
                                  y);
  }

 private:
  static __mmask16 mask(size_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
};

template <>
struct Vector<double> {
  using Type = __m512d;
  static constexpr size_t kWidth = 8;
  static Type zero() { return _mm512_setzero_pd(); }
  static Type load(const double* from) { return _mm512_loadu_pd(from); }
  static Type all(const double* from) { return _mm512_set1_pd(*from); }
  static void store(double* to, Type x) { _mm512_storeu_pd(to, x); }
  static Type load_some(const double* from, size_t n) { return _mm512_maskz_loadu_pd(mask(n), from); }
  static void store_some(double* to, Type x, size_t n) { _mm512_mask_storeu_pd(to, mask(n), x); }
  static Type add(Type x, Type y) { return _mm512_add_pd(x, y); }
  static Type multiply_add(Type x, Type y, Type sum) { return _mm512_fmadd_pd(x, y, sum); }
  static Type relu(Type x) { return _mm512_max_pd(zero(), x); }
  static Type gated(Type x, Type gate) { return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(gate, zero(), _CMP_GT_OQ), x); }
  static Type low_pairs(Type x, Type y) {
    return _mm512_permutex2var_pd(x, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), y);
  }
  static Type high_pairs(Type x, Type y) {
    return _mm512_permutex2var_pd(x, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), y);
  }

 private:
  static __mmask8 mask(size_t n) { return static_cast<__mmask8>((1u << n) - 1u); }
};

#elif defined(__AVX2__)

template <>
struct Vector<float> {
  using Type = __m256;
  static constexpr size_t kWidth = 8;
  static Type zero() { return _mm256_setzero_ps(); }
  static Type load(const float* from) { return _mm256_loadu_ps(from); }
  static Type all(const float* from) { return _mm256_broadcast_ss(from); }
  static void store(float* to, Type x) { _mm256_storeu_ps(to, x); }
  static Type load_some(const float* from, size_t n) { return _mm256_maskload_ps(from, mask(n)); }
  static void store_some(float* to, Type x, size_t n) { _mm256_maskstore_ps(to, mask(n), x); }
  static Type add(Type x, Type y) { return _mm256_add_ps(x, y); }
  static Type multiply_add(Type x, Type y, Type sum) { return _mm256_fmadd_ps(x, y, sum); }
  static Type relu(Type x) { return _mm256_max_ps(zero(), x); }  // a NaN stays: the second operand wins
  static Type gated(Type x, Type gate) { return _mm256_and_ps(_mm256_cmp_ps(gate, zero(), _CMP_GT_OQ), x); }
  static Type low_pairs(Type x, Type y) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y), 0x20);
  }
  static Type high_pairs(Type x, Type y) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y), 0x31);
  }

 private:
  static __m256i mask(size_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};

template <>
struct Vector<double> {
  using Type = __m256d;
  static constexpr size_t kWidth = 4;
  static Type zero() { return _mm256_setzero_pd(); }
  static Type load(const double* from) { return _mm256_loadu_pd(from); }
  static Type all(const double* from) { return _mm256_broadcast_sd(from); }
  static void store(double* to, Type x) { _mm256_storeu_pd(to, x); }
  static Type load_some(const double* from, size_t n) { return _mm256_maskload_pd(from, mask(n)); }
  static void store_some(double* to, Type x, size_t n) { _mm256_maskstore_pd(to, mask(n), x); }
  static Type add(Type x, Type y) { return _mm256_add_pd(x, y); }
  static Type multiply_add(Type x, Type y, Type sum) { return _mm256_fmadd_pd(x, y, sum); }
  static Type relu(Type x) { return _mm256_max_pd(zero(), x); }
  static Type gated(Type x, Type gate) { return _mm256_and_pd(_mm256_cmp_pd(gate, zero(), _CMP_GT_OQ), x); }
  static Type low_pairs(Type x, Type y) {
    return _mm256_permute2f128_pd(_mm256_unpacklo_pd(x, y), _mm256_unpackhi_pd(x, y), 0x20);
  }
  static Type high_pairs(Type x, Type y) {
    return _mm256_permute2f128_pd(_mm256_unpacklo_pd(x, y), _mm256_unpackhi_pd(x, y), 0x31);
  }

 private:
  static __m256i mask(size_t n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(static_cast<long long>(n)), _mm256_setr_epi64x(0, 1, 2, 3));
  }
};

#else

template <typename T, typename Lanes_, typename Mask, size_t kLanesOf>
struct SixteenBytes {
  using Type = Lanes_;
  static constexpr size_t kWidth = kLanesOf;
  static Type zero() { return Type{}; }
  static Type load(const T* from) {
    Type x;
    memcpy(&x, from, sizeof x);
    return x;
  }
  static Type all(const T* from) { return *from - Type{}; }
  static void store(T* to, Type x) { memcpy(to, &x, sizeof x); }
  static Type load_some(const T* from, size_t n) {
    Type x = {};
    for (size_t i = 0; i < n; ++i) x[i] = from[i];
    return x;
  }
  static void store_some(T* to, Type x, size_t n) {
    for (size_t i = 0; i < n; ++i) to[i] = x[i];
  }
  static Type add(Type x, Type y) { return x + y; }
  static Type multiply_add(Type x, Type y, Type sum) { return sum + x * y; }
  static Type relu(Type x) { return (Type)((Mask)x & ~(Mask)(x < Type{})); }
  static Type gated(Type x, Type gate) { return (Type)((Mask)x & (Mask)(gate > Type{})); }
};

typedef float Floats __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(16)));
typedef int32_t FloatMask __attribute__((vector_size(16)));
typedef int64_t DoubleMask __attribute__((vector_size(16)));

template <>
struct Vector<float> : SixteenBytes<float, Floats, FloatMask, 4> {
#if defined(__clang__)
  static Type low_pairs(Type x, Type y) { return __builtin_shufflevector(x, y, 0, 4, 1, 5); }
  static Type high_pairs(Type x, Type y) { return __builtin_shufflevector(x, y, 2, 6, 3, 7); }
#else
  static Type low_pairs(Type x, Type y) { return __builtin_shuffle(x, y, FloatMask{0, 4, 1, 5}); }
  static Type high_pairs(Type x, Type y) { return __builtin_shuffle(x, y, FloatMask{2, 6, 3, 7}); }
#endif
};

template <>
struct Vector<double> : SixteenBytes<double, Doubles, DoubleMask, 2> {
#if defined(__clang__)
  static Type low_pairs(Type x, Type y) { return __builtin_shufflevector(x, y, 0, 2); }
  static Type high_pairs(Type x, Type y) { return __builtin_shufflevector(x, y, 1, 3); }
#else
  static Type low_pairs(Type x, Type y) { return __builtin_shuffle(x, y, DoubleMask{0, 2}); }
  static Type high_pairs(Type x, Type y) { return __builtin_shuffle(x, y, DoubleMask{1, 3}); }
#endif
};

#endif
