// ternary_unpack — gap planes back to one value per weight
//
// Math       out[e,r,c] = the weight, −1, 0 or 1 (−2 … 2 with levels 5), without its row's scale
// Shapes     data (W) · tiles (E,B,S,2) · base (E·B·G + 1) u32 of a stack of E matrices (R,C) → out (E,R,C)
// Layout     all contiguous; docs/gap_planes.md
// Types      u32 → i8
// Edges      E, R or C = 0: nothing to write; corrupt bytes: the CPU raises, CUDA writes values that mean nothing; neither reads
//            or writes outside the tensors
// Order      exact
// Parallel   CPU: blocks of 64 rows over threads.  CUDA: warp ↔ half a tile
// Cost       reads the packed bytes, writes E·R·C bytes; no extra memory but 33 KB per thread
// Why so     the list of a tile is read as ternary_matmul reads it, then scattered over zeros
// Not for    multiplying: ternary_matmul never unpacks
#pragma once
#include "core/cpu/isa.h"
#include "core/gap_planes.h"

namespace effvlm {

struct TernaryUnpackArgs {
  GapPlanes weight;
  std::int8_t* out;  // (E,R,C)
  int threads;       // CPU only
};

EFFVLM_DECLARE_CPU(ternary_unpack, TernaryUnpackArgs)
void ternary_unpack_cuda(const TernaryUnpackArgs& args, int device, void* stream);

}  // namespace effvlm
