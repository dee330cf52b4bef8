// 3x3 convolutions on the CPU with a quarter of the products: Winograd's F(4x4, 3x3). See part_fast/ops/winograd.py.
#include <memory>
#include <vector>

#include "cpu.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define PF_X86 1
#endif

namespace part_fast {
namespace {

constexpr int64_t PANEL = 64;  // columns of the weights that lie together
constexpr int64_t LINE = 16;   // floats of a cache line
constexpr int64_t BLOCKS = 8;  // from so many blocks of tiles on, each is one thread's from x to y

// The points that polynomials are multiplied at: 0, A, -A, B, -B and infinity. With these two float32 loses a third of
// what it loses with the usual 1 and 2.
constexpr float A = 0.75f, B = 1.5f;
constexpr float SUM = A * A + B * B, PRODUCT = A * A * B * B;
constexpr float OF_A = 1 / (2 * A * A * (A * A - B * B)), OF_B = 1 / (2 * B * B * (B * B - A * A));

// x (n,h,w,in) -> y (n,h,w,out), stride and padding 1, in tiles of 4x4 outputs from 6x6 inputs.
struct Convolution {
  int64_t n, h, w, in, out, down, across;

  Convolution(const Images& x, int64_t channels)
      : n(x.n), h(x.h), w(x.w), in(x.c), out(channels), down((x.h + 3) / 4), across((x.w + 3) / 4) {}
  int64_t tiles() const { return n * down * across; }
  // Into `to`: where each pixel of the `rows` x `columns` lies from `above` and left of the tile's first output on, in
  // pixels; -1 outside of the image.
  void places(int64_t tile, int64_t above, int64_t rows, int64_t columns, int64_t* to) const {
    const int64_t image = tile / (across * down), y0 = tile / across % down * 4 - above, x0 = tile % across * 4 - above;
    for (int64_t y = y0; y < y0 + rows; ++y) {
      for (int64_t x = x0; x < x0 + columns; ++x) {
        *to++ = y < 0 || y >= h || x < 0 || x >= w ? -1 : (image * h + y) * w + x;
      }
    }
  }
};

// Weights (out,in,3,3), or what multiplies the gradient of the output: turned by half, in and out exchanged.
struct Weights {
  const float* data;
  int64_t in, out, in_stride, out_stride, y_stride, x_stride;

  Weights(const Tensor& weight, bool transposed)
      : data(part_fast::data<float>(weight)),
        in(weight.size(!transposed)),
        out(weight.size(transposed)),
        in_stride(weight.stride(!transposed)),
        out_stride(weight.stride(transposed)),
        y_stride(weight.stride(2)),
        x_stride(weight.stride(3)) {
    if (!transposed) return;
    data += 2 * (y_stride + x_stride);
    y_stride = -y_stride;
    x_stride = -x_stride;
  }
  const float* tap(int64_t index) const { return data + index / 3 * y_stride + index % 3 * x_stride; }
};

}  // namespace
}  // namespace part_fast

#ifdef PF_X86
#define PF_ISA avx512
#define PF_TARGET __attribute__((target("arch=x86-64-v4")))
#define PF_WIDTH 16
#define PF_FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define PF_STREAM(to, value) _mm512_stream_ps(to, value)
#include "winograd.h"
#define PF_ISA avx2
#define PF_TARGET __attribute__((target("arch=x86-64-v3")))
#define PF_WIDTH 8
#define PF_FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define PF_STREAM(to, value) _mm256_stream_ps(to, value)
#include "winograd.h"
#endif
#define PF_ISA baseline
#define PF_TARGET
#define PF_WIDTH 4
#define PF_FMA(a, b, c) ((a) * (b) + (c))
#define PF_STREAM(to, value) store(to, value)
#include "winograd.h"

namespace part_fast {
namespace {

struct Stages {
  decltype(&baseline::transform) transform;
  decltype(&baseline::enter) enter;
  decltype(&baseline::multiply) multiply;
  decltype(&baseline::leave) leave;
};

Stages stages() {
#ifdef PF_X86
  if (__builtin_cpu_supports("x86-64-v4")) {
    return {avx512::transform, avx512::enter, avx512::multiply, avx512::leave};
  }
  if (__builtin_cpu_supports("x86-64-v3")) return {avx2::transform, avx2::enter, avx2::multiply, avx2::leave};
#endif
  return {baseline::transform, baseline::enter, baseline::multiply, baseline::leave};
}

// Into u (36, in * out).
void winograd_weight_(const Tensor& u, const Tensor& weight, bool transposed) {
  static const Stages run = stages();
  const Weights weights(weight, transposed);
  float* to = mutable_data<float>(u);
  torch::stable::parallel_for(0, weights.out / LINE, 1, [&](int64_t first, int64_t last) {
    run.transform(weights, first * LINE, last * LINE, to);
  });
}

// Memory that a thread keeps, so that its pages are there the next time.
float* scratch(int64_t count) {
  thread_local std::unique_ptr<float[]> memory;
  thread_local int64_t size = 0;
  if (size < count) {
    memory.reset(new float[count]);
    size = count;
  }
  return memory.get();
}

// relu(convolution(x) + bias + other) for the transformed weights u. `positive`: where it is 0 or less x counts as 0.
Tensor winograd(const Tensor& x, const Tensor& u, int64_t channels, const std::optional<Tensor>& bias,
                const std::optional<Tensor>& other, bool relu, const std::optional<Tensor>& positive) {
  static const Stages run = stages();
  const Convolution conv(Images(x), channels);
  const Tensor out = torch::stable::new_empty(x, {conv.n, conv.h, conv.w, channels});
  const std::vector<float> zeros(conv.in);
  const float *from = data<float>(x), *weights = data<float>(u);
  const float* signs = positive ? data<float>(*positive) : nullptr;
  const float* shift = bias ? data<float>(*bias) : nullptr;
  const float* add = other ? data<float>(*other) : nullptr;
  float* to = mutable_data<float>(out);

  // Both sides of the products of a block of tiles stay in a core's second cache.
  const int64_t most = std::clamp<int64_t>(3600 / (conv.in + conv.out), 12, 24);
  const int64_t blocks = (conv.tiles() + most - 1) / most;
  const auto multiply = [&](int64_t i, const float* v, int64_t v_plane, float* m, int64_t m_plane, int64_t tiles) {
    run.multiply(v + i * v_plane, weights + i * conv.in * conv.out, m + i * m_plane, tiles, conv.in, conv.out);
  };
  if (blocks >= BLOCKS) {
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      const int64_t v_plane = most * conv.in + LINE, m_plane = most * conv.out + LINE;
      float *v = scratch(36 * (v_plane + m_plane)), *m = v + 36 * v_plane;
      for (int64_t block = first; block < last; ++block) {
        const int64_t begin = conv.tiles() * block / blocks, end = conv.tiles() * (block + 1) / blocks;
        run.enter(conv, from, signs, zeros.data(), begin, end, v, v_plane);
        for (int64_t i = 0; i < 36; ++i) multiply(i, v, v_plane, m, m_plane, end - begin);
        run.leave(conv, m, m_plane, begin, end, shift, add, relu, to);
      }
    });
  } else {
    // Few tiles, many weights: each of the products is one thread's, so that no weights are read twice.
    const int64_t tiles = conv.tiles(), v_plane = tiles * conv.in + LINE, m_plane = tiles * conv.out + LINE;
    float *v = scratch(36 * (v_plane + m_plane)), *m = v + 36 * v_plane;
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
      run.enter(conv, from, signs, zeros.data(), first, last, v + first * conv.in, v_plane);
    });
    torch::stable::parallel_for(0, 36, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) multiply(i, v, v_plane, m, m_plane, tiles);
    });
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
      run.leave(conv, m + first * conv.out, m_plane, first, last, shift, add, relu, to);
    });
  }
  // (N,H,W,C) as (N,C,H,W)
  return torch::stable::transpose(torch::stable::transpose(out, 1, 3), 2, 3);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(part_fast, CPU, m) {
  m.impl("_winograd_weight_", TORCH_BOX(&winograd_weight_));
  m.impl("_winograd", TORCH_BOX(&winograd));
}

}  // namespace part_fast
