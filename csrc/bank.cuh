// CUDA ops on a bank of perturbations: which stored value an element of the images belongs to.
#pragma once

#include "images.cuh"

namespace part_fast {

// A bank, int8 (S,C,H,W), and a row (sample, dy, dx, flip) for each image: see part_fast/ops/bank_start.py.
struct BankView {
  static constexpr int64_t OUTSIDE = -1, UNKNOWN = -2;
  int8_t* values;
  const int64_t* places;
  int64_t samples, channels, height, width;
  Divisor by_channels, by_height, by_width;
  bool channels_last;

  BankView(const Images& images, const Tensor& bank, const Tensor& places)
      : values(mutable_data<int8_t>(bank)),
        places(data<int64_t>(places)),
        samples(bank.size(0)),
        channels(images.c),
        height(images.h),
        width(images.w),
        by_channels(images.c),
        by_height(images.h),
        by_width(images.w),
        channels_last(images.channels_last) {}

  // Where in the bank element `element` of the images lies; OUTSIDE of the stored image, or of an UNKNOWN sample.
  __device__ __forceinline__ int64_t place_of(int64_t element) const {
    int64_t channel = 0, pixel = element;
    if (channels_last) {
      pixel = by_channels.divide(element);
      channel = element - pixel * channels;
    }
    const int64_t above = by_width.divide(pixel);
    int64_t column = pixel - above * width;
    int64_t image = by_height.divide(above);
    int64_t row = above - image * height;
    if (!channels_last) {
      const int64_t plane = image;
      image = by_channels.divide(plane);
      channel = plane - image * channels;
    }
    const int64_t* place = places + 4 * image;
    const int64_t sample = place[0];
    if (sample < 0 || sample >= samples) return UNKNOWN;
    // Further than the whole image is outside, whatever it is.
    row += max(-height, min(height, place[1]));
    column = (place[3] != 0 ? width - 1 - column : column) + max(-width, min(width, place[2]));
    if (row < 0 || row >= height || column < 0 || column >= width) return OUTSIDE;
    return ((sample * channels + channel) * height + row) * width + column;
  }
};

// Levels of a warp's tile. They are read in the order in which the lanes lie, so that neighbours in a row share
// sectors, then taken from shared memory in runs of N.
template <typename C, int N>
class LevelsTile {
 public:
  // To be called by the whole warp. `count`: elements of the tile, at most TILE.
  __device__ __forceinline__ LevelsTile(const BankView& bank, int64_t tile, int count) {
    __shared__ alignas(16) int16_t room[IMAGES_BLOCK / 32][TILE];
    shared_ = room[threadIdx.x / 32];
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < count; i += 32) {
      const int64_t place = bank.place_of(tile + i);
      int16_t level = place == BankView::UNKNOWN ? NOT_A_LEVEL : 0;
      if (place >= 0) level = bank.values[place];
      shared_[i] = level;
    }
    __syncwarp();
  }

  // Of element `i` of the tile; NaN where the sample is unknown.
  __device__ __forceinline__ C operator[](int i) const { return of(shared_[i]); }

  // Of this lane's run number `run`.
  __device__ __forceinline__ void read(int run, C (&to)[N]) const {
    int16_t levels[N];
    load_run(shared_ + (run * 32 + static_cast<int>(threadIdx.x % 32)) * N, levels);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = of(levels[i]);
  }

 private:
  static constexpr int16_t NOT_A_LEVEL = 1 << 8;

  __device__ __forceinline__ static C of(int16_t level) {
    return level == NOT_A_LEVEL ? static_cast<C>(nanf("")) : static_cast<C>(level);
  }

  int16_t* shared_;
};

}  // namespace part_fast
