// Where a segment is cut, in numbers that are the same at every level and on every device.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/workspace.h"

namespace effvlm {
namespace {

// A float's bits as an unsigned number of the same order. −0 is 0.
EFFVLM_HOST_DEVICE inline std::uint32_t key_of(float x) {
  std::uint32_t bits;
  x += 0.0f;
  std::memcpy(&bits, &x, sizeof bits);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
EFFVLM_HOST_DEVICE inline float float_of(std::uint32_t key) {
  const std::uint32_t bits = key >> 31 ? key & 0x7fffffffu : ~key;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
constexpr std::uint32_t kLowestKey = 0x007fffffu, kInfiniteKey = 0xff800000u;  // of −inf and +inf

// Kept are the tokens with a key above this one, and the first `equal` with this one.
struct Cut {
  std::uint32_t key;
  std::int32_t equal;
};
EFFVLM_HOST_DEVICE constexpr Cut keep_all() { return {kLowestKey, 0}; }             // but −inf
EFFVLM_HOST_DEVICE constexpr Cut keep_infinite() { return {kInfiniteKey - 1, 0}; }  // nothing but +inf

// −inf is never kept, +inf always.
EFFVLM_HOST_DEVICE inline Cut bounded(Cut cut) {
  return cut.key <= kLowestKey ? keep_all() : cut.key >= kInfiniteKey ? keep_infinite() : cut;
}

// What is at or above x. Nothing finite, if x is NaN.
EFFVLM_HOST_DEVICE inline Cut cut_from(float x) { return x == x ? bounded({key_of(x) - 1, 0}) : keep_infinite(); }

// What is above x.
EFFVLM_HOST_DEVICE inline Cut cut_above(double x) {
  const float rounded = static_cast<float>(x);
  return !(x < INFINITY) || rounded > x ? cut_from(rounded) : bounded({key_of(rounded), 0});
}

// ⌊limit⌋ within 0 … n.
EFFVLM_HOST_DEVICE inline std::int32_t whole(float limit, std::int32_t n) {
  return limit >= static_cast<float>(n) ? n : limit > 0 ? static_cast<std::int32_t>(limit) : 0;
}

// A share of a total of units, at least one unit and at most all.
EFFVLM_HOST_DEVICE inline std::int64_t share(float limit, std::int64_t total) {
  const double wanted = std::ceil(static_cast<double>(limit) * static_cast<double>(total));
  return !(wanted > 1) ? 1 : wanted < static_cast<double>(total) ? static_cast<std::int64_t>(wanted) : total;
}

// What turns a score of a segment of n into units, a power of two; `largest` is the key of the largest, finite and > 0. The units
// of all of them stay below 2^62.
EFFVLM_HOST_DEVICE inline double units_per_score(std::uint32_t largest, std::int64_t n) {
  const int exponent = static_cast<int>(largest >> 23 & 255) - 126;  // the largest is below 2^exponent
  int bits = 0;
  while (std::int64_t{1} << bits < n) ++bits;
  const std::uint64_t power = static_cast<std::uint64_t>(1023 + 62 - bits - exponent) << 52;
  double x;
  std::memcpy(&x, &power, sizeof x);
  return x;
}
EFFVLM_HOST_DEVICE inline std::int64_t units_of(std::uint32_t key, double per_score) {
  const float score = float_of(key);
  return score > 0 && key < kInfiniteKey ? static_cast<std::int64_t>(score * per_score) : 0;
}

// The place of quartile q (1 … 3) among n values in ascending order: `below`, and how many quarters of the way to the next.
struct Quartile {
  std::int32_t below, quarters;
};
EFFVLM_HOST_DEVICE inline Quartile quartile_of(int q, std::int32_t n) {
  const std::int64_t place = std::int64_t{q} * (n - 1);
  return {static_cast<std::int32_t>(place / 4), static_cast<int>(place % 4)};
}

}  // namespace
}  // namespace effvlm
