// How the bindings ask the core for a batch: the one place that knows the core's call.
#pragma once
#include <cstdint>

#include "core/replay.h"

namespace angle {

// Draws into `addresses`: the fields in the schema's order, then discounts, importance weights, handles and steps.
// Cost and thread rule of Replay::sample, whose number it returns. ages: where the rows' ages go, for return_call.
inline uint64_t draw(Replay& replay, const SampleRequest& request, uint8_t* const* addresses,
                     uint64_t* ages = nullptr) {
  uint8_t* const* const rest = addresses + replay.record().fields.size();
  const SampleOut out{addresses,
                      reinterpret_cast<float*>(rest[0]),
                      reinterpret_cast<float*>(rest[1]),
                      reinterpret_cast<int64_t*>(rest[2]),
                      reinterpret_cast<int64_t*>(rest[3]),
                      ages};
  return replay.sample(request, out);
}

}  // namespace angle
