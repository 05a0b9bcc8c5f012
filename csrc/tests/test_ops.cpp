// The fused operations' kernels on every ISA against plain loops in double, at sizes that leave every kind of tail.
#include <algorithm>
#include <cmath>
#include <random>
#include <type_traits>
#include <vector>

#include "doctest.h"
#include "kernels/kernels.h"
#include "tables.h"

using namespace angle;
using angle::testing::tables;

namespace {

template <class T>
const OpsKernelsOf<T>& ops_of(const Kernels& table) {
  if constexpr (std::is_same_v<T, float>) {
    return table.ops.f32;
  } else {
    return table.ops.f64;
  }
}

template <class T>
std::vector<T> normals(size_t n, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  std::vector<T> values(n);
  for (auto& value : values) value = static_cast<T>(normal(random));
  return values;
}

template <class T>
doctest::Approx near(double value) {
  return doctest::Approx(value).epsilon(std::is_same_v<T, float> ? 3e-6 : 1e-12);
}

constexpr size_t kSizes[] = {1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 100, 257};

}  // namespace

TEST_CASE_TEMPLATE("the target is reward plus the discounted soft minimum", T, float, double) {
  for (const Kernels* table : tables()) {
    for (const size_t n : kSizes) {
      for (const size_t critics : {1u, 2u, 5u}) {
        const auto rewards = normals<T>(n, 1), discounts = normals<T>(n, 2), q = normals<T>(critics * n, 3);
        const auto log_prob = normals<T>(n, 4);
        std::vector<T> got(n);
        ops_of<T>(*table).twin_q_target(
            {rewards.data(), discounts.data(), q.data(), log_prob.data(), T(0.3), got.data(), critics, n});
        for (size_t i = 0; i < n; ++i) {
          double smallest = q[i];
          for (size_t c = 1; c < critics; ++c) smallest = std::min<double>(smallest, q[c * n + i]);
          const double scale = 1 + std::abs(static_cast<double>(got[i]));
          const double expected = rewards[i] + discounts[i] * (smallest - double(T(0.3)) * log_prob[i]);
          CHECK(std::abs(got[i] - expected) <= scale * (std::is_same_v<T, float> ? 1e-6 : 1e-14));
        }
      }
    }
  }
}

TEST_CASE_TEMPLATE("loss, td error and gradient come from one pass", T, float, double) {
  for (const Kernels* table : tables()) {
    for (const size_t n : kSizes) {
      for (const double delta : {0.0, 0.5}) {
        const size_t critics = 3;
        const auto q = normals<T>(critics * n, 5), target = normals<T>(n, 6);
        auto weights = normals<T>(n, 7);
        for (auto& weight : weights) weight = std::abs(weight);
        std::vector<T> td_error(n), gradient(critics * n);
        T loss = 0;
        ops_of<T>(*table).twin_q_loss(
            {q.data(), target.data(), weights.data(), T(delta), &loss, td_error.data(), gradient.data(), critics, n});
        double expected_loss = 0;
        for (size_t i = 0; i < n; ++i) {
          double expected_td = 0;
          for (size_t c = 0; c < critics; ++c) {
            const double error = double(q[c * n + i]) - target[i], size = std::abs(error);
            const bool linear = delta > 0 && size > delta;
            const double value = delta > 0 ? (linear ? delta * (size - delta / 2) : error * error / 2) : error * error;
            const double slope = delta > 0 ? (linear ? std::copysign(delta, error) : error) : 2 * error;
            expected_loss += weights[i] * value;
            expected_td += size / critics;
            CHECK(gradient[c * n + i] == near<T>(weights[i] * slope / double(n)));
          }
          CHECK(td_error[i] == near<T>(expected_td));
        }
        CHECK(loss == near<T>(expected_loss / double(n)));
      }
    }
  }
}

TEST_CASE_TEMPLATE("a squashed sample, its density, and their gradient", T, float, double) {
  for (const Kernels* table : tables()) {
    for (const size_t rows : kSizes) {
      for (const size_t columns : {1u, 3u, 6u, 17u}) {
        const size_t n = rows * columns;
        const auto mean = normals<T>(n, 8), log_std = normals<T>(n, 9), noise = normals<T>(n, 10);
        const auto actions_gradient = normals<T>(n, 11), log_prob_gradient = normals<T>(rows, 12);
        std::vector<T> actions(n), spread(n), log_prob(rows), mean_gradient(n), log_std_gradient(n);
        ops_of<T>(*table).squashed_gaussian(
            {mean.data(), log_std.data(), noise.data(), actions.data(), spread.data(), log_prob.data(), rows, columns});
        ops_of<T>(*table).squashed_gaussian_gradient({actions_gradient.data(), log_prob_gradient.data(), actions.data(),
                                                      spread.data(), mean_gradient.data(), log_std_gradient.data(),
                                                      rows, columns});
        const double loose = std::is_same_v<T, float> ? 2e-5 : 1e-11;
        for (size_t row = 0; row < rows; ++row) {
          double expected = 0;
          for (size_t i = row * columns; i < (row + 1) * columns; ++i) {
            const double step = std::exp(double(log_std[i])) * noise[i], u = mean[i] + step;
            CHECK(std::abs(actions[i] - std::tanh(u)) <= (std::is_same_v<T, float> ? 3e-7 : 1e-15));
            const double squash = 2 * (std::log(2.0) - u - std::log1p(std::exp(-2 * u)));
            const double stable = u < -20 ? 2 * (std::log(2.0) + u) : squash;
            expected += -0.5 * double(noise[i]) * noise[i] - log_std[i] - 0.918938533204672742 - stable;
            const double from_u =
                actions_gradient[i] * (1 - std::tanh(u) * std::tanh(u)) + log_prob_gradient[row] * 2 * std::tanh(u);
            const double scale = 1 + std::abs(from_u) + std::abs(from_u * step);
            CHECK(std::abs(mean_gradient[i] - from_u) <= loose * scale);
            CHECK(std::abs(log_std_gradient[i] - (from_u * step - log_prob_gradient[row])) <= loose * scale);
          }
          CHECK(std::abs(log_prob[row] - expected) <= loose * (1 + std::abs(expected)));
        }
      }
    }
  }
}

TEST_CASE_TEMPLATE("targets move by tau", T, float, double) {
  for (const Kernels* table : tables()) {
    for (const size_t n : kSizes) {
      auto target = normals<T>(n, 13);
      const auto before = target, online = normals<T>(n, 14);
      ops_of<T>(*table).update_targets(target.data(), online.data(), n, 0.005);
      for (size_t i = 0; i < n; ++i) {
        CHECK(std::abs(target[i] - (0.005 * online[i] + 0.995 * before[i])) <= 1e-6 * (1 + std::abs(before[i])));
      }
    }
  }
}
