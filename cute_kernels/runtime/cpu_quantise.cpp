// Codes and parameters of a block's operand; python/bitdecoding/quantization.py says what they are, bit by bit.
//
// Compiled once per instruction set; see cpu_vectors.hpp. Never with fused multiply-add: every operation rounds.
#include "cpu_vectors.hpp"

namespace bitdecoding::cpu {
namespace {

constexpr float kMinScale = 0x1p-24f;   // the smallest fp16
constexpr float kZeroLimit = 0x1p-10f;  // scale >= max|x| * kZeroLimit
constexpr int kSearchSteps = 20;        // factors 1 - i / 32
constexpr float kSearchStep = 1.0f / 32;
constexpr float kRound = 0x1p23f;  // added to 0 .. 255 it leaves the nearest integer in the low bits

BITDECODING_INLINE F32 at_least(F32 x, F32 least) { return x < least ? least : x; }
BITDECODING_INLINE F32 at_most(F32 x, F32 most) { return x > most ? most : x; }
BITDECODING_INLINE F32 magnitude(F32 x) { return from_bits((U32)x & 0x7fffffffu); }

struct Parameters {
  F32 scale, zero;  // values of fp16 numbers
};

BITDECODING_INLINE Parameters parameters(F32 lo, F32 hi, float levels, bool symmetric) {
  const F32 largest = at_least(magnitude(lo), magnitude(hi));
  const auto rounded = [](F32 x) { return half_to_float(float_to_half(x)); };
  if (symmetric) return {rounded(at_least(largest / (levels * 0.5f), splat(kMinScale))), splat(levels * -0.5f)};
  const F32 scale = at_least((hi - lo) / levels, largest * kZeroLimit);
  const F32 rounded_scale = rounded(at_least(scale, splat(kMinScale)));
  return {rounded_scale, rounded(lo / rounded_scale) + 0.0f};  // + 0: no negative zero
}

BITDECODING_INLINE Parameters shrunk(F32 lo, F32 hi, float factor, float levels, bool symmetric) {
  if (symmetric) {
    const F32 end = at_least(magnitude(lo), magnitude(hi)) * factor;
    return parameters(-end, end, levels, true);
  }
  const F32 middle = (lo + hi) * 0.5f, half = (hi - lo) * 0.5f * factor;
  return parameters(middle - half, middle + half, levels, false);
}

// x + 2^23 of the code
BITDECODING_INLINE F32 encoded(F32 x, F32 inverse, F32 zero, float levels) {
  return at_most(at_least(x * inverse - zero, splat(0.0f)), splat(levels)) + kRound;
}

// Squared error of a group, summed by adding its upper half to its lower half until one is left.
BITDECODING_INLINE F32 squared_error(const F32* x, int valid, int group, const Parameters& p, float levels) {
  F32 error[kBlockTokens];
  const F32 inverse = 1.0f / p.scale;
  for (int i = 0; i < valid; ++i) {
    const F32 difference = (encoded(x[i], inverse, p.zero, levels) - kRound + p.zero) * p.scale - x[i];
    error[i] = difference * difference;
  }
  for (int i = valid; i < group; ++i) error[i] = splat(0.0f);
  for (int n = group / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) error[i] += error[i + n];
  }
  return error[0];
}

BITDECODING_INLINE Parameters searched(const F32* x, int valid, int group, F32 lo, F32 hi, float levels,
                                       bool symmetric) {
  F32 least = splat(kInfinity);
  Parameters best = {lo, hi};
  for (int i = 0; i < kSearchSteps; ++i) {
    const Parameters p = shrunk(lo, hi, 1.0f - static_cast<float>(i) * kSearchStep, levels, symmetric);
    const F32 error = squared_error(x, valid, group, p, levels);
    const I32 better = error < least;
    least = better ? error : least;
    best.scale = better ? p.scale : best.scale;
    best.zero = better ? p.zero : best.zero;
  }
  return best;
}

// Eight columns of a group of rows.
BITDECODING_INLINE void quantise_group(const Quantiser& q, const float* from, int columns, int valid,
                                       unsigned char* codes, std::uint16_t* scale, std::uint16_t* zero) {
  const float levels = static_cast<float>((1 << q.bits) - 1);
  F32 x[kBlockTokens];
  F32 lo = splat(kInfinity), hi = splat(-kInfinity);
  for (int i = 0; i < valid; ++i) {
    x[i] = load<F32>(from + i * columns);
    lo = at_most(lo, x[i]);
    hi = at_least(hi, x[i]);
  }
  Parameters p;
  if (q.clip == 0.0f) {
    p = searched(x, valid, q.group, lo, hi, levels, q.symmetric);
  } else if (q.clip == 1.0f) {
    p = parameters(lo, hi, levels, q.symmetric);
  } else {
    p = shrunk(lo, hi, q.clip, levels, q.symmetric);
  }
  const F32 inverse = 1.0f / p.scale;
  for (int i = 0; i < valid; ++i) {
    const U32 bits = (U32)encoded(x[i], inverse, p.zero, levels);
    for (int j = 0; j < kLanes; ++j) codes[i * columns + j] = static_cast<unsigned char>(bits[j]);
  }
  store(scale, float_to_half(p.scale));
  store(zero, float_to_half(p.zero));
}

}  // namespace

namespace BITDECODING_CPU_ISA {

void load(const unsigned char* from, Type type, int count, float* to) {
  const int bytes = type == Type::float32 ? 4 : 2;
  for (int i = 0; i < count; i += kLanes) {
    F32 x = load_element(from + bytes * i, type);
    x = x == x ? x : splat(0.0f);
    store(to + i, at_most(at_least(x, splat(-kValueLimit)), splat(kValueLimit)));
  }
}

void quantise(const Quantiser& q, const float* x, const Extent& rows, const Extent& columns, unsigned char* codes,
              std::uint16_t* scale, std::uint16_t* zero) {
  for (int first = 0; first < rows.valid; first += q.group) {
    const int left = rows.valid - first;
    const std::int64_t params = static_cast<std::int64_t>(first / q.group) * columns.size;
    for (int c = 0; c < columns.valid; c += kLanes) {
      const std::int64_t at = static_cast<std::int64_t>(first) * columns.size + c;
      quantise_group(q, x + at, columns.size, left < q.group ? left : q.group, codes + at, scale + params + c,
                     zero + params + c);
    }
  }
}

}  // namespace BITDECODING_CPU_ISA
}  // namespace bitdecoding::cpu
