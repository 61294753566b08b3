// Few rows times a matrix as a handler of XLA's FFI: every thread takes columns, and reads them once for all rows.
//
// Letters: X rows, D inputs, F outputs; the matrix is (D, F), in float32 or, read as they are, bfloat16.

#include "cpp.h"

namespace {

typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

constexpr int ROWS = 8;
constexpr int64_t PIECE = 8 * LANES;  // outputs that a thread takes at a time
constexpr int64_t AHEAD = 8;          // inputs whose weights are asked for before their turn: they are far apart
constexpr int64_t ALONE = 1 << 17;    // bytes of the matrix that are read before another thread is awake

inline Floats floats(const float* from) { return load<Floats>(from); }

inline Floats floats(const uint16_t* from) {
  return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
}

inline float number(float value) { return value; }

inline float number(uint16_t half) {
  const uint32_t word = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

template <typename Weight>
struct Operands {
  const float* x_XD;
  const Weight* w_DF;
  float* y_XF;
  int64_t X, D, F;
};

// SIZE vectors of outputs of R rows, from output `first` on.
template <int R, int SIZE, typename Weight>
inline void vectors(const Operands<Weight>& p, int64_t first) {
  Floats sum[R][SIZE] = {};
  const Weight* w_F = p.w_DF + first;
  for (int64_t d = 0; d < p.D; ++d, w_F += p.F) {
    for (int i = 0; i < SIZE; ++i) __builtin_prefetch(w_F + AHEAD * p.F + i * LANES);
    Floats w[SIZE];
#pragma GCC unroll 8
    for (int i = 0; i < SIZE; ++i) w[i] = floats(w_F + i * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float own = p.x_XD[r * p.D + d];
#pragma GCC unroll 8
      for (int i = 0; i < SIZE; ++i) sum[r][i] += own * w[i];
    }
  }
  for (int r = 0; r < R; ++r) std::memcpy(p.y_XF + r * p.F + first, sum[r], sizeof(sum[r]));
}

// Outputs first to last of R rows.
template <int R, typename Weight>
void columns(const Operands<Weight>& p, int64_t first, int64_t last) {
  constexpr int SIZE = std::clamp(SUMS / R, 1, 8);
  for (; first + SIZE * LANES <= last; first += SIZE * LANES) vectors<R, SIZE>(p, first);
  for (; first + LANES <= last; first += LANES) vectors<R, 1>(p, first);
  for (; first < last; ++first) {
    for (int r = 0; r < R; ++r) {
      float sum = 0;
      for (int64_t d = 0; d < p.D; ++d) sum += p.x_XD[r * p.D + d] * number(p.w_DF[d * p.F + first]);
      p.y_XF[r * p.F + first] = sum;
    }
  }
}

template <typename Weight>
void run(ffi::ThreadPool& pool, const Operands<Weight>& operands) {
  using Columns = void (*)(const Operands<Weight>&, int64_t, int64_t);
  constexpr Columns of_rows[ROWS] = {columns<1, Weight>, columns<2, Weight>, columns<3, Weight>, columns<4, Weight>,
                                     columns<5, Weight>, columns<6, Weight>, columns<7, Weight>, columns<8, Weight>};
  const Columns of_X = of_rows[operands.X - 1];
  const int64_t bytes = operands.D * operands.F * sizeof(Weight);
  in_pieces(pool, (operands.F + PIECE - 1) / PIECE, bytes < ALONE, [&operands, of_X](int64_t i) {
    of_X(operands, i * PIECE, std::min(operands.F, (i + 1) * PIECE));
  });
}

ffi::Error product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x_XD, ffi::AnyBuffer w_DF,
                   ffi::ResultBuffer<ffi::F32> y_XF) {
  const int64_t X = x_XD.dimensions()[0], D = x_XD.dimensions()[1], F = w_DF.dimensions()[1];
  if (X > ROWS) return ffi::Error::InvalidArgument("more rows than are meant for this product");
  if (X == 0) return ffi::Error::Success();
  if (w_DF.element_type() == ffi::F32)
    run<float>(pool, {x_XD.typed_data(), static_cast<const float*>(w_DF.untyped_data()), y_XF->typed_data(), X, D, F});
  else if (w_DF.element_type() == ffi::BF16)
    run<uint16_t>(pool, {x_XD.typed_data(), static_cast<const uint16_t*>(w_DF.untyped_data()), y_XF->typed_data(), X,
                         D, F});
  else
    return ffi::Error::InvalidArgument("the matrix must be in float32 or bfloat16");
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Handler, product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
