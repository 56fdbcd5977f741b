// The bindings of the scans.
#include "bindings.h"

namespace effvlm {

void bind_scans(py::module_&) {}

}  // namespace effvlm
