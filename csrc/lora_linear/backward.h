// Backward units of lora_linear. T: type of x, W, dy, dx. F: type of A, B and their gradients. ds_l = s_l dy_g B_l.
#pragma once

#include "lora_linear/tiles.h"

namespace pk::PK_ISA {

constexpr int64_t kMaxRank = 512;

// The block's part of ds for the rows of one row block: s * dy[:, block] B[block].
template <class T, class F>
void store_ds_part(const Problem& p, const Adapter& adapter, const T* dy, int64_t dy_stride, int64_t n0, int64_t cols,
                   int64_t row0, int64_t rows) {
  constexpr int64_t kPart = kMaxRank + kLanes;
  alignas(64) float part[kRowBlock][kPart];
  for (int64_t i = 0; i < rows; ++i) fill(part[i], adapter.R, vf{});
  const F* b = static_cast<const F*>(adapter.B) + n0 * adapter.R;
  outer_rows(part[0], kPart, rows, adapter.R, dy, dy_stride, b, adapter.R, cols);
  const int64_t panel_rows = p.panel1 - p.panel0;
  float* ds = p.ds_part + (n0 / kBlock * panel_rows + row0 - p.panel0) * p.R + adapter.rank0;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t r = 0; r < adapter.R; r += kLanes) {
      store_n(ds + i * p.R + r, load(part[i] + r) * scaling(adapter), adapter.R - r);
    }
  }
}

template <class T>
void add_rows(float* sums, const T* rows, int64_t count, int64_t ld, int64_t cols) {
  for (int64_t j = 0; j < cols; j += kLanes) {
    vf sum = load(sums + j);
    for (int64_t i = 0; i < count; ++i) sum += load_n(rows + i * ld + j, cols - j);
    store(sums + j, sum);
  }
}

template <class To>
void store_row(To* out, const float* row, int64_t cols, float scale) {
  for (int64_t j = 0; j < cols; j += kLanes) store_n(out + j, load(row + j) * scale, cols - j);
}

// One pass over dy in the rows of the panel and columns n0 ... n0 + kBlock of member g, kRowBlock rows at a time while
// they are in L1: the block's part of ds;  dB = dy^T h  (h carries s);  bias gradients, sums over the rows.
// sums: room for the sums of dy's columns and dB^T of the member's adapters, [1 + R_g][kPitch], kept between panels.
template <class T, class F>
void dy_pass_unit(const Problem& p, int64_t g, int64_t n0, float* sums) {
  const Member& member = p.member[g];
  const int64_t cols = min(kBlock, member.N - n0), stride = member.dy_stride;
  float* const db_t = sums + kPitch;
  bool wants_sums = member.dbias;
  each_adapter(p, g, db_t, [&](const Adapter& adapter, float*) { wants_sums = wants_sums || adapter.dbias; });
  if (p.panel0 == 0) fill(sums, (1 + member.R) * kPitch, vf{});
  for (int64_t row0 = p.panel0; row0 < p.panel1; row0 += kRowBlock) {
    const int64_t rows = min(kRowBlock, p.panel1 - row0);
    const T* dy = static_cast<const T*>(member.dy) + row0 * stride + n0;
    prefetch_rows(dy + rows * stride, min(kRowBlock, p.panel1 - row0 - rows), cols, stride);
    each_adapter(p, g, db_t, [&](const Adapter& adapter, float* rank_rows) {
      if (p.ds) store_ds_part<T, F>(p, adapter, dy, stride, n0, cols, row0, rows);
      if (adapter.dB) {
        const float* h = static_cast<const float*>(p.h) + row0 * p.R + adapter.rank0;
        outer<false>(rank_rows, kPitch, adapter.R, cols, h, p.R, 1, dy, stride, rows);
      }
    });
    if (wants_sums) add_rows(sums, dy, rows, stride, cols);
  }
  if (p.panel1 < p.M) return;
  each_adapter(p, g, db_t, [&](const Adapter& adapter, const float* rank_rows) {
    if (adapter.dB) {
      transpose(rank_rows, kPitch, adapter.R, cols, static_cast<F*>(adapter.dB) + n0 * adapter.R, adapter.R);
    }
    if (adapter.dbias) store_row(static_cast<F*>(adapter.dbias) + n0, sums, cols, scaling(adapter));
  });
  if (member.dbias) store_row(static_cast<T*>(member.dbias) + n0, sums, cols, 1.f);
}

template <class T, class F>
void dy_pass(const Problem& p, int64_t begin, int64_t end) {
  each_member_unit(p, begin, end,
                   [&](int64_t g, int64_t block, float* sums) { dy_pass_unit<T, F>(p, g, block * kBlock, sums); });
}

// ds of the panel's rows = the sum of the blocks' parts, in order.
static void sum_ds(const Problem& p, int64_t begin, int64_t end) {
  const int64_t first = begin * kRowBlock, panel_rows = p.panel1 - p.panel0, last = min(end * kRowBlock, panel_rows);
  for (int64_t l = 0; l < p.L; ++l) {
    const Adapter& adapter = p.adapter[l];
    for (int64_t row = first; row < last; ++row) {
      const float* part = p.ds_part + row * p.R + adapter.rank0;
      float* ds = p.ds + (p.panel0 + row) * p.R + adapter.rank0;
      for (int64_t r = 0; r < adapter.R; r += kLanes) {
        vf sum = load_n(part + r, adapter.R - r);
        for (int64_t block = 1; block < blocks(p.member[adapter.member].N); ++block) {
          sum += load_n(part + block * panel_rows * p.R + r, adapter.R - r);
        }
        store_n(ds + r, sum, adapter.R - r);
      }
    }
  }
}

// Slices of dy W for the members whose weight is stored [N, K].
template <class T>
void stream_dx(const Problem& p, int64_t begin, int64_t end) {
  int64_t unit = 0;
  for (int64_t g = 0; g < p.G; ++g) {
    const Member& member = p.member[g];
    for (int64_t slice = 0; member.streamed && slice < slices(member.N); ++slice, ++unit) {
      if (unit < begin || unit >= end) continue;
      const int64_t n = slice * slice_rows(member.N);
      stream_slice(member.streamed + slice * p.M * pitch(p.K), p.M, p.K, static_cast<const T*>(member.dy),
                   member.dy_stride, static_cast<const T*>(member.weight), member.weight_n, n,
                   min(n + slice_rows(member.N), member.N));
    }
  }
}

// tile += mask * scale * (ds A), rows of one row block, columns k0 ... k0 + cols.
template <class F>
void add_adapter(Tile& tile, int64_t rows, int64_t cols, const float* ds, int64_t ld_ds, const F* a, int64_t lda,
                 const Adapter& adapter, const uint32_t* mask) {
  if (!adapter.dropout.active()) {
    outer<false>(tile.at[0], kPitch, rows, cols, ds, 1, ld_ds, a, lda, adapter.R);
    return;
  }
  Tile part;
  for (int64_t i = 0; i < rows; ++i) fill(part.at[i], cols, vf{});
  outer<false>(part.at[0], kPitch, rows, cols, ds, 1, ld_ds, a, lda, adapter.R);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; j += kLanes) {
      const vf kept_part = keep(load(part.at[i] + j), mask[i * kMaskWords + j / 32] >> (j % 32));
      store(tile.at[i] + j, load(tile.at[i] + j) + kept_part * adapter.dropout.scale);
    }
  }
}

// dx[:, k0 ... k0 + kBlock] = sum_l mask_l (ds_l A_l) / (1 - p_l), plus sum_g dy_g W_g where the unit adds the base;
// dA_l = ds_l^T (mask_l x) / (1 - p_l). The mask is drawn once for both. da: room for dA, [R][kPitch].
template <class T, class F>
void x_pass_unit(const Problem& p, int64_t k0, float* da) {
  const int64_t cols = min(kBlock, p.K - k0);
  fill(da, p.R * kPitch, vf{});
  for (int64_t row0 = 0; row0 < p.M; row0 += kRowBlock) {
    const int64_t rows = min(kRowBlock, p.M - row0);
    const T* x = static_cast<const T*>(p.x) + row0 * p.x_stride + k0;
    if (p.x) prefetch_rows(x + rows * p.x_stride, min(kRowBlock, p.M - row0 - rows), cols, p.x_stride);
    Tile tile;
    for (int64_t i = 0; i < rows; ++i) fill(tile.at[i], cols, vf{});
    for (int64_t l = 0; l < p.L; ++l) {
      const Adapter& adapter = p.adapter[l];
      uint32_t mask[kRowBlock][kMaskWords];
      for (int64_t i = 0; adapter.dropout.active() && i < rows; ++i) {
        keep_words(mask[i], adapter.dropout, mask_row(p, row0 + i), k0 / 32, (cols + 31) / 32);
      }
      const float* ds = p.ds + row0 * p.R + adapter.rank0;
      if (p.dx) {
        add_adapter(tile, rows, cols, ds, p.R, static_cast<const F*>(adapter.A) + k0, p.K, adapter, mask[0]);
      }
      if (adapter.dA) {
        float* sums = da + adapter.rank0 * kPitch;
        if (adapter.dropout.active()) {
          outer<true>(sums, kPitch, adapter.R, cols, ds, p.R, 1, x, p.x_stride, rows, mask[0]);
        } else {
          outer<false>(sums, kPitch, adapter.R, cols, ds, p.R, 1, x, p.x_stride, rows);
        }
      }
    }
    if (!p.dx) continue;
    for (int64_t g = 0; p.base && g < p.G; ++g) {
      const Member& member = p.member[g];
      const T* dy = static_cast<const T*>(member.dy) + row0 * member.dy_stride;
      const T* w = static_cast<const T*>(member.weight) + k0 * member.weight_k;
      if (member.streamed) {
        add_slices(tile, rows, cols, member.streamed, slices(member.N), pitch(p.K), k0);
      } else {
        add_product(tile, rows, cols, dy, member.dy_stride, member.N, w, member.weight_k);
      }
    }
    store_tile(tile, rows, cols, static_cast<T*>(p.dx) + row0 * p.K + k0, p.K);
  }
  for (int64_t l = 0; l < p.L; ++l) {
    const Adapter& adapter = p.adapter[l];
    for (int64_t r = 0; adapter.dA && r < adapter.R; ++r) {
      const float* sums = da + (adapter.rank0 + r) * kPitch;
      store_row(static_cast<F*>(adapter.dA) + r * p.K + k0, sums, cols, adapter.dropout.scale);
    }
  }
}

template <class T, class F>
void x_pass(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) x_pass_unit<T, F>(p, unit * kBlock, p.scratch + unit * p.R * kPitch);
}

}  // namespace pk::PK_ISA
