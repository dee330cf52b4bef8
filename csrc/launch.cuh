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
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

inline int64_t element_size(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : dtype == ScalarType::Byte ? 1 : 2;
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

}  // namespace part_fast
