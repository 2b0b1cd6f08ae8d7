// Collectives of a warp.
#include "cuda/common/types.cuh"
#include "cuda/emulation/machine.h"
#include "cuda/emulation/matrix.h"

namespace kronafuse::cuda::emulation {
namespace {

struct Shuffle {
  uint64_t value, result;
  int source;
};

struct RowAddress {
  uint32_t* fragment;
  const unsigned char* row;
};

struct Fragments {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

constexpr const char* ldmatrix_names[2][5] = {{"", "", "ldmatrix.x2", "", "ldmatrix.x4"},
                                              {"", "", "ldmatrix.x2.trans", "", "ldmatrix.x4.trans"}};

}  // namespace

void sync_warp() {
  warp_collective("sync_warp", nullptr, [](void**) {});
}

bool elect_one() {
  warp_collective("elect_one", nullptr, [](void**) {});
  return current().lane == 0;
}

uint64_t shuffle_bits(uint64_t value, int source) {
  Shuffle own{value, 0, source};
  warp_collective("shuffle", &own, [](void** arguments) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* mine = static_cast<Shuffle*>(arguments[lane]);
      mine->result = static_cast<Shuffle*>(arguments[mine->source & 31])->value;
    }
  });
  return own.result;
}

void ldmatrix(uint32_t* fragment, int count, const void* row, bool transposed) {
  RowAddress own{fragment, static_cast<const unsigned char*>(row)};
  const char* name = ldmatrix_names[transposed][count];
  if (current().lane < 8 * count) {
    shared_offset(row, 16, name);
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail(std::string(name) + ": a row must lie at a multiple of 16");
  }
  warp_collective(name, &own, [&](void** arguments) {
    for (int matrix = 0; matrix < count; ++matrix) {
      uint16_t elements[8][8];
      for (int r = 0; r < 8; ++r) {
        std::memcpy(elements[r], static_cast<RowAddress*>(arguments[8 * matrix + r])->row, 16);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int r = lane / 4, c = 2 * (lane % 4);
        const uint16_t low = transposed ? elements[c][r] : elements[r][c];
        const uint16_t high = transposed ? elements[c + 1][r] : elements[r][c + 1];
        static_cast<RowAddress*>(arguments[lane])->fragment[matrix] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
}

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, DType dtype) {
  Fragments own{d, a, b};
  warp_collective(dtype == DType::bf16 ? "mma.bf16" : "mma.f16", &own, [&](void** arguments) {
    float left[16 * 16], right[16 * 8], sums[16 * 8];
    const auto unpack = [&](uint32_t packed, float* low, float* high) {
      *low = widen(static_cast<uint16_t>(packed), dtype);
      *high = widen(static_cast<uint16_t>(packed >> 16), dtype);
    };
    for (int lane = 0; lane < 32; ++lane) {
      const auto& f = *static_cast<Fragments*>(arguments[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        float* at = left + (g + 8 * (i & 1)) * 16 + 2 * t + 8 * (i >> 1);
        unpack(f.a[i], at, at + 1);
      }
      for (int i = 0; i < 2; ++i) {
        float* at = right + (2 * t + 8 * i) * 8 + g;
        unpack(f.b[i], at, at + 8);
      }
      for (int i = 0; i < 4; ++i) sums[(g + 8 * (i >> 1)) * 8 + 2 * t + (i & 1)] = f.d[i];
    }
    multiply_add(sums, left, right, 16, 8, 16);
    for (int lane = 0; lane < 32; ++lane) {
      const auto& f = *static_cast<Fragments*>(arguments[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) f.d[i] = sums[(g + 8 * (i >> 1)) * 8 + 2 * t + (i & 1)];
    }
  });
}

}  // namespace kronafuse::cuda::emulation
