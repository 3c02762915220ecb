// Composing the message that last_error() returns.
#pragma once

#include <initializer_list>
#include <new>
#include <sstream>
#include <string>

#include "bitdecoding/status.hpp"

namespace bitdecoding {

// Keeps the message for this thread and returns the status.
Status set_error(Status status, const std::string& message);

template <typename... Parts>
Status fail(Status status, const Parts&... parts) noexcept try {
  std::ostringstream text;
  text << std::boolalpha;
  (text << ... << parts);
  return set_error(status, text.str());
} catch (const std::bad_alloc&) {
  return set_error(status, "no memory");  // so short that it needs none
}

inline Status check_present(const char* argument, const void* pointer) {
  return pointer != nullptr ? Status::ok : fail(Status::invalid_argument, argument, ": is null");
}

// "8, 4, 2"
template <typename T>
std::string listed(std::initializer_list<T> values) {
  std::ostringstream text;
  const char* separator = "";
  for (const T& value : values) {
    text << separator << value;
    separator = ", ";
  }
  return text.str();
}

template <typename T, typename Allowed>
Status check_one_of(const char* argument, const T& value, std::initializer_list<Allowed> allowed) {
  for (const Allowed& candidate : allowed) {
    if (value == candidate) return Status::ok;
  }
  return fail(Status::invalid_argument, argument, "=", value, ": allowed are ", listed(allowed));
}

#define BITDECODING_TRY(expression)                                                                 \
  do {                                                                                              \
    if (const ::bitdecoding::Status status_ = (expression); status_ != ::bitdecoding::Status::ok) { \
      return status_;                                                                               \
    }                                                                                               \
  } while (false)

}  // namespace bitdecoding
