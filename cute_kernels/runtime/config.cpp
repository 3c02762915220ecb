#include "bitdecoding/config.hpp"

#include <algorithm>
#include <cctype>
#include <initializer_list>
#include <string>
#include <utility>

#include "bitdecoding/block_format.hpp"
#include "error.hpp"
#include "params.hpp"

namespace bitdecoding {
namespace {

thread_local std::string g_error;

constexpr std::int64_t kKilobyte = 1024;
constexpr std::int64_t kSmemAlign = 128;

std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

Status check_clip(const char* argument, const Clip& clip) {
  if (clip.search || (clip.factor > 0.0 && clip.factor <= 1.0)) return Status::ok;
  return fail(Status::invalid_argument, argument, "=", clip.factor,
              ": allowed are 'minmax', 'mse' and factors in (0, 1]");
}

Status check_group(const char* argument, std::int64_t group, std::int64_t head_dim) {
  BITDECODING_TRY(check_one_of(argument, group, {32, 64, 128}));
  if (head_dim % group != 0) {
    return fail(Status::invalid_argument, argument, "=", group, ": must divide head_dim=", head_dim);
  }
  return Status::ok;
}

// As in cute_kernels/wide_plan.py: one or two warpgroups share a block and its query columns; more split the columns.
struct WideTiling {
  explicit WideTiling(const KernelConfig& config) {
    constexpr std::int64_t kGroupWarps = 4;
    const std::int64_t groups = config.warps_per_block / kGroupWarps;
    const std::int64_t team = std::min({std::int64_t{2}, groups, config.head_dim / 64});
    splits = groups / team;
    teams = config.num_warps / (kGroupWarps * team);
    columns = config.q_tile / splits;
  }
  std::int64_t splits, teams, columns;
};

// From this many query columns on, kernels with wgmma dequantise tiles (cute_kernels/tiles.py).
constexpr std::int64_t kMinTileColumns = 64;

bool has_tiles(const KernelConfig& config) { return config.mma == "wgmma" && config.q_tile >= kMinTileColumns; }

// Whether K's scales meet the queries of a block, 16 at most (cute_kernels/wide_plan.py).
bool scales_queries(const KernelConfig& c) {
  constexpr std::int64_t kScaledColumns = 16;
  const QuantSpec& q = c.quant;
  return c.q_tile == kScaledColumns && WideTiling(c).splits == 1 && q.k_axis == "channel" &&
         q.k_group == kBlockTokens && q.k_mean == "none";
}

// Bytes of a stage's folded parameters. V has scales as fp32 and, unless symmetric, offsets as fp16; for tiles both as
// fp16. Where queries are scaled, a float of each instead of K's.
std::int64_t folded_bytes(const KernelConfig& c) {
  constexpr std::int64_t kFactorBytes = 16;
  constexpr std::int64_t kHalf = 2, kFloat = 4;
  const QuantSpec& q = c.quant;
  const std::int64_t head_dim = c.head_dim;
  const bool tiles = has_tiles(c);
  const std::int64_t v_params = head_dim / q.v_group * kBlockTokens;
  std::int64_t bytes = kFactorBytes;
  bytes += tiles ? v_params * 2 * kHalf : v_params * kFloat + (q.v_symmetric ? 0 : v_params * kHalf);
  if (scales_queries(c)) return bytes + c.q_tile * kFloat;
  if (q.k_axis == "channel") return bytes + kBlockTokens / q.k_group * 2 * head_dim * kHalf;
  bytes += head_dim / q.k_group * kBlockTokens * 4 * kHalf;
  return bytes + (q.k_mean == "block" ? head_dim * kHalf : 0);
}

// A row of 16-bit values on its way to a block.
std::int64_t row_bytes(std::int64_t head_dim) {
  constexpr std::int64_t kRowPadBytes = 16;
  return 2 * head_dim + kRowPadBytes;
}

// As in cute_kernels/append_plan.py: a block's rows of one operand, its parameters, 1 / scale as fp32, a job per warp.
std::int64_t append_smem_bytes(std::int64_t head_dim, const QuantSpec& quant) {
  constexpr std::int64_t kJobsBytes = 4 * 64;
  const BlockSections s = block_sections(block_spec(head_dim, quant));
  const std::int64_t image = std::max(s.v_codes.offset - s.k_scale.offset, s.block_bytes - s.v_scale.offset);
  const std::int64_t inverse = 2 * std::max(s.k_scale.bytes, s.v_scale.bytes);
  return round_up(kBlockTokens * row_bytes(head_dim) + image + inverse + kJobsBytes, kSmemAlign);
}

// As in cute_kernels/plan.py and wide_plan.py: the blocks, with wgmma their folded parameters, too.
std::int64_t ring_bytes(const KernelConfig& c) {
  const std::int64_t folded = c.mma == "wgmma" ? folded_bytes(c) : 0;
  return c.stages * (block_bytes(c.head_dim, c.quant) + folded);
}

// As in cute_kernels/tile_plan.py: ring, two stages of tiles, queries as fetched, pieces, barriers, results' states.
std::int64_t tile_smem_bytes(const KernelConfig& c) {
  constexpr std::int64_t kHalf = 2, kBarrierBytes = 8, kPieceBytes = 80, kPositionBytes = 4, kSharesBytes = 32;
  constexpr std::int64_t kTiles = 4, kBarriersOfStage = 3, kBarriersOfSlots = 4, kBarriersOfTiles = 8;
  constexpr std::int64_t kPrefetchingBytes = 96, kTileParamsBytes = 2 * 16, kPlacesBytes = 16, kStateBytes = 8,
                         kProgressBytes = 8;
  const std::int64_t ring = c.stages * (block_bytes(c.head_dim, c.quant) + folded_bytes(c));
  std::int64_t bytes = round_up(ring, kSmemAlign) + kTiles * kBlockTokens * c.head_dim * kHalf;
  // the next piece's queries are fetched ahead where there is room for them
  const std::int64_t token_bytes = c.head_dim * (c.quant.k_bits + c.quant.v_bits) / 8;
  const std::int64_t copies = c.q_tile == kMinTileColumns && token_bytes <= kPrefetchingBytes ? 2 : 1;
  bytes += c.q_tile * (copies * c.head_dim * kHalf + kPositionBytes) + 3 * kPieceBytes;
  bytes += kBarrierBytes * (kBarriersOfStage * c.stages + kBarriersOfSlots + kBarriersOfTiles);
  bytes = round_up(bytes, 16) + kTileParamsBytes + kPlacesBytes;
  bytes += c.num_warps / c.warps_per_block * c.q_tile * kStateBytes + c.num_warps * kProgressBytes + kSharesBytes;
  return round_up(bytes, kSmemAlign);
}

// Kernels of the other kinds have no tiling: its fields are at their defaults, so that the name says all.
Status check_untiled(const KernelConfig& config) {
  const KernelConfig defaults;
  auto untiled = [&config](const char* field, const auto& value, const auto& only) {
    if (value == only) return Status::ok;
    return fail(Status::invalid_argument, field, "=", value, ": kind=", config.kind, " has no tiling, allowed is ",
                only);
  };
  BITDECODING_TRY(untiled("q_tile", config.q_tile, defaults.q_tile));
  BITDECODING_TRY(untiled("mma", config.mma, defaults.mma));
  BITDECODING_TRY(untiled("copy", config.copy, defaults.copy));
  BITDECODING_TRY(untiled("num_warps", config.num_warps, defaults.num_warps));
  BITDECODING_TRY(untiled("warps_per_block", config.warps_per_block, defaults.warps_per_block));
  BITDECODING_TRY(untiled("stages", config.stages, defaults.stages));
  return untiled("ctas_per_sm", config.ctas_per_sm, defaults.ctas_per_sm);
}

// What only kernels with wgmma ask for: warpgroups, and A tiles of 64 rows.
Status check_wgmma(const KernelConfig& config) {
  BITDECODING_TRY(check_one_of("warps_per_block", config.warps_per_block, {4, 8, 16}));
  if (config.arch != "sm90a") {
    return fail(Status::unsupported_config, "mma=wgmma: needs arch=sm90a, got ", config.arch);
  }
  if (config.copy != "bulk") return fail(Status::unsupported_config, "copy=", config.copy, ": mma=wgmma needs bulk");
  if (config.head_dim % 64 != 0) {
    return fail(Status::unsupported_config, "head_dim=", config.head_dim, ": mma=wgmma has 64, 128 and 256");
  }
  if (config.ctas_per_sm > 1) {  // it hands out all registers of an SM
    return fail(Status::unsupported_config, "ctas_per_sm=", config.ctas_per_sm, ": mma=wgmma has 1");
  }
  if (has_tiles(config)) {
    BITDECODING_TRY(check_one_of("q_tile", config.q_tile, {64, 128}));
    BITDECODING_TRY(check_one_of("num_warps", config.num_warps, {8}));
    BITDECODING_TRY(check_one_of("warps_per_block", config.warps_per_block, {config.q_tile / 16}));
    if (config.head_dim > 128) {
      return fail(Status::unsupported_config, "q_tile=", config.q_tile, ": head_dim=", config.head_dim,
                  " with mma=wgmma has less than 64");
    }
    return Status::ok;
  }
  if (config.quant.v_group < 64) {
    return fail(Status::unsupported_config, "v_group=", config.quant.v_group,
                ": mma=wgmma has 64 and 128 for q_tile=", config.q_tile);
  }
  const WideTiling tiling(config);
  if (config.q_tile % (8 * tiling.splits) != 0) {
    return fail(Status::unsupported_config, "q_tile=", config.q_tile, ": warps_per_block=", config.warps_per_block,
                " needs a multiple of ", 8 * tiling.splits);
  }
  return Status::ok;
}

// Reads a name from the left.
class NameReader {
 public:
  explicit NameReader(const std::string& text) : text_(text) {}

  bool literal(const std::string& expected) {
    if (text_.compare(at_, expected.size(), expected) != 0) return false;
    at_ += expected.size();
    return true;
  }

  bool one_of(std::initializer_list<const char*> words, std::string* out) {
    for (const char* word : words) {
      if (literal(word)) {
        *out = word;
        return true;
      }
    }
    return false;
  }

  bool number(std::int64_t* out) {
    constexpr std::size_t kMaxDigits = 6;
    const std::size_t begin = at_;
    *out = 0;
    while (at_ < text_.size() && at_ - begin < kMaxDigits && std::isdigit(static_cast<unsigned char>(text_[at_]))) {
      *out = *out * 10 + (text_[at_++] - '0');
    }
    return at_ > begin;
  }

  bool at_end() const { return at_ == text_.size(); }

 private:
  const std::string& text_;
  std::size_t at_ = 0;
};

bool read_name(NameReader& in, KernelConfig* c) {
  QuantSpec& q = c->quant;
  std::string axis;
  if (!(in.one_of({"decode", "append", "step", "merge"}, &c->kind) && in.literal("_"))) return false;
  if (!in.one_of(kArchs, &c->arch)) return false;
  if (!(in.literal("_d") && in.number(&c->head_dim))) return false;
  if (c->kind == "merge") return in.at_end();
  if (!(in.literal("_k") && in.number(&q.k_bits) && in.one_of({"c", "t"}, &axis) && in.number(&q.k_group)))
    return false;
  q.k_axis = axis == "c" ? "channel" : "token";
  q.k_symmetric = in.literal("s");
  q.k_mean = in.literal("m") ? "block" : "none";
  if (!(in.literal("_v") && in.number(&q.v_bits) && in.literal("g") && in.number(&q.v_group))) return false;
  q.v_symmetric = in.literal("s");
  if (c->kind == "append") return in.at_end();
  if (!(in.literal("_q") && in.number(&c->q_tile))) return false;
  if (!(in.literal("_") && in.one_of({"mma_sync", "wgmma"}, &c->mma))) return false;
  if (!(in.literal("_") && in.one_of({"bulk", "cp_async"}, &c->copy))) return false;
  if (!(in.literal("_w") && in.number(&c->num_warps) && in.literal("x") && in.number(&c->warps_per_block)))
    return false;
  if (!(in.literal("_s") && in.number(&c->stages))) return false;
  if (!(in.literal("_c") && in.number(&c->ctas_per_sm))) return false;
  return in.at_end();
}

}  // namespace

const char* last_error() noexcept { return g_error.c_str(); }

Status set_error(Status status, const std::string& message) {
  g_error = message;
  return status;
}

Status QuantSpec::validate(std::int64_t head_dim) const noexcept {
  BITDECODING_TRY(check_one_of("head_dim", head_dim, {64, 96, 128, 256}));
  BITDECODING_TRY(check_one_of("k_bits", k_bits, {8, 4, 2}));
  BITDECODING_TRY(check_one_of("v_bits", v_bits, {8, 4, 2}));
  BITDECODING_TRY(check_one_of("k_axis", k_axis, {"channel", "token"}));
  BITDECODING_TRY(check_one_of("k_mean", k_mean, {"none", "block"}));
  // per channel, a K group lies along the block's 128 tokens
  BITDECODING_TRY(check_group("k_group", k_group, k_axis == "channel" ? kBlockTokens : head_dim));
  BITDECODING_TRY(check_group("v_group", v_group, head_dim));
  BITDECODING_TRY(check_clip("k_clip", k_clip));
  return check_clip("v_clip", v_clip);
}

Status QuantSpec::validate() const noexcept {
  constexpr std::int64_t kAnyHeadDim = 128;  // every group divides it
  return validate(kAnyHeadDim);
}

std::string QuantSpec::name() const {
  return "k" + std::to_string(k_bits) + (k_axis == "channel" ? "c" : "t") + std::to_string(k_group) +
         (k_symmetric ? "s" : "") + (k_mean == "block" ? "m" : "") + "_v" + std::to_string(v_bits) + "g" +
         std::to_string(v_group) + (v_symmetric ? "s" : "");
}

Status KernelConfig::validate() const noexcept {
  BITDECODING_TRY(check_one_of("kind", kind, {"decode", "append", "step", "merge"}));
  BITDECODING_TRY(check_one_of("arch", arch, kArchs));
  BITDECODING_TRY(check_one_of("head_dim", head_dim, {64, 96, 128, 256}));
  if (kind == "merge") {  // knows no blocks
    BITDECODING_TRY(check_one_of("quant", quant.name(), {QuantSpec{}.name()}));
    return check_untiled(*this);
  }
  BITDECODING_TRY(quant.validate(head_dim));
  if (kind == "append") return check_untiled(*this);
  BITDECODING_TRY(check_one_of("mma", mma, {"mma_sync", "wgmma"}));
  if (kind == "step") {
    BITDECODING_TRY(check_one_of("mma", mma, {"mma_sync"}));
    BITDECODING_TRY(check_one_of("num_warps", num_warps, {4, 8, 12, 16}));  // teams of four pack a block each
  }
  const bool wide = mma == "wgmma";
  const std::int64_t most_columns = wide ? 128 : 64;
  const bool few = !wide && q_tile == 4;
  if (!few && (q_tile < 8 || q_tile > most_columns || q_tile % 8 != 0)) {
    return fail(Status::invalid_argument, "q_tile=", q_tile, ": allowed are ", wide ? "" : "4 and ",
                "the multiples of 8 up to ", most_columns);
  }
  BITDECODING_TRY(check_one_of("copy", copy, {"bulk", "cp_async"}));
  if (wide) BITDECODING_TRY(check_wgmma(*this));
  if (num_warps < 1 || num_warps > 16) {
    return fail(Status::invalid_argument, "num_warps=", num_warps, ": allowed are 1 to 16");
  }
  if (!wide) BITDECODING_TRY(check_one_of("warps_per_block", warps_per_block, {1, 2, 4}));
  if (num_warps % warps_per_block != 0) {
    return fail(Status::invalid_argument, "warps_per_block=", warps_per_block, ": must divide num_warps=", num_warps);
  }
  if (stages < 1 || stages > 32) {
    return fail(Status::invalid_argument, "stages=", stages, ": allowed are 1 to 32");
  }
  if (!has_tiles(*this) && stages % (num_warps / warps_per_block) != 0) {
    // else two groups of warps would take turns at a stage, and one could be a phase of its barrier ahead
    return fail(Status::invalid_argument, "stages=", stages,
                ": must be a multiple of num_warps / warps_per_block=", num_warps / warps_per_block);
  }
  if (copy == "bulk" && arch.rfind("sm8", 0) == 0) {
    return fail(Status::unsupported_config, "copy=bulk: needs sm90a or later, arch=", arch, " has cp_async only");
  }
  if (ctas_per_sm < 1 || ctas_per_sm > 8) {
    return fail(Status::invalid_argument, "ctas_per_sm=", ctas_per_sm, ": allowed are 1 to 8");
  }
  if (kind == "step" && ring_bytes(*this) < append_smem_bytes(head_dim, quant)) {
    return fail(Status::unsupported_config, "stages=", stages, ": kind=step packs a block in the memory of the ring, ",
                append_smem_bytes(head_dim, quant), " bytes");
  }
  // the driver reserves a kilobyte per thread block, which the limit of one leaves out
  const std::int64_t available = (smem_limit(arch) + kKilobyte) / ctas_per_sm - kKilobyte;
  if (smem_bytes() > available) {
    return fail(Status::unsupported_config, "stages=", stages, ": the kernel would need ", smem_bytes(),
                " bytes of shared memory, ", arch, " has ", available, " with ctas_per_sm=", ctas_per_sm);
  }
  return Status::ok;
}

std::string KernelConfig::name() const {
  std::string problem = kind + "_" + arch + "_d" + std::to_string(head_dim);
  if (kind == "merge") return problem;
  problem += "_" + quant.name();
  if (kind == "append") return problem;
  return problem + "_q" + std::to_string(q_tile) + "_" + mma + "_" + copy + "_w" + std::to_string(num_warps) + "x" +
         std::to_string(warps_per_block) + "_s" + std::to_string(stages) + "_c" + std::to_string(ctas_per_sm);
}

Status KernelConfig::parse(const std::string& name, KernelConfig* out) noexcept {
  KernelConfig config;
  NameReader reader(name);
  // comparing the names rejects spellings that are not canonical, such as leading zeros
  if (!read_name(reader, &config) || config.name() != name) {
    return fail(Status::invalid_argument, "name='", name, "': is not the name of a kernel configuration");
  }
  BITDECODING_TRY(config.validate());
  *out = std::move(config);
  return Status::ok;
}

std::int64_t KernelConfig::smem_bytes() const noexcept {
  if (kind == "merge") return 0;
  if (kind == "append") return append_smem_bytes(head_dim, quant);
  // as in cute_kernels/plan.py: ring, merge scratch, slots of pieces, first piece, barriers
  constexpr std::int64_t kRowPad = 4;
  constexpr std::int64_t kBarrierBytes = 16;  // two mbarriers: per stage, of the scratch, of the slots
  constexpr std::int64_t kPieceBytes = 80;
  constexpr std::int64_t kMmaColumns = 8;  // a tile of 4 has each of its query columns twice
  const bool wide = mma == "wgmma";
  if (has_tiles(*this)) return tile_smem_bytes(*this);
  const std::int64_t ring = ring_bytes(*this);
  const std::int64_t states = wide ? num_warps / warps_per_block : num_warps;
  const std::int64_t scratch = states * q_tile * (head_dim + kRowPad) * static_cast<std::int64_t>(sizeof(float));
  // two slots of 16-bit queries, a factor and a position of each, the piece; one slot of queries as operand and as
  // fetched, a position of each, two pieces; the first piece
  const std::int64_t slots = wide ? q_tile * (4 * head_dim + 4) + 2 * kPieceBytes
                                  : 2 * (std::max(q_tile, kMmaColumns) * 2 * head_dim + q_tile * 8 + kPieceBytes);
  std::int64_t bytes = ring + scratch + slots + kPieceBytes + kBarrierBytes * (stages + 2);
  if (kind == "step") {  // another barrier per slot, a word, eight vectors of new rows per lane of a warp
    constexpr std::int64_t kVectorBytes = 16, kFetches = 8;
    bytes = round_up(bytes + kBarrierBytes + kVectorBytes, kVectorBytes) + kFetches * kWarpLanes * kVectorBytes;
  }
  if (wide) {  // more barriers: per stage, per team; floats per warp and column, two per team and column; the shares
    constexpr std::int64_t kSharesBytes = 32;
    const WideTiling tiling(*this);
    const std::int64_t scaled_slots = scales_queries(*this) ? 2 * tiling.teams : 0;  // of scaled queries
    bytes = round_up(bytes + kBarrierBytes / 2 * (stages + tiling.teams + scaled_slots), 16);
    bytes += (num_warps + 2 * tiling.teams) * tiling.columns * static_cast<std::int64_t>(sizeof(float)) + kSharesBytes;
    bytes += scaled_slots * q_tile * 2 * head_dim;
  }
  return round_up(bytes, kSmemAlign);
}

std::int64_t smem_limit(const std::string& arch) noexcept {
  if (arch == "sm80") return 163 * kKilobyte;
  if (arch == "sm86" || arch == "sm89" || arch == "sm120") return 99 * kKilobyte;
  if (arch == "sm90a" || arch == "sm100") return 227 * kKilobyte;
  return 0;
}

const char* arch_of(int major, int minor) noexcept {
  if (major == 8) return minor == 9 ? "sm89" : minor == 6 ? "sm86" : "sm80";  // 8.0 code runs on 8.7
  if (major == 9) return "sm90a";
  if (major == 10) return "sm100";
  if (major == 12) return "sm120";
  return "";
}

BlockSpec block_spec(std::int64_t head_dim, const QuantSpec& q) {
  BlockSpec spec;
  spec.head_dim = static_cast<int>(head_dim);
  spec.k_bits = static_cast<int>(q.k_bits);
  spec.v_bits = static_cast<int>(q.v_bits);
  spec.k_per_token = q.k_axis == "token";
  spec.k_group = static_cast<int>(q.k_group);
  spec.v_group = static_cast<int>(q.v_group);
  spec.k_symmetric = q.k_symmetric;
  spec.v_symmetric = q.v_symmetric;
  spec.k_mean = q.k_mean == "block";
  return spec;
}

std::int64_t block_bytes(std::int64_t head_dim, const QuantSpec& q) noexcept {
  return block_sections(block_spec(head_dim, q)).block_bytes;
}

}  // namespace bitdecoding
