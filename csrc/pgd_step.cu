// pgd_step on a GPU: out of place, in place, and its gradient, one launch each. See part_fast/ops/pgd_step.py.
#include "runs.cuh"

namespace part_fast {
namespace {

// What both directions read. T is the images' type.
template <typename T>
struct Step {
  using C = compute_t<T>;
  const T *x_adv, *x;
  const void* grad;
  int64_t numel;
  EpsView<C> eps;
  C alpha, clip_low, clip_high;
  ScalarType grad_dtype;
  bool aligned;

  Step(const Tensor& x_adv, const Tensor& grad, const Tensor& x, const std::optional<Tensor>& eps, double eps_high,
       double eps_low, double alpha, double clip_low, double clip_high)
      : x_adv(data<T>(x_adv)),
        x(data<T>(x)),
        grad(grad.data_ptr()),
        numel(x_adv.numel()),
        eps(view_eps<C>(Images(x_adv), eps_of(eps, eps_high, eps_low))),
        alpha(static_cast<C>(alpha)),
        clip_low(static_cast<C>(clip_low)),
        clip_high(static_cast<C>(clip_high)),
        grad_dtype(grad.scalar_type()),
        aligned(aligned_16(this->x_adv, this->x, this->grad)) {}

  __device__ __forceinline__ C moved(C x_adv, C sign, C x) const { return moved_by_step(x_adv, sign, x, alpha); }
  __device__ __forceinline__ T stepped(C x_adv, C sign, C x, C eps) const {
    return store<T>(clip(project(moved(x_adv, sign, x), x, eps), clip_low, clip_high));
  }
  __device__ __forceinline__ Signs signs(int64_t tile, bool whole) const {
    return whole ? signs_of<RUN<T>>(grad, grad_dtype, tile) : 0;
  }
};

template <typename T>
struct Fwd {
  Step<T> step;
  T* out;  // x_adv itself, in place
};

template <typename T>
__global__ void __launch_bounds__(IMAGES_BLOCK, IMAGES_BLOCKS) pgd_step_kernel(const __grid_constant__ Fwd<T> a) {
  using C = compute_t<T>;
  constexpr int N = RUN<T>;
  const Step<T>& s = a.step;
  over_tile<T>(
      s.numel, s.eps, s.aligned, [&](int64_t tile, int, bool whole) { return s.signs(tile, whole); },
      [&](Signs signs, int run, int64_t at, const C(&eps)[N]) {
        T x_adv[N], x[N], out[N];
        load_run(s.x_adv + at, x_adv);
        load_run(s.x + at, x);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          out[i] = s.stepped(load(x_adv[i]), sign_at<C>(signs, run * N + i), load(x[i]), eps[i]);
        }
        store_run(a.out + at, out);
      },
      [&](Signs, int, int64_t at, C eps) {
        const C sign = sign_of<C>(s.grad, s.grad_dtype, at);
        a.out[at] = s.stepped(load(s.x_adv[at]), sign, load(s.x[at]), eps);
      });
}

// The usual call; see runs.cuh. The gradient is of the images' type.
template <typename T>
struct FwdRuns {
  using C = compute_t<T>;
  const T *x_adv, *grad, *x;
  T* out;
  EpsRuns<T> eps;
  C alpha, clip_low, clip_high;

  FwdRuns(const Fwd<T>& a, const EpsRuns<T>& eps)
      : x_adv(a.step.x_adv),
        grad(static_cast<const T*>(a.step.grad)),
        x(a.step.x),
        out(a.out),
        eps(eps),
        alpha(a.step.alpha),
        clip_low(a.step.clip_low),
        clip_high(a.step.clip_high) {}
};

template <typename T>
__global__ void __launch_bounds__(IMAGES_BLOCK, IMAGES_BLOCKS)
    pgd_step_runs_kernel(const __grid_constant__ FwdRuns<T> a) {
  using C = compute_t<T>;
  step_run(a.x_adv, a.grad, a.x, a.eps, a.out, [&](T x_adv, C sign, T x, C eps) {
    const C moved = moved_by_step(load(x_adv), sign, load(x), a.alpha);
    return store<T>(clip(project(moved, load(x), eps), a.clip_low, a.clip_high));
  });
}

template <typename T>
struct Bwd {
  Step<T> step;
  const T* grad_out;
  GradientsView<T> to;
};

template <typename T>
__global__ void __launch_bounds__(IMAGES_BLOCK, IMAGES_BWD_BLOCKS<T>)
    pgd_step_bwd_kernel(const __grid_constant__ Bwd<T> a) {
  using C = compute_t<T>;
  constexpr int N = RUN<T>;
  const Step<T>& s = a.step;
  const auto passed = [&](C grad_out, C moved, C x, C eps) {
    return clipped(project(moved, x, eps), s.clip_low, s.clip_high) ? C(0) : grad_out;
  };
  over_tile<T>(
      s.numel, s.eps, s.aligned, [&](int64_t tile, int, bool whole) { return s.signs(tile, whole); },
      [&](Signs signs, int run, int64_t at, const C(&eps)[N]) {
        T x_adv[N], x[N], grad_out[N];
        load_run(s.x_adv + at, x_adv);
        load_run(s.x + at, x);
        load_run(a.grad_out + at, grad_out);
        Signs sides = 0;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const C moved = s.moved(load(x_adv[i]), sign_at<C>(signs, run * N + i), load(x[i]));
          grad_out[i] = store<T>(passed(load(grad_out[i]), moved, load(x[i]), eps[i]));
          sides |= signs_at(side(moved, eps[i]), i);
        }
        a.to.write_run(at, grad_out, sides);
      },
      [&](Signs, int, int64_t at, C eps) {
        const C sign = sign_of<C>(s.grad, s.grad_dtype, at), x = load(s.x[at]);
        const C moved = s.moved(load(s.x_adv[at]), sign, x);
        a.to.write_one(at, passed(load(a.grad_out[at]), moved, x, eps), side(moved, eps));
      });
}

template <typename... Arguments>
void pgd_step_into(const Tensor& out, const Tensor& x_adv, const Arguments&... arguments) {
  if (x_adv.numel() == 0) return;
  dispatch(x_adv.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    Fwd<T> a = {Step<T>(x_adv, arguments...), mutable_data<T>(out)};
    a.step.aligned = a.step.aligned && aligned_16(a.out);
    const EpsRuns<T> runs(a.step.eps, a.step.numel);
    if (runs.kind != runs.NONE && a.step.aligned && a.step.grad_dtype == x_adv.scalar_type()) {
      launch(pgd_step_runs_kernel<T>, run_grid(runs), IMAGES_BLOCK, 0, x_adv, FwdRuns<T>(a, runs));
      return;
    }
    launch(pgd_step_kernel<T>, tile_grid(a.step.numel), IMAGES_BLOCK, 0, x_adv, a);
  });
}

Tensor pgd_step(const Tensor& x_adv, const Tensor& grad, const Tensor& x, const std::optional<Tensor>& eps,
                double eps_high, double eps_low, double alpha, double clip_low, double clip_high) {
  const Tensor out = empty_like(x_adv, x_adv.scalar_type());
  pgd_step_into(out, x_adv, grad, x, eps, eps_high, eps_low, alpha, clip_low, clip_high);
  return out;
}

void pgd_step_(const Tensor& x_adv, const Tensor& grad, const Tensor& x, const std::optional<Tensor>& eps,
               double eps_high, double eps_low, double alpha, double clip_low, double clip_high) {
  pgd_step_into(x_adv, x_adv, grad, x, eps, eps_high, eps_low, alpha, clip_low, clip_high);
}

std::tuple<Tensor, Tensor, Tensor> pgd_step_bwd(const Tensor& grad_out, const Tensor& x_adv, const Tensor& grad,
                                                const Tensor& x, const std::optional<Tensor>& eps, double eps_high,
                                                double eps_low, double alpha, double clip_low, double clip_high) {
  const Gradients gradients(grad_out, eps);
  if (x_adv.numel() > 0) {
    dispatch(x_adv.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      Bwd<T> a = {Step<T>(x_adv, grad, x, eps, eps_high, eps_low, alpha, clip_low, clip_high), data<T>(grad_out),
                  GradientsView<T>(gradients)};
      a.step.aligned = a.step.aligned && aligned_16(a.grad_out, a.to.x_adv, a.to.x, a.to.eps);
      launch(pgd_step_bwd_kernel<T>, tile_grid(a.step.numel), IMAGES_BLOCK, 0, x_adv, a);
    });
  }
  return {gradients.x_adv, gradients.x, gradients.eps};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(part_fast, CUDA, m) {
  m.impl("_pgd_step", TORCH_BOX(&pgd_step));
  m.impl("_pgd_step_", TORCH_BOX(&pgd_step_));
  m.impl("_pgd_step_bwd", TORCH_BOX(&pgd_step_bwd));
}

}  // namespace part_fast
