// Vectors of eight floats, for the sources that are compiled once per instruction set (cpu_attend.cpp,
// cpu_quantise.cpp) into a namespace of its name, BITDECODING_CPU_ISA; which of them runs is decided on the machine
// (cpu_decode.cpp). So nothing in those sources may be shared by the linker with code for other machines: no inline
// function of a standard header, and all of this has internal linkage.
#pragma once

#include <cstdint>

#include "cpu_attend.hpp"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace bitdecoding::cpu {
namespace {

#define BITDECODING_INLINE inline __attribute__((always_inline))

constexpr int kLanes = 8;
typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t U32 __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t U16 __attribute__((vector_size(2 * kLanes)));

constexpr float kInfinity = __builtin_inff();

template <typename To, typename From>
BITDECODING_INLINE To load(const From* from) {
  To to;
  __builtin_memcpy(&to, from, sizeof(To));
  return to;
}

template <typename From, typename To>
BITDECODING_INLINE void store(To* to, From from) {
  __builtin_memcpy(to, &from, sizeof(From));
}

BITDECODING_INLINE F32 splat(float x) { return F32{x, x, x, x, x, x, x, x}; }

BITDECODING_INLINE F32 from_bits(U32 bits) { return (F32)bits; }

BITDECODING_INLINE F32 half_to_float(U16 half) {
#ifdef __F16C__
  return (F32)_mm256_cvtph_ps((__m128i)half);
#else
  const U32 bits = __builtin_convertvector(half, U32);
  const U32 magnitude = (bits & 0x7fffu) << 13;
  const U32 scaled = (U32)(from_bits(magnitude) * 0x1p112f);  // the exponent's other bias; subnormals become normal
  const U32 special = (U32)((bits & 0x7c00u) == 0x7c00u);     // infinity, NaN
  return from_bits(scaled | (special & 0x7f800000u) | (bits & 0x8000u) << 16);
#endif
}

BITDECODING_INLINE F32 load_element(const unsigned char* from, Type type) {
  if (type == Type::float32) return load<F32>(from);
  const U16 bits = load<U16>(from);
  return type == Type::float16 ? half_to_float(bits) : from_bits(__builtin_convertvector(bits, U32) << 16);
}

// To nearest even; finite and below 65520.
BITDECODING_INLINE U16 float_to_half(F32 x) {
#ifdef __F16C__
  return (U16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const U32 bits = (U32)x, magnitude = bits & 0x7fffffffu;
  const U32 normal = ((magnitude + 0xfffu + (magnitude >> 13 & 1u)) >> 13) - (112u << 10);
  // adding 1/2 leaves the multiple of 2^-24 in the low bits
  const U32 subnormal = (U32)(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const U32 half = magnitude < 0x38800000u ? subnormal : normal;
  return __builtin_convertvector(half | (bits >> 16 & 0x8000u), U16);
#endif
}

}  // namespace
}  // namespace bitdecoding::cpu
