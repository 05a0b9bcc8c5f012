#pragma once
#include <pybind11/pybind11.h>

#include <memory>

#include "core/replay.h"

namespace angle {
void bind_replay(pybind11::module_& m);
void bind_random(pybind11::module_& m);
void bind_ops(pybind11::module_& m);
void bind_floor(pybind11::module_& m);
void bind_learner(pybind11::module_& m);
void bind_acting(pybind11::module_& m);

// The core's replay inside Python's. Throws pybind11::cast_error where it is none.
std::shared_ptr<Replay> replay_of(pybind11::handle core);
}  // namespace angle
