// The cache of an inference engine in C++: allocates pages, appends a prompt, then generates tokens, each by one launch
// of a CUDA graph that appends a key and a value and attends, by one kernel if it can. Random numbers are the model.
//
//   cmake -S tests/cpp -B build -Dbitdecoding_DIR=$(bitdecoding cmake-dir) && cmake --build build --target engine
//   build/engine <a kernel pack for this GPU, such as bitdecoding-sm90a.bdpack>
#include <cuda_runtime_api.h>

#include <bitdecoding/runtime.hpp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <vector>

namespace bd = bitdecoding;

namespace {

constexpr int kBatch = 4, kQueryHeads = 32, kHeads = 8, kHeadDim = 128, kPrompt = 3000, kSteps = 1000;
constexpr int kRecent = 128, kTailCapacity = kRecent + 128;  // newest tokens that stay in 16 bit; what a step asks for
constexpr int kMaxPages = (kPrompt + kSteps + 127) / 128;    // of a sequence

void must(bool fine, const char* otherwise) {
  if (fine) return;
  std::fprintf(stderr, "%s\n", otherwise);
  std::exit(1);
}
void must(bd::Status status) { must(status == bd::Status::ok, bd::last_error()); }
void must(cudaError_t error) { must(error == cudaSuccess, cudaGetErrorString(error)); }

// Device memory: zeros, or a copy.
template <typename T>
T* on_device(std::size_t count, const T* from = nullptr) {
  void* to = nullptr;
  must(cudaMalloc(&to, count * sizeof(T)));
  must(cudaMemset(to, 0, count * sizeof(T)));
  if (from != nullptr) must(cudaMemcpy(to, from, count * sizeof(T), cudaMemcpyHostToDevice));
  return static_cast<T*>(to);
}

// fp16 numbers between 2^-4 and 1 of either sign, on the device.
std::uint16_t* random_halves(std::size_t count) {
  std::vector<std::uint16_t> x(count);
  for (auto& each : x) each = static_cast<std::uint16_t>(std::rand() % 2 << 15 | (0x2c00 + std::rand() % 0x1000));
  return on_device(count, x.data());
}

}  // namespace

int main(int argc, char** argv) {
  bd::DeviceInfo device;
  must(bd::device_info(0, &device));
  must(bd::load_pack(argc > 1 ? argv[1] : "", nullptr));

  // Which kernels: by format of the cache, heads and GPU.
  const bd::DecodeProblem problem{{}, kHeadDim, kQueryHeads, kHeads, 1, ""};  // its quant {}: 4 bit, groups of 128
  bd::DecodePlan plan;
  bd::AppendPlan append_plan;
  const bool one_kernel = bd::plan_step(problem, device, &plan) == bd::Status::ok;
  if (!one_kernel) must(bd::plan_decode(problem, device, &plan));
  must(bd::plan_append(problem.quant, kHeadDim, device, &append_plan));

  // The cache. Each sequence owns a row of pages here.
  const std::int64_t block_bytes = bd::block_bytes(kHeadDim, problem.quant);
  const std::size_t queries = std::size_t{kBatch} * kQueryHeads * kHeadDim, tokens = queries / kQueryHeads * kHeads;
  std::vector<std::int32_t> pages(kBatch * kMaxPages);
  std::iota(pages.begin(), pages.end(), 0);
  bd::AppendParams append;
  append.pages = on_device<std::uint8_t>(pages.size() * kHeads * block_bytes);
  append.block_table = on_device(pages.size(), pages.data());
  append.seqlens = on_device<std::int32_t>(kBatch);
  append.packed_lens = on_device<std::int32_t>(kBatch);
  append.tail_k = on_device<std::uint16_t>(tokens * kTailCapacity);
  append.tail_v = on_device<std::uint16_t>(tokens * kTailCapacity);
  append.status = on_device<std::int32_t>(1);
  append.workspace = on_device<std::uint8_t>(plan.workspace_bytes);
  append.head_stride_bytes = block_bytes;
  append.page_stride_bytes = kHeads * block_bytes;
  append.batch = kBatch;
  append.num_kv_heads = kHeads;
  append.num_pages = static_cast<std::int32_t>(pages.size());
  append.max_pages = kMaxPages;
  append.tail_capacity = kTailCapacity;
  append.recent = kRecent;
  append.new_head_stride_bytes = kHeadDim * sizeof(std::uint16_t);
  append.new_token_stride_bytes = kHeads * append.new_head_stride_bytes;
  bd::set_quant(problem.quant, &append);

  bd::DecodeParams decode;
  decode.pages = append.pages;
  decode.block_table = append.block_table;
  decode.seqlens = append.seqlens;
  decode.packed_lens = append.packed_lens;
  decode.tail_k = append.tail_k;
  decode.tail_v = append.tail_v;
  decode.workspace = append.workspace;
  decode.head_stride_bytes = append.head_stride_bytes;
  decode.page_stride_bytes = append.page_stride_bytes;
  decode.batch = kBatch;
  decode.num_q_heads = kQueryHeads;
  decode.num_kv_heads = kHeads;
  decode.num_pages = append.num_pages;
  decode.max_pages = kMaxPages;
  decode.tail_capacity = kTailCapacity;
  decode.softmax_scale_log2 = 1.4426950f * 0.088388348f;  // log2(e) / sqrt(head_dim)
  bd::set_quant(problem.quant, &decode);

  cudaStream_t stream = nullptr;
  must(cudaStreamCreate(&stream));
  const bd::LaunchOptions options{0, stream, true};  // true: launches overlap with the end of the kernel before

  // The prompt: full blocks are quantised, the rest stays in the tail.
  append.k_new = random_halves(tokens * kPrompt);
  append.v_new = random_halves(tokens * kPrompt);
  append.new_tokens = kPrompt;
  append.new_batch_stride_bytes = kPrompt * append.new_token_stride_bytes;
  must(bd::append(append_plan.handle, append, plan.workspace_bytes, options));

  // A step. Lengths are read and advanced on the device, so one graph serves all of them.
  const std::size_t made = queries + 2 * tokens;  // by the model in a step: q, k, v
  const std::uint16_t* random = random_halves(made + kSteps);
  auto* qkv = on_device<std::uint16_t>(made);
  append.k_new = qkv + queries;
  append.v_new = qkv + queries + tokens;
  append.new_tokens = 1;
  append.new_batch_stride_bytes = append.new_token_stride_bytes;
  decode.q = qkv;
  decode.out = on_device<std::uint16_t>(queries);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t step = nullptr;
  must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  if (one_kernel) must(bd::step(plan.handle, decode, append, plan.workspace_bytes, options));
  if (!one_kernel) must(bd::append(append_plan.handle, append, plan.workspace_bytes, options));
  if (!one_kernel) must(bd::decode(plan.handle, decode, plan.workspace_bytes, options));
  must(cudaStreamEndCapture(stream, &graph));
  must(cudaGraphInstantiate(&step, graph, 0));

  for (int i = 0; i < kSteps; ++i) {  // the model before and after attention would be in the graph too
    must(cudaMemcpyAsync(qkv, random + i, made * sizeof(*qkv), cudaMemcpyDeviceToDevice, stream));
    must(cudaGraphLaunch(step, stream));
  }
  must(cudaStreamSynchronize(stream));

  std::int32_t length = 0, without_page = 0;
  must(cudaMemcpy(&length, append.seqlens, 4, cudaMemcpyDeviceToHost));
  must(cudaMemcpy(&without_page, append.status, 4, cudaMemcpyDeviceToHost));
  std::printf("%d tokens per sequence, %d kernel(s) per step\n", length, one_kernel ? 1 : 2);
  return length == kPrompt + kSteps && without_page == 0 ? 0 : 1;
}
