// What the kernels over an adapter pool share: the tile of a block, read from route and table.
#pragma once

#include "batched_lora/batched_lora_cuda.h"
#include "common/activation.h"
#include "common/cp_async.h"
#include "common/launch.h"

namespace pk::batched_lora {

constexpr int kTileMost = static_cast<int>(kTile), kPage = static_cast<int>(kPageRows);
constexpr int kWarps = 4, kThreads = 32 * kWarps;  // of a block

// Up to 16 rows of one slot in one slice. rank = 0: there is nothing to do.
struct PoolTile {
  int rank, rows;
  int64_t first;         // position of its first row
  const int32_t* order;  // numbers of its rows
  const int32_t* entry;  // of the table
  int64_t slot;
  bool used;  // or else rows, first and slot say nothing
};

__device__ __forceinline__ PoolTile pool_tile(const Pool& call, const Slice& slice, int64_t index) {
  const int32_t* const header = call.route;
  const int32_t* const order = header + kRouteHeader + call.M;
  const int32_t* const tile = order + call.M + index * kTileFields;
  const bool used = index < header[kTilesUsed] && header[kRouteRows] == call.M && header[kRouteAdapters] == call.slots;
  const int64_t slot = tile[kTileAdapter], first = tile[kTileFirst];
  const int32_t* const entry = slice.table + (used ? slot : 0) * (kTablePages + 2 * slice.T);
  return {used ? entry[kTableRank] : 0, tile[kTileRows], first, order + (used ? first : 0), entry, slot, used};
}

// Whether h enters the second product as it is.
__device__ __forceinline__ bool is_lora(const Slice& slice, const PoolTile& tile) {
  return slice.down_bias == nullptr && tile.entry[kTableActivation] == kIdentity;
}

// f(h + a) of one rank.
template <class AccT>
__device__ __forceinline__ AccT bottleneck(const Slice& slice, const PoolTile& tile, int rank, AccT h) {
  const AccT* const a = static_cast<const AccT*>(slice.down_bias);
  if (a != nullptr) h += a[tile.slot * slice.T * kPageRows + rank];
  return activated(tile.entry[kTableActivation], h);
}

// y of one element before it is rounded, from the sum over its ranks. gain: minus one. The FMAs are spelled out so that
// every kernel takes the same ones.
template <class AccT>
__device__ __forceinline__ AccT changed(AccT y, AccT sum, AccT scaling, AccT bias, AccT gain, bool gained) {
  if (!gained) return fma(scaling, sum + bias, y);
  const AccT total = fma(scaling, sum, y);
  return fma(scaling, bias, fma(gain, total, total));
}

// The first column of a slice in h.
__device__ __forceinline__ int64_t h_column(const Pool& call, int slice) {
  int64_t column = 0;
  for (int g = 0; g < slice; ++g) column += call.slice[g].T * kPageRows;
  return column;
}

// Blocks that take turns at the ranks of one tile, slice and part: more of them where there is little else to do. They
// are at most `steps`, the shares into which the ranks of the widest table can be cut.
inline int rank_lanes(const Pool& call, int64_t steps) {
  constexpr int64_t kFillingBlocks = 1024;
  const int64_t blocks = tile_capacity(call.M, call.slots) * call.parts * call.slices;
  const int64_t lanes = kFillingBlocks / (blocks + 1);
  return static_cast<int>(lanes < 1 ? 1 : lanes < steps ? lanes : steps);
}

inline int64_t most_pages(const Pool& call) {
  int64_t pages = 0;
  for (int g = 0; g < call.slices; ++g) pages = call.slice[g].T > pages ? call.slice[g].T : pages;
  return pages;
}

// With few tiles K is cut: h is held in parts, or a cluster takes a tile.
inline bool few_tiles(const Pool& call) {
  constexpr int64_t kFewTiles = 1024;
  return tile_capacity(call.M, call.slots) * call.slices < kFewTiles;
}

// What the tensor cores' kernels take: pages of x's dtype, of 16 bits, and rows of whole, aligned vectors.
inline bool narrow(Dtype x, Dtype pages) {
  return x == pages && (x == Dtype::kBFloat16 || x == Dtype::kFloat16);
}

inline bool vectors_in(const Pool& call) {
  return call.K % 8 == 0 && vector_rows(call.x, call.x_stride, 2) && vector_rows(call.pages_in, call.K, 2);
}

inline bool vectors_out(const Pool& call) {
  bool fit = true;
  for (int g = 0; fit && g < call.slices; ++g) {
    const Slice& slice = call.slice[g];
    fit = slice.N % 8 == 0 && vector_rows(slice.pages_out, slice.N, 2) && vector_rows(slice.y, slice.y_stride, 2);
  }
  return fit;
}

// Nothing to launch: a grid has at least one block.
inline bool no_tiles(const Pool& call) {
  return call.slices == 0 || tile_capacity(call.M, call.slots) == 0;
}

}  // namespace pk::batched_lora
