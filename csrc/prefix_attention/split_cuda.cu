// The forward of prefix_attention for 16-bit types and few query rows a sequence (decoding), in two launches. The first
// divides the keys: each block takes 16 query rows of one head of keys, and a span of keys,
//   own      the rows of one sequence                          with a span of its own keys
//   prefix   the rows of as many sequences as fit, which share a prefix   with a span of it
// so that a prefix is read once for all of them, and writes the state of a softmax (for relu and linear: the sum of
// values) in fp32. The second, a warp for each row, adds what the spans gave, in their order, and composes.
//   slots     own spans, then those of the prefix: state [slot][B, Hq, S, D], high and sum [slot][B, Hq, S]
// Grid of the first: (a sequence, or the first of those that share a prefix and a tile, x span, head of keys);
// sequences that are not the first leave at once: which they are stands in prefix_ids, which only the device reads. Its
// warps have the same rows and 16 keys each of a tile (of wide heads two warps the same keys, and half of the values);
// two stages of keys and values, by cp.async. How many spans there are depends on shapes alone.
#include "prefix_attention/softmax_tiles.h"

namespace pk::prefix_attention {
namespace {

constexpr int kMergeThreads = 128, kLeastSpan = 128;  // keys of a span, at least
constexpr int64_t kBlocks = 512;                      // that fill a large GPU

template <int kD>
struct Shape {
  static constexpr int kHalves = kD > 128 ? 2 : 1, kCols = kD / kHalves;  // of values, which a warp has
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kGroups = kWarps / kHalves;
  static constexpr int kTileKeys = 16 * kGroups, kPitch = tile_pitch(kD);
  static constexpr int kQueries = kWarpRows * kPitch, kSlot = kTileKeys * kPitch, kStage = 2 * kSlot;
  static constexpr int kPartPitch = kD + 8, kPart = kWarpRows * kPartPitch;  // fp32, in the place of the stages
  static constexpr int kBytes = 2 * (kQueries + 2 * kStage);
  static_assert(4 * kGroups * kPart <= 4 * kStage, "the parts of all warps fit");
};

// Spans, and the keys of each: a multiple of every tile's.
struct Spans {
  int own, own_keys, prefix, prefix_keys;
};

int span_keys(int64_t keys, int64_t units) {
  const int64_t spans = kBlocks / units + 1, each = blocks(keys, spans);
  return static_cast<int>(blocks(each < kLeastSpan ? kLeastSpan : each, kLeastSpan) * kLeastSpan);
}

Spans spans_of(const Problem& p) {
  const int64_t together = kWarpRows / (p.S * group(p));  // sequences of a tile
  const int64_t P = p.prefixes ? p.P : 0;
  Spans spans;
  spans.own_keys = span_keys(p.T, p.B * p.Hkv);
  spans.own = static_cast<int>(blocks(p.T, spans.own_keys));
  spans.prefix_keys = span_keys(P, blocks(p.B, together) * p.Hkv);
  spans.prefix = static_cast<int>(blocks(P, spans.prefix_keys));
  return spans;
}

// The sequences whose rows a block has.
struct Members {
  int count, at[kWarpRows];
};

// If r is a first one: it and the next that have its prefix, `most` in all; else none. Sequences that share a prefix
// are divided in the order of the batch. Called by one warp.
__device__ __forceinline__ void find_members(Members& members, const Problem& p, int r, int most) {
  constexpr int kAtOnce = 4;
  const int lane = lane_index(), batch = static_cast<int>(p.B);
  int before = 0, found = 0;
#pragma unroll 1
  for (int base = 0; base < batch && found < most; base += 32 * kAtOnce) {
    bool same[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = base + 32 * i + lane;
      same[i] = at < batch && (!p.ids || p.ids[at] == p.ids[r]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = base + 32 * i + lane;
      before += __popc(__ballot_sync(kFullWarp, same[i] && at < r));
      const unsigned later = __ballot_sync(kFullWarp, same[i] && at >= r);
      const int index = found + __popc(later & ((1u << lane) - 1));
      if (same[i] && at >= r && index < most) members.at[index] = at;
      found += __popc(later);
    }
    if (found > 0 && before % most != 0) break;
  }
  if (lane == 0) members.count = before % most != 0 ? 0 : found < most ? found : most;
}

// What a block works at: a span of the keys of a sequence, or of its prefix.
struct Work {
  bool prefix;
  int sequence, span;
};

__device__ __forceinline__ Work unit_of(const Spans& spans, int index) {
  const int all = spans.own + spans.prefix, span = index % all;
  if (span < spans.prefix) return {true, index / all, span};
  return {false, index / all, span - spans.prefix};
}

// The warps' states become one, which is written to the slot.
template <int kD>
__device__ __forceinline__ void write_state(const Problem& p, float* parts, Softmax<Shape<kD>::kCols>& softmax,
                                            const Place* places, int64_t slot) {
  using S = Shape<kD>;
  __shared__ float high[S::kGroups][kWarpRows], sum[S::kGroups][kWarpRows];
  const int thread = static_cast<int>(threadIdx.x), group = warp_index() / S::kHalves;
  const int col0 = warp_index() % S::kHalves * S::kCols + lane_index() % 4 * 2;
  float unused[2];
  softmax.total(unused);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane_index() / 4 + 8 * i;
    if (col0 == 0) high[group][row] = softmax.high[i], sum[group][row] = softmax.sum[i];
    float* const own = parts + group * S::kPart + row * S::kPartPitch + col0;
#pragma unroll
    for (int j = 0; j < S::kCols / 8; ++j) {
      *reinterpret_cast<float2*>(own + 8 * j) = {softmax.values[j][2 * i], softmax.values[j][2 * i + 1]};
    }
  }
  __syncthreads();
  const int64_t from = slot * p.B * p.Hq * p.S;
  for (int i = thread; i < kWarpRows * kD / 4; i += S::kThreads) {
    const int row = i / (kD / 4), d = i % (kD / 4) * 4;
    if (places[row].row < 0 || d >= p.D) continue;
    float most = -INFINITY, total = 0.f;
#pragma unroll
    for (int w = 0; w < S::kGroups; ++w) most = high[w][row] > most ? high[w][row] : most;
    float4 all = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int w = 0; w < S::kGroups; ++w) {
      const float factor = power(high[w][row], below_of(most));
      const float4 part = *reinterpret_cast<const float4*>(parts + w * S::kPart + row * S::kPartPitch + d);
      all.x += factor * part.x, all.y += factor * part.y, all.z += factor * part.z, all.w += factor * part.w;
      total += factor * sum[w][row];
    }
    *reinterpret_cast<float4*>(p.state + (from + places[row].row) * p.D + d) = all;
    if (d == 0) p.high[from + places[row].row] = most, p.sum[from + places[row].row] = total;
  }
}

template <class T, int kD>
__global__ void __launch_bounds__(Shape<kD>::kThreads)
    prefix_attention_forward_split_kernel(const __grid_constant__ Problem p, const Vectors vectors, const Spans spans) {
  using S = Shape<kD>;
  constexpr int kKeys = S::kTileKeys;
  PK_DYNAMIC_SHARED(T, shared);
  __shared__ Place places[kWarpRows];
  __shared__ Sequence s;
  __shared__ Members members;
  let_next_launch_start();
  const Work unit = unit_of(spans, static_cast<int>(blockIdx.x));
  const int head = static_cast<int>(blockIdx.y), D = static_cast<int>(p.D);
  const int each = static_cast<int>(p.S * (p.Hq / p.Hkv));
  if (threadIdx.x == 0) {
    s = sequence_of(p, unit.sequence);
    if (!unit.prefix || s.P == 0) members.count = !unit.prefix, members.at[0] = unit.sequence;
  }
  __syncthreads();
  if (warp_index() == 0 && unit.prefix && s.P > 0) find_members(members, p, unit.sequence, kWarpRows / each);
  __syncthreads();
  if (members.count == 0) return;
  if (threadIdx.x < kWarpRows) {
    const int row = static_cast<int>(threadIdx.x);
    const bool there = row / each < members.count;
    const int r = there ? members.at[row / each] : 0;
    places[row] = place_of(p, sequence_of(p, r), r, head, there ? row % each : each);
  }
  __syncthreads();

  const int keys = static_cast<int>(unit.prefix ? s.P : s.T), most = unit.prefix ? spans.prefix_keys : spans.own_keys;
  const Sight sight = sight_of(p, places, unit.prefix, keys);
  const int first = greatest(unit.span * most, sight.some.begin / kKeys * kKeys);
  const int end = least((unit.span + 1) * most, sight.some.end);
  const View& k = unit.prefix ? p.pk : p.k;
  const View& v = unit.prefix ? p.pv : p.v;
  const auto rows_at = [&](const View& view, int j0) {
    return unit.prefix ? prefix_rows<T>(view, s, head, j0) : own_rows<T>(view, s, head, j0);
  };
  T* const stages = shared + S::kQueries;
  const auto fetch = [&](int j0) {
    if (j0 < end) {
      T* const stage = stages + (j0 - first) / kKeys % 2 * S::kStage;
      const bool k_vector = unit.prefix ? vectors.pk : vectors.k, v_vector = unit.prefix ? vectors.pv : vectors.v;
      copy_rows<kKeys, kD, S::kThreads>(stage, rows_at(k, j0), k.row, end - j0, D, k_vector);
      copy_rows<kKeys, kD, S::kThreads>(stage + S::kSlot, rows_at(v, j0), v.row, end - j0, D, v_vector);
    }
    cp_async_commit();
  };
  copy_queries<kWarpRows, kD, S::kThreads>(shared, p.q, places, D, vectors.q);
  fetch(first);

  const Place &upper = places[lane_index() / 4], &lower = places[lane_index() / 4 + 8];
  const bool linear = unit.prefix && p.composition == Composition::kLinear;
  const bool softened = !unit.prefix || p.composition <= Composition::kAdd;
  const float scale = linear ? 1.f : static_cast<float>(p.scale);
  const float factor[2] = {unit.prefix ? scale * upper.key_gate : scale, unit.prefix ? scale * lower.key_gate : scale};
  const Dropout& dropout = unit.prefix ? p.prefix_dropout : p.own_dropout;
  const uint64_t seed = dropout.active() ? *p.seed : 0;
  Softmax<S::kCols> softmax;
  softmax.start();
  if (!softened) softmax.high[0] = softmax.high[1] = 0.f;
#pragma unroll 1
  for (int j0 = first; j0 < end; j0 += kKeys) {
    cp_async_wait<0>();
    __syncthreads();  // also: the stage that is filled next has been read
    fetch(j0 + kKeys);
    const int mine = 16 * (warp_index() / S::kHalves);
    if (sight.none(j0 + mine, 16)) continue;
    const T* const tile = stages + (j0 - first) / kKeys % 2 * S::kStage + mine * S::kPitch;
    float w[2][4];
    if (linear) {
      multiply_features<kD, 16>(w, shared, tile);
    } else {
      multiply_rows<kD, 16>(w, shared, tile);
    }
    finish_logits<T>(w, factor, softened ? static_cast<float>(p.softcap) : 0.f, unit.prefix ? p.bias : p.mask, places,
                     sight, j0 + mine, softened ? -INFINITY : 0.f);
    if (softened) {
      softmax.accumulate(w, true);
    } else if (!linear) {
      each_element(w, [](float& l, int, int) { l = l < 0 ? 0.f : l; });
    }
    if (dropout.active()) {
      const int64_t rows[2] = {upper.row, lower.row};
      drop(w, dropout, seed, rows, j0 + mine);
    }
    multiply_values<kD, 16, S::kCols>(softmax.values, w, tile + S::kSlot + warp_index() % S::kHalves * S::kCols);
  }
  cp_async_wait<0>();
  __syncthreads();
  write_state<kD>(p, reinterpret_cast<float*>(stages), softmax, places, unit.span + (unit.prefix ? spans.own : 0));
}

// What the slots first ... end of a row give together: a softmax, or, where they are none, sums.
struct Merged {
  static constexpr int kPerLane = kMostDim / 32;
  float high = -INFINITY, sum = 0.f, values[kPerLane] = {};

  __device__ __forceinline__ void see(const Problem& p, int64_t row, int first, int end) {
    for (int slot = first; slot < end; ++slot) {
      const float found = p.high[slot * p.B * p.Hq * p.S + row];
      high = found > high ? found : high;
    }
  }
  __device__ __forceinline__ void add(const Problem& p, int64_t row, int first, int end, float gate) {
#pragma unroll 2
    for (int slot = first; slot < end; ++slot) {
      const int64_t at = slot * p.B * p.Hq * p.S + row;
      const float factor = power(p.high[at], below_of(high));
      sum += factor * p.sum[at];
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int d = lane_index() + 32 * i;
        if (d < p.D) values[i] += gate * (factor * p.state[at * p.D + d]);
      }
    }
  }
  __device__ __forceinline__ float reciprocal() const { return sum == 0 ? 0.f : 1 / sum; }
  __device__ __forceinline__ float lse() const { return high + logf(sum); }
};

template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    prefix_attention_forward_merge_kernel(const __grid_constant__ Problem p, const Spans spans) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kMergeThreads / 32) + warp_index();
  if (row >= p.B * p.Hq * p.S) return;
  const int64_t head = row / p.S % p.Hq, r = row / p.S / p.Hq;
  wait_for_previous_launch();  // which, where there are no keys at all, is not ours
  const Sequence s = sequence_of(p, r);
  const float gate = gate_at(p.gate, r, head);
  const int own = spans.own, all = own + (s.P > 0 ? spans.prefix : 0);
  const bool merges = p.composition == Composition::kMerge, adds = p.composition == Composition::kAdd;
  Merged first, second;
  first.see(p, row, 0, merges ? all : own);
  if (merges) first.add(p, row, own, all, gate);
  first.add(p, row, 0, own, 1.f);
  if (!merges) {
    second.see(p, row, own, all);
    second.add(p, row, own, all, gate);
  }
  const float scale = p.own_dropout.scale, more = adds ? second.reciprocal() : 1.f;
  T* const out = static_cast<T*>(p.out) + ((r * p.S + row % p.S) * p.Hq + head) * p.D;
#pragma unroll
  for (int i = 0; i < Merged::kPerLane; ++i) {
    const int d = lane_index() + 32 * i;
    if (d < p.D) out[d] = from_float<T>(scale * (first.values[i] * first.reciprocal() + second.values[i] * more));
  }
  if (lane_index() != 0) return;
  static_cast<float*>(p.lse)[row] = first.lse();
  if (adds) static_cast<float*>(p.prefix_lse)[row] = second.lse();
}

template <class T, int kD>
cudaError_t launch_split(const Problem& p, cudaStream_t stream) {
  const Spans spans = spans_of(p);
  const int64_t units = p.B * (spans.own + spans.prefix);
  if (units == 0) return cudaSuccess;
  if (units > INT32_MAX || !fits(p)) return cudaErrorInvalidValue;
  return PK_LAUNCH((prefix_attention_forward_split_kernel<T, kD>),
                   dim3(static_cast<unsigned>(units), static_cast<unsigned>(p.Hkv)), dim3(Shape<kD>::kThreads),
                   Shape<kD>::kBytes, stream, p, vectors_of(p, sizeof(T)), spans);
}

template <class T>
cudaError_t split_of(const Problem& p, cudaStream_t stream) {
  return p.D > 128  ? launch_split<T, 256>(p, stream)
         : p.D > 96 ? launch_split<T, 128>(p, stream)
         : p.D > 64 ? launch_split<T, 96>(p, stream)
         : p.D > 32 ? launch_split<T, 64>(p, stream)
                    : launch_split<T, 32>(p, stream);
}

}  // namespace

bool splits_keys(const Problem& p) {
  const bool halves = p.type == Dtype::kBFloat16 || p.type == Dtype::kFloat16;
  return halves && !p.cu_q && p.B * p.S > 0 && few(p);
}

int64_t split_floats(const Problem& p) {
  const Spans spans = spans_of(p);
  return (spans.own + spans.prefix) * p.B * p.Hq * p.S * (p.D + 2);
}

void set_splits(Problem& p, float* scratch) {
  const Spans spans = spans_of(p);
  const int64_t rows = (spans.own + spans.prefix) * p.B * p.Hq * p.S;
  p.state = scratch;
  p.high = scratch + rows * p.D;
  p.sum = p.high + rows;
}

cudaError_t forward_split(const Problem& p, cudaStream_t stream) {
  return p.type == Dtype::kBFloat16 ? split_of<bf16>(p, stream) : split_of<fp16>(p, stream);
}

cudaError_t forward_merge(const Problem& p, cudaStream_t stream) {
  constexpr int64_t kRowsEach = kMergeThreads / 32;
  const int64_t rows = blocks(p.B * p.Hq * p.S, kRowsEach);
  if (rows > INT32_MAX) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(rows));
  if (p.type == Dtype::kBFloat16) {
    return PK_LAUNCH_OVERLAPPED((prefix_attention_forward_merge_kernel<bf16>), grid, dim3(kMergeThreads), 0, stream, p,
                                spans_of(p));
  }
  return PK_LAUNCH_OVERLAPPED((prefix_attention_forward_merge_kernel<fp16>), grid, dim3(kMergeThreads), 0, stream, p,
                              spans_of(p));
}

}  // namespace pk::prefix_attention
