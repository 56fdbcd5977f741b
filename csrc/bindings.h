// What every block of bindings shares: how a tensor arrives, and how an op's CPU or CUDA form is called. Files named bindings*
// are the only ones that know pybind11. One short block per op: name the views, fill the args struct, release the GIL, call.
// Arguments come in schema order, then outputs, workspace and place (effvlm/_library.py: _run).
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "core/check.h"
#include "core/view.h"

namespace effvlm {

namespace py = pybind11;

#if defined(EFFVLM_SIMT)  // a test build: host tensors go to the CUDA kernels, compiled for the host (tests/simt)
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

using Raw = py::tuple;  // (address, shape, strides, dtype code, device)
using Optional = std::optional<Raw>;
using Place = std::tuple<int, std::uintptr_t, int>;  // (CUDA device or -1, stream, CPU threads)

inline View view(const Raw& raw) {
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

inline View view(const Optional& raw) { return raw ? view(*raw) : View{}; }

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

void bind_scans(py::module_& m);   // bindings_scans.cpp
void bind_tokens(py::module_& m);  // bindings_tokens.cpp

}  // namespace effvlm
