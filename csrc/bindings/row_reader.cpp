#include "bindings/row_reader.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

namespace py = pybind11;

namespace angle {
namespace {

// One truth value for a single row, bool [n] otherwise; nullptr: leave it to the facade.
const uint8_t* take_flags(py::handle value, py::ssize_t n, bool single, uint8_t& own) {
  if (single && PyBool_Check(value.ptr())) {
    own = value.ptr() == Py_True;
    return &own;
  }
  if (!py::isinstance<py::array_t<bool>>(value)) return nullptr;
  const auto array = py::reinterpret_borrow<py::array>(value);
  if (!(array.flags() & py::array::c_style) || array.size() != n || array.ndim() != (single ? 0 : 1)) return nullptr;
  return static_cast<const uint8_t*>(array.data());
}

template <class T>
const T* take_vector(py::handle value, py::ssize_t n) {
  if (!py::isinstance<py::array_t<T>>(value)) return nullptr;
  const auto array = py::reinterpret_borrow<py::array>(value);
  if (array.ndim() != 1 || array.shape(0) != n || !(array.flags() & py::array::c_style)) return nullptr;
  return static_cast<const T*>(array.data());
}

}  // namespace

RowReader::RowReader(std::vector<FieldType> types, size_t observation_fields)
    : types_(std::move(types)), observation_fields_(observation_fields) {
  while (types_.at(reward_field_).name != "rewards") ++reward_field_;
}

bool RowReader::read(const py::tuple& columns, py::handle terminated, py::handle truncated, py::handle streams,
                     py::handle priorities, InsertRows& rows) {
  if (columns.size() != types_.size()) return false;
  columns_.resize(types_.size());
  pointers_.resize(types_.size());
  py::ssize_t n = -1;  // -1: not known yet, otherwise the number of rows
  bool single = false;
  for (size_t f = 0; f < types_.size(); ++f) {
    if (!take_column(f, columns[f], n, single)) return false;
  }
  rows.terminated = take_flags(terminated, n, single, one_terminated_);
  if (rows.terminated == nullptr) return false;
  if (!truncated.is_none() && (rows.truncated = take_flags(truncated, n, single, one_truncated_)) == nullptr) {
    return false;
  }
  if (single && PyLong_CheckExact(streams.ptr())) {
    one_stream_ = PyLong_AsLongLong(streams.ptr());
    if (one_stream_ == -1 && PyErr_Occurred() != nullptr) PyErr_Clear();  // -1 is refused with all other such numbers
    rows.streams = &one_stream_;
  } else if (!streams.is_none() && (rows.streams = take_vector<int64_t>(streams, n)) == nullptr) {
    return false;
  }
  if (!priorities.is_none() && (rows.priorities = take_vector<float>(priorities, n)) == nullptr) return false;
  rows.n = static_cast<size_t>(n);
  rows.fields = pointers_.data();
  check_rewards(rows.n);
  rows.nan_rows = count_nan(rows.n);
  return true;
}

void RowReader::hand_over(InsertRows& rows, Held& held) {
  held = {std::exchange(columns_, {}), std::exchange(pointers_, {}), one_terminated_, one_truncated_, one_stream_};
  rows.fields = held.pointers.data();
  if (rows.terminated == &one_terminated_) rows.terminated = &held.terminated;
  if (rows.truncated == &one_truncated_) rows.truncated = &held.truncated;
  if (rows.streams == &one_stream_) rows.streams = &held.stream;
}

// Sets pointers_[f]; false: leave it to the facade.
bool RowReader::take_column(size_t f, py::handle value, py::ssize_t& n, bool& single) {
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

bool RowReader::take_scalar(size_t f, double number) {
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

void RowReader::check_rewards(size_t n) const {
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
size_t RowReader::nan_rows(size_t f, size_t first, size_t n) const {
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
size_t RowReader::count_nan(size_t n) const {
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

}  // namespace angle
