// Signatures of the kernels that a learner's update is made of.
//
// Matrices are row-major; a row's pitch is counted in elements and at least the row's length. Activations lie
// feature by feature, [features, batch]: a layer's weights [outputs, inputs] are then the left factor of its product as
// they are, and whatever goes row by row goes over the batch in vectors. Inputs and outputs do not overlap unless a
// line says so. Sums may be ordered, and multiply-adds fused, as an ISA likes best: results of different ISAs differ by
// rounding, those of one do not.
#pragma once
#include <cstddef>
#include <cstdint>

namespace angle {

enum class Activation : int { kNone, kRelu, kTanh, kSilu, kGelu };  // kGelu: the exact one, by erf

// Rows that a kernel may read beyond a matrix's last column: to the next multiple of this many elements. What lies
// there is finite and has no effect.
constexpr size_t kColumnMultiple = 16;

// The pitch for rows of n elements that are a product's b or gate: whole cache lines that hold the next
// kColumnMultiple, an odd number of them, so that rows spread over all sets of the caches. Begin each matrix on a line.
template <typename T>
constexpr size_t padded_pitch(size_t n) {
  constexpr size_t kPerLine = 64 / sizeof(T);
  return ((n + kColumnMultiple - 1) / kColumnMultiple * (kColumnMultiple / kPerLine) | 1) * kPerLine;
}

// c[i, j] = f(sum over l of a(i, l) * b[l, j]), i < m, j < n, l < k, with a(i, l) = a[i * a_row + l * a_step]. On one
// ISA, an element is the same to the last bit however c is divided into products by rows or columns, except into single
// rows where b is turned. Fastest where b and c lie on cache lines at padded_pitch.
template <typename T>
struct Product {
  const T* a;
  size_t a_row, a_step;  // one of them is 1
  const T* b;            // rows readable to the next kColumnMultiple
  size_t b_row;          // b[l, j] is b[l * b_row + j], or b[j * b_row + l] where b is turned
  T* c;                  // written only where i < m and j < n
  size_t c_row;
  size_t m, n, k;
  // f: adds bias[i], then kRelu sets what is negative to 0; where there is a gate, c is 0 unless gate[i, j] > 0.
  const T* bias = nullptr;  // [m], optional
  bool relu = false;
  const T* gate = nullptr;  // [m, n], rows readable to the next kColumnMultiple; optional
  size_t gate_row = 0;
  bool b_turned = false;  // b is given as [n, k]: a weight gradient's inputs as they lie, without a transpose before
};

// y[i, j] = bias[j] + sum over l of x[i, l] * weights[j, l], i < rows, j < outputs: a layer where acting, row by row,
// all dense, nothing read beyond. On one ISA, a row of y is the same to the last bit whatever rows go with it.
template <typename T>
struct FewRows {
  const T* x;        // [rows, inputs]
  const T* weights;  // [outputs, inputs]
  const T* bias;     // [outputs]
  T* y;              // [rows, outputs], written
  size_t rows, inputs, outputs;
};

// One step of Adam (Kingma and Ba 2015, arXiv:1412.6980), or of AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)
// where the decay is decoupled. Arithmetic as torch.optim.Adam's.
template <typename T>
struct AdamStep {
  T* parameters;       // [n], changed
  const T* gradients;  // [n]
  T* first;            // [n], the mean of gradients, changed
  T* second;           // [n], the mean of their squares, changed
  size_t n;
  double gradient_scale;  // gradients are taken times this
  double learning_rate, beta1, beta2, epsilon, weight_decay;
  bool decoupled;  // AdamW's decay
  double step;     // this step's number, from 1
  // Optional: [n], moved towards the new parameters in the same pass: target = tau * parameter + (1 - tau) * target.
  T* targets = nullptr;
  double tau = 0.0;
};

template <typename T>
struct LayerNorm {  // over features, each column by itself: y = (x - mean) / sqrt(variance + epsilon) * scale + shift
  const T* x;       // [features, batch]
  size_t x_row;
  const T* scale;  // [features], optional: ones
  const T* shift;  // [features], optional: zeros
  double epsilon;
  T* y;  // [features, batch], written; may be x
  size_t y_row;
  T* normal;  // [features, batch], written: (x - mean) / sqrt(variance + epsilon)
  size_t normal_row;
  T* inverse;  // [batch], written: 1 / sqrt(variance + epsilon)
  size_t features, batch;
};

template <typename T>
struct LayerNormGradient {
  const T* y_gradient;  // [features, batch]
  size_t y_row;
  const T* normal;  // as the forward kernel wrote it
  size_t normal_row;
  const T* inverse;  // [batch]
  const T* scale;    // [features], optional: ones
  T* x_gradient;     // [features, batch], written; may be y_gradient
  size_t x_row;
  T* scale_gradient;  // [features], optional, written: the sum over the batch
  T* shift_gradient;  // [features], optional, written
  size_t features, batch;
};

template <typename T>
struct GaussianColumns {  // as SquashedGaussian, feature by feature
  const T* mean;          // [actions, batch]
  const T* log_std;       // [actions, batch], before clamping
  size_t row;             // pitch of both
  T log_std_low, log_std_high;
  const T* noise;  // [batch, actions], row by row
  T* actions;      // [actions, batch], written: tanh(mean + spread)
  T* spread;       // [actions, batch], written: exp(clamped log_std) * noise
  size_t out_row;  // pitch of both
  T* log_prob;     // [batch], written
  size_t columns;  // actions
  size_t batch;
};

template <typename T>
struct GaussianColumnsGradient {
  const T* actions_gradient;  // [actions, batch], by the actions in [-1, 1]
  size_t gradient_row;
  T log_prob_gradient;  // one number for all rows
  const T* actions;     // from the forward kernel
  const T* spread;
  size_t out_row;    // pitch of both
  const T* log_std;  // [actions, batch], before clamping: no gradient where it was clamped
  size_t row;        // pitch of log_std and of the two outputs
  T log_std_low, log_std_high;
  T* mean_gradient;     // [actions, batch], written
  T* log_std_gradient;  // [actions, batch], written
  size_t columns, batch;
};

// All: any thread; no allocation; cost proportional to the elements read, a product's to m * n * k.
template <typename T>
struct LearnerKernelsOf {
  void (*product)(const Product<T>&);
  void (*few_rows)(const FewRows<T>&);
  // out[j, i] = in[i, j], i < rows, j < columns.
  void (*transpose)(const T* in, size_t in_row, T* out, size_t out_row, size_t rows, size_t columns);
  // out[i] = sum over j of in[i, j].
  void (*row_sums)(const T* in, size_t in_row, T* out, size_t rows, size_t columns);
  // out[i, j] = in[i, columns[j]], j < n.
  void (*take_columns)(const T* in, size_t in_row, T* out, size_t out_row, size_t rows, const uint32_t* columns,
                       size_t n);
  // out = f(x), elementwise; out may be x.
  void (*activate)(Activation, const T* x, T* out, size_t n);
  // gradient[i] *= f'(x[i]).
  void (*activate_gradient)(Activation, const T* x, T* gradient, size_t n);
  void (*layer_norm)(const LayerNorm<T>&);
  void (*layer_norm_gradient)(const LayerNormGradient<T>&);
  void (*gaussian_columns)(const GaussianColumns<T>&);
  void (*gaussian_columns_gradient)(const GaussianColumnsGradient<T>&);
  void (*adam)(const AdamStep<T>&);
  // The sum of squares, NaN or infinite where an element is.
  double (*squared_norm)(const T* x, size_t n);
};

struct LearnerKernels {
  LearnerKernelsOf<float> f32;
  LearnerKernelsOf<double> f64;
};

}  // namespace angle
