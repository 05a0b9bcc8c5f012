#include "bindings/bindings.h"

namespace angle {
void bind_ops(pybind11::module_&) {}
}  // namespace angle
