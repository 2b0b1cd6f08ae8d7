#include "cuda/emulation/memory.h"

#include <algorithm>
#include <sstream>

#include "cuda/emulation/machine.h"

namespace kronafuse::cuda::emulation {
namespace {

constexpr size_t guard_bytes = 4096;
constexpr unsigned char guard_value = 0x5a;
constexpr unsigned char unwritten = 0xff;  // a NaN in every floating type, and no valid mbarrier

}  // namespace

unsigned char* SharedMemory::at(size_t block, size_t bytes) {
  if (blocks_.size() <= block) blocks_.resize(block + 1);
  std::vector<unsigned char>& memory = blocks_[block];
  const size_t needed = bytes + 2 * guard_bytes + 1024;
  if (memory.size() < needed) memory.resize(needed);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory.data()) + guard_bytes;
  auto* shared = reinterpret_cast<unsigned char*>((begin + 1023) & ~uintptr_t{1023});
  std::memset(shared - guard_bytes, guard_value, guard_bytes);
  std::memset(shared, unwritten, bytes);
  std::memset(shared + bytes, guard_value, guard_bytes);
  return shared;
}

void check_guards(const Block& block) {
  const auto broken = [](const unsigned char* begin) {
    return std::any_of(begin, begin + guard_bytes, [](unsigned char value) { return value != guard_value; });
  };
  KF_CHECK(!broken(block.shared - guard_bytes), block.cluster->kernel, ": block (", block.indices.index.x, ", ",
           block.indices.index.y, ", ", block.indices.index.z, ") wrote below its shared memory");
  KF_CHECK(!broken(block.shared + block.shared_bytes), block.cluster->kernel, ": block (", block.indices.index.x, ", ",
           block.indices.index.y, ", ", block.indices.index.z, ") wrote beyond its ", block.shared_bytes,
           " bytes of shared memory");
}

unsigned char* dynamic_shared() { return current().block->shared; }

size_t shared_offset(const void* pointer, size_t bytes, const char* what) {
  const Block& block = *current().block;
  const auto offset = static_cast<const unsigned char*>(pointer) - block.shared;
  if (!block.owns(pointer, bytes)) {
    std::ostringstream text;
    text << what << ": bytes " << offset << " to " << offset + static_cast<std::ptrdiff_t>(bytes)
         << " are not inside the block's " << block.shared_bytes << " bytes of shared memory";
    fail(text.str());
  }
  return static_cast<size_t>(offset);
}

uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(shared_offset(pointer, 0, "shared address"));
}

void check_vector_address(const void* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) fail("16-byte access: the address is not a multiple of 16");
  const Block& block = *current().block;
  const auto* address = static_cast<const unsigned char*>(pointer);
  if (address + guard_bytes >= block.shared && address < block.shared + block.shared_bytes + guard_bytes) {
    shared_offset(pointer, 16, "16-byte access");
  }
}

}  // namespace kronafuse::cuda::emulation
