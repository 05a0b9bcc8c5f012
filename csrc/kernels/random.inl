// Random numbers: Philox blocks, eight side by side, and the normals made of them. Every ISA gives the same bits.

// Eight 64-bit lanes; the compiler splits them where the ISA's vectors are shorter.
typedef uint64_t Lanes __attribute__((vector_size(64)));

// The lanes' low 32 bits times a 32-bit constant.
inline Lanes multiply_low(Lanes a, uint64_t factor) {
#if defined(__AVX512F__)
  // By a mask of all: the plain intrinsic begins with an undefined register, which gcc 12 warns of.
  return (Lanes)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, _mm512_set1_epi64(static_cast<int64_t>(factor)));
#elif defined(__AVX2__)
  const __m256i factors = _mm256_set1_epi64x(static_cast<int64_t>(factor));
  const __m256i* const halves = reinterpret_cast<const __m256i*>(&a);
  Lanes out;
  reinterpret_cast<__m256i*>(&out)[0] = _mm256_mul_epu32(halves[0], factors);
  reinterpret_cast<__m256i*>(&out)[1] = _mm256_mul_epu32(halves[1], factors);
  return out;
#else
  return (a & 0xFFFFFFFFull) * factor;
#endif
}

// The first four lanes of a and b in turn, then the last four.
inline void interleave(Lanes a, Lanes b, Lanes* out) {
#if defined(__clang__)
  out[0] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  out[1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  out[0] = __builtin_shuffle(a, b, Lanes{0, 8, 1, 9, 2, 10, 3, 11});
  out[1] = __builtin_shuffle(a, b, Lanes{4, 12, 5, 13, 6, 14, 7, 15});
#endif
}

#if defined(__AVX512F__)
constexpr size_t kSets = 2;  // of eight blocks, worked on together: they keep the multiplier busy
#else
constexpr size_t kSets = 1;  // more would not fit the registers
#endif

// Eight Philox blocks side by side, each word in a 64-bit lane: one multiplication serves eight blocks.
struct Blocks {
  Lanes c0, c1, c2, c3;
};

// The rounds of kCount times eight blocks.
template <size_t kCount>
__attribute__((always_inline)) inline void philox_rounds(uint64_t key, Blocks* blocks) {
  constexpr uint64_t kLow = 0xFFFFFFFFull;
  uint64_t k0 = key & kLow, k1 = key >> 32;
  for (int round = 0; round < 10; ++round) {
    for (size_t set = 0; set < kCount; ++set) {
      Blocks& block = blocks[set];
      const Lanes p0 = multiply_low(block.c0, 0xD2511F53ull), p1 = multiply_low(block.c2, 0xCD9E8D57ull);
      block.c0 = (p1 >> 32) ^ block.c1 ^ k0;
      block.c2 = (p0 >> 32) ^ block.c3 ^ k1;
      block.c1 = p1 & kLow;
      block.c3 = p0 & kLow;
    }
    k0 = (k0 + 0x9E3779B9u) & kLow;
    k1 = (k1 + 0xBB67AE85u) & kLow;
  }
}

void philox_draws(uint64_t key, uint64_t counter, uint64_t stream, uint64_t* out, size_t n) {
  constexpr size_t kDraws = 16 * kSets;
  constexpr uint64_t kLow = 0xFFFFFFFFull;
  const Lanes zero = {}, lane = {0, 1, 2, 3, 4, 5, 6, 7};
  for (size_t start = 0; start < n; start += kDraws) {
    Blocks blocks[kSets];
    for (size_t set = 0; set < kSets; ++set) {
      blocks[set] = {zero + (counter & kLow), zero + (counter >> 32), zero + (stream & kLow),
                     lane + ((stream >> 32) + start / 2 + 8 * set)};
    }
    philox_rounds<kSets>(key, blocks);
    Lanes bits[2 * kSets];
    for (size_t set = 0; set < kSets; ++set) {
      const Blocks& block = blocks[set];
      interleave(block.c0 | block.c1 << 32, block.c2 | block.c3 << 32, bits + 2 * set);
    }
    memcpy(out + start, bits, (n - start < kDraws ? n - start : kDraws) * sizeof(uint64_t));
  }
}

// The halves of blocks (key, first + i, stream), i < 8 * kCount.
template <size_t kCount>
inline void philox_halves(uint64_t key, uint64_t first, uint64_t stream, uint64_t* low, uint64_t* high) {
  constexpr uint64_t kLow = 0xFFFFFFFFull;
  const Lanes zero = {}, lane = {0, 1, 2, 3, 4, 5, 6, 7};
  Blocks blocks[kCount];
  for (size_t set = 0; set < kCount; ++set) {
    const Lanes counter = lane + (first + 8 * set);
    blocks[set] = {counter & kLow, counter >> 32, zero + (stream & kLow), zero + (stream >> 32)};
  }
  philox_rounds<kCount>(key, blocks);
  for (size_t set = 0; set < kCount; ++set) {
    const Blocks& block = blocks[set];
    const Lanes halves[2] = {block.c0 | block.c1 << 32, block.c2 | block.c3 << 32};
    memcpy(low + 8 * set, &halves[0], sizeof(Lanes));
    memcpy(high + 8 * set, &halves[1], sizeof(Lanes));
  }
}

// Uniform in [0, 1) with 53 bits, as core/philox.h has it. Every ISA converts words of 32 bits in vectors, not all 64.
inline double unit_share(uint64_t bits) {
  constexpr uint64_t kMagic = 0x4330000000000000ull;  // 2^52
  const uint64_t whole = bits >> 11;
  const double low = __builtin_bit_cast(double, (whole & 0xFFFFFFFFull) | kMagic) - 0x1p52;
  const double high = __builtin_bit_cast(double, (whole >> 32) | kMagic) - 0x1p52;
  return high * 0x1p-21 + low * 0x1p-53;  // exactly
}

// log u for 2^-53 <= u <= 1, to 1 unit in the last place: with u = 2^e (1 + f), s = f / (2 + f) and
// log(1 + f) = 2 atanh(s) = f - s (f - r), where r = 2 s^2 / 3 + 2 s^4 / 5 + ...
inline double log_of_share(double u) {
  constexpr uint64_t kRootHalf = 0x3FE6A09E667F3BCDull, kOne = 1023ull << 52, kMagic = 0x4330000000000000ull;
  const uint64_t bits = __builtin_bit_cast(uint64_t, u), biased = (bits - kRootHalf + kOne) >> 52;
  const double e = __builtin_bit_cast(double, biased | kMagic) - (0x1p52 + 1023.0);
  const double f = __builtin_bit_cast(double, bits - (biased << 52) + kOne) - 1.0;
  const double s = f / (2.0 + f), q = s * s;
  // r / s^2, fitted to 3e-18 of s
  double r = 0x1.2f056065fd827p-3;
  r = r * q + 0x1.39a1bb0c7d69fp-3;
  r = r * q + 0x1.74663ee4ddd55p-3;
  r = r * q + 0x1.c71c5209700dep-3;
  r = r * q + 0x1.24924941f10afp-2;
  r = r * q + 0x1.999999997fdbap-2;
  r = r * q + 0x1.5555555555592p-1;
  r = r * q;
  return e * 0x1.62e42fee00000p-1 + (f - (s * (f - r) - e * 0x1.a39ef35793c76p-33));
}

// sin and cos of 2 pi v for 0 <= v < 1: v is a quarter's multiple and the rest within 1/8, exactly.
inline void sine_and_cosine(double v, double* sine, double* cosine) {
  constexpr double kRound = 0x1.8p52;  // adding it rounds to an integer, left in the low bits
  const double shifted = v * 4.0 + kRound;
  const uint64_t quarter = __builtin_bit_cast(uint64_t, shifted);
  const double x = v - (shifted - kRound) * 0.25, z = x * x;
  // (sin(2 pi x) / x - 2 pi) / x^2 and (cos(2 pi x) - 1) / x^2, fitted to 4e-18 of the results
  double sin_x = 0x1.e403d07fff2bcp+1;
  sin_x = sin_x * z + -0x1.e300a65a0aedbp+3;
  sin_x = sin_x * z + 0x1.5078301b6209dp+5;
  sin_x = sin_x * z + -0x1.32d2cce3332d5p+6;
  sin_x = sin_x * z + 0x1.466bc67758d85p+6;
  sin_x = sin_x * z + -0x1.4abbce625be47p+5;
  double cos_x = -0x1.b26fe9393b386p+0;
  cos_x = cos_x * z + 0x1.f9cc6ad2c4200p+2;
  cos_x = cos_x * z + -0x1.a6d1ecb7441c5p+4;
  cos_x = cos_x * z + 0x1.e1f50683b431ep+5;
  cos_x = cos_x * z + -0x1.55d3c7e3c95bcp+6;
  cos_x = cos_x * z + 0x1.03c1f081b5ab0p+6;
  cos_x = cos_x * z + -0x1.3bd3cc9be45dep+4;
  sin_x = 0x1.921fb54442d18p+2 * x + (x * z * sin_x + 0x1.1a62633145c07p-52 * x);
  cos_x = 1.0 + z * cos_x;
  const uint64_t swap = 0 - (quarter & 1), keep = ~swap;
  const uint64_t s = __builtin_bit_cast(uint64_t, sin_x), c = __builtin_bit_cast(uint64_t, cos_x);
  *sine = __builtin_bit_cast(double, ((s & keep) | (c & swap)) ^ ((quarter & 2) << 62));
  *cosine = __builtin_bit_cast(double, ((c & keep) | (s & swap)) ^ (((quarter + 1) & 2) << 62));
}

template <typename Real>
void normals(uint64_t key, uint64_t stream, Real* out, size_t n) {
  constexpr size_t kPairs = 64;
  for (size_t start = 0; start < n; start += 2 * kPairs) {
    alignas(64) uint64_t low[kPairs], high[kPairs];
    alignas(64) Real both[2 * kPairs];
    const size_t left = n - start < 2 * kPairs ? n - start : 2 * kPairs;
    const size_t pairs = (left + 15) / 16 * 8;  // whole sets of blocks
    size_t i = 0;
    for (; i + 8 * kSets <= pairs; i += 8 * kSets) philox_halves<kSets>(key, start / 2 + i, stream, low + i, high + i);
    for (; i < pairs; i += 8) philox_halves<1>(key, start / 2 + i, stream, low + i, high + i);
    for (i = 0; i < pairs; ++i) {
      const double radius = __builtin_sqrt(-2.0 * log_of_share(1.0 - unit_share(low[i])));
      double sine, cosine;
      sine_and_cosine(unit_share(high[i]), &sine, &cosine);
      both[2 * i] = static_cast<Real>(radius * cosine);
      both[2 * i + 1] = static_cast<Real>(radius * sine);
    }
    memcpy(out + start, both, left * sizeof(Real));
  }
}

constexpr RandomKernels random_kernels = {.normals_f32 = normals<float>, .normals_f64 = normals<double>};
