#include "core/check.h"
#include "core/cuda/launch.cuh"
#include "ops/ternary_matmul.h"

namespace effvlm {

void ternary_matmul_cuda(const TernaryMatmulArgs&, int, void*) { fail("ternary_matmul: no CUDA kernel yet"); }

std::int64_t ternary_matmul_workspace_cuda(const TernaryMatmulArgs&) { return 0; }

}  // namespace effvlm
