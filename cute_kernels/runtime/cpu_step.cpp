// A step on the CPU: an append that packs nothing, a decode, and an append of nothing that packs.
#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#include "bitdecoding/cpu.hpp"
#include "error.hpp"
#include "params.hpp"

namespace bitdecoding {
namespace {

// Takes the new tokens of a sequence back: what has been written lies beyond its length then.
void take_back(std::int32_t b, const AppendParams& p) { p.seqlens[b] -= p.new_tokens; }

// Whether a sequence has a full block in its tail.
bool is_due(std::int32_t b, const AppendParams& p) {
  const std::int64_t unpacked = std::int64_t{p.seqlens[b]} - std::min(p.seqlens[b], p.num_sink) - p.packed_lens[b];
  return unpacked - p.recent >= kBlockTokens;
}

Status run(const DecodeParams& decode, const AppendParams& append, const CpuAppendOptions& options) {
  const std::vector<std::int32_t> none(append.batch, 0);
  AppendParams tokens = append, blocks = append;
  tokens.recent = append.tail_capacity - (kBlockTokens - 1);  // as many as there is room for
  tokens.status = nullptr;
  blocks.lengths = none.data();
  CpuDecodeOptions of_decode;
  of_decode.quant = options.quant;
  of_decode.head_dim = options.head_dim;
  of_decode.num_pages = append.num_pages;
  of_decode.float32 = options.float32;
  of_decode.num_threads = options.num_threads;

  BITDECODING_TRY(append_cpu(tokens, options));
  Status status = decode_cpu(decode, of_decode);
  if (status == Status::ok) status = append_cpu(blocks, options);
  for (std::int32_t b = 0; b < append.batch; ++b) {
    if (status != Status::ok || is_due(b, append)) take_back(b, append);  // due: it had no page
  }
  return status;
}

}  // namespace

Status step_cpu(const DecodeParams& decode, const AppendParams& append, const CpuAppendOptions& options) noexcept {
  BITDECODING_TRY(validate_params(decode, append));
  try {
    return run(decode, append, options);
  } catch (const std::bad_alloc&) {
    return fail(Status::out_of_memory, "step: no memory for its lengths");
  }
}

}  // namespace bitdecoding
