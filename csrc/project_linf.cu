// project_linf on a GPU and its gradient, one launch each. See part_fast/ops/project_linf.py.
#include "images.cuh"

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
  const int64_t tile = this_tile();
  const int count = static_cast<int>(min(int64_t{TILE}, p.numel - tile));
  if (count <= 0) return;
  const EpsTile<C, N> bound(p.eps, tile, count);
  if (p.aligned && count == TILE) {
#pragma unroll
    for (int run = 0; run < EACH / N; ++run) {
      const int64_t at = this_run<T>(tile, run);
      T x_adv[N], x[N];
      load_run(p.x_adv + at, x_adv);
      load_run(p.x + at, x);
      C eps[N];
      bound.read(run, eps);
      T out[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        out[i] = store<T>(project(load(x_adv[i]) - load(x[i]), load(x[i]), eps[i]));
      }
      store_run(a.out + at, out);
    }
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < count; i += 32) {
    const int64_t at = tile + i;
    const C x = load(p.x[at]);
    a.out[at] = store<T>(project(load(p.x_adv[at]) - x, x, bound[i]));
  }
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
  const int64_t tile = this_tile();
  const int count = static_cast<int>(min(int64_t{TILE}, p.numel - tile));
  if (count <= 0) return;
  const EpsTile<C, N> bound(p.eps, tile, count);
  if (p.aligned && count == TILE) {
#pragma unroll
    for (int run = 0; run < EACH / N; ++run) {
      const int64_t at = this_run<T>(tile, run);
      T x_adv[N], x[N], grad_out[N];
      load_run(p.x_adv + at, x_adv);
      load_run(p.x + at, x);
      load_run(a.grad_out + at, grad_out);
      C eps[N];
      bound.read(run, eps);
      Signs sides = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) sides |= signs_at(side(load(x_adv[i]) - load(x[i]), eps[i]), i);
      a.to.write_run(at, grad_out, sides);
    }
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < count; i += 32) {
    const int64_t at = tile + i;
    a.to.write_one(at, load(a.grad_out[at]), side(load(p.x_adv[at]) - load(p.x[at]), bound[i]));
  }
}

Tensor project_linf(const Tensor& x_adv, const Tensor& x, const std::optional<Tensor>& eps, double eps_high,
                    double eps_low) {
  const Tensor out = empty_like(x_adv, x_adv.scalar_type());
  if (x_adv.numel() > 0) {
    dispatch(x_adv.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      Fwd<T> a = {Projection<T>(x_adv, x, eps, eps_high, eps_low), mutable_data<T>(out)};
      a.projection.aligned = a.projection.aligned && aligned_16(a.out);
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
