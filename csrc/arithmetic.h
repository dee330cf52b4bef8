// The arithmetic of one pixel, written once for the C++ and the CUDA sources.
//
// Every backend returns the same bits, so the order of operations is part of the contract: each line below is
// one rounding per operation, and both compilers are told not to contract a*b+c to an fma.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define PF_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__) && !defined(PF_SANITIZED)
#define PF_HD inline __attribute__((always_inline))
#else
#define PF_HD inline
#endif

namespace part_fast {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

// What is computed in for values stored as T: float64 for float64, else float32.
template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A stored value, exactly, in a type that has arithmetic.
template <typename T>
PF_HD compute_t<T> load(T value) {
  return static_cast<compute_t<T>>(value);
}

// `value` rounded to the storage type T: to nearest even; from float64 to 16 bits by way of float32, as torch does.
template <typename T, typename C>
PF_HD T store(C value) {
  if constexpr (sizeof(T) == 2) {
    return static_cast<T>(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

// -1, 0 or 1; 0 for NaN. A gradient in float64 is compared in float64: rounded first, a tiny one would be 0.
template <typename C, typename G>
PF_HD C sign(G grad) {
  const auto g = load(grad);
  return static_cast<C>(g > 0) - static_cast<C>(g < 0);
}

// Low bound first, then high. NaN in `value` stays; the bounds are numbers.
template <typename C>
PF_HD C clip(C value, C low, C high) {
  value = low > value ? low : value;
  return high < value ? high : value;
}

// x_adv + alpha * sign(grad) - x: how far the step went from x. `sign_of_grad` is -1, 0 or 1.
template <typename C>
PF_HD C moved_by_step(C x_adv, C sign_of_grad, C x, C alpha) {
  return (x_adv + alpha * sign_of_grad) - x;
}

// x + clamp(moved, -eps, eps); NaN in any of the three stays.
template <typename C>
PF_HD C project(C moved, C x, C eps) {
  const C inside = clip(moved, -eps, eps);
  return x + (eps != eps ? eps : inside);
}

// Where `moved` lies: 1 above eps, -1 below -eps, 0 inside, on a bound or NaN.
template <typename C>
PF_HD C side(C moved, C eps) {
  return moved > eps ? C(1) : (moved < -eps ? C(-1) : C(0));
}

// True where the clip cut `value`, so that no gradient passes; false for NaN.
template <typename C>
PF_HD bool clipped(C value, C low, C high) {
  return (value < low) | (value > high);
}

// The gradient of project for x_adv, x and eps, given `side`.
template <typename C>
PF_HD C grad_x_adv(C grad_out, C side) {
  return side == 0 ? grad_out : C(0);
}

template <typename C>
PF_HD C grad_x(C grad_out, C side) {
  return side == 0 ? C(0) : grad_out;
}

template <typename C>
PF_HD C grad_eps(C grad_out, C side) {
  return side > 0 ? grad_out : (side < 0 ? -grad_out : C(0));
}

// Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011: four random words for a
// counter of 128 bits, whose upper half is 0 here, and a key of 64.
struct Words {
  uint32_t a, b, c, d;
};

PF_HD Words philox(uint64_t counter, uint64_t key) {
  Words w = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#if defined(__CUDACC__)
#pragma unroll
#elif defined(__GNUC__)
#pragma GCC unroll 10
#endif
  for (int turn = 0; turn < 10; ++turn) {
    const uint64_t first = uint64_t{0xD2511F53u} * w.a, second = uint64_t{0xCD9E8D57u} * w.c;
    w = {static_cast<uint32_t>(second >> 32) ^ w.b ^ k0, static_cast<uint32_t>(second),
         static_cast<uint32_t>(first >> 32) ^ w.d ^ k1, static_cast<uint32_t>(first)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return w;
}

// 2u - 1 for u in [0,1) made of a word's upper 24 bits; exact.
PF_HD float signed_unit(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>(word >> 8) - (1 << 23)) * (1.0f / (1 << 23));
}

// x + noise * (scale * eps).
template <typename C>
PF_HD C with_noise(C x, C noise, C scale, C eps) {
  return x + noise * (scale * eps);
}

// The level of a bank, -127 to 127, that is nearest to `moved`, half to even; 0 for NaN. Adding what leaves no bit for
// fractions rounds, in every instruction set.
template <typename C>
PF_HD C level_of(C moved, C levels) {
  constexpr C WHOLE = sizeof(C) == 4 ? C(12582912.0) : C(6755399441055744.0);  // 1.5 * 2^23, 1.5 * 2^52
  const C level = clip(moved * levels, C(-127), C(127));
  return level != level ? C(0) : (level + WHOLE) - WHOLE;
}

// Bit of row-major pixel `pixel` in packed bits, least significant first.
PF_HD bool bit_of(const uint8_t* bits, int64_t pixel) { return (bits[pixel >> 3] >> (pixel & 7)) & 1; }

}  // namespace part_fast
