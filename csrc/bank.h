// CPU ops on a bank of perturbations: which stored values the elements of a chunk of images belong to.
#pragma once

#include "images.h"

namespace part_fast {

// A bank, int8 (S,C,H,W), and a row (sample, dy, dx, flip) for each image: see part_fast/ops/bank_start.py.
class BankRows {
 public:
  BankRows(const Images& images, const Tensor& bank, const Tensor& places)
      : images_(images), samples_(bank.size(0)), places_(data<int64_t>(places)) {}

  // For the elements [at, at + count) of the images, row by row: inside(begin, step, count, from, along) for those that
  // have a stored value, elements begin, begin + step, ... of the chunk and values from, from + along, ... of the bank;
  // unknown(begin, count) for those of an image whose sample is not in the bank.
  template <typename Inside, typename Unknown>
  void for_each_run(int64_t at, int64_t count, const Inside& inside, const Unknown& unknown) const {
    const int64_t channels = images_.c, height = images_.h, width = images_.w;
    // A row of memory has one channel, or in channels_last all of them side by side.
    const int64_t together = images_.channels_last ? channels : 1, planes = images_.channels_last ? 1 : channels;
    const int64_t length = width * together;
    int64_t number = at / length, column = at % length;
    for (int64_t begin = 0; begin < count; ++number, column = 0) {
      const int64_t left = std::min(length - column, count - begin);
      const int64_t row = number % height, plane = number / height % planes;
      const int64_t* place = places_ + 4 * (number / height / planes);
      const int64_t sample = place[0];
      if (sample < 0 || sample >= samples_) {
        unknown(begin, left);
      } else {
        const bool flip = place[3] != 0;
        const int64_t dx = std::clamp(place[2], -width, width);
        const int64_t stored_row = row + std::clamp(place[1], -height, height);
        // Columns that have a stored one.
        const int64_t low = std::max<int64_t>(0, flip ? dx : -dx),
                      high = std::min(width, flip ? width + dx : width - dx);
        for (int64_t c = 0; stored_row >= 0 && stored_row < height && c < together; ++c) {
          // The first and last column whose element of this channel lies in [column, column + left).
          const int64_t first = std::max(low, (column - c + together - 1) / together);
          const int64_t end = std::min(high, (column + left - c + together - 1) / together);
          if (first >= end) continue;
          const int64_t from = (sample * channels + plane + c) * height * width + stored_row * width +
                               (flip ? width - 1 - first : first) + dx;
          inside(begin + first * together + c - column, together, end - first, from, flip ? -1 : 1);
        }
      }
      begin += left;
    }
  }

 private:
  Images images_;
  int64_t samples_;
  const int64_t* places_;
};

}  // namespace part_fast
