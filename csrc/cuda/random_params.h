// What the launchers that draw random numbers take: addresses on the device and how many.
#pragma once
#include <cstdint>

namespace angle::device {

struct DrawParams {
  const int64_t* key;  // 64 bits, read when the kernel runs
  void* out;           // [n], written
  uint64_t n;
};

// out[0..n) as philox_normal and philox_uniform of core/philox.h fill it for the key, to the last bit. Each returns 0
// or the device's error code, in which case nothing was launched. Cost n. Any thread; on `stream`, whatever that is to
// the device (not read by the host's build).
extern "C" {
int angle_random_normals_f32(const DrawParams* p, void* stream);
int angle_random_normals_f64(const DrawParams* p, void* stream);
int angle_random_uniforms(const DrawParams* p, void* stream);
}

}  // namespace angle::device
