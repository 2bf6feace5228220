// The forward kernels of prefix_attention against its fp64 loops: every dtype and composition, many rows and few, heads
// of every width, prefixes of several lengths, shared and none, packed sequences, masks, windows, dropout, gates, rows
// that are not aligned. Needs a GPU, or the emulator.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "prefix_attention/prefix_attention_cuda.h"
#include "tests/prefix_attention_cases.h"

using namespace pk;
using namespace pk::prefix_attention;
using namespace pk::test;

namespace {

int failures = 0, cases = 0;

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
  Operands m(c, type);
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
