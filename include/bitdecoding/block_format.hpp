// Where the sections of a cache block lie: the C++ side of BlockFormat in cute_kernels/layouts.py.
// Usable in constant expressions and in device code.
#pragma once

#include <cstdint>

namespace bitdecoding {

constexpr int kFormatVersion = 1;
constexpr int kBlockTokens = 128;
constexpr int kBlockAlign = 128;

// The part of a QuantSpec that decides the layout.
struct BlockSpec {
  int head_dim = 128;
  int k_bits = 4;
  int v_bits = 4;
  bool k_per_token = false;  // k_axis == "token"
  int k_group = 128;
  int v_group = 128;
  bool k_symmetric = false;
  bool v_symmetric = false;
  bool k_mean = false;  // k_mean == "block"
};

struct BlockSection {
  std::int64_t offset = 0;
  std::int64_t bytes = 0;  // 0: absent
};

struct BlockSections {
  BlockSection k_codes, k_scale, k_zero, k_mean, v_codes, v_scale, v_zero;
  std::int64_t block_bytes = 0;
};

constexpr BlockSections block_sections(const BlockSpec& spec) {
  constexpr int kHalfBytes = 2;
  BlockSections s{};
  std::int64_t end = 0;
  auto place = [&end](std::int64_t bytes) {
    BlockSection section{end, bytes};
    end += bytes;
    return section;
  };
  const std::int64_t values = std::int64_t{kBlockTokens} * spec.head_dim;
  const std::int64_t k_params = values / spec.k_group * kHalfBytes;
  const std::int64_t v_params = values / spec.v_group * kHalfBytes;
  s.k_codes = place(values * spec.k_bits / 8);
  s.k_scale = place(k_params);
  s.k_zero = place(spec.k_symmetric ? 0 : k_params);
  s.k_mean = place(spec.k_mean ? std::int64_t{spec.head_dim} * kHalfBytes : 0);
  s.v_codes = place(values * spec.v_bits / 8);
  s.v_scale = place(v_params);
  s.v_zero = place(spec.v_symmetric ? 0 : v_params);
  s.block_bytes = (end + kBlockAlign - 1) / kBlockAlign * kBlockAlign;
  return s;
}

static_assert(block_sections({}).block_bytes == 17408, "128 x 128 values at 4.25 bits, K and V");

}  // namespace bitdecoding
