// Rows on their way from Python into the replay: arrays taken by address, or converted where NumPy's same_kind rule and
// a plain loop allow.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "core/replay.h"

namespace angle {

struct FieldType {
  std::string name;
  pybind11::dtype dtype;
  std::vector<pybind11::ssize_t> shape;
  size_t elements;
};

// Rows of one field, ready for the core: either the caller's own memory or a converted copy.
struct Column {
  const uint8_t* data = nullptr;
  std::vector<uint8_t> converted;
};

// Not thread-safe: its buffers serve one insert at a time, under the interpreter's lock.
class RowReader {
 public:
  // What a call's rows point to, for an insert that lets the lock go.
  struct Held {
    std::vector<Column> columns;
    std::vector<const uint8_t*> pointers;
    uint8_t terminated, truncated;
    int64_t stream;
  };

  // types: the schema's fields, observations first, their successors last, "rewards" among them.
  RowReader(std::vector<FieldType> types, size_t observation_fields);

  const std::vector<FieldType>& types() const { return types_; }
  size_t reward_field() const { return reward_field_; }

  // Points `rows` to the arguments' memory. false: they need the facade's conversions. Throws std::invalid_argument for
  // a reward that is not finite.
  bool read(const pybind11::tuple& columns, pybind11::handle terminated, pybind11::handle truncated,
            pybind11::handle streams, pybind11::handle priorities, InsertRows& rows);
  // Gives up what the last read() points to, so that the next one leaves it alone.
  void hand_over(InsertRows& rows, Held& held);

 private:
  bool take_column(size_t f, pybind11::handle value, pybind11::ssize_t& n, bool& single);
  bool take_scalar(size_t f, double number);
  void check_rewards(size_t n) const;
  size_t nan_rows(size_t f, size_t first, size_t n) const;
  size_t count_nan(size_t n) const;

  std::vector<FieldType> types_;
  size_t observation_fields_;
  size_t reward_field_ = 0;
  std::vector<Column> columns_;
  std::vector<const uint8_t*> pointers_;
  uint8_t one_terminated_ = 0, one_truncated_ = 0;
  int64_t one_stream_ = 0;
};

}  // namespace angle
