// Stacks, and the switch from one to another.
#pragma once

#include <cstddef>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace kronafuse::cuda::emulation {

// The place where a fiber, or the host's own thread, left off.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

void switch_context(Context& from, Context& to);

// `to` begins with entry(), which must never return, on the given stack.
void begin_context(Context& context, unsigned char* stack, size_t bytes, void (*entry)());

// Stacks of one size with an unreadable page below each; kept from one launch to the next.
class Stacks {
 public:
  static constexpr size_t bytes = 128 * 1024;

  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks();

  unsigned char* at(size_t i);

 private:
  std::vector<unsigned char*> stacks_;
};

}  // namespace kronafuse::cuda::emulation
