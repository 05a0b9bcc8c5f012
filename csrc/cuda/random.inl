// Random numbers from a key in the device's memory: the same bits as core/philox.h draws.
#pragma once
#include "core/philox.h"
#include "cuda/arithmetic.h"
#include "cuda/portable.h"
#include "cuda/random_params.h"

namespace angle::device {

// A thread draws the pair of numbers that one Philox block makes.
template <class Real, PhiloxStream kStream>
struct Draw {
  using Params = DrawParams;
  static constexpr uint32_t kThreads = 256;
  struct Shared {};

  ANGLE_DEVICE static void run(Block<Shared>& block, const DrawParams& p) {
    block.each_thread([&](uint32_t thread) {
      const uint64_t i = uint64_t{block.index} * block.threads + thread;
      if (2 * i >= p.n) return;
      const PhiloxBlock bits = philox(static_cast<uint64_t>(*p.key), i, kStream);
      double first, second;
      if constexpr (kStream == kNormal) {
        normal_pair(bits.low(), bits.high(), &first, &second);
      } else {
        first = unit_share(bits.low());
        second = unit_share(bits.high());
      }
      Real* const out = static_cast<Real*>(p.out) + 2 * i;
      out[0] = static_cast<Real>(first);
      if (2 * i + 1 < p.n) out[1] = static_cast<Real>(second);
    });
  }
};

}  // namespace angle::device
