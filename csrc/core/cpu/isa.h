// ISA levels: which of the compiled copies of an <op>_cpu.cpp runs. Each level includes all before it.
#pragma once
#include <string>
#include <vector>

namespace effvlm {

enum class Isa : int { scalar = 0, avx2, avx512, avx512_vnni, avx512_bf16, amx };

Isa isa();                                    // level in use
void set_isa(const char* name);               // force a level; nullptr: best supported. Unsupported or unknown: throws
std::vector<std::string> isa_supported();     // levels that this build has and this machine can run, lowest first
const char* isa_name(Isa level);

}  // namespace effvlm

// EFFVLM_DECLARE_CPU(token_merge, TokenMergeArgs) declares <level>::token_merge_cpu for each level, and token_merge_cpu,
// which calls the one in use.
#if defined(__x86_64__)
#define EFFVLM_DECLARE_CPU(op, Args)                              \
  namespace scalar { void op##_cpu(const Args&); }                \
  namespace avx2 { void op##_cpu(const Args&); }                  \
  namespace avx512 { void op##_cpu(const Args&); }                \
  namespace avx512_vnni { void op##_cpu(const Args&); }           \
  namespace avx512_bf16 { void op##_cpu(const Args&); }           \
  namespace amx { void op##_cpu(const Args&); }                   \
  inline void op##_cpu(const Args& args) {                        \
    using Kernel = void (*)(const Args&);                         \
    constexpr Kernel kernels[] = {scalar::op##_cpu,      avx2::op##_cpu,        avx512::op##_cpu, \
                                  avx512_vnni::op##_cpu, avx512_bf16::op##_cpu, amx::op##_cpu};   \
    kernels[static_cast<int>(isa())](args);                       \
  }
#else
#define EFFVLM_DECLARE_CPU(op, Args)                \
  namespace scalar { void op##_cpu(const Args&); }  \
  inline void op##_cpu(const Args& args) { scalar::op##_cpu(args); }
#endif
