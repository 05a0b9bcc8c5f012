// How the bindings ask the core for a batch: the one place that knows the core's call.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/replay.h"

namespace angle {

// A request as the facade says it. flags: 1 stratified, 2 with replacement, 4 importance weights bound by the buffer.
inline SampleRequest sample_request(size_t n, uint32_t n_step, double discount, double importance_exponent,
                                    uint32_t flags) {
  SampleRequest made{n};
  made.n_step = n_step;
  made.discount = discount;
  made.importance_exponent = importance_exponent;
  made.stratified = (flags & 1) != 0;
  made.replacement = (flags & 2) != 0;
  made.bound_by_buffer = (flags & 4) != 0;
  return made;
}

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
