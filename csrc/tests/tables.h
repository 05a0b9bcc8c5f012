// The kernels of every ISA that this machine can run.
#pragma once
#include <vector>

#include "kernels/kernels.h"

namespace angle::testing {

inline std::vector<const Kernels*> tables() {
  std::vector<const Kernels*> found{&baseline::table};
#if defined(ANGLE_X86)
  if (isa_available("avx2")) found.push_back(&avx2::table);
  if (isa_available("avx512")) found.push_back(&avx512::table);
#endif
  return found;
}

}  // namespace angle::testing
