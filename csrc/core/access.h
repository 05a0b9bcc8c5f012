// How the replay touches memory that other threads write: the one place where a racing read is written down.
//
// WordAccess reads and writes by atomic words, acquire and release, and is what sanitizers and other CPUs than x86-64
// run. VectorAccess goes through the vector kernels: on x86-64 an aligned 64-bit lane of a vector load is read at once,
// and loads are not reordered with loads, nor stores with stores, so the orders that WordAccess asks for hold by
// themselves; what remains is to keep the compiler from moving anything, which barrier() does.
#pragma once
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#include "core/philox.h"
#include "kernels/kernels.h"

namespace angle {

// A word of shared memory. Every operation on one, by any thread or process, goes through here.
template <class T>
struct AtomicWord {
  T* at;

  T load(std::memory_order order) const { return __atomic_load_n(at, static_cast<int>(order)); }
  void store(T value, std::memory_order order) const { __atomic_store_n(at, value, static_cast<int>(order)); }
  T exchange(T value, std::memory_order order) const { return __atomic_exchange_n(at, value, static_cast<int>(order)); }
  T fetch_add(T value, std::memory_order order) const { return __atomic_fetch_add(at, value, static_cast<int>(order)); }
  T fetch_sub(T value, std::memory_order order) const { return __atomic_fetch_sub(at, value, static_cast<int>(order)); }
  bool compare_exchange_weak(T& expected, T desired, std::memory_order success, std::memory_order failure) const {
    return __atomic_compare_exchange_n(at, &expected, desired, true, static_cast<int>(success),
                                       static_cast<int>(failure));
  }
  bool compare_exchange_strong(T& expected, T desired, std::memory_order success, std::memory_order failure) const {
    return __atomic_compare_exchange_n(at, &expected, desired, false, static_cast<int>(success),
                                       static_cast<int>(failure));
  }
};

// One object of type S for each thread.
template <class S>
S& own_of_thread() {
  static thread_local S own;
  return own;
}

// Threads are counted up; processes begin at different numbers.
inline size_t number_of_thread() {
  static std::atomic<size_t> threads{0};
  return threads.fetch_add(1, std::memory_order_relaxed) + static_cast<size_t>(getpid());
}

struct VectorAccess {
  template <class T>
  using Word = AtomicWord<T>;

  template <class S>
  static S& own() {
    return own_of_thread<S>();
  }
  static size_t lane() { return number_of_thread(); }

  static int64_t prefix_sums(const int64_t* nodes, size_t groups, int64_t* prefix) {
    return kernels().replay.prefix_sums(nodes, groups, prefix);
  }
  static void descend(const int64_t* level, size_t fan, size_t count, uint64_t* index, int64_t* target) {
    kernels().replay.descend(level, fan, count, index, target);
  }
  static void descend_leaves(const uint64_t* leaves, size_t fan, uint64_t weight_mask, size_t count, uint64_t* index,
                             int64_t* target, uint64_t* words) {
    kernels().replay.descend_leaves(leaves, fan, weight_mask, count, index, target, words);
  }
  static void gather(const uint8_t* records, size_t record_bytes, const uint64_t* slots, size_t count,
                     const FieldCopy* fields, size_t field_count) {
    kernels().replay.gather(records, record_bytes, slots, count, fields, field_count);
  }
  static void store_field(uint8_t* record, const uint8_t* from, size_t bytes) { std::memcpy(record, from, bytes); }
  static void barrier() { std::atomic_signal_fence(std::memory_order_seq_cst); }
};

// Templated on the word, so that tests can put a scheduler under every racing access; they also replace own(), since
// their threads are none to the compiler.
template <template <class> class WordType>
struct WordAccessT {
  template <class T>
  using Word = WordType<T>;

  template <class S>
  static S& own() {
    return own_of_thread<S>();
  }
  static size_t lane() { return number_of_thread(); }

  static int64_t load_node(const int64_t* node) { return word(node).load(std::memory_order_relaxed); }
  static uint64_t load_node(const uint64_t* node) { return word(node).load(std::memory_order_acquire); }

  static int64_t prefix_sums(const int64_t* nodes, size_t groups, int64_t* prefix) {
    int64_t total = 0;
    for (size_t group = 0; group < groups; ++group) {
      int64_t sum = 0;
      for (size_t i = 0; i < 8; ++i) sum += load_node(nodes + 8 * group + i);
      total += sum > 0 ? sum : 0;
      prefix[group] = total;
    }
    for (size_t i = groups; i % 8 != 0; ++i) prefix[i] = INT64_MAX;
    return total;
  }
  static void descend(const int64_t* level, size_t fan, size_t count, uint64_t* index, int64_t* target) {
    descend_words<int64_t>(level, fan, ~0ull, count, index, target, nullptr);
  }
  static void descend_leaves(const uint64_t* leaves, size_t fan, uint64_t weight_mask, size_t count, uint64_t* index,
                             int64_t* target, uint64_t* words) {
    descend_words<uint64_t>(leaves, fan, weight_mask, count, index, target, words);
  }
  static void gather(const uint8_t* records, size_t record_bytes, const uint64_t* slots, size_t count,
                     const FieldCopy* fields, size_t field_count) {
    for (size_t i = 0; i < count; ++i) {
      if (slots[i] == kLost) continue;
      for (size_t f = 0; f < field_count; ++f) {
        copy_words<true>(fields[f].out + i * fields[f].stride, records + slots[i] * record_bytes + fields[f].offset,
                         fields[f].bytes, fields[f].offset);
      }
    }
  }
  // Release stores: whoever sees a byte of a new row sees its slot marked busy (partner: the acquire loads of gather).
  static void store_field(uint8_t* record, const uint8_t* from, size_t bytes) {
    copy_words<false>(record, from, bytes, reinterpret_cast<uintptr_t>(record));
  }
  static void barrier() {}

 private:
  template <class T>
  static WordType<T> word(const T* at) {
    return {const_cast<T*>(at)};
  }

  template <class Node>
  static void descend_words(const Node* level, size_t fan, uint64_t mask, size_t count, uint64_t* index,
                            int64_t* target, uint64_t* words) {
    for (size_t i = 0; i < count; ++i) {
      if (index[i] == kLost) continue;
      const Node* node = level + index[i] * fan;
      uint64_t found = kLost;
      for (size_t child = 0; child < fan; ++child) {
        const Node value = load_node(node + child);
        int64_t share = static_cast<int64_t>(static_cast<uint64_t>(value) & mask);
        if (share < 0) share = 0;
        if (target[i] < share) {
          found = index[i] * fan + child;
          if (words != nullptr) words[i] = static_cast<uint64_t>(value);
          break;
        }
        target[i] -= share;
      }
      index[i] = found;
    }
  }

  template <class Piece, bool kLoad>
  static size_t copy_as(uint8_t* out, const uint8_t* in, size_t done, size_t bytes) {
    for (; done + sizeof(Piece) <= bytes; done += sizeof(Piece)) {
      Piece piece;
      if constexpr (kLoad) {
        piece = word(reinterpret_cast<const Piece*>(in + done)).load(std::memory_order_acquire);
        std::memcpy(out + done, &piece, sizeof piece);
      } else {
        std::memcpy(&piece, in + done, sizeof piece);
        word(reinterpret_cast<Piece*>(out + done)).store(piece, std::memory_order_release);
      }
    }
    return done;
  }

  // The widest words that the shared side's address is aligned to; reader and writer of a field agree on them.
  template <bool kLoad>
  static void copy_words(uint8_t* out, const uint8_t* in, size_t bytes, uintptr_t shared_offset) {
    size_t done = 0;
    if (shared_offset % 8 == 0) done = copy_as<uint64_t, kLoad>(out, in, done, bytes);
    if (shared_offset % 4 == 0) done = copy_as<uint32_t, kLoad>(out, in, done, bytes);
    copy_as<uint8_t, kLoad>(out, in, done, bytes);
  }
};

using WordAccess = WordAccessT<AtomicWord>;

#if defined(ANGLE_WORD_ACCESS)
using DefaultAccess = WordAccess;
#else
using DefaultAccess = VectorAccess;
#endif

}  // namespace angle
