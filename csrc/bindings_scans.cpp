// The bindings of the scans.
#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "bindings.h"
#include "ops/causal_conv1d.h"
#include "ops/chunk_scan.h"
#include "ops/selective_scan.h"
#include "ops/state_update.h"

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

void conv1d(const Raw& x_raw, const Raw& weight_raw, const Optional& bias_raw, const Optional& state_raw,
            const Optional& cu_seqlens_raw, bool silu, const Raw& out_raw, const Place& place) {
  const View x = view(x_raw), weight = view(weight_raw), bias = view(bias_raw), state = view(state_raw);
  const View cu_seqlens = view(cu_seqlens_raw), out = view(out_raw);
  CausalConv1dArgs a{};
  a.B = x.shape[0], a.D = x.shape[1], a.L = x.shape[2], a.W = weight.shape[1];
  a.S = cu_seqlens_raw ? cu_seqlens.shape[0] - 1 : a.B, a.M = state.shape[2], a.silu = silu;
  a.dtype = x.dtype, a.x = x.data;
  a.x_stride_b = x.stride[0], a.x_stride_d = x.stride[1], a.x_stride_l = x.stride[2];
  a.weight_dtype = weight.dtype, a.weight = weight.data;
  a.weight_stride_d = weight.stride[0], a.weight_stride_w = weight.stride[1];
  a.bias_dtype = bias.dtype, a.bias = bias.data, a.bias_stride = bias.stride[0];
  a.state_dtype = state.dtype, a.state = state.data;
  a.state_stride_s = state.stride[0], a.state_stride_d = state.stride[1], a.state_stride_m = state.stride[2];
  a.cu_seqlens = cu_seqlens.as<std::int32_t>(), a.cu_seqlens_stride = cu_seqlens.stride[0];
  a.out = out.data, a.out_stride_b = out.stride[0], a.out_stride_d = out.stride[1], a.out_stride_l = out.stride[2];
  a.threads = std::get<2>(place);
  run(a, place, causal_conv1d_cpu, EFFVLM_CUDA_FORM(causal_conv1d));
}

// The strides of a view along "shpn" (or whichever letters), of which it has those in `axes`, in order; 0 along the others.
std::array<std::int64_t, 4> strides_of(const View& v, const std::string& axes, const char* letters) {
  std::array<std::int64_t, 4> all{};
  for (std::size_t d = 0; d < axes.size(); ++d) all[std::strchr(letters, axes[d]) - letters] = v.stride[d];
  return all;
}

void update(const Raw& state_raw, const Raw& x_raw, const Raw& dt_raw, const Optional& A_raw, const Raw& B_raw, const Raw& C_raw,
            const Optional& D_raw, const Optional& z_raw, const Optional& dt_bias_raw, const Optional& beta_raw, bool dt_softplus,
            bool l2norm, double scale, const Raw& out_raw, const Place& place) {
  static const float one = 1;
  const View state = view(state_raw), x = view(x_raw), dt = view(dt_raw), A = view(A_raw), B = view(B_raw), C = view(C_raw);
  const View D = view(D_raw), z = view(z_raw), dt_bias = view(dt_bias_raw), beta = view(beta_raw);
  // Without heads the state is (S,P,N), and all that has h or g lacks it.
  const bool heads = state.rank == 4;
  const std::string rows = heads ? "hp" : "p", groups = heads ? "sgn" : "sn";
  const std::string decay = dt.rank == state.rank      ? "s" + rows + "n"
                            : beta_raw && dt.rank == 2 ? "sh"
                            : beta_raw                 ? "shn"
                                                       : "s" + rows;
  const std::string bias = dt_bias.rank == state.rank - 1 ? rows + "n" : rows;
  StateUpdateArgs a{};
  a.S = state.shape[0], a.H = heads ? state.shape[1] : 1, a.P = x.shape[x.rank - 1], a.N = state.shape[state.rank - 1];
  a.G = heads ? B.shape[1] : 1;
  a.dt_softplus = dt_softplus, a.l2norm = l2norm, a.scale = static_cast<float>(scale);
  a.state_dtype = state.dtype, a.dtype = x.dtype, a.state = state.data, a.x = x.data, a.B = B.data, a.C = C.data, a.z = z.data;
  a.dt_dtype = dt.dtype, a.dt = dt.data, a.D_dtype = D.dtype, a.D = D.data, a.dt_bias_dtype = dt_bias.dtype;
  a.dt_bias = dt_bias.data, a.beta_dtype = beta.dtype, a.beta = beta.data;
  const bool cuda = kEmulated || std::get<0>(place) >= 0;
  a.A_dtype = A.dtype, a.A = A_raw || cuda ? A.data : const_cast<float*>(&one);
  const auto in = [](const View& v, const std::string& axes, const char* letters, auto&... to) {
    const auto all = strides_of(v, axes, letters);
    std::size_t i = 0;
    ((to = all[i++]), ...);
  };
  in(state, "s" + rows + "n", "shpn", a.state_stride_s, a.state_stride_h, a.state_stride_p, a.state_stride_n);
  in(dt, decay, "shpn", a.dt_stride_s, a.dt_stride_h, a.dt_stride_p, a.dt_stride_n);
  in(x, "s" + rows, "shp", a.x_stride_s, a.x_stride_h, a.x_stride_p);
  in(z, z_raw ? "s" + rows : "", "shp", a.z_stride_s, a.z_stride_h, a.z_stride_p);
  in(A, A_raw ? rows + "n" : "", "hpn", a.A_stride_h, a.A_stride_p, a.A_stride_n);
  in(dt_bias, dt_bias_raw ? bias : "", "hpn", a.dt_bias_stride_h, a.dt_bias_stride_p, a.dt_bias_stride_n);
  in(B, groups, "sgn", a.B_stride_s, a.B_stride_g, a.B_stride_n);
  in(C, groups, "sgn", a.C_stride_s, a.C_stride_g, a.C_stride_n);
  in(D, D_raw ? rows : "", "hp", a.D_stride_h, a.D_stride_p);
  in(beta, beta_raw ? "sh" : "", "sh", a.beta_stride_s, a.beta_stride_h);
  a.out = view(out_raw).data, a.threads = std::get<2>(place);
  run(a, place, state_update_cpu, EFFVLM_CUDA_FORM(state_update));
}

}  // namespace

void bind_scans(py::module_& m) {
  m.def("chunk_scan_workspace", &chunk_workspace);
  m.def("chunk_scan", &chunk);
  m.def("selective_scan_workspace", &selective_workspace);
  m.def("selective_scan", &selective);
  m.def("causal_conv1d", &conv1d);
  m.def("state_update", &update);
}

}  // namespace effvlm
