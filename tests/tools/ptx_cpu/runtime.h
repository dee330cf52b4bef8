// What a translated kernel includes before its own code: arithmetic as PTX defines it, memory with checks, counters.
// A warp has 32 lanes; a set of lanes is a mask of 32 bits.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <type_traits>
#include <vector>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using u128 = unsigned __int128;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;

// Inlined in unoptimised builds as well, which would be twice as slow otherwise.
#define INLINE static inline __attribute__((always_inline))

template <class To, class From>
INLINE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}
INLINE f32 as_f32(u32 bits) { return bit_cast<f32>(bits); }
INLINE f64 as_f64(u64 bits) { return bit_cast<f64>(bits); }
INLINE u32 bits_of(f32 value) { return bit_cast<u32>(value); }
INLINE u64 bits_of(f64 value) { return bit_cast<u64>(value); }

// ---- 16-bit floating point

INLINE f32 f16_to_f32(u16 bits) { return (f32)bit_cast<_Float16>(bits); }
INLINE u16 f32_to_f16(f32 value) { return value != value ? 0x7fff : bit_cast<u16>((_Float16)value); }
INLINE u16 f64_to_f16(f64 value) { return value != value ? 0x7fff : bit_cast<u16>((_Float16)value); }
INLINE f32 bf16_to_f32(u16 bits) { return as_f32((u32)bits << 16); }
INLINE u16 f32_to_bf16(f32 value) {
  u32 bits = bits_of(value);
  if (value != value) return 0x7fff;
  return (u16)((bits + ((bits >> 16) & 1) + 0x7fff) >> 16);
}
// Rounded once: what float32 cannot hold becomes a last bit of 1, which no tie has.
INLINE u16 f64_to_bf16(f64 value) {
  f32 nearest = (f32)value;
  if ((f64)nearest != value && std::isfinite(nearest)) {
    u32 bits = bits_of(nearest);
    if (std::fabs((f64)nearest) > std::fabs(value)) bits -= 1;
    nearest = as_f32(bits | 1);
  }
  return f32_to_bf16(nearest);
}

// ---- floating point

INLINE f32 flush(f32 x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.f, x) : x; }
template <class T>
INLINE T saturate(T x) {
  return !(x > 0) ? T(0) : x > 1 ? T(1) : x;
}
INLINE f32 canonical(f32 x) { return x != x ? as_f32(0x7fffffff) : x; }
// Of a number and a NaN the number; -0 is smaller than 0.
template <class T>
INLINE T min_number(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class T>
INLINE T max_number(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}
template <class T>
INLINE T min_nan(T a, T b) {
  return a != a || b != b ? std::numeric_limits<T>::quiet_NaN() : min_number(a, b);
}
template <class T>
INLINE T max_nan(T a, T b) {
  return a != a || b != b ? std::numeric_limits<T>::quiet_NaN() : max_number(a, b);
}

enum Rounding { NEAREST, ZERO, DOWN, UP };
template <class T>
INLINE T round_to_integer(T x, Rounding rounding) {
  switch (rounding) {
    case NEAREST:
      return std::nearbyint(x);
    case ZERO:
      return std::trunc(x);
    case DOWN:
      return std::floor(x);
    default:
      return std::ceil(x);
  }
}
// The nearest value that the integer type has; of NaN 0, or the lowest of 64 bits.
template <class To, class From>
INLINE To to_integer(From x, Rounding rounding) {
  if (x != x) return sizeof(To) == 8 ? (To)0x8000000000000000ull : (To)0;
  From rounded = round_to_integer(x, rounding);
  if ((f64)rounded <= (f64)std::numeric_limits<To>::min()) return std::numeric_limits<To>::min();
  if ((f64)rounded >= (f64)std::numeric_limits<To>::max()) return std::numeric_limits<To>::max();
  return (To)rounded;
}

// ---- integers

template <class To, class From>
INLINE To clamp_to(From x) {
  __int128 value = x, low = std::numeric_limits<To>::min(), high = std::numeric_limits<To>::max();
  return (To)(value < low ? low : value > high ? high : value);
}
template <class T>
INLINE T multiply_high(T a, T b) {
  using Wide = std::conditional_t<std::is_signed<T>::value, __int128, u128>;
  return (T)(((Wide)a * (Wide)b) >> (8 * sizeof(T)));
}
template <class T>
INLINE T divide(T a, T b) {
  if (b == 0) return (T)-1;
  if (std::is_signed<T>::value && b == (T)-1) return (T)(0 - (std::make_unsigned_t<T>)a);
  return a / b;
}
template <class T>
INLINE T remainder_of(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed<T>::value && b == (T)-1) return 0;
  return a % b;
}
template <class T>
INLINE T shift_left(T a, u32 count) {
  return count >= 8 * sizeof(T) ? 0 : (T)(a << count);
}
// Signed types fill with the sign.
template <class T>
INLINE T shift_right(T a, u32 count) {
  const u32 most = 8 * sizeof(T) - 1;
  if (count > most) return std::is_signed<T>::value ? (T)(a >> most) : (T)0;
  return (T)(a >> count);
}
INLINE u32 lop3(u32 a, u32 b, u32 c, int table) {
  u32 result = 0;
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
INLINE u32 permute_bytes(u32 a, u32 b, u32 selectors) {
  u64 bytes = ((u64)b << 32) | a;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    u32 selector = (selectors >> (4 * i)) & 15;
    u8 byte = (u8)(bytes >> (8 * (selector & 7)));
    if (selector & 8) byte = byte & 0x80 ? 0xff : 0;  // its sign, eight times
    result |= (u32)byte << (8 * i);
  }
  return result;
}
template <class T>
INLINE T extract_bits(T a, u32 first, u32 count) {
  using U = std::make_unsigned_t<T>;
  const u32 bits = 8 * sizeof(T);
  first &= 255;
  count &= 255;
  if (count == 0) return 0;
  bool sign = std::is_signed<T>::value && ((U)a >> std::min(first + count - 1, bits - 1)) & 1;
  U result = 0;
  for (u32 i = 0; i < bits; i++) {
    bool bit = i < count && first + i < bits ? ((U)a >> (first + i)) & 1 : sign;
    result |= (U)bit << i;
  }
  return (T)result;
}
template <class U>
INLINE U insert_bits(U from, U into, u32 first, u32 count) {
  first &= 255;
  count &= 255;
  for (u32 i = 0; i < count && first + i < 8 * sizeof(U); i++) {
    U bit = (U)1 << (first + i);
    into = (into & ~bit) | ((from >> i) & 1 ? bit : 0);
  }
  return into;
}
template <class U>
INLINE U reverse_bits(U x) {
  U result = 0;
  for (u32 i = 0; i < 8 * sizeof(U); i++) result |= ((x >> i) & 1) << (8 * sizeof(U) - 1 - i);
  return result;
}
template <class T>
INLINE u32 highest_bit(T x) {
  using U = std::make_unsigned_t<T>;
  U value = x < 0 ? ~(U)x : (U)x;
  for (int i = 8 * sizeof(T) - 1; i >= 0; i--)
    if ((value >> i) & 1) return i;
  return 0xffffffffu;
}

// ---- a launch, its blocks and their warps

// Memory that the kernel may access. `touched` has a byte for each sector of 32 bytes: 1 read, 2 written.
struct Region {
  u64 first, end;
  u8* touched;
};
struct Counts {  // of one instruction that accesses global memory
  u64 requests, sectors, bytes;
};
struct Launch {
  u32 grid[3], block[3];
  u32 shared_bytes, parameter_bytes;
  u8* parameters;
  Region* regions;
  u32 region_count;
  Counts* counts;
  u32 stats, race, fill;
  u64 seed, max_steps;
  char* error;
  u32 error_size;
  u64 shared_requests, shared_conflicts, shared_atomics, shared_atomic_conflicts;
};
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};
extern const char* const INSTRUCTIONS[];

struct WarpState {
  u32 index;
  u32 pc[32];      // the block of the translated kernel where each lane is
  u32 live;        // lanes that have not returned
  u32 at_barrier;  // lanes that wait, each at `barrier`, for as many threads as `expected`; 0: all
  u32 barrier[32], expected[32];
  u64 steps;
};
struct Block {
  Launch* launch;
  u32 index[3];
  u32 threads;
  u32 local_size;  // of each thread
  u32 epoch;       // barriers passed, and 1
  std::vector<u8> shared, local;
  // Of each shared byte, where races are looked for: the warp that wrote and the one that read it last, and when.
  std::vector<u64> written, read;
  u64 linear() { return ((u64)index[2] * launch->grid[1] + index[1]) * launch->grid[0] + index[0]; }
};

#define LANES(mask)                                       \
  for (u32 lanes_ = (mask); lanes_; lanes_ &= lanes_ - 1) \
    if (const int l = __builtin_ctz(lanes_); true)
#define SET_PREDICATE(mask, value) (mask = (mask & ~(1u << l)) | ((value) ? 1u << l : 0u))

[[noreturn]] static void fail(Block& b, WarpState& w, int lane, int instruction, const char* what, u64 address) {
  char text[700];
  snprintf(text, sizeof text, "%s addr=0x%llx cta=(%u,%u,%u) thread=%u instr: %s", what, (unsigned long long)address,
           b.index[0], b.index[1], b.index[2], w.index * 32 + lane, INSTRUCTIONS[instruction]);
  throw Fault(text);
}

// ---- memory

enum Space { GENERIC, GLOBAL, SHARED, LOCAL, PARAMETER };
enum Access { READ = 1, WRITE = 2, ATOMIC = 3 };
// Generic addresses of shared and of local memory.
static const u64 SHARED_WINDOW = 0x0700000000000000ull, LOCAL_WINDOW = 0x0600000000000000ull, WINDOW_SIZE = 0x1000000;

INLINE bool in_window(u64 address, u64 window) { return address >= window && address < window + WINDOW_SIZE; }

INLINE u8* global_memory(Block& b, WarpState& w, int lane, u64 address, u32 size, Access access, int instruction) {
  static u32 last = 0;
  Launch& launch = *b.launch;
  for (u32 i = 0; i <= launch.region_count; i++) {
    u32 place = i ? i - 1 : last;  // where the last access was, first
    if (place >= launch.region_count) continue;
    Region& region = launch.regions[place];
    if (address < region.first || address >= region.end || size > region.end - address) continue;
    last = place;
    if (launch.stats) region.touched[address / 32 - region.first / 32] |= access & WRITE ? WRITE : READ;
    return (u8*)address;
  }
  fail(b, w, lane, instruction, access & WRITE ? "global write out of bounds" : "global read out of bounds", address);
}

// Two warps access a byte, no barrier between them, one of them writes, and not both by an atomic operation.
static void find_race(Block& b, WarpState& w, int lane, u64 address, u32 size, Access access, int instruction) {
  const u64 warp = w.index + 1, many = 0xffff, atomic = (u64)1 << 63;
  const u64 now = warp << 32 | b.epoch;
  auto by_another = [&](u64 mark) { return (u32)mark == b.epoch && (mark >> 32 & 0xffff) != warp; };
  for (u64 at = address; at < address + size; at++) {
    u64 &written = b.written[at], &read = b.read[at];
    bool race = by_another(written) && !(access == ATOMIC && written & atomic);
    race |= access & WRITE && by_another(read);
    if (race) fail(b, w, lane, instruction, "shared-memory race", address);
    if (access == ATOMIC)
      written = written == now ? now : now | atomic;  // its own plain write before it counts still
    else if (access == WRITE)
      written = now;
    else
      read = by_another(read) ? many << 32 | b.epoch : now;
  }
}

INLINE u8* memory(Space space, Block& b, WarpState& w, int lane, u64 address, u32 size, Access access,
                  int instruction) {
  if (address % size) fail(b, w, lane, instruction, "misaligned access", address);
  if (space == GENERIC) {
    space = GLOBAL;
    if (in_window(address, SHARED_WINDOW)) {
      space = SHARED;
      address -= SHARED_WINDOW;
    } else if (in_window(address, LOCAL_WINDOW)) {
      space = LOCAL;
      address -= LOCAL_WINDOW;
    }
  }
  if (space == GLOBAL) return global_memory(b, w, lane, address, size, access, instruction);
  address = (u32)address;
  if (space == SHARED) {
    if (address + size > b.shared.size()) fail(b, w, lane, instruction, "shared access out of bounds", address);
    if (b.launch->race) find_race(b, w, lane, address, size, access, instruction);
    return b.shared.data() + address;
  }
  if (space == LOCAL) {
    if (address + size > b.local_size) fail(b, w, lane, instruction, "local access out of bounds", address);
    return b.local.data() + (size_t)(w.index * 32 + lane) * b.local_size + address;
  }
  if (address + size > b.launch->parameter_bytes)
    fail(b, w, lane, instruction, "parameter access out of bounds", address);
  return b.launch->parameters + address;
}
template <class T>
INLINE T load(const u8* from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}
template <class T>
INLINE void store(u8* to, T value) {
  memcpy(to, &value, sizeof value);
}

// ---- counters

// Of a warp's request: how many sectors of 32 bytes it moves. An access is aligned and so lies in one.
static void count_global(Launch& launch, int instruction, u32 lanes, const u64* addresses, u32 size) {
  u64 sectors[32];
  u32 accesses = 0;
  LANES(lanes) {
    if (!in_window(addresses[l], SHARED_WINDOW) && !in_window(addresses[l], LOCAL_WINDOW))
      sectors[accesses++] = addresses[l] / 32;
  }
  if (!accesses) return;
  std::sort(sectors, sectors + accesses);
  Counts& counts = launch.counts[instruction];
  counts.requests++;
  counts.sectors += std::unique(sectors, sectors + accesses) - sectors;
  counts.bytes += accesses * size;
}
// A warp's request is served in parts of at most 128 bytes; a part takes as many cycles as the most different words
// that one of the 32 banks is asked for.
static void count_shared(u32 lanes, const u64* addresses, u32 size, u64& requests, u64& conflicts) {
  const int at_once = size <= 4 ? 32 : size == 8 ? 16 : 8;
  for (int first = 0; first < 32; first += at_once) {
    std::vector<u64> banks[32];
    size_t cycles = 0;
    LANES(lanes) {
      if (l < first || l >= first + at_once) continue;
      for (u32 i = 0; i < std::max(1u, size / 4); i++) {
        u64 word = addresses[l] / 4 + i;
        auto& bank = banks[word % 32];
        if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
        cycles = std::max(cycles, bank.size());
      }
    }
    if (!cycles) continue;
    requests++;
    conflicts += cycles - 1;
  }
}
static void count(Launch& launch, Space space, int instruction, u32 lanes, const u64* addresses, u32 size,
                  Access access) {
  if (!launch.stats) return;
  if (space == GLOBAL || space == GENERIC) count_global(launch, instruction, lanes, addresses, size);
  if (space != SHARED) return;
  if (access == ATOMIC)
    count_shared(lanes, addresses, size, launch.shared_atomics, launch.shared_atomic_conflicts);
  else
    count_shared(lanes, addresses, size, launch.shared_requests, launch.shared_conflicts);
}

// ---- exchange between lanes

enum Shuffle { SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_BFLY, SHUFFLE_IDX };
// The lane that `lane` reads from; itself, and `valid` false, where that is outside its segment.
INLINE int shuffle_source(Shuffle mode, int lane, u32 b, u32 c, bool& valid) {
  int by = b & 31, clamp = c & 31, segment = (c >> 8) & 31;
  int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
  int from = mode == SHUFFLE_UP     ? lane - by
             : mode == SHUFFLE_DOWN ? lane + by
             : mode == SHUFFLE_BFLY ? lane ^ by
                                    : first | (by & ~segment);
  valid = mode == SHUFFLE_UP ? from >= last : from <= last;
  return (valid ? from : lane) & 31;
}
