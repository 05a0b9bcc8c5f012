// The model checker on litmus tests whose outcomes the language fixes: what is allowed must be found, what is not must
// never be.
#include <algorithm>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "doctest.h"
#include "scheduled.h"

using namespace angle::testing;

namespace {

constexpr auto kRelaxed = std::memory_order_relaxed;
constexpr auto kAcquire = std::memory_order_acquire;
constexpr auto kRelease = std::memory_order_release;
constexpr auto kBoth = std::memory_order_acq_rel;
constexpr auto kSequential = std::memory_order_seq_cst;

using Word = ScheduledWord<uint64_t>;

Exploration quiet(uint64_t seeds, const char* scenario = "litmus") {
  Exploration exploration;
  exploration.seeds = seeds;
  exploration.quiet = true;
  exploration.scenario = scenario;
  return exploration;
}

// The pairs (a, b) that two threads return over all seeds.
template <class First, class Second>
std::set<std::pair<uint64_t, uint64_t>> outcomes(const First& first, const Second& second, uint64_t seeds = 4000) {
  std::set<std::pair<uint64_t, uint64_t>> seen;
  uint64_t x = 0, y = 0, a = 0, b = 0;
  const Explored explored = explore(quiet(seeds), [&](Run& run) {
    x = y = a = b = 0;
    run.thread([&] { a = first(Word(&x), Word(&y)); });
    run.thread([&] { b = second(Word(&x), Word(&y)); });
    run.at_rest([&] { seen.insert({a, b}); });
  });
  CHECK_FALSE(explored.failed);
  CHECK(explored.runs == seeds);
  return seen;
}

// (flag, data) as the reader of a message sees them.
std::set<std::pair<uint64_t, uint64_t>> messages(std::memory_order publish, std::memory_order look) {
  std::set<std::pair<uint64_t, uint64_t>> seen;
  uint64_t data = 0, flag = 0, a = 0, b = 0;
  explore(quiet(4000), [&](Run& run) {
    data = flag = a = b = 0;
    run.thread([&] {
      Word(&data).store(7, kRelaxed);
      Word(&flag).store(1, publish);
    });
    run.thread([&] {
      a = Word(&flag).load(look);
      b = Word(&data).load(kRelaxed);
    });
    run.at_rest([&] { seen.insert({a, b}); });
  });
  return seen;
}

}  // namespace

TEST_CASE("a message passes by release and acquire only") {
  const std::pair<uint64_t, uint64_t> lost{1, 0}, nothing{0, 0}, early{0, 7}, whole{1, 7};
  for (const auto& [publish, look] : {std::pair(kRelaxed, kRelaxed), std::pair(kRelease, kRelaxed),
                                      std::pair(kRelaxed, kAcquire), std::pair(kRelaxed, kSequential)}) {
    CHECK(messages(publish, look) == std::set{lost, nothing, early, whole});
  }
  for (const auto& [publish, look] :
       {std::pair(kRelease, kAcquire), std::pair(kSequential, kAcquire), std::pair(kRelease, kSequential)}) {
    CHECK(messages(publish, look) == std::set{nothing, early, whole});
  }
}

TEST_CASE("store buffering: both loads miss, unless all is seq_cst") {
  const auto both = [](std::memory_order store, std::memory_order load) {
    return outcomes(
        [=](Word x, Word y) {
          x.store(1, store);
          return y.load(load);
        },
        [=](Word x, Word y) {
          y.store(1, store);
          return x.load(load);
        });
  };
  const std::pair<uint64_t, uint64_t> neither{0, 0};
  CHECK(both(kRelaxed, kRelaxed).count(neither) == 1);
  CHECK(both(kRelease, kAcquire).count(neither) == 1);
  CHECK(both(kSequential, kAcquire).count(neither) == 1);
  CHECK(both(kSequential, kSequential) == std::set<std::pair<uint64_t, uint64_t>>{{0, 1}, {1, 0}, {1, 1}});
}

TEST_CASE("store buffering by exchanges on acq_rel still misses") {
  const auto seen = outcomes(
      [](Word x, Word y) {
        x.exchange(1, kBoth);
        return y.load(kAcquire);
      },
      [](Word x, Word y) {
        y.exchange(1, kBoth);
        return x.load(kAcquire);
      });
  CHECK(seen.count({0, 0}) == 1);
}

TEST_CASE("two writers of two words may both lose the first one, unless all is seq_cst or they have met") {
  const auto finals = [](std::memory_order order, bool meet) {
    std::set<std::pair<uint64_t, uint64_t>> seen;
    uint64_t x = 0, y = 0, lock = 0;
    explore(quiet(4000), [&](Run& run) {
      x = y = lock = 0;
      for (int thread = 0; thread < 2; ++thread) {
        run.thread([&, thread, meet, order] {
          if (meet && Word(&lock).exchange(1, kAcquire) != 0) return;
          Word(thread == 0 ? &x : &y).store(1, order);
          Word(thread == 0 ? &y : &x).store(2, order);
          if (meet) Word(&lock).store(0, kRelease);
        });
      }
      run.at_rest([&] { seen.insert({x, y}); });
    });
    return seen;
  };
  const std::pair<uint64_t, uint64_t> both{1, 1};
  CHECK(finals(kRelaxed, false).count(both) == 1);
  CHECK(finals(kRelease, false).count(both) == 1);
  CHECK(finals(kSequential, false).count(both) == 0);
  CHECK(finals(kRelaxed, true).count(both) == 0);
}

TEST_CASE("one location never goes backwards, two may") {
  std::set<std::pair<uint64_t, uint64_t>> seen;
  uint64_t x = 0, a = 0, b = 0;
  explore(quiet(4000), [&](Run& run) {
    x = a = b = 0;
    run.thread([&] {
      Word(&x).store(1, kRelaxed);
      Word(&x).store(2, kRelaxed);
    });
    run.thread([&] {
      a = Word(&x).load(kRelaxed);
      b = Word(&x).load(kRelaxed);
    });
    run.at_rest([&] {
      CHECK(a <= b);
      CHECK(x == 2);
      seen.insert({a, b});
    });
  });
  CHECK(seen.size() == 6);
}

TEST_CASE("a thread sees its own stores, and those that happened before what it acquired") {
  uint64_t x = 0, y = 0, z = 0;
  const Explored explored = explore(quiet(4000), [&](Run& run) {
    x = y = z = 0;
    run.thread([&] {
      Word(&x).store(1, kRelaxed);
      require(Word(&x).load(kRelaxed) == 1, "own store");
      Word(&y).store(1, kRelease);
    });
    run.thread([&] {
      if (Word(&y).load(kAcquire) == 1) Word(&z).store(1, kRelease);
    });
    run.thread([&] {
      if (Word(&z).load(kAcquire) == 1) require(Word(&x).load(kRelaxed) == 1, "happened before, by a third thread");
    });
  });
  CHECK_FALSE(explored.failed);
}

TEST_CASE("load and store lose an update, fetch_add and compare-exchange do not") {
  enum Way { kLoadStore, kAdd, kSwapWeak, kSwapStrong };
  const auto sums = [](Way way) {
    std::set<uint64_t> seen;
    uint64_t x = 0;
    explore(quiet(3000), [&](Run& run) {
      x = 0;
      for (int thread = 0; thread < 3; ++thread) {
        run.thread([&x, way] {
          const Word word(&x);
          if (way == kLoadStore) word.store(word.load(kRelaxed) + 1, kRelaxed);
          if (way == kAdd) word.fetch_add(1, kRelaxed);
          uint64_t seen_value = word.load(kRelaxed);
          while (way == kSwapWeak && !word.compare_exchange_weak(seen_value, seen_value + 1, kRelaxed, kRelaxed)) {
          }
          while (way == kSwapStrong && !word.compare_exchange_strong(seen_value, seen_value + 1, kRelaxed, kRelaxed)) {
          }
        });
      }
      run.at_rest([&] { seen.insert(x); });
    });
    return seen;
  };
  CHECK(sums(kLoadStore) == std::set<uint64_t>{1, 2, 3});
  CHECK(sums(kAdd) == std::set<uint64_t>{3});
  CHECK(sums(kSwapWeak) == std::set<uint64_t>{3});
  CHECK(sums(kSwapStrong) == std::set<uint64_t>{3});
}

TEST_CASE("a release sequence goes on through a relaxed read-modify-write and ends at a plain store") {
  const auto lost = [](bool by_add) {
    bool found = false;
    uint64_t data = 0, flag = 0;
    explore(quiet(6000), [&](Run& run) {
      data = flag = 0;
      run.thread([&] {
        Word(&data).store(7, kRelaxed);
        Word(&flag).store(1, kRelease);
      });
      run.thread([&, by_add] {
        if (Word(&flag).load(kRelaxed) != 1) return;
        if (by_add) {
          Word(&flag).fetch_add(1, kRelaxed);
        } else {
          Word(&flag).store(2, kRelaxed);
        }
      });
      run.thread([&] {
        if (Word(&flag).load(kAcquire) == 2 && Word(&data).load(kRelaxed) == 0) found = true;
      });
    });
    return found;
  };
  CHECK_FALSE(lost(true));
  CHECK(lost(false));
}

TEST_CASE("two readers disagree on the order of two writers, unless all is seq_cst") {
  const auto disagree = [](std::memory_order store, std::memory_order load) {
    bool found = false;
    uint64_t x = 0, y = 0, a = 0, b = 0, c = 0, d = 0;
    explore(quiet(8000), [&](Run& run) {
      x = y = a = b = c = d = 0;
      run.thread([&] { Word(&x).store(1, store); });
      run.thread([&] { Word(&y).store(1, store); });
      run.thread([&] {
        a = Word(&x).load(load);
        b = Word(&y).load(load);
      });
      run.thread([&] {
        c = Word(&y).load(load);
        d = Word(&x).load(load);
      });
      run.at_rest([&] { found = found || (a == 1 && b == 0 && c == 1 && d == 0); });
    });
    return found;
  };
  CHECK(disagree(kRelease, kAcquire));
  CHECK_FALSE(disagree(kSequential, kSequential));
}

TEST_CASE("a weak exchange may fail on the right value, a strong one may not; both may fail on an old one") {
  const auto failures = [](bool weak) {
    std::set<uint64_t> seen;
    uint64_t x = 0;
    explore(quiet(4000), [&](Run& run) {
      x = 0;
      run.thread([&] { Word(&x).store(1, kRelaxed); });
      run.thread([&, weak] {
        uint64_t expected = 1;
        const Word word(&x);
        const bool done = weak ? word.compare_exchange_weak(expected, 5, kRelaxed, kRelaxed)
                               : word.compare_exchange_strong(expected, 5, kRelaxed, kRelaxed);
        if (!done) seen.insert(expected);
      });
    });
    return seen;
  };
  CHECK(failures(true) == std::set<uint64_t>{0, 1});
  CHECK(failures(false) == std::set<uint64_t>{0});
}

TEST_CASE("without old values only interleavings remain") {
  Exploration exploration = quiet(4000);
  exploration.stale = false;
  bool missed = false;
  uint64_t x = 0, y = 0, a = 0, b = 0;
  explore(exploration, [&](Run& run) {
    x = y = 0;
    run.thread([&] {
      Word(&x).store(1, kRelaxed);
      a = Word(&y).load(kRelaxed);
    });
    run.thread([&] {
      Word(&y).store(1, kRelaxed);
      b = Word(&x).load(kRelaxed);
    });
    run.at_rest([&] { missed = missed || (a == 0 && b == 0); });
  });
  CHECK_FALSE(missed);
}

TEST_CASE("words of one, four and eight bytes keep their signs and their neighbours") {
  alignas(8) uint8_t bytes[16] = {};
  uint8_t* const small = bytes;
  uint32_t* const middle = reinterpret_cast<uint32_t*>(bytes + 4);
  int64_t* const large = reinterpret_cast<int64_t*>(bytes + 8);
  const auto use = [&] {
    ScheduledWord<uint8_t>(small).fetch_sub(1, kRelaxed);
    ScheduledWord<uint32_t>(middle).fetch_sub(2, kRelaxed);
    require(ScheduledWord<int64_t>(large).fetch_add(-3, kRelaxed) <= 0, "a negative sum stays negative");
  };
  const Explored explored = explore(quiet(20), [&](Run& run) {
    *small = 0;
    *middle = 0;
    *large = 0;
    run.thread(use);
    run.thread(use);
    run.at_rest([&] {
      CHECK(*small == 254);
      CHECK(*middle == 0xFFFFFFFCu);
      CHECK(*large == -6);
      CHECK(bytes[1] == 0);
    });
  });
  CHECK_FALSE(explored.failed);
  use();  // outside of a run: plain atomics
  CHECK(*large == -9);
  const Explored mixed = explore(quiet(1), [&](Run& run) {
    run.thread([&] {
      ScheduledWord<uint8_t>(small).load(kRelaxed);
      ScheduledWord<uint32_t>(reinterpret_cast<uint32_t*>(small)).load(kRelaxed);
    });
  });
  CHECK(mixed.failed);
}

TEST_CASE("a failure names its seed, and the seed runs the same again") {
  uint64_t x = 0;
  std::vector<int> order;
  const auto build = [&](Run& run) {
    x = 0;
    order.clear();
    run.name(&x, 1, 8, "counter");
    for (int thread = 0; thread < 3; ++thread) {
      run.thread([&, thread] {
        for (int i = 0; i < 3; ++i) {
          const uint64_t seen = Word(&x).load(kRelaxed);
          order.push_back(thread);
          Word(&x).store(seen + 1, kRelaxed);
        }
      });
    }
    run.at_rest([&] { require(x != 3, "x is not 3"); });
  };
  const Explored first = explore(quiet(5000), build);
  REQUIRE(first.failed);
  CHECK(first.message == "x is not 3");
  CHECK(first.trace.find("counter") != std::string::npos);
  const std::vector<int> order_of_first = order;
  Exploration again = quiet(1);
  again.first_seed = first.seed;
  const Explored second = explore(again, build);
  CHECK(second.failed);
  CHECK(second.trace == first.trace);
  CHECK(order == order_of_first);
}

TEST_CASE("exceptions and endless waits fail a run") {
  uint64_t x = 0;
  const Explored thrown = explore(quiet(10), [&](Run& run) {
    run.thread([&] {
      Word(&x).load(kRelaxed);
      throw std::runtime_error("out of a body");
    });
  });
  CHECK(thrown.failed);
  CHECK(thrown.message.find("out of a body") != std::string::npos);
  Exploration short_runs = quiet(10);
  short_runs.max_steps = 500;
  const Explored waiting = explore(short_runs, [&](Run& run) {
    x = 0;
    for (int thread = 0; thread < 2; ++thread) {
      run.thread([&] {
        while (Word(&x).load(kRelaxed) == 0) {
        }
      });
    }
  });
  CHECK(waiting.failed);
  CHECK(waiting.message.find("500") != std::string::npos);
  // A spin lock is found out: with priorities its holder is passed over for ever.
  short_runs.seeds = 300;
  const Explored locked = explore(short_runs, [&](Run& run) {
    x = 0;
    for (int thread = 0; thread < 2; ++thread) {
      run.thread([&] {
        while (Word(&x).exchange(1, kAcquire) != 0) {
        }
        Word(&x).store(0, kRelease);
      });
    }
  });
  CHECK(locked.failed);
  CHECK_THROWS_AS(fail("outside"), std::logic_error);
}

TEST_CASE("exceptions cross switches in each thread by themselves") {
  uint64_t x = 0;
  const Explored explored = explore(quiet(500), [&](Run& run) {
    for (int thread = 0; thread < 3; ++thread) {
      run.thread([&, thread] {
        for (int i = 0; i < 3; ++i) {
          try {
            Word(&x).fetch_add(1, kRelaxed);
            throw thread;
          } catch (const int caught) {
            Word(&x).fetch_add(1, kRelaxed);
            try {
              throw i;
            } catch (const int inner) {
              Word(&x).fetch_add(1, kRelaxed);
              require(inner == i, "the inner exception");
            }
            require(caught == thread, "the outer exception");
          }
        }
      });
    }
  });
  CHECK_FALSE(explored.failed);
}

TEST_CASE("a killed thread leaves what it did before and nothing else, and may die anywhere") {
  std::set<uint64_t> seen;
  uint64_t x = 0, y = 0;
  uint64_t deaths = 0;
  const Explored explored = explore(quiet(2000), [&](Run& run) {
    x = y = 0;
    run.mortal_thread([&] {
      for (uint64_t i = 1; i <= 4; ++i) {
        Word(&x).store(i, kRelaxed);
        require(Word(&x).load(kRelaxed) == i, "it reads what it wrote, dead or not");
      }
      uint64_t expected = 4;
      require(Word(&x).compare_exchange_strong(expected, 5, kRelaxed, kRelaxed), "and swaps it");
      require(Word(&x).fetch_add(0, kRelaxed) == 5, "and adds to it");
      deaths += killed() ? 1 : 0;
      if (killed()) fail("dropped");
    });
    run.thread([&] {
      Word(&y).fetch_add(1, kRelaxed);
      require(!killed(), "the other lives");
    });
    run.at_rest([&] {
      seen.insert(x);
      CHECK(y == 1);
    });
  });
  CHECK_FALSE(explored.failed);
  CHECK(seen == std::set<uint64_t>{0, 1, 2, 3, 4, 5});
  CHECK(deaths > 500);
  CHECK(deaths < 2000);
}

TEST_CASE("rewind puts memory back, and local objects are each thread's own") {
  uint64_t x = 11;
  Exploration exploration = quiet(50);
  exploration.rewind = true;
  struct Own {
    uint64_t thread = ~0ull;
  };
  const Explored explored = explore(exploration, [&](Run& run) {
    CHECK(x == 11);
    for (size_t thread = 0; thread < 3; ++thread) {
      run.thread([&, thread] {
        scheduled_local<Own>().thread = thread;
        Word(&x).fetch_add(1, kRelaxed);
        require(scheduled_thread() == thread && scheduled_local<Own>().thread == thread, "its own");
      });
    }
    run.at_rest([&] { CHECK(x == 14); });
  });
  CHECK_FALSE(explored.failed);
  CHECK(x == 11);
}

TEST_CASE("hundreds of locations and stores per run are kept apart from run to run") {
  std::vector<uint64_t> words(3000, 0);
  const Explored explored = explore(quiet(20), [&](Run& run) {
    std::fill(words.begin(), words.end(), 0);
    for (int thread = 0; thread < 2; ++thread) {
      run.thread([&] {
        for (auto& word : words) Word(&word).fetch_add(1, kBoth);
      });
    }
    run.at_rest([&] {
      for (const auto& word : words) require(word == 2, "each word was added to twice");
    });
  });
  CHECK_FALSE(explored.failed);
  CHECK(explored.steps == 20 * 6000);
}
