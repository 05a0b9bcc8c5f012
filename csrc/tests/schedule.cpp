// Runs the replay's scenarios under the scheduler of scheduled.h. Exit status 1 if one failed.
//   schedule                          all of them
//   schedule NAME...                  these
//   schedule --percent 10 [NAME...]   with a tenth of the seeds, or ten times as many with 1000
//   schedule --seed 4711 NAME         that one run
//   schedule --list                   the names
#include "schedule.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

using namespace angle::testing;

int main(int argc, char** argv) {
  uint64_t percent = 100, seed = 0;
  bool list = false;
  std::vector<std::string> names;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--percent") == 0 && i + 1 < argc) {
      percent = std::strtoull(argv[++i], nullptr, 10);
    } else if (std::strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
      seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (std::strcmp(argv[i], "--list") == 0) {
      list = true;
    } else {
      names.push_back(argv[i]);
    }
  }
  std::vector<Scenario> scenarios = row_scenarios();
  for (const auto& more : {stream_scenarios(), death_scenarios()}) {
    scenarios.insert(scenarios.end(), more.begin(), more.end());
  }
  size_t found = 0, failed = 0;
  for (const Scenario& scenario : scenarios) {
    bool wanted = names.empty();
    for (const auto& name : names) wanted = wanted || name == scenario.name;
    if (!wanted) continue;
    ++found;
    if (list) {
      std::printf("%s\n", scenario.name);
      continue;
    }
    Exploration exploration;
    exploration.scenario = scenario.name;
    exploration.seeds = seed != 0 ? 1 : scenario.seeds * percent / 100 + 1;
    exploration.first_seed = seed != 0 ? seed : 1;
    exploration.max_steps = 30000;
    const Explored explored = scenario.run(exploration);
    std::printf("%-34s %7llu runs %9llu steps  %s\n", scenario.name, static_cast<unsigned long long>(explored.runs),
                static_cast<unsigned long long>(explored.steps), explored.failed ? "FAILED" : "ok");
    std::fflush(stdout);
    failed += explored.failed;
  }
  if (found < (names.empty() ? 1 : names.size())) {
    std::fprintf(stderr, "no such scenario; see --list\n");
    return 2;
  }
  return failed == 0 ? 0 : 1;
}
