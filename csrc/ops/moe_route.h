// moe_route — which experts a token goes to, and with what weight, from the router's logits
//
// Math       score[t,e] = softmax over e, sigmoid, or the logit itself;   choice = score + bias[e] (without bias: the same order)
//            by token:  ids[t,:] = the K best choices, best first, among the experts of the top_groups best groups; a group
//            counts
//                       the sum of its two best choices with a bias (DeepSeek-V3), its best one without (DeepSeek-V2)
//            by expert: each expert takes its `capacity` tokens of highest score; ids[t,:] = the K best of those that took t
//            weight[t,k] = scale · score[t,ids[t,k]], divided by the sum of the K scores + 1e-20 when renormalised
// Shapes     logits (T,E) · bias (E) f32 or absent · mask (T) bool or absent → weight (T,K) f32 · ids (T,K) i64
// Layout     any strides; outputs contiguous
// Types      logits f32, f16 or bf16; everything else in f32
// Edges      a tie: the lower expert, the earlier token; NaN is above every number; choices that are not taken: id −1, weight 0
//            (a token with mask false, one over an expert's capacity, by expert: one that fewer than K experts took); by token,
//            an expert takes first choices before second ones and earlier tokens before later ones; renormalised before that
// Order      as written; same ids for any thread count
// Parallel   CPU: tokens over threads, then experts over threads where they choose.  CUDA: a warp per token, a block per expert
// Cost       reads T·E·e, writes 12·T·K bytes; T·E exponentials; extra memory 16·E + 8·K per thread (CPU) and, by expert, 4·T·E
//            (CPU) or 8·T (CUDA)
// Why so     keys whose order as integers is the order wanted, ties included: selection needs no sort and no special case
// Not for    scores of several experts that depend on each other in other ways; more than 32 groups
#pragma once
#include <cstdint>
#include <cstring>

#include "core/cpu/isa.h"
#include "core/dtype.h"
#include "core/workspace.h"

namespace effvlm {

enum class Score : int { softmax = 0, sigmoid, none };

struct MoeRouteArgs {
  std::int64_t T, E, K;
  Dtype dtype;         // of logits
  const void* logits;  // (T,E)
  std::int64_t logits_stride_t, logits_stride_e;
  const float* bias;  // (E) or null
  std::int64_t bias_stride;
  const bool* mask;  // (T) or null: all true
  std::int64_t mask_stride;
  Score score;
  bool renormalize, by_expert;
  float scale;
  std::int64_t groups, top_groups;
  std::int64_t capacity;  // tokens per expert; −1: no limit
  float* weight;          // (T,K)
  std::int64_t* ids;      // (T,K)
  void* workspace;        // MoeRouteLayout(args).bytes, or moe_route_workspace_cuda(args)
  int threads;            // CPU only
};

namespace {  // internal linkage: compiled once per ISA level, and the linker must not merge the copies

constexpr std::int64_t kMaxGroups = 32;

inline std::int64_t padded_experts(std::int64_t E) { return (E + 15) / 16 * 16; }

// CPU workspace, offsets in bytes: i64 tokens taken (E), i64 and u32 limits (E), f32 scores (T,E); per thread: f32 and u32 (4·E),
// i64 (K), u32 (T).
struct MoeRouteLayout : Workspace {
  std::int64_t taken, last, least, scores, values, chosen, column;

  explicit MoeRouteLayout(const MoeRouteArgs& a) {
    taken = take(8 * a.E), last = take(8 * a.E), least = take(4 * a.E);
    scores = take(a.by_expert ? 4 * a.T * a.E : 0);
    values = take(4 * a.threads * 4 * padded_experts(a.E)), chosen = take(8 * a.threads * a.K);
    column = take(a.by_expert ? 4 * a.threads * a.T : 0);
  }
};

}  // namespace

std::int64_t moe_route_workspace_cuda(const MoeRouteArgs& args);

EFFVLM_DECLARE_CPU(moe_route, MoeRouteArgs)
void moe_route_cuda(const MoeRouteArgs& args, int device, void* stream);

}  // namespace effvlm
