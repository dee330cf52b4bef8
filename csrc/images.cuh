// CUDA ops on images: flat tiles, a warp each, every access to an image 16 bytes a lane and consecutive in the warp.
//
// Images of one call share a dense memory format, so one flat index serves contiguous and channels_last. A lane owns
// EACH elements of a tile, in runs of as many as fill 16 bytes of the images' type T; eps is read for the same runs
// in whatever form it has. Tiles that are not whole, and images that do not start on 16 bytes, go element by element.
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

// The widest access for `size` bytes.
template <int size>
using word_t = std::conditional_t<size % 16 == 0, uint4,
                                  std::conditional_t<size == 8, uint2, std::conditional_t<size == 4, uint32_t, uint16_t>>>;

// N elements at a multiple of their size (of 16 bytes if they are larger), in as few accesses as can be.
template <typename T, int N>
__device__ __forceinline__ void load_run(const T* from, T (&to)[N]) {
  constexpr int size = sizeof(T) * N;
  using Word = word_t<size>;
#pragma unroll
  for (int i = 0; i < size / static_cast<int>(sizeof(Word)); ++i) {
    const Word word = reinterpret_cast<const Word*>(from)[i];
    memcpy(reinterpret_cast<char*>(to) + i * sizeof(Word), &word, sizeof(Word));
  }
}

template <typename T, int N>
__device__ __forceinline__ void store_run(T* to, const T (&from)[N]) {
  constexpr int size = sizeof(T) * N;
  using Word = word_t<size>;
#pragma unroll
  for (int i = 0; i < size / static_cast<int>(sizeof(Word)); ++i) {
    Word word;
    memcpy(&word, reinterpret_cast<const char*>(from) + i * sizeof(Word), sizeof(Word));
    reinterpret_cast<Word*>(to)[i] = word;
  }
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

// f(Type<T>{}) with the floating type that `dtype` names, on the device.
template <typename F>
__device__ __forceinline__ auto on_dtype(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) return f(Type<float>{});
  if (dtype == ScalarType::BFloat16) return f(Type<BFloat16>{});
  if (dtype == ScalarType::Half) return f(Type<Half>{});
  return f(Type<double>{});
}

template <int RUN_T>
__device__ __forceinline__ Signs signs_of(const void* grad, ScalarType dtype, int64_t tile) {
  return on_dtype(dtype, [&](auto type) {
    return signs_of<typename decltype(type)::type, RUN_T>(static_cast<const typename decltype(type)::type*>(grad), tile);
  });
}

template <typename C>
__device__ __forceinline__ C sign_of(const void* grad, ScalarType dtype, int64_t element) {
  return on_dtype(dtype, [&](auto type) {
    return sign<C>(static_cast<const typename decltype(type)::type*>(grad)[element]);
  });
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
  // What a run of RUN<T> elements of the images reads.
  enum Runs : int32_t { SAME, CONSECUTIVE, ANY };
  const void* data;
  int64_t inner, inner_stride;   // the last dimension
  int64_t sizes[2], strides[3];  // of the dimensions before it; the first one's size is not needed
  Divisor by_inner, by_sizes[2];
  C high, low;
  Kind kind;
  Runs runs;
  ScalarType dtype;
  int32_t outer;  // dimensions before the last one

  // Where element `flat` of the images finds its eps; `column` is its place in the last dimension.
  __device__ __forceinline__ int64_t offset(int64_t flat, int64_t& column) const {
    column = flat;
    int64_t result = 0;
    if (outer > 0) {
      int64_t row = by_inner.divide(flat);
      column = flat - row * inner;
      int64_t stride = strides[2];
      if (outer > 1) {
        int64_t above = by_sizes[1].divide(row);
        result = (row - above * sizes[1]) * stride;
        row = above;
        stride = strides[1];
        if (outer > 2) {
          above = by_sizes[0].divide(row);
          result += (row - above * sizes[0]) * stride;
          row = above;
          stride = strides[0];
        }
      }
      result += row * stride;
    }
    return result + column * inner_stride;
  }

  __device__ __forceinline__ C at(int64_t index) const {
    if (kind == BITS) return bit_of(static_cast<const uint8_t*>(data), index) ? high : low;
    return on_dtype(dtype, [&](auto type) {
      return static_cast<C>(load(static_cast<const typename decltype(type)::type*>(data)[index]));
    });
  }

  // eps of element `flat`.
  __device__ __forceinline__ C one(int64_t flat) const {
    if (kind == CONSTANT) return high;
    if (kind == SINGLE) return at(0);
    int64_t column;
    return at(offset(flat, column));
  }

  // To be called by the warp, once per tile, before `run`: eps whose rows are cut by runs is read element by element,
  // as the lanes lie, into `shared`, room for a tile.
  __device__ __forceinline__ void stage(int64_t tile, C* shared) const {
    if (runs != ANY) return;
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int i = lane; i < TILE; i += 32) {
      int64_t column;
      shared[i] = at(offset(tile + i, column));
    }
    __syncwarp();
  }

  // eps of this lane's run number `index`, of N elements.
  template <int N>
  __device__ __forceinline__ void run(int64_t tile, int index, const C* shared, C (&to)[N]) const {
    const int first = (index * 32 + static_cast<int>(threadIdx.x % 32)) * N;
    if (runs == ANY) {
      load_run(shared + first, to);
      return;
    }
    if (runs == CONSECUTIVE) {
      int64_t column;
      const int64_t from = offset(tile + first, column);
      if (kind == BITS) {
        const uint32_t bits = static_cast<const uint8_t*>(data)[from >> 3] >> (from & 7);
#pragma unroll
        for (int i = 0; i < N; ++i) to[i] = (bits >> i) & 1 ? high : low;
      } else {
        on_dtype(dtype, [&](auto type) {
          using E = typename decltype(type)::type;
          E values[N];
          load_run(static_cast<const E*>(data) + from, values);
#pragma unroll
          for (int i = 0; i < N; ++i) to[i] = static_cast<C>(load(values[i]));
        });
      }
      return;
    }
    const C value = one(tile + first);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = value;
  }
};

// This warp's shared memory for EpsView::stage.
template <typename C>
__device__ __forceinline__ C* room_for_eps() {
  __shared__ alignas(16) C room[IMAGES_BLOCK / 32][TILE];
  return room[threadIdx.x / 32];
}

// `run` is the images' RUN<T>.
template <typename C>
EpsView<C> view_eps(const Images& images, const Eps& eps, int run) {
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

  const bool whole = view.outer == 0 || view.inner % run == 0;  // no run crosses a row
  const int64_t bytes = view.kind == EpsView<C>::BITS ? 1 : run * element_size(eps.dtype);
  bool aligned = view.kind == EpsView<C>::BITS || reinterpret_cast<uintptr_t>(eps.data) % std::min<int64_t>(bytes, 16) == 0;
  for (const int64_t stride : view.strides) aligned = aligned && stride % run == 0;
  view.runs = EpsView<C>::ANY;
  if (whole && view.inner_stride == 0) view.runs = EpsView<C>::SAME;
  if (whole && view.inner_stride == 1 && aligned) view.runs = EpsView<C>::CONSECUTIVE;
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
