// The one validator of decode's tensors, for CPU and CUDA, and that of append's and quantize's for CUDA.
#pragma once

#include <dlpack/dlpack.h>

#include "bitdecoding/runtime.hpp"

namespace bitdecoding {

// The tensors of a decode call; optional ones may be null.
struct DecodeTensors {
  const DLTensor* q = nullptr;
  const DLTensor* pages = nullptr;
  const DLTensor* block_table = nullptr;
  const DLTensor* seqlens = nullptr;
  const DLTensor* packed_lens = nullptr;  // optional from here
  const DLTensor* tail_k = nullptr;
  const DLTensor* tail_v = nullptr;
  const DLTensor* sink_k = nullptr;
  const DLTensor* sink_v = nullptr;
  const DLTensor* sink_logits = nullptr;
  const DLTensor* out = nullptr;
  const DLTensor* lse = nullptr;
};

// Checks types, shapes, strides, devices and ranges, and fills in all parameters but the workspace.
Status check_decode(const DecodeTensors& tensors, const QuantSpec& quant, std::int64_t window, double softmax_scale,
                    double softcap, DecodeParams* out);

// The same for host tensors.
Status check_decode_for_cpu(const DecodeTensors& tensors, const QuantSpec& quant, std::int64_t window,
                            double softmax_scale, double softcap, DecodeParams* out);

// The same for a given kernel, whose head_dim must be that of q; also checks the workspace.
Status check_decode_for_kernel(const DecodeTensors& tensors, const KernelConfig& config, const DLTensor& workspace,
                               std::int64_t window, double softmax_scale, double softcap, DecodeParams* out);

// The tensors of an append; optional ones may be null.
struct AppendTensors {
  const DLTensor* k_new = nullptr;  // [batch, new_tokens, num_kv_heads, head_dim]
  const DLTensor* v_new = nullptr;
  const DLTensor* pages = nullptr;
  const DLTensor* block_table = nullptr;
  const DLTensor* seqlens = nullptr;
  const DLTensor* packed_lens = nullptr;
  const DLTensor* tail_k = nullptr;
  const DLTensor* tail_v = nullptr;
  const DLTensor* workspace = nullptr;
  const DLTensor* sink_k = nullptr;  // optional from here
  const DLTensor* sink_v = nullptr;
  const DLTensor* lengths = nullptr;
  const DLTensor* status = nullptr;
};

// The tensors of a quantize; cu_seqlens may be null.
struct QuantizeTensors {
  const DLTensor* k = nullptr;  // [num_tokens, num_kv_heads, head_dim]
  const DLTensor* v = nullptr;
  const DLTensor* pages = nullptr;
  const DLTensor* block_table = nullptr;
  const DLTensor* cu_seqlens = nullptr;
};

// Check types, shapes, strides and devices for a kernel of kind=append, and fill in the parameters that tensors decide.
Status check_append_for_kernel(const AppendTensors& tensors, const KernelConfig& config, AppendParams* out);
Status check_quantize_for_kernel(const QuantizeTensors& tensors, const KernelConfig& config, std::int64_t max_seqlen,
                                 AppendParams* out);

}  // namespace bitdecoding
