// The CPU kernels of DoRA for one instruction set: compiled once per set, with PK_ISA naming it.
#include "common/products.h"
#include "lora_linear/dora.h"

namespace pk::PK_ISA {
namespace {

using dora::adapter_of;
using dora::blocks;
using dora::chunk_rows;
using dora::kColumns;
using dora::kMostRanks;
using dora::kRows;
using dora::Norm;
using dora::Scale;

constexpr int64_t kLowPitch = kMostRanks + 16;  // off the powers of two, which thrash L1

float sum_of_lanes(vf v) {
  float lanes[kLanes], sum = 0;
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

// -- norm -------------------------------------------------------------------------------------------------------------

void gram(const Norm& p, int64_t begin, int64_t end) {
  const float s = static_cast<float>(p.scaling), *A = static_cast<const float*>(p.A);
  for (int64_t row0 = begin * kRows; row0 < min(end * kRows, p.R); row0 += kRows) {
    const int64_t rows = min(kRows, p.R - row0);
    float* const out = p.gram + row0 * p.R;
    for (int64_t i = 0; i < rows * p.R; ++i) out[i] = 0;
    for (int64_t k = 0; k < p.K; k += kDotChunk) {
      dots<false>(out, p.R, rows, p.R, A + row0 * p.K + k, p.K, A + k, p.K, min(kDotChunk, p.K - k), s * s);
    }
  }
}

template <class T>
float square_of(const T* row, int64_t count) {
  vf sum{};
  for (int64_t k = 0; k < count; k += kLanes) {
    const vf v = load_n(row + k, count - k);
    sum += v * v;
  }
  return sum_of_lanes(sum);
}

// low: [rows][kLowPitch] = 2 s A W_n; squares: ||W_n||^2.
template <class T>
void read_weight(const Norm& p, int64_t row0, int64_t rows, float* low, float* squares) {
  const T* const weight = static_cast<const T*>(p.weight) + row0 * p.weight_n;
  for (int64_t k = 0; k < p.K; k += kDotChunk) {
    const int64_t count = min(kDotChunk, p.K - k);
    alignas(64) T across[kRows * kDotChunk];  // rows of W, where they lie across memory
    const bool along = p.weight_k == 1;
    if (!along) transpose(weight + k * p.weight_k, p.weight_k, count, rows, across, kDotChunk);
    const T* const w = along ? weight + k : across;
    const int64_t ld = along ? p.weight_n : kDotChunk;
    for (int64_t i = 0; i < rows; ++i) squares[i] += square_of(w + i * ld, count);
    dots<false>(low, kLowPitch, rows, p.R, w, ld, static_cast<const float*>(p.A) + k, p.K, count,
                2 * static_cast<float>(p.scaling));
  }
}

template <class T>
void rows(const Norm& p, int64_t begin, int64_t end) {
  for (int64_t row0 = begin * kRows; row0 < min(end * kRows, p.N); row0 += kRows) {
    const int64_t count = min(kRows, p.N - row0);
    const float* const B = static_cast<const float*>(p.B) + row0 * p.R;
    alignas(64) float low[kRows * kLowPitch] = {}, squares[kRows] = {};
    read_weight<T>(p, row0, count, low, squares);
    outer<false>(low, kLowPitch, count, p.R, B, 1, p.R, p.gram, p.R, p.R);
    for (int64_t i = 0; i < count; ++i) {
      vf product{};
      for (int64_t r = 0; r < p.R; r += kLanes) {
        product += load_n(B + i * p.R + r, p.R - r) * load_n(low + i * kLowPitch + r, p.R - r);
      }
      const double square = squares[i] + sum_of_lanes(product);
      static_cast<float*>(p.norm)[row0 + i] = square < 0 ? 0 : static_cast<float>(__builtin_sqrt(square));
    }
  }
}

// -- scale ------------------------------------------------------------------------------------------------------------

void gains(const Scale& p, int64_t begin, int64_t end) {
  const float *magnitude = static_cast<const float*>(p.magnitude), *norm = static_cast<const float*>(p.norm);
  const int64_t across = blocks(p.N, kColumns);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit / across * p.N + unit % across * kColumns;
    const int64_t count = min(kColumns, p.N - unit % across * kColumns);
    for (int64_t j = first; j < first + count; j += kLanes) {
      const int64_t left = first + count - j;
      store_n(p.gain + j, load_n(magnitude + j, left) / load_n(norm + j, left), left);
    }
  }
}

// Columns n0 ... n0 + cols of row m; gain null: 1.
template <class T>
void scale_row(const Scale& p, int64_t m, const float* gain, int64_t n0, int64_t cols) {
  const T* const z = static_cast<const T*>(p.z) + m * p.z_stride + n0;
  const T* const bias = p.bias ? static_cast<const T*>(p.bias) + n0 : nullptr;
  const T* const residual = p.residual ? static_cast<const T*>(p.residual) + m * p.residual_stride + n0 : nullptr;
  T* const y = static_cast<T*>(p.y) + m * p.N + n0;
  for (int64_t j = 0; j < cols; j += kLanes) {
    vf v = load_n(z + j, cols - j);
    if (gain) v *= load_n(gain + n0 + j, cols - j);
    if (bias) v += load_n(bias + j, cols - j);
    if (residual) v += load_n(residual + j, cols - j);
    store_n(y + j, v, cols - j);
  }
}

PK_INLINE const float* gain_of(const Scale& p, int64_t m) {
  return adapter_of(p, m) < 0 ? nullptr : p.gain + adapter_of(p, m) * p.N;
}

template <class T>
void scale(const Scale& p, int64_t begin, int64_t end) {
  const int64_t across = blocks(p.N, kColumns);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row0 = unit / across * kRows, n0 = unit % across * kColumns;
    for (int64_t m = row0; m < min(row0 + kRows, p.M); ++m) {
      scale_row<T>(p, m, gain_of(p, m), n0, min(kColumns, p.N - n0));
    }
  }
}

// dm and db: the sums that the row adds to, or null.
template <class T>
void backward_row(const Scale& p, int64_t m, float* dm, float* db, int64_t n0, int64_t cols) {
  const T* const dy = static_cast<const T*>(p.dy) + m * p.dy_stride + n0;
  const T* const z = dm ? static_cast<const T*>(p.z) + m * p.z_stride + n0 : nullptr;
  const float* const gain = p.dz ? gain_of(p, m) : nullptr;
  for (int64_t j = 0; j < cols; j += kLanes) {
    const int64_t left = cols - j;
    const vf d = load_n(dy + j, left);
    if (p.dz) store_n(static_cast<T*>(p.dz) + m * p.N + n0 + j, gain ? d * load_n(gain + n0 + j, left) : d, left);
    if (dm) store_n(dm + j, load_n(dm + j, left) + d * load_n(z + j, left), left);
    if (db) store_n(db + j, load_n(db + j, left) + d, left);
  }
}

template <class T>
void backward(const Scale& p, int64_t begin, int64_t end) {
  const int64_t across = blocks(p.N, kColumns), height = chunk_rows(p.L);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t chunk = unit / across, n0 = unit % across * kColumns, cols = min(kColumns, p.N - n0);
    float* const dm = p.dm ? p.dm_parts + chunk * p.L * p.N + n0 : nullptr;
    float* const db = p.db ? p.db_parts + chunk * p.N + n0 : nullptr;
    for (int64_t j = 0; db && j < cols; ++j) db[j] = 0;
    for (int64_t l = 0; dm && l < p.L; ++l) {
      for (int64_t j = 0; j < cols; ++j) dm[l * p.N + j] = 0;
    }
    for (int64_t m = chunk * height; m < min((chunk + 1) * height, p.M); ++m) {
      const int64_t adapter = adapter_of(p, m);
      backward_row<T>(p, m, dm && adapter >= 0 ? dm + adapter * p.N : nullptr, db, n0, cols);
    }
  }
}

// Parts added in order; those of `rows` rows of N columns.
void add_parts(const Scale& p, const float* parts, int64_t rows, const float* divisor, float* out, int64_t n0,
               int64_t cols) {
  const int64_t chunks = dora::row_chunks(p);
  for (int64_t l = 0; l < rows; ++l) {
    const int64_t at = l * p.N + n0;
    for (int64_t j = 0; j < cols; j += kLanes) {
      vf sum{};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += load_n(parts + chunk * rows * p.N + at + j, cols - j);
      store_n(out + at + j, divisor ? sum / load_n(divisor + at + j, cols - j) : sum, cols - j);
    }
  }
}

void sums(const Scale& p, int64_t begin, int64_t end) {
  for (int64_t n0 = begin * kColumns; n0 < min(end * kColumns, p.N); n0 += kColumns) {
    const int64_t cols = min(kColumns, p.N - n0);
    const float* const norm = static_cast<const float*>(p.norm);
    if (p.dm) add_parts(p, p.dm_parts, p.L, norm, static_cast<float*>(p.dm), n0, cols);
    if (p.db) add_parts(p, p.db_parts, 1, nullptr, static_cast<float*>(p.db), n0, cols);
  }
}

template <class T>
constexpr dora::Kernels kKernels = {rows<T>, scale<T>, backward<T>};

}  // namespace

extern const dora::Table dora_table;
const dora::Table dora_table = {gram, gains, sums, kKernels<float>, kKernels<fp16>, kKernels<bf16>};

}  // namespace pk::PK_ISA
