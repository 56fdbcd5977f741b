// The bindings of the token ops.
#include <algorithm>
#include <array>

#include "bindings.h"
#include "ops/token_apply.h"
#include "ops/token_diverse.h"
#include "ops/token_match.h"
#include "ops/token_merge.h"
#include "ops/token_score.h"
#include "ops/token_select.h"
#include "ops/token_similarity.h"

namespace effvlm {
namespace {

std::int64_t apply_workspace(const Raw&, const Raw&, const Raw&, const Optional&, bool, const Place&) { return 0; }

void apply(const Raw& x_raw, const Raw& start_raw, const Raw& source_raw, const Optional& weight_raw, bool mean,
           const Raw& out_raw, const Raw&, const Place& place) {
  const View x = view(x_raw), start = view(start_raw), source = view(source_raw), weight = view(weight_raw), out = view(out_raw);
  run(TokenApplyArgs{x.shape[0], out.shape[0], x.shape[1], source.shape[0], mean, x.dtype, x.data, x.stride[0], x.stride[1],
                     start.as<std::int32_t>(), start.stride[0], source.as<std::int32_t>(), source.stride[0], weight.as<float>(),
                     weight.stride[0], out.data, std::get<2>(place)},
      place, token_apply_cpu, EFFVLM_CUDA_FORM(token_apply));
}

TokenDiverseArgs diverse_args(const Raw& x_raw, std::int64_t k, const Optional& relevance_raw, bool dpp, const Place& place) {
  const View x = view(x_raw), relevance = view(relevance_raw);
  return {x.shape[0],
          x.shape[1],
          x.shape[2],
          k,
          dpp,
          x.dtype,
          x.data,
          x.stride[0],
          x.stride[1],
          x.stride[2],
          relevance.as<float>(),
          relevance.stride[0],
          relevance.stride[1],
          nullptr,
          nullptr,
          std::get<2>(place)};
}

std::int64_t diverse_workspace(const Raw& x, std::int64_t k, const Optional& relevance, bool dpp, const Place& place) {
  const TokenDiverseArgs args = diverse_args(x, k, relevance, dpp, place);
#if EFFVLM_WITH_CUDA
  if (kEmulated || std::get<0>(place) >= 0) return token_diverse_workspace_cuda(args);
#endif
  return TokenDiverseLayout(args).bytes;
}

void diverse(const Raw& x, std::int64_t k, const Optional& relevance, bool dpp, const Raw& out, const Raw& workspace,
             const Place& place) {
  TokenDiverseArgs args = diverse_args(x, k, relevance, dpp, place);
  args.out = view(out).as<std::int32_t>(), args.workspace = view(workspace).data;
  run(args, place, token_diverse_cpu, EFFVLM_CUDA_FORM(token_diverse));
}

TokenMatchArgs match_args(const Raw& x_raw, std::int64_t r, bool cosine, const Optional& role_raw, const Place& place) {
  const View x = view(x_raw), role = view(role_raw);
  TokenMatchArgs args{};
  args.B = x.shape[0], args.N = x.shape[1], args.C = x.shape[2], args.r = r, args.cosine = cosine, args.dtype = x.dtype;
  args.x = x.data, args.x_stride_b = x.stride[0], args.x_stride_n = x.stride[1], args.x_stride_c = x.stride[2];
  args.role = role.as<std::uint8_t>(), args.role_stride_b = role.stride[0], args.role_stride_n = role.stride[1];
  args.threads = std::get<2>(place);
  return args;
}

std::int64_t match_workspace(const Raw& x, std::int64_t r, bool cosine, const Optional& role, const Place& place) {
  const TokenMatchArgs args = match_args(x, r, cosine, role, place);
#if EFFVLM_WITH_CUDA
  if (kEmulated || std::get<0>(place) >= 0) return token_match_workspace_cuda(args);
#endif
  return TokenMatchLayout(args).bytes;
}

void match(const Raw& x, std::int64_t r, bool cosine, const Optional& role, const Raw& score, const Raw& partner,
           const Raw& group, const Raw& workspace, const Place& place) {
  TokenMatchArgs args = match_args(x, r, cosine, role, place);
  args.score = view(score).as<float>(), args.partner = view(partner).as<std::int32_t>();
  args.group = view(group).as<std::int32_t>(), args.workspace = view(workspace).data;
  run(args, place, token_match_cpu, EFFVLM_CUDA_FORM(token_match));
}

std::int64_t merge_workspace(const Raw& x_raw, const Raw&, std::int64_t M, const Optional&, const Place&) {
  const View x = view(x_raw);
  return token_merge_workspace(x.shape[0], x.shape[1], M);
}

void merge(const Raw& x_raw, const Raw& group_raw, std::int64_t M, const Optional& weight_raw, const Raw& out,
           const Raw& out_weight, const Raw& workspace, const Place& place) {
  const View x = view(x_raw), group = view(group_raw), weight = view(weight_raw);
  run(TokenMergeArgs{x.shape[0], x.shape[1], M, x.shape[2], x.dtype, x.data, x.stride[0], x.stride[1], x.stride[2],
                     group.as<std::int32_t>(), group.stride[0], group.stride[1], weight.as<float>(), weight.stride[0],
                     weight.stride[1], view(out).data, view(out_weight).as<float>(), view(workspace).data, std::get<2>(place)},
      place, token_merge_cpu, EFFVLM_CUDA_FORM(token_merge));
}

SelectRule select_rule(const std::string& name) {
  constexpr std::array<const char*, 4> kRules = {"top", "above", "iqr", "top_p"};
  const auto found = std::find(kRules.begin(), kRules.end(), name);
  EFFVLM_CHECK(found != kRules.end(), "token_select: unknown rule '%s'", name.c_str());
  return static_cast<SelectRule>(found - kRules.begin());
}

std::int64_t select_workspace(const Raw& score, const Raw&, const Raw&, const std::string& rule, const Place&) {
  return SelectLayout(view(score).shape[0], select_rule(rule)).bytes;
}

void select(const Raw& score_raw, const Raw& start_raw, const Raw& limit_raw, const std::string& rule, const Raw& kept,
            const Raw& count, const Raw& workspace, const Place& place) {
  const View score = view(score_raw), start = view(start_raw), limit = view(limit_raw);
  run(TokenSelectArgs{score.shape[0], limit.shape[0], select_rule(rule), score.as<float>(), score.stride[0],
                      start.as<std::int32_t>(), start.stride[0], limit.as<float>(), limit.stride[0], view(kept).as<bool>(),
                      view(count).as<std::int32_t>(), view(workspace).data, std::get<2>(place)},
      place, token_select_cpu, EFFVLM_CUDA_FORM(token_select));
}

std::int64_t similarity_workspace(const Raw&, const Raw&, const Place&) { return 0; }

void similarity(const Raw& a_raw, const Raw& b_raw, const Raw& out, const Raw&, const Place& place) {
  const View a = view(a_raw), b = view(b_raw);
  run(TokenSimilarityArgs{a.shape[0], a.shape[1], a.dtype, a.data, a.stride[0], a.stride[1], b.data, b.stride[0], b.stride[1],
                          view(out).as<float>(), std::get<2>(place)},
      place, token_similarity_cpu, EFFVLM_CUDA_FORM(token_similarity));
}

TokenScoreArgs score_args(const Raw& query_raw, const Raw& key_raw, const Optional& lse_raw, const Optional& weight_raw,
                          const Optional& start_raw, bool causal, double scale, const std::string& heads, const Place& place) {
  constexpr std::array<const char*, 4> kHeads = {"none", "mean", "sum", "max"};
  const View query = view(query_raw), key = view(key_raw), lse = view(lse_raw), weight = view(weight_raw),
             start = view(start_raw);
  const auto found = std::find(kHeads.begin(), kHeads.end(), heads);
  EFFVLM_CHECK(found != kHeads.end(), "token_score: unknown heads '%s'", heads.c_str());
  TokenScoreArgs a{};
  a.B = query.shape[0], a.H = query.shape[1], a.G = key.shape[1], a.L = query.shape[2], a.S = key.shape[2], a.D = query.shape[3];
  a.dtype = query.dtype, a.query = query.data, a.key = key.data;
  a.query_stride_b = query.stride[0], a.query_stride_h = query.stride[1], a.query_stride_l = query.stride[2];
  a.query_stride_d = query.stride[3];
  a.key_stride_b = key.stride[0], a.key_stride_g = key.stride[1], a.key_stride_s = key.stride[2], a.key_stride_d = key.stride[3];
  a.lse = lse.as<float>(), a.lse_stride_b = lse.stride[0], a.lse_stride_h = lse.stride[1], a.lse_stride_l = lse.stride[2];
  a.weight = weight.as<float>(), a.weight_stride_b = weight.stride[0], a.weight_stride_l = weight.stride[1];
  a.start = start.as<std::int32_t>(), a.start_stride = start.stride[0], a.T = start_raw ? start.shape[0] - 1 : 0;
  a.causal = causal, a.scale = static_cast<float>(scale), a.heads = static_cast<ScoreHeads>(found - kHeads.begin());
  a.threads = std::get<2>(place);
  return a;
}

std::int64_t score_workspace(const Raw& query, const Raw& key, const Optional& lse, const Optional& weight, const Optional& start,
                             bool causal, double scale, const std::string& heads, const Place& place) {
  return TokenScoreLayout(score_args(query, key, lse, weight, start, causal, scale, heads, place)).bytes;
}

void score(const Raw& query, const Raw& key, const Optional& lse, const Optional& weight, const Optional& start, bool causal,
           double scale, const std::string& heads, const Raw& out, const Raw& workspace, const Place& place) {
  TokenScoreArgs a = score_args(query, key, lse, weight, start, causal, scale, heads, place);
  a.out = view(out).as<float>(), a.workspace = view(workspace).data;
  run(a, place, token_score_cpu, EFFVLM_CUDA_FORM(token_score));
}

}  // namespace

void bind_tokens(py::module_& m) {
  m.def("token_apply_workspace", &apply_workspace);
  m.def("token_apply", &apply);
  m.def("token_diverse_workspace", &diverse_workspace);
  m.def("token_diverse", &diverse);
  m.def("token_match_workspace", &match_workspace);
  m.def("token_match", &match);
  m.def("token_merge_workspace", &merge_workspace);
  m.def("token_merge", &merge);
  m.def("token_select_workspace", &select_workspace);
  m.def("token_select", &select);
  m.def("token_similarity_workspace", &similarity_workspace);
  m.def("token_similarity", &similarity);
  m.def("token_score_workspace", &score_workspace);
  m.def("token_score", &score);
}

}  // namespace effvlm
