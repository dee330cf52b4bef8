// CPU ops on class activation maps: one map at a time per thread, all in the caches.
#pragma once

#include <vector>

#include "cam_mask.h"
#include "cpu.h"

namespace part_fast {

constexpr int64_t PIXELS_A_TASK = 8192;  // below this, waking another thread costs more than it saves

// The taps of every output position along one axis.
template <typename C>
struct Axis {
  int64_t in, out;
  std::vector<Taps<C>> taps;

  Axis(int64_t size_in, int64_t size_out) : in(size_in), out(size_out) {
    taps.reserve(size_out);
    for (int64_t i = 0; i < size_out; ++i) taps.push_back(keys_taps<C>(i, size_in, size_out));
  }
};

// Enlarges maps (rows.in, columns.in) to (rows.out, columns.out); holds one thread's scratch.
template <typename C>
class Upsampler {
 public:
  const Axis<C>&rows, &columns;
  std::vector<C> map;   // the map read last; normalised once it was enlarged
  C low = 0, high = 0;  // its minimum and maximum, NaN if it holds one

  Upsampler(const Axis<C>& rows, const Axis<C>& columns)
      : rows(rows),
        columns(columns),
        map(rows.in * columns.in),
        tall_(rows.in * columns.in),
        wide_(rows.in * columns.out) {}

  template <typename T>
  void read(const T* cam) {
    widen(cam, map.data(), static_cast<int64_t>(map.size()));
    find_range();
  }

  // Once for each map read.
  void enlarge(C* u);

 private:
  void find_range();

  std::vector<C> tall_, wide_;
};

// Which pixels of an enlarged map (evidence given) a rule keeps; holds one thread's scratch.
template <typename C>
class Rules {
 public:
  Rules(int64_t rule, int64_t k, int64_t pixels) : rule_(rule), k_(k), pixels_(pixels) {
    if (rule == RELEASED) colours_.resize(pixels);
    if (rule == QUANTILE) sorted_.resize(pixels);
  }

  // mask (M, pixels), 0 or 1.
  void operator()(const C* u, uint8_t* mask);

 private:
  int64_t rule_, k_, pixels_;
  std::vector<uint8_t> colours_;
  std::vector<C> sorted_;
};

// per_thread(upsampler, each) on every thread at work; each(body) then runs body(image), for that thread's share of the
// maps cam (N,h,w), with the image's map in the upsampler.
template <typename T, typename F>
void for_each_map(const Tensor& cam, int64_t height, int64_t width, const F& per_thread) {
  using C = compute_t<T>;
  if (cam.size(0) == 0) return;
  const Axis<C> rows(cam.size(1), height);
  const bool square = rows.in == cam.size(2) && height == width;
  const Axis<C> columns = square ? rows : Axis<C>(cam.size(2), width);
  const T* maps = data<T>(cam);
  const int64_t grain = PIXELS_A_TASK / (height * width) + 1;
  parallel_for(0, cam.size(0), grain, [&](int64_t first, int64_t last) {
    Upsampler<C> upsampler(rows, columns);
    per_thread(upsampler, [&](const auto& body) {
      for (int64_t image = first; image < last; ++image) {
        upsampler.read(maps + image * rows.in * columns.in);
        body(image);
      }
    });
  });
}

// body(image, mask) for each map of cam (N,h,w), on all threads; mask (M, H*W), 0 or 1, as cam_mask defines it.
template <typename T, typename F>
void for_each_mask(const Tensor& cam, int64_t height, int64_t width, int64_t rule, int64_t k, const F& body) {
  using C = compute_t<T>;
  const int64_t pixels = height * width;
  for_each_map<T>(cam, height, width, [&](Upsampler<C>& upsampler, const auto& each) {
    Rules<C> rules(rule, k, pixels);
    std::vector<C> u(pixels);
    std::vector<uint8_t> mask(channels_of(rule) * pixels);
    each([&](int64_t image) {
      if (has_evidence<T>(upsampler.low, upsampler.high)) {
        upsampler.enlarge(u.data());
        rules(u.data(), mask.data());
      } else {
        std::fill(mask.begin(), mask.end(), uint8_t{0});
      }
      body(image, mask.data());
    });
  });
}

}  // namespace part_fast
