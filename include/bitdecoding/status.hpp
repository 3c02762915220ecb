// How functions of this library fail: a status code, and a message kept per thread. Nothing throws.
#pragma once

namespace bitdecoding {

enum class [[nodiscard]] Status {
  ok = 0,
  invalid_argument,    // an argument has a wrong type, shape or value
  unsupported_config,  // sound, but no kernel can exist for it
  kernel_not_found,    // no kernel of that name or handle is registered
  cuda_error,          // the CUDA driver is missing or returned an error
  format_error,        // a kernel pack is damaged, hostile or of another version
  out_of_memory,       // the host has no memory left
};

// The message of this thread's last function that did not return Status::ok: argument, value, what is allowed.
const char* last_error() noexcept;

}  // namespace bitdecoding
