// upsample_cam on a GPU and its gradient, one launch each. See part_fast/ops/upsample_cam.py.
#include "maps.cuh"

namespace part_fast {
namespace {

template <typename C>
struct Upsample {
  Maps<C> maps;
  void* out;  // of the maps' dtype
};

template <typename C>
__global__ void __launch_bounds__(MAPS_BLOCK, MAPS_BLOCKS<C>)
    upsample_cam_fwd_kernel(const __grid_constant__ Upsample<C> a) {
  const int64_t image = blockIdx.x;
  Enlarged<C> enlarged(a.maps);
  enlarged.each([&](int first, int count, const C(&u)[QUAD]) {
    on_dtype(a.maps.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      T values[QUAD];
#pragma unroll
      for (int i = 0; i < QUAD; ++i) values[i] = store<T>(u[i]);
      write_quad(static_cast<T*>(a.out) + image * a.maps.pixels, first, count, a.maps.pixels % QUAD == 0, values);
    });
  });
}

// The gradient: grad_out (N,H,W) times the taps along rows, then along columns, then through the normalisation.
constexpr int BWD_BLOCK = 256;
template <typename C>
constexpr int BWD_BLOCKS = sizeof(C) == 8 ? 3 : 6;
constexpr int CHUNK = 32;  // rows of grad_out in shared memory at a time: a lane for each

template <typename T>
struct UpsampleBwd {
  using C = compute_t<T>;
  const T *grad_out, *cam;
  T* out;
  int32_t h, w, height, width;
  int32_t parts;  // lanes of a warp that share a place of the map: the more, the narrower it is
  // In shared memory, offsets: the four weights of each output row and column, where the outputs of a place start,
  // grad_out times the weights along rows (w, height), a chunk of grad_out, and grad_out times both (h, w). What a warp
  // reads at once lies in all banks: rows of the chunk have an odd number of values, of what is narrowed `tall`.
  static constexpr int WEIGHTS = 256;
  int32_t starts, narrow, chunk, small, bytes, tall;
  bool kept;  // false: too large for that, everything is computed from device memory

  UpsampleBwd(const Tensor& grad_out, const Tensor& cam, const Tensor& out)
      : grad_out(data<T>(grad_out)),
        cam(data<T>(cam)),
        out(mutable_data<T>(out)),
        h(static_cast<int32_t>(cam.size(1))),
        w(static_cast<int32_t>(cam.size(2))),
        height(static_cast<int32_t>(grad_out.size(1))),
        width(static_cast<int32_t>(grad_out.size(2))),
        parts(1) {
    while (2 * parts * int64_t{w} <= 32) parts *= 2;
    const int64_t apart = (int64_t{height} - parts + 31) / 32 * 32 + parts;
    const auto values = [](int64_t count) { return (count * static_cast<int64_t>(sizeof(C)) + 15) / 16 * 16; };
    const int64_t starts_at = WEIGHTS + values(4 * (int64_t{height} + width));
    const int64_t narrow_at = starts_at + (static_cast<int64_t>(sizeof(int32_t)) * (int64_t{h} + w + 8) + 15) / 16 * 16;
    const int64_t chunk_at = narrow_at + values(w * apart);
    const int64_t small_at = chunk_at + values(int64_t{CHUNK} * (width | 1)), end = small_at + values(int64_t{h} * w);
    kept = end <= Room::LIMIT;
    starts = static_cast<int32_t>(starts_at);
    narrow = static_cast<int32_t>(narrow_at);
    chunk = static_cast<int32_t>(chunk_at);
    small = static_cast<int32_t>(small_at);
    tall = static_cast<int32_t>(apart);
    bytes = static_cast<int32_t>(kept ? end : WEIGHTS);
  }
};

// What an output position takes from `place` of the map, by its taps.
template <typename C>
__device__ __forceinline__ C weight_of(const Taps<C>& taps, int place) {
  C weight = 0;
#pragma unroll
  for (int t = 0; t < 4; ++t) weight = taps.index[t] == place && taps.weight[t] != 0 ? taps.weight[t] : weight;
  return weight;
}

// The first of `out` output positions whose four taps start at `place` of the map or later; a place lies outside where
// taps do. So `place` is tap t of the positions from start_of(place - t) to start_of(place - t + 1).
__device__ __forceinline__ int start_of(int place, int in, int out) {
  if (place < -1) return 0;
  if (place > in - 2) return out;
  const uint32_t unit = 2 * static_cast<uint32_t>(in);
  return static_cast<int>((static_cast<uint32_t>(2 * place + 3) * out + in - 1) / unit);
}

// KEPT: as UpsampleBwd::kept. Two kernels, as each fits into fewer registers than both paths in one.
template <typename T, int KEPT>
__global__ void __launch_bounds__(BWD_BLOCK, BWD_BLOCKS<compute_t<T>>)
    upsample_cam_bwd_kernel(const __grid_constant__ UpsampleBwd<T> a) {
  using C = compute_t<T>;
  char* const shared = block_room();
  const T* const cam = a.cam + static_cast<int64_t>(blockIdx.x) * a.h * a.w;
  const T* const grad_out = a.grad_out + static_cast<int64_t>(blockIdx.x) * a.height * a.width;
  C* const weights = reinterpret_cast<C*>(shared + a.WEIGHTS);
  C* const narrow = reinterpret_cast<C*>(shared + a.narrow);
  C* const chunk = reinterpret_cast<C*>(shared + a.chunk);
  C* const small = reinterpret_cast<C*>(shared + a.small);
  // From three places before the map to the one after it.
  int* const row_starts = reinterpret_cast<int*>(shared + a.starts) + 3;
  int* const column_starts = row_starts + a.h + 4;
  const int places = a.h * a.w, positions = a.height + a.width, broad = a.width | 1;

  C low = load(cam[0]), high = low;
#pragma unroll 1
  for (int i = threadIdx.x; i < places; i += blockDim.x) {
    low = lower(low, load(cam[i]));
    high = higher(high, load(cam[i]));
  }
  C* const room = reinterpret_cast<C*>(shared);
  low = reduce(low, room, [](C x, C y) { return lower(x, y); });
  high = reduce(high, room, [](C x, C y) { return higher(x, y); });
  // In shared memory, not in registers: the map's range and what its minimum and maximum share.
  C* const shares = room + 16;
  C* const range = room + 18;
  if (threadIdx.x == 0) {
    range[0] = low;
    range[1] = high;
  }
  __syncthreads();

  if constexpr (KEPT) {
    const int warps = static_cast<int>(blockDim.x) / 32, warp = static_cast<int>(threadIdx.x) / 32,
              lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
    for (int i = threadIdx.x; i < positions; i += blockDim.x) {
      const bool row = i < a.height;
      const Taps<C> taps = keys_taps<C, int32_t>(row ? i : i - a.height, row ? a.h : a.w, row ? a.height : a.width);
#pragma unroll
      for (int t = 0; t < 4; ++t) weights[t * positions + i] = taps.weight[t];
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < a.h + a.w + 8; i += blockDim.x) {
      const bool row = i < a.h + 4;
      row_starts[i - 3] = start_of((row ? i : i - a.h - 4) - 3, row ? a.h : a.w, row ? a.height : a.width);
    }
#pragma unroll 1
    for (int first = 0; first < a.height; first += CHUNK) {
      const int rows = min(CHUNK, a.height - first);
      __syncthreads();
      for (int row = warp; row < rows; row += warps) {
        const T* const from = grad_out + static_cast<int64_t>(first + row) * a.width;
#pragma unroll 4
        for (int x = lane; x < a.width; x += 32) chunk[row * broad + x] = load(from[x]);
      }
      __syncthreads();
#pragma unroll 1
      for (int column = warp; column < a.w; column += warps) {
        C sum = 0;
#pragma unroll 1
        for (int t = 3; t >= 0; --t) {
          const C* const weight = weights + t * positions + a.height;
          const int end = column_starts[column - t + 1];
#pragma unroll 2
          for (int x = column_starts[column - t]; x < end; ++x) {
            if (lane < rows) sum += chunk[lane * broad + x] * weight[x];
          }
        }
        if (lane < rows) narrow[column * a.tall + first + lane] = sum;
      }
    }
    __syncthreads();
    // A warp for each row of the map.
#pragma unroll 1
    for (int i = warp; i < a.h; i += warps) {
#pragma unroll 1
      for (int from = 0; from < a.w; from += 32 / a.parts) {
        const int j = from + lane / a.parts, part = lane % a.parts;
        C sum = 0;
#pragma unroll 1
        for (int t = 3; t >= 0; --t) {
          const int end = row_starts[i - t + 1];
#pragma unroll 1
          for (int y = row_starts[i - t] + part; y < end; y += a.parts) {
            if (j < a.w) sum += weights[t * positions + y] * narrow[j * a.tall + y];
          }
        }
#pragma unroll 1
        for (int other = a.parts / 2; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
        if (j < a.w && part == 0) small[i * a.w + j] = sum;
      }
    }
    __syncthreads();
  }

  const auto gradient_at = [&](int place) {
    if constexpr (KEPT) {
      return small[place];
    } else {
      const int i = place / a.w, j = place - i * a.w;
      const int bottom = start_of(i + 1, a.h, a.height), right = start_of(j + 1, a.w, a.width);
      C sum = 0;
#pragma unroll 1
      for (int y = start_of(i - 3, a.h, a.height); y < bottom; ++y) {
#pragma unroll 1
        for (int x = start_of(j - 3, a.w, a.width); x < right; ++x) {
          C product = load(grad_out[static_cast<int64_t>(y) * a.width + x]);
          // Both weights by one piece of code: two would hold more registers than there are.
#pragma unroll 1
          for (int axis = 0; axis < 2; ++axis) {
            const bool row = axis == 0;
            const Taps<C> taps = keys_taps<C, int32_t>(row ? y : x, row ? a.h : a.w, row ? a.height : a.width);
            product *= weight_of(taps, row ? i : j);
          }
          sum += product;
        }
      }
      return sum;
    }
  };
  // The minimum and the maximum of the map share what reaches them evenly between ties, as torch's amin and amax do.
  C from_low = 0, from_high = 0;
#pragma unroll 1
  for (int round = 0; round < 2; ++round) {
#pragma unroll 1
    for (int place = threadIdx.x; place < places; place += blockDim.x) {
      const C gradient = gradient_at(place);
      const C value = load(cam[place]), spread = range[1] - range[0];
      if (round == 0) {
        const C scaled = (value - range[0]) / spread;
        from_low += (scaled - 1) * gradient;
        from_high += -scaled * gradient;
      } else {
        const C shared_out = C(value == range[0]) * shares[0] + C(value == range[1]) * shares[1];
        a.out[blockIdx.x * static_cast<int64_t>(places) + place] =
            store<T>(spread == 0 ? C(0) : (gradient + shared_out) / spread);
      }
    }
    if (round == 0) {
      // Counted here, not in the loop above, where registers are few.
      int at_low = 0, at_high = 0;
#pragma unroll 1
      for (int place = threadIdx.x; place < places; place += blockDim.x) {
        const C value = load(cam[place]);
        at_low += value == range[0];
        at_high += value == range[1];
      }
      int* const counts = reinterpret_cast<int*>(room);
      from_low = reduce(from_low, room, Add()) / reduce(at_low, counts, Add());
      from_high = reduce(from_high, room, Add()) / reduce(at_high, counts, Add());
      if (threadIdx.x == 0) {
        shares[0] = from_low;
        shares[1] = from_high;
      }
      __syncthreads();
    }
  }
}

Tensor upsample_cam(const Tensor& cam, int64_t height, int64_t width) {
  const Tensor out = empty(cam, {cam.size(0), height, width}, cam.scalar_type());
  if (out.numel() > 0) {
    on_compute_type(cam, [&](auto type) {
      using C = typename decltype(type)::type;
      const Upsample<C> a = {Maps<C>(cam, height, width), out.data_ptr()};
      launch(upsample_cam_fwd_kernel<C>, a.maps.grid(), a.maps.block(), a.maps.room.bytes, cam, a);
    });
  }
  return out;
}

Tensor upsample_cam_bwd(const Tensor& grad_out, const Tensor& cam) {
  const Tensor out = empty_like(cam, cam.scalar_type());
  if (out.numel() > 0) {
    dispatch(cam.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      const UpsampleBwd<T> a(grad_out, cam, out);
      const auto kernel = a.kept ? upsample_cam_bwd_kernel<T, 1> : upsample_cam_bwd_kernel<T, 0>;
      launch(kernel, static_cast<unsigned>(cam.size(0)), BWD_BLOCK, a.bytes, cam, a);
    });
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(part_fast, CUDA, m) {
  m.impl("_upsample_cam", TORCH_BOX(&upsample_cam));
  m.impl("_upsample_cam_bwd", TORCH_BOX(&upsample_cam_bwd));
}

}  // namespace part_fast
