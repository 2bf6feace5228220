// The launch plan of lora_linear on the CPU as data: which phases one projection with one adapter runs, over how many
// units. Computed by the functions that the launcher itself calls, so that the two cannot disagree.
#pragma once

#include <cstdint>
#include <vector>

namespace pk::lora_linear {

struct Step {
  const char* name;  // a phase of Kernels, "gemm" for the library's, "loops" for fp64's plain loops
  int64_t units;     // what threads share out
};

struct Plan {
  const char* path;            // "fused": W is streamed by the phases; "gemm": the base is the library's; "loops"
  int64_t block, row_block;    // columns and rows of a unit
  std::vector<Step> forward;   // in the order in which they run
  std::vector<Step> backward;  // for gradients of x, lora_A and lora_B
  int64_t forward_scratch, backward_scratch;  // bytes
};

// M rows, N out_features, K in_features, R rank, W stored row by row [N, K]; dtype_size: bytes of an element of x, 2, 4
// or 8.
Plan plan(int64_t M, int64_t N, int64_t K, int64_t R, int64_t dtype_size);

}  // namespace pk::lora_linear
