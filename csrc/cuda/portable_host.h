// Kernels as loops on the host: one thread, a phase after the other. Included by portable.h, which says what each part
// does.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace angle::device {

// ---- words that several threads change ----

template <class T>
ANGLE_DEVICE void add(T* at, T by) {
  *at += by;
}
ANGLE_DEVICE uint32_t add_and_tell(uint32_t* at, uint32_t by) {
  const uint32_t found = *at;
  *at += by;
  return found;
}
ANGLE_DEVICE void raise(uint64_t* at, uint64_t value) { *at = value > *at ? value : *at; }
ANGLE_DEVICE void lower(uint64_t* at, uint64_t value) { *at = value < *at ? value : *at; }
ANGLE_DEVICE uint64_t fresh(const uint64_t* at) { return *at; }
ANGLE_DEVICE void set(uint64_t* at, uint64_t value) { *at = value; }
ANGLE_DEVICE uint64_t swap_if(uint64_t* at, uint64_t expected, uint64_t desired) {
  const uint64_t found = *at;
  if (found == expected) *at = desired;
  return found;
}
ANGLE_DEVICE void fence() {}
ANGLE_DEVICE void fence_for_host() {}

// Of bits that are not all 0, the lowest that is 1.
ANGLE_DEVICE int lowest_bit(uint32_t bits) { return std::countr_zero(bits); }

// ---- a warp and a block ----

template <class T>
class Lanes {
 public:
  T& operator[](int lane) { return values_[lane]; }
  const T& operator[](int lane) const { return values_[lane]; }

 private:
  T values_[kLanes]{};
};

class Warp {
 public:
  explicit Warp(uint32_t index_in) : index(index_in) {}
  const uint32_t index;

  template <class F>
  void each(F&& f) const {
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  }
  template <class T>
  Lanes<T> scan(const Lanes<T>& values) const {
    Lanes<T> sums = values;
    for (int lane = 1; lane < kLanes; ++lane) sums[lane] += sums[lane - 1];
    return sums;
  }
  template <class T>
  T sum(const Lanes<T>& values) const {
    return sums_of(values, kLanes)[0];
  }
  template <class T>
  Lanes<T> sums_of(const Lanes<T>& values, uint32_t width) const {
    // In the device's order, so that sums of floats are the same.
    Lanes<T> partial = values;
    for (int step = static_cast<int>(width) / 2; step > 0; step /= 2) {
      const Lanes<T> before = partial;
      for (int lane = 0; lane < kLanes; ++lane) partial[lane] = before[lane] + before[lane ^ step];
    }
    return partial;
  }
  template <class T>
  T least(const Lanes<T>& values) const {
    T found = values[0];
    for (int lane = 1; lane < kLanes; ++lane) found = values[lane] < found ? values[lane] : found;
    return found;
  }
  uint32_t ballot(const Lanes<bool>& values) const {
    uint32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<uint32_t>(values[lane]) << lane;
    return bits;
  }
  template <class T>
  T broadcast(const Lanes<T>& values, int from) const {
    return values[from];
  }
};

template <class Shared>
class Block {
 public:
  Block(Shared& shared_in, uint32_t index_in, uint32_t blocks_in, uint32_t threads_in)
      : shared(shared_in), index(index_in), blocks(blocks_in), threads(threads_in) {}
  Shared& shared;
  const uint32_t index, blocks, threads;

  template <class F>
  void each_thread(F&& f) {
    for (uint32_t thread = 0; thread < threads; ++thread) f(thread);
  }
  template <class F>
  void each_warp(F&& f) {
    for (uint32_t index_of = 0; index_of < threads / kLanes; ++index_of) {
      const Warp warp(index_of);
      f(warp);
    }
  }
};

// ---- launching ----

template <class Kernel>
int launch(const typename Kernel::Params& p, uint64_t blocks, void*) {
  auto* const shared = new typename Kernel::Shared;
  for (uint64_t index = 0; index < blocks; ++index) {
    // As undefined as a block's memory on a device is.
    std::memset(static_cast<void*>(shared), 0xA5, sizeof *shared);
    Block<typename Kernel::Shared> block(*shared, static_cast<uint32_t>(index), static_cast<uint32_t>(blocks),
                                         Kernel::kThreads);
    Kernel::run(block, p);
  }
  delete shared;
  return 0;
}

inline const char* error_text(int) { return "no error is known on the host"; }

}  // namespace angle::device
