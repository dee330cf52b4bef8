// cam on the CPU: one pass over an image's activation and gradient, summed in float64. See part_fast/ops/cam.py.
#include <vector>

#include "cpu.h"

namespace part_fast {
namespace {

// The raw op's `method` argument: the place in METHODS of part_fast/ops/cam.py.
enum Method { GRADCAM = 0, XGRADCAM = 1, LAYERCAM = 2, HIRESCAM = 3 };

// What one place of one channel adds to the sums from which the channel's weight is made: above / below.
template <int method>
PF_HD void add_to_weight(double activation, double gradient, double& above, double& below) {
  above += method == GRADCAM ? gradient : gradient * activation;
  below += method == GRADCAM ? 1.0 : activation + 1e-8;
}

// What it adds to the map. `weight` is the channel's, for the methods that have one.
template <int method>
PF_HD double term(double activation, double gradient, double weight) {
  if (method == LAYERCAM) return (gradient < 0 ? 0 : gradient) * activation;
  return (method == HIRESCAM ? gradient : weight) * activation;
}

constexpr int SUMS = 16;                  // independent running sums, so that additions need not wait for each other
constexpr int64_t VALUES_A_TASK = 32768;  // below this, waking another thread costs more than it saves

// One channel of a contiguous image: `places` values in a row, added to the map.
template <int method, typename C>
PF_HD void add_channel(const C* activation, const C* gradient, int64_t places, double* map) {
  double weight = 0;
  if (method == GRADCAM || method == XGRADCAM) {
    double above[SUMS] = {}, below[SUMS] = {};
    int64_t p = 0;
    for (; p + SUMS <= places; p += SUMS) {
      for (int i = 0; i < SUMS; ++i) add_to_weight<method>(activation[p + i], gradient[p + i], above[i], below[i]);
    }
    for (; p < places; ++p) add_to_weight<method>(activation[p], gradient[p], above[0], below[0]);
    for (int i = 1; i < SUMS; ++i) {
      above[0] += above[i];
      below[0] += below[i];
    }
    weight = above[0] / below[0];
  }
  PF_INDEPENDENT
  for (int64_t p = 0; p < places; ++p) map[p] += term<method>(activation[p], gradient[p], weight);
}

// One place of a channels_last image: the terms of its `channels` values in a row.
template <int method, typename C>
PF_HD double value_of_place(const C* activation, const C* gradient, int64_t channels, const double* weights) {
  double sums[SUMS] = {};
  int64_t k = 0;
  for (; k + SUMS <= channels; k += SUMS) {
    for (int i = 0; i < SUMS; ++i) sums[i] += term<method>(activation[k + i], gradient[k + i], weights[k + i]);
  }
  for (; k < channels; ++k) sums[0] += term<method>(activation[k], gradient[k], weights[k]);
  for (int i = 1; i < SUMS; ++i) sums[0] += sums[i];
  return sums[0];
}

// map (places) of one image. weights: scratch for 2 * channels.
template <int method, typename C>
PF_HD void image_cam(const C* activation, const C* gradient, int64_t channels, int64_t places, bool channels_last,
                     double* weights, double* map) {
  if (!channels_last) {
    std::fill_n(map, places, 0.0);
    for (int64_t k = 0; k < channels; ++k) {
      add_channel<method>(activation + k * places, gradient + k * places, places, map);
    }
    return;
  }
  std::fill_n(weights, 2 * channels, 0.0);
  if (method == GRADCAM || method == XGRADCAM) {
    double* below = weights + channels;
    for (int64_t p = 0; p < places; ++p) {
      const C *a = activation + p * channels, *g = gradient + p * channels;
      PF_INDEPENDENT
      for (int64_t k = 0; k < channels; ++k) add_to_weight<method>(a[k], g[k], weights[k], below[k]);
    }
    PF_INDEPENDENT
    for (int64_t k = 0; k < channels; ++k) weights[k] /= below[k];
  }
  for (int64_t p = 0; p < places; ++p) {
    map[p] = value_of_place<method>(activation + p * channels, gradient + p * channels, channels, weights);
  }
}

template <typename C>
PF_HD void image_cam(int64_t method, const C* activation, const C* gradient, int64_t channels, int64_t places,
                     bool channels_last, double* weights, double* map) {
  switch (method) {
    case GRADCAM:
      return image_cam<GRADCAM>(activation, gradient, channels, places, channels_last, weights, map);
    case XGRADCAM:
      return image_cam<XGRADCAM>(activation, gradient, channels, places, channels_last, weights, map);
    case LAYERCAM:
      return image_cam<LAYERCAM>(activation, gradient, channels, places, channels_last, weights, map);
    default:
      return image_cam<HIRESCAM>(activation, gradient, channels, places, channels_last, weights, map);
  }
}

PF_CLONES void map_of(int64_t method, const float* activation, const float* gradient, int64_t channels, int64_t places,
                      bool channels_last, double* weights, double* map) {
  image_cam(method, activation, gradient, channels, places, channels_last, weights, map);
}

PF_CLONES void map_of(int64_t method, const double* activation, const double* gradient, int64_t channels,
                      int64_t places, bool channels_last, double* weights, double* map) {
  image_cam(method, activation, gradient, channels, places, channels_last, weights, map);
}

Tensor cam(const Tensor& activation, const Tensor& gradient, int64_t method) {
  const Images shape(activation);
  const int64_t places = shape.pixels(), values = shape.c * places;
  const Tensor out = empty(activation, {shape.n, shape.h, shape.w}, compute_dtype(activation));
  dispatch(activation.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using C = compute_t<T>;
    const T *activations = data<T>(activation), *gradients = data<T>(gradient);
    C* to = mutable_data<C>(out);
    torch::stable::parallel_for(0, shape.n, VALUES_A_TASK / (values + 1) + 1, [&](int64_t first, int64_t last) {
      std::vector<double> weights(2 * shape.c), map(places);
      std::vector<C> buffer(std::is_same_v<T, C> ? 0 : 2 * values);
      for (int64_t image = first; image < last; ++image) {
        const C* a = decoded(activations + image * values, buffer.data(), values);
        const C* g = decoded(gradients + image * values, buffer.data() + values, values);
        map_of(method, a, g, shape.c, places, shape.channels_last, weights.data(), map.data());
        // relu, NaN kept.
        for (int64_t p = 0; p < places; ++p) to[image * places + p] = static_cast<C>(map[p] < 0 ? 0 : map[p]);
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(part_fast, CPU, m) { m.impl("_cam", TORCH_BOX(&cam)); }

}  // namespace part_fast
