// What the tensor-core kernels of prefix_attention share: tiles of query rows, keys and values of a 16-bit type in
// shared memory, and the logits of 16 rows with a tile of keys in the fragments of a warp,
//   l = cap(c scale q k^T) + mask, and where a row sees no key, -inf (or 0, where there is no softmax),
// the same for own keys and for a prefix. Lanes are named as in mma.h: lane 4 g + t holds columns 8 j + 2 t + {0, 1} of
// rows g (elements 0, 1 of fragment j) and g + 8 (elements 2, 3). kD: the head's size, rounded up to that of a tile.
#pragma once

#include "common/mma_tiles.h"
#include "common/typed.h"
#include "prefix_attention/prefix_attention_cuda.h"

namespace pk::prefix_attention {

constexpr int kWarpRows = 16;

// -- sequences and their tiles ----------------------------------------------------------------------------------------

__device__ __forceinline__ int64_t bounded(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

__device__ __forceinline__ int least(int a, int b) {
  return a < b ? a : b;
}
__device__ __forceinline__ int greatest(int a, int b) {
  return a > b ? a : b;
}

// Within a sequence, and among the sequences, counts are of 32 bits.
inline bool fits(const Problem& p) {
  return p.S <= INT32_MAX && p.T <= INT32_MAX && p.P <= INT32_MAX && p.rows <= INT32_MAX;
}

// Sequence r; prefix -1 and P 0 where it has none. Values out of range are bounded.
__device__ __forceinline__ Sequence sequence_of(const Problem& p, int64_t r) {
  Sequence s{r, 0, p.S, 0, p.T, p.ids ? p.ids[r] : 0, 0};
  if (p.cu_q) {
    s.batch = 0;
    s.q0 = bounded(p.cu_q[r], 0, p.S);
    s.S = bounded(p.cu_q[r + 1], s.q0, p.S) - s.q0;
    s.k0 = bounded(p.cu_k[r], 0, p.T);
    s.T = bounded(p.cu_k[r + 1], s.k0, p.T) - s.k0;
  }
  if (s.prefix < 0 || s.prefix >= p.prefixes) s.prefix = -1;
  if (s.prefix >= 0) s.P = p.lengths ? bounded(p.lengths[s.prefix], 0, p.P) : p.P;
  return s;
}

// The elements of all sequences, `factor` for each of a sequence's rows (of queries or of keys), in tiles of kSize that
// never hold those of two sequences. `each` rows a sequence has; where they are packed, `ends` says, and `each` is
// their sum: a sequence's tiles then begin at number (elements before it) / kSize + r, and a few stay empty.
struct Tile {
  int64_t sequence, first;  // element of the sequence; past its last one in an empty tile
};

template <int kSize>
int64_t count_tiles(const int32_t* ends, int64_t sequences, int64_t each, int64_t factor) {
  return ends ? each * factor / kSize + sequences : sequences * blocks(each * factor, kSize);
}

template <int kSize>
__device__ __forceinline__ Tile tile_at(const int32_t* ends, int64_t sequences, int64_t each, int64_t factor,
                                        int64_t index) {
  if (!ends) {
    const int64_t tiles = (each * factor + kSize - 1) / kSize;
    return {index / tiles, index % tiles * kSize};
  }
  const auto start = [&](int64_t r) { return bounded(ends[r], 0, each) * factor / kSize + r; };
  int64_t low = 0, high = sequences;  // start(low) <= index, which is before start(high)
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (start(middle) <= index ? low : high) = middle;
  }
  const int64_t past = index - start(low);  // negative where the first sequence does not begin at 0
  return {low, past < 0 ? each * factor : past * kSize};
}

// -- query rows -------------------------------------------------------------------------------------------------------

// Where a row of a tile comes from; in shared memory.
struct Place {
  int64_t row;                    // of [B, Hq, S]; -1: there is none
  int32_t sequence, batch, head;  // head of the queries
  int32_t query;                  // within the batch index
  int32_t at;                     // the last key of its own that it sees, if it is causal
  float gate, key_gate;
};

__device__ __forceinline__ float gate_at(const Gate& gate, int64_t sequence, int64_t head) {
  return gate.data ? load<float>(gate.data, gate.type, sequence * gate.row + head * gate.head) : 1.f;
}

// Row `flat` of a sequence and a head of keys: query flat / group, head flat % group of the group.
__device__ __forceinline__ Place place_of(const Problem& p, const Sequence& s, int64_t r, int64_t kv_head,
                                          int64_t flat) {
  const int64_t G = p.Hq / p.Hkv, query = flat / G, head = kv_head * G + flat % G;
  if (query >= s.S) return {-1, 0, 0, 0, 0, 0, 1.f, 1.f};
  return {(s.batch * p.Hq + head) * p.S + s.q0 + query,
          static_cast<int32_t>(r),
          static_cast<int32_t>(s.batch),
          static_cast<int32_t>(head),
          static_cast<int32_t>(s.q0 + query),
          static_cast<int32_t>(query + s.T - s.S),
          gate_at(p.gate, r, head),
          gate_at(p.key_gate, r, head)};
}

// Columns begin ... end that a row sees, of `count`.
struct Columns {
  int begin, end;
};

__device__ __forceinline__ Columns own_columns(const Problem& p, int at, int count) {
  const int64_t end = p.causal ? bounded(static_cast<int64_t>(at) + 1, 0, count) : count;
  return {static_cast<int>(p.window ? bounded(at - p.window + 1, 0, end) : 0), static_cast<int>(end)};
}

__device__ __forceinline__ Columns prefix_columns(const Problem& p, int at, int count) {
  const bool slides = p.window && p.window_over_prefix;
  return {static_cast<int>(slides ? bounded(at - p.window + 1 + count, 0, count) : 0), count};
}

// What the rows of a warp see: a lane's two rows, the columns that some row sees, those that all see. A row that is not
// there sees everything.
struct Sight {
  Columns own[2], some, all;

  __device__ __forceinline__ bool none(int j0, int keys) const { return j0 >= some.end || j0 + keys <= some.begin; }
  __device__ __forceinline__ bool whole(int j0, int keys) const { return j0 >= all.begin && j0 + keys <= all.end; }
};

// `places`: of the warp's 16 rows.
__device__ __forceinline__ Sight sight_of(const Problem& p, const Place* places, bool prefix, int count) {
  Sight sight;
  Columns some{count, 0}, all{0, count};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Place& place = places[lane_index() / 4 + 8 * i];
    const bool there = place.row >= 0;
    const Columns sees = prefix ? prefix_columns(p, place.at, count) : own_columns(p, place.at, count);
    sight.own[i] = there ? sees : Columns{0, count};
    if (!there) continue;
    some = {least(some.begin, sees.begin), greatest(some.end, sees.end)};
    all = {greatest(all.begin, sees.begin), least(all.end, sees.end)};
  }
  sight.some = {-warp_max(-some.begin), warp_max(some.end)};
  sight.all = {warp_max(all.begin), -warp_max(-all.end)};
  return sight;
}

// -- tiles in shared memory -------------------------------------------------------------------------------------------

// Which rows can be read 16 bytes at a time.
struct Vectors {
  bool q, k, v, pk, pv;
};

// Of a [batch, heads, rows, D] tensor, or of none.
inline bool vector_view(const View& view, int bytes_each) {
  return vector_rows(view.data, view.batch, bytes_each) && vector_rows(view.data, view.head, bytes_each) &&
         vector_rows(view.data, view.row, bytes_each);
}

inline Vectors vectors_of(const Problem& p, int bytes_each) {
  return {vector_view(p.q, bytes_each), vector_view(p.k, bytes_each), vector_view(p.v, bytes_each),
          vector_view(p.pk, bytes_each), vector_view(p.pv, bytes_each)};
}

// Eight columns, of a row or (null) zeros. D is a multiple of eight.
template <class T>
__device__ __forceinline__ void copy_eight(T* to, const T* from, const T* anywhere, bool vector) {
  if (vector) {
    cp_async<16>(to, from ? from : anywhere, from ? 16 : 0);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) to[e] = from ? from[e] : T{};
  }
}

// kRows rows of D columns, `stride` apart, into a tile [kRows][tile_pitch(kD)]; zeros past `rows` >= 1 and past D. All
// kThreads threads of the block call it; cp.async, so commit and wait.
template <int kRows, int kD, int kThreads, class T>
__device__ __forceinline__ void copy_rows(T* tile, const T* from, int64_t stride, int rows, int D, bool vector) {
  constexpr int kPerRow = kD / 8;
#pragma unroll
  for (int i = 0; i < (kRows * kPerRow + kThreads - 1) / kThreads; ++i) {
    const int index = static_cast<int>(threadIdx.x) + i * kThreads, row = index / kPerRow, col = index % kPerRow * 8;
    if (kRows * kPerRow % kThreads && row >= kRows) break;
    const T* const source = row < rows && col < D ? from + row * stride + col : nullptr;
    copy_eight(tile + row * tile_pitch(kD) + col, source, from, vector);
  }
}

// The same for rows of queries (or of what has their shape), wherever they are; zeros where there is none.
template <int kRows, int kD, int kThreads, class T>
__device__ __forceinline__ void copy_queries(T* tile, const View& view, const Place* places, int D, bool vector) {
  constexpr int kPerRow = kD / 8;
  const T* const data = static_cast<const T*>(view.data);
#pragma unroll
  for (int i = 0; i < (kRows * kPerRow + kThreads - 1) / kThreads; ++i) {
    const int index = static_cast<int>(threadIdx.x) + i * kThreads, row = index / kPerRow, col = index % kPerRow * 8;
    if (kRows * kPerRow % kThreads && row >= kRows) break;
    const Place& place = places[row];
    const T* const source = data + place.batch * view.batch + place.head * view.head + place.query * view.row + col;
    copy_eight(tile + row * tile_pitch(kD) + col, place.row >= 0 && col < D ? source : nullptr, data, vector);
  }
}

// Keys or values of a sequence and a head, from number j0 on; likewise of its prefix.
template <class T>
__device__ __forceinline__ const T* own_rows(const View& view, const Sequence& s, int64_t kv_head, int64_t j0) {
  return static_cast<const T*>(view.data) + s.batch * view.batch + kv_head * view.head + (s.k0 + j0) * view.row;
}
template <class T>
__device__ __forceinline__ const T* prefix_rows(const View& view, const Sequence& s, int64_t kv_head, int64_t j0) {
  return static_cast<const T*>(view.data) + s.prefix * view.batch + kv_head * view.head + j0 * view.row;
}

// -- products of a warp -----------------------------------------------------------------------------------------------

// s = left keys^T: 16 rows of a tile with kKeys rows of another.
template <int kD, int kKeys, class T>
__device__ __forceinline__ void multiply_rows(float (&s)[kKeys / 8][4], const T* left, const T* keys) {
  const int lane = lane_index();
  left += lane % 16 * tile_pitch(kD) + lane / 16 * 8;
  keys += (lane / 16 * 8 + lane % 8) * tile_pitch(kD) + lane / 8 % 2 * 8;
#pragma unroll
  for (int i = 0; i < kKeys / 2; ++i) s[i / 4][i % 4] = 0.f;
#pragma unroll
  for (int k = 0; k < kD; k += 16) {
    uint32_t a[4];
    ldmatrix(a, left + k);
#pragma unroll
    for (int j = 0; j < kKeys; j += 16) {
      uint32_t right[4];
      ldmatrix(right, keys + j * tile_pitch(kD) + k);
      const uint32_t first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
      mma_m16n8k16<T>(s[j / 8], a, first);
      mma_m16n8k16<T>(s[j / 8 + 1], a, second);
    }
  }
}

// elu(q) + 1.
__device__ __forceinline__ float feature(float q) {
  return q > 0 ? q + 1 : expf(q);
}

// s = (elu(left) + 1) keys^T, the features as two parts: rounded once they would be most of the error.
template <int kD, int kKeys, class T>
__device__ __forceinline__ void multiply_features(float (&s)[kKeys / 8][4], const T* left, const T* keys) {
  const int lane = lane_index();
  left += lane % 16 * tile_pitch(kD) + lane / 16 * 8;
  keys += (lane / 16 * 8 + lane % 8) * tile_pitch(kD) + lane / 8 % 2 * 8;
#pragma unroll
  for (int i = 0; i < kKeys / 2; ++i) s[i / 4][i % 4] = 0.f;
#pragma unroll 1
  for (int k = 0; k < kD; k += 16) {
    uint32_t pairs[4], a[2][4];
    ldmatrix(pairs, left + k);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t parts[2];
      split_pair<T>(feature(to_float(T{static_cast<uint16_t>(pairs[i])})),
                    feature(to_float(T{static_cast<uint16_t>(pairs[i] >> 16)})), parts);
      a[0][i] = parts[0], a[1][i] = parts[1];
    }
#pragma unroll
    for (int j = 0; j < kKeys; j += 16) {
      uint32_t right[4];
      ldmatrix(right, keys + j * tile_pitch(kD) + k);
      const uint32_t first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        mma_m16n8k16<T>(s[j / 8], a[part], first);
        mma_m16n8k16<T>(s[j / 8 + 1], a[part], second);
      }
    }
  }
}

// o += w values: weights of 16 rows, rounded to T, and kKeys rows of a tile, of which kCols columns.
template <int kD, int kKeys, int kCols = kD, class T>
__device__ __forceinline__ void multiply_values(float (&o)[kCols / 8][4], const float (&w)[kKeys / 8][4],
                                                const T* values) {
  const int lane = lane_index();
  values += lane % 16 * tile_pitch(kD) + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < kKeys; k += 16) {
    const float* const low = w[k / 8];
    const float* const high = w[k / 8 + 1];
    const uint32_t a[4] = {
        pack(from_float<T>(low[0]), from_float<T>(low[1])), pack(from_float<T>(low[2]), from_float<T>(low[3])),
        pack(from_float<T>(high[0]), from_float<T>(high[1])), pack(from_float<T>(high[2]), from_float<T>(high[3]))};
#pragma unroll
    for (int d = 0; d < kCols; d += 16) {
      uint32_t right[4];
      ldmatrix_trans(right, values + k * tile_pitch(kD) + d);
      const uint32_t first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
      mma_m16n8k16<T>(o[d / 8], a, first);
      mma_m16n8k16<T>(o[d / 8 + 1], a, second);
    }
  }
}

// -- from products to logits ------------------------------------------------------------------------------------------

// f(element, row of the lane (0: g, 1: g + 8), column of the tile)
template <int kFragments, class F>
__device__ __forceinline__ void each_element(float (&s)[kFragments][4], const F& f) {
#pragma unroll
  for (int i = 0; i < 4 * kFragments; ++i) {
    f(s[i / 4][i % 4], i / 2 % 2, i / 4 * 8 + lane_index() % 4 * 2 + i % 2);
  }
}

template <class Number, int kFragments>
__device__ __forceinline__ void add_numbers(float (&s)[kFragments][4], const Number* const (&rows)[2],
                                            const Sight& sight, int j0) {
  each_element(s, [&](float& l, int row, int col) {
    const bool seen = rows[row] && j0 + col >= sight.own[row].begin && j0 + col < sight.own[row].end;
    if (!seen) return;
    if constexpr (std::is_same_v<Number, uint8_t>) {
      l = rows[row][j0 + col] ? l : -INFINITY;
    } else {
      l += to_float(rows[row][j0 + col]);
    }
  });
}

// The mask's numbers for the columns j0 ... that a row sees, or -inf where it is false. T: of queries.
template <class T, int kFragments>
__device__ __forceinline__ void add_mask(float (&s)[kFragments][4], const Mask& mask, const Place* places,
                                         const Sight& sight, int j0) {
  int64_t from[2];
  bool there[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Place& place = places[lane_index() / 4 + 8 * i];
    there[i] = place.row >= 0;
    from[i] = place.batch * mask.batch + place.head * mask.head + place.query * mask.row;
  }
  const auto add = [&](auto number) {
    using Number = decltype(number);
    const Number* const data = static_cast<const Number*>(mask.data);
    const Number* const rows[2] = {there[0] ? data + from[0] : nullptr, there[1] ? data + from[1] : nullptr};
    add_numbers(s, rows, sight, j0);
  };
  if (mask.boolean) return add(uint8_t{});
  if (mask.type == Dtype::kFloat32) return add(float{});
  add(T{});
}

// Logits of the columns j0 ... from their products; `factor`: scale, times c for a prefix, of the lane's rows. Without
// a softmax there is neither cap nor mask: cap 0 and a mask of null.
template <class T, int kFragments>
__device__ __forceinline__ void finish_logits(float (&s)[kFragments][4], const float (&factor)[2], float cap,
                                              const Mask& mask, const Place* places, const Sight& sight, int j0,
                                              float hidden) {
  each_element(s, [&](float& l, int row, int) { l *= factor[row]; });
  if (cap != 0) {
    const float inverse = 1 / cap;
    each_element(s, [&](float& l, int, int) { l = cap * tanhf(l * inverse); });
  }
  if (mask.data) add_mask<T>(s, mask, places, sight, j0);
  if (sight.whole(j0, 8 * kFragments)) return;
  each_element(s, [&](float& l, int row, int col) {
    if (j0 + col < sight.own[row].begin || j0 + col >= sight.own[row].end) l = hidden;
  });
}

// Zeroes what is dropped of the columns j0 ..., a multiple of 16, and of 32 where there are 32 columns or more. The
// scale of what is kept is left to the caller. `rows`: of [B, Hq, S], the lane's.
template <int kFragments>
__device__ __forceinline__ void drop(float (&w)[kFragments][4], const Dropout& dropout, uint64_t seed,
                                     const int64_t (&rows)[2], int j0) {
  constexpr int kPerWords = kFragments < 4 ? kFragments : 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int first = 0; first < kFragments; first += kPerWords) {
      const Philox4 words = keep_words(seed, dropout.stream, rows[i], j0 / 32 + first / 4);
#pragma unroll
      for (int j = 0; j < kPerWords; ++j) {
        uint32_t random = words.word[j];
        if (kPerWords == 2 && j0 % 32) random = words.word[j + 2];
        float* const pair = w[first + j] + 2 * i;
        pair[0] = (random & 0xFFFFu) < dropout.threshold ? pair[0] : 0.f;
        pair[1] = (random >> 16) < dropout.threshold ? pair[1] : 0.f;
      }
    }
  }
}

}  // namespace pk::prefix_attention
