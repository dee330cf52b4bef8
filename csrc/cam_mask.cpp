// cam_mask on the CPU, as bool or as packed bits. See part_fast/ops/cam_mask.py.
#include "maps.h"

namespace part_fast {
namespace {

PF_CLONES void pack(const uint8_t* mask, int64_t pixels, uint8_t* bits) {
  int64_t p = 0;
  for (; p + 8 <= pixels; p += 8) {
    int byte = 0;
    for (int bit = 0; bit < 8; ++bit) byte |= mask[p + bit] << bit;
    bits[p / 8] = static_cast<uint8_t>(byte);
  }
  if (p == pixels) return;
  int byte = 0;
  for (int bit = 0; p + bit < pixels; ++bit) byte |= mask[p + bit] << bit;
  bits[p / 8] = static_cast<uint8_t>(byte);
}

Tensor cam_mask(const Tensor& cam, int64_t height, int64_t width, int64_t rule, int64_t k, bool packed) {
  const int64_t n = cam.size(0), channels = channels_of(rule), pixels = height * width;
  const int64_t bytes = (pixels + 7) / 8;
  const Tensor out = packed ? empty(cam, {n, channels, bytes}, ScalarType::Byte)
                            : empty(cam, {n, channels, height, width}, ScalarType::Bool);
  uint8_t* to = mutable_data<uint8_t>(out);
  dispatch(cam.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    for_each_mask<T>(cam, height, width, rule, k, [&](int64_t image, const uint8_t* mask) {
      if (packed) {
        for (int64_t c = 0; c < channels; ++c) pack(mask + c * pixels, pixels, to + (image * channels + c) * bytes);
      } else {
        std::copy_n(mask, channels * pixels, to + image * channels * pixels);
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(part_fast, CPU, m) { m.impl("_cam_mask", TORCH_BOX(&cam_mask)); }

}  // namespace part_fast
