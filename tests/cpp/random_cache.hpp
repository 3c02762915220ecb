// Cache blocks filled at random through the layouts of block_format.hpp, and the values that they stand for.
#pragma once

#include <bitdecoding/block_format.hpp>
#include <bitdecoding/config.hpp>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace random_cache {

namespace bd = bitdecoding;

struct Random {
  std::uint32_t state = 1;
  std::uint32_t bits() { return (state = state * 1664525u + 1013904223u) >> 8; }
  double uniform() { return bits() / 8388608.0 - 1.0; }  // -1 .. 1
};

// A positive or negative fp16 number of magnitude 2^exponent (1 .. 2), and its value.
inline std::uint16_t random_half(Random* random, int exponent, bool negative, double* value) {
  const int mantissa = static_cast<int>(random->bits() % 1024);
  *value = std::ldexp(1.0 + mantissa / 1024.0, exponent) * (negative ? -1 : 1);
  return static_cast<std::uint16_t>((negative ? 0x8000 : 0) | (exponent + 15) << 10 | mantissa);
}

struct Cache {
  bd::BlockSpec spec;
  std::vector<std::uint8_t> pages;
  std::vector<double> k, v;  // [page, head, token, channel]
};

// One operand of one block: codes and parameters drawn at random, their values to `values` [token, channel].
inline void fill_operand(Random* random, const bd::BlockSpec& spec, bd::Operand operand, std::uint8_t* block,
                         double* values) {
  const bool is_k = operand == bd::Operand::k;
  const bd::BlockSections at = bd::block_sections(spec);
  const int head_dim = spec.head_dim, bits = is_k ? spec.k_bits : spec.v_bits;
  const int group = is_k ? spec.k_group : spec.v_group;
  const bool per_channel = is_k && !spec.k_per_token;
  const bd::BlockSection codes = is_k ? at.k_codes : at.v_codes, scales = is_k ? at.k_scale : at.v_scale;
  const bd::BlockSection zeros = is_k ? at.k_zero : at.v_zero;
  const bd::CodeLayout layout{operand, head_dim, bits};
  auto put = [&](const bd::BlockSection& section, int element, std::uint16_t half) {
    std::memcpy(block + section.offset + 2 * element, &half, sizeof(half));
  };

  const int groups = (per_channel ? bd::kBlockTokens : head_dim) / group;
  const int others = per_channel ? head_dim : bd::kBlockTokens;
  std::vector<double> scale(groups * others), zero(groups * others), mean(head_dim, 0.0);
  for (int g = 0; g < groups; ++g) {
    for (int i = 0; i < others; ++i) {
      const bool rows = is_k && !per_channel;
      const int element = rows ? bd::row_order(groups, i, g) : g * others + bd::b_order(i);
      put(scales, element, random_half(random, -4, false, &scale[g * others + i]));
      zero[g * others + i] = -0.5 * ((1 << bits) - 1);
      if (zeros.bytes > 0) put(zeros, element, random_half(random, bits - 2, true, &zero[g * others + i]));
    }
  }
  if (is_k && at.k_mean.bytes > 0) {
    for (int c = 0; c < head_dim; ++c) put(at.k_mean, bd::b_order(c), random_half(random, -1, c % 3 == 0, &mean[c]));
  }
  for (int token = 0; token < bd::kBlockTokens; ++token) {
    for (int c = 0; c < head_dim; ++c) {
      const int code = static_cast<int>(random->bits() % (1u << bits));
      const int bit = layout(token, c);
      block[codes.offset + bit / 8] |= static_cast<std::uint8_t>(code << bit % 8);
      const int index = per_channel ? token / group * others + c : c / group * others + token;
      values[token * head_dim + c] = scale[index] * (code + zero[index]) + mean[c];
    }
  }
}

inline bd::BlockSpec block_spec(const bd::QuantSpec& quant, int head_dim) {
  bd::BlockSpec spec;
  spec.head_dim = head_dim;
  spec.k_bits = static_cast<int>(quant.k_bits);
  spec.v_bits = static_cast<int>(quant.v_bits);
  spec.k_per_token = quant.k_axis == "token";
  spec.k_group = static_cast<int>(quant.k_group);
  spec.v_group = static_cast<int>(quant.v_group);
  spec.k_symmetric = quant.k_symmetric;
  spec.v_symmetric = quant.v_symmetric;
  spec.k_mean = quant.k_mean == "block";
  return spec;
}

inline Cache make_cache(Random* random, const bd::BlockSpec& spec, int num_pages, int num_heads) {
  Cache cache;
  cache.spec = spec;
  const std::int64_t block_bytes = bd::block_sections(spec).block_bytes;
  const std::int64_t block_values = std::int64_t{bd::kBlockTokens} * spec.head_dim;
  cache.pages.resize(num_pages * num_heads * block_bytes);
  cache.k.resize(num_pages * num_heads * block_values);
  cache.v.resize(cache.k.size());
  for (int i = 0; i < num_pages * num_heads; ++i) {
    std::uint8_t* block = cache.pages.data() + i * block_bytes;
    fill_operand(random, spec, bd::Operand::k, block, cache.k.data() + i * block_values);
    fill_operand(random, spec, bd::Operand::v, block, cache.v.data() + i * block_values);
  }
  return cache;
}

}  // namespace random_cache
