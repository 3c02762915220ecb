// Attention over cache blocks and 16-bit tokens with vectors of eight floats.
//
// Compiled once per instruction set; see cpu_vectors.hpp.
//
// A block, for up to kTileRows rows of queries at once:
//   words    eight words whose codes lie in eight adjacent rows of A become a vector (CodeWalk); K and V alike
//   scores   code * (query * scale): scales and zeros of a channel go into the query, those of a token to its score
//   weights  running maximum, exp2
//   out      code * (weight * scale); the zeros' part is one number per row of queries and channel group
// A code costs a shift, an AND, a conversion, and one FMA per query.
#include "cpu_attend.hpp"

#include "cpu_vectors.hpp"

namespace bitdecoding::cpu {
namespace {

#ifdef __clang__
#define BITDECODING_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define BITDECODING_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (U32){__VA_ARGS__})
#endif

constexpr int kLineBytes = 64;

BITDECODING_INLINE float sum(F32 x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

// 2^x, to 2e-7 of the result; 0 below 2^-126. For x <= 0, NaN stays.
BITDECODING_INLINE F32 exp2(F32 x) {
  constexpr float kRound = 0x1.8p23f;  // adding and subtracting it rounds to an integer
  constexpr float kLeast = -126.0f;
  const I32 vanishes = x < kLeast;
  x = vanishes ? splat(kLeast) : x;
  const F32 whole = (x + kRound) - kRound;
  const F32 f = x - whole;  // Taylor: (ln 2)^n / n!
  F32 y = splat(1.5403530e-4f);
  y = y * f + 1.3333558e-3f;
  y = y * f + 9.6181291e-3f;
  y = y * f + 5.5504109e-2f;
  y = y * f + 2.4022651e-1f;
  y = y * f + 6.9314718e-1f;
  y = y * f + 1.0f;
  const F32 power = (F32)((__builtin_convertvector(whole, I32) + 127) << 23);
  return from_bits((U32)(y * power) & ~(U32)vanishes);
}

BITDECODING_INLINE float exp2_of(float x) { return exp2(splat(x))[0]; }

// cap * tanh(x / cap)
BITDECODING_INLINE F32 soft_cap(F32 x, float cap) {
  constexpr float kTwoLog2E = 2.8853901f;
  const F32 y = x * (1.0f / cap);
  const F32 magnitude = (F32)((U32)y & 0x7fffffffu);
  const F32 e = exp2(magnitude * -kTwoLog2E);
  const F32 bounded = (1.0f - e) / (1.0f + e);
  return (F32)((U32)bounded | ((U32)y & 0x80000000u)) * cap;
}

// ---- from a block to words and parameters ----

// Four words from each of two places.
BITDECODING_INLINE U32 load_halves(const unsigned char* low, const unsigned char* high) {
#ifdef __AVX2__
  return (U32)_mm256_inserti128_si256(_mm256_castsi128_si256(load<__m128i>(low)), load<__m128i>(high), 1);
#else
  U32 to;
  __builtin_memcpy(&to, low, sizeof(to) / 2);
  __builtin_memcpy(reinterpret_cast<unsigned char*>(&to) + sizeof(to) / 2, high, sizeof(to) / 2);
  return to;
#endif
}

// words[chunk][word of four lanes] are vectors of A's rows g = 0..7; a lane of row g is 4 g + t.
void transpose(const unsigned char* codes, const CodeWalk& walk, std::uint32_t* words) {
  const int row_words = 4 * walk.vector_words;
  const auto* from = codes;
  for (int chunk = 0; chunk < walk.chunks; ++chunk) {
    for (int first = 0; first < row_words; first += kLanes) {
      U32 a[kLanes], b[kLanes];  // a[i]: words 0 to 3 of rows i and i + 4, a[i + 4]: words 4 to 7
      for (int i = 0; i < kLanes; ++i) {
        const unsigned char* row = from + 4 * (i % 4 * row_words + first + i / 4 * 4);
        a[i] = load_halves(row, row + 16 * row_words);
      }
      for (int i = 0; i < kLanes; i += 2) {
        b[i] = BITDECODING_SHUFFLE(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        b[i + 1] = BITDECODING_SHUFFLE(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
      }
      for (int i = 0; i < kLanes; i += 4) {
        for (int j = 0; j < 2; ++j) {
          store(words + kLanes * (i + 2 * j), BITDECODING_SHUFFLE(b[i + j], b[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13));
          store(words + kLanes * (i + 2 * j + 1),
                BITDECODING_SHUFFLE(b[i + j], b[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15));
        }
      }
      words += kLanes * kLanes;
    }
    from += 4 * kLanes * row_words;
  }
}

BITDECODING_INLINE void halves_to_floats(const std::uint16_t* from, int count, float* to) {
  for (int i = 0; i < count; i += kLanes) store(to + i, half_to_float(load<U16>(from + i)));
}

// fp16 parameters in B vector runs (b_order) -> fp32 in the order of their index.
void load_runs(const unsigned char* section, int count, float* to) {
  constexpr int kPeriod = 32;  // b_order(32 x + i) == 32 x + b_order(i); two adjacent indices are adjacent there too
  for (int x = 0; x < count; x += kPeriod) {
    std::uint16_t natural[kPeriod];
#pragma GCC unroll 16
    for (int i = 0; i < kPeriod; i += 2) __builtin_memcpy(natural + i, section + 2 * (x + b_order(i)), 4);
    halves_to_floats(natural, kPeriod, to + x);
  }
}

// fp16 parameters in rows (row_order) -> fp32 [group, token].
void load_rows(const unsigned char* section, int groups, float* to) {
  for (int group = 0; group < groups; ++group) {
    std::uint16_t natural[kBlockTokens];
    for (int token = 0; token < kBlockTokens; ++token) {
      __builtin_memcpy(natural + token, section + 2 * row_order(groups, token, group), 2);
    }
    halves_to_floats(natural, kBlockTokens, to + group * kBlockTokens);
  }
}

// Scales and zeros of K or V; a symmetric operand's zero is a constant.
void load_parameters(const unsigned char* block, const StoredOperand& x, bool rows, int count, float* scale,
                     float* zero) {
  const auto read = [=](std::int64_t offset, float* to) {
    if (rows) {
      load_rows(block + offset, count / kBlockTokens, to);
    } else {
      load_runs(block + offset, count, to);
    }
  };
  read(x.scale.offset, scale);
  if (x.zero.bytes > 0) {
    read(x.zero.offset, zero);
  } else {
    const float centre = -0.5f * static_cast<float>((1 << x.bits) - 1);
    for (int i = 0; i < count; i += kLanes) store(zero + i, splat(centre));
  }
}

// ---- products of codes and a small operand ----

// The fields of a word, the same for K, V and every head_dim. A field is converted where it lies: the power of two of
// its slot goes into the row's sum (r0, pair) or into the small operand (r1), so that codes need no shift.
template <int kBits>
struct Fields {
  static constexpr CodeLayout kLayout{Operand::k, 64, kBits};
  static constexpr int kE = kLayout(0, 1);
  static constexpr int kR0 = kLayout(8, 0);
  static constexpr int kR1 = kLayout(0, 8) % kWordBits;     // 0: another word
  static constexpr int kPair = kLayout(16, 0) % kWordBits;  // 0: another word
  static constexpr std::uint32_t kMask = (1u << kBits) - 1;
};

// The small operand of a product: to[i] = x[i] * scale[i] with the inverse power of two of the column's slot. Without
// scale: x. -> the sum of x[i] * scale[i] * zero[i], without zero of x[i] * scale[i].
BITDECODING_INLINE float make_operand(int bits, const float* x, const float* scale, const float* zero, int count,
                                      float* to) {
  static_assert(Fields<8>::kR1 == 0 && Fields<4>::kR1 == Fields<2>::kR1);
  const float factor =
      bits == 8 ? 1.0f : 1.0f / static_cast<float>(1 << Fields<4>::kR1);  // of columns 8 to 15 of a tile
  F32 even = splat(0.0f), odd = splat(0.0f);
  for (int i = 0; i < count; i += 2 * kLanes) {
    F32 a = load<F32>(x + i), b = load<F32>(x + i + kLanes);
    if (scale != nullptr) {
      a *= load<F32>(scale + i);
      b *= load<F32>(scale + i + kLanes);
    }
    store(to + i, a);
    store(to + i + kLanes, b * factor);
    even += zero != nullptr ? a * load<F32>(zero + i) : a;
    odd += zero != nullptr ? b * load<F32>(zero + i + kLanes) : b;
  }
  return sum(even + odd);
}

// Lines that will be needed soon, fetched one at a time between the products.
struct Ahead {
  const unsigned char* next = nullptr;
  const unsigned char* end = nullptr;
};

// out[q][row] += sum over the columns of steps of code[row, column] * b[q][column], q < kRows, for the 16 rows of a
// unit and pair. `out` points to the first of them; b has its column factors.
template <int kBits, int kRows, int kPair>
void multiply_tile(const CodeWalk& walk, const std::uint32_t* words, int step_begin, int step_end, const float* b,
                   float* out, int out_stride, Ahead* ahead) {
  using F = Fields<kBits>;
  constexpr int kSplit = kRows <= 2 ? 2 : 1;  // sums of even and odd columns: independent FMAs to hide their latency
  constexpr int kSlot = kPair * F::kPair;
  constexpr float kPower[2] = {static_cast<float>(1 << kSlot), static_cast<float>(1 << (kSlot + F::kR0))};

  F32 sums[kSplit][2][kRows];
#pragma GCC unroll 2
  for (int r0 = 0; r0 < 2; ++r0) {
#pragma GCC unroll 4
    for (int q = 0; q < kRows; ++q) {
      sums[kSplit - 1][r0][q] = splat(0.0f);
      sums[0][r0][q] = load<F32>(out + q * out_stride + 8 * r0) * kPower[r0];
    }
  }
  for (int step = step_begin; step < step_end; ++step) {
    const float* column = b + walk.step_column[step];
    const std::uint32_t* at = words + kLanes * walk.step_word[step];
    if (ahead->next < ahead->end) {
      __builtin_prefetch(ahead->next);
      ahead->next += kLineBytes;
    }
#pragma GCC unroll 2
    for (int r1 = 0; r1 < 2; ++r1) {
      const U32 word = load<U32>(at + (F::kR1 == 0 ? kLanes * r1 * walk.r1_word : 0));
#pragma GCC unroll 2
      for (int e = 0; e < 2; ++e) {
        const U32 fields = word >> (F::kE * e);
        F32 codes[2];
#pragma GCC unroll 2
        for (int r0 = 0; r0 < 2; ++r0) {
          const std::uint32_t mask = F::kMask << (kSlot + F::kR1 * r1 + F::kR0 * r0);
          codes[r0] = __builtin_convertvector((I32)(fields & mask), F32);
        }
#pragma GCC unroll 4
        for (int q = 0; q < kRows; ++q) {
          const F32 operand = splat(column[q * kMaxHeadDim + 8 * r1 + e]);
          sums[e % kSplit][0][q] += codes[0] * operand;
          sums[e % kSplit][1][q] += codes[1] * operand;
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int r0 = 0; r0 < 2; ++r0) {
#pragma GCC unroll 4
    for (int q = 0; q < kRows; ++q) {
      F32 total = sums[0][r0][q];
      if (kSplit == 2) total += sums[kSplit - 1][r0][q];
      store(out + q * out_stride + 8 * r0, total * (1.0f / kPower[r0]));
    }
  }
}

struct Product {
  const StoredOperand* x;
  const std::uint32_t* words;
  int row_begin, row_end;
  int step_begin, step_end;
  const float* b;  // [kTileRows, kMaxHeadDim], with column factors
  float* out;      // [rows of queries, out_stride], at row 0 of A
  int out_stride;
  Ahead* ahead;
};

template <int kBits, int kRows>
void multiply_rows(const Product& p) {
  const CodeWalk& walk = p.x->walk;
  for (int unit = 0; unit < walk.num_units; ++unit) {
    for (int pair = 0; pair < 2; ++pair) {
      const int row = walk.unit_rows[unit] + pair * walk.pair_rows;
      if (row < p.row_begin || row >= p.row_end) continue;
      const std::uint32_t* words = p.words + kLanes * (walk.unit_word[unit] + pair * walk.pair_word);
      const auto tile = pair == 0 ? multiply_tile<kBits, kRows, 0> : multiply_tile<kBits, kRows, 1>;
      tile(walk, words, p.step_begin, p.step_end, p.b, p.out + row, p.out_stride, p.ahead);
    }
  }
}

template <int kBits>
void multiply_bits(int rows, const Product& p) {
  switch (rows) {
    case 1:
      return multiply_rows<kBits, 1>(p);
    case 2:
      return multiply_rows<kBits, 2>(p);
    case 3:
      return multiply_rows<kBits, 3>(p);
    default:
      return multiply_rows<kBits, kTileRows>(p);
  }
}

void multiply(int rows, const Product& p) {
  switch (p.x->bits) {
    case 8:
      return multiply_bits<8>(rows, p);
    case 4:
      return multiply_bits<4>(rows, p);
    default:
      return multiply_bits<2>(rows, p);
  }
}

BITDECODING_INLINE float dot(const float* a, const float* b, int count) {
  F32 total = splat(0.0f);
  for (int i = 0; i < count; i += kLanes) total += load<F32>(a + i) * load<F32>(b + i);
  return sum(total);
}

// ---- softmax ----

// Rows [first, first + count) of the queries, and which of up to 128 keys each of them sees.
struct Tile {
  int first = 0;
  int count = 0;
  int low[kTileRows], high[kTileRows];  // keys low .. high - 1
};

// false: no row sees any key.
bool make_tile(const Rows& rows, int first, std::int64_t position, int keys, Tile* tile) {
  bool any = false;
  tile->first = first;
  tile->count = rows.count - first < kTileRows ? rows.count - first : kTileRows;
  for (int q = 0; q < tile->count; ++q) {
    const std::int64_t low = rows.oldest[first + q] - position, high = rows.newest[first + q] - position + 1;
    tile->low[q] = static_cast<int>(low < 0 ? 0 : low > keys ? keys : low);
    tile->high[q] = static_cast<int>(high < 0 ? 0 : high > keys ? keys : high);
    any |= tile->low[q] < tile->high[q];
  }
  return any;
}

// scores [tile rows, 128] become weights; the rows' sums and outputs are rescaled where their maximum grows.
void weigh(const Rows& rows, const Tile& tile, int head_dim, float* scores) {
  for (int q = 0; q < tile.count; ++q, scores += kBlockTokens) {
    const int row = tile.first + q;
    if (rows.softcap > 0.0f) {
      for (int i = 0; i < kBlockTokens; i += kLanes) store(scores + i, soft_cap(load<F32>(scores + i), rows.softcap));
    }
    for (int i = 0; i < tile.low[q]; ++i) scores[i] = -kInfinity;
    for (int i = tile.high[q]; i < kBlockTokens; ++i) scores[i] = -kInfinity;
    F32 highest = splat(rows.largest[row]);
    for (int i = 0; i < kBlockTokens; i += kLanes) {
      const F32 score = load<F32>(scores + i);
      highest = score > highest ? score : highest;
    }
    float largest = highest[0];
    for (int i = 1; i < kLanes; ++i) largest = highest[i] > largest ? highest[i] : largest;
    if (largest > rows.largest[row]) {
      const float rescale = exp2_of(rows.largest[row] - largest);
      float* out = rows.out + static_cast<std::int64_t>(row) * head_dim;
      for (int c = 0; c < head_dim; c += kLanes) store(out + c, load<F32>(out + c) * rescale);
      rows.sum[row] *= rescale;
      rows.largest[row] = largest;
    }
    const float reference = largest == -kInfinity ? 0.0f : largest;  // no key yet: all weights are 0
    F32 total = splat(0.0f);
    for (int i = 0; i < kBlockTokens; i += kLanes) {
      const F32 weight = exp2(load<F32>(scores + i) - reference);
      store(scores + i, weight);
      total += weight;
    }
    rows.sum[row] += sum(total);
  }
}

// ---- a block ----

void score_keys(const Format& format, const float* queries, int rows, Scratch* s, Ahead* ahead) {
  const int head_dim = format.head_dim, group = format.k.group;
  const int all_steps = format.k.walk.num_steps;
  float bias[kTileRows];
  for (int q = 0; q < rows; ++q) {
    bias[q] = format.k.mean.bytes > 0 ? dot(queries + q * head_dim, s->k_mean, head_dim) : 0.0f;
  }
  if (!format.k_per_token) {
    for (int token = 0; token < kBlockTokens; token += group) {
      const float* scale = s->k_scale + token / group * head_dim;
      const float* zero = s->k_zero + token / group * head_dim;
      for (int q = 0; q < rows; ++q) {
        const float zeros =
            make_operand(format.k.bits, queries + q * head_dim, scale, zero, head_dim, s->operand + q * kMaxHeadDim);
        const F32 start = splat(zeros + bias[q]);
        for (int t = 0; t < group; t += kLanes) store(s->scores + q * kBlockTokens + token + t, start);
      }
      multiply(rows,
               {&format.k, s->k_words, token, token + group, 0, all_steps, s->operand, s->scores, kBlockTokens, ahead});
    }
    return;
  }
  const int groups = head_dim / group;
  float sums[kTileRows][kMaxGroups];  // of the queries
  for (int q = 0; q < rows; ++q) {
    for (int m = 0; m < groups; ++m) {
      sums[q][m] = make_operand(format.k.bits, queries + q * head_dim + m * group, nullptr, nullptr, group,
                                s->operand + q * kMaxHeadDim + m * group);
    }
    for (int t = 0; t < kBlockTokens; t += kLanes) store(s->scores + q * kBlockTokens + t, splat(bias[q]));
  }
  for (int m = 0; m < groups; ++m) {
    for (int i = 0; i < rows * kBlockTokens; i += kLanes) store(s->product + i, splat(0.0f));
    const int steps = all_steps / groups;
    multiply(rows, {&format.k, s->k_words, 0, kBlockTokens, m * steps, (m + 1) * steps, s->operand, s->product,
                    kBlockTokens, ahead});
    for (int q = 0; q < rows; ++q) {
      for (int t = 0; t < kBlockTokens; t += kLanes) {
        float* score = s->scores + q * kBlockTokens + t;
        const F32 value =
            load<F32>(s->product + q * kBlockTokens + t) + load<F32>(s->k_zero + m * kBlockTokens + t) * sums[q][m];
        store(score, load<F32>(score) + load<F32>(s->k_scale + m * kBlockTokens + t) * value);
      }
    }
  }
}

void add_values(const Format& format, const Rows& rows, const Tile& tile, Scratch* s, Ahead* ahead) {
  const int head_dim = format.head_dim, group = format.v.group;
  float* out = rows.out + static_cast<std::int64_t>(tile.first) * head_dim;
  for (int m = 0; m < head_dim / group; ++m) {
    for (int q = 0; q < tile.count; ++q) {
      const float bias = make_operand(format.v.bits, s->scores + q * kBlockTokens, s->v_scale + m * kBlockTokens,
                                      s->v_zero + m * kBlockTokens, kBlockTokens, s->operand + q * kMaxHeadDim);
      float* channels = out + q * head_dim + m * group;
      for (int c = 0; c < group; c += kLanes) store(channels + c, load<F32>(channels + c) + bias);
    }
    multiply(tile.count, {&format.v, s->v_words, m * group, (m + 1) * group, 0, format.v.walk.num_steps, s->operand,
                          out, head_dim, ahead});
  }
}

void attend_blocks(const Format& format, const Blocks& blocks, const Rows& rows, Scratch* s) {
  for (std::int64_t column = blocks.begin; column < blocks.end; ++column) {
    const std::int64_t first = column * kBlockTokens;
    const std::int64_t left = blocks.packed_len - first;
    const int tokens = static_cast<int>(left < kBlockTokens ? left : kBlockTokens);
    const unsigned char* block = blocks.pages + blocks.table[column] * blocks.page_stride;
    Ahead ahead;
    if (column + 1 < blocks.end) {
      ahead.next = blocks.pages + blocks.table[column + 1] * blocks.page_stride;
      ahead.end = ahead.next + format.block_bytes;
    }
    bool loaded = false;
    for (int row = 0; row < rows.count; row += kTileRows) {
      Tile tile;
      if (!make_tile(rows, row, blocks.position + first, tokens, &tile)) continue;
      if (!loaded) {
        loaded = true;
        const int k_params = kBlockTokens / format.k.group * format.head_dim;
        const int v_params = format.head_dim / format.v.group * kBlockTokens;
        transpose(block + format.k.codes.offset, format.k.walk, s->k_words);
        load_parameters(block, format.k, format.k_per_token, k_params, s->k_scale, s->k_zero);
        if (format.k.mean.bytes > 0) load_runs(block + format.k.mean.offset, format.head_dim, s->k_mean);
        transpose(block + format.v.codes.offset, format.v.walk, s->v_words);
        load_parameters(block, format.v, false, v_params, s->v_scale, s->v_zero);
        for (int i = 0; tokens < kBlockTokens && i < v_params; ++i) {  // 0 * whatever is there would not be 0
          if (i % kBlockTokens >= tokens) s->v_scale[i] = s->v_zero[i] = 0.0f;
        }
      }
      score_keys(format, rows.queries + static_cast<std::int64_t>(row) * format.head_dim, tile.count, s, &ahead);
      weigh(rows, tile, format.head_dim, s->scores);
      add_values(format, rows, tile, s, &ahead);
    }
  }
}

// ---- tokens that are not quantised ----

template <Type kType>
BITDECODING_INLINE void attend_tokens_of(int head_dim, const Tokens& tokens, const Rows& rows, Scratch* s) {
  constexpr int kBytes = kType == Type::float32 ? 4 : 2;
  for (std::int64_t first = 0; first < tokens.count; first += kBlockTokens) {
    const std::int64_t left = tokens.count - first;
    const int count = static_cast<int>(left < kBlockTokens ? left : kBlockTokens);
    const unsigned char* k = tokens.k + first * tokens.stride;
    const unsigned char* v = tokens.v + first * tokens.stride;
    for (int row = 0; row < rows.count; row += kTileRows) {
      Tile tile;
      if (!make_tile(rows, row, tokens.position + first, count, &tile)) continue;
      const float* queries = rows.queries + static_cast<std::int64_t>(row) * head_dim;
      float* out = rows.out + static_cast<std::int64_t>(row) * head_dim;
      for (int t = 0; t < count; ++t) {
        for (int c = 0; c < head_dim; c += kLanes) {
          store(s->values + c, load_element(k + t * tokens.stride + kBytes * c, kType));
        }
        for (int q = 0; q < tile.count; ++q) {
          s->scores[q * kBlockTokens + t] = dot(queries + q * head_dim, s->values, head_dim);
        }
      }
      weigh(rows, tile, head_dim, s->scores);
      for (int t = 0; t < count; ++t) {
        for (int q = 0; q < tile.count; ++q) {
          if (t < tile.low[q] || t >= tile.high[q]) continue;
          const float weight = s->scores[q * kBlockTokens + t];
          float* to = out + q * head_dim;
          for (int c = 0; c < head_dim; c += kLanes) {
            store(to + c, load<F32>(to + c) + load_element(v + t * tokens.stride + kBytes * c, kType) * weight);
          }
        }
      }
    }
  }
}

void attend_tokens(int head_dim, const Tokens& tokens, const Rows& rows, Scratch* s) {
  switch (tokens.type) {
    case Type::float16:
      return attend_tokens_of<Type::float16>(head_dim, tokens, rows, s);
    case Type::bfloat16:
      return attend_tokens_of<Type::bfloat16>(head_dim, tokens, rows, s);
    case Type::float32:
      return attend_tokens_of<Type::float32>(head_dim, tokens, rows, s);
  }
}

}  // namespace

namespace BITDECODING_CPU_ISA {

Load load;  // cpu_quantise.cpp
Quantise quantise;

const Loops kLoops = {attend_blocks, attend_tokens, load, quantise};

}  // namespace BITDECODING_CPU_ISA
}  // namespace bitdecoding::cpu
