// The learner for Python: addresses in, angle_rl.engines.native checks them. The interpreter's lock is let go for the
// whole call.
#include "learner/learner.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/draw.h"

namespace py = pybind11;

namespace angle {
namespace {

using Addresses = std::vector<uintptr_t>;
using Numbers = py::array_t<double, py::array::c_style>;
using Options = py::typing::Dict<py::str, py::object>;
using Outcome = py::typing::Tuple<py::int_, py::int_, py::float_, py::object>;

template <class Value>
Value option(const py::dict& options, const char* name) {
  if (!options.contains(name)) throw std::invalid_argument(std::string("the learner's options lack ") + name);
  return options[name].cast<Value>();
}

NetworkShape shape_from(const py::dict& given) {
  NetworkShape shape;
  shape.sizes = option<std::vector<size_t>>(given, "sizes");
  shape.activation = static_cast<Activation>(option<int>(given, "activation"));
  shape.layer_norm = option<bool>(given, "layer_norm");
  shape.norm_epsilon = option<double>(given, "norm_epsilon");
  shape.hidden_end = option<bool>(given, "hidden_end");
  return shape;
}

LearnerOptions options_from(const py::dict& given) {
  LearnerOptions options;
  options.batch = option<size_t>(given, "batch");
  options.observation_dim = option<size_t>(given, "observation_dim");
  options.next_value = static_cast<NextValue>(option<int>(given, "next_value"));
  options.policy_loss = static_cast<PolicyLoss>(option<int>(given, "policy_loss"));
  for (const py::dict& network : option<std::vector<py::dict>>(given, "networks")) {
    options.networks.push_back(shape_from(network));
  }
  options.prioritized = option<bool>(given, "prioritized");
  options.writes_priorities = option<bool>(given, "writes_priorities");
  options.targets_follow = static_cast<TargetsFollow>(option<int>(given, "targets_follow"));
  options.tau = option<double>(given, "tau");
  options.huber_delta = option<double>(given, "huber_delta");
  options.max_gradient_norm = option<double>(given, "max_gradient_norm");
  options.threads = option<size_t>(given, "threads");
  options.bfloat16 = option<bool>(given, "bfloat16");
  if (options.next_value == NextValue::kDouble || options.next_value == NextValue::kMaximum) {
    options.first_action = option<int64_t>(given, "first_action");
    options.critics = 1;
    return options;
  }
  options.action_dim = option<size_t>(given, "action_dim");
  options.critics = option<size_t>(given, "critics");
  options.critic_subset = option<size_t>(given, "critic_subset");
  options.target_policy = option<bool>(given, "target_policy");
  options.fresh_policy_batch = option<bool>(given, "fresh_policy_batch");
  options.target_noise = option<double>(given, "target_noise");
  options.target_noise_clip = option<double>(given, "target_noise_clip");
  options.learns_entropy = option<bool>(given, "learns_entropy");
  options.target_entropy = option<double>(given, "target_entropy");
  options.log_std_low = option<double>(given, "log_std_low");
  options.log_std_high = option<double>(given, "log_std_high");
  options.scale = option<std::vector<double>>(given, "scale");
  options.center = option<std::vector<double>>(given, "center");
  options.low = option<std::vector<double>>(given, "low");
  options.high = option<std::vector<double>>(given, "high");
  options.half_range = option<std::vector<double>>(given, "half_range");
  return options;
}

// Reads addresses one after the other.
class Reader {
 public:
  Reader(const Addresses& addresses, const Numbers& groups)
      : next_(addresses.data()),
        end_(next_ + addresses.size()),
        group_(groups.data()),
        end_group_(group_ + groups.size()) {}

  template <class T>
  T* address() {
    if (next_ == end_) throw std::invalid_argument("too few addresses");
    return reinterpret_cast<T*>(*next_++);
  }
  AdamGroup group() {
    if (end_group_ - group_ < 6) throw std::invalid_argument("too few numbers of Adam");
    const double* const g = std::exchange(group_, group_ + 6);
    return {g[0], g[1], g[2], g[3], g[4], g[5] != 0.0};
  }
  template <class T>
  AdamSlot<T> slot() {
    AdamSlot<T> slot;
    slot.value = address<T>();
    slot.first = address<T>();
    slot.second = address<T>();
    slot.steps = address<float>();
    slot.target = address<T>();
    slot.group = group();
    return slot;
  }

 private:
  const uintptr_t* next_;
  const uintptr_t* end_;
  const double* group_;
  const double* end_group_;
};

template <class T>
void read_network(Reader& from, const NetworkShape& shape, typename LearnerTensors<T>::Network& network) {
  network.slots.clear();
  network.layers.clear();
  network.targets.clear();
  for (size_t l = 0; l < shape.layers(); ++l) {
    LayerTensors<T> own, target;
    const auto take = [&](T*& value, T*& slow) {
      network.slots.push_back(from.slot<T>());
      value = network.slots.back().value;
      slow = network.slots.back().target;
    };
    take(own.weight, target.weight);
    take(own.bias, target.bias);
    if (shape.layer_norm && shape.hidden(l)) {
      take(own.scale, target.scale);
      take(own.shift, target.shift);
    }
    network.layers.push_back(own);
    network.targets.push_back(target);
  }
}

class PyLearner {
 public:
  PyLearner(py::handle replay, bool is_double, const Options& options, const std::vector<int>& kinds)
      : options_(options_from(options)), is_double_(is_double) {
    if (kinds.size() != 4) throw std::invalid_argument("a batch has four fields");
    for (size_t f = 0; f < 4; ++f) batch_.kinds[f] = policy_batch_.kinds[f] = static_cast<FieldKind>(kinds[f]);
    const std::shared_ptr<Replay> core = replay_of(replay);
    if (core->record().fields.size() != 4) throw std::invalid_argument("a row has four fields");
    if (is_double)
      wide_ = make_learner<double>(core, options_);
    else
      narrow_ = make_learner<float>(core, options_);
  }

  // addresses: of each tensor of each network, layer by layer, its own, Adam's two means and step, and the target's (or
  // 0); then the same of the entropy coefficient's logarithm where it is learned. groups: six numbers for each. places:
  // of the batch's eight tensors, the policy batch's, q, td_error and log_prob.
  Outcome run(const Addresses& addresses, const Numbers& groups, const Addresses& places, double entropy_coefficient,
              double reward_scale, const std::vector<double>& loss_weights, uint32_t n_step, double discount,
              double importance_exponent, uint32_t flags,
              const std::vector<std::tuple<uint64_t, uint32_t, bool>>& calls) {
    if (places.size() != 19) throw std::invalid_argument("a call takes 19 places");
    const SampleRequest request = sample_request(options_.batch, n_step, discount, importance_exponent, flags);
    calls_.clear();
    for (const auto& [key, policy_steps, copies] : calls) calls_.push_back({key, policy_steps, copies});
    const auto at = [&](size_t i) { return reinterpret_cast<uint8_t*>(places[i]); };
    for (size_t i = 0; i < 8; ++i) batch_.tensors[i] = at(i);
    for (size_t i = 0; i < 8; ++i) policy_batch_.tensors[i] = at(8 + i);
    narrow_tensors_.reward_scale = wide_tensors_.reward_scale = reward_scale;
    (is_double_ ? wide_tensors_.loss_weights : narrow_tensors_.loss_weights) = loss_weights;
    Reader reader(addresses, groups);
    const UpdateOutcome outcome =
        is_double_ ? run_with(*wide_, wide_tensors_, reader, request, entropy_coefficient, at(16), at(17), at(18))
                   : run_with(*narrow_, narrow_tensors_, reader, request, entropy_coefficient, at(16), at(17), at(18));
    return py::make_tuple(outcome.done, static_cast<int>(outcome.failure), outcome.critic_loss,
                          outcome.policy_stepped ? py::object(py::float_(outcome.policy_loss)) : py::none());
  }

  size_t bytes() const { return is_double_ ? wide_->bytes() : narrow_->bytes(); }

 private:
  template <class T>
  UpdateOutcome run_with(Learner<T>& learner, LearnerTensors<T>& tensors, Reader& reader, const SampleRequest& request,
                         double entropy_coefficient, uint8_t* q, uint8_t* td_error, uint8_t* log_prob) {
    tensors.networks.resize(options_.networks.size());
    for (size_t i = 0; i < options_.networks.size(); ++i) {
      read_network<T>(reader, options_.networks[i], tensors.networks[i]);
    }
    if (options_.learns_entropy) tensors.log_coefficient = reader.slot<T>();
    tensors.entropy_coefficient = entropy_coefficient;
    const py::gil_scoped_release released;
    return learner.run(tensors, request, batch_, policy_batch_, calls_.data(), calls_.size(), reinterpret_cast<T*>(q),
                       reinterpret_cast<T*>(td_error), reinterpret_cast<T*>(log_prob));
  }

  const LearnerOptions options_;
  const bool is_double_;
  std::unique_ptr<Learner<float>> narrow_;
  std::unique_ptr<Learner<double>> wide_;
  LearnerTensors<float> narrow_tensors_;
  LearnerTensors<double> wide_tensors_;
  BatchPlaces batch_, policy_batch_;
  std::vector<UpdateCall> calls_;
};

}  // namespace

void bind_learner(py::module_& m) {
  m.def(
      "has_bfloat16", [] { return bfloat16_product() != nullptr; },
      "Whether the learner can multiply bfloat16 numbers on this CPU, with the instruction set in use.");
  py::class_<PyLearner>(m, "Learner")
      .def(py::init<py::handle, bool, const Options&, const std::vector<int>&>(), py::arg("replay"),
           py::arg("is_double"), py::arg("options"), py::arg("kinds"))
      .def("run", &PyLearner::run, py::arg("addresses"), py::arg("groups"), py::arg("places"),
           py::arg("entropy_coefficient"), py::arg("reward_scale"), py::arg("loss_weights"), py::arg("n_step"),
           py::arg("discount"), py::arg("importance_exponent"), py::arg("flags"), py::arg("calls"))
      .def_property_readonly("nbytes", &PyLearner::bytes);
}

}  // namespace angle
