// Backward units of prefix_attention: weights are made again from lse, and with D = rowsum(dO o)
//   dl = w (drop(dO V^T) - D) cap',   dq = scale dl K,   dK = scale dl^T q,   dV = drop(w)^T dO
// for the prefix and for own keys; reference.py has what differs between the compositions. A unit owns what it sums
// into: a prefix for all of its rows, in order, or a sequence.
#pragma once

#include "prefix_attention/forward.h"

namespace pk::PK_ISA {

// A tile of rows with all that its gradients are made of.
struct BackwardRows {
  Rows rows;
  DimTile q, d, dq;  // the keys' factor in a product, dO, the sum of dl K
  float total[kRows], share[kRows], dc[kRows];
};

template <class T>
static void load_backward_rows(const Problem& p, BackwardRows& tile) {
  load_rows<T>(tile.d, p.dout, tile.rows, p.D, 1.f);
  DimTile out;
  load_rows<T>(out, p.saved_out, tile.rows, p.D, 1.f);
  for (int64_t i = 0; i < tile.rows.count; ++i) {
    vf sum{};
    for (int64_t d = 0; d < p.D; d += kLanes) sum += load(out.at[i] + d) * load(tile.d.at[i] + d);
    tile.total[i] = sum_of_lanes(sum);
    tile.share[i] = tile.dc[i] = 0;
    fill(tile.dq.at[i], p.D, 0.f);
  }
}

// Blocks of a tile: w, later dl, and the gradients of w.
struct Block {
  KeyTile weights, dropped, gradients;
  float slope[kKeyPitch], raw[kKeyPitch];
};

// row of logits -> e^(l - lse); 0 where nothing is seen.
PK_INLINE void normalise(float* row, float lse, int64_t keys) {
  const float below = lse == -INFINITY ? 0.f : lse;
  for (int64_t j = 0; j < keys; j += kLanes) {
    const vf l = load(row + j);
    store(row + j, exponential(l - below));
  }
}

PK_INLINE void copy(float* to, const float* from, int64_t count) {
  for (int64_t j = 0; j < count; j += kLanes) store(to + j, load(from + j));
}

// sums[j][d] += sum_i left[i][j] right[i][d], a gradient of keys or values.
PK_INLINE void add_to_keys(float* sums, int64_t keys, const KeyTile& left, const DimTile& right, int64_t rows,
                           int64_t D) {
  constexpr int64_t kPiece = 16;  // keys of a piece, whose sums lie in a buffer with room for whole vectors
  for (int64_t j = 0; j < keys; j += kPiece) {
    const int64_t height = min(kPiece, keys - j);
    float piece[kPiece][kDimPitch];
    for (int64_t a = 0; a < height; ++a) {
      for (int64_t d = 0; d < D; d += kLanes) store(piece[a] + d, load_n(sums + (j + a) * D + d, D - d));
    }
    outer<false, kTallest>(piece[0], kDimPitch, height, D, left.at[0] + j, kKeyPitch, 1, right.at[0], kDimPitch, rows);
    for (int64_t a = 0; a < height; ++a) {
      for (int64_t d = 0; d < D; d += kLanes) store_n(sums + (j + a) * D + d, load(piece[a] + d), D - d);
    }
  }
}

// A row of a gradient in fp32 -> T.
template <class T>
PK_INLINE void store_row(T* to, const float* from, int64_t D) {
  for (int64_t d = 0; d < D; d += kLanes) store_n(to + d, load_n(from + d, D - d), D - d);
}

// -- the prefix -------------------------------------------------------------------------------------------------------

// Weights of a row (in `weights`), what multiplies P_v (`dropped`), drop(dO P_v^T) (`gradients`), slope and raw logits.
static void prefix_row(const Problem& p, BackwardRows& tile, Block& b, int64_t i, int64_t j0, int64_t keys, int64_t P) {
  const RowPlace& place = tile.rows.place[i];
  float* const w = b.weights.at[i];
  const Range sees = prefix_range(p, place, P);
  copy(b.raw, w, keys);
  fill(b.slope, keys, 1.f);
  for (int64_t j = 0; j < keys; j += kLanes) store(w + j, load(w + j) * place.key_gate);
  if (has_softmax(p)) {
    const bool merges = p.composition == Composition::kMerge;
    finish_logits(p.softcap, p.bias, place, sees, w, b.slope, j0, keys, -INFINITY);
    normalise(w, static_cast<const float*>(merges ? p.lse : p.prefix_lse)[place.row], keys);
  } else {
    finish_logits(0, Mask{}, place, sees, b.slope, nullptr, j0, keys, 0.f);
    finish_logits(0, Mask{}, place, sees, w, nullptr, j0, keys, 0.f);
    for (int64_t j = 0; j < keys && p.composition == Composition::kRelu; j += kLanes) {
      const vf l = load(w + j), slope = load(b.slope + j);
      store(w + j, l < 0.f ? vf{} : l);
      store(b.slope + j, l > 0.f ? slope : l == l ? vf{} : l);
    }
  }
  copy(b.dropped.at[i], w, keys);
  drop_row(p.prefix_dropout, b.dropped.at[i], place.row, j0, keys);
  drop_row(p.prefix_dropout, b.gradients.at[i], place.row, j0, keys);
  for (int64_t j = 0; j < keys; j += kLanes) store(b.dropped.at[i] + j, load(b.dropped.at[i] + j) * place.gate);
}

PK_INLINE float row_share(const Block& b, int64_t i, int64_t keys) {
  vf sum{};
  for (int64_t j = 0; j < keys; j += kLanes) {
    const vf w = load(b.weights.at[i] + j), product = w * load(b.gradients.at[i] + j);
    sum += j + kLanes <= keys ? product : keep(product, (1u << (keys - j)) - 1);
  }
  return sum_of_lanes(sum);
}

// weights <- c dl of the row; adds to dc.
static void prefix_logit_gradients(const Problem& p, BackwardRows& tile, Block& b, int64_t i, int64_t keys) {
  const RowPlace& place = tile.rows.place[i];
  const bool merges = p.composition == Composition::kMerge;
  const float less = merges ? tile.total[i] : has_softmax(p) ? place.gate * tile.share[i] : 0.f;
  vf dc{};
  for (int64_t j = 0; j < keys; j += kLanes) {
    vf grad = (load(b.gradients.at[i] + j) * place.gate - less) * load(b.slope + j);
    if (has_softmax(p)) grad *= load(b.weights.at[i] + j);
    const vf part = grad * load(b.raw + j);
    dc += j + kLanes <= keys ? part : keep(part, (1u << (keys - j)) - 1);
    store(b.weights.at[i] + j, grad * place.key_gate);
  }
  tile.dc[i] += sum_of_lanes(dc);
}

template <class T>
static void prefix_blocks(const Problem& p, BackwardRows& tile, const Unit& unit, int64_t P, float* dpk, float* dpv) {
  const bool adds = p.composition == Composition::kAdd;
  const int64_t count = tile.rows.count;
  for (int pass = adds ? 0 : 1; pass < 2; ++pass) {  // the share of a softmax of its own comes before its gradients
    for (int64_t j0 = 0; j0 < P; j0 += kKeys) {
      const int64_t keys = min(kKeys, P - j0);
      const T* const pk = row_at<T>(p.pk, unit.index, unit.head, j0);
      Block b;
      products(p, b.weights, tile.q, count, pk, p.pk.row, keys);
      products(p, b.gradients, tile.d, count, row_at<T>(p.pv, unit.index, unit.head, j0), p.pv.row, keys);
      for (int64_t i = 0; i < count; ++i) {
        prefix_row(p, tile, b, i, j0, keys, P);
        if (pass == 0 || !adds) tile.share[i] += row_share(b, i, keys);
        if (pass == 1) prefix_logit_gradients(p, tile, b, i, keys);
      }
      if (pass == 0) continue;
      outer<false, kTallest>(tile.dq.at[0], kDimPitch, count, p.D, b.weights.at[0], 1, kKeyPitch, pk, p.pk.row, keys);
      if (dpk) add_to_keys(dpk + j0 * p.D, keys, b.weights, tile.q, count, p.D);
      if (dpv) add_to_keys(dpv + j0 * p.D, keys, b.dropped, tile.d, count, p.D);
    }
  }
}

template <class T>
static void finish_prefix_rows(const Problem& p, const BackwardRows& tile) {
  const bool linear = p.composition == Composition::kLinear;
  for (int64_t i = 0; i < tile.rows.count; ++i) {
    const RowPlace& place = tile.rows.place[i];
    const T* const q = row_at<T>(p.q, place.batch, place.head, place.query);
    p.share[place.row] = tile.share[i];
    p.dc[place.row] = tile.dc[i];
    for (int64_t d = 0; d < p.D; d += kLanes) {
      const vf sum = load(tile.dq.at[i] + d);
      const vf factor = linear ? feature_slope(load_n(q + d, p.D - d)) : vf{} + static_cast<float>(p.scale);
      store_n(p.state + place.row * p.D + d, sum * factor, p.D - d);
    }
  }
}

// One prefix, one head of keys: unit.index and unit.head.
template <class T>
static void prefix_backward_unit(const Problem& p, const Plan& plan, const Unit& unit) {
  const int64_t n = unit.index, at = (n * p.Hkv + unit.head) * p.P * p.D, all = p.prefixes * p.Hkv * p.P * p.D;
  const int64_t flat = (plan.first[n + 1] - plan.first[n]) * group(p), size = p.P * p.D;
  float* const dpk = p.dpk ? p.keys + at : nullptr;
  float* const dpv = p.dpv ? p.keys + all + at : nullptr;
  for (float* sums : {dpk, dpv}) {
    if (sums) __builtin_memset(sums, 0, size * sizeof(float));
  }
  for (int64_t first = 0; first < flat; first += kRows) {
    BackwardRows tile;
    rows_of_prefix(p, plan, tile.rows, n, unit.head, first, min(first + kRows, flat));
    load_backward_rows<T>(p, tile);
    load_prefix_queries<T>(p, tile.rows, tile.q);
    prefix_blocks<T>(p, tile, unit, plan.sequences[tile.rows.place[0].sequence].P, dpk, dpv);
    finish_prefix_rows<T>(p, tile);
  }
  for (int64_t j = 0; j < p.P; ++j) {
    if (dpk) store_row(static_cast<T*>(p.dpk) + at + j * p.D, dpk + j * p.D, p.D);
    if (dpv) store_row(static_cast<T*>(p.dpv) + at + j * p.D, dpv + j * p.D, p.D);
  }
}

static void prefix_backward(const Problem& p, const Plan& plan, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto number) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const Unit which{static_cast<int32_t>(unit / p.Hkv), static_cast<int32_t>(unit % p.Hkv), 0, 0};
      prefix_backward_unit<decltype(number)>(p, plan, which);
    }
  });
}

// -- own keys ---------------------------------------------------------------------------------------------------------

// weights <- dl, dropped <- drop(w), of the rows and a block of own keys.
static void own_logit_gradients(const Problem& p, BackwardRows& tile, Block& b, int64_t j0, int64_t keys, int64_t T) {
  for (int64_t i = 0; i < tile.rows.count; ++i) {
    const RowPlace& place = tile.rows.place[i];
    float* const w = b.weights.at[i];
    fill(b.slope, keys, 1.f);
    finish_logits(p.softcap, p.mask, place, own_range(p, place, T), w, b.slope, j0, keys, -INFINITY);
    normalise(w, static_cast<const float*>(p.lse)[place.row], keys);
    copy(b.dropped.at[i], w, keys);
    drop_row(p.own_dropout, b.dropped.at[i], place.row, j0, keys);
    drop_row(p.own_dropout, b.gradients.at[i], place.row, j0, keys);
    for (int64_t j = 0; j < keys; j += kLanes) {
      const vf weight = load(w + j), grad = weight * (load(b.gradients.at[i] + j) - tile.total[i]) * load(b.slope + j);
      store(w + j, weight == 0.f ? vf{} : grad);
    }
  }
}

template <class T>
static void store_dq(const Problem& p, const BackwardRows& tile, bool has_prefix) {
  for (int64_t i = 0; i < tile.rows.count; ++i) {
    const RowPlace& place = tile.rows.place[i];
    T* const dq = static_cast<T*>(p.dq) + ((place.batch * p.S + place.query) * p.Hq + place.head) * p.D;
    for (int64_t d = 0; d < p.D; d += kLanes) {
      vf grad = load(tile.dq.at[i] + d) * static_cast<float>(p.scale);
      if (has_prefix) grad += load_n(p.state + place.row * p.D + d, p.D - d);
      store_n(dq + d, grad, p.D - d);
    }
  }
}

// One sequence, one head of keys.
template <class T>
static void own_backward_unit(const Problem& p, const Plan& plan, int64_t sequence, int64_t head) {
  const Sequence& s = plan.sequences[sequence];
  const int64_t flat = s.S * group(p), size = s.T * p.D, all = p.B * p.T * p.Hkv * p.D;
  const int64_t at = (s.batch * p.T * p.Hkv + s.k0 * p.Hkv + head * s.T) * p.D;  // room for this unit alone
  float *const dk = p.dk ? p.keys + at : nullptr, *const dv = p.dv ? p.keys + all + at : nullptr;
  for (float* sums : {dk, dv}) {
    if (sums) __builtin_memset(sums, 0, size * sizeof(float));
  }
  for (int64_t first = 0; first < flat; first += kRows) {
    BackwardRows tile;
    rows_of_sequence(p, plan, tile.rows, sequence, head, first, min(first + kRows, flat));
    load_backward_rows<T>(p, tile);
    load_rows<T>(tile.q, p.q, tile.rows, p.D, static_cast<float>(p.scale));
    const int64_t count = tile.rows.count;
    for (int64_t i = 0; i < count && s.P > 0 && p.composition != Composition::kMerge; ++i) {
      tile.total[i] -= tile.rows.place[i].gate * p.share[tile.rows.place[i].row];
    }
    const Range sees = range_of_tile(p, tile.rows, s.T);
    for (int64_t j0 = sees.begin; j0 < sees.end; j0 += kKeys) {
      const int64_t keys = min(kKeys, sees.end - j0);
      const T* const k = row_at<T>(p.k, s.batch, head, s.k0 + j0);
      Block b;
      products(p, b.weights, tile.q, count, k, p.k.row, keys);
      products(p, b.gradients, tile.d, count, row_at<T>(p.v, s.batch, head, s.k0 + j0), p.v.row, keys);
      own_logit_gradients(p, tile, b, j0, keys, s.T);
      if (p.dq) {
        outer<false, kTallest>(tile.dq.at[0], kDimPitch, count, p.D, b.weights.at[0], 1, kKeyPitch, k, p.k.row, keys);
      }
      if (dk) add_to_keys(dk + j0 * p.D, keys, b.weights, tile.q, count, p.D);
      if (dv) add_to_keys(dv + j0 * p.D, keys, b.dropped, tile.d, count, p.D);
    }
    if (p.dq) store_dq<T>(p, tile, s.P > 0);
  }
  for (int64_t j = 0; j < s.T; ++j) {
    const int64_t to = ((s.batch * p.T + s.k0 + j) * p.Hkv + head) * p.D;
    if (dk) store_row(static_cast<T*>(p.dk) + to, dk + j * p.D, p.D);
    if (dv) store_row(static_cast<T*>(p.dv) + to, dv + j * p.D, p.D);
  }
}

static void own_backward(const Problem& p, const Plan& plan, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto number) {
    for (int64_t unit = begin; unit < end; ++unit) {
      own_backward_unit<decltype(number)>(p, plan, unit / p.Hkv, unit % p.Hkv);
    }
  });
}

// -- gates ------------------------------------------------------------------------------------------------------------

// A gate's gradient: the parts of the rows and heads that each of its numbers is for, in order.
static void gather_gate(const Problem& p, const Plan& plan, const Gate& gate, const float* parts, void* out) {
  const int64_t heads = gate.head ? p.Hq : 1, numbers = (gate.row ? p.rows : 1) * heads;
  for (int64_t n = 0; n < numbers; ++n) {
    const int64_t row = n / heads, head = n % heads;
    float sum = 0;
    for (int64_t r = gate.row ? row : 0; r < (gate.row ? row + 1 : p.rows); ++r) {
      const Sequence& s = plan.sequences[r];
      for (int64_t h = gate.head ? head : 0; s.P > 0 && h < (gate.head ? head + 1 : p.Hq); ++h) {
        for (int64_t i = 0; i < s.S; ++i) sum += parts[row_of(p, s.batch, h, s.q0 + i)];
      }
    }
    with_type(gate.type, [&](auto number) { store_n(static_cast<decltype(number)*>(out) + n, vf{} + sum, 1); });
  }
}

static void gather(const Problem& p, const Plan& plan, int64_t, int64_t) {
  if (p.dgate) gather_gate(p, plan, p.gate, p.share, p.dgate);
  if (p.dkey_gate) gather_gate(p, plan, p.key_gate, p.dc, p.dkey_gate);
}

}  // namespace pk::PK_ISA
