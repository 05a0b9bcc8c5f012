// What the updates of all agents share: a team that meets between phases, sampled rows, and Adam's step.
//
// In a phase by columns each thread takes its share of the batch through whole networks; in one by rows its share of
// the parameters. Between two phases all meet.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "core/philox.h"
#include "learner/learner.h"
#include "learner/optimizer.h"
#include "learner/team.h"

namespace angle {

template <class T>
const OpsKernelsOf<T>& ops_kernels() {
  if constexpr (sizeof(T) == sizeof(float))
    return kernels().ops.f32;
  else
    return kernels().ops.f64;
}

// The two kinds of learners, for make_learner.
template <class T>
std::unique_ptr<Learner<T>> make_actor_critic(std::shared_ptr<Replay> replay, const LearnerOptions& options);
template <class T>
std::unique_ptr<Learner<T>> make_action_values(std::shared_ptr<Replay> replay, const LearnerOptions& options);

template <class T>
class Phases : public Learner<T> {
 public:
  Phases(std::shared_ptr<Replay> the_replay, const LearnerOptions& the_options)
      : options(the_options), replay(std::move(the_replay)), team(the_options.threads) {
    one_work = [this](size_t t) { work(t); };
  }

  UpdateOutcome run(const LearnerTensors<T>& tensors, const SampleRequest& the_request, const BatchPlaces& the_batch,
                    const BatchPlaces& the_policy_batch, const UpdateCall* the_calls, size_t n, T* q, T* td_error,
                    T* log_prob) override {
    for (size_t i = 0; i < optimizers.size(); ++i) take_slots(optimizers[i], tensors.networks.at(i).slots);
    told = &tensors;
    take_tensors();
    request = the_request;
    batch = &the_batch;
    policy_batch = &the_policy_batch;
    q_out = q;
    td_error_out = td_error;
    log_prob_out = log_prob;
    entropy_coefficient = tensors.entropy_coefficient;
    reward_scale = tensors.reward_scale;
    calls = the_calls;
    count = n;
    outcome = {};
    thrown = nullptr;
    team.run(one_work);
    if (thrown) std::rethrow_exception(thrown);
    return outcome;
  }
  size_t bytes() const override { return space.bytes(); }

 protected:
  static constexpr size_t kChunk = 256;   // columns that pass through all networks before the next ones
  static constexpr size_t kAligned = 32;  // columns that a thread's share is a multiple of
  static constexpr size_t kApart = 8;     // doubles of a cache line

  struct Rows {  // one sampled batch beside its fields
    T* rewards;  // [batch]
    T* discounts;
    T* weights;
  };

  // One update, by every thread. False: nothing follows it.
  virtual bool one(const UpdateCall& call, size_t t) = 0;
  // Takes over where the networks lie.
  virtual void take_tensors() = 0;

  // Lays out what all updates need.
  void lay_out_shared(Workspace& s) {
    for (Rows* rows : {&critic_rows, &policy_rows}) {
      rows->rewards = s.take<T>(options.batch);
      rows->discounts = s.take<T>(options.batch);
      rows->weights = s.take<T>(options.batch);
    }
    sums = s.take<double>(2 * kApart * options.threads);
  }

  // How networks multiply. Throws std::invalid_argument where bfloat16 is asked for and cannot be had.
  auto product() const -> void (*)(const Product<T>&) {
    if (!options.bfloat16) return learner_kernels<T>().product;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (bfloat16_product() != nullptr) return bfloat16_product();
    }
    throw std::invalid_argument("there are no bfloat16 products of these numbers on this CPU");
  }

  // What only one thread does, while the others wait. False, for all, where it threw.
  template <class Serial>
  bool alone(size_t t, const Serial& serial) {
    if (t == 0) {
      try {
        serial();
      } catch (...) {
        thrown = std::current_exception();
      }
    }
    team.meet();
    return thrown == nullptr;
  }

  bool fail(size_t t, UpdateOutcome::Failure failure) {
    if (t == 0) outcome.failure = failure;
    return false;
  }

  // Adam's step of this thread's rows of optimizers [first, end), where all their gradients are finite.
  bool descend(size_t first, size_t end, size_t t) {
    double squares = 0.0;
    for (size_t i = first; i < end; ++i) squares += optimizers[i].squares();
    const double norm = std::sqrt(squares), most = options.max_gradient_norm;
    if (!std::isfinite(norm)) return false;
    // As torch.nn.utils.clip_grad_norm_.
    const double scale = most > 0.0 ? std::min(1.0, most / (norm + 1e-6)) : 1.0;
    for (size_t i = first; i < end; ++i) optimizers[i].step(scale, t);
    return true;
  }

  // The targets' move of this thread's rows, where it is due.
  void move_targets(const UpdateCall& call, size_t t) {
    const bool copies = options.targets_follow == TargetsFollow::kCopies;
    if (!(copies ? call.copy_targets : call.policy_steps > 0 || options.targets_follow == TargetsFollow::kUpdates)) {
      return;
    }
    for (Optimizer<T>& optimizer : optimizers) optimizer.move_targets(copies ? 1.0 : options.tau, t);
  }

  void write_priorities() {
    if (!options.prioritized || !options.writes_priorities) return;
    replay->update(reinterpret_cast<const int64_t*>(batch->tensors[6]), td_error_out, options.batch);
  }

  // --- Rows ---

  void draw(const BatchPlaces& into, const Rows& rows) {
    const SampleOut out{into.tensors, reinterpret_cast<float*>(into.tensors[4]),
                        reinterpret_cast<float*>(into.tensors[5]), reinterpret_cast<int64_t*>(into.tensors[6]),
                        reinterpret_cast<int64_t*>(into.tensors[7])};
    replay->sample(request, out);
    const size_t n = options.batch;
    read(into, 2, 0, n, [&](size_t i, double value) { rows.rewards[i] = static_cast<T>(value * reward_scale); });
    for (size_t i = 0; i < n; ++i) rows.discounts[i] = static_cast<T>(out.discounts[i]);
    for (size_t i = 0; i < n; ++i) rows.weights[i] = static_cast<T>(out.importance_weights[i]);
  }

  // write(i, value) for elements [first, first + n) of one of a batch's fields of floats.
  template <class Write>
  static void read(const BatchPlaces& from, size_t field, size_t first, size_t n, const Write& write) {
    if (from.kinds[field] == FieldKind::kDouble) {
      const double* const values = reinterpret_cast<const double*>(from.tensors[field]) + first;
      for (size_t i = 0; i < n; ++i) write(i, values[i]);
    } else {
      const float* const values = reinterpret_cast<const float*>(from.tensors[field]) + first;
      for (size_t i = 0; i < n; ++i) write(i, static_cast<double>(values[i]));
    }
  }

  // to[i, j] = element i of row j of a field.
  static void read_columns(const BatchPlaces& from, size_t field, size_t width, Columns at, Matrix<T> to) {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (from.kinds[field] == FieldKind::kFloat) {
        const float* const rows = reinterpret_cast<const float*>(from.tensors[field]);
        learner_kernels<T>().transpose(rows + at.first * width, width, to.at(0, at.first), to.row, at.n, width);
        return;
      }
    }
    for (size_t j = at.first; j < at.first + at.n; ++j) {
      read(from, field, j * width, width, [&](size_t i, double value) { *to.at(i, j) = static_cast<T>(value); });
    }
  }

  // --- Phases by columns ---

  template <class Work>
  void by_columns(size_t t, const Work& phase) {
    sums[2 * kApart * t] = sums[2 * kApart * t + 1] = 0.0;
    const Columns mine = share_of(options.batch, t, team.size(), kAligned);
    for (size_t first = mine.first; first < mine.first + mine.n; first += kChunk) {
      phase(Columns{first, std::min(kChunk, mine.first + mine.n - first)});
    }
  }
  // Losses that the threads have summed up: 0 the critics', 1 the policy's.
  void add_loss(size_t which, size_t t, double sum) { sums[2 * kApart * t + which] += sum; }
  double mean_loss(size_t which) const {
    double sum = 0.0;
    for (size_t t = 0; t < options.threads; ++t) sum += sums[2 * kApart * t + which];
    return sum / static_cast<double>(options.batch);
  }

  const LearnerOptions options;
  std::shared_ptr<Replay> replay;
  Team team;
  std::vector<Optimizer<T>> optimizers;  // one for each network

  // Of the present call.
  SampleRequest request{};
  const BatchPlaces* batch = nullptr;
  const BatchPlaces* policy_batch = nullptr;
  const LearnerTensors<T>* told = nullptr;
  T* q_out = nullptr;
  T* td_error_out = nullptr;
  T* log_prob_out = nullptr;
  UpdateOutcome outcome;
  double entropy_coefficient = 0.0, reward_scale = 1.0;

  Workspace space;
  Rows critic_rows{}, policy_rows{};

 private:
  static void take_slots(Optimizer<T>& optimizer, const std::vector<AdamSlot<T>>& given) {
    if (given.size() != optimizer.slots.size()) throw std::invalid_argument("the number of an optimizer's tensors");
    for (size_t i = 0; i < given.size(); ++i) {
      AdamSlot<T>& own = optimizer.slots[i];
      own.value = given[i].value;
      own.first = given[i].first;
      own.second = given[i].second;
      own.target = given[i].target;
      own.steps = given[i].steps;
      own.group = given[i].group;
    }
  }

  void work(size_t t) {
    for (size_t i = 0; i < count; ++i) {
      if (!one(calls[i], t)) return;
    }
  }

  std::function<void(size_t)> one_work;
  const UpdateCall* calls = nullptr;
  size_t count = 0;
  std::exception_ptr thrown;
  double* sums = nullptr;  // a cache line of partial losses for each thread
};

}  // namespace angle
