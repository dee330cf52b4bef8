#include "cpu.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define PF_F16C 1
#endif

namespace part_fast {

PF_CLONES void widen(const BFloat16* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = load(from[i]);
}

PF_CLONES void narrow(const float* from, BFloat16* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = store<BFloat16>(from[i]);
}

namespace {

#ifdef PF_F16C
#define PF_DEFAULT __attribute__((target("default")))
#define PF_AVX2 __attribute__((target("arch=x86-64-v3")))

PF_AVX2 void widen_half(const Half* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < count; ++i) to[i] = load(from[i]);
}

PF_AVX2 void narrow_half(const float* from, Half* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i eight = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), eight);
  }
  for (; i < count; ++i) to[i] = store<Half>(from[i]);
}
#else
#define PF_DEFAULT
#endif

PF_DEFAULT void widen_half(const Half* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = load(from[i]);
}

PF_DEFAULT void narrow_half(const float* from, Half* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = store<Half>(from[i]);
}

}  // namespace

void widen(const Half* from, float* to, int64_t count) { widen_half(from, to, count); }

void narrow(const float* from, Half* to, int64_t count) { narrow_half(from, to, count); }

}  // namespace part_fast
