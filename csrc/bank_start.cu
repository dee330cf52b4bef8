// bank_start on a GPU, one launch. See part_fast/ops/bank_start.py.
#include "bank.cuh"

namespace part_fast {
namespace {

template <typename T>
struct Start {
  using C = compute_t<T>;
  const T* x;
  T* out;
  int64_t numel;
  BankView bank;
  EpsView<C> eps;
  C unit, clip_low, clip_high;
  bool aligned;

  __device__ __forceinline__ T moved(T x, C level, C bound) const {
    return store<T>(clip(project(level * unit, load(x), bound), clip_low, clip_high));
  }
};

template <typename T>
__global__ void __launch_bounds__(IMAGES_BLOCK, IMAGES_BWD_BLOCKS<T>)
    bank_start_kernel(const __grid_constant__ Start<T> a) {
  using C = compute_t<T>;
  constexpr int N = RUN<T>;
  using Levels = LevelsTile<C, N>;
  over_tile<T>(
      a.numel, a.eps, a.aligned, [&](int64_t tile, int count, bool) { return Levels(a.bank, tile, count); },
      [&](const Levels& levels, int run, int64_t at, const C(&eps)[N]) {
        T x[N];
        load_run(a.x + at, x);
        C level[N];
        levels.read(run, level);
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = a.moved(x[i], level[i], eps[i]);
        store_run(a.out + at, x);
      },
      [&](const Levels& levels, int i, int64_t at, C eps) { a.out[at] = a.moved(a.x[at], levels[i], eps); });
}

Tensor bank_start(const Tensor& x, const Tensor& bank, const Tensor& places, const std::optional<Tensor>& eps,
                  double eps_high, double eps_low, double unit, double clip_low, double clip_high) {
  const Tensor out = empty_like(x, x.scalar_type());
  if (x.numel() == 0) return out;
  dispatch(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using C = compute_t<T>;
    const Images images(x);
    const Start<T> a = {data<T>(x),
                        mutable_data<T>(out),
                        x.numel(),
                        BankView(images, bank, places),
                        view_eps<C>(images, eps_of(eps, eps_high, eps_low)),
                        static_cast<C>(unit),
                        static_cast<C>(clip_low),
                        static_cast<C>(clip_high),
                        aligned_16(data<T>(x), data<T>(out))};
    launch(bank_start_kernel<T>, tile_grid(a.numel), IMAGES_BLOCK, 0, x, a);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(part_fast, CUDA, m) { m.impl("_bank_start", TORCH_BOX(&bank_start)); }

}  // namespace part_fast
