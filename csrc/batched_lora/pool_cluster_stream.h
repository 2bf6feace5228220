// What a block of pool_cluster_sm90.cu has in shared memory, and the stream of pieces that it reads. They go by
// cp.async and not by bulk copies: of x and A a thread reads what it copied itself, so that no barrier stands before
// the products, and what lies past a rank, a row count or K becomes zeros on the way.
#pragma once

#include "batched_lora/pool_expand_tile.h"
#include "batched_lora/pool_shrink_tile.h"
#include "common/cluster.h"

namespace pk::batched_lora {

constexpr int kClusterBlocks = kMostClusterBlocks;
constexpr int kSlots = 5, kSlot = (kTileMost + 2) * kPitch;  // of the ring; elements: y, bias and gain of 256 columns
constexpr int kBiasRow = kTileMost, kGainRow = kTileMost + 1;
static_assert(kThreads * sizeof(Vectors) <= kSlot * 2 && kStep <= kTileMost, "every piece fits a slot");
constexpr int64_t kFillingClusters = 16;              // 132 SMs of an H100 or H200
constexpr int64_t kMostShared = 113 * int64_t{1024};  // so that two blocks fit an SM

// A block's shared memory, in bytes: the ring; sums of its chunks [chunks][kTileMost][ranks]; u [kTileMost][pitch], in
// whose place are the sums of the warps before; the tile's row of the table; the numbers of its rows.
struct Room {
  int64_t chunks, ranks;

  static constexpr int64_t kSums = kSlots * kSlot * 2;
  // Over a multiple of 16 by 8, so that the float2 of half a warp (4 rows) meet in no bank.
  constexpr int64_t pitch() const { return ceil_div(ranks, kStep) * kStep + 8; }
  constexpr int64_t u() const { return kSums + chunks * kTileMost * ranks * 4; }
  constexpr int64_t entry() const {
    const int64_t bytes = kTileMost * pitch() * 4, least = sizeof(WarpSums);
    return u() + (bytes > least ? bytes : least);
  }
  constexpr int64_t order() const { return entry() + (kTablePages + 2 * (ranks / kPage)) * 4; }
  constexpr int64_t end() const { return order() + kTileMost * 4; }
};

constexpr Room room_for(int64_t K, int64_t T) {
  return {ceil_div(ceil_div(K, kChunk), kClusterBlocks), T * kPage};
}

// At most `left` of the thread's newest groups of copies stay in flight: the instruction takes a constant.
__device__ __forceinline__ void wait_for_all_but(int left) {
  static_assert(kSlots == 5, "a case for each number of groups that may be in flight");
  switch (left) {
    case 0:
      return cp_async_wait<0>();
    case 1:
      return cp_async_wait<1>();
    case 2:
      return cp_async_wait<2>();
    case 3:
      return cp_async_wait<3>();
    default:
      return cp_async_wait<4>();
  }
}

// The pieces that a block reads, in order, and the ring that they go through. A piece is a group of copies.
template <class T>
class Stream {
 public:
  struct Range {
    int begin, end;
  };
  __device__ __forceinline__ Stream(const Pool& call, const Slice& slice, const PoolTile& tile, T* ring, Range chunks,
                                    Range units)
      : call_(call), slice_(slice), tile_(tile), ring_(ring), chunks_(chunks), units_(units) {}

  // The next piece. The thread sees what it copied itself; behind a barrier it sees all.
  __device__ __forceinline__ T* take() {
    T* const piece = ring_ + reading_ * kSlot;
    reading_ = reading_ + 1 == kSlots ? 0 : reading_ + 1;
    wait_for_all_but(--ahead_);
    return piece;
  }

  // Behind a barrier after which no thread reads pieces taken before the last `kept`: others go into their place.
  __device__ __forceinline__ void refill(int kept) {
#pragma unroll 1
    while (chunks_.begin < chunks_.end && ahead_ + kept < kSlots) append([&](T* slot) { copy_of_chunk(slot); });
    refill_units(kept);
  }

  // The same, once all pieces of the chunks are taken.
  __device__ __forceinline__ void refill_units(int kept) {
#pragma unroll 1
    while (units_.begin < units_.end && ahead_ + kept < kSlots) append([&](T* slot) { copy_of_unit(slot); });
  }

 private:
  template <class Copy>
  __device__ __forceinline__ void append(Copy copy) {
    const int slot = reading_ + ahead_;
    copy(ring_ + (slot < kSlots ? slot : slot - kSlots) * kSlot);
    cp_async_commit();
    ++ahead_;
  }

  // 8 rows of x, or a page of A, for the thread alone: see read_own().
  __device__ __forceinline__ void copy_of_chunk(T* slot) {
    const int halves = tile_.rows > kTileMost / 2 ? 2 : 1, page = part_ - halves, lane = lane_index();
    const int row = (page < 0 ? part_ : page) * 8 + lane / 4;
    const bool inside = row < (page < 0 ? tile_.rows : tile_.rank);
    const T* from = static_cast<const T*>(page < 0 ? call_.x : call_.pages_in);
    if (inside && page < 0) from += tile_.order[row] * call_.x_stride;
    if (inside && page >= 0) from += (tile_.entry[kTablePages + page] * int64_t{kPage} + lane / 4) * call_.K;
    const int64_t k = first_column(chunks_.begin, warp_index(), lane);
#pragma unroll
    for (int s = 0; s < kVectors; ++s) {
      const bool there = inside && k + 32 * s < call_.K;
      cp_async<16>(slot + (s * kThreads + threadIdx.x) * 8, there ? from + k + 32 * s : from, there ? 16 : 0);
    }
    if (++part_ < halves + (tile_.rank + kPage - 1) / kPage) return;
    part_ = 0;
    ++chunks_.begin;
  }

  // 16 ranks of B^T; then y, with the bias and the gain.
  __device__ __forceinline__ void copy_of_unit(T* slot) {
    const int64_t n = static_cast<int64_t>(units_.begin) * kCols + lane_index() * 8;
    if (part_ * kStep < tile_.rank) return fill(slot, slice_, tile_, part_++, n);
    load_outputs<kPitch>(slot, slice_, tile_, n);
    if (warp_index() < 2) {
      const int64_t row = tile_.entry[warp_index() == 0 ? kTableBias : kTableGain];
      const T* const from = static_cast<const T*>(slice_.pages_out);
      const bool there = row >= 0 && n < slice_.N;
      cp_async<16>(slot + (warp_index() == 0 ? kBiasRow : kGainRow) * kPitch + lane_index() * 8,
                   there ? from + row * slice_.N + n : from, there ? 16 : 0);
    }
    part_ = 0;
    ++units_.begin;
  }

  const Pool& call_;
  const Slice& slice_;
  const PoolTile& tile_;
  T* const ring_;
  Range chunks_, units_;         // to be copied yet
  int part_ = 0;                 // of the next chunk or unit
  int reading_ = 0, ahead_ = 0;  // slot of the next piece to take, pieces in flight or landed from there on
};

template <class T>
__device__ __forceinline__ void read_own(Vectors& to, const T* piece) {
#pragma unroll
  for (int s = 0; s < kVectors; ++s) {
    to[s] = *reinterpret_cast<const uint4*>(piece + (s * kThreads + threadIdx.x) * 8);
  }
}

}  // namespace pk::batched_lora
