// The replay's promises that one thread can see.
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include "core/replay.h"
#include "doctest.h"
#include "rows.h"

using namespace angle;
using namespace angle::testing;

namespace {
ReplayOptions options(uint64_t capacity) {
  ReplayOptions o;
  o.capacity = capacity;
  o.seed = 5;
  return o;
}
std::vector<uint32_t> range(uint32_t from, uint32_t to) {
  std::vector<uint32_t> values;
  for (uint32_t value = from; value < to; ++value) values.push_back(value);
  return values;
}
}  // namespace

TEST_CASE_TEMPLATE("rows come back whole under their handles, past the ring's edge too", Access, WordAccess,
                   DefaultAccess) {
  ReplayT<Access> replay(options(40), row_layout());
  std::map<int64_t, uint32_t> inserted;
  std::vector<int64_t> handles;
  uint32_t value = 0;
  for (int round = 0; round < 30; ++round) {
    insert_values(replay, range(value, value + 7), handles);
    for (const int64_t handle : handles) inserted[handle] = value++;
    Drawn drawn(64);
    draw(replay, drawn);
    for (size_t i = 0; i < 64; ++i) {
      CHECK(drawn.rows.whole(i));
      CHECK(drawn.rows.rewards[i] == inserted.at(drawn.handles[i]));
      CHECK(drawn.handles[i] >= static_cast<int64_t>(value) - 40);
      CHECK(drawn.discounts[i] == (drawn.rows.rewards[i] % 5 == 0 ? 0.0f : 0.99f));
      CHECK(drawn.steps[i] == 1);
    }
  }
  CHECK(replay.size() == 40);
  CHECK(replay.sums_are_exact());
}

TEST_CASE("stale handles are refused, the last of equal handles wins") {
  Replay replay(options(8), row_layout());
  std::vector<int64_t> first, second;
  insert_values(replay, range(0, 8), first);
  insert_values(replay, range(8, 11), second);
  const std::vector<int64_t> handles{0, 1, 2, 3, 3, 9};
  const std::vector<double> td_errors{9, 9, 9, 5, 2, 4};
  CHECK(replay.update(handles.data(), td_errors.data(), 6) == 3);
  std::vector<int64_t> weights(8);
  replay.read_weights(weights.data());
  CHECK(weights[3] == std::llround(std::pow(2 + 1e-6, 0.6) * kWeightUnit));
  CHECK(weights[1] == std::llround(std::pow(4 + 1e-6, 0.6) * kWeightUnit));
  CHECK(replay.sums_are_exact());
  CHECK(replay.stats().refused_updates == 3);
  CHECK(replay.stats().updates == 3);
}

TEST_CASE("a bad priority or handle changes nothing") {
  Replay replay(options(8), row_layout());
  std::vector<int64_t> handles, weights(8), before(8);
  insert_values(replay, range(0, 8), handles);
  replay.read_weights(before.data());
  for (const double bad : {-1.0, std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    const std::vector<double> td_errors{3, bad};
    CHECK_THROWS_WITH_AS(replay.update(handles.data(), td_errors.data(), 2), doctest::Contains("td_errors[1]"),
                         std::invalid_argument);
  }
  const std::vector<double> good{3, 3};
  for (const int64_t bad : {-1ll, 8ll}) {
    const std::vector<int64_t> wrong{0, bad};
    CHECK_THROWS_WITH_AS(replay.update(wrong.data(), good.data(), 2), doctest::Contains("handles[1]"),
                         std::invalid_argument);
  }
  replay.read_weights(weights.data());
  CHECK(weights == before);
}

TEST_CASE("new rows weigh as much as the largest computed priority that still lives") {
  Replay replay(options(4), row_layout());
  std::vector<int64_t> handles;
  CHECK(replay.default_weight().weight == static_cast<uint64_t>(std::llround(std::pow(1 + 1e-6, 0.6) * kWeightUnit)));
  insert_values(replay, range(0, 4), handles);
  const std::vector<double> td_errors{1000, 2, 3, 0.5};
  replay.update(handles.data(), td_errors.data(), 4);
  const auto near = [&](double priority) {
    const double ratio =
        static_cast<double>(replay.default_weight().weight) / (std::pow(priority + 1e-6, 0.6) * kWeightUnit);
    return ratio >= 1.0 - 1e-9 && ratio <= 1.05;
  };
  CHECK(near(1000));
  insert_values(replay, {7}, handles);  // the outlier's row goes; its heir's default does not count as computed
  CHECK(near(3));
  insert_values(replay, {7, 7}, handles);
  CHECK(near(0.5));
  insert_values(replay, {7}, handles);
  CHECK(near(1));
}

TEST_CASE("weights saturate, are counted, and a positive one never becomes nothing") {
  ReplayOptions o = options(4);
  o.priority_epsilon = 0.0;
  o.priority_exponent = 1.0;
  Replay replay(o, row_layout());
  std::vector<int64_t> handles, weights(4);
  insert_values(replay, range(0, 4), handles);
  const std::vector<double> td_errors{1e300, 1e-300, 0.0, 1.0};
  replay.update(handles.data(), td_errors.data(), 4);
  replay.read_weights(weights.data());
  CHECK(weights[0] == (1ll << 40) - 1);
  CHECK(weights[1] == 1);
  CHECK(weights[2] == 0);
  CHECK(weights[3] == 1 << 20);
  CHECK(replay.stats().saturated_weights == 1);
  CHECK(replay.sums_are_exact());
}

TEST_CASE("rows of weight zero are never drawn, and a buffer of them says so") {
  ReplayOptions o = options(100);
  o.priority_epsilon = 0.0;
  Replay replay(o, row_layout());
  std::vector<int64_t> handles;
  insert_values(replay, range(0, 100), handles);
  std::vector<double> td_errors(100, 0.0);
  td_errors[42] = 1.0;
  replay.update(handles.data(), td_errors.data(), 100);
  Drawn drawn(256);
  draw(replay, drawn);
  for (const int64_t handle : drawn.handles) CHECK(handle == 42);
  for (const float weight : drawn.importance_weights) CHECK(weight == 1.0f);
  td_errors[42] = 0.0;
  replay.update(handles.data(), td_errors.data(), 100);
  CHECK_THROWS_AS(draw(replay, drawn), NothingToSample);
}

TEST_CASE("an empty buffer, too many rows and a bad stream are refused") {
  Replay replay(options(4), row_layout());
  Drawn drawn(1);
  CHECK_THROWS_AS(draw(replay, drawn), NothingToSample);
  std::vector<int64_t> handles;
  CHECK_THROWS_AS(insert_values(replay, range(0, 5), handles), std::invalid_argument);
  Rows rows(2);
  const auto in = rows.in();
  const std::vector<int64_t> streams{0, -1};
  CHECK_THROWS_WITH_AS(replay.insert({2, in.data(), rows.terminated.data(), nullptr, streams.data()}, handles.data()),
                       doctest::Contains("streams[1]"), std::invalid_argument);
  CHECK(replay.size() == 0);
}

TEST_CASE("every stratum gives its share: draws differ from the expected count by less than two") {
  Replay replay(options(1000), row_layout());
  std::vector<int64_t> handles, weights(1000);
  insert_values(replay, range(0, 1000), handles);
  std::vector<double> td_errors(1000);
  for (size_t i = 0; i < 1000; ++i) td_errors[i] = static_cast<double>(i % 17 + 1);
  replay.update(handles.data(), td_errors.data(), 1000);
  replay.read_weights(weights.data());
  double total = 0;
  for (const int64_t weight : weights) total += static_cast<double>(weight);
  for (const size_t n : {1000u, 4096u, 30000u}) {
    Drawn drawn(n);
    draw(replay, drawn);
    std::vector<double> count(1000, 0);
    for (const int64_t handle : drawn.handles) ++count[static_cast<size_t>(handle)];
    for (size_t i = 0; i < 1000; ++i) {
      CHECK(std::abs(count[i] - static_cast<double>(n) * static_cast<double>(weights[i]) / total) < 2.0);
    }
  }
}

TEST_CASE("importance weights are (N P)^-b over the batch's largest") {
  Replay replay(options(64), row_layout());
  std::vector<int64_t> handles, weights(64);
  insert_values(replay, range(0, 64), handles);
  std::vector<float> td_errors(64);
  for (size_t i = 0; i < 64; ++i) td_errors[i] = 0.1f * static_cast<float>(i + 1);
  replay.update(handles.data(), td_errors.data(), 64);
  replay.read_weights(weights.data());
  Drawn drawn(256);
  draw(replay, drawn, 0.7);
  double smallest = 1e300;
  for (const int64_t handle : drawn.handles) {
    smallest = std::min(smallest, static_cast<double>(weights[static_cast<size_t>(handle)]));
  }
  for (size_t i = 0; i < 256; ++i) {
    const double weight = static_cast<double>(weights[static_cast<size_t>(drawn.handles[i])]);
    CHECK(drawn.importance_weights[i] == doctest::Approx(std::pow(smallest / weight, 0.7)).epsilon(1e-6));
  }
}

TEST_CASE("the same seed draws the same rows, with words and with vectors") {
  ReplayT<WordAccess> words(options(5000), row_layout());
  Replay vectors(options(5000), row_layout());
  std::vector<int64_t> handles;
  insert_values(words, range(0, 5000), handles);
  insert_values(vectors, range(0, 5000), handles);
  for (int round = 0; round < 5; ++round) {
    Drawn a(256), b(256);
    draw(words, a);
    draw(vectors, b);
    CHECK(a.handles == b.handles);
    CHECK(a.rows.observations == b.rows.observations);
    CHECK(a.importance_weights == b.importance_weights);
    std::vector<double> td_errors(256);
    for (size_t i = 0; i < 256; ++i) td_errors[i] = static_cast<double>(a.handles[i] % 13);
    words.update(a.handles.data(), td_errors.data(), 256);
    vectors.update(b.handles.data(), td_errors.data(), 256);
  }
}

TEST_CASE("a uniform buffer draws every row alike") {
  ReplayOptions o = options(100);
  o.prioritized = false;
  Replay replay(o, row_layout());
  std::vector<int64_t> handles;
  insert_values(replay, range(0, 60), handles);
  std::vector<int> count(100, 0);
  Drawn drawn(60000);
  draw(replay, drawn, 0.4, false);
  for (size_t i = 0; i < drawn.handles.size(); ++i) {
    CHECK_FALSE(drawn.handles[i] >= 60);
    ++count[static_cast<size_t>(drawn.handles[i])];
    CHECK(drawn.importance_weights[i] == 1.0f);
  }
  double chi_square = 0;
  for (int i = 0; i < 60; ++i)
    chi_square += (count[static_cast<size_t>(i)] - 1000.0) * (count[static_cast<size_t>(i)] - 1000.0) / 1000.0;
  CHECK(chi_square < 98.3);  // 59 degrees of freedom, p = 0.001
}

TEST_CASE("rows of a stream are linked in time, streams apart") {
  Replay replay(options(16), row_layout());
  Rows rows(6);
  for (uint32_t i = 0; i < 6; ++i) rows.fill(i, i);
  const auto in = rows.in();
  const std::vector<int64_t> streams{0, 1, 0, 1, 1, 2};
  std::vector<int64_t> handles(6);
  replay.insert({6, in.data(), rows.terminated.data(), nullptr, streams.data()}, handles.data());
  const auto next = [&](uint64_t slot) {
    return *reinterpret_cast<const uint64_t*>(replay.segment() + replay.layout().records_at +
                                              slot * replay.layout().record_bytes + RecordLayout::kNext);
  };
  CHECK(next(0) == 2);
  CHECK(next(1) == 3);
  CHECK(next(2) == 2);  // itself: the newest of its stream
  CHECK(next(3) == 4);
  CHECK(next(4) == 4);
  CHECK(next(5) == 5);
  std::vector<int64_t> more;
  insert_values(replay, {9}, more);  // stream 0
  CHECK(next(2) == 6);
}
