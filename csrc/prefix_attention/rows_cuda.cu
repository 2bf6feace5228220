// The forward of prefix_attention for 16-bit types in one launch: o and lse of tiles of 64 query rows, which walk over
// the keys of their prefix and over their own. A row is a query of a head; the heads of a group lie side by side, so
// that their keys are read once. What a row does, turn by turn, with one accumulator o (fp32) from end to end:
//   merge         a softmax over the prefix; o *= g; the same softmax over own keys; o /= sum
//   add           a softmax over own keys; o /= sum; the sum over the prefix; o += g softmax(l_P) P_v
//   relu, linear  a softmax over own keys; o /= sum; o += g w_P P_v
// Grid: a block of 4 warps for each tile and head of keys; tiles hold rows of one sequence. A warp has 16 rows. Tiles
// of keys and of values take turns in a ring of three, by cp.async; those that no row sees are not read. Products by
// mma.sync: weights are rounded to the type first.
#include "prefix_attention/softmax_tiles.h"

namespace pk::prefix_attention {
namespace {

constexpr int kTileRows = 64, kThreads = 32 * kTileRows / kWarpRows, kSlots = 3;

template <int kD>
struct Shape {
  static constexpr int kTileKeys = kD > 128 ? 32 : 64;
  static constexpr int kPitch = tile_pitch(kD), kQueries = kTileRows * kPitch, kSlot = kTileKeys * kPitch;
  static constexpr int kBytes = 2 * (kQueries + kSlots * kSlot);
};

// What the copies bring next: keys, then values, of a tile of a turn.
struct Next {
  int turn = -1, j0 = 0;
  bool values = false;
};

// Keys that some row of the tile sees, from a multiple of the tile's keys on.
struct Ranges {
  Columns own, prefix;

  __device__ __forceinline__ const Columns& of(bool of_prefix) const { return of_prefix ? prefix : own; }
};

template <int kKeys>
__device__ __forceinline__ Ranges ranges_of(const Problem& p, const Sequence& s, const Place& first,
                                            const Place& last) {
  const int own = static_cast<int>(s.T), prefix = static_cast<int>(s.P);
  return {{own_columns(p, first.at, own).begin / kKeys * kKeys, own_columns(p, last.at, own).end},
          {prefix_columns(p, first.at, prefix).begin / kKeys * kKeys, prefix}};
}

template <int kKeys>
__device__ __forceinline__ void advance(Next& next, Composition composition, const Ranges& ranges) {
  const int turns = count_turns(composition);
  if (next.turn >= 0) {
    const Turn turn = turn_of(composition, next.turn);
    next.values = !next.values && turn.role != Role::kSum;
    if (next.values) return;
    next.j0 += kKeys;
    if (next.j0 < ranges.of(turn.prefix).end) return;
  }
  while (++next.turn < turns) {
    const Columns& range = ranges.of(turn_of(composition, next.turn).prefix);
    next.j0 = range.begin;
    if (range.begin < range.end) return;
  }
}

// out = factor o for the warp's rows, by way of shared memory that only the warp uses: whole vectors.
template <int kD, class T>
__device__ __forceinline__ void store_out(const Problem& p, T* rows, const Place* places, float (&o)[kD / 8][4],
                                          float factor) {
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kD / 4; ++i) {
    const int j = i / 2, half = i % 2, row = lane_index() / 4 + 8 * half, col = 8 * j + lane_index() % 4 * 2;
    const uint32_t pair = pack(from_float<T>(o[j][2 * half] * factor), from_float<T>(o[j][2 * half + 1] * factor));
    *reinterpret_cast<uint32_t*>(rows + row * tile_pitch(kD) + col) = pair;
  }
  __syncwarp();
  for (int i = lane_index(); i < kWarpRows * (kD / 8); i += 32) {
    const int row = i / (kD / 8), col = i % (kD / 8) * 8;
    const Place& place = places[row];
    if (place.row < 0 || col >= p.D) continue;
    const int64_t to = ((place.batch * p.S + place.query) * p.Hq + place.head) * p.D + col;
    *reinterpret_cast<uint4*>(static_cast<T*>(p.out) + to) =
        *reinterpret_cast<const uint4*>(rows + row * tile_pitch(kD) + col);
  }
}

template <class T, int kD>
__global__ void __launch_bounds__(kThreads, 2)
    prefix_attention_forward_rows_kernel(const __grid_constant__ Problem p, const Vectors vectors) {
  using S = Shape<kD>;
  constexpr int kKeys = S::kTileKeys;
  PK_DYNAMIC_SHARED(T, shared);
  __shared__ Place places[kTileRows];
  __shared__ Sequence s;
  const int64_t G = p.Hq / p.Hkv;
  const int head = static_cast<int>(blockIdx.y), D = static_cast<int>(p.D);
  // The last rows of a causal sequence have the most keys: they come first.
  const Tile tile = tile_at<kTileRows>(p.cu_q, p.rows, p.S, G, gridDim.x - 1 - blockIdx.x);
  if (threadIdx.x == 0) s = sequence_of(p, tile.sequence);
  __syncthreads();
  const int64_t left = s.S * G - tile.first;
  if (left <= 0) return;
  if (threadIdx.x < kTileRows) {
    places[threadIdx.x] = place_of(p, s, tile.sequence, head, tile.first + static_cast<int>(threadIdx.x));
  }
  __syncthreads();
  const Ranges ranges = ranges_of<kKeys>(p, s, places[0], places[left < kTileRows ? left - 1 : kTileRows - 1]);
  T* const ring = shared + S::kQueries;
  Next next;
  advance<kKeys>(next, p.composition, ranges);
  int filled = 0, used = 0;
  const auto fetch = [&] {
    if (next.turn < count_turns(p.composition)) {
      const bool prefix = turn_of(p.composition, next.turn).prefix;
      const View& view = prefix ? (next.values ? p.pv : p.pk) : (next.values ? p.v : p.k);
      const bool vector = prefix ? (next.values ? vectors.pv : vectors.pk) : (next.values ? vectors.v : vectors.k);
      const T* const from = prefix ? prefix_rows<T>(view, s, head, next.j0) : own_rows<T>(view, s, head, next.j0);
      const int rows = ranges.of(prefix).end - next.j0;
      copy_rows<kKeys, kD, kThreads>(ring + filled * S::kSlot, from, view.row, rows, D, vector);
      filled = filled + 1 == kSlots ? 0 : filled + 1;
      advance<kKeys>(next, p.composition, ranges);
    }
    cp_async_commit();
  };
  // The tile that the copies brought; the one that was used before it is filled again.
  const auto take = [&]() -> const T* {
    cp_async_wait<kSlots - 2>();
    __syncthreads();
    fetch();
    const T* const slot = ring + used * S::kSlot;
    used = used + 1 == kSlots ? 0 : used + 1;
    return slot;
  };
  copy_queries<kTileRows, kD, kThreads>(shared, p.q, places, D, vectors.q);
  for (int i = 0; i < kSlots - 1; ++i) fetch();

  T* const queries = shared + warp_index() * kWarpRows * S::kPitch;
  const Place* const mine = places + warp_index() * kWarpRows;
  const Place &upper = mine[lane_index() / 4], &lower = mine[lane_index() / 4 + 8];
  const bool linear = p.composition == Composition::kLinear, has_softmax = p.composition <= Composition::kAdd;
  Softmax<kD> softmax;
  softmax.start();
  float lse[2] = {};
#pragma unroll 1
  for (int i = 0; i < count_turns(p.composition); ++i) {
    const Turn turn = turn_of(p.composition, i);
    const Columns range = ranges.of(turn.prefix);
    const Sight sight = sight_of(p, mine, turn.prefix, static_cast<int>(turn.prefix ? s.P : s.T));
    const bool softened = has_softmax || !turn.prefix;
    const float scale = turn.prefix && linear ? 1.f : static_cast<float>(p.scale);
#pragma unroll 1
    for (int j0 = range.begin; j0 < range.end; j0 += kKeys) {
      const bool idle = sight.none(j0, kKeys);
      float w[kKeys / 8][4];
      const T* const keys = take();
      if (!idle) {
        if (turn.prefix && linear) {
          multiply_features<kD, kKeys>(w, queries, keys);
        } else {
          multiply_rows<kD, kKeys>(w, queries, keys);
        }
        const float factor[2] = {turn.prefix ? scale * upper.key_gate : scale,
                                 turn.prefix ? scale * lower.key_gate : scale};
        finish_logits<T>(w, factor, softened ? static_cast<float>(p.softcap) : 0.f, turn.prefix ? p.bias : p.mask, mine,
                         sight, j0, softened ? -INFINITY : 0.f);
        if (turn.role != Role::kWeights) {
          softmax.accumulate(w, turn.role == Role::kSoftmax);
        } else {
          each_element(w, [&](float& l, int row, int) {
            if (has_softmax) l = power(l, below_of(lse[row]));
            if (!linear && l < 0) l = 0.f;
            l *= row ? lower.gate : upper.gate;
          });
        }
        if (p.own_dropout.active() && turn.role != Role::kSum) {
          const int64_t rows[2] = {upper.row, lower.row};
          drop(w, turn.prefix ? p.prefix_dropout : p.own_dropout, *p.seed, rows, j0);
        }
      }
      if (turn.role == Role::kSum) continue;
      const T* const values = take();
      if (!idle) multiply_values<kD, kKeys>(softmax.values, w, values);
    }
    if (turn.role == Role::kWeights) continue;
    if (turn.prefix && turn.role == Role::kSoftmax) {
      softmax.scale({upper.gate, lower.gate});
      continue;
    }
    softmax.total(lse);
    store_row_numbers(turn.prefix ? p.prefix_lse : p.lse, lse, mine);
    if (!turn.prefix) softmax.normalise();
    softmax.restart();
  }
  cp_async_wait<0>();
  __syncthreads();  // a tile that meets no key has taken none: the other warps' copies of its queries must have landed
  store_out<kD>(p, queries, mine, softmax.values, p.own_dropout.scale);
}

template <class T, int kD>
cudaError_t launch_rows(const Problem& p, cudaStream_t stream) {
  const int64_t tiles = count_tiles<kTileRows>(p.cu_q, p.rows, p.S, p.Hq / p.Hkv);
  if (tiles > INT32_MAX || !fits(p)) return cudaErrorInvalidValue;
  return PK_LAUNCH((prefix_attention_forward_rows_kernel<T, kD>),
                   dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(p.Hkv)), dim3(kThreads), Shape<kD>::kBytes,
                   stream, p, vectors_of(p, sizeof(T)));
}

template <class T>
cudaError_t rows_of(const Problem& p, cudaStream_t stream) {
  return p.D > 128  ? launch_rows<T, 256>(p, stream)
         : p.D > 96 ? launch_rows<T, 128>(p, stream)
         : p.D > 64 ? launch_rows<T, 96>(p, stream)
         : p.D > 32 ? launch_rows<T, 64>(p, stream)
                    : launch_rows<T, 32>(p, stream);
}

}  // namespace

cudaError_t forward_rows(const Problem& p, cudaStream_t stream) {
  if (p.B * p.S * p.rows == 0) return cudaSuccess;
  if (p.type == Dtype::kBFloat16) return rows_of<bf16>(p, stream);
  return p.type == Dtype::kFloat16 ? rows_of<fp16>(p, stream) : cudaErrorInvalidValue;
}

}  // namespace pk::prefix_attention
