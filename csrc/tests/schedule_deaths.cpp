// Scenarios in which threads are killed, as processes on one segment may be: the others go on, what was not being
// written stays, audit finds the damage and repair mends it.
#include <cmath>
#include <cstdio>

#include "schedule.h"
#include "scheduled_replay.h"

namespace angle::testing {
namespace {

Explored killed_writer(const Exploration& exploration) {
  WorldOptions options;
  options.capacity = 4;  // the first writer of the last slot overwrites nothing: if it dies, only the slot shows it
  options.may_be_empty = true;
  World world(options);
  world.insert(0, 3, {1.0f, 2.0f, 3.0f});
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.mortal_thread([&] {
      world.insert(1000, 2);
      world.insert(1002);
    });
    run.thread([&] {
      world.insert(2000);
      world.insert(2001);
    });
    run.thread([&] { world.sample(1); });
    run.at_rest([&] { world.check(); });
  });
}

Explored killed_learner(const Exploration& exploration) {
  WorldOptions options;
  options.capacity = 3;
  options.may_be_empty = true;
  World world(options);
  const std::vector<int64_t> rows = world.insert(0, 3, {1.0f, 2.0f, 3.0f});
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.mortal_thread([&] {
      world.update(rows, {9.0f, 8.0f, 0.0f});
      world.remove(rows[1]);
      world.sample(2);
    });
    run.thread([&] {
      world.update({rows[1], rows[2]}, {5.0f, 6.0f});
      world.insert(1000);
    });
    run.at_rest([&] { world.check(); });
  });
}

Explored killed_exponent(const Exploration& exploration) {
  WorldOptions options;
  options.capacity = 3;
  World world(options);
  const std::vector<int64_t> rows = world.insert(0, 3, {1.0f, 2.0f, 3.0f});
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.mortal_thread([&] { world.set_exponent(0.5); });
    run.thread([&] { world.update({rows[1]}, {5.0f}); });
    run.at_rest([&] { world.check(); });
  });
}

Explored killed_sharing_writer(const Exploration& exploration) {
  WorldOptions options;
  options.capacity = 5;
  options.share = true;
  options.episode = 3;
  options.may_be_empty = true;
  World world(options);
  world.insert(0, 2);
  world.insert(1000);
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.mortal_thread([&] { world.insert(2, 3); });
    run.thread([&] {
      world.insert(1001);
      world.sample(1, 2);
    });
    run.at_rest([&] { world.check(); });
  });
}

// Everybody may die.
Explored killed_all(const Exploration& exploration) {
  WorldOptions options;
  options.capacity = 2;
  options.may_be_empty = true;
  World world(options);
  const std::vector<int64_t> rows = world.insert(0, 2);
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.mortal_thread([&] { world.insert(1000, 2); });
    run.mortal_thread([&] { world.insert(2000); });
    run.mortal_thread([&] { world.update(rows, {2.0f, 3.0f}); });
    run.at_rest([&] { world.check(); });
  });
}

// A call that is cut leaves its weight in flight for ever; no draw may be off by more than that. Row 8 weighs 7 of 8,
// and the update that is cut moves row 1 between 0 and 1.
Explored weight_in_flight(const Exploration& exploration) {
  WorldOptions options;
  options.capacity = 16;
  World world(options);
  std::vector<float> priorities(16, 0.0f);
  priorities[0] = 1.0f;
  priorities[8] = 7.0f;
  const std::vector<int64_t> rows = world.insert(0, 16, priorities);
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.mortal_thread([&] {
      for (int i = 0; i < 4; ++i) world.update({rows[1]}, {i % 2 == 0 ? 1.0f : 0.0f});
    });
    run.at_rest([&] {
      constexpr int kBatches = 100;
      int found = 0;
      for (int batch = 0; batch < kBatches; ++batch) {
        for (const int64_t handle : world.sample(4)) found += handle == rows[8];
      }
      const double share = found / (4.0 * kBatches), noise = 5.0 * std::sqrt(0.25 / (4.0 * kBatches));
      require(share > 7.0 / 9.0 - 1.0 / 9.0 - noise, "a draw is off by more than the weight in flight");
      require(share < 7.0 / 8.0 + 1.0 / 8.0 + noise, "a draw is off by more than the weight in flight");
      world.check();
    });
  });
}

}  // namespace

std::vector<Scenario> death_scenarios() {
  return {
      {"killed_writer", 4000, killed_writer},     {"killed_learner", 4000, killed_learner},
      {"killed_exponent", 2000, killed_exponent}, {"killed_sharing_writer", 4000, killed_sharing_writer},
      {"killed_all", 4000, killed_all},           {"weight_in_flight", 300, weight_in_flight},
  };
}

}  // namespace angle::testing
