// ISA levels: which of the compiled copies of an <op>_cpu.cpp runs. Each level includes all before it.
#pragma once
#include <string>
#include <vector>

namespace effvlm {

enum class Isa : int { scalar = 0, avx2, avx512, avx512_vnni, avx512_bf16, amx };

Isa isa();                                 // level in use
void set_isa(const char* name);            // force a level; nullptr: best supported. Unsupported or unknown: throws
std::vector<std::string> isa_supported();  // levels that this build has and this machine can run, lowest first
const char* isa_name(Isa level);

}  // namespace effvlm

// EFFVLM_DECLARE_CPU(token_merge, TokenMergeArgs) declares <level>::token_merge_cpu for each level, and token_merge_cpu,
// which calls the one in use. EFFVLM_ONLY_LEVEL: the build has that one level (machines that are not x86; test builds).
// clang-format off
#define EFFVLM_DECLARE_LEVEL(level, op, Args) namespace level { void op##_cpu(const Args&); }
#if !defined(__x86_64__) && !defined(EFFVLM_ONLY_LEVEL)
#define EFFVLM_ONLY_LEVEL scalar
#endif
#if defined(EFFVLM_ONLY_LEVEL)
#define EFFVLM_DECLARE_CPU(op, Args)               \
  EFFVLM_DECLARE_LEVEL(EFFVLM_ONLY_LEVEL, op, Args) \
  inline void op##_cpu(const Args& args) { EFFVLM_ONLY_LEVEL::op##_cpu(args); }
#else
#define EFFVLM_DECLARE_CPU(op, Args)                                                              \
  EFFVLM_DECLARE_LEVEL(scalar, op, Args)                                                          \
  EFFVLM_DECLARE_LEVEL(avx2, op, Args)                                                            \
  EFFVLM_DECLARE_LEVEL(avx512, op, Args)                                                          \
  EFFVLM_DECLARE_LEVEL(avx512_vnni, op, Args)                                                     \
  EFFVLM_DECLARE_LEVEL(avx512_bf16, op, Args)                                                     \
  EFFVLM_DECLARE_LEVEL(amx, op, Args)                                                             \
  inline void op##_cpu(const Args& args) {                                                        \
    using Kernel = void (*)(const Args&);                                                         \
    constexpr Kernel kernels[] = {scalar::op##_cpu,      avx2::op##_cpu,        avx512::op##_cpu, \
                                  avx512_vnni::op##_cpu, avx512_bf16::op##_cpu, amx::op##_cpu};   \
    kernels[static_cast<int>(isa())](args);                                                       \
  }
#endif
// clang-format on
