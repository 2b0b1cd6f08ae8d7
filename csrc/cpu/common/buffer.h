// Aligned scratch memory, freed with its owner; not for kernel files, which take pointers.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "common/check.h"

namespace kronafuse::cpu {

class Floats {
 public:
  explicit Floats(int64_t count) {
    constexpr int64_t alignment = 64;
    KF_CHECK(count >= 0 && count < (int64_t{1} << 40), "a buffer of ", count, " floats: sizes out of range");
    const auto bytes = static_cast<size_t>((count * 4 + alignment - 1) / alignment * alignment + alignment);
    memory_.reset(static_cast<float*>(std::aligned_alloc(alignment, bytes)));
    if (!memory_) throw std::bad_alloc();
  }
  float* data() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> memory_;
};

}  // namespace kronafuse::cpu
