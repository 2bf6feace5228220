// The backward kernels of prefix_attention against its fp64 loops: every dtype and composition, ragged sizes, heads of
// every width, few and many rows, prefixes of several lengths and none, packed sequences, masks, dropout, gates. Needs
// a GPU, or the emulator.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "prefix_attention/backward_cuda.h"
#include "tests/prefix_attention_cases.h"

using namespace pk;
using namespace pk::prefix_attention;
using namespace pk::test;

namespace {

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  printf("FAILED %s: %s\n", test::kWhere, what.c_str());
}

const Case kCases[] = {
    {"ragged", 3, 4, 2, 37, 37, 19, 40, 2, kMerge, true, false, false, Masks::kNone, 0, 0, 0},
    {"decode", 9, 6, 2, 1, 23, 5, 64, 3, kMerge, true, true, false, Masks::kNone, 0, 0, 0},
    {"many sequences", 70, 2, 1, 1, 2, 5, 32, 1, kMerge, true, false, false, Masks::kNone, 0, 0, 0},
    {"tiles", 1, 2, 1, 131, 150, 140, 32, 1, kMerge, true, false, false, Masks::kBoolean, 60, 1.5, 0.1},
    {"one dim", 2, 1, 1, 3, 5, 2, 8, 2, kMerge, false, true, false, Masks::kAdditive, 0, 0, 0},
    {"96", 2, 2, 1, 9, 9, 40, 96, 2, kMerge, true, true, false, Masks::kNone, 0, 0, 0.1},
    {"wide", 2, 2, 2, 17, 40, 33, 256, 2, kMerge, true, false, false, Masks::kNone, 0, 0, 0.5},
    {"packed", 1, 4, 2, 9, 15, 7, 32, 3, kMerge, true, true, true, Masks::kNone, 0, 0, 0.1},
    {"strided", 1, 4, 2, 9, 15, 7, 40, 2, kMerge, true, false, false, Masks::kNone, 0, 0, 0, true},
    {"no prefixes", 2, 2, 2, 9, 9, 4, 32, 0, kMerge, true, true, false, Masks::kNone, 0, 0, 0},
    {"no keys", 2, 2, 1, 3, 0, 4, 32, 2, kMerge, true, false, false, Masks::kNone, 0, 0, 0},
    {"no queries", 2, 2, 1, 0, 4, 4, 32, 2, kMerge, true, false, false, Masks::kNone, 0, 0, 0},
    {"unseen", 2, 2, 1, 12, 7, 0, 32, 1, kMerge, true, false, false, Masks::kNone, 0, 0, 0},
    {"add", 3, 4, 2, 19, 19, 40, 48, 2, kAdd, true, true, false, Masks::kAdditive, 4, 2, 0.1},
    {"relu", 3, 4, 4, 19, 21, 40, 32, 2, kRelu, true, true, false, Masks::kNone, 0, 0, 0.1},
    {"linear", 3, 4, 2, 2, 21, 40, 32, 2, kLinear, true, true, false, Masks::kNone, 0, 0, 0},
    {"linear wide", 2, 2, 1, 40, 21, 40, 136, 1, kLinear, true, true, false, Masks::kNone, 0, 0, 0.1},
    {"splits", 4, 4, 1, 130, 3, 5, 32, 2, kMerge, false, true, false, Masks::kNone, 0, 0, 0},
};

// The same with the gradients, and what the kernels keep between each other.
struct Gradients : Operands {
  Numbers dout, dq, dk, dv, dpk, dpv, dgate, dkey_gate, numbers, parts;

  Gradients(const Case& c, Dtype type, int splits)
      : Operands(c, type),
        dout(type, c.B * c.S * c.Hq * (c.D + pad), 8),
        dq(type, c.B * c.S * c.Hq * c.D),
        dk(type, c.B * c.T * c.Hkv * c.D),
        dv(type, c.B * c.T * c.Hkv * c.D),
        dpk(type, c.prefixes * c.Hkv * c.P * c.D),
        dpv(type, c.prefixes * c.Hkv * c.P * c.D),
        dgate(wide, c.rows() * c.Hq),
        dkey_gate(wide, c.Hq),
        numbers(wide, 5 * c.B * c.S * c.Hq),
        parts(wide, 2 * splits * c.prefixes * c.Hkv * c.P * c.D) {}

  // exact: of the fp64 loops.
  Problem problem(const Case& c, bool exact) {
    Problem p = Operands::problem(c, exact);
    const int64_t row = c.D + pad;
    p.dout = {dout.data(exact), c.S * c.Hq * row, row, c.Hq * row};
    p.saved_out = {out.data(exact), c.S * c.Hq * c.D, c.D, c.Hq * c.D};
    p.dq = dq.data(exact), p.dk = dk.data(exact), p.dv = dv.data(exact);
    p.dpk = dpk.data(exact), p.dpv = dpv.data(exact);
    if (c.gated) p.dgate = dgate.data(exact), p.dkey_gate = dkey_gate.data(exact);
    return p;
  }
};

// What the binding launches.
bool run(const Case& c, Gradients& m, const Problem& p, int splits) {
  Backward call{p};
  const int64_t rows = p.B * p.Hq * p.S, bytes = rows * test::bytes_of(m.wide);
  char* const numbers = static_cast<char*>(m.numbers.data(false));
  void** const places[] = {&call.total, &call.own_less, &call.prefix_less, &call.share, &call.dc};
  for (int i = 0; i < 5; ++i) *places[i] = numbers + i * bytes;
  const bool merges = p.composition == kMerge, keys = p.B * p.T > 0, prefixes = p.prefixes * p.P > 0;
  if (merges) call.own_less = call.prefix_less = call.total;
  call.parts = m.parts.data(false);
  call.splits = splits;
  const auto launched = [](cudaError_t error) { return error == cudaSuccess; };
  return ran([&] {
    bool right = true;
    if (rows > 0) {
      right = right && launched(backward_totals(call, nullptr));
      if (!merges || c.gated) right = right && launched(backward_shares(call, nullptr));
      right = right && launched(backward_queries(call, nullptr));
    }
    if (keys) right = right && launched(backward_keys(call, nullptr));
    if (prefixes) right = right && launched(backward_prefixes(call, nullptr));
    if (prefixes) right = right && launched(backward_prefix_sums(call, nullptr));
    if (p.dgate) right = right && launched(backward_gates(call, p.gate, call.share, p.dgate, nullptr));
    if (p.dkey_gate) right = right && launched(backward_gates(call, p.key_gate, call.dc, p.dkey_gate, nullptr));
    return right ? cudaSuccess : cudaErrorUnknown;
  });
}

// size: of numbers that cancel in these
void compare(const std::string& name, Dtype type, Numbers& numbers, double size) {
  double worst = 0;
  bool finite = true;
  for (size_t i = 0; i < numbers.wide.size(); ++i) {
    const double got = test::read(numbers.narrow.host(), numbers.type, static_cast<int64_t>(i));
    worst = std::fmax(worst, std::fabs(numbers.wide[i] - got));
    finite = finite && std::isfinite(got);
  }
  // 16 bits: w, dl, o and the result are rounded; others: sums of a few hundred terms, and exponentials of sums
  const double eps = type == Dtype::kFloat64   ? 200 * 0x1p-52
                     : type == Dtype::kFloat32 ? 200 * 0x1p-24
                     : type == Dtype::kFloat16 ? 4 * 0x1p-11
                                               : 4 * 0x1p-8;
  const double most = eps * numbers.largest() * size;
  expect(finite && worst <= most,
         name + " is off by " + std::to_string(worst) + " of " + std::to_string(numbers.largest()));
}

void run_case(const Case& c, Dtype type) {
  Problem sized{};
  sized.B = c.B, sized.S = c.S, sized.Hq = c.Hq, sized.Hkv = c.Hkv, sized.P = c.P, sized.prefixes = c.prefixes;
  const int splits = prefix_splits(sized);
  Gradients m(c, type, splits);
  const std::string name = std::string(c.name) + " of dtype " + std::to_string(static_cast<int>(type)) + ": ";
  const Problem exact = m.problem(c, true);
  const Plan plan = make_plan(exact);
  forward_double(exact, plan);
  for (Numbers* numbers : {&m.out, &m.lse, &m.prefix_lse}) numbers->round();
  backward_double(exact, plan);
  if (!run(c, m, m.problem(c, false), splits)) return expect(false, name + "a launch failed");
  const double size = m.out.largest();  // o, rounded, is what D is made of
  compare(name + "dq", type, m.dq, size);
  compare(name + "dk", type, m.dk, size);
  compare(name + "dv", type, m.dv, size);
  compare(name + "dpk", type, m.dpk, size);
  compare(name + "dpv", type, m.dpv, size);
  if (!c.gated) return;
  compare(name + "dgate", type, m.dgate, size);
  compare(name + "dkey_gate", type, m.dkey_gate, size);
}

}  // namespace

int main() {
  if (!test::device_present()) {
    printf("gpu: no backward kernel of prefix_attention run: no device\n");
    return test::kSkipped;
  }
  for (const Dtype type : {Dtype::kBFloat16, Dtype::kFloat16, Dtype::kFloat32, Dtype::kFloat64}) {
    for (const Case& c : kCases) run_case(c, type);
  }
  printf("%s: %zu cases of prefix_attention's backward in four dtypes, %d failures\n", test::kWhere, std::size(kCases),
         failures);
  return failures ? 1 : 0;
}
