#include "core/floor.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>

namespace angle {
namespace {

constexpr size_t kSource = 1024;         // distinct rows to insert
constexpr size_t kUpdateRows = 1 << 16;  // random rows that `update` walks through

inline void prefetch(const void* address) { __builtin_prefetch(address); }

void require(bool good, const char* message) {
  if (!good) throw std::invalid_argument(message);
}

constexpr size_t kTop = ReplayFloor::kLow * ReplayFloor::kMiddle * ReplayFloor::kHigh;  // leaves under 16 middle sums
constexpr size_t kLanes = 8;                                                            // draws searched side by side

size_t checked(size_t capacity) {
  require(capacity > 0, "capacity is 0; it must be at least 1");
  require(capacity < UINT32_MAX, "capacity does not fit 32 bits");
  return capacity;
}

// Groups of kTop leaves, as many as the levels above want: whole groups of 16 where there are such levels.
size_t tops(size_t capacity) {
  size_t nodes = (capacity + kTop - 1) / kTop, whole = 1;
  while (nodes > ReplayFloor::kMaxTop) {
    nodes = (nodes + ReplayFloor::kHigh - 1) / ReplayFloor::kHigh;
    whole *= ReplayFloor::kHigh;
  }
  return nodes * whole;
}

uint64_t split_mix(uint64_t& state) {  // SplitMix64 (Steele, Lea and Flood, 2014)
  uint64_t z = state += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(clock::now() - start_).count(); }

 private:
  using clock = std::chrono::steady_clock;
  clock::time_point start_ = clock::now();
};

// The child of a group of N in which `target` falls, without a branch; subtracts the children before it from
// `target`. First among four partial sums, then among N / 4 children: the chains are short and independent
// draws overlap.
template <size_t N>
inline size_t descend(const int64_t* group, int64_t& target) {
  constexpr size_t kBlock = N / 4;
  int64_t sums[4];
  for (size_t b = 0; b < 4; ++b) {
    sums[b] = 0;
    for (size_t i = 0; i < kBlock; ++i) sums[b] += group[b * kBlock + i];
  }
  const int64_t second = sums[0] + sums[1], third = second + sums[2];
  const int64_t past0 = -static_cast<int64_t>(target >= sums[0]), past1 = -static_cast<int64_t>(target >= second),
                past2 = -static_cast<int64_t>(target >= third);
  const size_t block = static_cast<size_t>(-(past0 + past1 + past2));
  const int64_t rest = target - (sums[0] & past0) - (sums[1] & past1) - (sums[2] & past2);
  const int64_t* child = group + block * kBlock;
  int64_t prefix = 0, passed = 0;
  size_t index = block * kBlock;
  for (size_t i = 0; i + 1 < kBlock; ++i) {
    prefix += child[i];
    const int64_t beyond = -static_cast<int64_t>(rest >= prefix);
    index -= static_cast<size_t>(beyond);
    passed += child[i] & beyond;
  }
  target = rest - passed;
  return index;
}

}  // namespace

template <size_t Observation, size_t Action>
ReplayFloorT<Observation, Action>::ReplayFloorT(size_t capacity, uint64_t seed)
    : capacity_(checked(capacity)),
      state_(seed),
      records_(capacity * kRecord),
      leaves_(tops(capacity) * kHigh * kMiddle * kLow),
      low_(tops(capacity) * kHigh * kMiddle),
      middle_(tops(capacity) * kHigh) {
  size_t nodes = tops(capacity);
  for (; nodes > kMaxTop; nodes /= kHigh) upper_.emplace_back(nodes);
  top_.assign(nodes, 0);
  source_.resize(kSource * kRecord);
  search_ = 1;
  while (search_ * 2 <= top_.size()) search_ *= 2;
  prefix_.assign(2 * search_, INT64_MAX);
  rows_.resize(kUpdateRows);
  new_weights_.resize(kUpdateRows);
  for (size_t row = 0; row < capacity + kSource; ++row) {
    float* values = reinterpret_cast<float*>(row < capacity ? records_.data() + row * kRecord
                                                            : source_.data() + (row - capacity) * kRecord);
    for (size_t i = 0; i < kRecord / sizeof(float); ++i) {
      values[i] = static_cast<float>(row & 0xFFFF) + static_cast<float>(i) / 64;
    }
  }
  for (size_t row = 0; row < capacity; ++row) set_weight(row, static_cast<int64_t>(random() >> 44) + 1);
  for (size_t i = 0; i < kUpdateRows; ++i) {
    rows_[i] = static_cast<uint32_t>(random() % capacity);
    new_weights_[i] = static_cast<int64_t>(random() >> 44) + 1;
  }
}

template <size_t Observation, size_t Action>
uint64_t ReplayFloorT<Observation, Action>::random() {
  return split_mix(state_);
}

template <size_t Observation, size_t Action>
inline void ReplayFloorT<Observation, Action>::set_weight(size_t row, int64_t weight) {
  const int64_t delta = weight - leaves_[row];
  leaves_[row] = weight;
  low_[row / kLow] += delta;
  middle_[row / (kLow * kMiddle)] += delta;
  size_t node = row / kTop;
  for (Pages<int64_t>& sums : upper_) {
    sums[node] += delta;
    node /= kHigh;
  }
  top_[node] += delta;
}

template <size_t Observation, size_t Action>
void ReplayFloorT<Observation, Action>::insert_once(size_t rows) {
  for (size_t i = 0; i < rows; ++i) {
    std::memcpy(records_.data() + next_ * kRecord, source_.data() + (next_ % kSource) * kRecord, kRecord);
    set_weight(next_, int64_t{1} << 20);
    next_ = next_ + 1 == capacity_ ? 0 : next_ + 1;
  }
}

template <size_t Observation, size_t Action>
void ReplayFloorT<Observation, Action>::resize_outputs(size_t batch) {
  const size_t rounded = (batch + kLanes - 1) / kLanes * kLanes;
  batch_ = batch;
  indices_.resize(rounded);
  remainders_.resize(rounded);
  observations_.resize(batch * kObservation);
  next_observations_.resize(batch * kObservation);
  actions_.resize(batch * kAction);
  rewards_.resize(batch);
  discounts_.resize(batch);
}

// Level by level over the whole batch, so that each level's misses overlap.
template <size_t Observation, size_t Action>
void ReplayFloorT<Observation, Action>::draw(size_t batch) {
  int64_t sum = 0;
  const size_t tops = top_.size();
  for (size_t i = 0; i < tops; ++i) {
    prefix_[i] = sum;
    sum += top_[i];
  }
  const double width = static_cast<double>(sum) / static_cast<double>(batch);
  for (size_t i = 0; i < batch; i += kLanes) {  // draws of the last lanes beyond the batch are not used
    int64_t target[kLanes];
    size_t node[kLanes] = {};
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const double place = static_cast<double>(i + lane) + static_cast<double>(random() >> 11) * 0x1p-53;
      const int64_t value = static_cast<int64_t>(place * width);
      target[lane] = value < sum ? value : sum - 1;
    }
    for (size_t half = search_; half > 0; half /= 2) {  // the last node whose prefix is not beyond the target
      for (size_t lane = 0; lane < kLanes; ++lane) {
        node[lane] += half & -static_cast<size_t>(prefix_[node[lane] + half] <= target[lane]);
      }
    }
    for (size_t lane = 0; lane < kLanes; ++lane) {
      indices_[i + lane] = static_cast<uint32_t>(node[lane]);
      remainders_[i + lane] = target[lane] - prefix_[node[lane]];
      const int64_t* group = (upper_.empty() ? middle_ : upper_.back()).data() + node[lane] * kHigh;
      for (size_t line = 0; line < kHigh; line += 8) prefetch(group + line);
    }
  }
  for (size_t level = upper_.size(); level-- > 0;) {
    const Pages<int64_t>& below = level == 0 ? middle_ : upper_[level - 1];
    for (size_t i = 0; i < batch; ++i) {
      const size_t first = indices_[i] * kHigh;
      const size_t node = first + descend<kHigh>(upper_[level].data() + first, remainders_[i]);
      indices_[i] = static_cast<uint32_t>(node);
      const int64_t* group = below.data() + node * kHigh;
      for (size_t line = 0; line < kHigh; line += 8) prefetch(group + line);
    }
  }
  for (size_t i = 0; i < batch; ++i) {
    const size_t first = indices_[i] * kHigh;
    const size_t node = first + descend<kHigh>(middle_.data() + first, remainders_[i]);
    indices_[i] = static_cast<uint32_t>(node);
    prefetch(low_.data() + node * kMiddle);
  }
  for (size_t i = 0; i < batch; ++i) {
    const size_t first = indices_[i] * kMiddle;
    const size_t node = first + descend<kMiddle>(low_.data() + first, remainders_[i]);
    indices_[i] = static_cast<uint32_t>(node);
    prefetch(leaves_.data() + node * kLow);
  }
  for (size_t i = 0; i < batch; ++i) {
    const size_t first = indices_[i] * kLow;
    const size_t row = first + descend<kLow>(leaves_.data() + first, remainders_[i]);
    indices_[i] = static_cast<uint32_t>(row);
    const unsigned char* record = records_.data() + row * kRecord;
    for (size_t line = 0; line < kRecord; line += 64) prefetch(record + line);
  }
}

template <size_t Observation, size_t Action>
void ReplayFloorT<Observation, Action>::gather(size_t batch) {
  constexpr size_t kNext = kObservation + kAction + 1;  // first float of the next observation in a record
  constexpr size_t kFlag = kNext + kObservation;        // the discount's place
  for (size_t i = 0; i < batch; ++i) {
    const unsigned char* record = records_.data() + indices_[i] * kRecord;
    const auto field = [record](size_t first) { return record + first * sizeof(float); };
    std::memcpy(observations_.data() + i * kObservation, field(0), kObservation * sizeof(float));
    std::memcpy(actions_.data() + i * kAction, field(kObservation), kAction * sizeof(float));
    std::memcpy(rewards_.data() + i, field(kObservation + kAction), sizeof(float));
    std::memcpy(next_observations_.data() + i * kObservation, field(kNext), kObservation * sizeof(float));
    std::memcpy(discounts_.data() + i, field(kFlag), sizeof(float));
  }
}

template <size_t Observation, size_t Action>
double ReplayFloorT<Observation, Action>::insert(size_t rows, size_t iterations) {
  require(rows > 0 && iterations > 0, "rows and iterations must be at least 1");
  const Stopwatch watch;
  for (size_t i = 0; i < iterations; ++i) insert_once(rows);
  return watch.seconds();
}

template <size_t Observation, size_t Action>
double ReplayFloorT<Observation, Action>::sample(size_t batch, size_t iterations) {
  require(batch > 0 && iterations > 0, "batch and iterations must be at least 1");
  resize_outputs(batch);
  const Stopwatch watch;
  for (size_t i = 0; i < iterations; ++i) {
    draw(batch);
    gather(batch);
  }
  return watch.seconds();
}

template <size_t Observation, size_t Action>
double ReplayFloorT<Observation, Action>::uniform_sample(size_t batch, size_t iterations) {
  require(batch > 0 && iterations > 0, "batch and iterations must be at least 1");
  resize_outputs(batch);
  const Stopwatch watch;
  for (size_t i = 0; i < iterations; ++i) {
    for (size_t k = 0; k < batch; ++k) {
      const uint32_t row = static_cast<uint32_t>((random() >> 32) * capacity_ >> 32);
      indices_[k] = row;
      for (size_t line = 0; line < kRecord; line += 64) prefetch(records_.data() + row * kRecord + line);
    }
    gather(batch);
  }
  return watch.seconds();
}

template <size_t Observation, size_t Action>
double ReplayFloorT<Observation, Action>::update(size_t batch, size_t iterations) {
  require(batch > 0 && iterations > 0, "batch and iterations must be at least 1");
  require(batch <= kUpdateRows, "batch is larger than 65536");
  const Stopwatch watch;
  size_t first = 0;
  for (size_t i = 0; i < iterations; ++i, first += batch) {
    if (first + batch > kUpdateRows) first = 0;
    for (size_t k = first; k < first + batch; ++k) {
      prefetch(&leaves_[rows_[k]]);
      prefetch(&low_[rows_[k] / kLow]);
    }
    for (size_t k = first; k < first + batch; ++k) set_weight(rows_[k], new_weights_[k]);
  }
  return watch.seconds();
}

template <size_t Observation, size_t Action>
double ReplayFloorT<Observation, Action>::learning(size_t batch, size_t iterations, size_t inserts) {
  require(batch > 0 && iterations > 0, "batch and iterations must be at least 1");
  require(batch <= kUpdateRows, "batch is larger than 65536");
  resize_outputs(batch);
  const Stopwatch watch;
  for (size_t i = 0; i < iterations; ++i) {
    insert_once(inserts);
    draw(batch);
    gather(batch);
    for (size_t k = 0; k < batch; ++k) set_weight(indices_[k], new_weights_[k]);
  }
  return watch.seconds();
}

template <size_t Observation, size_t Action>
double ReplayFloorT<Observation, Action>::learn(size_t batch, size_t iterations) {
  return learning(batch, iterations, 0);
}

template <size_t Observation, size_t Action>
double ReplayFloorT<Observation, Action>::cycle(size_t batch, size_t iterations) {
  return learning(batch, iterations, 1);
}

template <size_t Observation, size_t Action>
size_t ReplayFloorT<Observation, Action>::checked_row(size_t row) const {
  require(row < capacity_, "row lies beyond the capacity");
  return row;
}

template <size_t Observation, size_t Action>
const float* ReplayFloorT<Observation, Action>::record(size_t row) const {
  return reinterpret_cast<const float*>(records_.data() + checked_row(row) * kRecord);
}

template <size_t Observation, size_t Action>
int64_t ReplayFloorT<Observation, Action>::total() const {
  int64_t sum = 0;
  for (const int64_t value : top_) sum += value;
  return sum;
}

template <size_t Observation, size_t Action>
bool ReplayFloorT<Observation, Action>::sums_agree() const {
  const auto agree = [](const int64_t* children, size_t width, const int64_t* sums, size_t nodes) {
    for (size_t node = 0; node < nodes; ++node) {
      int64_t sum = 0;
      for (size_t i = 0; i < width; ++i) sum += children[node * width + i];
      if (sum != sums[node]) return false;
    }
    return true;
  };
  const Pages<int64_t>* below = &middle_;
  for (const Pages<int64_t>& sums : upper_) {
    if (!agree(below->data(), kHigh, sums.data(), sums.size())) return false;
    below = &sums;
  }
  return agree(leaves_.data(), kLow, low_.data(), low_.size()) &&
         agree(low_.data(), kMiddle, middle_.data(), middle_.size()) &&
         agree(below->data(), kHigh, top_.data(), top_.size());
}

template class ReplayFloorT<17, 6>;
template class ReplayFloorT<3, 1>;

CopyFloor::CopyFloor(size_t rows, size_t half_bytes)
    : rows_(checked(rows)), half_bytes_(half_bytes), records_(rows * 2 * std::max<size_t>(half_bytes, 1)) {
  require(half_bytes > 0, "half_bytes is 0; it must be at least 1");
  for (size_t row = 0; row < rows; ++row) {
    std::memset(records_.data() + 2 * row * half_bytes, static_cast<int>(row % 251), 2 * half_bytes);
  }
}

double CopyFloor::sample(size_t batch, size_t iterations) {
  require(batch > 0 && iterations > 0, "batch and iterations must be at least 1");
  first_.resize(batch * half_bytes_);
  second_.resize(batch * half_bytes_);
  drawn_.resize(batch);
  const Stopwatch watch;
  for (size_t i = 0; i < iterations; ++i) {
    for (size_t& row : drawn_) row = (split_mix(state_) >> 32) * rows_ >> 32;
    for (size_t k = 0; k < batch; ++k) {
      const unsigned char* const from = records_.data() + 2 * drawn_[k] * half_bytes_;
      std::memcpy(first_.data() + k * half_bytes_, from, half_bytes_);
      std::memcpy(second_.data() + k * half_bytes_, from + half_bytes_, half_bytes_);
    }
  }
  return watch.seconds();
}

bool CopyFloor::copies_agree() const {
  for (size_t k = 0; k < drawn_.size(); ++k) {
    for (const std::vector<unsigned char>* copies : {&first_, &second_}) {
      const unsigned char* const copy = copies->data() + k * half_bytes_;
      if (copy[0] != drawn_[k] % 251 || copy[half_bytes_ - 1] != drawn_[k] % 251) return false;
    }
  }
  return true;
}

}  // namespace angle
