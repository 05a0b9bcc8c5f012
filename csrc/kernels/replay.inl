bool any_nan_f32(const float* values, size_t n) {
  int found = 0;
  for (size_t i = 0; i < n; ++i) found |= values[i] != values[i];
  return found != 0;
}

constexpr ReplayKernels replay_kernels = {
    .any_nan_f32 = any_nan_f32,
};
