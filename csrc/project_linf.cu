// project_linf on a GPU and its gradient, one launch each. See part_fast/ops/project_linf.py.
#include "runs.cuh"

namespace part_fast {
namespace {

// What both directions read. T is the images' type.
template <typename T>
struct Projection {
  using C = compute_t<T>;
  const T *x_adv, *x;
  int64_t numel;
  EpsView<C> eps;
  bool aligned;

  Projection(const Tensor& x_adv, const Tensor& x, const std::optional<Tensor>& eps, double eps_high, double eps_low)
      : x_adv(data<T>(x_adv)),
        x(data<T>(x)),
        numel(x_adv.numel()),
        eps(view_eps<C>(Images(x_adv), eps_of(eps, eps_high, eps_low))),
        aligned(aligned_16(this->x_adv, this->x)) {}
};

template <typename T>
__device__ __forceinline__ T projected(T x_adv, T x, compute_t<T> eps) {
  return store<T>(project(load(x_adv) - load(x), load(x), eps));
}

template <typename T>
struct Fwd {
  Projection<T> projection;
  T* out;
};

template <typename T>
__global__ void __launch_bounds__(IMAGES_BLOCK, IMAGES_BLOCKS)
    project_linf_fwd_kernel(const __grid_constant__ Fwd<T> a) {
  using C = compute_t<T>;
  constexpr int N = RUN<T>;
  const Projection<T>& p = a.projection;
  over_tile<T>(
      p.numel, p.eps, p.aligned, Nothing(),
      [&](Nothing, int, int64_t at, const C(&eps)[N]) {
        T x_adv[N], x[N];
        load_run(p.x_adv + at, x_adv);
        load_run(p.x + at, x);
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = projected(x_adv[i], x[i], eps[i]);
        store_run(a.out + at, x);
      },
      [&](Nothing, int, int64_t at, C eps) { a.out[at] = projected(p.x_adv[at], p.x[at], eps); });
}

// The usual call; see runs.cuh.
template <typename T>
struct FwdRuns {
  const T *x_adv, *x;
  T* out;
  EpsRuns<T> eps;
};

template <typename T>
__global__ void __launch_bounds__(IMAGES_BLOCK, IMAGES_BLOCKS)
    project_linf_runs_kernel(const __grid_constant__ FwdRuns<T> a) {
  constexpr int N = RUN<T>;
  const uint32_t run = this_run();
  if (run >= a.eps.runs) return;
  const int64_t at = static_cast<int64_t>(run) * N;
  T x_adv[N], x[N];
  load_run(a.x_adv + at, x_adv);
  load_run(a.x + at, x);
  compute_t<T> eps[N];
  a.eps.read(run, eps);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = projected(x_adv[i], x[i], eps[i]);
  store_run(a.out + at, x);
}

template <typename T>
struct Bwd {
  Projection<T> projection;
  const T* grad_out;
  GradientsView<T> to;
};

template <typename T>
__global__ void __launch_bounds__(IMAGES_BLOCK, IMAGES_BWD_BLOCKS<T>)
    project_linf_bwd_kernel(const __grid_constant__ Bwd<T> a) {
  using C = compute_t<T>;
  constexpr int N = RUN<T>;
  const Projection<T>& p = a.projection;
  over_tile<T>(
      p.numel, p.eps, p.aligned, Nothing(),
      [&](Nothing, int, int64_t at, const C(&eps)[N]) {
        T x_adv[N], x[N], grad_out[N];
        load_run(p.x_adv + at, x_adv);
        load_run(p.x + at, x);
        load_run(a.grad_out + at, grad_out);
        Signs sides = 0;
#pragma unroll
        for (int i = 0; i < N; ++i) sides |= signs_at(side(load(x_adv[i]) - load(x[i]), eps[i]), i);
        a.to.write_run(at, grad_out, sides);
      },
      [&](Nothing, int, int64_t at, C eps) {
        a.to.write_one(at, load(a.grad_out[at]), side(load(p.x_adv[at]) - load(p.x[at]), eps));
      });
}

Tensor project_linf(const Tensor& x_adv, const Tensor& x, const std::optional<Tensor>& eps, double eps_high,
                    double eps_low) {
  const Tensor out = empty_like(x_adv, x_adv.scalar_type());
  if (x_adv.numel() > 0) {
    dispatch(x_adv.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      Fwd<T> a = {Projection<T>(x_adv, x, eps, eps_high, eps_low), mutable_data<T>(out)};
      a.projection.aligned = a.projection.aligned && aligned_16(a.out);
      const EpsRuns<T> runs(a.projection.eps, a.projection.numel);
      if (runs.kind != runs.NONE && a.projection.aligned) {
        const FwdRuns<T> usual = {a.projection.x_adv, a.projection.x, a.out, runs};
        launch(project_linf_runs_kernel<T>, run_grid(runs), IMAGES_BLOCK, 0, x_adv, usual);
        return;
      }
      launch(project_linf_fwd_kernel<T>, tile_grid(a.projection.numel), IMAGES_BLOCK, 0, x_adv, a);
    });
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor> project_linf_bwd(const Tensor& grad_out, const Tensor& x_adv, const Tensor& x,
                                                    const std::optional<Tensor>& eps, double eps_high, double eps_low) {
  const Gradients gradients(grad_out, eps);
  if (x_adv.numel() > 0) {
    dispatch(x_adv.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      Bwd<T> a = {Projection<T>(x_adv, x, eps, eps_high, eps_low), data<T>(grad_out), GradientsView<T>(gradients)};
      a.projection.aligned = a.projection.aligned && aligned_16(a.grad_out, a.to.x_adv, a.to.x, a.to.eps);
      launch(project_linf_bwd_kernel<T>, tile_grid(a.projection.numel), IMAGES_BLOCK, 0, x_adv, a);
    });
  }
  return {gradients.x_adv, gradients.x, gradients.eps};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(part_fast, CUDA, m) {
  m.impl("_project_linf", TORCH_BOX(&project_linf));
  m.impl("_project_linf_bwd", TORCH_BOX(&project_linf_bwd));
}

}  // namespace part_fast
