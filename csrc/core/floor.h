// The machine's floor under the replay: the same work by plain single-threaded C++ without atomics, checks,
// handles, importance weights or the map from td errors to weights. Benchmarks print it beside the real
// thing; nothing else uses it.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <vector>

namespace angle {

// A zeroed array on huge pages where the system gives them: a random row then costs one miss and no page
// walk.
template <class T>
class Pages {
 public:
  explicit Pages(size_t size) : size_(size) {
    const size_t bytes = (size * sizeof(T) + kPage - 1) / kPage * kPage;
    void* memory = std::aligned_alloc(kPage, bytes);
    if (memory == nullptr) throw std::bad_alloc();
    data_.reset(static_cast<T*>(memory));
#ifdef MADV_HUGEPAGE
    madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    std::memset(memory, 0, bytes);
  }
  T* data() const { return data_.get(); }
  T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  static constexpr size_t kPage = size_t{1} << 21;
  size_t size_;
  std::unique_ptr<T[], Free> data_;
};

// A sum tree of int64 weights (groups of 8 leaves, 8 sums, 16 sums, and of 16 again until at most kMaxTop nodes are
// left, which each call sums) over records on whole cache lines that hold one transition: observation, action, reward,
// next observation and discount in float32. One thread only.
template <size_t Observation, size_t Action>
class ReplayFloorT {
 public:
  static constexpr size_t kObservation = Observation;                                                 // float32
  static constexpr size_t kAction = Action;                                                           // float32
  static constexpr size_t kRecord = ((2 * Observation + Action + 2) * sizeof(float) + 63) / 64 * 64;  // bytes a record
  static constexpr size_t kLow = 8, kMiddle = 8, kHigh = 16;  // children a node, from the leaves up
  static constexpr size_t kMaxTop = 2048;

  // Fills `capacity` records and weights from `seed`. O(capacity). Throws std::invalid_argument when capacity
  // is 0.
  ReplayFloorT(size_t capacity, uint64_t seed);

  // Each runs its work `iterations` times and returns the seconds taken. Arguments of 0 throw
  // std::invalid_argument.
  double insert(size_t rows, size_t iterations);           // rows in a row: record copy, leaf, three sums
  double sample(size_t batch, size_t iterations);          // stratified descent and gather
  double uniform_sample(size_t batch, size_t iterations);  // uniform indices and gather
  double update(size_t batch, size_t iterations);          // leaf and three sums for random rows
  double learn(size_t batch, size_t iterations);           // sample batch, update the sampled rows
  double cycle(size_t batch, size_t iterations);           // insert 1 and learn

  // What the timed functions did last, to check answers by.
  std::span<const uint32_t> indices() const { return {indices_.data(), batch_}; }  // [batch] of the last sample
  std::span<const float> observations() const { return observations_; }            // [batch * Observation]
  int64_t weight(size_t row) const { return leaves_[row]; }                        // row < capacity
  size_t checked_row(size_t row) const;   // row, or std::invalid_argument when it lies beyond the capacity
  const float* record(size_t row) const;  // first float of a stored observation
  int64_t total() const;                  // sum over the top. O(kMaxTop)
  bool sums_agree() const;                // every sum is its children's. O(capacity)

 private:
  void insert_once(size_t rows);
  void set_weight(size_t row, int64_t weight);
  void resize_outputs(size_t batch);
  double learning(size_t batch, size_t iterations, size_t inserts);
  void draw(size_t batch);
  void gather(size_t batch);
  uint64_t random();

  size_t capacity_;
  size_t next_ = 0, batch_ = 0;
  size_t search_ = 1;  // largest power of two not above the number of top nodes
  uint64_t state_;
  Pages<unsigned char> records_;
  std::vector<unsigned char> source_;  // rows to insert
  Pages<int64_t> leaves_, low_, middle_;
  std::vector<Pages<int64_t>> upper_;  // between the middle and the top, from below
  std::vector<int64_t> top_, prefix_;
  std::vector<uint32_t> indices_, rows_;
  std::vector<int64_t> remainders_, new_weights_;
  std::vector<float> observations_, actions_, rewards_, next_observations_, discounts_;
};

extern template class ReplayFloorT<17, 6>;
extern template class ReplayFloorT<3, 1>;
using ReplayFloor = ReplayFloorT<17, 6>;      // HalfCheetah's rows, records of 192 bytes
using SmallReplayFloor = ReplayFloorT<3, 1>;  // rows of 32 bytes, records of 64

// The memory's floor under large rows: copies of random rows, in two halves each, into two arrays that are reused.
// One thread only.
class CopyFloor {
 public:
  // `rows` rows of 2 * half_bytes, filled. Throws std::invalid_argument when either is 0.
  CopyFloor(size_t rows, size_t half_bytes);
  // Copies `batch` rows `iterations` times and returns the seconds taken. Arguments of 0 throw std::invalid_argument.
  double sample(size_t batch, size_t iterations);
  // Whether the copies are the rows that were drawn last. O(batch).
  bool copies_agree() const;

 private:
  size_t rows_, half_bytes_;
  uint64_t state_ = 1;
  Pages<unsigned char> records_;
  std::vector<unsigned char> first_, second_;
  std::vector<size_t> drawn_;
};

}  // namespace angle
