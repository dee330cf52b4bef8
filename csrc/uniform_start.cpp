// uniform_start on the CPU. See part_fast/ops/uniform_start.py.
#include "images.h"

namespace part_fast {
namespace {

// 2u - 1 of `blocks` blocks of four elements from block `first` on.
PF_CLONES void noise_chunk(int64_t first, int64_t blocks, uint64_t key, float* noise) {
  for (int64_t i = 0; i < blocks; ++i) {
    const Words words = philox(static_cast<uint64_t>(first + i), key);
    noise[4 * i] = signed_unit(words.a);
    noise[4 * i + 1] = signed_unit(words.b);
    noise[4 * i + 2] = signed_unit(words.c);
    noise[4 * i + 3] = signed_unit(words.d);
  }
}

template <typename C>
struct Start {
  C scale, clip_low, clip_high;
};

template <typename C>
PF_HD void start_loop(const C* x, const float* noise, const C* eps, Start<C> start, C* out, int64_t count) {
  PF_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    out[i] = clip(with_noise(x[i], static_cast<C>(noise[i]), start.scale, eps[i]), start.clip_low, start.clip_high);
  }
}

PF_CLONES void start_chunk(const float* x, const float* noise, const float* eps, Start<float> start, float* out,
                           int64_t count) {
  start_loop(x, noise, eps, start, out, count);
}

PF_CLONES void start_chunk(const double* x, const float* noise, const double* eps, Start<double> start, double* out,
                           int64_t count) {
  start_loop(x, noise, eps, start, out, count);
}

Tensor uniform_start(const Tensor& x, const std::optional<Tensor>& eps, double eps_high, double eps_low, double scale,
                     int64_t seed, double clip_low, double clip_high) {
  const Tensor out = empty_like(x, x.scalar_type());
  dispatch(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using C = compute_t<T>;
    const T* x_data = data<T>(x);
    T* out_data = mutable_data<T>(out);
    const Start<C> start = {static_cast<C>(scale), static_cast<C>(clip_low), static_cast<C>(clip_high)};
    for_each_chunk<C>(Images(x), eps_of(eps, eps_high, eps_low), [&](int64_t at, int64_t count, const C* bound) {
      alignas(64) C buffer[2][CHUNK];
      alignas(64) float noise[CHUNK + 8];  // whole blocks, of which a chunk may begin or end inside
      const int64_t first = at / 4;
      noise_chunk(first, (at + count + 3) / 4 - first, static_cast<uint64_t>(seed), noise);
      C* to = place(out_data + at, buffer[1]);
      start_chunk(decoded(x_data + at, buffer[0], count), noise + at % 4, bound, start, to, count);
      write(to, out_data + at, count);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(part_fast, CPU, m) { m.impl("_uniform_start", TORCH_BOX(&uniform_start)); }

}  // namespace part_fast
