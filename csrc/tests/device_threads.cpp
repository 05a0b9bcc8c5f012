// The device kernels with a thread for each of a device's: they give what the host's core and kernels give, and under
// ThreadSanitizer every race between threads of a block or between blocks shows.
#define ANGLE_DEVICE_THREADS 1
#include "device_threads.h"

#include "cuda/launch.inl"

int main() {
  angle::testing::check_ops();
  angle::testing::check_replays();
  return 0;
}
