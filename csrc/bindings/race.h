#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/typing.h>

#include "core/race.h"

namespace angle {
// Before the class whose method takes RaceOptions is bound.
void bind_race(pybind11::module_& m);

// core/race.h's race without the interpreter's lock: {"inserts": ..., "cycles": ..., "checked_rows", "refused"}, both
// sides as {"calls", "per_second", "mean_us", "p50_us", "p99_us", "p999_us", "max_us"}.
pybind11::typing::Dict<pybind11::str, pybind11::object> race_for_python(Replay& replay, const RaceOptions& options);
}  // namespace angle
