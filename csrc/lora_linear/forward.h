// Forward units of lora_linear. T: type of x, W, bias, y. F: type of A, B, lora_bias.
#pragma once

#include "lora_linear/tiles.h"

namespace pk::PK_ISA {

// h[rows, ranks of l] = s / (1 - p) * sum_k mask[row, k] x[row, k] A[r, k]. One read of x from memory serves all the
// adapters: the units of a row block follow each other.
template <class T, class F>
void shrink_unit(const Problem& p, int64_t row0, const Adapter& adapter) {
  const int64_t rows = min(kRowBlock, p.M - row0);
  const T* x = static_cast<const T*>(p.x) + row0 * p.x_stride;
  const F* a = static_cast<const F*>(adapter.A);
  float* h = static_cast<float*>(p.h) + row0 * p.R + adapter.rank0;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t r = 0; r < adapter.R; ++r) h[i * p.R + r] = 0.f;
  }
  const Dropout& dropout = adapter.dropout;
  for (int64_t k = 0; k < p.K; k += kDotChunk) {
    const int64_t n = min(p.K - k, kDotChunk);
    prefetch_rows(x + rows * p.x_stride + k, min(kRowBlock, p.M - row0 - rows), n, p.x_stride);
    if (dropout.active()) {
      uint32_t mask[kRowBlock][kMaskWords];
      for (int64_t i = 0; i < rows; ++i) keep_words(mask[i], dropout, mask_row(p, row0 + i), k / 32, (n + 31) / 32);
      dots<true>(h, p.R, rows, adapter.R, x + k, p.x_stride, a + k, p.K, n, scaling(adapter) * dropout.scale, mask[0]);
    } else {
      dots<false>(h, p.R, rows, adapter.R, x + k, p.x_stride, a + k, p.K, n, scaling(adapter));
    }
  }
}

template <class T, class F>
void shrink(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    shrink_unit<T, F>(p, unit / p.L * kRowBlock, p.adapter[unit % p.L]);
  }
}

// Slices of x W^T for the members whose weight is stored [K, N].
template <class T>
void stream_y(const Problem& p, int64_t begin, int64_t end) {
  int64_t unit = 0;
  for (int64_t g = 0; g < p.G; ++g) {
    const Member& member = p.member[g];
    for (int64_t slice = 0; member.streamed && slice < slices(p.K); ++slice, ++unit) {
      if (unit < begin || unit >= end) continue;
      const int64_t k = slice * slice_rows(p.K);
      stream_slice(member.streamed + slice * p.M * pitch(member.N), p.M, member.N, static_cast<const T*>(p.x),
                   p.x_stride, static_cast<const T*>(member.weight), member.weight_k, k, min(k + slice_rows(p.K), p.K));
    }
  }
}

// The constant part of y in columns n0 ... n0 + cols: b + sum_l s_l b_Bl.
template <class T, class F>
void bias_row(float* row, const Problem& p, int64_t g, int64_t n0, int64_t cols) {
  const T* bias = static_cast<const T*>(p.member[g].bias);
  for (int64_t j = 0; j < cols; j += kLanes) {
    vf sum = bias ? load_n(bias + n0 + j, cols - j) : vf{};
    each_adapter(p, g, nullptr, [&](const Adapter& adapter, float*) {
      const F* lora_bias = static_cast<const F*>(adapter.bias);
      if (lora_bias) sum += load_n(lora_bias + n0 + j, cols - j) * scaling(adapter);
    });
    store(row + j, sum);
  }
}

// tile += rows of the residual; the next row block of it is on its way then.
template <class T>
void add_residual(Tile& tile, int64_t rows, int64_t cols, const T* residual, int64_t ld, int64_t next_rows) {
  prefetch_rows(residual + rows * ld, next_rows, cols, ld);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; j += kLanes) {
      store(tile.at[i] + j, load(tile.at[i] + j) + load_n(residual + i * ld + j, cols - j));
    }
  }
}

// y[:, n0 ... n0 + kBlock] of member g = bias + h B^T, plus the residual, or x W^T where the unit adds the base.
// b_t: room for B^T of the member's adapters, [R_g][kPitch].
template <class T, class F>
void expand_unit(const Problem& p, int64_t g, int64_t n0, float* b_t) {
  const Member& member = p.member[g];
  const int64_t cols = min(kBlock, member.N - n0);
  float bias[kPitch];
  bias_row<T, F>(bias, p, g, n0, cols);
  each_adapter(p, g, b_t, [&](const Adapter& adapter, float* rank_rows) {
    transpose(static_cast<const F*>(adapter.B) + n0 * adapter.R, adapter.R, cols, adapter.R, rank_rows, kPitch);
  });
  for (int64_t row0 = 0; row0 < p.M; row0 += kRowBlock) {
    const int64_t rows = min(kRowBlock, p.M - row0);
    Tile tile;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; j += kLanes) store(tile.at[i] + j, load(bias + j));
    }
    each_adapter(p, g, b_t, [&](const Adapter& adapter, const float* rank_rows) {
      const float* h = static_cast<const float*>(p.h) + row0 * p.R + adapter.rank0;
      outer<false>(tile.at[0], kPitch, rows, cols, h, 1, p.R, rank_rows, kPitch, adapter.R);
    });
    if (member.residual) {
      const T* residual = static_cast<const T*>(member.residual) + row0 * member.residual_stride + n0;
      add_residual(tile, rows, cols, residual, member.residual_stride, min(kRowBlock, p.M - row0 - rows));
    }
    if (p.base) {
      const T* x = static_cast<const T*>(p.x) + row0 * p.x_stride;
      const T* w = static_cast<const T*>(member.weight) + n0 * member.weight_n;
      if (member.streamed) {
        add_slices(tile, rows, cols, member.streamed, slices(p.K), pitch(member.N), n0);
      } else {
        add_product(tile, rows, cols, x, p.x_stride, p.K, w, member.weight_n);
      }
    }
    store_tile(tile, rows, cols, static_cast<T*>(member.y) + row0 * member.N + n0, member.N);
  }
}

template <class T, class F>
void expand(const Problem& p, int64_t begin, int64_t end) {
  each_member_unit(p, begin, end, [&](int64_t g, int64_t block, float* b_t) {
    if (p.base || p.member[g].R > 0 || p.member[g].bias) expand_unit<T, F>(p, g, block * kBlock, b_t);
  });
}

}  // namespace pk::PK_ISA
