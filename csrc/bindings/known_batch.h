// The tensors of a batch that a caller hands in again and again: checked once, then known by identity, address and
// length.
#pragma once
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace angle {

class KnownBatch {
 public:
  KnownBatch() = default;
  // Tensors that hold a batch of n rows. data_ptr and numel: torch.Tensor's.
  KnownBatch(size_t n, pybind11::tuple tensors, pybind11::object data_ptr, pybind11::object numel)
      : n_(n), tensors_(std::move(tensors)), data_ptr_(std::move(data_ptr)), numel_(std::move(numel)) {
    for (const pybind11::handle tensor : tensors_) places_.push_back(place_of(tensor.ptr()));
  }

  // Their addresses, when these are the tensors and none has moved or changed its length; false otherwise.
  bool find(size_t n, pybind11::handle tensors, uint8_t** addresses) const {
    if (n != n_ || !PyTuple_Check(tensors.ptr())) return false;
    const auto count = static_cast<pybind11::ssize_t>(places_.size());
    if (PyTuple_GET_SIZE(tensors.ptr()) != count) return false;
    for (pybind11::ssize_t t = 0; t < count; ++t) {
      PyObject* const tensor = PyTuple_GET_ITEM(tensors.ptr(), t);
      const Place& place = places_[static_cast<size_t>(t)];
      if (tensor != PyTuple_GET_ITEM(tensors_.ptr(), t) || place_of(tensor) != place) return false;
      addresses[t] = reinterpret_cast<uint8_t*>(place.address);
    }
    return true;
  }

 private:
  struct Place {
    size_t address, length;
    bool operator==(const Place&) const = default;
  };

  // Where a tensor's data lie and how many elements it has.
  Place place_of(PyObject* tensor) const {
    const auto ask = [tensor](const pybind11::object& method) {
      const auto answer = pybind11::reinterpret_steal<pybind11::object>(PyObject_CallOneArg(method.ptr(), tensor));
      if (!answer) throw pybind11::error_already_set();
      const size_t number = PyLong_AsSize_t(answer.ptr());
      if (number == static_cast<size_t>(-1) && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
      return number;
    };
    return {ask(data_ptr_), ask(numel_)};
  }

  size_t n_ = 0;
  pybind11::tuple tensors_;
  pybind11::object data_ptr_, numel_;
  std::vector<Place> places_;
};

}  // namespace angle
