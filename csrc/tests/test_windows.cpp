// Rows of n steps, shared successors and stacks of frames against a plain model: every row ever inserted in a map.
#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <vector>

#include "core/replay.h"
#include "doctest.h"

using namespace angle;

namespace {

constexpr uint32_t kFrameBytes = 12;

struct Observation {
  std::vector<uint8_t> frames;  // [stack * kFrameBytes]
  uint32_t clock = 0;
  bool operator==(const Observation&) const = default;
};

struct Row {
  Observation own, next;
  double reward = 0.0;
  bool terminated = false, truncated = false;
  int64_t following = -1;  // handle of the stream's next row of the same episode chain
};

// One environment: frames of random bytes, a stack padded by the first frame after a reset.
class Environment {
 public:
  Environment(uint32_t stack, uint64_t seed) : random_(seed), stack_(stack) { reset(); }

  Row step() {
    Row row;
    row.own = now_;
    now_.frames.erase(now_.frames.begin(), now_.frames.begin() + kFrameBytes);
    append_frame();
    ++now_.clock;
    row.next = now_;
    row.reward = static_cast<double>(static_cast<int>(random_() % 17) - 8) / 4;
    const uint64_t chance = random_() % 12;
    row.terminated = chance == 0;
    row.truncated = chance == 1 || chance == 0;
    if (chance == 2) {  // an end that nobody told the buffer of
      reset();
    } else if (row.terminated || row.truncated) {
      reset();
    }
    return row;
  }

 private:
  void append_frame() {
    // Few different frames, so that repeats and coincidences happen.
    const uint8_t shade = static_cast<uint8_t>(random_() % 3);
    for (uint32_t i = 0; i < kFrameBytes; ++i) now_.frames.push_back(static_cast<uint8_t>(shade * 31 + i));
  }
  void reset() {
    now_.frames.clear();
    append_frame();
    for (uint32_t frame = 1; frame < stack_; ++frame) {
      now_.frames.insert(now_.frames.end(), now_.frames.begin(), now_.frames.begin() + kFrameBytes);
    }
    now_.clock += 1000;
  }
  std::mt19937_64 random_;
  uint32_t stack_;
  Observation now_;
};

struct Kind {
  uint32_t stack;
  bool share;
  bool prioritized;
};

RecordLayout layout(const Kind& kind) {
  const uint32_t bytes = kind.stack * kFrameBytes;
  RowRoles roles;
  roles.observations = 2;
  roles.reward = 3;
  roles.share_successors = kind.share;
  return RecordLayout({{"frames", 1, bytes, kind.share ? kind.stack : 1},
                       {"clock", 4, 4},
                       {"action", 2, 2},
                       {"reward", 8, 8},
                       {"next_frames", 1, bytes, kind.share ? kind.stack : 1},
                       {"next_clock", 4, 4}},
                      roles);
}

struct Batch {
  Batch(size_t n, uint32_t stack)
      : bytes(stack * kFrameBytes),
        frames(n * bytes),
        next_frames(n * bytes),
        clock(n),
        next_clock(n),
        action(n),
        reward(n),
        discounts(n),
        weights(n),
        handles(n),
        steps(n) {}
  std::vector<uint8_t*> fields() {
    return {frames.data(),
            reinterpret_cast<uint8_t*>(clock.data()),
            reinterpret_cast<uint8_t*>(action.data()),
            reinterpret_cast<uint8_t*>(reward.data()),
            next_frames.data(),
            reinterpret_cast<uint8_t*>(next_clock.data())};
  }
  Observation own(size_t i) const { return {slice(frames, i), clock[i]}; }
  Observation next(size_t i) const { return {slice(next_frames, i), next_clock[i]}; }
  std::vector<uint8_t> slice(const std::vector<uint8_t>& from, size_t i) const {
    return {from.begin() + static_cast<ptrdiff_t>(i * bytes), from.begin() + static_cast<ptrdiff_t>((i + 1) * bytes)};
  }
  size_t bytes;
  std::vector<uint8_t> frames, next_frames;
  std::vector<uint32_t> clock, next_clock;
  std::vector<uint16_t> action;
  std::vector<double> reward;
  std::vector<float> discounts, weights;
  std::vector<int64_t> handles, steps;
};

void check_row(const std::map<int64_t, Row>& rows, const Batch& batch, size_t i, uint32_t n_step, double discount) {
  const auto found = rows.find(batch.handles[i]);
  REQUIRE(found != rows.end());
  CHECK(batch.own(i) == found->second.own);
  CHECK(batch.action[i] == static_cast<uint16_t>(found->second.own.clock));
  const Row* last = &found->second;
  double reward = last->reward, factor = discount;
  int64_t steps = 1;
  while (steps < n_step && !last->terminated && !last->truncated && last->following >= 0) {
    last = &rows.at(last->following);
    reward += factor * last->reward;
    factor *= discount;
    ++steps;
  }
  CHECK(batch.steps[i] == steps);
  CHECK(batch.reward[i] == doctest::Approx(reward));
  CHECK(batch.next(i) == last->next);
  CHECK(batch.discounts[i] == doctest::Approx(last->terminated ? 0.0 : factor));
}

template <class Access>
void run(const Kind& kind, uint64_t capacity, uint64_t seed) {
  CAPTURE(kind.stack);
  CAPTURE(kind.share);
  CAPTURE(capacity);
  CAPTURE(seed);
  ReplayOptions options;
  options.capacity = capacity;
  options.prioritized = kind.prioritized;
  ReplayT<Access> replay(options, layout(kind));
  std::mt19937_64 random(seed);
  std::vector<Environment> environments;
  for (uint64_t e = 0; e < 3; ++e) environments.emplace_back(kind.stack, seed * 7 + e);
  std::map<int64_t, Row> rows;
  std::vector<int64_t> newest(3, -1);
  for (int call = 0; call < 120; ++call) {
    const size_t n = 1 + random() % std::min<uint64_t>(5, capacity);
    std::vector<Row> made(n);
    std::vector<int64_t> streams(n), handles(n);
    Batch in(n, kind.stack);
    std::vector<uint8_t> terminated(n), truncated(n);
    for (size_t i = 0; i < n; ++i) {
      streams[i] = static_cast<int64_t>(random() % 3);
      made[i] = environments[static_cast<size_t>(streams[i])].step();
      std::copy(made[i].own.frames.begin(), made[i].own.frames.end(),
                in.frames.begin() + static_cast<ptrdiff_t>(i * in.bytes));
      std::copy(made[i].next.frames.begin(), made[i].next.frames.end(),
                in.next_frames.begin() + static_cast<ptrdiff_t>(i * in.bytes));
      in.clock[i] = made[i].own.clock;
      in.next_clock[i] = made[i].next.clock;
      in.action[i] = static_cast<uint16_t>(made[i].own.clock);
      in.reward[i] = made[i].reward;
      terminated[i] = made[i].terminated;
      truncated[i] = made[i].truncated;
    }
    const auto fields = in.fields();
    const std::vector<const uint8_t*> pointers(fields.begin(), fields.end());
    replay.insert({n, pointers.data(), terminated.data(), truncated.data(), streams.data()}, handles.data());
    for (size_t i = 0; i < n; ++i) {
      int64_t& before = newest[static_cast<size_t>(streams[i])];
      // Shared successors know where an episode broke off; kept ones take the writer's word for its stream's order.
      if (before >= 0 && (!kind.share || rows.at(before).next == made[i].own)) {
        rows.at(before).following = handles[i];
      }
      rows[handles[i]] = made[i];
      before = handles[i];
    }
    CHECK(replay.size() <= capacity);
    if (kind.prioritized) CHECK(replay.sums_are_exact());
    SampleRequest request;
    request.n = 24;
    request.n_step = 1 + static_cast<uint32_t>(random() % 6);
    request.discount = random() % 2 == 0 ? 0.9 : 1.0;
    request.stratified = random() % 2 == 0;
    Batch batch(request.n, kind.stack);
    const auto out = batch.fields();
    try {
      replay.sample(request, {out.data(), batch.discounts.data(), batch.weights.data(), batch.handles.data(),
                              batch.steps.data()});
    } catch (const NothingToSample&) {
      CHECK(kind.share);  // tiny rings may hold nothing but observations
      continue;
    }
    for (size_t i = 0; i < request.n; ++i) check_row(rows, batch, i, request.n_step, request.discount);
    if (kind.prioritized && call % 3 == 0) {
      std::vector<float> td_errors(request.n);
      for (float& td_error : td_errors) td_error = static_cast<float>(random() % 100) * 0.1f;
      replay.update(batch.handles.data(), td_errors.data(), request.n);
    }
  }
  CHECK(replay.audit().empty());
  if (kind.prioritized) CHECK(replay.stats().retries == 0);  // every row of positive weight can be returned
}

}  // namespace

TEST_CASE_TEMPLATE("rows of n steps agree with the model", Access, WordAccess, DefaultAccess) {
  for (const Kind kind : {Kind{1, false, true}, Kind{1, false, false}, Kind{1, true, true}, Kind{1, true, false},
                          Kind{4, true, true}, Kind{4, true, false}, Kind{3, false, true}, Kind{2, true, true}}) {
    for (const uint64_t capacity : {2ull, 7ull, 31ull, 500ull}) {
      for (uint64_t seed = 1; seed <= 4; ++seed) run<Access>(kind, capacity, seed);
    }
  }
}
