// Kernels as a device runs them. Included by portable.h, which says what each part does.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace angle::device {

// ---- words that several threads change ----

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
ANGLE_DEVICE uint64_t fresh(const uint64_t* at) { return *const_cast<const volatile uint64_t*>(at); }
ANGLE_DEVICE void set(uint64_t* at, uint64_t value) { *const_cast<volatile uint64_t*>(at) = value; }
ANGLE_DEVICE uint64_t swap_if(uint64_t* at, uint64_t expected, uint64_t desired) {
  return atomicCAS(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(expected),
                   static_cast<unsigned long long>(desired));
}
ANGLE_DEVICE void fence() { __threadfence(); }
ANGLE_DEVICE void fence_for_host() { __threadfence_system(); }

// Of bits that are not all 0, the lowest that is 1.
ANGLE_DEVICE int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }

// ---- a warp and a block ----

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

// ---- launching ----

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

}  // namespace angle::device
