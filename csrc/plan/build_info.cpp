// The facts arrive as macros, defined for this file alone so that a new revision recompiles nothing else.
#include "plan/build_info.h"

namespace pk {

const BuildInfo& build_info() {
  static constexpr BuildInfo info{PK_VERSION, PK_REVISION, PK_CUDA, PK_CUDA_ARCHS, PK_INSTRUCTION_SETS};
  return info;
}

}  // namespace pk
