// Normals from Philox bits: accurate, equal to the last bit on every ISA, and normal.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>
#include <vector>

#include "core/philox.h"
#include "doctest.h"
#include "kernels/kernels.h"
#include "tables.h"

using namespace angle;
using angle::testing::tables;

namespace {

std::vector<double> normals_of(const Kernels& table, uint64_t key, size_t n) {
  std::vector<double> out(n);
  table.random.normals_f64(key, kNormal, out.data(), n);
  return out;
}

double normal_share(double x) { return 0.5 * std::erfc(-x * std::numbers::sqrt2 / 2); }

}  // namespace

TEST_CASE("normals are Box and Muller's function of Philox blocks, on every ISA to the last bit") {
  constexpr size_t kCount = 40000;
  const uint64_t key = 0x9E3779B97F4A7C15ull;
  const std::vector<double> expected = normals_of(baseline::table, key, kCount);
  double worst = 0.0;
  for (size_t i = 0; i < kCount; i += 2) {
    const PhiloxBlock block = philox(key, i / 2, kNormal);
    const long double radius = std::sqrt(-2.0L * std::log(1.0L - unit_double(block.low())));
    // By a quarter's multiple and the rest, exactly, so that rounding 2 pi costs nothing near a zero.
    const double turn = unit_double(block.high()), quarter = std::round(4 * turn);
    const long double angle = 2.0L * std::numbers::pi_v<long double> * (turn - quarter / 4);
    const long double c = std::cos(angle), s = std::sin(angle), cosines[4] = {c, -s, -c, s}, sines[4] = {s, c, -s, -c};
    const size_t which = static_cast<size_t>(quarter) % 4;
    const long double first = radius * cosines[which], second = radius * sines[which];
    const double error =
        static_cast<double>(std::max(std::abs(first - expected[i]), std::abs(second - expected[i + 1])));
    worst = std::max(worst, error / static_cast<double>(radius));
  }
  CHECK(worst <= 4e-16);
  for (const Kernels* table : tables()) {
    const std::vector<double> got = normals_of(*table, key, kCount);
    CHECK(std::memcmp(got.data(), expected.data(), kCount * sizeof(double)) == 0);
  }
}

TEST_CASE("a normal depends on its key and place alone, and float32 ones are float64 ones rounded") {
  constexpr double kCanary = 12345.0;
  for (const Kernels* table : tables()) {
    const std::vector<double> all = normals_of(*table, 5, 600);
    for (const size_t n :
         {0u, 1u, 2u, 3u, 15u, 16u, 17u, 31u, 32u, 33u, 127u, 128u, 129u, 130u, 255u, 256u, 257u, 599u}) {
      std::vector<double> wide(n + 3, kCanary);
      std::vector<float> narrow(n + 3, static_cast<float>(kCanary));
      table->random.normals_f64(5, kNormal, wide.data(), n);
      table->random.normals_f32(5, kNormal, narrow.data(), n);
      for (size_t i = 0; i < n; ++i) {
        CHECK(wide[i] == all[i]);
        CHECK(narrow[i] == static_cast<float>(all[i]));
      }
      for (size_t i = n; i < n + 3; ++i) {
        CHECK(wide[i] == kCanary);
        CHECK(narrow[i] == static_cast<float>(kCanary));
      }
    }
    CHECK(normals_of(*table, 6, 4) != normals_of(*table, 5, 4));
    double other[4];
    table->random.normals_f64(5, kNormal + 1, other, 4);
    CHECK(other[0] != all[0]);
  }
}

TEST_CASE("philox_normal is the kernel in use") {
  std::vector<double> got(33);
  philox_normal(11, got.data(), got.size());
  CHECK(got == normals_of(baseline::table, 11, got.size()));
}

TEST_CASE("normals are normal: moments, a chi-square over equal shares, and pairs that do not follow each other") {
  constexpr size_t kCount = 1 << 18, kBins = 256;
  const std::vector<double> values = normals_of(kernels(), 2024, kCount);
  double sums[5] = {}, product = 0.0;
  std::vector<double> bins(kBins, 0.0), quadrants(4, 0.0);
  for (size_t i = 0; i < kCount; ++i) {
    double power = 1.0;
    for (double& sum : sums) {
      sum += power;
      power *= values[i];
    }
    ++bins[std::min(kBins - 1, static_cast<size_t>(normal_share(values[i]) * kBins))];
    if (i % 2 == 0) {
      product += values[i] * values[i + 1];
      ++quadrants[(values[i] > 0) + 2 * (values[i + 1] > 0)];
    }
  }
  const double n = kCount;  // each bound: five standard errors
  CHECK(std::abs(sums[1] / n) <= 5 * std::sqrt(1 / n));
  CHECK(std::abs(sums[2] / n - 1) <= 5 * std::sqrt(2 / n));
  CHECK(std::abs(sums[3] / n) <= 5 * std::sqrt(15 / n));
  CHECK(std::abs(sums[4] / n - 3) <= 5 * std::sqrt(96 / n));
  CHECK(std::abs(product / (n / 2)) <= 5 * std::sqrt(2 / n));
  double square = 0.0, square_of_quadrants = 0.0;
  for (const double count : bins) square += (count - n / kBins) * (count - n / kBins) / (n / kBins);
  for (const double count : quadrants) square_of_quadrants += (count - n / 8) * (count - n / 8) / (n / 8);
  CHECK(square < 347.7);              // 255 degrees of freedom, 1e-4
  CHECK(square > 178.1);              // and not better than chance allows
  CHECK(square_of_quadrants < 21.1);  // 3 degrees of freedom, 1e-4
}
