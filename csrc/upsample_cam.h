// Keys' bicubic interpolation of a min-max normalised map, written once for the C++ and the CUDA sources. The same
// operations in the same order as part_fast/ops/upsample_cam.py: every backend interpolates with the same bits.
#pragma once

#include <cstdint>

#include "arithmetic.h"

namespace part_fast {

// The four source places of one output position and their weights.
template <typename C>
struct Taps {
  int32_t index[4] = {};
  C weight[4] = {};
};

// Keys 1981, eq. 15, a = -0.5, half-pixel centres. A place outside the map weighs 0 (its index is that of the edge)
// and the rest are scaled to sum to 1. `Index` must hold 2 * size_in * size_out.
template <typename C, typename Index = int64_t>
PF_HD Taps<C> keys_taps(Index out, Index size_in, Index size_out) {
  const Index unit = 2 * size_out;
  const Index centre = (2 * out + 1) * size_in - size_out;  // in units of 1 / unit; above -unit
  const Index left = centre < 0 ? -1 : centre / unit;
  const C phase = static_cast<C>(centre - left * unit) / static_cast<C>(unit);
  const C far[2] = {phase + C(1), C(2) - phase};
  const C near[2] = {phase, C(1) - phase};
  C outer[2], inner[2];
  for (int i = 0; i < 2; ++i) {
    outer[i] = ((C(-0.5) * far[i] + C(2.5)) * far[i] - C(4)) * far[i] + C(2);
    inner[i] = (C(1.5) * near[i] - C(2.5)) * near[i] * near[i] + C(1);
  }
  Taps<C> taps = {{}, {outer[0], inner[0], inner[1], outer[1]}};
  for (int i = 0; i < 4; ++i) {
    const Index place = left - 1 + i;
    const bool inside = place >= 0 && place < size_in;
    taps.index[i] = static_cast<int32_t>(inside ? place : (place < 0 ? 0 : size_in - 1));
    taps.weight[i] = inside ? taps.weight[i] : C(0);
  }
  const C total = ((taps.weight[0] + taps.weight[1]) + taps.weight[2]) + taps.weight[3];
  for (int i = 0; i < 4; ++i) taps.weight[i] = taps.weight[i] / total;
  return taps;
}

// Along one axis, columns (of a row) first, rows second.
template <typename C>
PF_HD C interpolate(C v0, C v1, C v2, C v3, C w0, C w1, C w2, C w3) {
  return ((v0 * w0 + v1 * w1) + v2 * w2) + v3 * w3;
}

// To [0,1] by the map's minimum and maximum, NaN if the map holds one; a flat map gives 0.
template <typename C>
PF_HD C normalized(C value, C low, C high) {
  return high == low ? C(0) : (value - low) / (high - low);
}

// Running minimum and maximum that keep NaN.
template <typename C>
PF_HD C lower(C low, C value) {
  return ((value < low) | (value != value)) ? value : low;
}

template <typename C>
PF_HD C higher(C high, C value) {
  return ((value > high) | (value != value)) ? value : high;
}

}  // namespace part_fast
