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

template <class Floor>
void bind_tree_floor(py::module_& m, const char* name, const char* doc) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<Floor>(m, name, doc)
      .def(py::init<size_t, uint64_t>(), py::arg("capacity"), py::arg("seed") = 0)
      .def("insert", &Floor::insert, py::arg("rows"), py::arg("iterations"), release())
      .def("sample", &Floor::sample, py::arg("batch"), py::arg("iterations"), release())
      .def("uniform_sample", &Floor::uniform_sample, py::arg("batch"), py::arg("iterations"), release())
      .def("update", &Floor::update, py::arg("batch"), py::arg("iterations"), release())
      .def("learn", &Floor::learn, py::arg("batch"), py::arg("iterations"), release())
      .def("cycle", &Floor::cycle, py::arg("batch"), py::arg("iterations"), release())
      .def(
          "indices", [](const Floor& self) { return copy(self.indices()); }, "uint32 rows of the last sample.")
      .def(
          "observations", [](const Floor& self) { return copy(self.observations()); },
          "float32 observations of the last sample, one row after another.")
      .def(
          "weight", [](const Floor& self, size_t row) { return self.weight(self.checked_row(row)); }, py::arg("row"),
          "Weight of a row.")
      .def(
          "record", [](const Floor& self, size_t row) { return py::float_(*self.record(row)); }, py::arg("row"),
          "First number of a stored observation.")
      .def("total", &Floor::total, "Sum of the weights.")
      .def("sums_agree", &Floor::sums_agree, "Whether every sum is its children's.");
}

}  // namespace

void bind_floor(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  bind_tree_floor<ReplayFloor>(m, "ReplayFloor",
                               "The machine's floor under the replay, for benchmarks: each method runs its work "
                               "`iterations` times and returns the seconds taken. One thread only.");
  bind_tree_floor<SmallReplayFloor>(m, "SmallReplayFloor", "The same with rows of 32 bytes.");
  py::class_<CopyFloor>(m, "CopyFloor", "The floor under large rows: copies of random rows into two arrays.")
      .def(py::init<size_t, size_t>(), py::arg("rows"), py::arg("half_bytes"))
      .def("sample", &CopyFloor::sample, py::arg("batch"), py::arg("iterations"), release())
      .def("copies_agree", &CopyFloor::copies_agree, "Whether the last copies are the rows that were drawn.");
}

}  // namespace angle
