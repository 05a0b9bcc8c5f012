// A small model checker for lock-free code. Logical threads are fibers of one real thread; every operation on a
// ScheduledWord is a point at which a seeded generator picks the thread that goes on and, for a load, which of the
// values that the memory model still allows it sees. The same seed gives the same run.
//
// Memory model: each location keeps its stores in their order; each thread keeps a view, the oldest store of every
// location that it may still read. A plain store comes after the stores in its thread's view, mostly last. A release
// store carries its thread's view, a read-modify-write carries on the view of the store that it replaces, and an
// acquire load joins the view of the store that it reads. A read-modify-write reads the newest store and stays next to
// it. Seq_cst operations on a location never read or write behind one another; their total order is the order of
// execution. Not modelled: fences, loads that read a store of the future, and torn words.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <type_traits>

namespace angle::testing {

class Scheduler;

constexpr size_t kMaxThreads = 8;

namespace detail {

// The scheduler whose fiber runs on this thread, or nullptr.
inline constinit thread_local Scheduler* active = nullptr;

enum class Change : uint8_t { kAdd, kSubtract, kExchange };

struct Cell {
  void* address;
  uint8_t bytes;
};

// One operation of the logical thread that runs. Values travel in the low bytes of 64 bits. Only under a scheduler.
uint64_t scheduled_load(Cell cell, std::memory_order order);
void scheduled_store(Cell cell, uint64_t value, std::memory_order order);
uint64_t scheduled_change(Cell cell, Change change, uint64_t operand, std::memory_order order);
bool scheduled_swap(Cell cell, uint64_t* expected, uint64_t desired, bool weak, std::memory_order success,
                    std::memory_order failure);

}  // namespace detail

// An atomic word at a raw address: scheduled where a scheduler runs, plain atomic builtins elsewhere. Copying it copies
// the reference. Any thread. O(1), or under a scheduler O(locations) for acquire and release.
template <class T>
class ScheduledWord {
  static_assert(std::is_integral_v<T> && sizeof(T) <= 8);

 public:
  ScheduledWord(T* address) : address_(address) {}  // converts, as in the core: return {address}

  T load(std::memory_order order) const {
    if (detail::active == nullptr) return __atomic_load_n(address_, __ATOMIC_SEQ_CST);
    return narrow(detail::scheduled_load(cell(), order));
  }
  void store(T value, std::memory_order order) const {
    if (detail::active == nullptr) return __atomic_store_n(address_, value, __ATOMIC_SEQ_CST);
    detail::scheduled_store(cell(), widen(value), order);
  }
  T fetch_add(T by, std::memory_order order) const {
    if (detail::active == nullptr) return __atomic_fetch_add(address_, by, __ATOMIC_SEQ_CST);
    return narrow(detail::scheduled_change(cell(), detail::Change::kAdd, widen(by), order));
  }
  T fetch_sub(T by, std::memory_order order) const {
    if (detail::active == nullptr) return __atomic_fetch_sub(address_, by, __ATOMIC_SEQ_CST);
    return narrow(detail::scheduled_change(cell(), detail::Change::kSubtract, widen(by), order));
  }
  T exchange(T value, std::memory_order order) const {
    if (detail::active == nullptr) return __atomic_exchange_n(address_, value, __ATOMIC_SEQ_CST);
    return narrow(detail::scheduled_change(cell(), detail::Change::kExchange, widen(value), order));
  }
  bool compare_exchange_strong(T& expected, T desired, std::memory_order success, std::memory_order failure) const {
    return swap(expected, desired, false, success, failure);
  }
  bool compare_exchange_weak(T& expected, T desired, std::memory_order success, std::memory_order failure) const {
    return swap(expected, desired, true, success, failure);
  }
  bool compare_exchange_strong(T& expected, T desired, std::memory_order order) const {
    return swap(expected, desired, false, order, failure_order(order));
  }
  bool compare_exchange_weak(T& expected, T desired, std::memory_order order) const {
    return swap(expected, desired, true, order, failure_order(order));
  }

 private:
  static uint64_t widen(T value) { return static_cast<uint64_t>(static_cast<std::make_unsigned_t<T>>(value)); }
  static T narrow(uint64_t value) { return static_cast<T>(value); }
  static std::memory_order failure_order(std::memory_order order) {
    if (order == std::memory_order_acq_rel) return std::memory_order_acquire;
    return order == std::memory_order_release ? std::memory_order_relaxed : order;
  }
  detail::Cell cell() const { return {address_, sizeof(T)}; }
  bool swap(T& expected, T desired, bool weak, std::memory_order success, std::memory_order failure) const {
    if (detail::active == nullptr) {
      return __atomic_compare_exchange_n(address_, &expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    }
    uint64_t seen = widen(expected);
    if (detail::scheduled_swap(cell(), &seen, widen(desired), weak, success, failure)) return true;
    expected = narrow(seen);
    return false;
  }

  T* address_;
};

// Which logical thread runs, counted from 0 in the order of Run::thread; kMaxThreads outside of a run. O(1).
size_t scheduled_thread();

// Whether the logical thread that runs was killed: nothing that it does from there on reaches the others or memory, so
// that its body should report nothing any more. O(1).
bool killed();

// Marks the run as failed; the first message counts. A killed thread's failures are dropped. From a thread's body, from
// build or at_rest.
void fail(const std::string& message);
inline void require(bool holds, const char* message) {
  if (!holds) fail(message);
}

// One object of type S for each logical thread, and one for code outside of a run: what a thread_local variable is
// to real threads. O(1).
template <class S>
S& scheduled_local() {
  static S own[kMaxThreads + 1];
  return own[scheduled_thread()];
}

// One scenario under one seed, filled by explore's `build`.
class Run {
 public:
  explicit Run(Scheduler& scheduler) : scheduler_(scheduler) {}

  // Adds a logical thread, at most kMaxThreads. Several calls of `body` never run at once, but do interleave.
  void thread(std::function<void()> body);
  // Adds a logical thread that is stopped for ever before one of its operations, picked by the seed; it may also reach
  // its end. It then runs on in a copy of the memory that nobody else sees, so that its stack is left in order.
  void mortal_thread(std::function<void()> body);
  // What to check when all threads have ended. Memory then holds the newest store of each location.
  void at_rest(std::function<void()> check);
  // Gives `count` words, `stride` bytes apart, a name in the trace.
  void name(const void* first, size_t count, size_t stride, std::string label);
  // The seed of this run.
  uint64_t seed() const;

 private:
  Scheduler& scheduler_;
};

struct Exploration {
  uint64_t seeds = 1000;           // runs
  uint64_t first_seed = 1;         // run i has the seed first_seed + i
  uint64_t max_steps = 100000;     // a run of more operations fails: some thread waits for another or for ever
  bool stale = true;               // whether loads may see old values; false: interleavings of one order only
  bool rewind = false;             // after each run give every word that was touched its old value back
  bool quiet = false;              // print nothing
  const char* scenario = "model";  // name printed with a failure
};

struct Explored {
  bool failed = false;
  uint64_t seed = 0;  // the first seed that failed; no further one was run
  uint64_t runs = 0;
  uint64_t steps = 0;
  std::string message, trace;  // of the failing run; the trace holds its last operations
};

// Calls build(run) for each seed, runs the threads that it added and then its checks at rest. Stops at the first run
// that failed: by fail(), by an exception that left a body, by max_steps, or by a word used with two sizes; prints its
// seed and its trace to stderr. Not from within a run. One explore at a time on a thread.
Explored explore(const Exploration& exploration, const std::function<void(Run&)>& build);

}  // namespace angle::testing
