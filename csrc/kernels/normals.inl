// From random bits to uniforms and normals, one at a time: fixed float64 arithmetic, equal to the last bit on every ISA
// and device. Needs bits.inl.

// Uniform in [0, 1) with 53 bits, as core/philox.h has it. Every ISA converts words of 32 bits in vectors, not all 64.
ANGLE_KERNEL_FUNCTION double unit_share(uint64_t bits) {
  constexpr uint64_t kMagic = 0x4330000000000000ull;  // 2^52
  const uint64_t whole = bits >> 11;
  const double low = as_double((whole & 0xFFFFFFFFull) | kMagic) - 0x1p52;
  const double high = as_double((whole >> 32) | kMagic) - 0x1p52;
  return high * 0x1p-21 + low * 0x1p-53;  // exactly
}

// log u for 2^-53 <= u <= 1, to 1 unit in the last place: with u = 2^e (1 + f), s = f / (2 + f) and
// log(1 + f) = 2 atanh(s) = f - s (f - r), where r = 2 s^2 / 3 + 2 s^4 / 5 + ...
ANGLE_KERNEL_FUNCTION double log_of_share(double u) {
  constexpr uint64_t kRootHalf = 0x3FE6A09E667F3BCDull, kOne = 1023ull << 52, kMagic = 0x4330000000000000ull;
  const uint64_t bits = as_bits(u), biased = (bits - kRootHalf + kOne) >> 52;
  const double e = as_double(biased | kMagic) - (0x1p52 + 1023.0);
  const double f = as_double(bits - (biased << 52) + kOne) - 1.0;
  const double s = f / (2.0 + f), q = s * s;
  // r / s^2, fitted to 3e-18 of s
  double r = 0x1.2f056065fd827p-3;
  r = r * q + 0x1.39a1bb0c7d69fp-3;
  r = r * q + 0x1.74663ee4ddd55p-3;
  r = r * q + 0x1.c71c5209700dep-3;
  r = r * q + 0x1.24924941f10afp-2;
  r = r * q + 0x1.999999997fdbap-2;
  r = r * q + 0x1.5555555555592p-1;
  r = r * q;
  return e * 0x1.62e42fee00000p-1 + (f - (s * (f - r) - e * 0x1.a39ef35793c76p-33));
}

// sin and cos of 2 pi v for 0 <= v < 1: v is a quarter's multiple and the rest within 1/8, exactly.
ANGLE_KERNEL_FUNCTION void sine_and_cosine(double v, double* sine, double* cosine) {
  constexpr double kRound = 0x1.8p52;  // adding it rounds to an integer, left in the low bits
  const double shifted = v * 4.0 + kRound;
  const uint64_t quarter = as_bits(shifted);
  const double x = v - (shifted - kRound) * 0.25, z = x * x;
  // (sin(2 pi x) / x - 2 pi) / x^2 and (cos(2 pi x) - 1) / x^2, fitted to 4e-18 of the results
  double sin_x = 0x1.e403d07fff2bcp+1;
  sin_x = sin_x * z + -0x1.e300a65a0aedbp+3;
  sin_x = sin_x * z + 0x1.5078301b6209dp+5;
  sin_x = sin_x * z + -0x1.32d2cce3332d5p+6;
  sin_x = sin_x * z + 0x1.466bc67758d85p+6;
  sin_x = sin_x * z + -0x1.4abbce625be47p+5;
  double cos_x = -0x1.b26fe9393b386p+0;
  cos_x = cos_x * z + 0x1.f9cc6ad2c4200p+2;
  cos_x = cos_x * z + -0x1.a6d1ecb7441c5p+4;
  cos_x = cos_x * z + 0x1.e1f50683b431ep+5;
  cos_x = cos_x * z + -0x1.55d3c7e3c95bcp+6;
  cos_x = cos_x * z + 0x1.03c1f081b5ab0p+6;
  cos_x = cos_x * z + -0x1.3bd3cc9be45dep+4;
  sin_x = 0x1.921fb54442d18p+2 * x + (x * z * sin_x + 0x1.1a62633145c07p-52 * x);
  cos_x = 1.0 + z * cos_x;
  const uint64_t swap = 0 - (quarter & 1), keep = ~swap;
  const uint64_t s = as_bits(sin_x), c = as_bits(cos_x);
  *sine = as_double(((s & keep) | (c & swap)) ^ ((quarter & 2) << 62));
  *cosine = as_double(((c & keep) | (s & swap)) ^ (((quarter + 1) & 2) << 62));
}

// A pair of standard normals of 128 random bits, by Box and Muller (1958).
ANGLE_KERNEL_FUNCTION void normal_pair(uint64_t low, uint64_t high, double* first, double* second) {
  const double radius = sqrt(-2.0 * log_of_share(1.0 - unit_share(low)));
  double sine, cosine;
  sine_and_cosine(unit_share(high), &sine, &cosine);
  *first = radius * cosine;
  *second = radius * sine;
}
