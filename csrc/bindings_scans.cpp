// The bindings of the scans.
#include "bindings.h"
#include "ops/causal_conv1d.h"
#include "ops/state_update.h"

namespace effvlm {
namespace {

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

void update(const Raw& state_raw, const Raw& x_raw, const Raw& dt_raw, const Raw& A_raw, const Raw& B_raw, const Raw& C_raw,
            const Optional& D_raw, const Optional& z_raw, const Optional& dt_bias_raw, const Optional& beta_raw, bool dt_softplus,
            bool l2norm, double scale, const Raw& out_raw, const Place& place) {
  const View state = view(state_raw), x = view(x_raw), dt = view(dt_raw), A = view(A_raw), B = view(B_raw), C = view(C_raw);
  const View D = view(D_raw), z = view(z_raw), dt_bias = view(dt_bias_raw), beta = view(beta_raw);
  StateUpdateArgs a{};
  a.S = state.shape[0], a.H = state.shape[1], a.P = state.shape[2], a.N = state.shape[3], a.G = B.shape[1];
  a.dt_softplus = dt_softplus, a.l2norm = l2norm, a.scale = static_cast<float>(scale);
  a.state_dtype = state.dtype, a.dtype = x.dtype;
  a.state = state.data, a.state_stride_s = state.stride[0], a.state_stride_h = state.stride[1];
  a.state_stride_p = state.stride[2], a.state_stride_n = state.stride[3];
  a.x = x.data, a.x_stride_s = x.stride[0], a.x_stride_h = x.stride[1], a.x_stride_p = x.stride[2];
  a.dt_dtype = dt.dtype, a.dt = dt.data, a.dt_stride_s = dt.stride[0], a.dt_stride_h = dt.stride[1];
  a.dt_stride_p = dt.stride[2], a.dt_stride_n = dt.stride[3];
  a.A_dtype = A.dtype, a.A = A.data, a.A_stride_h = A.stride[0], a.A_stride_p = A.stride[1], a.A_stride_n = A.stride[2];
  a.B = B.data, a.B_stride_s = B.stride[0], a.B_stride_g = B.stride[1], a.B_stride_n = B.stride[2];
  a.C = C.data, a.C_stride_s = C.stride[0], a.C_stride_g = C.stride[1], a.C_stride_n = C.stride[2];
  a.D_dtype = D.dtype, a.D = D.data, a.D_stride_h = D.stride[0], a.D_stride_p = D.stride[1];
  a.z = z.data, a.z_stride_s = z.stride[0], a.z_stride_h = z.stride[1], a.z_stride_p = z.stride[2];
  a.dt_bias_dtype = dt_bias.dtype, a.dt_bias = dt_bias.data, a.dt_bias_stride_h = dt_bias.stride[0];
  a.dt_bias_stride_p = dt_bias.stride[1], a.dt_bias_stride_n = dt_bias.stride[2];
  a.beta_dtype = beta.dtype, a.beta = beta.data, a.beta_stride_s = beta.stride[0], a.beta_stride_h = beta.stride[1];
  a.out = view(out_raw).data, a.threads = std::get<2>(place);
  run(a, place, state_update_cpu, EFFVLM_CUDA_FORM(state_update));
}

}  // namespace

void bind_scans(py::module_& m) {
  m.def("causal_conv1d", &conv1d);
  m.def("state_update", &update);
}

}  // namespace effvlm
