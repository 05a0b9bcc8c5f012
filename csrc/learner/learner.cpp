#include "learner/learner.h"

#include <utility>

#include "learner/phases.h"

namespace angle {

template <class T>
std::unique_ptr<Learner<T>> make_learner(std::shared_ptr<Replay> replay, const LearnerOptions& options) {
  const bool values = options.next_value == NextValue::kDouble || options.next_value == NextValue::kMaximum;
  return values ? make_action_values<T>(std::move(replay), options) : make_actor_critic<T>(std::move(replay), options);
}
template std::unique_ptr<Learner<float>> make_learner(std::shared_ptr<Replay>, const LearnerOptions&);
template std::unique_ptr<Learner<double>> make_learner(std::shared_ptr<Replay>, const LearnerOptions&);

}  // namespace angle
