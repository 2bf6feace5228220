// What the backward kernels of prefix_attention share. A block owns 64 rows (or keys), 16 to a warp, and goes over keys
// (or rows) in steps of kStep: products of both over the head dim, weights and their gradients from those, and products
// of these with what it goes over. Sums lie in the lanes as mma.h says, for every dtype: 16-bit operands are copied
// into shared memory and multiplied by mma.sync, wider ones are read where they lie and multiplied by plain FMAs.
#pragma once

#include "prefix_attention/attention_tiles.h"
#include "prefix_attention/backward_cuda.h"
#include "prefix_attention/scalars.h"

namespace pk::prefix_attention {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kOwn = kWarpRows * kWarps;

template <class T>
constexpr bool kTensorCores = sizeof(T) == 2;
template <class T>
using AccOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// kDim: the head dim, rounded up, of 16-bit types; of others the columns of the result that a block computes.
template <class T, int kDim>
constexpr int kStep = kDim == 256 || sizeof(T) == 8 ? 16 : 32;

// elu(q) + 1, and its derivative.
template <class Acc>
__device__ __forceinline__ Acc feature(Acc q) {
  return q > 0 ? q + 1 : exponential(q);
}
template <class Acc>
__device__ __forceinline__ Acc feature_slope(Acc q) {
  return q > 0 ? Acc(1) : exponential(q);
}

// -- rows -------------------------------------------------------------------------------------------------------------

// What a tile's elements have to know of their rows, of one side: own keys or the prefix. In shared memory.
template <class Acc, int kRows>
struct RowTable {
  int64_t q[kRows], d[kRows], bias[kRows];  // where the row begins in q, dO, and the mask; q: -1 where there is none
  uint32_t m[kRows];                        // of [B, Hq, S], as dropout counts rows
  int begin[kRows], end[kRows];             // the keys that it sees
  Acc factor[kRows];                        // of the product with a key
  Acc gate[kRows], less[kRows], lse[kRows];
};

template <class Acc, int kRows>
__device__ __forceinline__ void clear_row(RowTable<Acc, kRows>& table, int i) {
  table.q[i] = table.d[i] = -1;
  table.bias[i] = 0;
  table.m[i] = 0;
  table.begin[i] = table.end[i] = 0;
  table.factor[i] = table.gate[i] = table.less[i] = table.lse[i] = 0;
}

// Row i of the table: query `query` of sequence r, with own keys or its prefix. less: Acc [B, Hq, S], or null for 0.
template <class Acc, int kRows>
__device__ __forceinline__ void fill_row(RowTable<Acc, kRows>& table, int i, const Problem& p, bool prefix,
                                         const Sequence& s, int64_t r, int64_t query, int64_t head, const void* less) {
  const int64_t token = s.q0 + query, m = (s.batch * p.Hq + head) * p.S + token;
  const int at = static_cast<int>(query + s.T - s.S);
  const Mask& mask = prefix ? p.bias : p.mask;
  const bool linear = p.composition == Composition::kLinear;
  table.q[i] = s.batch * p.q.batch + head * p.q.head + token * p.q.row;
  table.d[i] = s.batch * p.dout.batch + head * p.dout.head + token * p.dout.row;
  table.bias[i] = s.batch * mask.batch + head * mask.head + token * mask.row;
  table.m[i] = static_cast<uint32_t>(m);
  const Columns sees =
      prefix ? prefix_columns(p, at, static_cast<int>(s.P)) : own_columns(p, at, static_cast<int>(s.T));
  table.begin[i] = sees.begin;
  table.end[i] = sees.end;
  const Acc scale = prefix && linear ? Acc(1) : static_cast<Acc>(p.scale);
  table.factor[i] = prefix ? gate_of<Acc>(p.key_gate, r, head) * scale : scale;
  table.gate[i] = prefix ? gate_of<Acc>(p.gate, r, head) : Acc(1);
  const void* const lse = !prefix || p.composition == Composition::kMerge ? p.lse : p.prefix_lse;
  const bool softmax = !prefix || p.composition == Composition::kMerge || p.composition == Composition::kAdd;
  table.lse[i] = softmax ? static_cast<const Acc*>(lse)[m] : Acc(0);
  table.less[i] = softmax && less ? static_cast<const Acc*>(less)[m] : Acc(0);
}

// -- operands ---------------------------------------------------------------------------------------------------------

// Rows of q or dO by a table, or of keys a stride apart; null where there is none.
template <class T>
struct TableRows {
  const T* data;
  const int64_t* at;
  __device__ __forceinline__ const T* row(int i) const { return at[i] < 0 ? nullptr : data + at[i]; }
};
template <class T>
struct StridedRows {
  const T* data;
  int64_t stride;
  int count;
  __device__ __forceinline__ const T* row(int i) const { return i < count ? data + i * stride : nullptr; }
};

template <class T, class Rows>
struct Operand {
  Rows rows;
  T* tile;        // of shared memory, where it is copied to
  bool featured;  // rows of q count as elu(q) + 1, which a tile does not hold: on the left, and of wider types

  __device__ __forceinline__ AccOf<T> read(const T* row, int d) const {
    const AccOf<T> value = row ? static_cast<AccOf<T>>(row[d]) : AccOf<T>(0);
    return featured && row ? feature(value) : value;
  }
};

// Rows of D <= kDim numbers into a tile, zeros around them. The caller commits and waits.
template <int kCount, int kDim, class T, class Rows>
__device__ __forceinline__ void copy_operand(const Operand<T, Rows>& to, int D, bool vector) {
  if constexpr (kTensorCores<T>) {
    constexpr int kPieces = kDim / 8;
    for (int i = threadIdx.x; i < kCount * kPieces; i += kThreads) {
      const int d = i % kPieces * 8;
      const T* const row = to.rows.row(i / kPieces);
      T* const place = to.tile + i / kPieces * tile_pitch(kDim) + d;
      copy_eight(place, row && d < D ? row + d : nullptr, to.rows.data, vector);
    }
  }
}

// Of a tile that has arrived; all threads have seen it.
template <int kCount, int kDim, class T>
__device__ __forceinline__ void make_features(T* tile, int D) {
  if constexpr (kTensorCores<T>) {
    for (int i = threadIdx.x; i < kCount * kDim; i += kThreads) {
      T& place = tile[i / kDim * tile_pitch(kDim) + i % kDim];
      if (i % kDim < D) place = from_float<T>(feature(to_float(place)));
    }
  }
}

// -- products ---------------------------------------------------------------------------------------------------------

// Features of two neighbours: rounded, and the rest.
template <class T>
__device__ __forceinline__ void split_features(uint32_t& pair, uint32_t& rest) {
  const float first = to_float(T{static_cast<uint16_t>(pair)}), second = to_float(T{static_cast<uint16_t>(pair >> 16)});
  uint32_t parts[2];
  split_pair<T>(feature(first), feature(second), parts);
  pair = parts[0];
  rest = parts[1];
}

// sums += left[row0 ... row0 + 16] right[0 ... 8 kTiles]^T, over the head dim. Features on the left are not rounded:
// gradients of gates, which may be wider than q, come from such products.
template <int kDim, int kTiles, class T, class Left, class Right>
__device__ __forceinline__ void multiply(AccOf<T> (&sums)[kTiles][4], const Operand<T, Left>& left, int row0,
                                         const Operand<T, Right>& right, int D) {
  const int lane = lane_index();
  if constexpr (kTensorCores<T>) {
    constexpr int kPitch = tile_pitch(kDim);
    const T* const a_row = left.tile + (row0 + lane % 16) * kPitch + lane / 16 * 8;
    const T* const b_row = right.tile + (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8;
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      uint32_t a[4], rest[4] = {};
      ldmatrix(a, a_row + d);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (left.featured) split_features<T>(a[i], rest[i]);
      }
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) {
        uint32_t b[4];
        ldmatrix(b, b_row + 8 * j * kPitch + d);
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        mma_m16n8k16<T>(sums[j], a, first);
        mma_m16n8k16<T>(sums[j + 1], a, second);
        if (!left.featured) continue;
        mma_m16n8k16<T>(sums[j], rest, first);
        mma_m16n8k16<T>(sums[j + 1], rest, second);
      }
    }
  } else {
    const T* const a[2] = {left.rows.row(row0 + lane / 4), left.rows.row(row0 + lane / 4 + 8)};
    const T* b[kTiles][2];
#pragma unroll
    for (int j = 0; j < 2 * kTiles; ++j) b[j / 2][j % 2] = right.rows.row(j / 2 * 8 + lane % 4 * 2 + j % 2);
#pragma unroll 1
    for (int d = 0; d < D; ++d) {
      const T x[2] = {left.read(a[0], d), left.read(a[1], d)};
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const T y = right.read(b[j][e], d);
          sums[j][e] += x[0] * y;
          sums[j][2 + e] += x[1] * y;
        }
      }
    }
  }
}

// sums += weights right[.., first ... first + 8 kOut]. Weights lie in the lanes as sums do, which is how a left operand
// of mma.sync lies; wider types pass them through the warp's slice of shared memory.
template <int kDim, int kTiles, int kOut, class T, class Rows>
__device__ __forceinline__ void accumulate(AccOf<T> (&sums)[kOut][4], const AccOf<T> (&weights)[kTiles][4],
                                           const Operand<T, Rows>& right, int first, int D,
                                           AccOf<T> (&slice)[16][kTiles * 8 + 1]) {
  const int lane = lane_index();
  if constexpr (kTensorCores<T>) {
    constexpr int kPitch = tile_pitch(kDim);
    const T* const b_row = right.tile + lane % 16 * kPitch + lane / 16 * 8 + first;
#pragma unroll
    for (int k = 0; k < kTiles; k += 2) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const AccOf<T>(&w)[4] = weights[k + i / 2];
        a[i] = pack(from_float<T>(w[i % 2 * 2]), from_float<T>(w[i % 2 * 2 + 1]));
      }
#pragma unroll
      for (int j = 0; j < kOut; j += 2) {
        uint32_t b[4];
        ldmatrix_trans(b, b_row + 8 * k * kPitch + 8 * j);
        const uint32_t left[2] = {b[0], b[1]}, next[2] = {b[2], b[3]};
        mma_m16n8k16<T>(sums[j], a, left);
        mma_m16n8k16<T>(sums[j + 1], a, next);
      }
    }
  } else {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) slice[g + i % 4 / 2 * 8][i / 4 * 8 + 2 * t + i % 2] = weights[i / 4][i % 4];
    __syncwarp();
#pragma unroll 1
    for (int k = 0; k < 8 * kTiles; ++k) {
      const T* const row = right.rows.row(k);
      if (!row) break;  // those behind it are none either
      const T x[2] = {slice[g][k], slice[g + 8][k]};
#pragma unroll
      for (int j = 0; j < 2 * kOut; ++j) {
        const int d = first + j / 2 * 8 + 2 * t + j % 2;
        const T y = d < D ? right.read(row, d) : T(0);
        sums[j / 2][j % 2] += x[0] * y;
        sums[j / 2][2 + j % 2] += x[1] * y;
      }
    }
    __syncwarp();
  }
}

// -- dropout ----------------------------------------------------------------------------------------------------------

// Bytes of keep-bits of a row: one for each of the four calls of Philox that 32 keys take.
constexpr int bit_bytes(int keys) {
  return (keys + 31) / 32 * 4;
}

template <int kRows, int kKeys>
__device__ __forceinline__ void draw_bits(uint8_t* bits, const uint32_t* m, const Dropout& dropout, uint64_t seed,
                                          int key0) {
  constexpr int kBytes = bit_bytes(kKeys);
  for (int i = threadIdx.x; i < kRows * kBytes; i += kThreads) {
    const int piece = i % kBytes;
    const Philox4 random = philox(seed, {{m[i / kBytes], static_cast<uint32_t>(key0 / 32 + piece / 4),
                                          static_cast<uint32_t>(piece % 4), dropout.stream}});
    uint32_t byte = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      byte |= static_cast<uint32_t>((random.word[w] & 0xFFFFu) < dropout.threshold) << (2 * w);
      byte |= static_cast<uint32_t>((random.word[w] >> 16) < dropout.threshold) << (2 * w + 1);
    }
    bits[i] = static_cast<uint8_t>(byte);
  }
}

template <int kKeys>
__device__ __forceinline__ bool is_kept(const uint8_t* bits, int row, int key0, int col) {
  const int at = kKeys < 32 ? key0 % 32 + col : col;
  return bits[row * bit_bytes(kKeys) + at / 32 * 4 + at % 8 / 2] >> (at / 8 % 4 * 2 + at % 2) & 1;
}

// -- weights and their gradients --------------------------------------------------------------------------------------

// What is the same for all elements of a side.
template <class Acc>
struct Side {
  Mask mask;
  Dropout dropout;
  Acc keep_scale, softcap;  // 0: no cap
  bool softmax, relu;       // neither: linear

  __device__ __forceinline__ Side(const Problem& p, bool prefix)
      : mask(prefix ? p.bias : p.mask),
        dropout(prefix ? p.prefix_dropout : p.own_dropout),
        keep_scale(Acc(kKeepAll) / static_cast<Acc>(dropout.threshold)),
        softcap(static_cast<Acc>(p.softcap)),
        softmax(!prefix || p.composition == Composition::kMerge || p.composition == Composition::kAdd),
        relu(p.composition == Composition::kRelu) {}
};

template <class Acc>
struct Element {
  Acc weight, slope, grad;  // w; derivative of what w is made of; drop(dO V^T), the gradient of w
  Acc dropped;              // drop(w)
};

// product: of a query and a key, dp: of dO and a value.
template <class Acc, int kRows>
__device__ __forceinline__ Element<Acc> element_of(const Side<Acc>& side, const RowTable<Acc, kRows>& table, int row,
                                                   int key, bool kept, Acc product, Acc dp) {
  if (key < table.begin[row] || key >= table.end[row]) return {0, 0, 0, 0};
  Acc l = table.factor[row] * product, slope = 1;
  if (side.softmax) {
    if (side.softcap != 0) {
      const Acc t = hyperbolic_tangent(l / side.softcap);
      l = side.softcap * t;
      slope = 1 - t * t;
    }
    if (side.mask.data && side.mask.boolean) {
      if (!static_cast<const uint8_t*>(side.mask.data)[table.bias[row] + key]) return {0, 0, 0, 0};
    } else if (side.mask.data) {
      l += load<Acc>(side.mask.data, side.mask.type, table.bias[row] + key);
    }
    const Acc lse = table.lse[row];
    l = lse == -INFINITY ? Acc(0) : exponential(l - lse);
  } else if (side.relu) {
    slope = l > 0 ? Acc(1) : l == l ? Acc(0) : l;
    l = l < 0 ? Acc(0) : l;
  }
  return {l, slope, kept ? dp * side.keep_scale : Acc(0), kept ? l * side.keep_scale : Acc(0)};
}

// The gradient of a row's product with a key.
template <class Acc, int kRows>
__device__ __forceinline__ Acc logit_gradient(const Side<Acc>& side, const RowTable<Acc, kRows>& table, int row,
                                              const Element<Acc>& e) {
  const Acc grad = (table.gate[row] * e.grad - table.less[row]) * e.slope * table.factor[row];
  if (!side.softmax) return grad;
  return e.weight == 0 ? Acc(0) : e.weight * grad;  // no part, even of what is NaN
}

// Two neighbours, the first at an even column.
template <class T>
__device__ __forceinline__ void store_two(T* to, AccOf<T> first, AccOf<T> second) {
  if constexpr (kTensorCores<T>) {
    *reinterpret_cast<uint32_t*>(to) = pack(from_float<T>(first), from_float<T>(second));
  } else {
    to[0] = first;
    to[1] = second;
  }
}

// -- shared memory ----------------------------------------------------------------------------------------------------

template <class T, int kDim, int kRows, int kKeys>
struct Shared {
  static constexpr int kSteps = kRows < kKeys ? kRows : kKeys;
  static constexpr int size(int rows) { return kTensorCores<T> ? rows * tile_pitch(kDim) : 8; }
  alignas(16) T q[size(kRows)];
  alignas(16) T d[size(kRows)];
  alignas(16) T k[size(kKeys)];
  alignas(16) T v[size(kKeys)];
  RowTable<AccOf<T>, kRows> rows;
  AccOf<T> slices[kTensorCores<T> ? 1 : kWarps][16][kSteps + 1];
  uint8_t bits[kRows * bit_bytes(kKeys)];

  __device__ __forceinline__ AccOf<T> (&slice())[16][kSteps + 1] { return slices[kTensorCores<T> ? 0 : warp_index()]; }
};

}  // namespace pk::prefix_attention
