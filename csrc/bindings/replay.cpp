// The replay for Python: arrays in and out by address, conversions that NumPy's same_kind rule allows, and the one
// place that decides when the interpreter's lock is let go.
#include "core/replay.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/batch_memory.h"
#include "bindings/bindings.h"
#include "bindings/draw.h"
#include "bindings/known_batch.h"
#include "bindings/prefetch.h"
#include "bindings/race.h"
#include "bindings/replay_state.h"
#include "bindings/row_reader.h"
#include "bindings/tensors.h"

namespace py = pybind11;

namespace angle {
namespace {

// Letting the lock go and taking it back costs other threads' turn; it pays around work of 50 us and more.
constexpr size_t kLongWorkBytes = 512 * 1024;

// Name, dtype, shape and frames of one field.
using FieldSpec = std::tuple<std::string, py::dtype, std::vector<py::ssize_t>, uint32_t>;

std::vector<FieldType> field_types(const std::vector<FieldSpec>& fields) {
  std::vector<FieldType> types;
  for (const auto& [name, dtype, shape, frames] : fields) {
    size_t elements = 1;
    for (const py::ssize_t length : shape) elements *= static_cast<size_t>(length);
    types.push_back({name, dtype, shape, elements});
  }
  return types;
}

RecordLayout record_layout(const std::vector<FieldSpec>& fields, const RowReader& reader, size_t observation_fields,
                           bool share_successors) {
  std::vector<Field> layout;
  for (size_t f = 0; f < fields.size(); ++f) {
    const FieldType& type = reader.types()[f];
    const uint64_t itemsize = static_cast<uint64_t>(type.dtype.itemsize()), bytes = type.elements * itemsize;
    layout.push_back({type.name, static_cast<uint32_t>(itemsize),
                      bytes > UINT32_MAX ? UINT32_MAX : static_cast<uint32_t>(bytes), std::get<3>(fields[f])});
  }
  RowRoles roles;
  roles.observations = observation_fields;
  const size_t reward_bytes = layout[reader.reward_field()].bytes;
  if (reward_bytes == 4 || reward_bytes == 8) roles.reward = reader.reward_field();  // others are not summed
  roles.share_successors = share_successors;
  return RecordLayout(std::move(layout), roles);
}

// Memory that a replay is to be made in or was made in: private, shared, named or file.
class Segment {
 public:
  static Segment open(const std::string& kind, const std::string& target, int descriptor) {
    if (kind == "named") return Segment(Memory::open_named(target));
    if (kind == "file") return Segment(Memory::open_file(target));
    if (kind == "shared") return Segment(Memory::from_descriptor(descriptor));
    throw std::invalid_argument("kind is '" + kind + "'; it must be named, file or shared");
  }
  // Other threads go on meanwhile: the system gives every page of shared memory its place, which takes a while.
  static Memory create(const std::string& kind, const std::string& target, uint64_t bytes) {
    const py::gil_scoped_release released;
    if (kind == "named") return Memory::create_named(target, bytes);
    if (kind == "file") return Memory::create_file(target, bytes);
    if (kind == "shared") return Memory::shared(bytes);
    return Memory::anonymous(bytes);
  }

  std::string meta() { return std::string(Replay::read_meta(memory())); }
  Memory take() {
    Memory taken = std::move(memory());
    memory_.reset();
    return taken;
  }

 private:
  explicit Segment(Memory memory) : memory_(std::move(memory)) {}
  Memory& memory() {
    if (!memory_) throw std::invalid_argument("the segment is in use already; open it anew");
    return *memory_;
  }
  std::optional<Memory> memory_;
};

class PyReplay {
 public:
  // A new replay. target: the name or the path; meta: text for Segment.meta.
  PyReplay(const std::vector<FieldSpec>& fields, size_t observation_fields, bool share_successors, uint64_t capacity,
           bool prioritized, double priority_exponent, double priority_epsilon, const std::string& default_kind,
           double default_priority, uint64_t seed, const std::string& kind, const std::string& target,
           const std::string& meta)
      : reader_(field_types(fields), observation_fields) {
    ReplayOptions options;
    options.capacity = capacity;
    options.prioritized = prioritized;
    options.priority_exponent = priority_exponent;
    options.priority_epsilon = priority_epsilon;
    options.default_kind = default_kind == "live_maximum"       ? DefaultPriority::kLiveMaximum
                           : default_kind == "historic_maximum" ? DefaultPriority::kHistoricMaximum
                                                                : DefaultPriority::kGiven;
    options.default_priority = default_priority;
    options.seed = seed;
    RecordLayout record = record_layout(fields, reader_, observation_fields, share_successors);
    Memory memory = Segment::create(kind, target, Replay::bytes_needed(options, record, meta.size()));
    replay_ = std::make_shared<Replay>(options, std::move(record), std::move(memory), meta);
    make_maker();
  }
  // One that another process made.
  PyReplay(const std::vector<FieldSpec>& fields, size_t observation_fields, bool share_successors, Segment& segment)
      : reader_(field_types(fields), observation_fields) {
    replay_ =
        std::make_shared<Replay>(record_layout(fields, reader_, observation_fields, share_successors), segment.take());
    make_maker();
  }

  // Inserts when every argument can be taken as it is or by a plain conversion; otherwise returns None and changes
  // nothing, and the facade converts with full checks. columns: one array per field, in the schema's order.
  py::object insert(const py::typing::Tuple<py::object, py::ellipsis>& columns, py::handle terminated,
                    py::handle truncated, py::handle streams, py::handle priorities) {
    InsertRows rows{};
    if (!reader_.read(columns, terminated, truncated, streams, priorities, rows)) return py::none();
    py::array_t<int64_t> handles(static_cast<py::ssize_t>(rows.n));
    int64_t* const out = handles.mutable_data();
    if (rows.n * replay_->record().record_bytes <= kLongWorkBytes) {
      replay_->insert(rows, out);
      return handles;
    }
    // Another thread may come in meanwhile and use the reader.
    RowReader::Held held;
    reader_.hand_over(rows, held);
    const py::gil_scoped_release released;
    replay_->insert(rows, out);
    return handles;
  }

  // The memory of a batch of n rows, not drawn yet, as DLPack capsules: the fields in the schema's order, then
  // discounts, importance weights, handles and steps.
  py::typing::Tuple<py::capsule, py::ellipsis> blank(size_t n) const {
    Few<uint8_t*> addresses(maker_->tensors());
    return blank_at(n, addresses.data());
  }

  // A batch in fresh memory, as DLPack capsules. A torch function that allocated would let the interpreter's lock go
  // each time, which hands an inserting thread its whole turn.
  py::typing::Tuple<py::capsule, py::ellipsis> sample_fresh(size_t n, uint32_t n_step, double discount,
                                                            double importance_exponent, uint32_t flags) {
    Few<uint8_t*> addresses(maker_->tensors());
    auto out = blank_at(n, addresses.data());
    draw_now(sample_request(n, n_step, discount, importance_exponent, flags), addresses.data());
    return out;
  }

  // A batch into memory that is there: one address for each tensor of sample_fresh.
  void sample(size_t n, uint32_t n_step, double discount, double importance_exponent, uint32_t flags,
              const py::typing::Tuple<py::int_, py::ellipsis>& addresses) {
    Few<uint8_t*> pointers(maker_->tensors());
    read_addresses(addresses, pointers.data());
    draw_now(sample_request(n, n_step, discount, importance_exponent, flags), pointers.data());
  }

  // A fresh batch whose draws the key decides; the buffer counts no call.
  py::typing::Tuple<py::capsule, py::ellipsis> sample_by_key(size_t n, uint32_t n_step, double discount,
                                                             double importance_exponent, uint32_t flags, uint64_t key) {
    Few<uint8_t*> addresses(maker_->tensors());
    auto out = blank_at(n, addresses.data());
    SampleRequest made = sample_request(n, n_step, discount, importance_exponent, flags);
    made.key = key;
    draw_now(made, addresses.data());
    return out;
  }

  // Draws into the tensors that `remember` was given last, which the facade had checked, or returns False and draws
  // nothing when these are others, or one has moved or changed its length since.
  bool sample_into(size_t n, uint32_t n_step, double discount, double importance_exponent, uint32_t flags,
                   py::handle tensors) {
    Few<uint8_t*> addresses(maker_->tensors());
    if (!known_.find(n, tensors, addresses.data())) return false;
    draw_now(sample_request(n, n_step, discount, importance_exponent, flags), addresses.data());
    return true;
  }

  // data_ptr and numel: torch.Tensor's.
  void remember(size_t n, const py::typing::Tuple<py::object, py::ellipsis>& tensors, const py::object& data_ptr,
                const py::object& numel) {
    known_ = KnownBatch(n, tensors, data_ptr, numel);
  }

  // addresses: one for each tensor of a batch.
  void read_addresses(const py::typing::Tuple<py::int_, py::ellipsis>& addresses, uint8_t** pointers) const {
    if (addresses.size() != maker_->tensors()) throw std::invalid_argument("a batch needs one address for each tensor");
    for (size_t t = 0; t < addresses.size(); ++t) {
      PyObject* const address = PyTuple_GET_ITEM(addresses.ptr(), static_cast<py::ssize_t>(t));
      pointers[t] = static_cast<uint8_t*>(PyLong_AsVoidPtr(address));
      if (pointers[t] == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    }
  }

  const std::shared_ptr<Replay>& replay() const { return replay_; }

  size_t update(uintptr_t handles, uintptr_t td_errors, bool is_double, size_t n) {
    std::optional<py::gil_scoped_release> released;
    if (n * 64 > kLongWorkBytes) released.emplace();
    const auto* const tickets = reinterpret_cast<const int64_t*>(handles);
    return is_double ? replay_->update(tickets, reinterpret_cast<const double*>(td_errors), n)
                     : replay_->update(tickets, reinterpret_cast<const float*>(td_errors), n);
  }

  std::map<std::string, uint64_t> stats() const {
    const ReplayStats s = replay_->stats();
    return {{"inserts", s.inserts},
            {"samples", s.samples},
            {"updates", s.updates},
            {"refused_updates", s.refused_updates},
            {"removed", s.removed},
            {"busy_slots", s.busy_slots},
            {"retries", s.retries},
            {"saturated_weights", s.saturated_weights},
            {"nan_observations", s.nan_observations},
            {"held", s.held},
            {"sampled_ages", s.ages}};
  }

  size_t remove(uintptr_t handles, size_t n) { return replay_->remove(reinterpret_cast<const int64_t*>(handles), n); }

  void set_priority_exponent(double exponent) {
    const py::gil_scoped_release released;
    replay_->set_priority_exponent(exponent);
  }
  double priority_exponent() const { return replay_->priority_exponent(); }

  // Rows by weight: the least weight of each bucket that has any, in units of 2**-20, and how many.
  std::vector<std::pair<uint64_t, int64_t>> histogram() const {
    std::vector<int64_t> counts(kBuckets);
    replay_->read_histogram(counts.data());
    std::vector<std::pair<uint64_t, int64_t>> out;
    for (size_t bucket = 0; bucket < kBuckets; ++bucket) {
      if (counts[bucket] > 0) out.emplace_back(WeightBuckets::lower_edge(bucket), counts[bucket]);
    }
    return out;
  }

  std::vector<std::string> audit() const {
    const py::gil_scoped_release released;
    return replay_->audit();
  }
  uint64_t repair() {
    const py::gil_scoped_release released;
    return replay_->repair();
  }

  // The rows of slots [first, first + n) that hold one: the schema's fields, then handles, streams, terminated,
  // truncated and priorities.
  py::typing::List<py::array> rows(uint64_t first, size_t n) {
    if (first + n > replay_->capacity()) throw std::invalid_argument("rows beyond the buffer's capacity");
    std::vector<py::array> fields;
    std::vector<uint8_t*> addresses;
    std::vector<py::ssize_t> shape;
    for (const FieldType& type : reader_.types()) {
      shape.assign(1, static_cast<py::ssize_t>(n));
      shape.insert(shape.end(), type.shape.begin(), type.shape.end());
      fields.emplace_back(type.dtype, shape);
      addresses.push_back(static_cast<uint8_t*>(fields.back().mutable_data()));
    }
    std::vector<RowFacts> facts(n);
    replay_->read_rows(first, n, addresses.data(), facts.data());
    size_t kept = 0;
    for (size_t i = 0; i < n; ++i) {
      if (facts[i].handle < 0) continue;
      for (size_t f = 0; f < fields.size(); ++f) {
        const size_t bytes = replay_->record().fields[f].bytes;
        if (kept != i) std::memcpy(addresses[f] + kept * bytes, addresses[f] + i * bytes, bytes);
      }
      facts[kept++] = facts[i];
    }
    const auto count = static_cast<py::ssize_t>(kept);
    py::array_t<int64_t> handles(count), streams(count);
    py::array_t<bool> terminated(count), truncated(count);
    py::array_t<float> priorities(count);
    for (size_t i = 0; i < kept; ++i) {
      handles.mutable_data()[i] = facts[i].handle;
      streams.mutable_data()[i] = facts[i].stream;
      terminated.mutable_data()[i] = facts[i].terminated;
      truncated.mutable_data()[i] = facts[i].truncated;
      priorities.mutable_data()[i] = facts[i].priority;
    }
    py::typing::List<py::array> out;
    for (const py::array& field : fields) out.append(field[py::slice(0, count, 1)]);
    for (const py::array& more :
         std::initializer_list<py::array>{handles, streams, terminated, truncated, priorities}) {
      out.append(more);
    }
    return out;
  }

  int descriptor() const { return replay_->memory().descriptor(); }
  size_t stack() const { return replay_->record().stack; }

  py::array_t<int64_t> weights() const {
    py::array_t<int64_t> out(static_cast<py::ssize_t>(replay_->capacity()));
    replay_->read_weights(out.mutable_data());
    return out;
  }

  // Where everything lies in the memory, in bytes from its start, for whoever keeps such memory elsewhere.
  py::typing::Dict<py::str, py::object> layout() const {
    const SegmentLayout& at = replay_->layout();
    const RecordLayout& record = replay_->record();
    const size_t levels = at.tree.levels;
    std::vector<std::tuple<uint32_t, uint32_t, uint32_t, std::string>> fields;
    for (size_t f = 0; f < record.fields.size(); ++f) {
      const py::dtype& dtype = reader_.types()[f].dtype;
      const Field& field = record.fields[f];
      fields.emplace_back(field.offset, field.bytes, field.frames, dtype.kind() + std::to_string(dtype.itemsize()));
    }
    py::typing::Dict<py::str, py::object> out;
    out["capacity"] = at.capacity;
    out["record_bytes"] = at.record_bytes;
    out["header_bytes"] = sizeof(SegmentHeader);
    out["prioritized"] = reinterpret_cast<const SegmentHeader*>(replay_->segment())->prioritized != 0;
    out["exponent_at"] = offsetof(SegmentHeader, exponent);
    out["next_ticket_at"] = offsetof(SegmentHeader, next_ticket);
    out["rows_at"] = offsetof(SegmentHeader, rows);
    out["streams_at"] = at.streams_at;
    out["leaves_at"] = at.leaves_at;
    out["records_at"] = at.records_at;
    out["sums_at"] = std::vector<uint64_t>(at.sums_at, at.sums_at + levels);
    out["shifts"] = std::vector<uint32_t>(at.tree.shift, at.tree.shift + levels);
    out["top_nodes"] = at.tree.nodes[levels - 1];
    out["weight_bits"] = at.tree.weight_bits;
    out["total_bytes"] = at.total_bytes;
    out["fields"] = fields;
    out["observations"] = record.roles.observations;
    out["shares_successors"] = record.roles.share_successors;
    out["stack"] = record.stack;
    out["reward"] = reader_.reward_field();
    return out;
  }

  // The default priority that would follow from each bucket of weights as the highest that holds a row, under an
  // exponent.
  std::vector<float> bucket_priorities(double exponent) const {
    const auto& header = *reinterpret_cast<const SegmentHeader*>(replay_->segment());
    const PriorityMap map{exponent, header.priority_epsilon, LeafCode(replay_->layout().tree.weight_bits).weight_mask};
    std::vector<float> out(kBuckets);
    for (size_t bucket = 0; bucket < kBuckets; ++bucket) {
      out[bucket] = map.priority(std::min(WeightBuckets::upper_edge(bucket), map.largest));
    }
    return out;
  }

  // The whole memory, as a view.
  static py::array_t<uint8_t> memory(const py::object& self) {
    const Replay& replay = *self.cast<const PyReplay&>().replay_;
    return py::array_t<uint8_t>(static_cast<py::ssize_t>(replay.layout().total_bytes), replay.segment(), self);
  }

  // The state's parts, of `slots` records or of those in use.
  static StateParts parts(const py::object& self, std::optional<uint64_t> slots) {
    const Replay& replay = *self.cast<const PyReplay&>().replay_;
    return state_parts(replay, slots.value_or(std::min(replay.next_ticket(), replay.capacity())), self);
  }
  void adopt(const StateBytes& header, uint64_t slots) { adopt_state(*replay_, header, slots); }
  void restore(const StateBytes& header, const StateBytes& index, const StateBytes& records) {
    restore_state(*replay_, header, index, records);
  }

  uint64_t size() const { return replay_->size(); }
  uint64_t next_ticket() const { return replay_->next_ticket(); }
  bool inserts_are_done() const { return replay_->inserts_are_done(); }
  uint64_t capacity() const { return replay_->capacity(); }
  uint64_t bytes() const { return replay_->bytes(); }
  size_t pooled_bytes() const { return maker_->pool().free_bytes(); }
  size_t record_bytes() const { return replay_->record().record_bytes; }
  bool sums_are_exact() const { return replay_->sums_are_exact(); }
  uint64_t default_weight() const { return replay_->default_weight().weight; }

 private:
  py::typing::Tuple<py::capsule, py::ellipsis> blank_at(size_t n, uint8_t** addresses) const {
    const size_t count = maker_->tensors();
    Few<DLManagedTensor*> tensors(count);
    maker_->make(n, tensors.data());
    py::typing::Tuple<py::capsule, py::ellipsis> out(count);
    for (size_t t = 0; t < count; ++t) {
      addresses[t] = static_cast<uint8_t*>(tensors.data()[t]->dl_tensor.data);
      PyTuple_SET_ITEM(out.ptr(), static_cast<py::ssize_t>(t), to_capsule(tensors.data()[t]));
    }
    return out;
  }

  void draw_now(const SampleRequest& made, uint8_t* const* addresses) {
    std::optional<py::gil_scoped_release> released;
    if (made.n * (row_bytes_ + 24 * (made.n_step - 1)) > kLongWorkBytes) released.emplace();
    draw(*replay_, made, addresses);
  }

  void make_maker() {
    std::vector<TensorType> tensors;
    for (const FieldType& type : reader_.types()) {
      const auto bits = static_cast<uint8_t>(type.dtype.itemsize() * 8);
      tensors.push_back({{dl_code(type.dtype.kind()), bits},
                         {type.shape.begin(), type.shape.end()},
                         type.elements * static_cast<size_t>(type.dtype.itemsize())});
    }
    for (const DLDataType type : {DLDataType{2, 32}, DLDataType{2, 32}, DLDataType{0, 64}, DLDataType{0, 64}}) {
      tensors.push_back({type, {}, type.bits / size_t{8}});
    }
    const size_t pooled = std::clamp<size_t>(replay_->bytes() / 16, size_t{32} << 20, size_t{256} << 20);
    maker_ = std::make_unique<BatchMaker>(std::move(tensors), pooled);
    row_bytes_ = replay_->record().row_bytes();
  }

  RowReader reader_;
  std::shared_ptr<Replay> replay_;  // prefetchers hold it too
  std::unique_ptr<BatchMaker> maker_;
  KnownBatch known_;      // the batch that `out` was last
  size_t row_bytes_ = 0;  // as callers see it
};

// A Prefetch for Python; the facade keeps the memory that it submits.
class PyPrefetch {
 public:
  explicit PyPrefetch(const PyReplay& replay) : replay_(replay), prefetch_(replay.replay()) {}

  void submit(uint64_t name, const py::typing::Tuple<py::int_, py::ellipsis>& addresses, size_t n, uint32_t n_step,
              double discount, double importance_exponent, uint32_t flags) {
    std::vector<uint8_t*> pointers(addresses.size());
    replay_.read_addresses(addresses, pointers.data());
    prefetch_.submit(name, sample_request(n, n_step, discount, importance_exponent, flags), std::move(pointers));
  }

  std::optional<uint64_t> take() {
    if (const auto name = prefetch_.take_ready()) return name;
    const py::gil_scoped_release released;
    return prefetch_.take();
  }

  void stop() {
    const py::gil_scoped_release released;
    prefetch_.stop();
  }

 private:
  const PyReplay& replay_;  // kept alive by the binding
  Prefetch prefetch_;
};

}  // namespace

std::shared_ptr<Replay> replay_of(py::handle core) { return core.cast<const PyReplay&>().replay(); }

void bind_replay(py::module_& m) {
  m.attr("MAX_STREAMS") = kStreams;
  bind_race(m);
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const NothingToSample& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::system_error& error) {
      const py::object made = py::handle(PyExc_OSError)(error.code().value(), error.what());
      PyErr_SetObject(py::type::handle_of(made).ptr(), made.ptr());
    }
  });
  py::class_<Segment>(m, "Segment", "Memory that another process made a replay in.")
      .def_static("open", &Segment::open, py::arg("kind"), py::arg("target"), py::arg("descriptor"))
      .def_static("unlink", &Memory::unlink_named, py::arg("name"))
      .def("meta", &Segment::meta);
  py::class_<PyReplay>(m, "Replay", "The compiled replay. angle_rl.replay is its public face.")
      .def(py::init<const std::vector<FieldSpec>&, size_t, bool, uint64_t, bool, double, double, const std::string&,
                    double, uint64_t, const std::string&, const std::string&, const std::string&>(),
           py::arg("fields"), py::arg("observation_fields"), py::arg("share_successors"), py::arg("capacity"),
           py::arg("prioritized"), py::arg("priority_exponent"), py::arg("priority_epsilon"), py::arg("default_kind"),
           py::arg("default_priority"), py::arg("seed"), py::arg("kind"), py::arg("target"), py::arg("meta"))
      .def(py::init<const std::vector<FieldSpec>&, size_t, bool, Segment&>(), py::arg("fields"),
           py::arg("observation_fields"), py::arg("share_successors"), py::arg("segment"))
      .def("insert", &PyReplay::insert, py::arg("columns"), py::arg("terminated"), py::arg("truncated"),
           py::arg("streams"), py::arg("priorities"))
      .def("sample", &PyReplay::sample, py::arg("n"), py::arg("n_step"), py::arg("discount"),
           py::arg("importance_exponent"), py::arg("flags"), py::arg("addresses"))
      .def("sample_into", &PyReplay::sample_into, py::arg("n"), py::arg("n_step"), py::arg("discount"),
           py::arg("importance_exponent"), py::arg("flags"), py::arg("tensors"))
      .def("remember", &PyReplay::remember, py::arg("n"), py::arg("tensors"), py::arg("data_ptr"), py::arg("numel"))
      .def("blank", &PyReplay::blank, py::arg("n"))
      .def("sample_fresh", &PyReplay::sample_fresh, py::arg("n"), py::arg("n_step"), py::arg("discount"),
           py::arg("importance_exponent"), py::arg("flags"))
      .def("sample_by_key", &PyReplay::sample_by_key, py::arg("n"), py::arg("n_step"), py::arg("discount"),
           py::arg("importance_exponent"), py::arg("flags"), py::arg("key"))
      .def("update", &PyReplay::update, py::arg("handles"), py::arg("td_errors"), py::arg("is_double"), py::arg("n"))
      .def("remove", &PyReplay::remove, py::arg("handles"), py::arg("n"))
      .def("set_priority_exponent", &PyReplay::set_priority_exponent, py::arg("exponent"))
      .def("priority_exponent", &PyReplay::priority_exponent)
      .def("stats", &PyReplay::stats)
      .def("histogram", &PyReplay::histogram)
      .def("audit", &PyReplay::audit)
      .def("repair", &PyReplay::repair)
      .def("rows", &PyReplay::rows, py::arg("first"), py::arg("n"))
      .def("weights", &PyReplay::weights)
      .def(
          "parts", [](const py::object& self, std::optional<uint64_t> slots) { return PyReplay::parts(self, slots); },
          py::arg("slots") = py::none())
      .def("layout", &PyReplay::layout)
      .def("bucket_priorities", &PyReplay::bucket_priorities, py::arg("exponent"))
      .def("memory", [](const py::object& self) { return PyReplay::memory(self); })
      .def("adopt", &PyReplay::adopt, py::arg("header"), py::arg("slots"))
      .def("restore", &PyReplay::restore, py::arg("header"), py::arg("index"), py::arg("records"))
      .def("sums_are_exact", &PyReplay::sums_are_exact)
      .def("default_weight", &PyReplay::default_weight)
      .def("inserts_are_done", &PyReplay::inserts_are_done)
      .def_property_readonly("descriptor", &PyReplay::descriptor)
      .def_property_readonly("stack", &PyReplay::stack)
      .def(
          "race", [](PyReplay& self, const RaceOptions& options) { return race_for_python(*self.replay(), options); },
          py::arg("options"), "Lets native threads loose on the buffer; see RaceOptions.")
      .def_property_readonly("size", &PyReplay::size)
      .def_property_readonly("next_ticket", &PyReplay::next_ticket)
      .def_property_readonly("capacity", &PyReplay::capacity)
      .def_property_readonly("nbytes", &PyReplay::bytes)
      .def_property_readonly("pooled_bytes", &PyReplay::pooled_bytes)
      .def_property_readonly("record_bytes", &PyReplay::record_bytes);
  py::class_<PyPrefetch>(m, "Prefetch", "A thread that draws ahead. angle_rl.replay.Prefetcher is its public face.")
      .def(py::init<const PyReplay&>(), py::arg("replay"), py::keep_alive<1, 2>())
      .def("submit", &PyPrefetch::submit, py::arg("name"), py::arg("addresses"), py::arg("n"), py::arg("n_step"),
           py::arg("discount"), py::arg("importance_exponent"), py::arg("flags"))
      .def("take", &PyPrefetch::take)
      .def("stop", &PyPrefetch::stop);
}

}  // namespace angle
