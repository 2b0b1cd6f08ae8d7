// 16-byte loads and stores of global and shared memory.
#pragma once

#include "cuda/common/platform.cuh"
#include "cuda/common/types.cuh"

namespace kronafuse::cuda {

template <class T>
struct alignas(16) Vec16 {
  static constexpr int count = 16 / static_cast<int>(sizeof(T));
  T value[count];
  KF_HOST_DEVICE T& operator[](int i) { return value[i]; }
  KF_HOST_DEVICE const T& operator[](int i) const { return value[i]; }
};

struct alignas(16) Words4 {
  uint32_t word[4];
};

template <class T>
KF_DEVICE Vec16<T> vec16_of_words(const Words4& words) {
  Vec16<T> result;
  memcpy(&result, &words, 16);
  return result;
}

template <class T>
KF_DEVICE Words4 words_of_vec16(const Vec16<T>& vector) {
  Words4 result;
  memcpy(&result, &vector, 16);
  return result;
}

#ifdef KRONAFUSE_EMULATED

template <class T>
inline Vec16<T> load_16(const void* source) {
  emulation::check_vector_address(source);
  Vec16<T> result;
  memcpy(&result, source, 16);
  return result;
}

template <class T>
inline Vec16<T> load_16_streaming(const void* source) {
  return load_16<T>(source);
}

template <class T>
inline void store_16(void* target, const Vec16<T>& vector) {
  emulation::check_vector_address(target);
  memcpy(target, &vector, 16);
}

template <class T>
inline void store_16_streaming(void* target, const Vec16<T>& vector) {
  store_16(target, vector);
}

#else

// Of global or shared memory; the address must be a multiple of 16.
template <class T>
KF_DEVICE Vec16<T> load_16(const void* source) {
  const uint4 raw = *static_cast<const uint4*>(source);
  return vec16_of_words<T>(Words4{{raw.x, raw.y, raw.z, raw.w}});
}

// Of global memory that this kernel never writes and reads once: past L1.
template <class T>
KF_DEVICE Vec16<T> load_16_streaming(const void* source) {
  Words4 words;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.word[0]), "=r"(words.word[1]), "=r"(words.word[2]), "=r"(words.word[3])
               : "l"(__cvta_generic_to_global(source)));
  return vec16_of_words<T>(words);
}

template <class T>
KF_DEVICE void store_16(void* target, const Vec16<T>& vector) {
  const Words4 words = words_of_vec16(vector);
  *static_cast<uint4*>(target) = make_uint4(words.word[0], words.word[1], words.word[2], words.word[3]);
}

// Into global memory that this kernel does not read again.
template <class T>
KF_DEVICE void store_16_streaming(void* target, const Vec16<T>& vector) {
  const Words4 words = words_of_vec16(vector);
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(target)),
               "r"(words.word[0]), "r"(words.word[1]), "r"(words.word[2]), "r"(words.word[3])
               : "memory");
}

#endif

}  // namespace kronafuse::cuda
