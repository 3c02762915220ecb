// What kernels and the CPU ask of parameters alike.
#pragma once

#include "bitdecoding/block_format.hpp"
#include "bitdecoding/runtime.hpp"

namespace bitdecoding {

// The part of a valid QuantSpec that decides the layout.
BlockSpec block_spec(std::int64_t head_dim, const QuantSpec& quant);

// Null and misaligned pointers and impossible sizes; the workspace is not looked at.
Status validate_params(const DecodeParams& params);
Status validate_params(const AppendParams& params);

}  // namespace bitdecoding
