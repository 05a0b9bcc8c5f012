// Multilayer perceptrons over whole batches, forward and backward.
//
// Activations lie feature by feature, [features, batch]. Forward, and backward to the inputs, each column of the batch
// goes its own way, so threads take columns; gradients of parameters sum over columns, so there threads take rows.
#pragma once
#include <cstddef>
#include <vector>

#include "kernels/kernels.h"
#include "learner/workspace.h"

namespace angle {

template <class T>
const LearnerKernelsOf<T>& learner_kernels() {
  if constexpr (sizeof(T) == sizeof(float))
    return kernels().learner.f32;
  else
    return kernels().learner.f64;
}

// Linear layers, each hidden one followed by [layer norm and] the activation.
struct NetworkShape {
  std::vector<size_t> sizes;  // inputs, then each layer's outputs
  Activation activation = Activation::kRelu;
  bool layer_norm = false;
  double norm_epsilon = 1e-5;
  bool hidden_end = false;  // the last layer is a hidden one, too

  size_t layers() const { return sizes.size() - 1; }
  size_t inputs(size_t layer) const { return sizes[layer]; }
  size_t outputs(size_t layer) const { return sizes[layer + 1]; }
  bool hidden(size_t layer) const { return hidden_end || layer + 1 < layers(); }
  // Hidden layers end in a ReLU alone: its gradient can be told from its output.
  bool plain_relu() const { return activation == Activation::kRelu && !layer_norm; }
};

// The tensors of one layer of an ensemble, [members, outputs, inputs] and [members, outputs]. scale and shift: layer
// norm's, or nullptr.
template <class T>
struct LayerTensors {
  T* weight = nullptr;
  T* bias = nullptr;
  T* scale = nullptr;
  T* shift = nullptr;
};

// Networks of one shape.
template <class T>
struct Ensemble {
  NetworkShape shape;
  size_t members = 1;
  std::vector<LayerTensors<T>> layers;
  void (*product)(const Product<T>&) = learner_kernels<T>().product;

  LayerTensors<T> member(size_t layer, size_t k) const {
    const LayerTensors<T>& all = layers[layer];
    const size_t outputs = shape.outputs(layer);
    const auto own = [k](T* tensor, size_t n) { return tensor == nullptr ? nullptr : tensor + k * n; };
    return {own(all.weight, outputs * shape.inputs(layer)), own(all.bias, outputs), own(all.scale, outputs),
            own(all.shift, outputs)};
  }
};

// What a pass over one network leaves, for its way back.
template <class T>
struct Tape {
  struct Layer {
    Matrix<T> out;         // [outputs, batch], after the activation
    Matrix<T> before;      // the same before it; only where the activation's gradient needs it
    Matrix<T> normal;      // [outputs, batch], layer norm's
    T* inverse = nullptr;  // [batch]
    Matrix<T> delta;       // [outputs, batch], the loss's gradient by the linear layer's outputs
    Matrix<T> norm_delta;  // by layer norm's outputs
  };
  std::vector<Layer> layers;

  // backward: whether gradients will be asked for.
  void lay_out(Workspace& space, const NetworkShape& shape, size_t batch, bool backward) {
    layers.resize(shape.layers());
    for (size_t l = 0; l < shape.layers(); ++l) {
      Layer& layer = layers[l];
      const size_t outputs = shape.outputs(l);
      layer.out = space.matrix<T>(outputs, batch);
      if (shape.hidden(l) && !shape.plain_relu()) {
        layer.before = space.matrix<T>(outputs, batch);
        if (shape.layer_norm) {
          layer.normal = space.matrix<T>(outputs, batch);
          layer.inverse = space.take<T>(batch);
          layer.norm_delta = space.matrix<T>(outputs, batch);
        }
      }
      if (backward) layer.delta = space.matrix<T>(outputs, batch);
    }
  }
};

// Columns [first, first + n) of the batch.
struct Columns {
  size_t first, n;
};

// Evaluates member k at x, [inputs, batch]; the outputs are the last layer's `out`.
template <class T>
void forward(const Ensemble<T>& net, size_t k, Matrix<T> x, Tape<T>& tape, Columns at) {
  const LearnerKernelsOf<T>& kernel = learner_kernels<T>();
  const NetworkShape& shape = net.shape;
  for (size_t l = 0; l < shape.layers(); ++l) {
    typename Tape<T>::Layer& layer = tape.layers[l];
    const LayerTensors<T> own = net.member(l, k);
    const bool bends = shape.hidden(l) && !shape.plain_relu();
    const Matrix<T> linear = bends ? layer.before : layer.out;
    const size_t outputs = shape.outputs(l), inputs = shape.inputs(l);
    Product<T> product{};
    product.a = own.weight;
    product.a_row = inputs;
    product.a_step = 1;
    product.b = x.at(0, at.first);
    product.b_row = x.row;
    product.c = linear.at(0, at.first);
    product.c_row = linear.row;
    product.m = outputs;
    product.n = at.n;
    product.k = inputs;
    product.bias = own.bias;
    product.relu = shape.hidden(l) && !bends;
    net.product(product);
    if (bends) {
      if (shape.layer_norm) {
        kernel.layer_norm({linear.at(0, at.first), linear.row, own.scale, own.shift, shape.norm_epsilon,
                           linear.at(0, at.first), linear.row, layer.normal.at(0, at.first), layer.normal.row,
                           layer.inverse + at.first, outputs, at.n});
      }
      for (size_t i = 0; i < outputs; ++i) {
        kernel.activate(shape.activation, linear.at(i, at.first), layer.out.at(i, at.first), at.n);
      }
    }
    x = layer.out;
  }
}

// From the last layer's delta, which the caller wrote (by the outputs after the activation where that layer is hidden),
// to all others. x_gradient: [rows, batch], the gradient by inputs [first_input, first_input + rows), written where its
// data are not nullptr.
template <class T>
void backward(const Ensemble<T>& net, size_t k, Tape<T>& tape, Columns at, Matrix<T> x_gradient, size_t first_input,
              size_t rows) {
  const LearnerKernelsOf<T>& kernel = learner_kernels<T>();
  const NetworkShape& shape = net.shape;
  for (size_t l = shape.layers(); l-- > 0;) {
    typename Tape<T>::Layer& layer = tape.layers[l];
    const LayerTensors<T> own = net.member(l, k);
    const size_t outputs = shape.outputs(l), inputs = shape.inputs(l);
    if (shape.hidden(l) && (!shape.plain_relu() || l + 1 == shape.layers())) {
      const Matrix<T> source = shape.plain_relu() ? layer.out : layer.before;
      for (size_t i = 0; i < outputs; ++i) {
        kernel.activate_gradient(shape.activation, source.at(i, at.first), layer.delta.at(i, at.first), at.n);
      }
      if (shape.layer_norm) {
        for (size_t i = 0; i < outputs; ++i) {
          const T* const from = layer.delta.at(i, at.first);
          std::copy(from, from + at.n, layer.norm_delta.at(i, at.first));
        }
        kernel.layer_norm_gradient({layer.delta.at(0, at.first), layer.delta.row, layer.normal.at(0, at.first),
                                    layer.normal.row, layer.inverse + at.first, own.scale, layer.delta.at(0, at.first),
                                    layer.delta.row, nullptr, nullptr, outputs, at.n});
      }
    }
    const bool first = l == 0;
    if (first && x_gradient.data == nullptr) break;
    const Matrix<T> to = first ? x_gradient : tape.layers[l - 1].delta;
    Product<T> product{};
    product.a = own.weight + (first ? first_input : 0);
    product.a_row = 1;
    product.a_step = inputs;
    product.b = layer.delta.at(0, at.first);
    product.b_row = layer.delta.row;
    product.c = to.at(0, at.first);
    product.c_row = to.row;
    product.m = first ? rows : inputs;
    product.n = at.n;
    product.k = outputs;
    if (!first && shape.plain_relu()) {
      product.gate = tape.layers[l - 1].out.at(0, at.first);
      product.gate_row = tape.layers[l - 1].out.row;
    }
    net.product(product);
  }
}

// Gradients of outputs [first, first + rows) of layer l of a member, over the whole batch, from its deltas. x: the
// network's inputs, [inputs, batch]. Each gradient is the layer's as a whole; scale and shift may be nullptr.
template <class T>
void parameter_gradients(const Ensemble<T>& net, size_t l, const Tape<T>& tape, Matrix<T> x, size_t batch, size_t first,
                         size_t rows, const LayerTensors<T>& gradient) {
  const LearnerKernelsOf<T>& kernel = learner_kernels<T>();
  const typename Tape<T>::Layer& layer = tape.layers[l];
  const size_t inputs = net.shape.inputs(l);
  const Matrix<T> in = l == 0 ? x : tape.layers[l - 1].out;
  Product<T> product{};
  product.a = layer.delta.at(first);
  product.a_row = layer.delta.row;
  product.a_step = 1;
  product.b = in.data;
  product.b_row = in.row;
  product.b_turned = true;
  product.c = gradient.weight + first * inputs;
  product.c_row = inputs;
  product.m = rows;
  product.n = inputs;
  product.k = batch;
  net.product(product);
  kernel.row_sums(layer.delta.at(first), layer.delta.row, gradient.bias + first, rows, batch);
  if (gradient.scale == nullptr) return;
  kernel.row_sums(layer.norm_delta.at(first), layer.norm_delta.row, gradient.shift + first, rows, batch);
  for (size_t i = first; i < first + rows; ++i) {
    T sum = T(0);
    for (size_t j = 0; j < batch; ++j) sum += *layer.norm_delta.at(i, j) * *layer.normal.at(i, j);
    gradient.scale[i] = sum;
  }
}

}  // namespace angle
