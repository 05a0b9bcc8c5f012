// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
// The same key and counter give the same bits on every machine and device; there is no state to share or to lock.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"

namespace angle {

struct PhiloxBlock {
  uint32_t word[4];
  constexpr uint64_t low() const { return word[0] | static_cast<uint64_t>(word[1]) << 32; }
  constexpr uint64_t high() const { return word[2] | static_cast<uint64_t>(word[3]) << 32; }
};

// 128 random bits for (key, counter, stream). `stream` separates purposes that share a key. O(1). Any thread.
constexpr PhiloxBlock philox(uint64_t key, uint64_t counter, uint64_t stream) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = static_cast<uint32_t>(stream), c3 = static_cast<uint32_t>(stream >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Purposes that share a key.
enum PhiloxStream : uint64_t { kSplit = 1, kUniform = 2, kNormal = 3, kSample = 4 };

// The index-th child of a random key. O(1). Any thread.
inline uint64_t philox_split(uint64_t key, uint64_t index) { return philox(key, index, kSplit).low(); }

// Uniform in [0, 1) with 53 bits.
inline double unit_double(uint64_t bits) { return static_cast<double>(bits >> 11) * 0x1p-53; }

// out[0..n): uniform in [0, 1); element i depends on (key, i) alone. Cost n. Any thread.
inline void philox_uniform(uint64_t key, double* out, size_t n) {
  for (size_t i = 0; i < n; i += 2) {
    const PhiloxBlock block = philox(key, i / 2, kUniform);
    out[i] = unit_double(block.low());
    if (i + 1 < n) out[i + 1] = unit_double(block.high());
  }
}

// out[0..n): standard normals by Box and Muller (1958), a vector kernel that gives the same bits on every machine;
// element i depends on (key, i) alone, and the float32 numbers are the float64 ones rounded. Cost n. Any thread.
inline void philox_normal(uint64_t key, float* out, size_t n) { kernels().random.normals_f32(key, kNormal, out, n); }
inline void philox_normal(uint64_t key, double* out, size_t n) { kernels().random.normals_f64(key, kNormal, out, n); }

}  // namespace angle
