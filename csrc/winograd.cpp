// 3x3 convolutions on the CPU with a quarter of the products: Winograd's F(4x4, 3x3). See
// part_fast/attack_model/cpu/winograd.py.
#include <cstdlib>
#include <memory>
#include <string_view>
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
constexpr int64_t ROWS = 6;    // tiles that are multiplied at once
constexpr int64_t BLOCK = 12;  // tiles of which both sides of the products stay in a core's second cache
constexpr int64_t MANY = 96;   // from so many tiles on, a block is one thread's from x to y

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
  // Pointers to the pixels of a tile, row by row, or to `outside`.
  void inputs(int64_t tile, const float* x, const float* outside, const float** to) const {
    pixels<6, 1>(tile, x, in, outside, to);
  }
  template <typename T>
  void outputs(int64_t tile, T* y, T* outside, T** to) const {
    pixels<4, 0>(tile, y, out, outside, to);
  }

 private:
  template <int SIDE, int BEFORE, typename T>
  void pixels(int64_t tile, T* images, int64_t channels, T* outside, T** to) const {
    const int64_t image = tile / (across * down), top = tile / across % down * 4 - BEFORE;
    const int64_t left = tile % across * 4 - BEFORE, corner = ((image * h + top) * w + left) * channels;
    for (int64_t i = 0; i < SIDE; ++i) {
      const bool in_rows = top + i >= 0 && top + i < h;
      for (int64_t j = 0; j < SIDE; ++j) {
        const bool inside = in_rows && left + j >= 0 && left + j < w;
        *to++ = inside ? images + (corner + (i * w + j) * channels) : outside;
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

// By what the CPU has, and no more than ATEN_CPU_CAPABILITY allows, which torch goes by too.
Stages stages() {
#ifdef PF_X86
  const char* const allowed = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view most = allowed ? allowed : "";
  if (__builtin_cpu_supports("x86-64-v4") && most != "avx2" && most != "default") {
    return {avx512::transform, avx512::enter, avx512::multiply, avx512::leave};
  }
  if (__builtin_cpu_supports("x86-64-v3") && most != "default") {
    return {avx2::transform, avx2::enter, avx2::multiply, avx2::leave};
  }
#endif
  return {baseline::transform, baseline::enter, baseline::multiply, baseline::leave};
}

// Into u (36, in * out).
void winograd_weight_(const Tensor& u, const Tensor& weight, bool transposed) {
  static const Stages run = stages();
  const Weights weights(weight, transposed);
  float* to = mutable_data<float>(u);
  parallel_for(0, weights.out / LINE, 1,
               [&](int64_t first, int64_t last) { run.transform(weights, first * LINE, last * LINE, to); });
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

// Into y: relu(convolution(x) + bias + other) for the transformed weights u. x and other count as 0 where their
// `positive` is 0 or less.
void winograd_(const Tensor& y, const Tensor& x, const std::optional<Tensor>& x_positive, const Tensor& u,
               const std::optional<Tensor>& bias, const std::optional<Tensor>& other,
               const std::optional<Tensor>& other_positive, bool relu) {
  static const Stages run = stages();
  const Convolution conv(Images(x), y.size(1));
  const auto pointer = [](const std::optional<Tensor>& tensor) { return tensor ? data<float>(*tensor) : nullptr; };
  const float *from = data<float>(x), *signs = pointer(x_positive), *weights = data<float>(u), *shift = pointer(bias);
  const float *add = pointer(other), *add_signs = pointer(other_positive);
  float* to = mutable_data<float>(y);
  const std::vector<float> zeros(std::max(conv.in, conv.out));

  const auto multiply = [&](int64_t i, const float* v, int64_t v_plane, float* m, int64_t m_plane, int64_t tiles) {
    run.multiply(v + i * v_plane, weights + i * conv.in * conv.out, m + i * m_plane, tiles, conv.in, conv.out);
  };
  const auto leave = [&](const float* m, int64_t plane, int64_t first, int64_t last) {
    std::vector<float> nowhere(conv.out);
    run.leave(conv, m, plane, first, last, shift, add, add_signs, relu, to, zeros.data(), nowhere.data());
  };
  const int64_t tiles = conv.tiles();
  if (tiles >= MANY) {
    parallel_for(0, (tiles + ROWS - 1) / ROWS, 1, [&](int64_t first, int64_t last) {
      const int64_t v_plane = BLOCK * conv.in + LINE, m_plane = BLOCK * conv.out + LINE;
      float *v = scratch(36 * (v_plane + m_plane)), *m = v + 36 * v_plane;
      for (int64_t begin = first * ROWS; begin < std::min(last * ROWS, tiles); begin += BLOCK) {
        const int64_t end = std::min({begin + BLOCK, last * ROWS, tiles});
        run.enter(conv, from, signs, zeros.data(), begin, end, v, v_plane);
        for (int64_t i = 0; i < 36; ++i) multiply(i, v, v_plane, m, m_plane, end - begin);
        leave(m, m_plane, begin, end);
      }
    });
  } else {
    // Few tiles, many weights: each of the products is one thread's, so that no weights are read twice.
    const int64_t v_plane = tiles * conv.in + LINE, m_plane = tiles * conv.out + LINE;
    float *v = scratch(36 * (v_plane + m_plane)), *m = v + 36 * v_plane;
    parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
      run.enter(conv, from, signs, zeros.data(), first, last, v + first * conv.in, v_plane);
    });
    parallel_for(0, 36, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) multiply(i, v, v_plane, m, m_plane, tiles);
    });
    parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) { leave(m + first * conv.out, m_plane, first, last); });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(part_fast, CPU, m) {
  m.impl("_winograd_weight_", TORCH_BOX(&winograd_weight_));
  m.impl("_winograd_", TORCH_BOX(&winograd_));
}

}  // namespace part_fast
