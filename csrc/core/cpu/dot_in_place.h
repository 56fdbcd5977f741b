// The two instructions of sums of products, as asm: with their intrinsics GCC 12 copies every sum before and after it is added
// to, which took 30 to 40 % of the time of loops that hold sixteen sums or more.
#pragma once
#include "core/cpu/simd.h"

namespace effvlm::EFFVLM_ISA {

#if defined(__AVX512VNNI__)
// Lane l of i32: sum + Σ_j u[4l + j]·s[4l + j], u unsigned, s signed bytes.
inline __m512i dot_bytes(__m512i sum, __m512i u, __m512i s) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s));
  return sum;
}
#endif
#if defined(__AVX512BF16__)
// Lane l of f32: sum + a[2l + 1]·b[2l + 1] + a[2l]·b[2l], bf16.
inline __m512 dot_pairs(__m512 sum, __m512i a, __m512i b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
#endif

}  // namespace effvlm::EFFVLM_ISA
