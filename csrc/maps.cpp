#include "maps.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace part_fast {
namespace {

// Four values of memory, anywhere in it.
template <typename T>
struct Four {
  typedef T type __attribute__((vector_size(4 * sizeof(T)), aligned(alignof(T)), may_alias));
};

// Four values in registers; two of these are the eight running sums.
typedef double Doubles __attribute__((vector_size(4 * sizeof(double))));

// Sum of the values, each made its term in place by `term`, in the order that cam_mask.h fixes.
template <typename T, typename F>
PF_HD double ordered_sum(const T* values, int64_t count, const F& term) {
  Doubles first = {}, second = {};
  int64_t p = 0;
  for (; p + LANES <= count; p += LANES) {
    using Values = typename Four<T>::type;
    Doubles low = __builtin_convertvector(*reinterpret_cast<const Values*>(values + p), Doubles);
    Doubles high = __builtin_convertvector(*reinterpret_cast<const Values*>(values + p + 4), Doubles);
    term(low);
    term(high);
    first += low;
    second += high;
  }
  double sums[LANES];
  for (int lane = 0; lane < 4; ++lane) {
    sums[lane] = first[lane];
    sums[lane + 4] = second[lane];
  }
  for (int lane = 0; p + lane < count; ++lane) {
    double last = static_cast<double>(values[p + lane]);
    term(last);
    sums[lane % LANES] += last;
  }
  double total = sums[0];
  for (int lane = 1; lane < LANES; ++lane) total += sums[lane];
  return total;
}

// The values themselves, and their squared deviations, as terms.
struct Same {
  template <typename V>
  PF_HD void operator()(V&) const {}
};

struct Squared {
  double mean;
  template <typename V>
  PF_HD void operator()(V& values) const {
    values -= mean;
    values *= values;
  }
};

template <typename C>
struct Range {
  C low, high;
};

template <typename C>
PF_HD Range<C> range_of(const C* values, int64_t count) {
  C low[LANES], high[LANES];
  for (int lane = 0; lane < LANES; ++lane) low[lane] = high[lane] = values[0];
  int64_t p = 0;
  for (; p + LANES <= count; p += LANES) {
    for (int lane = 0; lane < LANES; ++lane) {
      low[lane] = lower(low[lane], values[p + lane]);
      high[lane] = higher(high[lane], values[p + lane]);
    }
  }
  for (; p < count; ++p) {
    low[0] = lower(low[0], values[p]);
    high[0] = higher(high[0], values[p]);
  }
  for (int lane = 1; lane < LANES; ++lane) {
    low[0] = lower(low[0], low[lane]);
    high[0] = higher(high[0], high[lane]);
  }
  return {low[0], high[0]};
}

template <typename C>
PF_HD void normalize(C* values, int64_t count, C low, C high) {
  for (int64_t i = 0; i < count; ++i) values[i] = normalized(values[i], low, high);
}

// `tall` is the map with its axes exchanged: what one output column is made of then lies in a row, and is a vector.
template <typename C>
PF_HD void enlarge_columns(const C* small, const Axis<C>& columns, int64_t rows, C* tall, C* wide) {
  constexpr int64_t STRIP = 16;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < columns.in; ++i) tall[i * rows + row] = small[row * columns.in + i];
  }
  for (int64_t i = 0; i < columns.out; ++i) {
    const Taps<C>& t = columns.taps[i];
    const C *v0 = tall + t.index[0] * rows, *v1 = tall + t.index[1] * rows, *v2 = tall + t.index[2] * rows,
            *v3 = tall + t.index[3] * rows;
    const C w0 = t.weight[0], w1 = t.weight[1], w2 = t.weight[2], w3 = t.weight[3];
    for (int64_t first = 0; first < rows; first += STRIP) {
      const int64_t count = std::min(STRIP, rows - first);
      C strip[STRIP];
      for (int64_t j = 0; j < count; ++j) {
        const int64_t row = first + j;
        strip[j] = interpolate(v0[row], v1[row], v2[row], v3[row], w0, w1, w2, w3);
      }
      for (int64_t j = 0; j < count; ++j) wide[(first + j) * columns.out + i] = strip[j];
    }
  }
}

template <typename C>
PF_HD void enlarge_rows(const C* wide, const Axis<C>& rows, int64_t width, C* u) {
  for (int64_t row = 0; row < rows.out; ++row) {
    const Taps<C>& t = rows.taps[row];
    const C *v0 = wide + t.index[0] * width, *v1 = wide + t.index[1] * width, *v2 = wide + t.index[2] * width,
            *v3 = wide + t.index[3] * width;
    const C w0 = t.weight[0], w1 = t.weight[1], w2 = t.weight[2], w3 = t.weight[3];
    C* to = u + row * width;
    PF_INDEPENDENT
    for (int64_t i = 0; i < width; ++i) to[i] = interpolate(v0[i], v1[i], v2[i], v3[i], w0, w1, w2, w3);
  }
}

template <typename C>
PF_HD void enlarge_map(C* small, Range<C> range, const Axis<C>& rows, const Axis<C>& columns, C* tall, C* wide, C* u) {
  normalize(small, rows.in * columns.in, range.low, range.high);
  enlarge_columns(small, columns, rows.in, tall, wide);
  enlarge_rows(wide, rows, columns.out, u);
}

// The least value that lies more than `std` above `mean`, both compared in float64. Rounding keeps order, so this one
// value decides for every pixel, and the pixels need not become float64.
template <typename C>
C least_above(double mean, double std) {
  const auto above = [&](C value) { return static_cast<double>(value) - mean > std; };
  const C infinity = std::numeric_limits<C>::infinity();
  C value = static_cast<C>(mean + std);
  while (above(value)) value = std::nextafter(value, -infinity);
  while (!above(value)) value = std::nextafter(value, infinity);
  return value;
}

template <typename C>
PF_HD void zscore_mask(const C* u, int64_t pixels, uint8_t* mask) {
  const double mean = ordered_sum(u, pixels, Same{}) / static_cast<double>(pixels);
  const double variance = ordered_sum(u, pixels, Squared{mean}) / static_cast<double>(pixels);
  const double std = std::sqrt(variance);
  const C least = least_above<C>(mean, std);
  for (int64_t p = 0; p < pixels; ++p) mask[p] = u[p] >= least;
}

constexpr Jet JET = make_jet();

template <typename C>
PF_HD void released_mask(const C* u, int64_t pixels, uint8_t* colours, uint8_t* mask) {
  for (int64_t p = 0; p < pixels; ++p) colours[p] = static_cast<uint8_t>(colour_of(u[p]));
  int32_t counts[COLOURS] = {};
  for (int64_t p = 0; p < pixels; ++p) ++counts[colours[p]];
  double terms[COLOURS];
  const double values = 3.0 * static_cast<double>(pixels);
  for (int i = 0; i < COLOURS; ++i) terms[i] = counts[i] * sum_of(JET.value[i]);
  // cppcheck-suppress uninitvar // the loop sets every one
  const double mean = ordered_sum(terms, COLOURS, Same{}) / values;
  for (int i = 0; i < COLOURS; ++i) terms[i] = counts[i] * squares_of(JET.value[i], mean);
  const double std = std::sqrt(ordered_sum(terms, COLOURS, Same{}) / values);
  for (int channel = 0; channel < 3; ++channel) {
    uint8_t keeps[COLOURS];
    for (int i = 0; i < COLOURS; ++i) keeps[i] = JET.value[i][channel] - mean > std;
    for (int64_t p = 0; p < pixels; ++p) mask[channel * pixels + p] = keeps[colours[p]];
  }
}

template <typename C>
PF_HD void quantile_mask(const C* u, int64_t pixels, int64_t k, C* sorted, uint8_t* mask) {
  std::copy_n(u, pixels, sorted);
  std::nth_element(sorted, sorted + k - 1, sorted + pixels, [](C a, C b) { return a > b; });
  const C least = sorted[k - 1];
  int64_t larger = 0;
  for (int64_t p = 0; p < pixels; ++p) larger += mask[p] = u[p] > least;
  int64_t ties = k - larger;
  for (int64_t p = 0; ties > 0; ++p) {
    if (u[p] == least) {
      mask[p] = 1;
      --ties;
    }
  }
}

PF_CLONES Range<float> range(const float* values, int64_t count) { return range_of(values, count); }

PF_CLONES Range<double> range(const double* values, int64_t count) { return range_of(values, count); }

PF_CLONES void enlarge(float* small, Range<float> range, const Axis<float>& rows, const Axis<float>& columns,
                       float* tall, float* wide, float* u) {
  enlarge_map(small, range, rows, columns, tall, wide, u);
}

PF_CLONES void enlarge(double* small, Range<double> range, const Axis<double>& rows, const Axis<double>& columns,
                       double* tall, double* wide, double* u) {
  enlarge_map(small, range, rows, columns, tall, wide, u);
}

PF_CLONES void zscore(const float* u, int64_t pixels, uint8_t* mask) { zscore_mask(u, pixels, mask); }

PF_CLONES void zscore(const double* u, int64_t pixels, uint8_t* mask) { zscore_mask(u, pixels, mask); }

PF_CLONES void released(const float* u, int64_t pixels, uint8_t* colours, uint8_t* mask) {
  released_mask(u, pixels, colours, mask);
}

PF_CLONES void released(const double* u, int64_t pixels, uint8_t* colours, uint8_t* mask) {
  released_mask(u, pixels, colours, mask);
}

}  // namespace

template <typename C>
void Upsampler<C>::find_range() {
  const Range<C> found = range(map.data(), static_cast<int64_t>(map.size()));
  low = found.low;
  high = found.high;
}

template <typename C>
void Upsampler<C>::enlarge(C* u) {
  part_fast::enlarge(map.data(), {low, high}, rows, columns, tall_.data(), wide_.data(), u);
}

template <typename C>
void Rules<C>::operator()(const C* u, uint8_t* mask) {
  if (rule_ == ZSCORE) {
    zscore(u, pixels_, mask);
  } else if (rule_ == RELEASED) {
    released(u, pixels_, colours_.data(), mask);
  } else {
    quantile_mask(u, pixels_, k_, sorted_.data(), mask);
  }
}

template class Upsampler<float>;
template class Upsampler<double>;
template class Rules<float>;
template class Rules<double>;

}  // namespace part_fast
