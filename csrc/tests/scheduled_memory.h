// The memory of scheduled.h's model: what each location was given, and which of it a thread may still read.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "scheduled.h"

namespace angle::testing {

using detail::Cell;
using detail::Change;

inline bool acquires(std::memory_order order) {
  return order == std::memory_order_acquire || order == std::memory_order_consume ||
         order == std::memory_order_acq_rel || order == std::memory_order_seq_cst;
}
inline bool releases(std::memory_order order) {
  return order == std::memory_order_release || order == std::memory_order_acq_rel || order == std::memory_order_seq_cst;
}
inline const char* order_name(std::memory_order order) {
  switch (order) {
    case std::memory_order_relaxed:
      return "relaxed";
    case std::memory_order_consume:
    case std::memory_order_acquire:
      return "acquire";
    case std::memory_order_release:
      return "release";
    case std::memory_order_acq_rel:
      return "acq_rel";
    default:
      return "seq_cst";
  }
}

inline uint64_t read_raw(Cell cell) {
  switch (cell.bytes) {
    case 1:
      return __atomic_load_n(static_cast<uint8_t*>(cell.address), __ATOMIC_RELAXED);
    case 2:
      return __atomic_load_n(static_cast<uint16_t*>(cell.address), __ATOMIC_RELAXED);
    case 4:
      return __atomic_load_n(static_cast<uint32_t*>(cell.address), __ATOMIC_RELAXED);
    default:
      return __atomic_load_n(static_cast<uint64_t*>(cell.address), __ATOMIC_RELAXED);
  }
}
inline void write_raw(Cell cell, uint64_t value) {
  switch (cell.bytes) {
    case 1:
      return __atomic_store_n(static_cast<uint8_t*>(cell.address), static_cast<uint8_t>(value), __ATOMIC_RELAXED);
    case 2:
      return __atomic_store_n(static_cast<uint16_t*>(cell.address), static_cast<uint16_t>(value), __ATOMIC_RELAXED);
    case 4:
      return __atomic_store_n(static_cast<uint32_t*>(cell.address), static_cast<uint32_t>(value), __ATOMIC_RELAXED);
    default:
      return __atomic_store_n(static_cast<uint64_t*>(cell.address), value, __ATOMIC_RELAXED);
  }
}
inline uint64_t cut(uint64_t value, uint8_t bytes) { return bytes == 8 ? value : value & ((1ull << (8 * bytes)) - 1); }
inline uint64_t changed(uint64_t old, Change change, uint64_t operand, uint8_t bytes) {
  switch (change) {
    case Change::kAdd:
      return cut(old + operand, bytes);
    case Change::kSubtract:
      return cut(old - operand, bytes);
    default:
      return operand;
  }
}

// splitmix64 (Steele, Lea and Flood, 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0xD1342543DE82EF95ull + 0x2545F4914F6CDD1Dull) {}
  uint64_t bits() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  uint64_t below(uint64_t n) { return (bits() >> 32) * n >> 32; }  // n < 2**32
  bool with_chance(uint32_t in_256) { return (bits() >> 56) < in_256; }

 private:
  uint64_t state_;
};

struct Store {
  uint64_t value;
  uint32_t time;                // its place in the location's order
  bool bound;                   // to the store before it, which it read
  uint32_t view_at, view_size;  // the released view in Memory::views_; size 0: none
};

using View = std::vector<uint32_t>;  // by location: the time of the oldest store that may be read; missing: 0

// The stores of all locations. Locations are numbered in the order of their first use, so nothing depends on addresses.
class Memory {
 public:
  struct Location {
    Cell cell{};
    uint32_t sequenced = 0;     // no seq_cst load reads a store from before this time
    std::vector<Store> stores;  // in their order
    uint32_t newest() const { return static_cast<uint32_t>(stores.size() - 1); }
    // The first store of this time or later.
    uint32_t index_of(uint32_t time) const {
      uint32_t index = newest();
      while (index > 0 && stores[index - 1].time >= time) --index;
      return index;
    }
  };

  void clear() {
    if (++epoch_ == 0) {
      std::fill(table_.begin(), table_.end(), Entry{});
      epoch_ = 1;
    }
    used_ = 0;
    views_.clear();
  }

  // The location's number; false: it is known with another size.
  bool find(Cell cell, uint32_t* number) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(cell.address);
    if (2 * used_ >= table_.size()) grow();
    size_t at = slot_of(address);
    while (table_[at].epoch == epoch_) {
      if (table_[at].address == address) {
        *number = table_[at].number;
        return locations_[*number].cell.bytes == cell.bytes;
      }
      at = (at + 1) & (table_.size() - 1);
    }
    const uint32_t fresh = static_cast<uint32_t>(used_++);
    if (fresh == locations_.size()) locations_.emplace_back();
    Location& location = locations_[fresh];
    location.cell = cell;
    location.sequenced = 0;
    location.stores.clear();
    location.stores.push_back({read_raw(cell), 0, false, 0, 0});
    table_[at] = {address, epoch_, fresh};
    *number = fresh;
    return true;
  }

  Location& at(uint32_t number) { return locations_[number]; }

  // The time of a store to be put in before store `index`, or after the last one; 0: there is no room.
  uint32_t time_before(uint32_t number, uint32_t index) const {
    constexpr uint32_t kGap = 4096;
    const Location& location = locations_[number];
    const uint32_t before = location.stores[index - 1].time;
    if (index == location.stores.size()) return before + kGap;
    const uint32_t time = before + (location.stores[index].time - before) / 2;
    return location.stores[index].bound || time == before ? 0 : time;
  }

  // Puts a store in before store `index`, or after the last one, and writes the newest to the real memory. `released`:
  // the view that it carries, or nullptr; `continued`: the store that it read and whose view it carries on, or nullptr.
  void add(uint32_t number, uint32_t index, uint32_t time, uint64_t value, const View* released,
           const Store* continued) {
    Store store{value, time, continued != nullptr, 0, 0};
    const uint32_t more = continued == nullptr ? 0 : continued->view_size;
    if (released == nullptr && more != 0) {
      store.view_at = continued->view_at;
      store.view_size = more;
    } else if (released != nullptr) {
      const uint32_t from = more == 0 ? 0 : continued->view_at;
      store.view_at = static_cast<uint32_t>(views_.size());
      store.view_size = std::max(static_cast<uint32_t>(released->size()), more);
      views_.resize(views_.size() + store.view_size, 0);
      std::copy(released->begin(), released->end(), views_.begin() + store.view_at);
      for (uint32_t i = 0; i < more; ++i) {
        views_[store.view_at + i] = std::max(views_[store.view_at + i], views_[from + i]);
      }
    }
    Location& location = locations_[number];
    location.stores.insert(location.stores.begin() + index, store);
    write_raw(location.cell, location.stores.back().value);
  }

  void join(View& view, const Store& store) const {
    if (view.size() < store.view_size) view.resize(store.view_size, 0);
    const uint32_t* const from = views_.data() + store.view_at;
    for (uint32_t i = 0; i < store.view_size; ++i) view[i] = std::max(view[i], from[i]);
  }

  void rewind() {
    for (size_t i = 0; i < used_; ++i) write_raw(locations_[i].cell, locations_[i].stores[0].value);
  }

 private:
  struct Entry {
    uintptr_t address = 0;
    uint32_t epoch = 0;
    uint32_t number = 0;
  };

  size_t slot_of(uintptr_t address) const {
    return static_cast<size_t>(address * 0x9E3779B97F4A7C15ull >> 20) & (table_.size() - 1);
  }
  void grow() {
    std::vector<Entry> old(std::max<size_t>(1024, 2 * table_.size()));
    old.swap(table_);
    for (const Entry& entry : old) {
      if (entry.epoch != epoch_) continue;
      size_t at = slot_of(entry.address);
      while (table_[at].epoch == epoch_) at = (at + 1) & (table_.size() - 1);
      table_[at] = entry;
    }
  }

  std::vector<Entry> table_;
  uint32_t epoch_ = 0;
  size_t used_ = 0;
  std::vector<Location> locations_;  // those in use first; the rest keep their capacity
  std::vector<uint32_t> views_;
};

}  // namespace angle::testing
