// Random numbers on a device for Python.
#include <pybind11/pybind11.h>

#include "bindings/device.h"
#include "cuda/random_params.h"

namespace py = pybind11;

namespace angle {
namespace {

using device::DrawParams;

template <int (*Launch)(const DrawParams*, void*)>
void draw(uintptr_t key, uintptr_t out, uint64_t n, uintptr_t stream) {
  const DrawParams p{at<const int64_t>(key), at<void>(out), n};
  check_launch(Launch(&p, at<void>(stream)), "random");
}

}  // namespace

void bind_device_random(py::module_& m) {
  const auto def = [&](const char* name, auto* function, const char* doc) {
    m.def(name, function, py::arg("key"), py::arg("out"), py::arg("n"), py::arg("stream"), doc);
  };
  def("philox_normal_f32", &draw<device::angle_random_normals_f32>,
      "Fill n float32 at address `out` with the standard normals of the 64-bit key at address `key`.");
  def("philox_normal_f64", &draw<device::angle_random_normals_f64>, "The same in float64.");
  def("philox_uniform", &draw<device::angle_random_uniforms>,
      "Fill n float64 at address `out` with the uniforms in [0, 1) of the 64-bit key at address `key`.");
}

}  // namespace angle
