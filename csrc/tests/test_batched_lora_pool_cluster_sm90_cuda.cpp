// The one launch of batched_lora over a pool (pool_cluster_sm90.cu) against the two that it stands for, whose bits it
// must have, and against double loops: few and many chunks of K, several blocks and groups of columns, ranks that take
// several stages, x in y. See batched_lora_pool_cases.h.
#include "tests/batched_lora_pool_cases.h"

using namespace pk;
using namespace pk::test;

namespace {

constexpr Pair kPairs[] = {{Dtype::kBFloat16, Dtype::kBFloat16}, {Dtype::kFloat16, Dtype::kFloat16}};
const std::vector<std::vector<int>> kWide = {{8, 12, 5}, {64, 9, 1}, {0, 0, 0}, {0, 1, 128}, {1, 17, 70}};

const Case kCases[] = {
    {"ones", 8, {8}, {{1}}, {0}},
    {"one row, two groups of columns", 1096, {2312}, {{16}}, {0}},
    {"q, k, v", 1032, {520, 264, 24}, kWide, in_turn(37, 5)},
    {"28 chunks", 14336, {264}, {{12}, {3}}, in_turn(5, 2)},
    {"nine chunks, the last of one vector", 4104, {48}, {{20}, {3}}, in_turn(50, 2)},
    {"wider buffers", 80, {24, 48}, {{9, 3}, {3, 30}}, in_turn(20, 2), 8, 8},
    {"one adapter of many", 96, {24}, {{4}, {12}, {6}}, std::vector<int64_t>(70, 1)},
    {"as many adapters as rows", 64, {16}, std::vector<std::vector<int>>(40, {5}), in_turn(40, 40)},
    {"no adapter", 16, {8}, {{4}}, {-1, -1, -1}},
    {"nothing touched", 16, {8}, {{0}}, {0, 0}},
};
const Case kSquare = {"x in y", 2312, {2312}, {{12}, {0}, {65}}, in_turn(40, 3), 0, 8};

void bits_are_those_of_two_launches(const Case& c, const Pair& pair) {
  const std::vector<int64_t> rows = all_rows(c), backwards(rows.rbegin(), rows.rend());
  Run two(c, pair, {rows});
  expect(two.run(), two.name());
  bits_are_the_same(c, pair, two, {rows, 0, 7, 0, kOneLaunch}, "in one launch");
  bits_are_the_same(c, pair, two, {backwards, 2, 11, 0, kOneLaunch},
                    "in one launch, backwards, in other slots and pages");
  bits_are_the_same(c, pair, two, {{rows.back()}, 1, 3, 0, kOneLaunch}, "in one launch, alone");
}

void x_may_lie_in_y(const Pair& pair) {
  const std::vector<int64_t> rows = all_rows(kSquare);
  Run apart(kSquare, pair, {rows, 0, 7, 0, kTwoLaunches, kCopied});
  expect(apart.run(), apart.name());
  bits_are_the_same(kSquare, pair, apart, {rows, 0, 7, 0, kOneLaunch, kInY}, "in one launch, in place");
}

struct Call {
  const char* what;
  bool taken;
  void (*change)(Pool&);
};

// Addresses that nothing is read from: x, pages and y of 64 rows of 4096 and of 2 slots.
Pool call_of_64_rows() {
  const auto at = [](uintptr_t gigabytes) { return reinterpret_cast<unsigned char*>(gigabytes << 30); };
  Pool call{64, 4096, 2, at(1), 4096, at(16), nullptr, 1, {}, nullptr, 1};
  for (int g = 0; g < kMostSlices; ++g) {
    call.slice[g] = {4096, at(16), 100, at(32 + g), 4096, nullptr, 2, nullptr, nullptr};
  }
  return call;
}

unsigned char* x_moved(const Pool& call, int64_t elements) {
  return static_cast<unsigned char*>(const_cast<void*>(call.x)) + 2 * elements;
}

const Call kCalls[] = {
    {"the call that the others change", true, [](Pool&) {}},
    {"three slices", true, [](Pool& call) { call.slices = 3; }},
    {"no rows", false, [](Pool& call) { call.M = 0; }},
    {"many tiles", false, [](Pool& call) { call.M = 1024 * 16; }},
    {"as many as are few", true, [](Pool& call) { call.M = 1021 * 16; }},
    {"rows of x not in vectors", false, [](Pool& call) { call.x_stride = 4100; }},
    {"rows of A not in vectors", false, [](Pool& call) { call.K = 4092; }},
    {"y not aligned", false, [](Pool& call) { call.slice[0].y = x_moved(call, 1 << 20 | 4); }},
    {"long ranks", true, [](Pool& call) { call.slice[0].T = 60; }},
    {"ranks that shared memory does not hold", false, [](Pool& call) { call.slice[0].T = 70; }},
    {"x in y", true, [](Pool& call) { call.slice[0].y = x_moved(call, 0); }},
    {"x in one y of two", false, [](Pool& call) { call.slices = 2, call.slice[1].y = x_moved(call, 0); }},
    {"x in y, other rows", false, [](Pool& call) { call.slice[0].y = x_moved(call, 4096); }},
    {"x half in the row before", false, [](Pool& call) { call.slice[0].y = x_moved(call, 2048); }},
    {"x and y side by side", true,
     [](Pool& call) { call.x_stride = call.slice[0].y_stride = 8192, call.slice[0].y = x_moved(call, 4096); }},
    {"x and y side by side, half over", true,
     [](Pool& call) { call.x_stride = call.slice[0].y_stride = 8192, call.slice[0].y = x_moved(call, 2048); }},
    {"rows of y wider apart than those of x in them", false,
     [](Pool& call) { call.slice[0].y_stride = 8192, call.slice[0].y = x_moved(call, 0); }},
    {"one row, half over", true, [](Pool& call) { call.M = 1, call.slice[0].y = x_moved(call, 2048); }},
};

void only_what_it_can_serve() {
  for (const Call& c : kCalls) {
    Pool call = call_of_64_rows();
    c.change(call);
    for (const Pair& pair : kPairs) expect(has_cluster_kernel(pair.x, pair.pages, call) == c.taken, c.what);
    expect(!has_cluster_kernel(Dtype::kFloat32, Dtype::kFloat32, call), c.what);
    expect(!has_cluster_kernel(Dtype::kBFloat16, Dtype::kFloat32, call), c.what);
  }
}

}  // namespace

int main() {
  only_what_it_can_serve();
  if (!sm90_present()) {
    printf("gpu: 0 launches of pool_cluster run: no device of compute capability 9.0\n");
    return failures ? 1 : kSkipped;
  }
  for (const Pair& pair : kPairs) {
    for (const Case& c : kCases) {
      rows_are_right(c, pair, kOneLaunch);
      bits_are_those_of_two_launches(c, pair);
    }
    rows_are_right(kCases[2], pair, kOneLaunch, true);
    other_routes_add_nothing(kCases[2], pair, kOneLaunch);
    x_may_lie_in_y(pair);
  }
  each_schedule([] {
    for (const int i : {1, 2, 4}) bits_are_those_of_two_launches(kCases[i], kPairs[0]);
    x_may_lie_in_y(kPairs[1]);
  });
  printf("%s: %d elements compared, %d failures\n", kWhere, compared, failures);
  return failures != 0;
}
