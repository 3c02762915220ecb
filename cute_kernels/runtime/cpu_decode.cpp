// Decode on the CPU: one task per (sequence, KV head, part of its keys), then one per (sequence, KV head) that merges
// the parts. How keys are divided depends on lengths and queries alone, so the result does not depend on the threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "bitdecoding/cpu.hpp"
#include "cpu_attend.hpp"
#include "elements.hpp"
#include "error.hpp"
#include "params.hpp"
#include "threads.hpp"

namespace bitdecoding {
namespace cpu {

CodeWalk code_walk(const CodeLayout& layout) {
  const bool is_k = layout.operand == Operand::k;
  const int n = layout.vector_words();
  // of A's row and column, where the row is a multiple of eight -> word of the transposed section
  auto word = [&](int row, int column) {
    const int stored = (is_k ? layout(row, column) : layout(column, row)) / kWordBits;
    const int chunk = kWarpLanes * n;
    return stored / chunk * 4 * n + stored % chunk;
  };
  CodeWalk walk;
  walk.vector_words = n;
  walk.chunks = kNumSlices * layout.words() / n;
  walk.num_units = is_k ? kNumSlices : layout.half();
  walk.pair_rows = is_k ? kTile : kTile * layout.half();
  walk.pair_word = word(walk.pair_rows, 0);
  walk.r1_word = word(0, 8);
  for (int unit = 0; unit < walk.num_units; ++unit) {
    walk.unit_rows[unit] = unit * (is_k ? kSliceTokens : kTile);
    walk.unit_word[unit] = word(walk.unit_rows[unit], 0);
  }
  for (int column = 0; column < (is_k ? layout.head_dim : kBlockTokens); ++column) {
    if (column % 2 != 0 || column / 8 % 2 != 0) continue;  // e and r1 lie inside a step
    walk.step_column[walk.num_steps] = column;
    walk.step_word[walk.num_steps++] = word(0, column);
  }
  return walk;
}

Format make_format(const BlockSpec& spec) {
  const BlockSections at = block_sections(spec);
  Format format;
  format.head_dim = spec.head_dim;
  format.block_bytes = at.block_bytes;
  format.k_per_token = spec.k_per_token;
  format.k = {
      spec.k_bits, code_walk({Operand::k, spec.head_dim, spec.k_bits}), at.k_codes, at.k_scale, at.k_zero, at.k_mean,
      spec.k_group};
  format.v = {spec.v_bits, code_walk({Operand::v, spec.head_dim, spec.v_bits}), at.v_codes, at.v_scale, at.v_zero, {},
              spec.v_group};
  return format;
}

const Loops& loops() {
#ifdef BITDECODING_CPU_AVX2
  static const bool has_avx2 = [] {
    const char* wanted = std::getenv("BITDECODING_CPU");
    if (wanted != nullptr && std::strcmp(wanted, "baseline") == 0) return false;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // all of these have F16C
  }();
  if (has_avx2) return avx2::kLoops;
#endif
  return baseline::kLoops;
}

namespace {

constexpr std::int64_t kMaxRows = 1 << 20;  // of a KV head
constexpr std::int64_t kPartBlocks = 16;    // work for about 100 us: little is lost where threads wait for the last
constexpr std::int64_t kPartRows = 512;  // with more, parts are longer: their results take no more than the cache does
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

Status validate(const DecodeParams& p, const CpuDecodeOptions& options) {
  BITDECODING_TRY(validate_params(p));
  if (options.num_threads < 0) {
    return fail(Status::invalid_argument, "num_threads=", options.num_threads, ": must not be negative");
  }
  const std::int64_t rows = std::int64_t{p.num_q_heads} / p.num_kv_heads * p.q_len;
  if (rows > kMaxRows) {
    return fail(Status::invalid_argument, "q_len=", p.q_len, ": makes ", rows, " rows of queries per KV head, ",
                kMaxRows, " are allowed");
  }
  const std::int64_t least = block_bytes(options.head_dim, options.quant);
  const auto check_stride = [least](const char* name, std::int64_t stride) {  // 0: the same block again and again
    if (stride == 0 || stride >= least) return Status::ok;
    return fail(Status::invalid_argument, name, "=", stride, ": must be at least block_bytes=", least);
  };
  BITDECODING_TRY(check_stride("head_stride_bytes", p.head_stride_bytes));
  return check_stride("page_stride_bytes", p.page_stride_bytes);
}

struct Sequence {
  std::int64_t seqlen = 0;
  std::int64_t sinks = 0;
  std::int64_t packed = 0;
  std::int64_t tail = 0;
  std::int64_t first_block = 0;  // blocks before it are outside of every query's window
  std::int64_t blocks = 0;
  std::int64_t first_part = 0;  // among the parts of all sequences; part 0 of a sequence has its 16-bit tokens
  std::int64_t parts = 0;
};

// What parts of a KV head leave behind: out [rows, head_dim], largest [rows], sum [rows].
class Decode {
 public:
  Decode(const DecodeParams& p, const CpuDecodeOptions& options)
      : p_(p),
        head_dim_(static_cast<int>(options.head_dim)),
        num_pages_(options.num_pages),
        type_(options.float32   ? Type::float32
              : p.bfloat16 != 0 ? Type::bfloat16
                                : Type::float16),
        group_(p.num_q_heads / p.num_kv_heads),
        rows_(group_ * p.q_len),
        part_blocks_(kPartBlocks * ((rows_ + kPartRows - 1) / kPartRows)),
        partial_floats_(std::int64_t{rows_} * (head_dim_ + 2)),
        format_(make_format(block_spec(options.head_dim, options.quant))) {}

  Status run(int num_threads) {
    BITDECODING_TRY(plan());
    const std::int64_t parts = sequences_.back().first_part + sequences_.back().parts;
    partials_.resize(static_cast<std::size_t>(parts * p_.num_kv_heads * partial_floats_));
    const int threads = num_threads > 0 ? num_threads : available_cores();
    auto attend = [this](std::int64_t task) { attend_part(task / p_.num_kv_heads, task % p_.num_kv_heads); };
    auto merge = [this](std::int64_t task) { merge_parts(task / p_.num_kv_heads, task % p_.num_kv_heads); };
    parallel_for(parts * p_.num_kv_heads, threads, attend);
    parallel_for(std::int64_t{p_.batch} * p_.num_kv_heads, threads, merge);
    if (out_of_memory_) return fail(Status::out_of_memory, "decode: no memory for a thread's working space");
    return Status::ok;
  }

 private:
  // Checks lengths and table, and divides the keys.
  Status plan() {
    std::int64_t first_part = 0;
    sequences_.resize(p_.batch);
    for (std::int32_t b = 0; b < p_.batch; ++b) {
      Sequence& s = sequences_[b];
      s.seqlen = p_.seqlens[b];
      if (s.seqlen < 0)
        return fail(Status::invalid_argument, "seqlens[", b, "]=", s.seqlen, ": allowed are numbers from 0");
      s.sinks = std::min<std::int64_t>(s.seqlen, p_.num_sink);
      const std::int64_t unpacked = s.seqlen - s.sinks;
      if (p_.packed_lens != nullptr) {
        s.packed = p_.packed_lens[b];
      } else {
        s.packed = p_.tail_capacity > 0 ? unpacked - unpacked % kBlockTokens : unpacked;
      }
      if (s.packed < 0 || s.packed > unpacked) {
        return fail(Status::invalid_argument, "packed_lens[", b, "]=", s.packed, ": allowed are 0 to ", unpacked,
                    " (seqlen less sinks)");
      }
      s.tail = unpacked - s.packed;
      if (s.tail > p_.tail_capacity) {
        return fail(Status::invalid_argument, "seqlens[", b, "]=", s.seqlen, ": allowed are at most ",
                    s.sinks + s.packed + p_.tail_capacity, " (", s.sinks, " sink tokens, packed_len ", s.packed,
                    ", tail_capacity ", p_.tail_capacity, ")");
      }
      s.blocks = (s.packed + kBlockTokens - 1) / kBlockTokens;
      BITDECODING_TRY(check_table(b, s.blocks));
      const std::int64_t oldest = s.seqlen - p_.q_len - p_.window + 1;  // that any query sees
      s.first_block = std::min(s.blocks, std::max<std::int64_t>(0, oldest - s.sinks) / kBlockTokens);
      s.first_part = first_part;
      s.parts = 1 + (s.blocks - s.first_block + part_blocks_ - 1) / part_blocks_;
      first_part += s.parts;
    }
    return Status::ok;
  }

  Status check_table(std::int32_t b, std::int64_t blocks) const {
    if (blocks > p_.max_pages) {
      return fail(Status::invalid_argument, "sequence ", b, " has ", blocks, " blocks in pages: allowed are ",
                  p_.max_pages, " (max_pages)");
    }
    const std::int32_t* row = p_.block_table + std::int64_t{b} * p_.max_pages;
    for (std::int64_t i = 0; i < blocks; ++i) {
      if (row[i] < 0 || row[i] >= num_pages_) {
        return fail(Status::invalid_argument, "block_table[", b, ", ", i, "]=", row[i], ": allowed are 0 to ",
                    num_pages_ - 1, " (num_pages)");
      }
    }
    return Status::ok;
  }

  float* partial(std::int64_t part, std::int64_t head) {
    return partials_.data() + (part * p_.num_kv_heads + head) * partial_floats_;
  }

  void attend_part(std::int64_t part, std::int64_t head) {
    const auto after = [](std::int64_t value, const Sequence& s) { return value < s.first_part; };
    const auto found = std::upper_bound(sequences_.begin(), sequences_.end(), part, after) - 1;
    const Sequence& s = *found;
    const std::int64_t b = found - sequences_.begin();

    struct Space {
      Scratch scratch;
      std::vector<float> queries;
      std::vector<std::int64_t> oldest, newest;
    };
    thread_local std::unique_ptr<Space> space;
    try {
      if (space == nullptr) space = std::make_unique<Space>();
      space->queries.resize(static_cast<std::size_t>(rows_) * head_dim_);
      space->oldest.resize(rows_);
      space->newest.resize(rows_);
    } catch (const std::bad_alloc&) {
      out_of_memory_ = true;
      return;
    }
    Rows rows;
    rows.count = rows_;
    rows.queries = space->queries.data();
    rows.oldest = space->oldest.data();
    rows.newest = space->newest.data();
    rows.softcap = p_.softcap * kLog2E;
    rows.out = partial(part, head);
    rows.largest = rows.out + std::int64_t{rows_} * head_dim_;
    rows.sum = rows.largest + rows_;
    std::fill(rows.out, rows.largest, 0.0f);
    std::fill(rows.largest, rows.sum, -kInfinity);
    std::fill(rows.sum, rows.sum + rows_, 0.0f);
    for (int row = 0; row < rows_; ++row) {
      float* query = space->queries.data() + std::int64_t{row} * head_dim_;
      load_elements(p_.q, type_, q_index(b, head, row), head_dim_, query);
      if (p_.rotate_q != 0) hadamard(query, head_dim_);
      for (int c = 0; c < head_dim_; ++c) query[c] *= p_.softmax_scale_log2;
      space->newest[row] = s.seqlen - p_.q_len + row % p_.q_len;
      space->oldest[row] = space->newest[row] - p_.window + 1;
    }

    if (part > s.first_part) {
      Blocks blocks;
      blocks.pages = static_cast<const unsigned char*>(p_.pages) + head * p_.head_stride_bytes;
      blocks.page_stride = p_.page_stride_bytes;
      blocks.table = p_.block_table + b * p_.max_pages;
      blocks.begin = s.first_block + (part - s.first_part - 1) * part_blocks_;
      blocks.end = std::min(s.blocks, blocks.begin + part_blocks_);
      blocks.position = s.sinks;
      blocks.packed_len = s.packed;
      loops().blocks(format_, blocks, rows, &space->scratch);
      return;
    }
    attend_tokens(p_.sink_k, p_.sink_v, b, head, p_.num_sink, s.sinks, 0, rows, &space->scratch);
    attend_tokens(p_.tail_k, p_.tail_v, b, head, p_.tail_capacity, s.tail, s.sinks + s.packed, rows, &space->scratch);
  }

  // k, v: [batch, capacity, num_kv_heads, head_dim]
  void attend_tokens(const void* k, const void* v, std::int64_t b, std::int64_t head, std::int64_t capacity,
                     std::int64_t count, std::int64_t position, const Rows& rows, Scratch* scratch) {
    if (count == 0) return;
    const std::int64_t row_bytes = std::int64_t{head_dim_} * bytes_of(type_);
    const std::int64_t offset = (b * capacity * p_.num_kv_heads + head) * row_bytes;
    Tokens tokens;
    tokens.type = type_;
    tokens.k = static_cast<const unsigned char*>(k) + offset;
    tokens.v = static_cast<const unsigned char*>(v) + offset;
    tokens.stride = p_.num_kv_heads * row_bytes;
    tokens.count = count;
    tokens.position = position;
    loops().tokens(head_dim_, tokens, rows, scratch);
  }

  void merge_parts(std::int64_t b, std::int64_t head) {
    const Sequence& s = sequences_[b];
    float out[kMaxHeadDim];
    for (int row = 0; row < rows_; ++row) {
      const std::int64_t q_head = head * group_ + row / p_.q_len;
      auto largest_of = [&](std::int64_t part) { return partial(part, head) + std::int64_t{rows_} * head_dim_ + row; };
      const float logit = p_.sink_logits != nullptr ? p_.sink_logits[q_head] * kLog2E : -kInfinity;
      float largest = logit;
      for (std::int64_t i = s.first_part; i < s.first_part + s.parts; ++i) largest = std::max(largest, *largest_of(i));
      const float reference = largest == -kInfinity ? 0.0f : largest;
      float sum = std::exp2(logit - reference);
      std::fill(out, out + head_dim_, 0.0f);
      for (std::int64_t i = s.first_part; i < s.first_part + s.parts; ++i) {
        const float* found = largest_of(i);
        if (*found == -kInfinity && found[rows_] == 0.0f) continue;
        const float weight = std::exp2(*found - reference);
        const float* from = partial(i, head) + std::int64_t{row} * head_dim_;
        for (int c = 0; c < head_dim_; ++c) out[c] += from[c] * weight;
        sum += found[rows_] * weight;
      }
      if (sum != 0.0f) {
        for (int c = 0; c < head_dim_; ++c) out[c] /= sum;
      }
      if (p_.rotate_out != 0) hadamard(out, head_dim_);
      store_elements(out, type_, q_index(b, head, row), head_dim_, p_.out);
      if (p_.lse != nullptr) {
        const std::int64_t index = (b * p_.q_len + row % p_.q_len) * p_.num_q_heads + q_head;
        p_.lse[index] = (reference + std::log2(sum)) * kLn2;
      }
    }
  }

  // Element of q and out where a row's head_dim elements begin; a row is (query head of the KV head's group, query).
  std::int64_t q_index(std::int64_t b, std::int64_t head, int row) const {
    return ((b * p_.q_len + row % p_.q_len) * p_.num_q_heads + head * group_ + row / p_.q_len) * head_dim_;
  }

  const DecodeParams& p_;
  const int head_dim_;
  const std::int64_t num_pages_;
  const Type type_;
  const int group_;
  const int rows_;
  const std::int64_t part_blocks_;
  const std::int64_t partial_floats_;
  const Format format_;
  std::vector<Sequence> sequences_;
  std::vector<float> partials_;
  std::atomic<bool> out_of_memory_{false};
};

}  // namespace
}  // namespace cpu

Status decode_cpu(const DecodeParams& params, const CpuDecodeOptions& options) noexcept {
  BITDECODING_TRY(options.quant.validate(options.head_dim));
  BITDECODING_TRY(cpu::validate(params, options));
  try {
    return cpu::Decode(params, options).run(options.num_threads);
  } catch (const std::bad_alloc&) {
    return fail(Status::out_of_memory, "decode: no memory for partial results");
  }
}

const char* cpu_instruction_set() noexcept { return &cpu::loops() == &cpu::baseline::kLoops ? "baseline" : "avx2"; }

}  // namespace bitdecoding
