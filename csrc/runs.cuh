// The usual call of an op on images: a thread for each run, 16 bytes of every tensor, all of which are asked for before
// the first one is waited for. So a launch takes the time of one access to memory, not of one after the other.
//
// It takes images that end on a whole run and start on 16 bytes, below 2^30 elements, and an eps whose elements lie as
// runs do: see EpsRuns. images.cuh takes everything else.
#pragma once

#include "images.cuh"

namespace part_fast {

// The eps of a run of elements. T is the images' type; eps is of this type or of the one that is computed in.
template <typename T>
struct EpsRuns {
  using C = compute_t<T>;
  static constexpr int N = RUN<T>;
  enum Kind : int32_t {
    NONE,      // not what a run can read: EpsTile does
    CONSTANT,  // `high`
    ALIKE,     // as many elements as the run has, one after the other
    ALIKE_BITS,
    SHARED,  // each is that of `inner` elements of the images, three at least
    SHARED_BITS
  };
  const void* data;
  uint32_t runs;  // of the images
  Kind kind;
  C high, low;
  bool computed;         // of type C, else of T
  int32_t outer;         // ALIKE: as EpsView's
  uint32_t inner, last;  // ALIKE: runs of the last dimension; SHARED: see above, and the last eps there is
  uint32_t sizes[2];     // as EpsView's
  SmallDivisor by_inner, by_sizes[2];
  int64_t strides[3];

  explicit EpsRuns(const EpsView<C>& view, int64_t numel);

  // Of run `run`. Each case asks for all that it reads before it looks at any of it.
  __device__ __forceinline__ void read(uint32_t run, C (&to)[N]) const {
    if (kind == CONSTANT) {
#pragma unroll
      for (int i = 0; i < N; ++i) to[i] = high;
    } else if (kind == ALIKE || kind == ALIKE_BITS) {
      read_alike(offset(run), to);
    } else {
      read_shared(run, to);
    }
  }

 private:
  __device__ __forceinline__ int64_t offset(uint32_t run) const {
    uint32_t row = by_inner.divide(run);
    int64_t result = static_cast<int64_t>(run - row * inner) * N, stride = strides[2];
    if (outer == 0) return result;
    if (outer > 1) {
      uint32_t above = by_sizes[1].divide(row);
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

  __device__ __forceinline__ void read_alike(int64_t from, C (&to)[N]) const {
    if (kind == ALIKE_BITS) {
      // Of one byte, as runs of eight elements at most are.
      const uint32_t bits = static_cast<const uint8_t*>(data)[from >> 3] >> (from & 7);
#pragma unroll
      for (int i = 0; i < N; ++i) to[i] = bits >> i & 1 ? high : low;
    } else if (computed) {
      load_run(static_cast<const C*>(data) + from, to);
    } else {
      T values[N];
      load_run(static_cast<const T*>(data) + from, values);
#pragma unroll
      for (int i = 0; i < N; ++i) to[i] = load(values[i]);
    }
  }

  // A run goes over four at most.
  __device__ __forceinline__ void read_shared(uint32_t run, C (&to)[N]) const {
    constexpr int MOST = N < 4 ? N : 4;
    const uint32_t first = by_inner.divide(run * N), passed = run * N - first * inner;
    C values[MOST];
    const auto read = [&](const auto& stored, const auto& value) {
      int64_t from[MOST];
      decltype(stored(0)) raw[MOST];
#pragma unroll
      for (int j = 0; j < MOST; ++j) {
        from[j] = min(first + j, last) * strides[2];
        raw[j] = stored(from[j]);
      }
#pragma unroll
      for (int j = 0; j < MOST; ++j) values[j] = value(raw[j], from[j]);
    };
    if (kind == SHARED_BITS) {
      read([&](int64_t i) { return static_cast<const uint8_t*>(data)[i >> 3]; },
           [&](uint8_t byte, int64_t i) { return byte >> (i & 7) & 1 ? high : low; });
    } else if (computed) {
      read([&](int64_t i) { return static_cast<const C*>(data)[i]; }, [](C eps, int64_t) { return eps; });
    } else {
      read([&](int64_t i) { return static_cast<const T*>(data)[i]; }, [](T eps, int64_t) { return load(eps); });
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      to[i] = values[0];
#pragma unroll
      for (int j = 1; j < MOST; ++j) to[i] = passed + i >= j * inner ? values[j] : to[i];
    }
  }
};

template <typename T>
EpsRuns<T>::EpsRuns(const EpsView<C>& view, int64_t numel)
    : data(view.data),
      runs(static_cast<uint32_t>(numel / N)),
      kind(NONE),
      high(view.high),
      low(view.low),
      computed(false),
      outer(view.outer),
      inner(0),
      last(0),
      sizes{},
      strides{view.strides[0], view.strides[1], view.strides[2]} {
  // Three times `inner` is less than 2^32.
  if (numel % N != 0 || numel >= int64_t{1} << 30) return;
  if (view.kind == view.CONSTANT) {
    kind = CONSTANT;
    return;
  }
  const bool bits = view.kind == view.BITS;
  constexpr ScalarType own = sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float;
  computed = view.dtype == own;
  if (!bits && !computed && view.dtype != torch::headeronly::CppTypeToScalarType<T>::value) return;
  if (view.inner_stride == 1 && view.inner % N == 0) {
    // Every run starts on as many elements.
    for (int d = 3 - std::min(3, outer); d < 3; ++d) {
      if (strides[d] % N != 0) return;
    }
    if (!bits && !aligned_16(static_cast<const char*>(data))) return;
    kind = bits ? ALIKE_BITS : ALIKE;
    inner = static_cast<uint32_t>(view.inner / N);
    for (int d = 0; d < 2; ++d) {
      sizes[d] = static_cast<uint32_t>(view.sizes[d]);
      by_sizes[d] = SmallDivisor(view.sizes[d]);
    }
  } else if (view.inner_stride == 0 && view.outer <= 1 && view.inner >= 3) {
    kind = bits ? SHARED_BITS : SHARED;
    inner = static_cast<uint32_t>(view.inner);
    last = static_cast<uint32_t>(numel / view.inner - 1);
  } else {
    return;
  }
  by_inner = SmallDivisor(inner);
}

// A thread for each run.
template <typename T>
unsigned run_grid(const EpsRuns<T>& eps) {
  return (eps.runs + IMAGES_BLOCK - 1) / IMAGES_BLOCK;
}

__device__ __forceinline__ uint32_t this_run() { return blockIdx.x * IMAGES_BLOCK + threadIdx.x; }

// A step of this thread's run: each element becomes `stepped(x_adv, sign of grad, x, eps)`. `out` may be x_adv.
template <typename T, typename F>
__device__ __forceinline__ void step_run(const T* x_adv, const T* grad, const T* x, const EpsRuns<T>& eps, T* out,
                                         const F& stepped) {
  using C = compute_t<T>;
  constexpr int N = RUN<T>;
  const uint32_t run = this_run();
  if (run >= eps.runs) return;
  const int64_t at = static_cast<int64_t>(run) * N;
  T from[N], grads[N], centre[N];
  load_run(x_adv + at, from);
  load_run(grad + at, grads);
  load_run(x + at, centre);
  C bound[N];
  eps.read(run, bound);
#pragma unroll
  for (int i = 0; i < N; ++i) from[i] = stepped(from[i], sign<C>(grads[i]), centre[i], bound[i]);
  store_run(out + at, from);
}

}  // namespace part_fast
