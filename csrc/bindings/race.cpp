#include "bindings/race.h"

namespace py = pybind11;

namespace angle {
namespace {

py::dict side(const RaceSide& found) {
  py::dict out;
  out["calls"] = found.calls;
  out["per_second"] = found.per_second;
  out["mean_us"] = found.mean_us;
  out["p50_us"] = found.p50_us;
  out["p99_us"] = found.p99_us;
  out["p999_us"] = found.p999_us;
  out["max_us"] = found.max_us;
  return out;
}

}  // namespace

py::typing::Dict<py::str, py::object> race_for_python(Replay& replay, const RaceOptions& options) {
  RaceResult found;
  {
    const py::gil_scoped_release released;
    found = race(replay, options);
  }
  py::typing::Dict<py::str, py::object> out;
  out["inserts"] = side(found.inserts);
  out["cycles"] = side(found.cycles);
  out["checked_rows"] = found.checked_rows;
  out["refused"] = found.refused;
  return out;
}

void bind_race(py::module_& m) {
  py::class_<RaceOptions>(
      m, "RaceOptions",
      "Threads of Replay.race: `inserters` insert row after row, `learners` sample `batch` rows and "
      "update their priorities, for `seconds`; every `check_every`-th batch is checked. The rows "
      "are HalfCheetah's, numbered from `first_row`; the inserters' streams from `first_stream`.")
      .def(py::init([](size_t inserters, size_t learners, size_t batch, double seconds, uint64_t first_row,
                       int64_t first_stream, size_t check_every) {
             return RaceOptions{inserters, learners, batch, seconds, first_row, first_stream, check_every};
           }),
           py::kw_only(), py::arg("inserters") = 1, py::arg("learners") = 1, py::arg("batch") = 256,
           py::arg("seconds") = 1.0, py::arg("first_row") = 0, py::arg("first_stream") = 0,
           py::arg("check_every") = 256);
}

}  // namespace angle
