// Merging of partial results on the CPU.
#include <algorithm>
#include <cmath>
#include <limits>

#include "bitdecoding/cpu.hpp"
#include "elements.hpp"
#include "error.hpp"
#include "params.hpp"

namespace bitdecoding {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

Status validate(const CpuMergeParams& p) {
  if (p.num_parts < 1) return fail(Status::invalid_argument, "num_parts=", p.num_parts, ": must be positive");
  if (p.rows < 0) return fail(Status::invalid_argument, "rows=", p.rows, ": must not be negative");
  if (p.head_dim < 1 || p.head_dim > cpu::kMaxHeadDim) {
    return fail(Status::invalid_argument, "head_dim=", p.head_dim, ": allowed are 1 to ", cpu::kMaxHeadDim);
  }
  if (p.bfloat16 && p.float32) return fail(Status::invalid_argument, "bfloat16 and float32: allowed is one of them");
  const std::int64_t most = kMaxExtentBytes / (p.head_dim * static_cast<std::int64_t>(sizeof(float)));
  if (p.rows > most) return fail(Status::invalid_argument, "rows=", p.rows, ": allowed are 0 to ", most);
  BITDECODING_TRY(check_present("outs", p.outs));
  BITDECODING_TRY(check_present("lses", p.lses));
  BITDECODING_TRY(check_present("out", p.out));
  for (std::int32_t i = 0; i < p.num_parts; ++i) {
    if (p.outs[i] == nullptr) return fail(Status::invalid_argument, "outs[", i, "]: is null");
    if (p.lses[i] == nullptr) return fail(Status::invalid_argument, "lses[", i, "]: is null");
  }
  return Status::ok;
}

}  // namespace

Status merge_cpu(const CpuMergeParams& p) noexcept {
  BITDECODING_TRY(validate(p));
  const cpu::Type type = p.float32 ? cpu::Type::float32 : p.bfloat16 ? cpu::Type::bfloat16 : cpu::Type::float16;
  const int head_dim = static_cast<int>(p.head_dim);
  for (std::int64_t row = 0; row < p.rows; ++row) {
    float largest = -kInfinity;
    for (std::int32_t i = 0; i < p.num_parts; ++i) largest = std::max(largest, p.lses[i][row]);
    float out[cpu::kMaxHeadDim] = {}, part[cpu::kMaxHeadDim];
    float sum = 0.0f;
    for (std::int32_t i = 0; i < p.num_parts; ++i) {
      const float lse = p.lses[i][row];
      if (lse == -kInfinity) continue;  // its out does not matter
      const float weight = std::exp(lse - largest);
      cpu::load_elements(p.outs[i], type, row * head_dim, head_dim, part);
      for (int c = 0; c < head_dim; ++c) out[c] += part[c] * weight;
      sum += weight;
    }
    if (sum != 0.0f) {
      for (int c = 0; c < head_dim; ++c) out[c] /= sum;
    }
    cpu::store_elements(out, type, row * head_dim, head_dim, p.out);
    if (p.lse != nullptr) p.lse[row] = sum != 0.0f ? largest + std::log(sum) : -kInfinity;
  }
  return Status::ok;
}

}  // namespace bitdecoding
