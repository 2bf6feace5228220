// The plan of a call and the room it needs, with the kernels of the instruction set in use.
#include <algorithm>

#include "common/instruction_set.h"
#include "prefix_attention/prefix_attention.h"

namespace pk {

PK_TABLE_IN_USE(prefix_attention)

namespace prefix_attention {
namespace {

void add_units(std::vector<Unit>& units, int64_t index, int64_t heads, int64_t flat) {
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t begin = 0; begin < flat; begin += kRows) {
      units.push_back({static_cast<int32_t>(index), static_cast<int32_t>(head), begin, std::min(begin + kRows, flat)});
    }
  }
}

float* take(float* room, int64_t& used, int64_t floats) {
  constexpr int64_t kLine = 16;
  float* const piece = room ? room + used : nullptr;
  used += blocks(floats, kLine) * kLine;
  return piece;
}

int64_t deal(Problem& p, bool backward, float* scratch) {
  const int64_t rows = p.B * p.Hq * p.S;
  int64_t used = 0;
  p.state = take(scratch, used, rows * p.D);
  p.high = take(scratch, used, backward ? 0 : rows);
  p.sum = take(scratch, used, backward ? 0 : rows);
  p.share = take(scratch, used, backward ? rows : 0);
  p.dc = take(scratch, used, backward ? rows : 0);
  const int64_t keys = std::max(p.prefixes * p.P, p.B * p.T) * p.Hkv * p.D;
  p.keys = take(scratch, used, backward ? 2 * keys : 0);
  return used;
}

}  // namespace

Plan make_plan(const Problem& p) {
  Plan plan;
  plan.first.assign(p.prefixes + 1, 0);
  for (int64_t r = 0; r < p.rows; ++r) {
    Sequence s{r, 0, p.S, 0, p.T, p.ids ? p.ids[r] : 0, 0};
    if (p.cu_q) s = {0, p.cu_q[r], p.cu_q[r + 1] - p.cu_q[r], p.cu_k[r], p.cu_k[r + 1] - p.cu_k[r], s.prefix, 0};
    if (s.prefix >= 0) s.P = p.lengths ? p.lengths[s.prefix] : p.P;
    if (s.P > 0) plan.first[s.prefix + 1] += s.S;
    add_units(plan.units, r, p.Hkv, s.S * group(p));
    plan.sequences.push_back(s);
  }
  for (int64_t n = 0; n < p.prefixes; ++n) plan.first[n + 1] += plan.first[n];
  plan.queries.resize(plan.first[p.prefixes]);
  std::vector<int64_t> next(plan.first);
  for (int64_t r = 0; r < p.rows; ++r) {
    const Sequence& s = plan.sequences[r];
    for (int64_t i = 0; s.P > 0 && i < s.S; ++i) {
      plan.queries[next[s.prefix]++] = {static_cast<int32_t>(r), static_cast<int32_t>(i)};
    }
  }
  for (int64_t n = 0; n < p.prefixes; ++n) {
    add_units(plan.prefix_units, n, p.Hkv, (plan.first[n + 1] - plan.first[n]) * group(p));
  }
  return plan;
}

int64_t scratch_floats(const Problem& problem, bool backward) {
  Problem copy = problem;
  return deal(copy, backward, nullptr);
}

void set_scratch(Problem& problem, bool backward, float* scratch) {
  deal(problem, backward, scratch);
}

}  // namespace prefix_attention
}  // namespace pk
