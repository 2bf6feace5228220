// Forward of batched_lora over a pool in one launch, for few tiles on sm_90: the shrink's h and the expand's y of
// batched_lora_cuda.h, with the bits of pool_shrink_cuda.cu and pool_expand_cuda.cu, without h in memory.
// Grid: (a cluster of 8 blocks for a tile, a group of columns, slice). With P = ceil(chunks of K / 8), block c
//   1. multiplies x and A over chunks [c P, (c + 1) P) and keeps the sums of each chunk in its shared memory;
//   2. adds up all chunks in order, from the shared memory of all blocks, and applies f(h + a);
//   3. adds to its share of the group's columns of y, 256 at a time.
// Bound by reading A and B^T, which a cluster reads once (A: once a group). All that a block reads is one stream of
// pieces of 8 KiB or so, by cp.async through a ring: per chunk 8 rows of x, the other 8 where there are more, the pages
// of A; then per 256 columns B^T, 16 ranks at a time, and y. So B^T is on its way while the shrink runs.
// x may lie where the one y lies if its rows do, see one_cluster_has_both(): all of a row of x is read before the
// barrier behind step 1, and y written after it. fp32 sums; 16 rows, whole pages and chunks are filled with zeros.
#include <algorithm>

#include "batched_lora/pool_cluster_stream.h"

namespace pk::batched_lora {
namespace {

// Step 1: sums [chunks][kTileMost][ranks] of the block's chunks. What is left in the ring belongs to step 3.
template <class T>
__device__ __forceinline__ void shrink(Stream<T>& stream, const PoolTile& tile, float* sums, int chunks, int ranks,
                                       WarpSums& of_warps) {
  // This thread adds up the warps for one row and one rank of each page.
  const int m = threadIdx.x / kPage, r = threadIdx.x % kPage, pages = (tile.rank + kPage - 1) / kPage;
  Vectors left[2] = {};
  int chunk = 0, page = 0;
#pragma unroll 1
  while (true) {  // in one place, not before the loops and in them: the code of a copy is long
    stream.refill(0);
    if (chunk >= chunks) return;
    if (page == 0) {
      read_own(left[0], stream.take());
      if (tile.rows > kTileMost / 2) read_own(left[1], stream.take());
    }
#pragma unroll
    for (int p = 0; p < kPages; ++p) {
      if (page + p == pages) break;
      Vectors right;
      read_own(right, stream.take());
      float d[4] = {};
      multiply<T>(d, left, right);
      store_sums(of_warps, warp_index(), lane_index(), p, d);
    }
    __syncthreads();
#pragma unroll
    for (int p = 0; p < kPages; ++p) {
      const int rank = (page + p) * kPage + r;
      if (m < tile.rows && rank < tile.rank) sums[m * ranks + rank] = add_sums(of_warps, p, m, r);
    }
    __syncthreads();
    page += kPages;
    if (page < pages) continue;
    page = 0;
    ++chunk;
    sums += kTileMost * ranks;
  }
}

// Step 2: u, zeros past the rows and ranks of the tile. A thread takes rows m and m + 8 of every 16th rank.
__device__ __forceinline__ void add_chunks(float* u, int pitch, float* sums, const Pool& call, const Slice& slice,
                                           const PoolTile& tile, const Room& room) {
  const int m = threadIdx.x / kStep, chunks = static_cast<int>(ceil_div(call.K, kChunk));
  const int of_block_most = static_cast<int>(room.chunks), ranks = static_cast<int>(room.ranks);
  const bool lora = is_lora(slice, tile);
#pragma unroll 1
  for (int rank = threadIdx.x % kStep; rank < pitch - 8; rank += kStep) {
    const int wanted = rank < tile.rank ? tile.rows : 0;
    float top = 0.f, low = 0.f;
    int block = 0, chunk = 0;
#pragma unroll 8
    for (int i = 0; i < chunks; ++i) {
      const float* const from = of_block(sums, block) + (chunk * kTileMost + m) * ranks + rank;
      if (m < wanted) top += from[0];
      if (m + 8 < wanted) low += from[8 * ranks];
      chunk = chunk + 1 == of_block_most ? 0 : chunk + 1;
      block += chunk == 0;
    }
#pragma unroll 1
    for (int i = lora ? 2 : 0; i < 2; ++i) {  // one after the other, which change places: the code of f is long
      const float h = top;
      top = low;
      low = m + 8 * i < wanted ? bottleneck(slice, tile, rank, h) : 0.f;
    }
    u[m * pitch + rank] = top;
    u[(m + 8) * pitch + rank] = low;
  }
}

// u of 16 ranks, the first of which it points to.
__device__ __forceinline__ void load_left(Left& left, const float* u, int pitch) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* const from = u + (lane_index() / 4 + i % 2 * 8) * pitch + lane_index() % 4 * 2 + i / 2 * 8;
    const float2 pair = *reinterpret_cast<const float2*>(from);
    uint32_t parts[kLowParts];
    cut_pair(pair.x, pair.y, parts);
#pragma unroll
    for (int p = 0; p < kLowParts; ++p) left[p][i] = parts[p];
  }
}

template <class T>
__device__ __forceinline__ float2 load_pair(const T* place) {
  const uint32_t pair = *reinterpret_cast<const uint32_t*>(place);
  return {to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)})};
}

// y, bias and gain of a unit are in the slot, y is changed there. n: the first column of y that is the lane's.
template <class T>
__device__ __forceinline__ void add_to_outputs(T* slot, const float (&sums)[kTiles][4], const Slice& slice,
                                               const PoolTile& tile, int64_t n, float scaling) {
  const bool gained = tile.entry[kTableGain] >= 0;
  slot += warp_index() * kWarpCols + lane_index() % 4 * 2;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    if (n + 8 * j >= slice.N) break;
    const float2 b = load_pair(slot + kBiasRow * kPitch + 8 * j), d = load_pair(slot + kGainRow * kPitch + 8 * j);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane_index() / 4 + 8 * i;
      if (row >= tile.rows) break;
      T* const y = slot + row * kPitch + 8 * j;
      const float2 before = load_pair(y);
      const T first = from_float<T>(changed(before.x, sums[j][2 * i], scaling, b.x, d.x, gained)),
              second = from_float<T>(changed(before.y, sums[j][2 * i + 1], scaling, b.y, d.y, gained));
      *reinterpret_cast<uint32_t*>(y) = pack(first, second);
    }
  }
}

// Step 3, for units of 256 columns of y.
template <class T>
__device__ __forceinline__ void expand(Stream<T>& stream, const Slice& slice, const PoolTile& tile, const float* u,
                                       int pitch, int unit, int units, float scaling) {
#pragma unroll 1
  for (; unit < units; ++unit) {
    float sums[kTiles][4] = {};
    T* slot;
#pragma unroll 1
    for (int rank = 0;; rank += kStep) {
      slot = stream.take();
      __syncthreads();
      stream.refill_units(1);
      if (rank >= tile.rank) break;  // it is y
      Left left;
      load_left(left, u + rank, pitch);
      multiply(sums, left, slot + warp_index() * kWarpCols);
    }
    const int64_t n = static_cast<int64_t>(unit) * kCols;
    add_to_outputs(slot, sums, slice, tile, n + warp_index() * kWarpCols + lane_index() % 4 * 2, scaling);
    __syncthreads();
    const int col = lane_index() * 8;
#pragma unroll 1
    for (int row = warp_index(); row < tile.rows && n + col < slice.N; row += kWarps) {
      const uint4 vector = *reinterpret_cast<const uint4*>(slot + row * kPitch + col);
      *reinterpret_cast<uint4*>(output<T>(slice, tile, row, n + col)) = vector;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    batched_lora_forward_pool_cluster_sm90_kernel(const __grid_constant__ Pool call) {
  PK_DYNAMIC_SHARED(T, ring);
  const Slice& slice = call.slice[blockIdx.z];
  const Room room = room_for(call.K, slice.T);
  unsigned char* const shared = reinterpret_cast<unsigned char*>(ring);
  float* const sums = reinterpret_cast<float*>(shared + Room::kSums);
  float* const u = reinterpret_cast<float*>(shared + room.u());
  int32_t* const entry = reinterpret_cast<int32_t*>(shared + room.entry());
  int32_t* const order = reinterpret_cast<int32_t*>(shared + room.order());
  const int thread = static_cast<int>(threadIdx.x), ranks = static_cast<int>(room.ranks);
  const int pitch = static_cast<int>(room.pitch());

  wait_for_previous_launch();
  PoolTile tile = pool_tile(call, slice, blockIdx.x / kClusterBlocks);
  // Read beside the rank, not behind it: then route, table and pages are the only waits for memory in a row.
  for (int i = thread; i < kTablePages + 2 * slice.T; i += kThreads) entry[i] = tile.entry[i];
  if (tile.used && thread < tile.rows) order[thread] = tile.order[thread];
  const int64_t of_slice = ceil_div(slice.N, kCols), groups = gridDim.y, group = blockIdx.y;
  if (tile.rank == 0 || of_slice * group / groups == of_slice * (group + 1) / groups) return;  // the whole cluster
  tile.entry = entry;
  tile.order = order;
  const float scaling = static_cast<const float*>(slice.scaling)[tile.slot];
  __syncthreads();

  const int rank = cluster_rank(), most = static_cast<int>(room.chunks);
  const int chunks = static_cast<int>(ceil_div(call.K, kChunk)), begin = rank * most,
            end = chunks < begin + most ? chunks : begin + most;
  const int64_t share = group * kClusterBlocks + rank;
  const int unit = static_cast<int>(of_slice * share / (groups * kClusterBlocks)),
            units = static_cast<int>(of_slice * (share + 1) / (groups * kClusterBlocks));
  Stream<T> stream(call, slice, tile, ring, {begin, end}, {unit, units});
  shrink(stream, tile, sums, end - begin, ranks, *reinterpret_cast<WarpSums*>(u));
  cluster_sync();
  if (unit < units) add_chunks(u, pitch, sums, call, slice, tile, room);
  cluster_arrive();
  expand(stream, slice, tile, u, pitch, unit, units, scaling);
  cluster_wait();  // others may still have read this block's sums
}

struct Bytes {
  uintptr_t begin, end;
};

// From the first element of a matrix to behind its last one.
Bytes bytes_of(const void* data, int64_t count, int64_t width, int64_t stride) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  return {begin, begin + static_cast<uintptr_t>((count - 1) * stride + width) * 2};
}

// x and y have no byte in common. Of rows that lie between each other's nothing is known.
bool apart(const Pool& call, const Slice& slice) {
  const Bytes x = bytes_of(call.x, call.M, call.K, call.x_stride),
              y = bytes_of(slice.y, call.M, slice.N, slice.y_stride);
  return x.end <= y.begin || y.end <= x.begin;
}

bool all_apart(const Pool& call) {
  return std::all_of(call.slice, call.slice + call.slices, [&](const Slice& slice) { return apart(call, slice); });
}

// Where they do: the cluster that reads row i of x must be the one that writes whatever of y lies there, which must
// then be of row i as well. A cluster has all columns of its rows where there is one group and one slice.
bool one_cluster_has_both(const Pool& call) {
  const Slice& slice = call.slice[0];
  const Bytes x = bytes_of(call.x, 1, call.K, 0), y = bytes_of(slice.y, 1, slice.N, 0);
  const uintptr_t width = (x.end > y.end ? x.end : y.end) - (x.begin < y.begin ? x.begin : y.begin);
  const bool rows_apart = call.x_stride == slice.y_stride && width <= static_cast<uintptr_t>(call.x_stride) * 2;
  return call.slices == 1 && (call.M == 1 || rows_apart);
}

// Clusters for one tile and slice, which share the columns of y and each make the same u: more than one where few tiles
// would leave most of the GPU idle.
int groups_of(const Pool& call) {
  int64_t widest = 0;
  for (int g = 0; g < call.slices; ++g) widest = std::max(widest, ceil_div(call.slice[g].N, kCols));
  const int64_t fill = kFillingClusters / (tile_capacity(call.M, call.slots) * call.slices);
  const int64_t groups = std::max<int64_t>(std::min(fill, ceil_div(widest, kClusterBlocks)), 1);
  return all_apart(call) ? static_cast<int>(groups) : 1;
}

template <class T>
cudaError_t launch_cluster(const Pool& call, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(tile_capacity(call.M, call.slots) * kClusterBlocks), groups_of(call),
                  call.slices);
  const size_t bytes = static_cast<size_t>(room_for(call.K, most_pages(call)).end());
  // Overlapped behind whatever kernel comes before it: all that is hidden is the way of the blocks to the GPU. Nothing
  // in memory may be read before the wait. The kernel before may be the route's, or torch's, which writes a page or a
  // row of a table for pool.add(); and one that is overlapped itself lets this one begin before those before *it* have
  // ended. pool_expand may read pages early because the launch before it is pool_shrink, which is not overlapped, or
  // an expand of other slices, before which there was one; and each expand waits.
  return PK_LAUNCH_CLUSTER(batched_lora_forward_pool_cluster_sm90_kernel<T>, kClusterBlocks, true, grid, dim3(kThreads),
                           bytes, stream, call);
}

}  // namespace

bool has_cluster_kernel(Dtype x, Dtype pages, const Pool& call) {
  return narrow(x, pages) && vectors_in(call) && vectors_out(call) && !no_tiles(call) && few_tiles(call) &&
         room_for(call.K, most_pages(call)).end() <= kMostShared && (all_apart(call) || one_cluster_has_both(call));
}

cudaError_t pool_cluster(Dtype x, const Pool& call, cudaStream_t stream) {
  return x == Dtype::kFloat16 ? launch_cluster<fp16>(call, stream) : launch_cluster<bf16>(call, stream);
}

}  // namespace pk::batched_lora
