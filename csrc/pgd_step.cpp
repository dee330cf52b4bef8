// pgd_step on the CPU: out of place, in place, and its gradient. See part_fast/ops/pgd_step.py.
#include "images.h"

namespace part_fast {
namespace {

template <typename C>
struct Step {
  C alpha, clip_low, clip_high;
};

template <typename C>
PF_HD void step_loop(const C* x_adv, const C* grad, const C* x, const C* eps, Step<C> step, C* out, int64_t count) {
  PF_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    const C moved = moved_by_step(x_adv[i], sign<C>(grad[i]), x[i], step.alpha);
    out[i] = clip(project(moved, x[i], eps[i]), step.clip_low, step.clip_high);
  }
}

PF_CLONES void step_chunk(const float* x_adv, const float* grad, const float* x, const float* eps, Step<float> step,
                          float* out, int64_t count) {
  step_loop(x_adv, grad, x, eps, step, out, count);
}

PF_CLONES void step_chunk(const double* x_adv, const double* grad, const double* x, const double* eps,
                          Step<double> step, double* out, int64_t count) {
  step_loop(x_adv, grad, x, eps, step, out, count);
}

// Of BFloat16 alone, two at a time.
PF_CLONES void step_chunk(const BFloat16* x_adv, const BFloat16* grad, const BFloat16* x, const float* eps,
                          Step<float> step, BFloat16* out, int64_t count) {
  const auto stepped = [&](float a, float g, float b, float bound) __attribute__((always_inline)) {
    return clip(project(moved_by_step(a, sign<float>(g), b, step.alpha), b, bound), step.clip_low, step.clip_high);
  };
  const Pair *x_advs = reinterpret_cast<const Pair*>(x_adv), *grads = reinterpret_cast<const Pair*>(grad),
             *xs = reinterpret_cast<const Pair*>(x);
  Pair* outs = reinterpret_cast<Pair*>(out);
  PF_INDEPENDENT
  for (int64_t i = 0; i < count / 2; ++i) {
    const uint32_t a = x_advs[i], g = grads[i], b = xs[i];
    outs[i] = pair_of(stepped(even_of(a), even_of(g), even_of(b), eps[2 * i]),
                      stepped(odd_of(a), odd_of(g), odd_of(b), eps[2 * i + 1]));
  }
  if (count % 2) {
    const int64_t last = count - 1;
    out[last] = store<BFloat16>(stepped(load(x_adv[last]), load(grad[last]), load(x[last]), eps[last]));
  }
}

template <typename C>
PF_HD void bwd_loop(const C* grad_out, const C* x_adv, const C* grad, const C* x, const C* eps, Step<C> step,
                    C* to_x_adv, C* to_x, C* to_eps, int64_t count) {
  PF_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    const C moved = moved_by_step(x_adv[i], sign<C>(grad[i]), x[i], step.alpha);
    const bool cut = clipped(project(moved, x[i], eps[i]), step.clip_low, step.clip_high);
    const C passed = cut ? C(0) : grad_out[i];
    const C where = side(moved, eps[i]);
    to_x_adv[i] = grad_x_adv(passed, where);
    to_x[i] = grad_x(passed, where);
    to_eps[i] = grad_eps(passed, where);
  }
}

PF_CLONES void bwd_chunk(const float* grad_out, const float* x_adv, const float* grad, const float* x, const float* eps,
                         Step<float> step, float* to_x_adv, float* to_x, float* to_eps, int64_t count) {
  bwd_loop(grad_out, x_adv, grad, x, eps, step, to_x_adv, to_x, to_eps, count);
}

PF_CLONES void bwd_chunk(const double* grad_out, const double* x_adv, const double* grad, const double* x,
                         const double* eps, Step<double> step, double* to_x_adv, double* to_x, double* to_eps,
                         int64_t count) {
  bwd_loop(grad_out, x_adv, grad, x, eps, step, to_x_adv, to_x, to_eps, count);
}

template <typename C>
Step<C> step_of(double alpha, double clip_low, double clip_high) {
  return {static_cast<C>(alpha), static_cast<C>(clip_low), static_cast<C>(clip_high)};
}

void pgd_step_into(const Tensor& out, const Tensor& x_adv, const Tensor& grad, const Tensor& x,
                   const std::optional<Tensor>& eps, double eps_high, double eps_low, double alpha, double clip_low,
                   double clip_high) {
  dispatch(x_adv.scalar_type(), [&](auto image_type) {
    dispatch(grad.scalar_type(), [&](auto grad_type) {
      using T = typename decltype(image_type)::type;
      using G = typename decltype(grad_type)::type;
      using C = compute_t<T>;
      const T *x_adv_data = data<T>(x_adv), *x_data = data<T>(x);
      const G* grad_data = data<G>(grad);
      T* out_data = mutable_data<T>(out);
      const auto step = step_of<C>(alpha, clip_low, clip_high);
      for_each_chunk<C>(Images(x_adv), eps_of(eps, eps_high, eps_low), [&](int64_t at, int64_t count, const C* bound) {
        if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<G, BFloat16>) {
          step_chunk(x_adv_data + at, grad_data + at, x_data + at, bound, step, out_data + at, count);
        } else {
          alignas(64) C buffer[3][CHUNK];
          C* to = place(out_data + at, buffer[0]);
          step_chunk(decoded(x_adv_data + at, buffer[0], count), decoded_sign(grad_data + at, buffer[1], count),
                     decoded(x_data + at, buffer[2], count), bound, step, to, count);
          write(to, out_data + at, count);
        }
      });
    });
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
  dispatch(x_adv.scalar_type(), [&](auto image_type) {
    dispatch(grad.scalar_type(), [&](auto grad_type) {
      using T = typename decltype(image_type)::type;
      using G = typename decltype(grad_type)::type;
      using C = compute_t<T>;
      const T *grad_out_data = data<T>(grad_out), *x_adv_data = data<T>(x_adv), *x_data = data<T>(x);
      const G* grad_data = data<G>(grad);
      const auto step = step_of<C>(alpha, clip_low, clip_high);
      for_each_chunk<C>(Images(x_adv), eps_of(eps, eps_high, eps_low), [&](int64_t at, int64_t count, const C* bound) {
        alignas(64) C buffer[4][CHUNK];
        const GradientsChunk<T> to(gradients, at);
        bwd_chunk(decoded(grad_out_data + at, buffer[0], count), decoded(x_adv_data + at, buffer[1], count),
                  decoded_sign(grad_data + at, buffer[2], count), decoded(x_data + at, buffer[3], count), bound, step,
                  to.x_adv, to.x, to.eps, count);
        to.write(count);
      });
    });
  });
  return {gradients.x_adv, gradients.x, gradients.eps};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(part_fast, CPU, m) {
  m.impl("_pgd_step", TORCH_BOX(&pgd_step));
  m.impl("_pgd_step_", TORCH_BOX(&pgd_step_));
  m.impl("_pgd_step_bwd", TORCH_BOX(&pgd_step_bwd));
}

}  // namespace part_fast
