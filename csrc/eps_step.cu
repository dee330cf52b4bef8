// eps_step_ on a GPU: the step, and what it leaves in the bank, in one launch. See part_fast/ops/eps_step.py.
#include "bank.cuh"
#include "runs.cuh"

namespace part_fast {
namespace {

// How an element moves.
template <typename C>
struct Move {
  C step, clip_low, clip_high;
  bool of_eps, project;

  template <typename T>
  __device__ __forceinline__ T moved(T x_adv, C sign, T x, C eps) const {
    const C free = moved_by_step(load(x_adv), sign, load(x), of_eps ? step * eps : step);
    const C result = project ? part_fast::project(free, load(x), eps) : load(x) + free;
    return store<T>(clip(result, clip_low, clip_high));
  }
};

// T is the images' type.
template <typename T>
struct Step {
  using C = compute_t<T>;
  T* x_adv;
  const T* x;
  const void* grad;
  int64_t numel;
  EpsView<C> eps;
  Move<C> move;
  ScalarType grad_dtype;
  bool aligned;
};

template <typename T>
struct Stored {
  Step<T> step;
  BankView bank;
  compute_t<T> levels;
};

// kept(i, its new value, x) is called for each element i of the warp's tile, by the lane that has it.
template <typename T, typename F>
__device__ __forceinline__ void step_tile(const Step<T>& s, const F& kept) {
  using C = compute_t<T>;
  constexpr int N = RUN<T>;
  over_tile<T>(
      s.numel, s.eps, s.aligned,
      [&](int64_t tile, int, bool whole) -> Signs { return whole ? signs_of<N>(s.grad, s.grad_dtype, tile) : 0; },
      [&](Signs signs, int run, int64_t at, const C(&eps)[N]) {
        T x_adv[N], x[N];
        load_run(s.x_adv + at, x_adv);
        load_run(s.x + at, x);
#pragma unroll
        for (int i = 0; i < N; ++i) x_adv[i] = s.move.moved(x_adv[i], sign_at<C>(signs, run * N + i), x[i], eps[i]);
        store_run(s.x_adv + at, x_adv);
#pragma unroll
        for (int i = 0; i < N; ++i) kept(static_cast<int>(at - this_tile()) + i, x_adv[i], x[i]);
      },
      [&](Signs, int i, int64_t at, C eps) {
        const T x = s.x[at], result = s.move.moved(s.x_adv[at], sign_of<C>(s.grad, s.grad_dtype, at), x, eps);
        s.x_adv[at] = result;
        kept(i, result, x);
      });
}

template <typename T>
__global__ void __launch_bounds__(IMAGES_BLOCK, IMAGES_BLOCKS) eps_step_kernel(const __grid_constant__ Step<T> a) {
  step_tile(a, [](int, T, T) {});
}

// The usual call; see runs.cuh. The gradient is of the images' type.
template <typename T>
struct StepRuns {
  using C = compute_t<T>;
  T* x_adv;
  const T *grad, *x;
  EpsRuns<T> eps;
  Move<C> move;
};

template <typename T>
__global__ void __launch_bounds__(IMAGES_BLOCK, IMAGES_BLOCKS)
    eps_step_runs_kernel(const __grid_constant__ StepRuns<T> a) {
  using C = compute_t<T>;
  step_run(a.x_adv, a.grad, a.x, a.eps, a.x_adv,
           [&](T x_adv, C sign, T x, C eps) { return a.move.moved(x_adv, sign, x, eps); });
}

template <typename T>
__global__ void __launch_bounds__(IMAGES_BLOCK, IMAGES_BWD_BLOCKS<T>)
    eps_step_bank_kernel(const __grid_constant__ Stored<T> a) {
  // Levels go to the bank in the order in which the lanes lie, so that neighbours in a row share sectors.
  __shared__ alignas(16) int8_t room[IMAGES_BLOCK / 32][TILE];
  int8_t* levels = room[threadIdx.x / 32];
  step_tile(a.step, [&](int i, T x_adv, T x) {
    levels[i] = static_cast<int8_t>(static_cast<int>(level_of(load(x_adv) - load(x), a.levels)));
  });
  __syncwarp();
  const int64_t tile = this_tile();
  const int count = static_cast<int>(min(int64_t{TILE}, a.step.numel - tile));
#pragma unroll 2
  for (int i = threadIdx.x % 32; i < count; i += 32) {
    const int64_t place = a.bank.place_of(tile + i);
    if (place >= 0) a.bank.values[place] = levels[i];
  }
}

void eps_step_(const Tensor& x_adv, const Tensor& grad, const Tensor& x, const std::optional<Tensor>& eps,
               double eps_high, double eps_low, double step, bool of_eps, bool project, double clip_low,
               double clip_high, const std::optional<Tensor>& bank, const std::optional<Tensor>& places,
               double levels) {
  if (x_adv.numel() == 0) return;
  dispatch(x_adv.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using C = compute_t<T>;
    const Images images(x_adv);
    const Step<T> a = {mutable_data<T>(x_adv),
                       data<T>(x),
                       grad.data_ptr(),
                       x_adv.numel(),
                       view_eps<C>(images, eps_of(eps, eps_high, eps_low)),
                       {static_cast<C>(step), static_cast<C>(clip_low), static_cast<C>(clip_high), of_eps, project},
                       grad.scalar_type(),
                       aligned_16(data<T>(x_adv), data<T>(x), static_cast<const char*>(grad.data_ptr()))};
    if (bank && places) {
      const Stored<T> stored = {a, BankView(images, *bank, *places), static_cast<C>(levels)};
      launch(eps_step_bank_kernel<T>, tile_grid(a.numel), IMAGES_BLOCK, 0, x_adv, stored);
      return;
    }
    const EpsRuns<T> runs(a.eps, a.numel);
    if (runs.kind != runs.NONE && a.aligned && a.grad_dtype == x_adv.scalar_type()) {
      const StepRuns<T> usual = {a.x_adv, static_cast<const T*>(a.grad), a.x, runs, a.move};
      launch(eps_step_runs_kernel<T>, run_grid(runs), IMAGES_BLOCK, 0, x_adv, usual);
    } else {
      launch(eps_step_kernel<T>, tile_grid(a.numel), IMAGES_BLOCK, 0, x_adv, a);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(part_fast, CUDA, m) { m.impl("_eps_step_", TORCH_BOX(&eps_step_)); }

}  // namespace part_fast
