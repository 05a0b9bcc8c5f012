// Scenarios on streams: windows of n steps, shared successors, stacked frames.
#include "schedule.h"
#include "scheduled_replay.h"

namespace angle::testing {
namespace {

// Windows race with the rows that are added at their end and overwritten at their beginning.
Explored windows(const Exploration& exploration) {
  WorldOptions options;
  options.capacity = 5;
  options.episode = 4;
  options.may_be_empty = true;
  World world(options);
  world.insert(0, 5);
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] {
      world.insert(5);
      world.insert(6, 2);
    });
    run.thread([&] {
      world.sample(2, 3);
      world.sample(1, 2);
    });
    run.at_rest([&] { world.check(); });
  });
}

Explored windows_of_two_streams(const Exploration& exploration) {
  WorldOptions options;
  options.capacity = 4;
  options.may_be_empty = true;
  World world(options);
  world.insert(0, 2);
  world.insert(1000, 2);
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] {
      world.insert(2);
      world.insert(3);
    });
    run.thread([&] { world.insert(1002, 2); });
    run.thread([&] {
      world.sample(1, 2);
      world.sample(1, 3);
    });
    run.at_rest([&] { world.check(); });
  });
}

WorldOptions sharing(uint64_t capacity) {
  WorldOptions options;
  options.capacity = capacity;
  options.share = true;
  options.episode = 3;
  options.may_be_empty = true;
  return options;
}

Explored shared_successors(const Exploration& exploration) {
  World world(sharing(5));
  world.insert(0, 2);
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] {
      world.insert(2);
      world.insert(3, 2);
    });
    run.thread([&] {
      world.sample(2);
      world.sample(1, 2);
    });
    run.at_rest([&] { world.check(); });
  });
}

// Two streams overwrite each other's open records.
Explored shared_streams(const Exploration& exploration) {
  World world(sharing(4));
  world.insert(0);
  world.insert(1000);
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] {
      world.insert(1);
      world.insert(2);
    });
    run.thread([&] {
      world.insert(1001);
      world.insert(1002, 2);
    });
    run.thread([&] { world.sample(1, 2); });
    run.at_rest([&] { world.check(); });
  });
}

Explored shared_with_updates(const Exploration& exploration) {
  World world(sharing(5));
  const std::vector<int64_t> rows = world.insert(0, 3);
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] {
      world.insert(3);
      world.insert(4);
    });
    run.thread([&] {
      world.update({rows[0], rows[1]}, {3.0f, 4.0f});
      world.remove(rows[2]);
    });
    run.thread([&] {
      const std::vector<int64_t> drawn = world.sample(1, 2);
      if (!drawn.empty()) world.update(drawn, {9.0f});
    });
    run.at_rest([&] { world.check(); });
  });
}

// The ring's edge cuts through an episode: the row after it has lost its older frame and must be taken out.
Explored stacks(const Exploration& exploration) {
  WorldOptions options = sharing(6);
  options.frames = 2;
  options.episode = 8;
  options.may_lose_rows = true;
  World world(options);
  world.insert(0, 2);
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] {
      world.insert(2);
      world.insert(3);
    });
    run.thread([&] { world.insert(1000, 2); });
    run.thread([&] { world.sample(1, 2); });
    run.at_rest([&] { world.check(); });
  });
}

// A frame is overwritten while the row that needs it is being completed.
Explored stacks_cut(const Exploration& exploration) {
  WorldOptions options = sharing(5);
  options.frames = 3;
  options.episode = 0;
  options.may_lose_rows = true;
  World world(options);
  world.insert(0, 2);
  world.keep();
  return explore(exploration, [&](Run& run) {
    world.begin(run);
    run.thread([&] { world.insert(2); });
    run.thread([&] {
      world.insert(1000);
      world.insert(2000, 2);
    });
    run.thread([&] { world.sample(1); });
    run.at_rest([&] { world.check(); });
  });
}

}  // namespace

std::vector<Scenario> stream_scenarios() {
  return {
      {"windows", 3000, windows},
      {"windows_of_two_streams", 3000, windows_of_two_streams},
      {"shared_successors", 3000, shared_successors},
      {"shared_streams", 3000, shared_streams},
      {"shared_with_updates", 3000, shared_with_updates},
      {"stacks", 3000, stacks},
      {"stacks_cut", 3000, stacks_cut},
  };
}

}  // namespace angle::testing
