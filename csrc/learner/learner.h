// Whole updates of agents made of multilayer perceptrons, from sampled rows to new priorities.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/replay.h"
#include "learner/network.h"
#include "learner/optimizer.h"

namespace angle {

// What the td target takes for the value of the next observations: SAC's, TD3's, DDPG's, DQN's with and without the
// online network's choice. And what a policy step descends: SAC's loss, TD3's and DDPG's, nothing.
enum class NextValue : int { kSoft, kSmoothed, kDeterministic, kDouble, kMaximum };
enum class PolicyLoss : int { kSoft, kDeterministic, kNone };
enum class TargetsFollow : int { kUpdates, kPolicySteps, kCopies };  // each update, each with policy steps, on demand

struct LearnerOptions {
  size_t batch = 256, observation_dim = 1;
  NextValue next_value = NextValue::kSoft;
  PolicyLoss policy_loss = PolicyLoss::kSoft;
  // Actor-critics: the policy, the critics. DQN: its network; or trunk, advantages and value where it is dueling.
  std::vector<NetworkShape> networks;
  bool prioritized = true;
  bool writes_priorities = true;  // whether an update ends with the priorities of a prioritized replay
  TargetsFollow targets_follow = TargetsFollow::kUpdates;
  double tau = 0.005;
  double huber_delta = 0.0;        // <= 0: squared error
  double max_gradient_norm = 0.0;  // <= 0: no clipping
  size_t threads = 1;
  bool bfloat16 = false;  // float32 only: products of factors rounded to bfloat16, summed in float32

  // Actor-critics only
  size_t action_dim = 1, critics = 2;
  size_t critic_subset = 0;  // target critics drawn for each update, whose minimum counts; 0: all
  bool target_policy = false;
  bool fresh_policy_batch = false;
  double target_noise = 0.0, target_noise_clip = 0.0;
  bool learns_entropy = false;
  double target_entropy = 0.0;
  double log_std_low = -20.0, log_std_high = 2.0;
  std::vector<double> scale, center;          // [action_dim], from actions in [-1, 1] to the bounds
  std::vector<double> low, high, half_range;  // [action_dim], the bounds that noisy actions are clamped to

  // DQN only
  int64_t first_action = 0;  // the action that the first output stands for
};

// Where everything lies that an update reads and changes in place, told anew before each call.
template <class T>
struct LearnerTensors {
  struct Network {
    std::vector<AdamSlot<T>> slots;                // layer by layer: weight, bias[, scale, shift]; rows, columns and
                                                   // gradient are not read
    std::vector<LayerTensors<T>> layers, targets;  // the same once more
  };
  std::vector<Network> networks;  // as in the options
  // The entropy coefficient's logarithm and its Adam, [1] each, where it is learned.
  AdamSlot<T> log_coefficient;
  double entropy_coefficient = 0.0;
  double reward_scale = 1.0;         // on all rewards
  std::vector<double> loss_weights;  // [critics], on their losses, or empty: 1 each; actor-critics only
};

enum class FieldKind : int { kFloat, kDouble, kInt64 };

// Where one sampled batch goes, and how its fields are to be read.
struct BatchPlaces {
  // One for each tensor of a batch: observations, actions, rewards, next observations, discounts, importance weights,
  // handles, steps.
  uint8_t* tensors[8] = {};
  FieldKind kinds[4] = {};  // of the first four
};

struct UpdateCall {
  uint64_t key;  // decides all that is random in it, but for the rows drawn
  uint32_t policy_steps;
  bool copy_targets;  // read under TargetsFollow::kCopies
};

struct UpdateOutcome {
  size_t done = 0;  // calls taken, the one that failed included
  // What was not finite and ended the last of them: nothing, the critics' loss or gradient, the policy's.
  enum Failure : int { kNone, kCriticLoss, kCriticGradient, kPolicyLoss, kPolicyGradient } failure = kNone;
  double critic_loss = 0.0, policy_loss = 0.0;  // of the last call
  bool policy_stepped = false;                  // whether the last call had a policy loss
};

template <class T>
class Learner {
 public:
  virtual ~Learner() = default;

  // Takes the calls in order; stops after the first that meets something not finite: its steps from there on, its
  // priorities and its targets are left out. q: [critics, batch], td_error and log_prob: [batch], written by each.
  // request.n is the batch size. O(batch * parameters) a call. One thread at a time; no allocation from the second call
  // on. Throws what Replay::sample and update do.
  virtual UpdateOutcome run(const LearnerTensors<T>& tensors, const SampleRequest& request, const BatchPlaces& batch,
                            const BatchPlaces& policy_batch, const UpdateCall* calls, size_t n, T* q, T* td_error,
                            T* log_prob) = 0;

  // Bytes of the workspace.
  virtual size_t bytes() const = 0;
};

// The learner for these options, T float or double; allocates all that its updates write. Throws std::invalid_argument,
// std::bad_alloc.
template <class T>
std::unique_ptr<Learner<T>> make_learner(std::shared_ptr<Replay> replay, const LearnerOptions& options);

}  // namespace angle
