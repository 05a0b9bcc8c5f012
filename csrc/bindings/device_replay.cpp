// The device replay's launches for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "bindings/device.h"

namespace py = pybind11;

namespace angle {
namespace {

using namespace device;

struct FieldPlace {
  uint32_t offset, bytes, frames;
  FieldReal real;
};

// One buffer's memory on the device and what its rows look like; see _core.Replay.layout.
class DeviceReplay {
 public:
  DeviceReplay(const py::dict& layout, uintptr_t segment, uintptr_t scratch, uintptr_t flags)
      : scratch_(at<ReplayScratch>(scratch)), flags_(at<ReplayFlags>(flags)) {
    const auto number = [&](const char* name) { return layout[name].cast<uint64_t>(); };
    view_.segment = at<uint8_t>(segment);
    view_.capacity = number("capacity");
    view_.record_bytes = number("record_bytes");
    view_.streams_at = number("streams_at");
    view_.leaves_at = number("leaves_at");
    view_.records_at = number("records_at");
    view_.top_nodes = number("top_nodes");
    view_.weight_bits = static_cast<uint32_t>(number("weight_bits"));
    const auto sums = layout["sums_at"].cast<std::vector<uint64_t>>();
    const auto shifts = layout["shifts"].cast<std::vector<uint32_t>>();
    view_.levels = static_cast<uint32_t>(sums.size());
    std::copy(sums.begin(), sums.end(), view_.sums_at);
    std::copy(shifts.begin(), shifts.end(), view_.shift);
    view_.stack = static_cast<uint32_t>(number("stack"));
    view_.shares_successors = static_cast<uint32_t>(number("shares_successors"));
    observations_ = number("observations");
    reward_ = number("reward");
    using Described = std::tuple<uint32_t, uint32_t, uint32_t, std::string>;
    for (const auto& [offset, bytes, frames, kind] : layout["fields"].cast<std::vector<Described>>()) {
      const FieldReal real = kind == "f4" ? FieldReal::kFloat : kind == "f8" ? FieldReal::kDouble : FieldReal::kNone;
      fields_.push_back({offset, bytes, frames, real});
    }
    if (fields_.size() > kMostFields) {
      throw std::invalid_argument("a row has " + std::to_string(fields_.size()) +
                                  " fields; on a device it has at most " + std::to_string(kMostFields));
    }
  }

  // columns: one address a field, each of n rows; the others' are 0 where there is none.
  void insert(const std::vector<uintptr_t>& columns, uint64_t n, uint64_t first_ticket, uintptr_t terminated,
              uintptr_t truncated, uintptr_t streams, uintptr_t next, uintptr_t last, uintptr_t priorities,
              bool check_rewards, uintptr_t stream) const {
    InsertParams p = insert_params(columns, n, terminated, truncated, streams, priorities, check_rewards);
    p.first_ticket = first_ticket;
    p.next = at<const int32_t>(next);
    p.last = at<const int32_t>(last);
    check_launch(angle_replay_insert(&p, at<void>(stream)), "replay_insert");
  }

  // The same where successors are shared. handles: [n], to be written. work: work_bytes(n) bytes.
  void insert_sharing(const std::vector<uintptr_t>& columns, uint64_t n, uintptr_t terminated, uintptr_t truncated,
                      uintptr_t streams, uintptr_t previous, uintptr_t priorities, bool check_rewards,
                      uintptr_t handles, uintptr_t work, uintptr_t stream) const {
    InsertParams p = insert_params(columns, n, terminated, truncated, streams, priorities, check_rewards);
    p.previous = at<const int32_t>(previous);
    p.handles = at<int64_t>(handles);
    p.writes = at<RecordWrite>(work);
    p.looks = at<RowLooks>(work + n * writes_a_row() * sizeof(RecordWrite));
    check_launch(angle_replay_insert(&p, at<void>(stream)), "replay_insert");
  }

  uint64_t work_bytes(uint64_t n) const { return n * (writes_a_row() * sizeof(RecordWrite) + sizeof(RowLooks)); }

  // addresses: one a field, then discounts, importance weights, handles and steps; drawn: [n] 64-bit words to work
  // with. how: SampleParams::Flags. live: two float64, discount and importance exponent, to be read instead of the
  // arguments when the kernel runs; 0: none. chosen, taken, taken_places, rows: as SampleParams has them; 0 with
  // replacement. where: one bool, False to do nothing; 0: none.
  void sample(const std::vector<uintptr_t>& addresses, uintptr_t drawn, uint64_t n, uint32_t n_step, double discount,
              double importance_exponent, uint32_t how, uint64_t key, uintptr_t live, uintptr_t chosen, uintptr_t taken,
              uint64_t taken_places, uintptr_t rows, uintptr_t where, uintptr_t stream) const {
    require_columns(addresses.size(), fields_.size() + 4);
    SampleParams p{};
    p.view = view_;
    p.scratch = scratch_;
    p.flags = flags_;
    for (size_t f = 0; f < fields_.size(); ++f) {
      if (n_step > 1 && f == reward_) continue;
      p.fields[p.field_count++] = {at<uint8_t>(addresses[f]), fields_[f].offset, fields_[f].bytes, fields_[f].frames,
                                   f >= fields_.size() - observations_ ? 1u : 0u};
    }
    p.draws_per_warp = few_a_warp(n);
    p.n = n;
    p.key = key;
    p.discount = discount;
    p.importance_exponent = importance_exponent;
    p.live = at<const double>(live);
    p.n_step = n_step;
    p.how = how;
    p.rewards = at<uint8_t>(addresses[reward_]);
    p.reward_offset = fields_[reward_].offset;
    p.reward = fields_[reward_].real;
    const uintptr_t* const rest = addresses.data() + fields_.size();
    p.discounts = at<float>(rest[0]);
    p.importance_weights = at<float>(rest[1]);
    p.handles = at<int64_t>(rest[2]);
    p.steps = at<int64_t>(rest[3]);
    p.drawn = at<uint64_t>(drawn);
    p.chosen = at<uint64_t>(chosen);
    p.taken = at<uint64_t>(taken);
    p.taken_places = taken_places;
    p.rows = at<uint64_t>(rows);
    p.where = at<const uint8_t>(where);
    check_launch(angle_replay_sample(&p, at<void>(stream)), "replay_sample");
  }

  // claims: [2 + claim_count] zeros where n is above FEW_HANDLES, else 0. refused: one int64, 0. where: one bool, False
  // to do nothing; 0: none.
  void update(uintptr_t handles, uintptr_t td_errors, bool is_double, uint64_t n, uintptr_t claims,
              uint64_t claim_count, uintptr_t refused, uintptr_t where, uintptr_t stream) const {
    const UpdateParams p{view_,
                         scratch_,
                         flags_,
                         at<const int64_t>(handles),
                         at<const void>(td_errors),
                         n,
                         at<uint64_t>(claims),
                         claim_count,
                         at<int64_t>(refused),
                         at<const uint8_t>(where),
                         is_double ? 1u : 0u};
    check_launch(angle_replay_update(&p, at<void>(stream)), "replay_update");
  }

  void remove(uintptr_t handles, uint64_t n, uintptr_t refused, uintptr_t stream) const {
    const RemoveParams p{view_, flags_, at<const int64_t>(handles), n, at<int64_t>(refused)};
    check_launch(angle_replay_remove(&p, at<void>(stream)), "replay_remove");
  }

  void reweigh(uintptr_t stream) const {
    const ReweighParams p{view_};
    check_launch(angle_replay_reweigh(&p, at<void>(stream)), "replay_reweigh");
  }

 private:
  uint64_t writes_a_row() const { return 1 + 2 * uint64_t{view_.stack}; }

  InsertParams insert_params(const std::vector<uintptr_t>& columns, uint64_t n, uintptr_t terminated,
                             uintptr_t truncated, uintptr_t streams, uintptr_t priorities, bool check_rewards) const {
    require_columns(columns.size(), fields_.size());
    InsertParams p{};
    p.view = view_;
    p.scratch = scratch_;
    p.flags = flags_;
    p.field_count = static_cast<uint32_t>(fields_.size());
    for (size_t f = 0; f < fields_.size(); ++f) {
      const bool observed = f < observations_ || f >= fields_.size() - observations_;
      p.fields[f] = {at<const uint8_t>(columns[f]), fields_[f].offset, fields_[f].bytes, fields_[f].frames,
                     observed ? fields_[f].real : FieldReal::kNone};
    }
    p.observations = static_cast<uint32_t>(observations_);
    p.rows_per_warp = few_a_warp(n);
    p.n = n;
    p.terminated = at<const uint8_t>(terminated);
    p.truncated = at<const uint8_t>(truncated);
    p.streams = at<const int64_t>(streams);
    p.priorities = at<const float>(priorities);
    p.rewards = check_rewards ? at<const uint8_t>(columns[reward_]) : nullptr;
    p.reward = fields_[reward_].real;
    return p;
  }

  // Rows that a warp sees to: one while that fills no more than a large device, up to its 32 lanes beyond.
  static uint32_t few_a_warp(uint64_t n) {
    constexpr uint64_t kWarps = 8192;
    return static_cast<uint32_t>(std::clamp<uint64_t>((n + kWarps - 1) / kWarps, 1, 32));
  }

  static void require_columns(size_t have, size_t need) {
    if (have != need) throw std::invalid_argument("there must be one address for each field of the rows");
  }

  ReplayView view_{};
  ReplayScratch* scratch_;
  ReplayFlags* flags_;
  std::vector<FieldPlace> fields_;
  size_t observations_ = 0, reward_ = 0;
};

// The first contents of a buffer's scratch memory.
py::bytes first_scratch(const std::vector<float>& bucket_priorities) {
  if (bucket_priorities.size() != kBuckets) throw std::invalid_argument("there must be one priority for each bucket");
  auto scratch = std::make_unique<ReplayScratch>();
  scratch->smallest = ~0ull;
  std::copy(bucket_priorities.begin(), bucket_priorities.end(), scratch->bucket_priority);
  return {reinterpret_cast<const char*>(scratch.get()), sizeof(ReplayScratch)};
}

}  // namespace

void bind_device_replay(py::module_& m) {
  m.attr("MOST_AT_ONCE") = kMostAtOnce;
  m.attr("FEW_HANDLES") = kFewHandles;
  m.attr("FLAG_WORDS") = sizeof(ReplayFlags) / sizeof(uint64_t);
  m.def("first_scratch", &first_scratch, py::arg("bucket_priorities"));
  py::class_<DeviceReplay>(m, "Replay", "Launches the replay's kernels. angle_rl.replay is its public face.")
      .def(py::init<const py::typing::Dict<py::str, py::object>&, uintptr_t, uintptr_t, uintptr_t>(), py::arg("layout"),
           py::arg("segment"), py::arg("scratch"), py::arg("flags"))
      .def("insert", &DeviceReplay::insert, py::arg("columns"), py::arg("n"), py::arg("first_ticket"),
           py::arg("terminated"), py::arg("truncated"), py::arg("streams"), py::arg("next"), py::arg("last"),
           py::arg("priorities"), py::arg("check_rewards"), py::arg("stream"))
      .def("insert_sharing", &DeviceReplay::insert_sharing, py::arg("columns"), py::arg("n"), py::arg("terminated"),
           py::arg("truncated"), py::arg("streams"), py::arg("previous"), py::arg("priorities"),
           py::arg("check_rewards"), py::arg("handles"), py::arg("work"), py::arg("stream"))
      .def("work_bytes", &DeviceReplay::work_bytes, py::arg("n"))
      .def("sample", &DeviceReplay::sample, py::arg("addresses"), py::arg("drawn"), py::arg("n"), py::arg("n_step"),
           py::arg("discount"), py::arg("importance_exponent"), py::arg("how"), py::arg("key"), py::arg("live"),
           py::arg("chosen"), py::arg("taken"), py::arg("taken_places"), py::arg("rows"), py::arg("where"),
           py::arg("stream"))
      .def("update", &DeviceReplay::update, py::arg("handles"), py::arg("td_errors"), py::arg("is_double"),
           py::arg("n"), py::arg("claims"), py::arg("claim_count"), py::arg("refused"), py::arg("where"),
           py::arg("stream"))
      .def("remove", &DeviceReplay::remove, py::arg("handles"), py::arg("n"), py::arg("refused"), py::arg("stream"))
      .def("reweigh", &DeviceReplay::reweigh, py::arg("stream"));
}

}  // namespace angle
