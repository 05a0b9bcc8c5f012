// A policy's forward pass for a few observations. It is given torch's tensors themselves and asks them, by their Python
// methods, what they are and where they lie: each call anew, for they may have moved. The interpreter's lock is kept,
// for the work takes microseconds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "kernels/kernels.h"

namespace py = pybind11;

namespace angle {
namespace {

constexpr size_t kMostRows = 8;

// Python's names of what tensors are asked, made once.
struct Names {
  PyObject *dtype, *shape, *nbytes, *is_cpu, *is_contiguous, *data_ptr, *new_empty, *normal;
};
const Names& names() {
  static const auto name = PyUnicode_InternFromString;
  static const Names made = {name("dtype"),         name("shape"),    name("nbytes"),    name("is_cpu"),
                             name("is_contiguous"), name("data_ptr"), name("new_empty"), name("normal_")};
  return made;
}

// Throws what Python raised.
py::object checked(PyObject* made) {
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}
py::object attribute(PyObject* of, PyObject* name) { return checked(PyObject_GetAttr(of, name)); }
py::object call(PyObject* of, PyObject* name) {
  PyObject* arguments[] = {of};
  return checked(PyObject_VectorcallMethod(name, arguments, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
}
py::object call(PyObject* of, PyObject* name, PyObject* argument) {
  PyObject* arguments[] = {of, argument};
  return checked(PyObject_VectorcallMethod(name, arguments, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
}

float* address(PyObject* tensor) {
  return reinterpret_cast<float*>(
      static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(call(tensor, names().data_ptr).ptr())));
}

// Whether a tensor is dense memory of this CPU and this dtype.
bool is_dense(PyObject* tensor, PyObject* dtype) {
  return attribute(tensor, names().dtype).ptr() == dtype && call(tensor, names().is_contiguous).ptr() == Py_True &&
         attribute(tensor, names().is_cpu).ptr() == Py_True;
}

bool has_shape(PyObject* tensor, size_t axes, size_t first, size_t second) {
  const py::object shape = attribute(tensor, names().shape);
  return PyTuple_GET_SIZE(shape.ptr()) == static_cast<Py_ssize_t>(axes) &&
         PyLong_AsSize_t(PyTuple_GET_ITEM(shape.ptr(), 0)) == first &&
         (axes < 2 || PyLong_AsSize_t(PyTuple_GET_ITEM(shape.ptr(), 1)) == second);
}

class ActingNetwork {
 public:
  ActingNetwork(std::vector<size_t> sizes, int activation, size_t action_dim, bool gaussian, double log_std_low,
                double log_std_high, py::object dtype, py::object empty_like)
      : sizes_(std::move(sizes)),
        activation_(static_cast<Activation>(activation)),
        action_dim_(action_dim),
        gaussian_(gaussian),
        low_(static_cast<float>(log_std_low)),
        high_(static_cast<float>(log_std_high)),
        dtype_(std::move(dtype)),
        empty_like_(std::move(empty_like)) {
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

  // A new tensor, as the model is, which is made at the first call: that is the quickest way to have one.
  template <class Shape>
  py::object fresh(py::object& model, PyObject* observations, const Shape& shape) const {
    if (!model) model = call(observations, names().new_empty, shape().ptr());
    return checked(PyObject_CallOneArg(empty_like_.ptr(), model.ptr()));
  }

  // Where the parameters lie, each as it should be. One that lies where it lay is in this CPU's memory and is asked
  // for less: of its shape only the size and the first axis, which costs half as much as the shape.
  bool read(PyObject* tensors) {
    const size_t layers = sizes_.size() - 1, count = static_cast<size_t>(PyTuple_GET_SIZE(tensors));
    if (count != 2 * layers && count != 2 * layers + 2) return false;
    places_.resize(count);
    for (size_t i = 0; i < count; ++i) {
      PyObject* const tensor = PyTuple_GET_ITEM(tensors, static_cast<Py_ssize_t>(i));
      const size_t l = i / 2, axes = l < layers && i % 2 == 0 ? 2 : 1;
      const size_t first = l < layers ? sizes_[l + 1] : action_dim_, second = axes == 2 ? sizes_[l] : 1;
      const Py_ssize_t size = PyObject_Size(tensor);
      if (size < 0) throw py::error_already_set();  // it has no axis
      if (size != static_cast<Py_ssize_t>(first) ||
          PyLong_AsSize_t(attribute(tensor, names().nbytes).ptr()) != first * second * sizeof(float) ||
          attribute(tensor, names().dtype).ptr() != dtype_.ptr() ||
          call(tensor, names().is_contiguous).ptr() != Py_True) {
        return false;
      }
      const float* const place = address(tensor);
      if (place != places_[i]) {
        if (!has_shape(tensor, axes, first, second) || !is_dense(tensor, dtype_.ptr())) return false;
        places_[i] = place;
      }
    }
    return true;
  }

  py::object act_or_raise(PyObject* tensors, PyObject* observations, bool deterministic, PyObject* noise) {
    const py::object shape = attribute(observations, names().shape);
    if (PyTuple_GET_SIZE(shape.ptr()) != 2 || PyLong_AsSize_t(PyTuple_GET_ITEM(shape.ptr(), 1)) != sizes_[0]) {
      return py::none();
    }
    const size_t rows = PyLong_AsSize_t(PyTuple_GET_ITEM(shape.ptr(), 0)), layers = sizes_.size() - 1;
    if (rows == 0 || rows > kMostRows || !is_dense(observations, dtype_.ptr())) return py::none();
    const bool noisy = gaussian_ && !deterministic;
    py::object normals = py::reinterpret_borrow<py::object>(noise);
    if (noisy && noise == Py_None) {
      if (!read(tensors)) return py::none();
      normals = fresh(action_models_[rows], observations, [&] { return py::make_tuple(rows, action_dim_); });
      call(normals.ptr(), names().normal);
    } else if (noisy && (Py_TYPE(noise) != Py_TYPE(observations) || !has_shape(noise, 2, rows, action_dim_) ||
                         !is_dense(noise, dtype_.ptr()))) {
      return py::none();
    }
    py::object actions = fresh(action_models_[rows], observations, [&] { return py::make_tuple(rows, action_dim_); });
    py::object log_prob = fresh(log_prob_models_[rows], observations, [&] { return py::make_tuple(rows); });

    // From here on nothing lets go of the interpreter's lock: no other thread moves a tensor or takes our memory.
    if (!read(tensors)) return py::none();
    float* const to = address(actions.ptr());
    float* const density = address(log_prob.ptr());
    const float* const random = noisy ? address(normals.ptr()) : zeros_.data();
    const float* x = address(observations);
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
  py::object dtype_, empty_like_;
  std::vector<const float*> places_;
  std::array<std::vector<float>, 2> hidden_;
  std::vector<float> mean_, log_std_, spread_, zeros_;
  std::array<py::object, kMostRows + 1> action_models_, log_prob_models_;
};

}  // namespace

void bind_acting(py::module_& m) {
  using py::arg;
  py::class_<ActingNetwork>(m, "ActingNetwork", "An MLP policy's forward pass for up to 8 float32 observations.")
      .def(py::init<std::vector<size_t>, int, size_t, bool, double, double, py::object, py::object>(), arg("sizes"),
           arg("activation"), arg("action_dim"), arg("gaussian"), arg("log_std_low"), arg("log_std_high"), arg("dtype"),
           arg("empty_like"))
      .def(
          "act", &ActingNetwork::act,
          "(actions, log_prob); False where the plan's places, kinds or lengths no longer hold; None where it does not "
          "take these tensors, and then nothing was drawn.",
          arg("plan"), arg("observations"), arg("deterministic"), arg("noise"));
  m.attr("most_acting_rows") = kMostRows;
}

}  // namespace angle
