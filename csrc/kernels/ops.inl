void update_targets_f32(float* target, const float* online, size_t n, float tau) {
  const float keep = 1.0f - tau;
  for (size_t i = 0; i < n; ++i) target[i] = tau * online[i] + keep * target[i];
}

constexpr OpsKernels ops_kernels = {
    .update_targets_f32 = update_targets_f32,
};
