// Where everything lies in a cache block: the C++ side of BlockFormat in cute_kernels/layouts.py, which explains it.
// Plain integer functions, usable in constant expressions; layout.hpp has the same layouts as CuTe types.
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

// ---- layouts of the sections; offsets count from the section's beginning ----

constexpr int kTile = 16;         // rows and columns of an A tile of mma.m16n8k16
constexpr int kSliceTokens = 32;  // two token tiles share vectors
constexpr int kNumSlices = kBlockTokens / kSliceTokens;
constexpr int kWarpLanes = 32;
constexpr int kWordBits = 32;

enum class Operand { k, v };

// (token, channel) -> bit of a code. K has tokens as the rows of A, V has channels.
struct CodeLayout {
  Operand operand = Operand::k;
  int head_dim = 128;
  int bits = 4;

  constexpr int half() const { return head_dim / (2 * kTile); }            // channel tiles of half a head
  constexpr int words() const { return head_dim * bits / kWordBits; }      // of a lane in a slice
  constexpr int vector_words() const { return words() % 4 == 0 ? 4 : 2; }  // of a lane, adjacent

  constexpr int operator()(int token, int channel) const {
    const bool is_k = operand == Operand::k;
    const int slice = token / kSliceTokens, t = token / kTile % 2, c = channel / kTile;
    const int row = is_k ? token % kTile : channel % kTile, column = is_k ? channel % kTile : token % kTile;
    const int lane = row % 8 * 4 + column / 2 % 4, e = column % 2;
    const int r0 = row / 8, r1 = column / 8;  // the bits of the register
    const int inner = is_k ? c % 2 : t, outer = is_k ? t : c / half();
    const int rest = is_k ? c / 2 : c % half();
    int word = 0, slot = 0;
    switch (bits) {
      case 8:
        word = r1 + 2 * inner + 4 * outer + 8 * rest;
        slot = 8 * r0;
        break;
      case 4:
        word = inner + 2 * outer + 4 * rest;
        slot = 4 * r0 + 8 * r1;
        break;
      default:
        word = inner + 2 * rest;
        slot = 4 * r0 + 8 * r1 + 2 * outer;
    }
    const int n = vector_words();
    return ((slice * words() + word / n * n) * kWarpLanes + lane * n + word % n) * kWordBits + 16 * e + slot;
  }
};

// Index along the k dimension of B -> fp16 element of a B vector run.
constexpr int b_order(int k) {
  const int x = k / 32, j = k / 16 % 2, r = k / 8 % 2, t = k / 2 % 4, e = k % 2;
  return (4 * x + t) * 8 + 4 * j + 2 * r + e;
}

// (token, channel group) -> fp16 element.
constexpr int row_order(int num_groups, int token, int group) {
  const int slice = token / kSliceTokens, i = token / 8 % 4, g = token % 8;
  return ((8 * slice + g) * num_groups + group) * 4 + i;
}

static_assert(block_sections({}).block_bytes == 17408, "128 x 128 values at 4.25 bits, K and V");

}  // namespace bitdecoding
