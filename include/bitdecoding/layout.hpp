// The layouts of a cache block as CuTe types, for device code: the C++ side of cute_kernels/layouts.py, which explains
// them. Codes map to bits, parameters to fp16 elements, both counted from the beginning of their section
// (block_format.hpp). Needs the CuTe headers; nothing else of this library does.
#pragma once

#include <cute/layout.hpp>

namespace bitdecoding {

namespace layout_detail {

using namespace cute;

constexpr int kTile = 16;
constexpr int kLanes = 32;
constexpr int kWordBits = 32;
constexpr int kHalfBits = 16;
constexpr int kNumSlices = 4;  // of 32 tokens

// (lane, value) -> row + 16 * column of A, n + 8 * k of B, of mma.m16n8k16
using MmaA = Layout<Shape<Shape<_4, _8>, Shape<_2, _2, _2>>, Stride<Stride<_32, _1>, Stride<_16, _8, _128>>>;
using MmaB = Layout<Shape<Shape<_4, _8>, Shape<_2, _2>>, Stride<Stride<_16, _1>, Stride<_8, _64>>>;

// (token, channel) -> bit. K has tokens as the rows of A, V has channels.
template <bool kIsK, int kHeadDim, int kBits>
CUTE_HOST_DEVICE constexpr auto codes() {
  constexpr int kTiles = kHeadDim / kTile;
  constexpr int kWords = kTiles * kBits / 2;  // of a lane in a slice
  constexpr int kVectorWords = kWords % 4 == 0 ? 4 : 2;
  constexpr int kLaneBits = kVectorWords * kWordBits;
  // word of a lane -> bit: words of a vector are adjacent, then come the other lanes' vectors
  using Place =
      Layout<Shape<Int<kVectorWords>, Int<kWords / kVectorWords>>, Stride<Int<kWordBits>, Int<kLanes * kLaneBits>>>;

  // The order of a lane's words, fastest first: at 8 bits the halves of a tile; then K: channel tile 2j or 2j+1, token
  // tile, j; V: token tile, half of head_dim, channel tile. At 2 bits the second of these is inside the word.
  constexpr int kUnit = kBits == 8 ? 2 : 1;
  auto first = composition(Place{}, Layout<_2, Int<kUnit>>{});
  auto second = [] {
    if constexpr (kBits == 2) {
      return Layout<_2, Int<kBits>>{};
    } else {
      return composition(Place{}, Layout<_2, Int<2 * kUnit>>{});
    }
  }();
  auto third = composition(Place{}, Layout<Int<kTiles / 2>, Int<kBits == 2 ? 2 : 4 * kUnit>>{});

  using R0 = Int<kBits == 8 ? 8 : 4>;          // rows + 8: the next code
  using R1 = Int<kBits == 8 ? kWordBits : 8>;  // columns + 8: the next byte or word
  using TvBits = Layout<Shape<Shape<_4, _8>, Shape<_2, _2, _2>>,
                        Stride<Stride<Int<kLaneBits>, Int<4 * kLaneBits>>, Stride<Int<kHalfBits>, R0, R1>>>;
  auto tile = composition(composition(TvBits{}, right_inverse(MmaA{})), Layout<Shape<Int<kTile>, Int<kTile>>>{});
  auto row = layout<0>(tile);
  auto column = layout<1>(tile);
  using Slices = Layout<Int<kNumSlices>, Int<kWords * kLanes * kWordBits>>;
  if constexpr (kIsK) {
    return make_layout(make_layout(row, second, Slices{}), make_layout(column, first, third));
  } else {
    return make_layout(make_layout(column, first, Slices{}), make_layout(row, third, second));
  }
}

// Index along the k dimension of B -> fp16 element.
template <int kExtent>
CUTE_HOST_DEVICE constexpr auto b_order() {
  using Tv = Layout<Shape<Shape<_4, _8>, Shape<_2, _2>>, Stride<Stride<_8, _0>, Stride<_1, _2>>>;
  auto k = composition(composition(Tv{}, right_inverse(MmaB{})), Layout<Int<kTile>, _8>{});
  return make_layout(k, Layout<_2, _4>{}, Layout<Int<kExtent / (2 * kTile)>, Int<2 * kTile>>{});
}

// (token, channel group) -> fp16 element.
template <int kGroups>
CUTE_HOST_DEVICE constexpr auto row_order() {
  using Token = Layout<Shape<_8, _2, _2, Int<kNumSlices>>, Stride<Int<4 * kGroups>, _1, _2, Int<2 * kTile * kGroups>>>;
  return make_layout(Token{}, Layout<Int<kGroups>, _4>{});
}

// (group along the slow dimension, index along B's k dimension) -> fp16 element.
template <int kGroups, int kExtent>
CUTE_HOST_DEVICE constexpr auto grouped_b_order() {
  return make_layout(Layout<Int<kGroups>, Int<kExtent>>{}, b_order<kExtent>());
}

}  // namespace layout_detail

// (token, channel) -> bit
template <int kHeadDim, int kBits>
using KCodes = decltype(layout_detail::codes<true, kHeadDim, kBits>());
template <int kHeadDim, int kBits>
using VCodes = decltype(layout_detail::codes<false, kHeadDim, kBits>());
// scale and zero of K, k_axis "channel": (token group, channel) -> fp16 element
template <int kHeadDim, int kGroup>
using KParamsPerChannel = decltype(layout_detail::grouped_b_order<128 / kGroup, kHeadDim>());
// scale and zero of K, k_axis "token": (token, channel group) -> fp16 element
template <int kHeadDim, int kGroup>
using KParamsPerToken = decltype(layout_detail::row_order<kHeadDim / kGroup>());
// the block's mean key: channel -> fp16 element
template <int kHeadDim>
using KMean = decltype(layout_detail::b_order<kHeadDim>());
// scale and zero of V: (channel group, token) -> fp16 element
template <int kHeadDim, int kGroup>
using VParams = decltype(layout_detail::grouped_b_order<kHeadDim / kGroup, 128>());

}  // namespace bitdecoding
