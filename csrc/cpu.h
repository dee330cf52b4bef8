// CPU ops: loops for several instruction sets, and chunks of memory in the compute type.
#pragma once

#include <algorithm>

#include "tensor.h"

// A function with this mark is compiled for several instruction sets; the best is chosen when the library is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
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

// Between storage and compute type, `count` elements.
void widen(const BFloat16* from, float* to, int64_t count);
void widen(const Half* from, float* to, int64_t count);
void narrow(const float* from, BFloat16* to, int64_t count);
void narrow(const float* from, Half* to, int64_t count);

template <typename S, typename C>
void widen(const S* from, C* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<C>(load(from[i]));
}

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
