// All kernels for CUDA devices.
#include "cuda/launch.inl"
