// The memory of fresh batches: blocks that a buffer's tensors share and that come back when the last of them dies.
// Knows no Python; a block goes to Python as DLPack tensors, whose layout in memory is fixed by that standard.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace angle {

// ---- DLPack's unversioned structures (dmlc.github.io/dlpack), field for field ----

struct DLDevice {
  int32_t device_type = 1;  // kDLCPU
  int32_t device_id = 0;
};

struct DLDataType {
  uint8_t code;  // 0 signed, 1 unsigned, 2 floating, 5 complex, 6 bool
  uint8_t bits;
  uint16_t lanes = 1;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};

// ---- blocks ----

// Free blocks of one buffer, for the next batch: a page that was touched before costs no fault. Any thread. Nobody
// waits: whoever finds the pool in use takes new memory, or frees its own, instead.
class BlockPool {
 public:
  // Keeps at most max_bytes and kBlocks free blocks.
  explicit BlockPool(size_t max_bytes) : max_bytes_(max_bytes) {}
  ~BlockPool();
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;

  // `bytes`, a multiple of 64, aligned to 64. O(kBlocks). Throws std::bad_alloc.
  uint8_t* take(size_t bytes);
  // Takes back what take gave. O(kBlocks).
  void give(uint8_t* block, size_t bytes) noexcept;
  // Bytes of the free blocks. Any thread.
  size_t free_bytes() const { return bytes_.load(std::memory_order_relaxed); }

 private:
  static constexpr size_t kBlocks = 32;
  struct Entry {
    uint8_t* memory;
    size_t bytes;
  };
  // Both orders: what one holder did to the entries is seen by the next.
  bool enter() { return !busy_.test_and_set(std::memory_order_acquire); }  // partner: leave
  void leave() { busy_.clear(std::memory_order_release); }                 // partner: enter

  const size_t max_bytes_;
  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  Entry entries_[kBlocks];  // oldest first
  size_t count_ = 0;
  std::atomic<size_t> bytes_{0};
};

// One tensor of a batch: `elements` of `shape` for each row.
struct TensorType {
  DLDataType dtype;
  std::vector<int64_t> shape;  // of one row
  size_t row_bytes;
};

// Makes the tensors of batches. Any thread.
class BatchMaker {
 public:
  BatchMaker(std::vector<TensorType> types, size_t max_pool_bytes)
      : types_(std::move(types)), pool_(std::make_shared<BlockPool>(max_pool_bytes)) {}

  size_t tensors() const { return types_.size(); }
  const BlockPool& pool() const { return *pool_; }

  // out[t]: tensor t, `n` uninitialised rows; each is to be released by its deleter, which any thread may call. Tensors
  // of at least kOwnBlock bytes have a block each, the others share one, which lives as long as one of them.
  // O(tensors). Throws std::bad_alloc, and then nothing is made.
  void make(size_t n, DLManagedTensor** out) const;

 private:
  static constexpr size_t kOwnBlock = size_t{32} << 10;

  std::vector<TensorType> types_;
  std::shared_ptr<BlockPool> pool_;
};

}  // namespace angle
