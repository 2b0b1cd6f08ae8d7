// The shared memory of the blocks of a cluster, each between two guards.
#pragma once

#include <cstddef>
#include <vector>

namespace kronafuse::cuda::emulation {

struct Block;

class SharedMemory {
 public:
  // Of one block, 1024-byte aligned and filled with NaN; kept from one launch to the next.
  unsigned char* at(size_t block, size_t bytes);

 private:
  std::vector<std::vector<unsigned char>> blocks_;
};

// Throws where the block wrote below or beyond its shared memory.
void check_guards(const Block& block);

}  // namespace kronafuse::cuda::emulation
