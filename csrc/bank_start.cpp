// bank_start on the CPU. See part_fast/ops/bank_start.py.
#include "bank.h"

namespace part_fast {
namespace {

template <typename C>
struct Start {
  C unit, clip_low, clip_high;
};

template <typename C>
PF_HD void start_loop(const C* x, const int8_t* stored, const C* eps, Start<C> start, C* out, int64_t count) {
  PF_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    const C moved = static_cast<C>(stored[i]) * start.unit;
    out[i] = clip(project(moved, x[i], eps[i]), start.clip_low, start.clip_high);
  }
}

PF_CLONES void start_chunk(const float* x, const int8_t* stored, const float* eps, Start<float> start, float* out,
                           int64_t count) {
  start_loop(x, stored, eps, start, out, count);
}

PF_CLONES void start_chunk(const double* x, const int8_t* stored, const double* eps, Start<double> start, double* out,
                           int64_t count) {
  start_loop(x, stored, eps, start, out, count);
}

// `count` values of a bank to elements `step` apart.
void take(const int8_t* from, int64_t along, int8_t* to, int64_t step, int64_t count) {
  if (step == 1 && along == 1) {
    std::copy_n(from, count, to);
  } else if (step == 1) {
    reversed(from - count + 1, to, count);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i * step] = from[i * along];
  }
}

Tensor bank_start(const Tensor& x, const Tensor& bank, const Tensor& places, const std::optional<Tensor>& eps,
                  double eps_high, double eps_low, double unit, double clip_low, double clip_high) {
  const Tensor out = empty_like(x, x.scalar_type());
  dispatch(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using C = compute_t<T>;
    const T* x_data = data<T>(x);
    T* out_data = mutable_data<T>(out);
    const int8_t* values = data<int8_t>(bank);
    const Images images(x);
    const BankRows rows(images, bank, places);
    const Start<C> start = {static_cast<C>(unit), static_cast<C>(clip_low), static_cast<C>(clip_high)};
    for_each_chunk<C>(images, eps_of(eps, eps_high, eps_low), [&](int64_t at, int64_t count, const C* bound) {
      alignas(64) C buffer[2][CHUNK];
      alignas(64) int8_t stored[CHUNK] = {};
      bool all_known = true;
      rows.for_each_run(
          at, count,
          [&](int64_t begin, int64_t step, int64_t length, int64_t from, int64_t along) {
            take(values + from, along, stored + begin, step, length);
          },
          [&](int64_t, int64_t) { all_known = false; });
      C* to = place(out_data + at, buffer[1]);
      start_chunk(decoded(x_data + at, buffer[0], count), stored, bound, start, to, count);
      if (!all_known) {
        rows.for_each_run(
            at, count, [](int64_t, int64_t, int64_t, int64_t, int64_t) {},
            [&](int64_t begin, int64_t length) {
              std::fill_n(to + begin, length, std::numeric_limits<C>::quiet_NaN());
            });
      }
      write(to, out_data + at, count);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(part_fast, CPU, m) { m.impl("_bank_start", TORCH_BOX(&bank_start)); }

}  // namespace part_fast
