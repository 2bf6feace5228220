// Element types, shared by every family. Storage only: how a vector of them is loaded and stored is in vec.h.
#pragma once

#include <cstdint>

namespace pk {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

enum class Dtype { kFloat32, kFloat16, kBFloat16, kFloat64 };

}  // namespace pk
