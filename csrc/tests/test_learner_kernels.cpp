// What a learner's update does besides products, elementwise and in sums: every ISA against long double.
#include <algorithm>
#include <numbers>

#include "doctest.h"
#include "learner_checks.h"
#include "tables.h"

using namespace angle;
using namespace angle::testing;

namespace {

constexpr Activation kActivations[] = {Activation::kNone, Activation::kRelu, Activation::kTanh, Activation::kSilu,
                                       Activation::kGelu};

Real normal_share(Real x) { return std::erfc(-x * std::numbers::sqrt2_v<Real> / 2) / 2; }

Real activated(Activation kind, Real x) {
  switch (kind) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return x < 0 ? 0 : x;
    case Activation::kTanh:
      return std::tanh(x);
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kGelu:
      return x * normal_share(x);
  }
  return 0;
}

Real slope(Activation kind, Real x) {
  switch (kind) {
    case Activation::kNone:
      return 1;
    case Activation::kRelu:
      return x > 0 ? 1 : 0;
    case Activation::kTanh:
      return 1 / (std::cosh(x) * std::cosh(x));
    case Activation::kSilu: {
      const Real s = 1 / (1 + std::exp(-x));
      return s * (1 + x * (1 - s));
    }
    case Activation::kGelu:
      return normal_share(x) + x * std::exp(-x * x / 2) / std::sqrt(2 * std::numbers::pi_v<Real>);
  }
  return 0;
}

// A grid over what layers see, both signs, and far beyond it.
template <class T>
std::vector<T> inputs() {
  std::vector<T> values;
  for (int i = -5000; i <= 5000; ++i) values.push_back(static_cast<T>(i * 0.00237));
  for (const double x : {1e-30, 1e-10, 1e-4, 14.0, 20.0, 40.0, 80.0, 87.0, 1e3, 1e10, 1e30}) {
    values.push_back(static_cast<T>(x));
    values.push_back(static_cast<T>(-x));
  }
  return values;
}

}  // namespace

TEST_CASE_TEMPLATE("row sums", T, float, double) {
  for (const Kernels* table : tables()) {
    Worst worst;
    for (const size_t columns : kSizes) {
      for (const size_t rows : {1u, 3u, 8u, 17u}) {
        const Matrix<T> in(rows, columns, rows % 5, columns, 1.0, 0.3);
        std::vector<T> out(rows + 1, kCanary<T>);
        learner_of<T>(*table).row_sums(in.data(), in.pitch, out.data(), rows, columns);
        for (size_t i = 0; i < rows; ++i) {
          Real sum = 0, sizes = 0;
          for (size_t j = 0; j < columns; ++j) {
            sum += in(i, j);
            sizes += std::abs(in(i, j));
          }
          worst.see(out[i], sum, sizes);
        }
        CHECK(out[rows] == kCanary<T>);
      }
    }
    CHECK(worst.error <= tolerance<T>(2e-7));
  }
}

TEST_CASE_TEMPLATE("columns are taken in any order, and any number of times", T, float, double) {
  for (const Kernels* table : tables()) {
    for (const size_t columns : kSizes) {
      const Matrix<T> in(5, columns, columns % 3, columns);
      std::mt19937_64 random(columns);
      std::vector<std::vector<uint32_t>> choices(8);
      for (uint32_t j = 0; j < columns; ++j) {
        if (random() % 2 == 0) choices[1].push_back(j);
        if (random() % 16 == 0) choices[2].push_back(j);
        choices[3].push_back(j);
        choices[4].push_back(static_cast<uint32_t>(columns - 1 - j));
        choices[5].push_back(static_cast<uint32_t>(random() % columns));
        choices[6].push_back(j / 3);
      }
      choices[7].assign(3 * columns + 1, static_cast<uint32_t>(columns / 2));
      for (const auto& chosen : choices) {
        Matrix<T> out(5, chosen.size(), columns % 2);
        learner_of<T>(*table).take_columns(in.data(), in.pitch, out.data(), out.pitch, 5, chosen.data(), chosen.size());
        bool right = out.pitch == 0 || out.untouched_beyond();
        for (size_t i = 0; i < 5; ++i) {
          for (size_t j = 0; j < chosen.size(); ++j) right &= out(i, j) == in(i, chosen[j]);
        }
        CHECK(right);
      }
    }
  }
}

TEST_CASE_TEMPLATE("activations, in place and not", T, float, double) {
  const std::vector<T> x = inputs<T>();
  for (const Kernels* table : tables()) {
    for (const Activation kind : kActivations) {
      CAPTURE(static_cast<int>(kind));
      std::vector<T> out(x.size()), same = x;
      learner_of<T>(*table).activate(kind, x.data(), out.data(), x.size());
      learner_of<T>(*table).activate(kind, same.data(), same.data(), x.size());
      Worst near, far;
      for (size_t i = 0; i < x.size(); ++i) {
        const Real expected = activated(kind, x[i]);
        CHECK(out[i] == same[i]);
        // Relative where the result is a normal number and the input not far out in a tail.
        if (std::abs(x[i]) < 5) near.see(out[i], expected, std::abs(expected) + Real{1e-300});
        far.see(out[i], expected, 1 + std::abs(expected));
      }
      CHECK(near.error <= tolerance<T>(2e-6));
      CHECK(far.error <= tolerance<T>(3e-7));
      for (const size_t n : kSizes) {
        std::vector<T> part(n + 1, kCanary<T>);
        learner_of<T>(*table).activate(kind, x.data() + 4000, part.data(), n);
        for (size_t i = 0; i < n; ++i) CHECK(std::abs(part[i] - out[4000 + i]) <= T(1e-6) * std::abs(part[i]));
        CHECK(part[n] == kCanary<T>);
      }
      T odd = std::numeric_limits<T>::quiet_NaN();
      learner_of<T>(*table).activate(kind, &odd, &odd, 1);
      CHECK(std::isnan(odd));
    }
  }
}

TEST_CASE_TEMPLATE("activations' gradients", T, float, double) {
  const std::vector<T> x = inputs<T>();
  for (const Kernels* table : tables()) {
    for (const Activation kind : kActivations) {
      CAPTURE(static_cast<int>(kind));
      const std::vector<T> given = normals<T>(x.size(), 3);
      std::vector<T> gradient = given;
      gradient.push_back(kCanary<T>);
      learner_of<T>(*table).activate_gradient(kind, x.data(), gradient.data(), x.size());
      Worst worst;
      for (size_t i = 0; i < x.size(); ++i) {
        worst.see(gradient[i], given[i] * slope(kind, x[i]), std::abs(given[i]));
      }
      CHECK(worst.error <= tolerance<T>(6e-7));
      CHECK(gradient[x.size()] == kCanary<T>);
      for (const size_t n : kSizes) {
        std::vector<T> part(given.begin() + 4000, given.begin() + 4000 + static_cast<long>(n));
        part.push_back(kCanary<T>);
        learner_of<T>(*table).activate_gradient(kind, x.data() + 4000, part.data(), n);
        for (size_t i = 0; i < n; ++i)
          CHECK(std::abs(part[i] - gradient[4000 + i]) <= T(1e-6) * std::abs(given[4000 + i]));
        CHECK(part[n] == kCanary<T>);
      }
    }
  }
}

TEST_CASE_TEMPLATE("Adam's and AdamW's steps, with the target's beside them", T, float, double) {
  constexpr double kRate = 3e-3, kBeta1 = 0.9, kBeta2 = 0.999, kSmall = 1e-8, kTau = 0.005, kScale = 0.37;
  for (const Kernels* table : tables()) {
    for (const size_t n : kSizes) {
      for (const double weight_decay : {0.0, 0.02}) {
        for (const bool decoupled : {false, true}) {
          for (const bool with_targets : {false, true}) {
            CAPTURE(n);
            CAPTURE(decoupled);
            CAPTURE(with_targets);
            auto parameters = normals<T>(n, 1), targets = normals<T>(n, 2);
            std::vector<T> first(n, T(0)), second(n, T(0));
            for (auto* values : {&parameters, &targets, &first, &second}) values->push_back(kCanary<T>);
            for (int step = 1; step <= 5; ++step) {
              auto gradients = normals<T>(n, 10 + static_cast<uint64_t>(step), step == 3 ? 1e-4 : 1.0);
              if (step == 1) gradients[n / 2] = T(0);
              const auto was = parameters, were = targets, first_was = first, second_was = second;
              learner_of<T>(*table).adam({.parameters = parameters.data(),
                                          .gradients = gradients.data(),
                                          .first = first.data(),
                                          .second = second.data(),
                                          .n = n,
                                          .gradient_scale = kScale,
                                          .learning_rate = kRate,
                                          .beta1 = kBeta1,
                                          .beta2 = kBeta2,
                                          .epsilon = kSmall,
                                          .weight_decay = weight_decay,
                                          .decoupled = decoupled,
                                          .step = static_cast<double>(step),
                                          .targets = with_targets ? targets.data() : nullptr,
                                          .tau = kTau});
              Worst moments, moved, targets_off;
              for (size_t i = 0; i < n; ++i) {
                // Algorithm 1 of Kingma and Ba; algorithm 2 of Loshchilov and Hutter.
                Real g = Real{gradients[i]} * kScale, p = was[i];
                const Real size = std::abs(g) + (decoupled ? 0 : weight_decay * std::abs(p));
                if (decoupled) {
                  p -= kRate * weight_decay * p;
                } else {
                  g += weight_decay * p;
                }
                const Real m = kBeta1 * Real{first_was[i]} + (1 - Real{kBeta1}) * g;
                const Real v = kBeta2 * Real{second_was[i]} + (1 - Real{kBeta2}) * g * g;
                const Real m_hat = m / (1 - std::pow(kBeta1, step)), v_hat = v / (1 - std::pow(kBeta2, step));
                p -= kRate * m_hat / (std::sqrt(v_hat) + kSmall);
                moments.see(first[i], m, std::abs(Real{first_was[i]}) + size + Real{1e-300});
                moments.see(second[i], v, v + (1 - Real{kBeta2}) * size * size + Real{1e-300});
                // The step itself, and rounding the parameter.
                moved.see(parameters[i], p, std::abs(Real{was[i]}) + kRate);
                const Real target =
                    with_targets ? kTau * Real{parameters[i]} + (1 - kTau) * Real{were[i]} : Real{were[i]};
                targets_off.see(targets[i], target, std::abs(target) + std::abs(Real{parameters[i]}));
              }
              CHECK(moments.error <= tolerance<T>(4e-7));
              CHECK(moved.error <= tolerance<T>(4e-7));
              CHECK(targets_off.error <= (with_targets ? tolerance<T>(2e-7) : Real{0}));
            }
            for (const auto* values : {&parameters, &targets, &first, &second}) CHECK(values->back() == kCanary<T>);
          }
        }
      }
    }
  }
}

TEST_CASE_TEMPLATE("the sum of squares, of large numbers too, and of what is no number", T, float, double) {
  for (const Kernels* table : tables()) {
    Worst worst;
    CHECK(learner_of<T>(*table).squared_norm(nullptr, 0) == 0.0);
    for (const size_t n : kSizes) {
      for (const double scale : {1e-20, 1.0, 1e30}) {
        auto x = normals<T>(n, n, scale);
        Real expected = 0;
        for (const T value : x) expected += Real{value} * value;
        worst.see(learner_of<T>(*table).squared_norm(x.data(), n), expected, expected);
        x[n - 1] = std::numeric_limits<T>::infinity();
        CHECK(std::isinf(learner_of<T>(*table).squared_norm(x.data(), n)));
        x[n / 2] = std::numeric_limits<T>::quiet_NaN();
        CHECK(std::isnan(learner_of<T>(*table).squared_norm(x.data(), n)));
      }
    }
    CHECK(worst.error <= Real{1e-14});
  }
}
