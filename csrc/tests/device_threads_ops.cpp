// The fused operations and random numbers against the host's kernels: what is written element by element to the last
// bit, sums, whose order is another, nearly.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "core/philox.h"
#include "cuda/ops_params.h"
#include "cuda/random_params.h"
#include "device_threads.h"
#include "kernels/kernels.h"

namespace angle::testing {
namespace {

using namespace device;

template <class T>
const OpsKernelsOf<T>& host() {
  if constexpr (std::is_same_v<T, float>) {
    return kernels().ops.f32;
  } else {
    return kernels().ops.f64;
  }
}

template <class T>
constexpr Number kKind = std::is_same_v<T, float> ? Number::kFloat : Number::kDouble;

template <class T>
NumbersIn in(const std::vector<T>& values) {
  return {values.data(), kKind<T>};
}

template <class T>
NumbersOut out(std::vector<T>& values) {
  return {values.data(), kKind<T>};
}

template <class T>
std::vector<T> normals(uint64_t key, size_t n) {
  std::vector<T> values(n);
  philox_normal(key, values.data(), n);
  return values;
}

template <class T>
void same(const std::vector<T>& own, const std::vector<T>& theirs, const char* what) {
  require(std::memcmp(own.data(), theirs.data(), own.size() * sizeof(T)) == 0,
          std::string("that bits are the same: ") + what);
}

template <class T>
void near(const std::vector<T>& own, const std::vector<T>& theirs, const char* what) {
  const double error = std::is_same_v<T, float> ? 2e-5 : 1e-10;
  for (size_t i = 0; i < own.size(); ++i) {
    const double size = 1.0 + std::abs(static_cast<double>(own[i]));
    require(std::abs(static_cast<double>(own[i] - theirs[i])) < error * size,
            std::string("that sums are nearly the same: ") + what);
  }
}

template <class T>
void check_losses(size_t critics, size_t batch) {
  const uint32_t wide = std::is_same_v<T, double> ? 1 : 0;
  const std::vector<T> q = normals<T>(1, critics * batch), rewards = normals<T>(2, batch),
                       weights = normals<T>(3, batch);
  const T coefficient = T(0.25);

  std::vector<T> target(batch), their_target(batch);
  host<T>().twin_q_target(
      {rewards.data(), weights.data(), q.data(), rewards.data(), coefficient, target.data(), critics, batch});
  TwinTargetParams t{};
  t.rewards = t.next_log_prob = in(rewards);
  t.discounts = in(weights);
  t.next_q = in(q);
  t.td_target = out(their_target);
  t.coefficient = static_cast<double>(coefficient);
  t.critics = critics;
  t.batch = batch;
  t.wide = wide;
  require(angle_op_twin_q_target(&t, nullptr) == 0, "that it is launched");
  same(target, their_target, "target");

  for (const T delta : {T(0), T(0.5)}) {
    std::vector<T> loss(1), td_error(batch), gradient(critics * batch);
    std::vector<T> their_loss(1), their_error(batch), their_gradient(critics * batch);
    std::vector<double> sums((batch + kLossRows - 1) / kLossRows);
    host<T>().twin_q_loss({q.data(), target.data(), weights.data(), delta, loss.data(), td_error.data(),
                           gradient.data(), critics, batch});
    TwinLossParams p{};
    p.q = in(q);
    p.td_target = in(target);
    p.importance_weights = in(weights);
    p.loss = out(their_loss);
    p.td_error = out(their_error);
    p.q_gradient = out(their_gradient);
    p.sums = sums.data();
    p.huber_delta = static_cast<double>(delta);
    p.critics = critics;
    p.batch = batch;
    p.wide = wide;
    require(angle_op_twin_q_loss(&p, nullptr) == 0, "that it is launched");
    same(td_error, their_error, "td error");
    same(gradient, their_gradient, "gradient by q");
    near(loss, their_loss, "loss");
  }
}

template <class T>
void check_gaussian(size_t rows, size_t columns) {
  const uint32_t wide = std::is_same_v<T, double> ? 1 : 0;
  const size_t n = rows * columns;
  const std::vector<T> mean = normals<T>(4, n), log_std = normals<T>(5, n), noise = normals<T>(6, n);
  const std::vector<T> by_density = normals<T>(7, rows);
  std::vector<T> actions(n), spread(n), density(rows), their_actions(n), their_spread(n), their_density(rows);
  host<T>().squashed_gaussian(
      {mean.data(), log_std.data(), noise.data(), actions.data(), spread.data(), density.data(), rows, columns});
  const SquashedGaussianParams p{
      in(mean), in(log_std), in(noise), out(their_actions), out(their_spread), out(their_density), rows, columns, wide};
  require(angle_op_squashed_gaussian(&p, nullptr) == 0, "that it is launched");
  same(actions, their_actions, "actions");
  same(spread, their_spread, "spread");
  near(density, their_density, "log-density");

  std::vector<T> by_mean(n), by_log_std(n), their_mean(n), their_log_std(n);
  host<T>().squashed_gaussian_gradient({noise.data(), by_density.data(), actions.data(), spread.data(), by_mean.data(),
                                        by_log_std.data(), rows, columns});
  const SquashedGaussianGradientParams g{in(noise),          in(by_density), in(actions), in(spread), out(their_mean),
                                         out(their_log_std), rows,           columns,     wide};
  require(angle_op_squashed_gaussian_gradient(&g, nullptr) == 0, "that it is launched");
  same(by_mean, their_mean, "gradient by mean");
  same(by_log_std, their_log_std, "gradient by log_std");
}

template <class T>
void check_targets() {
  constexpr double kTau = 0.005;
  const size_t sizes[] = {1, 7, 2048, 5000};
  std::vector<std::vector<T>> moved, theirs, online;
  UpdateTargetsParams p{};
  p.kind = kKind<T>;
  p.tau = kTau;
  for (const size_t n : sizes) {
    online.push_back(normals<T>(n, n));
    moved.push_back(normals<T>(n + 1, n));
    theirs.push_back(moved.back());
    host<T>().update_targets(moved.back().data(), online.back().data(), n, kTau);
    p.targets[p.tensors] = theirs.back().data();
    p.online[p.tensors] = online.back().data();
    p.sizes[p.tensors] = n;
    p.first_block[p.tensors + 1] =
        p.first_block[p.tensors] + static_cast<uint32_t>((n + kNumbersOfBlock - 1) / kNumbersOfBlock);
    ++p.tensors;
  }
  require(angle_op_update_targets(&p, nullptr) == 0, "that it is launched");
  for (size_t i = 0; i < moved.size(); ++i) same(moved[i], theirs[i], "targets");
}

void check_random(size_t n) {
  const int64_t key = -77;
  const uint64_t bits = static_cast<uint64_t>(key);
  std::vector<float> narrow(n);
  std::vector<double> wide(n), uniform(n);
  const DrawParams p{&key, narrow.data(), n}, q{&key, wide.data(), n}, r{&key, uniform.data(), n};
  require(angle_random_normals_f32(&p, nullptr) == 0, "that it is launched");
  require(angle_random_normals_f64(&q, nullptr) == 0, "that it is launched");
  require(angle_random_uniforms(&r, nullptr) == 0, "that it is launched");
  same(normals<float>(bits, n), narrow, "normals");
  same(normals<double>(bits, n), wide, "normals");
  std::vector<double> expected(n);
  philox_uniform(bits, expected.data(), n);
  same(expected, uniform, "uniforms");
}

}  // namespace

void check_ops() {
  for (const auto& [rows, columns] : {std::pair<size_t, size_t>{1, 1}, {33, 3}, {400, 2}}) {
    present() = "operations of " + std::to_string(rows) + " rows and " + std::to_string(columns) + " columns";
    check_losses<float>(columns, rows);
    check_losses<double>(columns, rows);
    check_gaussian<float>(rows, columns);
    check_gaussian<double>(rows, columns);
  }
  present() = "a loss of several blocks";
  check_losses<float>(2, 3 * kLossRows + 1);
  present() = "a row for each warp";
  check_gaussian<float>(9, 70);
  present() = "targets";
  check_targets<float>();
  check_targets<double>();
  for (const size_t n : {1, 7, 2000}) {
    present() = std::to_string(n) + " random numbers";
    check_random(n);
  }
}

}  // namespace angle::testing
