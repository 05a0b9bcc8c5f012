// The fused operations for Python: addresses of dense arrays as integers, 0 for an absent one. angle_rl.ops
// checks them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "kernels/kernels.h"

namespace py = pybind11;

namespace angle {
namespace {

constexpr size_t kWorthReleasing = size_t{1} << 17;  // elements that take well above 50 us

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
const OpsKernelsOf<T>& table() {
  if constexpr (sizeof(T) == sizeof(float))
    return kernels().ops.f32;
  else
    return kernels().ops.f64;
}

// Runs `work`, without the interpreter's lock when it is long.
template <typename Work>
void run(size_t elements, const Work& work) {
  if (elements < kWorthReleasing) {
    work();
  } else {
    py::gil_scoped_release unlocked;
    work();
  }
}

template <typename T>
void twin_q_target(uintptr_t rewards, uintptr_t discounts, uintptr_t next_q, uintptr_t next_log_prob,
                   double entropy_coefficient, uintptr_t td_target, size_t critics, size_t batch) {
  const TwinTarget<T> arguments{
      at<T>(rewards),   at<T>(discounts), at<T>(next_q), at<T>(next_log_prob), static_cast<T>(entropy_coefficient),
      at<T>(td_target), critics,          batch};
  run(critics * batch, [&] { table<T>().twin_q_target(arguments); });
}

template <typename T>
void twin_q_loss(uintptr_t q, uintptr_t td_target, uintptr_t importance_weights, double huber_delta, uintptr_t loss,
                 uintptr_t td_error, uintptr_t q_gradient, size_t critics, size_t batch) {
  const TwinLoss<T> arguments{at<T>(q),    at<T>(td_target), at<T>(importance_weights), static_cast<T>(huber_delta),
                              at<T>(loss), at<T>(td_error),  at<T>(q_gradient),         critics,
                              batch};
  run(critics * batch, [&] { table<T>().twin_q_loss(arguments); });
}

template <typename T>
void squashed_gaussian(uintptr_t mean, uintptr_t log_std, uintptr_t noise, uintptr_t actions, uintptr_t spread,
                       uintptr_t log_prob, size_t rows, size_t columns) {
  const SquashedGaussian<T> arguments{at<T>(mean),   at<T>(log_std),  at<T>(noise), at<T>(actions),
                                      at<T>(spread), at<T>(log_prob), rows,         columns};
  run(4 * rows * columns, [&] { table<T>().squashed_gaussian(arguments); });
}

template <typename T>
void squashed_gaussian_gradient(uintptr_t actions_gradient, uintptr_t log_prob_gradient, uintptr_t actions,
                                uintptr_t spread, uintptr_t mean_gradient, uintptr_t log_std_gradient, size_t rows,
                                size_t columns) {
  const SquashedGaussianGradient<T> arguments{
      at<T>(actions_gradient), at<T>(log_prob_gradient), at<T>(actions), at<T>(spread),
      at<T>(mean_gradient),    at<T>(log_std_gradient),  rows,           columns};
  run(rows * columns, [&] { table<T>().squashed_gaussian_gradient(arguments); });
}

template <typename T>
void update_targets(const std::vector<uintptr_t>& targets, const std::vector<uintptr_t>& online,
                    const std::vector<size_t>& sizes, double tau) {
  if (targets.size() != online.size() || targets.size() != sizes.size()) {
    throw py::value_error("targets, online and sizes must have one entry per tensor");
  }
  size_t total = 0;
  for (const size_t size : sizes) total += size;
  run(total, [&] {
    for (size_t i = 0; i < sizes.size(); ++i) {
      table<T>().update_targets(at<T>(targets[i]), at<T>(online[i]), sizes[i], tau);
    }
  });
}

template <typename T>
void bind_type(py::module_& m, const std::string& suffix) {
  const auto def = [&](const char* name, auto* function, const char* doc, auto... names) {
    m.def((name + suffix).c_str(), function, names..., doc);
  };
  using py::arg;
  def("twin_q_target_", &twin_q_target<T>, "rewards + discounts * (min over critics of next_q - entropy term).",
      arg("rewards"), arg("discounts"), arg("next_q"), arg("next_log_prob"), arg("entropy_coefficient"),
      arg("td_target"), arg("critics"), arg("batch"));
  def("twin_q_loss_", &twin_q_loss<T>, "Loss, |td error| and the loss's gradient by q; huber_delta 0: squared error.",
      arg("q"), arg("td_target"), arg("importance_weights"), arg("huber_delta"), arg("loss"), arg("td_error"),
      arg("q_gradient"), arg("critics"), arg("batch"));
  def("squashed_gaussian_", &squashed_gaussian<T>, "Actions tanh(mean + exp(log_std) * noise) and their log-density.",
      arg("mean"), arg("log_std"), arg("noise"), arg("actions"), arg("spread"), arg("log_prob"), arg("rows"),
      arg("columns"));
  def("squashed_gaussian_gradient_", &squashed_gaussian_gradient<T>, "Gradients by mean and log_std.",
      arg("actions_gradient"), arg("log_prob_gradient"), arg("actions"), arg("spread"), arg("mean_gradient"),
      arg("log_std_gradient"), arg("rows"), arg("columns"));
  def("update_targets_", &update_targets<T>,
      "target = tau * online + (1 - tau) * target, for every array of the lists.", arg("targets"), arg("online"),
      arg("sizes"), arg("tau"));
}

}  // namespace

void bind_ops(py::module_& m) {
  bind_type<float>(m, "f32");
  bind_type<double>(m, "f64");
}

}  // namespace angle
