// From priorities to integer weights and back.
#pragma once
#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace angle {

// weight = (priority + epsilon) ** exponent by fixed float64 arithmetic, in fixed point: equal on every machine.
// Priorities are float32.
struct PriorityMap {
  double exponent, epsilon;
  uint64_t largest;  // heavier weights are cut to this one

  // O(1).
  uint64_t weight(float priority, uint64_t* saturated) const {
    uint64_t found = 0;
    *saturated += kernels().replay.weigh(&priority, 1, epsilon, exponent, largest, &found);
    return found;
  }
  uint64_t weight(float priority) const {
    uint64_t saturated = 0;
    return weight(priority, &saturated);
  }
  // The least float32 priority whose weight is about `weight`; 1 where the exponent is 0. O(1).
  float priority(uint64_t weight) const {
    if (exponent == 0.0) return 1.0f;
    const double found = std::pow(static_cast<double>(weight) / kWeightUnit, 1.0 / exponent) - epsilon;
    if (!(found < static_cast<double>(FLT_MAX))) return FLT_MAX;
    const float nearest = static_cast<float>(std::max(found, 0.0));
    return static_cast<double>(nearest) < found ? std::nextafterf(nearest, FLT_MAX) : nearest;
  }
  // A td error as a float32 priority: too large becomes the largest, a positive one never 0. O(1).
  static float narrow(double td_error) {
    if (td_error >= static_cast<double>(FLT_MAX)) return FLT_MAX;
    const float nearest = static_cast<float>(td_error);
    return nearest == 0.0f && td_error > 0.0 ? FLT_TRUE_MIN : nearest;
  }
};

// Throws std::invalid_argument for one that is not finite or negative, by name and index. O(n).
inline void require_priorities(const char* name, const double* values, size_t n) {
  if (kernels().replay.are_priorities_f64(values, n)) return;
  for (size_t i = 0; i < n; ++i) {
    if (values[i] >= 0.0 && !std::isinf(values[i])) continue;
    throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(values[i]) +
                                "; priorities must be finite and not negative");
  }
}

inline void require_priorities(const char* name, const float* values, size_t n) {
  if (kernels().replay.are_priorities_f32(values, n)) return;
  const std::vector<double> wide(values, values + n);
  require_priorities(name, wide.data(), n);
}

// td errors as float32 priorities, in `into` unless they are already. O(n).
inline const float* narrowed(const float* td_errors, size_t, std::vector<float>&) { return td_errors; }
inline const float* narrowed(const double* td_errors, size_t n, std::vector<float>& into) {
  for (size_t i = 0; i < n; ++i) into[i] = PriorityMap::narrow(td_errors[i]);
  return into.data();
}

// Of numbers that are not negative, by their bits: those are in the same order, and a vector compares them at once.
inline float largest_of(const float* values, size_t n) {
  int32_t largest = 0;
  for (size_t i = 0; i < n; ++i) largest = std::max(largest, std::bit_cast<int32_t>(values[i]));
  return std::bit_cast<float>(largest);
}

}  // namespace angle
