// The device kernels by threads: what its parts share.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

namespace angle::testing {

// Where in the program's sequences this is, for whoever reads of a failure.
inline std::string& present() {
  static std::string text;
  return text;
}

inline void require(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "%s: %s does not hold\n", present().c_str(), what.c_str());
  std::exit(1);
}

// Random numbers of a seed, the same with every library.
class Choices {
 public:
  explicit Choices(uint64_t seed) : bits_(seed) {}
  uint64_t below(uint64_t end) { return bits_() % end; }
  uint64_t between(uint64_t first, uint64_t last) { return first + below(last - first + 1); }
  bool chance(uint64_t percent) { return below(100) < percent; }
  double share() { return static_cast<double>(bits_() >> 11) * 0x1p-53; }

 private:
  std::mt19937_64 bits_;
};

void check_replays();  // device_threads_replay.cpp
void check_ops();      // device_threads_ops.cpp

}  // namespace angle::testing
