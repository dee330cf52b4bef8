// upsample_cam on the CPU and its gradient. See part_fast/ops/upsample_cam.py.
#include "maps.h"

namespace part_fast {
namespace {

Tensor upsample_cam(const Tensor& cam, int64_t height, int64_t width) {
  const int64_t pixels = height * width;
  const Tensor out = empty(cam, {cam.size(0), height, width}, cam.scalar_type());
  dispatch(cam.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using C = compute_t<T>;
    T* to = mutable_data<T>(out);
    for_each_map<T>(cam, height, width, [&](Upsampler<C>& upsampler, const auto& each) {
      std::vector<C> buffer(std::is_same_v<T, C> ? 0 : pixels);
      each([&](int64_t image) {
        C* u = place(to + image * pixels, buffer.data());
        upsampler.enlarge(u);
        write(u, to + image * pixels, pixels);
      });
    });
  });
  return out;
}

// The adjoint of the interpolation, in float64: rows first, then columns. `wide` (h,W) is scratch.
template <typename C>
PF_HD void shrink_map(const C* grad_out, const Axis<C>& rows, const Axis<C>& columns, double* wide, double* small) {
  const int64_t width = columns.out;
  std::fill_n(wide, rows.in * width, 0.0);
  for (int64_t row = 0; row < rows.out; ++row) {
    for (int tap = 0; tap < 4; ++tap) {
      const double weight = rows.taps[row].weight[tap];
      double* to = wide + rows.taps[row].index[tap] * width;
      PF_INDEPENDENT
      for (int64_t i = 0; i < width; ++i) to[i] += weight * static_cast<double>(grad_out[row * width + i]);
    }
  }
  std::fill_n(small, rows.in * columns.in, 0.0);
  for (int64_t row = 0; row < rows.in; ++row) {
    for (int64_t i = 0; i < width; ++i) {
      const Taps<C>& t = columns.taps[i];
      for (int tap = 0; tap < 4; ++tap) {
        small[row * columns.in + t.index[tap]] += static_cast<double>(t.weight[tap]) * wide[row * width + i];
      }
    }
  }
}

PF_CLONES void shrink(const float* grad_out, const Axis<float>& rows, const Axis<float>& columns, double* wide,
                      double* small) {
  shrink_map(grad_out, rows, columns, wide, small);
}

PF_CLONES void shrink(const double* grad_out, const Axis<double>& rows, const Axis<double>& columns, double* wide,
                      double* small) {
  shrink_map(grad_out, rows, columns, wide, small);
}

// The gradient of the normalisation, in place: minimum and maximum share theirs evenly between ties.
template <typename C>
void normalize_bwd(const C* cam, C low, C high, int64_t count, double* grad) {
  const double spread = high - low;
  double from_low = 0, from_high = 0, at_low = 0, at_high = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double scaled = (static_cast<double>(cam[i]) - low) / spread;
    from_low += (scaled - 1) * grad[i];
    from_high -= scaled * grad[i];
    at_low += cam[i] == low;
    at_high += cam[i] == high;
  }
  for (int64_t i = 0; i < count; ++i) {
    const double shared = (cam[i] == low) * (from_low / at_low) + (cam[i] == high) * (from_high / at_high);
    grad[i] = spread == 0 ? 0 : (grad[i] + shared) / spread;
  }
}

Tensor upsample_cam_bwd(const Tensor& grad_out, const Tensor& cam) {
  const Tensor out = empty_like(cam, cam.scalar_type());
  const int64_t height = grad_out.size(1), width = grad_out.size(2), pixels = height * width;
  const int64_t places = cam.size(1) * cam.size(2);
  dispatch(cam.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using C = compute_t<T>;
    const T* grad_out_data = data<T>(grad_out);
    T* to = mutable_data<T>(out);
    for_each_map<T>(cam, height, width, [&](Upsampler<C>& upsampler, const auto& each) {
      std::vector<C> buffer(std::is_same_v<T, C> ? 0 : pixels);
      std::vector<double> wide(upsampler.rows.in * width), small(places);
      each([&](int64_t image) {
        const C* grad = decoded(grad_out_data + image * pixels, buffer.data(), pixels);
        shrink(grad, upsampler.rows, upsampler.columns, wide.data(), small.data());
        normalize_bwd(upsampler.map.data(), upsampler.low, upsampler.high, places, small.data());
        for (int64_t i = 0; i < places; ++i) to[image * places + i] = store<T>(small[i]);
      });
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(part_fast, CPU, m) {
  m.impl("_upsample_cam", TORCH_BOX(&upsample_cam));
  m.impl("_upsample_cam_bwd", TORCH_BOX(&upsample_cam_bwd));
}

}  // namespace part_fast
