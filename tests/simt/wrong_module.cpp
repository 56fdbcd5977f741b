// Binds wrong_kernels.cu; on its own, because that file is instrumented and Python's machinery need not be.
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

void run_wrong(const std::string& name, bool wrong, std::uintptr_t in, std::uintptr_t out);
void run_product(const std::string& type, std::uintptr_t a, std::uintptr_t b, std::uintptr_t d);

PYBIND11_MODULE(_wrong, m) {
  m.def("run", &run_wrong, py::call_guard<py::gil_scoped_release>());
  m.def("product", &run_product, py::call_guard<py::gil_scoped_release>());
}
