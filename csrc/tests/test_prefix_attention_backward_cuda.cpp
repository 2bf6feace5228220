// The backward kernels of prefix_attention against its fp64 loops: every dtype and composition, ragged sizes, heads of
// every width, few and many rows, prefixes of several lengths and none, packed sequences, masks, dropout, gates. Needs
// a GPU, or the emulator.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "prefix_attention/backward_cuda.h"
#include "tests/device_array.h"
#include "tests/typed_values.h"

using namespace pk;
using namespace pk::prefix_attention;
using pk::test::Array;
using pk::test::ran;

namespace {

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  printf("FAILED %s: %s\n", test::kWhere, what.c_str());
}

enum class Masks { kNone, kBoolean, kAdditive };

struct Case {
  const char* name;
  int64_t B, Hq, Hkv, S, T, P, D, prefixes;
  Composition composition;
  bool causal, gated, packed;
  Masks masks;
  int64_t window;
  double softcap, p;
  bool strided = false;  // rows that are not aligned to 16 bytes

  int64_t rows() const { return packed ? 4 : B; }
  bool biased() const { return masks == Masks::kAdditive; }
};

constexpr Composition kMerge = Composition::kMerge, kAdd = Composition::kAdd, kRelu = Composition::kRelu,
                      kLinear = Composition::kLinear;
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

// The same numbers in double and in a type, where the kernels read or write them.
struct Numbers {
  Dtype type;
  std::vector<double> wide;
  Array<char> narrow;

  Numbers(Dtype type, int64_t count, uint32_t seed = 0)
      : type(type), wide(count), narrow(static_cast<size_t>(count * test::bytes_of(type))) {
    memset(narrow.host(), 0xFF, static_cast<size_t>(count * test::bytes_of(type)));  // NaN until it is written
    if (!seed) return;
    for (double& number : wide) {  // multiples of 1/64 in [-1, 1), which every type holds
      seed = seed * 1664525u + 1013904223u;
      number = (static_cast<int>(seed >> 25) - 64) / 64.;
    }
    round();
  }
  void round() {
    for (size_t i = 0; i < wide.size(); ++i) {
      const bool tiny = type == Dtype::kFloat16 && std::fabs(wide[i]) < 0x1p-14;  // write() has no subnormal numbers
      test::write(narrow.host(), type, static_cast<int64_t>(i), tiny ? 0 : wide[i]);
    }
  }
  double largest() const {
    double most = 1;
    for (double number : wide) most = std::fmax(most, std::fabs(number));
    return most;
  }
  void* data(bool exact) { return exact ? static_cast<void*>(wide.data()) : narrow.data(); }
};

// Everything that a case reads and writes; `wide` numbers are the accumulator's.
struct Memory {
  Dtype wide;
  int64_t pad;  // of a row of q, k, v and dO
  Numbers q, k, v, pk, pv, gate, key_gate, dout, bias, mask, out, lse, prefix_lse, dq, dk, dv, dpk, dpv, dgate,
      dkey_gate, numbers, parts;
  Array<uint8_t> seen;
  Array<int32_t> ids, lengths, cu_q, cu_k;
  Array<uint64_t> seed;

  Memory(const Case& c, Dtype type, int splits)
      : wide(type == Dtype::kFloat64 ? type : Dtype::kFloat32),
        pad(c.strided ? 3 : 0),
        q(type, c.B * c.S * c.Hq * (c.D + pad), 1),
        k(type, c.B * c.T * c.Hkv * (c.D + pad), 2),
        v(type, c.B * c.T * c.Hkv * (c.D + pad), 3),
        pk(type, c.prefixes * c.Hkv * c.P * c.D, 4),
        pv(type, c.prefixes * c.Hkv * c.P * c.D, 5),
        gate(wide, c.rows() * c.Hq, 6),
        key_gate(wide, c.Hq, 7),
        dout(type, c.B * c.S * c.Hq * (c.D + pad), 8),
        bias(wide, c.Hq * c.S * c.P, 9),
        mask(type, c.S * c.T, 10),
        out(type, c.B * c.S * c.Hq * c.D),
        lse(wide, c.B * c.S * c.Hq),
        prefix_lse(wide, c.B * c.S * c.Hq),
        dq(type, c.B * c.S * c.Hq * c.D),
        dk(type, c.B * c.T * c.Hkv * c.D),
        dv(type, c.B * c.T * c.Hkv * c.D),
        dpk(type, c.prefixes * c.Hkv * c.P * c.D),
        dpv(type, c.prefixes * c.Hkv * c.P * c.D),
        dgate(wide, c.rows() * c.Hq),
        dkey_gate(wide, c.Hq),
        numbers(wide, 5 * c.B * c.S * c.Hq),
        parts(wide, 2 * splits * c.prefixes * c.Hkv * c.P * c.D),
        seen(static_cast<size_t>(c.B * c.S * c.T)),
        ids(static_cast<size_t>(c.rows())),
        lengths(static_cast<size_t>(c.prefixes)),
        cu_q(5),
        cu_k(5),
        seed(1) {
    const int32_t ends_q[] = {0, 3, 4, 4, 9}, ends_k[] = {0, 5, 6, 8, 15};
    for (size_t r = 0; r < 5; ++r) cu_q[r] = ends_q[r], cu_k[r] = ends_k[r];
    const int64_t kinds = c.prefixes + 1;  // the last of which is that there is none
    for (int64_t r = 0; r < c.rows(); ++r) ids[r] = c.prefixes == 1 ? 0 : static_cast<int32_t>((r + 1) % kinds) - 1;
    for (int64_t n = 0; n < c.prefixes; ++n) lengths[n] = static_cast<int32_t>(c.P - (n ? c.P / (n + 1) : 0));
    for (int64_t i = 0; i < c.B * c.S * c.T; ++i) seen[i] = i * 7919 % 5 != 0;
    seed[0] = 0x0123456789ABCDEFull;
  }
};

Problem problem_of(const Case& c, Memory& m, Dtype type, bool exact) {
  Problem p{};
  const int64_t row = c.D + m.pad;
  const bool adds = c.biased(), softmax = c.composition == kMerge || c.composition == kAdd;
  p.B = c.B, p.Hq = c.Hq, p.Hkv = c.Hkv, p.S = c.S, p.T = c.T, p.P = c.P, p.D = c.D;
  p.prefixes = c.prefixes, p.rows = c.rows(), p.type = type;
  p.q = {m.q.data(exact), c.S * c.Hq * row, row, c.Hq * row};
  p.k = {m.k.data(exact), c.T * c.Hkv * row, row, c.Hkv * row};
  p.v = {m.v.data(exact), c.T * c.Hkv * row, row, c.Hkv * row};
  p.pk = {m.pk.data(exact), c.Hkv * c.P * c.D, c.P * c.D, c.D};
  p.pv = {m.pv.data(exact), c.Hkv * c.P * c.D, c.P * c.D, c.D};
  p.ids = exact ? m.ids.host() : m.ids.data(), p.lengths = exact ? m.lengths.host() : m.lengths.data();
  if (c.packed) {
    p.cu_q = exact ? m.cu_q.host() : m.cu_q.data();
    p.cu_k = exact ? m.cu_k.host() : m.cu_k.data();
  }
  const Dtype wide = exact ? Dtype::kFloat64 : m.wide;
  if (c.gated) p.gate = {m.gate.data(exact), wide, c.Hq, 1}, p.key_gate = {m.key_gate.data(exact), wide, 0, 1};
  if (adds) p.mask = {m.mask.data(exact), false, exact ? wide : type, 0, 0, c.T};
  if (c.masks == Masks::kBoolean) p.mask = {exact ? m.seen.host() : m.seen.data(), true, wide, c.S * c.T, 0, c.T};
  if (adds && softmax) p.bias = {m.bias.data(exact), false, wide, 0, c.S * c.P, c.P};
  p.composition = c.composition, p.scale = 0.5, p.softcap = c.softcap, p.causal = c.causal, p.window = c.window;
  p.window_over_prefix = c.window > 0;
  const uint64_t seed = exact ? m.seed[0] : 0;  // the kernels read it where it is
  p.own_dropout = make_dropout(c.p, seed, 0), p.prefix_dropout = make_dropout(c.p, seed, 1);
  p.seed = exact || c.p == 0 ? nullptr : m.seed.data();
  p.out = m.out.data(exact), p.lse = m.lse.data(exact), p.prefix_lse = m.prefix_lse.data(exact);
  p.dout = {m.dout.data(exact), c.S * c.Hq * row, row, c.Hq * row};
  p.saved_out = {m.out.data(exact), c.S * c.Hq * c.D, c.D, c.Hq * c.D};
  p.dq = m.dq.data(exact), p.dk = m.dk.data(exact), p.dv = m.dv.data(exact);
  p.dpk = m.dpk.data(exact), p.dpv = m.dpv.data(exact);
  if (c.gated) p.dgate = m.dgate.data(exact), p.dkey_gate = m.dkey_gate.data(exact);
  return p;
}

// What the binding launches.
bool run(const Case& c, Memory& m, const Problem& p, int splits) {
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
  Memory m(c, type, splits);
  const std::string name = std::string(c.name) + " of dtype " + std::to_string(static_cast<int>(type)) + ": ";
  const Problem exact = problem_of(c, m, Dtype::kFloat64, true);
  const Plan plan = make_plan(exact);
  forward_double(exact, plan);
  for (Numbers* numbers : {&m.out, &m.lse, &m.prefix_lse}) numbers->round();
  backward_double(exact, plan);
  if (!run(c, m, problem_of(c, m, type, false), splits)) return expect(false, name + "a launch failed");
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
