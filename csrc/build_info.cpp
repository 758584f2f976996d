// How the compiled code of this installation was built; setup.py writes build_info.h. Needs no torch.
#include <pybind11/pybind11.h>

#include "build_info.h"

PYBIND11_MODULE(_build_info, m) {
  m.attr("revision") = LOKI_REVISION;          // of the git checkout, or empty
  m.attr("torch") = LOKI_TORCH;                // whose headers were used
  m.attr("compiler") = __VERSION__;
  m.attr("flags") = LOKI_FLAGS;
  m.attr("cuda") = LOKI_CUDA;                  // nvcc's version; empty without CUDA code
  m.attr("architectures") = LOKI_ARCHITECTURES;
}
