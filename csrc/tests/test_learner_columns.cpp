// Layer norm and the squashed Gaussian, feature by feature: every ISA against long double.
#include <algorithm>
#include <array>
#include <numbers>

#include "doctest.h"
#include "learner_checks.h"
#include "tables.h"

using namespace angle;
using namespace angle::testing;

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
