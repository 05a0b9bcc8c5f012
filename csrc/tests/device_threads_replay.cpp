// Random calls on a replay of the host's and, by the device's kernels, on a second one in memory of the same layout:
// the same batches, and after each call the same memory.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>

#include "core/priorities.h"
#include "core/replay.h"
#include "cuda/replay_params.h"
#include "device_threads.h"

namespace angle::testing {
namespace {

using namespace device;

struct Plan {
  const char* name;
  uint64_t capacity;
  bool prioritized;
  bool shares;
  uint32_t stack;
  uint64_t calls;
  uint64_t most_rows;  // of one insert
  uint64_t most_draws;
  uint64_t most_handles;
  DefaultPriority kind = DefaultPriority::kLiveMaximum;
  double epsilon = 1e-6;
};

constexpr uint32_t kFrame = 15;          // bytes of one, no multiple of a word
constexpr size_t kJoints = 3;            // float64
constexpr uint64_t kWho = 4;             // streams in use
constexpr uint64_t kMostDistinct = 520;  // more than a block takes at once
constexpr uint8_t kUntouched = 0xCC;

RecordLayout layout_of(const Plan& plan, bool wide_reward) {
  const uint32_t look = kFrame * plan.stack, reward = wide_reward ? 8 : 4;
  RowRoles roles;
  roles.observations = 2;
  roles.reward = 3;
  roles.share_successors = plan.shares;
  return RecordLayout({{"look", 1, look, plan.stack},
                       {"joints", 8, 8 * kJoints},
                       {"actions", 2, 6},
                       {"rewards", reward, reward},
                       {"next look", 1, look, plan.stack},
                       {"next joints", 8, 8 * kJoints}},
                      roles);
}

ReplayOptions options_of(const Plan& plan) {
  ReplayOptions options;
  options.capacity = plan.capacity;
  options.prioritized = plan.prioritized;
  options.priority_epsilon = plan.epsilon;
  options.default_kind = plan.kind;
  options.default_priority = 0.5;
  options.seed = plan.capacity;
  return options;
}

// What one stream shows.
struct Look {
  std::vector<uint8_t> frames;
  double joints[kJoints];
};

struct Columns {
  explicit Columns(const RecordLayout& record, size_t n) {
    for (const Field& field : record.fields) of.emplace_back(n * field.bytes, kUntouched);
  }
  std::vector<uint8_t*> addresses() {
    std::vector<uint8_t*> out;
    for (auto& column : of) out.push_back(column.data());
    return out;
  }
  std::vector<std::vector<uint8_t>> of;
};

struct Batch {
  Batch(const RecordLayout& record, size_t n)
      : columns(record, n), discounts(n, -7.0f), importance_weights(n, -7.0f), handles(n, -7), steps(n, -7) {}
  bool operator==(const Batch& other) const {
    return columns.of == other.columns.of && discounts == other.discounts &&
           importance_weights == other.importance_weights && handles == other.handles && steps == other.steps;
  }
  Columns columns;
  std::vector<float> discounts, importance_weights;
  std::vector<int64_t> handles, steps;
};

class Pair {
 public:
  Pair(const Plan& plan, uint64_t seed)
      : plan_(plan),
        choose_(seed),
        wide_reward_(seed % 2 == 1),
        host_(options_of(plan), layout_of(plan, wide_reward_)),
        there_(options_of(plan), layout_of(plan, wide_reward_)),
        record_(host_.record()) {
    const SegmentLayout& at = there_.layout();
    view_.segment = there_.segment();
    view_.capacity = at.capacity;
    view_.record_bytes = at.record_bytes;
    view_.streams_at = at.streams_at;
    view_.leaves_at = at.leaves_at;
    view_.records_at = at.records_at;
    view_.levels = static_cast<uint32_t>(at.tree.levels);
    std::copy_n(at.sums_at, at.tree.levels, view_.sums_at);
    std::copy_n(at.tree.shift, at.tree.levels, view_.shift);
    view_.top_nodes = at.tree.nodes[at.tree.levels - 1];
    view_.weight_bits = at.tree.weight_bits;
    view_.stack = record_.stack;
    view_.shares_successors = plan.shares ? 1 : 0;
    make_scratch();
    for (uint64_t stream = 0; stream < kWho; ++stream) looks_.push_back(reset());
  }

  void run() {
    for (uint64_t call = 0; call < plan_.calls; ++call) {
      const auto step = [&](const char* what) {
        present() = std::string(plan_.name) + ", capacity " + std::to_string(plan_.capacity) + ", call " +
                    std::to_string(call) + ", " + what;
      };
      step("insert");
      insert(up_to(std::min(plan_.capacity, plan_.most_rows), call), call % 5 == 4);
      check();
      const uint64_t usable = usable_rows();
      if (usable > 0 || plan_.prioritized) {
        step("draw");
        draw(up_to(plan_.most_draws, call), true, call % 4 == 2);
        step("draw without replacement");
        const uint64_t most = std::min(plan_.most_draws / 3 + 1, kMostDistinct);
        draw(up_to(std::min(most, usable + usable / 16 + 1), call), false, call % 4 == 3);
        check();
      }
      if (plan_.prioritized) {
        step("update");
        update(up_to(plan_.most_handles, call), call % 4 == 1, call % 4 == 3);
        check();
      }
      if (call % 2 == 1 && (plan_.prioritized || usable > 4)) {
        step("remove");
        remove(choose_.between(1, 3), call % 4 == 3);
        check();
      }
      if (plan_.prioritized && call % 4 == 2) {
        step("reweigh");
        reweigh(0.2 + 0.2 * static_cast<double>(choose_.below(4)));
        check();
      }
    }
    present() = std::string(plan_.name) + ", capacity " + std::to_string(plan_.capacity) + ", at the end";
    if (!plan_.prioritized && !plan_.shares && plan_.capacity > 100) leave_few();
    require(there_.audit().empty(), "that nothing is off");
    const ReplayStats s = host_.stats();
    std::printf("%s capacity %llu: %llu rows in, %llu drawn, %llu updated, %llu refused, %llu removed\n", plan_.name,
                static_cast<unsigned long long>(plan_.capacity), static_cast<unsigned long long>(s.inserts),
                static_cast<unsigned long long>(s.samples), static_cast<unsigned long long>(s.updates),
                static_cast<unsigned long long>(s.refused_updates), static_cast<unsigned long long>(s.removed));
  }

 private:
  SegmentHeader& header(const Replay& replay) const { return *reinterpret_cast<SegmentHeader*>(replay.segment()); }

  void make_scratch() {
    scratch_ = std::make_unique<ReplayScratch>();
    scratch_->smallest = ~0ull;
    const PriorityMap map{host_.priority_exponent(), plan_.epsilon,
                          LeafCode(there_.layout().tree.weight_bits).weight_mask};
    for (size_t bucket = 0; bucket < kBuckets; ++bucket) {
      scratch_->bucket_priority[bucket] = map.priority(std::min(WeightBuckets::upper_edge(bucket), map.largest));
    }
  }

  // The first calls are as large as they get.
  uint64_t up_to(uint64_t most, uint64_t call) { return call == 0 ? most : choose_.between(1, most); }

  // ---- rows ----

  Look reset() {
    Look look{std::vector<uint8_t>(kFrame * plan_.stack, static_cast<uint8_t>(choose_.below(3))), {}};
    if (choose_.chance(20)) {  // frames of another past
      for (uint8_t& byte : look.frames) byte = static_cast<uint8_t>(choose_.below(3));
    }
    return look;
  }

  void go_on(Look& look) {
    std::copy(look.frames.begin() + kFrame, look.frames.end(), look.frames.begin());
    std::fill(look.frames.end() - kFrame, look.frames.end(), static_cast<uint8_t>(choose_.below(3)));
    for (double& joint : look.joints) {
      joint = choose_.chance(2) ? std::numeric_limits<double>::quiet_NaN() : static_cast<double>(choose_.below(3));
    }
  }

  void show(const Look& look, Columns& columns, size_t field, size_t row) const {
    std::copy(look.frames.begin(), look.frames.end(), columns.of[field].data() + row * look.frames.size());
    std::memcpy(columns.of[field + 1].data() + row * sizeof look.joints, look.joints, sizeof look.joints);
  }

  static bool has_nan(const Look& look) {
    return std::any_of(look.joints, look.joints + kJoints, [](double joint) { return joint != joint; });
  }

  void set_reward(Columns& columns, size_t row, double reward) const {
    if (wide_reward_) {
      std::memcpy(columns.of[3].data() + row * 8, &reward, 8);
    } else {
      const float narrow = static_cast<float>(reward);
      std::memcpy(columns.of[3].data() + row * 4, &narrow, 4);
    }
  }

  void insert(size_t n, bool bad) {
    Columns columns(record_, n);
    std::vector<uint8_t> terminated(n), truncated(n);
    std::vector<int64_t> streams(n), handles(n, -7), theirs(n, -7);
    std::vector<float> priorities(n);
    const bool single = choose_.chance(30), graded = choose_.chance(25);
    size_t nan_rows = 0;
    const std::vector<Look> before = looks_;
    for (size_t row = 0; row < n; ++row) {
      streams[row] = single ? 0 : static_cast<int64_t>(choose_.below(kWho));
      Look& look = looks_[static_cast<size_t>(streams[row])];
      bool nan = has_nan(look);
      show(look, columns, 0, row);
      go_on(look);
      show(look, columns, 4, row);
      nan_rows += nan || has_nan(look);
      for (size_t i = 0; i < 6; ++i) columns.of[2][6 * row + i] = static_cast<uint8_t>(choose_.below(256));
      set_reward(columns, row, choose_.share() - 0.5);
      terminated[row] = choose_.chance(10);
      truncated[row] = choose_.chance(10);
      if (terminated[row] != 0 || truncated[row] != 0 || choose_.chance(10)) look = reset();
      priorities[row] = static_cast<float>(-std::log(1.0 - choose_.share()));
    }
    if (bad) set_reward(columns, choose_.below(n), std::numeric_limits<double>::infinity());

    InsertParams p{};
    p.view = view_;
    p.scratch = scratch_.get();
    p.flags = &flags_;
    for (size_t f = 0; f < record_.fields.size(); ++f) {
      const Field& field = record_.fields[f];
      p.fields[p.field_count++] = {columns.of[f].data(), field.offset, field.bytes, field.frames,
                                   f % 4 == 1 ? FieldReal::kDouble : FieldReal::kNone};
    }
    p.observations = 2;
    p.rows_per_warp = static_cast<uint32_t>(n > 500 ? 32 : choose_.between(1, 8));
    p.n = n;
    p.first_ticket = there_.next_ticket();
    p.terminated = terminated.data();
    p.truncated = truncated.data();
    p.priorities = graded ? priorities.data() : nullptr;
    p.rewards = columns.of[3].data();
    p.reward = wide_reward_ ? FieldReal::kDouble : FieldReal::kFloat;
    std::vector<int32_t> next(n, -1), last(n, -1), previous(n, -1);
    std::vector<int64_t> first_of(kWho, -1), newest_of(kWho, -1);
    for (size_t row = 0; row < n; ++row) {
      int64_t &first = first_of[static_cast<size_t>(streams[row])],
              &newest = newest_of[static_cast<size_t>(streams[row])];
      if (first < 0) first = static_cast<int64_t>(row);
      if (newest >= 0) {
        next[static_cast<size_t>(newest)] = static_cast<int32_t>(row);
        previous[row] = static_cast<int32_t>(newest);
      }
      newest = static_cast<int64_t>(row);
      last[static_cast<size_t>(first)] = static_cast<int32_t>(row);
    }
    if (!single || choose_.chance(50)) {
      p.streams = streams.data();
      p.next = next.data();
      p.last = last.data();
      p.previous = previous.data();
    }
    std::vector<RowLooks> looks(n);
    std::vector<RecordWrite> writes(n * (1 + 2 * uint64_t{view_.stack}));
    p.looks = looks.data();
    p.writes = writes.data();
    p.handles = theirs.data();
    require(angle_replay_insert(&p, nullptr) == 0, "that it is launched");

    if (bad) {
      told(ReplayFlags::kBadReward);
      looks_ = before;
      if (plan_.shares) return;
      header(host_).next_ticket += n;
      header(host_).busy_slots += n;
      return;
    }
    const auto addresses = columns.addresses();
    const std::vector<const uint8_t*> in(addresses.begin(), addresses.end());
    host_.insert({n, in.data(), terminated.data(), truncated.data(), p.streams, nan_rows, p.priorities},
                 handles.data());
    if (!plan_.shares) {
      for (size_t row = 0; row < n; ++row) theirs[row] = static_cast<int64_t>(p.first_ticket + row);
    }
    require(handles == theirs, "that handles are the same");
    handles_.insert(handles_.end(), handles.begin(), handles.end());
    const size_t kept = 3 * plan_.capacity + 9;
    if (handles_.size() > kept) handles_.erase(handles_.begin(), handles_.end() - static_cast<ptrdiff_t>(kept));
  }

  // ---- batches ----

  void draw(size_t n, bool replacement, bool left_out) {
    SampleRequest request;
    request.n = n;
    request.discount = choose_.chance(30) ? 1.0 : 0.9;
    request.importance_exponent = 0.4 * static_cast<double>(choose_.below(3));
    request.n_step = static_cast<uint32_t>(choose_.between(1, 5));
    request.stratified = choose_.chance(50);
    request.replacement = replacement;
    request.bound_by_buffer = choose_.chance(30);
    if (choose_.chance(30)) request.key = choose_.below(1000);
    Batch own(record_, n), theirs(record_, n);
    const uint8_t where = left_out ? 0 : 1;

    SampleParams p{};
    p.view = view_;
    p.scratch = scratch_.get();
    p.flags = &flags_;
    for (size_t f = 0; f < record_.fields.size(); ++f) {
      const Field& field = record_.fields[f];
      if (request.n_step > 1 && f == 3) continue;
      p.fields[p.field_count++] = {theirs.columns.of[f].data(), field.offset, field.bytes, field.frames,
                                   f >= 4 ? 1u : 0u};
    }
    p.draws_per_warp = static_cast<uint32_t>(n > 200 ? 32 : choose_.between(1, 8));
    p.n = n;
    p.n_step = request.n_step;
    if (request.stratified) p.how |= SampleParams::kStratified;
    if (request.bound_by_buffer) p.how |= SampleParams::kBoundByBuffer;
    if (request.key.has_value()) {
      p.how |= SampleParams::kKeyed;
      p.key = *request.key;
    }
    const double live[2] = {request.discount, request.importance_exponent};
    if (choose_.chance(50)) {
      p.live = live;
    } else {
      p.discount = request.discount;
      p.importance_exponent = request.importance_exponent;
    }
    p.rewards = theirs.columns.of[3].data();
    p.reward_offset = record_.fields[3].offset;
    p.reward = wide_reward_ ? FieldReal::kDouble : FieldReal::kFloat;
    p.discounts = theirs.discounts.data();
    p.importance_weights = theirs.importance_weights.data();
    p.handles = theirs.handles.data();
    p.steps = theirs.steps.data();
    std::vector<uint64_t> drawn(n), chosen, taken, rows;
    p.drawn = drawn.data();
    if (!replacement) {
      p.taken_places = std::bit_ceil(2 * n * (plan_.prioritized ? view_.levels + 1 : 1));
      chosen.resize(n);
      taken.resize(2 * p.taken_places);
      rows.resize(plan_.prioritized ? 0 : plan_.capacity);
      p.chosen = chosen.data();
      p.taken = taken.data();
      p.rows = rows.data();
    }
    if (left_out || choose_.chance(50)) p.where = &where;
    require(angle_replay_sample(&p, nullptr) == 0, "that it is launched");

    if (!left_out) {
      const auto fields = own.columns.addresses();
      try {
        host_.sample(request, {fields.data(), own.discounts.data(), own.importance_weights.data(), own.handles.data(),
                               own.steps.data()});
      } catch (const NothingToSample&) {
        told(usable_rows() == 0 ? ReplayFlags::kNothingToSample : ReplayFlags::kTooFew);
        require(theirs.handles == std::vector<int64_t>(n, -1), "that there are no rows in the batch");
        return;
      }
    }
    require(own == theirs, "that the batches are the same");
  }

  uint64_t usable_rows() const {
    std::vector<int64_t> weights(plan_.capacity);
    host_.read_weights(weights.data());
    return plan_.capacity - static_cast<uint64_t>(std::count(weights.begin(), weights.end(), 0));
  }

  // Few rows among many removed: attempts meet none, and draws go on from a list.
  void leave_few() {
    const std::vector<int64_t> gone(handles_.begin() + 6, handles_.end());
    remove(gone);
    for (const size_t n : {4, 6, 9}) draw(n, false, false);
    draw(9, true, false);
    check();
  }

  // ---- priorities ----

  std::vector<int64_t> some_handles(size_t n) {
    std::vector<int64_t> handles(n, 0);
    for (int64_t& handle : handles) {
      if (!handles_.empty()) handle = handles_[choose_.below(handles_.size())];
    }
    return handles;
  }

  void update(size_t n, bool bad, bool left_out) {
    if (handles_.empty()) return;
    std::vector<int64_t> handles = some_handles(n);
    std::vector<double> wide(n);
    std::vector<float> narrow(n);
    for (size_t i = 0; i < n; ++i) {
      narrow[i] = choose_.chance(5) ? 0.0f : static_cast<float>(-std::log(1.0 - choose_.share()));
      wide[i] = static_cast<double>(narrow[i]);
    }
    const bool is_double = choose_.chance(50), bad_handle = choose_.chance(50);
    const size_t where_bad = choose_.below(n);
    if (bad && bad_handle) handles[where_bad] = static_cast<int64_t>(there_.next_ticket() + choose_.below(9));
    if (bad && !bad_handle) narrow[where_bad] = -1.0f;
    if (bad && !bad_handle) wide[where_bad] = std::numeric_limits<double>::quiet_NaN();
    const uint8_t where = left_out ? 0 : 1;
    int64_t refused = 0;
    std::vector<uint64_t> claims;
    uint64_t count = 0;
    if (n > kFewHandles) {
      count = std::bit_ceil(2 * n);
      claims.resize(2 + count);
    }
    const void* const td_errors = is_double ? static_cast<const void*>(wide.data()) : narrow.data();
    const UpdateParams p{view_,
                         scratch_.get(),
                         &flags_,
                         handles.data(),
                         td_errors,
                         n,
                         claims.data(),
                         count,
                         &refused,
                         left_out || choose_.chance(50) ? &where : nullptr,
                         is_double ? 1u : 0u};
    require(angle_replay_update(&p, nullptr) == 0, "that it is launched");
    if (left_out) {
      require(refused == 0, "that nothing is refused");
      return;
    }
    if (bad) {
      told(bad_handle ? ReplayFlags::kUnknownHandle : ReplayFlags::kBadPriority);
      return;
    }
    const size_t expected =
        is_double ? host_.update(handles.data(), wide.data(), n) : host_.update(handles.data(), narrow.data(), n);
    require(static_cast<size_t>(refused) == expected, "that as many are refused");
  }

  void remove(size_t n, bool bad) {
    if (handles_.empty()) return;
    std::vector<int64_t> handles = some_handles(n);
    if (!bad) {
      remove(handles);
      return;
    }
    handles[choose_.below(n)] = -1;
    int64_t refused = 0;
    const RemoveParams p{view_, &flags_, handles.data(), n, &refused};
    require(angle_replay_remove(&p, nullptr) == 0, "that it is launched");
    told(ReplayFlags::kUnknownHandle);
  }

  void remove(const std::vector<int64_t>& handles) {
    int64_t refused = 0;
    const RemoveParams p{view_, &flags_, handles.data(), handles.size(), &refused};
    require(angle_replay_remove(&p, nullptr) == 0, "that it is launched");
    require(host_.remove(handles.data(), handles.size()) == static_cast<size_t>(refused), "that as many are refused");
  }

  void reweigh(double exponent) {
    host_.set_priority_exponent(exponent);
    header(there_).exponent = std::bit_cast<uint64_t>(exponent);
    make_scratch();
    const ReweighParams p{view_};
    require(angle_replay_reweigh(&p, nullptr) == 0, "that it is launched");
  }

  // ---- what there is afterwards ----

  void told(ReplayFlags::Code code) {
    require(flags_.code == code, "that the call is refused for reason " + std::to_string(code));
    flags_ = {};
  }

  void same(uint64_t from, uint64_t bytes, const char* what) const {
    require(std::memcmp(host_.segment() + from, there_.segment() + from, bytes) == 0, what);
  }

  // What a record keeps: of one that is an observation alone, no more than that. Elsewhere in it the host leaves what
  // rows held that the same call overwrote.
  void check_records() const {
    const SegmentLayout& at = host_.layout();
    const uint64_t used = std::min(host_.next_ticket(), at.capacity);
    for (uint64_t slot = 0; slot < used; ++slot) {
      const uint64_t begin = at.records_at + slot * at.record_bytes;
      same(begin, record_.header_bytes, "that records' headers are the same");
      uint64_t head = 0;
      std::memcpy(&head, host_.segment() + begin, sizeof head);
      for (size_t f = 0; f < (plan_.shares ? 4 : record_.fields.size()); ++f) {
        const Field& field = record_.fields[f];
        if (f >= 2 && !RecordHead::has(head, RecordHead::kRow)) continue;
        same(begin + field.offset, field.kept(), "that records are the same");
      }
    }
  }

  void check() const {
    require(flags_.code == ReplayFlags::kNone, "that no call is refused");
    require(scratch_->smallest == ~0ull && scratch_->finished == 0, "that a draw leaves nothing behind");
    const SegmentLayout& at = host_.layout();
    same(at.streams_at, kWho * sizeof(uint64_t), "that streams end alike");
    same(at.leaves_at, at.capacity * sizeof(uint64_t), "that leaves are the same");
    for (size_t level = 0; level < at.tree.levels; ++level) {
      same(at.sums_at[level], at.tree.padded[level] * sizeof(int64_t), "that sums are the same");
    }
    check_records();
    const ReplayStats own = host_.stats(), theirs = there_.stats();
    require(std::memcmp(&own, &theirs, sizeof own) == 0, "that counters are the same");
    require(host_.next_ticket() == there_.next_ticket() && host_.size() == there_.size(),
            "that there are as many rows");
    std::vector<int64_t> own_counts(kBuckets), their_counts(kBuckets);
    host_.read_histogram(own_counts.data());
    there_.read_histogram(their_counts.data());
    require(own_counts == their_counts, "that rows by weight are the same");
    require(host_.default_weight().weight == there_.default_weight().weight, "that new rows weigh the same");
  }

  const Plan plan_;
  Choices choose_;
  const bool wide_reward_;
  Replay host_, there_;
  const RecordLayout& record_;
  ReplayView view_{};
  std::unique_ptr<ReplayScratch> scratch_;
  ReplayFlags flags_{};
  std::vector<Look> looks_;
  std::vector<int64_t> handles_;
};

}  // namespace

void check_replays() {
  constexpr auto kHistoric = DefaultPriority::kHistoricMaximum, kGiven = DefaultPriority::kGiven;
  const Plan plans[] = {
      {"prioritised", 1, true, false, 1, 5, 1, 12, 20},
      {"uniform", 1, false, false, 1, 5, 1, 12, 0},
      {"prioritised", 7, true, false, 1, 5, 7, 30, 40, kHistoric, 0.0},
      {"uniform", 7, false, false, 1, 5, 7, 30, 0},
      {"prioritised", 300, true, false, 1, 8, 70, 60, 90, kGiven, 0.1},
      {"uniform", 300, false, false, 1, 6, 70, 60, 0},
      {"shared, prioritised", 2, true, true, 1, 5, 2, 12, 20},
      {"shared, uniform", 7, false, true, 1, 6, 5, 12, 0},
      {"shared, prioritised", 300, true, true, 1, 5, 20, 40, 60},
      {"stacks, prioritised", 7, true, true, 3, 6, 5, 12, 20},
      {"stacks, uniform", 60, false, true, 4, 6, 8, 30, 0},
      {"stacks, prioritised", 300, true, true, 4, 6, 10, 40, 60},
      {"prioritised", 150'001, true, false, 1, 2, 4000, 4200, 1500},
      {"uniform", 20'000, false, false, 1, 2, 2000, 300, 0},
  };
  uint64_t seed = 0;
  for (const Plan& plan : plans) Pair(plan, ++seed).run();
}

}  // namespace angle::testing
