// The parts of the bindings that know no Python: the thread that draws ahead, and the memory of batches.
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "bindings/batch_memory.h"
#include "bindings/prefetch.h"
#include "doctest.h"
#include "rows.h"

using namespace angle;
using namespace angle::testing;

namespace {

std::shared_ptr<Replay> filled() {
  ReplayOptions options;
  options.capacity = 64;
  options.seed = 9;
  auto replay = std::make_shared<Replay>(options, row_layout());
  std::vector<uint32_t> values(50);
  for (uint32_t i = 0; i < 50; ++i) values[i] = i;
  std::vector<int64_t> handles;
  insert_values(*replay, values, handles);
  return replay;
}

std::vector<uint8_t*> places(Drawn& drawn) {
  const auto fields = drawn.rows.out();
  std::vector<uint8_t*> out(fields.size() + 4);
  for (size_t f = 0; f < fields.size(); ++f) out[f] = fields[f];
  uint8_t** const rest = out.data() + fields.size();
  rest[0] = reinterpret_cast<uint8_t*>(drawn.discounts.data());
  rest[1] = reinterpret_cast<uint8_t*>(drawn.importance_weights.data());
  rest[2] = reinterpret_cast<uint8_t*>(drawn.handles.data());
  rest[3] = reinterpret_cast<uint8_t*>(drawn.steps.data());
  return out;
}

constexpr SampleRequest kRequest{16, 0.99, 0.4};

}  // namespace

TEST_CASE("a prefetcher draws the replay's own sequence, and gives back what nobody took") {
  const auto replay = filled(), twin = filled();
  for (int round = 0; round < 20; ++round) {
    std::vector<Drawn> drawn(6, Drawn(16));
    {
      Prefetch prefetch(replay);
      for (uint64_t i = 0; i < drawn.size(); ++i) prefetch.submit(i, kRequest, places(drawn[i]));
      for (uint64_t i = 0; i < 3; ++i) {
        CHECK(prefetch.take() == i);
        Drawn expected(16);
        draw(*twin, expected);
        CHECK(drawn[i].handles == expected.handles);
        CHECK(drawn[i].importance_weights == expected.importance_weights);
      }
      if (round % 2 == 0) prefetch.stop();
    }
    CHECK(replay->stats().samples == twin->stats().samples);
  }
}

TEST_CASE("an error comes out of the take that met it, and the batch stays in line") {
  ReplayOptions options;
  options.capacity = 8;
  const auto replay = std::make_shared<Replay>(options, row_layout());
  Drawn drawn(16);
  Prefetch prefetch(replay);
  prefetch.submit(7, kRequest, places(drawn));
  for (int i = 0; i < 5; ++i) CHECK_THROWS_AS(prefetch.take(), NothingToSample);
  std::vector<int64_t> handles;
  insert_values(*replay, {1, 2, 3}, handles);
  CHECK(prefetch.take() == 7u);
  CHECK(drawn.rows.whole(0));
  prefetch.stop();
  CHECK(!prefetch.take().has_value());
}

TEST_CASE("many take, others insert, one stops") {
  const auto replay = filled();
  for (int round = 0; round < 10; ++round) {
    std::vector<Drawn> drawn(400, Drawn(16));
    Prefetch prefetch(replay);
    std::atomic<bool> over{false};
    std::atomic<int> taken{0}, torn{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 2; ++t) {
      threads.emplace_back([&] {
        for (;;) {
          const auto name = prefetch.take();
          if (!name) return;
          for (size_t row = 0; row < 16; ++row) torn += !drawn[*name].rows.whole(row);
          ++taken;
        }
      });
    }
    threads.emplace_back([&] {
      std::vector<int64_t> handles;
      for (uint32_t value = 0; !over; value += 4)
        insert_values(*replay, {value, value + 1, value + 2, value + 3}, handles);
    });
    for (uint64_t i = 0; i < drawn.size(); ++i) prefetch.submit(i, kRequest, places(drawn[i]));
    while (taken < 100) std::this_thread::yield();
    std::thread other([&] { prefetch.stop(); });
    prefetch.stop();
    other.join();
    over = true;
    for (std::thread& thread : threads) thread.join();
    CHECK(torn == 0);
  }
}

TEST_CASE("a call is taken back only while it is the last one") {
  const auto replay = filled();
  Drawn drawn(4);
  const auto call = [&] { return draw(*replay, {4, 0.9, 0.0}, places(drawn).data()); };
  const uint64_t first = call(), second = call();
  CHECK(second == first + 1);
  CHECK(!replay->return_call(first, 4));
  CHECK(replay->return_call(second, 4));
  CHECK(replay->return_call(first, 4));
  CHECK(replay->stats().samples == 0);
  CHECK(call() == first);
}

TEST_CASE("blocks come back when their last tensor dies, in whatever thread") {
  const BatchMaker maker({{{2, 32}, {3}, 12}, {{1, 8}, {}, 1}, {{0, 64}, {2, 2}, 32}}, size_t{1} << 20);
  for (const size_t n : {1, 100, 3000, 20000}) {
    std::vector<std::thread> threads;
    std::atomic<int> wrong{0};
    for (int t = 0; t < 3; ++t) {
      threads.emplace_back([&, t] {
        for (int round = 0; round < 50; ++round) {
          DLManagedTensor* tensors[3];
          maker.make(n, tensors);
          const size_t bytes[] = {12 * n, n, 32 * n};
          for (int i = 0; i < 3; ++i) std::memset(tensors[i]->dl_tensor.data, 16 * t + i, bytes[i]);
          for (int i = 0; i < 3; ++i) {
            const auto* const data = static_cast<const uint8_t*>(tensors[i]->dl_tensor.data);
            wrong += data[0] != 16 * t + i || data[bytes[i] - 1] != 16 * t + i;
            wrong += reinterpret_cast<uintptr_t>(data) % 64 != 0;
          }
          std::thread([&] { tensors[1]->deleter(tensors[1]); }).join();
          tensors[2]->deleter(tensors[2]);
          tensors[0]->deleter(tensors[0]);
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(wrong == 0);
    CHECK(maker.pool().free_bytes() <= size_t{1} << 20);
    CHECK(maker.pool().free_bytes() > 0);
  }
  DLManagedTensor* tensors[3];
  maker.make(5, tensors);
  CHECK(tensors[2]->dl_tensor.ndim == 3);
  CHECK(tensors[2]->dl_tensor.shape[0] == 5);
  CHECK(tensors[2]->dl_tensor.strides[0] == 4);
  CHECK(tensors[2]->dl_tensor.strides[2] == 1);
  for (DLManagedTensor* tensor : tensors) tensor->deleter(tensor);
}
