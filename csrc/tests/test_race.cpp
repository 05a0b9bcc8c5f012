#include <cstring>
#include <stdexcept>
#include <vector>

#include "core/floor.h"
#include "core/race.h"
#include "doctest.h"

using namespace angle;

namespace {

RecordLayout half_cheetah() {
  return RecordLayout({{"observations", 4, 68}, {"actions", 4, 24}, {"rewards", 4, 4}, {"next_observations", 4, 68}});
}

ReplayOptions of_capacity(uint64_t capacity) {
  ReplayOptions options;
  options.capacity = capacity;
  return options;
}

void insert(Replay& replay, RaceRow row) {
  const uint8_t* const fields[] = {
      reinterpret_cast<const uint8_t*>(row.observation), reinterpret_cast<const uint8_t*>(row.action),
      reinterpret_cast<const uint8_t*>(&row.reward), reinterpret_cast<const uint8_t*>(row.next_observation)};
  int64_t handle;
  replay.insert({1, fields, &row.terminated}, &handle);
}

}  // namespace

TEST_CASE("a race's threads insert, learn and check") {
  Replay replay(of_capacity(3000), half_cheetah());
  for (uint64_t i = 0; i < 3000; ++i) insert(replay, race_row(i));
  RaceOptions options;
  options.inserters = 2;
  options.seconds = 0.2;
  options.batch = 64;
  options.first_row = 3000;
  options.check_every = 2;
  const RaceResult found = race(replay, options);
  CHECK(found.inserts.calls > 0);
  CHECK(found.cycles.calls > 0);
  CHECK(found.checked_rows >= 64 * (found.cycles.calls / 2));
  const ReplayStats stats = replay.stats();
  CHECK(stats.inserts == 3000 + found.inserts.calls);
  CHECK(stats.samples == 64 * found.cycles.calls);
  CHECK(stats.refused_updates == found.refused);
  CHECK(replay.sums_are_exact());
  for (const RaceSide& side : {found.inserts, found.cycles}) {
    CHECK(side.per_second > 0);
    CHECK(side.p50_us <= side.p99_us);
    CHECK(side.p99_us <= side.p999_us);
    CHECK(side.p999_us <= side.max_us);
  }
}

TEST_CASE("a race finds a row that is not whole") {
  Replay replay(of_capacity(100), half_cheetah());
  RaceRow row = race_row(5);
  row.next_observation[16] += 1.0f;
  insert(replay, row);
  RaceOptions options;
  options.inserters = 0;
  options.seconds = 5.0;
  CHECK_THROWS_WITH_AS(race(replay, options), doctest::Contains("is not whole"), std::runtime_error);
}

TEST_CASE("a race refuses what it cannot run") {
  Replay replay(of_capacity(100), half_cheetah());
  RaceOptions options;
  options.seconds = 0.1;
  options.inserters = 0;
  CHECK_THROWS_AS(race(replay, options), NothingToSample);
  options.batch = 0;
  CHECK_THROWS_AS(race(replay, options), std::invalid_argument);
  options = {};
  options.inserters = options.learners = 0;
  CHECK_THROWS_AS(race(replay, options), std::invalid_argument);
  options = {};
  options.first_stream = kStreams;
  CHECK_THROWS_AS(race(replay, options), std::invalid_argument);
  Replay other(of_capacity(100), RecordLayout({{"rewards", 4, 4}}));
  CHECK_THROWS_AS(race(other, RaceOptions{}), std::invalid_argument);
  CHECK(replay.size() == 0);
}

TEST_CASE("latencies are found again by their share") {
  LatencyHistogram histogram;
  CHECK(histogram.quantile(0.5) == 0.0);
  for (uint64_t i = 1; i <= 100000; ++i) histogram.add(i);
  for (const double share : {0.001, 0.5, 0.99, 0.999}) {
    CHECK(histogram.quantile(share) >= share * 100000);
    CHECK(histogram.quantile(share) <= share * 100000 * 1.07);
  }
  CHECK(histogram.quantile(1.0) == 100000.0);
  LatencyHistogram other;
  other.add(~0ull);
  histogram.merge(other);
  CHECK(histogram.count() == 100001);
  CHECK(histogram.longest() == ~0ull);
}

TEST_CASE_TEMPLATE("the floor's sums agree at every height", Floor, ReplayFloor, SmallReplayFloor) {
  for (const size_t capacity : {size_t{1}, size_t{5000}, size_t{2'200'000}}) {  // the last has a level more
    if (capacity > 5000 && Floor::kRecord > 64) continue;
    Floor floor(capacity, 1);
    floor.cycle(256, 20);
    floor.learn(64, 20);
    floor.insert(100, 3);
    CHECK(floor.sums_agree());
    floor.sample(100, 1);
    for (size_t i = 0; i < 100; ++i) {
      const uint32_t row = floor.indices()[i];
      REQUIRE(row < capacity);
      CHECK(floor.observations()[i * Floor::kObservation] == *floor.record(row));
    }
  }
}

TEST_CASE("the copies' floor copies the rows it drew") {
  CopyFloor floor(100, 1000);
  floor.sample(32, 3);
  CHECK(floor.copies_agree());
  CHECK_THROWS_AS(CopyFloor(0, 1), std::invalid_argument);
  CHECK_THROWS_AS(CopyFloor(1, 0), std::invalid_argument);
  CHECK_THROWS_AS(floor.sample(0, 1), std::invalid_argument);
}
