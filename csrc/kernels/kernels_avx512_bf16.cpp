// Products of bfloat16 factors with float32 sums, for CPUs that have AVX512_BF16 besides what the avx512 unit needs.
// Factors are rounded to pairs of successive steps, a block of a and a panel of b at a time, on the stack; the tiles
// are those of products.inl. Only C headers and intrinsics in here, as in kernels.inl.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels/kernels.h"

namespace angle::avx512_bf16 {
namespace {
#include "kernels/vector.inl"

// Two factors of successive steps, the first in the low half.
struct Pair {
  uint32_t both;
};

template <>
struct Vector<Pair> {
  using Type = __m512i;
  static Type all(const Pair* from) { return _mm512_set1_epi32(static_cast<int>(from->both)); }
  static Type load(const Pair* from) { return _mm512_loadu_si512(from); }
  static __m512 multiply_add(Type x, Type y, __m512 sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
  }
};

#include "kernels/products.inl"

constexpr size_t kWidth = 16;
constexpr size_t kPairs = kDepth / 2;
constexpr size_t kBlockRows = 128;            // rows of a in the buffer: 64 KB and a little
constexpr size_t kPairRow = kPairs + kWidth;  // an odd number of cache lines

// out[j] = (low[j], high[j]) for the first n of 16 columns, zeros beyond.
inline __m512i interleaved(__m512 low, __m512 high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}

// Steps in rows: out[l / 2][j] = (in[l][j], in[l + 1][j]), j < columns, the last step alone where their number is odd.
inline void pair_rows(const float* in, size_t in_row, size_t steps, size_t columns, Pair* out, size_t out_row) {
  using V = Vector<float>;
  for (size_t l = 0; l < steps; l += 2, in += 2 * in_row, out += out_row) {
    for (size_t j = 0; j < columns; j += kWidth) {
      const size_t rest = columns - j < kWidth ? columns - j : kWidth;
      const __m512 low = V::load_some(in + j, rest);
      const __m512 high = l + 1 < steps ? V::load_some(in + in_row + j, rest) : V::zero();
      _mm512_storeu_si512(out + j, interleaved(low, high));
    }
  }
}

// 32 steps of a row: (in[0], in[1]), (in[2], in[3]), …, zeros beyond the last.
inline __m512i paired(const float* in, size_t steps) {
  using V = Vector<float>;
  const __m512 low = V::load_some(in, steps < kWidth ? steps : kWidth);
  const __m512 high =
      steps > kWidth ? V::load_some(in + kWidth, steps < 2 * kWidth ? steps - kWidth : kWidth) : V::zero();
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// Steps in columns, as they lie: out[i][l / 2] = (in[i][l], in[i][l + 1]).
inline void pair_columns(const float* in, size_t in_row, size_t steps, size_t rows, Pair* out) {
  for (size_t i = 0; i < rows; ++i, in += in_row, out += kPairRow) {
    for (size_t l = 0; l < steps; l += 2 * kWidth) _mm512_storeu_si512(out + l / 2, paired(in + l, steps - l));
  }
}

// The same turned: out[l / 2][i] = (in[i][l], in[i][l + 1]), zeros from row `rows` to the next multiple of 16.
inline void pair_turned(const float* in, size_t in_row, size_t steps, size_t rows, Pair* out, size_t out_row) {
  alignas(64) float block[kWidth * kWidth];  // pairs, moved about as if they were floats
  for (size_t i = 0; i < rows; i += kWidth) {
    const size_t some = rows - i < kWidth ? rows - i : kWidth;
    for (size_t l = 0; l < steps; l += 2 * kWidth) {
      for (size_t r = 0; r < some; ++r)
        _mm512_store_si512(block + r * kWidth, paired(in + (i + r) * in_row + l, steps - l));
      transpose_block<float>(block, kWidth, some, reinterpret_cast<float*>(out + l / 2 * out_row + i), out_row);
    }
  }
}

}  // namespace

void product(const Product<float>& p) {
  constexpr size_t kMostVectors = 3, kFew = 8;
  if (p.m < kFew || p.k < kFew) {  // rounding would cost more than it saves
    avx512::table.learner.f32.product(p);
    return;
  }
  if (p.n == 0) return;
  alignas(64) Pair a[kBlockRows * kPairRow], b[kPairs * kMostVectors * kWidth];
  const size_t depth = depth_of(p.k), rows_at_once = even_part(p.m, kBlockRows);
  for (size_t begin = 0; begin < p.m; begin += rows_at_once) {
    const size_t end = p.m - begin < rows_at_once ? p.m : begin + rows_at_once, rows = end - begin;
    for (size_t first = 0;;) {
      const size_t steps = p.k - first < depth ? p.k - first : depth;
      const float* const from = p.a + begin * p.a_row + first * p.a_step;
      const bool by_rows = p.a_step == 1;
      if (by_rows) {
        pair_columns(from, p.a_row, steps, rows, a);
      } else {
        pair_rows(from, p.a_step, steps, rows, a, kPairRow);
      }
      const Piece<Pair> piece = {
          a,          by_rows ? kPairRow : 1, by_rows ? 1 : kPairRow, (steps + 1) / 2, begin, end,
          first == 0, first + steps == p.k};
      panels<Pair, float, kTileRows, kTileVectors>(p, piece, [&](size_t j, size_t vectors) {
        const size_t row = vectors * kWidth, columns = p.n - j < row ? p.n - j : row;
        if (p.b_turned) {
          pair_turned(p.b + j * p.b_row + first, p.b_row, steps, columns, b, row);
        } else {
          pair_rows(p.b + first * p.b_row + j, p.b_row, steps, columns, b, row);
        }
        return Panel<Pair>{b, row, j};
      });
      first += steps;
      if (piece.last) break;
    }
  }
}

}  // namespace angle::avx512_bf16
