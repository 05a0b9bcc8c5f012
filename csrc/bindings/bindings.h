#pragma once
#include <pybind11/pybind11.h>

namespace angle {
void bind_replay(pybind11::module_& m);
void bind_random(pybind11::module_& m);
void bind_ops(pybind11::module_& m);
void bind_floor(pybind11::module_& m);
}  // namespace angle
