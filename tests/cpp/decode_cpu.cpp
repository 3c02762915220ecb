// A C++ user without a GPU: fills blocks by hand through the layouts, decodes them on the CPU, and compares with fp64
// attention over the values that the bytes stand for. Prints the instruction set and the largest relative error.
// Arguments: the head_dims to check, by default all.
#include <algorithm>
#include <bitdecoding/block_format.hpp>
#include <bitdecoding/cpu.hpp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "random_cache.hpp"

namespace bd = bitdecoding;
using random_cache::Cache;
using random_cache::Random;

namespace {

constexpr int kBatch = 2, kQueryLen = 2, kQueryHeads = 6, kHeads = 2, kTailCapacity = 40, kSinks = 3;
constexpr int kSeqlens[kBatch] = {kSinks + 2100 + 33, kSinks + 200};
constexpr int kPacked[kBatch] = {2100, 200};
constexpr int kMaxPages = 17;
constexpr int kWindow = 2000;

// All values here are bfloat16, so that tests need no conversion to half precision but for a block's parameters.
float bfloat16_value(std::uint16_t x) {
  const std::uint32_t bits = std::uint32_t{x} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

std::uint16_t bfloat16(double value) {
  const float x = static_cast<float>(value);
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return static_cast<std::uint16_t>(bits >> 16);
}

// Relative error of a decode of this format; negative if the library refused or threads changed the result.
double check(const bd::QuantSpec& quant, int head_dim) {
  Random random;
  const int num_pages = kBatch * kMaxPages;
  const Cache cache = make_cache(&random, random_cache::block_spec(quant, head_dim), num_pages, kHeads);
  std::vector<std::int32_t> table(num_pages);
  for (int i = 0; i < num_pages; ++i) table[i] = num_pages - 1 - i;
  auto random_tokens = [&](std::int64_t count) {
    std::vector<std::uint16_t> x(count * head_dim);
    for (std::uint16_t& each : x) each = bfloat16(random.uniform());
    return x;
  };
  const auto q = random_tokens(std::int64_t{kBatch} * kQueryLen * kQueryHeads);
  const auto tail_k = random_tokens(kBatch * kTailCapacity * kHeads);
  const auto tail_v = random_tokens(kBatch * kTailCapacity * kHeads);
  const auto sink_k = random_tokens(kBatch * kSinks * kHeads), sink_v = random_tokens(kBatch * kSinks * kHeads);
  std::vector<float> logits(kQueryHeads), lse(kBatch * kQueryLen * kQueryHeads), again_lse(lse.size());
  for (float& each : logits) each = static_cast<float>(random.uniform());
  std::vector<float> out(q.size()), again(q.size());
  const auto widen = [](const std::vector<std::uint16_t>& from) {
    std::vector<float> to(from.size());
    std::transform(from.begin(), from.end(), to.begin(), bfloat16_value);
    return to;
  };
  const auto q_f = widen(q), tail_k_f = widen(tail_k), tail_v_f = widen(tail_v);
  const auto sink_k_f = widen(sink_k), sink_v_f = widen(sink_v);

  const double scale = 1.0 / std::sqrt(head_dim), softcap = 5.0;
  bd::DecodeParams p;
  p.q = q_f.data();
  p.pages = cache.pages.data();
  p.block_table = table.data();
  p.seqlens = kSeqlens;
  p.packed_lens = kPacked;
  p.tail_k = tail_k_f.data();
  p.tail_v = tail_v_f.data();
  p.sink_k = sink_k_f.data();
  p.sink_v = sink_v_f.data();
  p.sink_logits = logits.data();
  p.out = out.data();
  p.lse = lse.data();
  p.head_stride_bytes = bd::block_bytes(head_dim, quant);
  p.page_stride_bytes = kHeads * p.head_stride_bytes;
  p.batch = kBatch;
  p.q_len = kQueryLen;
  p.num_q_heads = kQueryHeads;
  p.num_kv_heads = kHeads;
  p.max_pages = kMaxPages;
  p.tail_capacity = kTailCapacity;
  p.num_sink = kSinks;
  p.window = kWindow;
  p.softmax_scale_log2 = static_cast<float>(scale * 1.4426950408889634);
  p.softcap = static_cast<float>(softcap);
  bd::CpuDecodeOptions options;
  options.quant = quant;
  options.head_dim = head_dim;
  options.num_pages = num_pages;
  options.float32 = true;
  options.num_threads = 1;
  if (bd::decode_cpu(p, options) != bd::Status::ok) return -1.0;
  options.num_threads = 3;
  p.out = again.data();
  p.lse = again_lse.data();
  if (bd::decode_cpu(p, options) != bd::Status::ok || again != out || again_lse != lse) return -2.0;

  double error = 0.0, norm = 0.0;
  for (int b = 0; b < kBatch; ++b) {
    for (int i = 0; i < kQueryLen; ++i) {
      for (int h = 0; h < kQueryHeads; ++h) {
        const int kv_head = h / (kQueryHeads / kHeads), newest = kSeqlens[b] - kQueryLen + i;
        const std::int64_t row = ((b * kQueryLen + i) * kQueryHeads + h);
        // value of channel c of K or V at a position
        auto at = [&](int position, int c, bool is_k) -> double {
          if (position < kSinks) {
            return (is_k ? sink_k_f : sink_v_f)[((b * kSinks + position) * kHeads + kv_head) * head_dim + c];
          }
          const int token = position - kSinks;
          if (token >= kPacked[b]) {
            const std::int64_t index = (b * kTailCapacity + token - kPacked[b]) * kHeads + kv_head;
            return (is_k ? tail_k_f : tail_v_f)[index * head_dim + c];
          }
          const std::int64_t block = table[b * kMaxPages + token / bd::kBlockTokens] * kHeads + kv_head;
          const std::int64_t in_block = token % bd::kBlockTokens * head_dim + c;
          return (is_k ? cache.k : cache.v)[block * bd::kBlockTokens * head_dim + in_block];
        };
        std::vector<double> sums(head_dim, 0.0);
        double total = std::exp(logits[h]);
        for (int position = std::max(0, newest - kWindow + 1); position <= newest; ++position) {
          double score = 0.0;
          for (int c = 0; c < head_dim; ++c) score += q_f[row * head_dim + c] * at(position, c, true);
          const double weight = std::exp(softcap * std::tanh(score * scale / softcap));
          total += weight;
          for (int c = 0; c < head_dim; ++c) sums[c] += weight * at(position, c, false);
        }
        for (int c = 0; c < head_dim; ++c) {
          const double want = sums[c] / total, difference = out[row * head_dim + c] - want;
          error += difference * difference;
          norm += want * want;
        }
        if (std::abs(lse[row] - std::log(total)) > 1e-4) return -3.0;
      }
    }
  }
  return std::sqrt(error / norm);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<int> head_dims;
  for (int i = 1; i < argc; ++i) head_dims.push_back(std::atoi(argv[i]));
  if (head_dims.empty()) head_dims = {64, 96, 128, 256};
  std::printf("%s\n", bd::cpu_instruction_set());
  double worst = 0.0;
  bool sound = true;
  for (const int head_dim : head_dims) {
    for (const int bits : {8, 4, 2}) {
      for (const bool per_token : {false, true}) {
        bd::QuantSpec quant;
        quant.k_bits = bits;
        quant.v_bits = bits == 8 ? 2 : 2 * bits;
        quant.k_axis = per_token ? "token" : "channel";
        quant.k_group = head_dim == 128 ? 128 : 32;
        quant.v_group = head_dim == 96 ? 32 : 64;
        quant.k_symmetric = per_token;
        quant.v_symmetric = bits == 2;
        quant.k_mean = bits == 4 ? "block" : "none";
        const double error = check(quant, head_dim);
        if (error < 0.0) {
          std::printf("%s at %d: %g %s\n", quant.name().c_str(), head_dim, error, bd::last_error());
          sound = false;
        }
        worst = std::max(worst, error);
      }
    }
  }
  std::printf("%g\n", worst);
  return sound && worst < 1e-3 ? 0 : 1;
}
