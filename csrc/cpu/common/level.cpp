#include "cpu/common/level.h"

#include <atomic>
#include <cstdlib>
#include <string>

#include "common/check.h"

namespace kronafuse::cpu {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512"};
constexpr const char* kVariable = "KRONAFUSE_CPU_LEVEL";

int found() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx2 && avx512 ? 2 : avx2 ? 1 : 0;
#else
  return 0;
#endif
}

int named() {
  const char* wanted = std::getenv(kVariable);
  if (wanted == nullptr || *wanted == '\0') return static_cast<int>(best_level());
  for (int number = 0; number < 3; ++number) {
    if (std::string(wanted) != kNames[number]) continue;
    KF_CHECK(number <= static_cast<int>(best_level()), kVariable, "=", wanted, ": the best level here is ",
             kNames[static_cast<int>(best_level())]);
    return number;
  }
  KF_CHECK(false, kVariable, " must be scalar, avx2 or avx512; got ", wanted);
}

std::atomic<int> current{-1};

}  // namespace

const char* name_of(Level level) { return kNames[static_cast<int>(level)]; }

Level best_level() {
  static const int number = found();
  return static_cast<Level>(number);
}

Level level() {
  int number = current.load(std::memory_order_relaxed);
  if (number < 0) current.store(number = named(), std::memory_order_relaxed);
  return static_cast<Level>(number);
}

bool has_bf16_dots() {
#if defined(__x86_64__)
  static const bool found = __builtin_cpu_supports("avx512bf16");
  return found && level() == Level::avx512;
#else
  return false;
#endif
}

void set_level(int number) {
  const int best = static_cast<int>(best_level());
  KF_CHECK(number >= 0 && number <= best, "set_level: level must be 0 (scalar) to ", best, " (", kNames[best],
           ") on this machine; got ", number);
  current.store(number, std::memory_order_relaxed);
}

}  // namespace kronafuse::cpu
