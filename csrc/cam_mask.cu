// cam_mask on a GPU, as bool or as packed bits, one launch. See part_fast/ops/cam_mask.py.
#include "masks.cuh"

namespace part_fast {
namespace {

template <typename C>
struct Mask {
  Maps<C> maps;
  uint8_t* out;
  int32_t k;
  bool packed;
};

template <typename C, int RULE>
__global__ void __launch_bounds__(MAPS_BLOCK, MAPS_BLOCKS<C>) cam_mask_kernel(const __grid_constant__ Mask<C> a) {
  const int64_t image = blockIdx.x;
  const int pixels = a.maps.pixels, bytes = a.packed ? (pixels + 7) / 8 : pixels;
  uint8_t* const out = a.out + image * channels_of(RULE) * bytes;
  each_choice<RULE>(a.maps, a.k, [&](int first, int count, uint32_t kept, const C(&)[QUAD]) {
#pragma unroll 1
    for (int c = 0; c < channels_of(RULE); ++c) {
      const uint32_t four = kept >> 8 * c & 15;
      if (a.packed) {
        // A byte is two threads' pixels.
        const uint32_t next = __shfl_down_sync(0xffffffffu, four, 1);
        if (count > 0 && first % 8 == 0) out[c * bytes + first / 8] = static_cast<uint8_t>(four | next << 4);
      } else {
        uint8_t values[QUAD];
#pragma unroll
        for (int i = 0; i < QUAD; ++i) values[i] = four >> i & 1;
        write_quad(out + c * bytes, first, count, pixels % QUAD == 0, values);
      }
    }
  });
}

Tensor cam_mask(const Tensor& cam, int64_t height, int64_t width, int64_t rule, int64_t k, bool packed) {
  const int64_t n = cam.size(0), channels = channels_of(rule), pixels = height * width;
  const Tensor out = packed ? empty(cam, {n, channels, (pixels + 7) / 8}, ScalarType::Byte)
                            : empty(cam, {n, channels, height, width}, ScalarType::Bool);
  if (out.numel() > 0) {
    on_compute_type(cam, [&](auto type) {
      using C = typename decltype(type)::type;
      const Mask<C> a = {Maps<C>(cam, height, width), mutable_data<uint8_t>(out), static_cast<int32_t>(k), packed};
      on_rule<ZSCORE, RELEASED, QUANTILE>(rule, [&](auto which) {
        launch(cam_mask_kernel<C, decltype(which)::value>, a.maps.grid(), a.maps.block(), a.maps.room.bytes, cam, a);
      });
    });
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(part_fast, CUDA, m) { m.impl("_cam_mask", TORCH_BOX(&cam_mask)); }

}  // namespace part_fast
