// A C++ user of the library: plans a kernel, registers one, and gets errors, all without a GPU.
#include <bitdecoding/runtime.hpp>
#include <cstdio>

namespace bd = bitdecoding;

int main() {
  bd::KernelConfig config;
  config.quant.k_bits = 2;
  config.stages = 3;
  std::printf("%s\n", config.name().c_str());
  std::printf("%lld\n", static_cast<long long>(config.smem_bytes()));

  config.quant.k_bits = 3;
  const bool rejected = config.validate() == bd::Status::invalid_argument;
  std::printf("%d %s\n", rejected, bd::last_error());

  bd::KernelConfig parsed;
  int handle = -1;
  bd::Kernel kernel;
  kernel.name = bd::KernelConfig{}.name();
  kernel.entry = "entry";
  kernel.image = "cubin";
  kernel.threads = 160;
  const bool added = bd::add_kernel(kernel, &handle) == bd::Status::ok;
  const bool found = bd::find_kernel(kernel.name) == handle && bd::list_kernels().size() == 1;
  const bool same = bd::KernelConfig::parse(kernel.name, &parsed) == bd::Status::ok && parsed.name() == kernel.name;
  std::printf("%d %d %d\n", added, found, same);

  bd::DecodeParams params;
  std::printf("%d ", bd::decode(handle, params, 0, {}) == bd::Status::invalid_argument);
  std::printf("%s\n", bd::last_error());
}
