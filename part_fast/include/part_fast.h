// The ops of part_fast for C++ programs that link libtorch: the checks of the Python functions of the same names, and
// then the same kernels, so the same bits. Shapes, units and sources are in their docstrings, part_fast/ops/*.py.
//
// `part_fast::load` comes first. Nothing here has a derivative: a tensor that requires a gradient is refused, but
// under torch::NoGradGuard. Errors are c10::Error, one line that names the argument.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

namespace part_fast {

using at::Tensor;

// Loads `_C.abi3.so` of the package, which has the CPU's ops and all schemas; after it `_C_cuda.abi3.so`, if wanted.
inline void load(const std::string& library) {
  TORCH_CHECK(dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL), "part_fast cannot load the library: ", dlerror());
}

// An eps map of two values, one bit per mask value: part_fast/ops/packed_epsilon.py.
struct PackedEpsilon {
  Tensor bits;  // uint8 (N, M, ceil(H*W/8)), the least significant bit first
  int64_t height, width;
  double eps, eps_low;
};

// An eps in one of its forms: a number, a tensor that broadcasts to the images by its own dimensions, a PackedEpsilon.
class Eps {
 public:
  Eps(double value) : high(value) {
    TORCH_CHECK(std::isfinite(value) && value >= 0, "eps must be finite and >= 0, got ", value);
  }
  Eps(Tensor value) : tensor(std::move(value)) {}
  Eps(const PackedEpsilon& value)
      : tensor(value.bits), high(value.eps), low(value.eps_low), size({value.height, value.width}) {}

  std::optional<Tensor> tensor;
  double high = 0, low = 0;
  std::optional<std::array<int64_t, 2>> size;  // of packed bits
};

namespace detail {

template <typename Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
  const auto found = c10::Dispatcher::singleton().findSchema({std::string("part_fast::") + name, ""});
  TORCH_CHECK(found, "part_fast::load must be called before any op");
  return found->template typed<Signature>();
}

inline void floating(const char* name, const Tensor& value) {
  TORCH_CHECK(value.defined(), name, " must be a tensor, got an undefined one");
  TORCH_CHECK(value.layout() == at::kStrided, name, " must be a dense tensor, got layout ", value.layout());
  const auto type = value.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble, name,
              " must be float32, bfloat16, float16 or float64, got ", type);
  TORCH_CHECK(!(at::GradMode::is_enabled() && value.requires_grad()), name,
              " must not require a gradient, which no op has in C++: detach it, or use torch::NoGradGuard");
}

inline void device(const char* name, const Tensor& value, const char* than, const Tensor& other) {
  TORCH_CHECK(value.device() == other.device(), name, " must be on the device of ", than, ", ", other.device(),
              ", got ", value.device());
}

inline void alike(const char* name, const Tensor& value, const char* than, const Tensor& other) {
  TORCH_CHECK(value.sizes() == other.sizes(), name, " must have the shape of ", than, ", ", other.sizes(), ", got ",
              value.sizes());
  device(name, value, than, other);
}

inline bool is_dense(const Tensor& value) {
  return value.is_contiguous() || value.is_contiguous(at::MemoryFormat::ChannelsLast);
}

// Contiguous or channels_last; a copy where it is neither.
inline Tensor dense(const Tensor& value) {
  if (is_dense(value)) return value;
  return value.contiguous(value.stride(1) == 1 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

inline Tensor same_format(const Tensor& value, const Tensor& other) {
  return value.contiguous(other.is_contiguous() ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast);
}

inline Tensor images(const char* name, const Tensor& value) {
  floating(name, value);
  TORCH_CHECK(value.dim() == 4, name, " must have shape (N,C,H,W), got ", value.sizes());
  return dense(value);
}

inline Tensor maps(const Tensor& cam, std::array<int64_t, 2> size) {
  floating("cam", cam);
  TORCH_CHECK(cam.dim() == 3 && cam.size(1) > 0 && cam.size(2) > 0,
              "cam must have shape (N,h,w), h and w at least 1, got ", cam.sizes());
  TORCH_CHECK(size[0] >= cam.size(1) && size[1] >= cam.size(2), "size must be at least the map's ",
              cam.sizes().slice(1), ", got ", at::IntArrayRef(size));
  return cam.contiguous();
}

// The eps of a raw op on images (N,C,H,W).
inline std::optional<Tensor> expanded(const Eps& eps, const Tensor& x) {
  if (!eps.tensor) return std::nullopt;
  const Tensor& value = *eps.tensor;
  if (eps.size) {
    TORCH_CHECK(value.defined() && value.scalar_type() == at::kByte, "eps must have bits of dtype uint8");
    TORCH_CHECK(std::isfinite(eps.high) && eps.low >= 0 && eps.low <= eps.high,
                "eps must have 0 <= eps_low <= eps, got eps_low ", eps.low, " and eps ", eps.high);
    const auto [height, width] = *eps.size;
    TORCH_CHECK(value.dim() == 3 && value.size(0) == x.size(0) && height == x.size(2) && width == x.size(3) &&
                    (value.size(1) == 1 || value.size(1) == x.size(1)) && value.size(2) == (height * width + 7) / 8,
                "eps must broadcast to the images, ", x.sizes(), ", got bits ", value.sizes(), " for size ",
                at::IntArrayRef(*eps.size));
    device("eps", value, "x_adv", x);
    return value.contiguous();
  }
  floating("eps", value);
  device("eps", value, "x_adv", x);
  const bool column = value.dim() == 1 || (value.dim() == 2 && value.size(1) == 1 && x.size(3) != 1);
  TORCH_CHECK(!(column && value.size(0) != 1),
              "eps must broadcast to (N,C,H,W) by its own dimensions: (N,1,1,1) for one per image, (1,1,1,W) for one "
              "per column, got ",
              value.sizes());
  bool fits = value.dim() <= 4;
  for (int64_t d = 1; fits && d <= value.dim(); ++d) fits = value.size(-d) == 1 || value.size(-d) == x.size(-d);
  TORCH_CHECK(fits, "eps must broadcast to the images, ", x.sizes(), ", got ", value.sizes());
  return value.expand(x.sizes());
}

inline int64_t place(const char* argument, const std::string& name, std::initializer_list<const char*> known) {
  const auto found = std::find(known.begin(), known.end(), name);
  std::string list;
  for (const char* one : known) list += list.empty() ? one : std::string(", ") + one;
  TORCH_CHECK(found != known.end(), argument, " must be one of ", list, ", got ", name);
  return found - known.begin();
}

// {number, k} of a rule: k is how many pixels "quantile:q" keeps, q a decimal fraction such as 0.25; else 0.
inline std::pair<int64_t, int64_t> rule_of(const std::string& rule, std::array<int64_t, 2> size, bool soft) {
  const std::string quantile = "quantile:";
  if (rule.compare(0, quantile.size(), quantile) == 0) {
    const std::string share = rule.substr(quantile.size());
    const size_t point = share.find('.');
    const std::string digits = point == std::string::npos ? "" : share.substr(point + 1);
    const bool plain = !digits.empty() && digits.size() <= 9 && share.find_first_not_of('0') == point &&
                       digits.find_first_not_of("0123456789") == std::string::npos;
    // Exact, as in Python: 0.07 of 100 pixels is 7.
    const int64_t top = plain ? std::stoll(digits) : 0;
    int64_t bottom = 1;
    for (size_t i = 0; i < digits.size() && plain; ++i) bottom *= 10;
    TORCH_CHECK(top > 0, "rule must be quantile:q with q a decimal fraction of at most nine digits, 0 < q < 1, got ",
                rule);
    const int64_t pixels = size[0] * size[1];
    return {2, pixels / bottom * top + (pixels % bottom * top + bottom - 1) / bottom};
  }
  const int64_t number = soft ? place("rule", rule, {"zscore", "released", "quantile:q", "soft"})
                              : place("rule", rule, {"zscore", "released", "quantile:q"});
  return {number, 0};
}

inline void eps_pair(double eps, double eps_low) {
  TORCH_CHECK(std::isfinite(eps) && eps_low >= 0 && eps_low <= eps,
              "eps and eps_low must be finite, 0 <= eps_low <= eps, got ", eps, " and ", eps_low);
}

inline Tensor raw_mask(const Tensor& cam, std::array<int64_t, 2> size, const std::string& rule, bool packed) {
  const Tensor map = maps(cam, size);
  const auto [number, k] = rule_of(rule, size, false);
  static const auto raw = op<Tensor(const Tensor&, c10::SymInt, c10::SymInt, int64_t, c10::SymInt, bool)>("_cam_mask");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return raw.call(map, size[0], size[1], number, k, packed);
}

}  // namespace detail

// Maps (N,h,w) from a layer's activations and the class score's gradients, (N,K,h,w).
// method: gradcam, xgradcam, layercam or hirescam.
inline Tensor cam(const Tensor& activation, const Tensor& gradient, const std::string& method = "gradcam") {
  const int64_t number = detail::place("method", method, {"gradcam", "xgradcam", "layercam", "hirescam"});
  for (const auto& [name, value] : {std::pair("activation", activation), std::pair("gradient", gradient)}) {
    detail::floating(name, value);
    TORCH_CHECK(value.dim() == 4 && value.size(1) > 0 && value.size(2) > 0 && value.size(3) > 0, name,
                " must have shape (N,K,h,w), K, h and w at least 1, got ", value.sizes());
  }
  detail::alike("gradient", gradient, "activation", activation);
  TORCH_CHECK(gradient.scalar_type() == activation.scalar_type(), "gradient must have the dtype of activation, ",
              activation.scalar_type(), ", got ", gradient.scalar_type());
  const Tensor dense = detail::dense(activation);
  static const auto raw = detail::op<Tensor(const Tensor&, const Tensor&, int64_t)>("_cam");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return raw.call(dense, detail::same_format(gradient, dense), number);
}

// The map min-max normalised and enlarged to size (H,W).
inline Tensor upsample_cam(const Tensor& cam, std::array<int64_t, 2> size) {
  const Tensor map = detail::maps(cam, size);
  static const auto raw = detail::op<Tensor(const Tensor&, c10::SymInt, c10::SymInt)>("_upsample_cam");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return raw.call(map, size[0], size[1]);
}

// Which pixels matter, bool (N,M,H,W). rule: zscore, released (M = 3) or quantile:q.
inline Tensor cam_mask(const Tensor& cam, std::array<int64_t, 2> size, const std::string& rule = "zscore") {
  return detail::raw_mask(cam, size, rule, false);
}

// Each pixel's eps (N,M,H,W). rule: those of cam_mask, or soft.
inline Tensor epsilon_map(const Tensor& cam, std::array<int64_t, 2> size, double eps, double eps_low,
                          const std::string& rule = "zscore") {
  detail::eps_pair(eps, eps_low);
  const Tensor map = detail::maps(cam, size);
  const auto [number, k] = detail::rule_of(rule, size, true);
  static const auto raw =
      detail::op<Tensor(const Tensor&, c10::SymInt, c10::SymInt, int64_t, c10::SymInt, double, double)>("_epsilon_map");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return raw.call(map, size[0], size[1], number, k, eps, eps_low);
}

// The same as one bit per pixel.
inline PackedEpsilon packed_epsilon_map(const Tensor& cam, std::array<int64_t, 2> size, double eps, double eps_low,
                                        const std::string& rule = "zscore") {
  detail::eps_pair(eps, eps_low);
  return {detail::raw_mask(cam, size, rule, true), size[0], size[1], eps, eps_low};
}

// Images x_adv back into each pixel's eps ball around x.
inline Tensor project_linf(const Tensor& x_adv, const Tensor& x, const Eps& eps) {
  const Tensor moved = detail::images("x_adv", x_adv), natural = detail::images("x", x);
  detail::alike("x", x, "x_adv", x_adv);
  TORCH_CHECK(x.scalar_type() == x_adv.scalar_type(), "x must have the dtype of x_adv, ", x_adv.scalar_type(), ", got ",
              x.scalar_type());
  static const auto raw =
      detail::op<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, double, double)>("_project_linf");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return raw.call(moved, detail::same_format(natural, moved), detail::expanded(eps, moved), eps.high, eps.low);
}

namespace detail {

// `value` shares no memory with x_adv, or is the same elements: an in-place kernel reads and writes one by one.
inline void apart(const char* name, const Tensor& value, const Tensor& x_adv) {
  if (!value.is_alias_of(x_adv) || x_adv.numel() == 0 || value.numel() == 0) return;
  const auto span = [](const Tensor& t) {
    int64_t extent = 1;
    for (int64_t d = 0; d < t.dim(); ++d) extent += (t.size(d) - 1) * t.stride(d);
    const int64_t size = static_cast<int64_t>(t.element_size());
    return std::pair(t.storage_offset() * size, (t.storage_offset() + extent) * size);
  };
  const auto [start, end] = span(value);
  const auto [first, last] = span(x_adv);
  const bool same = start == first && value.strides() == x_adv.strides() && value.scalar_type() == x_adv.scalar_type();
  TORCH_CHECK(start >= last || first >= end || same, name, " must not overlap x_adv in part, got bytes ", start, " to ",
              end, " and ", first, " to ", last);
}

// Runs the raw op `name` on checked arguments.
template <typename Result, typename First>
Result step(const char* name, First& x_adv, const Tensor& grad, const Tensor& x, const Eps& eps, double alpha,
            std::array<double, 2> clip) {
  images("grad", grad);
  images("x", x);
  alike("grad", grad, "x_adv", x_adv);
  alike("x", x, "x_adv", x_adv);
  TORCH_CHECK(x.scalar_type() == x_adv.scalar_type(), "x must have the dtype of x_adv, ", x_adv.scalar_type(), ", got ",
              x.scalar_type());
  const auto bound = expanded(eps, x_adv);
  TORCH_CHECK(std::isfinite(alpha), "alpha must be finite, got ", alpha);
  TORCH_CHECK(clip[0] <= clip[1], "clip must have low <= high, got ", clip[0], " and ", clip[1]);
  const Tensor direction = same_format(grad, x_adv), natural = same_format(x, x_adv);
  if constexpr (std::is_void_v<Result>) {
    apart("grad", direction, x_adv);
    apart("x", natural, x_adv);
    if (bound) apart("eps", *bound, x_adv);
  }
  const auto raw = op<Result(First&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, double, double,
                             double, double)>(name);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return raw.call(x_adv, direction, natural, bound, eps.high, eps.low, alpha, clip[0], clip[1]);
}

}  // namespace detail

// No clip.
constexpr std::array<double, 2> UNCLIPPED = {-std::numeric_limits<double>::infinity(),
                                             std::numeric_limits<double>::infinity()};

// A bank of perturbations, int8 (S,C,H,W), the row (sample, dy, dx, flip) of each image in it, int64 (N,4), and the
// perturbation, in image units, that 127 stands for: part_fast/ops/bank_start.py. The values of places are not read
// here: an image of a sample that is not in the bank starts as NaN and is not stored.
struct Bank {
  Tensor values, places;
  double scale;
};

namespace detail {

inline void check(const Bank& bank, const Tensor& x) {
  TORCH_CHECK(bank.values.defined() && bank.values.scalar_type() == at::kChar, "bank must be a tensor of int8");
  TORCH_CHECK(bank.places.defined() && bank.places.scalar_type() == at::kLong, "places must be a tensor of int64");
  device("bank", bank.values, "x", x);
  device("places", bank.places, "x", x);
  TORCH_CHECK(bank.values.dim() == 4 && bank.values.sizes().slice(1) == x.sizes().slice(1),
              "bank must have shape (S,C,H,W), as the images ", x.sizes(), ", got ", bank.values.sizes());
  TORCH_CHECK(bank.values.is_contiguous(), "bank must be contiguous, got strides ", bank.values.strides());
  TORCH_CHECK(bank.places.dim() == 2 && bank.places.size(0) == x.size(0) && bank.places.size(1) == 4,
              "places must have shape (", x.size(0), ", 4), a row (sample, dy, dx, flip) per image, got ",
              bank.places.sizes());
  TORCH_CHECK(std::isfinite(bank.scale) && bank.scale > 0, "scale must be finite and > 0, got ", bank.scale);
}

inline void check(std::array<double, 2> clip) {
  TORCH_CHECK(clip[0] <= clip[1], "clip must have low <= high, got ", clip[0], " and ", clip[1]);
}

}  // namespace detail

// x moved by uniform noise in +-scale * eps, made of the seed, and clipped.
inline Tensor uniform_start(const Tensor& x, const Eps& eps, int64_t seed, double scale = 1,
                            std::array<double, 2> clip = {0, 1}) {
  const Tensor from = detail::images("x", x);
  const auto bound = detail::expanded(eps, from);
  TORCH_CHECK(std::isfinite(scale) && scale >= 0, "scale must be finite and >= 0, got ", scale);
  TORCH_CHECK(seed >= 0, "seed must be >= 0, got ", seed);
  detail::check(clip);
  const auto raw = detail::op<Tensor(const Tensor&, const std::optional<Tensor>&, double, double, double, c10::SymInt,
                                     double, double)>("_uniform_start");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return raw.call(from, bound, eps.high, eps.low, scale, seed, clip[0], clip[1]);
}

// x moved by what the bank has of each image, within eps, and clipped.
inline Tensor bank_start(const Tensor& x, const Bank& bank, const Eps& eps, std::array<double, 2> clip = {0, 1}) {
  const Tensor from = detail::images("x", x);
  detail::check(bank, from);
  const auto bound = detail::expanded(eps, from);
  detail::check(clip);
  const auto raw = detail::op<Tensor(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double,
                                     double, double, double, double)>("_bank_start");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return raw.call(from, bank.values, bank.places.contiguous(), bound, eps.high, eps.low, bank.scale / 127, clip[0],
                  clip[1]);
}

// One PGD step: along the sign of grad, back into each pixel's eps ball around x, clipped.
inline Tensor pgd_step(const Tensor& x_adv, const Tensor& grad, const Tensor& x, const Eps& eps, double alpha,
                       std::array<double, 2> clip = {0, 1}) {
  const Tensor from = detail::images("x_adv", x_adv);
  return detail::step<Tensor>("_pgd_step", from, grad, x, eps, alpha, clip);
}

// The same written into x_adv, which is contiguous or channels_last.
inline Tensor& pgd_step_(Tensor& x_adv, const Tensor& grad, const Tensor& x, const Eps& eps, double alpha,
                         std::array<double, 2> clip = {0, 1}) {
  detail::images("x_adv", x_adv);
  TORCH_CHECK(detail::is_dense(x_adv), "x_adv must be contiguous or channels_last to be written, got strides ",
              x_adv.strides());
  detail::step<void, const Tensor>("_pgd_step_", x_adv, grad, x, eps, alpha, clip);
  // So that autograd refuses to use a value that was saved before it was overwritten here.
  x_adv.unsafeGetTensorImpl()->bump_version();
  return x_adv;
}

// A step of `factor` times each pixel's own eps, written into x_adv, and what it left of the perturbation into the
// bank.
inline Tensor& eps_step_(Tensor& x_adv, const Tensor& grad, const Tensor& x, const Eps& eps, double factor,
                         std::array<double, 2> clip = {0, 1}, bool project = true,
                         const std::optional<Bank>& bank = std::nullopt) {
  for (const auto& [name, value] : {std::pair("x_adv", x_adv), std::pair("grad", grad), std::pair("x", x)}) {
    detail::images(name, value);
  }
  TORCH_CHECK(detail::is_dense(x_adv), "x_adv must be contiguous or channels_last to be written, got strides ",
              x_adv.strides());
  detail::alike("grad", grad, "x_adv", x_adv);
  detail::alike("x", x, "x_adv", x_adv);
  TORCH_CHECK(x.scalar_type() == x_adv.scalar_type(), "x must have the dtype of x_adv, ", x_adv.scalar_type(), ", got ",
              x.scalar_type());
  const auto bound = detail::expanded(eps, x_adv);
  TORCH_CHECK(std::isfinite(factor), "factor must be finite, got ", factor);
  detail::check(clip);
  if (bank) detail::check(*bank, x_adv);
  const Tensor direction = detail::same_format(grad, x_adv), natural = detail::same_format(x, x_adv);
  detail::apart("grad", direction, x_adv);
  detail::apart("x", natural, x_adv);
  if (bound) detail::apart("eps", *bound, x_adv);
  std::optional<Tensor> values, places;
  if (bank) values = bank->values, places = bank->places.contiguous();
  const auto raw =
      detail::op<void(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, double, double,
                      bool, bool, double, double, const std::optional<Tensor>&, const std::optional<Tensor>&, double)>(
          "_eps_step_");
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    raw.call(x_adv, direction, natural, bound, eps.high, eps.low, factor, true, project, clip[0], clip[1], values,
             places, bank ? 127 / bank->scale : 0.0);
  }
  x_adv.unsafeGetTensorImpl()->bump_version();
  if (bank) bank->values.unsafeGetTensorImpl()->bump_version();
  return x_adv;
}

}  // namespace part_fast
