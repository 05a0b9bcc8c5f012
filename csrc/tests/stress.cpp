// Inserting, updating and sampling threads on one small buffer. Every row drawn must be whole and under its own handle,
// every update must land on its own row or be refused, and at rest the sums must equal the leaves.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "core/replay.h"
#include "rows.h"

using namespace angle;
using namespace angle::testing;

namespace {

std::atomic<uint64_t> failures{0};
std::atomic<bool> stop{false};

void require(bool holds, const char* what) {
  if (!holds && failures.fetch_add(1) < 10) std::fprintf(stderr, "broken: %s\n", what);
}

template <class Access>
void inserter(ReplayT<Access>& replay, uint64_t thread) {
  uint32_t value = static_cast<uint32_t>(thread) * 100000003u;
  std::vector<int64_t> handles;
  for (uint64_t round = 0; !stop.load(std::memory_order_relaxed); ++round) {
    std::vector<uint32_t> values(1 + round % 9);
    for (auto& v : values) v = value++;
    insert_values(replay, values, handles);
    for (size_t i = 1; i < handles.size(); ++i) require(handles[i] > handles[i - 1], "handles ascend");
  }
}

template <class Access>
void learner(ReplayT<Access>& replay, uint64_t thread) {
  uint64_t state = thread * 0x9E3779B97F4A7C15ull + 1;
  std::vector<float> td_errors(32);
  while (!stop.load(std::memory_order_relaxed)) {
    Drawn drawn(32);
    try {
      draw(replay, drawn);
    } catch (const NothingToSample&) {
      continue;  // every slot was being written at once
    }
    for (size_t i = 0; i < 32; ++i) {
      require(drawn.rows.whole(i), "a row is whole");
      require(drawn.importance_weights[i] > 0.0f && drawn.importance_weights[i] <= 1.0f,
              "an importance weight is in (0, 1]");
      require(drawn.discounts[i] == (drawn.rows.rewards[i] % 5 == 0 ? 0.0f : 0.99f), "the end flag belongs to the row");
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      td_errors[i] = static_cast<float>(state >> 40) * 1e-4f;
    }
    require(replay.update(drawn.handles.data(), td_errors.data(), 32) <= 32, "no more are refused than given");
  }
}

template <class Access>
void run(const char* name, bool prioritized, uint64_t capacity, double seconds) {
  ReplayOptions options;
  options.capacity = capacity;
  options.prioritized = prioritized;
  ReplayT<Access> replay(options, row_layout());
  stop = false;
  std::vector<std::thread> threads;
  for (uint64_t i = 0; i < 2; ++i) threads.emplace_back([&, i] { inserter(replay, i); });
  for (uint64_t i = 0; i < 2; ++i) threads.emplace_back([&, i] { learner(replay, i); });
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
  stop = true;
  for (auto& thread : threads) thread.join();
  if (prioritized) require(replay.sums_are_exact(), "at rest the sums equal the leaves");
  const ReplayStats s = replay.stats();
  require(replay.next_ticket() == s.inserts + s.busy_slots, "every ticket was used or given up");
  require(s.inserts > 0 && s.samples > 0 && s.updates > 0, "all threads worked");
  std::printf("%s capacity %llu %s: %llu rows in, %llu drawn, %llu updated, %llu refused, %llu busy, %llu redrawn\n",
              name, static_cast<unsigned long long>(capacity), prioritized ? "prioritised" : "uniform",
              static_cast<unsigned long long>(s.inserts), static_cast<unsigned long long>(s.samples),
              static_cast<unsigned long long>(s.updates), static_cast<unsigned long long>(s.refused_updates),
              static_cast<unsigned long long>(s.busy_slots), static_cast<unsigned long long>(s.retries));
}

}  // namespace

int main(int argc, char** argv) {
  double seconds = 3.0;
  if (argc == 3 && std::strcmp(argv[1], "--seconds") == 0) seconds = std::atof(argv[2]);
  for (const uint64_t capacity : {16ull, 100ull, 5000ull}) {
    run<WordAccess>("words", true, capacity, seconds / 4);
#if !defined(ANGLE_WORD_ACCESS)
    run<VectorAccess>("vectors", true, capacity, seconds / 4);
#endif
  }
  run<DefaultAccess>("default", false, 100, seconds / 4);
  if (failures != 0) {
    std::fprintf(stderr, "%llu checks failed\n", static_cast<unsigned long long>(failures.load()));
    return 1;
  }
  return 0;
}
