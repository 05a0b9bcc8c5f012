// Scenarios on rows with successors of their own: inserting, drawing, updating, removing, weighing anew.
#include <cmath>
#include <cstdio>

#include "schedule.h"
#include "scheduled_replay.h"

namespace angle::testing {
namespace {

// Writers of one row each wrap around the ring and meet busy slots. As long as there are as many slots as writers one
// is free.
Explored insert_on_itself(const Exploration& exploration) {
  WorldOptions options;
  options.capacity = 3;
  World world(options);
  world.insert(0);
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    for (uint32_t writer = 1; writer <= 3; ++writer) {
      run.thread([&world, writer] {
        world.insert(1000 * writer);
        world.insert(1000 * writer + 1);
        world.insert(1000 * writer + 2);
      });
    }
    run.at_rest([&] { world.check(); });
  });
}

// The same with rows in blocks, whose sums are added together.
Explored insert_blocks(const Exploration& exploration) {
  WorldOptions options;
  options.capacity = 3;
  World world(options);
  world.insert(0, 2, {5.0f, 7.0f});
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] {
      world.insert(1000, 3);
      world.insert(1003, 1, {2.0f});
    });
    run.thread([&] { world.insert(2000, 3, {1.0f, 0.0f, 3.0f}); });
    run.at_rest([&] { world.check(); });
  });
}

Explored insert_sample(const Exploration& exploration) {
  WorldOptions options;
  options.capacity = 3;
  options.may_be_empty = true;  // two slots may be in the writers' hands, and the third may move on
  World world(options);
  world.insert(0, 3, {1.0f, 2.0f, 3.0f});
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] {
      world.insert(1000);
      world.insert(1001);
      world.insert(1002);
    });
    run.thread([&] { world.insert(2000, 2); });
    run.thread([&] {
      world.sample(2);
      world.sample(1);
    });
    run.at_rest([&] { world.check(); });
  });
}

// One writer on a ring of one: every copy races with the next row.
Explored insert_sample_one_slot(const Exploration& exploration) {
  WorldOptions options;
  options.capacity = 1;
  options.may_be_empty = true;
  World world(options);
  world.insert(0);
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] {
      for (uint32_t v = 1000; v < 1003; ++v) world.insert(v);
    });
    run.thread([&] {
      world.sample(1);
      world.sample(1);
    });
    run.at_rest([&] { world.check(); });
  });
}

Explored read_rows_while_inserting(const Exploration& exploration) {
  WorldOptions options;
  options.capacity = 2;
  options.episode = 2;
  World world(options);
  world.insert(0, 2);
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] {
      for (uint32_t v = 1000; v < 1004; ++v) world.insert(v);
    });
    run.thread([&] { world.read_rows(); });
    run.at_rest([&] { world.check(); });
  });
}

Explored update_same_row(const Exploration& exploration) {
  WorldOptions options;
  World world(options);
  const std::vector<int64_t> rows = world.insert(0, 4);
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    for (int thread = 0; thread < 3; ++thread) {
      run.thread([&, thread] {
        const float td_error = 1.0f + static_cast<float>(thread);
        world.update({rows[1]}, {td_error});
        world.update({rows[1], rows[2]}, {td_error + 10.0f, td_error});
      });
    }
    run.at_rest([&] { world.check(); });
  });
}

// The row to be updated is overwritten meanwhile: the priority must not land on its successor in the slot.
Explored update_overwritten_row(const Exploration& exploration) {
  WorldOptions options;
  options.capacity = 2;
  World world(options);
  const std::vector<int64_t> rows = world.insert(0, 2);
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] { world.update(rows, {50.0f, 60.0f}); });
    run.thread([&] { world.update({rows[0]}, {70.0f}); });
    run.thread([&] {
      world.insert(1000, 1, {1.0f});
      world.insert(1001, 1, {2.0f});
      world.insert(1002, 1, {3.0f});
    });
    run.at_rest([&] { world.check(); });
  });
}

// Updates of a slot's rows, old and new, meet: each priority stays with its own row.
Explored update_late_with(const Exploration& exploration, double exponent) {
  WorldOptions options;
  options.capacity = 1;
  options.exponent = exponent;
  World world(options);
  const std::vector<int64_t> rows = world.insert(0);
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] { world.update(rows, {50.0f}); });
    run.thread([&] {
      const std::vector<int64_t> next = world.insert(1000);
      world.update(next, {3.0f});
      world.update(next, {4.0f});
    });
    run.thread([&] { world.update(rows, {60.0f}); });
    run.at_rest([&] { world.check(); });
  });
}

Explored update_late(const Exploration& exploration) { return update_late_with(exploration, 1.0); }

// The same where weights tell nothing about priorities.
Explored update_late_flat(const Exploration& exploration) { return update_late_with(exploration, 0.0); }

Explored sample_update_insert(const Exploration& exploration) {
  WorldOptions options;
  options.capacity = 3;
  options.may_be_empty = true;
  World world(options);
  world.insert(0, 3);
  world.keep();
  const auto learn = [&world](float td_error) {
    const std::vector<int64_t> handles = world.sample(2);
    if (!handles.empty()) world.update(handles, {td_error, td_error + 0.5f});
  };
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] { learn(1.0f); });
    run.thread([&] { learn(20.0f); });
    run.thread([&] {
      world.insert(1000);
      world.insert(1001, 2);
    });
    run.at_rest([&] { world.check(); });
  });
}

// Draws skip rows of weight 0, whatever becomes them while they are drawn.
Explored zero_weights(const Exploration& exploration) {
  WorldOptions options;
  World world(options);
  const std::vector<int64_t> rows = world.insert(0, 4, {0.0f, 1.0f, 0.0f, 1.0f});
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] {
      for (int i = 0; i < 3; ++i) {
        for (const int64_t handle : world.sample(4)) require(handle != rows[0], "a row without weight was drawn");
      }
    });
    run.thread([&] {
      world.update({rows[1]}, {0.0f});
      world.update({rows[2]}, {1.0f});
      world.update({rows[1], rows[2]}, {4.0f, 0.0f});
    });
    run.at_rest([&] { world.check(); });
  });
}

// The sums may tell of nothing under way, and yet the one row of positive weight is found, and only that.
Explored weight_on_one_row(const Exploration& exploration) {
  WorldOptions options;
  World world(options);
  const std::vector<int64_t> rows = world.insert(0, 4, {0.0f, 1.0f, 0.0f, 0.0f});
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] { world.update({rows[1]}, {5.0f}); });
    run.thread([&] { world.update({rows[1]}, {0.5f}); });
    run.thread([&] {
      for (const int64_t handle : world.sample(2)) require(handle == rows[1], "a row without weight was drawn");
    });
    run.at_rest([&] { world.check(); });
  });
}

Explored remove_update_sample(const Exploration& exploration) {
  WorldOptions options;
  World world(options);
  const std::vector<int64_t> rows = world.insert(0, 4);
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] { world.remove(rows[1]); });
    run.thread([&] {
      world.update({rows[1]}, {9.0f});
      world.remove(rows[2]);
    });
    run.thread([&] {
      world.update({rows[1], rows[2]}, {5.0f, 6.0f});
      world.sample(2);
    });
    run.at_rest([&] { world.check(); });
  });
}

Explored remove_insert_uniform(const Exploration& exploration) {
  WorldOptions options;
  options.prioritized = false;
  options.capacity = 3;
  options.may_be_empty = true;
  World world(options);
  const std::vector<int64_t> rows = world.insert(0, 3);
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] {
      world.remove(rows[2]);
      world.remove(rows[0]);
    });
    run.thread([&] {
      world.insert(1000);
      world.insert(1001);
    });
    run.thread([&] {
      world.sample(2);
      world.sample(1, 1, false);
    });
    run.at_rest([&] { world.check(); });
  });
}

// A removed row is not drawn by a call that begins afterwards.
Explored removed_rows_stay_away(const Exploration& exploration) {
  WorldOptions options;
  options.prioritized = false;
  World world(options);
  const std::vector<int64_t> rows = world.insert(0, 4);
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] {
      world.remove(rows[1]);
      for (const int64_t handle : world.sample(4)) require(handle != rows[1], "a removed row was drawn");
    });
    run.thread([&] { world.sample(2, 1, false); });
    run.at_rest([&] { world.check(); });
  });
}

Explored exponent_update_insert(const Exploration& exploration) {
  WorldOptions options;
  options.capacity = 3;
  World world(options);
  const std::vector<int64_t> rows = world.insert(0, 3, {2.0f, 3.0f, 5.0f});
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] { world.set_exponent(0.5); });
    run.thread([&] { world.update({rows[1], rows[2]}, {7.0f, 0.5f}); });
    run.thread([&] { world.insert(1000, 2, {11.0f, 0.25f}); });
    run.at_rest([&] { world.check(); });
  });
}

Explored exponent_twice(const Exploration& exploration) {
  WorldOptions options;
  options.capacity = 2;
  World world(options);
  const std::vector<int64_t> rows = world.insert(0, 2, {2.0f, 3.0f});
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] { world.set_exponent(0.5); });
    run.thread([&] { world.set_exponent(2.0); });
    run.thread([&] {
      world.update({rows[1]}, {7.0f});
      world.remove(rows[0]);
    });
    run.at_rest([&] { world.check(); });
  });
}

// The largest priority goes down while others ask for it.
Explored live_maximum(const Exploration& exploration) {
  WorldOptions options;
  options.capacity = 3;
  World world(options);
  const std::vector<int64_t> rows = world.insert(0, 3, {1.0f, 1.1f, 1.2f});
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] {
      world.update({rows[2]}, {1.0f});
      world.update({rows[2]}, {1.3f});
    });
    run.thread([&] { world.insert(1000); });
    run.thread([&] { world.update({rows[1]}, {1.4f}); });
    run.at_rest([&] { world.check(); });
  });
}

// It goes down and up again to where it was while others ask for it.
Explored live_maximum_again(const Exploration& exploration) {
  WorldOptions options;
  options.capacity = 3;
  World world(options);
  const std::vector<int64_t> rows = world.insert(0, 3, {1.0f, 1.1f, 1.2f});
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] { world.update({rows[2]}, {1.0f}); });
    run.thread([&] { world.update({rows[1]}, {1.2f}); });
    run.thread([&] { world.insert(1000); });
    run.at_rest([&] { world.check(); });
  });
}

Explored without_replacement(const Exploration& exploration) {
  WorldOptions options;
  options.capacity = 5;
  World world(options);
  const std::vector<int64_t> rows = world.insert(0, 5, {1.0f, 2.0f, 3.0f, 4.0f, 5.0f});
  options.may_be_empty = false;
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] { world.sample(3, 1, false); });
    run.thread([&] { world.insert(1000); });
    run.thread([&] {
      world.update({rows[3]}, {9.0f});
      world.sample(2, 1, false, true);
    });
    run.at_rest([&] { world.check(); });
  });
}

// More than one level of sums.
Explored two_levels(const Exploration& exploration) {
  WorldOptions options;
  options.capacity = 132000;
  World world(options);
  const std::vector<int64_t> rows = world.insert(0, 10);
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] { world.update({rows[0], rows[9]}, {3.0f, 0.5f}); });
    run.thread([&] { world.insert(1000, 2); });
    run.thread([&] { world.sample(2); });
    run.at_rest([&] { world.check(); });
  });
}

// One thread, no race: what it draws follows from the seed, batches differ, of equal handles the last wins, and a long
// series draws each row in proportion to its weight.
Explored alone(const Exploration& exploration) {
  WorldOptions options;
  options.capacity = 16;
  World world(options), twin(options);
  std::vector<float> priorities;
  for (int i = 0; i < 16; ++i) priorities.push_back(static_cast<float>(i % 5));
  std::vector<int64_t> rows;
  for (World* each : {&world, &twin}) {
    rows = each->insert(0, 16, priorities);
    each->insert(16, 3, {3.0f, 1.0f, 4.0f});
    each->keep();
  }
  std::map<uint32_t, uint64_t>& counts = world.counts();
  std::vector<int64_t> of_last_seed;
  uint64_t runs = 0, new_batches = 0;
  Explored explored = explore(exploration, [&](Run& run) {
    twin.begin(run);
    world.begin(run);
    run.thread([&] {
      std::vector<std::vector<int64_t>> batches, again;
      for (int i = 0; i < 8; ++i) batches.push_back(world.sample(8));
      for (int i = 0; i < 8; ++i) again.push_back(twin.sample(8));
      require(batches == again, "the same seed draws the same rows");
      ++runs;
      new_batches += batches[0] != of_last_seed;
      of_last_seed = batches[0];
      size_t different = 0;
      for (size_t i = 1; i < 8; ++i) different += batches[i] != batches[i - 1];
      require(different > 0, "each call draws anew");
      world.update({rows[5], rows[5], rows[0]}, {7.0f, 2.0f, 1.0f});  // row 0 is gone
      RowFacts facts{};
      uint8_t* const none[] = {nullptr, nullptr, nullptr};
      world.replay().read_rows(static_cast<uint64_t>(rows[5]), 1, none, &facts);
      require(facts.priority == 2.0f, "of equal handles the last wins");
    });
    run.at_rest([&] { world.check(); });
  });
  if (explored.failed) return explored;
  const auto refuse = [&explored](const std::string& message) {
    explored.failed = true;
    explored.message = message;
    std::fprintf(stderr, "alone: %s\n", message.c_str());
  };
  if (2 * new_batches < runs) refuse("other seeds draw the same rows");
  // Slots 0 to 2 hold rows 16 to 18.
  double total = 0.0, draws = 0.0, chi_square = 0.0;
  const auto weight_of = [&](uint32_t v) {
    return v >= 16 ? (v == 16 ? 3.0 : v == 17 ? 1.0 : 4.0) : static_cast<double>(v % 5);
  };
  for (uint32_t v = 3; v < 19; ++v) total += weight_of(v);
  for (const auto& [v, count] : counts) draws += static_cast<double>(count);
  for (uint32_t v = 3; v < 19; ++v) {
    const double expected = draws * weight_of(v) / total, difference = static_cast<double>(counts[v]) - expected;
    if (expected > 0.0) chi_square += difference * difference / expected;
    if (expected == 0.0 && counts[v] != 0) chi_square = INFINITY;
  }
  // Stratified draws vary less than independent ones: 12 degrees of freedom, 99.99 %.
  if (chi_square > 40.0) {
    refuse("draws are not in proportion to the weights, chi-square " + std::to_string(chi_square));
  }
  return explored;
}

}  // namespace

std::vector<Scenario> row_scenarios() {
  return {
      {"insert_on_itself", 4000, insert_on_itself},
      {"insert_blocks", 4000, insert_blocks},
      {"insert_sample", 4000, insert_sample},
      {"insert_sample_one_slot", 4000, insert_sample_one_slot},
      {"read_rows_while_inserting", 2000, read_rows_while_inserting},
      {"update_same_row", 4000, update_same_row},
      {"update_overwritten_row", 6000, update_overwritten_row},
      {"update_late", 3000, update_late},
      {"update_late_flat", 3000, update_late_flat},
      {"sample_update_insert", 4000, sample_update_insert},
      {"zero_weights", 2000, zero_weights},
      {"weight_on_one_row", 3000, weight_on_one_row},
      {"remove_update_sample", 4000, remove_update_sample},
      {"remove_insert_uniform", 4000, remove_insert_uniform},
      {"removed_rows_stay_away", 1000, removed_rows_stay_away},
      {"exponent_update_insert", 4000, exponent_update_insert},
      {"exponent_twice", 4000, exponent_twice},
      {"live_maximum", 3000, live_maximum},
      {"live_maximum_again", 3000, live_maximum_again},
      {"without_replacement", 2000, without_replacement},
      {"two_levels", 100, two_levels},
      {"alone", 100, alone},
  };
}

}  // namespace angle::testing
