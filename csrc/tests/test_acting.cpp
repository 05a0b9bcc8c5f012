// A layer for few rows: every ISA against long double, nothing read or written beyond, rows that do not depend on each
// other.
#include <cstring>

#include "doctest.h"
#include "learner_checks.h"
#include "tables.h"

using namespace angle;
using namespace angle::testing;

TEST_CASE_TEMPLATE("few rows", T, float, double) {
  for (const Kernels* table : tables()) {
    CAPTURE(table->isa);
    const auto few_rows = learner_of<T>(*table).few_rows;
    Worst worst;
    for (const size_t inputs : kSizes) {
      for (const size_t outputs : {1u, 3u, 4u, 8u, 12u, 15u, 16u, 17u, 33u}) {
        const std::vector<T> weights = normals<T>(inputs * outputs, inputs), bias = normals<T>(outputs, 5);
        const std::vector<T> x = normals<T>(9 * inputs, outputs);
        for (size_t rows = 1; rows <= 9; ++rows) {
          // What lies behind the arrays is not read: it would make every sum NaN.
          const auto guarded = [](const std::vector<T>& values, size_t n) {
            std::vector<T> out(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(n));
            out.resize(n + 16, std::numeric_limits<T>::quiet_NaN());
            return out;
          };
          const std::vector<T> given = guarded(x, rows * inputs), factors = guarded(weights, weights.size());
          const std::vector<T> added = guarded(bias, outputs);
          std::vector<T> y(rows * outputs + 16, kCanary<T>);
          few_rows({given.data(), factors.data(), added.data(), y.data(), rows, inputs, outputs});
          for (size_t i = rows * outputs; i < y.size(); ++i) REQUIRE(y[i] == kCanary<T>);
          for (size_t i = 0; i < rows; ++i) {
            std::vector<T> alone(outputs);
            few_rows({given.data() + i * inputs, factors.data(), added.data(), alone.data(), 1, inputs, outputs});
            REQUIRE(std::memcmp(alone.data(), y.data() + i * outputs, outputs * sizeof(T)) == 0);
            for (size_t j = 0; j < outputs; ++j) {
              Real sum = bias[j], sizes = std::abs(Real{bias[j]});
              for (size_t l = 0; l < inputs; ++l) {
                const Real term = Real{x[i * inputs + l]} * Real{weights[j * inputs + l]};
                sum += term;
                sizes += std::abs(term);
              }
              worst.see(y[i * outputs + j], sum, sizes);
            }
          }
        }
      }
    }
    CHECK(worst.error < tolerance<T>(1e-6));
  }
}

TEST_CASE("few rows keep what is not a number in its row") {
  for (const Kernels* table : tables()) {
    std::vector<float> x(3 * 20, 1.0f), weights(18 * 20, 0.5f), bias(18, 0.0f), y(3 * 18);
    x[20 + 19] = std::numeric_limits<float>::quiet_NaN();
    table->learner.f32.few_rows({x.data(), weights.data(), bias.data(), y.data(), 3, 20, 18});
    for (size_t i = 0; i < 3; ++i) {
      for (size_t j = 0; j < 18; ++j) CHECK(std::isnan(y[i * 18 + j]) == (i == 1));
    }
  }
}
