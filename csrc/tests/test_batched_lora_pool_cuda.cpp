// The kernels of batched_lora over a pool against double loops, in the emulator and, by the same program, on a GPU:
// ragged sizes, mixed ranks, scattered pages, several slices, bottlenecks, biases, gains, and the same bits wherever
// the same is asked for; see batched_lora_pool_cases.h.
#include "tests/batched_lora_pool_cases.h"

using namespace pk;
using namespace pk::test;

namespace {

constexpr Pair kPairs[] = {{Dtype::kBFloat16, Dtype::kBFloat16}, {Dtype::kFloat16, Dtype::kFloat16},
                           {Dtype::kBFloat16, Dtype::kFloat32},  {Dtype::kFloat16, Dtype::kFloat32},
                           {Dtype::kFloat32, Dtype::kFloat32},   {Dtype::kFloat64, Dtype::kFloat64}};

const Case kCases[] = {
    {"ones", 8, {8}, {{1}}, {0}},
    {"one row, chunks and blocks", 1096, {520}, {{16}}, {0}},
    {"q, k, v", 136, {64, 16, 24}, kMixed, in_turn(37, 5)},
    {"ragged", 67, {131, 9, 33}, kMixed, in_turn(23, 5)},
    {"unaligned rows", 72, {40}, {{9}, {3}}, in_turn(20, 2), 1, 3},
    {"wider buffers", 80, {24, 48}, {{9, 3}, {3, 30}}, in_turn(20, 2), 8, 8},
    {"one adapter of many", 96, {24}, {{4}, {12}, {6}}, std::vector<int64_t>(70, 1)},
    {"the largest rank", 600, {264}, {{3}, {512}}, in_turn(18, 2)},
    {"as many adapters as rows", 64, {16}, std::vector<std::vector<int>>(40, {5}), in_turn(40, 40)},
    {"no adapter", 16, {8}, {{4}}, {-1, -1, -1}},
    {"no rows", 16, {8}, {{4}}, {}},
    {"nothing touched", 16, {8}, {{0}}, {0, 0}},
    {"only K in vectors", 72, {9}, {{5}, {18}}, in_turn(20, 2)},
    {"only N in vectors", 67, {16}, {{5}, {18}}, in_turn(20, 2)},
};

void bits_are_kept(const Case& c, const Pair& pair) {
  Run whole(c, pair, {all_rows(c)});
  expect(whole.run(), whole.name());
  const std::vector<int64_t> rows = all_rows(c), backwards(rows.rbegin(), rows.rend());
  for (const int64_t row : {rows.front(), rows.size() > 6 ? rows[6] : rows.back(), rows.back()}) {
    bits_are_the_same(c, pair, whole, {{row}, 1, 3}, "alone");
  }
  bits_are_the_same(c, pair, whole, {backwards, 2, 11}, "backwards, in other slots and pages");
  bits_are_the_same(c, pair, whole, {rows, 0, 7, 1}, "with h in one part");
  bits_are_the_same(c, pair, whole, {rows, 0, 7, static_cast<int>(ceil_div(c.K, kChunk))}, "with h in chunks");
}

}  // namespace

int main() {
  if (!device_present()) {
    printf("gpu: 0 kernels of batched_lora over a pool run: no device\n");
    return kSkipped;
  }
  for (const Pair& pair : kPairs) {
    for (const Case& c : kCases) rows_are_right(c, pair);
    rows_are_right(kCases[2], pair, kTwoLaunches, true);
    rows_are_right(kCases[3], pair, kTwoLaunches, true);
    other_routes_add_nothing(kCases[2], pair);
    for (const int i : {1, 2, 3, 6}) bits_are_kept(kCases[i], pair);
  }
  for (const Pair& pair : {kPairs[0], kPairs[1], kPairs[4]}) {
    each_schedule([&] {
      for (const int i : {1, 2, 3}) rows_are_right(kCases[i], pair);
    });
  }
  for (const Pair& pair : {kPairs[0], kPairs[1]}) bits_are_kept(kCases[7], pair);
  printf("%s: %d elements compared, %d failures\n", kWhere, compared, failures);
  return failures != 0;
}
