// Kernels as threads on the host: one for each thread of a device, several blocks side by side. For ThreadSanitizer,
// which then sees what a device would: what one thread does is ordered before what another does by barriers, launches
// and add_and_tell alone. Of many blocks, those that the same threads take one after the other are ordered, too; each
// meets others that are not. Included by portable.h, which says what each part does. Nobody times it.
#pragma once
#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <ctime>
#endif

// A function that the sanitizer does not see into. Threads wait for one another in such ones, and what that orders is
// told apart: it must be neither less than on a device nor more.
#if defined(__clang__)
#define ANGLE_UNSEEN __attribute__((noinline, disable_sanitizer_instrumentation))
#else
#define ANGLE_UNSEEN __attribute__((noinline, no_sanitize("thread")))
#endif

namespace angle::device {

// ---- words that several threads change ----

template <class T>
void add(T* at, T by) {
  std::atomic_ref<T>(*at).fetch_add(by, std::memory_order_relaxed);
}
// acq_rel in place of the fences beside it on a device: gcc's ThreadSanitizer knows no fences.
inline uint32_t add_and_tell(uint32_t* at, uint32_t by) {
  return std::atomic_ref<uint32_t>(*at).fetch_add(by, std::memory_order_acq_rel);
}
inline void fence() {}
inline void fence_for_host() {}

inline uint64_t fresh(const uint64_t* at) {
  return std::atomic_ref<uint64_t>(*const_cast<uint64_t*>(at)).load(std::memory_order_relaxed);
}
inline void set(uint64_t* at, uint64_t value) {
  std::atomic_ref<uint64_t>(*at).store(value, std::memory_order_relaxed);
}
inline uint64_t swap_if(uint64_t* at, uint64_t expected, uint64_t desired) {
  std::atomic_ref<uint64_t>(*at).compare_exchange_strong(expected, desired, std::memory_order_relaxed);
  return expected;
}
inline void raise(uint64_t* at, uint64_t value) {
  for (uint64_t found = fresh(at); found < value;) {
    const uint64_t before = swap_if(at, found, value);
    if (before == found) return;
    found = before;
  }
}
inline void lower(uint64_t* at, uint64_t value) {
  for (uint64_t found = fresh(at); found > value;) {
    const uint64_t before = swap_if(at, found, value);
    if (before == found) return;
    found = before;
  }
}

// Of bits that are not all 0, the lowest that is 1.
inline int lowest_bit(uint32_t bits) { return std::countr_zero(bits); }

// ---- waiting ----

constexpr int kLongestWait = 120;  // seconds
constexpr int kLooks = 3;          // before a thread sleeps

[[noreturn]] inline void give_up(const char* what, const char* place, const char* other = "") {
  std::fprintf(stderr, "%s:\n  %s\n  %s\n", what, place, other);
  std::abort();
}

// Until the word is another; false where it stayed the same for `seconds`, 0: for ever.
ANGLE_UNSEEN inline bool wait_while(const uint32_t* word, uint32_t value, int seconds) {
  // Mostly the others are about to come, and to be woken costs more than to look again.
  for (int look = 0; look < kLooks && seconds != 0; ++look) {
    if (__atomic_load_n(word, __ATOMIC_ACQUIRE) != value) return true;
    std::this_thread::yield();
  }
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  while (__atomic_load_n(word, __ATOMIC_ACQUIRE) == value) {
#if defined(__linux__)
    const timespec limit{seconds, 0};
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, seconds == 0 ? nullptr : &limit, nullptr, 0);
#else
    std::this_thread::sleep_for(std::chrono::microseconds(100));
#endif
    if (seconds != 0 && std::chrono::steady_clock::now() >= end) {
      return __atomic_load_n(word, __ATOMIC_ACQUIRE) != value;
    }
  }
  return true;
}

inline void wake_all([[maybe_unused]] const uint32_t* word) {
#if defined(__linux__)
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
#endif
}

// Where so many threads meet, again and again. It orders nothing that the sanitizer would see.
class Meeting {
 public:
  explicit Meeting(uint32_t threads) : threads_(threads) {}

  // How often all have met. Asked by one of them, it stays the same until that one meets.
  ANGLE_UNSEEN uint32_t count() const { return __atomic_load_n(&count_, __ATOMIC_ACQUIRE); }

  // `place`: which function's end this is; all have to come to the same.
  ANGLE_UNSEEN void meet(const char* place) {
    const uint32_t count = __atomic_load_n(&count_, __ATOMIC_ACQUIRE);
    const char* first = nullptr;
    if (!__atomic_compare_exchange_n(&place_, &first, place, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE) &&
        first != place) {
      give_up("threads came to different barriers", first, place);
    }
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == threads_) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&place_, nullptr, __ATOMIC_RELAXED);
      __atomic_store_n(&count_, count + 1, __ATOMIC_RELEASE);
      wake_all(&count_);
    } else if (!wait_while(&count_, count, kLongestWait)) {
      give_up("not all threads came to this barrier", place);
    }
  }

  // Only while nobody is here.
  void set_threads(uint32_t threads) { threads_ = threads; }

 private:
  uint32_t threads_;
  uint32_t arrived_ = 0, count_ = 0;
  const char* place_ = nullptr;
};

// A meeting after which each has seen what all did before it. Words to order by take turns: a thread that wakes late
// would else seem to come after what others did since.
class Barrier {
 public:
  explicit Barrier(uint32_t threads) : meeting(threads) {}

  void wait(const char* place) {
    std::atomic<uint32_t>& word = order_[meeting.count() % 2];
    word.fetch_add(1, std::memory_order_release);
    meeting.meet(place);
    word.load(std::memory_order_acquire);
  }

  Meeting meeting;

 private:
  std::atomic<uint32_t> order_[2]{};
};

// ---- a warp ----

template <class T>
class Lanes {
 public:
  T& operator[](int) { return own_; }
  const T& operator[](int) const { return own_; }

 private:
  T own_{};
};

// What the threads of a warp share.
struct WarpMemory {
  Barrier barrier{kLanes};
  // One for each lane, in turns: nobody writes where others still read.
  uint64_t slots[2][kLanes]{};
};

class Warp {
 public:
  Warp(uint32_t index_in, int lane, WarpMemory& memory) : index(index_in), lane_(lane), memory_(memory) {}
  const uint32_t index;

  template <class F>
  void each(F&& f) const {
    f(lane_);
    memory_.barrier.wait(__PRETTY_FUNCTION__);
  }
  template <class T>
  Lanes<T> scan(const Lanes<T>& values) const {
    const All<T> all = exchange(values[0], __PRETTY_FUNCTION__);
    Lanes<T> sums;
    for (int lane = 0; lane <= lane_; ++lane) sums[0] += all.of[lane];
    return sums;
  }
  template <class T>
  T sum(const Lanes<T>& values) const {
    return add_up(exchange(values[0], __PRETTY_FUNCTION__), kLanes);
  }
  template <class T>
  Lanes<T> sums_of(const Lanes<T>& values, uint32_t width) const {
    Lanes<T> sums;
    sums[0] = add_up(exchange(values[0], __PRETTY_FUNCTION__), static_cast<int>(width));
    return sums;
  }
  template <class T>
  T least(const Lanes<T>& values) const {
    const All<T> all = exchange(values[0], __PRETTY_FUNCTION__);
    return *std::min_element(all.of, all.of + kLanes);
  }
  uint32_t ballot(const Lanes<bool>& values) const {
    const All<bool> all = exchange(values[0], __PRETTY_FUNCTION__);
    uint32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<uint32_t>(all.of[lane]) << lane;
    return bits;
  }
  template <class T>
  T broadcast(const Lanes<T>& values, int from) const {
    return exchange(values[0], __PRETTY_FUNCTION__).of[from];
  }

 private:
  template <class T>
  struct All {
    T of[kLanes];
  };

  // Every lane's value, told to all. No memory is ordered by it.
  template <class T>
  ANGLE_UNSEEN All<T> exchange(T own, const char* place) const {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t* const slots = memory_.slots[memory_.barrier.meeting.count() % 2];
    __builtin_memcpy(&slots[lane_], &own, sizeof own);
    memory_.barrier.meeting.meet(place);
    All<T> all;
    for (int lane = 0; lane < kLanes; ++lane) __builtin_memcpy(&all.of[lane], &slots[lane], sizeof(T));
    return all;
  }

  // Of the calling lane's group of `width`, in the device's order, so that sums of floats are the same.
  template <class T>
  T add_up(All<T> all, int width) const {
    for (int step = width / 2; step > 0; step /= 2) {
      const All<T> before = all;
      for (int lane = 0; lane < kLanes; ++lane) all.of[lane] = before.of[lane] + before.of[lane ^ step];
    }
    return all.of[lane_];
  }

  const int lane_;
  WarpMemory& memory_;
};

// ---- a block ----

constexpr uint32_t kMostThreads = 1024, kMostWarps = kMostThreads / kLanes;

// The threads of a block. They stay for the next launch.
class Crew {
 public:
  Crew() = default;
  ~Crew() {
    start({});
    for (std::thread& thread : threads_) thread.join();
  }
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  // Makes threads until there are so many.
  void grow(uint32_t threads) {
    while (threads_.size() < threads) {
      const uint32_t thread = static_cast<uint32_t>(threads_.size());
      if (thread % kLanes == 0) warps_[thread / kLanes] = std::make_unique<WarpMemory>();
      threads_.emplace_back([this, thread] { serve(thread); });
    }
    working_ = threads;
    barrier.meeting.set_threads(threads);
  }

  // Has the first threads, as many as grow was given, call `task` each with its number; one that is empty ends all.
  void start(std::function<void(uint32_t)> task) {
    task_ = std::move(task);
    const uint32_t threads = task_ ? working_ : static_cast<uint32_t>(threads_.size());
    done_.store(0, std::memory_order_relaxed);
    for (uint32_t warp = 0; warp < threads / kLanes; ++warp) {
      starts_[warp].fetch_add(1, std::memory_order_release);
      wake_all(address_of(starts_[warp]));
    }
  }

  void wait() {
    for (;;) {
      const uint32_t done = done_.load(std::memory_order_acquire);
      if (done == working_) return;
      wait_while(address_of(done_), done, 0);
    }
  }

  WarpMemory& warp(uint32_t index) { return *warps_[index]; }

  Barrier barrier{0};
  uint64_t next_block = 0;

 private:
  static const uint32_t* address_of(const std::atomic<uint32_t>& word) {
    static_assert(sizeof word == sizeof(uint32_t));
    return reinterpret_cast<const uint32_t*>(&word);
  }

  void serve(uint32_t thread) {
    const std::atomic<uint32_t>& start = starts_[thread / kLanes];
    for (uint32_t served = 0;; ++served) {
      wait_while(address_of(start), served, 0);
      start.load(std::memory_order_acquire);
      if (!task_) return;
      task_(thread);
      const uint32_t working = working_;  // a later launch may have another number
      if (done_.fetch_add(1, std::memory_order_release) + 1 == working) wake_all(address_of(done_));
    }
  }

  std::vector<std::thread> threads_;
  std::unique_ptr<WarpMemory> warps_[kMostWarps];
  std::atomic<uint32_t> starts_[kMostWarps]{};
  std::atomic<uint32_t> done_{0};
  std::function<void(uint32_t)> task_;
  uint32_t working_ = 0;
};

template <class Shared>
class Block {
 public:
  Block(Shared& shared_in, uint32_t index_in, uint32_t blocks_in, uint32_t threads_in, uint32_t thread, Crew& crew)
      : shared(shared_in), index(index_in), blocks(blocks_in), threads(threads_in), thread_(thread), crew_(crew) {}
  Shared& shared;
  const uint32_t index, blocks, threads;

  template <class F>
  void each_thread(F&& f) {
    f(thread_);
    crew_.barrier.wait(__PRETTY_FUNCTION__);
  }
  template <class F>
  void each_warp(F&& f) {
    const uint32_t index_of = thread_ / kLanes;
    const Warp warp(index_of, static_cast<int>(thread_ % kLanes), crew_.warp(index_of));
    f(warp);
    crew_.barrier.wait(__PRETTY_FUNCTION__);
  }

 private:
  const uint32_t thread_;
  Crew& crew_;
};

// ---- launching ----

constexpr uint64_t kCrews = 3;  // blocks at the same time

inline Crew* crews() {
  static Crew all[kCrews];
  return all;
}

template <class Kernel>
int launch(const typename Kernel::Params& p, uint64_t blocks, void*) {
  using Shared = typename Kernel::Shared;
  static_assert(Kernel::kThreads <= kMostThreads && Kernel::kThreads % kLanes == 0);
  const uint64_t count = std::min(blocks, kCrews);
  std::atomic<uint64_t> next{count};
  for (uint64_t number = 0; number < count; ++number) {
    Crew& crew = crews()[number];
    crew.grow(Kernel::kThreads);
    const std::shared_ptr<Shared> shared = std::make_shared<Shared>();
    // As undefined as a block's memory on a device is.
    const auto forget = [shared] { std::memset(static_cast<void*>(shared.get()), 0xA5, sizeof(Shared)); };
    forget();
    crew.start([&crew, &p, &next, shared, forget, number, blocks](uint32_t thread) {
      for (uint64_t index = number;;) {
        Block<Shared> block(*shared, static_cast<uint32_t>(index), static_cast<uint32_t>(blocks), Kernel::kThreads,
                            thread, crew);
        Kernel::run(block, p);
        if (blocks <= kCrews) return;
        // relaxed: what blocks do must not seem to come after one another.
        if (thread == 0) crew.next_block = next.fetch_add(1, std::memory_order_relaxed);
        crew.barrier.wait("a block's end");
        index = crew.next_block;
        if (index >= blocks) return;
        if (thread == 0) forget();
        crew.barrier.wait("a block's beginning");
      }
    });
  }
  for (uint64_t number = 0; number < count; ++number) crews()[number].wait();
  return 0;
}

inline const char* error_text(int) { return "no error is known on the host"; }

}  // namespace angle::device
