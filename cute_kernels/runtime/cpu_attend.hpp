// What decode and append on the CPU share with their loops in cpu_attend.cpp and cpu_quantise.cpp, which are compiled
// once per instruction set.
#pragma once

#include <cstdint>

#include "bitdecoding/block_format.hpp"

namespace bitdecoding::cpu {

constexpr int kMaxHeadDim = 256;
constexpr float kValueLimit = 32768.0f;  // of what is quantised: products of the kernels stay finite
constexpr int kMaxGroups = 8;            // parameter groups of a row: channels of a head in groups of 32
constexpr int kTileRows = 4;             // rows of queries that are multiplied at once: what 16 vector registers hold
constexpr int kMaxColumnSteps = kMaxHeadDim / 4;

enum class Type { float16, bfloat16, float32 };

// The words of a code section after each slice's lanes have been transposed: eight words that differ only in A's row g
// (eight adjacent rows) are a vector, so a vector's codes lie in one column. Sums of what CodeLayout gives for the
// parts.
struct CodeWalk {
  int chunks = 0;        // units of transposition: a lane vector of all lanes
  int vector_words = 0;  // words of a lane in a chunk
  int num_units = 0;     // row coordinate = unit_rows[unit] + pair * pair_rows + 8 * r0 + g
  int pair_rows = 0;
  int pair_word = 0;  // 0: the pair shares words
  int r1_word = 0;    // column + 8; 0: in the same word
  int unit_rows[8] = {};
  int unit_word[8] = {};
  int num_steps = 0;  // column coordinate = step_column[step] + 8 * r1 + e
  int step_column[kMaxColumnSteps] = {};
  int step_word[kMaxColumnSteps] = {};
};

CodeWalk code_walk(const CodeLayout& layout);

// How K or V is stored.
struct StoredOperand {
  int bits = 0;
  CodeWalk walk;
  BlockSection codes, scale, zero, mean;
  int group = 0;  // values of a parameter group
};

struct Format {
  int head_dim = 0;
  std::int64_t block_bytes = 0;
  bool k_per_token = false;
  StoredOperand k, v;
};

Format make_format(const BlockSpec& spec);

// Queries of one KV head, and the softmax over the keys that they have seen: row = (query head of the group, query).
// Scores are in units of log2, so a row's weights are exp2(score - largest).
struct Rows {
  int count = 0;
  const float* queries = nullptr;        // [count, head_dim], times softmax scale and log2(e)
  const std::int64_t* oldest = nullptr;  // [count], the first position that a row sees
  const std::int64_t* newest = nullptr;  // [count], the last one
  float softcap = 0.0f;                  // in units of log2; 0: none
  float* out = nullptr;                  // [count, head_dim], sum of weight * value
  float* largest = nullptr;              // [count], -inf: no key yet
  float* sum = nullptr;                  // [count], of the weights
};

// Blocks of one KV head.
struct Blocks {
  const unsigned char* pages = nullptr;  // of this head
  std::int64_t page_stride = 0;          // bytes
  const std::int32_t* table = nullptr;   // the sequence's row
  std::int64_t begin = 0, end = 0;       // columns of the table
  std::int64_t position = 0;             // of the first token of column 0
  std::int64_t packed_len = 0;           // tokens in pages, from column 0 on
};

// Tokens that are not quantised, of one KV head.
struct Tokens {
  Type type = Type::float16;
  const unsigned char* k = nullptr;
  const unsigned char* v = nullptr;
  std::int64_t stride = 0;  // bytes from token to token
  std::int64_t count = 0;
  std::int64_t position = 0;
};

// Working memory of one thread; 32-byte aligned.
struct alignas(64) Scratch {
  std::uint32_t k_words[kBlockTokens * kMaxHeadDim / 4];
  std::uint32_t v_words[kBlockTokens * kMaxHeadDim / 4];
  float k_scale[kBlockTokens * kMaxGroups];  // per channel: [token group, channel]; per token: [channel group, token]
  float k_zero[kBlockTokens * kMaxGroups];
  float k_mean[kMaxHeadDim];
  float v_scale[kMaxGroups * kBlockTokens];  // [channel group, token]
  float v_zero[kMaxGroups * kBlockTokens];
  float operand[kTileRows * kMaxHeadDim];  // the small operand of a product: queries or weights, times scales
  float product[kTileRows * kBlockTokens];
  float scores[kTileRows * kBlockTokens];  // of one tile; then its weights
  float values[kMaxHeadDim];               // a token
};

// How values become codes.
struct Quantiser {
  int bits = 0;
  int group = 0;  // rows that share a scale
  bool symmetric = false;
  float clip = 1.0f;  // as in AppendParams
};

struct Extent {
  int size = 0;   // of columns: a multiple of eight
  int valid = 0;  // the first ones; the others are not looked at
};

// count values (a multiple of eight) as fp32: NaN as 0, the others at most kValueLimit in magnitude.
using Load = void(const unsigned char* from, Type type, int count, float* to);

// x [rows, columns] -> codes [rows, columns], scale and zero fp16 [rows / group, columns]. Only what valid rows and
// columns need is written, in whole vectors of columns.
using Quantise = void(const Quantiser& quantiser, const float* x, const Extent& rows, const Extent& columns,
                      unsigned char* codes, std::uint16_t* scale, std::uint16_t* zero);

// The loops of one instruction set.
struct Loops {
  void (*blocks)(const Format& format, const Blocks& blocks, const Rows& rows, Scratch* scratch);
  void (*tokens)(int head_dim, const Tokens& tokens, const Rows& rows, Scratch* scratch);
  Load* load;
  Quantise* quantise;
};

namespace baseline {
extern const Loops kLoops;
}
namespace avx2 {
extern const Loops kLoops;  // where BITDECODING_CPU_AVX2 is defined
}

// Those that this machine has; the environment variable BITDECODING_CPU=baseline is for tests and for comparing.
const Loops& loops();

}  // namespace bitdecoding::cpu
