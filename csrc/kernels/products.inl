// Matrix products and transposes (docs/decisions/0010-matrix-products.md).
//
// A tile of c, some rows by some vectors, is summed up in registers while one row of b and one column of a after the
// other goes by. Nothing is copied, for the caches keep up: a panel of b as wide as a tile is read again by all rows of
// a. Only a turned b is, panel by panel. Long sums are cut into pieces, added up in c. Which pieces depends on k alone,
// so an element of c is the same however c is divided into calls.

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

// The size of parts, at most `most`, into which a total divides most evenly.
inline size_t even_part(size_t total, size_t most) {
  const size_t parts = total <= most ? 1 : (total + most - 1) / most;
  return (total + parts - 1) / parts;
}

// Steps of all pieces but the last: whole cache lines.
inline size_t depth_of(size_t k) {
  return (even_part(k, kDepth) + kColumnMultiple - 1) / kColumnMultiple * kColumnMultiple;
}

// Some rows of c, to be added up over some steps. Factors are numbers, or what Vector<Factor> makes of them.
template <typename Factor>
struct Piece {
  const Factor* a;  // of the first row and step
  size_t a_row, a_step;
  size_t steps;
  size_t begin, end;  // rows of c
  bool first, last;   // of the sum
};

// A panel of b from the piece's first step on, and its first column of c.
template <typename Factor>
struct Panel {
  const Factor* b;
  size_t b_row;
  size_t j;
};

// Tiles one below the other from row i of c on; only the last vector may reach beyond p.n. The strips are looped over
// in here, which saves short sums the calls.
template <typename Factor, typename T, size_t kRows, size_t kVectors>
__attribute__((noinline)) void tiles(const Product<T>& p, const Piece<Factor>& piece, const Panel<Factor>& panel,
                                     size_t i, size_t strips) {
  using V = Vector<T>;
  using F = Vector<Factor>;
  constexpr size_t kWidth = V::kWidth, kGroups = (kRows + 2) / 3;  // rows 0, 1, 2 of a group: scaled addresses
  for (; strips != 0; --strips, i += kRows) {
    typename V::Type sums[kRows][kVectors];
    if (p.bias != nullptr && piece.first) {
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

    const size_t a_row = piece.a_row, a_step = piece.a_step, b_row = panel.b_row;
    const Factor* a[kGroups];
#pragma GCC unroll 16
    for (size_t g = 0; g < kGroups; ++g) a[g] = piece.a + (i - piece.begin + 3 * g) * a_row;
    const Factor* b = panel.b;
#pragma GCC unroll 2
    for (size_t step = piece.steps; step != 0; --step) {
      typename F::Type row[kVectors];
#pragma GCC unroll 8
      for (size_t v = 0; v < kVectors; ++v) row[v] = F::load(b + v * kWidth);
#pragma GCC unroll 16
      for (size_t r = 0; r < kRows; ++r) {
        const typename F::Type factor = F::all(a[r / 3] + r % 3 * a_row);
#pragma GCC unroll 8
        for (size_t v = 0; v < kVectors; ++v) sums[r][v] = F::multiply_add(factor, row[v], sums[r][v]);
      }
#pragma GCC unroll 16
      for (size_t g = 0; g < kGroups; ++g) a[g] += a_step;
      b += b_row;
    }

    T* const c = p.c + i * p.c_row + panel.j;
    const size_t c_row = p.c_row, rest = p.n - panel.j - (kVectors - 1) * kWidth;  // columns of the last vector
    const bool whole = rest >= kWidth;
    if (!piece.first) {
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
      const T* const gate = p.gate + i * p.gate_row + panel.j;
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
template <typename Factor, typename T, size_t kRows, size_t kVectors>
inline void tiles_of(size_t rows, const Product<T>& p, const Piece<Factor>& piece, const Panel<Factor>& panel, size_t i,
                     size_t strips) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      tiles_of<Factor, T, kRows - 1, kVectors>(rows, p, piece, panel, i, strips);
      return;
    }
  }
  tiles<Factor, T, kRows, kVectors>(p, piece, panel, i, strips);
}

// The piece's rows in strips of nearly equal height.
template <typename Factor, typename T, size_t kRows, size_t kVectors>
inline void strips_of(const Product<T>& p, const Piece<Factor>& piece, const Panel<Factor>& panel) {
  const size_t rows = piece.end - piece.begin, strips = (rows + kRows - 1) / kRows;
  const size_t height = rows / strips, higher = rows % strips, i = piece.begin;
  if (higher != 0) tiles_of<Factor, T, kRows, kVectors>(height + 1, p, piece, panel, i, higher);
  tiles_of<Factor, T, kRows, kVectors>(height, p, piece, panel, i + higher * (height + 1), strips - higher);
}

// The piece's rows over all columns: panels of kVectors vectors, then narrower ones. panel_at(j, vectors) says where
// they lie.
template <typename Factor, typename T, size_t kRows, size_t kVectors, typename PanelAt>
inline void panels(const Product<T>& p, const Piece<Factor>& piece, const PanelAt& panel_at) {
  constexpr size_t kWidth = Vector<T>::kWidth, kLower = kRows < 3 ? kRows : kRows * 2 / 3;
  size_t j = 0, left = (p.n + kWidth - 1) / kWidth;  // vectors
  const auto next = [&](size_t vectors) {
    const Panel<Factor> panel = panel_at(j, vectors);
    j += vectors * kWidth;
    left -= vectors;
    return panel;
  };
  while (left >= kVectors && left != 3) strips_of<Factor, T, kRows, kVectors>(p, piece, next(kVectors));
  while (left >= 2 && left != 3) strips_of<Factor, T, kRows, 2>(p, piece, next(2));
  if (left == 3) {
    strips_of<Factor, T, kLower, 3>(p, piece, next(3));
  } else if (left == 1) {
    strips_of<Factor, T, kRows, 1>(p, piece, next(1));
  }
}

// Square blocks of a vector's width, of whose rows there are `rows`, the others zeros: rows half a block apart are
// interleaved, as often as it takes to halve the width down to 1.
template <typename T>
inline void transpose_block(const T* in, size_t in_row, size_t rows, T* out, size_t out_row) {
  using V = Vector<T>;
  constexpr size_t kWidth = V::kWidth;
  typename V::Type now[kWidth], next[kWidth];
  if (rows >= kWidth) {
#pragma GCC unroll 16
    for (size_t i = 0; i < kWidth; ++i) now[i] = V::load(in + i * in_row);
  } else {
#pragma GCC unroll 16
    for (size_t i = 0; i < kWidth; ++i) now[i] = i < rows ? V::load(in + i * in_row) : V::zero();
  }
#pragma GCC unroll 4
  for (size_t width = kWidth; width > 1; width /= 2) {
#pragma GCC unroll 8
    for (size_t i = 0; i < kWidth / 2; ++i) {
      next[2 * i] = V::low_pairs(now[i], now[i + kWidth / 2]);
      next[2 * i + 1] = V::high_pairs(now[i], now[i + kWidth / 2]);
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < kWidth; ++i) now[i] = next[i];
  }
#pragma GCC unroll 16
  for (size_t i = 0; i < kWidth; ++i) V::store(out + i * out_row, now[i]);
}

// One row of c from a dense row of a and a turned b: vectors of steps are summed up for as many columns as a vector has
// lanes, then a transpose adds up the lanes of each sum.
template <typename T>
inline void dots(const Product<T>& p) {
  using V = Vector<T>;
  constexpr size_t kWidth = V::kWidth;
  for (size_t j = 0; j < p.n; j += kWidth) {
    const size_t columns = p.n - j < kWidth ? p.n - j : kWidth;
    const T* rows[kWidth];
#pragma GCC unroll 16
    for (size_t r = 0; r < kWidth; ++r) rows[r] = p.b + (j + (r < columns ? r : columns - 1)) * p.b_row;
    typename V::Type sums[kWidth];
#pragma GCC unroll 16
    for (size_t r = 0; r < kWidth; ++r) sums[r] = V::zero();
    for (size_t l = 0; l < p.k; l += kWidth) {
      const typename V::Type a = p.k - l >= kWidth ? V::load(p.a + l) : V::load_some(p.a + l, p.k - l);
#pragma GCC unroll 16
      for (size_t r = 0; r < kWidth; ++r) sums[r] = V::multiply_add(a, V::load(rows[r] + l), sums[r]);
    }
    alignas(64) T lanes[kWidth * kWidth];
#pragma GCC unroll 16
    for (size_t r = 0; r < kWidth; ++r) V::store(lanes + r * kWidth, sums[r]);
    transpose_block<T>(lanes, kWidth, kWidth, lanes, kWidth);
    typename V::Type total = p.bias != nullptr ? V::all(p.bias) : V::zero();
    for (size_t lane = 0; lane < kWidth; ++lane) total = V::add(total, V::load(lanes + lane * kWidth));
    if (p.relu) total = V::relu(total);
    if (p.gate != nullptr) total = V::gated(total, V::load(p.gate + j));
    V::store_some(p.c + j, total, columns);
  }
}

template <typename T>
void product(const Product<T>& p) {
  constexpr size_t kWidth = Vector<T>::kWidth;
  constexpr size_t kPanelVectors = kTileVectors < 3 ? 3 : kTileVectors;
  alignas(64) T turned[kDepth * kPanelVectors * kWidth];
  if (p.m == 0 || p.n == 0) return;
  if (p.m == 1 && p.b_turned && (p.a_step == 1 || p.k == 1)) {
    dots(p);
    return;
  }
  const size_t depth = depth_of(p.k), rows_at_once = even_part(p.m, kRowsAtOnce);
  for (size_t begin = 0; begin < p.m; begin += rows_at_once) {
    const size_t end = p.m - begin < rows_at_once ? p.m : begin + rows_at_once;
    for (size_t first = 0;;) {
      const size_t steps = p.k - first < depth ? p.k - first : depth;
      const Piece<T> piece = {p.a + begin * p.a_row + first * p.a_step,
                              p.a_row,
                              p.a_step,
                              steps,
                              begin,
                              end,
                              first == 0,
                              first + steps == p.k};
      if (p.b_turned) {
        panels<T, T, kTileRows, kTileVectors>(p, piece, [&](size_t j, size_t vectors) {
          const size_t row = vectors * kWidth;
          for (size_t step = 0; step < steps; step += kWidth) {
            for (size_t at = j; at < j + row && at < p.n; at += kWidth) {
              transpose_block<T>(p.b + at * p.b_row + first + step, p.b_row, p.n - at, turned + step * row + at - j,
                                 row);
            }
          }
          return Panel<T>{turned, row, j};
        });
      } else {
        const auto in_place = [&](size_t j, size_t) { return Panel<T>{p.b + first * p.b_row + j, p.b_row, j}; };
        if (end - begin == 1) {  // few rows want wide tiles: it takes enough sums to hide a multiply-add's time
          panels<T, T, 1, kRowVectors>(p, piece, in_place);
        } else if (end - begin == 2) {
          panels<T, T, 2, 4>(p, piece, in_place);
        } else {
          panels<T, T, kTileRows, kTileVectors>(p, piece, in_place);
        }
      }
      first += steps;
      if (piece.last) break;
    }
  }
}

template <typename T>
void transpose(const T* in, size_t in_row, T* out, size_t out_row, size_t rows, size_t columns) {
  constexpr size_t kWidth = Vector<T>::kWidth;
  const size_t whole_rows = rows / kWidth * kWidth, whole_columns = columns / kWidth * kWidth;
  for (size_t j = 0; j < whole_columns; j += kWidth) {
    for (size_t i = 0; i < whole_rows; i += kWidth) {
      transpose_block<T>(in + i * in_row + j, in_row, kWidth, out + j * out_row + i, out_row);
    }
  }
  for (size_t j = 0; j < columns; ++j) {
    for (size_t i = j < whole_columns ? whole_rows : 0; i < rows; ++i) out[j * out_row + i] = in[i * in_row + j];
  }
}
