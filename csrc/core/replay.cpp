// The shipped replays: one per way of touching shared memory.
#include "core/replay.h"

#include "core/care.inl"
#include "core/insert.inl"
#include "core/sample.inl"
#include "core/update.inl"

namespace angle {

#define ANGLE_INSTANTIATE(Access)                                                       \
  template class ReplayT<Access>;                                                       \
  template size_t ReplayT<Access>::update<float>(const int64_t*, const float*, size_t); \
  template size_t ReplayT<Access>::update<double>(const int64_t*, const double*, size_t);

ANGLE_INSTANTIATE(WordAccess)
#if !defined(ANGLE_WORD_ACCESS)
ANGLE_INSTANTIATE(VectorAccess)
#endif

}  // namespace angle
