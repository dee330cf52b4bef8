// cam on a GPU: class activation maps, one launch, a block per image. See part_fast/ops/cam.py.
//
// An image is a matrix: contiguous, a row for each channel; channels_last, a row for each pixel. One pass makes a
// weight for each channel (gradcam and xgradcam), the next one the weighted sum over channels; gradcam reads gradients
// in the first and activations in the second, layercam and hirescam need the second alone: each input is read once.
// xgradcam needs activations in both and so reads them twice, the second time from the caches.
#include <algorithm>

#include "launch.cuh"

namespace part_fast {
namespace {

constexpr int CAM_BLOCK = 512;
constexpr int CAM_BLOCKS = 3;
constexpr int CHANNELS = 4096;  // whose weights are in shared memory at a time

// The raw op's `method` argument: the place in METHODS of part_fast/ops/cam.py.
enum Method { GRADCAM = 0, XGRADCAM = 1, LAYERCAM = 2, HIRESCAM = 3 };

template <typename T>
struct Cam {
  const T *activation, *gradient;
  compute_t<T>* out;
  int32_t channels, pixels, method;
  bool channels_last, aligned;
};

template <typename C>
struct Pair {
  C first = 0, second = 0;
};

// One matrix of one image, in runs of N elements.
template <typename T, int N>
class Matrix {
 public:
  using C = compute_t<T>;

  __device__ __forceinline__ Matrix(const T* activation, const T* gradient, int rows, int columns, int stride)
      : activation_(activation), gradient_(gradient), rows_(rows), runs_(columns / N), stride_(stride) {}

  // finish(row, sums over the row of what `terms` adds), once for each row. weigh(row, run, weights) fills the
  // run's weights, terms(a, g, weight, sums) adds an element. LONG: whether rows are long and few rather than short and
  // many; a thread asks for several runs of one row at a time, or for runs of several rows.
  template <bool A, bool G, bool LONG, typename Weigh, typename Terms, typename Finish>
  __device__ __forceinline__ void over_rows(const Weigh& weigh, const Terms& terms, const Finish& finish) const {
    // As many lanes as a row has runs, rounded up to a power of two.
    int lanes = 1;
    while (lanes < 32 && lanes < runs_) lanes *= 2;
    const int group = threadIdx.x / lanes, groups = blockDim.x / lanes, lane = threadIdx.x % lanes;
    constexpr int ROWS = LONG ? 1 : at_once<A, G>(), RUNS = LONG ? at_once<A, G>() : 1;
#pragma unroll 1
    for (int base = 0; base < rows_; base += groups * ROWS) {
      Pair<C> sums[ROWS];
#pragma unroll 1
      for (int first = lane; first < runs_; first += lanes * RUNS) {
        Runs<A, G> runs[ROWS * RUNS];
#pragma unroll
        for (int i = 0; i < ROWS * RUNS; ++i) {
          runs[i].read(*this, min(base + i % ROWS * groups + group, rows_ - 1),
                       min(first + i / ROWS * lanes, runs_ - 1));
        }
#pragma unroll
        for (int i = 0; i < ROWS * RUNS; ++i) {
          const int row = base + i % ROWS * groups + group, run = first + i / ROWS * lanes;
          if (row < rows_ && run < runs_) {
            runs[i].add(row, run, weigh, terms, [&](int) -> Pair<C>& { return sums[i % ROWS]; });
          }
        }
      }
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
#pragma unroll 1
        for (int other = lanes / 2; other > 0; other /= 2) {
          sums[i].first += __shfl_xor_sync(0xffffffffu, sums[i].first, other);
          sums[i].second += __shfl_xor_sync(0xffffffffu, sums[i].second, other);
        }
        const int row = base + i * groups + group;
        if (lane == 0 && row < rows_) finish(row, sums[i]);
      }
    }
    __syncthreads();
  }

  // The same over columns. `room`: 2 * N values per thread. SECOND: whether the pair's second value is of interest.
  template <bool A, bool G, bool SECOND, typename Weigh, typename Terms, typename Finish>
  __device__ __forceinline__ void over_columns(C* room, const Weigh& weigh, const Terms& terms,
                                               const Finish& finish) const {
#pragma unroll 1
    for (int from = 0; from < runs_; from += blockDim.x) {
      const int width = min(static_cast<int>(blockDim.x), runs_ - from);
      int slices = blockDim.x / width;
      const int slice = threadIdx.x / width, run = from + threadIdx.x % width;
      Pair<C> sums[N];
      constexpr int AT_ONCE = at_once<A, G>();
      if (slice < slices) {
#pragma unroll 1
        for (int first = slice; first < rows_; first += slices * AT_ONCE) {
          Runs<A, G> runs[AT_ONCE];
#pragma unroll
          for (int i = 0; i < AT_ONCE; ++i) runs[i].read(*this, min(first + i * slices, rows_ - 1), run);
#pragma unroll
          for (int i = 0; i < AT_ONCE; ++i) {
            const int row = first + i * slices;
            if (row < rows_) runs[i].add(row, run, weigh, terms, [&](int j) -> Pair<C>& { return sums[j]; });
          }
        }
      }
      int place = slice;
      if (width < 32 && 32 % width == 0) {
        // The lanes of a warp that share a column; one of them goes on for all.
        place = threadIdx.x % 32 < width ? threadIdx.x / 32 : slices;
        slices = blockDim.x / 32;
#pragma unroll
        for (int i = 0; i < N; ++i) {
#pragma unroll 1
          for (int other = width; other < 32; other *= 2) {
            sums[i].first += __shfl_xor_sync(0xffffffffu, sums[i].first, other);
            if (SECOND) sums[i].second += __shfl_xor_sync(0xffffffffu, sums[i].second, other);
          }
        }
      }
      C* const second = room + blockDim.x * N;
      if (place < slices) {
        const int at = (place * width + threadIdx.x % width) * N;
        C values[WORD];
#pragma unroll
        for (int i = 0; i < N; i += WORD) {
#pragma unroll
          for (int j = 0; j < WORD; ++j) values[j] = sums[i + j].first;
          put_run(room + spread(at + i), values);
#pragma unroll
          for (int j = 0; j < WORD; ++j) values[j] = sums[i + j].second;
          if (SECOND) put_run(second + spread(at + i), values);
        }
      }
      __syncthreads();
#pragma unroll 1
      for (int i = threadIdx.x; i < width * N; i += blockDim.x) {
        Pair<C> total;
#pragma unroll 4
        for (int s = 0; s < slices; ++s) {
          const int at = spread(s * width * N + i);
          total.first += room[at];
          if (SECOND) total.second += second[at];
        }
        finish(from * N + i, total);
      }
      __syncthreads();
    }
  }

 private:
  // Runs that a thread asks for before it looks at one: as many as its registers hold beside the sums.
  template <bool A, bool G>
  __host__ __device__ static constexpr int at_once() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
    constexpr int MOST = 2;  // of four, ptxas spills there
#else
    constexpr int MOST = 4;
#endif
    return (A && G) || N == 1 ? (N == 4 ? 2 : 1) : (N == 4 ? MOST : 2);
  }

  // A run of what is asked for of the two.
  template <bool A, bool G>
  struct Runs {
    T a[N] = {}, g[N] = {};

    __device__ __forceinline__ void read(const Matrix& matrix, int row, int run) {
      const int64_t at = static_cast<int64_t>(row) * matrix.stride_ + run * N;
      if (A) load_run(matrix.activation_ + at, a);
      if (G) load_run(matrix.gradient_ + at, g);
    }
    template <typename Weigh, typename Terms, typename To>
    __device__ __forceinline__ void add(int row, int run, const Weigh& weigh, const Terms& terms, const To& to) const {
      C weights[N] = {};
      weigh(row, run, weights);
#pragma unroll
      for (int i = 0; i < N; ++i) terms(load(a[i]), load(g[i]), weights[i], to(i));
    }
  };

  // Where over_columns keeps its i-th sum. A thread has one word of 16 bytes, or two; of those, every second four
  // threads swap theirs, so that the first words of eight threads lie in all banks, and the second ones too.
  static constexpr int WORD = N * sizeof(C) < 16 ? N : 16 / sizeof(C);
  static_assert(N == WORD || N == 2 * WORD);
  __device__ __forceinline__ static int spread(int i) { return N == WORD ? i : i ^ (i / (8 * WORD) % 2 * WORD); }

  const T *activation_, *gradient_;
  int rows_, runs_, stride_;
};

// The weights of up to CHANNELS channels in shared memory. Read in runs of two 16-byte words, they lie parted, so that
// the lanes of a warp meet all banks.
template <typename C, int N>
struct Weights {
  static constexpr int WORD = 16 / sizeof(C);
  int half;

  __host__ __device__ explicit Weights(int channels) : half((min_of(channels) + 63) / 64 * 32 + 16) {}
  __host__ __device__ static int min_of(int channels) { return channels < CHANNELS ? channels : CHANNELS; }
  __host__ __device__ int size() const { return 2 * half; }
  __device__ __forceinline__ int place(int channel) const {
    return N <= WORD ? channel : channel % N / WORD * half + channel / N * WORD + channel % WORD;
  }
};

// Has the block's `count` elements brought to the L2 cache, if all blocks' fit there together: what is read second
// comes while what is read first is waited for.
template <typename T>
__device__ __forceinline__ void prefetch(const T* from, int count) {
  constexpr int LINE = 128, MOST = 64 << 10;
  const char* const bytes = reinterpret_cast<const char*>(from);
  const int64_t size = static_cast<int64_t>(count) * sizeof(T);
  if (size > MOST) return;
#pragma unroll 1
  for (int i = threadIdx.x * LINE; i < size; i += blockDim.x * LINE) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(bytes + i));
  }
}

template <typename T, int N>
__device__ __forceinline__ void cam_of_image(const Cam<T>& a, char* shared) {
  using C = compute_t<T>;
  C* const weights = reinterpret_cast<C*>(shared);
  const Weights<C, N> places(a.channels);
  C* const room = weights + places.size();
  const int64_t image = static_cast<int64_t>(blockIdx.x) * a.channels * a.pixels;
  C* const out = a.out + static_cast<int64_t>(blockIdx.x) * a.pixels;
#pragma unroll 1
  for (int from = 0; from < a.channels; from += CHANNELS) {
    const int channels = min(CHANNELS, a.channels - from);
    const bool last = from + channels == a.channels;
    const int64_t at = image + (a.channels_last ? from : static_cast<int64_t>(from) * a.pixels);
    const int rows = a.channels_last ? a.pixels : channels, columns = a.channels_last ? channels : a.pixels;
    const Matrix<T, N> matrix(a.activation + at, a.gradient + at, rows, columns,
                              a.channels_last ? a.channels : a.pixels);

    if (a.method == GRADCAM && channels == a.channels) prefetch(a.activation + at, channels * a.pixels);
    const auto nothing = [](int, int, C(&)[N]) {};
    const auto of_row = [&](int row, int, C(&to)[N]) {
#pragma unroll
      for (int i = 0; i < N; ++i) to[i] = weights[places.place(row)];
    };
    const auto of_columns = [&](int, int run, C(&to)[N]) {
      constexpr int WORD = N < places.WORD ? N : places.WORD;
#pragma unroll
      for (int i = 0; i < N; i += WORD) {
        C word[WORD];
        load_run(weights + places.place(run * N + i), word);
#pragma unroll
        for (int j = 0; j < WORD; ++j) to[i + j] = word[j];
      }
    };
    const auto mean = [](C, C g, C, Pair<C>& to) { to.first += g; };
    const auto ratio = [](C value, C g, C, Pair<C>& to) {
      to.first += g * value;
      to.second += value + C(1e-8);
    };
    const auto weighted = [](C value, C, C weight, Pair<C>& to) { to.first += weight * value; };
    const auto local = [&](C value, C g, C, Pair<C>& to) {
      to.first += (a.method == LAYERCAM && g < 0 ? C(0) : g) * value;
    };
    const auto weight = [&](int channel, const Pair<C>& sums) {
      weights[places.place(channel)] = a.method == GRADCAM ? sums.first / C(a.pixels) : sums.first / sums.second;
    };
    const auto finish = [&](int pixel, const Pair<C>& sums) {
      const C sum = from == 0 ? sums.first : out[pixel] + sums.first;
      out[pixel] = last && sum < 0 ? C(0) : sum;
    };
    if (a.channels_last) {
      if (a.method == GRADCAM) matrix.template over_columns<false, true, false>(room, nothing, mean, weight);
      if (a.method == XGRADCAM) matrix.template over_columns<true, true, true>(room, nothing, ratio, weight);
      if (a.method <= XGRADCAM) {
        matrix.template over_rows<true, false, true>(of_columns, weighted, finish);
      } else {
        matrix.template over_rows<true, true, true>(nothing, local, finish);
      }
    } else {
      if (a.method == GRADCAM) matrix.template over_rows<false, true, false>(nothing, mean, weight);
      if (a.method == XGRADCAM) matrix.template over_rows<true, true, false>(nothing, ratio, weight);
      if (a.method <= XGRADCAM) {
        matrix.template over_columns<true, false, false>(room, of_row, weighted, finish);
      } else {
        matrix.template over_columns<true, true, false>(room, nothing, local, finish);
      }
    }
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(CAM_BLOCK, CAM_BLOCKS) cam_kernel(const __grid_constant__ Cam<T> a) {
  extern __shared__ __align__(16) char shared[];
  cam_of_image<T, N>(a, shared);
}

Tensor cam(const Tensor& activation, const Tensor& gradient, int64_t method) {
  const int64_t n = activation.size(0), channels = activation.size(1), h = activation.size(2), w = activation.size(3);
  const Tensor out = empty(activation, {n, h, w}, compute_dtype(activation));
  if (out.numel() > 0) {
    dispatch(activation.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      using C = compute_t<T>;
      constexpr int N = 16 / sizeof(T);
      STD_TORCH_CHECK(channels * h * w < (int64_t{1} << 31), "activation must be below 2^31 elements a sample, got ",
                      channels, " x ", h, " x ", w);
      Cam<T> a = {data<T>(activation),         data<T>(gradient),
                  mutable_data<C>(out),        static_cast<int32_t>(channels),
                  static_cast<int32_t>(h * w), static_cast<int32_t>(method),
                  !activation.is_contiguous(), false};
      a.aligned = aligned_16(a.activation, a.gradient) && (a.channels_last ? channels : h * w) % N == 0;
      const auto run = [&](auto kernel, int run_length) {
        const size_t values = Weights<C, 1>(a.channels).size() + 2 * CAM_BLOCK * run_length;
        launch(kernel, static_cast<unsigned>(n), CAM_BLOCK, values * sizeof(C), activation, a);
      };
      if (a.aligned) {
        run(cam_kernel<T, N>, N);
      } else {
        run(cam_kernel<T, 1>, 1);
      }
    });
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(part_fast, CUDA, m) { m.impl("_cam", TORCH_BOX(&cam)); }

}  // namespace part_fast
