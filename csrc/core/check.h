// Guards. User-facing validation lives in Python (effvlm/ops/<op>.py: check); these protect memory.
#pragma once

namespace effvlm {

// Throws std::invalid_argument (ValueError in Python) with a printf-style message. Defined once, at the base ISA.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

}  // namespace effvlm

#define EFFVLM_CHECK(condition, ...)               \
  do {                                             \
    if (!(condition)) ::effvlm::fail(__VA_ARGS__); \
  } while (0)
