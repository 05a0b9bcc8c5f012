// Layout, random numbers and kernels: each ISA against the portable code.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "core/counts.h"
#include "core/layout.h"
#include "core/philox.h"
#include "core/tree.h"
#include "doctest.h"
#include "kernels/kernels.h"
#include "tables.h"

using namespace angle;

using angle::testing::tables;

TEST_CASE("a HalfCheetah record fits three cache lines") {
  const RecordLayout record(
      {{"observations", 4, 68}, {"actions", 4, 24}, {"rewards", 4, 4}, {"next_observations", 4, 68}});
  CHECK(record.record_bytes == 192);
  const SegmentLayout layout(1000000, record);
  CHECK(layout.total_bytes <= 1000000ull * (192 + 16) + (1 << 21));
}

TEST_CASE("fields are aligned to their elements and do not overlap") {
  const RecordLayout record({{"a", 1, 3}, {"b", 8, 24}, {"c", 2, 6}, {"d", 4, 12}, {"e", 1, 100}});
  std::vector<int> used(record.record_bytes, 0);
  for (const Field& field : record.fields) {
    CHECK(field.offset % field.itemsize == 0);
    CHECK(field.offset >= record.header_bytes);
    for (uint32_t i = 0; i < field.bytes; ++i) CHECK(++used[field.offset + i] == 1);
  }
}

TEST_CASE("a schema's hash follows names and sizes") {
  const auto hash = [](const char* name, uint32_t itemsize, uint32_t bytes) {
    return RecordLayout({{name, itemsize, bytes}}).schema_hash;
  };
  CHECK(hash("a", 4, 8) == hash("a", 4, 8));
  CHECK(hash("a", 4, 8) != hash("b", 4, 8));
  CHECK(hash("a", 4, 8) != hash("a", 8, 8));
  CHECK(hash("a", 4, 8) != hash("a", 4, 16));
}

TEST_CASE("bad layouts are refused") {
  CHECK_THROWS_AS(RecordLayout({{"a", 3, 3}}), std::invalid_argument);
  CHECK_THROWS_AS(RecordLayout({{"a", 4, 6}}), std::invalid_argument);
  CHECK_THROWS_AS(RecordLayout({{"a", 4, 0}}), std::invalid_argument);
  const RecordLayout record({{"a", 4, 4}});
  CHECK_THROWS_AS(SegmentLayout(0, record), std::invalid_argument);
  CHECK_THROWS_AS(SegmentLayout(1ull << 62, record), std::invalid_argument);
}

TEST_CASE("capacity times the largest weight stays below 2**62") {
  for (const uint64_t capacity : {1ull, 2ull, 1000ull, 1000000ull, 1ull << 27, (1ull << 30) + 1}) {
    const TreeShape shape(capacity);
    CHECK(static_cast<double>(capacity) * std::ldexp(1.0, static_cast<int>(shape.weight_bits)) <= 0x1p62);
    CHECK(shape.nodes[shape.levels - 1] <= TreeShape::kMaxTop);
  }
}

TEST_CASE("Philox gives the published answers") {
  // Known answers of philox4x32-10 from the authors' Random123 distribution.
  const PhiloxBlock zeros = philox(0, 0, 0);
  CHECK(zeros.word[0] == 0x6627e8d5u);
  CHECK(zeros.word[1] == 0xe169c58du);
  CHECK(zeros.word[2] == 0xbc57ac4cu);
  CHECK(zeros.word[3] == 0x9b00dbd8u);
  const PhiloxBlock ones = philox(~0ull, ~0ull, ~0ull);
  CHECK(ones.word[0] == 0x408f276du);
  CHECK(ones.word[1] == 0x41c83b0eu);
  CHECK(ones.word[2] == 0xa20bc7c6u);
  CHECK(ones.word[3] == 0x6d5451fdu);
}

TEST_CASE("draws are Philox blocks on every ISA") {
  for (const Kernels* table : tables()) {
    std::vector<uint64_t> bits(37);
    table->replay.philox_draws(7, 1ull << 40, 5, bits.data(), bits.size());
    for (size_t i = 0; i < bits.size(); ++i) {
      const PhiloxBlock block = philox(7, 1ull << 40, 5 + (static_cast<uint64_t>(i / 2) << 32));
      CHECK(bits[i] == (i % 2 == 0 ? block.low() : block.high()));
    }
  }
}

TEST_CASE("powers are accurate and equal to the last bit on every ISA") {
  std::mt19937_64 random(1);
  std::vector<double> base{0.0, 0x1p-1074, 1e-300, 1e-6, 0.5, 1.0, 2.0, 1e6, 1e300};
  for (int i = 0; i < 2000; ++i) base.push_back(std::exp2(std::uniform_real_distribution<>(-40, 40)(random)));
  for (const double exponent : {0.0, 0.4, 0.6, 1.0, 2.5}) {
    std::vector<double> expected = base;
    baseline::table.replay.powers(expected.data(), expected.size(), exponent);
    for (size_t i = 0; i < base.size(); ++i) {
      const double exact = std::pow(base[i], exponent);
      if (base[i] < 1e-200 || exact > 1e300) continue;
      CHECK(std::abs(expected[i] - exact) <= 1e-13 * exact);
    }
    CHECK(expected[0] == (exponent == 0.0 ? 1.0 : 0.0));
    for (const Kernels* table : tables()) {
      std::vector<double> got = base;
      table->replay.powers(got.data(), got.size(), exponent);
      CHECK(std::equal(got.begin(), got.end(), expected.begin()));
    }
  }
}

TEST_CASE("prefix sums and location read negative sums as nothing") {
  std::mt19937_64 random(2);
  alignas(64) static int64_t nodes[8 * 977];
  for (const size_t n : {1u, 7u, 8u, 9u, 100u, 977u}) {
    std::vector<int64_t> sums(n, 0);
    for (size_t i = 0; i < 8 * n; ++i) sums[i / 8] += nodes[i] = static_cast<int64_t>(random() % 100) - 45;
    nodes[8 * (n / 2)] += 500;
    sums[n / 2] += 500;
    for (const Kernels* table : tables()) {
      std::vector<int64_t> prefix(n + 8);
      const int64_t total = table->replay.prefix_sums(nodes, n, prefix.data());
      int64_t sum = 0;
      for (size_t i = 0; i < n; ++i) CHECK(prefix[i] == (sum += std::max<int64_t>(sums[i], 0)));
      CHECK(total == sum);
      for (const int ascending : {0, 1}) {
        std::vector<int64_t> targets(64);
        for (size_t i = 0; i < targets.size(); ++i) targets[i] = total * static_cast<int64_t>(i) / 64;
        std::vector<int64_t> left = targets;
        std::vector<uint64_t> index(targets.size());
        table->replay.locate(prefix.data(), n, ascending, targets.size(), index.data(), left.data());
        for (size_t i = 0; i < targets.size(); ++i) {
          const auto expected = std::upper_bound(prefix.begin(), prefix.begin() + static_cast<long>(n), targets[i]);
          CHECK(index[i] == static_cast<uint64_t>(expected - prefix.begin()));
          CHECK(left[i] == targets[i] - (index[i] == 0 ? 0 : prefix[index[i] - 1]));
          CHECK(left[i] < sums[index[i]]);
        }
      }
    }
  }
}

TEST_CASE("a descent ends in the child that holds the target, or is lost, on every ISA") {
  constexpr size_t kMostFan = 16, kNodes = 4;
  std::mt19937_64 random(3);
  alignas(64) int64_t level[kMostFan * kNodes];
  for (auto& value : level) value = static_cast<int64_t>(random() % 50) - 20;
  for (const Kernels* table : tables()) {
    for (const size_t fan : {8u, 16u})
      for (uint64_t node = 0; node < kNodes; ++node) {
        int64_t total = 0;
        for (size_t child = 0; child < fan; ++child) total += std::max<int64_t>(level[node * fan + child], 0);
        int64_t passed = 0;
        size_t child = 0;
        for (int64_t target = 0; target <= total; ++target) {
          while (child < fan && target >= passed + std::max<int64_t>(level[node * fan + child], 0)) {
            passed += std::max<int64_t>(level[node * fan + child++], 0);
          }
          uint64_t index = node;
          int64_t left = target;
          table->replay.descend(level, fan, 1, &index, &left);
          if (target == total) {
            CHECK(index == kLost);
          } else {
            CHECK(index == node * fan + child);
            CHECK(left == target - passed);
          }
        }
      }
  }
}

TEST_CASE("a weight's bucket holds it and is at most 3.2 % wide") {
  for (uint64_t weight = 1; weight < 5000; ++weight) {
    CHECK(WeightBuckets::upper_edge(WeightBuckets::of(weight)) >= weight);
    CHECK(static_cast<double>(WeightBuckets::upper_edge(WeightBuckets::of(weight))) <=
          1.032 * static_cast<double>(weight));
  }
  for (int shift = 13; shift < 62; ++shift) {
    const uint64_t weight = (1ull << shift) + 12345;
    const uint64_t edge = WeightBuckets::upper_edge(WeightBuckets::of(weight));
    CHECK(edge >= weight);
    CHECK(static_cast<double>(edge) <= 1.032 * static_cast<double>(weight));
    CHECK(WeightBuckets::of(weight) < kBuckets);
  }
}
