#include "core/cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "core/check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace effvlm {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};
constexpr int kLevels = sizeof kNames / sizeof kNames[0];

#if defined(__x86_64__)
// AMX: the CPU has tiles (CPUID 7: EDX 22 bf16, 24 tile, 25 int8) and the kernel grants this process their 8 KiB of state.
bool amx_usable() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kNeeded) != kNeeded) return false;
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
#else
  return false;
#endif
}

int best_level() {
  __builtin_cpu_init();  // the builtin also asks the operating system whether it saves the registers
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))) return 0;
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kF16c = 1u << 29;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kF16c)) return 0;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")))
    return 1;
  if (!(__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2")))
    return 2;
  constexpr unsigned kAvx512Bf16 = 1u << 5;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kAvx512Bf16)) return 3;
  return amx_usable() ? 5 : 4;
}
#else
int best_level() { return 0; }
#endif

int supported_level() {
  static const int level = best_level();
  return level;
}

int parse(const char* name, const char* source) {
  for (int level = 0; level < kLevels; ++level) {
    if (std::strcmp(name, kNames[level]) != 0) continue;
    EFFVLM_CHECK(level <= supported_level(), "%s: expected a level that this machine supports (up to '%s'), got '%s'", source,
                 kNames[supported_level()], name);
    return level;
  }
  fail("%s: expected one of scalar, avx2, avx512, avx512_vnni, avx512_bf16, amx, got '%s'", source, name);
}

int initial_level() {
  const char* wish = std::getenv("EFFVLM_CPU_ISA");
  return wish && *wish ? parse(wish, "EFFVLM_CPU_ISA") : supported_level();
}

std::atomic<int>& current() {
  static std::atomic<int> level{initial_level()};
  return level;
}

}  // namespace

Isa isa() { return static_cast<Isa>(current().load(std::memory_order_relaxed)); }

void set_isa(const char* name) { current().store(name ? parse(name, "set_cpu_isa") : initial_level()); }

std::vector<std::string> isa_supported() { return {kNames, kNames + supported_level() + 1}; }

const char* isa_name(Isa level) { return kNames[static_cast<int>(level)]; }

}  // namespace effvlm
