// What kernels and the CPU ask of parameters alike.
#pragma once

#include <cstdint>
#include <limits>

#include "bitdecoding/block_format.hpp"
#include "bitdecoding/runtime.hpp"

namespace bitdecoding {

// The part of a valid QuantSpec that decides the layout.
BlockSpec block_spec(std::int64_t head_dim, const QuantSpec& quant);

// The product of sizes that are checked later; the largest number where it has no room.
inline std::int64_t product(std::int64_t a, std::int64_t b) noexcept {
  std::int64_t result = 0;
  return __builtin_mul_overflow(a, b, &result) ? std::numeric_limits<std::int64_t>::max() : result;
}

// A stride of `count` things. No address space is larger; the sum of a few such extents has room in 64 bits.
constexpr std::int64_t kMaxExtentBytes = std::int64_t{1} << 60;
Status check_stride(const char* name, std::int64_t stride, std::int64_t count);

// Null and misaligned pointers and impossible sizes; the workspace is not looked at.
Status validate_params(const DecodeParams& params);
Status validate_params(const AppendParams& params);
// Both, and that they are a step's: of one cache and the same tokens.
Status validate_params(const DecodeParams& decode, const AppendParams& append);

}  // namespace bitdecoding
