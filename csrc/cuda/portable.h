// What lets one source be a kernel for a device (nvcc) and a loop on the host (any C++20 compiler): the second is how
// the kernels are tested where there is no device.
//
// A kernel is a struct: Params, by value; Shared, the memory of one block; kThreads; and
//   static void run(Block<Shared>& block, const Params& p).
// Its body is a row of phases, block.each_thread(f) and block.each_warp(f), each followed by a barrier. On the device f
// runs once, for the calling thread or warp; on the host for all of them in turn. So nothing but Shared may pass from
// one phase to the next. Within a warp, warp.each(f) runs f for each lane; what lanes keep lives in Lanes<T>, which is
// one register on the device and 32 values on the host; scan, ballot, sum, sums_of, least and broadcast work across the
// lanes.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ANGLE_DEVICE __device__ __forceinline__
#define ANGLE_KERNEL_FUNCTION __device__ __forceinline__
#define ANGLE_UNROLL _Pragma("unroll")
#include <cuda_runtime.h>
#else
#define ANGLE_DEVICE inline
#define ANGLE_UNROLL
#endif

namespace angle::device {

constexpr int kLanes = 32;

// ---- words that several threads change; relaxed, as all that depends on them comes after a barrier or a launch ----

#if defined(__CUDACC__)
ANGLE_DEVICE void add(int64_t* at, int64_t by) {
  atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(by));
}
ANGLE_DEVICE void add(uint64_t* at, uint64_t by) {
  atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(by));
}
ANGLE_DEVICE void add(int32_t* at, int32_t by) { atomicAdd(at, by); }
ANGLE_DEVICE uint32_t add_and_tell(uint32_t* at, uint32_t by) { return atomicAdd(at, by); }
ANGLE_DEVICE void raise(uint64_t* at, uint64_t value) {
  atomicMax(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
}
ANGLE_DEVICE void lower(uint64_t* at, uint64_t value) {
  atomicMin(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
}
// A value that other blocks have changed during this kernel.
ANGLE_DEVICE uint64_t fresh(const uint64_t* at) { return *const_cast<const volatile uint64_t*>(at); }
// What was there; `desired` is there now if that was `expected`.
ANGLE_DEVICE uint64_t swap_if(uint64_t* at, uint64_t expected, uint64_t desired) {
  return atomicCAS(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(expected),
                   static_cast<unsigned long long>(desired));
}
// All writes before it are seen by whoever sees a write after it.
ANGLE_DEVICE void fence() { __threadfence(); }
ANGLE_DEVICE void fence_for_host() { __threadfence_system(); }
#else
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
ANGLE_DEVICE uint64_t swap_if(uint64_t* at, uint64_t expected, uint64_t desired) {
  const uint64_t found = *at;
  if (found == expected) *at = desired;
  return found;
}
ANGLE_DEVICE void fence() {}
ANGLE_DEVICE void fence_for_host() {}
#endif

// Of bits that are not all 0, the lowest that is 1.
#if defined(__CUDACC__)
ANGLE_DEVICE int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }
#else
ANGLE_DEVICE int lowest_bit(uint32_t bits) { return std::countr_zero(bits); }
#endif

// ---- a warp ----

#if defined(__CUDACC__)

template <class T>
class Lanes {
 public:
  ANGLE_DEVICE T& operator[](int) { return own_; }
  ANGLE_DEVICE const T& operator[](int) const { return own_; }

 private:
  T own_{};
};

class Warp {
 public:
  ANGLE_DEVICE explicit Warp(uint32_t index_in) : index(index_in) {}
  const uint32_t index;  // within the block

  template <class F>
  ANGLE_DEVICE void each(F&& f) const {
    f(static_cast<int>(threadIdx.x % kLanes));
    __syncwarp();
  }
  // Running sums over the lanes, each with its own.
  template <class T>
  ANGLE_DEVICE Lanes<T> scan(const Lanes<T>& values) const {
    const int lane = static_cast<int>(threadIdx.x % kLanes);
    Lanes<T> sums = values;
    for (int step = 1; step < kLanes; step *= 2) {
      const T other = __shfl_up_sync(kAll, sums[lane], static_cast<unsigned>(step));
      if (lane >= step) sums[lane] += other;
    }
    return sums;
  }
  template <class T>
  ANGLE_DEVICE T sum(const Lanes<T>& values) const {
    T total = values[0];
    for (int step = kLanes / 2; step > 0; step /= 2) total += __shfl_xor_sync(kAll, total, step);
    return total;
  }
  // The same over each group of `width` lanes, a power of two, for all lanes of it.
  template <class T>
  ANGLE_DEVICE Lanes<T> sums_of(const Lanes<T>& values, uint32_t width) const {
    Lanes<T> sums = values;
    for (int step = static_cast<int>(width) / 2; step > 0; step /= 2) {
      sums[0] += __shfl_xor_sync(kAll, sums[0], step);
    }
    return sums;
  }
  template <class T>
  ANGLE_DEVICE T least(const Lanes<T>& values) const {
    T found = values[0];
    for (int step = kLanes / 2; step > 0; step /= 2) {
      const T other = __shfl_xor_sync(kAll, found, step);
      found = other < found ? other : found;
    }
    return found;
  }
  // Bit l: whether lane l's is true.
  ANGLE_DEVICE uint32_t ballot(const Lanes<bool>& values) const { return __ballot_sync(kAll, values[0]); }
  template <class T>
  ANGLE_DEVICE T broadcast(const Lanes<T>& values, int from) const {
    return __shfl_sync(kAll, values[0], from);
  }

 private:
  static constexpr unsigned kAll = 0xFFFFFFFFu;
};

template <class Shared>
class Block {
 public:
  ANGLE_DEVICE explicit Block(Shared& shared_in)
      : shared(shared_in), index(blockIdx.x), blocks(gridDim.x), threads(blockDim.x) {}
  Shared& shared;
  const uint32_t index, blocks, threads;

  template <class F>
  ANGLE_DEVICE void each_thread(F&& f) {
    f(threadIdx.x);
    __syncthreads();
  }
  template <class F>
  ANGLE_DEVICE void each_warp(F&& f) {
    const Warp warp(threadIdx.x / kLanes);
    f(warp);
    __syncthreads();
  }
};

#else

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

#endif

// ---- launching: 0, or the device's error code, which error_text explains ----

#if defined(__CUDACC__)
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads) run_kernel(const __grid_constant__ typename Kernel::Params p) {
  __shared__ __align__(16) unsigned char memory[sizeof(typename Kernel::Shared)];
  Block<typename Kernel::Shared> block(*reinterpret_cast<typename Kernel::Shared*>(memory));
  Kernel::run(block, p);
}

template <class Kernel>
int launch(const typename Kernel::Params& p, uint64_t blocks, void* stream) {
  if (blocks == 0) return 0;
  run_kernel<Kernel><<<static_cast<unsigned>(blocks), Kernel::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return static_cast<int>(cudaGetLastError());
}

inline const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
#else
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
#endif

}  // namespace angle::device
