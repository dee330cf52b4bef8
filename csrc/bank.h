// CPU ops on a bank of perturbations: which stored values the elements of a chunk of images belong to.
#pragma once

#include <limits>

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
    const int64_t together = images_.channels_last ? channels : 1, planes = channels / together;
    const int64_t length = width * together;
    int64_t begin = 0, column = at % length, row = at / length % height, plane = at / length / height % planes;
    for (const int64_t* place = places_ + 4 * (at / length / height / planes); begin < count; place += 4, plane = 0) {
      const int64_t sample = place[0], dx = std::clamp(place[2], -width, width);
      const int64_t dy = std::clamp(place[1], -height, height);
      const bool known = sample >= 0 && sample < samples_, flip = place[3] != 0;
      // Columns that have a stored one.
      const int64_t low = std::max<int64_t>(0, flip ? dx : -dx), high = std::min(width, flip ? width + dx : width - dx);
      for (; plane < planes && begin < count; ++plane, row = 0) {
        for (; row < height && begin < count; ++row, column = 0) {
          const int64_t here = begin, left = std::min(length - column, count - begin), stored_row = row + dy;
          begin += left;
          if (!known) unknown(here, left);
          if (!known || stored_row < 0 || stored_row >= height) continue;
          const int64_t line = (sample * channels + plane) * height * width + stored_row * width + dx;
          for (int64_t c = 0; c < together; ++c) {
            // The first and last column whose element of this channel lies in [column, column + left).
            int64_t first = column, end = column + left;
            if (together > 1) {
              first = (first - c + together - 1) / together;
              end = (end - c + together - 1) / together;
            }
            first = std::max(low, first);
            end = std::min(high, end);
            if (first >= end) continue;
            inside(here + first * together + c - column, together, end - first,
                   line + c * height * width + (flip ? width - 1 - first : first), flip ? -1 : 1);
          }
        }
      }
    }
  }

 private:
  Images images_;
  int64_t samples_;
  const int64_t* places_;
};

// `count` bytes in reverse order. Eight at once, also by instruction sets that have no shuffles.
inline void reversed(const int8_t* from, int8_t* to, int64_t count) {
  const auto eight = [](const int8_t* source, int8_t* target) {
    uint64_t bytes;
    std::memcpy(&bytes, source, sizeof(bytes));
    bytes = __builtin_bswap64(bytes);
    std::memcpy(target, &bytes, sizeof(bytes));
  };
  if (count < 8) {
    std::reverse_copy(from, from + count, to);
    return;
  }
  for (int64_t i = 0; i + 8 <= count; i += 8) eight(from + count - 8 - i, to + i);
  eight(from, to + count - 8);
}

}  // namespace part_fast
