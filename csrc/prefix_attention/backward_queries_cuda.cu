// The passes of prefix_attention's backward that own rows: a block has 64 rows of one sequence and one head of keys
// (and up to 128 columns of dq, 64 of wider types), and goes over keys that any of them sees.
//   shares   D_P = sum_j w dw;  dc = g sum_j dl / g raw, from sums that need no D_P before it is known;  what own
//            weights (D - g D_P) and the softmax of the prefix (g D_P) lose
//   queries  dq = scale (dl_X K + c dl_P P_k);  linear: c dl_P P_k elu'(q) for the latter
// grid: sequence x head of keys x tile of rows x columns; 16 rows to each of four warps.
#include "prefix_attention/backward_launch.h"

namespace pk::prefix_attention {
namespace {

// kFeatures: the weights of `linear` are asked for, not their gradients alone, which do not hang on q.
template <class T, int kDim, bool kFeatures>
struct RowTile {
  using Acc = AccOf<T>;
  static constexpr int kKeys = kStep<T, kDim>, kTiles = kKeys / 8;
  using Memory = Shared<T, kDim, kOwn, kKeys>;

  const Problem& p;
  Memory& shared;
  const uint64_t seed;
  const bool vector;
  const int64_t group, head;  // head: of the keys
  const Tile tile;
  const Sequence s;
  const int64_t rows;  // of the tile; 0: none

  __device__ __forceinline__ RowTile(const Backward& call, Memory& shared, bool vector, int64_t block)
      : p(call.problem),
        shared(shared),
        seed(p.seed ? *p.seed : 0),
        vector(vector),
        group(p.Hq / p.Hkv),
        head(block % p.Hkv),
        tile(tile_at<kOwn>(p.cu_q, p.rows, p.S, group, block / p.Hkv)),
        s(sequence_of(p, tile.sequence)),
        rows(bounded(s.S * group - tile.first, 0, kOwn)) {}

  __device__ __forceinline__ int64_t query(int64_t row) const { return (tile.first + row) / group; }
  __device__ __forceinline__ int64_t query_head(int64_t row) const { return head * group + (tile.first + row) % group; }
  __device__ __forceinline__ bool active() const { return 16 * warp_index() < rows; }

  __device__ __forceinline__ Operand<T, TableRows<T>> queries(bool prefix) const {
    const bool featured = kFeatures && prefix && p.composition == Composition::kLinear;
    return {{static_cast<const T*>(p.q.data), shared.rows.q}, shared.q, featured};
  }
  __device__ __forceinline__ Operand<T, TableRows<T>> gradients() const {
    return {{static_cast<const T*>(p.dout.data), shared.rows.d}, shared.d, false};
  }

  // The table and the rows of q and dO, for own keys or the prefix.
  __device__ __forceinline__ void load_rows(bool prefix, const void* less) {
    __syncthreads();
    for (int i = threadIdx.x; i < kOwn; i += kThreads) {
      if (i < rows) {
        fill_row(shared.rows, i, p, prefix, s, tile.sequence, query(i), query_head(i), less);
      } else {
        clear_row(shared.rows, i);
      }
    }
    __syncthreads();
    copy_operand<kOwn, kDim>(queries(prefix), static_cast<int>(p.D), vector);
    copy_operand<kOwn, kDim>(gradients(), static_cast<int>(p.D), vector);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
  }

  // use(j0, products of q and keys, of dO and values, keys) for each step of keys, by warps that have rows.
  template <class F>
  __device__ __forceinline__ void over_keys(bool prefix, const F& use) {
    const View &keys = prefix ? p.pk : p.k, &values = prefix ? p.pv : p.v;
    const Dropout& dropout = prefix ? p.prefix_dropout : p.own_dropout;
    const T* const k0 = prefix ? prefix_rows<T>(keys, s, head, 0) : own_rows<T>(keys, s, head, 0);
    const T* const v0 = prefix ? prefix_rows<T>(values, s, head, 0) : own_rows<T>(values, s, head, 0);
    const int begin = shared.rows.begin[0], end = shared.rows.end[rows - 1];  // both rise from row to row
    for (int j0 = begin / kKeys * kKeys; j0 < end; j0 += kKeys) {
      const Operand<T, StridedRows<T>> k{{k0 + j0 * keys.row, keys.row, end - j0}, shared.k, false};
      const Operand<T, StridedRows<T>> v{{v0 + j0 * values.row, values.row, end - j0}, shared.v, false};
      __syncthreads();
      copy_operand<kKeys, kDim>(k, static_cast<int>(p.D), vector);
      copy_operand<kKeys, kDim>(v, static_cast<int>(p.D), vector);
      cp_async_commit();
      if (dropout.active()) draw_bits<kOwn, kKeys>(shared.bits, shared.rows.m, dropout, seed, j0);
      cp_async_wait<0>();
      __syncthreads();
      if (!active()) continue;
      Acc products[kTiles][4] = {}, dps[kTiles][4] = {};
      multiply<kDim>(products, queries(prefix), 16 * warp_index(), k, static_cast<int>(p.D));
      multiply<kDim>(dps, gradients(), 16 * warp_index(), v, static_cast<int>(p.D));
      use(j0, products, dps, k);
    }
  }

  // Element i of a fragment's tile: its row, and its key within the step.
  __device__ __forceinline__ static int row_of(int i) { return 16 * warp_index() + lane_index() / 4 + i / 2 * 8; }
  __device__ __forceinline__ static int key_of(int j, int i) { return 8 * j + lane_index() % 4 * 2 + i % 2; }

  __device__ __forceinline__ Element<Acc> element(const Side<Acc>& side, int j0, int j, int i, Acc product,
                                                  Acc dp) const {
    const bool kept = !side.dropout.active() || is_kept<kKeys>(shared.bits, row_of(i), j0, key_of(j, i));
    return element_of(side, shared.rows, row_of(i), j0 + key_of(j, i), kept, product, dp);
  }
};

// -- shares -----------------------------------------------------------------------------------------------------------

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads) prefix_attention_backward_shares_kernel(const Backward call, bool vector) {
  using Rows = RowTile<T, kDim, true>;
  using Acc = AccOf<T>;
  PK_DYNAMIC_SHARED(typename Rows::Memory, shared);
  Rows tile(call, *shared, vector, blockIdx.x);
  if (tile.rows == 0) return;
  const Problem& p = call.problem;
  const bool merges = p.composition == Composition::kMerge, adds = p.composition == Composition::kAdd;
  const Acc scale = p.composition == Composition::kLinear ? Acc(1) : static_cast<Acc>(p.scale);
  const Side<Acc> side(p, true);
  Acc share[2] = {}, along[2] = {}, lost[2] = {};  // sums of w dw; of w dw raw, without w but for a softmax; of w raw
  tile.load_rows(true, nullptr);
  tile.over_keys(true, [&](int j0, auto& products, auto& dps, const auto&) {
#pragma unroll
    for (int i = 0; i < 4 * Rows::kTiles; ++i) {
      const Acc product = products[i / 4][i % 4];
      const Element<Acc> e = tile.element(side, j0, i / 4, i % 4, product, dps[i / 4][i % 4]);
      const Acc raw = scale * product * e.slope;
      if (side.softmax ? e.weight == 0 : e.slope == 0) continue;
      share[i % 4 / 2] += e.weight * e.grad;
      along[i % 4 / 2] += (side.softmax ? e.weight : Acc(1)) * e.grad * raw;
      lost[i % 4 / 2] += e.weight * raw;
    }
  });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Acc sum = warp_sum<4>(share[half]), gained = warp_sum<4>(along[half]), less = warp_sum<4>(lost[half]);
    const int row = Rows::row_of(2 * half);
    if (lane_index() % 4 != 0 || row >= tile.rows) continue;
    const int64_t m = (tile.s.batch * p.Hq + tile.query_head(row)) * p.S + tile.s.q0 + tile.query(row);
    const Acc gate = shared->rows.gate[row], total = static_cast<const Acc*>(call.total)[m];
    static_cast<Acc*>(call.share)[m] = sum;
    static_cast<Acc*>(call.dc)[m] = gate * gained - (merges ? total * less : adds ? gate * sum * less : Acc(0));
    if (!merges) static_cast<Acc*>(call.own_less)[m] = total - gate * sum;
    if (adds) static_cast<Acc*>(call.prefix_less)[m] = gate * sum;
  }
}

// -- queries ----------------------------------------------------------------------------------------------------------

template <int kDim>
constexpr int kColumns = kDim < 128 ? kDim : 128;  // of dq, that the registers of a thread have room for

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, 2)
    prefix_attention_backward_queries_kernel(const Backward call, bool vector, int columns) {
  using Rows = RowTile<T, kDim, false>;
  using Acc = AccOf<T>;
  PK_DYNAMIC_SHARED(typename Rows::Memory, shared);
  Rows tile(call, *shared, vector, blockIdx.x / columns);
  if (tile.rows == 0) return;
  const Problem& p = call.problem;
  constexpr int kOut = kColumns<kDim> / 8;
  const int D = static_cast<int>(p.D), first = static_cast<int>(blockIdx.x % columns) * kOut * 8;
  const int column = first + lane_index() % 4 * 2;
  Acc sums[kOut][4] = {};
#pragma unroll 1
  for (int pass = tile.s.P > 0 ? 0 : 1; pass < 2; ++pass) {
    const bool prefix = pass == 0;
    const Side<Acc> side(p, prefix);
    tile.load_rows(prefix, prefix ? call.prefix_less : call.own_less);
    tile.over_keys(prefix, [&](int j0, auto& products, auto& dps, const auto& keys) {
#pragma unroll
      for (int i = 0; i < 4 * Rows::kTiles; ++i) {
        const Element<Acc> e = tile.element(side, j0, i / 4, i % 4, products[i / 4][i % 4], dps[i / 4][i % 4]);
        products[i / 4][i % 4] = logit_gradient(side, shared->rows, Rows::row_of(i % 4), e);
      }
      accumulate<kDim>(sums, products, keys, first, D, shared->slice());
    });
    if (!prefix || p.composition != Composition::kLinear) continue;
#pragma unroll
    for (int i = 0; i < 4 * kOut; ++i) {
      const int64_t at = shared->rows.q[Rows::row_of(i % 4)];
      const int d = column + i / 4 * 8 + i % 2;
      if (at >= 0 && d < D) sums[i / 4][i % 4] *= feature_slope(load<Acc>(p.q.data, p.type, at + d));
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = Rows::row_of(2 * half);
    if (row >= tile.rows) continue;
    const int64_t token = tile.s.batch * p.S + tile.s.q0 + tile.query(row);
    T* const to = static_cast<T*>(p.dq) + (token * p.Hq + tile.query_head(row)) * p.D;
#pragma unroll
    for (int j = 0; j < kOut; ++j) {
      if (column + 8 * j < D) store_two(to + column + 8 * j, sums[j][2 * half], sums[j][2 * half + 1]);
    }
  }
}

// f(T{}, integral_constant kDim, tiles of rows)
template <class F>
cudaError_t with_tiles(const Problem& p, const F& f) {
  const int64_t tiles = count_tiles<kOwn>(p.cu_q, p.rows, p.S, p.Hq / p.Hkv) * p.Hkv;
  return with_kernel(p, tiles, [&](auto number, auto dim) { return f(number, dim, tiles); });
}

}  // namespace

cudaError_t backward_shares(const Backward& call, cudaStream_t stream) {
  return with_tiles(call.problem, [&](auto number, auto dim, int64_t tiles) {
    using T = decltype(number);
    constexpr int kDim = decltype(dim)::value;
    const dim3 grid(static_cast<unsigned>(tiles)), block(kThreads);
    return PK_LAUNCH((prefix_attention_backward_shares_kernel<T, kDim>), grid, block,
                     sizeof(typename RowTile<T, kDim, true>::Memory), stream, call, all_vectors(call.problem));
  });
}

cudaError_t backward_queries(const Backward& call, cudaStream_t stream) {
  return with_tiles(call.problem, [&](auto number, auto dim, int64_t tiles) {
    using T = decltype(number);
    constexpr int kDim = decltype(dim)::value;
    const int64_t columns = blocks(call.problem.D, kColumns<kDim>);
    const dim3 grid(static_cast<unsigned>(tiles * columns)), block(kThreads);
    return PK_LAUNCH((prefix_attention_backward_queries_kernel<T, kDim>), grid, block,
                     sizeof(typename RowTile<T, kDim, false>::Memory), stream, call, all_vectors(call.problem),
                     static_cast<int>(columns));
  });
}

}  // namespace pk::prefix_attention
