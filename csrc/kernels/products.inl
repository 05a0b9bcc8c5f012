// Matrix products and transposes.

template <typename T>
void product(const Product<T>& p) {
  for (size_t i = 0; i < p.m; ++i) {
    T* const c = p.c + i * p.c_row;
    const T start = p.bias != nullptr ? p.bias[i] : T(0);
    for (size_t j = 0; j < p.n; ++j) c[j] = start;
    for (size_t l = 0; l < p.k; ++l) {
      const T a = p.a[i * p.a_row + l * p.a_step];
      const T* const b = p.b + l * p.b_row;
      for (size_t j = 0; j < p.n; ++j) c[j] += a * b[j];
    }
    if (p.relu) {
      for (size_t j = 0; j < p.n; ++j) c[j] = c[j] < T(0) ? T(0) : c[j];
    }
    if (p.gate != nullptr) {
      const T* const gate = p.gate + i * p.gate_row;
      for (size_t j = 0; j < p.n; ++j) c[j] = gate[j] > T(0) ? c[j] : T(0);
    }
  }
}

template <typename T>
void transpose(const T* in, size_t in_row, T* out, size_t out_row, size_t rows, size_t columns) {
  for (size_t i = 0; i < rows; ++i) {
    for (size_t j = 0; j < columns; ++j) out[j * out_row + i] = in[i * in_row + j];
  }
}
