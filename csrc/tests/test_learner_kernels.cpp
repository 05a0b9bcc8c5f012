// What a learner's update does besides products: every kernel on every ISA against long double, at sizes that leave
// every kind of tail, with pitches beyond the rows and canaries there.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numbers>
#include <random>
#include <type_traits>
#include <vector>

#include "doctest.h"
#include "kernels/kernels.h"
#include "tables.h"

using namespace angle;
using angle::testing::tables;

namespace {

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
constexpr T kCanary = T(-12345);

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

constexpr size_t kSizes[] = {1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 100, 257, 530};
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

namespace {

constexpr std::array<size_t, 2> kNormShapes[] = {{1, 1},   {2, 3},   {7, 16},   {16, 17},
                                                 {17, 31}, {33, 64}, {64, 257}, {300, 40}};
constexpr double kEpsilon = 1e-5;

}  // namespace

TEST_CASE_TEMPLATE("layer norm over features, also far from zero and of equal features", T, float, double) {
  for (const Kernels* table : tables()) {
    for (const auto& [features, batch] : kNormShapes) {
      CAPTURE(features);
      CAPTURE(batch);
      for (const int kind : {0, 1, 2, 3}) {  // plain, scaled and in place, far from zero, all features equal
        CAPTURE(kind);
        const double offset = kind == 2 ? 1000.0 : 0.1, spread = kind == 3 ? 0.0 : 1.0;
        const Matrix<T> x(features, batch, batch % 4, features + batch, spread, offset);
        const auto scale = normals<T>(features, 1), shift = normals<T>(features, 2);
        const bool scaled = kind == 1;
        Matrix<T> y = scaled ? x : Matrix<T>(features, batch, 1), normal(features, batch, 2);
        std::vector<T> inverse(batch + 1, kCanary<T>);
        learner_of<T>(*table).layer_norm({.x = scaled ? y.data() : x.data(),
                                          .x_row = x.pitch,
                                          .scale = scaled ? scale.data() : nullptr,
                                          .shift = scaled ? shift.data() : nullptr,
                                          .epsilon = kEpsilon,
                                          .y = y.data(),
                                          .y_row = y.pitch,
                                          .normal = normal.data(),
                                          .normal_row = normal.pitch,
                                          .inverse = inverse.data(),
                                          .features = features,
                                          .batch = batch});
        Worst normals_off, y_off, inverse_off;
        for (size_t j = 0; j < batch; ++j) {
          Real mean = 0, squares = 0;
          for (size_t i = 0; i < features; ++i) mean += x(i, j) / Real(features);
          for (size_t i = 0; i < features; ++i) squares += (x(i, j) - mean) * (x(i, j) - mean) / Real(features);
          const Real expected = 1 / std::sqrt(squares + Real{kEpsilon});
          // What rounding the inputs' mean to T leaves of a difference, in units of the result.
          const Real leaves = 1 + expected * std::abs(mean);
          inverse_off.see(inverse[j], expected, expected * leaves);
          for (size_t i = 0; i < features; ++i) {
            const Real value = (x(i, j) - mean) * expected;
            normals_off.see(normal(i, j), value, leaves + std::abs(value));
            const Real factor = scaled ? scale[i] : T(1), added = scaled ? shift[i] : T(0);
            y_off.see(y(i, j), value * factor + added, (leaves + std::abs(value)) * (1 + std::abs(factor)));
          }
        }
        CHECK(inverse_off.error <= tolerance<T>(3e-7));
        CHECK(normals_off.error <= tolerance<T>(3e-7));
        CHECK(y_off.error <= tolerance<T>(3e-7));
        CHECK(inverse[batch] == kCanary<T>);
        CHECK(y.untouched_beyond());
        CHECK(normal.untouched_beyond());
      }
    }
  }
}

TEST_CASE_TEMPLATE("layer norm's gradient", T, float, double) {
  for (const Kernels* table : tables()) {
    for (const auto& [features, batch] : kNormShapes) {
      CAPTURE(features);
      CAPTURE(batch);
      for (const bool scaled : {false, true}) {  // the scaled one in place and with the parameters' gradients
        const Matrix<T> given(features, batch, batch % 4, features, 1.0, 0.2), normal(features, batch, 3, batch);
        const auto scale = normals<T>(features, 1);
        auto inverse = normals<T>(batch, 2);
        for (auto& value : inverse) value = std::abs(value) + T(0.1);
        Matrix<T> out = scaled ? given : Matrix<T>(features, batch, 1);
        std::vector<T> by_scale(features + 1, kCanary<T>), by_shift(features + 1, kCanary<T>);
        learner_of<T>(*table).layer_norm_gradient({.y_gradient = scaled ? out.data() : given.data(),
                                                   .y_row = given.pitch,
                                                   .normal = normal.data(),
                                                   .normal_row = normal.pitch,
                                                   .inverse = inverse.data(),
                                                   .scale = scaled ? scale.data() : nullptr,
                                                   .x_gradient = out.data(),
                                                   .x_row = out.pitch,
                                                   .scale_gradient = scaled ? by_scale.data() : nullptr,
                                                   .shift_gradient = scaled ? by_shift.data() : nullptr,
                                                   .features = features,
                                                   .batch = batch});
        Worst by_x, by_parameters;
        for (size_t j = 0; j < batch; ++j) {
          Real sum = 0, along = 0, size = 0, size_along = 0;
          for (size_t i = 0; i < features; ++i) {
            const Real g = given(i, j) * Real(scaled ? scale[i] : T(1));
            sum += g / Real(features);
            along += g * normal(i, j) / Real(features);
            size += std::abs(g) / Real(features);
            size_along += std::abs(g * normal(i, j)) / Real(features);
          }
          for (size_t i = 0; i < features; ++i) {
            const Real g = given(i, j) * Real(scaled ? scale[i] : T(1));
            const Real magnitude = std::abs(g) + size + std::abs(normal(i, j)) * size_along;
            by_x.see(out(i, j), inverse[j] * (g - sum - normal(i, j) * along), inverse[j] * magnitude);
          }
        }
        CHECK(by_x.error <= tolerance<T>(6e-7));
        CHECK(out.untouched_beyond());
        if (scaled) {
          for (size_t i = 0; i < features; ++i) {
            Real sum = 0, along = 0, size = 0, size_along = 0;
            for (size_t j = 0; j < batch; ++j) {
              sum += given(i, j);
              along += Real{given(i, j)} * normal(i, j);
              size += std::abs(given(i, j));
              size_along += std::abs(Real{given(i, j)} * normal(i, j));
            }
            by_parameters.see(by_shift[i], sum, size);
            by_parameters.see(by_scale[i], along, size_along);
          }
          CHECK(by_parameters.error <= tolerance<T>(3e-7));
          CHECK(by_scale[features] == kCanary<T>);
          CHECK(by_shift[features] == kCanary<T>);
        }
      }
    }
  }
}

TEST_CASE_TEMPLATE("a squashed sample feature by feature, its density and their gradient", T, float, double) {
  constexpr double kLow = -1.5, kHigh = 0.75, kByLogProb = -0.37;
  for (const Kernels* table : tables()) {
    for (const size_t batch : kSizes) {
      for (const size_t columns : {1u, 3u, 6u, 17u}) {
        CAPTURE(batch);
        CAPTURE(columns);
        const size_t beyond = batch % 3;
        const Matrix<T> mean(columns, batch, beyond, 1, 2.0), log_std(columns, batch, beyond, 2);
        const std::vector<T> noise = normals<T>(batch * columns, 3);
        Matrix<T> actions(columns, batch, 2), spread(columns, batch, 2);
        std::vector<T> log_prob(batch + 1, kCanary<T>);
        learner_of<T>(*table).gaussian_columns({.mean = mean.data(),
                                                .log_std = log_std.data(),
                                                .row = mean.pitch,
                                                .log_std_low = T(kLow),
                                                .log_std_high = T(kHigh),
                                                .noise = noise.data(),
                                                .actions = actions.data(),
                                                .spread = spread.data(),
                                                .out_row = actions.pitch,
                                                .log_prob = log_prob.data(),
                                                .columns = columns,
                                                .batch = batch});
        const Matrix<T> given(columns, batch, 5, 4);
        Matrix<T> by_mean(columns, batch, beyond), by_log_std(columns, batch, beyond);
        learner_of<T>(*table).gaussian_columns_gradient({.actions_gradient = given.data(),
                                                         .gradient_row = given.pitch,
                                                         .log_prob_gradient = T(kByLogProb),
                                                         .actions = actions.data(),
                                                         .spread = spread.data(),
                                                         .out_row = actions.pitch,
                                                         .log_std = log_std.data(),
                                                         .row = mean.pitch,
                                                         .log_std_low = T(kLow),
                                                         .log_std_high = T(kHigh),
                                                         .mean_gradient = by_mean.data(),
                                                         .log_std_gradient = by_log_std.data(),
                                                         .columns = columns,
                                                         .batch = batch});
        Worst sample, density, gradient;
        for (size_t j = 0; j < batch; ++j) {
          Real expected = 0, size = 1;
          for (size_t i = 0; i < columns; ++i) {
            const Real before = log_std(i, j), used = std::clamp<Real>(before, T(kLow), T(kHigh));
            const Real drawn = noise[j * columns + i], step = std::exp(used) * drawn, u = mean(i, j) + step;
            const Real action = std::tanh(u);
            sample.see(spread(i, j), step, std::abs(step));
            sample.see(actions(i, j), action, 1);
            // log(1 - tanh(u)^2) = 2 (log 2 - |u| - log(1 + e^-2|u|))
            const Real squash = 2 * (std::numbers::ln2_v<Real> - std::abs(u) - std::log1p(std::exp(-2 * std::abs(u))));
            const Real part = -drawn * drawn / 2 - used - std::log(2 * std::numbers::pi_v<Real>) / 2 - squash;
            expected += part;
            size += std::abs(part) + drawn * drawn / 2 + std::abs(u);
            const Real by_u = given(i, j) * (1 - action * action) + T(kByLogProb) * 2 * action;
            const bool inside = before == used;
            gradient.see(by_mean(i, j), by_u, 1 + std::abs(given(i, j)));
            gradient.see(by_log_std(i, j), inside ? by_u * step - T(kByLogProb) : 0,
                         (1 + std::abs(given(i, j))) * (1 + std::abs(step)));
          }
          density.see(log_prob[j], expected, size);
        }
        CHECK(sample.error <= tolerance<T>(4e-7));
        CHECK(density.error <= tolerance<T>(4e-7));
        CHECK(gradient.error <= tolerance<T>(1e-6));
        CHECK(log_prob[batch] == kCanary<T>);
        for (const Matrix<T>* out : {&actions, &spread, &by_mean, &by_log_std}) CHECK(out->untouched_beyond());
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
