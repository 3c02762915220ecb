// Which registered kernel decodes a problem, with or without appending, appends to blocks of a format, or merges.
#include <new>
#include <string>
#include <vector>

#include "bitdecoding/runtime.hpp"
#include "error.hpp"

namespace bitdecoding {
namespace {

// Whether a kernel with `tile` query columns suits `columns` better than one with `other`.
bool suits_better(std::int64_t columns, std::int64_t tile, std::int64_t other) {
  const bool holds = tile >= columns, other_holds = other >= columns;
  if (holds != other_holds) return holds;
  return holds ? tile < other : tile > other;
}

Status check_device(const DeviceInfo& device) {
  if (device.num_sms < 1) return fail(Status::invalid_argument, "num_sms=", device.num_sms, ": must be positive");
  if (smem_limit(device.arch) != 0) return Status::ok;
  return fail(Status::unsupported_config, "arch='", device.arch, "': allowed are ", listed(kArchs));
}

// What a kernel must be for.
struct Wanted {
  const char* kind;
  std::int64_t head_dim;
  std::string format;  // QuantSpec::name()
  std::string arch;

  bool all_but_arch(const KernelConfig& config) const {
    return config.kind == kind && config.head_dim == head_dim && config.quant.name() == format;
  }
};

// The best of the registered kernels, better(config, best so far).
template <typename Better>
Status find_best(const Wanted& wanted, const Better& better, int* handle, const KernelConfig** best) {
  *best = nullptr;
  std::string other_archs;
  for (const std::string& name : list_kernels()) {
    const int found = find_kernel(name);
    const KernelConfig* config = nullptr;
    BITDECODING_TRY(kernel_config(found, &config));
    if (!wanted.all_but_arch(*config)) continue;
    if (config->arch != wanted.arch) {
      if (other_archs.find(config->arch) == std::string::npos)
        other_archs += (other_archs.empty() ? "" : ", ") + config->arch;
      continue;
    }
    if (*best == nullptr || better(*config, **best)) {
      *best = config;
      *handle = found;
    }
  }
  if (*best != nullptr) return Status::ok;
  const std::string format = std::string(wanted.kind) == "merge" ? "" : " and " + wanted.format;
  return fail(Status::kernel_not_found, "arch=", wanted.arch, ": no kernel of kind=", wanted.kind,
              " for head_dim=", wanted.head_dim, format, " is registered; there are some for ",
              other_archs.empty() ? "no arch" : other_archs, "; load a kernel pack");
}

// The kernel that the caller names.
Status find_named(const Wanted& wanted, const std::string& name, int* handle, const KernelConfig** config) {
  *handle = find_kernel(name);
  if (*handle < 0) return fail(Status::kernel_not_found, "kernel='", name, "': is not registered");
  BITDECODING_TRY(kernel_config(*handle, config));
  if (wanted.all_but_arch(**config) && (*config)->arch == wanted.arch) return Status::ok;
  return fail(Status::invalid_argument, "kernel='", name, "': is not for kind=", wanted.kind,
              ", head_dim=", wanted.head_dim, " and ", wanted.format, " on ", wanted.arch);
}

// kind: decode, whose kernels take any number of query columns in tiles, or step, whose kernels take one tile.
Status choose(const char* kind, const DecodeProblem& problem, const DeviceInfo& device, DecodePlan* out) {
  BITDECODING_TRY(problem.quant.validate(problem.head_dim));
  if (problem.num_kv_heads < 1 || problem.num_q_heads < 1 || problem.num_q_heads % problem.num_kv_heads != 0) {
    return fail(Status::invalid_argument, "num_q_heads=", problem.num_q_heads,
                ": must be a multiple of num_kv_heads=", problem.num_kv_heads);
  }
  if (problem.q_len < 1) return fail(Status::invalid_argument, "q_len=", problem.q_len, ": must be positive");
  BITDECODING_TRY(check_device(device));

  const std::int64_t columns = std::int64_t{problem.num_q_heads} / problem.num_kv_heads * problem.q_len;
  const Wanted wanted{kind, problem.head_dim, problem.quant.name(), device.arch};
  const KernelConfig* best = nullptr;
  DecodePlan plan;
  if (problem.kernel.empty()) {
    const auto better = [columns](const KernelConfig& config, const KernelConfig& other) {
      return suits_better(columns, config.q_tile, other.q_tile);
    };
    BITDECODING_TRY(find_best(wanted, better, &plan.handle, &best));
  } else {
    BITDECODING_TRY(find_named(wanted, problem.kernel, &plan.handle, &best));
  }
  if (best->kind == "step" && columns > best->q_tile) {
    return fail(Status::kernel_not_found, "q_len=", problem.q_len, ": kernel ", best->name(), " has ", best->q_tile,
                " query columns, num_q_heads / num_kv_heads * q_len is ", columns, "; append and decode do that");
  }
  plan.workspace_bytes = decode_workspace_bytes(*best, std::int64_t{device.num_sms} * best->ctas_per_sm);
  *out = plan;
  return Status::ok;
}

// Of kinds whose kernels have no tiling there is one.
Status find_only(const Wanted& wanted, int* handle) {
  const auto better = [](const KernelConfig&, const KernelConfig&) { return false; };
  const KernelConfig* best = nullptr;
  return find_best(wanted, better, handle, &best);
}

Status choose(const QuantSpec& quant, std::int64_t head_dim, const DeviceInfo& device, AppendPlan* out) {
  BITDECODING_TRY(quant.validate(head_dim));
  BITDECODING_TRY(check_device(device));
  AppendPlan plan;
  BITDECODING_TRY(find_only({"append", head_dim, quant.name(), device.arch}, &plan.handle));
  plan.workspace_bytes = kCounterBytes;
  *out = plan;
  return Status::ok;
}

float clip_param(const Clip& clip) { return clip.search ? 0.0f : static_cast<float>(clip.factor); }

}  // namespace

void set_quant(const QuantSpec& quant, DecodeParams* params) noexcept {
  params->rotate_q = quant.rotate_k ? 1 : 0;
  params->rotate_out = quant.rotate_v ? 1 : 0;
}

void set_quant(const QuantSpec& quant, AppendParams* params) noexcept {
  params->k_clip = clip_param(quant.k_clip);
  params->v_clip = clip_param(quant.v_clip);
  params->rotate_k = quant.rotate_k ? 1 : 0;
  params->rotate_v = quant.rotate_v ? 1 : 0;
}

Status plan_decode(const DecodeProblem& problem, const DeviceInfo& device, DecodePlan* out) noexcept {
  BITDECODING_TRY(check_present("out", out));
  *out = DecodePlan{};
  try {
    return choose("decode", problem, device, out);
  } catch (const std::bad_alloc&) {
    return fail(Status::out_of_memory, "plan: no memory for the names of kernels");
  }
}

Status plan_step(const DecodeProblem& problem, const DeviceInfo& device, DecodePlan* out) noexcept {
  BITDECODING_TRY(check_present("out", out));
  *out = DecodePlan{};
  try {
    return choose("step", problem, device, out);
  } catch (const std::bad_alloc&) {
    return fail(Status::out_of_memory, "plan: no memory for the names of kernels");
  }
}

Status plan_append(const QuantSpec& quant, std::int64_t head_dim, const DeviceInfo& device, AppendPlan* out) noexcept {
  BITDECODING_TRY(check_present("out", out));
  *out = AppendPlan{};
  try {
    return choose(quant, head_dim, device, out);
  } catch (const std::bad_alloc&) {
    return fail(Status::out_of_memory, "plan: no memory for the names of kernels");
  }
}

Status plan_merge(std::int64_t head_dim, const DeviceInfo& device, int* handle) noexcept {
  BITDECODING_TRY(check_present("handle", handle));
  *handle = -1;
  BITDECODING_TRY(check_one_of<std::int64_t>("head_dim", head_dim, {64, 96, 128, 256}));
  BITDECODING_TRY(check_device(device));
  try {
    return find_only({"merge", head_dim, QuantSpec{}.name(), device.arch}, handle);
  } catch (const std::bad_alloc&) {
    return fail(Status::out_of_memory, "plan: no memory for the names of kernels");
  }
}

}  // namespace bitdecoding
