// Products of a warpgroup: queued as they are issued, done when all 128 threads wait for them.
#include "cuda/common/swizzle.cuh"
#include "cuda/emulation/machine.h"
#include "cuda/emulation/matrix.h"

namespace kronafuse::cuda::emulation {
namespace {

// A matrix descriptor taken apart; offsets in bytes.
struct Descriptor {
  uint32_t address, leading, stride;
  Swizzle swizzle;

  explicit Descriptor(uint64_t bits)
      : address(static_cast<uint32_t>(bits & 0x3fff) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4),
        swizzle(bits >> 62 == 0 ? Swizzle::none : static_cast<Swizzle>(4 - (bits >> 62))) {}

  // Of element (row of M or N, k), 16-bit.
  uint32_t at(int row, int k, bool mn_major) const {
    const auto span = static_cast<uint32_t>(span_of(swizzle));
    const auto r = static_cast<uint32_t>(row), c = static_cast<uint32_t>(k);
    uint32_t offset;
    if (mn_major) {
      const uint32_t width = span / 2;
      const uint32_t by_rows = swizzle == Swizzle::none ? stride : leading;
      const uint32_t by_k = swizzle == Swizzle::none ? leading : stride;
      offset = r % width * 2 + r / width * by_rows + c % 8 * span + c / 8 * by_k;
    } else if (swizzle == Swizzle::none) {
      offset = r % 8 * 16 + r / 8 * stride + c % 8 * 2 + c / 8 * leading;
    } else {
      offset = r % 8 * span + r / 8 * stride + c * 2;
    }
    return swizzled(address + offset, swizzle);
  }
};

float element(const Block& block, uint32_t offset, DType dtype) {
  if (offset + 2 > static_cast<uint32_t>(block.shared_bytes)) {
    fail("wgmma: a descriptor reaches byte " + std::to_string(offset) + " of " + std::to_string(block.shared_bytes));
  }
  uint16_t bits;
  std::memcpy(&bits, block.shared + offset, 2);
  return widen(bits, dtype);
}

bool same_instruction(const Product& a, const Product& b) {
  return a.n == b.n && a.dtype == b.dtype && a.a_in_registers == b.a_in_registers && a.a == b.a && a.b == b.b &&
         a.trans_b == b.trans_b && a.accumulate == b.accumulate;
}

// Product `which` of each of the 128 threads from `first` on.
void multiply(Block& block, Fiber* first, size_t which) {
  const Product& common = first->products.operations[which];
  const int n = common.n;
  const auto product = [&](int thread) -> const Product& { return first[thread].products.operations[which]; };
  static float left[64 * 16], right[16 * 256], sums[64 * 256];
  const Descriptor a(common.a), b(common.b);
  for (int row = 0; row < 64 && !common.a_in_registers; ++row) {
    for (int k = 0; k < 16; ++k) left[row * 16 + k] = element(block, a.at(row, k, false), common.dtype);
  }
  for (int thread = 0; thread < 128 && common.a_in_registers; ++thread) {
    const int row = 16 * (thread / 32) + thread % 32 / 4, t = thread % 4;
    for (int i = 0; i < 4; ++i) {
      float* at = left + (row + 8 * (i & 1)) * 16 + 2 * t + 8 * (i >> 1);
      const uint32_t packed = product(thread).a_registers[i];
      at[0] = widen(static_cast<uint16_t>(packed), common.dtype);
      at[1] = widen(static_cast<uint16_t>(packed >> 16), common.dtype);
    }
  }
  for (int k = 0; k < 16; ++k) {
    for (int column = 0; column < n; ++column) {
      right[k * n + column] = element(block, b.at(column, k, common.trans_b), common.dtype);
    }
  }
  const auto for_each_sum = [&](auto&& visit) {
    for (int thread = 0; thread < 128; ++thread) {
      const int row = 16 * (thread / 32) + thread % 32 / 4, t = thread % 4;
      float* acc = product(thread).acc;
      for (int i = 0; i < n / 2; ++i) {
        visit(acc[i], sums[(row + 8 * (i >> 1 & 1)) * n + 8 * (i / 4) + 2 * t + (i & 1)]);
      }
    }
  };
  const bool accumulate = common.accumulate;
  for_each_sum([&](const float& acc, float& sum) { sum = accumulate ? acc : 0.0f; });
  multiply_add(sums, left, right, 64, n, 16);
  for_each_sum([](float& acc, const float& sum) { acc = sum; });
}

}  // namespace

void wgmma_fence() { current().wgmma_fenced = true; }

void wgmma(float* acc, int n, DType dtype, const uint32_t* a_registers, uint64_t a, uint64_t b, bool trans_b,
           bool accumulate) {
  Fiber& fiber = current();
  if (!fiber.wgmma_fenced) fail("wgmma: wgmma_fence() must come before the first product");
  Product product{acc, n, dtype, a_registers != nullptr, {}, a, b, trans_b, accumulate};
  if (a_registers != nullptr) std::memcpy(product.a_registers, a_registers, sizeof product.a_registers);
  fiber.products.operations.push_back(product);
}

void wgmma_commit() { current().products.commit(); }

void wgmma_wait(int pending) {
  Fiber& fiber = current();
  Block& block = *fiber.block;
  const size_t which = fiber.index.x / 128;
  Warpgroup& group = block.warpgroups[which];
  if (block.fibers.size() < 128 * (which + 1)) fail("wgmma: its warpgroup is not whole");
  if (group.arrived != 0 && group.pending != pending) {
    fail("wgmma_wait: the warpgroup's threads wait for different groups");
  }
  group.pending = pending;
  if (++group.arrived < 128) {
    group.waiting.push_back(&fiber);
    wait_for("wgmma_wait");
    return;
  }
  yield_turn();
  Fiber* first = &block.fibers[128 * which];
  const size_t issued = first->products.operations.size(), groups = first->products.ends.size();
  for (int thread = 1; thread < 128; ++thread) {
    const auto& mine = first[thread].products;
    if (mine.operations.size() != issued || mine.ends.size() != groups) {
      fail("wgmma_wait: the warpgroup's threads have issued different numbers of products");
    }
    for (size_t i = 0; i < issued; ++i) {
      if (!same_instruction(mine.operations[i], first->products.operations[i])) {
        fail("wgmma: the warpgroup's threads name different operands");
      }
    }
  }
  const size_t kept = static_cast<size_t>(pending);
  const size_t due = groups > kept ? first->products.ends[groups - kept - 1] : 0;
  for (size_t i = 0; i < due; ++i) multiply(block, first, i);
  for (int thread = 0; thread < 128; ++thread) first[thread].products.complete(pending, [](const Product&) {});
  group.arrived = 0;
  std::vector<Fiber*> waiting;
  waiting.swap(group.waiting);
  for (Fiber* other : waiting) wake(*other);
}

}  // namespace kronafuse::cuda::emulation
