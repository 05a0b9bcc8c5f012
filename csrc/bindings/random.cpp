#include <cstdint>

#include "bindings/bindings.h"
#include "core/philox.h"

namespace py = pybind11;

namespace angle {

void bind_random(py::module_& m) {
  m.def("philox_split", &philox_split, py::arg("key"), py::arg("index"), "The index-th child of a 64-bit random key.");
  m.def(
      "philox_uniform",
      [](uint64_t key, uintptr_t out, size_t n) { philox_uniform(key, reinterpret_cast<double*>(out), n); },
      py::arg("key"), py::arg("out"), py::arg("n"), "Fill n float64 at address `out` with uniforms in [0, 1).");
  m.def(
      "philox_normal_f32",
      [](uint64_t key, uintptr_t out, size_t n) { philox_normal(key, reinterpret_cast<float*>(out), n); },
      py::arg("key"), py::arg("out"), py::arg("n"), "Fill n float32 at address `out` with standard normals.");
  m.def(
      "philox_normal_f64",
      [](uint64_t key, uintptr_t out, size_t n) { philox_normal(key, reinterpret_cast<double*>(out), n); },
      py::arg("key"), py::arg("out"), py::arg("n"), "Fill n float64 at address `out` with standard normals.");
}

}  // namespace angle
