// The few entry points of the CUDA driver that we call, found in libcuda at run time.
//
// Neither a CUDA toolkit nor a driver is needed to build or load this library, so the prototypes and the few
// constants of the public, stable driver ABI are declared here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bitdecoding/runtime.hpp"

namespace bitdecoding::cuda {

using Result = int;
using Device = int;
using Context = struct ContextHandle*;
using Library = struct LibraryHandle*;
using Kernel = struct KernelHandle*;
using Function = struct FunctionHandle*;
using Stream = struct StreamHandle*;

constexpr Result kSuccess = 0;

enum DeviceAttribute : int { kNumSms = 16, kComputeMajor = 75, kComputeMinor = 76 };
enum FunctionAttribute : int { kMaxDynamicSmem = 8 };
enum CaptureMode : int { kCaptureRelaxed = 2 };
enum CaptureStatus : int { kCaptureActive = 1 };

struct LaunchAttribute {  // CUlaunchAttribute
  static constexpr std::uint32_t kProgrammaticStreamSerialization = 6;
  std::uint32_t id = 0;
  char pad[4] = {};
  alignas(8) union {
    int flag;
    char bytes[64];
  } value = {};
};
static_assert(sizeof(LaunchAttribute) == 72);

struct LaunchConfig {  // CUlaunchConfig
  unsigned grid[3] = {1, 1, 1};
  unsigned block[3] = {1, 1, 1};
  unsigned smem = 0;
  Stream stream = nullptr;
  LaunchAttribute* attributes = nullptr;
  unsigned num_attributes = 0;
};
static_assert(sizeof(LaunchConfig) == 56);

// X(member, exported symbol, parameters)
#define BITDECODING_DRIVER_FUNCTIONS(X)                                                                    \
  X(init, "cuInit", (unsigned flags))                                                                      \
  X(driver_version, "cuDriverGetVersion", (int* version))                                                  \
  X(error_name, "cuGetErrorName", (Result, const char** name))                                             \
  X(error_string, "cuGetErrorString", (Result, const char** text))                                         \
  X(device_count, "cuDeviceGetCount", (int* count))                                                        \
  X(device_get, "cuDeviceGet", (Device*, int ordinal))                                                     \
  X(device_name, "cuDeviceGetName", (char* name, int capacity, Device))                                    \
  X(device_attribute, "cuDeviceGetAttribute", (int* value, DeviceAttribute, Device))                       \
  X(device_memory, "cuDeviceTotalMem_v2", (std::size_t* bytes, Device))                                    \
  X(primary_context_retain, "cuDevicePrimaryCtxRetain", (Context*, Device))                                \
  X(context_current, "cuCtxGetCurrent", (Context*))                                                        \
  X(context_device, "cuCtxGetDevice", (Device*))                                                           \
  X(context_push, "cuCtxPushCurrent_v2", (Context))                                                        \
  X(context_pop, "cuCtxPopCurrent_v2", (Context*))                                                         \
  X(library_load, "cuLibraryLoadData",                                                                     \
    (Library*, const void* image, int* jit_options, void** jit_values, unsigned num_jit, int* lib_options, \
     void** lib_values, unsigned num_lib))                                                                 \
  X(library_unload, "cuLibraryUnload", (Library))                                                          \
  X(library_kernel, "cuLibraryGetKernel", (Kernel*, Library, const char* name))                            \
  X(kernel_set_attribute, "cuKernelSetAttribute", (FunctionAttribute, int value, Kernel, Device))          \
  X(kernel_function, "cuKernelGetFunction", (Function*, Kernel))                                           \
  X(launch, "cuLaunchKernelEx", (const LaunchConfig*, Kernel, void** params, void** extra))                \
  X(exchange_capture_mode, "cuThreadExchangeStreamCaptureMode", (CaptureMode*))                            \
  X(capture_info, "cuStreamGetCaptureInfo_v2",                                                             \
    (Stream, CaptureStatus*, std::uint64_t* id, void** graph, const void** dependencies, std::size_t* num))

struct Driver {
#define BITDECODING_DECLARE(member, symbol, parameters) Result(*member) parameters = nullptr;
  BITDECODING_DRIVER_FUNCTIONS(BITDECODING_DECLARE)
#undef BITDECODING_DECLARE
};

// The driver, initialised; Status::cuda_error says what is missing. Found once, also when that fails.
Status get_driver(const Driver** out);

constexpr int kMaxDevices = 64;

// Facts of a device, read once; the address stays good.
Status find_device(const Driver& driver, int device, const DeviceInfo** out);

// Status::cuda_error with the driver's name of the error, unless the call succeeded.
Status check(const Driver& driver, Result result, const char* what);

// Makes a context of the device current, unless one is, and restores the previous one at the end.
class ContextScope {
 public:
  ContextScope() = default;
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;
  ~ContextScope();

  Status enter(const Driver& driver, int device);

 private:
  const Driver* pushed_ = nullptr;
};

}  // namespace bitdecoding::cuda
