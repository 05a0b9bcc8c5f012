// A policy's forward pass for a few observations. It is given torch's tensors themselves and looks what they are and
// where they lie: each call anew, for they may have moved. The interpreter's lock is kept, for the work takes
// microseconds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bindings/batch_memory.h"
#include "bindings/bindings.h"
#include "bindings/tensors.h"
#include "bindings/torch_tensors.h"
#include "kernels/kernels.h"

namespace py = pybind11;

namespace angle {
namespace {

constexpr size_t kMostRows = 8, kPoolBytes = 64 << 10;

class ActingNetwork {
 public:
  ActingNetwork(std::vector<size_t> sizes, int activation, size_t action_dim, bool gaussian, double log_std_low,
                double log_std_high, py::object float32, py::object exchange, py::object from_dlpack)
      : sizes_(std::move(sizes)),
        activation_(static_cast<Activation>(activation)),
        action_dim_(action_dim),
        gaussian_(gaussian),
        low_(static_cast<float>(log_std_low)),
        high_(static_cast<float>(log_std_high)),
        tensors_(std::move(float32), std::move(exchange)),
        from_dlpack_(std::move(from_dlpack)),
        noise_({rows_of(action_dim)}, kPoolBytes),
        results_({rows_of(action_dim), rows_of(0)}, kPoolBytes) {
    if (activation < 0 || activation > static_cast<int>(Activation::kGelu)) {
      throw std::invalid_argument("there is no such activation");
    }
    if (sizes_.size() < 2 || action_dim_ == 0 || sizes_.back() != action_dim_ * (gaussian_ ? 2 : 1)) {
      throw std::invalid_argument("sizes must end with action_dim, of a Gaussian with twice that");
    }
    const size_t widest = *std::max_element(sizes_.begin() + 1, sizes_.end());
    for (auto& layer : hidden_) layer.resize(kMostRows * widest);
    for (auto* part : {&mean_, &log_std_, &spread_, &zeros_}) part->assign(kMostRows * action_dim_, 0.0f);
  }

  // plan: four tuples. places: dict, key and value, one after the other; value must be what the dict has, or Ellipsis
  // where it has nothing. kinds: object and type, one after the other. lengths: dict and number of entries. tensors:
  // weight and bias layer by layer, then the bounds' scale and center, if any.
  py::object act(py::handle plan, py::handle observations, bool deterministic, py::handle noise) {
    PyObject* parts[4];
    if (!PyTuple_Check(plan.ptr()) || PyTuple_GET_SIZE(plan.ptr()) != 4)
      throw std::invalid_argument("a plan is a tuple of four tuples");
    for (size_t i = 0; i < 4; ++i) {
      parts[i] = PyTuple_GET_ITEM(plan.ptr(), static_cast<Py_ssize_t>(i));
      if (!PyTuple_Check(parts[i])) throw std::invalid_argument("a plan is a tuple of four tuples");
    }
    if (!holds(parts[0], parts[1], parts[2])) return py::bool_(false);
    try {
      return act_or_raise(parts[3], observations.ptr(), deterministic, noise.ptr());
    } catch (py::error_already_set&) {
      return py::none();  // a tensor of a kind that has no memory to ask for: torch says what is wrong
    }
  }

  bool exchanges() const { return tensors_.exchanges(); }

 private:
  static bool holds(PyObject* places, PyObject* kinds, PyObject* lengths) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(places); i += 3) {
      PyObject* const wanted = PyTuple_GET_ITEM(places, i + 2);
      PyObject* const found = PyDict_GetItemWithError(PyTuple_GET_ITEM(places, i), PyTuple_GET_ITEM(places, i + 1));
      if (found != (wanted == Py_Ellipsis ? nullptr : wanted)) return false;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(kinds); i += 2) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(PyTuple_GET_ITEM(kinds, i))) != PyTuple_GET_ITEM(kinds, i + 1))
        return false;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(lengths); i += 2) {
      if (PyDict_Size(PyTuple_GET_ITEM(lengths, i)) != PyLong_AsSsize_t(PyTuple_GET_ITEM(lengths, i + 1))) return false;
    }
    return true;
  }

  static TensorType rows_of(size_t columns) {
    const std::vector<int64_t> shape(columns > 0 ? 1 : 0, static_cast<int64_t>(columns));
    return {{2, 32}, shape, std::max<size_t>(columns, 1) * sizeof(float)};
  }

  // New tensors, not filled.
  template <size_t kCount>
  std::array<py::object, kCount> fresh(const BatchMaker& maker, size_t rows) const {
    std::array<DLManagedTensor*, kCount> made;
    std::array<py::object, kCount> out;
    maker.make(rows, made.data());
    for (size_t i = 0; i < kCount; ++i) out[i] = py::reinterpret_steal<py::object>(to_capsule(made[i]));
    for (py::object& one : out) {
      PyObject* const tensor = PyObject_CallOneArg(from_dlpack_.ptr(), one.ptr());
      if (tensor == nullptr) throw py::error_already_set();
      one = py::reinterpret_steal<py::object>(tensor);
    }
    return out;
  }

  // Where the parameters lie, each as it should be.
  bool read(PyObject* tensors) {
    const size_t layers = sizes_.size() - 1, count = static_cast<size_t>(PyTuple_GET_SIZE(tensors));
    if (count != 2 * layers && count != 2 * layers + 2) return false;
    places_.resize(count);
    for (size_t i = 0; i < count; ++i) {
      const TensorReader::Seen seen = tensors_.look(PyTuple_GET_ITEM(tensors, static_cast<Py_ssize_t>(i)));
      const size_t l = i / 2;
      const bool fits = l == layers  ? seen.is(action_dim_)
                        : i % 2 == 0 ? seen.is(sizes_[l + 1], sizes_[l])
                                     : seen.is(sizes_[l + 1]);
      if (!fits) return false;
      places_[i] = seen.data;
    }
    return true;
  }

  py::object act_or_raise(PyObject* tensors, PyObject* observations, bool deterministic, PyObject* noise) {
    const size_t rows = tensors_.look(observations).shape[0], layers = sizes_.size() - 1;
    if (rows == 0 || rows > kMostRows) return py::none();
    const bool noisy = gaussian_ && !deterministic;
    py::object normals = py::reinterpret_borrow<py::object>(noise);
    if (noisy && noise == Py_None) {
      if (!read(tensors) || !tensors_.look(observations).is(rows, sizes_[0])) return py::none();
      normals = fresh<1>(noise_, rows)[0];
      normals.attr("normal_")();
    } else if (noisy && Py_TYPE(noise) != Py_TYPE(observations)) {
      return py::none();
    }
    auto [actions, log_prob] = fresh<2>(results_, rows);

    // From here on nothing lets go of the interpreter's lock: no other thread moves a tensor or takes our memory.
    if (!read(tensors)) return py::none();
    const TensorReader::Seen seen = tensors_.look(observations), drawn = noisy ? tensors_.look(normals.ptr()) : seen;
    if (!seen.is(rows, sizes_[0]) || (noisy && !drawn.is(rows, action_dim_))) return py::none();
    float* const to = tensors_.look(actions.ptr()).data;
    float* const density = tensors_.look(log_prob.ptr()).data;
    const float* const random = noisy ? drawn.data : zeros_.data();
    const float* x = seen.data;
    const LearnerKernelsOf<float>& kernel = kernels().learner.f32;
    for (size_t l = 0; l < layers; ++l) {
      float* const y = hidden_[l % 2].data();
      kernel.few_rows({x, places_[2 * l], places_[2 * l + 1], y, rows, sizes_[l], sizes_[l + 1]});
      if (l + 1 < layers) kernel.activate(activation_, y, y, rows * sizes_[l + 1]);
      x = y;
    }
    if (gaussian_) {
      for (size_t i = 0; i < rows; ++i) {
        for (size_t j = 0; j < action_dim_; ++j) {
          const float log_std = x[(2 * i + 1) * action_dim_ + j], above = log_std < low_ ? low_ : log_std;
          mean_[i * action_dim_ + j] = x[2 * i * action_dim_ + j];
          log_std_[i * action_dim_ + j] = above > high_ ? high_ : above;
        }
      }
      kernels().ops.f32.squashed_gaussian(
          {mean_.data(), log_std_.data(), random, to, spread_.data(), density, rows, action_dim_});
    } else {
      kernel.activate(Activation::kTanh, x, to, rows * action_dim_);
      std::fill_n(density, rows, 0.0f);
    }
    if (places_.size() > 2 * layers) {
      const float *const scale = places_[2 * layers], *const center = places_[2 * layers + 1];
      for (size_t i = 0; i < rows; ++i) {
        for (size_t j = 0; j < action_dim_; ++j)
          to[i * action_dim_ + j] = center[j] + to[i * action_dim_ + j] * scale[j];
      }
    }
    return py::make_tuple(std::move(actions), std::move(log_prob));
  }

  std::vector<size_t> sizes_;
  Activation activation_;
  size_t action_dim_;
  bool gaussian_;
  float low_, high_;
  TensorReader tensors_;
  py::object from_dlpack_;
  BatchMaker noise_, results_;
  std::vector<const float*> places_;
  std::array<std::vector<float>, 2> hidden_;
  std::vector<float> mean_, log_std_, spread_, zeros_;
};

}  // namespace

void bind_acting(py::module_& m) {
  using py::arg;
  py::class_<ActingNetwork>(m, "ActingNetwork", "An MLP policy's forward pass for up to 8 float32 observations.")
      .def(py::init<std::vector<size_t>, int, size_t, bool, double, double, py::object, py::object, py::object>(),
           arg("sizes"), arg("activation"), arg("action_dim"), arg("gaussian"), arg("log_std_low"), arg("log_std_high"),
           arg("float32"), arg("exchange"), arg("from_dlpack"))
      .def_property_readonly("exchanges", &ActingNetwork::exchanges,
                             "Whether tensors are looked at by DLPack's functions.")
      .def(
          "act", &ActingNetwork::act,
          "(actions, log_prob); False where the plan's places, kinds or lengths no longer hold; None where it does not "
          "take these tensors, and then nothing was drawn.",
          arg("plan"), arg("observations"), arg("deterministic"), arg("noise"));
  m.attr("most_acting_rows") = kMostRows;
}

}  // namespace angle
