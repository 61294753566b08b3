// The product of reference.py as a handler of XLA's FFI. Bytes become floats in registers; rows of x share them.
//
// Letters as there: X rows, G groups, F outputs, C inputs of a group, Y its bytes. Written with the vectors of GCC and
// Clang, as wide as the processor's. Four bytes lie in one lane, a word, and shifts take them apart: converting bytes
// would move each of them (GCC 12), so x is put in the order of the lanes instead.

#include <vector>

#include "cpp.h"

namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a word's first byte must be its lowest");

constexpr int CHUNK = 4 * LANES;  // bytes of a vector, and inputs that change places with each other
typedef int32_t Words __attribute__((vector_size(CHUNK)));
typedef uint32_t Bits __attribute__((vector_size(CHUNK)));

constexpr int ROWS = 8;                 // of a pass over the bytes
constexpr int64_t PIECE = 64;           // outputs that a thread takes at a time
constexpr int64_t INPUTS = 4096;        // of all rows of a pass, held in the first cache: 16 KB
constexpr int64_t AHEAD = 4096;         // bytes: a quarter to a third faster than the processor's own prefetching (LOG)
constexpr int64_t ALONE = 1 << 19;      // bytes times rows that are done before another thread is awake

struct Operands {
  const float* x_XGC;
  const int8_t* values_GFY;
  const float* scales_GF;
  float* y_XF;
  int64_t X, G, F, C, Y;
};

// The signed number that lies in `width` bits of each word, from bit `first` on.
template <int first, int width>
inline Floats numbers(Bits words) {
  return __builtin_convertvector((Words)(words << (32 - width - first)) >> (32 - width), Floats);
}

inline float total(Floats lanes) {
  float sum = 0;
  for (int i = 0; i < LANES; ++i) sum += lanes[i];
  return sum;
}

// part[r][o] += x of row r times the numbers of output o. Everything is unrolled: `part` stays in registers.
template <int R, int O, int first, int width>
inline void add(const Bits* words, const float* x, int64_t row, Floats (&part)[R][O]) {
  Floats w[O];
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o) w[o] = numbers<first, width>(words[o]);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Floats own = load<Floats>(x + r * row);
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) part[r][o] += w[o] * own;
  }
}

// sums[r * PIECE + o] += scale * (x of row r . numbers of output o) over bytes y to stop of a group.
template <int R, int O, bool FOUR>
inline void group(const Operands& p, const float* x, const int8_t* values, const float* scales, int64_t y, int64_t stop,
                  Floats* sums) {
  const int64_t row = p.G * p.C;
  Floats part[R][O] = {};
  for (; y + CHUNK <= stop; y += CHUNK) {
    Bits words[O];
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      words[o] = load<Bits>(values + o * p.Y + y);
      __builtin_prefetch(values + o * p.Y + y + AHEAD);
    }
    if constexpr (FOUR) {
      add<R, O, 4, 4>(words, x + p.Y + y, row, part);
      add<R, O, 12, 4>(words, x + p.Y + y + LANES, row, part);
      add<R, O, 20, 4>(words, x + p.Y + y + 2 * LANES, row, part);
      add<R, O, 28, 4>(words, x + p.Y + y + 3 * LANES, row, part);
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) words[o] ^= 0x08080808;  // the lower numbers are stored with 8 added
    }
    constexpr int width = FOUR ? 4 : 8;
    add<R, O, 0, width>(words, x + y, row, part);
    add<R, O, 8, width>(words, x + y + LANES, row, part);
    add<R, O, 16, width>(words, x + y + 2 * LANES, row, part);
    add<R, O, 24, width>(words, x + y + 3 * LANES, row, part);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) sums[r * PIECE + o] += scales[o] * part[r][o];
  }
  for (; y < stop; ++y) {  // bytes that fill no vector
    for (int o = 0; o < O; ++o) {
      const int byte = values[o * p.Y + y];
      for (int r = 0; r < R; ++r) {
        const float* own = x + r * row + y;
        const float sum = FOUR ? ((byte & 15) - 8) * own[0] + (byte >> 4) * own[p.Y] : byte * own[0];
        sums[r * PIECE + o][0] += scales[o] * sum;
      }
    }
  }
}

// Outputs first to last of R rows.
template <int R, bool FOUR>
void pass(const Operands& p, int64_t x, int64_t first, int64_t last) {
  constexpr int O = std::clamp(SUMS / R, 1, 4);  // outputs at a time: as many sums as there are registers for
  constexpr int64_t SPAN = INPUTS / R / (FOUR ? 2 : 1) / CHUNK * CHUNK;
  Floats sums[R * PIECE] = {};
  for (int64_t g = 0; g < p.G; ++g) {
    const float* own = p.x_XGC + (x * p.G + g) * p.C;
    const int8_t* values = p.values_GFY + g * p.F * p.Y;
    const float* scales = p.scales_GF + g * p.F;
    for (int64_t y = 0; y < p.Y; y += SPAN) {
      const int64_t stop = std::min(p.Y, y + SPAN);
      int64_t f = first;
      for (; f + O <= last; f += O)
        group<R, O, FOUR>(p, own, values + f * p.Y, scales + f, y, stop, sums + f - first);
      for (; f < last; ++f)
        group<R, 1, FOUR>(p, own, values + f * p.Y, scales + f, y, stop, sums + f - first);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int64_t f = first; f < last; ++f) p.y_XF[(x + r) * p.F + f] = total(sums[r * PIECE + f - first]);
}

template <bool FOUR>
void piece(const Operands& p, int64_t first, int64_t last) {
  constexpr decltype(&pass<1, FOUR>) passes[ROWS] = {pass<1, FOUR>, pass<2, FOUR>, pass<3, FOUR>, pass<4, FOUR>,
                                                     pass<5, FOUR>, pass<6, FOUR>, pass<7, FOUR>, pass<8, FOUR>};
  for (int64_t x = 0; x < p.X; x += ROWS) passes[std::min<int64_t>(ROWS, p.X - x) - 1](p, x, first, last);
}

// x in the order of the lanes: of every whole chunk of Y inputs every fourth, then the next ones.
std::vector<Floats> in_lanes(const float* x, int64_t size, int64_t Y) {
  std::vector<Floats> whole(size / LANES + 1);  // of vectors: aligned as they are
  float* moved = reinterpret_cast<float*>(whole.data());
  std::copy(x, x + size, moved);
  for (int64_t start = 0; start < size; start += Y)
    for (int64_t at = start; at + CHUNK <= start + Y; at += CHUNK)
      for (int byte = 0; byte < 4; ++byte)
        for (int lane = 0; lane < LANES; ++lane) moved[at + byte * LANES + lane] = x[at + 4 * lane + byte];
  return whole;
}

ffi::Error product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x_XD, ffi::Buffer<ffi::S8> values_GFY,
                   ffi::Buffer<ffi::F32> scales_GF, ffi::ResultBuffer<ffi::F32> y_XF) {
  const int64_t X = x_XD.dimensions()[0], G = values_GFY.dimensions()[0], F = values_GFY.dimensions()[1],
                Y = values_GFY.dimensions()[2];
  const std::vector<Floats> x = in_lanes(x_XD.typed_data(), x_XD.element_count(), Y);
  const Operands operands = {reinterpret_cast<const float*>(x.data()), values_GFY.typed_data(), scales_GF.typed_data(),
                             y_XF->typed_data(), X, G, F, x_XD.dimensions()[1] / G, Y};
  in_pieces(pool, (F + PIECE - 1) / PIECE, X * G * F * Y < ALONE, [&](int64_t i) {
    (operands.C == Y ? piece<false> : piece<true>)(operands, i * PIECE, std::min(F, (i + 1) * PIECE));
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Handler, product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
