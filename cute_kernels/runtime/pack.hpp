// Reading a kernel pack; the format is described in cute_kernels/pack.py, which writes it.
#pragma once

#include <string>
#include <vector>

#include "bitdecoding/runtime.hpp"

namespace bitdecoding {

// Every size and offset is checked before it is used: a truncated or hostile file gives Status::format_error.
Status read_pack(const std::string& path, std::vector<Kernel>* out);

// What must hold for a kernel wherever it comes from.
Status validate_kernel(const Kernel& kernel);

}  // namespace bitdecoding
