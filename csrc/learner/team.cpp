#include "learner/team.h"

#include <unistd.h>

#include <new>

namespace angle {
namespace {

constexpr int kSpins =
    20'000;  // about 0.2 ms: longer than any wait inside an update, shorter than a nap's cost is felt

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Until `word` is no longer `old`: spins, then sleeps. Pairs with the store or add (release) that changes it.
void wait_while(const std::atomic<uint32_t>& word, uint32_t old) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (word.load(std::memory_order_acquire) != old) return;
    relax();
  }
  while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
}

}  // namespace

Team::~Team() { stop(); }

void Team::start() {
  if (owner_ == getpid()) return;
  if (owner_ != 0) {  // a fork's child: the threads are the parent's, and so are their handles
    for (std::thread& thread : threads_) new (&thread) std::thread();
    threads_.clear();
    arrived_.store(0, std::memory_order_relaxed);
  }
  owner_ = getpid();
  leave_ = false;
  const uint32_t seen = call_.load(std::memory_order_relaxed);
  for (size_t index = 1; index < size_; ++index) threads_.emplace_back(&Team::serve, this, index, seen);
}

void Team::stop() {
  if (owner_ != getpid()) {
    for (std::thread& thread : threads_) new (&thread) std::thread();
    return;
  }
  leave_ = true;
  call_.fetch_add(1, std::memory_order_release);
  call_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

void Team::serve(size_t index, uint32_t seen) {
  for (;;) {
    wait_while(call_, seen);
    ++seen;
    if (leave_) return;
    (*work_)(index);
    meet();
  }
}

void Team::run(const std::function<void(size_t)>& work) {
  if (size_ == 1) return work(0);
  start();
  work_ = &work;
  call_.fetch_add(1, std::memory_order_release);
  call_.notify_all();
  work(0);
  meet();
}

void Team::meet() {
  if (size_ == 1) return;
  const uint32_t now = meeting_.load(std::memory_order_relaxed);
  // The adds release what each thread wrote, the last one acquires all of it and hands it on.
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    meeting_.fetch_add(1, std::memory_order_release);
    meeting_.notify_all();
  } else {
    wait_while(meeting_, now);
  }
}

}  // namespace angle
