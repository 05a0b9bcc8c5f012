// Batches on their way to Python: DLPack tensors in capsules.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "bindings/batch_memory.h"

namespace angle {

// A short list, on the heap only when it is longer than usual.
template <class T>
class Few {
 public:
  explicit Few(size_t count) {
    if (count > few_.size()) many_.resize(count);
  }
  T* data() { return many_.empty() ? few_.data() : many_.data(); }

 private:
  std::array<T, 16> few_;
  std::vector<T> many_;
};

// DLPack's code of one of NumPy's kinds.
inline uint8_t dl_code(char kind) {
  switch (kind) {
    case 'i':
      return 0;
    case 'u':
      return 1;
    case 'c':
      return 5;
    case 'b':
      return 6;
    default:
      return 2;
  }
}

// Owns the tensor until a consumer takes it over, which it says by giving the capsule another name.
inline PyObject* to_capsule(DLManagedTensor* tensor) {
  PyObject* const capsule = PyCapsule_New(tensor, "dltensor", [](PyObject* self) {
    if (!PyCapsule_IsValid(self, "dltensor")) return;
    auto* const owned = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(self, "dltensor"));
    owned->deleter(owned);
  });
  if (capsule == nullptr) {
    tensor->deleter(tensor);
    throw pybind11::error_already_set();
  }
  return capsule;
}

}  // namespace angle
