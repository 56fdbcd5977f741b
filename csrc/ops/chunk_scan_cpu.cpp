#include <cstring>

#include "core/cpu/parallel.h"
#include "core/dispatch.h"
#include "ops/chunk_scan_decay.h"
#include "ops/chunk_scan_delta.h"

namespace effvlm::EFFVLM_ISA {
namespace {

Head head_of(const ChunkScanArgs& a, i64 s, i64 h) {
  Head head{a.cu_seqlens ? 0 : s, h, 0, a.L, a.final_state + (s * a.H + h) * a.K * a.V};
  if (a.cu_seqlens) head.first = a.cu_seqlens[s], head.count = a.cu_seqlens[s + 1] - head.first;
  return head;
}

void start_state(const ChunkScanArgs& a, i64 s, const Head& head) {
  if (!a.initial_state) {
    std::memset(head.state, 0, a.K * a.V * sizeof(float));
    return;
  }
  const float* from = a.initial_state + s * a.initial_stride[0] + head.h * a.initial_stride[1];
  for (i64 i = 0; i < a.K; ++i)
    for (i64 j = 0; j < a.V; ++j) head.state[i * a.V + j] = from[i * a.initial_stride[2] + j * a.initial_stride[3]];
}

void check_bounds(const ChunkScanArgs& a) {
  for (i64 s = 0; s <= a.S; ++s) {
    const i64 bound = a.cu_seqlens[s], before = s ? a.cu_seqlens[s - 1] : 0;
    if (bound < before || (s == 0 && bound != 0) || (s == a.S && bound != a.L))
      fail("chunk_scan: expected cu_seqlens to ascend from 0 to L = %lld, got %lld at %lld", static_cast<long long>(a.L),
           static_cast<long long>(bound), static_cast<long long>(s));
  }
}

}  // namespace

void chunk_scan_cpu(const ChunkScanArgs& a) {
  if (a.cu_seqlens) check_bounds(a);
  if (a.S * a.H == 0) return;
  const bool delta = a.beta || a.per_channel;
  const i64 group = a.H / a.G, together = chunk_scan_heads(a), parts = (group + together - 1) / together;
  const i64 scratch_bytes = chunk_scan_workspace_cpu(a) / a.threads;
  by_float_dtype("chunk_scan", a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(a.S * a.G * parts, 1, a.threads, [&](i64 begin, i64 end, int thread) {
      char* scratch = static_cast<char*>(a.workspace) + thread * scratch_bytes;
      for (i64 i = begin; i < end; ++i) {
        const i64 s = i / (a.G * parts), first = i / parts % a.G * group + i % parts * together;
        const i64 left = group - i % parts * together, heads = left < together ? left : together;
        for (i64 h = first; h < first + heads; ++h) start_state(a, s, head_of(a, s, h));
        const Head head = head_of(a, s, first);
        if (delta) {
          scan_delta<T>(a, head, heads, reinterpret_cast<float*>(scratch));
        } else {
          scan_decay<T>(a, head, heads, scratch);
        }
      }
    });
  });
}

}  // namespace effvlm::EFFVLM_ISA
