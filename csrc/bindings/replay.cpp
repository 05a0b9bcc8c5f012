#include "bindings/bindings.h"

namespace angle {
void bind_replay(pybind11::module_&) {}
}  // namespace angle
