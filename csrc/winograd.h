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

// Six values of a row or a column of a tile of the input, in place.
PF_TARGET inline __attribute__((always_inline)) void input_transform(vec* d) {
  const vec first = d[4] - SUM * d[2] + PRODUCT * d[0], last = d[5] - SUM * d[3] + PRODUCT * d[1];
  const vec even_a = d[4] - B * B * d[2], odd_a = A * (d[3] - B * B * d[1]);
  const vec even_b = d[4] - A * A * d[2], odd_b = B * (d[3] - A * A * d[1]);
  d[0] = first;
  d[1] = even_a + odd_a;
  d[2] = even_a - odd_a;
  d[3] = even_b + odd_b;
  d[4] = even_b - odd_b;
  d[5] = last;
}

// Six values of a row or a column of weights, from three; `stride` vectors apart.
PF_TARGET inline __attribute__((always_inline)) void weight_transform(vec g0, vec g1, vec g2, vec* u, int64_t stride) {
  const vec even_a = (g0 + A * A * g2) * OF_A, odd_a = A * g1 * OF_A;
  const vec even_b = (g0 + B * B * g2) * OF_B, odd_b = B * g1 * OF_B;
  u[0] = g0 * (1 / PRODUCT);
  u[stride] = even_a + odd_a;
  u[2 * stride] = even_a - odd_a;
  u[3 * stride] = even_b + odd_b;
  u[4 * stride] = even_b - odd_b;
  u[5 * stride] = g2;
}

// Four outputs from six products.
PF_TARGET inline __attribute__((always_inline)) void output_transform(const vec* m, vec& y0, vec& y1, vec& y2,
                                                                      vec& y3) {
  const vec plus_a = m[1] + m[2], minus_a = A * (m[1] - m[2]);
  const vec plus_b = m[3] + m[4], minus_b = B * (m[3] - m[4]);
  y0 = m[0] + plus_a + plus_b;
  y1 = minus_a + minus_b;
  y2 = A * A * plus_a + B * B * plus_b;
  y3 = A * A * minus_a + B * B * minus_b + m[5];
}

// Tiles [first, last) of the input, transformed: v (36, last - first, in), `plane` floats from one of the 36 to the
// next. `positive`: the values of x where it is 0 or less count as 0.
PF_TARGET void enter(const Convolution& conv, const float* x, const float* positive, const float* zeros, int64_t first,
                     int64_t last, float* v, int64_t plane) {
  int64_t next[36];
  conv.places(first, 1, 6, 6, next);
  for (int64_t tile = first; tile < last; ++tile, v += conv.in) {
    const float *from[36], *after[36];
    int64_t offset[36];
    for (int i = 0; i < 36; ++i) {
      offset[i] = next[i] * conv.in;
      from[i] = next[i] < 0 ? zeros : x + offset[i];
    }
    conv.places(std::min(tile + 1, last - 1), 1, 6, 6, next);
    for (int i = 0; i < 36; ++i) after[i] = next[i] < 0 ? zeros : x + next[i] * conv.in;
    for (int64_t k = 0; k < conv.in; k += PF_WIDTH) {
      vec d[36];
      for (int j = 0; j < 6; ++j) {
        vec column[6];
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) {
          if (j > 1) __builtin_prefetch(after[6 * i + j] + k);
          column[i] = load(from[6 * i + j] + k);
          if (positive && offset[6 * i + j] >= 0) {
            column[i] = load(positive + offset[6 * i + j] + k) <= 0.0f ? vec{} : column[i];
          }
        }
        input_transform(column);
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) d[6 * i + j] = column[i];
      }
      for (int i = 0; i < 6; ++i) {
        input_transform(d + 6 * i);
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) store(v + (6 * i + j) * plane + k, d[6 * i + j]);
      }
    }
  }
}

// m (ROWS, VECS vectors) = v (ROWS, in) @ u (in, VECS vectors); rows are `in`, `width` and `out` floats apart.
template <int ROWS, int VECS>
PF_TARGET void multiply_block(const float* v, const float* u, int64_t width, float* m, int64_t in, int64_t out) {
  vec sums[ROWS][VECS] = {};
  for (int64_t k = 0; k < in; ++k, u += width) {
    vec right[VECS];
#pragma GCC unroll 8
    for (int j = 0; j < VECS; ++j) right[j] = load(u + j * PF_WIDTH);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const vec left = v[i * in + k] - vec{};
#pragma GCC unroll 8
      for (int j = 0; j < VECS; ++j) sums[i][j] = PF_FMA(left, right[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
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
  // Six rows of so many vectors, and what they are made from, fit into registers.
  constexpr int64_t VECS = PF_WIDTH == 16 ? 4 : 2;
  const int64_t blocks = (tiles + 5) / 6;
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

// The outputs of tiles [first, last): relu(sums + bias + other).
PF_TARGET void leave(const Convolution& conv, const float* m, int64_t plane, int64_t first, int64_t last,
                     const float* bias, const float* other, bool relu, float* y) {
  for (int64_t tile = first; tile < last; ++tile, m += conv.out) {
    int64_t offset[16];
    conv.places(tile, 0, 4, 4, offset);
    for (int i = 0; i < 16; ++i) offset[i] *= conv.out;
    for (int64_t k = 0; k < conv.out; k += PF_WIDTH) {
      vec columns[24];
      for (int j = 0; j < 6; ++j) {
        vec column[6];
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) column[i] = load(m + (6 * i + j) * plane + k);
        output_transform(column, columns[j], columns[6 + j], columns[12 + j], columns[18 + j]);
      }
      const vec shift = bias ? load(bias + k) : vec{};
      for (int i = 0; i < 4; ++i) {
        vec row[4];
        output_transform(columns + 6 * i, row[0], row[1], row[2], row[3]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const int64_t to = offset[4 * i + j] + k;
          if (offset[4 * i + j] < 0) continue;
          vec value = row[j] + shift;
          if (other) value += load(other + to);
          if (relu) value = value < 0.0f ? vec{} : value;  // NaN stays
          store(y + to, value);
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
