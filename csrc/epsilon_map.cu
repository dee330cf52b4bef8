// epsilon_map on a GPU: from a small map to each pixel's eps, one launch. See part_fast/ops/epsilon_map.py.
#include "masks.cuh"

namespace part_fast {
namespace {

template <typename C>
struct EpsilonMap {
  Maps<C> maps;
  C* out;
  int32_t k;
  C eps, eps_low, spread;
};

template <typename C, int RULE>
__global__ void __launch_bounds__(MAPS_BLOCK, MAPS_BLOCKS<C>)
    epsilon_map_kernel(const __grid_constant__ EpsilonMap<C> a) {
  const int64_t image = blockIdx.x;
  const int pixels = a.maps.pixels;
  C* const out = a.out + image * channels_of(RULE) * pixels;
  each_choice<RULE>(a.maps, a.k, [&](int first, int count, uint32_t kept, const C(&u)[QUAD]) {
#pragma unroll 1
    for (int c = 0; c < channels_of(RULE); ++c) {
      C values[QUAD];
#pragma unroll
      for (int i = 0; i < QUAD; ++i) {
        const C chosen = kept >> (8 * c + i) & 1 ? a.eps : a.eps_low;
        values[i] = RULE == SOFT ? soft_eps(u[i], a.eps_low, a.spread) : chosen;
      }
      write_quad(out + static_cast<int64_t>(c) * pixels, first, count, pixels % QUAD == 0, values);
    }
  });
}

Tensor epsilon_map(const Tensor& cam, int64_t height, int64_t width, int64_t rule, int64_t k, double eps,
                   double eps_low) {
  const int64_t channels = channels_of(rule);
  const Tensor out = empty(cam, {cam.size(0), channels, height, width}, compute_dtype(cam));
  if (out.numel() > 0) {
    on_compute_type(cam, [&](auto type) {
      using C = typename decltype(type)::type;
      const EpsilonMap<C> a = {Maps<C>(cam, height, width), mutable_data<C>(out),    static_cast<int32_t>(k),
                               static_cast<C>(eps),         static_cast<C>(eps_low), static_cast<C>(eps - eps_low)};
      on_rule<ZSCORE, RELEASED, QUANTILE, SOFT>(rule, [&](auto which) {
        launch(epsilon_map_kernel<C, decltype(which)::value>, a.maps.grid(), a.maps.block(), a.maps.room.bytes, cam, a);
      });
    });
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(part_fast, CUDA, m) { m.impl("_epsilon_map", TORCH_BOX(&epsilon_map)); }

}  // namespace part_fast
