#include "core/floor.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace angle {

namespace {

template <class T>
py::array_t<T> copy(std::span<const T> values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

}  // namespace

void bind_floor(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<ReplayFloor>(m, "ReplayFloor",
                          "The machine's floor under the replay, for benchmarks: each method runs its work "
                          "`iterations` times and returns the seconds taken. One thread only.")
      .def(py::init<size_t, uint64_t>(), py::arg("capacity"), py::arg("seed") = 0)
      .def("insert", &ReplayFloor::insert, py::arg("rows"), py::arg("iterations"), release())
      .def("sample", &ReplayFloor::sample, py::arg("batch"), py::arg("iterations"), release())
      .def("uniform_sample", &ReplayFloor::uniform_sample, py::arg("batch"), py::arg("iterations"), release())
      .def("update", &ReplayFloor::update, py::arg("batch"), py::arg("iterations"), release())
      .def("cycle", &ReplayFloor::cycle, py::arg("batch"), py::arg("iterations"), release())
      .def(
          "indices", [](const ReplayFloor& self) { return copy(self.indices()); }, "uint32 rows of the last sample.")
      .def(
          "observations", [](const ReplayFloor& self) { return copy(self.observations()); },
          "float32 observations of the last sample, one row after another.")
      .def(
          "weight", [](const ReplayFloor& self, size_t row) { return self.weight(self.checked_row(row)); },
          py::arg("row"), "Weight of a row.")
      .def(
          "record", [](const ReplayFloor& self, size_t row) { return py::float_(*self.record(row)); }, py::arg("row"),
          "First number of a stored observation.")
      .def("total", &ReplayFloor::total, "Sum of the weights.")
      .def("sums_agree", &ReplayFloor::sums_agree, "Whether every sum is its children's.");
}

}  // namespace angle
