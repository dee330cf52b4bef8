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
  // In shared memory, offsets: taps of both axes, grad_out times those along rows (w, height), a chunk of grad_out,
  // and grad_out times both (h, w). Rows are padded to an odd number of values, so that columns lie in all banks.
  static constexpr int ROW_TAPS = 256;
  int32_t column_taps, narrow, chunk, small, bytes;
  bool kept;  // false: too large for that, everything is computed from device memory

  UpsampleBwd(const Tensor& grad_out, const Tensor& cam, const Tensor& out)
      : grad_out(data<T>(grad_out)),
        cam(data<T>(cam)),
        out(mutable_data<T>(out)),
        h(static_cast<int32_t>(cam.size(1))),
        w(static_cast<int32_t>(cam.size(2))),
        height(static_cast<int32_t>(grad_out.size(1))),
        width(static_cast<int32_t>(grad_out.size(2))) {
    const auto values = [](int64_t count) { return (count * static_cast<int64_t>(sizeof(C)) + 15) / 16 * 16; };
    const int64_t columns_at = ROW_TAPS + height * static_cast<int64_t>(sizeof(Taps<C>));
    const int64_t narrow_at = columns_at + width * static_cast<int64_t>(sizeof(Taps<C>));
    const int64_t chunk_at = narrow_at + values(int64_t{w} * (height | 1));
    const int64_t small_at = chunk_at + values(int64_t{CHUNK} * (width | 1)), end = small_at + values(int64_t{h} * w);
    kept = end <= Room::LIMIT;
    column_taps = static_cast<int32_t>(columns_at);
    narrow = static_cast<int32_t>(narrow_at);
    chunk = static_cast<int32_t>(chunk_at);
    small = static_cast<int32_t>(small_at);
    bytes = static_cast<int32_t>(kept ? end : ROW_TAPS);
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

// Output positions [first, last) that may take something from `place` of the map.
struct Reach {
  int first, last;

  __device__ __forceinline__ Reach(int place, int64_t in, int64_t out)
      : first(at((2 * place - 3) * out - in, in)),
        last(min(at((2 * place + 5) * out - in, in), static_cast<int>(out))) {}
  __device__ __forceinline__ static int at(int64_t numerator, int64_t in) {
    return numerator <= 0 ? 0 : static_cast<int>((numerator + 2 * in - 1) / (2 * in));
  }
};

template <typename T>
__global__ void __launch_bounds__(BWD_BLOCK, BWD_BLOCKS<compute_t<T>>)
    upsample_cam_bwd_kernel(const __grid_constant__ UpsampleBwd<T> a) {
  using C = compute_t<T>;
  char* const shared = block_room();
  const T* const cam = a.cam + static_cast<int64_t>(blockIdx.x) * a.h * a.w;
  const T* const grad_out = a.grad_out + static_cast<int64_t>(blockIdx.x) * a.height * a.width;
  Taps<C>* const row_taps = reinterpret_cast<Taps<C>*>(shared + a.ROW_TAPS);
  Taps<C>* const column_taps = reinterpret_cast<Taps<C>*>(shared + a.column_taps);
  C* const narrow = reinterpret_cast<C*>(shared + a.narrow);
  C* const chunk = reinterpret_cast<C*>(shared + a.chunk);
  C* const small = reinterpret_cast<C*>(shared + a.small);
  const int places = a.h * a.w, tall = a.height | 1, broad = a.width | 1;

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

  if (a.kept) {
#pragma unroll 1
    for (int i = threadIdx.x; i < a.height + a.width; i += blockDim.x) {
      const bool row = i < a.height;
      const int out = row ? i : i - a.height;
      Taps<C>* const to = row ? row_taps : column_taps;
      to[out] = keys_taps<C, int32_t>(out, row ? a.h : a.w, row ? a.height : a.width);
    }
#pragma unroll 1
    for (int first = 0; first < a.height; first += CHUNK) {
      const int rows = min(CHUNK, a.height - first), warps = static_cast<int>(blockDim.x) / 32,
                lane = static_cast<int>(threadIdx.x) % 32;
      __syncthreads();
      for (int row = static_cast<int>(threadIdx.x) / 32; row < rows; row += warps) {
        const T* const from = grad_out + static_cast<int64_t>(first + row) * a.width;
#pragma unroll 4
        for (int x = lane; x < a.width; x += 32) chunk[row * broad + x] = load(from[x]);
      }
      __syncthreads();
      for (int column = static_cast<int>(threadIdx.x) / 32; column < a.w; column += warps) {
        const Reach reach(column, a.w, a.width);
        C sum = 0;
#pragma unroll 2
        for (int x = reach.first; x < reach.last; ++x) {
          const C weight = weight_of(column_taps[x], column);
          if (lane < rows) sum += chunk[lane * broad + x] * weight;
        }
        if (lane < rows) narrow[column * tall + first + lane] = sum;
      }
    }
    __syncthreads();
  }

  const auto gradient_at = [&](int place) {
    const int i = place / a.w, j = place - i * a.w;
    const Reach down(i, a.h, a.height);
    C sum = 0;
    if (a.kept) {
#pragma unroll 1
      for (int y = down.first; y < down.last; ++y) sum += weight_of(row_taps[y], i) * narrow[j * tall + y];
      return sum;
    }
    const Reach across(j, a.w, a.width);
#pragma unroll 1
    for (int y = down.first; y < down.last; ++y) {
      C row = 0;
#pragma unroll 1
      for (int x = across.first; x < across.last; ++x) {
        row += load(grad_out[static_cast<int64_t>(y) * a.width + x]) *
               weight_of(keys_taps<C, int32_t>(x, a.w, a.width), j);
      }
      sum += weight_of(keys_taps<C, int32_t>(y, a.h, a.height), i) * row;
    }
    return sum;
  };
  // The minimum and the maximum of the map share what reaches them evenly between ties, as torch's amin and amax do.
  C from_low = 0, from_high = 0;
  int at_low = 0, at_high = 0;
#pragma unroll 1
  for (int round = 0; round < 2; ++round) {
#pragma unroll 1
    for (int place = threadIdx.x; place < places; place += blockDim.x) {
      const C gradient = a.kept && round == 1 ? small[place] : gradient_at(place);
      const C value = load(cam[place]), spread = range[1] - range[0];
      if (round == 0) {
        const C scaled = (value - range[0]) / spread;
        if (a.kept) small[place] = gradient;
        from_low += (scaled - 1) * gradient;
        from_high += -scaled * gradient;
        at_low += value == range[0];
        at_high += value == range[1];
      } else {
        const C shared_out = C(value == range[0]) * shares[0] + C(value == range[1]) * shares[1];
        a.out[blockIdx.x * static_cast<int64_t>(places) + place] =
            store<T>(spread == 0 ? C(0) : (gradient + shared_out) / spread);
      }
    }
    if (round == 0) {
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
      launch(upsample_cam_bwd_kernel<T>, static_cast<unsigned>(cam.size(0)), BWD_BLOCK, a.bytes, cam, a);
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
