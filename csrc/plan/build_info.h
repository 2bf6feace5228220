// What this build is made of, recorded by setup.py when it compiles build_info.cpp.
#pragma once

namespace pk {

struct BuildInfo {
  const char* version;           // of the package
  const char* revision;          // of the sources, "" if the build was not told
  const char* cuda;              // version of the CUDA toolkit, "" if built without
  const char* cuda_archs;        // "80;90a;...": architectures with machine code; PTX of the last one too
  const char* instruction_sets;  // "default;avx2;...": of the CPU kernels
};

const BuildInfo& build_info();

}  // namespace pk
