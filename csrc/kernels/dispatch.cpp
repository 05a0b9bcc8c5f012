#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels/kernels.h"

namespace angle {

bool isa_available(const char* isa) {
  if (std::strcmp(isa, "baseline") == 0) return true;
#if defined(ANGLE_X86)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (std::strcmp(isa, "avx2") == 0) return has_avx2;
  if (std::strcmp(isa, "avx512") == 0) {
    return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return false;
}

namespace {

const Kernels* table_of(const std::string& isa) {
#if defined(ANGLE_X86)
  if (isa == "avx512") return &avx512::table;
  if (isa == "avx2") return &avx2::table;
#endif
  return isa == "baseline" ? &baseline::table : nullptr;
}

const Kernels& choose() {
  const char* forced = std::getenv("ANGLE_ISA");
  if (forced != nullptr && *forced != '\0') {
    const Kernels* table = isa_available(forced) ? table_of(forced) : nullptr;
    if (table == nullptr) {
      throw std::runtime_error(std::string("ANGLE_ISA is '") + forced +
                               "'; it must be baseline, avx2 or avx512, and one that this CPU has");
    }
    return *table;
  }
  for (const char* isa : {"avx512", "avx2"}) {
    if (isa_available(isa)) return *table_of(isa);
  }
  return baseline::table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

BfloatProduct bfloat16_product() {
#if defined(ANGLE_X86)
  if (&kernels() == &avx512::table && __builtin_cpu_supports("avx512bf16")) return avx512_bf16::product;
#endif
  return nullptr;
}

}  // namespace angle
