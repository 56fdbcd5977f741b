// The bindings of the scans.
#include <vector>

#include "bindings.h"
#include "ops/selective_scan.h"

namespace effvlm {
namespace {

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
  m.def("selective_scan_workspace", &selective_workspace);
  m.def("selective_scan", &selective);
}

}  // namespace effvlm
