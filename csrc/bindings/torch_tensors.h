// Torch's tensors without torch's headers.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "bindings/batch_memory.h"

namespace angle {

// The functions that a library offers by DLPack 1 (dmlc.github.io/dlpack, its C exchange API), field for field. What is
// not used here has no type.
struct DLExchange {
  uint32_t major, minor;
  void *older, *allocate, *share, *take;
  int (*look)(void* tensor, DLTensor* found);  // not 0: failed, Python's error is set. Shape and strides stay its own.
  void* stream;
};

// Looks at dense float32 tensors of one or two axes in this CPU's memory. By DLPack's functions, or, where torch offers
// none (before 2.10), by the tensors' Python methods, which say the same and take longer. Remembers nothing. Keep the
// interpreter's lock.
class TensorReader {
 public:
  struct Seen {
    float* data = nullptr;  // nullptr: a tensor of another kind, or without elements
    size_t axes = 0;
    std::array<size_t, 2> shape{};

    bool is(size_t size) const { return data != nullptr && axes == 1 && shape[0] == size; }
    bool is(size_t rows, size_t columns) const {
      return data != nullptr && axes == 2 && shape[0] == rows && shape[1] == columns;
    }
  };

  // float32: torch's dtype. exchange: `torch.Tensor.__dlpack_c_exchange_api__`; whatever is no such capsule is ignored.
  TensorReader(pybind11::object float32, pybind11::object exchange);

  // Where a tensor lies now. Throws what Python raised: it has no memory to ask for.
  Seen look(PyObject* tensor) const;
  // Whether DLPack's functions are used.
  bool exchanges() const { return exchange_ != nullptr; }

 private:
  pybind11::object float32_, capsule_;
  const DLExchange* exchange_ = nullptr;
};

}  // namespace angle
