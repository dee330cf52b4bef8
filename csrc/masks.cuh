// Which pixels of an enlarged map a rule keeps: one kernel body for cam_mask and epsilon_map. See cam_mask.h.
#pragma once

#include "maps.cuh"

namespace part_fast {

// Not in constant memory, from which threads that want different entries are served one after the other.
__device__ const Jet JET = make_jet();

// An unsigned integer in the order of the values, with -0 and 0 alike.
__device__ __forceinline__ uint32_t ordered(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

__device__ __forceinline__ uint64_t ordered(double value) {
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(value + 0.0));
  return bits ^ (bits >> 63 ? ~uint64_t{0} : uint64_t{1} << 63);
}

// Which pixels of one image a rule keeps: it looks at the whole map a few times, then chooses.
template <typename C, int RULE>
class Chosen {
 public:
  using Key = decltype(ordered(C()));
  static constexpr int DIGITS = sizeof(Key);  // of 8 bits

  // What the looks found out, in shared memory, the same for the whole block.
  struct State {
    double mean, deviation;  // zscore, released
    Key prefix;              // quantile: the k-th largest key, its digits found so far
    int need;                // how many of the pixels with that prefix are kept
    int spare;               // and how many are not
  };
  static_assert(sizeof(State) <= Room::MAP - Room::STATE);

  __device__ __forceinline__ Chosen(int k, int pixels) : pixels_(pixels) {
    if (threadIdx.x == 0) {
      state().prefix = 0;
      state().need = k;
    }
  }

  static constexpr int LOOKS = RULE == QUANTILE ? DIGITS : 1;

  __device__ __forceinline__ void begin() {
    if constexpr (RULE != ZSCORE) {
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < 256; i += blockDim.x) histogram()[i] = 0;
      __syncthreads();
    }
  }

  __device__ __forceinline__ void look(int round, int count, const C (&u)[QUAD]) {
#pragma unroll
    for (int i = 0; i < QUAD; ++i) {
      if constexpr (RULE == ZSCORE) {
        const double value = i < count ? u[i] : C(0);
        sum_ += value;
        squares_ += value * value;
      } else if constexpr (RULE == RELEASED) {
        if (i < count) atomicAdd(&histogram()[colour_of(u[i])], 1);
      } else {
        const int shift = 8 * (DIGITS - 1 - round);
        const Key key = ordered(u[i]) >> shift;
        // The digits above this one are decided.
        const bool alike = round == 0 || (key ^ state().prefix >> shift) >> 8 == 0;
        if (i < count && alike) atomicAdd(&histogram()[key & 255], 1);
      }
    }
  }

  __device__ __forceinline__ void end(int round) {
    __syncthreads();
    if constexpr (RULE == QUANTILE) {
      decide_digit(round);
    } else {
      decide_moments();
    }
    if constexpr (RULE == RELEASED) {
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < COLOURS; i += blockDim.x) {
        uint32_t word = 0;
#pragma unroll 1
        for (int c = 0; c < 3; ++c) word |= (JET.value[i][c] - state().mean > state().deviation) << (i % 8 * 4 + c);
#pragma unroll 1
        for (int lanes = 1; lanes < 8; lanes *= 2) word |= __shfl_xor_sync(0xffffffffu, word, lanes);
        if (i % 8 == 0) table()[i / 8] = word;
      }
      __syncthreads();
    }
  }

  // Bit i of byte c: whether pixel i of a quad is kept in channel c. To be called by the whole block, in order.
  __device__ __forceinline__ uint32_t choose(int count, const C (&u)[QUAD]) {
    uint32_t kept = 0, ties = 0;
#pragma unroll
    for (int i = 0; i < QUAD; ++i) {
      uint32_t channels;
      if constexpr (RULE == ZSCORE) {
        channels = u[i] - state().mean > state().deviation;
      } else if constexpr (RULE == RELEASED) {
        const int colour = colour_of(u[i]);
        channels = table()[colour / 8] >> colour % 8 * 4;
        channels = (channels & 1) | (channels & 2) << 7 | (channels & 4) << 14;
      } else {
        const Key key = ordered(u[i]);
        channels = key > state().prefix;
        ties |= (i < count && key == state().prefix ? 1u : 0u) << i;
      }
      kept |= (i < count ? channels : 0u) << i;
    }
    return RULE == QUANTILE ? kept | (state().spare == 0 ? ties : first_ties(ties)) : kept;
  }

 private:
  __device__ __forceinline__ State& state() const { return *reinterpret_cast<State*>(block_room() + Room::STATE); }
  __device__ __forceinline__ int* histogram() const { return reinterpret_cast<int*>(block_room() + Room::HISTOGRAM); }
  // The channels that each colour is kept in, four bits: a word for each bank.
  __device__ __forceinline__ uint32_t* table() const { return reinterpret_cast<uint32_t*>(block_room() + Room::TABLE); }
  // One for each colour, where the map was: every band is prepared by now, or will be again.
  __device__ __forceinline__ double* terms() const { return reinterpret_cast<double*>(block_room() + Room::MAP); }
  __device__ __forceinline__ double* room() const { return reinterpret_cast<double*>(block_room() + Room::REDUCTION); }

  // The mean, then the deviation from it.
  __device__ __forceinline__ void decide_moments() const {
    if constexpr (RULE == ZSCORE) {
      const int warps = static_cast<int>(blockDim.x) / 32;
      const double sum = reduce_warp(sum_, Add()), squares = reduce_warp(squares_, Add());
      if (threadIdx.x % 32 == 0) {
        room()[threadIdx.x / 32] = sum;
        room()[warps + threadIdx.x / 32] = squares;
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        // One after the other: a division in float64 takes many registers.
#pragma unroll 1
        for (int moment = 0; moment < 2; ++moment) {
          double result = room()[moment * warps];
#pragma unroll 4
          for (int i = 1; i < warps; ++i) result += room()[moment * warps + i];
          result /= pixels_;
          // u lies around [0,1] and its map is not flat: nothing is lost by this form in float64.
          if (moment == 1) result = sqrt(max(result - state().mean * state().mean, 0.0));
          (moment == 0 ? state().mean : state().deviation) = result;
        }
      }
      __syncthreads();
    } else {
#pragma unroll 1
      for (int moment = 0; moment < 2; ++moment) {
        const double result = over_colours(moment) / (3.0 * pixels_);
        if (threadIdx.x == 0) {
          (moment == 0 ? state().mean : state().deviation) = moment == 0 ? result : sqrt(max(result, 0.0));
        }
        __syncthreads();
      }
    }
  }

  // The sum over the colours of their count times their values, or their squared deviations, in the order of the
  // reference: eight interleaved sums, then their sum. For the first warp.
  __device__ __forceinline__ double over_colours(int moment) const {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < COLOURS; i += blockDim.x) {
      terms()[i] = histogram()[i] * (moment == 0 ? sum_of(JET.value[i]) : squares_of(JET.value[i], state().mean));
    }
    __syncthreads();
    if (threadIdx.x >= 32) return 0;
    double mine = 0;
#pragma unroll 8
    for (int i = static_cast<int>(threadIdx.x) % LANES; i < COLOURS; i += LANES) mine += terms()[i];
    double sum = __shfl_sync(0xffffffffu, mine, 0);
#pragma unroll
    for (int i = 1; i < LANES; ++i) sum += __shfl_sync(0xffffffffu, mine, i);
    return sum;
  }

  // The next digit of the k-th largest key: the first warp adds up the histogram from its upper end, a digit a lane.
  __device__ __forceinline__ void decide_digit(int round) const {
    if (threadIdx.x < 32) {
      const int need = state().need;
      int digit = 255 - static_cast<int>(threadIdx.x), above = 0, mine;
#pragma unroll 1
      for (;; digit -= 32) {
        mine = histogram()[digit];
        const int together = __reduce_add_sync(0xffffffffu, mine);
        if (above + together >= need) break;
        above += together;
      }
      above += up_to(mine, threadIdx.x) - mine;
      __syncwarp();
      if (above < need && need <= above + mine) {
        state().prefix |= static_cast<Key>(digit) << 8 * (DIGITS - 1 - round);
        state().need = need - above;
        state().spare = mine - (need - above);
      }
    }
    __syncthreads();
  }

  // Of pixels equal to the k-th largest, those that still fit, by lower index.
  __device__ __forceinline__ uint32_t first_ties(uint32_t ties) const {
    int* const warps = reinterpret_cast<int*>(room());
    const int mine = __popc(ties), warp = static_cast<int>(threadIdx.x) / 32;
    int before = up_to(mine, threadIdx.x % 32);
    __syncthreads();
    if (threadIdx.x % 32 == 31) warps[warp] = before;
    __syncthreads();
    int left = state().need + mine - before;
#pragma unroll 1
    for (int i = 0; i < warp; ++i) left -= warps[i];
    __syncthreads();
    // The last thread knows what all of them took.
    if (threadIdx.x == blockDim.x - 1) state().need = left - mine;
    uint32_t kept = 0;
#pragma unroll
    for (int i = 0; i < QUAD; ++i) {
      if ((ties >> i & 1) != 0 && left-- > 0) kept |= 1u << i;
    }
    return kept;
  }

  // Sum of `value` over the lanes up to this one.
  __device__ __forceinline__ static int up_to(int value, int lane) {
#pragma unroll 1
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, value, lanes);
      if (lane >= lanes) value += other;
    }
    return value;
  }

  int pixels_;
  double sum_ = 0, squares_ = 0;
};

// write(first, count, kept, u) for every quad of the block's image, in order: `kept` as Chosen::choose gives it.
template <int RULE, typename C, typename F>
__device__ __forceinline__ void each_choice(const Maps<C>& maps, int k, const F& write) {
  Enlarged<C> enlarged(maps);
  if constexpr (RULE == SOFT) {
    enlarged.each([&](int first, int count, const C(&u)[QUAD]) { write(first, count, 0u, u); });
  } else {
    Chosen<C, RULE> chosen(k, maps.pixels);
    const int looks = enlarged.evidence() ? chosen.LOOKS : 0;
#pragma unroll 1
    for (int round = 0; round <= looks; ++round) {
      if (round < looks) chosen.begin();
      enlarged.each([&](int first, int count, const C(&u)[QUAD]) {
        if (round < looks) {
          chosen.look(round, count, u);
        } else {
          write(first, count, looks > 0 ? chosen.choose(count, u) : 0u, u);
        }
      });
      if (round < looks) chosen.end(round);
    }
  }
}

// f(Constant<rule>{}) with one of the rules RULES.
template <int RULE>
using Constant = std::integral_constant<int, RULE>;

template <int... RULES, typename F>
void on_rule(int64_t rule, const F& f) {
  ((rule == RULES ? f(Constant<RULES>()) : void()), ...);
}

}  // namespace part_fast
