#include "core/check.h"

#include <cstdarg>
#include <cstdio>
#include <stdexcept>

namespace effvlm {

void fail(const char* format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  throw std::invalid_argument(text);
}

}  // namespace effvlm
