// Adam over the tensors of one ensemble, in place, and the target tensors that follow it.
//
// A tensor is taken as rows, [members * outputs, inputs or 1], and a thread takes the same rows of every tensor all
// through an update: it writes their gradients, sums their squares, steps them and moves their targets.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "learner/network.h"

namespace angle {

struct AdamGroup {
  double learning_rate = 1e-3, beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8, weight_decay = 0.0;
  bool decoupled = false;  // AdamW
};

// [first, first + n) of `total` that thread t of `threads` takes: whole multiples but for the last one.
inline Columns share_of(size_t total, size_t t, size_t threads, size_t multiple) {
  const size_t units = (total + multiple - 1) / multiple;
  const size_t first = std::min(total, units * t / threads * multiple);
  const size_t end = std::min(total, units * (t + 1) / threads * multiple);
  return {first, end - first};
}

// One tensor, Adam's state of it and the target tensor that follows it.
template <class T>
struct AdamSlot {
  size_t rows = 0, columns = 0;  // [members * outputs, inputs or 1]
  T* gradient = nullptr;
  T* value = nullptr;
  T* first = nullptr;
  T* second = nullptr;
  T* target = nullptr;     // optional
  float* steps = nullptr;  // torch keeps the count as a float
  AdamGroup group;
};

template <class T>
class Optimizer {
 public:
  // Slots in the order weight, bias[, scale, shift] of each layer.
  void lay_out(Workspace& space, const NetworkShape& shape, size_t members, size_t threads) {
    slots.clear();
    gradients_.assign(shape.layers(), {});
    for (size_t l = 0; l < shape.layers(); ++l) {
      const size_t rows = members * shape.outputs(l);
      const auto add = [&](size_t columns) {
        AdamSlot<T>& slot = slots.emplace_back();
        slot.rows = rows;
        slot.columns = columns;
        return slot.gradient = space.take<T>(rows * columns);
      };
      gradients_[l].weight = add(shape.inputs(l));
      gradients_[l].bias = add(1);
      if (shape.layer_norm && shape.hidden(l)) {
        gradients_[l].scale = add(1);
        gradients_[l].shift = add(1);
      }
    }
    threads_ = threads;
    norms_ = space.take<double>(threads * kApart);
  }

  // The rows of a tensor that thread t takes.
  Columns rows_of(size_t rows, size_t t) const { return share_of(rows, t, threads_, 8); }

  // The gradients of the rows that thread t takes, and the sum of their squares. tapes: one for each member. x: the
  // networks' inputs, [inputs, batch].
  void collect(const Ensemble<T>& net, const std::vector<Tape<T>>& tapes, Matrix<T> x, size_t batch, size_t t) {
    for (size_t l = 0; l < net.shape.layers(); ++l) {
      const size_t outputs = net.shape.outputs(l);
      const Columns mine = rows_of(net.members * outputs, t);
      for (size_t row = mine.first; row < mine.first + mine.n;) {
        const size_t k = row / outputs, first = row - k * outputs;
        const size_t n = std::min(outputs - first, mine.first + mine.n - row);
        LayerTensors<T> own = gradients_[l];
        own.weight += k * outputs * net.shape.inputs(l);
        own.bias += k * outputs;
        if (own.scale != nullptr) {
          own.scale += k * outputs;
          own.shift += k * outputs;
        }
        parameter_gradients(net, l, tapes[k], x, batch, first, n, own);
        row += n;
      }
    }
    double sum = 0.0;
    for (const AdamSlot<T>& slot : slots) {
      const Columns mine = rows_of(slot.rows, t);
      sum += learner_kernels<T>().squared_norm(slot.gradient + mine.first * slot.columns, mine.n * slot.columns);
    }
    norms_[t * kApart] = sum;
  }

  // The sum of all gradients' squares, once all threads have collected; not finite where one is not. Any thread.
  double squares() const {
    double sum = 0.0;
    for (size_t t = 0; t < threads_; ++t) sum += norms_[t * kApart];
    return sum;
  }

  // One step of the rows that thread t takes. count_step() follows, once, when all have stepped.
  void step(double gradient_scale, size_t t) {
    for (const AdamSlot<T>& slot : slots) {
      const Columns mine = rows_of(slot.rows, t);
      const size_t at = mine.first * slot.columns;
      const AdamGroup& g = slot.group;
      learner_kernels<T>().adam({slot.value + at, slot.gradient + at, slot.first + at, slot.second + at,
                                 mine.n * slot.columns, gradient_scale, g.learning_rate, g.beta1, g.beta2, g.epsilon,
                                 g.weight_decay, g.decoupled, static_cast<double>(*slot.steps) + 1.0});
    }
  }
  void count_step() {
    for (const AdamSlot<T>& slot : slots) *slot.steps += 1.0f;
  }

  // target <- tau * value + (1 - tau) * target, the rows that thread t takes.
  void move_targets(double tau, size_t t) {
    for (const AdamSlot<T>& slot : slots) {
      if (slot.target == nullptr) continue;
      const Columns mine = rows_of(slot.rows, t);
      const size_t at = mine.first * slot.columns, n = mine.n * slot.columns;
      if (tau == 1.0)
        std::copy(slot.value + at, slot.value + at + n, slot.target + at);
      else if constexpr (sizeof(T) == sizeof(float))
        kernels().ops.f32.update_targets(slot.target + at, slot.value + at, n, tau);
      else
        kernels().ops.f64.update_targets(slot.target + at, slot.value + at, n, tau);
    }
  }

  std::vector<AdamSlot<T>> slots;

 private:
  static constexpr size_t kApart = 8;  // doubles of a cache line
  std::vector<LayerTensors<T>> gradients_;
  size_t threads_ = 1;
  double* norms_ = nullptr;
};

}  // namespace angle
