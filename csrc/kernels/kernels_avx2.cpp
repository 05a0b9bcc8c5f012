#define ANGLE_ISA_NAME avx2
#include "kernels/kernels.inl"
