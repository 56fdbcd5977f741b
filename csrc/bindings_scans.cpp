// The bindings of the scans.
#include <algorithm>

#include "bindings.h"
#include "ops/chunk_scan.h"
#include <vector>

#include "bindings.h"
#include "ops/selective_scan.h"

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

// A view's strides by its axes: letters of "bkcl", as ScanTensor names them.
ScanTensor scan_tensor(const View& v, const char* axes) {
  ScanTensor x{v.data, v.dtype, 0, 0, 0, 0};
  for (int d = 0; d < v.rank; ++d)
    (axes[d] == 'b' ? x.stride_b : axes[d] == 'k' ? x.stride_k : axes[d] == 'c' ? x.stride_c : x.stride_l) = v.stride[d];
  return x;
}

using Paths = std::optional<std::vector<std::int64_t>>;

SelectiveScanArgs selective_args(const Raw& u, const Raw& delta, const Raw& A, const Raw& b, const Raw& c, const Optional& skip,
                                 const Optional& z, const Optional& bias, const Optional& initial, const Optional& starts,
                                 bool softplus, const Paths& paths, const Place& place) {
  const View shape = view(delta), cuts = view(starts);
  SelectiveScanArgs a{};
  a.B = shape.shape[0], a.K = shape.shape[1], a.D = shape.shape[2], a.L = shape.shape[3], a.N = view(A).shape[2];
  a.S = starts ? cuts.shape[0] - 1 : a.B;
  a.u = scan_tensor(view(u), "bcl"), a.delta = scan_tensor(shape, "bkcl"), a.a = scan_tensor(view(A), "kcl");
  a.b = scan_tensor(view(b), "bkcl"), a.c = scan_tensor(view(c), "bkcl"), a.skip = scan_tensor(view(skip), "kc");
  a.z = scan_tensor(view(z), "bcl"), a.bias = scan_tensor(view(bias), "kc"), a.initial = scan_tensor(view(initial), "bkcl");
  a.starts = cuts.as<std::int32_t>(), a.starts_stride = cuts.stride[0], a.softplus = softplus, a.in_order = !paths;
  EFFVLM_CHECK(a.K <= kScanPaths && (!paths || paths->size() == 5 * static_cast<std::size_t>(a.K)),
               "selective_scan: expected 5 numbers for each of at most %d paths", kScanPaths);
  for (std::int64_t k = 0; paths && k < a.K; ++k) {
    const std::int64_t* p = paths->data() + 5 * k;
    a.paths[k] = {p[0], p[1], p[2], p[3], p[4]};
  }
  a.threads = std::get<2>(place);
  return a;
}

std::int64_t selective_workspace(const Raw& u, const Raw& delta, const Raw& A, const Raw& b, const Raw& c, const Optional& skip,
                                 const Optional& z, const Optional& bias, const Optional& initial, const Optional& starts,
                                 bool softplus, const Paths& paths, const Place& place) {
  const SelectiveScanArgs a = selective_args(u, delta, A, b, c, skip, z, bias, initial, starts, softplus, paths, place);
#if EFFVLM_WITH_CUDA
  if (kEmulated || std::get<0>(place) >= 0) return selective_scan_workspace_cuda(a);
#endif
  return SelectiveScanLayout(a).bytes;
}

void selective(const Raw& u, const Raw& delta, const Raw& A, const Raw& b, const Raw& c, const Optional& skip, const Optional& z,
               const Optional& bias, const Optional& initial, const Optional& starts, bool softplus, const Paths& paths,
               const Raw& out, const Raw& final, const Raw& workspace, const Place& place) {
  SelectiveScanArgs a = selective_args(u, delta, A, b, c, skip, z, bias, initial, starts, softplus, paths, place);
  a.out = scan_tensor(view(out), "bcl"), a.final = scan_tensor(view(final), "bkcl"), a.workspace = view(workspace).data;
  run(a, place, selective_scan_cpu, EFFVLM_CUDA_FORM(selective_scan));
}

}  // namespace

void bind_scans(py::module_& m) {
  m.def("chunk_scan_workspace", &chunk_workspace);
  m.def("chunk_scan", &chunk);
  m.def("selective_scan_workspace", &selective_workspace);
  m.def("selective_scan", &selective);
}

}  // namespace effvlm
