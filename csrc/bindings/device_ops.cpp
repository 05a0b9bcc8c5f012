// The fused operations on a device for Python: addresses of dense arrays as integers, 0 for an absent one. `kinds` says
// what the arrays hold, two bits each (device::Number), in the order of the arguments. angle_rl.ops checks them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstddef>
#include <vector>

#include "bindings/device.h"
#include "cuda/ops_params.h"

namespace py = pybind11;

namespace angle {
namespace {

using namespace device;

// Takes addresses with their kinds, from the first one on.
class Kinds {
 public:
  explicit Kinds(uint64_t bits) : bits_(bits), wide_((bits & 3) == static_cast<uint64_t>(Number::kDouble)) {}
  NumbersIn in(uintptr_t address) { return {at<const void>(address), next()}; }
  NumbersOut out(uintptr_t address) { return {at<void>(address), next()}; }
  // Whether the first one was float64, as all are then.
  uint32_t wide() const { return wide_ ? 1 : 0; }

 private:
  Number next() {
    const Number kind = static_cast<Number>(bits_ & 3);
    bits_ >>= 2;
    return kind;
  }
  uint64_t bits_;
  bool wide_;
};

void twin_q_target(uintptr_t rewards, uintptr_t discounts, uintptr_t next_q, uintptr_t next_log_prob,
                   uintptr_t entropy_coefficient, uintptr_t td_target, uint64_t kinds, double coefficient,
                   uint64_t critics, uint64_t batch, uintptr_t stream) {
  Kinds of(kinds);
  TwinTargetParams p{};
  p.rewards = of.in(rewards);
  p.discounts = of.in(discounts);
  p.next_q = of.in(next_q);
  p.next_log_prob = of.in(next_log_prob);
  p.entropy_coefficient = of.in(entropy_coefficient);
  p.td_target = of.out(td_target);
  p.coefficient = coefficient;
  p.critics = critics;
  p.batch = batch;
  p.wide = of.wide();
  check_launch(angle_op_twin_q_target(&p, at<void>(stream)), "twin_q_target");
}

void twin_q_loss(uintptr_t q, uintptr_t td_target, uintptr_t importance_weights, uintptr_t loss, uintptr_t td_error,
                 uintptr_t q_gradient, uint64_t kinds, uintptr_t sums, double huber_delta, uint64_t critics,
                 uint64_t batch, uintptr_t stream) {
  Kinds of(kinds);
  TwinLossParams p{};
  p.q = of.in(q);
  p.td_target = of.in(td_target);
  p.importance_weights = of.in(importance_weights);
  p.loss = of.out(loss);
  p.td_error = of.out(td_error);
  p.q_gradient = of.out(q_gradient);
  p.sums = at<double>(sums);
  p.huber_delta = huber_delta;
  p.critics = critics;
  p.batch = batch;
  p.wide = of.wide();
  check_launch(angle_op_twin_q_loss(&p, at<void>(stream)), "twin_q_loss");
}

void squashed_gaussian(uintptr_t mean, uintptr_t log_std, uintptr_t noise, uintptr_t actions, uintptr_t spread,
                       uintptr_t log_prob, uint64_t kinds, uint64_t rows, uint64_t columns, uintptr_t stream) {
  Kinds of(kinds);
  SquashedGaussianParams p{};
  p.mean = of.in(mean);
  p.log_std = of.in(log_std);
  p.noise = of.in(noise);
  p.actions = of.out(actions);
  p.spread = of.out(spread);
  p.log_prob = of.out(log_prob);
  p.rows = rows;
  p.columns = columns;
  p.wide = of.wide();
  check_launch(angle_op_squashed_gaussian(&p, at<void>(stream)), "squashed_gaussian");
}

void squashed_gaussian_gradient(uintptr_t actions, uintptr_t spread, uintptr_t actions_gradient,
                                uintptr_t log_prob_gradient, uintptr_t mean_gradient, uintptr_t log_std_gradient,
                                uint64_t kinds, uint64_t rows, uint64_t columns, uintptr_t stream) {
  Kinds of(kinds);
  SquashedGaussianGradientParams p{};
  p.actions = of.in(actions);
  p.spread = of.in(spread);
  p.actions_gradient = of.in(actions_gradient);
  p.log_prob_gradient = of.in(log_prob_gradient);
  p.mean_gradient = of.out(mean_gradient);
  p.log_std_gradient = of.out(log_std_gradient);
  p.rows = rows;
  p.columns = columns;
  p.wide = of.wide();
  check_launch(angle_op_squashed_gaussian_gradient(&p, at<void>(stream)), "squashed_gaussian_gradient");
}

// As many launches as the tensors fill, by kTensorsAtOnce.
void update_targets(const std::vector<uintptr_t>& targets, const std::vector<uintptr_t>& online,
                    const std::vector<uint64_t>& sizes, uint64_t kind, double tau, uintptr_t stream) {
  if (targets.size() != online.size() || targets.size() != sizes.size()) {
    throw py::value_error("targets, online and sizes must have one entry per tensor");
  }
  UpdateTargetsParams p{};
  p.kind = static_cast<Number>(kind);
  p.tau = tau;
  const auto flush = [&] {
    if (p.tensors != 0) check_launch(angle_op_update_targets(&p, at<void>(stream)), "update_targets");
    p.tensors = 0;
  };
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) continue;
    const uint32_t t = p.tensors;
    p.targets[t] = at<void>(targets[i]);
    p.online[t] = at<const void>(online[i]);
    p.sizes[t] = sizes[i];
    p.first_block[t + 1] = p.first_block[t] + static_cast<uint32_t>((sizes[i] + kNumbersOfBlock - 1) / kNumbersOfBlock);
    p.tensors = t + 1;
    if (p.tensors == kTensorsAtOnce) flush();
  }
  flush();
}

}  // namespace

void bind_device_ops(py::module_& m) {
  using py::arg;
  m.attr("LOSS_ROWS") = kLossRows;
  m.def("twin_q_target", &twin_q_target, arg("rewards"), arg("discounts"), arg("next_q"), arg("next_log_prob"),
        arg("entropy_coefficient"), arg("td_target"), arg("kinds"), arg("coefficient"), arg("critics"), arg("batch"),
        arg("stream"),
        "rewards + discounts * (min over critics of next_q - entropy term); `coefficient` where entropy_coefficient is "
        "0.");
  m.def("twin_q_loss", &twin_q_loss, arg("q"), arg("td_target"), arg("importance_weights"), arg("loss"),
        arg("td_error"), arg("q_gradient"), arg("kinds"), arg("sums"), arg("huber_delta"), arg("critics"), arg("batch"),
        arg("stream"),
        "Loss, |td error| and the loss's gradient by q; huber_delta 0: squared error. sums: one float64 for every "
        "LOSS_ROWS rows or part of them, 0 where these are one.");
  m.def("squashed_gaussian", &squashed_gaussian, arg("mean"), arg("log_std"), arg("noise"), arg("actions"),
        arg("spread"), arg("log_prob"), arg("kinds"), arg("rows"), arg("columns"), arg("stream"),
        "Actions tanh(mean + exp(log_std) * noise) and their log-density.");
  m.def("squashed_gaussian_gradient", &squashed_gaussian_gradient, arg("actions"), arg("spread"),
        arg("actions_gradient"), arg("log_prob_gradient"), arg("mean_gradient"), arg("log_std_gradient"), arg("kinds"),
        arg("rows"), arg("columns"), arg("stream"), "Gradients by mean and log_std.");
  m.def("update_targets", &update_targets, arg("targets"), arg("online"), arg("sizes"), arg("kind"), arg("tau"),
        arg("stream"), "target = tau * online + (1 - tau) * target, for every array of the lists.");
}

}  // namespace angle
