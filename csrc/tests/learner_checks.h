// What the tests of the learner's kernels share: matrices with canaries, tolerances, sizes that leave every kind of
// tail.
#pragma once
#include <cmath>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "kernels/kernels.h"

namespace angle::testing {

using Real = long double;

template <class T>
const LearnerKernelsOf<T>& learner_of(const Kernels& table) {
  if constexpr (std::is_same_v<T, float>) {
    return table.learner.f32;
  } else {
    return table.learner.f64;
  }
}

// Tolerances: float32's, and a like number of float64's last places.
template <class T>
constexpr Real tolerance(double of_float) {
  return std::is_same_v<T, float> ? Real{of_float} : Real{of_float} * Real{0x1p-29};
}

template <class T>
inline constexpr T kCanary = T(-12345);

// [rows, columns] with a pitch, canaries between the rows and behind the last.
template <class T>
struct Matrix {
  size_t rows, columns, pitch;
  std::vector<T> values;

  Matrix(size_t rows_, size_t columns_, size_t beyond)
      : rows(rows_), columns(columns_), pitch(columns_ + beyond), values(rows_ * pitch + 16, kCanary<T>) {}

  // Normals of a seed, times scale, plus offset.
  Matrix(size_t rows_, size_t columns_, size_t beyond, uint64_t seed, double scale = 1.0, double offset = 0.0)
      : Matrix(rows_, columns_, beyond) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    for (size_t i = 0; i < rows; ++i) {
      for (size_t j = 0; j < columns; ++j) (*this)(i, j) = static_cast<T>(offset + scale * normal(random));
    }
  }

  T& operator()(size_t i, size_t j) { return values[i * pitch + j]; }
  const T& operator()(size_t i, size_t j) const { return values[i * pitch + j]; }
  T* data() { return values.data(); }
  const T* data() const { return values.data(); }

  bool untouched_beyond() const {
    for (size_t at = 0; at < values.size(); ++at) {
      if ((at / pitch >= rows || at % pitch >= columns) && values[at] != kCanary<T>) return false;
    }
    return true;
  }
};

template <class T>
std::vector<T> normals(size_t n, uint64_t seed, double scale = 1.0) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  std::vector<T> values(n);
  for (auto& value : values) value = static_cast<T>(scale * normal(random));
  return values;
}

// The largest error seen, each relative to the scale given with it; not a number counts as infinite.
struct Worst {
  Real error = 0;
  void see(Real got, Real expected, Real scale) {
    const Real found = std::abs(got - expected) / scale;
    error = found <= error ? error : (found == found ? found : std::numeric_limits<Real>::infinity());
  }
};

inline constexpr size_t kSizes[] = {1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 100, 257, 530};

}  // namespace angle::testing
