// Forward units of prefix_attention. A softmax is accumulated block by block: the greatest logit so far, the sum of the
// exponentials below it, and the values weighted by them.
#pragma once

#include "prefix_attention/tiles.h"

namespace pk::PK_ISA {

struct Softmax {
  float high[kRows], sum[kRows];
  DimTile values;
};

static void start(Softmax& softmax, int64_t rows, int64_t D) {
  for (int64_t i = 0; i < rows; ++i) {
    softmax.high[i] = -INFINITY;
    softmax.sum[i] = 0;
    fill(softmax.values.at[i], D, 0.f);
  }
}

// A row of logits becomes exponentials below the greatest logit so far; what is there already is scaled to it.
static void accumulate_row(Softmax& softmax, int64_t i, float* row, int64_t keys, int64_t D) {
  vf greatest = vf{} - INFINITY;
  for (int64_t j = 0; j < keys; j += kLanes) greatest = maximum(load(row + j), greatest);
  const float before = softmax.high[i], found = greatest_lane(greatest), high = found > before ? found : before;
  const float below = high == -INFINITY ? 0.f : high;  // nothing is seen yet: exponentials of -inf
  vf sum{};
  for (int64_t j = 0; j < keys; j += kLanes) {
    const vf power = exponential(load(row + j) - below);
    sum += power;
    store(row + j, power);
  }
  if (high != before) {
    float lanes[kLanes];
    store(lanes, exponential(vf{} + (before - below)));
    for (int64_t d = 0; d < D; d += kLanes) store(softmax.values.at[i] + d, load(softmax.values.at[i] + d) * lanes[0]);
    softmax.sum[i] *= lanes[0];
    softmax.high[i] = high;
  }
  softmax.sum[i] += sum_of_lanes(sum);
}

// What the values are multiplied by. Where the sum is NaN they are too, but where all that was NaN was dropped.
PK_INLINE float reciprocal(float sum) {
  return sum == 0 ? 0.f : sum == sum ? 1 / sum : 1.f;
}

// -- the prefix -------------------------------------------------------------------------------------------------------

// What a block of the prefix, positions j0 ... j0 + keys, adds to the rows.
template <class T>
static void prefix_block(const Problem& p, const Rows& rows, const DimTile& q, Softmax& softmax, const T* pk,
                         const T* pv, int64_t j0, int64_t keys, int64_t P) {
  KeyTile logits;
  products(p, logits, q, rows.count, pk, p.pk.row, keys);
  for (int64_t i = 0; i < rows.count; ++i) {
    const RowPlace& place = rows.place[i];
    float* const row = logits.at[i];
    for (int64_t j = 0; j < keys; j += kLanes) store(row + j, load(row + j) * place.key_gate);
    const Range sees = prefix_range(p, place, P);
    if (has_softmax(p)) {
      finish_logits(p.softcap, p.bias, place, sees, row, nullptr, j0, keys, -INFINITY);
      accumulate_row(softmax, i, row, keys, p.D);
    } else {
      finish_logits(0, Mask{}, place, sees, row, nullptr, j0, keys, 0.f);
      for (int64_t j = 0; j < keys && p.composition == Composition::kRelu; j += kLanes) {
        const vf l = load(row + j);
        store(row + j, l < 0.f ? vf{} : l);
      }
    }
    drop_row(p.prefix_dropout, row, place.row, j0, keys);
    for (int64_t j = 0; j < keys; j += kLanes) store(row + j, load(row + j) * place.gate);
  }
  outer<false, kTallest>(softmax.values.at[0], kDimPitch, rows.count, p.D, logits.at[0], 1, kKeyPitch, pv, p.pv.row,
                         keys);
}

// The queries' side of the products with a prefix.
template <class T>
static void load_prefix_queries(const Problem& p, const Rows& rows, DimTile& q) {
  const bool linear = p.composition == Composition::kLinear;
  load_rows<T>(q, p.q, rows, p.D, linear ? 1.f : static_cast<float>(p.scale));
  for (int64_t i = 0; linear && i < rows.count; ++i) {
    for (int64_t d = 0; d < p.D; d += kLanes) store(q.at[i] + d, feature(load(q.at[i] + d)));
  }
}

template <class T>
static void prefix_unit(const Problem& p, const Plan& plan, const Unit& unit) {
  Rows rows;
  rows_of_prefix(p, plan, rows, unit.index, unit.head, unit.begin, unit.end);
  const int64_t P = plan.sequences[rows.place[0].sequence].P;
  DimTile q;
  Softmax softmax;
  load_prefix_queries<T>(p, rows, q);
  start(softmax, rows.count, p.D);
  for (int64_t j0 = 0; j0 < P; j0 += kKeys) {
    prefix_block(p, rows, q, softmax, row_at<T>(p.pk, unit.index, unit.head, j0),
                 row_at<T>(p.pv, unit.index, unit.head, j0), j0, min(kKeys, P - j0), P);
  }
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t row = rows.place[i].row;
    float factor = 1.f;
    if (p.composition == Composition::kAdd) {
      factor = reciprocal(softmax.sum[i]);
      static_cast<float*>(p.prefix_lse)[row] = softmax.high[i] + __builtin_logf(softmax.sum[i]);
    }
    p.high[row] = softmax.high[i];
    p.sum[row] = softmax.sum[i];
    for (int64_t d = 0; d < p.D; d += kLanes) {
      store_n(p.state + row * p.D + d, load(softmax.values.at[i] + d) * factor, p.D - d);
    }
  }
}

static void prefix(const Problem& p, const Plan& plan, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto number) {
    for (int64_t unit = begin; unit < end; ++unit) prefix_unit<decltype(number)>(p, plan, plan.prefix_units[unit]);
  });
}

// -- own keys ---------------------------------------------------------------------------------------------------------

// What the own keys j0 ... j0 + keys add to the rows.
template <class T>
static void own_block(const Problem& p, const Rows& rows, const DimTile& q, Softmax& softmax, const T* k, const T* v,
                      int64_t j0, int64_t keys, int64_t T_own) {
  KeyTile logits;
  products(p, logits, q, rows.count, k, p.k.row, keys);
  for (int64_t i = 0; i < rows.count; ++i) {
    const RowPlace& place = rows.place[i];
    finish_logits(p.softcap, p.mask, place, own_range(p, place, T_own), logits.at[i], nullptr, j0, keys, -INFINITY);
    accumulate_row(softmax, i, logits.at[i], keys, p.D);
    drop_row(p.own_dropout, logits.at[i], place.row, j0, keys);
  }
  outer<false, kTallest>(softmax.values.at[0], kDimPitch, rows.count, p.D, logits.at[0], 1, kKeyPitch, v, p.v.row,
                         keys);
}

// The block of kKeys columns where a tile's rows begin to see keys, and the last key that one sees.
static Range range_of_tile(const Problem& p, const Rows& rows, int64_t T_own) {
  Range all{T_own, 0};
  for (int64_t i = 0; i < rows.count; ++i) {
    const Range sees = own_range(p, rows.place[i], T_own);
    if (sees.begin < all.begin) all.begin = sees.begin;
    if (sees.end > all.end) all.end = sees.end;
  }
  all.begin = all.begin / kKeys * kKeys;
  return all;
}

// The state that the prefix left, where it shares the softmax.
static void resume(const Problem& p, const Rows& rows, Softmax& softmax) {
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t row = rows.place[i].row;
    softmax.high[i] = p.high[row];
    softmax.sum[i] = p.sum[row];
    for (int64_t d = 0; d < p.D; d += kLanes) {
      store(softmax.values.at[i] + d, load_n(p.state + row * p.D + d, p.D - d));
    }
  }
}

template <class T>
static void store_out(const Problem& p, const Rows& rows, const Softmax& softmax, bool adds) {
  for (int64_t i = 0; i < rows.count; ++i) {
    const RowPlace& place = rows.place[i];
    const float sum = softmax.sum[i], factor = reciprocal(sum);
    T* const out = static_cast<T*>(p.out) + ((place.batch * p.S + place.query) * p.Hq + place.head) * p.D;
    const float* const more = p.state + place.row * p.D;
    for (int64_t d = 0; d < p.D; d += kLanes) {
      vf o = load(softmax.values.at[i] + d) * factor;
      if (adds) o += load_n(more + d, p.D - d);
      store_n(out + d, o, p.D - d);
    }
    static_cast<float*>(p.lse)[place.row] = softmax.high[i] + __builtin_logf(sum);
    if (p.composition == Composition::kAdd && !adds) static_cast<float*>(p.prefix_lse)[place.row] = -INFINITY;
  }
}

template <class T>
static void own_unit(const Problem& p, const Plan& plan, const Unit& unit) {
  const Sequence& s = plan.sequences[unit.index];
  const bool has_prefix = s.P > 0, merges = p.composition == Composition::kMerge;
  Rows rows;
  rows_of_sequence(p, plan, rows, unit.index, unit.head, unit.begin, unit.end);
  DimTile q;
  Softmax softmax;
  load_rows<T>(q, p.q, rows, p.D, static_cast<float>(p.scale));
  if (has_prefix && merges) {
    resume(p, rows, softmax);
  } else {
    start(softmax, rows.count, p.D);
  }
  const Range sees = range_of_tile(p, rows, s.T);
  for (int64_t j0 = sees.begin; j0 < sees.end; j0 += kKeys) {
    own_block(p, rows, q, softmax, row_at<T>(p.k, s.batch, unit.head, s.k0 + j0),
              row_at<T>(p.v, s.batch, unit.head, s.k0 + j0), j0, min(kKeys, sees.end - j0), s.T);
  }
  store_out<T>(p, rows, softmax, has_prefix && !merges);
}

static void own(const Problem& p, const Plan& plan, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto number) {
    for (int64_t unit = begin; unit < end; ++unit) own_unit<decltype(number)>(p, plan, plan.units[unit]);
  });
}

}  // namespace pk::PK_ISA
