#include "cpu/common/gemm.h"

#include <atomic>

#include "common/check.h"

namespace kronafuse::cpu {
namespace {

std::atomic<Gemm> hook{nullptr};

}  // namespace

void set_gemm(Gemm gemm) { hook.store(gemm); }

void gemm(const View& out, const View& a, const View& b, double beta, double alpha) {
  KF_CHECK(out.dim == 2 && a.dim == 2 && b.dim == 2 && a.size[0] == out.size[0] && b.size[1] == out.size[1] &&
               a.size[1] == b.size[0],
           "gemm: out (R, C) = a (R, I) b (I, C); got out ", Shape{out}, ", a ", Shape{a}, ", b ", Shape{b});
  KF_CHECK(a.dtype == out.dtype && b.dtype == out.dtype, "gemm: a and b must have out's dtype ", out.dtype, "; got ",
           a.dtype, " and ", b.dtype);
  if (out.empty()) return;
  const Gemm run = hook.load(std::memory_order_relaxed);
  KF_CHECK(run != nullptr, "gemm: no GEMM is set");
  run(out, a, b, beta, alpha);
}

}  // namespace kronafuse::cpu
