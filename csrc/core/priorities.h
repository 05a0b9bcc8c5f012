// From priorities to integer weights and back.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "kernels/kernels.h"

namespace angle {

// weight = (priority + epsilon) ** exponent in units of 2**-20, by fixed float64 arithmetic: equal on every machine.
// Priorities are float32.
struct PriorityMap {
  static constexpr double kUnit = 1048576.0;

  double exponent, epsilon;
  uint64_t largest;  // heavier weights are cut to this one

  // To fixed point; a positive weight never becomes 0. O(1).
  uint64_t fixed(double weight, uint64_t* saturated) const {
    const double scaled = weight * kUnit;
    if (!(scaled < static_cast<double>(largest))) {
      ++*saturated;
      return largest;
    }
    const uint64_t rounded = static_cast<uint64_t>(scaled + 0.5);
    return rounded == 0 && weight > 0.0 ? 1 : rounded;
  }
  // O(1).
  uint64_t weight(float priority, uint64_t* saturated) const {
    double value = static_cast<double>(priority) + epsilon;
    kernels().replay.powers(&value, 1, exponent);
    return fixed(value, saturated);
  }
  uint64_t weight(float priority) const {
    uint64_t saturated = 0;
    return weight(priority, &saturated);
  }
  // The least float32 priority whose weight is about `weight`; 1 where the exponent is 0. O(1).
  float priority(uint64_t weight) const {
    if (exponent == 0.0) return 1.0f;
    const double found = std::pow(static_cast<double>(weight) / kUnit, 1.0 / exponent) - epsilon;
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

}  // namespace angle
