// epsilon_map on the CPU: from a small map to each pixel's eps. See part_fast/ops/epsilon_map.py.
#include "maps.h"

namespace part_fast {
namespace {

template <typename C>
PF_HD void choose_loop(const uint8_t* mask, int64_t count, C eps, C eps_low, C* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = mask[i] ? eps : eps_low;
}

PF_CLONES void choose(const uint8_t* mask, int64_t count, float eps, float eps_low, float* to) {
  choose_loop(mask, count, eps, eps_low, to);
}

PF_CLONES void choose(const uint8_t* mask, int64_t count, double eps, double eps_low, double* to) {
  choose_loop(mask, count, eps, eps_low, to);
}

template <typename C>
PF_HD void soft_loop(C* u, int64_t count, C eps_low, C spread) {
  for (int64_t i = 0; i < count; ++i) u[i] = soft_eps(u[i], eps_low, spread);
}

PF_CLONES void soft(float* u, int64_t count, float eps_low, float spread) { soft_loop(u, count, eps_low, spread); }

PF_CLONES void soft(double* u, int64_t count, double eps_low, double spread) { soft_loop(u, count, eps_low, spread); }

Tensor epsilon_map(const Tensor& cam, int64_t height, int64_t width, int64_t rule, int64_t k, double eps,
                   double eps_low) {
  const int64_t n = cam.size(0), channels = channels_of(rule), pixels = height * width;
  const Tensor out = empty(cam, {n, channels, height, width}, compute_dtype(cam));
  dispatch(cam.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using C = compute_t<T>;
    C* to = mutable_data<C>(out);
    if (rule == SOFT) {
      for_each_map<T>(cam, height, width, [&](Upsampler<C>& upsampler, const auto& each) {
        each([&](int64_t image) {
          upsampler.enlarge(to + image * pixels);
          soft(to + image * pixels, pixels, static_cast<C>(eps_low), static_cast<C>(eps - eps_low));
        });
      });
      return;
    }
    const C set = static_cast<C>(eps), unset = static_cast<C>(eps_low);
    for_each_mask<T>(cam, height, width, rule, k, [&](int64_t image, const uint8_t* mask) {
      choose(mask, channels * pixels, set, unset, to + image * channels * pixels);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(part_fast, CPU, m) { m.impl("_epsilon_map", TORCH_BOX(&epsilon_map)); }

}  // namespace part_fast
