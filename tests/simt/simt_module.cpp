// How tests tell the emulator what a call may touch.
#include <pybind11/pybind11.h>

#include <string>

namespace simt {
void allow(std::uintptr_t address, std::size_t bytes, const char* name, bool output);
std::string forget_all();
void set_seed(unsigned value);
}  // namespace simt

PYBIND11_MODULE(_simt_control, m) {
  m.def("allow", &simt::allow);
  m.def("forget_all", &simt::forget_all);
  m.def("set_seed", &simt::set_seed);
}
