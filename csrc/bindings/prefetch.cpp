#include "bindings/prefetch.h"

#include <unistd.h>

#include <stdexcept>
#include <utility>

namespace angle {

struct Prefetch::State {
  struct Job {
    uint64_t name;
    SampleRequest request;
    std::vector<uint8_t*> addresses;
  };
  struct Ready {
    uint64_t name;
    uint64_t call;  // of Replay::sample
    size_t n;
    uint64_t ages;
  };

  explicit State(std::shared_ptr<Replay> replay_in) : replay(std::move(replay_in)), owner(getpid()) {}

  void work() {
    std::unique_lock lock(mutex);
    for (;;) {
      work_waits.wait(lock, [&] { return stopping || (!jobs.empty() && failure == nullptr); });
      if (stopping) return;
      const Job job = std::move(jobs.front());
      jobs.pop_front();
      lock.unlock();
      uint64_t call = 0, ages = 0;
      std::exception_ptr thrown;
      try {
        call = draw(*replay, job.request, job.addresses.data(), &ages);
      } catch (...) {
        thrown = std::current_exception();
      }
      lock.lock();
      if (thrown == nullptr) {
        ready.push_back({job.name, call, job.request.n, ages});
      } else {
        failure = thrown;
        jobs.push_front(job);
      }
      takers_wait.notify_all();
    }
  }

  std::optional<uint64_t> pop() {
    if (ready.empty()) return std::nullopt;
    const uint64_t name = ready.front().name;
    ready.pop_front();
    return name;
  }

  const std::shared_ptr<Replay> replay;
  const pid_t owner;
  std::mutex mutex;                     // guards all below but `thread`
  std::condition_variable work_waits;   // for a job, the end of a failure, or stopping
  std::condition_variable takers_wait;  // for a ready batch, a failure, or stopping
  std::deque<Job> jobs;
  std::deque<Ready> ready;
  std::exception_ptr failure;  // of the first job; the thread rests until a take clears it
  bool stopping = false;
  std::mutex joining;
  std::thread thread;
};

Prefetch::Prefetch(std::shared_ptr<Replay> replay) : state_(std::make_unique<State>(std::move(replay))) {
  state_->thread = std::thread([state = state_.get()] { state->work(); });
}

Prefetch::~Prefetch() {
  if (getpid() != state_->owner) {
    static_cast<void>(state_.release());  // its locks and its thread are another process's
    return;
  }
  stop();
}

Prefetch::State& Prefetch::state() const {
  if (getpid() != state_->owner) {
    throw std::runtime_error("this prefetcher belongs to the process that made it; make one after the fork");
  }
  return *state_;
}

void Prefetch::submit(uint64_t name, const SampleRequest& request, std::vector<uint8_t*> addresses) {
  State& s = state();
  const std::scoped_lock lock(s.mutex);
  if (s.stopping) return;
  s.jobs.push_back({name, request, std::move(addresses)});
  s.work_waits.notify_one();
}

std::optional<uint64_t> Prefetch::take_ready() {
  State& s = state();
  const std::scoped_lock lock(s.mutex);
  return s.stopping ? std::nullopt : s.pop();
}

std::optional<uint64_t> Prefetch::take() {
  State& s = state();
  std::unique_lock lock(s.mutex);
  if (s.ready.empty() && s.failure != nullptr) {
    s.failure = nullptr;
    s.work_waits.notify_one();
  }
  s.takers_wait.wait(lock, [&] { return s.stopping || !s.ready.empty() || s.failure != nullptr; });
  if (s.stopping) return std::nullopt;
  if (s.ready.empty()) std::rethrow_exception(s.failure);
  return s.pop();
}

void Prefetch::stop() {
  if (getpid() != state_->owner) return;
  State& s = *state_;
  const std::scoped_lock join(s.joining);
  {
    const std::scoped_lock lock(s.mutex);
    s.stopping = true;
  }
  s.work_waits.notify_all();
  s.takers_wait.notify_all();
  if (s.thread.joinable()) s.thread.join();
  const std::scoped_lock lock(s.mutex);
  s.jobs.clear();
  while (!s.ready.empty()) {
    const State::Ready& newest = s.ready.back();
    if (!s.replay->return_call(newest.call, newest.n, newest.ages)) break;
    s.ready.pop_back();
  }
  s.ready.clear();
}

}  // namespace angle
