// Host side of every kernel launch, and what kernels share.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "tensor.h"

namespace part_fast {

// kernel(arguments), on the device of `on` and the stream that is current there. Nothing waits for it.
template <typename Arguments>
void launch(void (*kernel)(Arguments), unsigned grid, unsigned block, size_t shared_bytes, const Tensor& on,
            const Arguments& arguments) {
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  if (shared_bytes > (48 << 10)) {
    // More than this must be asked for.
    STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// f(Type<C>{}) with what ops compute in for this tensor.
template <typename F>
void on_compute_type(const Tensor& tensor, const F& f) {
  if (compute_dtype(tensor) == ScalarType::Double) {
    f(Type<double>{});
  } else {
    f(Type<float>{});
  }
}

// Whether 16-byte accesses may start at every one of these.
template <typename... Pointers>
bool aligned_16(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Division of 0 <= n < 2^63 by a constant that the host knows: a multiplication and a shift.
// Granlund and Montgomery, "Division by invariant integers using multiplication", PLDI 1994.
struct Divisor {
  uint64_t multiplier = 0;
  int32_t shift = -1;  // -1: by one

  Divisor() = default;
  explicit Divisor(int64_t by) {
    if (by < 2) return;
    int bits = 1;
    while (bits < 63 && (int64_t{1} << bits) < by) ++bits;
    multiplier = static_cast<uint64_t>((((unsigned __int128){1} << (63 + bits)) + by - 1) / by);
    shift = bits - 1;
  }
  __device__ __forceinline__ int64_t divide(int64_t n) const {
    return shift < 0 ? n : static_cast<int64_t>(__umul64hi(multiplier, static_cast<uint64_t>(n)) >> shift);
  }
};

// Divisor for 0 <= n < 2^31.
struct SmallDivisor {
  uint32_t multiplier = 0;
  int32_t shift = -1;  // -1: by one

  SmallDivisor() = default;
  explicit SmallDivisor(int64_t by) {
    if (by < 2) return;
    int bits = 1;
    while (bits < 31 && (int64_t{1} << bits) < by) ++bits;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + bits)) + static_cast<uint64_t>(by) - 1) / by);
    shift = bits - 1;
  }
  __device__ __forceinline__ uint32_t divide(uint32_t n) const {
    return shift < 0 ? n : __umulhi(multiplier, n) >> shift;
  }
};

// f(Type<T>{}) with the floating type that `dtype` names, on the device.
template <typename F>
__device__ __forceinline__ auto on_dtype(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) return f(Type<float>{});
  if (dtype == ScalarType::BFloat16) return f(Type<BFloat16>{});
  if (dtype == ScalarType::Half) return f(Type<Half>{});
  return f(Type<double>{});
}

// The widest access for `size` bytes.
template <int size>
using word_t =
    std::conditional_t<size % 16 == 0, uint4,
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

// The same to shared memory.
template <typename T, int N>
__device__ __forceinline__ void put_run(T* to, const T (&from)[N]) {
  constexpr int size = sizeof(T) * N;
  using Word = word_t<size>;
#pragma unroll
  for (int i = 0; i < size / static_cast<int>(sizeof(Word)); ++i) {
    Word word;
    memcpy(&word, reinterpret_cast<const char*>(from) + i * sizeof(Word), sizeof(Word));
    reinterpret_cast<Word*>(to)[i] = word;
  }
}

// The same to device memory. By an instruction: a plain assignment is sometimes compiled to a store for each element.
template <typename T, int N>
__device__ __forceinline__ void store_run(T* to, const T (&from)[N]) {
  constexpr int size = sizeof(T) * N;
  using Word = word_t<size>;
#pragma unroll
  for (int i = 0; i < size / static_cast<int>(sizeof(Word)); ++i) {
    Word word;
    memcpy(&word, reinterpret_cast<const char*>(from) + i * sizeof(Word), sizeof(Word));
    Word* const place = reinterpret_cast<Word*>(to) + i;
    if constexpr (sizeof(Word) == 16) {
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(place), "r"(word.x), "r"(word.y), "r"(word.z),
                   "r"(word.w)
                   : "memory");
    } else {
      __stwb(place, word);
    }
  }
}

}  // namespace part_fast
