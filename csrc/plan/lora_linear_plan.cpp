// From sizes to the launch plan: a problem without data, put to the launcher's own questions.
#include "plan/lora_linear_plan.h"

#include <algorithm>

#include "lora_linear/lora_linear.h"

namespace pk::lora_linear {

Plan plan(int64_t M, int64_t N, int64_t K, int64_t R, int64_t dtype_size) {
  Member member{};
  member.N = N;
  member.R = R;
  Problem p{};
  p.M = M;
  p.K = K;
  p.R = R;
  p.G = p.L = 1;
  p.member = &member;
  if (dtype_size == 8) return {"loops", kBlock, kRowBlock, {{"loops", 1}}, {{"loops", 1}}, 0, 0};
  const bool fused = M <= kFewRows;
  Plan plan{fused ? "fused" : "gemm", kBlock, kRowBlock, {}, {}, 0, 0};
  plan.forward = {{"shrink", row_units(M) * p.L}, {"expand", member_units(p)}};
  plan.backward = {{"dy_pass", member_units(p)}, {"sum_ds", row_units(M)}, {"x_pass", blocks(K)}};
  if (blocks(N) == 1) plan.backward.erase(plan.backward.begin() + 1);  // one part of ds is its own sum
  const int64_t slices_of_dx = fused && K > 1 ? slices(N) : 0;         // dy W sums across the rows of W
  if (slices_of_dx) plan.backward.insert(plan.backward.end() - 1, {"stream_dx", slices_of_dx});
  if (!fused) {
    plan.forward.push_back({"gemm", 1});
    plan.backward.push_back({"gemm", 1});
  }
  plan.forward_scratch = sizeof(float) * member_scratch(p);
  plan.backward_scratch =
      sizeof(float) * (std::max(member_scratch(p), x_pass_scratch(p)) + ds_scratch(p) + slices_of_dx * M * pitch(K));
  return plan;
}

}  // namespace pk::lora_linear
