// eps_step_ on the CPU. See part_fast/ops/eps_step.py.
#include "bank.h"

namespace part_fast {
namespace {

template <typename C>
struct Step {
  C step = 0, clip_low = 0, clip_high = 0;
  bool of_eps = false, project = false;
};

template <typename C>
PF_HD void step_loop(const C* x_adv, const C* grad, const C* x, const C* eps, Step<C> s, C* out, int64_t count) {
  constexpr C FREE = std::numeric_limits<C>::infinity();
  PF_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    const C alpha = s.of_eps ? s.step * eps[i] : s.step;
    const C moved = moved_by_step(x_adv[i], sign<C>(grad[i]), x[i], alpha);
    out[i] = clip(project(moved, x[i], s.project ? eps[i] : FREE), s.clip_low, s.clip_high);
  }
}

PF_CLONES void step_chunk(const float* x_adv, const float* grad, const float* x, const float* eps, Step<float> s,
                          float* out, int64_t count) {
  step_loop(x_adv, grad, x, eps, s, out, count);
}

PF_CLONES void step_chunk(const double* x_adv, const double* grad, const double* x, const double* eps, Step<double> s,
                          double* out, int64_t count) {
  step_loop(x_adv, grad, x, eps, s, out, count);
}

template <typename C>
PF_HD void level_loop(const C* x_adv, const C* x, C levels, int8_t* to, int64_t count) {
  PF_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    to[i] = static_cast<int8_t>(static_cast<int32_t>(level_of(x_adv[i] - x[i], levels)));
  }
}

PF_CLONES void level_chunk(const float* x_adv, const float* x, float levels, int8_t* to, int64_t count) {
  level_loop(x_adv, x, levels, to, count);
}

PF_CLONES void level_chunk(const double* x_adv, const double* x, double levels, int8_t* to, int64_t count) {
  level_loop(x_adv, x, levels, to, count);
}

// `count` values, from elements `step` apart, to a bank.
void give(const int8_t* from, int64_t step, int8_t* to, int64_t along, int64_t count) {
  if (step == 1 && along == 1) {
    std::copy_n(from, count, to);
  } else if (step == 1) {
    reversed(from, to - count + 1, count);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i * along] = from[i * step];
  }
}

void eps_step_(const Tensor& x_adv, const Tensor& grad, const Tensor& x, const std::optional<Tensor>& eps,
               double eps_high, double eps_low, double step, bool of_eps, bool project, double clip_low,
               double clip_high, const std::optional<Tensor>& bank, const std::optional<Tensor>& places,
               double levels) {
  const Images images(x_adv);
  std::optional<BankRows> rows;
  if (bank && places) rows.emplace(images, *bank, *places);
  dispatch(x_adv.scalar_type(), [&](auto image_type) {
    dispatch(grad.scalar_type(), [&](auto grad_type) {
      using T = typename decltype(image_type)::type;
      using G = typename decltype(grad_type)::type;
      using C = compute_t<T>;
      T* x_adv_data = mutable_data<T>(x_adv);
      const T* x_data = data<T>(x);
      const G* grad_data = data<G>(grad);
      int8_t* values = rows ? mutable_data<int8_t>(*bank) : nullptr;
      const Step<C> s = {static_cast<C>(step), static_cast<C>(clip_low), static_cast<C>(clip_high), of_eps, project};
      for_each_chunk<C>(images, eps_of(eps, eps_high, eps_low), [&](int64_t at, int64_t count, const C* bound) {
        alignas(64) C buffer[4][CHUNK];
        T* out = x_adv_data + at;
        const C *from = decoded(out, buffer[0], count), *natural = decoded(x_data + at, buffer[2], count);
        // x may be x_adv itself, so with a bank nothing is written before the perturbation is known.
        C* to = rows ? buffer[3] : place(out, buffer[3]);
        step_chunk(from, decoded_sign(grad_data + at, buffer[1], count), natural, bound, s, to, count);
        if (!rows) {
          write(to, out, count);
          return;
        }
        alignas(64) int8_t stored[CHUNK];
        if constexpr (std::is_same_v<T, C>) {
          level_chunk(to, natural, static_cast<C>(levels), stored, count);
          std::copy_n(to, count, out);
        } else {
          write(to, out, count);
          level_chunk(decoded(out, buffer[0], count), natural, static_cast<C>(levels), stored, count);
        }
        rows->for_each_run(
            at, count,
            [&](int64_t begin, int64_t apart, int64_t length, int64_t to_bank, int64_t along) {
              give(stored + begin, apart, values + to_bank, along, length);
            },
            [](int64_t, int64_t) {});
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(part_fast, CPU, m) { m.impl("_eps_step_", TORCH_BOX(&eps_step_)); }

}  // namespace part_fast
