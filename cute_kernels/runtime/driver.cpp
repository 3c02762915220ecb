#include "driver.hpp"

#include <dlfcn.h>

#include <array>
#include <atomic>
#include <mutex>
#include <string>

#include "bitdecoding/runtime.hpp"
#include "error.hpp"

namespace bitdecoding {
namespace cuda {
namespace {

std::string open_driver(Driver* driver) {
  constexpr const char* kLibrary = "libcuda.so.1";
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return std::string(kLibrary) + ": not found; install the NVIDIA driver to run on a GPU";
#define BITDECODING_RESOLVE(member, symbol, parameters)                                            \
  driver->member = reinterpret_cast<decltype(driver->member)>(dlsym(library, symbol));             \
  if (driver->member == nullptr) {                                                                 \
    return std::string(kLibrary) + ": has no " symbol "; a driver for CUDA 12 or newer is needed"; \
  }
  BITDECODING_DRIVER_FUNCTIONS(BITDECODING_RESOLVE)
#undef BITDECODING_RESOLVE
  if (const Result result = driver->init(0); result != kSuccess) {
    static_cast<void>(check(*driver, result, "cuInit"));  // composes the message
    return last_error();
  }
  return "";
}

struct DeviceState {
  std::mutex mutex;
  std::atomic<bool> known{false};
  std::atomic<Context> primary{nullptr};
  DeviceInfo info;
};

std::array<DeviceState, kMaxDevices>& devices() {
  static auto* states = new std::array<DeviceState, kMaxDevices>;  // never destroyed: threads may outlive main
  return *states;
}

Status check_ordinal(const Driver& driver, int device) {
  int count = 0;
  BITDECODING_TRY(check(driver, driver.device_count(&count), "cuDeviceGetCount"));
  if (device < 0 || device >= count || device >= kMaxDevices) {
    return fail(Status::invalid_argument, "device=", device, ": ", count, " device(s) are visible");
  }
  return Status::ok;
}

Status read_device(const Driver& driver, int device, DeviceInfo* out) {
  Device handle = 0;
  char name[256] = {};
  std::size_t memory = 0;
  DeviceInfo info;
  info.index = device;
  BITDECODING_TRY(check_ordinal(driver, device));
  BITDECODING_TRY(check(driver, driver.device_get(&handle, device), "cuDeviceGet"));
  BITDECODING_TRY(check(driver, driver.device_name(name, sizeof(name) - 1, handle), "cuDeviceGetName"));
  BITDECODING_TRY(check(driver, driver.device_memory(&memory, handle), "cuDeviceTotalMem"));
  BITDECODING_TRY(check(driver, driver.driver_version(&info.driver_version), "cuDriverGetVersion"));
  BITDECODING_TRY(check(driver, driver.device_attribute(&info.num_sms, kNumSms, handle), "cuDeviceGetAttribute"));
  BITDECODING_TRY(check(driver, driver.device_attribute(&info.major, kComputeMajor, handle), "cuDeviceGetAttribute"));
  BITDECODING_TRY(check(driver, driver.device_attribute(&info.minor, kComputeMinor, handle), "cuDeviceGetAttribute"));
  info.name = name;
  info.memory_bytes = static_cast<std::int64_t>(memory);
  info.arch = arch_of(info.major, info.minor);
  *out = info;
  return Status::ok;
}

Status primary_context(const Driver& driver, int device, Context* out) {
  DeviceState& state = devices()[device];  // find_device() has accepted the ordinal
  *out = state.primary.load(std::memory_order_acquire);
  if (*out != nullptr) return Status::ok;
  std::lock_guard<std::mutex> lock(state.mutex);
  *out = state.primary.load(std::memory_order_relaxed);
  if (*out != nullptr) return Status::ok;
  Device handle = 0;
  BITDECODING_TRY(check(driver, driver.device_get(&handle, device), "cuDeviceGet"));
  BITDECODING_TRY(check(driver, driver.primary_context_retain(out, handle), "cuDevicePrimaryCtxRetain"));
  state.primary.store(*out, std::memory_order_release);
  return Status::ok;
}

}  // namespace

Status get_driver(const Driver** out) {
  static Driver driver;
  static const std::string error = open_driver(&driver);
  if (!error.empty()) return set_error(Status::cuda_error, error);
  *out = &driver;
  return Status::ok;
}

Status check(const Driver& driver, Result result, const char* what) {
  if (result == kSuccess) return Status::ok;
  const char* name = nullptr;
  const char* text = nullptr;
  driver.error_name(result, &name);
  driver.error_string(result, &text);
  return fail(Status::cuda_error, what, ": ", name != nullptr ? name : "unknown error", " (", result, ")",
              text != nullptr ? ": " : "", text != nullptr ? text : "");
}

Status ContextScope::enter(const Driver& driver, int device) {
  Context current = nullptr;
  Device current_device = -1;
  BITDECODING_TRY(check(driver, driver.context_current(&current), "cuCtxGetCurrent"));
  if (current != nullptr) {
    BITDECODING_TRY(check(driver, driver.context_device(&current_device), "cuCtxGetDevice"));
    if (current_device == device) return Status::ok;
  }
  Context primary = nullptr;
  BITDECODING_TRY(primary_context(driver, device, &primary));
  BITDECODING_TRY(check(driver, driver.context_push(primary), "cuCtxPushCurrent"));
  pushed_ = &driver;
  return Status::ok;
}

Status find_device(const Driver& driver, int device, const DeviceInfo** out) {
  if (device < 0 || device >= kMaxDevices) return check_ordinal(driver, device);
  DeviceState& state = devices()[device];
  if (!state.known.load(std::memory_order_acquire)) {
    std::lock_guard<std::mutex> lock(state.mutex);
    if (!state.known.load(std::memory_order_relaxed)) {
      BITDECODING_TRY(read_device(driver, device, &state.info));
      state.known.store(true, std::memory_order_release);
    }
  }
  *out = &state.info;
  return Status::ok;
}

ContextScope::~ContextScope() {
  Context popped = nullptr;
  if (pushed_ != nullptr) pushed_->context_pop(&popped);
}

}  // namespace cuda

Status device_count(int* out) noexcept {
  BITDECODING_TRY(check_present("out", out));
  const cuda::Driver* driver = nullptr;
  BITDECODING_TRY(cuda::get_driver(&driver));
  return cuda::check(*driver, driver->device_count(out), "cuDeviceGetCount");
}

Status device_info(int device, DeviceInfo* out) noexcept {
  BITDECODING_TRY(check_present("out", out));
  const cuda::Driver* driver = nullptr;
  const DeviceInfo* info = nullptr;
  BITDECODING_TRY(cuda::get_driver(&driver));
  BITDECODING_TRY(cuda::find_device(*driver, device, &info));
  *out = *info;
  return Status::ok;
}

}  // namespace bitdecoding
