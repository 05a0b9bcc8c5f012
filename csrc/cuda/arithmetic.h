// The arithmetic that kernels for devices share with those of core/, and bfloat16.
#pragma once
#include <math.h>

#include "cuda/portable.h"
#include "kernels/kernels.h"

namespace angle::device {

// clang-format off: each uses what stands above it.
#include "kernels/bits.inl"
#include "kernels/exponentials.inl"
#include "kernels/normals.inl"
#include "kernels/weights.inl"
// clang-format on

ANGLE_DEVICE float of_bfloat16(uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }

// To the nearest, even on a tie; a NaN stays one.
ANGLE_DEVICE uint16_t to_bfloat16(float value) {
  const uint32_t bits = as_bits(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace angle::device
