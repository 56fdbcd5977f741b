// Warp operations: shuffles, tensor cores, asynchronous copies; bytes of words; and roundings.
#include "simt_block.h"

namespace simt {

std::uint64_t exchange(unsigned mask, std::uint64_t value, int from) {
  const int me = block->current, first = me / kWarp * kWarp;
  if (!(mask >> (me % kWarp) & 1)) fail("warp operation by lane %d, which its own mask leaves out", me % kWarp);
  if (!(mask >> from & 1)) fail("shuffle from lane %d, which is not in the mask", from);
  block->fibers[me].slot = value;
  sync_warp(mask);
  const std::uint64_t result = block->fibers[first + from].slot;
  sync_warp(mask);  // nobody overwrites its slot before all have read
  return result;
}

// One warp operation in which every lane sees what every other lane brought: calls use(lane → its `mine`).
template <class T, class Use>
void together(const T& mine, Use&& use) {
  const int first = block->current / kWarp * kWarp;
  block->fibers[block->current].published = &mine;
  sync_warp(0xffffffffu);
  use([first](int k) -> const T& { return *static_cast<const T*>(block->fibers[first + k].published); });
  sync_warp(0xffffffffu);  // nobody's `mine` ends before all have read
}

void load_matrices(std::uint32_t* out, const void* row) {
  struct Row {
    std::uint32_t pair[4];
  } mine;
  check_aligned(row, 16);
  access(row, 16, false);
  std::memcpy(&mine, row, 16);
  together(mine, [&](auto&& of) {
    for (int m = 0; m < 4; ++m) out[m] = of(8 * m + lane() / 4).pair[lane() % 4];
  });
}

struct Fragments {
  std::uint32_t a[4], b[2];
};
// Element (row, k) of A and (k, column) of B, for `each` values in a register: of lane 4·row + …, as mma.cuh says.
template <class Value, class T>
void multiply(T* d, const Fragments& mine, int each, Value&& value) {
  together(mine, [&](auto&& of) {
    const auto part = [&](const std::uint32_t word, int k) { return value(word, k % each); };
    for (int i = 0; i < 4; ++i) {
      const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
      for (int k = 0; k < 8 * each; ++k) {
        const int half = k / (4 * each), p = k % (4 * each) / each;
        d[i] += part(of(row % 8 * 4 + p).a[row / 8 + 2 * half], k) * part(of(column * 4 + p).b[half], k);
      }
    }
  });
}
void multiply_16x8x16(float* d, const std::uint32_t* a, std::uint32_t b0, std::uint32_t b1, bool bfloat) {
  multiply(d, Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}}, 2, [bfloat](std::uint32_t word, int k) {
    const std::uint16_t bits = static_cast<std::uint16_t>(word >> 16 * k);
    if (!bfloat) return half_to_float(bits);
    const std::uint32_t wide = std::uint32_t{bits} << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  });
}
void multiply_16x8x32(int* d, const std::uint32_t* a, std::uint32_t b0, std::uint32_t b1) {
  multiply(d, Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}}, 4,
           [](std::uint32_t word, int k) { return static_cast<int>(static_cast<std::int8_t>(word >> 8 * k)); });
}

void copy_async(void* shared, const void* global, int bytes) {
  const auto to = reinterpret_cast<std::uintptr_t>(shared);
  check_aligned(shared, 16);
  check_aligned(global, 16);
  if (to < block->shared.begin || to + 16 > block->shared.end)
    fail("asynchronous copy to %p, which is not shared memory", shared);
  if (bytes < 0 || bytes > 16) fail("asynchronous copy of %d bytes, not 0 … 16", bytes);
  access(shared, 16, true);  // from now on nobody may count on what was there
  if (bytes) access(global, bytes, false);
  Fiber& fiber = block->fibers[block->current];
  Copy copy{to, {}, fiber.copy_group};
  std::memcpy(copy.bytes, global, bytes);
  fiber.copies.push_back(copy);
  std::memset(shared, kPoison, 16);
  for (int k = 0; k < 16; ++k) block->shared_written[to - block->shared.begin + k] = false;
}
void copy_commit() { ++block->fibers[block->current].copy_group; }
void copy_wait(int pending) {
  Fiber& fiber = block->fibers[block->current];
  auto later = fiber.copies.begin();
  for (; later != fiber.copies.end() && later->group < fiber.copy_group - pending; ++later) {
    std::memcpy(reinterpret_cast<void*>(later->to), later->bytes, 16);
    access(reinterpret_cast<void*>(later->to), 16, true);
  }
  fiber.copies.erase(fiber.copies.begin(), later);
}

// As PTX's prmt.b32 in its default mode.
std::uint32_t permute_bytes(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
  const std::uint64_t both = std::uint64_t{b} << 32 | a;
  std::uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t nibble = selector >> 4 * i & 15, byte = static_cast<std::uint32_t>(both >> 8 * (nibble & 7)) & 0xff;
    result |= (nibble < 8 ? byte : byte >> 7 ? 0xff : 0) << 8 * i;
  }
  return result;
}

float half_to_float(std::uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}
std::uint16_t float_to_half(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  std::uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
std::uint16_t float_to_bfloat16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<std::uint16_t>(x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace simt
