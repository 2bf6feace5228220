// The forward kernels of prefix_attention against its fp64 loops: every dtype and composition, many rows and few, heads
// of every width, prefixes of several lengths, shared and none, packed sequences, masks, windows, dropout, gates, rows
// that are not aligned. Needs a GPU, or the emulator.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "prefix_attention/prefix_attention_cuda.h"
#include "tests/device_array.h"
#include "tests/typed_values.h"

using namespace pk;
using namespace pk::prefix_attention;
using pk::test::Array;
using pk::test::ran;

namespace {

int failures = 0, cases = 0;

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
};

constexpr Composition kMerge = Composition::kMerge, kAdd = Composition::kAdd, kRelu = Composition::kRelu,
                      kLinear = Composition::kLinear;
const Case kCases[] = {
    {"ragged", 3, 4, 2, 37, 37, 19, 40, 2, kMerge, true, false, false, Masks::kNone, 0, 0, 0},
    {"tiles", 1, 2, 1, 131, 150, 140, 32, 1, kMerge, true, false, false, Masks::kBoolean, 60, 1.5, 0.1},
    {"96", 2, 2, 1, 19, 19, 40, 96, 2, kMerge, true, true, false, Masks::kNone, 0, 0, 0.1},
    {"128", 1, 2, 2, 70, 70, 9, 128, 1, kMerge, false, true, false, Masks::kAdditive, 0, 0, 0},
    {"wide", 1, 2, 2, 17, 40, 33, 256, 2, kMerge, true, false, false, Masks::kNone, 0, 0, 0.5},
    {"packed", 1, 4, 2, 9, 15, 7, 32, 3, kMerge, true, true, true, Masks::kNone, 0, 0, 0.1},
    {"strided", 1, 4, 2, 9, 15, 7, 40, 2, kMerge, true, false, false, Masks::kNone, 0, 0, 0, true},
    {"no prefixes", 2, 4, 2, 9, 9, 4, 32, 0, kMerge, true, true, false, Masks::kNone, 0, 0, 0},
    {"no keys", 2, 4, 1, 5, 0, 4, 32, 2, kMerge, true, false, false, Masks::kNone, 0, 0, 0},
    {"unseen", 2, 2, 1, 12, 7, 0, 32, 1, kMerge, true, false, false, Masks::kNone, 0, 0, 0},
    {"nothing", 2, 2, 1, 80, 5, 0, 32, 1, kMerge, true, false, false, Masks::kNone, 0, 0, 0},
    {"add", 3, 4, 2, 19, 19, 70, 48, 2, kAdd, true, true, false, Masks::kAdditive, 4, 2, 0.1},
    {"relu", 3, 4, 4, 19, 21, 40, 32, 2, kRelu, true, true, false, Masks::kNone, 0, 0, 0.1},
    {"linear", 3, 4, 2, 19, 21, 40, 32, 2, kLinear, true, true, false, Masks::kNone, 0, 0, 0},
    {"linear wide", 1, 2, 1, 40, 21, 40, 136, 1, kLinear, true, true, false, Masks::kNone, 0, 0, 0.1},
    {"decode", 9, 6, 2, 1, 23, 5, 64, 3, kMerge, true, true, false, Masks::kNone, 0, 0, 0},
    {"decode shared", 150, 2, 1, 1, 2, 5, 32, 1, kMerge, true, false, false, Masks::kNone, 0, 0, 0},
    {"decode spans", 2, 4, 2, 2, 300, 200, 64, 2, kMerge, true, true, false, Masks::kBoolean, 0, 1.5, 0.1},
    {"decode window", 2, 2, 1, 3, 300, 200, 128, 1, kMerge, true, false, false, Masks::kNone, 140, 0, 0},
    {"decode strided", 3, 2, 1, 2, 23, 40, 40, 2, kMerge, true, false, false, Masks::kNone, 0, 0, 0, true},
    {"decode wide", 2, 2, 2, 1, 40, 140, 256, 1, kMerge, true, false, false, Masks::kAdditive, 0, 0, 0.5},
    {"decode add", 5, 4, 2, 1, 150, 140, 48, 2, kAdd, true, true, false, Masks::kNone, 0, 2, 0.1},
    {"decode relu", 5, 4, 2, 2, 21, 140, 96, 2, kRelu, true, true, false, Masks::kNone, 0, 0, 0.1},
    {"decode linear", 5, 4, 2, 1, 21, 140, 32, 2, kLinear, true, true, false, Masks::kNone, 0, 0, 0},
    {"decode unseen", 2, 2, 1, 5, 2, 0, 8, 1, kAdd, true, false, false, Masks::kNone, 0, 0, 0},
};

// The same numbers in double and in a type, where the kernels read or write them.
struct Numbers {
  Dtype type;
  std::vector<double> wide;
  Array<char> narrow;

  Numbers(Dtype type, int64_t count, uint32_t seed = 0)
      : type(type), wide(static_cast<size_t>(count)), narrow(static_cast<size_t>(count * test::bytes_of(type))) {
    memset(narrow.host(), 0xFF, static_cast<size_t>(count * test::bytes_of(type)));  // NaN until it is written
    for (int64_t i = 0; seed && i < count; ++i) {  // multiples of 1/64 in [-1, 1), which every type holds
      seed = seed * 1664525u + 1013904223u;
      test::write(narrow.host(), type, i, wide[static_cast<size_t>(i)] = (static_cast<int>(seed >> 25) - 64) / 64.);
    }
  }
  void* data(bool exact) { return exact ? static_cast<void*>(wide.data()) : narrow.data(); }
};

// Everything that a case reads and writes.
struct Memory {
  Dtype type, wide;  // wide: the accumulator's
  int64_t pad;       // of a row of q, k and v
  Numbers q, k, v, pk, pv, gate, key_gate, bias, mask, out, lse, prefix_lse;
  Array<uint8_t> seen;
  Array<int32_t> ids, lengths, cu_q, cu_k;
  Array<uint64_t> seed;

  Memory(const Case& c, Dtype type)
      : type(type),
        wide(type == Dtype::kFloat64 ? type : Dtype::kFloat32),
        pad(c.strided ? 3 : 0),
        q(type, c.B * c.S * c.Hq * (c.D + pad), 1),
        k(type, c.B * c.T * c.Hkv * (c.D + pad), 2),
        v(type, c.B * c.T * c.Hkv * (c.D + pad), 3),
        pk(type, c.prefixes * c.Hkv * c.P * c.D, 4),
        pv(type, c.prefixes * c.Hkv * c.P * c.D, 5),
        gate(wide, c.rows() * c.Hq, 6),
        key_gate(wide, c.Hq, 7),
        bias(wide, c.Hq * c.S * c.P, 9),
        mask(type, c.S * c.T, 10),
        out(type, c.B * c.S * c.Hq * c.D),
        lse(wide, c.B * c.S * c.Hq),
        prefix_lse(wide, c.B * c.S * c.Hq),
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

  // exact: of the fp64 loops.
  Problem problem(const Case& c, bool exact) {
    Problem p{};
    const int64_t row = c.D + pad;
    const Dtype gates = exact ? Dtype::kFloat64 : wide;
    p.B = c.B, p.Hq = c.Hq, p.Hkv = c.Hkv, p.S = c.S, p.T = c.T, p.P = c.P, p.D = c.D;
    p.prefixes = c.prefixes, p.rows = c.rows(), p.type = exact ? Dtype::kFloat64 : type;
    p.q = {q.data(exact), c.S * c.Hq * row, row, c.Hq * row};
    p.k = {k.data(exact), c.T * c.Hkv * row, row, c.Hkv * row};
    p.v = {v.data(exact), c.T * c.Hkv * row, row, c.Hkv * row};
    p.pk = {pk.data(exact), c.Hkv * c.P * c.D, c.P * c.D, c.D};
    p.pv = {pv.data(exact), c.Hkv * c.P * c.D, c.P * c.D, c.D};
    p.ids = exact ? ids.host() : ids.data(), p.lengths = exact ? lengths.host() : lengths.data();
    if (c.packed) {
      p.cu_q = exact ? cu_q.host() : cu_q.data();
      p.cu_k = exact ? cu_k.host() : cu_k.data();
    }
    if (c.gated) p.gate = {gate.data(exact), gates, c.Hq, 1}, p.key_gate = {key_gate.data(exact), gates, 0, 1};
    if (c.masks == Masks::kBoolean) p.mask = {exact ? seen.host() : seen.data(), true, gates, c.S * c.T, 0, c.T};
    if (c.masks == Masks::kAdditive) {
      p.mask = {mask.data(exact), false, p.type, 0, 0, c.T};
      p.bias = {bias.data(exact), false, gates, 0, c.S * c.P, c.P};
    }
    p.composition = c.composition, p.scale = 0.5, p.softcap = c.softcap, p.causal = c.causal, p.window = c.window;
    p.window_over_prefix = c.window > 0;
    const uint64_t key = exact ? seed[0] : 0;  // the kernels read it where it is
    p.own_dropout = make_dropout(c.p, key, 0), p.prefix_dropout = make_dropout(c.p, key, 1);
    p.seed = exact || c.p == 0 ? nullptr : seed.data();
    p.out = out.data(exact), p.lse = lse.data(exact), p.prefix_lse = prefix_lse.data(exact);
    return p;
  }
};

// What the binding launches.
bool run(Problem p) {
  if (p.type == Dtype::kFloat32 || p.type == Dtype::kFloat64) return ran([&] { return forward_plain(p, nullptr); });
  if (!splits_keys(p)) return ran([&] { return forward_rows(p, nullptr); });
  Array<float> scratch(static_cast<size_t>(split_floats(p)));
  set_splits(p, scratch.data());
  return ran([&] {
    const cudaError_t first = forward_split(p, nullptr), second = forward_merge(p, nullptr);
    return first != cudaSuccess ? first : second;
  });
}

void compare(const std::string& name, Dtype type, Numbers& numbers) {
  double worst = 0, largest = 1;
  bool same_infinities = true;
  for (size_t i = 0; i < numbers.wide.size(); ++i) {
    const double wanted = numbers.wide[i],
                 got = test::read(numbers.narrow.host(), numbers.type, static_cast<int64_t>(i));
    if (std::isinf(wanted) || !std::isfinite(got)) {
      same_infinities = same_infinities && got == wanted;
      continue;
    }
    worst = std::fmax(worst, std::fabs(wanted - got));
    largest = std::fmax(largest, std::fabs(wanted));
  }
  // 16 bits: weights and o are rounded; others: sums of a few hundred terms, and exponentials of sums
  const double eps = test::bytes_of(numbers.type) == 4 ? 100 * 0x1p-24
                     : numbers.type == Dtype::kFloat64 ? 100 * 0x1p-52
                     : type == Dtype::kFloat16         ? 2 * 0x1p-11
                                                       : 2 * 0x1p-8;
  ++cases;
  if (same_infinities && worst <= eps * largest) return;
  ++failures;
  printf("FAILED %s: %s is off by %g of %g\n", test::kWhere, name.c_str(), worst, largest);
}

void run_case(const Case& c, Dtype type) {
  Memory m(c, type);
  const std::string name = std::string(c.name) + " of dtype " + std::to_string(static_cast<int>(type)) + ": ";
  const Problem exact = m.problem(c, true);
  forward_double(exact, make_plan(exact));
  if (!run(m.problem(c, false))) {
    ++failures;
    return;
  }
  compare(name + "o", type, m.out);
  compare(name + "lse", type, m.lse);
  if (c.composition == kAdd) compare(name + "prefix_lse", type, m.prefix_lse);
}

}  // namespace

int main() {
  if (!test::device_present()) {
    printf("gpu: no forward kernel of prefix_attention run: no device\n");
    return test::kSkipped;
  }
  for (const Dtype type : {Dtype::kBFloat16, Dtype::kFloat16, Dtype::kFloat32, Dtype::kFloat64}) {
    for (const Case& c : kCases) run_case(c, type);
  }
  printf("%s: %d arrays of prefix_attention's forward, %d failures\n", test::kWhere, cases, failures);
  return failures != 0;
}
