// A C++ user with a GPU: appends ragged prompts to a cache on the device, then generates tokens, by whole steps or,
// where a sequence sits out, by append and decode, and does the same on the CPU: the caches must be equal byte for
// byte, the attention nearly. Arguments: kernel packs for the GPU with kernels of the default format for decode, append
// and step. Prints the largest relative error of decodes and of steps; exit status 77: there is no GPU.
#include <dlfcn.h>

#include <algorithm>
#include <bitdecoding/cpu.hpp>
#include <bitdecoding/runtime.hpp>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "random_cache.hpp"

namespace bd = bitdecoding;

namespace {

constexpr int kBatch = 3, kQueryHeads = 32, kHeads = 8, kHeadDim = 128, kMaxPages = 9;
constexpr int kNumPages = kBatch * kMaxPages;
constexpr int kPrompts[kBatch] = {700, 0, 129}, kPrompt = 700, kSteps = 300;
constexpr int kRecent = 20, kSinks = 4, kTailCapacity = kRecent + 128;
constexpr int kNoGpu = 77;

void must(bd::Status status) {
  if (status == bd::Status::ok) return;
  std::printf("%s\n", bd::last_error());
  std::exit(1);
}

// Memory on the device, through the driver: what a user without the CUDA toolkit has.
class Driver {
 public:
  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW);
    const auto find = [library](const char* name, auto* function) {
      *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(library, name));
      if (*function == nullptr) std::exit(1);
    };
    int (*retain)(void**, int);
    int (*set_current)(void*);
    find("cuDevicePrimaryCtxRetain", &retain);
    find("cuCtxSetCurrent", &set_current);
    find("cuMemAlloc_v2", &alloc_);
    find("cuMemcpyHtoD_v2", &to_device_);
    find("cuMemcpyDtoH_v2", &to_host_);
    find("cuMemsetD8_v2", &set_);
    void* context = nullptr;
    check(retain(&context, 0));
    check(set_current(context));
  }
  void* zeros(std::size_t bytes) const {
    unsigned long long address = 0;
    check(alloc_(&address, bytes));
    check(set_(address, 0, bytes));
    return reinterpret_cast<void*>(address);
  }
  template <typename T>
  void* upload(const std::vector<T>& from) const {
    void* to = zeros(from.size() * sizeof(T));
    copy(from, to);
    return to;
  }
  template <typename T>
  void copy(const std::vector<T>& from, void* to) const {
    check(to_device_(reinterpret_cast<unsigned long long>(to), from.data(), from.size() * sizeof(T)));
  }
  template <typename T>
  void copy(const void* from, std::vector<T>* to) const {  // waits for what was enqueued on the default stream
    check(to_host_(to->data(), reinterpret_cast<unsigned long long>(from), to->size() * sizeof(T)));
  }

 private:
  static void check(int result) {
    if (result == 0) return;
    std::printf("driver error %d\n", result);
    std::exit(1);
  }
  int (*alloc_)(unsigned long long*, std::size_t) = nullptr;
  int (*to_device_)(unsigned long long, const void*, std::size_t) = nullptr;
  int (*to_host_)(void*, unsigned long long, std::size_t) = nullptr;
  int (*set_)(unsigned long long, unsigned char, std::size_t) = nullptr;
};

double half_value(std::uint16_t x) {  // of a normal number
  return std::ldexp(1.0 + x % 1024 / 1024.0, (x >> 10 & 31) - 15) * (x >> 15 != 0 ? -1 : 1);
}

}  // namespace

int main(int argc, char** argv) {
  bd::DeviceInfo device;
  if (bd::device_info(0, &device) != bd::Status::ok) {
    std::printf("%s\n", bd::last_error());
    return kNoGpu;
  }
  bd::DecodeProblem problem;
  problem.head_dim = kHeadDim;
  problem.num_q_heads = kQueryHeads;
  problem.num_kv_heads = kHeads;
  bd::DecodePlan plan, step_plan;
  bd::AppendPlan append_plan;
  for (int i = 1; i < argc; ++i) must(bd::load_pack(argv[i]));
  must(bd::plan_decode(problem, device, &plan));
  must(bd::plan_step(problem, device, &step_plan));
  must(bd::plan_append(problem.quant, kHeadDim, device, &append_plan));
  const std::int64_t workspace_bytes = std::max(plan.workspace_bytes, step_plan.workspace_bytes);

  const Driver driver;
  random_cache::Random random;
  const auto random_halves = [&random](std::size_t count) {
    std::vector<std::uint16_t> x(count);
    double value;
    for (std::uint16_t& each : x) {
      const int exponent = -1 - static_cast<int>(random.bits() % 4);
      each = random_cache::random_half(&random, exponent, random.bits() % 2 == 0, &value);
    }
    return x;
  };

  // the cache on the host
  const std::size_t token = std::size_t{kHeads} * kHeadDim, q_size = std::size_t{kBatch} * kQueryHeads * kHeadDim;
  const std::int64_t block_bytes = bd::block_bytes(kHeadDim, problem.quant);
  std::vector<std::uint8_t> pages(static_cast<std::size_t>(kNumPages * kHeads * block_bytes));
  std::vector<std::int32_t> table(kNumPages), packed(kBatch), seqlens(kBatch);
  for (int i = 0; i < kNumPages; ++i) table[i] = kNumPages - 1 - i;
  std::vector<std::uint16_t> tail_k(kBatch * kTailCapacity * token), tail_v(tail_k.size());
  std::vector<std::uint16_t> sink_k(kBatch * kSinks * token), sink_v(sink_k.size()), out(q_size), got(q_size);
  bd::AppendParams append;
  append.pages = pages.data();
  append.block_table = table.data();
  append.seqlens = seqlens.data();
  append.packed_lens = packed.data();
  append.tail_k = tail_k.data();
  append.tail_v = tail_v.data();
  append.sink_k = sink_k.data();
  append.sink_v = sink_v.data();
  append.head_stride_bytes = block_bytes;
  append.page_stride_bytes = kHeads * block_bytes;
  append.batch = kBatch;
  append.num_kv_heads = kHeads;
  append.num_pages = kNumPages;
  append.max_pages = kMaxPages;
  append.tail_capacity = kTailCapacity;
  append.num_sink = kSinks;
  append.recent = kRecent;
  append.new_head_stride_bytes = kHeadDim * 2;
  append.new_token_stride_bytes = kHeads * append.new_head_stride_bytes;
  bd::CpuAppendOptions append_options;
  append_options.quant = problem.quant;
  append_options.head_dim = kHeadDim;
  bd::CpuDecodeOptions options;
  options.quant = problem.quant;
  options.head_dim = kHeadDim;
  options.num_pages = kNumPages;

  // and on the device
  bd::AppendParams append_there = append;
  append_there.pages = driver.upload(pages);
  append_there.block_table = static_cast<std::int32_t*>(driver.upload(table));
  append_there.seqlens = static_cast<std::int32_t*>(driver.upload(seqlens));
  append_there.packed_lens = static_cast<std::int32_t*>(driver.upload(packed));
  append_there.tail_k = driver.upload(tail_k);
  append_there.tail_v = driver.upload(tail_v);
  append_there.sink_k = driver.upload(sink_k);
  append_there.sink_v = driver.upload(sink_v);
  append_there.workspace = driver.zeros(static_cast<std::size_t>(workspace_bytes));

  const auto set_tokens = [&](const std::vector<std::uint16_t>& k, const std::vector<std::uint16_t>& v) {
    for (bd::AppendParams* p : {&append, &append_there}) {
      p->new_tokens = static_cast<std::int32_t>(k.size() / token / kBatch);
      p->new_batch_stride_bytes = p->new_tokens * p->new_token_stride_bytes;
    }
    append.k_new = k.data();
    append.v_new = v.data();
    append_there.k_new = driver.upload(k);
    append_there.v_new = driver.upload(v);
  };
  const auto append_both = [&](const std::vector<std::int32_t>& lengths) {
    append.lengths = lengths.data();
    append_there.lengths = static_cast<std::int32_t*>(driver.upload(lengths));
    must(bd::append_cpu(append, append_options));
    must(bd::append(append_plan.handle, append_there, workspace_bytes, {}));
    append.lengths = append_there.lengths = nullptr;
  };
  const auto view = [](const bd::AppendParams& from) {
    bd::DecodeParams p;
    p.pages = from.pages;
    p.block_table = from.block_table;
    p.seqlens = from.seqlens;
    p.packed_lens = from.packed_lens;
    p.tail_k = from.tail_k;
    p.tail_v = from.tail_v;
    p.sink_k = from.sink_k;
    p.sink_v = from.sink_v;
    p.workspace = from.workspace;
    p.head_stride_bytes = from.head_stride_bytes;
    p.page_stride_bytes = from.page_stride_bytes;
    p.batch = kBatch;
    p.num_q_heads = kQueryHeads;
    p.num_kv_heads = kHeads;
    p.num_pages = kNumPages;
    p.max_pages = kMaxPages;
    p.tail_capacity = kTailCapacity;
    p.num_sink = kSinks;
    p.softmax_scale_log2 = 1.4426950f / std::sqrt(static_cast<float>(kHeadDim));
    return p;
  };
  bd::DecodeParams decode = view(append), decode_there = view(append_there);
  decode.out = out.data();
  decode_there.q = driver.zeros(q_size * 2);
  decode_there.out = driver.zeros(q_size * 2);

  std::vector<std::uint16_t> k = random_halves(kBatch * kPrompt * token), v = random_halves(k.size());
  set_tokens(k, v);
  append_both({kPrompts, kPrompts + kBatch});
  double worst[2] = {0.0, 0.0};  // of decodes, of steps
  for (int i = 0; i < kSteps; ++i) {
    const bool whole = i % 3 != 0;
    const std::vector<std::uint16_t> q = random_halves(q_size);
    k = random_halves(kBatch * token);
    v = random_halves(kBatch * token);
    set_tokens(k, v);
    decode.q = q.data();
    driver.copy(q, const_cast<void*>(decode_there.q));
    if (whole) {
      must(bd::step_cpu(decode, append, append_options));
      must(bd::step(step_plan.handle, decode_there, append_there, workspace_bytes, {}));
    } else {
      append_both({1, 1, 0});
      must(bd::decode_cpu(decode, options));
      must(bd::decode(plan.handle, decode_there, workspace_bytes, {}));
    }
    driver.copy(decode_there.out, &got);
    double error = 0.0, norm = 0.0;
    for (std::size_t j = 0; j < q_size; ++j) {
      const double want = half_value(out[j]), difference = half_value(got[j]) - want;
      error += difference * difference;
      norm += want * want;
    }
    worst[whole] = std::max(worst[whole], std::sqrt(error / norm));
  }

  bool same = true;
  const auto compare = [&](const char* name, const auto& here, const void* there) {
    auto copy = here;
    driver.copy(there, &copy);
    if (copy == here) return;
    std::printf("%s differ\n", name);
    same = false;
  };
  compare("pages", pages, append_there.pages);
  compare("seqlens", seqlens, append_there.seqlens);
  compare("packed_lens", packed, append_there.packed_lens);
  compare("sink_k", sink_k, append_there.sink_k);
  compare("sink_v", sink_v, append_there.sink_v);
  std::printf("%g %g\n", worst[0], worst[1]);
  return same && std::max(worst[0], worst[1]) < 2e-3 ? 0 : 1;
}
