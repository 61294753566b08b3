// Experts of few tokens as a handler of XLA's FFI; few.py has the same in XLA.
//
// Letters as in reference.py: X tokens, E experts, K of them a token, D model width, F hidden width; P pairs (X * K).

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, SUMS = 6;
#elif defined(__AVX__)
constexpr int LANES = 8, SUMS = 6;
#else
constexpr int LANES = 4, SUMS = 6;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));

constexpr int64_t ALONE = 1 << 19;  // bytes of weights that are read before another thread is awake

// Columns of y = x w for `M` matrices of (rows, width) that share x: SIZE vectors of sums of each stay in registers.
template <int M, int SIZE>
inline void columns(const float* x, const float* const (&w)[M], int64_t rows, int64_t width, int64_t first,
                    float* const (&y)[M]) {
  Floats sum[M][SIZE] = {};
  for (int64_t row = 0; row < rows; ++row) {
    const float own = x[row];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
      for (int i = 0; i < SIZE; ++i) {
        Floats values;
        std::memcpy(&values, w[m] + row * width + first + i * LANES, sizeof(values));
        sum[m][i] += own * values;
      }
    }
  }
  for (int m = 0; m < M; ++m) std::memcpy(y[m] + first, sum[m], sizeof(sum[m]));
}

template <int M>
void product(const float* x, const float* const (&w)[M], int64_t rows, int64_t width, float* const (&y)[M]) {
  int64_t first = 0;
  for (; first + SUMS * LANES <= width; first += SUMS * LANES) columns<M, SUMS>(x, w, rows, width, first, y);
  for (; first + LANES <= width; first += LANES) columns<M, 1>(x, w, rows, width, first, y);
  for (; first < width; ++first) {
    for (int m = 0; m < M; ++m) {
      float sum = 0;
      for (int64_t row = 0; row < rows; ++row) sum += x[row] * w[m][row * width + first];
      y[m][first] = sum;
    }
  }
}

struct Operands {
  const float *x_XD, *gate_EDF, *up_EDF, *down_EFD;
  const int32_t* indices_P;
  int64_t K, D, F, P;
};

// Pairs are taken one by one, by whoever is free. The caller takes part, and then waits for those alone that another
// thread has begun: where all threads of the pool are callers, none waits for ever.
struct Work {
  Operands operands;
  std::vector<float> y_PD;
  std::atomic<int64_t> taken{0}, done{0};

  void take_part() {
    for (int64_t p; (p = taken.fetch_add(1)) < operands.P; done.fetch_add(1, std::memory_order_release)) pair(p);
  }

  void pair(int64_t p) {
    const auto& [x_XD, gate_EDF, up_EDF, down_EFD, indices_P, K, D, F, P] = operands;
    const int64_t of = indices_P[p] * D * F;
    std::vector<float> g_F(F), u_F(F);
    product<2>(x_XD + p / K * D, {gate_EDF + of, up_EDF + of}, D, F, {g_F.data(), u_F.data()});
    for (int64_t f = 0; f < F; ++f) g_F[f] *= u_F[f] / (1 + std::exp(-g_F[f]));
    product<1>(g_F.data(), {down_EFD + of}, F, D, {y_PD.data() + p * D});
  }
};

ffi::Error experts(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x_XD, ffi::Buffer<ffi::F32> gate_EDF,
                   ffi::Buffer<ffi::F32> up_EDF, ffi::Buffer<ffi::F32> down_EFD, ffi::Buffer<ffi::F32> weights_XK,
                   ffi::Buffer<ffi::S32> indices_XK, ffi::ResultBuffer<ffi::F32> y_XD) {
  const int64_t D = x_XD.dimensions()[1], F = gate_EDF.dimensions()[2], K = indices_XK.dimensions()[1],
                P = indices_XK.element_count();
  auto work = std::make_shared<Work>();
  work->operands = {x_XD.typed_data(), gate_EDF.typed_data(), up_EDF.typed_data(), down_EFD.typed_data(),
                    indices_XK.typed_data(), K, D, F, P};
  work->y_PD.resize(P * D);
  const int64_t others = 12 * P * D * F < ALONE ? 0 : std::min(pool.num_threads(), P) - 1;
  for (int64_t i = 0; i < others; ++i) pool.Schedule([work] { work->take_part(); });
  work->take_part();
  while (work->done.load(std::memory_order_acquire) < P) std::this_thread::yield();
  const float *weights_P = weights_XK.typed_data(), *y_PD = work->y_PD.data();
  float* y = y_XD->typed_data();
  std::fill(y, y + x_XD.element_count(), 0.0f);
  for (int64_t p = 0; p < P; ++p)
    for (int64_t d = 0; d < D; ++d) y[p / K * D + d] += weights_P[p] * y_PD[p * D + d];
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Handler, experts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
