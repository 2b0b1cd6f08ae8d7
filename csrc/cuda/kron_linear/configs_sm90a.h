// Tiles of the Hopper GEMM with tails: which there are, how many stages fit, what a block takes. Read by the host and
// by the kernel.
//
// Source: derived (shared memory, registers, wave and L2 arithmetic); no row has been measured yet.
#pragma once

#include "common/configs.h"

namespace kronafuse::cuda {

// Two consumer warpgroups share a tile by its rows, or take whole tiles in turn (ping_pong), one multiplying while
// the other stores.
struct HopperForm {
  int tile_m;
  int tile_n;
  bool ping_pong;
};

constexpr HopperForm kHopperForms[] = {
    {128, 160, false}, {128, 160, true}, {64, 160, true}, {128, 128, false}, {128, 256, false}, {256, 128, false},
};
constexpr int kHopperFormCount = sizeof(kHopperForms) / sizeof(kHopperForms[0]);

constexpr int kHopperConsumers = 2;
constexpr int kHopperThreads = 128 * (1 + kHopperConsumers);
constexpr int kHopperBlockK = 64;                 // 128 bytes of 16-bit elements: a row of the widest swizzle
constexpr int kHopperSteps = kHopperBlockK / 16;  // wgmma's K
constexpr int kHopperChunkN = 64;                 // columns of y that are staged at a time, with 64 rows
constexpr int kHopperSharedLimit = 227 * 1024;
constexpr int kHopperSharedExtra = 2048;          // barriers, bias and K steps; HopperShared checks it

constexpr int hopper_stage_bytes(HopperForm form) { return (form.tile_m + form.tile_n) * kHopperBlockK * 2; }

constexpr int hopper_chunks_per_row(HopperForm form) { return (form.tile_n + kHopperChunkN - 1) / kHopperChunkN; }

// Places for chunks of y, per consumer: a row of them where the last chunk is narrow, so that it always has the last
// place.
constexpr int hopper_slots(HopperForm form) { return form.tile_n % kHopperChunkN ? hopper_chunks_per_row(form) : 2; }

constexpr int hopper_staging_bytes(HopperForm form) {
  return 64 * 2 * (form.tile_n % kHopperChunkN ? form.tile_n : 2 * kHopperChunkN);
}

// As many as fit.
constexpr int hopper_stages(HopperForm form) {
  return (kHopperSharedLimit - kHopperSharedExtra - kHopperConsumers * hopper_staging_bytes(form)) /
         hopper_stage_bytes(form);
}

constexpr int hopper_shared_bytes(HopperForm form) {
  return hopper_stages(form) * hopper_stage_bytes(form) + kHopperConsumers * hopper_staging_bytes(form) +
         kHopperSharedExtra;
}

constexpr Configuration hopper_configuration(const char* name, int form) {
  return {name,
          kHopperForms[form].tile_m,
          kHopperForms[form].tile_n,
          kHopperBlockK,
          hopper_stages(kHopperForms[form]),
          kHopperThreads,
          hopper_shared_bytes(kHopperForms[form])};
}

// Row 2·form + cluster - 1: blocks of a cluster have neighbouring rows and share each tile of W and L by multicast.
inline constexpr Configuration linear_sm90a_configurations[] = {
    hopper_configuration("128x160", 0),           hopper_configuration("128x160_cluster2", 0),
    hopper_configuration("128x160_pingpong", 1),  hopper_configuration("128x160_pingpong_cluster2", 1),
    hopper_configuration("64x160_pingpong", 2),   hopper_configuration("64x160_pingpong_cluster2", 2),
    hopper_configuration("128x128", 3),           hopper_configuration("128x128_cluster2", 3),
    hopper_configuration("128x256", 4),           hopper_configuration("128x256_cluster2", 4),
    hopper_configuration("256x128", 5),           hopper_configuration("256x128_cluster2", 5),
};
constexpr int kHopperClusters = 2;
constexpr int kHopperRows = kHopperFormCount * kHopperClusters;
static_assert(sizeof(linear_sm90a_configurations) / sizeof(Configuration) == kHopperRows);

}  // namespace kronafuse::cuda
