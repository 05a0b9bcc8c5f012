// Compiled once per ISA; ANGLE_ISA_NAME is the namespace. Only C headers and intrinsics in here: a template from the
// standard library, emitted as a weak symbol with wide instructions, could be the copy that the linker keeps for all.
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels/kernels.h"

#define ANGLE_STRINGIZE_(x) #x
#define ANGLE_STRINGIZE(x) ANGLE_STRINGIZE_(x)

namespace angle::ANGLE_ISA_NAME {
namespace {
// clang-format off: each uses what stands above it.
#include "kernels/bits.inl"
#include "kernels/exponentials.inl"
#include "kernels/ops.inl"
#include "kernels/normals.inl"
#include "kernels/random.inl"
#include "kernels/weights.inl"
#include "kernels/replay.inl"
#include "kernels/vector.inl"
#include "kernels/products.inl"
#include "kernels/activations.inl"
#include "kernels/acting.inl"
#include "kernels/learner.inl"
// clang-format on
}  // namespace

extern const Kernels table;
const Kernels table = {ANGLE_STRINGIZE(ANGLE_ISA_NAME), replay_kernels, ops_kernels, learner_kernels, random_kernels};

}  // namespace angle::ANGLE_ISA_NAME
