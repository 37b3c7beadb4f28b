// htv._host: what was built and what is in force. Loads without torch.
#include <pybind11/pybind11.h>

#include "cpu/machine.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = HTV_COMPILER;
  info["flags"] = HTV_FLAGS;
  info["cpu_levels"] = py::str(HTV_CPU_ISAS).attr("split")();
  info["torch"] = HTV_TORCH_VERSION;
  info["torch_target"] = HTV_TORCH_TARGET;
  info["cuda"] = bool(HTV_WITH_CUDA);
  info["cuda_archs"] = py::str(HTV_CUDA_ARCHS).attr("split")();
  return info;
}

py::dict cpu_traits() {
  py::dict traits;
  for (const htv::Trait* trait : {&htv::product_trait(), &htv::order_trait()})
    traits[trait->name] = trait->choice();
  return traits;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build information and CPU capability of the compiled part of htv.";
  m.def("build_info", &build_info,
        "Compiler, flags, instruction sets, torch version and CUDA architectures of this build.");
  m.def(
      "cpu_capability", [] { return htv::name(htv::current_isa()); },
      "The instruction set the CPU kernels use: baseline, avx2, avx512, icelake or zen4."
      " HTV_CPU_CAPABILITY can lower it.");
  m.def("cpu_traits", &cpu_traits,
        "Return by name what is taken to be faster on this machine: `product`, whose matrix product"
        " takes the plain sums of large layers, torch or own (HTV_CPU_PRODUCT can choose); `order`,"
        " as what values are compared, floats or integers (HTV_CPU_ORDER).");
}
