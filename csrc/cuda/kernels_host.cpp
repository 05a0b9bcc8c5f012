// All kernels for the host, where their logic is tested.
#include "cuda/launch.inl"
