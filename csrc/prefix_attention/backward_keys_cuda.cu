// The passes of prefix_attention's backward that own keys: a block has 64 keys of one head, of a sequence or of a
// prefix (and up to 128 columns of their gradients, 64 of wider types), and goes over the rows that may see them.
//   keys      dK = scale dl_X^T q,  dV = drop(w_X)^T dO:  rows of the sequence
//   prefixes  parts of dP_k = scale c dl_P^T q (linear: c dl_P^T (elu(q) + 1)) and dP_v = g drop(w_P)^T dO:  rows of
//             all sequences that have the prefix; a split takes tokens split * share ... of the batch
// grid: sequence or prefix x head x tile of keys x columns x splits; 16 keys to each of four warps.
#include <algorithm>

#include "prefix_attention/backward_launch.h"

namespace pk::prefix_attention {
namespace {

// Columns of both gradients and rows of a step, as the registers of a thread have room for.
template <class T, int kDim>
constexpr int kColumns = sizeof(T) == 8 ? 32
                         : kDim < 128   ? kDim
                                        : 128;
template <class T, int kDim>
constexpr int kRowStep = kColumns<T, kDim> == 128 ? 16 : kStep<T, kDim>;

// Rows one after the other: the heads of a group side by side, queries in order, sequences in order.
struct Walk {
  const Problem& p;
  const bool prefix;
  const int64_t group, which;   // which: the prefix, of which rows count, or the sequence
  const int64_t low, high;      // tokens that count, of [B, S]; of own keys, the first and the last key
  int64_t r, end, before = 0;   // the sequence, where to stop, rows of the sequences before
  int64_t first = 0, last = 0;  // queries of the sequence that count

  __device__ __forceinline__ Walk(const Problem& p, bool prefix, int64_t which, int64_t low, int64_t high)
      : p(p), prefix(prefix), group(p.Hq / p.Hkv), which(which), low(low), high(high) {
    r = prefix ? 0 : which;
    end = prefix ? p.rows : which + 1;
    if (prefix && low >= high) end = r;
    if (prefix && !p.cu_q && r < end) {
      r = low / p.S;
      end = (high - 1) / p.S + 1;
    }
    enter();
  }

  __device__ __forceinline__ void enter() {
    if (r >= end) return;
    const Sequence s = sequence_of(p, r);
    if (prefix) {
      const int64_t token = s.batch * p.S + s.q0;
      const bool counts = s.prefix == which && s.P > 0;
      first = bounded(low - token, 0, s.S);
      last = counts ? bounded(high - token, first, s.S) : first;
    } else {
      const int64_t offset = s.T - s.S;  // query i is at key i + offset
      first = p.causal ? bounded(low - offset, 0, s.S) : 0;
      last = p.window ? bounded(high - offset + p.window, first, s.S) : s.S;
    }
  }

  // Goes on to row number `row`; false where there are not as many.
  __device__ __forceinline__ bool reaches(int64_t row) {
    while (r < end && row - before >= (last - first) * group) {
      before += (last - first) * group;
      ++r;
      enter();
    }
    return r < end;
  }
};

template <class T, int kDim>
struct KeyTile {
  using Acc = AccOf<T>;
  static constexpr int kRows = kRowStep<T, kDim>, kTiles = kRows / 8, kOut = kColumns<T, kDim> / 8;
  using Memory = Shared<T, kDim, kRows, kOwn>;

  const Problem& p;
  Memory& shared;
  const bool prefix, vector;
  const int64_t head;
  const int j0, keys, column;  // first key, keys from there on, first column

  // Row i of a fragment's tile, and its key of the block.
  __device__ __forceinline__ static int row_of(int j, int i) { return 8 * j + lane_index() % 4 * 2 + i % 2; }
  __device__ __forceinline__ static int key_of(int i) { return 16 * warp_index() + lane_index() / 4 + i / 2 * 8; }

  __device__ __forceinline__ Operand<T, TableRows<T>> queries() const {
    const bool featured = prefix && p.composition == Composition::kLinear;
    return {{static_cast<const T*>(p.q.data), shared.rows.q}, shared.q, featured};
  }
  __device__ __forceinline__ Operand<T, TableRows<T>> gradients() const {
    return {{static_cast<const T*>(p.dout.data), shared.rows.d}, shared.d, false};
  }

  // The table of rows first ... first + kRows of the walk, and their rows of q and dO; false where there are none.
  __device__ __forceinline__ bool load_rows(Walk& walk, int64_t first, const void* less, uint64_t seed) {
    const Dropout& dropout = prefix ? p.prefix_dropout : p.own_dropout;
    const int D = static_cast<int>(p.D), i = static_cast<int>(threadIdx.x);
    __syncthreads();
    if (i < kRows) {
      if (walk.reaches(first + i)) {
        const int64_t row = first + i - walk.before, query = walk.first + row / walk.group;
        fill_row(shared.rows, i, p, prefix, sequence_of(p, walk.r), walk.r, query, head * walk.group + row % walk.group,
                 less);
      } else {
        clear_row(shared.rows, i);
      }
    }
    __syncthreads();
    if (shared.rows.q[0] < 0) return false;
    copy_operand<kRows, kDim>(queries(), D, vector);
    copy_operand<kRows, kDim>(gradients(), D, vector);
    cp_async_commit();
    if (dropout.active()) draw_bits<kRows, kOwn>(shared.bits, shared.rows.m, dropout, seed, j0);
    cp_async_wait<0>();
    __syncthreads();
    if (queries().featured) {
      make_features<kRows, kDim>(shared.q, D);
      __syncthreads();
    }
    return true;
  }

  // What the rows add to the gradients of the warp's keys, where they are wanted.
  __device__ __forceinline__ void add_rows(const Side<Acc>& side, const Operand<T, StridedRows<T>>& k,
                                           const Operand<T, StridedRows<T>>& v, Acc (&dk)[kOut][4], Acc (&dv)[kOut][4],
                                           bool wants_dk, bool wants_dv) {
    const int D = static_cast<int>(p.D);
    Acc products[kTiles][4] = {}, dps[kTiles][4] = {};
    multiply<kDim>(products, k, 16 * warp_index(), queries(), D);
    if (wants_dk) multiply<kDim>(dps, v, 16 * warp_index(), gradients(), D);
#pragma unroll
    for (int n = 0; n < 4 * kTiles; ++n) {
      const int row = row_of(n / 4, n % 4), key = key_of(n % 4);
      const bool kept = !side.dropout.active() || is_kept<kOwn>(shared.bits, row, j0, key);
      Acc &product = products[n / 4][n % 4], &dp = dps[n / 4][n % 4];
      const Element<Acc> e = element_of(side, shared.rows, row, j0 + key, kept, product, dp);
      product = logit_gradient(side, shared.rows, row, e);
      dp = e.dropped * shared.rows.gate[row];
    }
    if (wants_dk) accumulate<kDim>(dk, products, queries(), column, D, shared.slice());
    if (wants_dv) accumulate<kDim>(dv, dps, gradients(), column, D, shared.slice());
  }

  // The sums of the tile, to rows of keys a stride apart.
  template <class To>
  __device__ __forceinline__ void write(To* out, int64_t stride, const Acc (&sums)[kOut][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = key_of(2 * half);
      if (key >= keys) continue;
      To* const to = out + (j0 + key) * stride + column + lane_index() % 4 * 2;
#pragma unroll
      for (int j = 0; j < kOut; ++j) {
        const int d = column + 8 * j;
        if (d < p.D) store_two(to + 8 * j, sums[j][2 * half], sums[j][2 * half + 1]);
      }
    }
  }
};

// Which keys, of which sequence or prefix.
struct Block {
  int64_t head, which, split, column;
  int64_t j0, keys, seen;  // keys that are written, keys that are there for the rows
  int64_t low, high;       // of the walk
};

__device__ __forceinline__ Block own_block(const Problem& p, int64_t index, int64_t columns) {
  const Tile tile = tile_at<kOwn>(p.cu_k, p.rows, p.T, 1, index / columns / p.Hkv);
  const int64_t keys = bounded(sequence_of(p, tile.sequence).T - tile.first, 0, kOwn);
  return {index / columns % p.Hkv, tile.sequence, 0, index % columns, tile.first, keys, keys, tile.first,
          tile.first + keys - 1};
}

__device__ __forceinline__ Block prefix_block(const Problem& p, int64_t index, int64_t columns, int splits) {
  const int64_t tiles = (p.P + kOwn - 1) / kOwn, tile = index / splits / columns, tokens = p.B * p.S;
  const int64_t n = tile / tiles / p.Hkv, j0 = tile % tiles * kOwn, split = index % splits;
  const int64_t length = p.lengths ? bounded(p.lengths[n], 0, p.P) : p.P;
  const int64_t share = (tokens + splits - 1) / splits, low = bounded(split * share, 0, tokens);
  const int64_t seen = bounded(length - j0, 0, kOwn), high = seen > 0 ? bounded(low + share, 0, tokens) : low;
  return {tile / tiles % p.Hkv, n, split, index / splits % columns, j0, bounded(p.P - j0, 0, kOwn), seen, low, high};
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, 2)
    prefix_attention_backward_keys_kernel(const Backward call, bool prefix, bool vector, int columns) {
  using Keys = KeyTile<T, kDim>;
  using Acc = AccOf<T>;
  PK_DYNAMIC_SHARED(typename Keys::Memory, shared);
  const Problem& p = call.problem;
  const Block block = prefix ? prefix_block(p, blockIdx.x, columns, call.splits) : own_block(p, blockIdx.x, columns);
  if (block.keys == 0) return;
  Keys tile{p,
            *shared,
            prefix,
            vector,
            block.head,
            static_cast<int>(block.j0),
            static_cast<int>(block.keys),
            static_cast<int>(block.column) * kColumns<T, kDim>};
  const View &keys = prefix ? p.pk : p.k, &values = prefix ? p.pv : p.v;
  Walk walk(p, prefix, block.which, block.low, block.high);
  Sequence place{0, 0, 0, 0, 0, block.which, 0};
  if (!prefix) place = sequence_of(p, block.which);
  const int seen = static_cast<int>(block.seen);
  const auto operand = [&](const View& view, T* to) {
    const T* const from =
        prefix ? prefix_rows<T>(view, place, block.head, block.j0) : own_rows<T>(view, place, block.head, block.j0);
    return Operand<T, StridedRows<T>>{{from, view.row, seen}, to, false};
  };
  const Operand<T, StridedRows<T>> k = operand(keys, shared->k), v = operand(values, shared->v);
  copy_operand<kOwn, kDim>(k, static_cast<int>(p.D), vector);
  copy_operand<kOwn, kDim>(v, static_cast<int>(p.D), vector);
  cp_async_commit();
  cp_async_wait<0>();
  void *const dk = prefix ? p.dpk : p.dk, *const dv = prefix ? p.dpv : p.dv;
  const void* const less = prefix ? call.prefix_less : call.own_less;
  const uint64_t seed = p.seed ? *p.seed : 0;
  const Side<Acc> side(p, prefix);
  Acc dk_sums[Keys::kOut][4] = {}, dv_sums[Keys::kOut][4] = {};
  for (int64_t first = 0; tile.load_rows(walk, first, less, seed); first += Keys::kRows) {
    if (16 * warp_index() < seen) tile.add_rows(side, k, v, dk_sums, dv_sums, dk, dv);
  }
  if (prefix) {
    const int64_t size = p.P * p.D, all = p.prefixes * p.Hkv * size;
    Acc* const parts = static_cast<Acc*>(call.parts) + block.split * all + (block.which * p.Hkv + block.head) * size;
    if (dk) tile.write(parts, p.D, dk_sums);
    if (dv) tile.write(parts + call.splits * all, p.D, dv_sums);
  } else {
    const int64_t at = ((place.batch * p.T + place.k0) * p.Hkv + block.head) * p.D;
    if (dk) tile.write(static_cast<T*>(dk) + at, p.Hkv * p.D, dk_sums);
    if (dv) tile.write(static_cast<T*>(dv) + at, p.Hkv * p.D, dv_sums);
  }
}

cudaError_t launch_keys(const Backward& call, bool prefix, int64_t tiles, cudaStream_t stream) {
  return with_kernel(call.problem, tiles, [&](auto number, auto dim) {
    using T = decltype(number);
    constexpr int kDim = decltype(dim)::value;
    const int64_t columns = blocks(call.problem.D, kColumns<T, kDim>);
    const dim3 grid(static_cast<unsigned>(tiles * columns)), block(kThreads);
    return PK_LAUNCH((prefix_attention_backward_keys_kernel<T, kDim>), grid, block,
                     sizeof(typename KeyTile<T, kDim>::Memory), stream, call, prefix, all_vectors(call.problem),
                     static_cast<int>(columns));
  });
}

int64_t prefix_tiles(const Problem& p) {
  return p.prefixes * p.Hkv * blocks(p.P, kOwn);
}

}  // namespace

cudaError_t backward_keys(const Backward& call, cudaStream_t stream) {
  const Problem& p = call.problem;
  return launch_keys(call, false, count_tiles<kOwn>(p.cu_k, p.rows, p.T, 1) * p.Hkv, stream);
}

// Enough blocks for the largest GPUs, none with fewer than 256 rows.
int prefix_splits(const Problem& p) {
  constexpr int64_t kBlocks = 256, kLeastRows = 256, kMost = 32;
  const int64_t tiles = std::max<int64_t>(prefix_tiles(p), 1), rows = p.B * p.S * group(p);
  return static_cast<int>(std::clamp<int64_t>(std::min(blocks(kBlocks, tiles), rows / kLeastRows), 1, kMost));
}

cudaError_t backward_prefixes(const Backward& call, cudaStream_t stream) {
  return launch_keys(call, true, prefix_tiles(call.problem) * call.splits, stream);
}

}  // namespace pk::prefix_attention
