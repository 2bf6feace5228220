// The routing kernel against a plain sort, in the emulator and, by the same program, on a GPU: batches without rows,
// without adapters, of one adapter, of as many as rows; ids out of range; windows of adapters; every number compared.
#include <cstdio>
#include <string>
#include <vector>

#include "batched_lora/batched_lora_cuda.h"
#include "tests/device_array.h"

#ifdef EMULATOR_BUILD
#include "emulator/emulator.h"
#endif

using namespace pk;
using namespace pk::batched_lora;
using namespace pk::test;

namespace {

int failures = 0, routes = 0;

std::vector<int32_t> expected_route(const std::vector<int64_t>& given, int64_t adapters) {
  const int64_t M = static_cast<int64_t>(given.size());
  std::vector<int32_t> route(route_size(M, adapters));
  int32_t *const ids = route.data() + kRouteHeader, *order = ids + M, *tile = order + M;
  route[kRouteRows] = static_cast<int32_t>(M);
  route[kRouteAdapters] = static_cast<int32_t>(adapters);
  for (int64_t i = 0; i < M; ++i) {
    const bool valid = given[i] >= 0 && given[i] < adapters;
    ids[i] = valid ? static_cast<int32_t>(given[i]) : -1;
    route[kBadIds] += !valid && given[i] != -1;
  }
  const auto next_of = [&](int32_t last) {  // the least adapter greater than it, or -1
    int32_t next = -1;
    for (int64_t i = 0; i < M; ++i) {
      if (ids[i] > last && (next < 0 || ids[i] < next)) next = ids[i];
    }
    return next;
  };
  for (int32_t adapter = next_of(-1); adapter >= 0; adapter = next_of(adapter)) {
    int rows = 0;
    for (int64_t i = 0; i < M; ++i) {
      if (ids[i] != adapter) continue;
      if (rows++ % kTile == 0) {
        tile = ids + 2 * M + route[kTilesUsed]++ * kTileFields;
        tile[kTileAdapter] = adapter;
        tile[kTileFirst] = route[kRowsRouted];
      }
      ++tile[kTileRows];
      ++route[kRowsRouted];
      *order++ = static_cast<int32_t>(i);
    }
  }
  for (int64_t i = 0; i < M; ++i) {
    if (ids[i] < 0) *order++ = static_cast<int32_t>(i);
  }
  return route;
}

template <class Id>
void check(const std::string& name, const std::vector<int64_t>& given, int64_t adapters) {
  const int64_t M = static_cast<int64_t>(given.size()), size = route_size(M, adapters);
  Array<Id> ids(M + 1);
  Array<int32_t> got(size);
  for (int64_t i = 0; i < M; ++i) ids[i] = static_cast<Id>(given[i]);
  for (int64_t i = 0; i < size; ++i) got[i] = 0x7B7B7B7B;
  bool right = ran([&] { return route({ids.data(), sizeof(Id) == 8, M, adapters, got.data()}, nullptr); });
  const std::vector<int32_t> want = expected_route(given, adapters);
  for (int64_t i = 0; i < size; ++i) right = right && got[i] == want[i];
  ++routes;
  if (right) return;
  ++failures;
  printf("FAILED %s: route %s, M=%d, adapters=%d\n", kWhere, name.c_str(), int(M), int(adapters));
}

// M ids of adapters from `first` on, `distinct` of them `step` apart; every `gap`th row has none.
std::vector<int64_t> ids_of(int64_t M, int64_t first, int64_t distinct, int64_t step, int64_t gap) {
  std::vector<int64_t> ids;
  uint64_t state = 1;
  for (int64_t i = 0; i < M; ++i) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    ids.push_back(gap > 0 && i % gap == 0 ? -1 : first + static_cast<int64_t>((state >> 33) % distinct) * step);
  }
  return ids;
}

void small_batches() {
  check<int32_t>("of nothing", {}, 1);
  check<int32_t>("of one row", {0}, 1);
  check<int64_t>("of one row without an adapter", {-1}, 70000);
  check<int64_t>("of rows out of range", {5, -2, 4, int64_t{1} << 40, -1, 0, -(int64_t{1} << 33), 4}, 5);
  check<int32_t>("of few", {3, 1, 3, -1, 1, 3, 7, -1, 1}, 8);
  check<int32_t>("of one adapter", std::vector<int64_t>(64, 2), 4);
  check<int32_t>("of no adapter", std::vector<int64_t>(33, -1), 4);
  std::vector<int64_t> whole_tile(16, 0);
  whole_tile.insert(whole_tile.end(), 17, 1);
  check<int32_t>("of 16 and 17 rows", whole_tile, 2);
  std::vector<int64_t> backwards;
  for (int64_t i = 64; i-- > 0;) backwards.push_back(i);
  check<int32_t>("of distinct adapters", backwards, 64);
  check<int32_t>("of 64 in 65536", ids_of(64, 3, 64, 1021, 5), 65536);
}

void large_batches() {
  check<int32_t>("of 2500 rows", ids_of(2500, 0, 50, 1, 9), 50);
  check<int32_t>("of 1500 rows of 20000 adapters", ids_of(1500, 0, 20000, 1, 0), 20000);
  check<int64_t>("of the last adapters", ids_of(100, 2147483647 - 40, 40, 1, 0), 2147483647);
  check<int32_t>("of one share of a warp", ids_of(3000, 7, 1, 1, 2), 8192);
}

}  // namespace

int main() {
  if (!device_present()) {
    printf("gpu: 0 routes made: no device\n");
    return kSkipped;
  }
#ifdef EMULATOR_BUILD
  for (const uint64_t seed : {1, 2, 3}) {
    emulator::set_schedule({seed});
    small_batches();
  }
  emulator::set_schedule({});
#endif
  small_batches();
  large_batches();
  if (std::string(kWhere) != "race") check<int32_t>("of 100000 rows", ids_of(100000, 0, 300, 1, 11), 65536);
  printf("%s: %d routes compared, %d failures\n", kWhere, routes, failures);
  return failures != 0;
}
