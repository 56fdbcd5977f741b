// The bindings of the scans.
#include "bindings.h"
#include "ops/causal_conv1d.h"

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

}  // namespace

void bind_scans(py::module_& m) { m.def("causal_conv1d", &conv1d); }

}  // namespace effvlm
