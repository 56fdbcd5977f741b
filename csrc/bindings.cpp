// effvlm._core: the only file that knows pybind11. One short block per op: name the views, fill the args struct, release
// the GIL, call. Arguments come in schema order, then outputs, workspace and place (effvlm/_library.py: _run).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "core/check.h"
#include "core/cpu/isa.h"
#include "core/cpu/parallel.h"
#include "core/view.h"
#include "ops/token_match.h"
#include "ops/token_merge.h"

namespace py = pybind11;
using namespace effvlm;

namespace {

#if defined(EFFVLM_SIMT)  // a test build: host tensors go to the CUDA kernels, compiled for the host (tests/simt)
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

using Raw = py::tuple;                               // (address, shape, strides, dtype code, device)
using Place = std::tuple<int, std::uintptr_t, int>;  // (CUDA device or -1, stream, CPU threads)

View view(const Raw& raw) {
  View v;
  const auto shape = raw[1].cast<py::tuple>(), stride = raw[2].cast<py::tuple>();
  v.rank = static_cast<int>(shape.size());
  EFFVLM_CHECK(v.rank <= kMaxRank, "expected a tensor of at most %d dimensions, got %d", kMaxRank, v.rank);
  v.data = reinterpret_cast<void*>(raw[0].cast<std::uintptr_t>());
  for (int d = 0; d < v.rank; ++d) {
    v.shape[d] = shape[d].cast<std::int64_t>();
    v.stride[d] = stride[d].cast<std::int64_t>();
  }
  v.dtype = static_cast<Dtype>(raw[3].cast<int>());
  v.device = raw[4].cast<int>();
  return v;
}

View view(const std::optional<Raw>& raw) { return raw ? view(*raw) : View{}; }

// Calls the CPU or the CUDA form of an op with the GIL released.
template <class Args, class Cuda>
void run(const Args& args, const Place& place, void (*cpu)(const Args&), [[maybe_unused]] Cuda cuda) {
  py::gil_scoped_release release;
  const auto [device, stream, threads] = place;
  if (device < 0 && !kEmulated) return cpu(args);
#if EFFVLM_WITH_CUDA
  cuda(args, device, reinterpret_cast<void*>(stream));
#else
  fail("this build has no CUDA kernels");
#endif
}

#if EFFVLM_WITH_CUDA
#define EFFVLM_CUDA_FORM(op) op##_cuda
#else
#define EFFVLM_CUDA_FORM(op) nullptr
#endif

std::int64_t match_workspace(const Raw& x_raw, std::int64_t, bool, const Place& place) {
  const View x = view(x_raw);
#if EFFVLM_WITH_CUDA
  if (kEmulated || std::get<0>(place) >= 0) return token_match_workspace_cuda(x.shape[0], x.shape[1], x.shape[2], x.dtype);
#endif
  return token_match_workspace_cpu(x.shape[0], x.shape[1], x.shape[2], x.dtype, x.stride[2] != 1, std::get<2>(place));
}

void match(const Raw& x_raw, std::int64_t r, bool cosine, const Raw& score, const Raw& partner, const Raw& group,
           const Raw& workspace, const Place& place) {
  const View x = view(x_raw);
  run(TokenMatchArgs{x.shape[0], x.shape[1], x.shape[2], r, cosine, x.dtype, x.data, x.stride[0], x.stride[1], x.stride[2],
                     view(score).as<float>(), view(partner).as<std::int32_t>(), view(group).as<std::int32_t>(),
                     view(workspace).data, view(workspace).shape[0], std::get<2>(place)},
      place, token_match_cpu, EFFVLM_CUDA_FORM(token_match));
}

std::int64_t merge_workspace(const Raw& x_raw, const Raw&, std::int64_t M, const std::optional<Raw>&, const Place&) {
  const View x = view(x_raw);
  return token_merge_workspace(x.shape[0], x.shape[1], M);
}

void merge(const Raw& x_raw, const Raw& group_raw, std::int64_t M, const std::optional<Raw>& weight_raw, const Raw& out,
           const Raw& out_weight, const Raw& workspace, const Place& place) {
  const View x = view(x_raw), group = view(group_raw), weight = view(weight_raw);
  run(TokenMergeArgs{x.shape[0], x.shape[1], M, x.shape[2], x.dtype, x.data, x.stride[0], x.stride[1], x.stride[2],
                     group.as<std::int32_t>(), group.stride[0], group.stride[1], weight.as<float>(), weight.stride[0],
                     weight.stride[1], view(out).data, view(out_weight).as<float>(), view(workspace).data, std::get<2>(place)},
      place, token_merge_cpu, EFFVLM_CUDA_FORM(token_merge));
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
  m.def("token_match_workspace", &match_workspace);
  m.def("token_match", &match);
  m.def("token_merge_workspace", &merge_workspace);
  m.def("token_merge", &merge);
}
