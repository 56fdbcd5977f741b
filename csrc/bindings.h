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

// Item i of a tuple as an integer, by CPython's own calls: a decode step passes ten tensors, and pybind11's casts of their sixty
// numbers cost as much as its arithmetic.
inline long long item(PyObject* tuple, Py_ssize_t i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i)); }

inline View view(const Raw& raw) {
  View v;
  EFFVLM_CHECK(raw.size() == 5, "expected a tensor as (address, shape, strides, dtype code, device), got %zu items", raw.size());
  PyObject *shape = PyTuple_GET_ITEM(raw.ptr(), 1), *stride = PyTuple_GET_ITEM(raw.ptr(), 2);
  EFFVLM_CHECK(PyTuple_Check(shape) && PyTuple_Check(stride) && PyTuple_GET_SIZE(shape) == PyTuple_GET_SIZE(stride),
               "expected the shape and strides of a tensor as tuples of one size");
  v.rank = static_cast<int>(PyTuple_GET_SIZE(shape));
  EFFVLM_CHECK(v.rank <= kMaxRank, "expected a tensor of at most %d dimensions, got %d", kMaxRank, v.rank);
  v.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(raw.ptr(), 0));
  for (int d = 0; d < v.rank; ++d) v.shape[d] = item(shape, d), v.stride[d] = item(stride, d);
  v.dtype = static_cast<Dtype>(item(raw.ptr(), 3));
  v.device = static_cast<int>(item(raw.ptr(), 4));
  if (PyErr_Occurred()) throw py::error_already_set();
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
