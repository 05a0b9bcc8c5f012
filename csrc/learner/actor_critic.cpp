// SAC, TD3 and DDPG: a policy, critics, and targets that follow.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "learner/phases.h"

namespace angle {
namespace {

template <class T>
class ActorCritic final : public Phases<T> {
  using Base = Phases<T>;
  using Base::add_loss, Base::alone, Base::batch, Base::by_columns, Base::critic_rows, Base::descend, Base::draw,
      Base::entropy_coefficient, Base::fail, Base::kChunk, Base::log_prob_out, Base::mean_loss, Base::move_targets,
      Base::optimizers, Base::options, Base::outcome, Base::policy_batch, Base::policy_rows, Base::q_out,
      Base::read_columns, Base::space, Base::td_error_out, Base::team, Base::told, Base::write_priorities;
  using typename Base::Rows;

 public:
  ActorCritic(std::shared_ptr<Replay> the_replay, const LearnerOptions& the_options)
      : Base(std::move(the_replay), the_options) {
    check();
    policy.shape = options.networks[0];
    critics.shape = options.networks[1];
    critics.members = options.critics;
    policy.product = critics.product = this->product();
    target_policy = policy;
    target_critics = critics;
    chosen.resize(options.critics);
    space.make([this](Workspace& s) { lay_out(s); });
  }

 protected:
  bool one(const UpdateCall& call, size_t t) override {
    const bool last_thread = t + 1 == team.size();
    const uint64_t target_key = philox_split(call.key, 0);
    // A subset of the critics is drawn with a key of its own, and then the rest with another.
    if (last_thread) draw_next_noise(options.critic_subset > 0 ? philox_split(target_key, 1) : target_key);
    const bool sampled = alone(t, [&] {
      outcome.policy_stepped = false;
      choose_targets(philox_split(target_key, 0));
      draw(*batch, critic_rows);
      ++outcome.done;
    });
    if (!sampled) return false;
    by_columns(t, [&](Columns at) { critic_columns(at, t); });
    team.meet();
    optimizers[kCritics].collect(critics, critic_tapes, x, options.batch, t);
    team.meet();
    const double loss = mean_loss(0);
    if (t == 0) outcome.critic_loss = loss;
    if (!std::isfinite(loss)) return fail(t, UpdateOutcome::kCriticLoss);
    if (!descend(kCritics, kCritics + 1, t)) return fail(t, UpdateOutcome::kCriticGradient);

    for (uint32_t step = 0; step < call.policy_steps; ++step) {
      if (last_thread) draw_noise(philox_split(call.key, 1 + step));
      const bool ready = alone(t, [&] {
        if (options.fresh_policy_batch) draw(*policy_batch, policy_rows);
      });
      // All have stepped, and nobody asks for the count before they meet again.
      if (t == 0 && step == 0) optimizers[kCritics].count_step();
      if (!ready) return false;
      by_columns(t, [&](Columns at) { policy_columns(at, t); });
      team.meet();
      optimizers[kPolicy].collect(policy, policy_tapes, x, options.batch, t);
      team.meet();
      const double policy_loss = mean_loss(1);
      if (t == 0) {
        outcome.policy_loss = policy_loss;
        outcome.policy_stepped = true;
      }
      if (!std::isfinite(policy_loss)) return fail(t, UpdateOutcome::kPolicyLoss);
      if (!descend(kPolicy, kPolicy + 1, t)) return fail(t, UpdateOutcome::kPolicyGradient);
      alone(t, [&] { learn_entropy_coefficient(); });
      if (t == 0) optimizers[kPolicy].count_step();
    }
    move_targets(call, t);
    const bool done = alone(t, [&] { write_priorities(); });
    if (t == 0 && call.policy_steps == 0) optimizers[kCritics].count_step();
    return done;
  }

  void take_tensors() override {
    const auto& given = told->networks;
    policy.layers = given[kPolicy].layers;
    critics.layers = given[kCritics].layers;
    target_policy.layers = given[kPolicy].targets;
    target_critics.layers = given[kCritics].targets;
    const std::vector<double>& weights = told->loss_weights;
    if (!weights.empty() && weights.size() != options.critics) throw std::invalid_argument("a loss weight a critic");
    weighted = std::any_of(weights.begin(), weights.end(), [](double weight) { return weight != 1.0; });
  }

 private:
  static constexpr size_t kPolicy = 0, kCritics = 1;  // of options.networks and optimizers

  void check() const {
    if (options.batch < 1 || options.threads < 1 || options.critics < 1 || options.networks.size() != 2) {
      throw std::invalid_argument("an actor-critic needs a batch, a thread, a policy and a critic");
    }
    const size_t inputs = options.observation_dim + options.action_dim;
    const size_t outputs = options.policy_loss == PolicyLoss::kSoft ? 2 * options.action_dim : options.action_dim;
    const auto fits = [](const NetworkShape& shape, size_t first, size_t last) {
      return shape.sizes.size() >= 2 && shape.sizes.front() == first && shape.sizes.back() == last;
    };
    if (!fits(options.networks[kPolicy], options.observation_dim, outputs)) {
      throw std::invalid_argument("the policy's sizes do not fit the observations and actions");
    }
    if (!fits(options.networks[kCritics], inputs, 1)) {
      throw std::invalid_argument("the critics' sizes do not fit the observations and actions");
    }
    if (options.critic_subset > options.critics) throw std::invalid_argument("critic_subset exceeds critics");
    for (const auto* bounds : {&options.scale, &options.center, &options.low, &options.high, &options.half_range}) {
      if (bounds->size() != options.action_dim) throw std::invalid_argument("a bound's length is not action_dim");
    }
  }

  void lay_out(Workspace& s) {
    const size_t batch_size = options.batch, actions = options.action_dim, inputs = options.observation_dim + actions;
    this->lay_out_shared(s);
    x = s.matrix<T>(inputs, batch_size);
    next_x = s.matrix<T>(inputs, batch_size);
    next_policy_tape.lay_out(s, policy.shape, batch_size, false);
    target_tape.lay_out(s, critics.shape, batch_size, false);
    policy_tapes.resize(1);
    policy_tapes[0].lay_out(s, policy.shape, batch_size, true);
    critic_tapes.resize(options.critics);
    for (Tape<T>& tape : critic_tapes) tape.lay_out(s, critics.shape, batch_size, true);
    if (critics.shape.plain_relu()) least_tape.lay_out(s, critics.shape, batch_size, true);
    for (T** vector : {&td_target, &next_log_prob, &log_prob}) *vector = s.take<T>(batch_size);
    for (T** vector : {&next_noise, &noise}) *vector = s.take<T>(batch_size * actions);
    for (T** matrix : {&next_q, &q, &q_gradient}) *matrix = s.take<T>(options.critics * batch_size);
    for (Matrix<T>* matrix : {&next_actions, &next_spread, &actions_taken, &spread, &action_gradient, &part_gradient}) {
      *matrix = s.matrix<T>(actions, batch_size);
    }
    least = s.take<uint32_t>(batch_size);
    shares = s.take<double>(options.critics);
    optimizers.resize(2);
    optimizers[kPolicy].lay_out(s, policy.shape, 1, options.threads);
    optimizers[kCritics].lay_out(s, critics.shape, options.critics, options.threads);
  }

  // --- Randomness ---

  void draw_next_noise(uint64_t key) {
    if (options.next_value == NextValue::kSoft) {
      philox_normal(key, next_noise, options.batch * options.action_dim);
    } else if (options.next_value == NextValue::kSmoothed) {
      philox_normal(philox_split(key, 1), next_noise, options.batch * options.action_dim);
    }
  }
  void draw_noise(uint64_t key) {
    if (options.policy_loss == PolicyLoss::kSoft) philox_normal(key, noise, options.batch * options.action_dim);
  }

  // Which target critics this update takes the minimum of: all, or the first places of a shuffle with the key
  // (Durstenfeld 1964).
  void choose_targets(uint64_t key) {
    std::iota(chosen.begin(), chosen.end(), size_t{0});
    chosen_count = options.critics;
    if (options.critic_subset == 0) return;
    chosen_count = options.critic_subset;
    philox_uniform(key, shares, options.critics);
    for (size_t i = 0; i < chosen_count; ++i) {
      const double left = static_cast<double>(options.critics - i);
      std::swap(chosen[i], chosen[i + static_cast<size_t>(shares[i] * left)]);
    }
  }

  // --- Phases by columns ---

  void scale_actions(Matrix<T> from, Matrix<T> to, Columns at) const {
    for (size_t i = 0; i < options.action_dim; ++i) {
      const T scale = static_cast<T>(options.scale[i]), center = static_cast<T>(options.center[i]);
      const T* const source = from.at(i, at.first);
      T* const out = to.at(i, at.first);
      for (size_t j = 0; j < at.n; ++j) out[j] = center + source[j] * scale;
    }
  }

  GaussianColumns<T> gaussian(const Tape<T>& tape, const T* normals, Matrix<T> actions, Matrix<T> spreads, T* log_probs,
                              Columns at) const {
    const Matrix<T> out = tape.layers.back().out;
    return {out.at(0, at.first),
            out.at(options.action_dim, at.first),
            out.row,
            static_cast<T>(options.log_std_low),
            static_cast<T>(options.log_std_high),
            normals + at.first * options.action_dim,
            actions.at(0, at.first),
            spreads.at(0, at.first),
            actions.row,
            log_probs + at.first,
            options.action_dim,
            at.n};
  }

  void squash(const Tape<T>& tape, Matrix<T> actions, Columns at) const {
    const Matrix<T> out = tape.layers.back().out;
    for (size_t i = 0; i < options.action_dim; ++i) {
      learner_kernels<T>().activate(Activation::kTanh, out.at(i, at.first), actions.at(i, at.first), at.n);
    }
  }

  // The actions at the next observations, and what the target takes from them.
  void choose_next_actions(Columns at) {
    const bool soft = options.next_value == NextValue::kSoft;
    const Ensemble<T>& actor = options.target_policy ? target_policy : policy;
    forward(actor, 0, next_x, next_policy_tape, at);
    if (soft) {
      learner_kernels<T>().gaussian_columns(
          gaussian(next_policy_tape, next_noise, next_actions, next_spread, next_log_prob, at));
    } else {
      squash(next_policy_tape, next_actions, at);
    }
    const Matrix<T> to{next_x.at(options.observation_dim), next_x.row};
    scale_actions(next_actions, to, at);
    if (options.next_value != NextValue::kSmoothed) return;
    const float deviation = static_cast<float>(options.target_noise),
                most = static_cast<float>(options.target_noise_clip);
    for (size_t i = 0; i < options.action_dim; ++i) {
      const T low = static_cast<T>(options.low[i]), high = static_cast<T>(options.high[i]);
      const T half = static_cast<T>(options.half_range[i]);
      for (size_t j = at.first; j < at.first + at.n; ++j) {
        const T drawn = next_noise[j * options.action_dim + i] * static_cast<T>(deviation);
        const T share = std::clamp(drawn, static_cast<T>(-most), static_cast<T>(most));
        *to.at(i, j) = std::clamp(*to.at(i, j) + share * half, low, high);
      }
    }
  }

  // Target, critics forward, loss, and the critics' deltas.
  void critic_columns(Columns at, size_t t) {
    const size_t observation = options.observation_dim, n = at.n;
    const Matrix<T> taken{x.at(observation), x.row};
    read_columns(*batch, 0, observation, at, x);
    read_columns(*batch, 1, options.action_dim, at, taken);
    read_columns(*batch, 3, observation, at, next_x);

    choose_next_actions(at);
    T* const next = next_q + options.critics * at.first;  // [chosen, n], this chunk's own
    for (size_t c = 0; c < chosen_count; ++c) {
      forward(target_critics, chosen[c], next_x, target_tape, at);
      const T* const values = target_tape.layers.back().out.at(0, at.first);
      std::copy(values, values + n, next + c * n);
    }
    const bool soft = options.next_value == NextValue::kSoft;
    ops_kernels<T>().twin_q_target({critic_rows.rewards + at.first, critic_rows.discounts + at.first, next,
                                    soft ? next_log_prob + at.first : nullptr, static_cast<T>(entropy_coefficient),
                                    td_target + at.first, chosen_count, n});

    T* const own_q = q + options.critics * at.first;  // [critics, n]
    T* const by_q = q_gradient + options.critics * at.first;
    for (size_t k = 0; k < options.critics; ++k) {
      forward(critics, k, x, critic_tapes[k], at);
      const T* const values = critic_tapes[k].layers.back().out.at(0, at.first);
      std::copy(values, values + n, own_q + k * n);
      std::copy(values, values + n, q_out + k * options.batch + at.first);
    }
    const auto regress = [&](size_t first, size_t members) {
      T loss;
      ops_kernels<T>().twin_q_loss(
          {own_q + first * n, td_target + at.first, options.prioritized ? critic_rows.weights + at.first : nullptr,
           static_cast<T>(options.huber_delta), &loss, td_error_out + at.first, by_q + first * n, members, n});
      return static_cast<double>(loss) * static_cast<double>(n);
    };
    double weighted_loss = 0.0;
    for (size_t k = 0; weighted && k < options.critics; ++k) weighted_loss += told->loss_weights[k] * regress(k, 1);
    const double plain_loss = regress(0, options.critics);  // last: the td errors are means over all critics
    add_loss(0, t, weighted ? weighted_loss : plain_loss);
    const T share = static_cast<T>(static_cast<double>(n) / static_cast<double>(options.batch));
    for (size_t k = 0; k < options.critics; ++k) {
      T* const delta = critic_tapes[k].layers.back().delta.at(0, at.first);
      const T own_share = weighted ? static_cast<T>(told->loss_weights[k]) * share : share;
      for (size_t j = 0; j < n; ++j) delta[j] = by_q[k * n + j] * own_share;
      backward(critics, k, critic_tapes[k], at, Matrix<T>{}, 0, 0);
    }
  }

  // The policy's loss and deltas, through the critics.
  void policy_columns(Columns at, size_t t) {
    const size_t observation = options.observation_dim, n = at.n;
    const bool soft = options.policy_loss == PolicyLoss::kSoft;
    const BatchPlaces& from = options.fresh_policy_batch ? *policy_batch : *batch;
    if (options.fresh_policy_batch) {
      read_columns(from, 0, observation, at, x);
    }
    Tape<T>& tape = policy_tapes[0];
    forward(policy, 0, x, tape, at);
    if (soft) {
      learner_kernels<T>().gaussian_columns(gaussian(tape, noise, actions_taken, spread, log_prob, at));
      std::copy(log_prob + at.first, log_prob + at.first + n, log_prob_out + at.first);
    } else {
      squash(tape, actions_taken, at);
    }
    scale_actions(actions_taken, {x.at(observation), x.row}, at);

    const size_t valued = soft ? options.critics : 1;  // deterministic policies climb the first critic
    for (size_t k = 0; k < valued; ++k) forward(critics, k, x, critic_tapes[k], at);
    double sum = 0.0;
    for (size_t j = at.first; j < at.first + n; ++j) {
      uint32_t smallest = 0;
      T value = critic_value(0, j);
      for (size_t k = 1; k < valued; ++k) {
        const T other = critic_value(k, j);
        if (other < value || other != other) {
          value = other;
          smallest = static_cast<uint32_t>(k);
        }
      }
      least[j] = smallest;
      sum -= static_cast<double>(value);
      if (soft) sum += entropy_coefficient * static_cast<double>(log_prob[j]);
    }
    add_loss(1, t, sum);

    for (size_t k = 0; k < valued; ++k) critic_to_actions(k, valued, at);
    for (size_t i = 0; i < options.action_dim; ++i) {
      const T scale = static_cast<T>(options.scale[i]);
      T* const gradient = action_gradient.at(i, at.first);
      for (size_t j = 0; j < n; ++j) gradient[j] *= scale;
    }
    typename Tape<T>::Layer& last = tape.layers.back();
    if (soft) {
      const Matrix<T> out = last.out, delta = last.delta;
      const T by_log_prob = static_cast<T>(entropy_coefficient / static_cast<double>(options.batch));
      learner_kernels<T>().gaussian_columns_gradient(
          {action_gradient.at(0, at.first), action_gradient.row, by_log_prob, actions_taken.at(0, at.first),
           spread.at(0, at.first), actions_taken.row, out.at(options.action_dim, at.first), out.row,
           static_cast<T>(options.log_std_low), static_cast<T>(options.log_std_high), delta.at(0, at.first),
           delta.at(options.action_dim, at.first), options.action_dim, n});
    } else {
      for (size_t i = 0; i < options.action_dim; ++i) {
        for (size_t j = at.first; j < at.first + n; ++j) {
          const T action = *actions_taken.at(i, j);
          *last.delta.at(i, j) = *action_gradient.at(i, j) * (T(1) - action * action);
        }
      }
    }
    backward(policy, 0, tape, at, Matrix<T>{}, 0, 0);
  }

  T critic_value(size_t k, size_t j) const { return *critic_tapes[k].layers.back().out.at(0, j); }

  // The gradient of -mean(Q) by the actions, in the columns where critic k is the least. Written, in the order of k.
  void critic_to_actions(size_t k, size_t valued, Columns at) {
    const T each = static_cast<T>(-1.0 / static_cast<double>(options.batch));
    const size_t layers = critics.shape.layers(), actions = options.action_dim;
    if (valued == 1) {
      T* const delta = critic_tapes[k].layers.back().delta.at(0, at.first);
      std::fill(delta, delta + at.n, each);
      backward(critics, k, critic_tapes[k], at, action_gradient, options.observation_dim, actions);
      return;
    }
    if (!critics.shape.plain_relu()) {
      T* const delta = critic_tapes[k].layers.back().delta.at(0, at.first);
      for (size_t j = 0; j < at.n; ++j) delta[j] = least[at.first + j] == k ? each : T(0);
      backward(critics, k, critic_tapes[k], at, part_gradient, options.observation_dim, actions);
      for (size_t i = 0; i < actions; ++i) {
        T* const sum = action_gradient.at(i, at.first);
        const T* const part = part_gradient.at(i, at.first);
        for (size_t j = 0; j < at.n; ++j) sum[j] = k == 0 ? part[j] : sum[j] + part[j];
      }
      return;
    }
    // Only these columns go back: their gates side by side, then their gradients back to where they belong.
    uint32_t columns[kChunk];
    size_t n = 0;
    for (size_t j = 0; j < at.n; ++j) {
      columns[n] = static_cast<uint32_t>(j);
      n += least[at.first + j] == k;
    }
    if (n == 0) return;
    const Columns packed{at.first, n};
    for (size_t l = 0; l + 1 < layers; ++l) {
      const Matrix<T> from = critic_tapes[k].layers[l].out, to = least_tape.layers[l].out;
      learner_kernels<T>().take_columns(from.at(0, at.first), from.row, to.at(0, at.first), to.row,
                                        critics.shape.outputs(l), columns, n);
    }
    T* const delta = least_tape.layers.back().delta.at(0, at.first);
    std::fill(delta, delta + n, each);
    backward(critics, k, least_tape, packed, part_gradient, options.observation_dim, actions);
    for (size_t i = 0; i < actions; ++i) {
      const T* const part = part_gradient.at(i, at.first);
      T* const whole = action_gradient.at(i, at.first);
      for (size_t j = 0; j < n; ++j) whole[columns[j]] = part[j];
    }
  }

  // --- The entropy coefficient: the gradient of -log(alpha) * mean(log_prob + target) by log(alpha), and Adam. ---

  void learn_entropy_coefficient() {
    if (!options.learns_entropy) return;
    double sum = 0.0;
    for (size_t j = 0; j < options.batch; ++j) sum += static_cast<double>(log_prob[j]);
    const T gradient = static_cast<T>(-(sum / static_cast<double>(options.batch) + options.target_entropy));
    const AdamSlot<T>& slot = told->log_coefficient;
    const AdamGroup& g = slot.group;
    learner_kernels<T>().adam({slot.value, &gradient, slot.first, slot.second, 1, 1.0, g.learning_rate, g.beta1,
                               g.beta2, g.epsilon, g.weight_decay, g.decoupled,
                               static_cast<double>(*slot.steps) + 1.0});
    *slot.steps += 1.0f;
    entropy_coefficient = static_cast<double>(std::exp(*slot.value));
  }

  std::vector<size_t> chosen;  // the first chosen_count of them: target critics of this update
  size_t chosen_count = 0;
  bool weighted = false;  // whether a critic's loss has another weight than 1
  double* shares;         // [critics], uniforms

  Ensemble<T> policy, critics, target_policy, target_critics;
  Matrix<T> x, next_x;  // [observation_dim + action_dim, batch]
  Tape<T> next_policy_tape, target_tape, least_tape;
  std::vector<Tape<T>> policy_tapes, critic_tapes;
  T *td_target, *next_log_prob, *log_prob;  // [batch]
  T *next_noise, *noise;                    // [batch, action_dim]
  T *next_q, *q, *q_gradient;               // [critics, columns] of one chunk after the other
  Matrix<T> next_actions, next_spread, actions_taken, spread, action_gradient, part_gradient;  // [action_dim, batch]
  uint32_t* least;                                                                             // [batch]
};

}  // namespace

template <class T>
std::unique_ptr<Learner<T>> make_actor_critic(std::shared_ptr<Replay> replay, const LearnerOptions& options) {
  return std::make_unique<ActorCritic<T>>(std::move(replay), options);
}
template std::unique_ptr<Learner<float>> make_actor_critic(std::shared_ptr<Replay>, const LearnerOptions&);
template std::unique_ptr<Learner<double>> make_actor_critic(std::shared_ptr<Replay>, const LearnerOptions&);

}  // namespace angle
