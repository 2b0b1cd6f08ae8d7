// kronafuse._C: what was built and what each kernel takes, as Python objects. It runs on the host, uses nothing of
// torch but pybind11's headers, and is the only part that is compiled for one Python version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/configs.h"
#include "python/configurations.h"

namespace py = pybind11;

namespace kronafuse {
namespace {

// One kernel on one architecture, as ptxas reported it; bytes are per thread, shared ones per block and static.
struct Usage {
  const char* kernel;
  const char* arch;
  int registers;
  int stack_bytes;
  int spill_store_bytes;
  int spill_load_bytes;
  int shared_bytes;
};

#include "build_record.inc"

py::dict versions() {
  py::dict found;
  for (const auto& fact : build_facts) found[fact[0]] = fact[1];
  return found;
}

std::vector<Usage> usages() { return {usage_rows, usage_rows + usage_count}; }

py::dict configurations() {
  py::dict found;
  for (const ConfigurationTable& table : configuration_tables) {
    found[table.kernel] = std::vector<Configuration>(table.first, table.first + table.count);
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "What the native libraries were built from and with, and what their kernels take.";
  py::class_<Usage>(module, "Usage", "What ptxas said of one kernel on one architecture.")
      .def_readonly("kernel", &Usage::kernel)
      .def_readonly("arch", &Usage::arch)
      .def_readonly("registers", &Usage::registers)
      .def_readonly("stack_bytes", &Usage::stack_bytes)
      .def_readonly("spill_store_bytes", &Usage::spill_store_bytes)
      .def_readonly("spill_load_bytes", &Usage::spill_load_bytes)
      .def_readonly("shared_bytes", &Usage::shared_bytes);
  py::class_<Configuration>(module, "Configuration", "One configuration of a kernel template.")
      .def_readonly("name", &Configuration::name)
      .def_readonly("tile_m", &Configuration::tile_m)
      .def_readonly("tile_n", &Configuration::tile_n)
      .def_readonly("tile_k", &Configuration::tile_k)
      .def_readonly("stages", &Configuration::stages)
      .def_readonly("threads", &Configuration::threads)
      .def_readonly("shared_bytes", &Configuration::shared_bytes);
  module.def("versions", &versions, "Versions of compilers and torch, architectures, CPU levels.");
  module.def("usages", &usages, "What every CUDA kernel takes on every architecture.");
  module.def("configurations", &configurations, "Kernel -> its configurations.");
}

}  // namespace kronafuse
