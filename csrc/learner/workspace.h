// One block of memory for all that an update writes, laid out once.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "kernels/learner_kernels.h"

namespace angle {

// A row-major matrix somewhere; `row` is its pitch in elements.
template <class T>
struct Matrix {
  T* data = nullptr;
  size_t row = 0;
  T* at(size_t i, size_t j = 0) const { return data + i * row + j; }
  Matrix columns_from(size_t j) const { return {data + j, row}; }
};

class Workspace {
 public:
  // Calls lay_out(*this) twice: to measure, then to hand out zeroed memory. Throws std::bad_alloc.
  template <class LayOut>
  void make(const LayOut& lay_out) {
    base_ = used_ = 0;
    lay_out(*this);
    memory_.reset(static_cast<std::byte*>(::operator new(used_, std::align_val_t{kLine})));
    std::memset(memory_.get(), 0, used_);
    base_ = reinterpret_cast<uintptr_t>(memory_.get());
    used_ = 0;
    lay_out(*this);
  }

  // n elements at the start of a cache line.
  template <class T>
  T* take(size_t n) {
    T* const out = reinterpret_cast<T*>(base_ + used_);
    used_ += (n * sizeof(T) + kLine - 1) / kLine * kLine;
    return out;
  }
  // A matrix whose rows can be read to the next multiple of kColumnMultiple.
  template <class T>
  Matrix<T> matrix(size_t rows, size_t columns) {
    const size_t row = padded_pitch<T>(columns);
    return {take<T>(rows * row), row};
  }
  size_t bytes() const { return used_; }

 private:
  static constexpr size_t kLine = 64;
  struct Free {
    void operator()(std::byte* memory) const { ::operator delete(memory, std::align_val_t{kLine}); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  uintptr_t base_ = 0, used_ = 0;
};

}  // namespace angle
