// The threads of the host program, through a hook that the binding sets: launchers stay free of torch.
#pragma once

#include <cstdint>

namespace kronafuse::cpu {

using RangeBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context);

// One thread until the binding sets it.
void set_parallel_for(ParallelFor parallel_for);

namespace detail {
void run_parallel(int64_t count, int64_t grain, RangeBody body, void* context);
}

// body(begin, end) over [0, count), in ranges of at least `grain`; what a unit does must not depend on its range.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  detail::run_parallel(
      count, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}

}  // namespace kronafuse::cpu
