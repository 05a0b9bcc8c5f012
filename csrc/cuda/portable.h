// What lets one source be a kernel for a device (nvcc), a loop on the host (any C++20 compiler), by which the kernels
// are tested where there is no device, and, under ANGLE_DEVICE_THREADS, threads on the host, one for each of a
// device's, in which ThreadSanitizer finds what a loop cannot show: races, and barriers that are missing or diverge.
//
// A kernel is a struct: Params, by value; Shared, the memory of one block; kThreads; and
//   static void run(Block<Shared>& block, const Params& p).
// Its body is a row of phases, block.each_thread(f) and block.each_warp(f), each followed by a barrier. On the device f
// runs once, for the calling thread or warp; on the host for all of them in turn. So nothing but Shared may pass from
// one phase to the next. Within a warp, warp.each(f) runs f for each lane; what lanes keep lives in Lanes<T>, which is
// one register on the device and 32 values on the host; scan, ballot, sum, sums_of, least and broadcast work across the
// lanes. Only the end of warp.each orders what lanes write and read in memory.
//
// Words that several threads change or that change under readers go through functions, all of them relaxed, as what
// depends on them comes after a barrier or a launch:
//   add, raise, lower      the word becomes the sum, the larger, the smaller
//   add_and_tell, swap_if  give what was there; with swap_if `desired` is there now if that was `expected`
//   fresh, set             a load and a store
//   fence, fence_for_host  all writes before it are seen by whoever sees a write after it
//
// launch<Kernel>(p, blocks, stream) gives 0, or the device's error code, which error_text explains.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ANGLE_DEVICE __device__ __forceinline__
#define ANGLE_KERNEL_FUNCTION __device__ __forceinline__
#define ANGLE_UNROLL _Pragma("unroll")
#else
#define ANGLE_DEVICE inline
#define ANGLE_UNROLL
#endif

namespace angle::device {

constexpr int kLanes = 32;

}  // namespace angle::device

#if defined(__CUDACC__)
#include "cuda/portable_device.h"
#elif defined(ANGLE_DEVICE_THREADS)
#include "cuda/portable_threads.h"
#else
#include "cuda/portable_host.h"
#endif
