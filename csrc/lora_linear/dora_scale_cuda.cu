// DoRA's magnitudes on the output of a layer, bound by memory:
//   forward   y = r + b + g z, one pass; block -> 64 rows x 32 vectors of 16 bytes, a warp to a row
//   backward  dz = g dy and, in registers, the sums of dy z and dy over a chunk of rows; block -> a chunk, the
//             columns of 32 vectors, and in a mixed batch one adapter (or none), whose rows it takes: dy and z are
//             read once, the ids by every block. The eight warps are added in order.
// z [M, N]; g = m / norm [L, N]. fp32, fp64 for fp64.
#include <type_traits>

#include "common/cp_async.h"
#include "common/typed.h"
#include "common/warp.h"
#include "lora_linear/dora_cuda.h"

namespace pk::dora_cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kRows = 64;

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
__device__ __forceinline__ Wide<T> widen(T value) {
  if constexpr (std::is_same_v<T, double>) {
    return value;
  } else {
    return to_float(value);
  }
}
template <class T>
__device__ __forceinline__ T narrow(Wide<T> value) {
  if constexpr (std::is_same_v<T, double>) {
    return value;
  } else {
    return from_float<T>(value);
  }
}

// A lane's columns of a row: the elements of one vector, or as many 32 apart where rows do not lie on vectors.
template <class T, bool kVector>
struct Piece {
  static constexpr int kWidth = 16 / sizeof(T), kCols = 32 * kWidth;
  struct alignas(16) Vector {
    T at[kWidth];
  };
  int64_t first, N;

  static __device__ __forceinline__ int offset(int i) {
    return kVector ? lane_index() * kWidth + i : lane_index() + 32 * i;
  }
  __device__ __forceinline__ bool has(int i) const { return first + offset(i) < N; }

  __device__ __forceinline__ void load_row(Wide<T> (&values)[kWidth], const void* row) const {
    const T* const from = static_cast<const T*>(row) + first;
    Vector vector = {};
    if constexpr (kVector) {
      if (has(0)) vector = *reinterpret_cast<const Vector*>(from + offset(0));
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (has(i)) vector.at[i] = from[offset(i)];
      }
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = widen(vector.at[i]);
  }

  __device__ __forceinline__ void store_row(void* row, const Wide<T> (&values)[kWidth]) const {
    T* const to = static_cast<T*>(row) + first;
    Vector vector;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) vector.at[i] = narrow<T>(values[i]);
    if constexpr (kVector) {
      if (has(0)) *reinterpret_cast<Vector*>(to + offset(0)) = vector;
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (has(i)) to[offset(i)] = vector.at[i];
      }
    }
  }

  // The gains of an adapter; of none, 1.
  __device__ __forceinline__ void load_gains(Wide<T> (&values)[kWidth], const Gains& gains, int64_t adapter) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      values[i] = 1;
      const int64_t at = adapter * N + first + offset(i);
      if (adapter < 0 || !has(i)) continue;
      values[i] = load<Wide<T>>(gains.magnitude, gains.type, at) / static_cast<const Wide<T>*>(gains.norm)[at];
    }
  }
};

__device__ __forceinline__ int64_t adapter_of(const Gains& gains, int64_t m) {
  const int64_t id = gains.ids[m];
  return id >= 0 && id < gains.L ? id : -1;
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, 2) dora_scale_forward_kernel(const Scale call) {
  using P = Piece<T, kVector>;
  const auto across = static_cast<unsigned>((call.N + P::kCols - 1) / P::kCols);
  const P piece{int64_t{blockIdx.x % across} * P::kCols, call.N};
  const int64_t row0 = int64_t{blockIdx.x / across} * kRows, end = row0 + kRows < call.M ? row0 + kRows : call.M;
  Wide<T> gain[P::kWidth], bias[P::kWidth] = {};
  if (!call.gains.ids) piece.load_gains(gain, call.gains, 0);
  if (call.bias) {
#pragma unroll
    for (int i = 0; i < P::kWidth; ++i) {
      if (piece.has(i)) bias[i] = widen(static_cast<const T*>(call.bias)[piece.first + P::offset(i)]);
    }
  }
#pragma unroll 1
  for (int64_t m = row0 + warp_index(); m < end; m += kWarps) {
    Wide<T> v[P::kWidth], r[P::kWidth] = {};
    piece.load_row(v, static_cast<const T*>(call.z) + m * call.z_stride);
    if (call.residual) piece.load_row(r, static_cast<const T*>(call.residual) + m * call.residual_stride);
    if (call.gains.ids) piece.load_gains(gain, call.gains, adapter_of(call.gains, m));
#pragma unroll
    for (int i = 0; i < P::kWidth; ++i) v[i] = gain[i] * v[i] + bias[i] + r[i];
    piece.store_row(static_cast<T*>(call.y) + m * call.N, v);
  }
}

// What the warps of a block have summed, added in order, divided by `norm` where there is one.
template <class P, class Acc>
__device__ __forceinline__ void store_sums(Acc (&shared)[kWarps][P::kCols], const Acc (&sums)[P::kWidth],
                                           const P& piece, const Acc* norm, Acc* out) {
#pragma unroll
  for (int i = 0; i < P::kWidth; ++i) shared[warp_index()][P::offset(i)] = sums[i];
  __syncthreads();
  const int col = static_cast<int>(threadIdx.x);
  if (col < P::kCols && piece.first + col < piece.N) {
    Acc sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += shared[w][col];
    out[piece.first + col] = norm ? sum / norm[piece.first + col] : sum;
  }
  __syncthreads();
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads, 2) dora_scale_backward_kernel(const ScaleBackward call, int64_t rows_each) {
  using P = Piece<T, kVector>;
  using Acc = Wide<T>;
  __shared__ Acc shared[kWarps][P::kCols];
  const auto across = static_cast<unsigned>((call.N + P::kCols - 1) / P::kCols);
  const auto owners = static_cast<unsigned>(dora_cuda::owners(call.gains));
  const P piece{int64_t{blockIdx.x % across} * P::kCols, call.N};
  const int64_t part = blockIdx.x / across, chunk = part / owners;
  const int64_t adapter = call.gains.ids ? part % owners - 1 : 0;
  const int64_t begin = chunk * rows_each, end = begin + rows_each < call.M ? begin + rows_each : call.M;
  Acc gain[P::kWidth], dm[P::kWidth] = {}, db[P::kWidth] = {};
  if (call.dz) piece.load_gains(gain, call.gains, adapter);
#pragma unroll 1
  for (int64_t m = begin + warp_index(); m < end; m += kWarps) {
    if (call.gains.ids && adapter_of(call.gains, m) != adapter) continue;
    Acc d[P::kWidth], z[P::kWidth] = {};
    piece.load_row(d, static_cast<const T*>(call.dy) + m * call.dy_stride);
    if (call.dm) piece.load_row(z, static_cast<const T*>(call.z) + m * call.z_stride);
#pragma unroll
    for (int i = 0; i < P::kWidth; ++i) {
      db[i] += d[i];
      dm[i] += d[i] * z[i];
      d[i] *= gain[i];
    }
    if (call.dz) piece.store_row(static_cast<T*>(call.dz) + m * call.N, d);
  }
  if (call.db) store_sums<P, Acc>(shared, db, piece, nullptr, static_cast<Acc*>(call.db) + part * call.N);
  if (call.dm && adapter >= 0) {
    const Acc* const norm = static_cast<const Acc*>(call.gains.norm) + adapter * call.N;
    store_sums<P, Acc>(shared, dm, piece, norm, static_cast<Acc*>(call.dm) + (chunk * call.gains.L + adapter) * call.N);
  }
}

template <class T, bool kVector>
cudaError_t launch_scale(const Scale& call, cudaStream_t stream) {
  constexpr int kCols = Piece<T, kVector>::kCols;
  const dim3 grid(static_cast<unsigned>((call.N + kCols - 1) / kCols * ((call.M + kRows - 1) / kRows)));
  return PK_LAUNCH((dora_scale_forward_kernel<T, kVector>), grid, dim3(kThreads), 0, stream, call);
}

template <class T>
cudaError_t scale_typed(const Scale& call, cudaStream_t stream) {
  const bool vector = vector_rows(call.z, call.z_stride, sizeof(T)) && vector_rows(call.y, call.N, sizeof(T)) &&
                      (!call.residual || vector_rows(call.residual, call.residual_stride, sizeof(T)));
  return vector ? launch_scale<T, true>(call, stream) : launch_scale<T, false>(call, stream);
}

template <class T, bool kVector>
cudaError_t launch_backward(const ScaleBackward& call, cudaStream_t stream) {
  constexpr int kCols = Piece<T, kVector>::kCols;
  const int64_t parts = row_chunks(call.M, call.gains.L) * owners(call.gains);
  const dim3 grid(static_cast<unsigned>((call.N + kCols - 1) / kCols * parts));
  return PK_LAUNCH((dora_scale_backward_kernel<T, kVector>), grid, dim3(kThreads), 0, stream, call,
                   chunk_rows(call.gains.L));
}

template <class T>
cudaError_t backward_typed(const ScaleBackward& call, cudaStream_t stream) {
  const bool vector = vector_rows(call.dy, call.dy_stride, sizeof(T)) &&
                      (!call.dz || vector_rows(call.dz, call.N, sizeof(T))) && call.N * sizeof(T) % 16 == 0 &&
                      (!call.dm || vector_rows(call.z, call.z_stride, sizeof(T)));
  return vector ? launch_backward<T, true>(call, stream) : launch_backward<T, false>(call, stream);
}

}  // namespace

cudaError_t scale(Dtype type, const Scale& call, cudaStream_t stream) {
  if (type == Dtype::kFloat64) return scale_typed<double>(call, stream);
  if (type == Dtype::kFloat32) return scale_typed<float>(call, stream);
  return type == Dtype::kFloat16 ? scale_typed<fp16>(call, stream) : scale_typed<bf16>(call, stream);
}

cudaError_t scale_backward(Dtype type, const ScaleBackward& call, cudaStream_t stream) {
  if (type == Dtype::kFloat64) return backward_typed<double>(call, stream);
  if (type == Dtype::kFloat32) return backward_typed<float>(call, stream);
  return type == Dtype::kFloat16 ? backward_typed<fp16>(call, stream) : backward_typed<bf16>(call, stream);
}

}  // namespace pk::dora_cuda
