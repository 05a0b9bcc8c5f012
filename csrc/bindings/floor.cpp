#include "core/floor.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <chrono>
#include <cmath>
#include <stdexcept>

#include "bindings/bindings.h"
#include "kernels/kernels.h"

namespace py = pybind11;

namespace angle {

namespace {

template <class T>
py::array_t<T> copy(std::span<const T> values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

template <class Floor>
void bind_tree_floor(py::module_& m, const char* name, const char* doc) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::class_<Floor>(m, name, doc)
      .def(py::init<size_t, uint64_t>(), py::arg("capacity"), py::arg("seed") = 0)
      .def("insert", &Floor::insert, py::arg("rows"), py::arg("iterations"), release())
      .def("sample", &Floor::sample, py::arg("batch"), py::arg("iterations"), release())
      .def("uniform_sample", &Floor::uniform_sample, py::arg("batch"), py::arg("iterations"), release())
      .def("update", &Floor::update, py::arg("batch"), py::arg("iterations"), release())
      .def("learn", &Floor::learn, py::arg("batch"), py::arg("iterations"), release())
      .def("cycle", &Floor::cycle, py::arg("batch"), py::arg("iterations"), release())
      .def(
          "indices", [](const Floor& self) { return copy(self.indices()); }, "uint32 rows of the last sample.")
      .def(
          "observations", [](const Floor& self) { return copy(self.observations()); },
          "float32 observations of the last sample, one row after another.")
      .def(
          "weight", [](const Floor& self, size_t row) { return self.weight(self.checked_row(row)); }, py::arg("row"),
          "Weight of a row.")
      .def(
          "record", [](const Floor& self, size_t row) { return py::float_(*self.record(row)); }, py::arg("row"),
          "First number of a stored observation.")
      .def("total", &Floor::total, "Sum of the weights.")
      .def("sums_agree", &Floor::sums_agree, "Whether every sum is its children's.");
}

// The product that a learner's layers are made of, again and again on the same matrices: c [m, n] = a [m, k] * b [k,
// n].
class ProductFloor {
 public:
  // O(m * k + k * n). Throws std::invalid_argument where a size is 0.
  ProductFloor(size_t m, size_t n, size_t k)
      : m_(m), n_(n), k_(k), pitch_(pitch_of(n)), a_(m * k + kColumnMultiple), b_(k * pitch_), c_(m * pitch_) {
    if (m == 0 || n == 0 || k == 0) throw std::invalid_argument("m, n and k must be at least 1");
    for (size_t i = 0; i < m * k; ++i) a_[i] = value(i, 7);
    for (size_t l = 0; l < k; ++l) {
      for (size_t j = 0; j < n; ++j) b_[l * pitch_ + j] = value(l * n + j, 11);
    }
  }

  // Seconds that `iterations` products took. O(m * n * k) each. One thread.
  double product(size_t iterations) {
    Product<float> p{};
    p.a = a_.data(), p.a_row = k_, p.a_step = 1;
    p.b = b_.data(), p.b_row = pitch_;
    p.c = c_.data(), p.c_row = pitch_;
    p.m = m_, p.n = n_, p.k = k_;
    const auto run = kernels().learner.f32.product;
    const auto start = std::chrono::steady_clock::now();
    for (size_t i = 0; i < iterations; ++i) run(p);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  // Whether 16 rows of the last product are the factors', to float32's rounding. O(n * k).
  bool agrees() const {
    for (size_t i = 0; i < m_; i += (m_ + 15) / 16) {
      for (size_t j = 0; j < n_; ++j) {
        double sum = 0.0, size = 0.0;
        for (size_t l = 0; l < k_; ++l) {
          const double term = static_cast<double>(a_[i * k_ + l]) * b_[l * pitch_ + j];
          sum += term, size += std::abs(term);
        }
        if (!(std::abs(c_[i * pitch_ + j] - sum) <= 1e-5 * size)) return false;
      }
    }
    return true;
  }

 private:
  // Not a power of two, so that rows do not all fall on the same cache sets.
  static size_t pitch_of(size_t n) { return (n / kColumnMultiple + 2) * kColumnMultiple; }
  static float value(size_t i, size_t step) { return static_cast<float>(i * step % 251) / 128.0F - 1.0F; }

  size_t m_, n_, k_, pitch_;
  Pages<float> a_, b_, c_;
};

}  // namespace

void bind_floor(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  bind_tree_floor<ReplayFloor>(m, "ReplayFloor",
                               "The machine's floor under the replay, for benchmarks: each method runs its work "
                               "`iterations` times and returns the seconds taken. One thread only.");
  bind_tree_floor<SmallReplayFloor>(m, "SmallReplayFloor", "The same with rows of 32 bytes.");
  py::class_<CopyFloor>(m, "CopyFloor", "The floor under large rows: copies of random rows into two arrays.")
      .def(py::init<size_t, size_t>(), py::arg("rows"), py::arg("half_bytes"))
      .def("sample", &CopyFloor::sample, py::arg("batch"), py::arg("iterations"), release())
      .def("copies_agree", &CopyFloor::copies_agree, "Whether the last copies are the rows that were drawn.");
  py::class_<ProductFloor>(m, "ProductFloor",
                           "The learner's float32 product [m, k] x [k, n] alone, for benchmarks. One thread only.")
      .def(py::init<size_t, size_t, size_t>(), py::arg("m"), py::arg("n"), py::arg("k"))
      .def("product", &ProductFloor::product, py::arg("iterations"), release(),
           "Runs it `iterations` times and returns the seconds taken.")
      .def("agrees", &ProductFloor::agrees, release(), "Whether the last product is right, as 16 of its rows show.");
}

}  // namespace angle
