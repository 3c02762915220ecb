// The runtime: which kernels exist, and how to launch them on the public CUDA driver API.
//
// libcuda is looked for at the first call that needs a device, so the library loads and plans without one.
// All functions are thread safe. None throws.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "bitdecoding/config.hpp"
#include "bitdecoding/status.hpp"

namespace bitdecoding {

// ---- devices ----

struct DeviceInfo {
  int index = 0;
  std::string name;
  std::string arch;  // "" if no kernel of ours can run there
  int major = 0;     // compute capability
  int minor = 0;
  int num_sms = 0;
  int driver_version = 0;  // of CUDA, such as 13000
  std::int64_t memory_bytes = 0;
};

Status device_count(int* out) noexcept;
// Read once per device and kept.
Status device_info(int device, DeviceInfo* out) noexcept;

// ---- kernels ----

// A compiled kernel; `image` holds the cubin.
struct Kernel {
  std::string name;   // KernelConfig::name()
  std::string entry;  // symbol in the image
  std::string image;
  int threads = 0;      // per block
  int smem = 0;         // bytes of dynamic shared memory
  int regs = 0;         // per thread, for information
  int ctas_per_sm = 1;  // grid = SMs * ctas_per_sm
};

// Registers every kernel of a pack, or none. Names that are registered already keep their first kernel.
Status load_pack(const std::string& path, int* kernels_in_pack = nullptr) noexcept;
// Registers one kernel. *handle is also set when the name is registered already.
Status add_kernel(Kernel kernel, int* handle) noexcept;
// The handle of a kernel, or -1.
int find_kernel(const std::string& name) noexcept;
std::vector<std::string> list_kernels();
// The configuration that a handle's name stands for; the address stays good.
Status kernel_config(int handle, const KernelConfig** out) noexcept;

// ---- decode ----

// The kernel's parameters, in its order. Pointers are device pointers; those marked optional may be null. Tensors are
// row-major without gaps, but for pages; q, tail, sinks and out are all float16 or all bfloat16 and begin at multiples
// of 16 bytes like workspace, pages and its strides. A sequence is its sinks, then its packed, then its tail tokens.
struct DecodeParams {
  const void* q = nullptr;                    // [batch, q_len, num_q_heads, head_dim]
  const void* pages = nullptr;                // [num_pages, num_kv_heads, block_bytes], 16-byte aligned
  const std::int32_t* block_table = nullptr;  // [batch, max_pages]
  const std::int32_t* seqlens = nullptr;      // [batch]
  const std::int32_t* packed_lens = nullptr;  // [batch], optional
  const void* tail_k = nullptr;               // [batch, tail_capacity, num_kv_heads, head_dim], optional
  const void* tail_v = nullptr;
  const void* sink_k = nullptr;  // [batch, num_sink, num_kv_heads, head_dim], optional
  const void* sink_v = nullptr;
  const float* sink_logits = nullptr;  // [num_q_heads], optional
  void* out = nullptr;                 // like q
  float* lse = nullptr;                // [batch, q_len, num_q_heads], optional
  void* workspace = nullptr;           // decode_workspace_bytes(), see kCounterBytes
  std::int64_t page_stride_bytes = 0;
  std::int64_t head_stride_bytes = 0;
  std::int32_t batch = 0;
  std::int32_t q_len = 1;
  std::int32_t num_q_heads = 0;
  std::int32_t num_kv_heads = 0;
  std::int32_t num_pages = 0;  // 0: unknown, then nothing is fetched ahead of the previous kernel's end
  std::int32_t max_pages = 0;
  std::int32_t tail_capacity = 0;
  std::int32_t num_sink = 0;
  std::int32_t window = INT32_MAX;  // tokens visible to a query, itself included; INT32_MAX: all
  float softmax_scale_log2 = 0.0f;  // softmax scale * log2(e)
  float softcap = 0.0f;             // 0: none
  std::int32_t bfloat16 = 0;        // 1: q, tail, sinks and out are bfloat16; 0: float16
  std::int32_t rotate_q = 0;        // 1: q goes through a Hadamard transform over head_dim, as the keys did
  std::int32_t rotate_out = 0;      // 1: out goes through a Hadamard transform, as the values did
};

// Sets what a cache's quantisation asks of a decode: rotation.
void set_quant(const QuantSpec& quant, DecodeParams* params) noexcept;

// What decides which kernel is needed.
struct DecodeProblem {
  QuantSpec quant;
  std::int64_t head_dim = 128;
  std::int32_t num_q_heads = 1;
  std::int32_t num_kv_heads = 1;  // divides num_q_heads
  std::int32_t q_len = 1;         // new tokens per sequence
  std::string kernel;             // KernelConfig::name() of the kernel to use; "": the plan's choice
};

struct DecodePlan {
  int handle = -1;
  std::int64_t workspace_bytes = 0;
};

// Chooses among the registered kernels for this format: the narrowest tile that holds all query columns of a KV head,
// else the widest; of equal ones the first that was registered. Of `device` only arch and num_sms count, so this needs
// no driver. Status::kernel_not_found says for which archs there is one. A decode of the plan must have the problem's
// sizes and format.
Status plan_decode(const DecodeProblem& problem, const DeviceInfo& device, DecodePlan* out) noexcept;

// A workspace is zeroed once when it is allocated; kernels leave it zero. So calls of all shapes can share it, as long
// as they do not run at the same time. It begins with the counters of an append, one per sequence.
constexpr std::int64_t kCounterBytes = 1 << 22;

// Bytes of workspace for a grid of num_ctas: the counters, then two partial results per CTA.
std::int64_t decode_workspace_bytes(const KernelConfig& config, std::int64_t num_ctas) noexcept;
// The same for a registered kernel on a device.
Status decode_workspace_bytes(int handle, int device, std::int64_t* out) noexcept;

struct LaunchOptions {
  int device = 0;
  void* stream = nullptr;     // CUstream
  bool programmatic = false;  // may start before the previous kernel of the stream ends (sm90 and later)
};

// Launches a registered kernel of kind=decode; returns once it is enqueued. workspace_bytes: size of params.workspace.
Status decode(int handle, const DecodeParams& params, std::int64_t workspace_bytes,
              const LaunchOptions& options) noexcept;

// ---- append ----

// The parameters of a kernel of kind=append, in its order (which has one more at the end of the sizes: the launch
// decides how many CTAs share a sequence). New tokens are rows of head_dim values, keys and values with the same
// strides.
//
// pack_all=0 appends to a cache: what new tokens, tail, sinks, lengths and table mean is said at bitdecoding.append
// (python/bitdecoding/ops.py). pack_all=1 quantises every token from the start of a sequence's first block on; the
// last block may be partial, a block without a page is left out; lengths and tensors of a cache must then be null.
struct AppendParams {
  const void* k_new = nullptr;                // row t of sequence b at b * new_batch_stride + t * new_token_stride;
  const void* v_new = nullptr;                // with cu_seqlens at (cu_seqlens[b] + t) * new_token_stride
  const std::int32_t* lengths = nullptr;      // [batch], optional: how many of the new tokens count
  const std::int32_t* cu_seqlens = nullptr;   // [batch + 1], optional: ragged new tokens, instead of lengths
  void* pages = nullptr;                      // [num_pages, num_kv_heads, block_bytes], 16-byte aligned
  const std::int32_t* block_table = nullptr;  // [batch, max_pages]; entries outside 0 .. num_pages - 1: no page
  std::int32_t* seqlens = nullptr;            // [batch], advanced
  std::int32_t* packed_lens = nullptr;        // [batch], multiples of 128, advanced
  void* tail_k = nullptr;                     // [batch, tail_capacity, num_kv_heads, head_dim]
  void* tail_v = nullptr;
  void* sink_k = nullptr;  // [batch, num_sink, num_kv_heads, head_dim], optional
  void* sink_v = nullptr;
  std::int32_t* status = nullptr;  // [1], optional: becomes at least 1 + b where sequence b had no page for a block;
                                   // such a sequence stays as it was
  void* workspace = nullptr;       // counters, see kCounterBytes
  std::int64_t new_batch_stride_bytes = 0;
  std::int64_t new_token_stride_bytes = 0;
  std::int64_t new_head_stride_bytes = 0;
  std::int64_t page_stride_bytes = 0;
  std::int64_t head_stride_bytes = 0;
  std::int32_t batch = 0;
  std::int32_t new_tokens = 0;  // of each sequence, at most
  std::int32_t num_kv_heads = 0;
  std::int32_t num_pages = 0;
  std::int32_t max_pages = 0;
  std::int32_t tail_capacity = 0;  // at least recent + 127
  std::int32_t num_sink = 0;
  std::int32_t recent = 0;  // newest tokens that stay in 16 bit
  float k_clip = 1.0f;      // 1: min/max; in (0, 1): a factor of it; 0: searched for the least squared error
  float v_clip = 1.0f;
  std::int32_t rotate_k = 0;  // 1: keys go through a Hadamard transform over head_dim
  std::int32_t rotate_v = 0;
  std::int32_t bfloat16 = 0;  // 1: all 16-bit tensors are bfloat16; 0: float16
  std::int32_t pack_all = 0;  // 1: quantise
};

// Sets what a cache's quantisation asks of an append: clip and rotation.
void set_quant(const QuantSpec& quant, AppendParams* params) noexcept;

struct AppendPlan {
  int handle = -1;
  std::int64_t workspace_bytes = 0;  // a workspace of decode may be shared
};

// Finds the registered kernel that appends to blocks of a format and quantises to them; as plan_decode.
Status plan_append(const QuantSpec& quant, std::int64_t head_dim, const DeviceInfo& device, AppendPlan* out) noexcept;

// Launches a registered kernel of kind=append; returns once it is enqueued. workspace_bytes: size of params.workspace.
Status append(int handle, const AppendParams& params, std::int64_t workspace_bytes,
              const LaunchOptions& options) noexcept;

// ---- step ----

// Chooses among the registered kernels that append the tokens of the queries themselves; as plan_decode, but that such
// a kernel has no more query columns than its tile: where num_q_heads / num_kv_heads * q_len is more than the widest
// has, Status::kernel_not_found; append and decode do that.
Status plan_step(const DecodeProblem& problem, const DeviceInfo& device, DecodePlan* out) noexcept;

// Launches a registered kernel of kind=step: a decode that first appends the tokens of its queries, all of them, and
// after the attention packs the blocks that are full (bitdecoding.step in python/bitdecoding/ops.py). The two sets of
// parameters are of one cache, whose tail has room for recent + 127 + q_len tokens, and of one workspace; new_tokens is
// q_len, lengths and cu_seqlens are null. A sequence without a page for a block stays as it was, its attention counts.
Status step(int handle, const DecodeParams& decode, const AppendParams& append, std::int64_t workspace_bytes,
            const LaunchOptions& options) noexcept;

// ---- merge ----

// The parameters of a kernel of kind=merge, in its order. Tensors are without gaps and begin at multiples of 16 bytes.
struct MergeParams {
  const void* outs = nullptr;   // [num_parts, rows, head_dim], float16 or bfloat16 like out
  const float* lses = nullptr;  // [num_parts, rows], natural logarithm; -inf: the part has no key there
  void* out = nullptr;          // [rows, head_dim]; may be one part of outs
  float* lse = nullptr;         // [rows], optional; must not be a part of lses
  std::int64_t rows = 0;
  std::int32_t num_parts = 0;
  std::int32_t bfloat16 = 0;  // 1: bfloat16; 0: float16
};

// Finds the registered kernel that merges rows of head_dim values; as plan_decode. It needs no workspace.
Status plan_merge(std::int64_t head_dim, const DeviceInfo& device, int* handle) noexcept;

// Launches a registered kernel of kind=merge, which combines attention over disjoint sets of keys: zeros and -inf where
// no part has a key.
Status merge(int handle, const MergeParams& params, const LaunchOptions& options) noexcept;

// An id of the graph capture that a stream is in, or 0.
Status capture_id(int device, void* stream, std::uint64_t* out) noexcept;

}  // namespace bitdecoding
