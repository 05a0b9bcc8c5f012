#define ANGLE_ISA_NAME baseline
#include "kernels/kernels.inl"
