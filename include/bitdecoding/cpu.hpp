// Decode, append, quantise, steps and merge on the CPU: the same blocks, bit for bit, and the same parameters as the
// kernels'. Needs no kernel pack.
#pragma once

#include <cstdint>

#include "bitdecoding/config.hpp"
#include "bitdecoding/runtime.hpp"
#include "bitdecoding/status.hpp"

namespace bitdecoding {

struct CpuDecodeOptions {
  QuantSpec quant;              // the blocks' format; whether to rotate is in DecodeParams
  std::int64_t head_dim = 128;  // 64, 96, 128 or 256
  std::int64_t num_pages = 0;   // extent of DecodeParams::pages; entries of the block table are checked against it
  bool float32 = false;         // q, tail, sinks and out are fp32; DecodeParams::bfloat16 then does not matter
  int num_threads = 0;          // at most so many; 0: one per core that this process may use
};

// Attention of the newest tokens of each sequence over its cache, done when it returns: fp32 throughout, the result
// does not depend on the number of threads. Pointers of `params` are host pointers, `workspace` is not used. Lengths
// and block table are checked before anything is written: Status::invalid_argument names the first wrong one.
Status decode_cpu(const DecodeParams& params, const CpuDecodeOptions& options) noexcept;

struct CpuAppendOptions {
  QuantSpec quant;              // the blocks' format; clip and rotation are in AppendParams
  std::int64_t head_dim = 128;  // 64, 96, 128 or 256
  bool float32 = false;         // all tokens are fp32; AppendParams::bfloat16 then does not matter
  int num_threads = 0;          // at most so many; 0: one per core that this process may use
};

// Appends new tokens to a cache, or with AppendParams::pack_all quantises all of them; done when it returns. Pointers
// of `params` are host pointers, `workspace` is not used. Lengths and block table are checked before anything is
// written: Status::invalid_argument names the first wrong one. With AppendParams::status a sequence that has no page
// for a block is no error, but stays as it was.
Status append_cpu(const AppendParams& params, const CpuAppendOptions& options) noexcept;

// A step: appends the tokens of the queries, attends, then packs the blocks that are full, as the kernels of kind=step;
// done when it returns. The parameters are as for bitdecoding::step and checked as by append_cpu and decode_cpu; where
// it fails, lengths and all tokens that they count are as before.
Status step_cpu(const DecodeParams& decode, const AppendParams& append, const CpuAppendOptions& options) noexcept;

struct CpuMergeParams {
  const void* const* outs = nullptr;  // num_parts pointers to [rows, head_dim], fp16, bf16 or fp32
  // num_parts pointers to [rows], natural logarithm; -inf: the part has no key there, and its out does not matter
  const float* const* lses = nullptr;
  std::int32_t num_parts = 0;
  std::int64_t rows = 0;
  std::int64_t head_dim = 0;  // 1 to 256
  bool bfloat16 = false;      // outs and out are bf16
  bool float32 = false;       // outs and out are fp32
  void* out = nullptr;        // [rows, head_dim]; may be one of outs
  float* lse = nullptr;       // [rows], optional; may be one of lses
};

// Combines attention over disjoint sets of keys: zeros and -inf where no part has a key.
Status merge_cpu(const CpuMergeParams& params) noexcept;

// The instruction set that decode_cpu and append_cpu use on this machine: "avx2", or "baseline" where there is none or
// where the environment variable BITDECODING_CPU is "baseline".
const char* cpu_instruction_set() noexcept;

}  // namespace bitdecoding
