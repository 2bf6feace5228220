// The one launch of bottleneck_adapter for few rows (few_rows_sm90.cu) against loops in double: one stage of K and more
// than the ring holds, fewer blocks' shares than blocks, several tiles of N to a block, all options and none, masks,
// what fp16 cannot hold, NaNs and infinities, any order of threads and copies. And for which calls it is meant.
#include "tests/bottleneck_adapter_fused_cases.h"

#ifdef EMULATOR_BUILD
#include "emulator/emulator.h"
#endif

using namespace pk;
using namespace pk::test;

namespace {

constexpr Dtype kBf = Dtype::kBFloat16, kHalf = Dtype::kFloat16, kFloat = Dtype::kFloat32;

// Addresses that nothing is read from.
Fused call_of_one_row() {
  static char place[32];
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(place) + 15) / 16 * 16;
  void* const at = reinterpret_cast<void*>(aligned);
  Fused call{};
  call.x = call.A = call.B = call.residual = call.y = at;
  call.x_stride = call.K = call.N = call.residual_stride = 4096;
  call.M = 1;
  call.E = 64;
  return call;
}

struct Change {
  const char* what;
  bool taken;
  void (*change)(Fused&);
};
constexpr Change kChanges[] = {
    {"one row", true, [](Fused&) {}},
    {"16 rows", true, [](Fused& call) { call.M = 16; }},
    {"17 rows", false, [](Fused& call) { call.M = 17; }},
    {"E of 72", false, [](Fused& call) { call.E = 72; }},
    {"more of A than a block reads in time", false, [](Fused& call) { call.K = 4104; }},
    {"a narrow A for a larger K", true, [](Fused& call) { call.K = call.x_stride = 16384, call.E = 16; }},
    {"rows of x not in vectors", false, [](Fused& call) { call.x_stride = 4100; }},
    {"rows of B not in vectors", false, [](Fused& call) { call.E = 60; }},
    {"rows of y not in vectors", false, [](Fused& call) { call.N = 4092; }},
    {"rows of the residual not in vectors", false, [](Fused& call) { call.residual_stride = 4100; }},
};

void only_what_it_can_serve() {
  for (const Change& c : kChanges) {
    Fused call = call_of_one_row();
    c.change(call);
    expect(has_few_rows_cluster_kernel(kBf, kBf, call) == c.taken, c.what);
    expect(has_few_rows_cluster_kernel(kHalf, kHalf, call) == c.taken, c.what);
    expect(!has_few_rows_cluster_kernel(kBf, kFloat, call) && !has_few_rows_cluster_kernel(kFloat, kFloat, call),
           c.what);
  }
}

void rows_are_right(Dtype T) {
  check(T, {1, 8, 8, 8, 0}, {false, false, false, kRelu, 1}, few_rows_cluster);
  check(T, {16, 136, 64, 72, 8}, {true, true, true, kGelu, 1}, few_rows_cluster);
  check(T, {9, 1032, 24, 136, 0}, {true, false, false, kSilu, 1}, few_rows_cluster);
  check(T, {3, 4104, 16, 24, 8}, {false, false, true, kGeluTanh, 1}, few_rows_cluster);  // more stages than slots
  check(T, {2, 64, 40, 8840, 0}, {true, true, false, kTanh, 1}, few_rows_cluster);       // tiles: 139 for 128 blocks
  check(T, {5, 64, 40, 1096, 8}, {true, true, true, kIdentity, 256}, few_rows_cluster);  // |h| far beyond 65504
  check(T, {5, 64, 40, 72, 0}, {false, false, false, kIdentity, 1, true}, few_rows_cluster);
}

}  // namespace

int main() {
  only_what_it_can_serve();
  if (!sm90_present()) {
    printf("gpu: the one launch of bottleneck_adapter for few rows was not run: no device of compute capability 9.0\n");
    return failures ? 1 : kSkipped;
  }
  for (const Dtype T : {kBf, kHalf}) {
    rows_are_right(T);
    stays_in_its_row(T, 0, few_rows_cluster, 16);
    a_dropped_nan_is_zero(T, 0, few_rows_cluster, 16);
  }
#ifdef EMULATOR_BUILD
  using emulator::Copies;
  for (const emulator::Schedule& schedule :
       {emulator::Schedule{1, Copies::kEarly}, emulator::Schedule{2, Copies::kRandom}}) {
    emulator::set_schedule(schedule);
    rows_are_right(kBf);
  }
#endif
  return said();
}
