// The registry of kernels, and their launches.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <deque>
#include <initializer_list>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bitdecoding/block_format.hpp"
#include "bitdecoding/runtime.hpp"
#include "driver.hpp"
#include "error.hpp"
#include "pack.hpp"
#include "params.hpp"

namespace bitdecoding {
namespace {

constexpr std::int64_t kVectorBytes = 16;
constexpr std::int32_t kMaxWindow = 1 << 30;       // as in cute_kernels/work.py
constexpr std::int64_t kOperands = 2;              // K and V
constexpr std::int64_t kAppendCounterBytes = 128;  // of a sequence, as in cute_kernels/append_plan.py

struct Registered {
  Kernel kernel;
  KernelConfig config;
  // Set at the first launch: a cuda::Kernel is good in every context, its attributes are set per device.
  std::mutex mutex;
  cuda::Kernel loaded = nullptr;
  std::array<std::atomic<bool>, cuda::kMaxDevices> ready{};
};

class Registry {
 public:
  int find(const std::string& name) const {
    std::shared_lock<std::shared_mutex> lock(mutex_);
    const auto found = handles_.find(name);
    return found == handles_.end() ? -1 : found->second;
  }

  // A validated kernel; a name that is known keeps its first kernel.
  int add(Kernel kernel) {
    std::unique_lock<std::shared_mutex> lock(mutex_);
    const auto found = handles_.find(kernel.name);
    if (found != handles_.end()) return found->second;
    const int handle = static_cast<int>(kernels_.size());
    kernels_.emplace_back();
    static_cast<void>(KernelConfig::parse(kernel.name, &kernels_.back().config));  // validated
    kernels_.back().kernel = std::move(kernel);
    handles_.emplace(kernels_.back().kernel.name, handle);  // last: where there is no memory for it, there is no name
    return handle;
  }

  Status get(int handle, Registered** out) {
    std::shared_lock<std::shared_mutex> lock(mutex_);
    if (handle < 0 || handle >= static_cast<int>(kernels_.size())) {
      return fail(Status::kernel_not_found, "handle=", handle, ": ", kernels_.size(), " kernel(s) are registered");
    }
    *out = &kernels_[handle];
    return Status::ok;
  }

  std::vector<std::string> names() const {
    std::shared_lock<std::shared_mutex> lock(mutex_);
    std::vector<std::string> result;
    for (const Registered& each : kernels_) result.push_back(each.kernel.name);
    return result;
  }

 private:
  mutable std::shared_mutex mutex_;
  std::deque<Registered> kernels_;  // addresses stay
  std::unordered_map<std::string, int> handles_;
};

Registry& registry() {
  static auto* instance = new Registry;  // never destroyed: threads may outlive main
  return *instance;
}

// Loads the kernel into the current context of the device, at its first launch there.
Status make_ready(const cuda::Driver& driver, int device, Registered* r) try {
  if (r->ready[device].load(std::memory_order_acquire)) return Status::ok;
  std::lock_guard<std::mutex> lock(r->mutex);
  if (r->ready[device].load(std::memory_order_relaxed)) return Status::ok;

  const std::string what = "loading kernel " + r->kernel.name;
  // Loading is no stream operation: allow it while this thread captures a graph.
  cuda::CaptureMode mode = cuda::kCaptureRelaxed;
  driver.exchange_capture_mode(&mode);
  auto load = [&]() -> Status {
    if (r->loaded == nullptr) {
      cuda::Library library = nullptr;
      BITDECODING_TRY(cuda::check(
          driver, driver.library_load(&library, r->kernel.image.data(), nullptr, nullptr, 0, nullptr, nullptr, 0),
          what.c_str()));
      const Status found =
          cuda::check(driver, driver.library_kernel(&r->loaded, library, r->kernel.entry.c_str()), what.c_str());
      if (found != Status::ok) {
        r->loaded = nullptr;
        driver.library_unload(library);
        return found;
      }
    }
    cuda::Device handle = 0;
    cuda::Function function = nullptr;
    BITDECODING_TRY(cuda::check(driver, driver.device_get(&handle, device), what.c_str()));
    BITDECODING_TRY(cuda::check(driver, driver.kernel_function(&function, r->loaded), what.c_str()));
    return cuda::check(driver, driver.kernel_set_attribute(cuda::kMaxDynamicSmem, r->kernel.smem, r->loaded, handle),
                       what.c_str());
  };
  const Status status = load();
  driver.exchange_capture_mode(&mode);
  if (status == Status::ok) r->ready[device].store(true, std::memory_order_release);
  return status;
} catch (const std::bad_alloc&) {
  return fail(Status::out_of_memory, "kernel ", r->kernel.name, ": no memory to load it");
}

// Query columns of a KV head, and the tiles of them.
std::int64_t columns_of(const DecodeParams& p) { return std::int64_t{p.num_q_heads} / p.num_kv_heads * p.q_len; }

std::int64_t q_tiles_of(const KernelConfig& config, const DecodeParams& p) {
  return (columns_of(p) + config.q_tile - 1) / config.q_tile;
}

// ---- launches ----

// A registered kernel that does what the caller wants.
Status find_kind(int handle, const char* kind, Registered** out) {
  BITDECODING_TRY(registry().get(handle, out));
  if ((*out)->config.kind == kind) return Status::ok;
  return fail(Status::invalid_argument, "handle=", handle, ": is kernel ", (*out)->kernel.name,
              ", allowed are those of kind=", kind);
}

// The device of a launch, which must run the kernel's code.
Status find_target(const Registered& r, int device, const cuda::Driver** driver, const DeviceInfo** info) {
  BITDECODING_TRY(cuda::get_driver(driver));
  BITDECODING_TRY(cuda::find_device(**driver, device, info));
  if (r.config.arch == (*info)->arch) return Status::ok;
  return fail(Status::unsupported_config, "arch=", r.config.arch, ": device ", (*info)->index, " (", (*info)->name,
              ", compute capability ", (*info)->major, ".", (*info)->minor, ") runs kernels of ",
              (*info)->arch.empty() ? "no supported arch" : (*info)->arch);
}

Status launch(const cuda::Driver& driver, const DeviceInfo& info, Registered* r, std::int64_t num_ctas,
              void** arguments, const LaunchOptions& options) {
  cuda::ContextScope context;
  BITDECODING_TRY(context.enter(driver, options.device));
  BITDECODING_TRY(make_ready(driver, options.device, r));
  cuda::LaunchAttribute programmatic;
  programmatic.id = cuda::LaunchAttribute::kProgrammaticStreamSerialization;
  programmatic.value.flag = 1;
  cuda::LaunchConfig config;
  config.grid[0] = static_cast<unsigned>(num_ctas);
  config.block[0] = static_cast<unsigned>(r->kernel.threads);
  config.smem = static_cast<unsigned>(r->kernel.smem);
  config.stream = static_cast<cuda::Stream>(options.stream);
  config.attributes = &programmatic;
  config.num_attributes = options.programmatic && info.major >= 9 ? 1 : 0;
  return cuda::check(driver, driver.launch(&config, r->loaded, arguments, nullptr), r->kernel.name.c_str());
}

// ---- checks of parameters ----

Status positive(const char* name, std::int64_t value) {
  return value > 0 ? Status::ok : fail(Status::invalid_argument, name, "=", value, ": must be positive");
}

Status not_negative(const char* name, std::int64_t value) {
  return value >= 0 ? Status::ok : fail(Status::invalid_argument, name, "=", value, ": must not be negative");
}

Status absent(const char* name, const void* pointer, const char* why) {
  return pointer == nullptr ? Status::ok : fail(Status::invalid_argument, name, ": must be null ", why);
}

// A tensor that kernels read and write in vectors.
Status vectors(const char* name, const void* pointer) {
  BITDECODING_TRY(check_present(name, pointer));
  if (reinterpret_cast<std::uintptr_t>(pointer) % kVectorBytes == 0) return Status::ok;
  return fail(Status::invalid_argument, name, ": address must be a multiple of ", kVectorBytes, " bytes");
}

struct Extent {
  const char* name;
  std::int64_t value;
};

// A tensor of rows of head_dim values, fewer of them than 2^bits.
Status check_rows(const char* tensor, std::initializer_list<Extent> extents, int bits) {
  std::int64_t rows = 1;
  for (const Extent& extent : extents) rows = product(rows, extent.value);
  if (rows < std::int64_t{1} << bits) return Status::ok;
  std::string sizes;
  for (const Extent& extent : extents) {
    sizes += std::string(sizes.empty() ? "" : ", ") + extent.name + "=" + std::to_string(extent.value);
  }
  return fail(Status::invalid_argument, tensor, ": ", sizes, ": allowed are less than 2^", bits, " rows of head_dim");
}

// Tokens of a sequence are counted in 32 bits, so that more pages of one make no sense.
Status check_max_pages(std::int32_t max_pages) {
  constexpr std::int32_t kMaxPages = std::numeric_limits<std::int32_t>::max() / kBlockTokens;
  if (max_pages >= 0 && max_pages <= kMaxPages) return Status::ok;
  return fail(Status::invalid_argument, "max_pages=", max_pages, ": allowed are 0 to ", kMaxPages);
}

constexpr int kCountBits = 31;  // what kernels count in 32 bits: query rows, and a head's 16-bit tokens
constexpr int kTokenBits = 48;  // tensors whose size in bytes has room in 64 bits

// The sizes of tail and sinks.
template <typename Params>
Status check_kept(const Params& p) {
  const Extent batch{"batch", p.batch}, num_kv_heads{"num_kv_heads", p.num_kv_heads};
  const Extent tail{"tail_capacity", p.tail_capacity}, sink{"num_sink", p.num_sink};
  BITDECODING_TRY(check_rows("tail_k", {batch, tail}, kCountBits));
  BITDECODING_TRY(check_rows("sink_k", {batch, sink}, kCountBits));
  BITDECODING_TRY(check_rows("tail_k", {batch, tail, num_kv_heads}, kTokenBits));
  return check_rows("sink_k", {batch, sink, num_kv_heads}, kTokenBits);
}

// How many pages a stride may be multiplied by.
std::int64_t page_count(std::int32_t num_pages) {
  return num_pages > 0 ? num_pages : std::numeric_limits<std::int32_t>::max();  // 0: unknown
}

Status check_clip_factor(const char* name, float factor) {
  if (factor >= 0.0f && factor <= 1.0f) return Status::ok;
  return fail(Status::invalid_argument, name, "=", factor, ": allowed are 0 (searched) to 1");
}

// The tensors of a cache, which quantising does not have.
Status validate_cache(const AppendParams& p) {
  if (p.pack_all != 0) {
    constexpr char kWhy[] = "with pack_all";
    BITDECODING_TRY(absent("lengths", p.lengths, kWhy));
    BITDECODING_TRY(absent("seqlens", p.seqlens, kWhy));
    BITDECODING_TRY(absent("packed_lens", p.packed_lens, kWhy));
    BITDECODING_TRY(absent("tail_k", p.tail_k, kWhy));
    BITDECODING_TRY(absent("tail_v", p.tail_v, kWhy));
    BITDECODING_TRY(absent("sink_k", p.sink_k, kWhy));
    BITDECODING_TRY(absent("sink_v", p.sink_v, kWhy));
    BITDECODING_TRY(absent("status", p.status, kWhy));
    if (p.tail_capacity == 0 && p.num_sink == 0 && p.recent == 0) return Status::ok;
    return fail(Status::invalid_argument, "tail_capacity, num_sink and recent must be 0 with pack_all");
  }
  BITDECODING_TRY(check_present("seqlens", p.seqlens));
  BITDECODING_TRY(check_present("packed_lens", p.packed_lens));
  BITDECODING_TRY(vectors("tail_k", p.tail_k));
  BITDECODING_TRY(vectors("tail_v", p.tail_v));
  BITDECODING_TRY(not_negative("num_sink", p.num_sink));
  if (p.num_sink > 0) {
    BITDECODING_TRY(vectors("sink_k", p.sink_k));
    BITDECODING_TRY(vectors("sink_v", p.sink_v));
  }
  BITDECODING_TRY(not_negative("recent", p.recent));
  const std::int64_t least = std::int64_t{p.recent} + kBlockTokens - 1;
  if (p.tail_capacity < least) {
    return fail(Status::invalid_argument, "tail_capacity=", p.tail_capacity, ": allowed are numbers from ", least,
                " (recent + ", kBlockTokens - 1, ")");
  }
  BITDECODING_TRY(check_kept(p));
  if (p.new_tokens > std::numeric_limits<std::int32_t>::max() - p.tail_capacity) {
    return fail(Status::invalid_argument, "new_tokens=", p.new_tokens, ": with tail_capacity=", p.tail_capacity,
                " allowed are up to ", std::numeric_limits<std::int32_t>::max() - p.tail_capacity);
  }
  if (p.cu_seqlens != nullptr) return absent("lengths", p.lengths, "with cu_seqlens");
  return Status::ok;
}

Status validate(const AppendParams& p) {
  BITDECODING_TRY(positive("batch", p.batch));
  BITDECODING_TRY(positive("new_tokens", p.new_tokens));
  BITDECODING_TRY(positive("num_kv_heads", p.num_kv_heads));
  BITDECODING_TRY(not_negative("num_pages", p.num_pages));
  BITDECODING_TRY(check_max_pages(p.max_pages));
  BITDECODING_TRY(vectors("k_new", p.k_new));
  BITDECODING_TRY(vectors("v_new", p.v_new));
  if (p.num_pages > 0) BITDECODING_TRY(vectors("pages", p.pages));
  if (p.max_pages > 0) BITDECODING_TRY(check_present("block_table", p.block_table));
  // with cu_seqlens tokens are counted from the first sequence's first on
  const std::int64_t tokens = p.cu_seqlens != nullptr ? std::numeric_limits<std::int32_t>::max() : p.new_tokens;
  BITDECODING_TRY(check_stride("new_head_stride_bytes", p.new_head_stride_bytes, p.num_kv_heads));
  BITDECODING_TRY(check_stride("new_token_stride_bytes", p.new_token_stride_bytes, tokens));
  BITDECODING_TRY(check_stride("new_batch_stride_bytes", p.new_batch_stride_bytes, p.batch));
  BITDECODING_TRY(check_stride("head_stride_bytes", p.head_stride_bytes, p.num_kv_heads));
  BITDECODING_TRY(check_stride("page_stride_bytes", p.page_stride_bytes, page_count(p.num_pages)));
  BITDECODING_TRY(check_clip_factor("k_clip", p.k_clip));
  BITDECODING_TRY(check_clip_factor("v_clip", p.v_clip));
  return validate_cache(p);
}

// How many CTAs of an append kernel fit on the GPU at once.
std::int64_t resident_ctas(const Kernel& kernel, const DeviceInfo& info) {
  constexpr std::int64_t kRegisters = 65536;
  constexpr std::int64_t kCtaSmem = 1024;  // that the driver reserves
  const std::int64_t by_smem = (smem_limit(info.arch) + kCtaSmem) / (kernel.smem + kCtaSmem);
  const std::int64_t by_registers = kRegisters / std::max(kernel.regs * kernel.threads, 1);
  return std::max<std::int64_t>(info.num_sms * std::min(by_smem, by_registers), 1);
}

// Items of an operand (K or V) of a sequence's head: one per block, and when appending one for the 16-bit tokens.
std::int64_t append_items(const AppendParams& p) {
  if (p.pack_all != 0) return (std::int64_t{p.new_tokens} + kBlockTokens - 1) / kBlockTokens;
  return 1 + p.new_tokens / kBlockTokens;
}

// Items of an operand when quantising, each with every n-th block in a CTA of its own: starting one costs a fifth of a
// block. But there are to be five rounds of CTAs, as K and V take different times, or as lengths differ; a range that
// is searched takes so long that a start counts little.
std::int64_t quantize_items(const AppendParams& p, std::int64_t blocks, std::int64_t resident) {
  constexpr std::int64_t kBlocksOfItem = 5, kRounds = 5;
  const bool searched = p.k_clip == 0 || p.v_clip == 0;
  const std::int64_t all = blocks * p.batch * p.num_kv_heads * kOperands, round = kRounds * resident;
  const std::int64_t of_item = searched ? 1 : std::clamp<std::int64_t>((all + round / 2) / round, 1, kBlocksOfItem);
  return (blocks + of_item - 1) / of_item;
}

// CTAs of an append or quantise of num_items in all. Items of blocks of new tokens have their own. Others are a few
// rows to copy mostly: no more CTAs than leave room for those of the next append, which start before these end, and one
// item to a CTA only while each has an SM.
std::int64_t append_grid(const Kernel& kernel, const DeviceInfo& info, bool of_blocks, std::int64_t num_items) {
  constexpr std::int64_t kItemsOfCta = 4;  // at most, one per warp of the kernel
  if (of_blocks || num_items <= info.num_sms) return num_items;
  const std::int64_t half = std::max<std::int64_t>(resident_ctas(kernel, info) / 2, 1);
  const std::int64_t per_cta = std::clamp<std::int64_t>((num_items + half - 1) / half, 2, kItemsOfCta);
  return (num_items + per_cta - 1) / per_cta;
}

// Launches a kernel of kind=decode, or of another kind with more parameters behind decode's; these are valid.
template <typename... More>
Status launch_decode(Registered* r, const DecodeParams& params, std::int64_t workspace_bytes,
                     const LaunchOptions& options, More*... more) {
  const cuda::Driver* driver = nullptr;
  const DeviceInfo* info = nullptr;
  BITDECODING_TRY(vectors("workspace", params.workspace));
  BITDECODING_TRY(find_target(*r, options.device, &driver, &info));
  const int num_ctas = info->num_sms * r->kernel.ctas_per_sm;
  const std::int64_t needed = decode_workspace_bytes(r->config, num_ctas);
  if (workspace_bytes < needed) {
    return fail(Status::invalid_argument, "workspace: has ", workspace_bytes, " bytes, ", needed, " are needed");
  }

  DecodeParams p = params;
  p.workspace = static_cast<char*>(params.workspace) + kCounterBytes;
  p.window = std::min(params.window, kMaxWindow);
  std::int32_t group = p.num_q_heads / p.num_kv_heads;
  std::int32_t q_tiles = static_cast<std::int32_t>(q_tiles_of(r->config, params));
  void* arguments[] = {&p.q,
                       &p.pages,
                       &p.block_table,
                       &p.seqlens,
                       &p.packed_lens,
                       &p.tail_k,
                       &p.tail_v,
                       &p.sink_k,
                       &p.sink_v,
                       &p.sink_logits,
                       &p.out,
                       &p.lse,
                       &p.workspace,
                       &p.page_stride_bytes,
                       &p.head_stride_bytes,
                       &p.batch,
                       &p.q_len,
                       &p.num_q_heads,
                       &p.num_kv_heads,
                       &p.num_pages,
                       &p.max_pages,
                       &p.tail_capacity,
                       &p.num_sink,
                       &p.window,
                       &p.softmax_scale_log2,
                       &p.softcap,
                       &p.bfloat16,
                       &p.rotate_q,
                       &p.rotate_out,
                       &group,
                       &q_tiles,
                       more...};
  return launch(*driver, *info, r, num_ctas, arguments, options);
}

}  // namespace

Status check_stride(const char* name, std::int64_t stride, std::int64_t count) {
  const std::int64_t largest = kMaxExtentBytes / std::max<std::int64_t>(count, 1);
  if (stride >= 0 && stride <= largest && stride % kVectorBytes == 0) return Status::ok;
  return fail(Status::invalid_argument, name, "=", stride, ": allowed are multiples of ", kVectorBytes, " from 0 to ",
              largest);
}

Status validate_params(const AppendParams& p) { return validate(p); }

Status validate_params(const DecodeParams& p) {
  BITDECODING_TRY(positive("batch", p.batch));
  BITDECODING_TRY(positive("q_len", p.q_len));
  BITDECODING_TRY(positive("num_kv_heads", p.num_kv_heads));
  BITDECODING_TRY(positive("num_q_heads", p.num_q_heads));
  BITDECODING_TRY(positive("window", p.window));
  if (p.num_q_heads % p.num_kv_heads != 0) {
    return fail(Status::invalid_argument, "num_q_heads=", p.num_q_heads,
                ": must be a multiple of num_kv_heads=", p.num_kv_heads);
  }
  BITDECODING_TRY(not_negative("num_pages", p.num_pages));
  BITDECODING_TRY(check_max_pages(p.max_pages));
  BITDECODING_TRY(not_negative("tail_capacity", p.tail_capacity));
  BITDECODING_TRY(not_negative("num_sink", p.num_sink));
  BITDECODING_TRY(
      check_rows("q", {{"batch", p.batch}, {"q_len", p.q_len}, {"num_q_heads", p.num_q_heads}}, kCountBits));
  BITDECODING_TRY(check_kept(p));
  BITDECODING_TRY(vectors("q", p.q));
  BITDECODING_TRY(vectors("out", p.out));
  BITDECODING_TRY(check_present("seqlens", p.seqlens));
  if (p.tail_capacity > 0) {
    BITDECODING_TRY(vectors("tail_k", p.tail_k));
    BITDECODING_TRY(vectors("tail_v", p.tail_v));
  }
  if (p.num_sink > 0) {
    BITDECODING_TRY(vectors("sink_k", p.sink_k));
    BITDECODING_TRY(vectors("sink_v", p.sink_v));
  }
  if (p.max_pages > 0) {
    BITDECODING_TRY(vectors("pages", p.pages));
    BITDECODING_TRY(check_present("block_table", p.block_table));
  }
  BITDECODING_TRY(check_stride("head_stride_bytes", p.head_stride_bytes, p.num_kv_heads));
  BITDECODING_TRY(check_stride("page_stride_bytes", p.page_stride_bytes, page_count(p.num_pages)));
  if (!std::isfinite(p.softmax_scale_log2) || p.softmax_scale_log2 <= 0.0f) {
    return fail(Status::invalid_argument, "softmax_scale_log2=", p.softmax_scale_log2, ": must be positive and finite");
  }
  if (!std::isfinite(p.softcap) || p.softcap < 0.0f) {
    return fail(Status::invalid_argument, "softcap=", p.softcap, ": must be positive and finite, or 0 for none");
  }
  return Status::ok;
}

Status validate_params(const DecodeParams& d, const AppendParams& a) {
  const auto same = [](const char* name, std::int64_t of_append, std::int64_t of_decode, const char* name_there) {
    if (of_append == of_decode) return Status::ok;
    return fail(Status::invalid_argument, name, "=", of_append, ": must be decode's ", name_there, "=", of_decode);
  };
  const auto same_tensor = [](const char* name, const void* of_append, const void* of_decode) {
    if (of_append == of_decode) return Status::ok;
    return fail(Status::invalid_argument, name, ": must be decode's");
  };
  BITDECODING_TRY(validate_params(d));
  BITDECODING_TRY(validate_params(a));
  if (a.pack_all != 0) return fail(Status::invalid_argument, "pack_all=", a.pack_all, ": must be 0 for a step");
  BITDECODING_TRY(same("batch", a.batch, d.batch, "batch"));
  BITDECODING_TRY(same("new_tokens", a.new_tokens, d.q_len, "q_len"));
  BITDECODING_TRY(same("num_kv_heads", a.num_kv_heads, d.num_kv_heads, "num_kv_heads"));
  BITDECODING_TRY(same("num_pages", a.num_pages, d.num_pages, "num_pages"));
  BITDECODING_TRY(same("max_pages", a.max_pages, d.max_pages, "max_pages"));
  BITDECODING_TRY(same("tail_capacity", a.tail_capacity, d.tail_capacity, "tail_capacity"));
  BITDECODING_TRY(same("num_sink", a.num_sink, d.num_sink, "num_sink"));
  BITDECODING_TRY(same("page_stride_bytes", a.page_stride_bytes, d.page_stride_bytes, "page_stride_bytes"));
  BITDECODING_TRY(same("head_stride_bytes", a.head_stride_bytes, d.head_stride_bytes, "head_stride_bytes"));
  BITDECODING_TRY(same("bfloat16", a.bfloat16, d.bfloat16, "bfloat16"));
  BITDECODING_TRY(same("rotate_k", a.rotate_k, d.rotate_q, "rotate_q"));
  BITDECODING_TRY(same("rotate_v", a.rotate_v, d.rotate_out, "rotate_out"));
  BITDECODING_TRY(same_tensor("pages", a.pages, d.pages));
  BITDECODING_TRY(same_tensor("block_table", a.block_table, d.block_table));
  BITDECODING_TRY(same_tensor("seqlens", a.seqlens, d.seqlens));
  BITDECODING_TRY(same_tensor("packed_lens", a.packed_lens, d.packed_lens));
  BITDECODING_TRY(same_tensor("tail_k", a.tail_k, d.tail_k));
  BITDECODING_TRY(same_tensor("tail_v", a.tail_v, d.tail_v));
  BITDECODING_TRY(same_tensor("sink_k", a.sink_k, d.sink_k));
  BITDECODING_TRY(same_tensor("sink_v", a.sink_v, d.sink_v));
  BITDECODING_TRY(absent("lengths", a.lengths, "for a step"));
  BITDECODING_TRY(absent("cu_seqlens", a.cu_seqlens, "for a step"));
  const std::int64_t least = std::int64_t{a.recent} + kBlockTokens - 1 + d.q_len;
  if (a.tail_capacity >= least) return Status::ok;
  return fail(Status::invalid_argument, "tail_capacity=", a.tail_capacity, ": allowed are numbers from ", least,
              " (recent + ", kBlockTokens - 1, " + q_len)");
}

Status load_pack(const std::string& path, int* kernels_in_pack) noexcept try {
  std::vector<Kernel> kernels;
  BITDECODING_TRY(read_pack(path, &kernels));
  if (kernels_in_pack != nullptr) *kernels_in_pack = static_cast<int>(kernels.size());
  for (Kernel& kernel : kernels) registry().add(std::move(kernel));
  return Status::ok;
} catch (const std::bad_alloc&) {
  return fail(Status::out_of_memory, "path='", path, "': no memory for the pack");
}

Status add_kernel(Kernel kernel, int* handle) noexcept try {
  BITDECODING_TRY(check_present("handle", handle));
  BITDECODING_TRY(validate_kernel(kernel));
  *handle = registry().add(std::move(kernel));
  return Status::ok;
} catch (const std::bad_alloc&) {
  return fail(Status::out_of_memory, "kernel: no memory for its name");
}

int find_kernel(const std::string& name) noexcept { return registry().find(name); }

std::vector<std::string> list_kernels() { return registry().names(); }

Status kernel_config(int handle, const KernelConfig** out) noexcept {
  BITDECODING_TRY(check_present("out", out));
  Registered* r = nullptr;
  BITDECODING_TRY(registry().get(handle, &r));
  *out = &r->config;
  return Status::ok;
}

std::int64_t decode_workspace_bytes(const KernelConfig& config, std::int64_t num_ctas) noexcept {
  // a CTA's share of the blocks begins and ends inside a sequence: two partial results at most
  const std::int64_t slot = config.q_tile * (config.head_dim + 2) * static_cast<std::int64_t>(sizeof(float));
  return kCounterBytes + num_ctas * 2 * slot;
}

Status decode_workspace_bytes(int handle, int device, std::int64_t* out) noexcept {
  BITDECODING_TRY(check_present("out", out));
  Registered* r = nullptr;
  DeviceInfo info;
  BITDECODING_TRY(registry().get(handle, &r));
  if (r->config.kind != "step") BITDECODING_TRY(find_kind(handle, "decode", &r));
  BITDECODING_TRY(device_info(device, &info));
  *out = decode_workspace_bytes(r->config, std::int64_t{info.num_sms} * r->kernel.ctas_per_sm);
  return Status::ok;
}

Status decode(int handle, const DecodeParams& params, std::int64_t workspace_bytes,
              const LaunchOptions& options) noexcept {
  Registered* r = nullptr;
  BITDECODING_TRY(find_kind(handle, "decode", &r));
  BITDECODING_TRY(validate_params(params));
  return launch_decode(r, params, workspace_bytes, options);
}

Status step(int handle, const DecodeParams& decode, const AppendParams& append, std::int64_t workspace_bytes,
            const LaunchOptions& options) noexcept {
  Registered* r = nullptr;
  BITDECODING_TRY(find_kind(handle, "step", &r));
  BITDECODING_TRY(validate_params(decode, append));
  if (append.workspace != decode.workspace) {
    return fail(Status::invalid_argument, "workspace: must be that of decode");
  }
  const std::int64_t columns = columns_of(decode);
  if (columns > r->config.q_tile) {
    return fail(Status::unsupported_config, "q_len=", decode.q_len, ": kernel ", r->kernel.name, " has ",
                r->config.q_tile, " query columns, num_q_heads / num_kv_heads * q_len is ", columns);
  }
  AppendParams a = append;
  std::int32_t num_items = 1;
  return launch_decode(r, decode, workspace_bytes, options, &a.k_new, &a.v_new, &a.lengths, &a.cu_seqlens, &a.status,
                       &a.new_batch_stride_bytes, &a.new_token_stride_bytes, &a.new_head_stride_bytes, &a.new_tokens,
                       &a.recent, &num_items, &a.k_clip, &a.v_clip, &a.rotate_k, &a.rotate_v, &a.pack_all,
                       &a.workspace);
}

Status append(int handle, const AppendParams& params, std::int64_t workspace_bytes,
              const LaunchOptions& options) noexcept {
  constexpr std::int64_t kMaxGrid = std::numeric_limits<std::int32_t>::max();
  const cuda::Driver* driver = nullptr;
  Registered* r = nullptr;
  const DeviceInfo* info = nullptr;
  BITDECODING_TRY(find_kind(handle, "append", &r));
  BITDECODING_TRY(validate(params));
  const std::int64_t num_heads = std::int64_t{params.batch} * params.num_kv_heads;
  std::int64_t items = append_items(params);
  if (num_heads > kMaxGrid / (kOperands * items)) {
    return fail(Status::unsupported_config, "new_tokens=", params.new_tokens, ": with batch=", params.batch,
                " and num_kv_heads=", params.num_kv_heads, " one launch would need more than ", kMaxGrid,
                " thread blocks");
  }
  if (params.pack_all == 0) {
    BITDECODING_TRY(check_present("workspace", params.workspace));
    const std::int64_t counters = params.batch * kAppendCounterBytes;
    if (counters > kCounterBytes) {
      return fail(Status::unsupported_config, "batch=", params.batch, ": one launch would need ", counters,
                  " bytes of counters, ", kCounterBytes, " is the limit");
    }
    if (workspace_bytes < counters) {
      return fail(Status::invalid_argument, "workspace: has ", workspace_bytes, " bytes, ", counters, " are needed");
    }
  }
  BITDECODING_TRY(find_target(*r, options.device, &driver, &info));

  if (params.pack_all != 0) items = quantize_items(params, items, resident_ctas(r->kernel, *info));
  AppendParams p = params;
  std::int32_t num_items = static_cast<std::int32_t>(items);
  void* arguments[] = {&p.k_new,
                       &p.v_new,
                       &p.lengths,
                       &p.cu_seqlens,
                       &p.pages,
                       &p.block_table,
                       &p.seqlens,
                       &p.packed_lens,
                       &p.tail_k,
                       &p.tail_v,
                       &p.sink_k,
                       &p.sink_v,
                       &p.status,
                       &p.workspace,
                       &p.new_batch_stride_bytes,
                       &p.new_token_stride_bytes,
                       &p.new_head_stride_bytes,
                       &p.page_stride_bytes,
                       &p.head_stride_bytes,
                       &p.batch,
                       &p.new_tokens,
                       &p.num_kv_heads,
                       &p.num_pages,
                       &p.max_pages,
                       &p.tail_capacity,
                       &p.num_sink,
                       &p.recent,
                       &num_items,
                       &p.k_clip,
                       &p.v_clip,
                       &p.rotate_k,
                       &p.rotate_v,
                       &p.bfloat16,
                       &p.pack_all};
  const bool of_blocks = params.pack_all != 0 || items > 1;
  const std::int64_t num_ctas = append_grid(r->kernel, *info, of_blocks, num_heads * items * kOperands);
  return launch(*driver, *info, r, num_ctas, arguments, options);
}

Status merge(int handle, const MergeParams& params, const LaunchOptions& options) noexcept {
  constexpr std::int64_t kVectorValues = 8;  // of a thread
  constexpr std::int64_t kMaxGrid = std::numeric_limits<std::int32_t>::max();
  const cuda::Driver* driver = nullptr;
  Registered* r = nullptr;
  const DeviceInfo* info = nullptr;
  BITDECODING_TRY(find_kind(handle, "merge", &r));
  BITDECODING_TRY(positive("num_parts", params.num_parts));
  BITDECODING_TRY(not_negative("rows", params.rows));
  BITDECODING_TRY(vectors("outs", params.outs));
  BITDECODING_TRY(check_present("lses", params.lses));
  BITDECODING_TRY(vectors("out", params.out));
  BITDECODING_TRY(check_rows("outs", {{"num_parts", params.num_parts}, {"rows", params.rows}}, kTokenBits));
  const std::int64_t row_vectors = r->config.head_dim / kVectorValues, threads = r->kernel.threads;
  if (params.rows > kMaxGrid / row_vectors * threads) {
    return fail(Status::unsupported_config, "rows=", params.rows, ": one launch would need more than ", kMaxGrid,
                " thread blocks");
  }
  BITDECODING_TRY(find_target(*r, options.device, &driver, &info));
  if (params.rows == 0) return Status::ok;
  MergeParams p = params;
  void* arguments[] = {&p.outs, &p.lses, &p.out, &p.lse, &p.rows, &p.num_parts, &p.bfloat16};
  return launch(*driver, *info, r, (p.rows * row_vectors + threads - 1) / threads, arguments, options);
}

Status capture_id(int device, void* stream, std::uint64_t* out) noexcept {
  BITDECODING_TRY(check_present("out", out));
  const cuda::Driver* driver = nullptr;
  const DeviceInfo* info = nullptr;
  BITDECODING_TRY(cuda::get_driver(&driver));
  BITDECODING_TRY(cuda::find_device(*driver, device, &info));
  cuda::ContextScope context;
  BITDECODING_TRY(context.enter(*driver, device));
  cuda::CaptureStatus status{};
  *out = 0;
  BITDECODING_TRY(cuda::check(
      *driver, driver->capture_info(static_cast<cuda::Stream>(stream), &status, out, nullptr, nullptr, nullptr),
      "cuStreamGetCaptureInfo"));
  if (status != cuda::kCaptureActive) *out = 0;
  return Status::ok;
}

}  // namespace bitdecoding
