#include "core/check.h"
#include "core/cuda/launch.cuh"
#include "ops/ternary_unpack.h"

namespace effvlm {

void ternary_unpack_cuda(const TernaryUnpackArgs&, int, void*) { fail("ternary_unpack: no CUDA kernel yet"); }

}  // namespace effvlm
