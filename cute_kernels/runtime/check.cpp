#include "check.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <string>

#include "error.hpp"

namespace bitdecoding {
namespace {

constexpr std::int64_t kVectorBytes = 16;
constexpr DLDataType kUint8{kDLUInt, 8, 1};
constexpr DLDataType kInt32{kDLInt, 32, 1};
constexpr DLDataType kFloat16{kDLFloat, 16, 1};
constexpr DLDataType kBfloat16{kDLBfloat, 16, 1};
constexpr DLDataType kFloat32{kDLFloat, 32, 1};

bool same(DLDataType a, DLDataType b) { return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes; }

std::string dtype_name(DLDataType type) {
  std::string base = "dtype";
  if (type.code == kDLInt) base = "int";
  if (type.code == kDLUInt) base = "uint";
  if (type.code == kDLFloat) base = "float";
  if (type.code == kDLBfloat) base = "bfloat";
  if (type.code == kDLBool) return "bool";
  return base + std::to_string(type.bits);
}

std::string device_name(DLDevice device) {
  const char* type = device.device_type == kDLCPU ? "cpu" : device.device_type == kDLCUDA ? "cuda" : nullptr;
  if (type == nullptr) return "device type " + std::to_string(device.device_type);
  return device.device_type == kDLCPU ? type : type + (":" + std::to_string(device.device_id));
}

std::string list(const std::int64_t* values, int count) {
  std::ostringstream text;
  text << "[";
  for (int i = 0; i < count; ++i) text << (i > 0 ? ", " : "") << values[i];
  text << "]";
  return text.str();
}

std::string shape(const DLTensor& t) { return list(t.shape, t.ndim); }

const char* data(const DLTensor* t) {
  return t == nullptr ? nullptr : static_cast<const char*>(t->data) + t->byte_offset;
}

// Extent of one dimension: its name, and the value that it must have (kAny: free).
struct Extent {
  const char* name;
  std::int64_t value;
};
constexpr std::int64_t kAny = -1;

// Checks one tensor after the other against the device of the first.
class Checker {
 public:
  explicit Checker(DLDevice device) : device_(device) {}

  Status tensor(const char* name, const DLTensor& t, std::initializer_list<DLDataType> dtypes,
                std::initializer_list<Extent> extents) const {
    BITDECODING_TRY(type_and_device(name, t, dtypes));
    if (t.ndim != static_cast<int>(extents.size())) return bad_shape(name, t, extents, "rank");
    int i = 0;
    for (const Extent& extent : extents) {
      if (extent.value != kAny && t.shape[i] != extent.value) return bad_shape(name, t, extents, extent.name);
      if (t.shape[i] > std::numeric_limits<std::int32_t>::max()) {
        return fail(Status::invalid_argument, name, ": shape ", shape(t), ": ", extent.name, " exceeds 2^31 - 1");
      }
      ++i;
    }
    return Status::ok;
  }

  // Row-major without gaps, and 16-byte aligned if the kernel reads it with vector loads.
  Status contiguous(const char* name, const DLTensor& t, bool vectors) const {
    std::int64_t expected = 1;
    for (int i = t.ndim - 1; i >= 0 && expected > 0; --i) {  // strides of an empty tensor do not matter
      if (t.strides != nullptr && t.shape[i] != 1 && t.strides[i] != expected) {
        return fail(Status::invalid_argument, name, ": strides ", list(t.strides, t.ndim), " of shape ", shape(t),
                    ": must be contiguous");
      }
      expected *= t.shape[i];
    }
    return vectors ? aligned(name, t) : Status::ok;
  }

  Status aligned(const char* name, const DLTensor& t) const {
    if (reinterpret_cast<std::uintptr_t>(data(&t)) % kVectorBytes != 0) {
      return fail(Status::invalid_argument, name, ": address must be a multiple of ", kVectorBytes, " bytes");
    }
    return Status::ok;
  }

 private:
  Status type_and_device(const char* name, const DLTensor& t, std::initializer_list<DLDataType> dtypes) const {
    const auto matches = [&t](const DLDataType& dtype) { return same(t.dtype, dtype); };
    if (std::none_of(dtypes.begin(), dtypes.end(), matches)) {
      std::string names;
      for (const DLDataType& dtype : dtypes) names += (names.empty() ? "" : ", ") + dtype_name(dtype);
      return fail(Status::invalid_argument, name, ": dtype ", dtype_name(t.dtype), ": allowed are ", names);
    }
    if (t.device.device_type != device_.device_type || t.device.device_id != device_.device_id) {
      return fail(Status::invalid_argument, name, ": is on ", device_name(t.device), ": q is on ",
                  device_name(device_));
    }
    return Status::ok;
  }

  static Status bad_shape(const char* name, const DLTensor& t, std::initializer_list<Extent> extents,
                          const char* which) {
    std::ostringstream wanted;
    const char* separator = "";
    for (const Extent& extent : extents) {
      wanted << separator << extent.name;
      if (extent.value != kAny) wanted << "=" << extent.value;
      separator = ", ";
    }
    return fail(Status::invalid_argument, name, ": shape ", shape(t), ": must be [", wanted.str(), "] (", which, ")");
  }

  DLDevice device_;
};

Status check_pair(const char* k_name, const DLTensor* k, const char* v_name, const DLTensor* v) {
  if ((k == nullptr) == (v == nullptr)) return Status::ok;
  return fail(Status::invalid_argument, k == nullptr ? k_name : v_name, ": is missing, ",
              k == nullptr ? v_name : k_name, " is given");
}

}  // namespace

Status check_decode(const DecodeTensors& t, const QuantSpec& quant, std::int64_t window, double softmax_scale,
                    double softcap, DecodeParams* out) {
  const DLTensor& q = *t.q;
  const DLTensor& pages = *t.pages;
  const Checker check(q.device);
  const bool on_cpu = q.device.device_type == kDLCPU;
  if (!on_cpu && q.device.device_type != kDLCUDA) {
    return fail(Status::invalid_argument, "q: is on ", device_name(q.device), ": allowed are cpu and cuda");
  }

  BITDECODING_TRY(check.tensor("q", q,
                               on_cpu ? std::initializer_list<DLDataType>{kFloat16, kBfloat16, kFloat32}
                                      : std::initializer_list<DLDataType>{kFloat16, kBfloat16},
                               {{"batch", kAny}, {"q_len", kAny}, {"num_q_heads", kAny}, {"head_dim", kAny}}));
  const std::int64_t batch = q.shape[0], q_len = q.shape[1], num_q_heads = q.shape[2], head_dim = q.shape[3];
  BITDECODING_TRY(quant.validate(head_dim));
  BITDECODING_TRY(check.contiguous("q", q, true));

  BITDECODING_TRY(
      check.tensor("pages", pages, {kUint8},
                   {{"num_pages", kAny}, {"num_kv_heads", kAny}, {"block_bytes", block_bytes(head_dim, quant)}}));
  const std::int64_t num_kv_heads = pages.shape[1];
  if (num_kv_heads == 0 || num_q_heads == 0 || num_q_heads % num_kv_heads != 0) {
    return fail(Status::invalid_argument, "q: shape ", shape(q),
                ": num_q_heads must be a multiple of num_kv_heads=", num_kv_heads);
  }
  if (q_len == 0) return fail(Status::invalid_argument, "q: shape ", shape(q), ": q_len must be positive");
  // a pool of pages may be a slice of a larger one: only a block itself must be whole
  const std::int64_t head_stride = pages.strides != nullptr ? pages.strides[1] : pages.shape[2];
  const std::int64_t page_stride = pages.strides != nullptr ? pages.strides[0] : pages.shape[1] * pages.shape[2];
  if ((pages.strides != nullptr && pages.strides[2] != 1) || head_stride % kVectorBytes != 0 ||
      page_stride % kVectorBytes != 0) {
    return fail(Status::invalid_argument, "pages: strides ", list(pages.strides, pages.ndim),
                ": the last must be 1, the others multiples of ", kVectorBytes);
  }
  BITDECODING_TRY(check.aligned("pages", pages));

  BITDECODING_TRY(check.tensor("block_table", *t.block_table, {kInt32}, {{"batch", batch}, {"max_pages", kAny}}));
  BITDECODING_TRY(check.contiguous("block_table", *t.block_table, false));
  BITDECODING_TRY(check.tensor("seqlens", *t.seqlens, {kInt32}, {{"batch", batch}}));
  BITDECODING_TRY(check.contiguous("seqlens", *t.seqlens, false));
  if (t.packed_lens != nullptr) {
    BITDECODING_TRY(check.tensor("packed_lens", *t.packed_lens, {kInt32}, {{"batch", batch}}));
    BITDECODING_TRY(check.contiguous("packed_lens", *t.packed_lens, false));
  }

  BITDECODING_TRY(check_pair("tail_k", t.tail_k, "tail_v", t.tail_v));
  BITDECODING_TRY(check_pair("sink_k", t.sink_k, "sink_v", t.sink_v));
  auto check_tokens = [&](const char* name, const DLTensor& tokens, const char* count_name, std::int64_t count) {
    BITDECODING_TRY(
        check.tensor(name, tokens, {q.dtype},
                     {{"batch", batch}, {count_name, count}, {"num_kv_heads", num_kv_heads}, {"head_dim", head_dim}}));
    return check.contiguous(name, tokens, true);
  };
  if (t.tail_k != nullptr) {
    BITDECODING_TRY(check_tokens("tail_k", *t.tail_k, "tail_capacity", kAny));
    BITDECODING_TRY(check_tokens("tail_v", *t.tail_v, "tail_capacity", t.tail_k->shape[1]));
  }
  if (t.sink_k != nullptr) {
    BITDECODING_TRY(check_tokens("sink_k", *t.sink_k, "num_sink", kAny));
    BITDECODING_TRY(check_tokens("sink_v", *t.sink_v, "num_sink", t.sink_k->shape[1]));
  }
  if (t.sink_logits != nullptr) {
    BITDECODING_TRY(check.tensor("sink_logits", *t.sink_logits, {kFloat32}, {{"num_q_heads", num_q_heads}}));
    BITDECODING_TRY(check.contiguous("sink_logits", *t.sink_logits, false));
  }
  if (t.out != nullptr) {
    BITDECODING_TRY(
        check.tensor("out", *t.out, {q.dtype},
                     {{"batch", batch}, {"q_len", q_len}, {"num_q_heads", num_q_heads}, {"head_dim", head_dim}}));
    BITDECODING_TRY(check.contiguous("out", *t.out, true));
  }
  if (t.lse != nullptr) {
    BITDECODING_TRY(
        check.tensor("lse", *t.lse, {kFloat32}, {{"batch", batch}, {"q_len", q_len}, {"num_q_heads", num_q_heads}}));
    BITDECODING_TRY(check.contiguous("lse", *t.lse, false));
  }

  constexpr std::int64_t kNoWindow = std::numeric_limits<std::int32_t>::max();
  if (window < 1 || window > kNoWindow) {
    return fail(Status::invalid_argument, "window=", window, ": allowed are 1 to 2^31 - 1");
  }
  if (!std::isfinite(softmax_scale) || softmax_scale <= 0.0) {
    return fail(Status::invalid_argument, "softmax_scale=", softmax_scale, ": must be positive and finite");
  }
  if (!std::isfinite(softcap) || softcap < 0.0) {
    return fail(Status::invalid_argument, "softcap=", softcap, ": must be positive and finite, or 0 for none");
  }

  constexpr double kLog2E = 1.4426950408889634;
  DecodeParams p;
  p.q = data(t.q);
  p.pages = data(t.pages);
  p.block_table = reinterpret_cast<const std::int32_t*>(data(t.block_table));
  p.seqlens = reinterpret_cast<const std::int32_t*>(data(t.seqlens));
  p.packed_lens = reinterpret_cast<const std::int32_t*>(data(t.packed_lens));
  p.tail_k = data(t.tail_k);
  p.tail_v = data(t.tail_v);
  p.sink_k = data(t.sink_k);
  p.sink_v = data(t.sink_v);
  p.sink_logits = reinterpret_cast<const float*>(data(t.sink_logits));
  p.out = const_cast<char*>(data(t.out));
  p.lse = reinterpret_cast<float*>(const_cast<char*>(data(t.lse)));
  p.page_stride_bytes = page_stride;
  p.head_stride_bytes = head_stride;
  p.batch = static_cast<std::int32_t>(batch);
  p.q_len = static_cast<std::int32_t>(q_len);
  p.num_q_heads = static_cast<std::int32_t>(num_q_heads);
  p.num_kv_heads = static_cast<std::int32_t>(num_kv_heads);
  p.max_pages = static_cast<std::int32_t>(t.block_table->shape[1]);
  p.tail_capacity = t.tail_k != nullptr ? static_cast<std::int32_t>(t.tail_k->shape[1]) : 0;
  p.num_sink = t.sink_k != nullptr ? static_cast<std::int32_t>(t.sink_k->shape[1]) : 0;
  p.window = static_cast<std::int32_t>(window);
  p.softmax_scale_log2 = static_cast<float>(softmax_scale * kLog2E);
  p.softcap = static_cast<float>(softcap);
  p.bfloat16 = same(q.dtype, kBfloat16) ? 1 : 0;
  *out = p;
  return Status::ok;
}

Status check_decode_for_cpu(const DecodeTensors& tensors, const QuantSpec& quant, std::int64_t window,
                            double softmax_scale, double softcap, DecodeParams* out) {
  if (tensors.q->device.device_type != kDLCPU) {
    return fail(Status::invalid_argument, "q: is on ", device_name(tensors.q->device), ": allowed is cpu");
  }
  return check_decode(tensors, quant, window, softmax_scale, softcap, out);
}

Status check_decode_for_kernel(const DecodeTensors& tensors, const KernelConfig& config, const DLTensor& workspace,
                               std::int64_t window, double softmax_scale, double softcap, DecodeParams* out) {
  const DLTensor& q = *tensors.q;
  if (q.device.device_type != kDLCUDA) {
    return fail(Status::invalid_argument, "q: is on ", device_name(q.device), ": kernels need CUDA tensors");
  }
  if (q.ndim == 4 && q.shape[3] != config.head_dim) {
    return fail(Status::invalid_argument, "q: shape ", shape(q), ": the kernel is for head_dim=", config.head_dim);
  }
  BITDECODING_TRY(check_decode(tensors, config.quant, window, softmax_scale, softcap, out));
  const Checker check(q.device);
  BITDECODING_TRY(check.tensor("workspace", workspace, {kUint8}, {{"bytes", kAny}}));
  BITDECODING_TRY(check.contiguous("workspace", workspace, true));
  out->workspace = const_cast<char*>(data(&workspace));
  return Status::ok;
}

}  // namespace bitdecoding
