#include "images.h"

namespace part_fast {
namespace {

// Element `index` of an eps argument.
template <typename S, typename C>
struct Stored {
  const S* values;
  PF_HD C operator[](int64_t index) const { return static_cast<C>(load(values[index])); }
};

struct Bits {
  const uint8_t* bits;
  float set, unset;
  PF_HD float operator[](int64_t index) const { return bit_of(bits, index) ? set : unset; }
};

template <typename Source, typename C>
PF_HD void copy_run(const Source& source, int64_t index, int64_t stride, int64_t count, C* to) {
  if (stride == 0) {
    const C value = source[index];
    for (int64_t i = 0; i < count; ++i) to[i] = value;
  } else if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = source[index + i];
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = source[index + i * stride];
  }
}

template <typename T>
struct Quad {
  typedef T type __attribute__((vector_size(4 * sizeof(T)), aligned(alignof(T)), may_alias));
};

// A run of bits is read eight at a time.
template <typename C>
PF_HD void copy_run(Bits source, int64_t index, int64_t stride, int64_t count, C* to) {
  using Ints = Quad<int32_t>::type;
  using Floats = Quad<float>::type;
  using Values = typename Quad<C>::type;
  int64_t i = 0;
  if (stride == 1) {
    const Ints low = {1, 2, 4, 8}, high = {16, 32, 64, 128};
    const Floats set = Floats{} + source.set, unset = Floats{} + source.unset;
    for (; i < count && (index + i) % 8; ++i) to[i] = source[index + i];
    for (; i + 8 <= count; i += 8) {
      const int32_t byte = source.bits[(index + i) >> 3];
      const Floats first = (low & byte) != 0 ? set : unset, second = (high & byte) != 0 ? set : unset;
      *reinterpret_cast<Values*>(to + i) = __builtin_convertvector(first, Values);
      *reinterpret_cast<Values*>(to + i + 4) = __builtin_convertvector(second, Values);
    }
  }
  for (; i < count; ++i) to[i] = source[index + i * stride];
}

using Four = std::array<int64_t, 4>;

template <typename Source, typename C>
PF_HD void copy_chunk(const Source& source, const Four& sizes, const Four& strides, int64_t begin, int64_t count,
                      C* to) {
  Four at;
  for (int d = 3; d >= 0; --d) {
    at[d] = begin % sizes[d];
    begin /= sizes[d];
  }
  while (count > 0) {
    const int64_t index = at[0] * strides[0] + at[1] * strides[1] + at[2] * strides[2] + at[3] * strides[3];
    const int64_t rows = std::min(sizes[2] - at[2], count / sizes[3]);
    int64_t done;
    if (at[3] == 0 && rows > 0 && sizes[3] == 3) {
      // channels_last RGB: too short for a run of its own.
      C planes[3][CHUNK / 3];
      for (int j = 0; j < 3; ++j) {
        if (j == 0 || strides[3] != 0) copy_run(source, index + j * strides[3], strides[2], rows, planes[j]);
      }
      const C *red = planes[0], *green = strides[3] == 0 ? red : planes[1], *blue = strides[3] == 0 ? red : planes[2];
      PF_INDEPENDENT
      for (int64_t i = 0; i < rows; ++i) {
        to[3 * i] = red[i];
        to[3 * i + 1] = green[i];
        to[3 * i + 2] = blue[i];
      }
      done = 3 * rows;
      at[2] += rows;
    } else {
      done = std::min(sizes[3] - at[3], count);
      copy_run(source, index, strides[3], done, to);
      at[3] += done;
    }
    to += done;
    count -= done;
    for (int d = 3; d > 0; --d) {
      if (at[d] == sizes[d]) {
        at[d] = 0;
        ++at[d - 1];
      }
    }
  }
}

template <typename C>
PF_HD void copy_eps(const Eps& eps, const Four& sizes, const Four& strides, int64_t begin, int64_t count, C* to) {
  const auto stored = [&](auto type) __attribute__((always_inline)) {
    using S = typename decltype(type)::type;
    copy_chunk(Stored<S, C>{static_cast<const S*>(eps.data)}, sizes, strides, begin, count, to);
  };
  if (eps.form == Eps::SCALAR) {
    std::fill_n(to, count, static_cast<C>(eps.value));
  } else if (eps.form == Eps::BITS) {
    const Bits bits = {static_cast<const uint8_t*>(eps.data), eps.set, eps.unset};
    copy_chunk(bits, sizes, strides, begin, count, to);
  } else if (eps.dtype == ScalarType::Float) {
    stored(Type<float>{});
  } else if (eps.dtype == ScalarType::BFloat16) {
    stored(Type<BFloat16>{});
  } else if (eps.dtype == ScalarType::Half) {
    stored(Type<Half>{});
  } else {
    stored(Type<double>{});
  }
}

PF_CLONES void copy_eps_float(const Eps& eps, const Four& sizes, const Four& strides, int64_t begin, int64_t count,
                              float* to) {
  copy_eps(eps, sizes, strides, begin, count, to);
}

PF_CLONES void copy_eps_double(const Eps& eps, const Four& sizes, const Four& strides, int64_t begin, int64_t count,
                               double* to) {
  copy_eps(eps, sizes, strides, begin, count, to);
}

}  // namespace

EpsReader::EpsReader(const Images& images, const Eps& eps) : eps_(eps), numel_(images.numel()) {
  Four sizes = {images.n, images.c, images.h, images.w}, strides = eps.strides;
  if (eps.form == Eps::BITS) {
    // In bits. A mask starts on a byte of its own.
    const int64_t mask = 8 * eps.mask_bytes;
    strides = {eps.channels * mask, eps.channels == 1 ? 0 : mask, images.w, 1};
  } else if (eps.form == Eps::SCALAR) {
    strides = {};
  }
  if (images.channels_last) {
    sizes = {sizes[0], sizes[2], sizes[3], sizes[1]};
    strides = {strides[0], strides[2], strides[3], strides[1]};
  }
  int last = 3;
  sizes_[3] = sizes[3];
  strides_[3] = strides[3];
  for (int d = 2; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (sizes_[last] == 1) {
      sizes_[last] = sizes[d];
      strides_[last] = strides[d];
    } else if (strides[d] == strides_[last] * sizes_[last]) {
      sizes_[last] *= sizes[d];
    } else {
      --last;
      sizes_[last] = sizes[d];
      strides_[last] = strides[d];
    }
  }
  if (sizes_[3] < CHUNK / 16) chunk_ = CHUNK / (16 * sizes_[3]) * (16 * sizes_[3]);
  if (eps.form == Eps::DENSE && strides_[3] == 1) {
    if (eps.dtype == ScalarType::Float) in_place_ = sizeof(float);
    if (eps.dtype == ScalarType::Double) in_place_ = sizeof(double);
  }
}

void EpsReader::decode(int64_t begin, int64_t count, float* to) const {
  copy_eps_float(eps_, sizes_, strides_, begin, count, to);
}

void EpsReader::decode(int64_t begin, int64_t count, double* to) const {
  copy_eps_double(eps_, sizes_, strides_, begin, count, to);
}

}  // namespace part_fast
