// A small replay under the scheduler, with rows whose every byte follows from one number, and a record of what its
// callers were told, against which the buffer is checked at rest.
#pragma once
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "core/replay.h"
#include "scheduled.h"

namespace angle::testing {

struct ScheduledAccess : WordAccessT<ScheduledWord> {
  template <class S>
  static S& own() {
    return scheduled_local<S>();
  }
  static size_t lane() { return 0; }  // so that all threads want the same set of counts
};

}  // namespace angle::testing

namespace angle {
// In schedule_core.cpp.
extern template class ReplayT<testing::ScheduledAccess>;
extern template size_t ReplayT<testing::ScheduledAccess>::update<float>(const int64_t*, const float*, size_t);
}  // namespace angle

namespace angle::testing {

struct WorldOptions {
  uint64_t capacity = 4;
  bool prioritized = true;
  bool share = false;
  uint32_t frames = 1;         // above 1: stacks, with share only
  uint32_t episode = 0;        // rows an episode; every second one is truncated; 0: no episode ends
  double exponent = 1.0;       // so that weights are priorities in units
  double epsilon = 0.0;        // so that a priority of 0 weighs nothing
  bool may_be_empty = false;   // sample may find no row
  bool may_lose_rows = false;  // stacks: a row whose older frames were overwritten is taken out
};

// The replay, its callers' record and the checks. The row of number v has the observation v, the reward v and the
// successor v + 1, or another where its episode ends; its stream is v / 1000. Each number is inserted once.
class World {
 public:
  explicit World(const WorldOptions& options);

  // ---- calls, from a logical thread or outside of a run ----

  // Rows v, v + 1, ... of one call; all of them new. Returns their handles, or nothing when the thread was killed.
  std::vector<int64_t> insert(uint32_t first, size_t n = 1, const std::vector<float>& priorities = {});
  // Draws and checks the rows; returns their handles.
  std::vector<int64_t> sample(size_t n, uint32_t n_step = 1, bool replacement = true, bool bound_by_buffer = false);
  void update(const std::vector<int64_t>& handles, const std::vector<float>& td_errors);
  void remove(int64_t handle);
  void set_exponent(double exponent);
  void read_rows();

  // ---- around runs ----

  // Ends the setup: begin() goes back to this point.
  void keep();
  // Before each run: memory and record as at keep(), the sampler's seed that of the run, names for the trace.
  void begin(Run& run);
  // At rest. After a run with killed threads the buffer is repaired, checked again and used.
  void check();

  ReplayT<ScheduledAccess>& replay() { return replay_; }
  std::map<uint32_t, uint64_t>& counts() { return counts_; }  // draws by row number; begin() leaves them alone

 private:
  struct Drawn {
    int64_t handle;
    uint32_t value;
    uint32_t steps;
  };
  struct Record {
    std::map<int64_t, uint32_t> rows;                    // handle to number, of inserts that returned
    std::map<uint32_t, int64_t> handles;                 // and back
    std::set<uint32_t> begun;                            // numbers whose insert was called
    std::map<int64_t, std::set<float>> asked, accepted;  // priorities by handle
    std::set<int64_t> removed, remove_asked;
    std::map<int64_t, float> given;  // priorities given at insert
    std::vector<Drawn> drawn;
    bool exponent_changed = false;
    uint64_t refused = 0, samples = 0, removals = 0, updates = 0, calls = 0, returned = 0;
  };

  size_t frame_words() const { return 3; }
  size_t observation_words() const { return frame_words() * options_.frames; }
  bool ends(uint32_t v) const { return options_.episode != 0 && v % 1000 % options_.episode == options_.episode - 1; }
  bool terminates(uint32_t v) const { return ends(v) && v % 1000 / options_.episode % 2 == 0; }
  void fill(uint32_t v, bool successor, uint32_t* out) const;
  bool shows(uint32_t v, bool successor, const uint32_t* words) const;
  uint64_t leaf(uint64_t slot) const;
  int64_t ticket_at(uint64_t slot) const;  // of the slot's leaf; -1: never written
  bool quiet_parts_agree() const;
  void check_draws();
  void check_slots(bool after_deaths);
  void check_sums();
  void check_counters();
  void use_after_repair();

  struct Part {
    size_t at, bytes;
  };
  std::vector<Part> parts() const;

  WorldOptions options_;
  ReplayT<ScheduledAccess> replay_;
  Record record_, kept_;
  std::vector<uint8_t> memory_;
  std::set<uint32_t> known_;  // rows of the setup
  std::map<uint32_t, uint64_t> counts_;
};

}  // namespace angle::testing
