// Matrix products and transposes on every ISA against plain loops in double.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "doctest.h"
#include "kernels/kernels.h"
#include "learner_checks.h"
#include "tables.h"

using namespace angle;
using angle::testing::learner_of;
using angle::testing::normals;
using angle::testing::tables;

namespace {

// Numbers enough for every shape below, drawn once.
template <class T>
struct Numbers {
  std::vector<T> a = normals<T>(1 << 17, 1), b = normals<T>(1 << 17, 2), bias = normals<T>(1 << 11, 3),
                 gate = normals<T>(1 << 17, 4);
};

template <class T>
const Numbers<T>& numbers() {
  static const Numbers<T> drawn;
  return drawn;
}

struct Case {
  size_t m, n, k;
  bool turned;  // a lies column by column
  bool bias, relu, gate;
  bool b_turned = false;
};

constexpr size_t kLead = 5, kBeyond = 19;  // elements before c and after each of its rows that stay as they are

// Adds x * y to a row's sums and |x * y| to their sizes; y[j] is `step` numbers after y[j - 1]. Nearly all of the
// reference's work: sanitizers, which would take most of their time here, need not look on.
__attribute__((no_sanitize("address", "thread", "undefined"))) void add_products(double x, const double* y, size_t step,
                                                                                 double* sum, double* size, size_t n) {
  for (size_t j = 0; j < n; ++j) {
    const double product = x * y[j * step];
    sum[j] += product;
    size[j] += product < 0 ? -product : product;
  }
}

// The largest of |got - expected| / (sum |a| |b| + |bias|), infinite where an element outside c was written.
template <class T>
double worst_error(void (*product)(const Product<T>&), const Case& c, T (*rounded)(T) = nullptr) {
  const Numbers<T>& in = numbers<T>();
  const T canary = T(-12345.75);
  // Copies of just what may be read, so that a sanitizer sees what is read beyond.
  const auto exactly = [](const std::vector<T>& from, size_t rows, size_t pitch, size_t readable) {
    const size_t size = rows == 0 || readable == 0 ? 0 : (rows - 1) * pitch + readable;
    REQUIRE(size <= from.size());
    return std::vector<T>(from.begin(), from.begin() + static_cast<std::ptrdiff_t>(size));
  };
  const auto whole = [](size_t columns) { return (columns + kColumnMultiple - 1) / kColumnMultiple * kColumnMultiple; };
  Product<T> p;
  p.m = c.m, p.n = c.n, p.k = c.k;
  p.a_row = c.turned ? 1 : c.k + 2, p.a_step = c.turned ? c.m + 3 : 1;
  const std::vector<T> a = exactly(in.a, c.turned ? c.k : c.m, c.turned ? p.a_step : p.a_row, c.turned ? c.m : c.k);
  p.a = a.data();
  p.b_turned = c.b_turned;
  p.b_row = padded_pitch<T>(c.b_turned ? c.k : c.n);
  const std::vector<T> b = exactly(in.b, c.b_turned ? c.n : c.k, p.b_row, whole(c.b_turned ? c.k : c.n));
  p.b = b.data();
  p.c_row = c.n + kBeyond;
  std::vector<T> result(kLead + c.m * p.c_row, canary);
  p.c = result.data() + kLead;
  const std::vector<T> bias = exactly(in.bias, c.m, 1, 1);
  p.bias = c.bias ? bias.data() : nullptr;
  p.relu = c.relu;
  p.gate_row = padded_pitch<T>(c.n);
  const std::vector<T> gate = exactly(in.gate, c.m, p.gate_row, whole(c.n));
  p.gate = c.gate ? gate.data() : nullptr;
  product(p);

  const auto factor = [&](T x) { return double(rounded == nullptr ? x : rounded(x)); };
  std::vector<double> factors(b.size());
  std::transform(b.begin(), b.end(), factors.begin(), factor);
  double worst = 0;
  std::vector<double> sum(c.n), size(c.n);
  for (size_t i = 0; i < c.m; ++i) {
    const double start = c.bias ? double(p.bias[i]) : 0.0;
    std::fill(sum.begin(), sum.end(), start);
    std::fill(size.begin(), size.end(), std::abs(start) + 1e-30);
    for (size_t l = 0; l < c.k && c.n > 0; ++l) {
      const double x = factor(p.a[i * p.a_row + l * p.a_step]);
      add_products(x, &factors[c.b_turned ? l : l * p.b_row], c.b_turned ? p.b_row : 1, sum.data(), size.data(), c.n);
    }
    for (size_t j = 0; j < c.n; ++j) {
      double expected = c.relu ? std::max(sum[j], 0.0) : sum[j];
      if (c.gate && !(p.gate[i * p.gate_row + j] > T(0))) expected = 0;
      const double error = std::abs(double(p.c[i * p.c_row + j]) - expected) / size[j];
      worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : std::max(worst, error);
    }
  }
  for (size_t at = 0; at < result.size(); ++at) {
    const bool inside = at >= kLead && (at - kLead) % p.c_row < c.n;
    if (!inside && result[at] != canary) worst = std::numeric_limits<double>::infinity();
  }
  return worst;
}

// Rounding of a sum of k products, with some room: the bound proper grows like k.
template <class T>
double allowed(size_t k) {
  return (std::is_same_v<T, float> ? 6e-8 : 1.1e-16) * (4.0 + std::sqrt(double(k)));
}

template <class T>
void check(const Kernels& table, const Case& c) {
  const double error = worst_error<T>(learner_of<T>(table).product, c);
  CAPTURE(std::string(table.isa));
  CAPTURE(c.m);
  CAPTURE(c.n);
  CAPTURE(c.k);
  CAPTURE(c.turned);
  CAPTURE(c.b_turned);
  CHECK(error <= allowed<T>(c.k));
}

}  // namespace

TEST_CASE_TEMPLATE("a product is right at every size around a tile's", T, float, double) {
  for (const Kernels* table : tables()) {
    size_t turn = 0;
    for (size_t m = 1; m <= 17; ++m) {
      for (size_t n = 1; n <= 49; ++n) {
        const size_t k = 1 + (7 * m + 3 * n) % 40;
        const unsigned kind = static_cast<unsigned>(turn++ * 5 % 16);
        check<T>(*table,
                 {m, n, k, (kind & 1) != 0, (kind & 2) != 0, (kind & 4) != 0, (kind & 8) != 0, (m + n) % 3 == 0});
      }
    }
    for (size_t k = 1; k <= 40; ++k) {
      for (const bool b_turned : {false, true}) {
        check<T>(*table, {13, 35, k, false, true, true, false, b_turned});
        check<T>(*table, {13, 35, k, true, false, false, true, b_turned});
      }
    }
  }
}

TEST_CASE_TEMPLATE("a product is right at a learner's sizes, with every end and both ways that a may lie", T, float,
                   double) {
  constexpr size_t kShapes[][3] = {{1, 130, 1},    {1, 45, 259},  {1, 200, 70},  {2, 200, 33}, {3, 64, 256},
                                   {12, 96, 256},  {33, 23, 257}, {24, 48, 600}, {1, 17, 600}, {100, 33, 512},
                                   {23, 128, 100}, {2, 9, 600},   {41, 16, 300}, {509, 7, 5},  {5, 40, 258}};
  for (const Kernels* table : tables()) {
    for (const auto& [m, n, k] : kShapes) {
      for (unsigned kind = 0; kind < 32; ++kind) {
        check<T>(*table,
                 {m, n, k, (kind & 1) != 0, (kind & 2) != 0, (kind & 4) != 0, (kind & 8) != 0, (kind & 16) != 0});
      }
    }
  }
}

TEST_CASE_TEMPLATE("an empty sum is the bias, an empty product nothing", T, float, double) {
  for (const Kernels* table : tables()) {
    check<T>(*table, {5, 19, 0, false, true, false, false});
    check<T>(*table, {5, 19, 0, false, false, false, false});
    check<T>(*table, {0, 19, 3, false, true, true, false});
    check<T>(*table, {5, 0, 3, false, true, true, false});
  }
}

TEST_CASE_TEMPLATE("a product divided into ranges of rows or columns gives the same numbers", T, float, double) {
  constexpr size_t m = 29, n = 83, k = 300, pitch = padded_pitch<T>(n);
  const Numbers<T>& in = numbers<T>();
  for (const Kernels* table : tables()) {
    const auto rows = [&](size_t begin, size_t end, size_t first, size_t past, std::vector<T>& c,
                          bool b_turned = false) {
      Product<T> p;
      p.a = in.a.data() + begin * k, p.a_row = k, p.a_step = 1;
      p.b = in.b.data() + first, p.b_row = pitch;
      p.c = c.data() + begin * n + first, p.c_row = n;
      p.m = end - begin, p.n = past - first, p.k = k;
      p.bias = in.bias.data() + begin;
      std::vector<T> copy;
      if (b_turned) {
        copy.resize(p.n * padded_pitch<T>(k));
        learner_of<T>(*table).transpose(p.b, p.b_row, copy.data(), padded_pitch<T>(k), k, p.n);
        p.b = copy.data(), p.b_row = padded_pitch<T>(k), p.b_turned = true;
      }
      learner_of<T>(*table).product(p);
    };
    std::vector<T> whole(m * n), by_rows(m * n), by_columns(m * n), from_turned(m * n);
    rows(0, m, 0, n, whole);
    rows(0, 1, 0, n, by_rows), rows(1, 3, 0, n, by_rows), rows(3, 16, 0, n, by_rows), rows(16, m, 0, n, by_rows);
    rows(0, m, 0, 16, by_columns), rows(0, m, 16, 64, by_columns), rows(0, m, 64, n, by_columns);
    rows(0, m, 0, 30, from_turned, true), rows(0, 2, 30, n, from_turned, true), rows(2, m, 30, n, from_turned, true);
    CAPTURE(std::string(table->isa));
    CHECK(from_turned == whole);
    CHECK(by_rows == whole);
    CHECK(by_columns == whole);
  }
}

TEST_CASE_TEMPLATE("what is not a number stays so, except behind a closed gate", T, float, double) {
  constexpr size_t m = 14, n = 37, pitch = padded_pitch<T>(n);
  const T nan = std::numeric_limits<T>::quiet_NaN();
  for (const Kernels* table : tables()) {
    std::vector<T> a(m, T(1)), b(pitch, T(1)), c(m * n), gate(m * pitch, T(1));
    b[3] = nan, b[36] = nan;
    gate[3] = T(0), gate[4] = nan;
    Product<T> p;
    p.a = a.data(), p.a_row = 1, p.a_step = m;
    p.b = b.data(), p.b_row = pitch;
    p.c = c.data(), p.c_row = n;
    p.m = m, p.n = n, p.k = 1;
    p.relu = true;
    learner_of<T>(*table).product(p);
    for (size_t i = 0; i < m; ++i) {
      CHECK(std::isnan(c[i * n + 3]));
      CHECK(std::isnan(c[i * n + 36]));
      CHECK(c[i * n + 4] == T(1));
    }
    p.gate = gate.data(), p.gate_row = pitch;
    learner_of<T>(*table).product(p);
    CHECK(c[3] == T(0));
    CHECK(c[4] == T(0));  // a gate that is not a number is closed
    CHECK(std::isnan(c[36]));
    CHECK(std::isnan(c[n + 3]));
  }
}

TEST_CASE_TEMPLATE("a transpose puts every element in its place and nothing elsewhere", T, float, double) {
  const std::vector<T>& in = numbers<T>().a;
  constexpr size_t kSizes[] = {1, 2, 3, 7, 8, 15, 16, 17, 23, 31, 32, 33, 50};
  for (const Kernels* table : tables()) {
    for (const size_t rows : kSizes) {
      for (const size_t columns : kSizes) {
        const size_t in_row = columns + 3, out_row = rows + 5;
        std::vector<T> out(columns * out_row + 7, T(77));
        learner_of<T>(*table).transpose(in.data() + 1, in_row, out.data() + 1, out_row, rows, columns);
        size_t wrong = 0;
        for (size_t at = 0; at < out.size(); ++at) {
          const size_t j = at == 0 ? columns : (at - 1) / out_row, i = at == 0 ? 0 : (at - 1) % out_row;
          const T expected = j < columns && i < rows ? in[1 + i * in_row + j] : T(77);
          wrong += out[at] != expected;
        }
        CAPTURE(std::string(table->isa));
        CHECK(wrong == 0);
      }
    }
  }
}

TEST_CASE("a pitch is an odd number of cache lines and leaves room to read on") {
  for (size_t n = 0; n <= 1100; ++n) {
    for (const size_t lanes : {16u, 8u}) {
      const size_t pitch = lanes == 16 ? padded_pitch<float>(n) : padded_pitch<double>(n);
      CHECK(pitch % lanes == 0);
      CHECK(pitch / lanes % 2 == 1);
      CHECK(pitch >= (n + kColumnMultiple - 1) / kColumnMultiple * kColumnMultiple);
      CHECK(pitch < n + 3 * kColumnMultiple);
    }
  }
}

namespace {

float bfloat16(float x) {  // to the nearest, even on a tie
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

}  // namespace

TEST_CASE("a product of bfloat16 factors is that of the rounded factors") {
  const auto product = bfloat16_product();
  if (product == nullptr) {
    MESSAGE("not tested: no AVX512_BF16 here, or ANGLE_ISA forbids it");
    return;
  }
  const auto check_rounded = [product](const Case& c) {
    const double error = worst_error<float>(product, c, c.m < 8 || c.k < 8 ? nullptr : bfloat16);
    CAPTURE(c.m);
    CAPTURE(c.n);
    CAPTURE(c.k);
    CAPTURE(c.turned);
    CAPTURE(c.b_turned);
    CHECK(error <= allowed<float>(c.k));
  };
  for (size_t m = 6; m <= 20; ++m) {
    for (size_t n = 1; n <= 49; ++n) {
      const unsigned kind = static_cast<unsigned>(m * 5 + n);
      check_rounded({m, n, 1 + (7 * m + 3 * n) % 40, (kind & 1) != 0, (kind & 2) != 0, (kind & 4) != 0, (kind & 8) != 0,
                     (kind & 16) != 0});
    }
  }
  for (const size_t k : {7u, 8u, 9u, 31u, 32u, 33u, 34u, 63u, 65u, 127u, 255u, 256u, 257u, 258u, 273u, 600u}) {
    for (unsigned kind = 0; kind < 8; ++kind) {
      check_rounded({13, 37, k, (kind & 1) != 0, (kind & 2) != 0, false, false, (kind & 4) != 0});
      check_rounded({149, 60, k, (kind & 1) != 0, false, false, (kind & 2) != 0, (kind & 4) != 0});
    }
  }
}
