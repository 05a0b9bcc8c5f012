// The scenarios of the program `schedule`.
#pragma once
#include <functional>
#include <vector>

#include "scheduled.h"

namespace angle::testing {

struct Scenario {
  const char* name;
  uint64_t seeds;  // of a normal run
  Explored (*run)(const Exploration& exploration);
};

std::vector<Scenario> row_scenarios();     // schedule_rows.cpp
std::vector<Scenario> stream_scenarios();  // schedule_streams.cpp
std::vector<Scenario> death_scenarios();   // schedule_deaths.cpp

}  // namespace angle::testing
