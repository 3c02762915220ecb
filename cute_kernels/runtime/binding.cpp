// The Python binding: the core's structs as tvm-ffi objects, its functions under the name "bitdecoding.*".
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/container/variant.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/object.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/ffi/string.h>

#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>

#include "bitdecoding/block_format.hpp"
#include "bitdecoding/cpu.hpp"
#include "bitdecoding/runtime.hpp"
#include "check.hpp"
#include "error.hpp"

namespace bitdecoding {
namespace {

namespace ffi = tvm::ffi;
namespace refl = tvm::ffi::reflection;

// Python's exception classes are registered under these kinds (cute_kernels/native.py).
void raise_unless_ok(Status status) {
  switch (status) {
    case Status::ok:
      break;
    case Status::invalid_argument:
      TVM_FFI_THROW(InvalidArgument) << last_error();
      break;
    case Status::unsupported_config:
      TVM_FFI_THROW(UnsupportedConfig) << last_error();
      break;
    case Status::kernel_not_found:
      TVM_FFI_THROW(KernelNotFound) << last_error();
      break;
    case Status::cuda_error:
      TVM_FFI_THROW(CudaError) << last_error();
      break;
    case Status::format_error:
      TVM_FFI_THROW(CacheFormatError) << last_error();
      break;
    case Status::out_of_memory:
      TVM_FFI_THROW(MemoryError) << last_error();
      break;
  }
}

// ---- fields: how a core type appears in Python ----

using PyClip = ffi::Variant<ffi::String, double>;

template <typename T>
struct Field {
  using Py = T;
  static T to_py(const T& value) { return value; }
  static T to_core(const char*, const T& value) { return value; }
};

template <>
struct Field<std::string> {
  using Py = ffi::String;
  static ffi::String to_py(const std::string& value) { return value; }
  static std::string to_core(const char*, const ffi::String& value) { return value; }
};

template <>
struct Field<Clip> {
  using Py = PyClip;
  static PyClip to_py(const Clip& clip) {
    if (clip.search) return ffi::String("mse");
    if (clip.factor == 1.0) return ffi::String("minmax");
    return clip.factor;
  }
  static Clip to_core(const char* name, const PyClip& value) {
    if (auto factor = value.as<double>()) return Clip{*factor, false};
    const std::string word = value.get<ffi::String>();
    if (word == "mse") return Clip{1.0, true};
    if (word != "minmax") {
      TVM_FFI_THROW(InvalidArgument) << name << "='" << word << "': allowed are 'minmax', 'mse' and factors in (0, 1]";
    }
    return Clip{};
  }
};

#define BITDECODING_MEMBER(type, name, initial, doc) Field<type>::Py name = Field<type>::to_py(initial);
#define BITDECODING_TO_CORE(type, name, initial, doc) core.name = Field<type>::to_core(#name, name);
#define BITDECODING_FROM_CORE(type, name, initial, doc) object->name = Field<type>::to_py(core.name);
#define BITDECODING_REFLECT(type, name, initial, doc) \
  def.def_ro(#name, &Self::name, doc, refl::kw_only(true), default_trait([]() { return Field<type>::to_py(initial); }));

template <typename Make>
auto default_trait(Make make) {
  // Objects cannot be made yet, while the library is loading: their type has no index.
  if constexpr (std::is_base_of_v<ffi::ObjectRef, decltype(make())>) {
    return refl::default_factory(ffi::Function::FromTyped(make));
  } else {
    return refl::default_value(make());
  }
}

class QuantSpecObj : public ffi::Object {
 public:
  BITDECODING_QUANT_SPEC_FIELDS(BITDECODING_MEMBER)

  QuantSpec to_core() const {
    QuantSpec core;
    BITDECODING_QUANT_SPEC_FIELDS(BITDECODING_TO_CORE)
    return core;
  }

  static ffi::ObjectPtr<QuantSpecObj> from_core(const QuantSpec& core) {
    auto object = ffi::make_object<QuantSpecObj>();
    BITDECODING_QUANT_SPEC_FIELDS(BITDECODING_FROM_CORE)
    return object;
  }

  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("bitdecoding.QuantSpec", QuantSpecObj, ffi::Object);
};

class QuantSpecRef : public ffi::ObjectRef {
 public:
  explicit QuantSpecRef(ffi::ObjectPtr<QuantSpecObj> object) : ffi::ObjectRef(std::move(object)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(QuantSpecRef, ffi::ObjectRef, QuantSpecObj);
};

template <>
struct Field<QuantSpec> {
  using Py = QuantSpecRef;
  static QuantSpecRef to_py(const QuantSpec& value) { return QuantSpecRef(QuantSpecObj::from_core(value)); }
  static QuantSpec to_core(const char*, const QuantSpecRef& value) { return value->to_core(); }
};

class KernelConfigObj : public ffi::Object {
 public:
  BITDECODING_KERNEL_CONFIG_FIELDS(BITDECODING_MEMBER)

  KernelConfig to_core() const {
    KernelConfig core;
    BITDECODING_KERNEL_CONFIG_FIELDS(BITDECODING_TO_CORE)
    return core;
  }

  static ffi::ObjectPtr<KernelConfigObj> from_core(const KernelConfig& core) {
    auto object = ffi::make_object<KernelConfigObj>();
    BITDECODING_KERNEL_CONFIG_FIELDS(BITDECODING_FROM_CORE)
    return object;
  }

  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("bitdecoding.KernelConfig", KernelConfigObj, ffi::Object);
};

class KernelConfigRef : public ffi::ObjectRef {
 public:
  explicit KernelConfigRef(ffi::ObjectPtr<KernelConfigObj> object) : ffi::ObjectRef(std::move(object)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(KernelConfigRef, ffi::ObjectRef, KernelConfigObj);
};

KernelConfig valid_config(const KernelConfigRef& config) {
  KernelConfig core = config->to_core();
  raise_unless_ok(core.validate());
  return core;
}

KernelConfigRef parse_name(const ffi::String& name) {
  KernelConfig core;
  raise_unless_ok(KernelConfig::parse(name, &core));
  return KernelConfigRef(KernelConfigObj::from_core(core));
}

// ---- registry and devices ----

int64_t load_pack_py(const ffi::String& path) {
  int kernels = 0;
  raise_unless_ok(load_pack(path, &kernels));
  return kernels;
}

int64_t add_kernel_py(const ffi::String& name, const ffi::String& entry, const ffi::Bytes& cubin, int64_t threads,
                      int64_t smem, int64_t regs, int64_t ctas_per_sm) {
  Kernel kernel;
  kernel.name = name;
  kernel.entry = entry;
  kernel.image.assign(cubin.data(), cubin.size());
  kernel.threads = static_cast<int>(threads);
  kernel.smem = static_cast<int>(smem);
  kernel.regs = static_cast<int>(regs);
  kernel.ctas_per_sm = static_cast<int>(ctas_per_sm);
  int handle = -1;
  raise_unless_ok(add_kernel(std::move(kernel), &handle));
  return handle;
}

ffi::Array<ffi::String> list_kernels_py() {
  ffi::Array<ffi::String> names;
  for (const std::string& name : list_kernels()) names.push_back(name);
  return names;
}

int64_t device_count_py() {
  int count = 0;
  raise_unless_ok(device_count(&count));
  return count;
}

ffi::Map<ffi::String, ffi::Any> device_info_py(int64_t device) {
  DeviceInfo info;
  raise_unless_ok(device_info(static_cast<int>(device), &info));
  return {{"index", info.index},
          {"name", ffi::String(info.name)},
          {"arch", ffi::String(info.arch)},
          {"major", info.major},
          {"minor", info.minor},
          {"num_sms", info.num_sms},
          {"driver_version", info.driver_version},
          {"memory_bytes", info.memory_bytes}};
}

// ---- arguments of public functions, which are checked under their names ----

using Argument = ffi::AnyView;

std::string shown(const Argument& value) {
  std::ostringstream text;
  if (value == nullptr) {
    text << "None";
  } else if (const auto flag = value.as<bool>()) {
    text << (*flag ? "True" : "False");
  } else if (const auto number = value.try_cast<double>()) {
    text << *number;
  } else if (const auto word = value.try_cast<ffi::String>()) {
    text << "'" << *word << "'";
  } else {
    text << value.GetTypeKey();
  }
  return text.str();
}

template <typename T>
T expect(const char* name, const Argument& value, std::optional<T> found, const char* allowed) {
  if (!found.has_value()) {
    TVM_FFI_THROW(InvalidArgument) << name << "=" << shown(value) << ": allowed is " << allowed;
  }
  return *found;
}

const DLTensor* tensor(const char* name, const Argument& value) {
  return expect(name, value, value.try_cast<DLTensor*>(), "a tensor");
}

const DLTensor* optional_tensor(const char* name, const Argument& value) {
  return value == nullptr ? nullptr : expect(name, value, value.try_cast<DLTensor*>(), "a tensor or None");
}

int64_t integer(const char* name, const Argument& value) {  // no bool
  return expect(name, value, value.as<int64_t>(), "an integer");
}

double number(const char* name, const Argument& value) {
  return expect(name, value, value.as<bool>() ? std::nullopt : value.try_cast<double>(), "a number");
}

// ---- launches ----

// On the stream that torch uses. Kernels themselves wait for the one before them, so they may be started early.
LaunchOptions on_current_stream(const DLTensor& tensor) {
  LaunchOptions options;
  options.programmatic = true;
  options.device = tensor.device.device_id;
  options.stream = TVMFFIEnvGetStream(kDLCUDA, options.device);
  return options;
}

DecodeTensors decode_tensors(const Argument& q, const Argument& pages, const Argument& block_table,
                             const Argument& seqlens, const Argument& packed_lens, const Argument& tail_k,
                             const Argument& tail_v, const Argument& sink_k, const Argument& sink_v,
                             const Argument& sink_logits, const Argument& out, const Argument& lse) {
  DecodeTensors t;
  t.q = tensor("q", q);
  t.pages = tensor("pages", pages);
  t.block_table = tensor("block_table", block_table);
  t.seqlens = tensor("seqlens", seqlens);
  t.packed_lens = optional_tensor("packed_lens", packed_lens);
  t.tail_k = optional_tensor("tail_k", tail_k);
  t.tail_v = optional_tensor("tail_v", tail_v);
  t.sink_k = optional_tensor("sink_k", sink_k);
  t.sink_v = optional_tensor("sink_v", sink_v);
  t.sink_logits = optional_tensor("sink_logits", sink_logits);
  t.out = tensor("out", out);
  t.lse = optional_tensor("lse", lse);
  return t;
}

void decode_py(int64_t handle, Argument q, Argument pages, Argument block_table, Argument seqlens, Argument packed_lens,
               Argument tail_k, Argument tail_v, Argument sink_k, Argument sink_v, Argument sink_logits, Argument out,
               Argument lse, Argument workspace, Argument window, Argument softmax_scale, Argument softcap,
               bool rotate_q, bool rotate_out) {
  const DecodeTensors tensors = decode_tensors(q, pages, block_table, seqlens, packed_lens, tail_k, tail_v, sink_k,
                                               sink_v, sink_logits, out, lse);
  const DLTensor& space = *tensor("workspace", workspace);
  const KernelConfig* config = nullptr;
  DecodeParams params;
  const int kernel = static_cast<int>(handle);
  raise_unless_ok(kernel_config(kernel, &config));
  raise_unless_ok(check_decode_for_kernel(tensors, *config, space, integer("window", window),
                                          number("softmax_scale", softmax_scale), number("softcap", softcap), &params));
  if (params.batch == 0) return;
  params.rotate_q = rotate_q;
  params.rotate_out = rotate_out;
  raise_unless_ok(decode(kernel, params, space.shape[0], on_current_stream(*tensors.q)));
}

AppendTensors append_tensors(const Argument& k_new, const Argument& v_new, const Argument& pages,
                             const Argument& block_table, const Argument& seqlens, const Argument& packed_lens,
                             const Argument& tail_k, const Argument& tail_v, const Argument& workspace,
                             const Argument& sink_k, const Argument& sink_v, const Argument& lengths,
                             const Argument& status) {
  AppendTensors t;
  t.k_new = tensor("k_new", k_new);
  t.v_new = tensor("v_new", v_new);
  t.pages = tensor("pages", pages);
  t.block_table = tensor("block_table", block_table);
  t.seqlens = tensor("seqlens", seqlens);
  t.packed_lens = tensor("packed_lens", packed_lens);
  t.tail_k = tensor("tail_k", tail_k);
  t.tail_v = tensor("tail_v", tail_v);
  t.workspace = tensor("workspace", workspace);
  t.sink_k = optional_tensor("sink_k", sink_k);
  t.sink_v = optional_tensor("sink_v", sink_v);
  t.lengths = optional_tensor("lengths", lengths);
  t.status = optional_tensor("status", status);
  return t;
}

// What tensors do not say of an append.
void set_options(int64_t recent, double k_clip, double v_clip, bool rotate_k, bool rotate_v, AppendParams* params) {
  if (recent < 0 || recent > std::numeric_limits<std::int32_t>::max()) {
    TVM_FFI_THROW(InvalidArgument) << "recent=" << recent << ": allowed are integers from 0";
  }
  params->recent = static_cast<std::int32_t>(recent);
  params->k_clip = static_cast<float>(k_clip);
  params->v_clip = static_cast<float>(v_clip);
  params->rotate_k = rotate_k;
  params->rotate_v = rotate_v;
}

void append_py(int64_t handle, Argument k_new, Argument v_new, Argument pages, Argument block_table, Argument seqlens,
               Argument packed_lens, Argument tail_k, Argument tail_v, Argument workspace, Argument sink_k,
               Argument sink_v, Argument lengths, Argument status, Argument recent, double k_clip, double v_clip,
               bool rotate_k, bool rotate_v) {
  const AppendTensors tensors = append_tensors(k_new, v_new, pages, block_table, seqlens, packed_lens, tail_k, tail_v,
                                               workspace, sink_k, sink_v, lengths, status);
  const int64_t kept = integer("recent", recent);
  const KernelConfig* config = nullptr;
  AppendParams params;
  const int kernel = static_cast<int>(handle);
  raise_unless_ok(kernel_config(kernel, &config));
  raise_unless_ok(check_append_for_kernel(tensors, *config, &params));
  set_options(kept, k_clip, v_clip, rotate_k, rotate_v, &params);
  if (params.batch == 0 || params.new_tokens == 0) return;
  raise_unless_ok(append(kernel, params, tensors.workspace->shape[0], on_current_stream(*tensors.k_new)));
}

void step_py(int64_t handle, Argument q, Argument k_new, Argument v_new, Argument pages, Argument block_table,
             Argument seqlens, Argument packed_lens, Argument tail_k, Argument tail_v, Argument workspace,
             Argument sink_k, Argument sink_v, Argument sink_logits, Argument status, Argument out, Argument lse,
             Argument recent, Argument window, Argument softmax_scale, Argument softcap, double k_clip, double v_clip,
             bool rotate_k, bool rotate_v) {
  const DecodeTensors decode = decode_tensors(q, pages, block_table, seqlens, packed_lens, tail_k, tail_v, sink_k,
                                              sink_v, sink_logits, out, lse);
  const AppendTensors append = append_tensors(k_new, v_new, pages, block_table, seqlens, packed_lens, tail_k, tail_v,
                                              workspace, sink_k, sink_v, nullptr, status);
  const int64_t kept = integer("recent", recent);
  const KernelConfig* config = nullptr;
  const int kernel = static_cast<int>(handle);
  raise_unless_ok(kernel_config(kernel, &config));
  DecodeParams of_decode;
  raise_unless_ok(check_decode_for_kernel(decode, *config, *append.workspace, integer("window", window),
                                          number("softmax_scale", softmax_scale), number("softcap", softcap),
                                          &of_decode));
  AppendParams of_append;
  raise_unless_ok(check_append_for_kernel(append, *config, &of_append));
  if (of_decode.batch == 0 && of_append.batch == 0) return;
  of_decode.rotate_q = rotate_k;
  of_decode.rotate_out = rotate_v;
  set_options(kept, k_clip, v_clip, rotate_k, rotate_v, &of_append);
  raise_unless_ok(step(kernel, of_decode, of_append, append.workspace->shape[0], on_current_stream(*decode.q)));
}

void quantize_py(int64_t handle, DLTensor* k, DLTensor* v, DLTensor* pages, DLTensor* block_table,
                 ffi::Optional<DLTensor*> cu_seqlens, int64_t max_seqlen, double k_clip, double v_clip, bool rotate_k,
                 bool rotate_v) {
  const QuantizeTensors tensors{k, v, pages, block_table, cu_seqlens.has_value() ? cu_seqlens.value() : nullptr};
  const KernelConfig* config = nullptr;
  AppendParams params;
  const int kernel = static_cast<int>(handle);
  raise_unless_ok(kernel_config(kernel, &config));
  raise_unless_ok(check_quantize_for_kernel(tensors, *config, max_seqlen, &params));
  if (params.batch == 0 || params.new_tokens == 0) return;
  params.k_clip = static_cast<float>(k_clip);
  params.v_clip = static_cast<float>(v_clip);
  params.rotate_k = rotate_k;
  params.rotate_v = rotate_v;
  raise_unless_ok(append(kernel, params, 0, on_current_stream(*k)));
}

void decode_cpu_py(Argument q, Argument pages, Argument block_table, Argument seqlens, Argument packed_lens,
                   Argument tail_k, Argument tail_v, Argument sink_k, Argument sink_v, Argument sink_logits,
                   Argument out, Argument lse, const QuantSpecRef& quant, Argument window, Argument softmax_scale,
                   Argument softcap, int64_t num_threads) {
  const DecodeTensors tensors = decode_tensors(q, pages, block_table, seqlens, packed_lens, tail_k, tail_v, sink_k,
                                               sink_v, sink_logits, out, lse);
  DecodeParams params;
  CpuDecodeOptions options;
  options.quant = quant->to_core();
  raise_unless_ok(check_decode_for_cpu(tensors, options.quant, integer("window", window),
                                       number("softmax_scale", softmax_scale), number("softcap", softcap), &params));
  if (params.batch == 0) return;
  params.rotate_q = options.quant.rotate_k;
  params.rotate_out = options.quant.rotate_v;
  options.head_dim = tensors.q->shape[3];
  options.num_pages = tensors.pages->shape[0];
  options.float32 = tensors.q->dtype.bits == 32;
  options.num_threads = static_cast<int>(num_threads);
  raise_unless_ok(decode_cpu(params, options));
}

// outs [num_parts, .., head_dim], lses [num_parts, ..], out [.., head_dim], lse [..]: contiguous, checked by the caller
void merge_py(int64_t handle, DLTensor* outs, DLTensor* lses, DLTensor* out, DLTensor* lse) {
  const auto data = [](const DLTensor* tensor) { return static_cast<char*>(tensor->data) + tensor->byte_offset; };
  MergeParams params;
  params.outs = data(outs);
  params.lses = reinterpret_cast<const float*>(data(lses));
  params.out = data(out);
  params.lse = reinterpret_cast<float*>(data(lse));
  params.num_parts = static_cast<std::int32_t>(outs->shape[0]);
  params.bfloat16 = outs->dtype.code == kDLBfloat ? 1 : 0;
  params.rows = 1;
  for (int i = 1; i < outs->ndim - 1; ++i) params.rows *= outs->shape[i];
  raise_unless_ok(merge(static_cast<int>(handle), params, on_current_stream(*outs)));
}

int64_t workspace_bytes_py(int64_t handle, int64_t device) {
  int64_t bytes = 0;
  raise_unless_ok(decode_workspace_bytes(static_cast<int>(handle), static_cast<int>(device), &bytes));
  return bytes;
}

int64_t capture_id_py(int64_t device, int64_t stream) {
  std::uint64_t id = 0;
  raise_unless_ok(capture_id(static_cast<int>(device), reinterpret_cast<void*>(stream), &id));
  return static_cast<int64_t>(id);
}

TVM_FFI_STATIC_INIT_BLOCK() {
  {
    using Self = QuantSpecObj;
    refl::ObjectDef<Self> def;
    BITDECODING_QUANT_SPEC_FIELDS(BITDECODING_REFLECT)
  }
  {
    using Self = KernelConfigObj;
    refl::ObjectDef<Self> def;
    BITDECODING_KERNEL_CONFIG_FIELDS(BITDECODING_REFLECT)
  }
  refl::GlobalDef()
      .def("bitdecoding.format_version", []() { return static_cast<int64_t>(kFormatVersion); })
      .def("bitdecoding.quant_validate",
           [](const QuantSpecRef& quant, int64_t head_dim) {  // 0: whatever it will be
             const QuantSpec core = quant->to_core();
             raise_unless_ok(head_dim == 0 ? core.validate() : core.validate(head_dim));
           })
      .def("bitdecoding.quant_name", [](const QuantSpecRef& quant) { return ffi::String(quant->to_core().name()); })
      .def("bitdecoding.config_validate", [](const KernelConfigRef& config) { valid_config(config); })
      .def("bitdecoding.config_name",
           [](const KernelConfigRef& config) { return ffi::String(valid_config(config).name()); })
      .def("bitdecoding.config_parse", parse_name)
      .def("bitdecoding.config_smem_bytes",
           [](const KernelConfigRef& config) {
             const KernelConfig core = config->to_core();
             const Status found = core.validate();
             if (found != Status::unsupported_config) raise_unless_ok(found);  // that may be for its shared memory
             return core.smem_bytes();
           })
      .def("bitdecoding.smem_limit", [](const ffi::String& arch) { return smem_limit(arch); })
      .def("bitdecoding.arch_of",
           [](int64_t major, int64_t minor) {
             return ffi::String(arch_of(static_cast<int>(major), static_cast<int>(minor)));
           })
      .def("bitdecoding.block_bytes",
           [](int64_t head_dim, const QuantSpecRef& quant) {
             const QuantSpec core = quant->to_core();
             raise_unless_ok(core.validate(head_dim));
             return block_bytes(head_dim, core);
           })
      .def("bitdecoding.load_pack", load_pack_py)
      .def("bitdecoding.add_kernel", add_kernel_py)
      .def("bitdecoding.find_kernel", [](const ffi::String& name) { return static_cast<int64_t>(find_kernel(name)); })
      .def("bitdecoding.list_kernels", list_kernels_py)
      .def("bitdecoding.device_count", device_count_py)
      .def("bitdecoding.device_info", device_info_py)
      .def("bitdecoding.counter_bytes", []() { return kCounterBytes; })
      .def("bitdecoding.workspace_bytes", workspace_bytes_py)
      .def("bitdecoding.capture_id", capture_id_py)
      .def("bitdecoding.decode", decode_py)
      .def("bitdecoding.append", append_py)
      .def("bitdecoding.step", step_py)
      .def("bitdecoding.quantize", quantize_py)
      .def("bitdecoding.merge", merge_py)
      .def("bitdecoding.decode_cpu", decode_cpu_py)
      .def("bitdecoding.cpu_instruction_set", []() { return ffi::String(cpu_instruction_set()); });
}

}  // namespace
}  // namespace bitdecoding
