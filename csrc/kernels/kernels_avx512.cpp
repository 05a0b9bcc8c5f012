#define ANGLE_ISA_NAME avx512
#include "kernels/kernels.inl"
