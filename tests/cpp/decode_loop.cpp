// A C++ user with a GPU: generates tokens, one per step and sequence, into the 16-bit tail of a cache on the device,
// and compares every step with decode_cpu on the same bytes. Argument: a kernel pack for the GPU with a decode kernel
// of the default format. Prints the largest relative error; exit status 77: there is no GPU.
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

constexpr int kBatch = 3, kQueryHeads = 32, kHeads = 8, kHeadDim = 128, kTailCapacity = 40, kMaxPages = 9;
constexpr int kNumPages = kBatch * kMaxPages;
constexpr int kPacked[kBatch] = {1024, 0, 640};
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
  bd::DecodePlan plan;
  must(bd::load_pack(argc > 1 ? argv[1] : ""));
  must(bd::plan_decode(problem, device, &plan));

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
  const random_cache::Cache cache =
      random_cache::make_cache(&random, random_cache::block_spec(problem.quant, kHeadDim), kNumPages, kHeads);
  std::vector<std::int32_t> table(kNumPages), packed(kPacked, kPacked + kBatch), seqlens = packed;
  for (int i = 0; i < kNumPages; ++i) table[i] = kNumPages - 1 - i;
  const std::size_t token = std::size_t{kHeads} * kHeadDim, q_size = std::size_t{kBatch} * kQueryHeads * kHeadDim;
  std::vector<std::uint16_t> tail_k(kBatch * kTailCapacity * token), tail_v(tail_k.size()), out(q_size), got(q_size);

  bd::DecodeParams host;
  host.pages = cache.pages.data();
  host.block_table = table.data();
  host.seqlens = seqlens.data();
  host.packed_lens = packed.data();
  host.tail_k = tail_k.data();
  host.tail_v = tail_v.data();
  host.out = out.data();
  host.head_stride_bytes = bd::block_bytes(kHeadDim, problem.quant);
  host.page_stride_bytes = kHeads * host.head_stride_bytes;
  host.batch = kBatch;
  host.num_q_heads = kQueryHeads;
  host.num_kv_heads = kHeads;
  host.max_pages = kMaxPages;
  host.tail_capacity = kTailCapacity;
  host.softmax_scale_log2 = 1.4426950f / std::sqrt(static_cast<float>(kHeadDim));
  bd::CpuDecodeOptions options;
  options.quant = problem.quant;
  options.head_dim = kHeadDim;
  options.num_pages = kNumPages;

  bd::DecodeParams on_device = host;
  on_device.q = driver.zeros(q_size * 2);
  on_device.pages = driver.upload(cache.pages);
  on_device.block_table = static_cast<std::int32_t*>(driver.upload(table));
  on_device.seqlens = static_cast<std::int32_t*>(driver.upload(seqlens));
  on_device.packed_lens = static_cast<std::int32_t*>(driver.upload(packed));
  on_device.tail_k = driver.upload(tail_k);
  on_device.tail_v = driver.upload(tail_v);
  on_device.out = driver.zeros(q_size * 2);
  on_device.workspace = driver.zeros(static_cast<std::size_t>(plan.workspace_bytes));

  double worst = 0.0;
  for (int step = 0; step < kTailCapacity; ++step) {
    const std::vector<std::uint16_t> k = random_halves(kBatch * token), v = random_halves(kBatch * token);
    for (int b = 0; b < kBatch; ++b) {
      const std::size_t at = (std::size_t{static_cast<unsigned>(b)} * kTailCapacity + step) * token;
      std::copy_n(k.begin() + b * token, token, tail_k.begin() + at);
      std::copy_n(v.begin() + b * token, token, tail_v.begin() + at);
      ++seqlens[b];
    }
    const std::vector<std::uint16_t> q = random_halves(q_size);
    host.q = q.data();
    must(bd::decode_cpu(host, options));

    driver.copy(q, const_cast<void*>(on_device.q));
    driver.copy(seqlens, const_cast<std::int32_t*>(on_device.seqlens));
    driver.copy(tail_k, const_cast<void*>(on_device.tail_k));
    driver.copy(tail_v, const_cast<void*>(on_device.tail_v));
    must(bd::decode(plan.handle, on_device, plan.workspace_bytes, {}));
    driver.copy(on_device.out, &got);
    double error = 0.0, norm = 0.0;
    for (std::size_t i = 0; i < q_size; ++i) {
      const double want = half_value(out[i]), difference = half_value(got[i]) - want;
      error += difference * difference;
      norm += want * want;
    }
    worst = std::max(worst, std::sqrt(error / norm));
  }
  std::printf("%g\n", worst);
  return worst < 2e-3 ? 0 : 1;
}
