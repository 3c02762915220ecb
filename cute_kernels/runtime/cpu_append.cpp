// Append and quantise on the CPU: one task per (full block, KV head), which reads its tokens from the tail and from the
// new ones, then one per (sequence, KV head) that moves 16-bit tokens. Nothing is written before everything is checked,
// and nothing but blocks that no length reaches yet before all memory is there. What the bits mean is specified in
// python/bitdecoding/quantization.py.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <unordered_set>
#include <vector>

#include "bitdecoding/cpu.hpp"
#include "cpu_attend.hpp"
#include "elements.hpp"
#include "error.hpp"
#include "params.hpp"
#include "threads.hpp"

namespace bitdecoding {
namespace cpu {
namespace {

constexpr std::uint16_t kMinusZero = 0x8000;

// A block's K or V: how its values become codes, and where these go.
struct OperandFormat {
  bool is_k = true;
  bool per_channel = true;  // a group is tokens of a channel, otherwise channels of a token
  bool mean = false;
  Quantiser quantiser;
  BlockSection codes, scale, zero, mean_at;
  std::vector<std::int32_t> code_order;  // code of the section -> element of [rows, columns], rows falling into groups
};

OperandFormat make_operand_format(bool is_k, const BlockSpec& spec, float clip) {
  const BlockSections at = block_sections(spec);
  OperandFormat op;
  op.is_k = is_k;
  op.per_channel = is_k && !spec.k_per_token;
  op.mean = is_k && spec.k_mean;
  op.quantiser.bits = is_k ? spec.k_bits : spec.v_bits;
  op.quantiser.group = is_k ? spec.k_group : spec.v_group;
  op.quantiser.symmetric = is_k ? spec.k_symmetric : spec.v_symmetric;
  op.quantiser.clip = clip;
  op.codes = is_k ? at.k_codes : at.v_codes;
  op.scale = is_k ? at.k_scale : at.v_scale;
  op.zero = is_k ? at.k_zero : at.v_zero;
  op.mean_at = at.k_mean;
  op.code_order.resize(static_cast<std::size_t>(kBlockTokens) * spec.head_dim);
  const CodeLayout layout{is_k ? Operand::k : Operand::v, spec.head_dim, op.quantiser.bits};
  for (int token = 0; token < kBlockTokens; ++token) {
    for (int channel = 0; channel < spec.head_dim; ++channel) {
      op.code_order[layout(token, channel) / op.quantiser.bits] =
          op.per_channel ? token * spec.head_dim + channel : channel * kBlockTokens + token;
    }
  }
  return op;
}

// Working memory of one thread.
struct Space {
  float tokens[kBlockTokens * kMaxHeadDim];  // [token, channel]
  float turned[kBlockTokens * kMaxHeadDim];  // [channel, token]; before that sums
  unsigned char codes[kBlockTokens * kMaxHeadDim];
  std::uint16_t scale[kMaxGroups * kMaxHeadDim], zero[kMaxGroups * kMaxHeadDim];  // [group, column]
};

// The mean of the block's tokens, as it is stored, which is subtracted from them.
void subtract_mean(int head_dim, int count, unsigned char* to, Space* s) {
  const int values = kBlockTokens * head_dim;
  std::copy_n(s->tokens, values, s->turned);
  for (int half = values / 2; half >= head_dim; half /= 2) {
    for (int i = 0; i < half; ++i) s->turned[i] += s->turned[i + half];
  }
  const float inverse = 1.0f / static_cast<float>(count);
  for (int c = 0; c < head_dim; ++c) {
    std::uint16_t mean = float_to_half(s->turned[c] * inverse);
    if (mean == kMinusZero) mean = 0;
    std::memcpy(to + sizeof(mean) * b_order(c), &mean, sizeof(mean));
    const float value = half_to_float(mean);
    for (int t = 0; t < count; ++t) s->tokens[t * head_dim + c] -= value;
  }
}

// s->tokens, of which the first `count` exist and the others are 0, to their part of a zeroed block.
void encode(const OperandFormat& op, int head_dim, int count, unsigned char* block, Space* s) {
  if (op.mean) subtract_mean(head_dim, count, block + op.mean_at.offset, s);
  const float* x = s->tokens;
  Extent tokens{kBlockTokens, count}, channels{head_dim, head_dim};
  if (!op.per_channel) {
    for (int t = 0; t < kBlockTokens; ++t) {
      for (int c = 0; c < head_dim; ++c) s->turned[c * kBlockTokens + t] = s->tokens[t * head_dim + c];
    }
    x = s->turned;
  }
  const Extent& rows = op.per_channel ? tokens : channels;
  const Extent& columns = op.per_channel ? channels : tokens;
  const int groups = rows.size / op.quantiser.group;
  std::fill_n(s->codes, rows.size * columns.size, static_cast<unsigned char>(0));
  std::fill_n(s->scale, groups * columns.size, std::uint16_t{0});
  std::fill_n(s->zero, groups * columns.size, std::uint16_t{0});
  loops().quantise(op.quantiser, x, rows, columns, s->codes, s->scale, s->zero);
  if (columns.valid < columns.size) {
    const int beyond = columns.size - columns.valid;
    for (int r = 0; r < rows.size; ++r) {
      std::fill_n(s->codes + r * columns.size + columns.valid, beyond, static_cast<unsigned char>(0));
    }
    for (int g = 0; g < groups; ++g) {
      std::fill_n(s->scale + g * columns.size + columns.valid, beyond, std::uint16_t{0});
      std::fill_n(s->zero + g * columns.size + columns.valid, beyond, std::uint16_t{0});
    }
  }

  const int bits = op.quantiser.bits, codes_per_byte = 8 / bits;
  const std::int32_t* order = op.code_order.data();
  for (std::int64_t i = 0; i < op.codes.bytes; ++i) {
    unsigned byte = 0;
    for (int j = 0; j < codes_per_byte; ++j) byte |= static_cast<unsigned>(s->codes[*order++]) << (j * bits);
    block[op.codes.offset + i] = static_cast<unsigned char>(byte);
  }
  const auto put = [&](const BlockSection& section, const std::uint16_t* from) {
    if (section.bytes == 0) return;
    for (int g = 0; g < groups; ++g) {
      for (int i = 0; i < columns.size; ++i) {
        const bool by_row = op.is_k && !op.per_channel;
        const int element = by_row ? row_order(groups, i, g) : g * columns.size + b_order(i);
        std::memcpy(block + section.offset + sizeof(*from) * element, from + g * columns.size + i, sizeof(*from));
      }
    }
  };
  put(op.scale, s->scale);
  put(op.zero, s->zero);
}

Status validate(const AppendParams& p, const CpuAppendOptions& options) {
  BITDECODING_TRY(validate_params(p));
  if (options.num_threads < 0) {
    return fail(Status::invalid_argument, "num_threads=", options.num_threads, ": must not be negative");
  }
  const std::int64_t least = block_bytes(options.head_dim, options.quant);
  const auto check_stride = [least](const char* name, std::int64_t stride, std::int64_t extent) {
    if (extent <= 1 || stride >= least) return Status::ok;
    return fail(Status::invalid_argument, name, "=", stride, ": must be at least block_bytes=", least);
  };
  BITDECODING_TRY(check_stride("head_stride_bytes", p.head_stride_bytes, p.num_kv_heads));
  return check_stride("page_stride_bytes", p.page_stride_bytes, p.num_pages);
}

struct SequenceJob {
  std::int64_t sinks = 0, packed = 0, tail = 0;  // tokens before the call
  std::int64_t first_row = 0;                    // bytes from k_new to its first new token
  std::int64_t count = 0;                        // new tokens
  std::int64_t to_sink = 0;                      // of them
  std::int64_t packing = 0;                      // tokens to pack, of the tail and then of the other new ones
  std::int64_t first_block = 0;                  // among the blocks of all sequences
  std::int64_t blocks = 0;
};

class Append {
 public:
  Append(const AppendParams& p, const CpuAppendOptions& options)
      : p_(p),
        head_dim_(static_cast<int>(options.head_dim)),
        type_(options.float32   ? Type::float32
              : p.bfloat16 != 0 ? Type::bfloat16
                                : Type::float16),
        row_bytes_(std::int64_t{head_dim_} * bytes_of(type_)),
        spec_(block_spec(options.head_dim, options.quant)) {}

  Status run(int num_threads) {
    BITDECODING_TRY(plan());
    const int threads = num_threads > 0 ? num_threads : available_cores();
    const std::int64_t blocks = sequences_.back().first_block + sequences_.back().blocks;
    if (blocks > 0) {
      k_ = make_operand_format(true, spec_, p_.k_clip);
      v_ = make_operand_format(false, spec_, p_.v_clip);
      auto pack = [this](std::int64_t task) { pack_block(task / p_.num_kv_heads, task % p_.num_kv_heads); };
      parallel_for(blocks * p_.num_kv_heads, threads, pack);
      if (out_of_memory_) return fail(Status::out_of_memory, "append: no memory for a thread's working space");
    }
    if (p_.pack_all != 0) return Status::ok;
    auto move = [this](std::int64_t task) { move_tokens(task / p_.num_kv_heads, task % p_.num_kv_heads); };
    parallel_for(std::int64_t{p_.batch} * p_.num_kv_heads, threads, move);
    for (std::int32_t b = 0; b < p_.batch; ++b) {
      p_.seqlens[b] += static_cast<std::int32_t>(sequences_[b].count);
      p_.packed_lens[b] += static_cast<std::int32_t>(sequences_[b].packing);
    }
    if (p_.status != nullptr) *p_.status = std::max(*p_.status, without_page_);
    return Status::ok;
  }

 private:
  // Checks lengths and table, and decides what moves where.
  Status plan() {
    std::unordered_set<std::int32_t> due;
    std::int64_t first_block = 0;
    sequences_.resize(p_.batch);
    for (std::int32_t b = 0; b < p_.batch; ++b) {
      SequenceJob& s = sequences_[b];
      s.first_block = first_block;
      BITDECODING_TRY(count_new(b, &s));
      if (p_.pack_all != 0) {
        s.packing = s.count;
      } else {
        BITDECODING_TRY(count_held(b, &s));
        s.to_sink = std::min(s.count, p_.num_sink - s.sinks);
        const std::int64_t beyond = s.tail + s.count - s.to_sink - p_.recent;
        s.packing = std::max<std::int64_t>(0, beyond) / kBlockTokens * kBlockTokens;
      }
      s.blocks = (s.packing + kBlockTokens - 1) / kBlockTokens;
      const Status found = check_pages(b, s);
      if (found != Status::ok) {
        if (p_.status == nullptr) return found;
        s.count = s.to_sink = s.packing = s.blocks = 0;  // it stays as it was
        without_page_ = 1 + b;
      }
      for (std::int64_t i = 0; i < s.blocks; ++i) {
        if (!due.insert(page(b, s, i)).second) {
          return fail(Status::invalid_argument, "block_table names page ", page(b, s, i),
                      " twice for blocks to be written: allowed is once");
        }
      }
      first_block += s.blocks;
    }
    return Status::ok;
  }

  Status count_new(std::int32_t b, SequenceJob* s) const {
    s->first_row = b * p_.new_batch_stride_bytes;
    s->count = p_.new_tokens;
    if (p_.cu_seqlens != nullptr) {
      const std::int64_t start = p_.cu_seqlens[b], stop = p_.cu_seqlens[b + 1];
      s->first_row = start * p_.new_token_stride_bytes;
      s->count = stop - start;
      if (start < 0 || s->count < 0 || s->count > p_.new_tokens) {
        return fail(Status::invalid_argument, "cu_seqlens[", b, "]=", start, ", cu_seqlens[", b + 1, "]=", stop,
                    ": allowed are ascending numbers from 0, at most new_tokens=", p_.new_tokens, " apart");
      }
    }
    if (p_.lengths == nullptr) return Status::ok;
    s->count = p_.lengths[b];
    if (s->count >= 0 && s->count <= p_.new_tokens) return Status::ok;
    return fail(Status::invalid_argument, "lengths[", b, "]=", s->count,
                ": allowed are 0 to new_tokens=", p_.new_tokens);
  }

  Status count_held(std::int32_t b, SequenceJob* s) const {
    const std::int64_t seqlen = p_.seqlens[b];
    if (seqlen < 0 || seqlen + s->count > std::numeric_limits<std::int32_t>::max()) {
      return fail(Status::invalid_argument, "seqlens[", b, "]=", seqlen, ": allowed are numbers from 0 to 2^31 - 1, ",
                  s->count, " new tokens included");
    }
    s->sinks = std::min<std::int64_t>(seqlen, p_.num_sink);
    s->packed = p_.packed_lens[b];
    const std::int64_t unpacked = seqlen - s->sinks;
    if (s->packed < 0 || s->packed > unpacked || s->packed % kBlockTokens != 0) {
      return fail(Status::invalid_argument, "packed_lens[", b, "]=", s->packed, ": allowed are multiples of ",
                  kBlockTokens, " up to ", unpacked, " (seqlen less sinks)");
    }
    s->tail = unpacked - s->packed;
    if (s->tail <= p_.tail_capacity) return Status::ok;
    return fail(Status::invalid_argument, "seqlens[", b, "]=", seqlen, ": allowed are at most ",
                s->sinks + s->packed + p_.tail_capacity, " (", s->sinks, " sink tokens, packed_len ", s->packed,
                ", tail_capacity ", p_.tail_capacity, ")");
  }

  std::int32_t page(std::int64_t b, const SequenceJob& s, std::int64_t block) const {
    return p_.block_table[b * p_.max_pages + s.packed / kBlockTokens + block];
  }

  Status check_pages(std::int32_t b, const SequenceJob& s) const {
    const std::int64_t first = s.packed / kBlockTokens, needed = first + s.blocks;
    if (s.blocks > 0 && needed > p_.max_pages) {
      return fail(Status::invalid_argument, "sequence ", b, " needs ", needed, " pages: allowed are ", p_.max_pages,
                  " (max_pages)");
    }
    for (std::int64_t i = 0; i < s.blocks; ++i) {
      const std::int32_t entry = page(b, s, i);
      if (entry < 0 || entry >= p_.num_pages) {
        return fail(Status::invalid_argument, "block_table[", b, ", ", first + i, "]=", entry, ": allowed are 0 to ",
                    p_.num_pages - 1, " (num_pages)");
      }
    }
    return Status::ok;
  }

  // Row of a tail or of sinks: [batch, capacity, num_kv_heads, head_dim].
  unsigned char* slot(const void* base, std::int64_t capacity, std::int64_t b, std::int64_t i,
                      std::int64_t head) const {
    const std::int64_t row = (b * capacity + i) * p_.num_kv_heads + head;
    return static_cast<unsigned char*>(const_cast<void*>(base)) + row * row_bytes_;
  }

  const unsigned char* new_row(bool is_k, const SequenceJob& s, std::int64_t i, std::int64_t head) const {
    return static_cast<const unsigned char*>(is_k ? p_.k_new : p_.v_new) + s.first_row + i * p_.new_token_stride_bytes +
           head * p_.new_head_stride_bytes;
  }

  // A new token in the space of the cache, rounded to its dtype.
  void rotate(const unsigned char* from, float* x, unsigned char* to) const {
    loops().load(from, type_, head_dim_, x);
    hadamard(x, head_dim_);
    for (int c = 0; c < head_dim_; ++c) x[c] = std::min(std::max(x[c], -kValueLimit), kValueLimit);
    store_elements(x, type_, 0, head_dim_, to);
  }

  void copy_new(bool is_k, const unsigned char* from, unsigned char* to) const {
    if ((is_k ? p_.rotate_k : p_.rotate_v) == 0) {
      std::memcpy(to, from, row_bytes_);
      return;
    }
    float x[kMaxHeadDim];
    rotate(from, x, to);
  }

  void load_tokens(bool is_k, std::int64_t b, const SequenceJob& s, std::int64_t first, int count, std::int64_t head,
                   float* to) const {
    for (int i = 0; i < kBlockTokens; ++i, to += head_dim_) {
      if (i >= count) {
        std::fill_n(to, head_dim_, 0.0f);
        continue;
      }
      const std::int64_t at = first + i;  // in the tail followed by new tokens
      const unsigned char* from;
      unsigned char rotated[kMaxHeadDim * sizeof(float)];
      if (at < s.tail) {
        from = slot(is_k ? p_.tail_k : p_.tail_v, p_.tail_capacity, b, at, head);
      } else {
        from = new_row(is_k, s, s.to_sink + at - s.tail, head);
        if ((is_k ? p_.rotate_k : p_.rotate_v) != 0) {
          rotate(from, to, rotated);
          from = rotated;
        }
      }
      loops().load(from, type_, head_dim_, to);
    }
  }

  void pack_block(std::int64_t block, std::int64_t head) {
    const auto after = [](std::int64_t value, const SequenceJob& s) { return value < s.first_block; };
    const auto found = std::upper_bound(sequences_.begin(), sequences_.end(), block, after) - 1;
    const SequenceJob& s = *found;
    const std::int64_t b = found - sequences_.begin(), index = block - s.first_block;
    thread_local std::unique_ptr<Space> space;
    if (space == nullptr) space.reset(new (std::nothrow) Space);
    if (space == nullptr) {
      out_of_memory_ = true;
      return;
    }
    unsigned char* to =
        static_cast<unsigned char*>(p_.pages) + page(b, s, index) * p_.page_stride_bytes + head * p_.head_stride_bytes;
    const std::int64_t first = index * kBlockTokens;
    const int count = static_cast<int>(std::min<std::int64_t>(kBlockTokens, s.packing - first));
    std::memset(to, 0, block_sections(spec_).block_bytes);
    for (const OperandFormat* op : {&k_, &v_}) {
      load_tokens(op->is_k, b, s, first, count, head, space->tokens);
      encode(*op, head_dim_, count, to, space.get());
    }
  }

  void move_tokens(std::int64_t b, std::int64_t head) const {
    const SequenceJob& s = sequences_[b];
    const std::int64_t kept = std::max<std::int64_t>(0, s.tail - s.packing);
    for (const bool is_k : {true, false}) {
      const void* sink = is_k ? p_.sink_k : p_.sink_v;
      const void* tail = is_k ? p_.tail_k : p_.tail_v;
      for (std::int64_t i = 0; i < s.to_sink; ++i) {
        copy_new(is_k, new_row(is_k, s, i, head), slot(sink, p_.num_sink, b, s.sinks + i, head));
      }
      for (std::int64_t i = 0; s.packing > 0 && i < kept; ++i) {
        std::memcpy(slot(tail, p_.tail_capacity, b, i, head), slot(tail, p_.tail_capacity, b, s.packing + i, head),
                    row_bytes_);
      }
      const std::int64_t packed_new = std::max<std::int64_t>(0, s.packing - s.tail);
      std::int64_t to = kept;
      for (std::int64_t i = s.to_sink + packed_new; i < s.count; ++i, ++to) {
        copy_new(is_k, new_row(is_k, s, i, head), slot(tail, p_.tail_capacity, b, to, head));
      }
    }
  }

  const AppendParams& p_;
  const int head_dim_;
  const Type type_;
  const std::int64_t row_bytes_;
  const BlockSpec spec_;
  OperandFormat k_, v_;
  std::vector<SequenceJob> sequences_;
  std::int32_t without_page_ = 0;
  std::atomic<bool> out_of_memory_{false};
};

}  // namespace
}  // namespace cpu

Status append_cpu(const AppendParams& params, const CpuAppendOptions& options) noexcept {
  BITDECODING_TRY(options.quant.validate(options.head_dim));
  BITDECODING_TRY(cpu::validate(params, options));
  try {
    return cpu::Append(params, options).run(options.num_threads);
  } catch (const std::bad_alloc&) {
    return fail(Status::out_of_memory, "append: no memory for its plan");
  }
}

}  // namespace bitdecoding
