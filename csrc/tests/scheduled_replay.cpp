#include "scheduled_replay.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace angle::testing {
namespace {

constexpr uint32_t kFinal = 500000;  // added to an ended row's number for the observation that it ended in
constexpr double kDiscount = 0.5;

RecordLayout layout_of(const WorldOptions& options) {
  const uint32_t bytes = 12 * options.frames;
  return RecordLayout(
      {{"observations", 4, bytes, options.frames}, {"rewards", 4, 4}, {"next_observations", 4, bytes, options.frames}},
      {1, 1, options.share});
}

ReplayOptions replay_options(const WorldOptions& options) {
  ReplayOptions o;
  o.capacity = options.capacity;
  o.prioritized = options.prioritized;
  o.priority_exponent = options.exponent;
  o.priority_epsilon = options.epsilon;
  return o;
}

std::string text(int64_t number) { return std::to_string(number); }

}  // namespace

World::World(const WorldOptions& options) : options_(options), replay_(replay_options(options), layout_of(options)) {}

// ---- rows ----

void World::fill(uint32_t v, bool successor, uint32_t* out) const {
  const uint32_t start = options_.episode == 0 ? v / 1000 * 1000 : v - v % 1000 % options_.episode;
  for (uint32_t frame = 0; frame < options_.frames; ++frame) {
    const uint32_t back = options_.frames - 1 - frame + (successor ? 0 : 1);  // 0: the successor itself
    const uint32_t shown = back == 0 ? (ends(v) ? v + kFinal : v + 1) : v - std::min(v - start, back - 1);
    *out++ = shown;
    *out++ = ~shown;
    *out++ = shown * 7;
  }
}

bool World::shows(uint32_t v, bool successor, const uint32_t* words) const {
  std::vector<uint32_t> expected(observation_words());
  fill(v, successor, expected.data());
  return std::equal(expected.begin(), expected.end(), words);
}

// ---- calls ----

std::vector<int64_t> World::insert(uint32_t first, size_t n, const std::vector<float>& priorities) {
  std::vector<uint32_t> observations(n * observation_words()), successors(observations);
  std::vector<float> rewards(n);
  std::vector<uint8_t> terminated(n), truncated(n);
  std::vector<int64_t> streams(n), handles(n);
  for (size_t i = 0; i < n; ++i) {
    const uint32_t v = first + static_cast<uint32_t>(i);
    fill(v, false, &observations[i * observation_words()]);
    fill(v, true, &successors[i * observation_words()]);
    rewards[i] = static_cast<float>(v);
    terminated[i] = terminates(v);
    truncated[i] = ends(v) && !terminates(v);
    streams[i] = v / 1000;
    record_.begun.insert(v);
  }
  const uint8_t* const fields[] = {reinterpret_cast<const uint8_t*>(observations.data()),
                                   reinterpret_cast<const uint8_t*>(rewards.data()),
                                   reinterpret_cast<const uint8_t*>(successors.data())};
  InsertRows rows{n, fields, terminated.data(), truncated.data(), streams.data()};
  if (!priorities.empty()) rows.priorities = priorities.data();
  ++record_.calls;
  replay_.insert(rows, handles.data());
  if (killed()) return {};
  ++record_.returned;
  for (size_t i = 0; i < n; ++i) {
    const uint32_t v = first + static_cast<uint32_t>(i);
    require(record_.rows.emplace(handles[i], v).second, "no handle is given twice");
    record_.handles[v] = handles[i];
    if (!priorities.empty()) record_.given[handles[i]] = priorities[i];
    if (i > 0) require(handles[i] > handles[i - 1], "handles ascend");
  }
  return handles;
}

std::vector<int64_t> World::sample(size_t n, uint32_t n_step, bool replacement, bool bound_by_buffer) {
  std::vector<uint32_t> observations(n * observation_words()), successors(observations);
  std::vector<float> rewards(n), discounts(n), weights(n);
  std::vector<int64_t> handles(n), steps(n);
  uint8_t* const fields[] = {reinterpret_cast<uint8_t*>(observations.data()),
                             reinterpret_cast<uint8_t*>(rewards.data()), reinterpret_cast<uint8_t*>(successors.data())};
  SampleRequest request;
  request.n = n;
  request.n_step = n_step;
  request.discount = kDiscount;
  request.replacement = replacement;
  request.bound_by_buffer = bound_by_buffer;
  ++record_.calls;
  try {
    replay_.sample(request, {fields, discounts.data(), weights.data(), handles.data(), steps.data()});
  } catch (const NothingToSample& error) {
    ++record_.returned;
    if (!options_.may_be_empty) fail(std::string("a row was there, but: ") + error.what());
    return {};
  }
  if (killed()) return {};
  ++record_.returned;
  record_.samples += n;
  for (size_t i = 0; i < n; ++i) {
    const uint32_t v = observations[i * observation_words() + observation_words() - 3];
    const auto check = [&](bool holds, const char* what) {
      if (!holds) fail("row " + text(v) + " as drawn: " + what);
    };
    const uint32_t k = static_cast<uint32_t>(steps[i]);
    check(record_.begun.count(v) == 1, "nobody inserted it");
    check(shows(v, false, &observations[i * observation_words()]), "its observation is torn");
    check(k >= 1 && k <= n_step, "its steps are out of range");
    double reward = 0.0;
    for (uint32_t step = 0; step < k; ++step) {
      reward += std::pow(kDiscount, step) * (v + step);
      check(step + 1 == k || !ends(v + step), "its window crosses an episode's end");
    }
    const uint32_t last = v + k - 1;
    check(static_cast<double>(rewards[i]) == reward, "its reward is another's");
    check(shows(last, true, &successors[i * observation_words()]), "its successor is torn or another's");
    check(static_cast<double>(discounts[i]) == (terminates(last) ? 0.0 : std::pow(kDiscount, k)),
          "its discount is another's");
    // A window may stop at what was the stream's newest row, which rows of the setup but the last were not.
    check(k == n_step || ends(last) || known_.count(last + 1) == 0, "its window stops early");
    check(weights[i] > 0.0f && weights[i] <= 1.0f, "its importance weight is not in (0, 1]");
    record_.drawn.push_back({handles[i], v, k});
    for (size_t j = 0; j < i && !replacement; ++j) check(handles[j] != handles[i], "it was drawn twice");
  }
  return handles;
}

void World::update(const std::vector<int64_t>& handles, const std::vector<float>& td_errors) {
  for (size_t i = 0; i < handles.size(); ++i) record_.asked[handles[i]].insert(td_errors[i]);
  ++record_.calls;
  const size_t refused = replay_.update(handles.data(), td_errors.data(), handles.size());
  if (killed()) return;
  ++record_.returned;
  record_.refused += refused;
  record_.updates += handles.size() - refused;
  if (refused == 0) {
    for (size_t i = 0; i < handles.size(); ++i) record_.accepted[handles[i]].insert(td_errors[i]);
  }
}

void World::remove(int64_t handle) {
  record_.remove_asked.insert(handle);
  ++record_.calls;
  const size_t refused = replay_.remove(&handle, 1);
  if (killed()) return;
  ++record_.returned;
  record_.refused += refused;
  record_.removals += 1 - refused;
  if (refused == 0) require(record_.removed.insert(handle).second, "a row is removed once");
}

void World::set_exponent(double exponent) {
  ++record_.calls;
  record_.exponent_changed = true;
  replay_.set_priority_exponent(exponent);
  if (!killed()) ++record_.returned;
}

void World::read_rows() {
  const size_t n = options_.capacity;
  std::vector<uint32_t> observations(n * observation_words()), successors(observations);
  std::vector<float> rewards(n);
  std::vector<RowFacts> facts(n);
  uint8_t* const fields[] = {reinterpret_cast<uint8_t*>(observations.data()),
                             reinterpret_cast<uint8_t*>(rewards.data()), reinterpret_cast<uint8_t*>(successors.data())};
  ++record_.calls;
  replay_.read_rows(0, n, fields, facts.data());
  if (killed()) return;
  ++record_.returned;
  for (size_t i = 0; i < n; ++i) {
    if (facts[i].handle < 0) continue;
    const uint32_t v = static_cast<uint32_t>(rewards[i]);
    const auto check = [&](bool holds, const char* what) {
      if (!holds) fail("row " + text(v) + " as read: " + what);
    };
    check(record_.begun.count(v) == 1, "nobody inserted it");
    check(shows(v, false, &observations[i * observation_words()]), "its observation is torn");
    check(shows(v, true, &successors[i * observation_words()]), "its successor is torn or another's");
    check(facts[i].terminated == terminates(v) && facts[i].truncated == (ends(v) && !terminates(v)),
          "its end is another's");
    check(facts[i].stream == v / 1000, "its stream is another's");
    record_.drawn.push_back({facts[i].handle, v, 1});
  }
}

// ---- around runs ----

std::vector<World::Part> World::parts() const {
  const SegmentLayout& layout = replay_.layout();
  return {{0, static_cast<size_t>(layout.streams_at) + 8 * 16},
          {static_cast<size_t>(layout.leaves_at), static_cast<size_t>(layout.total_bytes - layout.leaves_at)}};
}

void World::keep() {
  kept_ = record_;
  kept_.drawn.clear();
  known_ = record_.begun;
  memory_.clear();
  for (const Part& part : parts()) {
    memory_.insert(memory_.end(), replay_.segment() + part.at, replay_.segment() + part.at + part.bytes);
  }
}

void World::begin(Run& run) {
  record_ = kept_;
  size_t from = 0;
  for (const Part& part : parts()) {
    std::memcpy(replay_.segment() + part.at, memory_.data() + from, part.bytes);
    from += part.bytes;
  }
  SegmentHeader& h = *reinterpret_cast<SegmentHeader*>(replay_.segment());
  h.seed = run.seed();
  const SegmentLayout& layout = replay_.layout();
  run.name(replay_.segment() + layout.leaves_at, options_.capacity, 8, "leaf");
  for (size_t level = 0; level < layout.tree.levels; ++level) {
    run.name(replay_.segment() + layout.sums_at[level], layout.tree.padded[level], 8, "sum" + std::to_string(level));
  }
  run.name(replay_.segment() + layout.records_at, options_.capacity, layout.record_bytes, "record");
  run.name(replay_.segment() + layout.streams_at, 16, 8, "stream");
  for (size_t set = 0; set < kCountSets; ++set) {
    const std::string name = "counts" + std::to_string(set);
    run.name(&h.counts[set].claimed, 1, 8, name + " claimed");
    run.name(h.counts[set].rows, kBuckets, 8, name + " default");
    run.name(h.counts[set].rows + kBuckets, kBuckets, 8, name + " computed");
  }
  run.name(&h.next_ticket, 1, 8, "next_ticket");
  run.name(&h.highest_bucket, 1, 8, "highest_bucket");
  run.name(&h.exponent, 1, 8, "exponent");
  run.name(&h.inserts, 1, 8, "inserts");
  run.name(&h.updates, 1, 8, "updates");
  run.name(&h, 1, sizeof h.magic * 100, "header");
}

uint64_t World::leaf(uint64_t slot) const {
  uint64_t word = 0;
  std::memcpy(&word, replay_.segment() + replay_.layout().leaves_at + 8 * slot, sizeof word);
  return word;
}

int64_t World::ticket_at(uint64_t slot) const {
  const LeafCode code(replay_.layout().tree.weight_bits);
  const uint64_t lap = code.lap(leaf(slot));
  return lap == 0 ? -1 : static_cast<int64_t>((lap - 1) * options_.capacity + slot);
}

// ---- checks at rest ----

void World::check() {
  const bool deaths = record_.returned != record_.calls;
  check_draws();
  check_slots(deaths);
  if (deaths) {
    const LeafCode code(replay_.layout().tree.weight_bits);
    size_t busy = 0;
    for (uint64_t slot = 0; slot < options_.capacity; ++slot) busy += code.state(leaf(slot)) == LeafCode::kBusy;
    require(busy == 0 || !replay_.audit().empty(), "the audit finds busy slots");
    const bool clean = replay_.audit().empty();
    const uint64_t mended = replay_.repair();
    if (clean) require(mended == 0, "the audit finds whatever repair mends");
    check_slots(true);
    check_sums();
    use_after_repair();
  } else {
    check_counters();
  }
  check_sums();
}

void World::check_sums() {
  require(replay_.sums_are_exact(), "at rest the sums equal the leaves");
  const std::vector<std::string> findings = replay_.audit();
  if (!findings.empty()) fail("at rest the audit finds: " + findings[0]);
  if (!options_.prioritized) return;
  // The default priority covers the live rows' computed ones, at most 5 % high.
  const LeafCode code(replay_.layout().tree.weight_bits);
  uint64_t largest = 0;
  for (uint64_t slot = 0; slot < options_.capacity; ++slot) {
    const uint64_t word = leaf(slot);
    if (code.state(word) == LeafCode::kComputed) largest = std::max(largest, code.weight(word));
  }
  const double standard = static_cast<double>(replay_.default_weight().weight), live = static_cast<double>(largest);
  if (largest != 0) require(standard >= live && standard <= 1.05 * live, "new rows weigh as the largest live one");
}

void World::check_counters() {
  const ReplayStats stats = replay_.stats();
  require(stats.inserts == record_.rows.size(), "every row inserted is counted");
  const uint64_t used = options_.share ? stats.inserts + stats.held : stats.inserts;
  require(replay_.next_ticket() == used + stats.busy_slots, "every ticket was used or given up");
  require(stats.samples == record_.samples, "every row drawn is counted");
  require(stats.updates == record_.updates, "every update is counted");
  require(stats.removed == record_.removals, "every removal is counted");
  require(stats.refused_updates == record_.refused, "every refusal is counted");
}

void World::check_draws() {
  for (const Drawn& drawn : record_.drawn) {
    ++counts_[drawn.value];
    const auto found = record_.handles.find(drawn.value);
    if (found == record_.handles.end()) continue;  // its writer was killed before it knew
    if (found->second != drawn.handle) {
      fail("row " + text(drawn.value) + " was drawn under handle " + text(drawn.handle) + ", not " +
           text(found->second));
    }
  }
}

// Each slot holds the newest row that was inserted there, with the last priority given to it.
void World::check_slots(bool after_deaths) {
  const LeafCode code(replay_.layout().tree.weight_bits);
  const size_t n = options_.capacity;
  std::vector<int64_t> newest(n, -1);
  for (const auto& [handle, value] : record_.rows) {
    int64_t& slot = newest[static_cast<size_t>(handle) % n];
    slot = std::max(slot, handle);
  }
  std::vector<uint32_t> observations(n * observation_words()), successors(observations);
  std::vector<float> rewards(n);
  std::vector<RowFacts> facts(n);
  uint8_t* const fields[] = {reinterpret_cast<uint8_t*>(observations.data()),
                             reinterpret_cast<uint8_t*>(rewards.data()), reinterpret_cast<uint8_t*>(successors.data())};
  replay_.read_rows(0, n, fields, facts.data());
  for (size_t slot = 0; slot < n; ++slot) {
    const auto check = [&](bool holds, const std::string& what) {
      if (!holds) fail("slot " + text(static_cast<int64_t>(slot)) + " at rest: " + what);
    };
    const int64_t ticket = ticket_at(slot), expected = newest[slot];
    check(ticket >= expected, "its row was lost");
    // Later ones are held, or their writer died before it knew its handle.
    if (ticket > expected && !after_deaths && !options_.share) check(false, "a row that nobody inserted");
    if (!after_deaths && ticket >= 0) check(code.state(leaf(slot)) != LeafCode::kBusy, "it is still busy");
    const RowFacts& row = facts[slot];
    const uint64_t weight = code.weight(leaf(slot));
    const bool own = ticket == expected && expected >= 0, is_row = code.is_row(leaf(slot));
    if (own && record_.removed.count(expected) != 0) check(!is_row, "it was removed and is back");
    if (own && !is_row && !after_deaths) {
      // Or the ring passed it by while it was being written.
      const bool passed = replay_.next_ticket() - static_cast<uint64_t>(expected) > n;
      check(record_.remove_asked.count(expected) != 0 || options_.may_lose_rows || (options_.share && passed),
            "it was removed by nobody");
    }
    if (own && weight != 0 && !after_deaths) check(row.handle == expected, "it has weight and cannot be drawn whole");
    if (row.handle < 0) continue;
    const uint32_t v = static_cast<uint32_t>(rewards[slot]);
    check(row.handle == ticket, "its record belongs to another ticket");
    check(shows(v, false, &observations[slot * observation_words()]), "its observation is torn");
    check(shows(v, true, &successors[slot * observation_words()]), "its successor is torn or another's");
    check(row.terminated == terminates(v) && row.truncated == (ends(v) && !terminates(v)), "its end is another's");
    if (ticket != expected) {
      check(record_.begun.count(v) == 1 && record_.handles.count(v) == 0, "it holds a row of elsewhere");
      continue;
    }
    check(record_.rows.at(expected) == v, "it holds another row than its handle's");
    const auto asked = record_.asked.find(expected);
    const auto accepted = record_.accepted.find(expected);
    const auto among = [&row](const std::set<float>& values) {
      // A store that came too late for the row before may have cost the priority's last bits.
      return std::any_of(values.begin(), values.end(),
                         [&](float value) { return std::abs(row.priority - value) <= 1e-4f * value; });
    };
    // Such a store is of an update that was refused. Where the exponent changes meanwhile, or is 0, the priority is
    // lost.
    const bool only_weight = record_.refused != 0 && (record_.exponent_changed || options_.exponent == 0.0);
    if (only_weight) {
    } else if (accepted != record_.accepted.end()) {
      check(among(asked->second), "none of its updates gave it its priority " + std::to_string(row.priority));
    } else if (asked != record_.asked.end() && among(asked->second)) {
      check(after_deaths || record_.refused != 0, "an update was refused and yet took place");
    } else if (record_.given.count(expected) != 0) {
      check(among({record_.given.at(expected)}), "its priority is not the one that it came with");
    }
    const bool weightless = options_.prioritized && options_.epsilon == 0.0 && row.priority == 0.0f;
    check((weight == 0) == weightless || after_deaths, "it weighs something just where it should not");
  }
}

// A repaired buffer takes a ring of rows, draws them whole and changes their priorities.
void World::use_after_repair() {
  const uint32_t first = 9000;
  const size_t rows = options_.share ? options_.capacity - 1 : options_.capacity;
  std::vector<int64_t> handles;
  for (size_t i = 0; i < rows; ++i) {
    handles.push_back(insert(first + static_cast<uint32_t>(i))[0]);
  }
  update({handles.back()}, {3.0f});
  const size_t drawn_before = record_.drawn.size();
  sample(8);
  for (size_t i = drawn_before; i < record_.drawn.size(); ++i) {
    const uint32_t v = record_.drawn[i].value;
    require(record_.handles.count(v) != 0 && record_.handles.at(v) == record_.drawn[i].handle,
            "after repair rows come under their handles");
    require(v >= first || options_.share, "after a ring of inserts all rows are new");
  }
}

}  // namespace angle::testing
