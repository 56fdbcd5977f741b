// effvlm._core: the module, and the bindings of all ops but the token ops.
#include <algorithm>
#include <array>

#include "bindings.h"
#include "core/cpu/isa.h"
#include "core/cpu/parallel.h"
#include "core/gap_planes_pack.h"
#include "ops/grouped_linear.h"
#include "ops/moe_ffn.h"
#include "ops/moe_route.h"
#include "ops/ternary_matmul.h"
#include "ops/ternary_unpack.h"

using namespace effvlm;

namespace {

py::object owned(PyObject* made) {
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

// The arguments with a Raw (bindings.h) in place of each tensor, and their kinds, hashable: of tensors shape,
// strides, dtype and device, of others type and value. `codes` of dtypes; −1 for others, which no op takes. Here because a decode
// step passes ten tensors, and the interpreter takes twice as long to ask each its five questions.
py::tuple describe(const py::sequence& args, const py::type& tensor, const py::dict& codes) {
  static PyObject *const address = PyUnicode_InternFromString("data_ptr"), *const shape = PyUnicode_InternFromString("shape"),
                         *const stride = PyUnicode_InternFromString("stride"), *const dtype = PyUnicode_InternFromString("dtype"),
                         *const device = PyUnicode_InternFromString("device"),
                         *const number = PyUnicode_InternFromString("get_device");
  const std::size_t count = py::len(args);
  py::list raws(count);
  py::tuple kinds(count);
  for (std::size_t i = 0; i < count; ++i) {
    const py::object x = args[i];
    if (!PyObject_TypeCheck(x.ptr(), reinterpret_cast<PyTypeObject*>(tensor.ptr()))) {
      raws[i] = x;
      kinds[i] = py::make_tuple(py::type::of(x), py::isinstance<py::list>(x) ? py::tuple(x) : x);
      continue;
    }
    const auto call = [&](PyObject* method) { return owned(PyObject_CallMethodNoArgs(x.ptr(), method)); };
    const auto read = [&](PyObject* attribute) { return owned(PyObject_GetAttr(x.ptr(), attribute)); };
    PyObject* const known = PyDict_GetItemWithError(codes.ptr(), read(dtype).ptr());
    const py::object code = known ? py::reinterpret_borrow<py::object>(known) : py::int_(-1);
    const py::object all[] = {call(address), read(shape), call(stride), code, call(number)};
    raws[i] = owned(PyTuple_Pack(5, all[0].ptr(), all[1].ptr(), all[2].ptr(), all[3].ptr(), all[4].ptr()));
    kinds[i] = py::make_tuple(all[1], all[2], all[3], read(device));  // numbers do not tell the CPU from the meta device
  }
  return py::make_tuple(raws, kinds);
}

MoeFfnArgs moe_args(const Raw& x_raw, const Raw& ids_raw, const Raw& weight_raw, const Raw& up_raw, const Optional& up_bias_raw,
                    const Raw& down_raw, const Optional& down_bias_raw, const std::string& act, bool gated, bool interleaved,
                    double alpha, double limit, double offset, const Place& place) {
  constexpr std::array<const char*, 6> kActs = {"silu", "gelu", "gelu_tanh", "relu", "relu2", "identity"};
  const View x = view(x_raw), ids = view(ids_raw), weight = view(weight_raw), up = view(up_raw), up_bias = view(up_bias_raw);
  const View down = view(down_raw), down_bias = view(down_bias_raw);
  const auto found = std::find(kActs.begin(), kActs.end(), act);
  EFFVLM_CHECK(found != kActs.end(), "moe_ffn: unknown activation '%s'", act.c_str());
  MoeFfnArgs a{};
  a.T = x.shape[0], a.K = ids.shape[1], a.E = up.shape[0], a.H = x.shape[1], a.I = down.shape[2], a.O = down.shape[1];
  a.dtype = x.dtype, a.x = x.data, a.x_stride_t = x.stride[0], a.x_stride_h = x.stride[1];
  a.ids = ids.as<std::int64_t>(), a.ids_stride_t = ids.stride[0], a.ids_stride_k = ids.stride[1];
  a.weight = weight.as<float>(), a.weight_stride_t = weight.stride[0], a.weight_stride_k = weight.stride[1];
  a.up = up.data, a.up_stride_e = up.stride[0], a.up_stride_r = up.stride[1], a.up_stride_h = up.stride[2];
  a.up_bias = up_bias.data, a.up_bias_stride_e = up_bias.stride[0], a.up_bias_stride_r = up_bias.stride[1];
  a.down = down.data, a.down_stride_e = down.stride[0], a.down_stride_o = down.stride[1], a.down_stride_i = down.stride[2];
  a.down_bias = down_bias.data, a.down_bias_stride_e = down_bias.stride[0], a.down_bias_stride_o = down_bias.stride[1];
  a.act = static_cast<Act>(found - kActs.begin()), a.gated = gated, a.interleaved = interleaved;
  a.alpha = static_cast<float>(alpha), a.limit = static_cast<float>(limit), a.offset = static_cast<float>(offset);
  a.threads = std::get<2>(place);
  return a;
}

std::int64_t moe_workspace(const Raw& x, const Raw& ids, const Raw& weight, const Raw& up, const Optional& up_bias,
                           const Raw& down, const Optional& down_bias, const std::string& act, bool gated, bool interleaved,
                           double alpha, double limit, double offset, const Place& place) {
  const MoeFfnArgs a =
      moe_args(x, ids, weight, up, up_bias, down, down_bias, act, gated, interleaved, alpha, limit, offset, place);
#if EFFVLM_WITH_CUDA
  if (kEmulated || std::get<0>(place) >= 0) return moe_ffn_workspace_cuda(a);
#endif
  return MoeFfnLayout(a, multiplies_pairs(a.dtype)).bytes;
}

void moe(const Raw& x, const Raw& ids, const Raw& weight, const Raw& up, const Optional& up_bias, const Raw& down,
         const Optional& down_bias, const std::string& act, bool gated, bool interleaved, double alpha, double limit,
         double offset, const Raw& out, const Raw& workspace, const Place& place) {
  MoeFfnArgs a = moe_args(x, ids, weight, up, up_bias, down, down_bias, act, gated, interleaved, alpha, limit, offset, place);
  a.out = view(out).data, a.workspace = view(workspace).data, a.workspace_bytes = view(workspace).shape[0];
  run(a, place, moe_ffn_cpu, EFFVLM_CUDA_FORM(moe_ffn));
}

GroupedLinearArgs linear_args(const Raw& x_raw, const Raw& ids_raw, const Raw& weight_raw, const Optional& bias_raw,
                              const Place& place) {
  const View x = view(x_raw), ids = view(ids_raw), weight = view(weight_raw), bias = view(bias_raw);
  GroupedLinearArgs a{};
  a.T = x.shape[0], a.E = weight.shape[0], a.C = x.shape[1], a.O = weight.shape[1];
  a.dtype = x.dtype, a.x = x.data, a.x_stride_t = x.stride[0], a.x_stride_c = x.stride[1];
  a.ids = ids.as<std::int64_t>(), a.ids_stride = ids.stride[0];
  a.weight = weight.data, a.weight_stride_e = weight.stride[0], a.weight_stride_o = weight.stride[1];
  a.weight_stride_c = weight.stride[2], a.bias = bias.data, a.bias_stride_e = bias.stride[0], a.bias_stride_o = bias.stride[1];
  a.threads = std::get<2>(place);
  return a;
}

std::int64_t linear_workspace(const Raw& x, const Raw& ids, const Raw& weight, const Optional& bias, const Place& place) {
  const GroupedLinearArgs a = linear_args(x, ids, weight, bias, place);
#if EFFVLM_WITH_CUDA
  if (kEmulated || std::get<0>(place) >= 0) return grouped_linear_workspace_cuda(a);
#endif
  return GroupedLinearLayout(a, multiplies_pairs(a.dtype)).bytes;
}

void linear(const Raw& x, const Raw& ids, const Raw& weight, const Optional& bias, const Raw& out, const Raw& workspace,
            const Place& place) {
  GroupedLinearArgs a = linear_args(x, ids, weight, bias, place);
  a.out = view(out).data, a.workspace = view(workspace).data, a.workspace_bytes = view(workspace).shape[0];
  run(a, place, grouped_linear_cpu, EFFVLM_CUDA_FORM(grouped_linear));
}

MoeRouteArgs route_args(const Raw& logits_raw, std::int64_t K, const std::string& score, const Optional& bias_raw,
                        const Optional& mask_raw, bool renormalize, double scale, std::int64_t groups, std::int64_t top_groups,
                        std::optional<std::int64_t> capacity, bool by_expert, const Place& place) {
  const View logits = view(logits_raw), bias = view(bias_raw), mask = view(mask_raw);
  MoeRouteArgs a{};
  a.T = logits.shape[0], a.E = logits.shape[1], a.K = K, a.dtype = logits.dtype;
  a.logits = logits.data, a.logits_stride_t = logits.stride[0], a.logits_stride_e = logits.stride[1];
  a.bias = bias.as<float>(), a.bias_stride = bias.stride[0], a.mask = mask.as<bool>(), a.mask_stride = mask.stride[0];
  a.score = score == "softmax" ? Score::softmax : score == "sigmoid" ? Score::sigmoid : Score::none;
  a.renormalize = renormalize, a.by_expert = by_expert, a.scale = static_cast<float>(scale);
  a.groups = groups, a.top_groups = top_groups, a.capacity = capacity.value_or(-1), a.threads = std::get<2>(place);
  return a;
}

std::int64_t route_workspace(const Raw& logits, std::int64_t K, const std::string& score, const Optional& bias,
                             const Optional& mask, bool renormalize, double scale, std::int64_t groups, std::int64_t top_groups,
                             std::optional<std::int64_t> capacity, bool by_expert, const Place& place) {
  const MoeRouteArgs a =
      route_args(logits, K, score, bias, mask, renormalize, scale, groups, top_groups, capacity, by_expert, place);
#if EFFVLM_WITH_CUDA
  if (kEmulated || std::get<0>(place) >= 0) return moe_route_workspace_cuda(a);
#endif
  return MoeRouteLayout(a).bytes;
}

void route(const Raw& logits, std::int64_t K, const std::string& score, const Optional& bias, const Optional& mask,
           bool renormalize, double scale, std::int64_t groups, std::int64_t top_groups, std::optional<std::int64_t> capacity,
           bool by_expert, const Raw& weight, const Raw& ids, const Raw& workspace, const Place& place) {
  MoeRouteArgs a = route_args(logits, K, score, bias, mask, renormalize, scale, groups, top_groups, capacity, by_expert, place);
  a.weight = view(weight).as<float>(), a.ids = view(ids).as<std::int64_t>(), a.workspace = view(workspace).data;
  run(a, place, moe_route_cpu, EFFVLM_CUDA_FORM(moe_route));
}

// ---- gap planes: one stack of matrices as (data, tiles, base) ----

GapPlanes planes_of(const Raw& data, const Raw& tiles, const Raw& base, std::int64_t E, std::int64_t R, std::int64_t C,
                    std::int64_t levels) {
  const View d = view(data), t = view(tiles), b = view(base);
  const GapPlanes w{
      E, R, C, static_cast<int>(levels), d.as<std::uint32_t>(), d.shape[0], t.as<std::uint32_t>(), b.as<std::uint32_t>()};
  EFFVLM_CHECK(t.shape[0] == E && t.shape[1] == blocks_of(w) && t.shape[2] == strips_of(w.C) && t.shape[3] == 2 &&
                   b.shape[0] == E * blocks_of(w) * groups_of(w) + 1 && d.shape[0] >= kDataPadding,
               "ternary: the tensors do not belong to %lld matrices of %lld × %lld", static_cast<long long>(E),
               static_cast<long long>(R), static_cast<long long>(C));
  return w;
}

std::int64_t planes_measure(const Raw& weights_raw, std::int64_t levels, const Raw& tiles, const Raw& base, int threads) {
  const View weights = view(weights_raw);
  const GapPlanes w{weights.shape[0], weights.shape[1], weights.shape[2], static_cast<int>(levels), nullptr, 0, nullptr, nullptr};
  auto *to_tiles = view(tiles).as<std::uint32_t>(), *to_base = view(base).as<std::uint32_t>();
  py::gil_scoped_release release;
  return gap_planes_measure(weights.as<std::int8_t>(), w, to_tiles, to_base, threads);
}

void planes_write(const Raw& weights_raw, std::int64_t levels, const Raw& data, const Raw& tiles, const Raw& base, int threads) {
  const View weights = view(weights_raw);
  const GapPlanes w = planes_of(data, tiles, base, weights.shape[0], weights.shape[1], weights.shape[2], levels);
  auto* to_data = view(data).as<std::uint32_t>();
  py::gil_scoped_release release;
  gap_planes_write(weights.as<std::int8_t>(), w, to_data, threads);
}

void planes_validate(const Raw& data, const Raw& tiles, const Raw& base, std::int64_t E, std::int64_t R, std::int64_t C,
                     std::int64_t levels, std::int64_t first, std::int64_t last, int threads) {
  const GapPlanes w = planes_of(data, tiles, base, E, R, C, levels);
  EFFVLM_CHECK(0 <= first && first <= last && last <= E, "ternary: expected matrices in 0 … %lld", static_cast<long long>(E));
  py::gil_scoped_release release;
  gap_planes_validate(w, first, last, threads);
}

std::int64_t unpack_workspace(const Raw&, const Raw&, const Raw&, std::int64_t, std::int64_t, std::int64_t, const Place&) {
  return 0;
}

void unpack(const Raw& data, const Raw& tiles, const Raw& base, std::int64_t R, std::int64_t C, std::int64_t levels,
            const Raw& out, const Raw&, const Place& place) {
  const GapPlanes w = planes_of(data, tiles, base, view(tiles).shape[0], R, C, levels);
  run(TernaryUnpackArgs{w, view(out).as<std::int8_t>(), std::get<2>(place)}, place, ternary_unpack_cpu,
      EFFVLM_CUDA_FORM(ternary_unpack));
}

TernaryMatmulArgs ternary_args(const Raw& x_raw, const Raw& ids_raw, const Raw& data, const Raw& tiles, const Raw& base,
                               const Raw& scale_raw, std::int64_t levels, bool int8, const Place& place) {
  const View x = view(x_raw), ids = view(ids_raw), scale = view(scale_raw);
  TernaryMatmulArgs a{};
  a.T = x.shape[0], a.K = ids.shape[1], a.dtype = x.dtype, a.int8 = int8;
  a.x = x.data, a.x_stride_t = x.stride[0], a.x_stride_c = x.stride[1];
  a.ids = ids.as<std::int64_t>(), a.ids_stride_t = ids.stride[0], a.ids_stride_k = ids.stride[1];
  a.weight = planes_of(data, tiles, base, scale.shape[0], scale.shape[1], x.shape[1], levels);
  a.scale = scale.as<bf16>(), a.scale_stride_e = scale.stride[0], a.scale_stride_r = scale.stride[1];
  a.threads = std::get<2>(place);
  return a;
}

std::int64_t ternary_workspace(const Raw& x, const Raw& ids, const Raw& data, const Raw& tiles, const Raw& base, const Raw& scale,
                               std::int64_t levels, bool int8, const Place& place) {
  const TernaryMatmulArgs a = ternary_args(x, ids, data, tiles, base, scale, levels, int8, place);
#if EFFVLM_WITH_CUDA
  if (kEmulated || std::get<0>(place) >= 0) return ternary_matmul_workspace_cuda(a);
#endif
  return TernaryMatmulLayout(a).bytes;
}

void ternary(const Raw& x, const Raw& ids, const Raw& data, const Raw& tiles, const Raw& base, const Raw& scale,
             std::int64_t levels, bool int8, const Raw& out, const Raw& workspace, const Place& place) {
  TernaryMatmulArgs a = ternary_args(x, ids, data, tiles, base, scale, levels, int8, place);
  a.out = view(out).data, a.workspace = view(workspace).data, a.workspace_bytes = view(workspace).shape[0];
  run(a, place, ternary_matmul_cpu, EFFVLM_CUDA_FORM(ternary_matmul));
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "effvlm's compiled kernels. Use the functions of effvlm, which check their arguments.";
  isa();  // a wrong EFFVLM_CPU_ISA is an error at import, not at the first op
  m.def("set_cpu_isa", [](std::optional<std::string> name) { set_isa(name ? name->c_str() : nullptr); });
  m.def("cpu_isa", [] { return isa_name(isa()); });
  m.def("cpu_isas", &isa_supported);
  m.def("openmp_runtime", [] { return parallel_runtime() != nullptr; });
#if EFFVLM_WITH_CUDA
  m.attr("cuda_version") = EFFVLM_CUDA_VERSION;
  m.attr("cuda_archs") = EFFVLM_CUDA_ARCHS;
#else
  m.attr("cuda_version") = "";
  m.attr("cuda_archs") = "";
#endif
  m.def("describe", &describe);
  m.def("grouped_linear_workspace", &linear_workspace);
  m.def("grouped_linear", &linear);
  m.def("moe_ffn_workspace", &moe_workspace);
  m.def("moe_ffn", &moe);
  m.def("moe_route_workspace", &route_workspace);
  m.def("moe_route", &route);
  m.def("gap_planes_measure", &planes_measure);
  m.def("gap_planes_write", &planes_write);
  m.def("gap_planes_validate", &planes_validate);
  m.def("ternary_matmul_workspace", &ternary_workspace);
  m.def("ternary_matmul", &ternary);
  m.def("ternary_unpack_workspace", &unpack_workspace);
  m.def("ternary_unpack", &unpack);
  bind_scans(m);
  bind_tokens(m);
}
