// Signatures of the kernels that draw random numbers.
#pragma once
#include <cstddef>
#include <cstdint>

namespace angle {

struct RandomKernels {
  // out[0..n): standard normals by Box and Muller (1958) in fixed float64 arithmetic, equal on every ISA to the last
  // bit: elements 2i and 2i + 1 are the pair made of Philox block (key, i, stream). The float32 numbers are the float64
  // ones rounded. Within 4e-16 of the exact function of the same bits, relative to the pair's radius. Cost n. Any
  // thread.
  void (*normals_f32)(uint64_t key, uint64_t stream, float* out, size_t n);
  void (*normals_f64)(uint64_t key, uint64_t stream, double* out, size_t n);
};

}  // namespace angle
