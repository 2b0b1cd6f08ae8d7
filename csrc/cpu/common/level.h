// Which instruction set the kernels run on: found once by cpuid, held down by KRONAFUSE_CPU_LEVEL or by set_level.
#pragma once

namespace kronafuse::cpu {

enum class Level : int { scalar, avx2, avx512 };

const char* name_of(Level level);

// The best that this processor and this build offer.
Level best_level();

// The one in use; KRONAFUSE_CPU_LEVEL is read at the first call. An Error where it names none that runs here.
Level level();

// Whether the level in use has dot products of bf16 pairs (AVX512-BF16).
bool has_bf16_dots();

// Takes another one from here on, in all threads; an Error where this processor or build lacks it.
void set_level(int number);

}  // namespace kronafuse::cpu

// One function of a kernel file: declared for every level it is compiled for, and the one in use.
#if defined(__x86_64__)
#define KF_DECLARE_KERNEL(Result, name, ...)                \
  namespace scalar { Result name(__VA_ARGS__); }            \
  namespace avx2 { Result name(__VA_ARGS__); }              \
  namespace avx512 { Result name(__VA_ARGS__); }
#define KF_KERNEL(name)                                                  \
  (::kronafuse::cpu::level() == ::kronafuse::cpu::Level::avx512 ? avx512::name \
   : ::kronafuse::cpu::level() == ::kronafuse::cpu::Level::avx2 ? avx2::name   \
                                                                : scalar::name)
#else
#define KF_DECLARE_KERNEL(Result, name, ...) namespace scalar { Result name(__VA_ARGS__); }
#define KF_KERNEL(name) (scalar::name)
#endif
