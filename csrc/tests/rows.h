// Rows whose every byte follows from one number, so that a torn or misplaced copy shows.
#pragma once
#include <cstdint>
#include <vector>

#include "core/replay.h"

namespace angle::testing {

// Odd sizes on purpose: a field of 4-byte elements that is no multiple of 8, one of bytes, one of doubles.
inline RecordLayout row_layout() {
  return RecordLayout({{"observations", 4, 68}, {"pixels", 1, 100}, {"rewards", 4, 4}, {"times", 8, 8}});
}

struct Rows {
  explicit Rows(size_t n) : observations(17 * n), pixels(100 * n), rewards(n), times(n), terminated(n) {}

  void fill(size_t row, uint32_t value) {
    for (size_t i = 0; i < 17; ++i) observations[17 * row + i] = value + static_cast<uint32_t>(i);
    for (size_t i = 0; i < 100; ++i) pixels[100 * row + i] = static_cast<uint8_t>(value * 31 + i);
    rewards[row] = value;
    times[row] = value * 3ull;
    terminated[row] = value % 5 == 0;
  }
  bool whole(size_t row) const {
    const uint32_t value = rewards[row];
    for (size_t i = 0; i < 17; ++i) {
      if (observations[17 * row + i] != value + static_cast<uint32_t>(i)) return false;
    }
    for (size_t i = 0; i < 100; ++i) {
      if (pixels[100 * row + i] != static_cast<uint8_t>(value * 31 + i)) return false;
    }
    return times[row] == value * 3ull;
  }
  std::vector<const uint8_t*> in() const {
    return {reinterpret_cast<const uint8_t*>(observations.data()), pixels.data(),
            reinterpret_cast<const uint8_t*>(rewards.data()), reinterpret_cast<const uint8_t*>(times.data())};
  }
  std::vector<uint8_t*> out() {
    return {reinterpret_cast<uint8_t*>(observations.data()), pixels.data(), reinterpret_cast<uint8_t*>(rewards.data()),
            reinterpret_cast<uint8_t*>(times.data())};
  }

  std::vector<uint32_t> observations;
  std::vector<uint8_t> pixels;
  std::vector<uint32_t> rewards;
  std::vector<uint64_t> times;
  std::vector<uint8_t> terminated;
};

struct Drawn {
  explicit Drawn(size_t n) : rows(n), discounts(n), importance_weights(n), handles(n), steps(n) {}
  Rows rows;
  std::vector<float> discounts, importance_weights;
  std::vector<int64_t> handles, steps;
};

template <class Access>
void insert_values(ReplayT<Access>& replay, const std::vector<uint32_t>& values, std::vector<int64_t>& handles) {
  Rows rows(values.size());
  for (size_t i = 0; i < values.size(); ++i) rows.fill(i, values[i]);
  const auto in = rows.in();
  handles.resize(values.size());
  replay.insert({values.size(), in.data(), rows.terminated.data()}, handles.data());
}

template <class Access>
void draw(ReplayT<Access>& replay, Drawn& drawn, double importance_exponent = 0.4, bool stratified = true) {
  const auto out = drawn.rows.out();
  SampleRequest request;
  request.n = drawn.handles.size();
  request.importance_exponent = importance_exponent;
  request.stratified = stratified;
  replay.sample(request, {out.data(), drawn.discounts.data(), drawn.importance_weights.data(), drawn.handles.data(),
                          drawn.steps.data()});
}

}  // namespace angle::testing
