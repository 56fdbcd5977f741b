// Element types, as data (Dtype) and as C++ types. 16-bit floats are plain bits here; arithmetic is done in f32.
#pragma once
#include <cstdint>

namespace effvlm {

enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2, i32 = 3, i64 = 4, u8 = 5, i8 = 6, boolean = 7, f64 = 8, u32 = 9 };

struct f16 {
  std::uint16_t bits;
};
struct bf16 {
  std::uint16_t bits;
};

}  // namespace effvlm
