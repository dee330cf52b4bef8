// uniform_start on a GPU, one launch. See part_fast/ops/uniform_start.py.
#include "images.cuh"

namespace part_fast {
namespace {

template <typename T>
struct Start {
  using C = compute_t<T>;
  const T* x;
  T* out;
  int64_t numel;
  uint64_t key;
  EpsView<C> eps;
  C scale, clip_low, clip_high;
  bool aligned;

  __device__ __forceinline__ T moved(T x, uint32_t word, C bound) const {
    const C noise = signed_unit(word);
    return store<T>(clip(with_noise(load(x), noise, scale, bound), clip_low, clip_high));
  }
};

// Word `i` of four, where `i` is known when this is compiled or differs between lanes: never an array in memory.
__device__ __forceinline__ uint32_t word_at(const Words& words, int i) {
  const uint32_t even = i < 2 ? words.a : words.c, odd = i < 2 ? words.b : words.d;
  return i % 2 == 0 ? even : odd;
}

template <typename T>
__global__ void __launch_bounds__(IMAGES_BLOCK, IMAGES_BLOCKS)
    uniform_start_kernel(const __grid_constant__ Start<T> a) {
  using C = compute_t<T>;
  constexpr int N = RUN<T>;
  constexpr int WORDS = N < 4 ? N : 4;  // of a block that a run takes at once; a run of two may take the second two
  over_tile<T>(
      a.numel, a.eps, a.aligned, Nothing(),
      [&](Nothing, int, int64_t at, const C(&eps)[N]) {
        T x[N];
        load_run(a.x + at, x);
#pragma unroll
        for (int i = 0; i < N; i += WORDS) {
          const Words words = philox(static_cast<uint64_t>(at + i) / 4, a.key);
          const int first = WORDS == 4 ? 0 : static_cast<int>(at % 4);
#pragma unroll
          for (int j = 0; j < WORDS; ++j) x[i + j] = a.moved(x[i + j], word_at(words, first + j), eps[i + j]);
        }
        store_run(a.out + at, x);
      },
      [&](Nothing, int, int64_t at, C eps) {
        const Words words = philox(static_cast<uint64_t>(at) / 4, a.key);
        a.out[at] = a.moved(a.x[at], word_at(words, static_cast<int>(at % 4)), eps);
      });
}

Tensor uniform_start(const Tensor& x, const std::optional<Tensor>& eps, double eps_high, double eps_low, double scale,
                     int64_t seed, double clip_low, double clip_high) {
  const Tensor out = empty_like(x, x.scalar_type());
  if (x.numel() == 0) return out;
  dispatch(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using C = compute_t<T>;
    const Start<T> a = {data<T>(x),
                        mutable_data<T>(out),
                        x.numel(),
                        static_cast<uint64_t>(seed),
                        view_eps<C>(Images(x), eps_of(eps, eps_high, eps_low)),
                        static_cast<C>(scale),
                        static_cast<C>(clip_low),
                        static_cast<C>(clip_high),
                        aligned_16(data<T>(x), data<T>(out))};
    launch(uniform_start_kernel<T>, tile_grid(a.numel), IMAGES_BLOCK, 0, x, a);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(part_fast, CUDA, m) { m.impl("_uniform_start", TORCH_BOX(&uniform_start)); }

}  // namespace part_fast
