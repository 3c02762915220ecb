// Which registered kernel decodes a problem.
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

Status choose(const DecodeProblem& problem, const DeviceInfo& device, DecodePlan* out) {
  BITDECODING_TRY(problem.quant.validate(problem.head_dim));
  if (problem.num_kv_heads < 1 || problem.num_q_heads < 1 || problem.num_q_heads % problem.num_kv_heads != 0) {
    return fail(Status::invalid_argument, "num_q_heads=", problem.num_q_heads,
                ": must be a multiple of num_kv_heads=", problem.num_kv_heads);
  }
  if (problem.q_len < 1) return fail(Status::invalid_argument, "q_len=", problem.q_len, ": must be positive");
  if (device.num_sms < 1) return fail(Status::invalid_argument, "num_sms=", device.num_sms, ": must be positive");
  if (smem_limit(device.arch) == 0) {
    return fail(Status::unsupported_config, "arch='", device.arch, "': allowed are sm80, sm89, sm90a, sm100 and sm120");
  }

  const std::int64_t columns = std::int64_t{problem.num_q_heads} / problem.num_kv_heads * problem.q_len;
  const std::string format = problem.quant.name();
  const KernelConfig* best = nullptr;
  std::string other_archs;
  for (const std::string& name : list_kernels()) {
    const int handle = find_kernel(name);
    const KernelConfig* config = nullptr;
    BITDECODING_TRY(kernel_config(handle, &config));
    if (config->kind != "decode" || config->head_dim != problem.head_dim || config->quant.name() != format) continue;
    if (config->arch != device.arch) {
      if (other_archs.find(config->arch) == std::string::npos)
        other_archs += (other_archs.empty() ? "" : ", ") + config->arch;
      continue;
    }
    if (best == nullptr || suits_better(columns, config->q_tile, best->q_tile)) {
      best = config;
      out->handle = handle;
    }
  }
  if (best == nullptr) {
    return fail(Status::kernel_not_found, "arch=", device.arch, ": no kernel for head_dim=", problem.head_dim, " and ",
                format, " is registered; there are some for ", other_archs.empty() ? "no arch" : other_archs,
                "; load a kernel pack");
  }
  out->workspace_bytes = decode_workspace_bytes(*best, std::int64_t{device.num_sms} * best->ctas_per_sm);
  return Status::ok;
}

}  // namespace

Status plan_decode(const DecodeProblem& problem, const DeviceInfo& device, DecodePlan* out) noexcept {
  BITDECODING_TRY(check_present("out", out));
  *out = DecodePlan{};
  try {
    return choose(problem, device, out);
  } catch (const std::bad_alloc&) {
    return fail(Status::out_of_memory, "plan: no memory for the names of kernels");
  }
}

}  // namespace bitdecoding
