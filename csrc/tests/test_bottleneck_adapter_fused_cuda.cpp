// The fused forward of bottleneck_adapter, whole and behind a shrink, against loops in double: rows, columns and
// bottlenecks around the tiles, rows that no vector fits, all options and none, masks, what fp16 cannot hold, NaNs and
// infinities. And for which calls the two are meant. Needs a GPU, or the emulator.
#include "tests/bottleneck_adapter_fused_cases.h"

using namespace pk;
using namespace pk::test;

namespace {

void the_shape_decides() {
  constexpr Dtype kBf = Dtype::kBFloat16, kHalf = Dtype::kFloat16, kFloat = Dtype::kFloat32;
  for (const Dtype T : {kBf, kHalf}) {
    expect(has_fused_kernel(T, T, 8129, 1) && has_fused_kernel(T, T, 8129, 256), "many rows take one launch");
    expect(!has_fused_kernel(T, T, 8128, 256) && !has_fused_kernel(T, T, 8129, 257), "others do not");
    expect(has_few_rows_kernel(T, T, 1, 8, 1) && has_few_rows_kernel(T, T, 16, 8, 256), "few rows take two");
    expect(!has_few_rows_kernel(T, T, 17, 8, 256) && !has_few_rows_kernel(T, T, 16, 8, 257), "others do not");
    const int64_t widest = 65535 * 64;  // a grid's y has no more blocks
    expect(has_few_rows_kernel(T, T, 16, widest, 1) && !has_few_rows_kernel(T, T, 16, widest + 1, 1), "the grid's end");
  }
  for (const auto& pair : {std::pair(kBf, kFloat), std::pair(kBf, kHalf), std::pair(kFloat, kFloat)}) {
    expect(!has_fused_kernel(pair.first, pair.second, 8129, 1), "16 bits and one type");
    expect(!has_few_rows_kernel(pair.first, pair.second, 16, 8, 1), "16 bits and one type");
  }
}

}  // namespace

int main() {
  if (!test::device_present()) {
    printf("gpu: the fused kernel of bottleneck_adapter was not run: no device\n");
    return test::kSkipped;
  }
  for (const Dtype T : {Dtype::kBFloat16, Dtype::kFloat16}) {
    check(T, {1, 1, 1, 1, 0}, {false, false, false, kRelu, 1});
    check(T, {63, 67, 5, 65, 3}, {true, true, true, kGelu, 1});
    check(T, {64, 64, 64, 64, 8}, {false, false, false, kSilu, 1});
    check(T, {65, 136, 65, 131, 8}, {true, false, false, kGeluTanh, 1});
    check(T, {130, 72, 24, 72, 0}, {true, true, false, kSigmoid, 1});
    check(T, {9, 264, 129, 24, 8}, {true, true, true, kLeakyRelu, 1});
    check(T, {65, 192, 256, 136, 8}, {true, true, true, kTanh, 1});
    check(T, {5, 128, 33, 40, 1}, {false, false, false, kIdentity, 1});
    check(T, {66, 64, 72, 65, 8}, {true, true, true, kIdentity, 256});  // |h| far beyond 65504
    check(T, {3, 72, 8, 16, 0}, {false, false, false, kRelu, 0x1p-6});
    check(T, {1, 72, 40, 136, 8, 3}, {true, true, true, kGelu, 1});
    check(T, {16, 67, 5, 65, 0, 1}, {true, false, false, kRelu, 1});
    check(T, {66, 64, 256, 24, 8, 2}, {false, false, false, kTanh, 1});
    check(T, {5, 64, 128, 131, 8, 2}, {true, true, true, kIdentity, 256});
    check(T, {5, 64, 40, 72, 0}, {false, false, false, kIdentity, 1, true});
    check(T, {5, 64, 40, 72, 0, 2}, {false, false, false, kIdentity, 1, true});
    for (const int splits : {0, 2}) {
      stays_in_its_row(T, splits);
      a_dropped_nan_is_zero(T, splits);
    }
  }
  the_shape_decides();
  return test::said();
}
