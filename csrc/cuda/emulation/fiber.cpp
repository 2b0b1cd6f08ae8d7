#include "cuda/emulation/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#include "common/check.h"

namespace kronafuse::cuda::emulation {

#if defined(__x86_64__)

extern "C" void kronafuse_switch_stack(void** from, void* to);

// The registers that a call preserves, on the old stack; then those of the new one.
asm(R"(
.text
.local kronafuse_switch_stack
.type kronafuse_switch_stack, @function
kronafuse_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size kronafuse_switch_stack, .-kronafuse_switch_stack
)");

void switch_context(Context& from, Context& to) { kronafuse_switch_stack(&from.stack_pointer, to.stack_pointer); }

void begin_context(Context& context, unsigned char* stack, size_t bytes, void (*entry)()) {
  // A function expects the stack 8 off a multiple of 16, as a call leaves it.
  auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15};
  void** slot = reinterpret_cast<void**>(top) - 1;
  *slot = nullptr;
  *--slot = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--slot = nullptr;
  context.stack_pointer = slot;
}

#else

void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

void begin_context(Context& context, unsigned char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = bytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}

#endif

Stacks::~Stacks() {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  for (unsigned char* stack : stacks_) munmap(stack - page, bytes + page);
}

unsigned char* Stacks::at(size_t i) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  while (stacks_.size() <= i) {
    void* memory =
        mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    KF_CHECK(memory != MAP_FAILED, "emulation: no memory for stack ", i, " of ", bytes, " bytes");
    mprotect(memory, page, PROT_NONE);
    stacks_.push_back(static_cast<unsigned char*>(memory) + page);
  }
  return stacks_[i];
}

}  // namespace kronafuse::cuda::emulation
