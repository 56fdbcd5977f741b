// parallel_for on the OpenMP runtime that the process already has (torch's), without linking one: a second runtime would
// mean a second pool of threads fighting for the same cores.
#pragma once
#include <cstdint>

namespace effvlm {

// body(context, begin, end, thread) for contiguous parts of [0, count), 0 <= thread < threads. A part has a multiple of `grain`
// items (but for the last), so that a grain of whole cache lines is never shared; threads take the next part when they are free,
// so a body's result must not depend on its thread. The first exception thrown by a part is rethrown to the caller, once all
// threads have stopped.
using ParallelBody = void (*)(void* context, std::int64_t begin, std::int64_t end, int thread);
void parallel_run(std::int64_t count, std::int64_t grain, int threads, ParallelBody body, void* context);

// The address of GOMP_parallel that is in use (0: none found, loops run on the calling thread). For `effvlm info`.
const void* parallel_runtime();

// The same with a lambda f(begin, end, thread). Internal linkage: the lambda is compiled per ISA level.
namespace {
template <class F>
inline void parallel_for(std::int64_t count, std::int64_t grain, int threads, F&& f) {
  parallel_run(
      count, grain, threads,
      [](void* context, std::int64_t begin, std::int64_t end, int thread) { (*static_cast<F*>(context))(begin, end, thread); },
      &f);
}
}  // namespace

}  // namespace effvlm
