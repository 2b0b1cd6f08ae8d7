// cp.async and TMA: what was asked for lands when it is waited for, or some turns later; until then the target is NaN.
#include <algorithm>
#include <sstream>

#include "cuda/common/swizzle.cuh"
#include "cuda/common/tensor_map.h"
#include "cuda/emulation/machine.h"

namespace kronafuse::cuda {

bool tensor_map_serves(const void* data, DType dtype, int dims, const TensorExtent* extents, Swizzle swizzle) {
  return !tensor_map_problem(data, dtype, dims, extents, swizzle);
}

TensorMap make_tensor_map(const void* data, DType dtype, int dims, const TensorExtent* extents, Swizzle swizzle) {
  const std::optional<std::string> problem = tensor_map_problem(data, dtype, dims, extents, swizzle);
  KF_CHECK(!problem, "tensor map: ", *problem);
  emulation::EmulatedMap map{};
  map.mark = emulation::EmulatedMap::valid_mark;
  map.element_bytes = static_cast<uint8_t>(size_of(dtype));
  map.dims = static_cast<uint8_t>(dims);
  map.swizzle = static_cast<uint8_t>(swizzle);
  map.data = reinterpret_cast<uintptr_t>(data);
  for (int d = 0; d < 4; ++d) {
    map.size[d] = d < dims ? static_cast<uint64_t>(extents[d].size) : 1;
    map.box[d] = d < dims ? static_cast<uint16_t>(extents[d].box) : 1;
    if (d > 0) map.stride_bytes[d - 1] = d < dims ? static_cast<uint64_t>(extents[d].stride_bytes) : 0;
  }
  TensorMap result{};
  std::memcpy(&result, &map, sizeof map);
  return result;
}

namespace emulation {
namespace {

EmulatedMap read_map(const void* map, int dims, const char* what) {
  EmulatedMap result;
  std::memcpy(&result, map, sizeof result);
  if (result.mark != EmulatedMap::valid_mark) fail(std::string(what) + ": this tensor map was not made");
  if (dims != 0 && result.dims != dims) {
    fail(std::string(what) + ": the tensor map has " + std::to_string(result.dims) + " dimensions; got " +
         std::to_string(dims) + " coordinates");
  }
  return result;
}

// Calls visit(offset in the swizzled box, address in global memory or null outside the tensor) for each element.
template <class Visit>
void for_each_element(const EmulatedMap& map, const int* at, size_t box_offset, Visit&& visit) {
  const auto swizzle = static_cast<Swizzle>(map.swizzle);
  uint32_t plain = static_cast<uint32_t>(box_offset);
  const auto inside = [&](int d, int i) {
    const int64_t position = static_cast<int64_t>(at[d]) + i;
    return position >= 0 && position < static_cast<int64_t>(map.size[d]);
  };
  const auto part = [&](int d, int i) { return static_cast<int64_t>(map.stride_bytes[d - 1]) * (at[d] + int64_t{i}); };
  for (int i3 = 0; i3 < map.box[3]; ++i3) {
    for (int i2 = 0; i2 < map.box[2]; ++i2) {
      for (int i1 = 0; i1 < map.box[1]; ++i1) {
        const bool row_inside = inside(1, i1) && inside(2, i2) && inside(3, i3);
        const int64_t row = part(1, i1) + part(2, i2) + part(3, i3);
        for (int i0 = 0; i0 < map.box[0]; ++i0, plain += map.element_bytes) {
          unsigned char* address = nullptr;
          if (row_inside && inside(0, i0)) {
            address = reinterpret_cast<unsigned char*>(map.data) + row + (at[0] + int64_t{i0}) * map.element_bytes;
          }
          visit(swizzled(plain, swizzle), address);
        }
      }
    }
  }
}

void check_box_address(const EmulatedMap& map, size_t offset, const char* what) {
  const auto swizzle = static_cast<Swizzle>(map.swizzle);
  const size_t alignment = swizzle == Swizzle::none ? 128 : std::max(128, 8 * span_of(swizzle));
  if (offset % alignment != 0) {
    fail(std::string(what) + ": the box must lie at a multiple of " + std::to_string(alignment) + "; got byte " +
         std::to_string(offset));
  }
}

void copy_coordinates(int* target, int dims, const int* at) {
  for (int d = 0; d < 4; ++d) target[d] = d < dims ? at[d] : 0;
}

void store(const Block& block, const BoxStore& box) {
  for_each_element(box.map, box.at, static_cast<size_t>(box.shared - block.shared),
                   [&](uint32_t offset, unsigned char* address) {
                     if (address != nullptr) std::memcpy(address, block.shared + offset, box.map.element_bytes);
                   });
}

}  // namespace

int64_t EmulatedMap::box_bytes() const { return int64_t{element_bytes} * box[0] * box[1] * box[2] * box[3]; }

void cp_async(void* shared, const void* global, int bytes, bool valid) {
  const auto size = static_cast<size_t>(bytes);
  const std::string what = "cp_async_" + std::to_string(bytes);
  if (shared_offset(shared, size, what.c_str()) % size != 0) {
    fail(what + ": the shared address is not a multiple of its size");
  }
  if (valid && reinterpret_cast<uintptr_t>(global) % size != 0) {
    fail(what + ": the global address is not a multiple of its size");
  }
  std::memset(shared, 0xff, size);
  current().copies.operations.push_back({shared, global, bytes, valid});
}

void cp_async_commit() { current().copies.commit(); }

void cp_async_wait(int pending) {
  current().copies.complete(pending, [](const SmallCopy& copy) {
    if (copy.valid) {
      std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes));
    } else {
      std::memset(copy.shared, 0, static_cast<size_t>(copy.bytes));
    }
  });
}

uint16_t own_block_mask() { return static_cast<uint16_t>(1u << current().block->rank); }

void tma_prefetch(const void* map) { read_map(map, 0, "tma_prefetch"); }

void tma_load(void* shared, const void* map, int dims, const int* at, uint64_t* barrier, uint16_t block_mask) {
  BoxLoad load;
  load.map = read_map(map, dims, "tma_load");
  const auto bytes = static_cast<size_t>(load.map.box_bytes());
  load.offset = shared_offset(shared, bytes, "tma_load");
  load.barrier_offset = shared_offset(barrier, 8, "tma_load's mbarrier");
  load.block_mask = block_mask;
  check_box_address(load.map, load.offset, "tma_load");
  copy_coordinates(load.at, dims, at);
  Cluster& cluster = *current().block->cluster;
  if (block_mask == 0 || block_mask >> cluster.blocks.size() != 0) {
    fail("tma_load_multicast: the mask names blocks outside the cluster: " + std::to_string(block_mask));
  }
  for (Block& block : cluster.blocks) {
    if ((block_mask >> block.rank & 1) == 0) continue;
    if (block.alive == 0) fail("tma_load_multicast: block " + std::to_string(block.rank) + " has ended");
    std::memset(block.shared + load.offset, 0xff, bytes);
  }
  load.turns_left = 1 + static_cast<int>(cluster.random() % 24);
  cluster.loads.push_back(load);
}

void land(Cluster& cluster, size_t which) {
  const BoxLoad load = cluster.loads[which];
  cluster.loads.erase(cluster.loads.begin() + static_cast<std::ptrdiff_t>(which));
  for (Block& block : cluster.blocks) {
    if ((load.block_mask >> block.rank & 1) == 0) continue;
    for_each_element(load.map, load.at, load.offset, [&](uint32_t offset, const unsigned char* address) {
      if (address != nullptr) {
        std::memcpy(block.shared + offset, address, load.map.element_bytes);
      } else {
        std::memset(block.shared + offset, 0, load.map.element_bytes);
      }
    });
    complete_bytes(block, reinterpret_cast<uint64_t*>(block.shared + load.barrier_offset), load.map.box_bytes());
  }
}

void tma_store(const void* map, const void* shared, int dims, const int* at) {
  if (!current().block->fenced) fail("tma_store: no thread of the block has called fence_async_shared()");
  BoxStore store;
  store.map = read_map(map, dims, "tma_store");
  check_box_address(store.map, shared_offset(shared, static_cast<size_t>(store.map.box_bytes()), "tma_store"),
                    "tma_store");
  store.shared = static_cast<const unsigned char*>(shared);
  copy_coordinates(store.at, dims, at);
  current().stores.operations.push_back(store);
}

void tma_store_commit() { current().stores.commit(); }

void tma_store_wait(int pending) {
  if (current().stores.ends.size() > static_cast<size_t>(pending)) yield_turn();
  const Block& block = *current().block;
  current().stores.complete(pending, [&](const BoxStore& box) { store(block, box); });
}

std::string unfinished_work(const Fiber& fiber) {
  if (!fiber.stores.operations.empty()) return "the thread ends before its TMA stores have read shared memory";
  if (!fiber.products.operations.empty()) return "the thread ends before its wgmma products are waited for";
  return {};
}

std::string unfinished_loads(const Cluster& cluster, const Block& block) {
  for (const BoxLoad& load : cluster.loads) {
    if (load.block_mask >> block.rank & 1) return "the block ends while TMA loads to it are on their way";
  }
  return {};
}

}  // namespace emulation
}  // namespace kronafuse::cuda
