// CUDA ops on images: flat tiles, a warp each, every access to an image 16 bytes a lane and consecutive in the warp.
//
// Images of one call share a dense memory format, so one flat index serves contiguous and channels_last. A lane owns
// EACH elements of a tile, in runs of as many as fill 16 bytes of the images' type T. Tiles that are not whole, and
// images that do not start on 16 bytes, go element by element.
#pragma once

#include <algorithm>

#include "launch.cuh"

namespace part_fast {

constexpr int EACH = 8;  // elements per lane and tile: 16 bytes of the narrowest type
constexpr int TILE = 32 * EACH;
constexpr int IMAGES_BLOCK = 128;
// Blocks that an SM must hold: 1536 threads, three quarters of what the largest one can.
constexpr int IMAGES_BLOCKS = 12;

// Elements of T in 16 bytes.
template <typename T>
constexpr int RUN = 16 / sizeof(T);

// For gradient kernels; in float64, of twice the registers, half of what the largest one can.
template <typename T>
constexpr int IMAGES_BWD_BLOCKS = sizeof(T) == 8 ? 8 : IMAGES_BLOCKS;

inline unsigned tile_grid(int64_t numel) {
  constexpr int64_t block = IMAGES_BLOCK / 32 * TILE;
  return static_cast<unsigned>((numel + block - 1) / block);
}

// First element of this warp's tile.
__device__ __forceinline__ int64_t this_tile() {
  return (static_cast<int64_t>(blockIdx.x) * (IMAGES_BLOCK / 32) + threadIdx.x / 32) * TILE;
}

// First element of run `run` of this lane in a tile.
template <typename T>
__device__ __forceinline__ int64_t this_run(int64_t tile, int run) {
  return tile + (run * 32 + static_cast<int>(threadIdx.x % 32)) * RUN<T>;
}

// Signs of a lane's elements: bit i is set where element i is positive, bit EACH + i where it is negative.
using Signs = uint32_t;

template <typename C>
__device__ __forceinline__ Signs signs_at(C value, int i) {
  return (value > 0 ? 1u << i : 0u) | (value < 0 ? 1u << (EACH + i) : 0u);
}

template <typename C>
__device__ __forceinline__ C sign_at(Signs signs, int i) {
  return static_cast<C>((signs >> i) & 1) - static_cast<C>((signs >> (EACH + i)) & 1);
}

// Signs of a whole tile of gradients, for runs of RUN_T elements. Read in runs of RUN<G>, 16 bytes, and handed to the
// lanes that own the elements.
template <typename G, int RUN_T>
__device__ __forceinline__ Signs signs_of(const G* grad, int64_t tile) {
  constexpr int RUN_G = RUN<G>;
  G values[EACH / RUN_G][RUN_G];
#pragma unroll
  for (int run = 0; run < EACH / RUN_G; ++run) load_run(grad + this_run<G>(tile, run), values[run]);
  Signs read = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    read |= signs_at(load(values[i / RUN_G][i % RUN_G]), i);
  }
  if constexpr (RUN_G == RUN_T) {
    return read;
  } else {
    constexpr int PART = RUN_G < RUN_T ? RUN_G : RUN_T;  // what lies in one lane on both sides
    constexpr Signs MASK = ((1u << PART) - 1) | ((1u << PART) - 1) << EACH;
    Signs mine = 0;
#pragma unroll
    for (int i = 0; i < EACH; i += PART) {
      const int element = (i / RUN_T * 32 + static_cast<int>(threadIdx.x % 32)) * RUN_T + i % RUN_T;
      const int place = element / (32 * RUN_G) * RUN_G + element % RUN_G;
      const Signs theirs = __shfl_sync(0xffffffffu, read, element / RUN_G % 32);
      mine |= ((theirs >> place) & MASK) << i;
    }
    return mine;
  }
}

template <int RUN_T>
__device__ __forceinline__ Signs signs_of(const void* grad, ScalarType dtype, int64_t tile) {
  return on_dtype(dtype, [&](auto type) {
    return signs_of<typename decltype(type)::type, RUN_T>(static_cast<const typename decltype(type)::type*>(grad),
                                                          tile);
  });
}

template <typename C>
__device__ __forceinline__ C sign_of(const void* grad, ScalarType dtype, int64_t element) {
  return on_dtype(dtype,
                  [&](auto type) { return sign<C>(static_cast<const typename decltype(type)::type*>(grad)[element]); });
}

// An eps argument as elements at strides, in the memory order of the images. Dimensions that lie one after the other
// are merged; those left are the last ones.
template <typename C>
struct EpsView {
  enum Kind : int32_t {
    CONSTANT,  // `high`
    SINGLE,    // one element for all
    ELEMENTS,  // of type `dtype`
    BITS       // `high` where set, else `low`
  };
  const void* data;
  int64_t inner, inner_stride;   // the last dimension
  int64_t sizes[2], strides[3];  // of the dimensions before it; the first one's size is not needed
  Divisor by_inner, by_sizes[2];
  C high, low;
  Kind kind;
  ScalarType dtype;
  int32_t outer;  // dimensions before the last one

  // Where element `flat` of the images finds its eps.
  __device__ __forceinline__ int64_t offset(int64_t flat) const {
    if (outer == 0) return flat * inner_stride;
    int64_t row = by_inner.divide(flat);
    int64_t result = (flat - row * inner) * inner_stride, stride = strides[2];
    if (outer > 1) {
      int64_t above = by_sizes[1].divide(row);
      result += (row - above * sizes[1]) * stride;
      row = above;
      stride = strides[1];
      if (outer > 2) {
        above = by_sizes[0].divide(row);
        result += (row - above * sizes[0]) * stride;
        row = above;
        stride = strides[0];
      }
    }
    return result + row * stride;
  }
};

// eps of a warp's tile, to be read in runs of N. What differs between elements is read in the order in which the lanes
// lie, then taken from shared memory in runs: every form is read once and in whole sectors, whatever the size of its
// elements.
template <typename C, int N>
class EpsTile {
 public:
  // To be called by the whole warp. `count`: elements of the tile, at most TILE.
  __device__ __forceinline__ EpsTile(const EpsView<C>& eps, int64_t tile, int count) : same_(eps.high) {
    __shared__ alignas(16) C room[IMAGES_BLOCK / 32][place(TILE - 1) + 1];
    shared_ = eps.kind == eps.CONSTANT || eps.kind == eps.SINGLE ? nullptr : room[threadIdx.x / 32];
    if (eps.kind == eps.CONSTANT) return;
    if (eps.kind == eps.SINGLE) {
      on_dtype(eps.dtype, [&](auto type) {
        same_ = static_cast<C>(load(*static_cast<const typename decltype(type)::type*>(eps.data)));
      });
      return;
    }
    constexpr int AT_ONCE = 4;
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int first = lane; first < count; first += 32 * AT_ONCE) {
      int64_t from[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) from[i] = eps.offset(tile + min(first + 32 * i, count - 1));
      C values[AT_ONCE];
      if (eps.kind == eps.BITS) {
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
          values[i] = bit_of(static_cast<const uint8_t*>(eps.data), from[i]) ? eps.high : eps.low;
        }
      } else {
        on_dtype(eps.dtype, [&](auto type) {
          using E = typename decltype(type)::type;
#pragma unroll
          for (int i = 0; i < AT_ONCE; ++i) values[i] = static_cast<C>(load(static_cast<const E*>(eps.data)[from[i]]));
        });
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        if (first + 32 * i < count) shared_[place(first + 32 * i)] = values[i];
      }
    }
    __syncwarp();
  }

  // Of element `i` of the tile.
  __device__ __forceinline__ C operator[](int i) const { return shared_ == nullptr ? same_ : shared_[place(i)]; }

  // Of this lane's run number `run`.
  __device__ __forceinline__ void read(int run, C (&to)[N]) const {
    const int first = (run * 32 + static_cast<int>(threadIdx.x % 32)) * N;
#pragma unroll
    for (int i = 0; i < N; i += WORD) {
      C values[WORD];
      if (shared_ != nullptr) load_run(shared_ + place(first + i), values);
#pragma unroll
      for (int j = 0; j < WORD; ++j) to[i + j] = shared_ != nullptr ? values[j] : same_;
    }
  }

 private:
  static constexpr int WORD = 16 / sizeof(C);

  // Where element `i` lies. A run of two 16-byte words is parted: in both orders the lanes meet all banks.
  __host__ __device__ static constexpr int place(int i) {
    return N == WORD ? i : i % N / WORD * (TILE / 2 + 16) + i / N * WORD + i % WORD;
  }

  C same_;
  C* shared_;
};

// A warp's tile: prepare(tile, whole) first, by the whole warp, then either of_run(its result, run, at, eps) for each
// run of this lane, elements from `at` on, or of_one(its result, i, at, eps) for single elements, the i-th of the tile.
template <typename T, typename Prepare, typename OfRun, typename OfOne>
__device__ __forceinline__ void over_tile(int64_t numel, const EpsView<compute_t<T>>& eps, bool aligned,
                                          const Prepare& prepare, const OfRun& of_run, const OfOne& of_one) {
  using C = compute_t<T>;
  constexpr int N = RUN<T>;
  const int64_t tile = this_tile();
  const int count = static_cast<int>(min(int64_t{TILE}, numel - tile));
  if (count <= 0) return;
  const bool whole = aligned && count == TILE;
  const EpsTile<C, N> bound(eps, tile, count);
  const auto prepared = prepare(tile, count, whole);
  if (whole) {
#pragma unroll
    for (int run = 0; run < EACH / N; ++run) {
      C of_eps[N];
      bound.read(run, of_eps);
      of_run(prepared, run, this_run<T>(tile, run), of_eps);
    }
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < count; i += 32) of_one(prepared, i, tile + i, bound[i]);
}

// For those that have nothing to prepare.
struct Nothing {
  __device__ __forceinline__ Nothing operator()(int64_t, int, bool) const { return {}; }
};

template <typename C>
EpsView<C> view_eps(const Images& images, const Eps& eps) {
  EpsView<C> view = {};
  view.data = eps.data;
  view.dtype = eps.dtype;
  view.high = eps.form == Eps::SCALAR ? static_cast<C>(eps.value) : static_cast<C>(eps.set);
  view.low = static_cast<C>(eps.unset);
  view.kind = EpsView<C>::CONSTANT;
  if (eps.form == Eps::SCALAR) return view;

  std::array<int64_t, 4> sizes = {images.n, images.c, images.h, images.w}, strides = eps.strides;
  if (eps.form == Eps::BITS) {
    // In bits. A mask starts on a byte of its own.
    const int64_t mask = 8 * eps.mask_bytes;
    strides = {eps.channels * mask, eps.channels == 1 ? 0 : mask, images.w, 1};
  }
  if (images.channels_last) {
    sizes = {sizes[0], sizes[2], sizes[3], sizes[1]};
    strides = {strides[0], strides[2], strides[3], strides[1]};
  }
  std::array<int64_t, 4> merged_sizes = {1, 1, 1, 1}, merged_strides = {};
  int last = 4;  // the first merged dimension
  for (int d = 3; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (last < 4 && strides[d] == merged_strides[last] * merged_sizes[last]) {
      merged_sizes[last] *= sizes[d];
    } else {
      --last;
      merged_sizes[last] = sizes[d];
      merged_strides[last] = strides[d];
    }
  }
  view.outer = std::max(0, 3 - last);
  view.inner = merged_sizes[3];
  view.inner_stride = merged_strides[3];
  view.by_inner = Divisor(view.inner);
  for (int d = 0; d < 3; ++d) view.strides[d] = merged_strides[d];
  for (int d = 0; d < 2; ++d) {
    view.sizes[d] = merged_sizes[d + 1];
    view.by_sizes[d] = Divisor(view.sizes[d]);
  }
  view.kind = eps.form == Eps::BITS ? EpsView<C>::BITS : EpsView<C>::ELEMENTS;
  if (view.outer == 0 && view.inner_stride == 0 && view.kind != EpsView<C>::BITS) view.kind = EpsView<C>::SINGLE;
  return view;
}

// The gradients of a projection for x_adv, x and eps; the last is empty where eps has no derivative.
struct Gradients {
  Tensor x_adv, x, eps;

  Gradients(const Tensor& grad_out, const std::optional<Tensor>& eps)
      : x_adv(empty_like(grad_out, grad_out.scalar_type())),
        x(empty_like(grad_out, grad_out.scalar_type())),
        eps(eps && eps->scalar_type() != ScalarType::Byte ? empty_like(grad_out, eps->scalar_type())
                                                          : empty(grad_out, {0}, grad_out.scalar_type())) {}
};

// Where a kernel writes them. T is the images' type.
template <typename T>
struct GradientsView {
  using C = compute_t<T>;
  T *x_adv, *x;
  void* eps;  // null: not asked for
  ScalarType eps_dtype;

  explicit GradientsView(const Gradients& to)
      : x_adv(mutable_data<T>(to.x_adv)),
        x(mutable_data<T>(to.x)),
        eps(to.eps.numel() == 0 ? nullptr : to.eps.data_ptr()),
        eps_dtype(to.eps.scalar_type()) {}

  // N elements from `at` on, given what reaches the projection and on which sides of the ball they lie.
  template <int N>
  __device__ __forceinline__ void write_run(int64_t at, const T (&grad_out)[N], Signs sides) const {
    T values[N];
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = store<T>(grad_x_adv(load(grad_out[i]), sign_at<C>(sides, i)));
    store_run(x_adv + at, values);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = store<T>(grad_x(load(grad_out[i]), sign_at<C>(sides, i)));
    store_run(x + at, values);
    if (eps == nullptr) return;
    on_dtype(eps_dtype, [&](auto type) {
      using E = typename decltype(type)::type;
      E eps_values[N];
#pragma unroll
      for (int i = 0; i < N; ++i) eps_values[i] = store<E>(grad_eps(load(grad_out[i]), sign_at<C>(sides, i)));
      store_run(static_cast<E*>(eps) + at, eps_values);
    });
  }

  __device__ __forceinline__ void write_one(int64_t at, C grad_out, C side) const {
    x_adv[at] = store<T>(grad_x_adv(grad_out, side));
    x[at] = store<T>(grad_x(grad_out, side));
    if (eps == nullptr) return;
    on_dtype(eps_dtype, [&](auto type) {
      using E = typename decltype(type)::type;
      static_cast<E*>(eps)[at] = store<E>(grad_eps(grad_out, side));
    });
  }
};

}  // namespace part_fast
