// The extension module _core. The files of this folder are the only ones that know pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "kernels/kernels.h"

namespace py = pybind11;

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled core of angle_rl: replay and fused operations. Use it through angle_rl.replay and angle_rl.ops.";
  m.attr("__version__") = ANGLE_VERSION;
  m.def("isa", [] { return angle::kernels().isa; }, "Name of the instruction set in use.");
  m.def(
      "available_isas",
      [] {
        std::vector<std::string> found;
        for (const char* isa : {"baseline", "avx2", "avx512"}) {
          if (angle::isa_available(isa)) found.emplace_back(isa);
        }
        return found;
      },
      "Names of the instruction sets that this machine can run.");
  angle::bind_replay(m);
  angle::bind_random(m);
  angle::bind_ops(m);
  angle::bind_floor(m);
  angle::bind_learner(m);
  angle::bind_acting(m);
}
