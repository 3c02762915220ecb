// Prints what include/bitdecoding says about the block format, for tests/test_layout_cpp.py.
// A table: "<name> <head_dim> <bits or group> <rows> <columns>\n", then rows * columns int32; once from the CuTe types
// of layout.hpp, once ("plain_<name>") from the functions of block_format.hpp. Sections: "sections <the spec's 9
// fields> <7 x offset and bytes> <block_bytes>\n".
#include <cstdint>
#include <cstdio>
#include <vector>

#include "bitdecoding/block_format.hpp"
#include "bitdecoding/layout.hpp"

namespace bd = bitdecoding;

template <typename Layout>
void print_table(const char* name, int head_dim, int parameter, int rows, int columns, const Layout& layout) {
  std::vector<std::int32_t> table;
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; ++column) table.push_back(static_cast<std::int32_t>(layout(row, column)));
  }
  std::printf("%s %d %d %d %d\n", name, head_dim, parameter, rows, columns);
  std::fwrite(table.data(), sizeof(std::int32_t), table.size(), stdout);
}

template <typename Layout>
void print_table(const char* name, int head_dim, int parameter) {
  const Layout layout;
  print_table(name, head_dim, parameter, cute::size<0>(layout), cute::size<1>(layout), layout);
}

void print_plain(int head_dim) {
  for (int bits : {8, 4, 2}) {
    for (const bd::Operand operand : {bd::Operand::k, bd::Operand::v}) {
      const char* name = operand == bd::Operand::k ? "plain_k_codes" : "plain_v_codes";
      print_table(name, head_dim, bits, bd::kBlockTokens, head_dim, bd::CodeLayout{operand, head_dim, bits});
    }
  }
  const auto runs_of = [](int extent) { return [=](int run, int k) { return run * extent + bd::b_order(k); }; };
  for (int group : {32, 64, 128}) {
    print_table("plain_k_params_channel", head_dim, group, bd::kBlockTokens / group, head_dim, runs_of(head_dim));
    if (head_dim % group != 0) continue;
    const int groups = head_dim / group;
    const auto rows = [=](int token, int index) { return bd::row_order(groups, token, index); };
    print_table("plain_k_params_token", head_dim, group, bd::kBlockTokens, groups, rows);
    print_table("plain_v_params", head_dim, group, groups, bd::kBlockTokens, runs_of(bd::kBlockTokens));
  }
  print_table("plain_k_mean", head_dim, 0, 1, head_dim, runs_of(head_dim));
}

template <int kHeadDim, int kBits>
void print_codes() {
  print_table<bd::KCodes<kHeadDim, kBits>>("k_codes", kHeadDim, kBits);
  print_table<bd::VCodes<kHeadDim, kBits>>("v_codes", kHeadDim, kBits);
}

template <int kHeadDim, int kGroup>
void print_params() {
  print_table<bd::KParamsPerChannel<kHeadDim, kGroup>>("k_params_channel", kHeadDim, kGroup);
  if constexpr (kHeadDim % kGroup == 0) {
    print_table<bd::KParamsPerToken<kHeadDim, kGroup>>("k_params_token", kHeadDim, kGroup);
    print_table<bd::VParams<kHeadDim, kGroup>>("v_params", kHeadDim, kGroup);
  }
}

template <int kHeadDim>
void print_head_dim() {
  print_codes<kHeadDim, 8>();
  print_codes<kHeadDim, 4>();
  print_codes<kHeadDim, 2>();
  print_params<kHeadDim, 32>();
  print_params<kHeadDim, 64>();
  print_params<kHeadDim, 128>();
  print_table<decltype(cute::make_layout(cute::Layout<cute::_1, cute::_0>{}, bd::KMean<kHeadDim>{}))>("k_mean",
                                                                                                      kHeadDim, 0);
  print_plain(kHeadDim);
}

void print_sections(const bd::BlockSpec& s) {
  const bd::BlockSections b = bd::block_sections(s);
  std::printf("sections %d %d %d %d %d %d %d %d %d", s.head_dim, s.k_bits, s.v_bits, s.k_per_token, s.k_group,
              s.v_group, s.k_symmetric, s.v_symmetric, s.k_mean);
  for (const bd::BlockSection& each : {b.k_codes, b.k_scale, b.k_zero, b.k_mean, b.v_codes, b.v_scale, b.v_zero}) {
    std::printf(" %d %d", static_cast<int>(each.offset), static_cast<int>(each.bytes));
  }
  std::printf(" %d\n", static_cast<int>(b.block_bytes));
}

int main() {
  print_head_dim<64>();
  print_head_dim<96>();
  print_head_dim<128>();
  print_head_dim<256>();
  for (int head_dim : {64, 96, 128, 256}) {
    for (int k_bits : {8, 4, 2}) {
      for (int v_bits : {8, 4, 2}) {
        for (int k_group : {32, 64, 128}) {
          for (int v_group : {32, 64, 128}) {
            for (int flags = 0; flags < 16; ++flags) {
              const bool k_per_token = flags & 1;
              if (head_dim % v_group != 0 || (k_per_token && head_dim % k_group != 0)) continue;
              print_sections({head_dim, k_bits, v_bits, k_per_token, k_group, v_group, (flags & 2) != 0,
                              (flags & 4) != 0, (flags & 8) != 0});
            }
          }
        }
      }
    }
  }
}
