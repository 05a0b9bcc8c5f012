#include "bindings/batch_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <new>

namespace angle {
namespace {

constexpr size_t kAlign = 64, kHugePage = size_t{1} << 21;

size_t round_up(size_t bytes, size_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

// A block begins with this.
struct BlockHead {
  std::shared_ptr<BlockPool> pool;
  size_t bytes;
  std::atomic<uint32_t> users;
};
constexpr size_t kHeadBytes = (sizeof(BlockHead) + kAlign - 1) / kAlign * kAlign;

void release(DLManagedTensor* tensor) {
  auto* const head = static_cast<BlockHead*>(tensor->manager_ctx);
  // acq_rel: partner of the other tensors' decrements; the last one sees that nobody reads the block any more.
  if (head->users.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  const std::shared_ptr<BlockPool> pool = std::move(head->pool);
  const size_t bytes = head->bytes;
  head->~BlockHead();
  pool->give(reinterpret_cast<uint8_t*>(head), bytes);
}

}  // namespace

BlockPool::~BlockPool() {
  for (size_t i = 0; i < count_; ++i) std::free(entries_[i].memory);
}

uint8_t* BlockPool::take(size_t bytes) {
  if (enter()) {
    uint8_t* found = nullptr;
    for (size_t i = count_; i-- > 0;) {  // the newest first: it is the warmest
      if (entries_[i].bytes != bytes) continue;
      found = entries_[i].memory;
      std::copy(entries_ + i + 1, entries_ + count_, entries_ + i);
      --count_;
      bytes_.fetch_sub(bytes, std::memory_order_relaxed);
      break;
    }
    leave();
    if (found != nullptr) return found;
  }
  void* const memory = std::aligned_alloc(kAlign, bytes);
  if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (bytes >= 2 * kHugePage) {
    auto* const first = static_cast<uint8_t*>(memory);
    const size_t skipped = round_up(reinterpret_cast<uintptr_t>(first), kHugePage) - reinterpret_cast<uintptr_t>(first);
    madvise(first + skipped, (bytes - skipped) / kHugePage * kHugePage, MADV_HUGEPAGE);
  }
#endif
  return static_cast<uint8_t*>(memory);
}

void BlockPool::give(uint8_t* block, size_t bytes) noexcept {
  std::array<uint8_t*, kBlocks> dropped;  // freed outside, where it keeps nobody out
  size_t drops = 0;
  if (bytes > max_bytes_ || !enter()) {
    std::free(block);
    return;
  }
  size_t held = bytes_.load(std::memory_order_relaxed);
  while (count_ == kBlocks || (count_ > 0 && held + bytes > max_bytes_)) {
    held -= entries_[0].bytes;
    dropped[drops++] = entries_[0].memory;
    std::copy(entries_ + 1, entries_ + count_, entries_);
    --count_;
  }
  entries_[count_++] = {block, bytes};
  bytes_.store(held + bytes, std::memory_order_relaxed);
  leave();
  for (size_t i = 0; i < drops; ++i) std::free(dropped[i]);
}

void BatchMaker::make(size_t n, DLManagedTensor** out) const {
  // Where tensor t's description lies in its block; its data follow, after the descriptions of a shared block.
  const auto description = [&](size_t t) { return sizeof(DLManagedTensor) + 16 * (types_[t].shape.size() + 1); };
  const auto own = [&](size_t t) { return n * types_[t].row_bytes >= kOwnBlock; };
  size_t described = kHeadBytes, data_bytes = 0;
  uint32_t sharing = 0;
  for (size_t t = 0; t < types_.size(); ++t) {
    if (own(t)) continue;
    ++sharing;
    described += description(t);
    data_bytes += round_up(n * types_[t].row_bytes, kAlign);
  }
  const auto open = [&](size_t bytes, uint32_t users) {
    uint8_t* const block = pool_->take(bytes);
    new (block) BlockHead{pool_, bytes, users};
    return block;
  };
  const auto describe = [&](size_t t, uint8_t* block, uint8_t* at, uint8_t* data) {
    const TensorType& type = types_[t];
    const size_t ndim = type.shape.size() + 1;
    auto* const shape = reinterpret_cast<int64_t*>(at + sizeof(DLManagedTensor));
    auto* const strides = shape + ndim;
    shape[0] = static_cast<int64_t>(n);
    int64_t stride = 1;
    for (size_t d = ndim; d-- > 1;) {
      shape[d] = type.shape[d - 1];
      strides[d] = stride;
      stride *= shape[d];
    }
    strides[0] = stride;
    out[t] = new (at)
        DLManagedTensor{{data, DLDevice(), static_cast<int32_t>(ndim), type.dtype, shape, strides, 0}, block, &release};
  };
  std::fill_n(out, types_.size(), nullptr);
  try {
    if (sharing > 0) {
      described = round_up(described, kAlign);
      uint8_t* const block = open(described + data_bytes, sharing);
      uint8_t* at = block + kHeadBytes;
      uint8_t* data = block + described;
      for (size_t t = 0; t < types_.size(); ++t) {
        if (own(t)) continue;
        describe(t, block, at, data);
        at += description(t);
        data += round_up(n * types_[t].row_bytes, kAlign);
      }
    }
    for (size_t t = 0; t < types_.size(); ++t) {
      if (!own(t)) continue;
      const size_t before = round_up(kHeadBytes + description(t), kAlign);
      uint8_t* const block = open(before + round_up(n * types_[t].row_bytes, kAlign), 1);
      describe(t, block, block + kHeadBytes, block + before);
    }
  } catch (const std::bad_alloc&) {
    for (size_t t = 0; t < types_.size(); ++t) {
      if (out[t] != nullptr) release(out[t]);
    }
    throw;
  }
}

}  // namespace angle
