// CPU ops: loops for several instruction sets, and chunks of memory in the compute type.
#pragma once

#include <algorithm>
#include <cstring>

#include "tensor.h"

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

// A function with this mark is compiled for several instruction sets; the best is chosen when the library is loaded.
// Under sanitizers each is compiled once: they watch the same lines in a third of the time.
#if !defined(PF_SANITIZED) && defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define PF_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PF_CLONES
#endif

// In front of a loop whose output may be one of its inputs, element by element.
#if defined(__GNUC__) && !defined(__clang__)
#define PF_INDEPENDENT _Pragma("GCC ivdep")
#else
#define PF_INDEPENDENT
#endif

namespace part_fast {

#ifdef __SANITIZE_THREAD__
// A body that tells ThreadSanitizer what a parallel loop orders: it sees neither OpenMP nor torch.
template <typename F>
struct Watched {
  const F& body;
  alignas(8) mutable char begun = 0;
  alignas(8) mutable char ended = 0;

  void operator()(int64_t first, int64_t last) const {
    __tsan_acquire(&begun);
    body(first, last);
    __tsan_release(&ended);
  }
};
#endif

// body(first, last) for parts of [begin, end), of `grain` and more, on torch's threads.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& body) {
#ifdef __SANITIZE_THREAD__
  const Watched<F> watched = {body};
  __tsan_release(&watched.begun);
  torch::stable::parallel_for(begin, end, grain, watched);
  __tsan_acquire(&watched.ended);
#else
  torch::stable::parallel_for(begin, end, grain, body);
#endif
}

// Between storage and compute type, `count` elements.
void widen(const BFloat16* from, float* to, int64_t count);
void widen(const Half* from, float* to, int64_t count);
void narrow(const float* from, BFloat16* to, int64_t count);
void narrow(const float* from, Half* to, int64_t count);

template <typename S, typename C>
void widen(const S* from, C* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<C>(load(from[i]));
}

// Two BFloat16 side by side, from anywhere. As halves of 32 bits they become floats, and floats become them, by shifts
// and masks: a loop over pairs needs no shuffles, and no buffers of floats. (x86 and ARM: the even one is the low
// half.)
typedef uint32_t Pair __attribute__((may_alias, aligned(alignof(BFloat16))));

PF_HD float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

PF_HD float even_of(uint32_t pair) { return float_of_bits(pair << 16); }

PF_HD float odd_of(uint32_t pair) { return float_of_bits(pair & 0xffff0000u); }

// The high half is `value` rounded to BFloat16, to nearest even, every NaN the same one as in torch.
PF_HD uint32_t rounded_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return value != value ? 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1);
}

PF_HD uint32_t pair_of(float even, float odd) { return rounded_bits(even) >> 16 | (rounded_bits(odd) & 0xffff0000u); }

// A chunk of an input in the compute type C: in place, or decoded into `buffer`.
template <typename C, typename T>
const C* decoded(const T* from, C* buffer, int64_t count) {
  if constexpr (std::is_same_v<T, C>) {
    return from;
  } else {
    widen(from, buffer, count);
    return buffer;
  }
}

// A chunk of a gradient of which only the sign matters. A tiny float64 would be 0 in float32, hence its sign itself.
template <typename C, typename G>
const C* decoded_sign(const G* from, C* buffer, int64_t count) {
  if constexpr (sizeof(G) > sizeof(C)) {
    for (int64_t i = 0; i < count; ++i) buffer[i] = sign<C>(from[i]);
    return buffer;
  } else {
    return decoded(from, buffer, count);
  }
}

// Where a chunk of an output is computed, and its way home.
template <typename C, typename T>
C* place(T* to, C* buffer) {
  if constexpr (std::is_same_v<T, C>) {
    return to;
  } else {
    return buffer;
  }
}

template <typename C, typename T>
void write(const C* from, T* to, int64_t count) {
  if constexpr (std::is_same_v<C, float> && sizeof(T) == 2) {
    narrow(from, to, count);
  } else if constexpr (!std::is_same_v<T, C>) {
    for (int64_t i = 0; i < count; ++i) to[i] = store<T>(from[i]);
  }
}

}  // namespace part_fast
