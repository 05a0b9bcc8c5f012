#include "core/race.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
#include <latch>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

namespace angle {
namespace {

constexpr double kDiscount = 0.99, kImportanceExponent = 0.4;
constexpr size_t kErrorBatches = 16;  // distinct batches of td errors that a learner walks through

using SteadyClock = std::chrono::steady_clock;

double seconds_since(SteadyClock::time_point start) {
  return std::chrono::duration<double>(SteadyClock::now() - start).count();
}

// A counter that grows steadily and costs less to read than the calls that it times.
uint64_t ticks() {
#if defined(__x86_64__)
  return __builtin_ia32_rdtsc();
#else
  return static_cast<uint64_t>(SteadyClock::now().time_since_epoch().count());
#endif
}

// The fields of rows to insert or of a batch, as the core takes them. The only functions that know how it is called.
struct Columns {
  explicit Columns(size_t n)
      : observations(17 * n),
        actions(6 * n),
        rewards(n),
        next_observations(17 * n),
        discounts(n),
        importance_weights(n),
        handles(n),
        steps(n),
        terminated(n) {}

  void set(size_t row, const RaceRow& values) {
    std::memcpy(&observations[17 * row], values.observation, sizeof values.observation);
    std::memcpy(&actions[6 * row], values.action, sizeof values.action);
    rewards[row] = values.reward;
    std::memcpy(&next_observations[17 * row], values.next_observation, sizeof values.next_observation);
    terminated[row] = values.terminated;
  }

  // Whether a sampled row's numbers are those of one row.
  bool whole(size_t row) const {
    const float low = observations[17 * row], high = observations[17 * row + 1];
    if (!(low >= 0.0f && low < 4096.0f && high >= 0.0f && high < 0x1p24f)) return false;
    const RaceRow truth = race_row(static_cast<uint64_t>(low) + 4096 * static_cast<uint64_t>(high));
    const float discount = truth.terminated != 0 ? 0.0f : static_cast<float>(kDiscount);
    return std::memcmp(&observations[17 * row], truth.observation, sizeof truth.observation) == 0 &&
           std::memcmp(&actions[6 * row], truth.action, sizeof truth.action) == 0 && rewards[row] == truth.reward &&
           std::memcmp(&next_observations[17 * row], truth.next_observation, sizeof truth.next_observation) == 0 &&
           discounts[row] == discount && importance_weights[row] > 0.0f;
  }

  template <class Access>
  void insert(ReplayT<Access>& replay, size_t row, const int64_t* stream) {
    const uint8_t* const fields[] = {bytes(&observations[17 * row]), bytes(&actions[6 * row]), bytes(&rewards[row]),
                                     bytes(&next_observations[17 * row])};
    InsertRows rows{1, fields, &terminated[row]};
    rows.streams = stream;
    int64_t handle;
    replay.insert(rows, &handle);
  }

  template <class Access>
  void sample(ReplayT<Access>& replay) {
    uint8_t* const fields[] = {bytes(observations.data()), bytes(actions.data()), bytes(rewards.data()),
                               bytes(next_observations.data())};
    SampleRequest request{handles.size()};
    request.discount = kDiscount;
    request.importance_exponent = kImportanceExponent;
    replay.sample(request, {fields, discounts.data(), importance_weights.data(), handles.data(), steps.data()});
  }

  template <class Access>
  size_t update(ReplayT<Access>& replay, const float* td_errors) {
    return replay.update(handles.data(), td_errors, handles.size());
  }

  static uint8_t* bytes(float* values) { return reinterpret_cast<uint8_t*>(values); }

  std::vector<float> observations, actions, rewards, next_observations, discounts, importance_weights;
  std::vector<int64_t> handles, steps;
  std::vector<uint8_t> terminated;
};

// What one thread did.
struct Lane {
  LatencyHistogram durations;  // ticks a call
  uint64_t calls = 0, checked_rows = 0, refused = 0;
  double seconds = 0.0;
};

struct Course {
  explicit Course(size_t threads) : start(static_cast<ptrdiff_t>(threads)) {}
  std::latch start;
  std::atomic<bool> stop{false};
  std::mutex failing;
  std::exception_ptr failure;

  void fail() {
    const std::lock_guard<std::mutex> guard(failing);
    if (!failure) failure = std::current_exception();
    stop.store(true, std::memory_order_relaxed);
  }
};

// Calls `step` until the course stops, at least once: a busy system may let a thread on only then.
template <class Step>
void drive(Course& course, Lane& lane, Step step) {
  course.start.arrive_and_wait();
  const SteadyClock::time_point begin = SteadyClock::now();
  try {
    do {
      step();
      ++lane.calls;
    } while (!course.stop.load(std::memory_order_relaxed));
  } catch (...) {
    course.fail();
  }
  lane.seconds = seconds_since(begin);
}

// An insert lasts from the end of the one before: one look at the counter a row.
template <class Access>
void insert_rows(ReplayT<Access>& replay, const RaceOptions& options, Course& course, Lane& lane, int64_t stream) {
  Columns rows(kRaceRows);
  for (size_t row = 0; row < kRaceRows; ++row) rows.set(row, race_row(options.first_row + row));
  size_t row = 0;
  uint64_t last = 0;
  drive(course, lane, [&] {
    if (last == 0) last = ticks();
    rows.insert(replay, row, &stream);
    row = (row + 1) % kRaceRows;
    const uint64_t now = ticks();
    lane.durations.add(now - last);
    last = now;
  });
}

template <class Access>
void learn(ReplayT<Access>& replay, const RaceOptions& options, Course& course, Lane& lane, uint64_t seed) {
  Columns batch(options.batch);
  std::vector<float> td_errors(options.batch * kErrorBatches);
  uint64_t state = seed * 0x9E3779B97F4A7C15ull + 1;
  for (float& error : td_errors) {  // exponential, as the errors that the buffer was filled with
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    error = static_cast<float>(-std::log((static_cast<double>(state >> 40) + 1.0) * 0x1p-24));
  }
  size_t turn = 0;
  drive(course, lane, [&] {
    const uint64_t before = ticks();
    batch.sample(replay);
    lane.refused += batch.update(replay, td_errors.data() + (turn % kErrorBatches) * options.batch);
    lane.durations.add(ticks() - before);
    if (turn++ % options.check_every != 0) return;
    for (size_t row = 0; row < options.batch; ++row) {
      if (!batch.whole(row)) {
        throw std::runtime_error("row " + std::to_string(row) + " of a sampled batch, handle " +
                                 std::to_string(batch.handles[row]) + ", is not whole");
      }
    }
    lane.checked_rows += options.batch;
  });
}

RaceSide together(const Lane* lanes, size_t count, double tick_us) {
  RaceSide side;
  LatencyHistogram all;
  double seconds = 0.0;
  for (size_t i = 0; i < count; ++i) {
    all.merge(lanes[i].durations);
    side.calls += lanes[i].calls;
    side.per_second += static_cast<double>(lanes[i].calls) / lanes[i].seconds;
    seconds += lanes[i].seconds;
  }
  if (side.calls == 0) return side;
  side.mean_us = seconds * 1e6 / static_cast<double>(side.calls);
  side.p50_us = all.quantile(0.5) * tick_us;
  side.p99_us = all.quantile(0.99) * tick_us;
  side.p999_us = all.quantile(0.999) * tick_us;
  side.max_us = static_cast<double>(all.longest()) * tick_us;
  return side;
}

void require(bool good, const char* message) {
  if (!good) throw std::invalid_argument(message);
}

void check(const RecordLayout& record, const RaceOptions& options) {
  require(options.inserters + options.learners > 0, "inserters and learners are both 0; there is nothing to do");
  require(options.inserters + options.learners <= 1024, "inserters and learners are more than 1024 together");
  require(options.batch > 0, "batch is 0; it must be at least 1");
  require(options.seconds > 0 && options.seconds <= 3600, "seconds must be above 0 and at most 3600");
  require(options.check_every > 0, "check_every is 0; it must be at least 1");
  require(options.first_row <= (1ull << 36) - kRaceRows, "first_row must be at most 2**36 - 1024");
  require(options.first_stream >= 0 && options.first_stream + static_cast<int64_t>(options.inserters) <= kStreams,
          "first_stream and those after it must be in [0, 65536)");
  constexpr uint32_t kBytes[] = {17 * 4, 6 * 4, 4, 17 * 4};
  bool fits = record.fields.size() == std::size(kBytes);
  for (size_t f = 0; fits && f < std::size(kBytes); ++f) {
    fits = record.fields[f].itemsize == 4 && record.fields[f].bytes == kBytes[f];
  }
  require(fits, "the race needs rows of 17 observations, 6 actions, a reward and 17 next observations in float32");
}

}  // namespace

void LatencyHistogram::add(uint64_t duration) {
  size_t bucket = duration;
  if (duration >= kPart) {
    const int octave = 63 - __builtin_clzll(duration);
    bucket = static_cast<size_t>(octave - 3) * kPart + ((duration >> (octave - 4)) & (kPart - 1));
  }
  ++buckets_[bucket];
  ++count_;
  longest_ = std::max(longest_, duration);
}

void LatencyHistogram::merge(const LatencyHistogram& other) {
  for (size_t i = 0; i < buckets_.size(); ++i) buckets_[i] += other.buckets_[i];
  count_ += other.count_;
  longest_ = std::max(longest_, other.longest_);
}

double LatencyHistogram::quantile(double share) const {
  const double due = share * static_cast<double>(count_);
  uint64_t seen = 0;
  for (size_t i = 0; i < buckets_.size(); ++i) {
    seen += buckets_[i];
    if (seen == 0 || static_cast<double>(seen) < due) continue;
    if (i < kPart) return static_cast<double>(i);
    const double upper = std::ldexp(static_cast<double>(kPart + i % kPart + 1), static_cast<int>(i / kPart) - 1) - 1.0;
    return std::min(upper, static_cast<double>(longest_));
  }
  return 0.0;
}

RaceRow race_row(uint64_t number) {
  RaceRow row;
  for (uint64_t i = 0; i < 17; ++i) {
    row.observation[i] = static_cast<float>(number * (3 + i) % 251) / 256.0f;
    if (i < 6) row.action[i] = static_cast<float>(number * (3 + i) % 127) / 64.0f - 1.0f;
  }
  row.observation[0] = static_cast<float>(number % 4096);
  row.observation[1] = static_cast<float>(number / 4096);
  for (size_t i = 0; i < 17; ++i) row.next_observation[i] = row.observation[i] + 0.5f;
  row.reward = static_cast<float>(number % 1021);
  row.terminated = number % 1000 == 999 ? 1 : 0;
  return row;
}

template <class Access>
RaceResult race(ReplayT<Access>& replay, const RaceOptions& options) {
  check(replay.record(), options);
  const size_t threads = options.inserters + options.learners;
  std::vector<Lane> lanes(threads);
  Course course(threads + 1);
  const auto run = [&](size_t i) {
    try {
      if (i < options.inserters) {
        insert_rows(replay, options, course, lanes[i], options.first_stream + static_cast<int64_t>(i));
      } else {
        learn(replay, options, course, lanes[i], i);
      }
    } catch (...) {  // before the start: what comes later, drive keeps
      course.fail();
      course.start.count_down();
    }
  };
  std::vector<std::thread> running;
  running.reserve(threads);
  try {
    while (running.size() < threads) running.emplace_back(run, running.size());
  } catch (...) {
    course.fail();
    course.start.count_down(static_cast<ptrdiff_t>(threads - running.size()));
  }
  course.start.arrive_and_wait();
  const SteadyClock::time_point begin = SteadyClock::now();
  const uint64_t first_tick = ticks();
  for (double left = options.seconds; left > 0 && !course.stop.load(std::memory_order_relaxed);
       left = options.seconds - seconds_since(begin)) {
    std::this_thread::sleep_for(std::chrono::duration<double>(std::min(left, 0.05)));
  }
  course.stop.store(true, std::memory_order_relaxed);
  const double tick_us = seconds_since(begin) * 1e6 / static_cast<double>(std::max<uint64_t>(ticks() - first_tick, 1));
  for (std::thread& thread : running) thread.join();
  if (course.failure) std::rethrow_exception(course.failure);
  RaceResult result;
  result.inserts = together(lanes.data(), options.inserters, tick_us);
  result.cycles = together(lanes.data() + options.inserters, options.learners, tick_us);
  for (const Lane& lane : lanes) {
    result.checked_rows += lane.checked_rows;
    result.refused += lane.refused;
  }
  return result;
}

template RaceResult race(ReplayT<WordAccess>&, const RaceOptions&);
#if !defined(ANGLE_WORD_ACCESS)
template RaceResult race(ReplayT<VectorAccess>&, const RaceOptions&);
#endif

}  // namespace angle
