// AMX: eight tiles of 16 rows × 64 bytes, products of int8 and of bf16. With EFFVLM_EMULATE_AMX (tests on machines without AMX)
// the same calls work on plain memory; the emulation is the instruction's definition, not a second kernel.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AMX_INT8__) || defined(EFFVLM_EMULATE_AMX)
#define EFFVLM_HAS_AMX 1
#include <immintrin.h>

namespace effvlm::EFFVLM_ISA {

#if defined(EFFVLM_EMULATE_AMX)

struct Tile {
  std::uint8_t row[16][64];
};
inline Tile& tile(int index) {
  static thread_local Tile tiles[8];
  return tiles[index];
}
struct TileScope {};
inline void tile_zero(int t) { std::memset(&tile(t), 0, sizeof(Tile)); }
inline void tile_load(int t, const void* from, std::int64_t row_bytes) {
  for (int i = 0; i < 16; ++i) std::memcpy(tile(t).row[i], static_cast<const char*>(from) + i * row_bytes, 64);
}
inline void tile_store(int t, void* to, std::int64_t row_bytes) {
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * row_bytes, tile(t).row[i], 64);
}
inline void tile_dot_u8s8(int to, int a, int b) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      std::int32_t sum;
      std::memcpy(&sum, tile(to).row[m] + 4 * n, 4);
      for (int k = 0; k < 16; ++k)
        for (int byte = 0; byte < 4; ++byte)
          sum += tile(a).row[m][4 * k + byte] * static_cast<std::int8_t>(tile(b).row[k][4 * n + byte]);
      std::memcpy(tile(to).row[m] + 4 * n, &sum, 4);
    }
}

inline float tile_bf16(const std::uint8_t* bytes) {
  std::uint32_t bits = 0;
  std::memcpy(reinterpret_cast<char*>(&bits) + 2, bytes, 2);
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline void tile_dot_bf16(int to, int a, int b) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float sum;
      std::memcpy(&sum, tile(to).row[m] + 4 * n, 4);
      for (int k = 0; k < 16; ++k)
        for (int half = 0; half < 4; half += 2)
          sum += tile_bf16(tile(a).row[m] + 4 * k + half) * tile_bf16(tile(b).row[k] + 4 * n + half);
      std::memcpy(tile(to).row[m] + 4 * n, &sum, 4);
    }
}

// The intrinsics are macros (their operands are register names), so the emulation takes over their names.
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd
#undef _tile_dpbf16ps
#define _tile_zero(t) tile_zero(t)
#define _tile_loadd(t, from, row_bytes) tile_load(t, from, row_bytes)
#define _tile_stored(t, to, row_bytes) tile_store(t, to, row_bytes)
#define _tile_dpbusd(to, a, b) tile_dot_u8s8(to, a, b)
#define _tile_dpbf16ps(to, a, b) tile_dot_bf16(to, a, b)

#else

// All tiles 16 rows of 64 bytes while in scope; tile state belongs to the thread, so each part of a loop opens its own scope.
struct TileScope {
  TileScope() {
    struct alignas(64) {
      std::uint8_t palette, start_row, reserved[14];
      std::uint16_t bytes_per_row[16];
      std::uint8_t rows[16];
    } config = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
};

#endif

}  // namespace effvlm::EFFVLM_ISA
#endif
