#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/replay_params.h"

namespace angle {

void bind_device_replay(pybind11::module_& m);
void bind_device_ops(pybind11::module_& m);
void bind_device_random(pybind11::module_& m);

// Throws std::runtime_error, naming the kernel, where the device refused its launch.
inline void check_launch(int code, const char* kernel) {
  if (code == 0) return;
  throw std::runtime_error(std::string("launching ") + kernel + ": " + device::angle_device_error(code));
}

// An address that Python gives as an integer; 0 is null.
template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace angle
