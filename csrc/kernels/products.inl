// Matrix products and transposes (docs/decisions/0010-matrix-products.md).
//
// A tile of c, some rows by some vectors, is summed up in registers while one row of b and one column of a after the
// other goes by. Neither matrix is copied: with rows of b at an odd number of cache lines, a panel of b as wide as a
// tile lies in the L1 cache while all rows of a pass by. Long sums are cut into pieces of equal length, added up in c.
// Which pieces depends on k alone, so an element of c is the same however c is divided into calls.

#if defined(__AVX512F__)
constexpr size_t kTileRows = 12, kTileVectors = 2;
#elif defined(__AVX2__)
constexpr size_t kTileRows = 6, kTileVectors = 2;
#else
constexpr size_t kTileRows = 2, kTileVectors = 4;
#endif
constexpr size_t kRowVectors = 8;    // of a tile of one row
constexpr size_t kDepth = 256;       // most steps of one piece
constexpr size_t kRowsAtOnce = 504;  // rows of a that pass by each panel of b

struct Piece {
  size_t first, steps;
  bool last;
};

// Tiles one below the other, the first at c[i, j]; only the last vector may reach beyond p.n. The strips are looped
// over in here, which saves short sums the calls.
template <typename T, size_t kRows, size_t kVectors>
__attribute__((noinline)) void tiles(const Product<T>& p, const Piece& piece, size_t i, size_t j, size_t strips) {
  using V = Vector<T>;
  constexpr size_t kWidth = V::kWidth, kGroups = (kRows + 2) / 3;  // rows 0, 1, 2 of a group: scaled addresses
  for (; strips != 0; --strips, i += kRows) {
    typename V::Type sums[kRows][kVectors];
    if (p.bias != nullptr && piece.first == 0) {
#pragma GCC unroll 16
      for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (size_t v = 0; v < kVectors; ++v) sums[r][v] = V::all(p.bias + i + r);
      }
    } else {
#pragma GCC unroll 16
      for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (size_t v = 0; v < kVectors; ++v) sums[r][v] = V::zero();
      }
    }

    const size_t a_row = p.a_row, a_step = p.a_step, b_row = p.b_row;
    const T* a[kGroups];
#pragma GCC unroll 16
    for (size_t g = 0; g < kGroups; ++g) a[g] = p.a + (i + 3 * g) * a_row + piece.first * a_step;
    const T* b = p.b + piece.first * b_row + j;
#pragma GCC unroll 2
    for (size_t step = piece.steps; step != 0; --step) {
      typename V::Type row[kVectors];
#pragma GCC unroll 8
      for (size_t v = 0; v < kVectors; ++v) row[v] = V::load(b + v * kWidth);
#pragma GCC unroll 16
      for (size_t r = 0; r < kRows; ++r) {
        const typename V::Type factor = V::all(a[r / 3] + r % 3 * a_row);
#pragma GCC unroll 8
        for (size_t v = 0; v < kVectors; ++v) sums[r][v] = V::multiply_add(factor, row[v], sums[r][v]);
      }
#pragma GCC unroll 16
      for (size_t g = 0; g < kGroups; ++g) a[g] += a_step;
      b += b_row;
    }

    T* const c = p.c + i * p.c_row + j;
    const size_t c_row = p.c_row, rest = p.n - j - (kVectors - 1) * kWidth;  // columns of the last vector
    const bool whole = rest >= kWidth;
    if (piece.first != 0) {
#pragma GCC unroll 16
      for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (size_t v = 0; v < kVectors; ++v) {
          const T* const from = c + r * c_row + v * kWidth;
          sums[r][v] = V::add(sums[r][v], whole || v + 1 < kVectors ? V::load(from) : V::load_some(from, rest));
        }
      }
    }
    if (piece.last && p.relu) {
#pragma GCC unroll 16
      for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (size_t v = 0; v < kVectors; ++v) sums[r][v] = V::relu(sums[r][v]);
      }
    }
    if (piece.last && p.gate != nullptr) {
      const T* const gate = p.gate + i * p.gate_row + j;
      const size_t gate_row = p.gate_row;
#pragma GCC unroll 16
      for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (size_t v = 0; v < kVectors; ++v) {
          sums[r][v] = V::gated(sums[r][v], V::load(gate + r * gate_row + v * kWidth));
        }
      }
    }
#pragma GCC unroll 16
    for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (size_t v = 0; v < kVectors; ++v) {
        T* const to = c + r * c_row + v * kWidth;
        if (whole || v + 1 < kVectors) {
          V::store(to, sums[r][v]);
        } else {
          V::store_some(to, sums[r][v], rest);
        }
      }
    }
  }
}

// The same with a number of rows known at run time, at most kRows.
template <typename T, size_t kRows, size_t kVectors>
inline void tiles_of(size_t rows, const Product<T>& p, const Piece& piece, size_t i, size_t j, size_t strips) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      tiles_of<T, kRows - 1, kVectors>(rows, p, piece, i, j, strips);
      return;
    }
  }
  tiles<T, kRows, kVectors>(p, piece, i, j, strips);
}

// Rows [begin, end) of c in strips of nearly equal height.
template <typename T, size_t kRows, size_t kVectors>
inline void panel(const Product<T>& p, const Piece& piece, size_t begin, size_t end, size_t j) {
  const size_t strips = (end - begin + kRows - 1) / kRows, height = (end - begin) / strips;
  const size_t higher = (end - begin) % strips;
  if (higher != 0) tiles_of<T, kRows, kVectors>(height + 1, p, piece, begin, j, higher);
  tiles_of<T, kRows, kVectors>(height, p, piece, begin + higher * (height + 1), j, strips - higher);
}

// The rows over all columns: panels of kVectors vectors, then smaller ones.
template <typename T, size_t kRows, size_t kVectors>
inline void panels(const Product<T>& p, const Piece& piece, size_t begin, size_t end) {
  constexpr size_t kWidth = Vector<T>::kWidth, kLower = kRows < 3 ? kRows : kRows * 2 / 3;
  size_t j = 0, left = (p.n + kWidth - 1) / kWidth;  // vectors
  const auto go = [&](size_t vectors) {
    j += vectors * kWidth;
    left -= vectors;
  };
  for (; left >= kVectors && left != 3; go(kVectors)) panel<T, kRows, kVectors>(p, piece, begin, end, j);
  for (; left >= 2 && left != 3; go(2)) panel<T, kRows, 2>(p, piece, begin, end, j);
  if (left == 3) {
    panel<T, kLower, 3>(p, piece, begin, end, j);
  } else if (left == 1) {
    panel<T, kRows, 1>(p, piece, begin, end, j);
  }
}

template <typename T>
void product(const Product<T>& p) {
  if (p.m == 0 || p.n == 0) return;
  const size_t pieces = p.k <= kDepth ? 1 : (p.k + kDepth - 1) / kDepth, depth = (p.k + pieces - 1) / pieces;
  for (size_t begin = 0; begin < p.m; begin += kRowsAtOnce) {
    const size_t end = p.m - begin < kRowsAtOnce ? p.m : begin + kRowsAtOnce;
    for (size_t first = 0;;) {
      const size_t steps = p.k - first < depth ? p.k - first : depth;
      const Piece piece = {first, steps, first + steps == p.k};
      if (end - begin == 1) {  // few rows want wide tiles: there have to be enough sums to hide a multiply-add's time
        panels<T, 1, kRowVectors>(p, piece, begin, end);
      } else if (end - begin == 2) {
        panels<T, 2, 4>(p, piece, begin, end);
      } else {
        panels<T, kTileRows, kTileVectors>(p, piece, begin, end);
      }
      first += steps;
      if (piece.last) break;
    }
  }
}

// Square blocks of a vector's width: rows half a block apart are interleaved, as often as it takes to halve the width
// down to 1.
template <typename T>
inline void transpose_block(const T* in, size_t in_row, T* out, size_t out_row) {
  using V = Vector<T>;
  constexpr size_t kWidth = V::kWidth;
  typename V::Type rows[kWidth], next[kWidth];
#pragma GCC unroll 16
  for (size_t i = 0; i < kWidth; ++i) rows[i] = V::load(in + i * in_row);
#pragma GCC unroll 4
  for (size_t width = kWidth; width > 1; width /= 2) {
#pragma GCC unroll 8
    for (size_t i = 0; i < kWidth / 2; ++i) {
      next[2 * i] = V::low_pairs(rows[i], rows[i + kWidth / 2]);
      next[2 * i + 1] = V::high_pairs(rows[i], rows[i + kWidth / 2]);
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < kWidth; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (size_t i = 0; i < kWidth; ++i) V::store(out + i * out_row, rows[i]);
}

template <typename T>
void transpose(const T* in, size_t in_row, T* out, size_t out_row, size_t rows, size_t columns) {
  constexpr size_t kWidth = Vector<T>::kWidth;
  const size_t whole_rows = rows / kWidth * kWidth, whole_columns = columns / kWidth * kWidth;
  for (size_t j = 0; j < whole_columns; j += kWidth) {
    for (size_t i = 0; i < whole_rows; i += kWidth) {
      transpose_block<T>(in + i * in_row + j, in_row, out + j * out_row + i, out_row);
    }
  }
  for (size_t j = 0; j < columns; ++j) {
    for (size_t i = j < whole_columns ? whole_rows : 0; i < rows; ++i) out[j * out_row + i] = in[i * in_row + j];
  }
}
