// The bindings of the scans.
#include <algorithm>

#include "bindings.h"
#include "ops/chunk_scan.h"

namespace effvlm {
namespace {

template <std::size_t rank>
void strides(const View& from, std::int64_t (&to)[rank]) {
  std::copy_n(from.stride, rank, to);
}

ChunkScanArgs chunk_args(const Raw& q_raw, const Raw& k_raw, const Raw& v_raw, const Raw& decay_raw, const Optional& gain_raw,
                         const Optional& beta_raw, const Optional& skip_raw, const Optional& initial_raw,
                         const Optional& cu_seqlens_raw, double scale, bool l2norm, const Place& place) {
  const View q = view(q_raw), k = view(k_raw), v = view(v_raw), decay = view(decay_raw), gain = view(gain_raw),
             beta = view(beta_raw), skip = view(skip_raw), initial = view(initial_raw), cu_seqlens = view(cu_seqlens_raw);
  ChunkScanArgs a{};
  a.B = v.shape[0], a.L = v.shape[1], a.G = q.shape[2], a.H = v.shape[2], a.K = q.shape[3], a.V = v.shape[3];
  a.S = cu_seqlens_raw ? cu_seqlens.shape[0] - 1 : a.B, a.dtype = v.dtype;
  a.q = q.data, a.k = k.data, a.v = v.data, a.log_decay = decay.as<float>(), a.per_channel = decay.rank == 4;
  strides(q, a.q_stride), strides(k, a.k_stride), strides(v, a.v_stride);
  strides(decay, a.decay_stride);  // a View's strides beyond its rank are 0
  a.gain = gain.as<float>(), a.beta = beta.as<float>(), a.skip = skip.as<float>(), a.initial_state = initial.as<float>();
  strides(gain, a.gain_stride), strides(beta, a.beta_stride), strides(initial, a.initial_stride);
  a.skip_stride = skip.stride[0], a.cu_seqlens = cu_seqlens.as<std::int32_t>();
  a.scale = static_cast<float>(scale), a.l2norm = l2norm, a.threads = std::get<2>(place);
  return a;
}

std::int64_t chunk_workspace(const Raw& q, const Raw& k, const Raw& v, const Raw& decay, const Optional& gain,
                             const Optional& beta, const Optional& skip, const Optional& initial, const Optional& cu_seqlens,
                             double scale, bool l2norm, const Place& place) {
  const ChunkScanArgs a = chunk_args(q, k, v, decay, gain, beta, skip, initial, cu_seqlens, scale, l2norm, place);
#if EFFVLM_WITH_CUDA
  if (kEmulated || std::get<0>(place) >= 0) return chunk_scan_workspace_cuda(a);
#endif
  return chunk_scan_workspace_cpu(a);
}

void chunk(const Raw& q, const Raw& k, const Raw& v, const Raw& decay, const Optional& gain, const Optional& beta,
           const Optional& skip, const Optional& initial, const Optional& cu_seqlens, double scale, bool l2norm, const Raw& out,
           const Raw& final_state, const Raw& workspace, const Place& place) {
  ChunkScanArgs a = chunk_args(q, k, v, decay, gain, beta, skip, initial, cu_seqlens, scale, l2norm, place);
  a.out = view(out).data, a.final_state = view(final_state).as<float>(), a.workspace = view(workspace).data;
  run(a, place, chunk_scan_cpu, EFFVLM_CUDA_FORM(chunk_scan));
}

}  // namespace

void bind_scans(py::module_& m) {
  m.def("chunk_scan_workspace", &chunk_workspace);
  m.def("chunk_scan", &chunk);
}

}  // namespace effvlm
