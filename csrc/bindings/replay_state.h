// A replay's state as bytes, for files and checkpoints: the only place that takes a segment apart. All of it only while
// no other call is under way.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/typing.h>

#include <cstdint>

#include "core/replay.h"

namespace angle {

using StateParts = pybind11::typing::Dict<pybind11::str, pybind11::array_t<uint8_t>>;
using StateBytes = pybind11::array_t<uint8_t, pybind11::array::c_style>;

// Writable views of a replay's bytes, kept alive by `owner`: "header" (seed, counters), "index" (streams, weights and
// their sums) and "records" (the first `slots`). What the segment says of itself, its text, is left out. O(1).
StateParts state_parts(const Replay& replay, uint64_t slots, pybind11::handle owner);

// Goes on from `header`, after state_parts()'s other views were filled with what belongs to it. Throws
// std::invalid_argument, and leaves the header as it was, where it does not fit this replay and `slots` records.
void adopt_state(Replay& replay, const StateBytes& header, uint64_t slots);

// Copies all parts in. Throws std::invalid_argument, and changes nothing, where they do not fit. O(bytes).
void restore_state(Replay& replay, const StateBytes& header, const StateBytes& index, const StateBytes& records);

}  // namespace angle
