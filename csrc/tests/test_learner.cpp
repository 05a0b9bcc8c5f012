// Whole updates: no allocation, the same numbers on any number of threads, and threads that keep in step.
#include <doctest.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <random>
#include <vector>

#include "learner/learner.h"
#include "learner/team.h"

namespace {
std::atomic<bool> counting{false};
std::atomic<size_t> allocations{0};

void* counted(size_t bytes, size_t alignment) {
  if (counting.load(std::memory_order_relaxed)) allocations.fetch_add(1, std::memory_order_relaxed);
  void* const memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
}  // namespace

// Where gcc inlines one of a pair alone, it takes the other's free for a mistake.
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"
void* operator new(size_t bytes) { return counted(bytes, alignof(std::max_align_t)); }
void* operator new(size_t bytes, std::align_val_t alignment) { return counted(bytes, static_cast<size_t>(alignment)); }
void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  try {
    return counted(bytes, alignof(std::max_align_t));
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }

namespace angle {
namespace {

constexpr size_t kObservation = 5, kAction = 3, kBatch = 70, kRows = 200;

// An agent with parameters of its own.
template <class T>
struct Agent {
  explicit Agent(LearnerOptions the_options) : options(std::move(the_options)), generator(7) {
    ReplayOptions replay_options{.capacity = 256, .seed = 3};
    RowRoles roles;
    roles.observations = 1;
    roles.reward = 2;
    const bool discrete = options.next_value == NextValue::kDouble;
    const uint32_t action_bytes = discrete ? 8 : 4 * kAction;
    replay = std::make_shared<Replay>(replay_options, RecordLayout({{"observations", 4, 4 * kObservation},
                                                                    {"actions", discrete ? 8u : 4u, action_bytes},
                                                                    {"rewards", 4, 4},
                                                                    {"next_observations", 4, 4 * kObservation}},
                                                                   roles));
    fill(discrete);
    learner = make_learner<T>(replay, options);
    tensors.networks.resize(options.networks.size());
    for (size_t i = 0; i < options.networks.size(); ++i) {
      const bool critics = i == 1 && !discrete;
      add_network(tensors.networks[i], options.networks[i], critics ? options.critics : 1);
    }
    tensors.log_coefficient = slot(1);
    tensors.entropy_coefficient = 1.0;
    for (auto& tensor : batch_memory) tensor.resize(kBatch * 64);
    for (size_t i = 0; i < 8; ++i) batch.tensors[i] = batch_memory[i].data();
    if (discrete) batch.kinds[1] = FieldKind::kInt64;
    q.resize(4 * kBatch);
    td_error.resize(kBatch);
    log_prob.resize(kBatch);
  }

  UpdateOutcome run(const std::vector<UpdateCall>& calls) {
    SampleRequest request{kBatch};
    return learner->run(tensors, request, batch, batch, calls.data(), calls.size(), q.data(), td_error.data(),
                        log_prob.data());
  }

  LearnerOptions options;
  std::mt19937_64 generator;
  std::shared_ptr<Replay> replay;
  std::unique_ptr<Learner<T>> learner;
  LearnerTensors<T> tensors;
  std::vector<std::unique_ptr<std::vector<T>>> memory;
  std::vector<std::unique_ptr<float>> counts;
  std::vector<uint8_t> batch_memory[8];
  BatchPlaces batch;
  std::vector<T> q, td_error, log_prob;

 private:
  T* numbers(size_t n, double size) {
    memory.push_back(std::make_unique<std::vector<T>>(n));
    std::normal_distribution<double> normal(0.0, size);
    for (T& number : *memory.back()) number = static_cast<T>(normal(generator));
    return memory.back()->data();
  }
  AdamSlot<T> slot(size_t n) {
    counts.push_back(std::make_unique<float>(0.0f));
    AdamSlot<T> made;
    made.value = numbers(n, 0.3);
    made.first = numbers(n, 0.0);
    made.second = numbers(n, 0.0);
    made.target = numbers(n, 0.3);
    made.steps = counts.back().get();
    return made;
  }
  void add_network(typename LearnerTensors<T>::Network& network, const NetworkShape& shape, size_t members) {
    for (size_t l = 0; l < shape.layers(); ++l) {
      network.slots.push_back(slot(members * shape.outputs(l) * shape.inputs(l)));
      const AdamSlot<T> weight = network.slots.back();
      network.slots.push_back(slot(members * shape.outputs(l)));
      const AdamSlot<T> bias = network.slots.back();
      network.layers.push_back({weight.value, bias.value});
      network.targets.push_back({weight.target, bias.target});
    }
  }
  void fill(bool discrete) {
    std::normal_distribution<float> normal;
    std::vector<float> observations(kRows * kObservation), actions(kRows * kAction), rewards(kRows);
    std::vector<int64_t> choices(kRows);
    std::vector<uint8_t> terminated(kRows);
    for (auto* numbers : {&observations, &actions, &rewards}) {
      for (float& number : *numbers) number = std::tanh(normal(generator));
    }
    for (size_t i = 0; i < kRows; ++i) {
      choices[i] = static_cast<int64_t>(i % kAction);
      terminated[i] = i % 7 == 0;
    }
    const auto* const seen = reinterpret_cast<const uint8_t*>(observations.data());
    const uint8_t* const fields[] = {
        seen,
        discrete ? reinterpret_cast<const uint8_t*>(choices.data()) : reinterpret_cast<const uint8_t*>(actions.data()),
        reinterpret_cast<const uint8_t*>(rewards.data()), seen};
    std::vector<int64_t> handles(kRows);
    replay->insert({kRows, fields, terminated.data()}, handles.data());
  }
};

LearnerOptions soft_options(size_t threads) {
  LearnerOptions options;
  options.batch = kBatch;
  options.observation_dim = kObservation;
  options.action_dim = kAction;
  options.critics = 3;
  options.critic_subset = 2;
  options.networks.resize(2);
  options.networks[0].sizes = {kObservation, 40, 24, 2 * kAction};
  options.networks[1].sizes = {kObservation + kAction, 33, 20, 1};
  options.learns_entropy = true;
  options.target_entropy = -3.0;
  options.scale = {1.0, 2.0, 0.5};
  options.center = {0.0, 1.0, -1.0};
  options.low = {-1.0, -1.0, -1.5};
  options.high = {1.0, 3.0, -0.5};
  options.half_range = options.scale;
  options.threads = threads;
  return options;
}

LearnerOptions dueling_options(size_t threads) {
  LearnerOptions options;
  options.batch = kBatch;
  options.observation_dim = kObservation;
  options.next_value = NextValue::kDouble;
  options.policy_loss = PolicyLoss::kNone;
  options.networks.resize(3);
  options.networks[0].sizes = {kObservation, 20};
  options.networks[0].hidden_end = true;
  options.networks[1].sizes = {20, 18, kAction};
  options.networks[2].sizes = {20, 16, 1};
  options.threads = threads;
  return options;
}

std::vector<UpdateCall> some_calls(size_t n, uint32_t policy_steps) {
  std::vector<UpdateCall> calls;
  for (size_t i = 0; i < n; ++i) calls.push_back({100 + i, policy_steps, false});
  return calls;
}

// The greatest difference between two agents' tensors.
template <class T>
double distance(const Agent<T>& one, const Agent<T>& other) {
  double most = 0.0;
  for (size_t i = 0; i < one.memory.size(); ++i) {
    for (size_t j = 0; j < one.memory[i]->size(); ++j) {
      most = std::max(most, std::abs(static_cast<double>((*one.memory[i])[j] - (*other.memory[i])[j])));
    }
  }
  return most;
}

}  // namespace

TEST_CASE("an update allocates nothing") {
  for (const size_t threads : {1, 2}) {
    Agent<float> soft(soft_options(threads)), dueling(dueling_options(threads));
    const auto calls = some_calls(3, 1), more = some_calls(3, 0);
    soft.run(calls);
    dueling.run(more);
    allocations = 0;
    counting = true;
    const UpdateOutcome outcome = soft.run(calls);
    dueling.run(more);
    counting = false;
    CHECK(outcome.done == 3);
    CHECK(allocations == 0);
  }
}

TEST_CASE("any number of threads gives the same float64 numbers but for the order of sums") {
  for (const bool values : {false, true}) {
    Agent<double> one(values ? dueling_options(1) : soft_options(1));
    const auto calls = some_calls(8, values ? 0 : 1);
    CHECK(one.run(calls).done == 8);
    CHECK(one.memory[0]->front() == one.memory[0]->front());
    for (const size_t threads : {2, 3, 5}) {
      Agent<double> other(values ? dueling_options(threads) : soft_options(threads));
      CHECK(distance(one, other) > 1e-3);  // eight updates have changed it
      CHECK(other.run(calls).done == 8);
      CHECK(distance(one, other) < 1e-9);
    }
  }
}

TEST_CASE("a loss that is not finite ends the call and counts as taken") {
  for (const size_t threads : {1, 2}) {
    Agent<float> agent(soft_options(threads));
    agent.tensors.networks[1].slots[0].value[0] = NAN;
    const UpdateOutcome outcome = agent.run(some_calls(4, 1));
    CHECK(outcome.done == 1);
    CHECK(outcome.failure == UpdateOutcome::kCriticLoss);
    CHECK(std::isnan(outcome.critic_loss));
    CHECK(!outcome.policy_stepped);
  }
}

TEST_CASE("options that do not fit are refused") {
  LearnerOptions options = soft_options(1);
  options.networks[0].sizes.back() = 5;
  CHECK_THROWS_AS(Agent<float>{options}, std::invalid_argument);
  options = soft_options(1);
  options.critic_subset = 4;
  CHECK_THROWS_AS(Agent<float>{options}, std::invalid_argument);
  options = dueling_options(1);
  options.networks[2].sizes.front() = 19;
  CHECK_THROWS_AS(Agent<float>{options}, std::invalid_argument);
}

TEST_CASE("a team's threads see what the others wrote before they met") {
  Team team(4);
  std::vector<size_t> written(4);
  std::atomic<size_t> wrong{0};
  for (size_t round = 1; round <= 200; ++round) {
    team.run([&](size_t t) {
      for (size_t phase = 0; phase < 3; ++phase) {
        written[t] = 3 * round + phase;
        team.meet();
        for (const size_t value : written) wrong += value != 3 * round + phase;
        team.meet();
      }
    });
  }
  CHECK(wrong == 0);
}

}  // namespace angle
