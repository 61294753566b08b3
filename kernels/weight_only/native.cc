// The product of reference.py as a handler of XLA's FFI. Bytes become floats in registers; rows of x share them.
//
// Letters as there: X rows, E matrices, G groups, F outputs, C inputs of a group, Y its bytes. Written with the vectors
// of GCC and Clang, as wide as the processor's. Four bytes lie in one lane, a word, and shifts take them apart:
// converting bytes would move each of them (GCC 12), so x is put in the order of the lanes instead.

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

enum Format { INT8, INT4, E4M3 };  // in the order of reference.py

struct Operands {
  const float* x_XGC;
  const int8_t* values_EGFY;
  const float* scales_EGF;
  const int32_t* matrix_X;
  float* y_XF;
  int64_t X, G, F, C, Y;
};

// The signed number that lies in `width` bits of each word, from bit `first` on.
template <int first, int width>
inline Floats integers(Bits words) {
  return __builtin_convertvector((Words)(words << (32 - width - first)) >> (32 - width), Floats);
}

// The finite E4M3 that lies in 8 bits of each word, from bit `first` on: a sign, 4 bits of exponent and 3 of fraction.
// Put where a float has them they are right but for an exponent of 0, whose float would have a 1 before its fraction:
// such a number is twice what that float is above 2^-7. All others are below twice theirs less 2^-6. (A float without
// an exponent, which it could be instead, is read as zero where XLA's threads flush those.)
template <int first>
inline Floats floats(Bits words) {
  words <<= 24 - first;
  const Floats one = (Floats)(((words & 0x7f000000) >> 4) + (120u << 23)), twice = one + one - 0x1p-6f;
  const Floats size = one < twice ? one : twice;
  return (Floats)((Bits)size | (words & 0x80000000));
}

template <Format format, int first, int width>
inline Floats numbers(Bits words) {
  if constexpr (format == E4M3) return floats<first>(words);
  else return integers<first, width>(words);
}

inline float total(Floats lanes) {
  float sum = 0;
  for (int i = 0; i < LANES; ++i) sum += lanes[i];
  return sum;
}

// part[r][o] += x of row r times the numbers of output o. Everything is unrolled: `part` stays in registers.
template <Format format, int R, int O, int first, int width>
inline void add(const Bits* words, const float* x, int64_t row, Floats (&part)[R][O]) {
  Floats w[O];
#pragma GCC unroll 8
  for (int o = 0; o < O; ++o) w[o] = numbers<format, first, width>(words[o]);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Floats own = load<Floats>(x + r * row);
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) part[r][o] += w[o] * own;
  }
}

// sums[r * PIECE + o] += scale * (x of row r . numbers of output o) over bytes y to stop of a group.
template <Format format, int R, int O>
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
    if constexpr (format == INT4) {
      add<format, R, O, 4, 4>(words, x + p.Y + y, row, part);
      add<format, R, O, 12, 4>(words, x + p.Y + y + LANES, row, part);
      add<format, R, O, 20, 4>(words, x + p.Y + y + 2 * LANES, row, part);
      add<format, R, O, 28, 4>(words, x + p.Y + y + 3 * LANES, row, part);
#pragma GCC unroll 8
      for (int o = 0; o < O; ++o) words[o] ^= 0x08080808;  // the lower numbers are stored with 8 added
    }
    constexpr int width = format == INT4 ? 4 : 8;
    add<format, R, O, 0, width>(words, x + y, row, part);
    add<format, R, O, 8, width>(words, x + y + LANES, row, part);
    add<format, R, O, 16, width>(words, x + y + 2 * LANES, row, part);
    add<format, R, O, 24, width>(words, x + y + 3 * LANES, row, part);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) sums[r * PIECE + o] += scales[o] * part[r][o];
  }
  for (; y < stop; ++y) {  // bytes that fill no vector; those of E4M3's blocks do
    for (int o = 0; o < O; ++o) {
      const int byte = values[o * p.Y + y];
      for (int r = 0; r < R; ++r) {
        const float* own = x + r * row + y;
        const float sum = format == INT4 ? ((byte & 15) - 8) * own[0] + (byte >> 4) * own[p.Y] : byte * own[0];
        sums[r * PIECE + o][0] += scales[o] * sum;
      }
    }
  }
}

// Outputs first to last of R rows from x on, all of which meet the same matrix.
template <Format format, int R>
void pass(const Operands& p, int64_t x, int64_t first, int64_t last) {
  constexpr int O = std::clamp(SUMS / R, 1, 4);  // outputs at a time: as many sums as there are registers for
  constexpr int64_t SPAN = INPUTS / R / (format == INT4 ? 2 : 1) / CHUNK * CHUNK;
  Floats sums[R * PIECE] = {};
  for (int64_t g = 0; g < p.G; ++g) {
    const float* own = p.x_XGC + (x * p.G + g) * p.C;
    const int64_t at = (p.matrix_X[x] * p.G + g) * p.F;
    const int8_t* values = p.values_EGFY + at * p.Y;
    const float* scales = p.scales_EGF + at;
    for (int64_t y = 0; y < p.Y; y += SPAN) {
      const int64_t stop = std::min(p.Y, y + SPAN);
      int64_t f = first;
      for (; f + O <= last; f += O)
        group<format, R, O>(p, own, values + f * p.Y, scales + f, y, stop, sums + f - first);
      for (; f < last; ++f)
        group<format, R, 1>(p, own, values + f * p.Y, scales + f, y, stop, sums + f - first);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int64_t f = first; f < last; ++f) p.y_XF[(x + r) * p.F + f] = total(sums[r * PIECE + f - first]);
}

template <Format format>
void piece(const Operands& p, int64_t first, int64_t last) {
  constexpr decltype(&pass<format, 1>) passes[ROWS] = {
      pass<format, 1>, pass<format, 2>, pass<format, 3>, pass<format, 4>,
      pass<format, 5>, pass<format, 6>, pass<format, 7>, pass<format, 8>};
  for (int64_t x = 0, stop; x < p.X; x = stop) {
    for (stop = x + 1; stop < std::min(p.X, x + ROWS) && p.matrix_X[stop] == p.matrix_X[x];) ++stop;
    passes[stop - x - 1](p, x, first, last);
  }
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

ffi::Error product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x_XD, ffi::Buffer<ffi::S8> values_EGFY,
                   ffi::Buffer<ffi::F32> scales_EGF, ffi::Buffer<ffi::S32> matrix_X,
                   ffi::ResultBuffer<ffi::F32> y_XF, int32_t format) {
  const int64_t X = x_XD.dimensions()[0], G = values_EGFY.dimensions()[1], F = values_EGFY.dimensions()[2],
                Y = values_EGFY.dimensions()[3];
  const std::vector<Floats> x = in_lanes(x_XD.typed_data(), x_XD.element_count(), Y);
  const Operands operands = {reinterpret_cast<const float*>(x.data()), values_EGFY.typed_data(),
                             scales_EGF.typed_data(), matrix_X.typed_data(), y_XF->typed_data(),
                             X, G, F, x_XD.dimensions()[1] / G, Y};
  constexpr decltype(&piece<INT8>) pieces[] = {piece<INT8>, piece<INT4>, piece<E4M3>};
  in_pieces(pool, (F + PIECE - 1) / PIECE, X * G * F * Y < ALONE, [&](int64_t i) {
    pieces[format](operands, i * PIECE, std::min(F, (i + 1) * PIECE));
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
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int32_t>("format"));
