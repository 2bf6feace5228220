// The CPU kernels of prefix_attention against its fp64 loops, for every instruction set that this processor has: ragged
// sizes, few and many rows, prefixes of several lengths and none, packed sequences, every composition, dropout, gates.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "common/instruction_set.h"
#include "prefix_attention/prefix_attention.h"

namespace {

using namespace pk;
using namespace pk::prefix_attention;

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("FAILED: %s: %s\n", instruction_set_name(), what.c_str());
  ++failures;
}

// Multiples of 1/64 in [-1, 1), the same in float and double; a guard after the end that no kernel may touch.
struct Numbers {
  static constexpr size_t kGuard = 32;
  std::vector<float> narrow;
  std::vector<double> wide;

  explicit Numbers(int64_t count, uint32_t seed = 0) : narrow(count + kGuard, 7), wide(count + kGuard, 7) {
    for (int64_t i = 0; seed && i < count; ++i) {
      seed = seed * 1664525u + 1013904223u;
      wide[i] = narrow[i] = static_cast<float>(static_cast<int>(seed >> 25) - 64) / 64;
    }
  }
  void* data(bool is_double) { return is_double ? static_cast<void*>(wide.data()) : narrow.data(); }
  bool guard_holds() const {
    for (size_t i = narrow.size() - kGuard; i < narrow.size(); ++i) {
      if (narrow[i] != 7) return false;
    }
    return true;
  }
};

struct Case {
  const char* name;
  int64_t B, Hq, Hkv, S, T, P, D, prefixes;
  Composition composition;
  bool causal, gated, packed;
  int64_t window;
  double softcap, p;
};

const Case kCases[] = {
    {"ragged", 3, 4, 2, 37, 37, 19, 40, 2, Composition::kMerge, true, false, false, 0, 0, 0},
    {"decode", 9, 6, 2, 1, 23, 5, 64, 3, Composition::kMerge, true, true, false, 0, 0, 0},
    {"tiles", 1, 2, 1, 131, 150, 140, 32, 1, Composition::kMerge, true, false, false, 60, 1.5, 0.1},
    {"one dim", 2, 1, 1, 3, 5, 2, 8, 2, Composition::kMerge, false, true, false, 0, 0, 0},
    {"wide", 2, 2, 2, 17, 9, 33, 256, 2, Composition::kMerge, true, false, false, 0, 0, 0.5},
    {"packed", 1, 4, 2, 9, 15, 7, 32, 3, Composition::kMerge, true, true, true, 0, 0, 0.1},
    {"add", 3, 4, 2, 19, 19, 40, 48, 2, Composition::kAdd, true, true, false, 4, 2, 0.1},
    {"relu", 3, 4, 4, 19, 21, 40, 32, 2, Composition::kRelu, true, true, false, 0, 0, 0.1},
    {"linear", 3, 4, 2, 2, 21, 40, 32, 2, Composition::kLinear, true, true, false, 0, 0, 0},
};

// Everything that a case reads and writes.
struct Memory {
  Numbers q, k, v, pk, pv, gate, key_gate, dout, out, lse, prefix_lse, dq, dk, dv, dpk, dpv, dgate, dkey_gate;
  std::vector<int32_t> ids, lengths, cu_q{0, 3, 4, 4, 9}, cu_k{0, 5, 6, 8, 15};

  explicit Memory(const Case& c)
      : q(c.B * c.S * c.Hq * c.D, 1),
        k(c.B * c.T * c.Hkv * c.D, 2),
        v(c.B * c.T * c.Hkv * c.D, 3),
        pk(c.prefixes * c.Hkv * c.P * c.D, 4),
        pv(c.prefixes * c.Hkv * c.P * c.D, 5),
        gate(rows(c) * c.Hq, 6),
        key_gate(c.Hq, 7),
        dout(c.B * c.S * c.Hq * c.D, 8),
        out(c.B * c.S * c.Hq * c.D),
        lse(c.B * c.S * c.Hq),
        prefix_lse(c.B * c.S * c.Hq),
        dq(c.B * c.S * c.Hq * c.D),
        dk(c.B * c.T * c.Hkv * c.D),
        dv(c.B * c.T * c.Hkv * c.D),
        dpk(c.prefixes * c.Hkv * c.P * c.D),
        dpv(c.prefixes * c.Hkv * c.P * c.D),
        dgate(rows(c) * c.Hq),
        dkey_gate(c.Hq) {
    for (int64_t r = 0; r < rows(c); ++r) ids.push_back(static_cast<int32_t>((r + 1) % (c.prefixes + 1)) - 1);
    for (int64_t n = 0; n < c.prefixes; ++n) lengths.push_back(static_cast<int32_t>(c.P - (n ? c.P / (n + 1) : 0)));
  }
  static int64_t rows(const Case& c) { return c.packed ? 4 : c.B; }
};

Problem problem_of(const Case& c, Memory& m, bool is_double) {
  Problem p{};
  p.B = c.B, p.Hq = c.Hq, p.Hkv = c.Hkv, p.S = c.S, p.T = c.T, p.P = c.P, p.D = c.D;
  p.prefixes = c.prefixes, p.rows = Memory::rows(c);
  p.type = is_double ? Dtype::kFloat64 : Dtype::kFloat32;
  p.q = {m.q.data(is_double), c.S * c.Hq * c.D, c.D, c.Hq * c.D};
  p.k = {m.k.data(is_double), c.T * c.Hkv * c.D, c.D, c.Hkv * c.D};
  p.v = {m.v.data(is_double), c.T * c.Hkv * c.D, c.D, c.Hkv * c.D};
  p.pk = {m.pk.data(is_double), c.Hkv * c.P * c.D, c.P * c.D, c.D};
  p.pv = {m.pv.data(is_double), c.Hkv * c.P * c.D, c.P * c.D, c.D};
  p.ids = m.ids.data(), p.lengths = m.lengths.data();
  if (c.packed) p.cu_q = m.cu_q.data(), p.cu_k = m.cu_k.data();
  if (c.gated)
    p.gate = {m.gate.data(is_double), p.type, c.Hq, 1}, p.key_gate = {m.key_gate.data(is_double), p.type, 0, 1};
  p.composition = c.composition, p.scale = 0.5, p.softcap = c.softcap, p.causal = c.causal, p.window = c.window;
  p.window_over_prefix = c.window > 0;
  p.own_dropout = make_dropout(c.p, 0x5EED, 0), p.prefix_dropout = make_dropout(c.p, 0x5EED, 1);
  p.out = m.out.data(is_double), p.lse = m.lse.data(is_double), p.prefix_lse = m.prefix_lse.data(is_double);
  p.dout = {m.dout.data(is_double), c.S * c.Hq * c.D, c.D, c.Hq * c.D};
  p.saved_out = {m.out.data(is_double), c.S * c.Hq * c.D, c.D, c.Hq * c.D};
  p.dq = m.dq.data(is_double), p.dk = m.dk.data(is_double), p.dv = m.dv.data(is_double);
  p.dpk = m.dpk.data(is_double), p.dpv = m.dpv.data(is_double);
  if (c.gated) p.dgate = m.dgate.data(is_double), p.dkey_gate = m.dkey_gate.data(is_double);
  return p;
}

// Phases in pieces of one unit, last to first: no unit may lean on another of its phase.
void run(Problem& p, bool backward) {
  const Plan plan = make_plan(p);
  std::vector<float> scratch(scratch_floats(p, backward), NAN);
  set_scratch(p, backward, scratch.data());
  const auto phase = [&](Phase f, int64_t units) {
    for (int64_t unit = units; unit-- > 0;) f(p, plan, unit, unit + 1);
  };
  if (backward) {
    phase(table().prefix_backward, p.prefixes * p.Hkv);
    phase(table().own_backward, p.rows * p.Hkv);
    phase(table().gather, 1);
  } else {
    phase(table().prefix, static_cast<int64_t>(plan.prefix_units.size()));
    phase(table().own, static_cast<int64_t>(plan.units.size()));
  }
}

void compare(const Case& c, const char* what, const Numbers& numbers) {
  double largest = 0, worst = 0;
  for (size_t i = 0; i + Numbers::kGuard < numbers.wide.size(); ++i) {
    if (std::isinf(numbers.wide[i]) && numbers.wide[i] == numbers.narrow[i]) continue;
    const double distance = std::fabs(numbers.wide[i] - numbers.narrow[i]);
    largest = std::fmax(largest, std::fabs(numbers.wide[i]));
    if (!(distance <= worst) && !std::isnan(worst)) worst = distance;  // NaN stays
  }
  constexpr double kUnits = 200;  // sums of a few hundred terms, and exponentials of sums
  expect(worst <= kUnits * 0x1p-24 * std::fmax(largest, 1),
         std::string(c.name) + ": " + what + " is off by " + std::to_string(worst));
  expect(numbers.guard_holds(), std::string(c.name) + ": " + what + " was written past its end");
}

void run_case(const Case& c) {
  Memory m(c);
  Problem exact = problem_of(c, m, true), narrow = problem_of(c, m, false);
  forward_double(exact, make_plan(exact));
  backward_double(exact, make_plan(exact));
  run(narrow, false);
  run(narrow, true);
  compare(c, "out", m.out);
  compare(c, "lse", m.lse);
  if (c.composition == Composition::kAdd) compare(c, "prefix_lse", m.prefix_lse);
  compare(c, "dq", m.dq);
  compare(c, "dk", m.dk);
  compare(c, "dv", m.dv);
  compare(c, "dpk", m.dpk);
  compare(c, "dpv", m.dpv);
  if (c.gated) {
    compare(c, "dgate", m.dgate);
    compare(c, "dkey_gate", m.dkey_gate);
  }
}

}  // namespace

int main() {
  for (const char* name : {"default", "avx2", "avx512", "avx512_bf16"}) {
    if (!use_instruction_set(name)) continue;
    for (const Case& c : kCases) run_case(c);
    std::printf("prefix_attention: %zu cases with %s\n", std::size(kCases), name);
  }
  return failures ? 1 : 0;
}
