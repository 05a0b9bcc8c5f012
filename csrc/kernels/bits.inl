// What sources that ISAs and devices share are made of. ANGLE_KERNEL_FUNCTION says how their functions are declared
// where this is compiled. They call nothing but C's mathematical functions.
#if !defined(ANGLE_KERNEL_FUNCTION)
#define ANGLE_KERNEL_FUNCTION __attribute__((always_inline)) inline
#endif

ANGLE_KERNEL_FUNCTION double as_double(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

ANGLE_KERNEL_FUNCTION uint64_t as_bits(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

ANGLE_KERNEL_FUNCTION float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

ANGLE_KERNEL_FUNCTION uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
