// Host side, for the C++ and the CUDA sources: what the stable ABI leaves to its users.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <cstdint>
#include <optional>

#include "arithmetic.h"

// Torch 2.10 and 2.11 have it under its older name alone, which does not say why a call failed.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace part_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
struct Type {
  using type = T;
};

// f(Type<T>{}) with the floating type that `dtype` names. Python has refused every other dtype already.
template <typename F>
auto dispatch(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(Type<float>{});
    case ScalarType::BFloat16:
      return f(Type<BFloat16>{});
    case ScalarType::Half:
      return f(Type<Half>{});
    case ScalarType::Double:
      return f(Type<double>{});
    default:
      STD_TORCH_CHECK(false, "part_fast takes float32, bfloat16, float16 and float64, got dtype ",
                      static_cast<int>(dtype));
  }
}

// What ops compute in, and the dtype of maps: float64 for float64, else float32.
inline ScalarType compute_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Uninitialised, of the shape and memory format of `like`.
inline Tensor empty_like(const Tensor& like, ScalarType dtype) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(like),         from(std::make_optional(dtype)),
                                    from(std::nullopt), from(std::nullopt),
                                    from(std::nullopt), from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Uninitialised and contiguous, on the device of `like`.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// An eps argument of the raw ops, for images (N,C,H,W): a scalar, a tensor expanded to the images, or packed bits.
struct Eps {
  enum Form { SCALAR, DENSE, BITS };
  Form form = SCALAR;
  const void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  std::array<int64_t, 4> strides = {};  // DENSE: in elements; 0 where broadcast
  int64_t mask_bytes = 0;               // BITS: bytes of one mask
  int64_t channels = 1;                 // BITS: 1 or C
  float set = 0, unset = 0;             // BITS: eps where the bit is set, and elsewhere
  double value = 0;                     // SCALAR
};

inline Eps eps_of(const std::optional<Tensor>& eps, double high, double low) {
  Eps result;
  result.value = high;
  // Kept as float: g++ 12 drops the rounding of a vectorised double -> float -> double.
  result.set = static_cast<float>(high);
  result.unset = static_cast<float>(low);
  if (!eps) return result;
  result.data = eps->data_ptr();
  result.dtype = eps->scalar_type();
  if (result.dtype == ScalarType::Byte) {
    result.form = Eps::BITS;
    result.channels = eps->size(1);
    result.mask_bytes = eps->size(2);
  } else {
    result.form = Eps::DENSE;
    for (int d = 0; d < 4; ++d) result.strides[d] = eps->stride(d);
  }
  return result;
}

// (N,C,H,W) images that lie dense in memory, contiguous or channels_last.
struct Images {
  int64_t n, c, h, w;
  bool channels_last;

  explicit Images(const Tensor& images)
      : n(images.size(0)),
        c(images.size(1)),
        h(images.size(2)),
        w(images.size(3)),
        channels_last(!images.is_contiguous()) {}
  int64_t pixels() const { return h * w; }
  int64_t numel() const { return n * c * h * w; }
};

}  // namespace part_fast
