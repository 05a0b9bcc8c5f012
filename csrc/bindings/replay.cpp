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
#include <utility>
#include <vector>

#include "bindings/batch_memory.h"
#include "bindings/bindings.h"

namespace py = pybind11;

namespace angle {
namespace {

// Letting the lock go and taking it back costs other threads' turn; it pays around work of 50 us and more.
constexpr size_t kLongWorkBytes = 512 * 1024;

// A short list, on the heap only when it is longer than usual.
template <class T>
class Few {
 public:
  explicit Few(size_t count) {
    if (count > few_.size()) many_.resize(count);
  }
  T* data() { return many_.empty() ? few_.data() : many_.data(); }

 private:
  std::array<T, 16> few_;
  std::vector<T> many_;
};

struct FieldType {
  std::string name;
  py::dtype dtype;
  std::vector<py::ssize_t> shape;
  size_t elements;
};

// Rows of one field, ready for the core: either the caller's own memory or a converted copy.
struct Column {
  const uint8_t* data = nullptr;
  std::vector<uint8_t> converted;
};

// DLPack's code of one of NumPy's kinds.
uint8_t dl_code(char kind) {
  switch (kind) {
    case 'i':
      return 0;
    case 'u':
      return 1;
    case 'c':
      return 5;
    case 'b':
      return 6;
    default:
      return 2;
  }
}

// Owns the tensor until a consumer takes it over, which it says by giving the capsule another name.
PyObject* to_capsule(DLManagedTensor* tensor) {
  PyObject* const capsule = PyCapsule_New(tensor, "dltensor", [](PyObject* self) {
    if (!PyCapsule_IsValid(self, "dltensor")) return;
    auto* const owned = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(self, "dltensor"));
    owned->deleter(owned);
  });
  if (capsule == nullptr) {
    tensor->deleter(tensor);
    throw py::error_already_set();
  }
  return capsule;
}

class PyReplay {
 public:
  PyReplay(uint64_t capacity, const std::vector<std::tuple<std::string, py::dtype, std::vector<py::ssize_t>>>& fields,
           size_t observation_fields, bool prioritized, bool stratified, double priority_exponent,
           double priority_epsilon, uint64_t seed)
      : observation_fields_(observation_fields), stratified_(stratified) {
    std::vector<Field> layout;
    for (const auto& [name, dtype, shape] : fields) {
      size_t elements = 1;
      for (const py::ssize_t length : shape) elements *= static_cast<size_t>(length);
      types_.push_back({name, dtype, shape, elements});
      const uint64_t bytes = elements * static_cast<uint64_t>(dtype.itemsize());
      layout.push_back({name, static_cast<uint32_t>(dtype.itemsize()),
                        bytes > UINT32_MAX ? UINT32_MAX : static_cast<uint32_t>(bytes)});
    }
    while (types_.at(reward_field_).name != "rewards") ++reward_field_;
    ReplayOptions options;
    options.capacity = capacity;
    options.prioritized = prioritized;
    options.priority_exponent = priority_exponent;
    options.priority_epsilon = priority_epsilon;
    options.seed = seed;
    RowRoles roles;
    roles.observations = observation_fields;
    roles.reward = reward_field_;
    replay_ = std::make_unique<Replay>(options, RecordLayout(std::move(layout), roles));
    std::vector<TensorType> tensors;
    for (const FieldType& type : types_) {
      const auto bits = static_cast<uint8_t>(type.dtype.itemsize() * 8);
      tensors.push_back({{dl_code(type.dtype.kind()), bits},
                         {type.shape.begin(), type.shape.end()},
                         type.elements * static_cast<size_t>(type.dtype.itemsize())});
    }
    for (const DLDataType type : {DLDataType{2, 32}, DLDataType{2, 32}, DLDataType{0, 64}, DLDataType{0, 64}}) {
      tensors.push_back({type, {}, type.bits / size_t{8}});
    }
    const size_t pooled = std::clamp<size_t>(replay_->bytes() / 16, size_t{1} << 20, size_t{256} << 20);
    maker_ = std::make_unique<BatchMaker>(std::move(tensors), pooled);
  }

  // Inserts when every argument can be taken as it is or by a plain conversion; otherwise returns None and changes
  // nothing, and the facade converts with full checks. columns: one array per field, in the schema's order.
  py::object insert(const py::typing::Tuple<py::object, py::ellipsis>& columns, py::handle terminated,
                    py::handle truncated, py::handle streams) {
    if (columns.size() != types_.size()) return py::none();
    columns_.resize(types_.size());
    pointers_.resize(types_.size());
    py::ssize_t n = -1;  // -1: not known yet, otherwise the number of rows
    bool single = false;
    for (size_t f = 0; f < types_.size(); ++f) {
      if (!take_column(f, columns[f], n, single)) return py::none();
    }
    std::vector<uint8_t> one_terminated, one_truncated;
    const uint8_t* terminated_data = take_flags(terminated, n, single, one_terminated);
    if (terminated_data == nullptr) return py::none();
    const uint8_t* truncated_data = nullptr;
    if (!truncated.is_none()) {
      truncated_data = take_flags(truncated, n, single, one_truncated);
      if (truncated_data == nullptr) return py::none();
    }
    const int64_t* streams_data = nullptr;
    if (!streams.is_none()) {
      if (!py::isinstance<py::array_t<int64_t>>(streams)) return py::none();
      const auto array = py::reinterpret_borrow<py::array>(streams);
      if (array.ndim() != 1 || array.shape(0) != n || !(array.flags() & py::array::c_style)) return py::none();
      streams_data = static_cast<const int64_t*>(array.data());
    }
    const size_t rows = static_cast<size_t>(n);
    check_rewards(rows);
    py::array_t<int64_t> handles(n);
    InsertRows request{rows, pointers_.data(), terminated_data, truncated_data, streams_data, count_nan(rows)};
    int64_t* const out = handles.mutable_data();
    if (rows * replay_->record().record_bytes <= kLongWorkBytes) {
      replay_->insert(request, out);
      return handles;
    }
    // Another thread may come in meanwhile and use the members.
    const std::vector<Column> kept = std::exchange(columns_, {});
    const std::vector<const uint8_t*> pointers = std::exchange(pointers_, {});
    request.fields = pointers.data();
    const py::gil_scoped_release released;
    replay_->insert(request, out);
    return handles;
  }

  // A batch in fresh memory, as DLPack capsules: the fields in the schema's order, then discounts, importance weights,
  // handles and steps. A torch function that allocated would let the interpreter's lock go each time, which hands an
  // inserting thread its whole turn.
  py::typing::Tuple<py::capsule, py::ellipsis> sample_fresh(size_t n, double discount, double importance_exponent) {
    const size_t count = maker_->tensors();
    Few<DLManagedTensor*> tensors(count);
    Few<uint8_t*> addresses(count);
    maker_->make(n, tensors.data());
    py::typing::Tuple<py::capsule, py::ellipsis> out(count);
    for (size_t t = 0; t < count; ++t) {
      addresses.data()[t] = static_cast<uint8_t*>(tensors.data()[t]->dl_tensor.data);
      PyTuple_SET_ITEM(out.ptr(), static_cast<py::ssize_t>(t), to_capsule(tensors.data()[t]));
    }
    draw(n, discount, importance_exponent, addresses.data());
    return out;
  }

  // A batch into memory that is there: one address for each tensor of sample_fresh.
  void sample(size_t n, double discount, double importance_exponent,
              const py::typing::Tuple<py::int_, py::ellipsis>& addresses) {
    const size_t count = maker_->tensors();
    if (addresses.size() != count) throw std::invalid_argument("sample needs one address for each tensor");
    Few<uint8_t*> pointers(count);
    for (size_t t = 0; t < count; ++t) {
      PyObject* const address = PyTuple_GET_ITEM(addresses.ptr(), static_cast<py::ssize_t>(t));
      pointers.data()[t] = static_cast<uint8_t*>(PyLong_AsVoidPtr(address));
      if (pointers.data()[t] == nullptr) throw py::error_already_set();
    }
    draw(n, discount, importance_exponent, pointers.data());
  }

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
            {"busy_slots", s.busy_slots},
            {"retries", s.retries},
            {"saturated_weights", s.saturated_weights},
            {"nan_observations", s.nan_observations}};
  }

  py::array_t<int64_t> weights() const {
    py::array_t<int64_t> out(static_cast<py::ssize_t>(replay_->capacity()));
    replay_->read_weights(out.mutable_data());
    return out;
  }

  // The used parts of the segment as views of its bytes: no copy, and only meaningful while nothing else runs.
  static py::typing::Dict<py::str, py::array_t<uint8_t>> parts(const py::object& self) {
    const auto& me = self.cast<const PyReplay&>();
    const SegmentLayout& layout = me.replay_->layout();
    const auto view = [&](uint64_t from, uint64_t to) {
      return py::array_t<uint8_t>(static_cast<py::ssize_t>(to - from), me.replay_->segment() + from, self);
    };
    py::typing::Dict<py::str, py::array_t<uint8_t>> out;
    out["index"] = view(0, layout.records_at);
    out["records"] = view(layout.records_at, layout.records_at + me.replay_->size() * layout.record_bytes);
    return out;
  }

  void restore(const py::array_t<uint8_t, py::array::c_style>& index,
               const py::array_t<uint8_t, py::array::c_style>& records) {
    const SegmentLayout& layout = replay_->layout();
    const auto index_bytes = static_cast<uint64_t>(index.size()), record_bytes = static_cast<uint64_t>(records.size());
    if (index_bytes != layout.records_at) {
      throw std::invalid_argument("the saved replay's index has " + std::to_string(index_bytes) +
                                  " bytes; it must have " + std::to_string(layout.records_at));
    }
    const auto& saved = *reinterpret_cast<const SegmentHeader*>(index.data());
    replay_->check_header(saved);
    const uint64_t rows = std::min<uint64_t>(saved.next_ticket, replay_->capacity());
    if (record_bytes != rows * layout.record_bytes) {
      throw std::invalid_argument("the saved replay's records have " + std::to_string(record_bytes) + " bytes; its " +
                                  std::to_string(rows) + " rows need " + std::to_string(rows * layout.record_bytes));
    }
    std::memcpy(replay_->segment(), index.data(), index_bytes);
    std::memcpy(replay_->segment() + layout.records_at, records.data(), record_bytes);
  }

  uint64_t size() const { return replay_->size(); }
  uint64_t capacity() const { return replay_->capacity(); }
  uint64_t bytes() const { return replay_->bytes(); }
  size_t pooled_bytes() const { return maker_->pool().free_bytes(); }
  size_t record_bytes() const { return replay_->record().record_bytes; }
  bool sums_are_exact() const { return replay_->sums_are_exact(); }
  uint64_t default_weight() const { return replay_->default_weight().weight; }

 private:
  // addresses: one for each tensor of a batch.
  void draw(size_t n, double discount, double importance_exponent, uint8_t* const* addresses) {
    uint8_t* const* const rest = addresses + types_.size();
    const SampleOut out{addresses, reinterpret_cast<float*>(rest[0]), reinterpret_cast<float*>(rest[1]),
                        reinterpret_cast<int64_t*>(rest[2]), reinterpret_cast<int64_t*>(rest[3])};
    std::optional<py::gil_scoped_release> released;
    if (n * replay_->record().record_bytes > kLongWorkBytes) released.emplace();
    SampleRequest request;
    request.n = n;
    request.discount = discount;
    request.importance_exponent = importance_exponent;
    request.stratified = stratified_;
    replay_->sample(request, out);
  }

  // Sets pointers_[f]; false: leave it to the facade.
  bool take_column(size_t f, py::handle value, py::ssize_t& n, bool& single) {
    const FieldType& type = types_[f];
    if (type.shape.empty() && single && PyFloat_Check(value.ptr())) {
      return take_scalar(f, PyFloat_AS_DOUBLE(value.ptr()));
    }
    if (!py::isinstance<py::array>(value)) return false;
    const auto array = py::reinterpret_borrow<py::array>(value);
    if (!(array.flags() & py::array::c_style)) return false;
    const auto own_dims = static_cast<py::ssize_t>(type.shape.size());
    const py::ssize_t lead = array.ndim() - own_dims;
    if (lead != 0 && lead != 1) return false;
    if (n < 0) {
      single = lead == 0;
      n = single ? 1 : array.shape(0);
    } else if (single != (lead == 0) || (lead == 1 && array.shape(0) != n)) {
      return false;
    }
    for (py::ssize_t d = 0; d < own_dims; ++d) {
      if (array.shape(lead + d) != type.shape[static_cast<size_t>(d)]) return false;
    }
    const auto* data = static_cast<const uint8_t*>(array.data());
    const char have = array.dtype().char_(), want = type.dtype.char_();
    if (array.dtype().byteorder() == '>') return false;
    if (have == want || array.dtype().equal(type.dtype)) {
      pointers_[f] = data;
      return true;
    }
    if (have == 'd' && want == 'f') {  // MuJoCo's float64 observations into float32 rows
      const size_t count = type.elements * static_cast<size_t>(n);
      columns_[f].converted.resize(count * sizeof(float));
      auto* const out = reinterpret_cast<float*>(columns_[f].converted.data());
      const auto* const in = reinterpret_cast<const double*>(data);
      for (size_t i = 0; i < count; ++i) out[i] = static_cast<float>(in[i]);
      pointers_[f] = columns_[f].converted.data();
      return true;
    }
    return false;
  }

  bool take_scalar(size_t f, double number) {
    const char want = types_[f].dtype.char_();
    if (want != 'f' && want != 'd') return false;
    columns_[f].converted.resize(sizeof(double));
    if (want == 'f') {
      const float narrow = static_cast<float>(number);
      std::memcpy(columns_[f].converted.data(), &narrow, sizeof narrow);
    } else {
      std::memcpy(columns_[f].converted.data(), &number, sizeof number);
    }
    pointers_[f] = columns_[f].converted.data();
    return true;
  }

  static const uint8_t* take_flags(py::handle value, py::ssize_t n, bool single, std::vector<uint8_t>& own) {
    if (single && PyBool_Check(value.ptr())) {
      own.assign(1, value.ptr() == Py_True ? 1 : 0);
      return own.data();
    }
    if (!py::isinstance<py::array_t<bool>>(value)) return nullptr;
    const auto array = py::reinterpret_borrow<py::array>(value);
    if (!(array.flags() & py::array::c_style) || array.size() != n || array.ndim() != (single ? 0 : 1)) return nullptr;
    return static_cast<const uint8_t*>(array.data());
  }

  void check_rewards(size_t n) const {
    const char type = types_[reward_field_].dtype.char_();
    for (size_t i = 0; i < n; ++i) {
      double reward = 0.0;
      if (type == 'f') reward = reinterpret_cast<const float*>(pointers_[reward_field_])[i];
      if (type == 'd') reward = reinterpret_cast<const double*>(pointers_[reward_field_])[i];
      if (!std::isfinite(reward)) {
        throw std::invalid_argument("rewards[" + std::to_string(i) + "] is " + std::to_string(reward) +
                                    "; rewards must be finite in the buffer's dtype");
      }
    }
  }

  // How many of the n rows from `first` on hold a NaN in field f.
  size_t nan_rows(size_t f, size_t first, size_t n) const {
    const size_t width = types_[f].elements;
    switch (types_[f].dtype.char_()) {
      case 'f':
        return kernels().replay.nan_rows_f32(reinterpret_cast<const float*>(pointers_[f]) + first * width, n, width);
      case 'd':
        return kernels().replay.nan_rows_f64(reinterpret_cast<const double*>(pointers_[f]) + first * width, n, width);
      default:
        return 0;
    }
  }

  // Rows whose observations or next observations hold a NaN. Fields come observations first, next observations last.
  size_t count_nan(size_t n) const {
    const auto in_observations = [&](size_t first, size_t rows) {
      size_t found = 0;
      for (size_t f = 0; f < observation_fields_; ++f) {
        found += nan_rows(f, first, rows) + nan_rows(types_.size() - 1 - f, first, rows);
      }
      return found;
    };
    if (in_observations(0, n) == 0) return 0;  // as nearly always
    size_t rows = 0;
    for (size_t row = 0; row < n; ++row) rows += in_observations(row, 1) != 0;
    return rows;
  }

  size_t observation_fields_;
  bool stratified_;
  std::vector<FieldType> types_;
  size_t reward_field_ = 0;
  std::vector<Column> columns_;
  std::vector<const uint8_t*> pointers_;
  std::unique_ptr<Replay> replay_;
  std::unique_ptr<BatchMaker> maker_;
};

}  // namespace

void bind_replay(py::module_& m) {
  m.attr("MAX_STREAMS") = kStreams;
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const NothingToSample& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    }
  });
  py::class_<PyReplay>(m, "Replay", "The compiled replay. angle_rl.replay is its public face.")
      .def(py::init<uint64_t, const std::vector<std::tuple<std::string, py::dtype, std::vector<py::ssize_t>>>&, size_t,
                    bool, bool, double, double, uint64_t>(),
           py::arg("capacity"), py::arg("fields"), py::arg("observation_fields"), py::arg("prioritized"),
           py::arg("stratified"), py::arg("priority_exponent"), py::arg("priority_epsilon"), py::arg("seed"))
      .def("insert", &PyReplay::insert, py::arg("columns"), py::arg("terminated"), py::arg("truncated"),
           py::arg("streams"))
      .def("sample", &PyReplay::sample, py::arg("n"), py::arg("discount"), py::arg("importance_exponent"),
           py::arg("addresses"))
      .def("sample_fresh", &PyReplay::sample_fresh, py::arg("n"), py::arg("discount"), py::arg("importance_exponent"))
      .def("update", &PyReplay::update, py::arg("handles"), py::arg("td_errors"), py::arg("is_double"), py::arg("n"))
      .def("stats", &PyReplay::stats)
      .def("weights", &PyReplay::weights)
      .def("parts", [](const py::object& self) { return PyReplay::parts(self); })
      .def("restore", &PyReplay::restore, py::arg("index"), py::arg("records"))
      .def("sums_are_exact", &PyReplay::sums_are_exact)
      .def("default_weight", &PyReplay::default_weight)
      .def_property_readonly("size", &PyReplay::size)
      .def_property_readonly("capacity", &PyReplay::capacity)
      .def_property_readonly("nbytes", &PyReplay::bytes)
      .def_property_readonly("pooled_bytes", &PyReplay::pooled_bytes)
      .def_property_readonly("record_bytes", &PyReplay::record_bytes);
}

}  // namespace angle
