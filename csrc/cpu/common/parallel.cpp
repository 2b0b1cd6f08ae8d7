#include "cpu/common/parallel.h"

#include <atomic>

namespace kronafuse::cpu {
namespace {

void in_this_thread(int64_t begin, int64_t end, int64_t, RangeBody body, void* context) { body(begin, end, context); }

std::atomic<ParallelFor> hook{&in_this_thread};

}  // namespace

void set_parallel_for(ParallelFor parallel_for) { hook.store(parallel_for); }

namespace detail {

void run_parallel(int64_t count, int64_t grain, RangeBody body, void* context) {
  if (count <= 0) return;
  if (count <= grain) return body(0, count, context);
  hook.load()(0, count, grain < 1 ? 1 : grain, body, context);
}

}  // namespace detail
}  // namespace kronafuse::cpu
