// Makes and reads routes: rows sorted stably by adapter, cut into tiles of one adapter's rows.
#include "batched_lora/route.h"

#include <algorithm>
#include <numeric>

namespace pk::batched_lora {

template <class Id>
void make_route(const Id* ids, int64_t M, int64_t adapters, int32_t* route) {
  std::fill(route, route + route_size(M, adapters), 0);
  int32_t* const clean = route + kRouteHeader;
  int32_t* const order = clean + M;
  int32_t* tile = order + M;
  for (int64_t i = 0; i < M; ++i) {
    const bool valid = 0 <= ids[i] && ids[i] < adapters;
    route[kBadIds] += !valid && ids[i] != -1;
    clean[i] = valid ? static_cast<int32_t>(ids[i]) : -1;
  }
  std::iota(order, order + M, 0);
  // As unsigned numbers, rows without an adapter come last.
  const auto key = [clean](int32_t row) { return static_cast<uint32_t>(clean[row]); };
  std::stable_sort(order, order + M, [key](int32_t a, int32_t b) { return key(a) < key(b); });
  int64_t first = 0;
  while (first < M && clean[order[first]] >= 0) {
    const int32_t adapter = clean[order[first]];
    int64_t last = first + 1;
    while (last < M && last < first + kTile && clean[order[last]] == adapter) ++last;
    tile[kTileAdapter] = adapter;
    tile[kTileFirst] = static_cast<int32_t>(first);
    tile[kTileRows] = static_cast<int32_t>(last - first);
    tile += kTileFields;
    ++route[kTilesUsed];
    first = last;
  }
  route[kRowsRouted] = static_cast<int32_t>(first);
  route[kRouteRows] = static_cast<int32_t>(M);
  route[kRouteAdapters] = static_cast<int32_t>(adapters);
}

template void make_route(const int32_t*, int64_t, int64_t, int32_t*);
template void make_route(const int64_t*, int64_t, int64_t, int32_t*);

bool read_route(const int32_t* route, int64_t size, int64_t M, std::vector<Segment>& segments) {
  if (size < kRouteHeader + 2 * M || route[kRouteRows] != M) return false;
  const int32_t* const ids = route + kRouteHeader;
  const int32_t* const order = ids + M;
  std::vector<bool> seen(M, false);
  for (int64_t i = 0; i < M; ++i) {
    const int32_t row = order[i];
    if (row < 0 || row >= M || seen[row]) return false;
    seen[row] = true;
    const int64_t before = i == 0 ? -1 : ids[order[i - 1]];
    if (i > 0 && ids[row] == before && row > order[i - 1]) {
      ++segments.back().M;
    } else if (i == 0 || ids[row] > before || (ids[row] == -1 && before >= 0)) {
      segments.push_back({ids[row], 1, order + i});
    } else {
      return false;
    }
  }
  return true;
}

}  // namespace pk::batched_lora
