#include "check.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <string>

#include "error.hpp"
#include "params.hpp"

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

char* mutable_data(const DLTensor* t) { return const_cast<char*>(data(t)); }

std::int32_t* ints(const DLTensor* t) { return reinterpret_cast<std::int32_t*>(mutable_data(t)); }

// Token slots of a tail or of sinks.
std::int32_t slots(const DLTensor* t) { return t == nullptr ? 0 : static_cast<std::int32_t>(t->shape[1]); }

// Extent of one dimension: its name, and the value that it must have (kAny: free).
struct Extent {
  const char* name;
  std::int64_t value;
};
constexpr std::int64_t kAny = -1;

// Checks one tensor after the other against the device of the first, `first`.
class Checker {
 public:
  Checker(const char* first, DLDevice device) : first_(first), device_(device) {}

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
      expected = product(expected, t.shape[i]);
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
      return fail(Status::invalid_argument, name, ": is on ", device_name(t.device), ": ", first_, " is on ",
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

  const char* first_;
  DLDevice device_;
};

Status check_ints(const Checker& check, const char* name, const DLTensor& t, std::initializer_list<Extent> extents) {
  BITDECODING_TRY(check.tensor(name, t, {kInt32}, extents));
  return check.contiguous(name, t, false);
}

Status check_workspace(const Checker& check, const DLTensor& workspace) {
  BITDECODING_TRY(check.tensor("workspace", workspace, {kUint8}, {{"bytes", kAny}}));
  return check.contiguous("workspace", workspace, true);
}

// A pool of pages may be a slice of a larger one: only a block itself must be whole.
Status check_page_strides(const Checker& check, const DLTensor& pages, std::int64_t* page_stride,
                          std::int64_t* head_stride) {
  *head_stride = pages.strides != nullptr ? pages.strides[1] : pages.shape[2];
  *page_stride = pages.strides != nullptr ? pages.strides[0] : pages.shape[1] * pages.shape[2];
  if ((pages.strides != nullptr && pages.strides[2] != 1) || *head_stride % kVectorBytes != 0 ||
      *page_stride % kVectorBytes != 0) {
    return fail(Status::invalid_argument, "pages: strides ", list(pages.strides, pages.ndim),
                ": the last must be 1, the others multiples of ", kVectorBytes);
  }
  return check.aligned("pages", pages);
}

Status check_pair(const char* k_name, const DLTensor* k, const char* v_name, const DLTensor* v) {
  if ((k == nullptr) == (v == nullptr)) return Status::ok;
  return fail(Status::invalid_argument, k == nullptr ? k_name : v_name, ": is missing, ",
              k == nullptr ? v_name : k_name, " is given");
}

// What a tensor of 16-bit tokens (fp32 too on the CPU) has in common with the others of a call.
struct TokenDims {
  DLDataType dtype;
  std::int64_t batch;
  std::int64_t num_kv_heads;
  std::int64_t head_dim;
};

// An optional pair of tensors [batch, count, num_kv_heads, head_dim].
Status check_tokens(const Checker& check, const char* k_name, const DLTensor* k, const char* v_name, const DLTensor* v,
                    const char* count_name, const TokenDims& dims) {
  BITDECODING_TRY(check_pair(k_name, k, v_name, v));
  if (k == nullptr) return Status::ok;
  auto check_one = [&](const char* name, const DLTensor& tokens, std::int64_t count) {
    BITDECODING_TRY(check.tensor(name, tokens, {dims.dtype},
                                 {{"batch", dims.batch},
                                  {count_name, count},
                                  {"num_kv_heads", dims.num_kv_heads},
                                  {"head_dim", dims.head_dim}}));
    return check.contiguous(name, tokens, true);
  };
  BITDECODING_TRY(check_one(k_name, *k, kAny));
  return check_one(v_name, *v, k->shape[1]);
}

// Stride in bytes of a dimension of 16-bit values; 0 where it does not matter.
std::int64_t stride_bytes(const DLTensor& t, int dim) {
  if (t.shape[dim] <= 1) return 0;
  std::int64_t stride = 1;
  for (int i = t.ndim - 1; t.strides == nullptr && i > dim; --i) stride = product(stride, t.shape[i]);
  if (t.strides != nullptr) stride = t.strides[dim];
  return product(stride, t.dtype.bits / 8);
}

// New tokens may be slices of larger tensors: only the channels of a head must be contiguous.
Status check_new_tokens(const Checker& check, const char* k_name, const DLTensor& k, const char* v_name,
                        const DLTensor& v) {
  for (int i = 0; i < k.ndim; ++i) {
    const bool channels = i == k.ndim - 1;
    const std::int64_t bytes = stride_bytes(k, i);
    if (bytes != stride_bytes(v, i)) {
      return fail(Status::invalid_argument, v_name, ": strides ", list(v.strides, v.ndim), ": must be those of ",
                  k_name);
    }
    if (bytes < 0 || (channels ? bytes != k.dtype.bits / 8 : bytes % kVectorBytes != 0)) {
      return fail(Status::invalid_argument, k_name, ": strides ", list(k.strides, k.ndim),
                  ": the last must be 1, the others multiples of ", kVectorBytes, " bytes");
    }
  }
  BITDECODING_TRY(check.aligned(k_name, k));
  return check.aligned(v_name, v);
}

// What append and quantize have in common: keys, values and pages.
Status check_append_common(const Checker& check, const char* k_name, const DLTensor& k, const char* v_name,
                           const DLTensor& v, const DLTensor& pages, const DLTensor& block_table, std::int64_t batch,
                           const KernelConfig& config, AppendParams* p) {
  const std::int64_t num_kv_heads = k.shape[k.ndim - 2];
  if (num_kv_heads == 0) {
    return fail(Status::invalid_argument, k_name, ": shape ", shape(k), ": num_kv_heads must be positive");
  }
  BITDECODING_TRY(check_new_tokens(check, k_name, k, v_name, v));
  BITDECODING_TRY(check.tensor("pages", pages, {kUint8},
                               {{"num_pages", kAny},
                                {"num_kv_heads", num_kv_heads},
                                {"block_bytes", block_bytes(config.head_dim, config.quant)}}));
  BITDECODING_TRY(check_page_strides(check, pages, &p->page_stride_bytes, &p->head_stride_bytes));
  BITDECODING_TRY(check_ints(check, "block_table", block_table, {{"batch", batch}, {"max_pages", kAny}}));
  p->k_new = data(&k);
  p->v_new = data(&v);
  p->pages = mutable_data(&pages);
  p->block_table = ints(&block_table);
  p->new_token_stride_bytes = stride_bytes(k, k.ndim - 3);
  p->new_head_stride_bytes = stride_bytes(k, k.ndim - 2);
  p->batch = static_cast<std::int32_t>(batch);
  p->num_kv_heads = static_cast<std::int32_t>(num_kv_heads);
  p->num_pages = static_cast<std::int32_t>(pages.shape[0]);
  p->max_pages = static_cast<std::int32_t>(block_table.shape[1]);
  p->bfloat16 = same(k.dtype, kBfloat16) ? 1 : 0;
  return Status::ok;
}

Status check_on_gpu(const char* name, const DLTensor& t) {
  if (t.device.device_type == kDLCUDA) return Status::ok;
  return fail(Status::invalid_argument, name, ": is on ", device_name(t.device), ": kernels need CUDA tensors");
}

}  // namespace

Status check_decode(const DecodeTensors& t, const QuantSpec& quant, std::int64_t window, double softmax_scale,
                    double softcap, DecodeParams* out) {
  const DLTensor& q = *t.q;
  const DLTensor& pages = *t.pages;
  const Checker check("q", q.device);
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
  std::int64_t head_stride = 0, page_stride = 0;
  BITDECODING_TRY(check_page_strides(check, pages, &page_stride, &head_stride));

  BITDECODING_TRY(check_ints(check, "block_table", *t.block_table, {{"batch", batch}, {"max_pages", kAny}}));
  BITDECODING_TRY(check_ints(check, "seqlens", *t.seqlens, {{"batch", batch}}));
  if (t.packed_lens != nullptr) BITDECODING_TRY(check_ints(check, "packed_lens", *t.packed_lens, {{"batch", batch}}));

  const TokenDims dims{q.dtype, batch, num_kv_heads, head_dim};
  BITDECODING_TRY(check_tokens(check, "tail_k", t.tail_k, "tail_v", t.tail_v, "tail_capacity", dims));
  BITDECODING_TRY(check_tokens(check, "sink_k", t.sink_k, "sink_v", t.sink_v, "num_sink", dims));
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
  const auto cap = static_cast<float>(softcap);
  if (!std::isfinite(cap) || softcap < 0.0 || (softcap > 0.0) != (cap > 0.0f)) {
    return fail(Status::invalid_argument, "softcap=", softcap, ": must be positive and finite, or 0 for none");
  }

  constexpr double kLog2E = 1.4426950408889634;
  DecodeParams p;
  p.q = data(t.q);
  p.pages = data(t.pages);
  p.block_table = ints(t.block_table);
  p.seqlens = ints(t.seqlens);
  p.packed_lens = ints(t.packed_lens);
  p.tail_k = data(t.tail_k);
  p.tail_v = data(t.tail_v);
  p.sink_k = data(t.sink_k);
  p.sink_v = data(t.sink_v);
  p.sink_logits = reinterpret_cast<const float*>(data(t.sink_logits));
  p.out = mutable_data(t.out);
  p.lse = reinterpret_cast<float*>(mutable_data(t.lse));
  p.page_stride_bytes = page_stride;
  p.head_stride_bytes = head_stride;
  p.batch = static_cast<std::int32_t>(batch);
  p.q_len = static_cast<std::int32_t>(q_len);
  p.num_q_heads = static_cast<std::int32_t>(num_q_heads);
  p.num_kv_heads = static_cast<std::int32_t>(num_kv_heads);
  p.num_pages = static_cast<std::int32_t>(t.pages->shape[0]);
  // an empty pool has no address, and the table no entry that could be used
  p.max_pages = p.num_pages == 0 ? 0 : static_cast<std::int32_t>(t.block_table->shape[1]);
  p.tail_capacity = slots(t.tail_k);
  p.num_sink = slots(t.sink_k);
  p.window = static_cast<std::int32_t>(window);
  p.softmax_scale_log2 = static_cast<float>(softmax_scale * kLog2E);
  p.softcap = cap;
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
  BITDECODING_TRY(check_workspace(Checker("q", q.device), workspace));
  out->workspace = mutable_data(&workspace);
  return Status::ok;
}

Status check_append_for_kernel(const AppendTensors& t, const KernelConfig& config, AppendParams* out) {
  const DLTensor& k = *t.k_new;
  const Checker check("k_new", k.device);
  BITDECODING_TRY(
      check.tensor("k_new", k, {kFloat16, kBfloat16},
                   {{"batch", kAny}, {"new_tokens", kAny}, {"num_kv_heads", kAny}, {"head_dim", config.head_dim}}));
  const TokenDims dims{k.dtype, k.shape[0], k.shape[2], config.head_dim};
  BITDECODING_TRY(check.tensor("v_new", *t.v_new, {k.dtype},
                               {{"batch", dims.batch},
                                {"new_tokens", k.shape[1]},
                                {"num_kv_heads", dims.num_kv_heads},
                                {"head_dim", dims.head_dim}}));
  AppendParams p;
  BITDECODING_TRY(
      check_append_common(check, "k_new", k, "v_new", *t.v_new, *t.pages, *t.block_table, dims.batch, config, &p));
  BITDECODING_TRY(check_ints(check, "seqlens", *t.seqlens, {{"batch", dims.batch}}));
  BITDECODING_TRY(check_ints(check, "packed_lens", *t.packed_lens, {{"batch", dims.batch}}));
  BITDECODING_TRY(check_tokens(check, "tail_k", t.tail_k, "tail_v", t.tail_v, "tail_capacity", dims));
  BITDECODING_TRY(check_tokens(check, "sink_k", t.sink_k, "sink_v", t.sink_v, "num_sink", dims));
  if (t.lengths != nullptr) BITDECODING_TRY(check_ints(check, "lengths", *t.lengths, {{"batch", dims.batch}}));
  if (t.status != nullptr) BITDECODING_TRY(check_ints(check, "status", *t.status, {{"one", 1}}));
  BITDECODING_TRY(check_workspace(check, *t.workspace));
  BITDECODING_TRY(check_on_gpu("k_new", k));

  p.lengths = ints(t.lengths);
  p.seqlens = ints(t.seqlens);
  p.packed_lens = ints(t.packed_lens);
  p.tail_k = mutable_data(t.tail_k);
  p.tail_v = mutable_data(t.tail_v);
  p.sink_k = mutable_data(t.sink_k);
  p.sink_v = mutable_data(t.sink_v);
  p.status = ints(t.status);
  p.workspace = mutable_data(t.workspace);
  p.new_batch_stride_bytes = stride_bytes(k, 0);
  p.new_tokens = static_cast<std::int32_t>(k.shape[1]);
  p.tail_capacity = slots(t.tail_k);
  p.num_sink = slots(t.sink_k);
  *out = p;
  return Status::ok;
}

Status check_quantize_for_kernel(const QuantizeTensors& t, const KernelConfig& config, std::int64_t max_seqlen,
                                 AppendParams* out) {
  const DLTensor& k = *t.k;
  const Checker check("k", k.device);
  BITDECODING_TRY(check.tensor("k", k, {kFloat16, kBfloat16},
                               {{"num_tokens", kAny}, {"num_kv_heads", kAny}, {"head_dim", config.head_dim}}));
  BITDECODING_TRY(check.tensor(
      "v", *t.v, {k.dtype}, {{"num_tokens", k.shape[0]}, {"num_kv_heads", k.shape[1]}, {"head_dim", config.head_dim}}));
  std::int64_t batch = 1;
  if (t.cu_seqlens != nullptr) {
    BITDECODING_TRY(check_ints(check, "cu_seqlens", *t.cu_seqlens, {{"batch + 1", kAny}}));
    batch = t.cu_seqlens->shape[0] - 1;
    if (batch < 0) return fail(Status::invalid_argument, "cu_seqlens: shape [0]: must be [batch + 1]");
  }
  if (max_seqlen < 0 || max_seqlen > k.shape[0]) {
    return fail(Status::invalid_argument, "max_seqlen=", max_seqlen, ": allowed are 0 to num_tokens=", k.shape[0]);
  }
  AppendParams p;
  BITDECODING_TRY(check_append_common(check, "k", k, "v", *t.v, *t.pages, *t.block_table, batch, config, &p));
  BITDECODING_TRY(check_on_gpu("k", k));
  p.cu_seqlens = ints(t.cu_seqlens);
  p.new_tokens = static_cast<std::int32_t>(max_seqlen);
  p.pack_all = 1;
  *out = p;
  return Status::ok;
}

}  // namespace bitdecoding
