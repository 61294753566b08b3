// Experts of few tokens as a handler of XLA's FFI; few.py has the same in XLA.
//
// Letters as in reference.py: X tokens, E experts, K of them a token, D model width, F hidden width; P pairs (X * K).

#include <cmath>
#include <vector>

#include "cpp.h"

namespace {

constexpr int VECTORS = 6;          // of outputs at a time, of each of two matrices
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
        sum[m][i] += own * load<Floats>(w[m] + row * width + first + i * LANES);
      }
    }
  }
  for (int m = 0; m < M; ++m) std::memcpy(y[m] + first, sum[m], sizeof(sum[m]));
}

template <int M>
void product(const float* x, const float* const (&w)[M], int64_t rows, int64_t width, float* const (&y)[M]) {
  int64_t first = 0;
  for (; first + VECTORS * LANES <= width; first += VECTORS * LANES) columns<M, VECTORS>(x, w, rows, width, first, y);
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

// What the expert of pair p makes of its token, D numbers.
void pair(const Operands& operands, int64_t p, float* y_D) {
  const auto& [x_XD, gate_EDF, up_EDF, down_EFD, indices_P, K, D, F, P] = operands;
  const int64_t of = indices_P[p] * D * F;
  std::vector<float> g_F(F), u_F(F);
  product<2>(x_XD + p / K * D, {gate_EDF + of, up_EDF + of}, D, F, {g_F.data(), u_F.data()});
  for (int64_t f = 0; f < F; ++f) g_F[f] *= u_F[f] / (1 + std::exp(-g_F[f]));
  product<1>(g_F.data(), {down_EFD + of}, F, D, {y_D});
}

ffi::Error experts(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x_XD, ffi::Buffer<ffi::F32> gate_EDF,
                   ffi::Buffer<ffi::F32> up_EDF, ffi::Buffer<ffi::F32> down_EFD, ffi::Buffer<ffi::F32> weights_XK,
                   ffi::Buffer<ffi::S32> indices_XK, ffi::ResultBuffer<ffi::F32> y_XD) {
  const int64_t D = x_XD.dimensions()[1], F = gate_EDF.dimensions()[2], K = indices_XK.dimensions()[1],
                P = indices_XK.element_count();
  const Operands operands = {x_XD.typed_data(), gate_EDF.typed_data(), up_EDF.typed_data(), down_EFD.typed_data(),
                             indices_XK.typed_data(), K, D, F, P};
  std::vector<float> y_PD(P * D);
  in_pieces(pool, P, 12 * P * D * F < ALONE, [&](int64_t p) { pair(operands, p, y_PD.data() + p * D); });
  const float* weights_P = weights_XK.typed_data();
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
