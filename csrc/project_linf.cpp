// project_linf on the CPU and its gradient. See part_fast/ops/project_linf.py.
#include "images.h"

namespace part_fast {
namespace {

template <typename C>
PF_HD void project_loop(const C* x_adv, const C* x, const C* eps, C* out, int64_t count) {
  PF_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) out[i] = project(x_adv[i] - x[i], x[i], eps[i]);
}

PF_CLONES void project_chunk(const float* x_adv, const float* x, const float* eps, float* out, int64_t count) {
  project_loop(x_adv, x, eps, out, count);
}

PF_CLONES void project_chunk(const double* x_adv, const double* x, const double* eps, double* out, int64_t count) {
  project_loop(x_adv, x, eps, out, count);
}

// Of BFloat16, two at a time.
PF_CLONES void project_chunk(const BFloat16* x_adv, const BFloat16* x, const float* eps, BFloat16* out, int64_t count) {
  const Pair *x_advs = reinterpret_cast<const Pair*>(x_adv), *xs = reinterpret_cast<const Pair*>(x);
  Pair* outs = reinterpret_cast<Pair*>(out);
  PF_INDEPENDENT
  for (int64_t i = 0; i < count / 2; ++i) {
    const uint32_t a = x_advs[i], b = xs[i];
    outs[i] = pair_of(project(even_of(a) - even_of(b), even_of(b), eps[2 * i]),
                      project(odd_of(a) - odd_of(b), odd_of(b), eps[2 * i + 1]));
  }
  if (count % 2) {
    const int64_t last = count - 1;
    out[last] = store<BFloat16>(project(load(x_adv[last]) - load(x[last]), load(x[last]), eps[last]));
  }
}

template <typename C>
PF_HD void bwd_loop(const C* grad_out, const C* x_adv, const C* x, const C* eps, C* to_x_adv, C* to_x, C* to_eps,
                    int64_t count) {
  PF_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    const C where = side(x_adv[i] - x[i], eps[i]);
    to_x_adv[i] = grad_x_adv(grad_out[i], where);
    to_x[i] = grad_x(grad_out[i], where);
    to_eps[i] = grad_eps(grad_out[i], where);
  }
}

PF_CLONES void bwd_chunk(const float* grad_out, const float* x_adv, const float* x, const float* eps, float* to_x_adv,
                         float* to_x, float* to_eps, int64_t count) {
  bwd_loop(grad_out, x_adv, x, eps, to_x_adv, to_x, to_eps, count);
}

PF_CLONES void bwd_chunk(const double* grad_out, const double* x_adv, const double* x, const double* eps,
                         double* to_x_adv, double* to_x, double* to_eps, int64_t count) {
  bwd_loop(grad_out, x_adv, x, eps, to_x_adv, to_x, to_eps, count);
}

Tensor project_linf(const Tensor& x_adv, const Tensor& x, const std::optional<Tensor>& eps, double eps_high,
                    double eps_low) {
  const Tensor out = empty_like(x_adv, x_adv.scalar_type());
  dispatch(x_adv.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using C = compute_t<T>;
    const T *x_adv_data = data<T>(x_adv), *x_data = data<T>(x);
    T* out_data = mutable_data<T>(out);
    for_each_chunk<C>(Images(x_adv), eps_of(eps, eps_high, eps_low), [&](int64_t at, int64_t count, const C* bound) {
      if constexpr (std::is_same_v<T, BFloat16>) {
        project_chunk(x_adv_data + at, x_data + at, bound, out_data + at, count);
      } else {
        alignas(64) C buffer[2][CHUNK];
        C* to = place(out_data + at, buffer[0]);
        project_chunk(decoded(x_adv_data + at, buffer[0], count), decoded(x_data + at, buffer[1], count), bound, to,
                      count);
        write(to, out_data + at, count);
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> project_linf_bwd(const Tensor& grad_out, const Tensor& x_adv, const Tensor& x,
                                                    const std::optional<Tensor>& eps, double eps_high, double eps_low) {
  const Gradients gradients(grad_out, eps);
  dispatch(x_adv.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using C = compute_t<T>;
    const T *grad_out_data = data<T>(grad_out), *x_adv_data = data<T>(x_adv), *x_data = data<T>(x);
    for_each_chunk<C>(Images(x_adv), eps_of(eps, eps_high, eps_low), [&](int64_t at, int64_t count, const C* bound) {
      alignas(64) C buffer[3][CHUNK];
      const GradientsChunk<T> to(gradients, at);
      bwd_chunk(decoded(grad_out_data + at, buffer[0], count), decoded(x_adv_data + at, buffer[1], count),
                decoded(x_data + at, buffer[2], count), bound, to.x_adv, to.x, to.eps, count);
      to.write(count);
    });
  });
  return {gradients.x_adv, gradients.x, gradients.eps};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(part_fast, CPU, m) {
  m.impl("_project_linf", TORCH_BOX(&project_linf));
  m.impl("_project_linf_bwd", TORCH_BOX(&project_linf_bwd));
}

}  // namespace part_fast
