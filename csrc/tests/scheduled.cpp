#undef _FORTIFY_SOURCE  // fiber.h says why
#include "scheduled.h"

#include <cinttypes>
#include <cstdio>
#include <exception>
#include <memory>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fiber.h"
#include "scheduled_memory.h"

namespace angle::testing {
namespace {

enum class Action : uint8_t { kLoad, kStore, kAdd, kSubtract, kExchange, kSwap, kNoSwap, kKill };

struct Traced {
  Action action;
  uint8_t thread;
  std::memory_order order;
  uint32_t location, read, newest;  // which store was read, and the newest one
  uint64_t before, after;
};

}  // namespace

// ---- scheduler ----

class Scheduler {
 public:
  explicit Scheduler(const Exploration& exploration) : exploration_(exploration), random_(0), trace_(kTraced) {}

  Explored explore(const std::function<void(Run&)>& build);

  void add_thread(std::function<void()> body, bool mortal) {
    if (count_ == kMaxThreads) throw std::invalid_argument("a run has at most 8 threads");
    Thread& thread = threads_[count_];
    if (thread.fiber == nullptr) thread.fiber = std::make_unique<Fiber>(&Scheduler::enter, this);
    thread.body = std::move(body);
    thread.mortal = mortal;
    ++count_;
  }
  void set_check(std::function<void()> check) { check_ = std::move(check); }
  void add_name(const void* first, size_t count, size_t stride, std::string label) {
    names_.push_back({reinterpret_cast<uintptr_t>(first), count, stride, std::move(label)});
  }
  uint64_t seed() const { return seed_; }
  void fail(const std::string& message) {
    if (running_ != kMaxThreads && threads_[running_].killed) return;
    if (failed_) return;
    failed_ = true;
    message_ = message;
  }
  size_t running() const { return running_; }
  bool running_killed() const { return running_ != kMaxThreads && threads_[running_].killed; }

  uint64_t load(Cell cell, std::memory_order order);
  void store(Cell cell, uint64_t value, std::memory_order order);
  uint64_t change(Cell cell, Change change, uint64_t operand, std::memory_order order);
  bool swap(Cell cell, uint64_t* expected, uint64_t desired, bool weak, std::memory_order success,
            std::memory_order failure);

 private:
  static constexpr size_t kTraced = 64;
  static constexpr size_t kMostChanges = 4;

  struct Thread {
    std::unique_ptr<Fiber> fiber;
    std::function<void()> body;
    View view;
    bool mortal = false, killed = false, ended = true;
    uint64_t steps = 0, dies_at = 0;
    uint32_t priority = 0;
    std::unordered_map<uintptr_t, uint64_t> own;  // what a killed thread wrote
  };
  struct Name {
    uintptr_t first;
    size_t count, stride;
    std::string label;
  };

  static void enter(void* self) { static_cast<Scheduler*>(self)->run_bodies(); }

  void run_bodies();
  void prepare_run();
  bool step(Cell cell);
  size_t pick();
  void go_to(size_t next);
  uint32_t location_of(Cell cell);
  uint32_t readable(uint32_t number, bool sequential);
  void saw(Thread& thread, uint32_t number, uint32_t index, std::memory_order order);
  void put(Thread& thread, uint32_t number, uint64_t value, std::memory_order order, const Store* continued);
  uint64_t own_value(Cell cell);
  void note(Action action, std::memory_order order, uint32_t location, uint32_t read, uint64_t before, uint64_t after) {
    trace_[noted_++ % kTraced] = {action, static_cast<uint8_t>(running_), order,  location,
                                  read,   memory_.at(location).newest(),  before, after};
  }
  std::string label_of(Cell cell) const;
  std::string trace_text();

  const Exploration exploration_;
  Fiber main_;
  Thread threads_[kMaxThreads];
  size_t count_ = 0;
  size_t running_ = kMaxThreads;
  std::function<void()> check_;
  std::vector<Name> names_;

  Memory memory_;
  Random random_;
  uint64_t seed_ = 0, steps_ = 0, noted_ = 0;
  bool failed_ = false, abandoned_ = false;
  std::string message_;
  std::vector<Traced> trace_;

  // How this run is scheduled, drawn from the seed.
  bool by_priority_ = false;
  uint32_t change_chance_ = 0, stale_chance_ = 0;  // of 256
  uint64_t changes_at_[kMostChanges]{};
  size_t changes_ = 0;
};

void Scheduler::run_bodies() {
  for (;;) {
    Thread& thread = threads_[running_];
    try {
      thread.body();
    } catch (const std::exception& error) {
      fail(std::string("a thread threw: ") + error.what());
    } catch (...) {
      fail("a thread threw something");
    }
    thread.ended = true;
    go_to(pick());
  }
}

// Half of the runs switch at random with a chance of their own; half follow random priorities with a few changes
// (after Burckhardt et al., "A randomized scheduler with probabilistic guarantees of finding bugs", 2010).
void Scheduler::prepare_run() {
  by_priority_ = random_.with_chance(128);
  constexpr uint32_t kChances[] = {4, 16, 64, 128};
  change_chance_ = kChances[random_.below(4)];
  constexpr uint32_t kStale[] = {0, 32, 128, 224};
  stale_chance_ = exploration_.stale ? kStale[random_.below(4)] : 0;
  const uint64_t horizon = 1ull << (3 + random_.below(9));
  changes_ = random_.below(kMostChanges + 1);
  for (size_t i = 0; i < changes_; ++i) changes_at_[i] = random_.below(horizon);
  for (size_t i = 0; i < count_; ++i) {
    Thread& thread = threads_[i];
    thread.view.clear();
    thread.own.clear();
    thread.killed = thread.ended = false;
    thread.steps = 0;
    thread.priority = static_cast<uint32_t>(random_.bits() >> 33) + kMostChanges;
    thread.dies_at = random_.below(1ull << (1 + random_.below(9)));
  }
}

size_t Scheduler::pick() {
  size_t alive[kMaxThreads], n = 0;
  for (size_t i = 0; i < count_; ++i) {
    if (!threads_[i].ended) alive[n++] = i;
  }
  if (n == 0) return kMaxThreads;
  if (!by_priority_) return alive[n == 1 ? 0 : random_.below(n)];
  size_t best = alive[0];
  for (size_t i = 1; i < n; ++i) {
    if (threads_[alive[i]].priority > threads_[best].priority) best = alive[i];
  }
  return best;
}

void Scheduler::go_to(size_t next) {
  if (next == running_) return;
  Fiber& from = running_ == kMaxThreads ? main_ : *threads_[running_].fiber;
  Fiber& to = next == kMaxThreads ? main_ : *threads_[next].fiber;
  running_ = next;
  detail::active = next == kMaxThreads ? nullptr : this;
  Fiber::change(from, to);
}

// Before each operation: perhaps another thread goes first. False: the thread is killed and goes on by itself.
bool Scheduler::step(Cell cell) {
  ++steps_;
  if (steps_ > exploration_.max_steps) {
    if (!failed_) message_ = "no end after " + std::to_string(exploration_.max_steps) + " operations";
    failed_ = abandoned_ = true;
    --steps_;
    go_to(kMaxThreads);  // for ever
  }
  Thread& self = threads_[running_];
  ++self.steps;
  if (self.killed) return false;
  if (by_priority_) {
    for (size_t i = 0; i < changes_; ++i) {
      if (changes_at_[i] == steps_) self.priority = static_cast<uint32_t>(i);
    }
    go_to(pick());
  } else if (random_.with_chance(change_chance_)) {
    go_to(pick());
  }
  if (self.mortal && self.steps > self.dies_at) {
    const uint32_t number = location_of(cell);
    note(Action::kKill, std::memory_order_relaxed, number, memory_.at(number).newest(), 0, 0);
    self.killed = true;
    return false;
  }
  return true;
}

uint32_t Scheduler::location_of(Cell cell) {
  uint32_t number = 0;
  if (!memory_.find(cell, &number)) fail("a word of " + label_of(cell) + " is used with two sizes");
  View& view = threads_[running_].view;
  if (view.size() <= number) view.resize(number + 1, 0);
  return number;
}

// Which store a load reads.
uint32_t Scheduler::readable(uint32_t number, bool sequential) {
  const Memory::Location& location = memory_.at(number);
  const uint32_t seen = threads_[running_].view[number];
  const uint32_t least = location.index_of(sequential ? std::max(seen, location.sequenced) : seen);
  const uint32_t newest = location.newest();
  if (least == newest || stale_chance_ == 0 || !random_.with_chance(stale_chance_)) return newest;
  if (random_.with_chance(192)) return least;
  return least + static_cast<uint32_t>(random_.below(newest - least + 1));
}

void Scheduler::saw(Thread& thread, uint32_t number, uint32_t index, std::memory_order order) {
  Memory::Location& location = memory_.at(number);
  const Store& store = location.stores[index];
  thread.view[number] = std::max(thread.view[number], store.time);
  if (order == std::memory_order_seq_cst) location.sequenced = std::max(location.sequenced, store.time);
  if (acquires(order) && store.view_size != 0) memory_.join(thread.view, store);
}

// A store after all others, or, where the thread has not seen those and none is bound to its place, before some of
// them.
void Scheduler::put(Thread& thread, uint32_t number, uint64_t value, std::memory_order order, const Store* continued) {
  Memory::Location& location = memory_.at(number);
  uint32_t index = location.newest() + 1;
  uint32_t time = memory_.time_before(number, index);
  if (continued == nullptr && stale_chance_ != 0 && random_.with_chance(stale_chance_ / 2)) {
    const bool sequential = order == std::memory_order_seq_cst;
    const uint32_t seen = thread.view[number];
    const uint32_t least = location.index_of(sequential ? std::max(seen, location.sequenced) : seen);
    const uint32_t before = least + 1 + static_cast<uint32_t>(random_.below(location.newest() - least + 1));
    const uint32_t between = memory_.time_before(number, before);
    if (between != 0) {
      index = before;
      time = between;
    }
  }
  thread.view[number] = time;
  if (order == std::memory_order_seq_cst) location.sequenced = std::max(location.sequenced, time);
  memory_.add(number, index, time, value, releases(order) ? &thread.view : nullptr, continued);
}

uint64_t Scheduler::own_value(Cell cell) {
  const auto found = threads_[running_].own.find(reinterpret_cast<uintptr_t>(cell.address));
  return found != threads_[running_].own.end() ? found->second : read_raw(cell);
}

uint64_t Scheduler::load(Cell cell, std::memory_order order) {
  if (!step(cell)) return own_value(cell);
  const uint32_t number = location_of(cell);
  const uint32_t index = readable(number, order == std::memory_order_seq_cst);
  const uint64_t value = memory_.at(number).stores[index].value;
  note(Action::kLoad, order, number, index, value, value);
  saw(threads_[running_], number, index, order);
  return value;
}

void Scheduler::store(Cell cell, uint64_t value, std::memory_order order) {
  if (!step(cell)) {
    threads_[running_].own[reinterpret_cast<uintptr_t>(cell.address)] = value;
    return;
  }
  const uint32_t number = location_of(cell);
  const uint32_t newest = memory_.at(number).newest();
  note(Action::kStore, order, number, newest, memory_.at(number).stores[newest].value, value);
  put(threads_[running_], number, value, order, nullptr);
}

uint64_t Scheduler::change(Cell cell, Change change, uint64_t operand, std::memory_order order) {
  if (!step(cell)) {
    const uint64_t old = own_value(cell);
    threads_[running_].own[reinterpret_cast<uintptr_t>(cell.address)] = changed(old, change, operand, cell.bytes);
    return old;
  }
  const uint32_t number = location_of(cell);
  const uint32_t newest = memory_.at(number).newest();
  const Store old = memory_.at(number).stores[newest];
  const uint64_t value = changed(old.value, change, operand, cell.bytes);
  const Action action = change == Change::kAdd        ? Action::kAdd
                        : change == Change::kSubtract ? Action::kSubtract
                                                      : Action::kExchange;
  note(action, order, number, newest, old.value, value);
  saw(threads_[running_], number, newest, order);
  put(threads_[running_], number, value, order, &old);
  return old.value;
}

bool Scheduler::swap(Cell cell, uint64_t* expected, uint64_t desired, bool weak, std::memory_order success,
                     std::memory_order failure) {
  if (!step(cell)) {
    const uint64_t old = own_value(cell);
    if (old == *expected) {
      threads_[running_].own[reinterpret_cast<uintptr_t>(cell.address)] = desired;
      return true;
    }
    *expected = old;
    return false;
  }
  constexpr uint32_t kSpurious = 16;  // of 256
  const uint32_t number = location_of(cell);
  const uint32_t newest = memory_.at(number).newest();
  Thread& thread = threads_[running_];
  uint32_t index = readable(number, failure == std::memory_order_seq_cst);
  const bool spurious = weak && exploration_.stale && random_.with_chance(kSpurious);
  // A stale value that equals the expected one may fail a weak exchange, but a strong one then has to look again.
  if (!spurious && memory_.at(number).stores[index].value == *expected) index = newest;
  const Store seen = memory_.at(number).stores[index];
  if (!spurious && index == newest && seen.value == *expected) {
    note(Action::kSwap, success, number, newest, seen.value, desired);
    saw(thread, number, newest, success);
    put(thread, number, desired, success, &seen);
    return true;
  }
  note(Action::kNoSwap, failure, number, index, seen.value, desired);
  saw(thread, number, index, failure);
  *expected = seen.value;
  return false;
}

std::string Scheduler::label_of(Cell cell) const {
  const uintptr_t address = reinterpret_cast<uintptr_t>(cell.address);
  for (const Name& name : names_) {
    if (address < name.first || address >= name.first + name.count * name.stride) continue;
    const uintptr_t within = address - name.first;
    std::string label = name.label;
    if (name.count > 1) label.append("[").append(std::to_string(within / name.stride)).append("]");
    if (within % name.stride != 0) label.append("+").append(std::to_string(within % name.stride));
    return label;
  }
  char text[32];
  std::snprintf(text, sizeof text, "0x%" PRIxPTR, address);
  return text;
}

std::string Scheduler::trace_text() {
  constexpr const char* kNames[] = {"load", "store", "add", "sub", "exchange", "swap", "no swap", "kill"};
  std::string text;
  for (uint64_t at = noted_ > kTraced ? noted_ - kTraced : 0; at < noted_; ++at) {
    const Traced& t = trace_[at % kTraced];
    char line[256];
    std::snprintf(line, sizeof line, "  %5" PRIu64 "  thread %u  %-8s %-7s  %-24s ", at, t.thread,
                  kNames[static_cast<int>(t.action)], order_name(t.order),
                  label_of(memory_.at(t.location).cell).c_str());
    text += line;
    if (t.action == Action::kKill) {
      std::snprintf(line, sizeof line, "here it died");
    } else if (t.action == Action::kLoad || t.action == Action::kNoSwap) {
      std::snprintf(line, sizeof line, "%" PRIx64, t.before);
    } else {
      std::snprintf(line, sizeof line, "%" PRIx64 " -> %" PRIx64, t.before, t.after);
    }
    text += line;
    if (t.read != t.newest) {
      std::snprintf(line, sizeof line, "   (store %u of %u: old)", t.read, t.newest);
      text += line;
    }
    text += '\n';
  }
  return text;
}

Explored Scheduler::explore(const std::function<void(Run&)>& build) {
  Explored result;
  for (uint64_t i = 0; i < exploration_.seeds; ++i) {
    seed_ = exploration_.first_seed + i;
    random_ = Random(seed_);
    memory_.clear();
    count_ = 0;
    steps_ = 0;
    failed_ = abandoned_ = false;
    check_ = nullptr;
    names_.clear();
    noted_ = 0;
    Run run(*this);
    build(run);
    prepare_run();
    go_to(pick());
    if (abandoned_) {
      // Their stacks hold frames that nobody will leave.
      for (size_t t = 0; t < count_; ++t) {
        if (!threads_[t].ended) threads_[t].fiber.reset();
      }
    } else if (check_) {
      check_();
    }
    ++result.runs;
    result.steps += steps_;
    if (failed_) {
      result.failed = true;
      result.seed = seed_;
      result.message = message_;
      result.trace = trace_text();
      if (!exploration_.quiet) {
        std::fprintf(stderr, "%s: seed %" PRIu64 " failed: %s\n%s", exploration_.scenario, seed_, message_.c_str(),
                     result.trace.c_str());
      }
    }
    if (exploration_.rewind) memory_.rewind();
    for (size_t t = 0; t < count_; ++t) threads_[t].body = nullptr;
    if (failed_) break;
  }
  return result;
}

namespace {
// The scheduler whose explore is under way, for fail() outside of a logical thread.
thread_local Scheduler* exploring = nullptr;
}  // namespace

uint64_t detail::scheduled_load(Cell cell, std::memory_order order) { return active->load(cell, order); }
void detail::scheduled_store(Cell cell, uint64_t value, std::memory_order order) { active->store(cell, value, order); }
uint64_t detail::scheduled_change(Cell cell, Change change, uint64_t operand, std::memory_order order) {
  return active->change(cell, change, operand, order);
}
bool detail::scheduled_swap(Cell cell, uint64_t* expected, uint64_t desired, bool weak, std::memory_order success,
                            std::memory_order failure) {
  return active->swap(cell, expected, desired, weak, success, failure);
}

size_t scheduled_thread() { return detail::active == nullptr ? kMaxThreads : detail::active->running(); }
bool killed() { return detail::active != nullptr && detail::active->running_killed(); }
void fail(const std::string& message) {
  if (exploring == nullptr) throw std::logic_error("fail() belongs into a run: " + message);
  exploring->fail(message);
}

void Run::thread(std::function<void()> body) { scheduler_.add_thread(std::move(body), false); }
void Run::mortal_thread(std::function<void()> body) { scheduler_.add_thread(std::move(body), true); }
void Run::at_rest(std::function<void()> check) { scheduler_.set_check(std::move(check)); }
void Run::name(const void* first, size_t count, size_t stride, std::string label) {
  scheduler_.add_name(first, count, stride, std::move(label));
}
uint64_t Run::seed() const { return scheduler_.seed(); }

Explored explore(const Exploration& exploration, const std::function<void(Run&)>& build) {
  if (exploring != nullptr) throw std::logic_error("explore() was called within a run");
  Scheduler scheduler(exploration);
  struct Reset {
    ~Reset() { exploring = nullptr; }
  } reset;
  exploring = &scheduler;
  return scheduler.explore(build);
}

}  // namespace angle::testing
