// The rules of cam_mask, written once for the C++ and the CUDA sources. The same operations in the same order as
// part_fast/ops/cam_mask.py.
#pragma once

#include "upsample_cam.h"

namespace part_fast {

// The raw ops' `rule` argument: the place in RULES of part_fast/ops/cam_mask.py.
enum Rule { ZSCORE = 0, RELEASED = 1, QUANTILE = 2, SOFT = 3 };

// Channels M of the mask.
PF_HD constexpr int channels_of(int64_t rule) { return rule == RELEASED ? 3 : 1; }

// Sums over a map run in float64 over eight interleaved lanes (value p goes to lane p % 8, in turn); then the lanes
// are added in turn. Where this order is kept, no mask differs, however close a pixel lies to its threshold.
constexpr int LANES = 8;

// Whether a map of storage type T says anything: not flat, no NaN, no infinity.
template <typename T>
PF_HD bool has_evidence(compute_t<T> low, compute_t<T> high) {
  // Not high > low: where denormals are flushed to zero, the difference may be none.
  const compute_t<T> spread = high - low;
  return spread > 0 && spread - spread == 0;
}

// matplotlib's jet, linear between (place, value) points of each channel.
constexpr int COLOURS = 256;

constexpr double JET_POINTS[3][6][2] = {
    {{0.0, 0.0}, {0.35, 0.0}, {0.66, 1.0}, {0.89, 1.0}, {1.0, 0.5}, {1.0, 0.5}},
    {{0.0, 0.0}, {0.125, 0.0}, {0.375, 1.0}, {0.64, 1.0}, {0.91, 0.0}, {1.0, 0.0}},
    {{0.0, 0.5}, {0.11, 1.0}, {0.34, 1.0}, {0.65, 0.0}, {1.0, 0.0}, {1.0, 0.0}},
};
constexpr int JET_POINT_COUNT[3] = {5, 6, 5};

struct Jet {
  double value[COLOURS][3];
};

// The 256-entry table in float64; a constant expression, for `constexpr Jet` and `__constant__ Jet` alike.
constexpr Jet make_jet() {
  Jet jet = {};
  for (int entry = 0; entry < COLOURS; ++entry) {
    for (int channel = 0; channel < 3; ++channel) {
      const auto& points = JET_POINTS[channel];
      int i = 0;
      while (i + 2 < JET_POINT_COUNT[channel] && entry >= 255.0 * points[i + 1][0]) ++i;
      const double x0 = points[i][0], y0 = points[i][1], x1 = points[i + 1][0], y1 = points[i + 1][1];
      jet.value[entry][channel] = (entry - 255.0 * x0) / (255.0 * x1 - 255.0 * x0) * (y1 - y0) + y0;
    }
  }
  return jet;
}

// Which of the 256 colours a pixel of the enlarged map u gets: that of u * u.
template <typename C>
PF_HD int colour_of(C u) {
  const C place = (u * u) * C(256);
  return static_cast<int>(place > C(255) ? C(255) : place);
}

// A colour's three values, and their squared deviations, in the order in which they are added.
PF_HD double sum_of(const double (&rgb)[3]) { return (rgb[0] + rgb[1]) + rgb[2]; }

PF_HD double squares_of(const double (&rgb)[3], double mean) {
  const double r = rgb[0] - mean, g = rgb[1] - mean, b = rgb[2] - mean;
  return (r * r + g * g) + b * b;
}

// eps_low + (eps - eps_low) * clamp(u, 0, 1), NaN kept. `spread` is eps - eps_low, subtracted in float64.
template <typename C>
PF_HD C soft_eps(C u, C eps_low, C spread) {
  return eps_low + spread * clip(u, C(0), C(1));
}

}  // namespace part_fast
