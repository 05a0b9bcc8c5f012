// DQN: a network that values all actions at once, and its target. A dueling one is a trunk with two heads.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "learner/phases.h"

namespace angle {
namespace {

template <class T>
class ActionValues final : public Phases<T> {
  using Base = Phases<T>;
  using Base::add_loss, Base::alone, Base::batch, Base::by_columns, Base::critic_rows, Base::descend, Base::draw,
      Base::fail, Base::mean_loss, Base::move_targets, Base::optimizers, Base::options, Base::outcome, Base::q_out,
      Base::read_columns, Base::space, Base::td_error_out, Base::team, Base::told, Base::write_priorities;

 public:
  ActionValues(std::shared_ptr<Replay> the_replay, const LearnerOptions& the_options)
      : Base(std::move(the_replay), the_options), dueling(the_options.networks.size() == 3) {
    check();
    actions = options.networks[dueling ? kAdvantages : 0].sizes.back();
    for (const NetworkShape& shape : options.networks) {
      for (std::vector<Ensemble<T>>* ensembles : {&online, &target}) {
        Ensemble<T> network;
        network.shape = shape;
        network.product = this->product();
        ensembles->push_back(network);
      }
    }
    space.make([this](Workspace& s) { lay_out(s); });
  }

 protected:
  bool one(const UpdateCall& call, size_t t) override {
    const bool sampled = alone(t, [&] {
      draw(*batch, critic_rows);
      ++outcome.done;
    });
    if (!sampled) return false;
    by_columns(t, [&](Columns at) { columns(at, t); });
    team.meet();
    for (size_t i = 0; i < online.size(); ++i) {
      const bool behind_trunk = i > 0 && online[kTrunk].shape.layers() > 0;
      optimizers[i].collect(online[i], tapes[i], behind_trunk ? tapes[kTrunk][0].layers.back().out : x, options.batch,
                            t);
    }
    team.meet();
    const double loss = mean_loss(0);
    if (t == 0) outcome.critic_loss = loss;
    if (!std::isfinite(loss)) return fail(t, UpdateOutcome::kCriticLoss);
    if (!descend(0, optimizers.size(), t)) return fail(t, UpdateOutcome::kCriticGradient);
    move_targets(call, t);
    const bool done = alone(t, [&] { write_priorities(); });
    if (t == 0) {
      for (Optimizer<T>& optimizer : optimizers) optimizer.count_step();
    }
    return done;
  }

  void take_tensors() override {
    for (size_t i = 0; i < online.size(); ++i) {
      online[i].layers = told->networks[i].layers;
      target[i].layers = told->networks[i].targets;
    }
  }

 private:
  static constexpr size_t kTrunk = 0, kAdvantages = 1, kValue = 2;  // of a dueling network

  void check() const {
    const std::vector<NetworkShape>& networks = options.networks;
    if (options.batch < 1 || options.threads < 1 || (networks.size() != 1 && networks.size() != 3)) {
      throw std::invalid_argument("a network of action values needs a batch, a thread, and one or three parts");
    }
    bool fits = networks[0].sizes.front() == options.observation_dim;
    if (dueling) {
      const size_t width = networks[kTrunk].sizes.back();
      fits = fits && networks[kTrunk].hidden_end && networks[kAdvantages].sizes.front() == width &&
             networks[kValue].sizes.front() == width && networks[kValue].sizes.back() == 1;
    }
    if (!fits) throw std::invalid_argument("the network's sizes do not fit one another");
  }

  void lay_out(Workspace& s) {
    const size_t batch_size = options.batch;
    this->lay_out_shared(s);
    x = s.matrix<T>(options.observation_dim, batch_size);
    next_x = s.matrix<T>(options.observation_dim, batch_size);
    tapes.resize(online.size());
    scratch.resize(online.size());
    optimizers.resize(online.size());
    for (size_t i = 0; i < online.size(); ++i) {
      tapes[i].resize(1);
      tapes[i][0].lay_out(s, online[i].shape, batch_size, true);
      scratch[i].lay_out(s, online[i].shape, batch_size, false);
      optimizers[i].lay_out(s, online[i].shape, 1, options.threads);
    }
    if (dueling) {
      trunk_gradient = s.matrix<T>(online[kTrunk].shape.sizes.back(), batch_size);
    }
    values = s.matrix<T>(actions, batch_size);
    target_values = s.matrix<T>(actions, batch_size);
    for (T** vector : {&next_value, &td_target, &taken_q, &q_gradient}) *vector = s.take<T>(batch_size);
    taken = s.take<uint32_t>(batch_size);
  }

  // The values of all actions at `from` into `to`, [actions, batch]. keep: for the way back, on `tapes`.
  void value(const std::vector<Ensemble<T>>& networks, Matrix<T> from, Matrix<T> to, Columns at, bool keep) {
    const auto tape = [&](size_t i) -> Tape<T>& { return keep ? tapes[i][0] : scratch[i]; };
    forward(networks[0], 0, from, tape(0), at);
    if (!dueling) {
      copy(tape(0).layers.back().out, to, actions, at);
      return;
    }
    const bool has_trunk = networks[kTrunk].shape.layers() > 0;
    const Matrix<T> hidden = has_trunk ? tape(kTrunk).layers.back().out : from;
    for (size_t i : {kAdvantages, kValue}) forward(networks[i], 0, hidden, tape(i), at);
    const Matrix<T> advantages = tape(kAdvantages).layers.back().out, value = tape(kValue).layers.back().out;
    for (size_t j = at.first; j < at.first + at.n; ++j) {
      T sum = T(0);
      for (size_t i = 0; i < actions; ++i) sum += *advantages.at(i, j);
      const T base = *value.at(0, j) - sum / static_cast<T>(actions);
      for (size_t i = 0; i < actions; ++i) *to.at(i, j) = base + *advantages.at(i, j);
    }
  }

  static void copy(Matrix<T> from, Matrix<T> to, size_t rows, Columns at) {
    for (size_t i = 0; i < rows; ++i) std::copy(from.at(i, at.first), from.at(i, at.first) + at.n, to.at(i, at.first));
  }

  // The first of a column's largest values.
  size_t best(Matrix<T> of, size_t j) const {
    size_t found = 0;
    for (size_t i = 1; i < actions; ++i) {
      if (*of.at(i, j) > *of.at(found, j)) found = i;
    }
    return found;
  }

  void columns(Columns at, size_t t) {
    const size_t n = at.n, end = at.first + at.n;
    read_columns(*batch, 0, options.observation_dim, at, x);
    read_columns(*batch, 3, options.observation_dim, at, next_x);
    const auto* const chosen = reinterpret_cast<const int64_t*>(batch->tensors[1]);
    for (size_t j = at.first; j < end; ++j) taken[j] = static_cast<uint32_t>(chosen[j] - options.first_action);

    value(target, next_x, target_values, at, false);
    const bool twice = options.next_value == NextValue::kDouble;
    if (twice) value(online, next_x, values, at, false);
    for (size_t j = at.first; j < end; ++j)
      next_value[j] = *target_values.at(best(twice ? values : target_values, j), j);
    ops_kernels<T>().twin_q_target({critic_rows.rewards + at.first, critic_rows.discounts + at.first,
                                    next_value + at.first, nullptr, T(0), td_target + at.first, 1, n});

    value(online, x, values, at, true);
    for (size_t j = at.first; j < end; ++j) q_out[j] = taken_q[j] = *values.at(taken[j], j);
    T loss;
    ops_kernels<T>().twin_q_loss(
        {taken_q + at.first, td_target + at.first, options.prioritized ? critic_rows.weights + at.first : nullptr,
         static_cast<T>(options.huber_delta), &loss, td_error_out + at.first, q_gradient + at.first, 1, n});
    add_loss(0, t, static_cast<double>(loss) * static_cast<double>(n));
    const T share = static_cast<T>(static_cast<double>(n) / static_cast<double>(options.batch));
    for (size_t j = at.first; j < end; ++j) q_gradient[j] *= share;
    go_back(at);
  }

  void go_back(Columns at) {
    const Matrix<T> by_advantages = tapes[dueling ? kAdvantages : 0][0].layers.back().delta;
    for (size_t i = 0; i < actions; ++i) {
      T* const delta = by_advantages.at(i, at.first);
      for (size_t j = 0; j < at.n; ++j) {
        const T gradient = q_gradient[at.first + j];
        delta[j] = (taken[at.first + j] == i ? gradient : T(0)) - (dueling ? gradient / static_cast<T>(actions) : T(0));
      }
    }
    if (!dueling) {
      backward(online[0], 0, tapes[0][0], at, Matrix<T>{}, 0, 0);
      return;
    }
    std::copy(q_gradient + at.first, q_gradient + at.first + at.n,
              tapes[kValue][0].layers.back().delta.at(0, at.first));
    if (online[kTrunk].shape.layers() == 0) {
      for (size_t i : {kAdvantages, kValue}) backward(online[i], 0, tapes[i][0], at, Matrix<T>{}, 0, 0);
      return;
    }
    const size_t width = online[kTrunk].shape.sizes.back();
    const Matrix<T> whole = tapes[kTrunk][0].layers.back().delta;
    backward(online[kAdvantages], 0, tapes[kAdvantages][0], at, whole, 0, width);
    backward(online[kValue], 0, tapes[kValue][0], at, trunk_gradient, 0, width);
    for (size_t i = 0; i < width; ++i) {
      T* const sum = whole.at(i, at.first);
      const T* const part = trunk_gradient.at(i, at.first);
      for (size_t j = 0; j < at.n; ++j) sum[j] += part[j];
    }
    backward(online[kTrunk], 0, tapes[kTrunk][0], at, Matrix<T>{}, 0, 0);
  }

  const bool dueling;
  size_t actions = 0;
  std::vector<Ensemble<T>> online, target;           // as options.networks
  std::vector<std::vector<Tape<T>>> tapes;           // one of each network's only member
  std::vector<Tape<T>> scratch;                      // for values whose gradients nobody asks for
  Matrix<T> x, next_x;                               // [observation_dim, batch]
  Matrix<T> values, target_values;                   // [actions, batch]
  Matrix<T> trunk_gradient;                          // [the trunk's outputs, batch]
  T *next_value, *td_target, *taken_q, *q_gradient;  // [batch]
  uint32_t* taken;                                   // [batch], the action's row
};

}  // namespace

template <class T>
std::unique_ptr<Learner<T>> make_action_values(std::shared_ptr<Replay> replay, const LearnerOptions& options) {
  return std::make_unique<ActionValues<T>>(std::move(replay), options);
}
template std::unique_ptr<Learner<float>> make_action_values(std::shared_ptr<Replay>, const LearnerOptions&);
template std::unique_ptr<Learner<double>> make_action_values(std::shared_ptr<Replay>, const LearnerOptions&);

}  // namespace angle
