// CPU ops on images: flat chunks over the threads, every operand of a chunk decoded to the compute type.
//
// Images of one call share a dense memory format, so one flat loop serves contiguous and channels_last. A chunk of
// float32 or float64 is read where it lies; other dtypes, broadcast eps and packed bits are decoded into a buffer that
// stays in the L1 cache. The arithmetic then is one vectorised loop for every form.
#pragma once

#include "cpu.h"

namespace part_fast {

constexpr int64_t CHUNK = 1024;        // elements; at most nine buffers of a chunk are in use at once
constexpr int64_t CHUNKS_A_TASK = 32;  // below this, waking another thread costs more than it saves

// Any eps argument as elements at strides, in the memory order of the images; dimensions that lie one after the other
// are merged, so that what broadcasts alike is one run.
class EpsReader {
 public:
  EpsReader(const Images& images, const Eps& eps);

  // Elements per chunk: whole runs of the innermost dimension where it is short, as in channels_last.
  int64_t chunk() const { return chunk_; }

  // eps of the images' elements [begin, begin + count). `buffer` holds CHUNK elements, filled by `prepare`.
  template <typename C>
  const C* read(int64_t begin, int64_t count, C* buffer) const {
    if (strides_[3] == 0 && sizes_[3] == numel_) return buffer;
    if (in_place_ == sizeof(C)) {
      const int64_t column = begin % sizes_[3];
      if (column + count <= sizes_[3]) return static_cast<const C*>(eps_.data) + offset(begin / sizes_[3]) + column;
    }
    decode(begin, count, buffer);
    return buffer;
  }

  template <typename C>
  void prepare(C* buffer) const {
    if (strides_[3] == 0 && sizes_[3] == numel_) decode(0, std::min(chunk_, numel_), buffer);
  }

 private:
  int64_t offset(int64_t row) const {
    int64_t result = 0;
    for (int d = 2; d >= 0; --d) {
      result += row % sizes_[d] * strides_[d];
      row /= sizes_[d];
    }
    return result;
  }
  void decode(int64_t begin, int64_t count, float* to) const;
  void decode(int64_t begin, int64_t count, double* to) const;

  Eps eps_;
  int64_t numel_, chunk_ = CHUNK;
  std::array<int64_t, 4> sizes_ = {1, 1, 1, 1}, strides_ = {};
  size_t in_place_ = 0;  // size of an element that can be read where it lies
};

// body(begin, count, eps) for each chunk, on all threads; eps points to the chunk's `count` values.
template <typename C, typename F>
void for_each_chunk(const Images& images, const Eps& eps, const F& body) {
  const int64_t numel = images.numel();
  if (numel == 0) return;
  const EpsReader reader(images, eps);
  const int64_t chunk = reader.chunk();
  parallel_for(0, (numel + chunk - 1) / chunk, CHUNKS_A_TASK, [&](int64_t first, int64_t last) {
    alignas(64) C buffer[CHUNK];
    reader.prepare(buffer);
    for (int64_t begin = first * chunk; begin < std::min(last * chunk, numel); begin += chunk) {
      const int64_t count = std::min(chunk, numel - begin);
      body(begin, count, reader.read(begin, count, buffer));
    }
  });
}

// The gradients of a projection for x_adv, x and eps; the last is empty where eps has no derivative.
struct Gradients {
  Tensor x_adv, x, eps;

  Gradients(const Tensor& grad_out, const std::optional<Tensor>& eps)
      : x_adv(empty_like(grad_out, grad_out.scalar_type())),
        x(empty_like(grad_out, grad_out.scalar_type())),
        eps(eps && eps->scalar_type() != ScalarType::Byte ? empty_like(grad_out, eps->scalar_type())
                                                          : empty(grad_out, {0}, grad_out.scalar_type())) {}
};

// One chunk of them, to be computed at x_adv, x and eps and then written. T is the images' type.
template <typename T>
class GradientsChunk {
 public:
  using C = compute_t<T>;
  C *x_adv, *x, *eps;

  GradientsChunk(const Gradients& to, int64_t at)
      : x_adv(place(mutable_data<T>(to.x_adv) + at, buffer_[0])),
        x(place(mutable_data<T>(to.x) + at, buffer_[1])),
        eps(buffer_[2]),
        to_(to),
        at_(at) {}

  void write(int64_t count) const {
    part_fast::write(x_adv, mutable_data<T>(to_.x_adv) + at_, count);
    part_fast::write(x, mutable_data<T>(to_.x) + at_, count);
    if (to_.eps.numel() == 0) return;
    dispatch(to_.eps.scalar_type(), [&](auto type) {
      using E = typename decltype(type)::type;
      E* to_eps = mutable_data<E>(to_.eps) + at_;
      if constexpr (std::is_same_v<E, C>) {
        std::copy_n(eps, count, to_eps);
      } else {
        part_fast::write(eps, to_eps, count);
      }
    });
  }

 private:
  const Gradients& to_;
  int64_t at_;
  alignas(64) C buffer_[3][CHUNK];
};

}  // namespace part_fast
