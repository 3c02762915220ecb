// Elements of q, out and 16-bit tokens on the host, to and from fp32; their rotation.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu_attend.hpp"

namespace bitdecoding::cpu {

inline float to_float(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline std::uint32_t to_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float half_to_float(std::uint16_t half) {
  const std::uint32_t magnitude = half & 0x7fffu;
  const float x =
      magnitude >= 0x7c00u ? to_float(0x7f800000u | (magnitude & 0x3ffu) << 13) : to_float(magnitude << 13) * 0x1p112f;
  return (half & 0x8000u) != 0 ? -x : x;
}

// To nearest even.
inline std::uint16_t float_to_half(float x) {
  const std::uint32_t sign = to_bits(x) >> 16 & 0x8000u;
  std::uint32_t bits = to_bits(x) & 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);   // NaN
  if (bits >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (bits < 0x38800000u) {  // subnormal: adding 1/2 leaves the multiple of 2^-24 in the low bits
    return static_cast<std::uint16_t>(sign | (to_bits(to_float(bits) + 0.5f) - 0x3f000000u));
  }
  bits += 0xfffu + (bits >> 13 & 1u);
  return static_cast<std::uint16_t>(sign | ((bits >> 13) - (112u << 10)));
}

inline std::uint16_t float_to_bfloat16(float x) {
  const std::uint32_t bits = to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);  // NaN
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline int bytes_of(Type type) { return type == Type::float32 ? 4 : 2; }

// count elements from element `index` on.
inline void load_elements(const void* from, Type type, std::int64_t index, int count, float* to) {
  if (type == Type::float32) {
    std::memcpy(to, static_cast<const float*>(from) + index, count * sizeof(float));
    return;
  }
  const auto* halves = static_cast<const std::uint16_t*>(from) + index;
  for (int i = 0; i < count; ++i) {
    to[i] = type == Type::float16 ? half_to_float(halves[i]) : to_float(std::uint32_t{halves[i]} << 16);
  }
}

// To nearest even.
inline void store_elements(const float* from, Type type, std::int64_t index, int count, void* to) {
  if (type == Type::float32) {
    std::memcpy(static_cast<float*>(to) + index, from, count * sizeof(float));
    return;
  }
  auto* halves = static_cast<std::uint16_t*>(to) + index;
  for (int i = 0; i < count; ++i) {
    halves[i] = type == Type::float16 ? float_to_half(from[i]) : float_to_bfloat16(from[i]);
  }
}

// x H / sqrt(h) over blocks of h, the largest power of two in head_dim; as quantization.hadamard.
inline void hadamard(float* x, int head_dim) {
  const int size = head_dim & -head_dim;
  for (int stride = 1; stride < size; stride *= 2) {
    for (int i = 0; i < head_dim; i += 2 * stride) {
      for (int j = i; j < i + stride; ++j) {
        const float a = x[j], b = x[j + stride];
        x[j] = a + b;
        x[j + stride] = a - b;
      }
    }
  }
  const float factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(size)));
  for (int i = 0; i < head_dim; ++i) x[i] *= factor;
}

}  // namespace bitdecoding::cpu
