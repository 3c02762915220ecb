// The C ABI, on top of the C++ one.
#include "bitdecoding/c_api.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <string>

#include "bitdecoding/cpu.hpp"
#include "bitdecoding/runtime.hpp"
#include "error.hpp"
#include "params.hpp"

namespace bitdecoding {
namespace {

static_assert(static_cast<int>(Status::out_of_memory) == BITDECODING_OUT_OF_MEMORY);

constexpr std::size_t kMaxStructBytes = 4096;  // no version will have so many: what is more was never set

// Runs a function that returns a Status; nothing leaves but its number.
template <typename Function>
bitdecoding_status guarded(const Function& function) noexcept {
  try {
    return static_cast<bitdecoding_status>(function());
  } catch (const std::bad_alloc&) {
    static_cast<void>(fail(Status::out_of_memory, "the host has no memory left"));
    return BITDECODING_OUT_OF_MEMORY;
  }
}

// A struct of the caller, whatever its size: fields that it lacks are zero, fields that we lack must be.
template <typename T>
Status read(const char* name, const T* given, T* out) {
  BITDECODING_TRY(check_present(name, given));
  const std::size_t size = given->size;
  if (size < sizeof(T)) {  // of the first version
    return fail(Status::invalid_argument, name, ": size=", size, ": must be at least ", sizeof(T));
  }
  if (size > kMaxStructBytes) {
    return fail(Status::invalid_argument, name, ": size=", size, ": set it with the struct's _INIT value");
  }
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  if (std::any_of(bytes + sizeof(T), bytes + size, [](unsigned char byte) { return byte != 0; })) {
    return fail(Status::invalid_argument, name, ": size=", size, ": this library knows ", sizeof(T),
                " bytes of it, and what follows is not zero");
  }
  *out = *given;
  return Status::ok;
}

// The inverse: fills what the caller knows.
template <typename T>
Status write(const char* name, T from, T* to) {
  BITDECODING_TRY(check_present(name, to));
  const std::size_t size = to->size;
  if (size < sizeof(T)) {
    return fail(Status::invalid_argument, name, ": size=", size, ": must be at least ", sizeof(T));
  }
  from.size = size;
  std::memcpy(to, &from, sizeof(T));
  return Status::ok;
}

Status check_flag(const char* name, std::int32_t value) { return check_one_of(name, value, {0, 1}); }

Status to_clip(const char* name, float value, Clip* out) {
  if (value == BITDECODING_CLIP_SEARCHED) {
    out->search = true;
  } else if (value == 0.0f) {
    out->factor = 1.0;
  } else if (value > 0.0f && value <= 1.0f) {
    out->factor = value;
  } else {
    return fail(Status::invalid_argument, name, "=", value, ": allowed are 0, factors up to 1, and -1 (searched)");
  }
  return Status::ok;
}

Status to_quant(const bitdecoding_quant_spec* given, QuantSpec* out) {
  bitdecoding_quant_spec q = {};
  BITDECODING_TRY(read("quant", given, &q));
  BITDECODING_TRY(check_flag("k_per_token", q.k_per_token));
  BITDECODING_TRY(check_flag("k_symmetric", q.k_symmetric));
  BITDECODING_TRY(check_flag("v_symmetric", q.v_symmetric));
  BITDECODING_TRY(check_flag("k_mean", q.k_mean));
  BITDECODING_TRY(check_flag("rotate_k", q.rotate_k));
  BITDECODING_TRY(check_flag("rotate_v", q.rotate_v));
  out->k_bits = q.k_bits;
  out->v_bits = q.v_bits;
  out->k_axis = q.k_per_token != 0 ? "token" : "channel";
  out->k_group = q.k_group;
  out->v_group = q.v_group;
  out->k_symmetric = q.k_symmetric != 0;
  out->v_symmetric = q.v_symmetric != 0;
  out->k_mean = q.k_mean != 0 ? "block" : "none";
  out->rotate_k = q.rotate_k != 0;
  out->rotate_v = q.rotate_v != 0;
  BITDECODING_TRY(to_clip("k_clip", q.k_clip, &out->k_clip));
  return to_clip("v_clip", q.v_clip, &out->v_clip);
}

// All but workspace and rotation.
Status to_params(const bitdecoding_decode_params& given, std::int64_t block_bytes, DecodeParams* out) {
  constexpr double kLog2E = 1.4426950408889634;
  DecodeParams p;
  p.q = given.q;
  p.pages = given.pages;
  p.block_table = given.block_table;
  p.seqlens = given.seqlens;
  p.packed_lens = given.packed_lens;
  p.tail_k = given.tail_k;
  p.tail_v = given.tail_v;
  p.sink_k = given.sink_k;
  p.sink_v = given.sink_v;
  p.sink_logits = given.sink_logits;
  p.out = given.out;
  p.lse = given.lse;
  p.head_stride_bytes = given.head_stride_bytes != 0 ? given.head_stride_bytes : block_bytes;
  p.page_stride_bytes =
      given.page_stride_bytes != 0 ? given.page_stride_bytes : product(given.num_kv_heads, p.head_stride_bytes);
  p.batch = given.batch;
  p.q_len = given.q_len;
  p.num_q_heads = given.num_q_heads;
  p.num_kv_heads = given.num_kv_heads;
  p.num_pages = given.num_pages;
  p.max_pages = given.max_pages;
  p.tail_capacity = given.tail_capacity;
  p.num_sink = given.num_sink;
  if (given.window != 0) p.window = given.window;
  const double scale = given.softmax_scale != 0.0f ? given.softmax_scale : 1.0 / std::sqrt(given.head_dim);
  p.softmax_scale_log2 = static_cast<float>(scale * kLog2E);
  p.softcap = given.softcap;
  p.bfloat16 = given.dtype == BITDECODING_BFLOAT16 ? 1 : 0;
  *out = p;
  return Status::ok;
}

Status check_workspace(std::int64_t bytes, std::int64_t needed) {
  if (bytes >= needed) return Status::ok;
  return fail(Status::invalid_argument, "workspace_bytes=", bytes, ": the plan needs ", needed);
}

Status decode_on_device(const bitdecoding_decode_plan* given_plan, const bitdecoding_decode_params* given_params,
                        void* workspace, std::int64_t workspace_bytes, void* stream) {
  bitdecoding_decode_plan plan = {};
  bitdecoding_decode_params given = {};
  BITDECODING_TRY(read("plan", given_plan, &plan));
  BITDECODING_TRY(read("params", given_params, &given));
  const KernelConfig* config = nullptr;
  BITDECODING_TRY(kernel_config(plan.kernel, &config));
  BITDECODING_TRY(check_one_of<std::int64_t>("head_dim", given.head_dim, {config->head_dim}));
  BITDECODING_TRY(check_one_of<std::int32_t>("dtype", given.dtype, {BITDECODING_FLOAT16, BITDECODING_BFLOAT16}));
  DecodeParams params;
  BITDECODING_TRY(to_params(given, block_bytes(config->head_dim, config->quant), &params));
  BITDECODING_TRY(check_workspace(workspace_bytes, plan.workspace_bytes));
  params.workspace = workspace;
  params.rotate_q = plan.rotate_q;
  params.rotate_out = plan.rotate_out;
  LaunchOptions options;
  options.device = plan.device;
  options.stream = stream;
  return decode(plan.kernel, params, workspace_bytes, options);
}

Status decode_on_host(const bitdecoding_quant_spec* quant, const bitdecoding_decode_params* given_params,
                      std::int32_t num_threads) {
  CpuDecodeOptions options;
  bitdecoding_decode_params given = {};
  BITDECODING_TRY(to_quant(quant, &options.quant));
  BITDECODING_TRY(read("params", given_params, &given));
  BITDECODING_TRY(options.quant.validate(given.head_dim));
  BITDECODING_TRY(check_one_of<std::int32_t>("dtype", given.dtype,
                                             {BITDECODING_FLOAT16, BITDECODING_BFLOAT16, BITDECODING_FLOAT32}));
  DecodeParams params;
  BITDECODING_TRY(to_params(given, block_bytes(given.head_dim, options.quant), &params));
  set_quant(options.quant, &params);
  options.head_dim = given.head_dim;
  options.num_pages = given.num_pages;
  options.float32 = given.dtype == BITDECODING_FLOAT32;
  options.num_threads = num_threads;
  return decode_cpu(params, options);
}

DeviceInfo to_device(const bitdecoding_device& given) {
  DeviceInfo info;
  info.index = given.index;
  info.arch.assign(given.arch, strnlen(given.arch, sizeof(given.arch)));
  info.num_sms = given.num_sms;
  return info;
}

Status to_problem(const bitdecoding_decode_problem* given_problem, DecodeProblem* out) {
  bitdecoding_decode_problem given = {};
  BITDECODING_TRY(read("problem", given_problem, &given));
  BITDECODING_TRY(to_quant(given.quant, &out->quant));
  out->head_dim = given.head_dim;
  out->num_q_heads = given.num_q_heads;
  out->num_kv_heads = given.num_kv_heads;
  out->q_len = given.q_len;
  if (given.kernel != nullptr) out->kernel = given.kernel;
  return Status::ok;
}

Status plan(const bitdecoding_decode_problem* given_problem, const bitdecoding_device* given_device,
            bitdecoding_decode_plan* out) {
  bitdecoding_device device = {};
  DecodeProblem problem;
  DecodePlan chosen;
  BITDECODING_TRY(to_problem(given_problem, &problem));
  BITDECODING_TRY(read("device", given_device, &device));
  BITDECODING_TRY(plan_decode(problem, to_device(device), &chosen));
  bitdecoding_decode_plan result = BITDECODING_DECODE_PLAN_INIT;
  result.kernel = chosen.handle;
  result.device = device.index;
  result.workspace_bytes = chosen.workspace_bytes;
  DecodeParams wanted;
  set_quant(problem.quant, &wanted);
  result.rotate_q = wanted.rotate_q;
  result.rotate_out = wanted.rotate_out;
  return write("plan", result, out);
}

// What an append asks of a plan, whose struct may be that of a step.
template <typename Plan>
void set_append(const QuantSpec& quant, Plan* out) {
  AppendParams wanted;
  set_quant(quant, &wanted);
  out->rotate_k = wanted.rotate_k;
  out->rotate_v = wanted.rotate_v;
  out->k_clip = wanted.k_clip;
  out->v_clip = wanted.v_clip;
}

// And what such a plan asks of an append.
template <typename Plan>
void set_params(const Plan& plan, void* workspace, AppendParams* out) {
  out->rotate_k = plan.rotate_k;
  out->rotate_v = plan.rotate_v;
  out->k_clip = plan.k_clip;
  out->v_clip = plan.v_clip;
  out->workspace = workspace;
}

Status plan(const bitdecoding_quant_spec* given_quant, std::int64_t head_dim, const bitdecoding_device* given_device,
            bitdecoding_append_plan* out) {
  bitdecoding_device device = {};
  QuantSpec quant;
  AppendPlan chosen;
  BITDECODING_TRY(to_quant(given_quant, &quant));
  BITDECODING_TRY(read("device", given_device, &device));
  BITDECODING_TRY(plan_append(quant, head_dim, to_device(device), &chosen));
  bitdecoding_append_plan result = BITDECODING_APPEND_PLAN_INIT;
  result.kernel = chosen.handle;
  result.device = device.index;
  result.workspace_bytes = chosen.workspace_bytes;
  set_append(quant, &result);
  return write("plan", result, out);
}

Status plan(const bitdecoding_decode_problem* given_problem, const bitdecoding_device* given_device,
            bitdecoding_step_plan* out) {
  bitdecoding_device device = {};
  DecodeProblem problem;
  DecodePlan chosen;
  BITDECODING_TRY(to_problem(given_problem, &problem));
  BITDECODING_TRY(read("device", given_device, &device));
  BITDECODING_TRY(plan_step(problem, to_device(device), &chosen));
  bitdecoding_step_plan result = BITDECODING_STEP_PLAN_INIT;
  result.kernel = chosen.handle;
  result.device = device.index;
  result.workspace_bytes = chosen.workspace_bytes;
  set_append(problem.quant, &result);
  return write("plan", result, out);
}

// All but workspace; dtype and head_dim are valid.
void to_params(const bitdecoding_append_params& given, const QuantSpec& quant, bool pack_all, AppendParams* out) {
  AppendParams p;
  p.k_new = given.k_new;
  p.v_new = given.v_new;
  p.lengths = given.lengths;
  p.cu_seqlens = given.cu_seqlens;
  p.pages = given.pages;
  p.block_table = given.block_table;
  p.seqlens = given.seqlens;
  p.packed_lens = given.packed_lens;
  p.tail_k = given.tail_k;
  p.tail_v = given.tail_v;
  p.sink_k = given.sink_k;
  p.sink_v = given.sink_v;
  p.status = given.status;
  const auto or_default = [](std::int64_t value, std::int64_t otherwise) { return value != 0 ? value : otherwise; };
  const std::int64_t row_bytes = std::int64_t{given.head_dim} * (given.dtype == BITDECODING_FLOAT32 ? 4 : 2);
  p.new_head_stride_bytes = or_default(given.new_head_stride_bytes, row_bytes);
  p.new_token_stride_bytes =
      or_default(given.new_token_stride_bytes, product(given.num_kv_heads, p.new_head_stride_bytes));
  p.new_batch_stride_bytes =
      or_default(given.new_batch_stride_bytes, product(given.new_tokens, p.new_token_stride_bytes));
  p.head_stride_bytes = or_default(given.head_stride_bytes, block_bytes(given.head_dim, quant));
  p.page_stride_bytes = or_default(given.page_stride_bytes, product(given.num_kv_heads, p.head_stride_bytes));
  p.batch = given.batch;
  p.new_tokens = given.new_tokens;
  p.num_kv_heads = given.num_kv_heads;
  p.num_pages = given.num_pages;
  p.max_pages = given.max_pages;
  p.tail_capacity = given.tail_capacity;
  p.num_sink = given.num_sink;
  p.recent = given.recent;
  p.bfloat16 = given.dtype == BITDECODING_BFLOAT16 ? 1 : 0;
  p.pack_all = pack_all ? 1 : 0;
  set_quant(quant, &p);
  *out = p;
}

Status append_on_device(const bitdecoding_append_plan* given_plan, const bitdecoding_append_params* given_params,
                        bool pack_all, void* workspace, std::int64_t workspace_bytes, void* stream) {
  bitdecoding_append_plan plan = {};
  bitdecoding_append_params given = {};
  BITDECODING_TRY(read("plan", given_plan, &plan));
  BITDECODING_TRY(read("params", given_params, &given));
  const KernelConfig* config = nullptr;
  AppendParams params;
  BITDECODING_TRY(kernel_config(plan.kernel, &config));
  BITDECODING_TRY(check_one_of<std::int64_t>("head_dim", given.head_dim, {config->head_dim}));
  BITDECODING_TRY(check_one_of<std::int32_t>("dtype", given.dtype, {BITDECODING_FLOAT16, BITDECODING_BFLOAT16}));
  to_params(given, config->quant, pack_all, &params);
  set_params(plan, workspace, &params);
  LaunchOptions options;
  options.device = plan.device;
  options.stream = stream;
  return append(plan.kernel, params, workspace_bytes, options);
}

Status append_on_host(const bitdecoding_quant_spec* quant, const bitdecoding_append_params* given_params, bool pack_all,
                      std::int32_t num_threads) {
  CpuAppendOptions options;
  bitdecoding_append_params given = {};
  AppendParams params;
  BITDECODING_TRY(to_quant(quant, &options.quant));
  BITDECODING_TRY(read("params", given_params, &given));
  BITDECODING_TRY(options.quant.validate(given.head_dim));
  BITDECODING_TRY(check_one_of<std::int32_t>("dtype", given.dtype,
                                             {BITDECODING_FLOAT16, BITDECODING_BFLOAT16, BITDECODING_FLOAT32}));
  to_params(given, options.quant, pack_all, &params);
  options.head_dim = given.head_dim;
  options.float32 = given.dtype == BITDECODING_FLOAT32;
  options.num_threads = num_threads;
  return append_cpu(params, options);
}

// Both sets of parameters of a step.
struct GivenStep {
  bitdecoding_decode_params decode = {};
  bitdecoding_append_params append = {};

  Status read_from(const bitdecoding_decode_params* given_decode, const bitdecoding_append_params* given_append) {
    BITDECODING_TRY(read("decode", given_decode, &decode));
    BITDECODING_TRY(read("append", given_append, &append));
    BITDECODING_TRY(check_one_of<std::int32_t>("head_dim", append.head_dim, {decode.head_dim}));
    return check_one_of<std::int32_t>("dtype", append.dtype, {decode.dtype});
  }
};

Status step_on_device(const bitdecoding_step_plan* given_plan, const bitdecoding_decode_params* given_decode,
                      const bitdecoding_append_params* given_append, void* workspace, std::int64_t workspace_bytes,
                      void* stream) {
  bitdecoding_step_plan plan = {};
  GivenStep given;
  const KernelConfig* config = nullptr;
  DecodeParams of_decode;
  AppendParams of_append;
  BITDECODING_TRY(read("plan", given_plan, &plan));
  BITDECODING_TRY(given.read_from(given_decode, given_append));
  BITDECODING_TRY(kernel_config(plan.kernel, &config));
  BITDECODING_TRY(check_one_of<std::int64_t>("head_dim", given.decode.head_dim, {config->head_dim}));
  BITDECODING_TRY(check_one_of<std::int32_t>("dtype", given.decode.dtype, {BITDECODING_FLOAT16, BITDECODING_BFLOAT16}));
  BITDECODING_TRY(to_params(given.decode, block_bytes(config->head_dim, config->quant), &of_decode));
  to_params(given.append, config->quant, false, &of_append);
  BITDECODING_TRY(check_workspace(workspace_bytes, plan.workspace_bytes));
  set_params(plan, workspace, &of_append);
  of_decode.rotate_q = plan.rotate_k;
  of_decode.rotate_out = plan.rotate_v;
  of_decode.workspace = workspace;
  LaunchOptions options;
  options.device = plan.device;
  options.stream = stream;
  return step(plan.kernel, of_decode, of_append, workspace_bytes, options);
}

Status step_on_host(const bitdecoding_quant_spec* quant, const bitdecoding_decode_params* given_decode,
                    const bitdecoding_append_params* given_append, std::int32_t num_threads) {
  CpuAppendOptions options;
  GivenStep given;
  DecodeParams of_decode;
  AppendParams of_append;
  BITDECODING_TRY(to_quant(quant, &options.quant));
  BITDECODING_TRY(given.read_from(given_decode, given_append));
  BITDECODING_TRY(options.quant.validate(given.decode.head_dim));
  BITDECODING_TRY(check_one_of<std::int32_t>("dtype", given.decode.dtype,
                                             {BITDECODING_FLOAT16, BITDECODING_BFLOAT16, BITDECODING_FLOAT32}));
  BITDECODING_TRY(to_params(given.decode, block_bytes(given.decode.head_dim, options.quant), &of_decode));
  to_params(given.append, options.quant, false, &of_append);
  set_quant(options.quant, &of_decode);
  options.head_dim = given.decode.head_dim;
  options.float32 = given.decode.dtype == BITDECODING_FLOAT32;
  options.num_threads = num_threads;
  return step_cpu(of_decode, of_append, options);
}

Status list(char* names, std::size_t capacity, std::size_t* needed) {
  BITDECODING_TRY(check_present("needed", needed));
  if (names == nullptr && capacity > 0) return fail(Status::invalid_argument, "names: is null");
  std::string text;
  for (const std::string& name : list_kernels()) text += name + "\n";
  *needed = text.size() + 1;
  if (capacity < *needed) {
    return fail(Status::invalid_argument, "capacity=", capacity, ": the names need ", *needed, " bytes");
  }
  std::memcpy(names, text.c_str(), *needed);
  return Status::ok;
}

Status get_device(std::int32_t index, bitdecoding_device* out) {
  DeviceInfo info;
  BITDECODING_TRY(device_info(index, &info));
  bitdecoding_device device = BITDECODING_DEVICE_INIT;
  device.index = info.index;
  device.major = info.major;
  device.minor = info.minor;
  device.num_sms = info.num_sms;
  info.arch.copy(device.arch, sizeof(device.arch) - 1);
  return write("device", device, out);
}

}  // namespace
}  // namespace bitdecoding

namespace bd = bitdecoding;

const char* bitdecoding_last_error(void) { return bd::last_error(); }

bitdecoding_status bitdecoding_block_bytes(int64_t head_dim, const bitdecoding_quant_spec* quant, int64_t* bytes) {
  return bd::guarded([&] {
    bd::QuantSpec spec;
    BITDECODING_TRY(bd::to_quant(quant, &spec));
    BITDECODING_TRY(spec.validate(head_dim));
    BITDECODING_TRY(bd::check_present("bytes", bytes));
    *bytes = bd::block_bytes(head_dim, spec);
    return bd::Status::ok;
  });
}

bitdecoding_status bitdecoding_load_pack(const char* path, int32_t* num_kernels) {
  return bd::guarded([&] {
    BITDECODING_TRY(bd::check_present("path", path));
    return bd::load_pack(path, num_kernels);
  });
}

bitdecoding_status bitdecoding_list_kernels(char* names, size_t capacity, size_t* needed) {
  return bd::guarded([&] { return bd::list(names, capacity, needed); });
}

bitdecoding_status bitdecoding_get_device(int32_t index, bitdecoding_device* device) {
  return bd::guarded([&] { return bd::get_device(index, device); });
}

bitdecoding_status bitdecoding_plan_decode(const bitdecoding_decode_problem* problem, const bitdecoding_device* device,
                                           bitdecoding_decode_plan* plan) {
  return bd::guarded([&] { return bd::plan(problem, device, plan); });
}

bitdecoding_status bitdecoding_decode(const bitdecoding_decode_plan* plan, const bitdecoding_decode_params* params,
                                      void* workspace, int64_t workspace_bytes, void* stream) {
  return bd::guarded([&] { return bd::decode_on_device(plan, params, workspace, workspace_bytes, stream); });
}

bitdecoding_status bitdecoding_decode_cpu(const bitdecoding_quant_spec* quant, const bitdecoding_decode_params* params,
                                          int32_t num_threads) {
  return bd::guarded([&] { return bd::decode_on_host(quant, params, num_threads); });
}

bitdecoding_status bitdecoding_plan_append(const bitdecoding_quant_spec* quant, int64_t head_dim,
                                           const bitdecoding_device* device, bitdecoding_append_plan* plan) {
  return bd::guarded([&] { return bd::plan(quant, head_dim, device, plan); });
}

bitdecoding_status bitdecoding_append(const bitdecoding_append_plan* plan, const bitdecoding_append_params* params,
                                      void* workspace, int64_t workspace_bytes, void* stream) {
  return bd::guarded([&] { return bd::append_on_device(plan, params, false, workspace, workspace_bytes, stream); });
}

bitdecoding_status bitdecoding_quantize(const bitdecoding_append_plan* plan, const bitdecoding_append_params* params,
                                        void* stream) {
  return bd::guarded([&] { return bd::append_on_device(plan, params, true, nullptr, 0, stream); });
}

bitdecoding_status bitdecoding_append_cpu(const bitdecoding_quant_spec* quant, const bitdecoding_append_params* params,
                                          int32_t num_threads) {
  return bd::guarded([&] { return bd::append_on_host(quant, params, false, num_threads); });
}

bitdecoding_status bitdecoding_quantize_cpu(const bitdecoding_quant_spec* quant,
                                            const bitdecoding_append_params* params, int32_t num_threads) {
  return bd::guarded([&] { return bd::append_on_host(quant, params, true, num_threads); });
}

bitdecoding_status bitdecoding_plan_step(const bitdecoding_decode_problem* problem, const bitdecoding_device* device,
                                         bitdecoding_step_plan* plan) {
  return bd::guarded([&] { return bd::plan(problem, device, plan); });
}

bitdecoding_status bitdecoding_step(const bitdecoding_step_plan* plan, const bitdecoding_decode_params* decode,
                                    const bitdecoding_append_params* append, void* workspace, int64_t workspace_bytes,
                                    void* stream) {
  return bd::guarded([&] { return bd::step_on_device(plan, decode, append, workspace, workspace_bytes, stream); });
}

bitdecoding_status bitdecoding_step_cpu(const bitdecoding_quant_spec* quant, const bitdecoding_decode_params* decode,
                                        const bitdecoding_append_params* append, int32_t num_threads) {
  return bd::guarded([&] { return bd::step_on_host(quant, decode, append, num_threads); });
}

bitdecoding_status bitdecoding_merge(const bitdecoding_device* device, int32_t dtype, int32_t num_parts,
                                     const void* outs, const float* lses, int64_t rows, int64_t head_dim, void* out,
                                     float* lse, void* stream) {
  return bd::guarded([&] {
    bitdecoding_device given = {};
    int kernel = -1;
    BITDECODING_TRY(bd::read("device", device, &given));
    BITDECODING_TRY(bd::check_one_of<std::int32_t>("dtype", dtype, {BITDECODING_FLOAT16, BITDECODING_BFLOAT16}));
    BITDECODING_TRY(bd::plan_merge(head_dim, bd::to_device(given), &kernel));
    bd::MergeParams params;
    params.outs = outs;
    params.lses = lses;
    params.out = out;
    params.lse = lse;
    params.rows = rows;
    params.num_parts = num_parts;
    params.bfloat16 = dtype == BITDECODING_BFLOAT16 ? 1 : 0;
    bd::LaunchOptions options;
    options.device = given.index;
    options.stream = stream;
    return bd::merge(kernel, params, options);
  });
}

bitdecoding_status bitdecoding_merge_cpu(int32_t dtype, int32_t num_parts, const void* const* outs,
                                         const float* const* lses, int64_t rows, int64_t head_dim, void* out,
                                         float* lse) {
  return bd::guarded([&] {
    BITDECODING_TRY(bd::check_one_of<std::int32_t>("dtype", dtype,
                                                   {BITDECODING_FLOAT16, BITDECODING_BFLOAT16, BITDECODING_FLOAT32}));
    bd::CpuMergeParams params;
    params.outs = outs;
    params.lses = lses;
    params.num_parts = num_parts;
    params.rows = rows;
    params.head_dim = head_dim;
    params.bfloat16 = dtype == BITDECODING_BFLOAT16;
    params.float32 = dtype == BITDECODING_FLOAT32;
    params.out = out;
    params.lse = lse;
    return bd::merge_cpu(params);
  });
}
