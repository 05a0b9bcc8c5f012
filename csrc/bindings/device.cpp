// The extension modules _cuda and _cuda_host: the same bindings over the same kernels, compiled for devices and for the
// host. Addresses come as integers; where they lie is the caller's business.
#include "bindings/device.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(ANGLE_DEVICE_MODULE, m) {
  m.doc() = "Device kernels of angle_rl. Use them through angle_rl.replay and angle_rl.ops.";
  m.attr("__version__") = ANGLE_VERSION;
  angle::bind_device_replay(m);
  angle::bind_device_ops(m);
  angle::bind_device_random(m);
}
