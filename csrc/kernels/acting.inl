// A layer for few rows. Weights pass by once, so reading them from the caches is what it costs.

// A vector's width of outputs for kRows rows, kOutputs of them at a time: vectors of steps are summed up, then a
// transpose adds up the lanes of each sum. An element's sum is the same whatever rows go with it.
template <size_t kRows, size_t kOutputs, typename T>
inline void few_rows_outputs(const FewRows<T>& p, size_t row, size_t j) {
  using V = Vector<T>;
  constexpr size_t kWidth = V::kWidth;
  const size_t k = p.inputs, whole = k / kWidth * kWidth, count = at_most(p.outputs - j, kWidth);
  const T* const x = p.x + row * k;
  alignas(64) T lanes[kRows][kWidth * kWidth];
  for (size_t first = 0; first < kWidth; first += kOutputs) {
    const T* weights[kOutputs];
#pragma GCC unroll 16
    for (size_t o = 0; o < kOutputs; ++o) weights[o] = p.weights + (j + at_most(first + o, count - 1)) * k;
    typename V::Type sums[kRows][kOutputs];
#pragma GCC unroll 4
    for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (size_t o = 0; o < kOutputs; ++o) sums[r][o] = V::zero();
    }
    for (size_t l = 0; l < whole; l += kWidth) {
      typename V::Type inputs[kRows];
#pragma GCC unroll 4
      for (size_t r = 0; r < kRows; ++r) inputs[r] = V::load(x + r * k + l);
#pragma GCC unroll 16
      for (size_t o = 0; o < kOutputs; ++o) {
        const typename V::Type weight = V::load(weights[o] + l);
#pragma GCC unroll 4
        for (size_t r = 0; r < kRows; ++r) sums[r][o] = V::multiply_add(inputs[r], weight, sums[r][o]);
      }
    }
    if (whole < k) {
#pragma GCC unroll 16
      for (size_t o = 0; o < kOutputs; ++o) {
        const typename V::Type weight = V::load_some(weights[o] + whole, k - whole);
#pragma GCC unroll 4
        for (size_t r = 0; r < kRows; ++r) {
          sums[r][o] = V::multiply_add(V::load_some(x + r * k + whole, k - whole), weight, sums[r][o]);
        }
      }
    }
#pragma GCC unroll 4
    for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (size_t o = 0; o < kOutputs; ++o) V::store(lanes[r] + (first + o) * kWidth, sums[r][o]);
    }
  }
  const typename V::Type bias = V::load_some(p.bias + j, count);
  for (size_t r = 0; r < kRows; ++r) {
    transpose_block<T>(lanes[r], kWidth, kWidth, lanes[r], kWidth);
    typename V::Type total[2] = {bias, V::zero()};
#pragma GCC unroll 8
    for (size_t lane = 0; lane < kWidth; lane += 2) {
      total[0] = V::add(total[0], V::load(lanes[r] + lane * kWidth));
      total[1] = V::add(total[1], V::load(lanes[r] + (lane + 1) * kWidth));
    }
    V::store_some(p.y + (row + r) * p.outputs + j, V::add(total[0], total[1]), count);
  }
}

template <typename T>
void few_rows(const FewRows<T>& p) {
  constexpr size_t kWidth = Vector<T>::kWidth, kHalf = kWidth / 2, kQuarter = kWidth < 4 ? 1 : kWidth / 4;
  for (size_t j = 0; j < p.outputs; j += kWidth) {
    size_t row = 0;
    for (; row + 4 <= p.rows; row += 4) few_rows_outputs<4, kQuarter>(p, row, j);
    if (row + 2 <= p.rows) {
      few_rows_outputs<2, kHalf>(p, row, j);
      row += 2;
    }
    if (row < p.rows) few_rows_outputs<1, kWidth>(p, row, j);
  }
}
