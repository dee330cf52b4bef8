// What a translated kernel includes after its own code, which is:
//   struct Warp : WarpState                    its registers
//   bool needs(Block&, Warp&, pc, lanes, ...)  whether what stands at pc takes other lanes too, and which
//   void step(Block&, Warp&, pc, lanes)        runs the code at pc
// Blocks run one after another. The warps of a block take turns, each until it ends or all its lanes wait.
#pragma once
#include "runtime.h"

// Runs a warp: the lanes that are furthest behind go first, so that lanes that parted meet again. Whether it got ahead.
static bool run_warp(Block& b, Warp& w) {
  for (bool ahead = false;; ahead = true) {
    u32 candidates = w.live & ~w.at_barrier;
    if (!candidates) return ahead;
    if (++w.steps > b.launch->max_steps) throw Fault("step limit reached: does the kernel end?");
    // A warp that waits in a loop for another one lets it run.
    if (w.steps % 65536 == 0) return true;
    bool stepped = false, waits = false;
    u32 named = 0, arrived = 0;
    int waiting = 0;
    while (candidates && !stepped) {
      u32 pc = ~0u, lanes = 0;
      LANES(candidates) pc = std::min(pc, w.pc[l]);
      LANES(candidates) if (w.pc[l] == pc) lanes |= 1u << l;
      u32 members;
      int instruction;
      if (needs(b, w, pc, lanes, members, instruction)) {
        if (members & w.live & ~lanes || !(lanes & members)) {  // some are not there yet
          waits = true;
          waiting = instruction, named = members, arrived = lanes;
          candidates &= ~lanes;
          continue;
        }
        lanes &= members;
      }
      step(b, w, pc, lanes);
      stepped = true;
    }
    if (stepped) continue;
    if (waits && !(w.at_barrier & named)) {
      char text[500];
      snprintf(text, sizeof text, "lanes 0x%x never arrive, 0x%x of 0x%x did: cta=(%u,%u,%u) warp=%u instr: %s",
               named & w.live & ~arrived, arrived, named, b.index[0], b.index[1], b.index[2], w.index,
               INSTRUCTIONS[waiting]);
      throw Fault(text);
    }
    return ahead;
  }
}

// Lets go on who waits at a barrier that as many threads have reached as it takes. Whether anybody does.
static bool open_barriers(Block& b, std::vector<Warp>& warps) {
  u32 live = 0, count[16] = {}, expected[16] = {};
  for (Warp& w : warps) {
    live += __builtin_popcount(w.live);
    LANES(w.at_barrier) {
      u32 barrier = w.barrier[l];
      if (barrier > 15) throw Fault("barriers have numbers from 0 to 15");
      count[barrier]++;
      expected[barrier] = w.expected[l];
    }
  }
  bool opened = false;
  for (u32 barrier = 0; barrier < 16; barrier++) {
    if (!count[barrier] || count[barrier] < (expected[barrier] ? expected[barrier] : live)) continue;
    for (Warp& w : warps) LANES(w.at_barrier) if (w.barrier[l] == barrier) w.at_barrier &= ~(1u << l);
    b.epoch++;
    opened = true;
  }
  return opened;
}

static u64 random_number(u64& state) {
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}

static void run_block(Launch& launch, u64 number) {
  Block b;
  b.launch = &launch;
  b.index[0] = number % launch.grid[0];
  b.index[1] = number / launch.grid[0] % launch.grid[1];
  b.index[2] = number / launch.grid[0] / launch.grid[1];
  b.threads = launch.block[0] * launch.block[1] * launch.block[2];
  b.epoch = 1;
  const u32 warp_count = (b.threads + 31) / 32;
  b.local_size = (LOCAL_BYTES + 15) / 16 * 16;
  b.local.assign((size_t)b.local_size * 32 * warp_count, launch.fill);
  b.shared.assign(DYNAMIC_SHARED + launch.shared_bytes, launch.fill);
  if (launch.race) {
    b.written.assign(b.shared.size(), 0);
    b.read.assign(b.shared.size(), 0);
  }
  static std::vector<Warp> warps;
  warps.resize(warp_count);
  std::vector<u32> order(warp_count);
  for (u32 i = 0; i < warp_count; i++) {
    Warp& w = warps[i];
    memset((void*)&w, launch.fill, sizeof w);  // registers hold what nobody wrote
    w.index = order[i] = i;
    w.live = w.at_barrier = 0;
    w.steps = 0;
    for (int l = 0; l < 32; l++) {
      u32 thread = i * 32 + l;
      w.pc[l] = 0;
      if (thread < b.threads) w.live |= 1u << l;
      w.thread[0][l] = thread % launch.block[0];
      w.thread[1][l] = thread / launch.block[0] % launch.block[1];
      w.thread[2][l] = thread / launch.block[0] / launch.block[1];
    }
  }
  u64 random = launch.seed * 7919 + b.linear() * 104729 + 12345;
  while (true) {
    if (launch.seed)
      for (u32 i = warp_count - 1; i > 0; i--) std::swap(order[i], order[random_number(random) % (i + 1)]);
    bool ahead = false;
    u32 live = 0;
    for (u32 i : order) ahead |= run_warp(b, warps[i]);
    for (Warp& w : warps) {
      w.at_barrier &= w.live;
      live |= w.live;
    }
    if (!live) return;
    ahead |= open_barriers(b, warps);
    if (!ahead) {
      char text[200];
      snprintf(text, sizeof text, "deadlock: some threads wait at a barrier that others never reach: cta=(%u,%u,%u)",
               b.index[0], b.index[1], b.index[2]);
      throw Fault(text);
    }
  }
}

extern "C" int run_blocks(Launch* launch, const u64* blocks, u64 count) {
  try {
    for (u64 i = 0; i < count; i++) run_block(*launch, blocks[i]);
  } catch (const std::exception& fault) {
    snprintf(launch->error, launch->error_size, "%s", fault.what());
    return 1;
  }
  return 0;
}
