// cam on the CPU: values are read where they lie, eight at a time. See part_fast/ops/cam.py.
//
// Sums run in float32 (float64 for float64), as on the other backends. A contiguous image has a row of places for each
// channel: a channel's weight comes from a sum over its row, and the map takes eight weighted rows at a time. A
// channels_last image has a row of channels for each place: weights come from sums over the rows, and each value of the
// map is the sum of a weighted row; four rows at a time.
#include <cstring>
#include <vector>

#include "cpu.h"

namespace part_fast {
namespace {

// The raw op's `method` argument: the place in METHODS of part_fast/ops/cam.py.
enum Method { GRADCAM = 0, XGRADCAM = 1, LAYERCAM = 2, HIRESCAM = 3 };

constexpr bool has_weights(int method) { return method == GRADCAM || method == XGRADCAM; }

constexpr int64_t LANES = 8;              // values in registers, and channels of a contiguous image at a time
constexpr int64_t ROWS = 4;               // of a channels_last image, at a time
constexpr int64_t VALUES_A_TASK = 32768;  // below this, waking another thread costs more than it saves

template <typename T>
struct Lanes {
  typedef T type __attribute__((vector_size(LANES * sizeof(T))));
};
template <typename T>
using Vector = typename Lanes<T>::type;

// body(at, Type<V[N]>{}) for all of `count` values: two vectors at a time, then one, then single ones.
template <typename C, typename F>
PF_HD void for_values(int64_t count, const F& body) {
  int64_t i = 0;
  for (; i + 2 * LANES <= count; i += 2 * LANES) body(i, Type<Vector<C>[2]>{});
  for (; i + LANES <= count; i += LANES) body(i, Type<Vector<C>[1]>{});
  for (; i < count; ++i) body(i, Type<C[1]>{});
}

// N values or vectors from anywhere. Of 16-bit values the first of two vectors gets the even ones and the second the
// odd ones, which takes a shift and a mask where their order would take shuffles. See `in_order`.
template <typename T, typename V, int N>
PF_HD void get(const T* from, V (&to)[N]) {
  if constexpr (!std::is_same_v<T, BFloat16>) {
    const char* bytes = reinterpret_cast<const char*>(from);
    for (int i = 0; i < N; ++i) std::memcpy(&to[i], bytes + i * sizeof(V), sizeof(V));
  } else if constexpr (sizeof(V) == sizeof(float)) {
    to[0] = load(*from);
  } else if constexpr (N == 1) {
    Vector<uint16_t> bits;
    std::memcpy(&bits, from, sizeof(bits));
    const Vector<uint32_t> wide = __builtin_convertvector(bits, Vector<uint32_t>) << 16;
    std::memcpy(&to[0], &wide, sizeof(wide));
  } else {
    Vector<uint32_t> pairs;
    std::memcpy(&pairs, from, sizeof(pairs));
    const Vector<uint32_t> even = pairs << 16, odd = pairs & 0xffff0000u;
    std::memcpy(&to[0], &even, sizeof(even));
    std::memcpy(&to[1], &odd, sizeof(odd));
  }
}

// Adds them to values of the compute type.
template <typename C, typename V, int N>
PF_HD void add(const V (&values)[N], C* to) {
  char* bytes = reinterpret_cast<char*>(to);
  V sums[N];
  get(to, sums);
  for (int i = 0; i < N; ++i) {
    sums[i] += values[i];
    std::memcpy(bytes + i * sizeof(V), &sums[i], sizeof(V));
  }
}

// Values that were computed from 16-bit ones, brought from the order in which `get` read them into their own.
PF_HD void in_order(float* values, int64_t count) {
  for (; count >= 2 * LANES; count -= 2 * LANES, values += 2 * LANES) {
    float read[2 * LANES];
    std::copy_n(values, 2 * LANES, read);
    for (int i = 0; i < LANES; ++i) {
      values[2 * i] = read[i];
      values[2 * i + 1] = read[LANES + i];
    }
  }
}

// Asks for what lies `values` further on, for rows that are read a few at a time: the hardware reads on in a row, but
// not from a row to the one after the next. Behind the last row lies anything; asking for it does no harm.
template <typename T>
PF_HD void prefetch(const T* from, int64_t values) {
  __builtin_prefetch(from + values);
}

// The sum of each of LANES vectors.
template <typename C>
PF_HD void sums_of(const Vector<C> (&values)[LANES], C (&sums)[LANES]) {
#if __has_builtin(__builtin_shufflevector)
  Vector<C> two[4], four[2];
  for (int i = 0; i < 4; ++i) {
    const Vector<C>&a = values[2 * i], &b = values[2 * i + 1];
    two[i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13) +
             __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 2; ++i) {
    const Vector<C>&a = two[2 * i], &b = two[2 * i + 1];
    four[i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
              __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  const Vector<C> all = __builtin_shufflevector(four[0], four[1], 0, 1, 2, 3, 8, 9, 10, 11) +
                        __builtin_shufflevector(four[0], four[1], 4, 5, 6, 7, 12, 13, 14, 15);
  std::memcpy(sums, &all, sizeof(all));
#else
  for (int i = 0; i < LANES; ++i) {
    const Vector<C>& v = values[i];
    sums[i] = ((v[0] + v[2]) + (v[1] + v[3])) + ((v[4] + v[6]) + (v[5] + v[7]));
  }
#endif
}

// What one place of one channel adds to the sums from which the channel's weight is made: above / below, or for gradcam
// above / places.
template <int method, typename C, typename V>
PF_HD void add_to_weight(const V& activation, const V& gradient, V& above, V& below) {
  if constexpr (method == GRADCAM) {
    above += gradient;
  } else {
    above += gradient * activation;
    below += activation + C(1e-8);
  }
}

// What it adds to the map. `weight` is the channel's, for the methods that have one.
template <int method, typename V, typename W>
PF_HD void add_term(const V& activation, const V& gradient, const W& weight, V& sum) {
  if constexpr (method == LAYERCAM) {
    sum += (gradient < 0 ? V{} : gradient) * activation;
  } else if constexpr (method == HIRESCAM) {
    sum += gradient * activation;
  } else {
    sum += weight * activation;
  }
}

// The weights of `channels` channels, at most LANES, each of which has its places in a row.
template <int method, int channels, typename C, typename T>
PF_HD void weights_of(const T* activation, const T* gradient, int64_t places, C (&weights)[LANES]) {
  Vector<C> above[LANES] = {}, below[LANES] = {};
  C last_above[LANES] = {}, last_below[LANES] = {}, totals[LANES];
  for (int i = 0; i < channels; ++i) {
    Vector<C> above_[2] = {}, below_[2] = {};
    for_values<C>(places, [&](int64_t p, auto type) __attribute__((always_inline)) {
      using Values = typename decltype(type)::type;
      Values a = {}, g;
      if constexpr (method == XGRADCAM) get(activation + i * places + p, a);
      get(gradient + i * places + p, g);
      prefetch(gradient + i * places + p, channels * places);
      if constexpr (std::is_same_v<Values, C[1]>) {
        add_to_weight<method, C>(a[0], g[0], last_above[i], last_below[i]);
      } else {
        for (size_t j = 0; j < std::size(a); ++j) add_to_weight<method, C>(a[j], g[j], above_[j], below_[j]);
      }
    });
    above[i] = above_[0] + above_[1];
    below[i] = below_[0] + below_[1];
  }
  sums_of<C>(above, weights);
  sums_of<C>(below, totals);
  for (int i = 0; i < LANES; ++i) {
    weights[i] =
        (weights[i] + last_above[i]) / (method == GRADCAM ? static_cast<C>(places) : totals[i] + last_below[i]);
  }
}

// Adds `channels` channels of a contiguous image, at most LANES, to the map, which `get` orders.
template <int method, int channels, typename C, typename T>
PF_HD void add_channels(const T* activation, const T* gradient, int64_t places, C* map) {
  C weights[LANES];
  if constexpr (has_weights(method)) weights_of<method, channels>(activation, gradient, places, weights);
  for_values<C>(places, [&](int64_t p, auto type) __attribute__((always_inline)) {
    typename decltype(type)::type sums = {}, a, g = {};
    for (int i = 0; i < channels; ++i) {
      get(activation + i * places + p, a);
      prefetch(activation + i * places + p, channels * places);
      if constexpr (!has_weights(method)) {
        get(gradient + i * places + p, g);
        prefetch(gradient + i * places + p, channels * places);
      }
      for (size_t j = 0; j < std::size(a); ++j) add_term<method>(a[j], g[j], weights[i], sums[j]);
    }
    add(sums, map + p);
  });
}

// Adds `rows` rows of channels to the sums from which the weights are made, which `get` orders.
template <int method, int rows, typename C, typename T>
PF_HD void add_to_weights(const T* activation, const T* gradient, int64_t channels, C* above, C* below) {
  for_values<C>(channels, [&](int64_t k, auto type) __attribute__((always_inline)) {
    typename decltype(type)::type to_above = {}, to_below = {}, a = {}, g;
    for (int i = 0; i < rows; ++i) {
      if constexpr (method == XGRADCAM) {
        get(activation + i * channels + k, a);
        prefetch(activation + i * channels + k, rows * channels);
      }
      get(gradient + i * channels + k, g);
      prefetch(gradient + i * channels + k, rows * channels);
      for (size_t j = 0; j < std::size(g); ++j) add_to_weight<method, C>(a[j], g[j], to_above[j], to_below[j]);
    }
    add(to_above, above + k);
    if constexpr (method == XGRADCAM) add(to_below, below + k);
  });
}

// The map's values of `rows` rows of channels.
template <int method, int rows, typename C, typename T>
PF_HD void map_rows(const T* activation, const T* gradient, int64_t channels, const C* weights, C* map) {
  Vector<C> sums[LANES] = {};
  C last[rows] = {}, totals[LANES];
  for_values<C>(channels, [&](int64_t k, auto type) __attribute__((always_inline)) {
    using Values = typename decltype(type)::type;
    Values w = {}, a, g = {};
    if constexpr (has_weights(method)) get(weights + k, w);
    for (int i = 0; i < rows; ++i) {
      get(activation + i * channels + k, a);
      prefetch(activation + i * channels + k, rows * channels);
      if constexpr (!has_weights(method)) {
        get(gradient + i * channels + k, g);
        prefetch(gradient + i * channels + k, rows * channels);
      }
      if constexpr (std::is_same_v<Values, C[1]>) {
        add_term<method>(a[0], g[0], w[0], last[i]);
      } else {
        for (size_t j = 0; j < std::size(a); ++j) add_term<method>(a[j], g[j], w[j], sums[j * rows + i]);
      }
    }
  });
  for (int i = 0; i < rows; ++i) sums[i] += sums[rows + i];
  sums_of<C>(sums, totals);
  for (int i = 0; i < rows; ++i) map[i] = totals[i] + last[i];
}

// map (places) of one contiguous image, without relu.
template <int method, typename C, typename T>
PF_HD void contiguous_cam(const T* activation, const T* gradient, int64_t channels, int64_t places, C* map) {
  std::fill_n(map, places, C(0));
  int64_t k = 0;
  for (; k + LANES <= channels; k += LANES) {
    add_channels<method, LANES>(activation + k * places, gradient + k * places, places, map);
  }
  for (; k < channels; ++k) add_channels<method, 1>(activation + k * places, gradient + k * places, places, map);
  if constexpr (std::is_same_v<T, BFloat16>) in_order(map, places);
}

// map (places) of one image. weights: scratch for 2 * channels.
template <int method, typename C, typename T>
PF_HD void image_cam(const T* activation, const T* gradient, int64_t channels, int64_t places, bool channels_last,
                     C* weights, C* map) {
  if (!channels_last) {
    // ResNets end in 4x4 on 32x32 images: rows too short for a loop, so they get code of their own.
    if (places == 16) {
      contiguous_cam<method>(activation, gradient, channels, 16, map);
    } else {
      contiguous_cam<method>(activation, gradient, channels, places, map);
    }
  } else {
    int64_t p = 0;
    if constexpr (has_weights(method)) {
      C* below = weights + channels;
      std::fill_n(weights, 2 * channels, C(0));
      for (; p + ROWS <= places; p += ROWS) {
        add_to_weights<method, ROWS>(activation + p * channels, gradient + p * channels, channels, weights, below);
      }
      for (; p < places; ++p) {
        add_to_weights<method, 1>(activation + p * channels, gradient + p * channels, channels, weights, below);
      }
      for (int64_t k = 0; k < channels; ++k) weights[k] /= method == GRADCAM ? static_cast<C>(places) : below[k];
    }
    p = 0;
    for (; p + ROWS <= places; p += ROWS) {
      map_rows<method, ROWS>(activation + p * channels, gradient + p * channels, channels, weights, map + p);
    }
    for (; p < places; ++p) {
      map_rows<method, 1>(activation + p * channels, gradient + p * channels, channels, weights, map + p);
    }
  }
  // relu, NaN kept.
  for (int64_t p = 0; p < places; ++p) map[p] = map[p] < 0 ? C(0) : map[p];
}

template <typename C, typename T>
PF_HD void image_cam(int64_t method, const T* activation, const T* gradient, int64_t channels, int64_t places,
                     bool channels_last, C* weights, C* map) {
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
                      bool channels_last, float* weights, float* map) {
  image_cam(method, activation, gradient, channels, places, channels_last, weights, map);
}

PF_CLONES void map_of(int64_t method, const BFloat16* activation, const BFloat16* gradient, int64_t channels,
                      int64_t places, bool channels_last, float* weights, float* map) {
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
    constexpr bool decode = std::is_same_v<T, Half>;
    const T *activations = data<T>(activation), *gradients = data<T>(gradient);
    C* to = mutable_data<C>(out);
    parallel_for(0, shape.n, VALUES_A_TASK / (values + 1) + 1, [&](int64_t first, int64_t last) {
      std::vector<C> weights(2 * shape.c), buffer(decode ? 2 * values : 0);
      for (int64_t image = first; image < last; ++image) {
        const T *a = activations + image * values, *g = gradients + image * values;
        C* map = to + image * places;
        if constexpr (decode) {
          widen(a, buffer.data(), values);
          widen(g, buffer.data() + values, values);
          map_of(method, buffer.data(), buffer.data() + values, shape.c, places, shape.channels_last, weights.data(),
                 map);
        } else {
          map_of(method, a, g, shape.c, places, shape.channels_last, weights.data(), map);
        }
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(part_fast, CPU, m) { m.impl("_cam", TORCH_BOX(&cam)); }

}  // namespace part_fast
