// What the operations in C++ share: vectors as wide as the processor's, and pieces that XLA's threads take.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

// LANES: floats of a vector; SUMS: vectors of sums that the registers hold beside what is added to them.
#if defined(__AVX512F__)
constexpr int LANES = 16, SUMS = 16;
#elif defined(__AVX__)
constexpr int LANES = 8, SUMS = 8;
#else
constexpr int LANES = 4, SUMS = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));

template <typename Vector>
inline Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(Vector));
  return vector;
}

// piece(i) for every i below `count`, with other threads unless `alone`. Pieces are taken one by one, by whoever is
// free. The caller takes part, and then waits for those alone that another thread has begun: where all threads of the
// pool are callers, none waits for ever. Who comes later finds no piece: `piece` may refer to what the caller holds.
template <typename Piece>
void in_pieces(ffi::ThreadPool& pool, int64_t count, bool alone, Piece piece) {
  struct Work {
    Piece piece;
    int64_t count;
    alignas(64) std::atomic<int64_t> taken{0};  // lines of their own: all threads read the above and write these
    alignas(64) std::atomic<int64_t> done{0};

    Work(Piece piece, int64_t count) : piece(piece), count(count) {}

    void take_part() {
      for (int64_t i; (i = taken.fetch_add(1)) < count; done.fetch_add(1, std::memory_order_release)) piece(i);
    }
  };
  auto work = std::make_shared<Work>(piece, count);
  const int64_t others = alone ? 0 : std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < others; ++i) pool.Schedule([work] { work->take_part(); });
  work->take_part();
  while (work->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}
