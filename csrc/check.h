// Errors that cross the binding. Kernels do not throw: input is checked before a kernel is called.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace flcore {

struct Error : std::invalid_argument {  // -> flcore.errors.InvalidInputError
  using std::invalid_argument::invalid_argument;
};
struct PacketError : Error {  // -> flcore.errors.PacketError
  using Error::Error;
};

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace flcore

#define FLCORE_CHECK(condition, ...)                                  \
  do {                                                                \
    if (!(condition)) throw ::flcore::Error(::flcore::text(__VA_ARGS__)); \
  } while (0)
