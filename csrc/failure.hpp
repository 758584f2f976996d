// How an operator fails: it returns a message, which loki_kernels/_native.py raises. "" is success.
//
// It throws nothing, because a failed STD_TORCH_CHECK ended the process with a segmentation fault
// (torch 2.11.0+cu130, Python 3.12, H200). That is not torch 2.11 alone: without a GPU the same
// build hands the exception to Python, and so it does there before CUDA is initialised. The
// suspect, not proven, is the std::ostringstream of that macro: torch 2.11's libc10 and libtorch
// export its constructor and str(), this library binds to those, and the rest is libstdc++'s. So
// none is used here, and no frame of torch or pybind11 is unwound. What torch's headers throw is
// caught.
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <utility>

namespace loki {

inline std::string text(const char* part) { return part; }
inline std::string text(int64_t part) { return std::to_string(part); }

template <typename... Parts>
std::string joined(const Parts&... parts) {
  return (std::string() + ... + text(parts));
}

// An operator's function, with what torch's own headers throw caught.
template <auto function>
struct Caught;

template <typename... Arguments, std::string (*function)(Arguments...)>
struct Caught<function> {
  static std::string call(Arguments... arguments) {
    try {
      return function(std::forward<Arguments>(arguments)...);
    } catch (const std::exception& error) {
      return joined("torch: ", error.what());
    }
  }
};

}  // namespace loki

// Ends the function with this message unless `condition` holds.
#define LOKI_CHECK(condition, ...)                                          \
  do {                                                                      \
    if (!(condition)) return ::loki::joined(__VA_ARGS__);                   \
  } while (false)

// Ends the function with the message of another one that has failed.
#define LOKI_TRY(call)                                                      \
  do {                                                                      \
    if (std::string failure = (call); !failure.empty()) return failure;     \
  } while (false)
