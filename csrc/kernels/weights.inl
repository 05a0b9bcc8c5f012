// From priorities to weights, one number at a time: fixed float64 arithmetic, equal to the last bit on every ISA and
// device. Needs bits.inl.

// log2 by the series of atanh on [sqrt(1/2), sqrt(2)), then exp2 by Taylor's on [-1/2, 1/2]: only additions,
// multiplications, one division and shifts of bits, in a fixed order (by halves: short chains), so that every ISA and
// device agrees.
ANGLE_KERNEL_FUNCTION double power_of(double value, double exponent) {
  constexpr uint64_t kRootHalf = 0x3FE6A09E667F3BCDull, kBias = 1023ull << 52, kMagicBits = 0x4330000000000000ull;
  constexpr double kMagic = 0x1p52, kRound = 0x1.8p52, kSmallest = 0x1p-1022, kLog2E = 0x1.71547652b82fep+0,
                   kLn2 = 0x1.62e42fefa39efp-1;
  const double x = value < kSmallest ? kSmallest : value;
  const uint64_t bits = as_bits(x), biased = (bits - kRootHalf + kBias) >> 52;
  const double whole = as_double(biased | kMagicBits) - kMagic - 1023.0;
  const double mantissa = as_double(bits - (biased << 52) + kBias);
  const double s = (mantissa - 1.0) / (mantissa + 1.0), q = s * s;
  const double q2 = q * q, q4 = q2 * q2;
  const double low = (1.0 + q * (1.0 / 3.0)) + (1.0 / 5.0 + q * (1.0 / 7.0)) * q2;
  const double middle = (1.0 / 9.0 + q * (1.0 / 11.0)) + (1.0 / 13.0 + q * (1.0 / 15.0)) * q2;
  const double high = (1.0 / 17.0 + q * (1.0 / 19.0)) + (1.0 / 21.0) * q2;
  const double series = low + middle * q4 + high * (q4 * q4);
  double y = (whole + 2.0 * s * series * kLog2E) * exponent;
  y = y < -1022.0 ? -1022.0 : y;
  y = y > 1023.0 ? 1023.0 : y;
  const double rounded = y + kRound;
  const double f = (y - (rounded - kRound)) * kLn2;
  const double f2 = f * f, f4 = f2 * f2;
  const double p0 = (1.0 + f) + (0.5 + f * (1.0 / 6.0)) * f2;
  const double p4 = (1.0 / 24.0 + f * (1.0 / 120.0)) + (1.0 / 720.0 + f * (1.0 / 5040.0)) * f2;
  const double p8 = (1.0 / 40320.0 + f * (1.0 / 362880.0)) + (1.0 / 3628800.0 + f * (1.0 / 39916800.0)) * f2;
  const double p12 = 1.0 / 479001600.0 + f * (1.0 / 6227020800.0);
  const double p = (p0 + p4 * f4) + (p8 + p12 * f4) * (f4 * f4);
  const double power = p * as_double((as_bits(rounded) + 1023ull) << 52);
  const double at_zero = exponent == 0.0 ? 1.0 : 0.0;
  return value > 0.0 ? power : at_zero;
}

// A power as an integer weight: times kWeightUnit and rounded; a positive one never becomes 0, and one beyond `largest`
// is cut to it.
ANGLE_KERNEL_FUNCTION uint64_t weight_of(double power, uint64_t largest, bool* cut) {
  const double scaled = power * kWeightUnit;
  const bool over = !(scaled < static_cast<double>(largest));
  const int64_t rounded = static_cast<int64_t>((over ? 0.0 : scaled) + 0.5);
  const int64_t least = power > 0.0 ? 1 : 0;
  *cut = over;
  return over ? largest : static_cast<uint64_t>(rounded > least ? rounded : least);
}
