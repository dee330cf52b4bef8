// CUDA ops on class activation maps: a block for each image keeps what the enlarging of its map needs in shared memory
// and computes any pixel of the enlarged map as often as a rule asks for it. Nothing but the
// result is written to device memory.
#pragma once

#include <algorithm>

#include "cam_mask.h"
#include "launch.cuh"

namespace part_fast {

constexpr int MAPS_BLOCK = 512;  // threads of a block, at most
// Blocks that an SM must hold: 1536 threads, three quarters of what the largest one can; for float64, half.
template <typename C>
constexpr int MAPS_BLOCKS = sizeof(C) == 8 ? 2 : 3;
constexpr int QUAD = 4;  // pixels that a thread takes at a time

// What `value` is where all lanes of the warp were combined.
template <typename V, typename F>
__device__ __forceinline__ V reduce_warp(V value, const F& combine) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  return value;
}

// The values of all threads of the block combined, the same for each thread. `room`: one value per warp.
template <typename V, typename F>
__device__ __forceinline__ V reduce(V value, V* room, const F& combine) {
  value = reduce_warp(value, combine);
  __syncthreads();
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = value;
  __syncthreads();
  value = room[0];
#pragma unroll 1
  for (int i = 1; i < static_cast<int>(blockDim.x) / 32; ++i) value = combine(value, room[i]);
  return value;
}

// The block's dynamic shared memory.
__device__ __forceinline__ char* block_room() {
  extern __shared__ __align__(16) char shared[];
  return shared;
}

struct Add {
  template <typename V>
  __device__ __forceinline__ V operator()(V a, V b) const {
    return a + b;
  }
};

// Shared memory of one image. The fixed part comes first: a histogram, a table, room for reductions, the map's range
// and what a rule found out, which in registers would cost warps.
struct Room {
  static constexpr int HISTOGRAM = 0, TABLE = 1024, REDUCTION = TABLE + 128, RANGE = REDUCTION + 256,
                       STATE = RANGE + 16;
  static constexpr int MAP = STATE + 48;
  static constexpr int TERMS = 256 * 8;  // where the map lies while a band is prepared, a rule adds up colours later
  static constexpr int64_t LIMIT = 96 << 10;  // what every architecture can give a block that asks for it
  int32_t band;  // rows of the enlarged map that are prepared together, all of them where they fit
  int32_t wide, taps, weights, bytes;  // offsets

  Room(int64_t h, int64_t w, int64_t height, int64_t width, int64_t element) {
    const auto round = [](int64_t size) { return (size + 15) / 16 * 16; };
    // A band starts on a whole byte of packed bits.
    int64_t least = 1;
    while (least * width % 8 != 0) least *= 2;
    int64_t rows = height, wide_at, taps_at, weights_at, end;
    for (;; rows = std::max(least, rows / 2 / least * least)) {
      const int64_t sources = std::min(h, (rows - 1) * h / std::max<int64_t>(height, 1) + 5);  // rows of the map in use
      wide_at = MAP + std::max<int64_t>(TERMS, round(sources * w * element));
      taps_at = wide_at + round(sources * width * element);
      weights_at = taps_at + round(rows * 4 * sizeof(int32_t));
      end = weights_at + rows * 4 * element;
      if (end <= LIMIT || rows <= least) break;
    }
    STD_TORCH_CHECK(end <= LIMIT, "size must be small enough for a few rows to fit into a block's shared memory, got ",
                    height, " x ", width);
    band = static_cast<int32_t>(rows);
    wide = static_cast<int32_t>(wide_at);
    taps = static_cast<int32_t>(taps_at);
    weights = static_cast<int32_t>(weights_at);
    bytes = static_cast<int32_t>(end);
  }
};

// Maps cam (N,h,w), to be enlarged to (height, width) in the compute type C.
template <typename C>
struct Maps {
  const void* cam;
  int64_t n;
  int32_t h, w, height, width, pixels;
  SmallDivisor by_width;
  Room room;
  ScalarType dtype;

  Maps(const Tensor& cam, int64_t height, int64_t width)
      : cam(cam.data_ptr()),
        n(cam.size(0)),
        h(static_cast<int32_t>(cam.size(1))),
        w(static_cast<int32_t>(cam.size(2))),
        height(static_cast<int32_t>(height)),
        width(static_cast<int32_t>(width)),
        pixels(static_cast<int32_t>(height * width)),
        by_width(width),
        room(cam.size(1), cam.size(2), height, width, sizeof(C)),
        dtype(cam.scalar_type()) {
    constexpr int64_t limit = int64_t{1} << 30;
    STD_TORCH_CHECK(height * width < limit && height * cam.size(1) < limit && width * cam.size(2) < limit,
                    "size must be below 2^30 pixels, and each side times the map's, got ", height, " x ", width);
  }

  unsigned grid() const { return static_cast<unsigned>(n); }
  // A thread for each quad, so that 16x16 pixels already make blocks of 64 threads, of which an SM's 32 fill it.
  unsigned block() const {
    return static_cast<unsigned>(std::min(MAPS_BLOCK, (pixels + 32 * QUAD - 1) / (32 * QUAD) * 32));
  }
  __device__ __forceinline__ C at(int64_t place) const {
    return on_dtype(dtype, [&](auto type) {
      return static_cast<C>(load(static_cast<const typename decltype(type)::type*>(cam)[place]));
    });
  }
};

// One enlarged map, computed pixel by pixel.
template <typename C>
class Enlarged {
 public:
  // To be called by the whole block.
  __device__ __forceinline__ explicit Enlarged(const Maps<C>& maps)
      : maps_(maps),
        map_(static_cast<int64_t>(blockIdx.x) * maps.h * maps.w),
        once_(maps.room.band == maps.height && maps.pixels <= static_cast<int>(blockDim.x) * QUAD) {
    prepare<true>(0, min(maps.room.band, maps.height));
  }

  // Whether the map says anything; see has_evidence.
  __device__ __forceinline__ bool evidence() const {
    return on_dtype(maps_.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      return has_evidence<T>(static_cast<compute_t<T>>(range()[0]), static_cast<compute_t<T>>(range()[1]));
    });
  }

  // body(first, count, u) for four pixels from `first` on, of which `count` (0 to 4) exist, in order; the whole block
  // comes to each call.
  template <typename F>
  __device__ __forceinline__ void each(const F& body) {
#pragma unroll 1
    for (int row = 0; row < maps_.height; row += maps_.room.band) {
      const int rows = min(maps_.room.band, maps_.height - row);
      if (prepared_ != row) {
        __syncthreads();
        prepare<false>(row, rows);
        // Nothing is kept over this, neither in fact nor in registers.
        unknown_ = true;
#pragma unroll
        for (int i = 0; i < QUAD; ++i) u_[i] = 0;
      }
      prepared_ = row;
#pragma unroll 1
      for (int base = 0; base < rows * maps_.width; base += blockDim.x * QUAD) {
        const int first = base + threadIdx.x * QUAD, count = max(0, min(QUAD, rows * maps_.width - first));
        if (unknown_ && count > 0) quad(first, count, u_);
        unknown_ = !once_;
        body(row * maps_.width + first, count, u_);
      }
    }
  }

 private:
  // Minimum and maximum of the map, NaN if it holds one.
  __device__ __forceinline__ C* range() const { return reinterpret_cast<C*>(block_room() + Room::RANGE); }
  // Four indices and four weights for each row of the band. Indices count from the band's first row of the map.
  __device__ __forceinline__ int* indices() const { return reinterpret_cast<int*>(block_room() + maps_.room.taps); }
  __device__ __forceinline__ C* weights() const { return reinterpret_cast<C*>(block_room() + maps_.room.weights); }
  // The rows of the map that the band needs, normalised; and these rows enlarged.
  __device__ __forceinline__ C* map() const { return reinterpret_cast<C*>(block_room() + Room::MAP); }
  __device__ __forceinline__ C* wide() const { return reinterpret_cast<C*>(block_room() + maps_.room.wide); }

  // FIRST: the band is the first one and the map's range is not known. Nobody reads an earlier band any more. The map
  // is asked for before all that does not need it.
  template <bool FIRST>
  __device__ __forceinline__ void prepare(int row, int rows) const {
    const int start = FIRST ? 0 : keys_taps<C, int32_t>(row, maps_.h, maps_.height).index[0];
    const int places = maps_.h * maps_.w, from = start * maps_.w;
    // This thread's first value, or one that another thread has too.
    C value = maps_.at(map_ + min(from + static_cast<int>(threadIdx.x), places - 1));
    const int step = blockDim.x;
#pragma unroll 1
    for (int y = threadIdx.x; y < rows; y += step) {
      Taps<C> taps = keys_taps<C, int32_t>(row + y, maps_.h, maps_.height);
#pragma unroll
      for (int t = 0; t < 4; ++t) taps.index[t] -= start;
      put_run(indices() + 4 * y, taps.index);
      put_run(weights() + 4 * y, taps.weight);
    }
    // A thread has a column and every so many rows, so that it computes the column's taps once.
    const bool narrow = maps_.width <= step;
    const int lines = narrow ? maps_.by_width.divide(step) : 1, line = narrow ? maps_.by_width.divide(threadIdx.x) : 0;
    int x = threadIdx.x - (narrow ? line * maps_.width : 0);
    Taps<C> columns;
    if (FIRST) columns = keys_taps<C, int32_t>(x, maps_.w, maps_.width);
    C low, high;
    if constexpr (FIRST) {
      find_range(value, low, high);
    } else {
      __syncthreads();
      low = range()[0];
      high = range()[1];
    }
    const int sources = indices()[4 * rows - 1] + 1;
#pragma unroll 1
    for (int i = threadIdx.x; i < sources * maps_.w; i += step) {
      if (i >= step) value = maps_.at(map_ + from + i);
      map()[i] = normalized(value, low, high);
    }
    __syncthreads();
    if (!FIRST) columns = keys_taps<C, int32_t>(x, maps_.w, maps_.width);
    if (line < lines) {
#pragma unroll 1
      while (x < maps_.width) {
#pragma unroll 1
        for (int y = line; y < sources; y += lines) {
          const C* const source = map() + y * maps_.w;
          wide()[y * maps_.width + x] = interpolate(
              source[columns.index[0]], source[columns.index[1]], source[columns.index[2]], source[columns.index[3]],
              columns.weight[0], columns.weight[1], columns.weight[2], columns.weight[3]);
        }
        x += step;
        if (x < maps_.width) columns = keys_taps<C, int32_t>(x, maps_.w, maps_.width);
      }
    }
    __syncthreads();
  }

  // Minimum and maximum of the map, given `value` of it for each thread, also for later; the block's first barrier.
  __device__ __forceinline__ void find_range(C value, C& low, C& high) const {
    const auto lesser = [](C a, C b) { return lower(a, b); };
    const auto greater = [](C a, C b) { return higher(a, b); };
    low = high = value;
#pragma unroll 1
    for (int i = threadIdx.x + blockDim.x; i < maps_.h * maps_.w; i += blockDim.x) {
      const C other = maps_.at(map_ + i);
      low = lower(low, other);
      high = higher(high, other);
    }
    low = reduce_warp(low, lesser);
    high = reduce_warp(high, greater);
    C* const room = reinterpret_cast<C*>(block_room() + Room::REDUCTION);
    if (threadIdx.x % 32 == 0) {
      const C both[2] = {low, high};
      put_run(room + threadIdx.x / 32 * 2, both);
    }
    __syncthreads();
#pragma unroll 4
    for (int i = 0; i < static_cast<int>(blockDim.x) / 32; ++i) {
      low = lower(low, room[2 * i]);
      high = higher(high, room[2 * i + 1]);
    }
    if (threadIdx.x == 0) {
      range()[0] = low;
      range()[1] = high;
    }
  }

  // In the order of `interpolate`. All four rows are asked for at once.
  __device__ __forceinline__ void quad(int first, int count, C (&u)[QUAD]) const {
    int y = maps_.by_width.divide(first), x = first - y * maps_.width;
    if (maps_.width % QUAD == 0) {
      int index[4];
      C weight[4], row[4][QUAD];
      load_run(indices() + 4 * y, index);
#pragma unroll
      for (int t = 0; t < 4; ++t) load_run(wide() + index[t] * maps_.width + x, row[t]);
      load_run(weights() + 4 * y, weight);
#pragma unroll
      for (int i = 0; i < QUAD; ++i) {
        u[i] = interpolate(row[0][i], row[1][i], row[2][i], row[3][i], weight[0], weight[1], weight[2], weight[3]);
      }
      return;
    }
    // Not unrolled, so that little is held in registers. -0 + a is a, whatever a.
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      C value = C(-0.0);
#pragma unroll 1
      for (int t = 4 * y; t < 4 * y + 4; ++t) value = value + wide()[indices()[t] * maps_.width + x] * weights()[t];
      // Not u[i]: an index unknown to the compiler would put the array into local memory.
#pragma unroll
      for (int j = 0; j < QUAD; ++j) u[j] = i == j ? value : u[j];
      if (++x == maps_.width) {
        x = 0;
        ++y;
      }
    }
  }

  const Maps<C>& maps_;
  int64_t map_;  // where it starts
  bool once_;    // each thread has one quad at most, which it keeps
  bool unknown_ = true;
  int prepared_ = 0;  // first row of the band that is
  C u_[QUAD] = {};
};

// Four results from `first` on, of which `count` exist. `aligned`: every quad is whole and starts on its own size.
template <typename E>
__device__ __forceinline__ void write_quad(E* to, int first, int count, bool aligned, const E (&values)[QUAD]) {
  if (count == 0) return;
  if (aligned) {
    store_run(to + first, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < QUAD; ++i) {
    if (i < count) to[first + i] = values[i];
  }
}

}  // namespace part_fast
