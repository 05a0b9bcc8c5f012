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
      double first, second;
      normal_pair(low[i], high[i], &first, &second);
      both[2 * i] = static_cast<Real>(first);
      both[2 * i + 1] = static_cast<Real>(second);
    }
    memcpy(out + start, both, left * sizeof(Real));
  }
}

constexpr RandomKernels random_kernels = {.normals_f32 = normals<float>, .normals_f64 = normals<double>};
