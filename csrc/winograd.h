// The three stages of csrc/winograd.cpp for one instruction set. Included once for each, with
//   PF_ISA     the namespace
//   PF_TARGET  the attribute that lets a function use it
//   PF_WIDTH   floats of a vector
//   PF_FMA     a * b + c of vectors, rounded once where it can be
//   PF_STREAM  writes a vector to where nothing is read soon
// since GCC takes vectors apart where a function is defined, not where it is inlined. No include guard, therefore.

namespace part_fast {
namespace PF_ISA {

using vec = float __attribute__((vector_size(4 * PF_WIDTH)));
// The same at any address.
using loose = float __attribute__((vector_size(4 * PF_WIDTH), aligned(4), may_alias));

PF_TARGET inline __attribute__((always_inline)) vec load(const float* from) {
  return *reinterpret_cast<const loose*>(from);
}

PF_TARGET inline __attribute__((always_inline)) void store(float* to, vec value) {
  *reinterpret_cast<loose*>(to) = value;
}

PF_TARGET inline __attribute__((always_inline)) vec fma(float a, vec b, vec c) { return PF_FMA(a - vec{}, b, c); }

// Six values of a row or a column of a tile of the input, in place.
PF_TARGET inline __attribute__((always_inline)) void input_transform(vec* d) {
  const vec first = fma(PRODUCT, d[0], fma(-SUM, d[2], d[4])), last = fma(PRODUCT, d[1], fma(-SUM, d[3], d[5]));
  const vec even_a = fma(-B * B, d[2], d[4]), odd_a = fma(-B * B, d[1], d[3]);
  const vec even_b = fma(-A * A, d[2], d[4]), odd_b = fma(-A * A, d[1], d[3]);
  d[0] = first;
  d[1] = fma(A, odd_a, even_a);
  d[2] = fma(-A, odd_a, even_a);
  d[3] = fma(B, odd_b, even_b);
  d[4] = fma(-B, odd_b, even_b);
  d[5] = last;
}

// Six values of a row or a column of weights, from three; `stride` vectors apart.
PF_TARGET inline __attribute__((always_inline)) void weight_transform(vec g0, vec g1, vec g2, vec* u, int64_t stride) {
  const vec even_a = OF_A * fma(A * A, g2, g0), even_b = OF_B * fma(B * B, g2, g0);
  u[0] = 1 / PRODUCT * g0;
  u[stride] = fma(OF_A * A, g1, even_a);
  u[2 * stride] = fma(-OF_A * A, g1, even_a);
  u[3 * stride] = fma(OF_B * B, g1, even_b);
  u[4 * stride] = fma(-OF_B * B, g1, even_b);
  u[5 * stride] = g2;
}

// Four outputs from six products.
PF_TARGET inline __attribute__((always_inline)) void output_transform(const vec* m, vec& y0, vec& y1, vec& y2,
                                                                      vec& y3) {
  const vec plus_a = m[1] + m[2], minus_a = m[1] - m[2], plus_b = m[3] + m[4], minus_b = m[3] - m[4];
  y0 = m[0] + plus_a + plus_b;
  y1 = fma(B, minus_b, A * minus_a);
  y2 = fma(B * B, plus_b, A * A * plus_a);
  y3 = fma(B * B * B, minus_b, fma(A * A * A, minus_a, m[5]));
}

// Tiles [first, last) of the input, transformed: v (36, last - first, in), `plane` floats from one of the 36 to the
// next. `positive`: the values of x where it is 0 or less count as 0. `zeros`: what lies outside of an image.
PF_TARGET void enter(const Convolution& conv, const float* x, const float* positive, const float* zeros, int64_t first,
                     int64_t last, float* v, int64_t plane) {
  const float *from[36], *next[36], *signs[36] = {}, *next_signs[36] = {};
  conv.inputs(first, x, zeros, next);
  if (positive) conv.inputs(first, positive, zeros, next_signs);
  for (int64_t tile = first; tile < last; ++tile, v += conv.in) {
    std::copy(next, next + 36, from);
    conv.inputs(std::min(tile + 1, last - 1), x, zeros, next);
    if (positive) {
      std::copy(next_signs, next_signs + 36, signs);
      conv.inputs(std::min(tile + 1, last - 1), positive, zeros, next_signs);
    }
    for (int64_t k = 0; k < conv.in; k += PF_WIDTH) {
      vec d[36];
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) {
        vec column[6];
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) {
          // Two columns are this tile's too.
          if (j > 1) __builtin_prefetch(next[6 * i + j] + k);
          column[i] = load(from[6 * i + j] + k);
          if (positive) {
            if (j > 1) __builtin_prefetch(next_signs[6 * i + j] + k);
            column[i] = load(signs[6 * i + j] + k) <= 0.0f ? vec{} : column[i];
          }
        }
        input_transform(column);
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) d[6 * i + j] = column[i];
      }
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
        input_transform(d + 6 * i);
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) store(v + (6 * i + j) * plane + k, d[6 * i + j]);
      }
    }
  }
}

// m (COUNT, VECS vectors) = v (COUNT, in) @ u (in, VECS vectors); rows are `in`, `width` and `out` floats apart.
template <int COUNT, int VECS>
PF_TARGET void multiply_block(const float* v, const float* u, int64_t width, float* m, int64_t in, int64_t out) {
  vec sums[COUNT][VECS] = {};
  for (int64_t k = 0; k < in; ++k, u += width) {
    vec right[VECS];
#pragma GCC unroll 8
    for (int j = 0; j < VECS; ++j) right[j] = load(u + j * PF_WIDTH);
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i) {
      const vec left = v[i * in + k] - vec{};
#pragma GCC unroll 8
      for (int j = 0; j < VECS; ++j) sums[i][j] = PF_FMA(left, right[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < COUNT; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < VECS; ++j) store(m + i * out + j * PF_WIDTH, sums[i][j]);
  }
}

template <int VECS>
PF_TARGET void multiply_rows(int64_t rows, const float* v, const float* u, int64_t width, float* m, int64_t in,
                             int64_t out) {
  switch (rows) {
    case 6:
      return multiply_block<6, VECS>(v, u, width, m, in, out);
    case 5:
      return multiply_block<5, VECS>(v, u, width, m, in, out);
    case 4:
      return multiply_block<4, VECS>(v, u, width, m, in, out);
    case 3:
      return multiply_block<3, VECS>(v, u, width, m, in, out);
    case 2:
      return multiply_block<2, VECS>(v, u, width, m, in, out);
    default:
      return multiply_block<1, VECS>(v, u, width, m, in, out);
  }
}

// One of the 36 products: m (tiles, out) = v (tiles, in) @ u (in, out), of which panels of columns lie one by one.
PF_TARGET void multiply(const float* v, const float* u, float* m, int64_t tiles, int64_t in, int64_t out) {
  // ROWS rows of so many vectors, and what they are made from, fit into registers.
  constexpr int64_t VECS = PF_WIDTH == 16 ? 4 : 2;
  const int64_t blocks = (tiles + ROWS - 1) / ROWS;
  for (int64_t panel = 0; panel < out; panel += PANEL, u += in * PANEL) {
    const int64_t width = std::min(PANEL, out - panel);
    for (int64_t block = 0; block < blocks; ++block) {
      // Shares as even as they can be: six rows at a time would leave few for the last.
      const int64_t row = tiles * block / blocks, rows = tiles * (block + 1) / blocks - row;
      const float* from = v + row * in;
      for (int64_t column = 0; column < width; column += VECS * PF_WIDTH) {
        float* to = m + row * out + panel + column;
        const int64_t vecs = std::min(VECS, (width - column) / PF_WIDTH);
        if (vecs == 1) multiply_rows<1>(rows, from, u + column, width, to, in, out);
        if (vecs == 2) multiply_rows<2>(rows, from, u + column, width, to, in, out);
        if constexpr (VECS == 4) {
          if (vecs == 3) multiply_rows<3>(rows, from, u + column, width, to, in, out);
          if (vecs == 4) multiply_rows<4>(rows, from, u + column, width, to, in, out);
        }
      }
    }
  }
}

// Columns [first, last) of the transformed weights, u (36, in, out) in panels.
PF_TARGET void transform(const Weights& weights, int64_t first, int64_t last, float* u) {
  const int64_t in = weights.in, out = weights.out;
  for (int64_t column = first; column < last; column += PF_WIDTH) {
    const int64_t panel = column / PANEL * PANEL, width = std::min(PANEL, out - panel);
    float* to = u + panel * in + column - panel;
    for (int64_t k = 0; k < in; ++k, to += width) {
      vec g[9], rows[18], all[6];
      for (int tap = 0; tap < 9; ++tap) {
        const float* from = weights.tap(tap) + column * weights.out_stride + k * weights.in_stride;
        for (int i = 0; i < PF_WIDTH; ++i) g[tap][i] = from[i * weights.out_stride];
      }
      for (int j = 0; j < 3; ++j) weight_transform(g[j], g[3 + j], g[6 + j], rows + j, 3);
      for (int i = 0; i < 6; ++i) {
        weight_transform(rows[3 * i], rows[3 * i + 1], rows[3 * i + 2], all, 1);
        for (int j = 0; j < 6; ++j) PF_STREAM(to + (6 * i + j) * in * out, all[j]);
      }
    }
  }
}

// The outputs of tiles [first, last): relu(sums + bias + other), of other what is not where its `positive` is 0 or
// less. `nowhere`: what would lie outside of an image.
PF_TARGET void leave(const Convolution& conv, const float* m, int64_t plane, int64_t first, int64_t last,
                     const float* bias, const float* other, const float* positive, bool relu, float* y,
                     const float* zeros, float* nowhere) {
  float *to[16], *next[16];
  const float *add[16], *next_add[16] = {}, *signs[16], *next_signs[16] = {};
  const auto point = [&](int64_t tile) {
    conv.outputs(tile, y, nowhere, next);
    if (other) conv.outputs(tile, other, zeros, next_add);
    if (positive) conv.outputs(tile, positive, zeros, next_signs);
  };
  point(first);
  for (int64_t tile = first; tile < last; ++tile, m += conv.out) {
    std::copy(next, next + 16, to);
    std::copy(next_add, next_add + 16, add);
    std::copy(next_signs, next_signs + 16, signs);
    point(std::min(tile + 1, last - 1));
    for (int64_t k = 0; k < conv.out; k += PF_WIDTH) {
      vec columns[24];
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) {
        vec column[6];
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) column[i] = load(m + (6 * i + j) * plane + k);
        output_transform(column, columns[j], columns[6 + j], columns[12 + j], columns[18 + j]);
      }
      const vec shift = bias ? load(bias + k) : vec{};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        vec row[4];
        output_transform(columns + 6 * i, row[0], row[1], row[2], row[3]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          __builtin_prefetch(next[4 * i + j] + k, 1);
          vec value = row[j] + shift;
          if (other) {
            __builtin_prefetch(next_add[4 * i + j] + k);
            if (positive) __builtin_prefetch(next_signs[4 * i + j] + k);
            const vec more = load(add[4 * i + j] + k);
            value += positive ? (load(signs[4 * i + j] + k) <= 0.0f ? vec{} : more) : more;
          }
          if (relu) value = value < 0.0f ? vec{} : value;  // NaN stays
          store(to[4 * i + j] + k, value);
        }
      }
    }
  }
}

}  // namespace PF_ISA
}  // namespace part_fast

#undef PF_ISA
#undef PF_TARGET
#undef PF_WIDTH
#undef PF_FMA
#undef PF_STREAM
