// The forward of prefix_attention for fp32 and fp64, on the plain cores, in one launch: what rows_cuda.cu does, turn by
// turn, with all sums in the type itself. Grid: a block of 4 warps for each tile of 16 query rows of a sequence and
// head of keys. A row has eight lanes, which lie side by side along keys and along the head dim; keys and values of a
// tile take turns in one place of shared memory.
#include "prefix_attention/scalars.h"
#include "prefix_attention/softmax_tiles.h"

namespace pk::prefix_attention {
namespace {

constexpr int kTileRows = 16, kLanes = 8, kThreads = kTileRows * kLanes;

template <class T, int kD>
struct Shape {
  static constexpr int kTileKeys = sizeof(T) == 8 ? 16 : 32, kPitch = kD + 1, kWeightPitch = kTileKeys + 1;
  static constexpr int kQueries = kTileRows * kPitch, kKeys = kTileKeys * kPitch;
  static constexpr int kBytes = static_cast<int>(sizeof(T)) * (kQueries + kKeys + kTileRows * kWeightPitch);
};

__device__ __forceinline__ float logarithm(float x) {
  return logf(x);
}
__device__ __forceinline__ double logarithm(double x) {
  return log(x);
}

// kept() of common/dropout.h, without an index that would put the words into local memory.
__device__ __forceinline__ bool keeps(const Dropout& dropout, uint64_t seed, int64_t row, int col) {
  const uint32_t k = static_cast<uint32_t>(col);
  const Philox4 random = philox(seed, {{static_cast<uint32_t>(row), k / 32, k % 8 / 2, dropout.stream}});
  const uint32_t w = k / 8 % 4;
  const uint32_t word = w & 2 ? (w & 1 ? random.word[3] : random.word[2]) : (w & 1 ? random.word[1] : random.word[0]);
  return (k % 2 ? word >> 16 : word & 0xFFFFu) < dropout.threshold;
}

// The row of eight lanes.
template <class T, int kD>
struct Row {
  Place place;
  T gate, key_gate;
  T values[kD / kLanes], high, sum;

  __device__ __forceinline__ void restart() { high = static_cast<T>(-INFINITY), sum = 0; }
  __device__ __forceinline__ void scale(T factor) {
#pragma unroll
    for (int i = 0; i < kD / kLanes; ++i) values[i] *= factor;
  }
  __device__ __forceinline__ T below() const { return high == -INFINITY ? T(0) : high; }
  __device__ __forceinline__ T reciprocal() const { return sum == 0 ? T(0) : 1 / sum; }
};

// Logits of the lane's keys j0 + lane, j0 + lane + 8 ... of a tile. `hidden`: of keys that the row does not see.
template <class T, int kD, int kEach>
__device__ __forceinline__ void make_logits(T (&l)[kEach], const Problem& p, const Row<T, kD>& row, const T* q,
                                            const T* keys, bool prefix, bool softened, Columns sees, int j0) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes, D = static_cast<int>(p.D);
  const Mask& mask = prefix ? p.bias : p.mask;
  const Place& place = row.place;
  const int64_t from = place.batch * mask.batch + place.head * mask.head + place.query * mask.row;
  const T scale = prefix && p.composition == Composition::kLinear ? T(1) : static_cast<T>(p.scale);
#pragma unroll
  for (int i = 0; i < kEach; ++i) l[i] = 0;
#pragma unroll 4
  for (int d = 0; d < D; ++d) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) l[i] += q[d] * keys[(lane + kLanes * i) * (kD + 1) + d];
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int j = j0 + lane + kLanes * i;
    const bool seen = place.row >= 0 && j >= sees.begin && j < sees.end;
    l[i] *= prefix ? scale * row.key_gate : scale;
    if (softened && p.softcap != 0) {
      const T cap = static_cast<T>(p.softcap);
      l[i] = cap * hyperbolic_tangent(l[i] / cap);
    }
    if (seen && mask.data && mask.boolean) {
      if (!static_cast<const uint8_t*>(mask.data)[from + j]) l[i] = static_cast<T>(-INFINITY);
    } else if (seen && mask.data) {
      l[i] += load<T>(mask.data, mask.type, from + j);
    }
    if (!seen) l[i] = softened ? static_cast<T>(-INFINITY) : T(0);
  }
}

// Logits become weights for the values, of this turn's kind.
template <class T, int kD, int kEach>
__device__ __forceinline__ void weigh(T (&w)[kEach], const Problem& p, Row<T, kD>& row, Role role, T lse) {
  if (role == Role::kWeights) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (p.composition == Composition::kAdd) w[i] = lse == -INFINITY ? T(0) : exponential(w[i] - lse);
      if (p.composition == Composition::kRelu && w[i] < 0) w[i] = 0;
      w[i] *= row.gate;
    }
    return;
  }
  T found = static_cast<T>(-INFINITY), part = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) found = w[i] > found ? w[i] : found;
  found = warp_max<kLanes>(found);
  const T before = row.high;
  row.high = found > before ? found : before;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    w[i] = exponential(w[i] - row.below());
    part += w[i];
  }
  const T factor = exponential(before - row.below());
  row.sum = row.sum * factor + warp_sum<kLanes>(part);
  if (role == Role::kSoftmax) row.scale(factor);
}

// Rows of keys or values into shared memory, zeros around them; between two barriers.
template <class T, int kD>
__device__ __forceinline__ void bring(T* keys, const T* from, int64_t stride, int rows, int D) {
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < Shape<T, kD>::kTileKeys * kD; i += kThreads) {
    const int j = i / kD, d = i % kD;
    keys[j * (kD + 1) + d] = j < rows && d < D ? from[j * stride + d] : T(0);
  }
  __syncthreads();
}

template <class T, int kD>
__global__ void __launch_bounds__(kThreads, 2)
    prefix_attention_forward_plain_kernel(const __grid_constant__ Problem p) {
  using S = Shape<T, kD>;
  constexpr int kKeys = S::kTileKeys, kEach = kKeys / kLanes;
  PK_DYNAMIC_SHARED(T, shared);
  const int64_t G = p.Hq / p.Hkv;
  const int head = static_cast<int>(blockIdx.y), D = static_cast<int>(p.D);
  const Tile tile = tile_at<kTileRows>(p.cu_q, p.rows, p.S, G, gridDim.x - 1 - blockIdx.x);
  const Sequence s = sequence_of(p, tile.sequence);
  const int64_t left = s.S * G - tile.first, last = tile.first + (left < kTileRows ? left : kTileRows) - 1;
  if (left <= 0) return;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, at = static_cast<int>(threadIdx.x) / kLanes;
  T* const q = shared + at * S::kPitch;
  T* const keys = shared + S::kQueries;
  T* const weights = keys + S::kKeys + at * S::kWeightPitch;
  Row<T, kD> row;
  row.place = place_of(p, s, tile.sequence, head, tile.first + at);
  const bool there = row.place.row >= 0;
  row.gate = there ? gate_of<T>(p.gate, tile.sequence, row.place.head) : T(1);
  row.key_gate = there ? gate_of<T>(p.key_gate, tile.sequence, row.place.head) : T(1);
  row.restart();
#pragma unroll
  for (int i = 0; i < kD / kLanes; ++i) {
    const int d = lane + kLanes * i;
    const T* const from = static_cast<const T*>(p.q.data) + row.place.batch * p.q.batch + row.place.head * p.q.head +
                          row.place.query * p.q.row;
    q[d] = there && d < D ? from[d] : T(0);
    row.values[i] = 0;
  }
  const int first_at = static_cast<int>(tile.first / G + s.T - s.S), last_at = static_cast<int>(last / G + s.T - s.S);
  const bool drops = p.own_dropout.active();
  const uint64_t seed = drops ? *p.seed : 0;
  T lse = 0;
#pragma unroll 1
  for (int i = 0; i < count_turns(p.composition); ++i) {
    const Turn turn = turn_of(p.composition, i);
    const int count = static_cast<int>(turn.prefix ? s.P : s.T);
    const auto columns = [&](int key) {
      return turn.prefix ? prefix_columns(p, key, count) : own_columns(p, key, count);
    };
    const Columns sees = columns(row.place.at);
    const int end = columns(last_at).end;
    const View& k = turn.prefix ? p.pk : p.k;
    const View& v = turn.prefix ? p.pv : p.v;
    const auto rows_at = [&](const View& view, int j0) {
      return turn.prefix ? prefix_rows<T>(view, s, head, j0) : own_rows<T>(view, s, head, j0);
    };
    const Dropout& dropout = turn.prefix ? p.prefix_dropout : p.own_dropout;
    if (turn.prefix && p.composition == Composition::kLinear) {
      for (int d = lane; d < D; d += kLanes) q[d] = q[d] > 0 ? q[d] + 1 : exponential(q[d]);
    }
#pragma unroll 1
    for (int j0 = columns(first_at).begin / kKeys * kKeys; j0 < end; j0 += kKeys) {
      T w[kEach];
      bring<T, kD>(keys, rows_at(k, j0), k.row, end - j0, D);
      make_logits(w, p, row, q, keys, turn.prefix, !turn.prefix || p.composition <= Composition::kAdd, sees, j0);
      weigh(w, p, row, turn.role, lse);
      if (turn.role == Role::kSum) continue;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int col = lane + kLanes * j;
        weights[col] = !drops || keeps(dropout, seed, row.place.row, j0 + col) ? w[j] : T(0);
      }
      bring<T, kD>(keys, rows_at(v, j0), v.row, end - j0, D);
#pragma unroll 1
      for (int j = 0; j < kKeys; ++j) {
#pragma unroll
        for (int d = 0; d < kD / kLanes; ++d) row.values[d] += weights[j] * keys[j * S::kPitch + lane + kLanes * d];
      }
    }
    if (turn.role == Role::kWeights) continue;
    if (turn.prefix && turn.role == Role::kSoftmax) {
      row.scale(row.gate);
      continue;
    }
    lse = row.high + logarithm(row.sum);
    if (there && lane == 0) static_cast<T*>(turn.prefix ? p.prefix_lse : p.lse)[row.place.row] = lse;
    if (!turn.prefix) row.scale(row.reciprocal());
    row.restart();
  }
  const T scale = static_cast<T>(kKeepAll) / static_cast<T>(p.own_dropout.threshold);
  T* const out = static_cast<T*>(p.out) + ((row.place.batch * p.S + row.place.query) * p.Hq + row.place.head) * p.D;
#pragma unroll
  for (int i = 0; i < kD / kLanes; ++i) {
    const int d = lane + kLanes * i;
    if (there && d < D) out[d] = scale * row.values[i];
  }
}

template <class T, int kD>
cudaError_t launch_plain(const Problem& p, cudaStream_t stream) {
  const int64_t tiles = count_tiles<kTileRows>(p.cu_q, p.rows, p.S, p.Hq / p.Hkv);
  if (tiles > INT32_MAX || !fits(p)) return cudaErrorInvalidValue;
  return PK_LAUNCH((prefix_attention_forward_plain_kernel<T, kD>),
                   dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(p.Hkv)), dim3(kThreads),
                   (Shape<T, kD>::kBytes), stream, p);
}

}  // namespace

cudaError_t forward_plain(const Problem& p, cudaStream_t stream) {
  if (p.B * p.S * p.rows == 0) return cudaSuccess;
  if (p.type == Dtype::kFloat64)
    return p.D > 64 ? launch_plain<double, 256>(p, stream) : launch_plain<double, 64>(p, stream);
  if (p.type != Dtype::kFloat32) return cudaErrorInvalidValue;
  return p.D > 128  ? launch_plain<float, 256>(p, stream)
         : p.D > 64 ? launch_plain<float, 128>(p, stream)
                    : launch_plain<float, 64>(p, stream);
}

}  // namespace pk::prefix_attention
