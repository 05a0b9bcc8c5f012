// The vector kernels and how one set of them is chosen at run time.
//
// Every ISA compiles the same sources (the .inl files, in kernels.inl's order) into one table of functions. Numbers are
// equal to the last bit on every ISA where a kernel says so. No kernel allocates, throws or takes a lock.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/learner_kernels.h"
#include "kernels/ops_kernels.h"
#include "kernels/random_kernels.h"
#include "kernels/replay_kernels.h"

namespace angle {

struct Kernels {
  const char* isa;  // "baseline", "avx2" or "avx512"
  ReplayKernels replay;
  OpsKernels ops;
  LearnerKernels learner;
  RandomKernels random;
};

// The table in use: the widest that the CPU has, or the one that the environment variable ANGLE_ISA names at the
// first call. O(1). Any thread. Throws std::runtime_error when ANGLE_ISA names one that is unknown or that the CPU
// lacks.
const Kernels& kernels();

// LearnerKernels::f32.product with factors rounded to bfloat16 (to the nearest, even on a tie; subnormal ones are
// zeros) and float32 sums; with fewer than 8 rows or steps nothing is rounded. The same numbers however the columns are
// divided. Uses 100 KB of stack. Null where the CPU lacks AVX512_BF16 or kernels() are not those of avx512. O(1). Any
// thread.
using BfloatProduct = void (*)(const Product<float>&);
BfloatProduct bfloat16_product();

// Whether this machine can run the named ISA. Any thread.
bool isa_available(const char* isa);

// One table per ISA, each defined in its own translation unit.
namespace baseline {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512_bf16 {
void product(const Product<float>& p);
}

}  // namespace angle
