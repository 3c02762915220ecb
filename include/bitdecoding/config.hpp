// What the bits of a cache mean (QuantSpec) and what gets compiled (KernelConfig).
//
// The fields are declared once, in the two lists below: X(type, name, default, doc). The Python classes are made
// from the same lists by reflection.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "bitdecoding/status.hpp"

namespace bitdecoding {

// How the range of a group is chosen: a factor in (0, 1] applied to min/max, or a search for the least squared error.
struct Clip {
  double factor = 1.0;
  bool search = false;
};

#define BITDECODING_QUANT_SPEC_FIELDS(X)                                                                         \
  X(std::int64_t, k_bits, 4, "bits of a K code: 8, 4 or 2")                                                      \
  X(std::int64_t, v_bits, 4, "bits of a V code: 8, 4 or 2")                                                      \
  X(std::string, k_axis, "channel", "what a K group holds: tokens of one 'channel', or channels of one 'token'") \
  X(std::int64_t, k_group, 128, "values per K group: 32, 64 or 128")                                             \
  X(std::int64_t, v_group, 128, "channels per V group: 32, 64 or 128")                                           \
  X(bool, k_symmetric, false, "K codes are centred, no zero is stored")                                          \
  X(bool, v_symmetric, false, "V codes are centred, no zero is stored")                                          \
  X(std::string, k_mean, "none", "'block': the mean of a block's keys is subtracted and stored once")            \
  X(Clip, k_clip, Clip{}, "range of a K group: 'minmax', 'mse' or a factor in (0, 1]")                           \
  X(Clip, v_clip, Clip{}, "range of a V group: 'minmax', 'mse' or a factor in (0, 1]")                           \
  X(bool, rotate_k, false, "keys (and queries) go through a Hadamard transform")                                 \
  X(bool, rotate_v, false, "values go through a Hadamard transform, undone on the output")

#define BITDECODING_KERNEL_CONFIG_FIELDS(X)                                                                           \
  X(std::string, kind, "decode", "what the kernel does: decode, append (which also quantises), step (both) or merge") \
  X(std::string, arch, "sm90a", "sm80, sm86, sm89, sm90a, sm100 or sm120")                                            \
  X(std::int64_t, head_dim, 128, "channels per head: 64, 96, 128 or 256")                                             \
  X(QuantSpec, quant, QuantSpec{}, "the cache's format; clip and rotation do not reach the kernel")                   \
  X(std::int64_t, q_tile, 8, "query columns of a tile: 4, or a multiple of 8 up to 64 (wgmma: 8 to 128)")             \
  X(std::string, mma, "mma_sync", "tensor-core instruction: mma_sync, or wgmma (sm90a)")                              \
  X(std::string, copy, "bulk", "how blocks reach shared memory: bulk (sm90a and later) or cp_async")                  \
  X(std::int64_t, num_warps, 4, "warps that compute: 1 to 16")                                                        \
  X(std::int64_t, warps_per_block, 4, "warps that share a block: 1, 2 or 4 (wgmma: 4, 8 or 16)")                      \
  X(std::int64_t, stages, 4, "blocks in the shared-memory ring: 1 to 32")                                             \
  X(std::int64_t, ctas_per_sm, 1, "thread blocks that share an SM: 1 to 8")

#define BITDECODING_DECLARE_FIELD(type, name, default_value, doc) type name = default_value;

struct QuantSpec {
  BITDECODING_QUANT_SPEC_FIELDS(BITDECODING_DECLARE_FIELD)

  // Status::invalid_argument names the first field whose value is not allowed, or the head_dim.
  Status validate(std::int64_t head_dim) const noexcept;
  // The same for whatever head_dim it will be.
  Status validate() const noexcept;
  // The format as it appears in a kernel's name, such as k4c128_v4g128 (s: symmetric, m: mean).
  std::string name() const;
};

struct KernelConfig {
  BITDECODING_KERNEL_CONFIG_FIELDS(BITDECODING_DECLARE_FIELD)

  // Status::invalid_argument: a value is not allowed; unsupported_config: no such kernel can exist on this arch.
  Status validate() const noexcept;
  // Canonical, and different for any two configurations that differ in a field that reaches the kernel.
  std::string name() const;
  // The inverse of name().
  static Status parse(const std::string& name, KernelConfig* out) noexcept;
  // Dynamic shared memory of the kernel. The configuration must be valid.
  std::int64_t smem_bytes() const noexcept;
};

#undef BITDECODING_DECLARE_FIELD

// The architectures that kernels are for.
inline constexpr std::initializer_list<const char*> kArchs = {"sm80", "sm86", "sm89", "sm90a", "sm100", "sm120"};
// Bytes of dynamic shared memory that a block of threads may ask for on an architecture; 0 for an unknown one.
std::int64_t smem_limit(const std::string& arch) noexcept;
// The architecture whose kernels run on a device of this compute capability; "" if there is none.
const char* arch_of(int major, int minor) noexcept;
// Bytes of a cache block (128 tokens of one KV head) of a valid QuantSpec.
std::int64_t block_bytes(std::int64_t head_dim, const QuantSpec& quant) noexcept;

}  // namespace bitdecoding
