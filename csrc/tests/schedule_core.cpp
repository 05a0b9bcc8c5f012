// The replay under the scheduler, compiled apart from its scenarios.
#include "core/care.inl"
#include "core/insert.inl"
#include "core/sample.inl"
#include "core/update.inl"
#include "scheduled_replay.h"

namespace angle {

template class ReplayT<testing::ScheduledAccess>;
template size_t ReplayT<testing::ScheduledAccess>::update<float>(const int64_t*, const float*, size_t);

}  // namespace angle
