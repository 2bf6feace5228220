// The steps of a call and the room they need, with the kernels of the instruction set in use.
#include "bottleneck_adapter/bottleneck_adapter.h"
#include "common/instruction_set.h"

namespace pk {

PK_TABLE_IN_USE(bottleneck_adapter)

namespace bottleneck_adapter {
namespace {

constexpr size_t kMostSteps = 8;

// Hands out pieces of one buffer, or counts them where there is none.
class Room {
 public:
  explicit Room(float* begin) : begin_(begin) {}
  float* take(int64_t floats) {
    float* const piece = begin_ ? begin_ + used_ : nullptr;
    used_ += blocks(floats, kLine) * kLine;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kLine = 16;
  float* begin_;
  int64_t used_ = 0;
};

int64_t deal(Problem& p, bool backward, float* scratch) {
  Room room(scratch);
  const bool narrow = p.factors != Dtype::kFloat32, scales_B = p.gemm && (p.scales > 1 || has_no_scale(p));
  if (backward) {
    const bool reads_B = wants_dh(p) || p.dgate;
    p.packed_B = reads_B && (narrow || scales_B) ? room.take(p.N * p.E) : nullptr;
    p.u = room.take(wants_up(p) ? p.M * p.E : 0);
    p.dh = room.take(wants_dh(p) ? p.M * p.E : 0);
    p.partial = room.take(p.M * (bottleneck_units(p) + 1) + blocks(p.N, kColumns));
    const int64_t up = blocks(p.N, kColumns) * up_floats(p), down = blocks(p.K, kColumns) * down_floats(p);
    p.sums = room.take(up > down || p.gemm ? up : down);
    p.raw = wants_raw(p) && p.type != Dtype::kFloat32 ? room.take(p.M * p.K) : static_cast<float*>(p.dx);
  } else {
    p.packed_A = room.take(few(p) || p.gemm ? 0 : p.K * pitch(p.E));
    p.packed_B = scales_B ? room.take(p.N * p.E) : nullptr;
    p.u = room.take(p.M * p.E);
  }
  p.statistics = room.take(p.norm == Norm::kNone ? 0 : 2 * p.M);
  return room.used();
}

}  // namespace

int64_t scratch_floats(const Problem& problem, bool backward) {
  Problem copy = problem;
  return deal(copy, backward, nullptr);
}

void set_scratch(Problem& problem, bool backward, float* scratch) {
  deal(problem, backward, scratch);
}

std::vector<Step> forward_steps(const Problem& p) {
  const Table& t = table();
  std::vector<Step> steps;
  steps.reserve(kMostSteps);
  if (p.gemm) {
    if (p.packed_B) steps.push_back({t.scale_B, blocks(p.N, kColumns), p.E * p.N});
    steps.push_back({t.gemm_shrink, low_units(p), p.M * p.E * p.K});
    steps.push_back({t.gemm_expand, wide_units(p, p.N), p.M * p.E * p.N});
    return steps;
  }
  if (p.norm != Norm::kNone) steps.push_back({t.measure, blocks(p.M, kRows), p.M * p.K * 2});
  if (!few(p)) steps.push_back({t.pack, blocks(p.K, kColumns), p.E * p.K * 4});
  steps.push_back({t.shrink, row_units(p) * bottleneck_units(p), p.M * p.E * p.K});
  steps.push_back({t.expand, expand_units(p), p.M * p.E * p.N});
  return steps;
}

std::vector<Step> backward_steps(const Problem& p) {
  const Table& t = table();
  const int64_t low_rank = p.M * p.E;
  std::vector<Step> steps;
  steps.reserve(kMostSteps);
  if (p.packed_B) steps.push_back({p.gemm ? t.scale_B : t.widen, blocks(p.N, kColumns), p.E * p.N});
  if (p.gemm) {
    if (wants_up(p) || wants_dh(p)) steps.push_back({t.gemm_slope, low_units(p), low_rank * p.N});
    if (wants_up(p)) steps.push_back({t.gemm_dB, blocks(p.N, kGemmColumns), low_rank * p.N});
  } else {
    if (p.norm != Norm::kNone) steps.push_back({t.measure, blocks(p.M, kRows), p.M * p.K * 2});
    steps.push_back({t.slope, row_units(p) * bottleneck_units(p), low_rank * p.N});
  }
  if ((wants_up(p) && !gemm_ends_dB(p)) || p.db) steps.push_back({t.up, blocks(p.N, kColumns), low_rank * p.N});
  if (p.gemm) {
    if (p.dx) steps.push_back({t.gemm_dx, wide_units(p, p.K), low_rank * p.K});
    if (p.dA) steps.push_back({t.gemm_dA, blocks(p.K, kGemmColumns), low_rank * p.K});
  } else if (p.dA || wants_out(p)) {
    steps.push_back({t.down, blocks(p.K, kColumns), 2 * low_rank * p.K});
  }
  if (wants_raw(p)) steps.push_back({t.norm_dx, blocks(p.M, kRows), p.M * p.K * 8});
  if (p.da) steps.push_back({t.sums, blocks(p.E, kColumns), low_rank});
  if (p.dgate || (p.dscale && p.scales == 1)) steps.push_back({t.gather, 1, 0});
  return steps;
}

}  // namespace bottleneck_adapter
}  // namespace pk
