// The route of a batch: which rows each adapter has, as tiles of up to 16 rows of one adapter; layout in
// batched_lora.h. ids [M] -> header, ids with those out of range as -1, row numbers sorted stably by adapter (rows
// without one last), tiles. A counting sort by one block, since it runs once per step and for tens of rows: windows of
// 8192 adapters, each beginning at the least one not yet routed, are counted in shared memory; a scan of the counts
// gives each adapter its place in the order and its tiles; then every warp goes through all rows in order and places
// those of its share of the adapters. Integer arithmetic: the order in which counts are added changes nothing.
#include <climits>

#include "batched_lora/batched_lora_cuda.h"
#include "common/warp.h"

namespace pk::batched_lora {
namespace {

constexpr int kWarps = 32, kThreads = 32 * kWarps;
constexpr int kTileMost = static_cast<int>(kTile);
constexpr int kWindow = 8192, kEach = kWindow / kThreads;  // adapters of a window, of a thread in its scan
constexpr int kNone = INT_MIN;                             // of -adapter, where the greatest is the least adapter

struct Shared {
  int place[kWindow];  // counts of the window's adapters, then the position of the next row of each
  int row[kThreads];   // adapters of rows, counted from the window's first
  int rows[kWarps], tiles[kWarps];
  int outside, least[2];
};

struct Counts {
  int rows, tiles;
};

// The sums over the threads before this one, and in `all` over the whole block.
__device__ __forceinline__ Counts counts_before(Shared& shared, Counts mine, Counts& all) {
  const int lane = lane_index(), warp = warp_index();
  Counts sum = mine;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const int rows = __shfl_up_sync(kFullWarp, sum.rows, by), tiles = __shfl_up_sync(kFullWarp, sum.tiles, by);
    if (lane >= by) sum = {sum.rows + rows, sum.tiles + tiles};
  }
  if (lane == 31) {
    shared.rows[warp] = sum.rows;
    shared.tiles[warp] = sum.tiles;
  }
  __syncthreads();
  all = {};
  Counts before = {sum.rows - mine.rows, sum.tiles - mine.tiles};
#pragma unroll 8
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = {before.rows + all.rows, before.tiles + all.tiles};
    all = {all.rows + shared.rows[w], all.tiles + shared.tiles[w]};
  }
  __syncthreads();
  return before;
}

// Writes the ids of the route; counts those out of range, and leaves the least adapter in shared.least[0].
__device__ __forceinline__ void clean(Shared& shared, const Routing& call, int32_t* ids) {
  int outside = 0, least = kNone;
  for (int64_t i = threadIdx.x; i < call.M; i += kThreads) {
    const int64_t id =
        call.wide ? static_cast<const int64_t*>(call.ids)[i] : int64_t{static_cast<const int32_t*>(call.ids)[i]};
    const bool valid = id >= 0 && id < call.adapters;
    ids[i] = valid ? static_cast<int32_t>(id) : -1;
    outside += !valid && id != -1;
    if (valid && -id > least) least = static_cast<int>(-id);
  }
  if (outside > 0) atomicAdd(&shared.outside, outside);
  if (least != kNone) atomicMax(&shared.least[0], least);
}

// Counts the rows of each of the window's adapters; the least adapter behind it goes to `behind`.
__device__ __forceinline__ void count(Shared& shared, const int32_t* ids, int64_t M, int first, int& behind) {
  int least = kNone;
  for (int64_t i = threadIdx.x; i < M; i += kThreads) {
    const int id = ids[i];
    if (id < first) continue;
    if (id - first < kWindow) {
      atomicAdd(&shared.place[id - first], 1);
    } else if (-id > least) {
      least = -id;
    }
  }
  if (least != kNone) atomicMax(&behind, least);
}

// Turns counts into positions, from done.rows on, and writes the window's tiles from done.tiles on. Returns its counts.
__device__ __forceinline__ Counts lay_out(Shared& shared, int32_t* tiles, int first, Counts done) {
  int* const mine = shared.place + threadIdx.x * kEach;
  Counts sum = {}, all;
  for (int i = 0; i < kEach; ++i) {
    sum = {sum.rows + mine[i], sum.tiles + (mine[i] + kTileMost - 1) / kTileMost};
  }
  const Counts before = counts_before(shared, sum, all);
  int place = done.rows + before.rows;
  int32_t* tile = tiles + int64_t{done.tiles + before.tiles} * kTileFields;
  for (int i = 0; i < kEach; ++i) {
    const int end = place + mine[i];
    mine[i] = place;
    for (; place < end; place += kTileMost, tile += kTileFields) {
      tile[kTileAdapter] = first + static_cast<int>(threadIdx.x) * kEach + i;
      tile[kTileFirst] = place;
      tile[kTileRows] = end - place < kTileMost ? end - place : kTileMost;
    }
    place = end;
  }
  return all;
}

// Places the rows of the window's adapters: each warp those of its share of them, in the order of the rows.
__device__ __forceinline__ void place_rows(Shared& shared, const int32_t* ids, int64_t M, int first, int32_t* order) {
  const int lane = lane_index(), warp = warp_index();
  for (int64_t begin = 0; begin < M; begin += kThreads) {
    const int64_t i = begin + threadIdx.x;
    const int id = i < M ? ids[i] : -1;
    shared.row[threadIdx.x] = id >= first && id - first < kWindow ? id - first : -1;
    __syncthreads();
    for (int at = lane; begin + at - lane < M && at < kThreads; at += 32) {
      const int adapter = shared.row[at];
      const bool mine = adapter >= 0 && static_cast<int>(adapter * 0x9E3779B1u >> 27) == warp;
      for (unsigned left = __ballot_sync(kFullWarp, mine); left != 0;) {
        const int leader = __ffs(static_cast<int>(left)) - 1, its = __shfl_sync(kFullWarp, adapter, leader);
        const unsigned same = __ballot_sync(kFullWarp, mine && adapter == its);
        const int place = shared.place[its];
        __syncwarp();
        if (lane == leader) shared.place[its] = place + __popc(same);
        __syncwarp();
        if (same >> lane & 1) order[place + __popc(same & ((1u << lane) - 1))] = static_cast<int32_t>(begin + at);
        left &= ~same;
      }
    }
    __syncthreads();
  }
}

// Rows without an adapter, in order, from position `place` on.
__device__ __forceinline__ void place_others(Shared& shared, const int32_t* ids, int64_t M, int place, int32_t* order) {
  for (int64_t begin = 0; begin < M; begin += kThreads) {
    const int64_t i = begin + threadIdx.x;
    const bool other = i < M && ids[i] < 0;
    Counts all;
    const Counts before = counts_before(shared, {other, 0}, all);
    if (other) order[place + before.rows] = static_cast<int32_t>(i);
    place += all.rows;
  }
}

__global__ void __launch_bounds__(kThreads, 1) batched_lora_forward_route_kernel(const __grid_constant__ Routing call) {
  __shared__ Shared shared;
  int32_t* const ids = call.route + kRouteHeader;
  int32_t *const order = ids + call.M, *const tiles = order + call.M;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    shared.outside = 0;
    shared.least[0] = kNone;
  }
  __syncthreads();
  clean(shared, call, ids);
  __syncthreads();
  Counts done = {};
  int turn = 0;
  for (int least = shared.least[0]; least != kNone; turn ^= 1) {
    const int first = -least;
    for (int i = thread; i < kWindow; i += kThreads) shared.place[i] = 0;
    if (thread == 0) shared.least[turn ^ 1] = kNone;
    __syncthreads();
    count(shared, ids, call.M, first, shared.least[turn ^ 1]);
    __syncthreads();
    const Counts window = lay_out(shared, tiles, first, done);
    __syncthreads();
    place_rows(shared, ids, call.M, first, order);
    done = {done.rows + window.rows, done.tiles + window.tiles};
    least = shared.least[turn ^ 1];
  }
  if (done.rows < call.M) place_others(shared, ids, call.M, done.rows, order);
  const int64_t unused = tile_capacity(call.M, call.adapters) * kTileFields;
  for (int64_t i = int64_t{done.tiles} * kTileFields + thread; i < unused; i += kThreads) tiles[i] = 0;
  if (thread < kRouteHeader) {
    const int64_t header[] = {done.tiles, done.rows, shared.outside, call.M, call.adapters};
    int value = 0;
#pragma unroll
    for (int i = 0; i < 5; ++i) value = thread == i ? static_cast<int>(header[i]) : value;
    call.route[thread] = value;
  }
}

}  // namespace

cudaError_t route(const Routing& call, cudaStream_t stream) {
  return PK_LAUNCH(batched_lora_forward_route_kernel, dim3(1), dim3(kThreads), 0, stream, call);
}

}  // namespace pk::batched_lora
