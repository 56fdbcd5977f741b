#include "core/cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace effvlm {
namespace {

// GNU, LLVM and Intel runtimes all export these (GNU's ABI). torch loads its runtime into the global scope.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using OmpQuery = int (*)();

struct Runtime {
  GompParallel parallel = nullptr;
  OmpQuery thread_num = nullptr;
};

const Runtime& runtime() {
  static const Runtime found = [] {
    Runtime r;
#if defined(__unix__) || defined(__APPLE__)
    r.parallel = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    r.thread_num = reinterpret_cast<OmpQuery>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    if (!r.thread_num) r.parallel = nullptr;
#endif
    return r;
  }();
  return found;
}

struct Job {
  std::int64_t count, part_size;
  ParallelBody body;
  void* context;
  std::atomic<std::int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;

  void run(int thread) {
    try {
      for (std::int64_t begin; (begin = next.fetch_add(part_size)) < count;)
        body(context, begin, std::min(begin + part_size, count), thread);
    } catch (...) {  // must not leave the parallel region
      next.store(count);
      std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  }
};

constexpr int kPartsPerThread = 8;  // enough to even out a core that is busy with something else

}  // namespace

void parallel_run(std::int64_t count, std::int64_t grain, int threads, ParallelBody body, void* context) {
  if (count <= 0) return;
  grain = std::max<std::int64_t>(1, grain);
  const std::int64_t parts = std::clamp<std::int64_t>(count / grain, 1, std::int64_t{threads} * kPartsPerThread);
  const std::int64_t size = (count + parts - 1) / parts;
  Job job{count, (size + grain - 1) / grain * grain, body, context, {}, nullptr, {}};
  const int team = static_cast<int>(std::min<std::int64_t>(threads, parts));
  if (team <= 1 || !runtime().parallel) {
    job.run(0);
  } else {  // the runtime may give a smaller team; then fewer threads take all parts
    runtime().parallel([](void* data) { static_cast<Job*>(data)->run(runtime().thread_num()); }, &job,
                       static_cast<unsigned>(team), 0);
  }
  if (job.error) std::rethrow_exception(job.error);
}

const void* parallel_runtime() { return reinterpret_cast<const void*>(runtime().parallel); }

}  // namespace effvlm
