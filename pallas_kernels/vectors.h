// Vectors of any machine: the compiler makes of 16 lanes what its registers hold.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace jaxllm {

constexpr float kLog2e = 1.44269504f;

struct bf16 { uint16_t bits; };

template <int N> using Floats __attribute__((vector_size(N * 4))) = float;
template <int N> using Words __attribute__((vector_size(N * 4))) = uint32_t;
template <int N> using Ints __attribute__((vector_size(N * 4))) = int32_t;
template <int N> using Bytes __attribute__((vector_size(N))) = int8_t;
template <int N> using UBytes __attribute__((vector_size(N))) = uint8_t;
using F16 = Floats<16>;
using Halves __attribute__((vector_size(32))) = uint16_t;

template <class V> inline V load(const void* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class V> inline void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { uint32_t u = uint32_t{x.bits} << 16; float f; std::memcpy(&f, &u, 4); return f; }
inline bf16 to_bf16(float x) {  // to nearest even; NaN stays NaN
  uint32_t u; std::memcpy(&u, &x, 4);
  if (x != x) return {uint16_t((u >> 16) | 0x40)};
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
inline Halves to_bf16(F16 x) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  const Words<16> u = (Words<16>)x;
  return __builtin_convertvector(((x == x) ? (u + 0x7fff + ((u >> 16) & 1)) : (u | 0x400000u)) >> 16, Halves);
#endif
}

inline F16 get(const float* from) { return load<F16>(from); }
inline F16 get(const bf16* from) { return (F16)(__builtin_convertvector(load<Halves>(from), Words<16>) << 16); }
inline void put(float* to, F16 x) { store(to, x); }
inline void put(bf16* to, F16 x) { store(to, to_bf16(x)); }

// The first `count` of 16 numbers, and zeros.
template <class E> F16 get_some(const E* from, int count) {
  E some[16] = {};
  return get((const E*)std::memcpy(some, from, count * sizeof(E)));
}
template <class E> void put_some(E* to, F16 x, int count) {
  E some[16];
  put(some, x);
  std::memcpy(to, some, count * sizeof(E));
}

// The sixteen lanes as one number, halves first.
template <class V, class F> inline float fold(V x, F f) {
  if constexpr (sizeof(V) == 2 * sizeof(float)) return f(x[0], x[1]);
  else {
    using Half = Floats<sizeof(V) / 8>;
    return fold(f(load<Half>(&x), load<Half>((const char*)&x + sizeof(V) / 2)), f);
  }
}
#if defined(__AVX512F__)  // as the folds below, without a way through memory
inline float total(F16 x) { return _mm512_reduce_add_ps((__m512)x); }
inline float greatest(F16 x) { return _mm512_reduce_max_ps((__m512)x); }
#else
inline float total(F16 x) { return fold(x, [](auto a, auto b) { return a + b; }); }
inline float greatest(F16 x) { return fold(x, [](auto a, auto b) { return a > b ? a : b; }); }
#endif

// 2^x over the range of floats; below it 2^-126. The relative error is 2e-7, or 1e-4 where `Rough`.
template <bool Rough = false> inline F16 exp2(F16 x) {
  const F16 least = F16{} - 126.f;
  x = (least > x) ? least : x;   // the order that makes it one instruction; NaN stays
  F16 shifted = x + 12582912.f;  // rounds to an integer in the low bits
  F16 f = x - (shifted - 12582912.f);
  F16 p = F16{} + (Rough ? 5.500893e-2f : 1.5353362e-4f);
  if constexpr (Rough) for (float c : {0.24221096f, 0.69328293f, 1.f}) p = p * f + c;
  else for (float c : {1.3398874e-3f, 9.6184373e-3f, 5.5503324e-2f, 2.4022648e-1f, 6.9314718e-1f, 1.f}) p = p * f + c;
  return (F16)((Ints<16>)p + ((Ints<16>)shifted << 23));
}
inline F16 tanh(F16 x) {
  x = (x > 20.f) ? (F16{} + 20.f) : (x < -20.f) ? (F16{} - 20.f) : x;
  return 1.f - 2.f / (exp2(x * (2.f * kLog2e)) + 1.f);
}
inline F16 silu(F16 x) {
  const F16 y = x * -kLog2e;
  return (y > 126.f) ? F16{} : x / (1.f + exp2(y));
}
inline F16 gelu_tanh(F16 x) {  // https://arxiv.org/abs/1606.08415
  return 0.5f * x * (1.f + tanh((x + 0.044715f * x * x * x) * 0.79788456f));
}

}  // namespace jaxllm
