// What the units of prefix_attention share: a tile of query rows, and its logits with a block of keys.
#pragma once

#include <cmath>

#include "common/dropout_mask.h"
#include "common/products.h"
#include "common/vec_math.h"
#include "prefix_attention/prefix_attention.h"

namespace pk::PK_ISA {

using namespace prefix_attention;

// f(a number of the type)
template <class F>
PK_INLINE void with_type(Dtype type, const F& f) {
  if (type == Dtype::kFloat16) return f(fp16{});
  if (type == Dtype::kBFloat16) return f(bf16{});
  f(float{});
}

template <class T>
PK_INLINE const T* row_at(const View& view, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const T*>(view.data) + batch * view.batch + head * view.head + row * view.row;
}

PK_INLINE float number_at(Dtype type, const void* data, int64_t at) {
  float number = 0;
  with_type(type, [&](auto t) {
    float lanes[kLanes];
    store(lanes, load_n(static_cast<const decltype(t)*>(data) + at, 1));
    number = lanes[0];
  });
  return number;
}

PK_INLINE float gate_at(const Gate& gate, int64_t row, int64_t head) {
  return gate.data ? number_at(gate.type, gate.data, row * gate.row + head * gate.head) : 1.f;
}

PK_INLINE vf maximum(vf a, vf b) {
  return a > b ? a : b;
}
PK_INLINE float sum_of_lanes(vf v) {
  float lanes[kLanes], sum = 0;
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}
PK_INLINE float greatest_lane(vf v) {
  float lanes[kLanes], greatest = -INFINITY;
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) greatest = lanes[i] > greatest ? lanes[i] : greatest;
  return greatest;
}

// Where a row of a tile comes from.
struct RowPlace {
  int64_t sequence, batch, head, query;  // query within the batch index
  int64_t at;                            // the last key of its own that it sees, if it is causal
  int64_t row;                           // of [B, Hq, S]
  float gate, key_gate;
};

struct Rows {
  int64_t count;
  RowPlace place[kRows];
};

PK_INLINE RowPlace place_of(const Problem& p, const Plan& plan, int64_t sequence, int64_t query, int64_t head) {
  const Sequence& s = plan.sequences[sequence];
  RowPlace place{sequence, s.batch, head, s.q0 + query, query + s.T - s.S, 0, 1.f, 1.f};
  place.row = row_of(p, s.batch, head, s.q0 + query);
  place.gate = gate_at(p.gate, sequence, head);
  place.key_gate = gate_at(p.key_gate, sequence, head);
  return place;
}

// Rows first ... last of a sequence, queries in order, the heads of a group side by side.
static void rows_of_sequence(const Problem& p, const Plan& plan, Rows& rows, int64_t sequence, int64_t kv_head,
                             int64_t first, int64_t last) {
  const int64_t G = group(p);
  rows.count = last - first;
  for (int64_t i = 0; i < rows.count; ++i) {
    rows.place[i] = place_of(p, plan, sequence, (first + i) / G, kv_head * G + (first + i) % G);
  }
}

// The same of the queries that share a prefix.
static void rows_of_prefix(const Problem& p, const Plan& plan, Rows& rows, int64_t prefix, int64_t kv_head,
                           int64_t first, int64_t last) {
  const int64_t G = group(p);
  const Query* const queries = plan.queries.data() + plan.first[prefix];
  rows.count = last - first;
  for (int64_t i = 0; i < rows.count; ++i) {
    const Query q = queries[(first + i) / G];
    rows.place[i] = place_of(p, plan, q.sequence, q.query, kv_head * G + (first + i) % G);
  }
}

// Columns of the block that a row sees: begin <= j < end, of `keys` in all.
struct Range {
  int64_t begin, end;
};

PK_INLINE int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

PK_INLINE Range own_range(const Problem& p, const RowPlace& place, int64_t T) {
  const int64_t end = p.causal ? clamp(place.at + 1, 0, T) : T;
  return {p.window ? clamp(place.at - p.window + 1, 0, end) : 0, end};
}

PK_INLINE Range prefix_range(const Problem& p, const RowPlace& place, int64_t P) {
  return {p.window && p.window_over_prefix ? clamp(place.at - p.window + 1 + P, 0, P) : 0, P};
}

struct DimTile {
  alignas(64) float at[kRows][kDimPitch];
};
struct KeyTile {
  alignas(64) float at[kRows][kKeyPitch];
};

PK_INLINE void fill(float* row, int64_t count, float value) {
  for (int64_t j = 0; j < count; j += kLanes) store(row + j, vf{} + value);
}

// Rows of q, dO or o in fp32, times a factor.
template <class T>
static void load_rows(DimTile& tile, const View& view, const Rows& rows, int64_t D, float factor) {
  for (int64_t i = 0; i < rows.count; ++i) {
    const RowPlace& at = rows.place[i];
    const T* from = row_at<T>(view, at.batch, at.head, at.query);
    for (int64_t d = 0; d < D; d += kLanes) store(tile.at[i] + d, load_n(from + d, D - d) * factor);
  }
}

// elu(q) + 1, which is e^q where q < 0; and its derivative.
PK_INLINE vf feature(vf q) {
  return q > 0.f ? q + 1.f : exponential(q);
}
PK_INLINE vf feature_slope(vf q) {
  return q > 0.f ? vf{} + 1.f : exponential(q);
}

// out[i][j] = sum_d left[i][d] right[j][d] for `keys` rows of the right. Many rows are worth turning the keys for.
template <class T>
static void products(const Problem& p, KeyTile& out, const DimTile& left, int64_t rows, const T* right, int64_t stride,
                     int64_t keys) {
  for (int64_t i = 0; i < rows; ++i) fill(out.at[i], keys, 0.f);
  if (few(p)) {
    dots<false>(out.at[0], kKeyPitch, rows, keys, left.at[0], kDimPitch, right, stride, p.D, 1.f);
  } else {
    alignas(64) float turned[kMostDim * kKeyPitch];
    transpose(right, stride, keys, p.D, turned, kKeyPitch);
    outer<false, kTallest>(out.at[0], kKeyPitch, rows, keys, left.at[0], 1, kDimPitch, turned, kKeyPitch, p.D);
  }
}

// row[j] += the mask's numbers of columns j0 ... j0 + keys, or -inf where it is false.
static void add_mask(const Mask& mask, const RowPlace& place, float* row, int64_t j0, int64_t keys) {
  const int64_t from = place.batch * mask.batch + place.head * mask.head + place.query * mask.row + j0;
  if (mask.boolean) {
    const auto* seen = static_cast<const uint8_t*>(mask.data) + from;
    for (int64_t j = 0; j < keys; ++j) row[j] = seen[j] ? row[j] : -INFINITY;
    return;
  }
  with_type(mask.type, [&](auto number) {
    const auto* numbers = static_cast<const decltype(number)*>(mask.data) + from;
    for (int64_t j = 0; j < keys; j += kLanes) store(row + j, load(row + j) + load_n(numbers + j, keys - j));
  });
}

// A row of raw products becomes logits; columns that it does not see become `hidden`. slope: derivative of the cap.
static void finish_logits(double softcap, const Mask& mask, const RowPlace& place, Range sees, float* row, float* slope,
                          int64_t j0, int64_t keys, float hidden) {
  if (softcap != 0) {
    const float cap = static_cast<float>(softcap), inverse = static_cast<float>(1 / softcap);
    for (int64_t j = 0; j < keys; j += kLanes) {
      const vf t = hyperbolic_tangent(load(row + j) * inverse);
      store(row + j, t * cap);
      if (slope) store(slope + j, 1.f - t * t);
    }
  }
  if (mask.data) add_mask(mask, place, row, j0, keys);
  const int64_t begin = clamp(sees.begin - j0, 0, keys), end = clamp(sees.end - j0, begin, keys);
  for (int64_t j = 0; j < begin; ++j) row[j] = hidden;
  const int64_t whole = blocks(keys, kLanes) * kLanes;  // what is past the keys is hidden too
  for (int64_t j = end; j < whole; ++j) row[j] = hidden;
}

// row <- drop(row), columns j0 ... j0 + keys, j0 a multiple of 32.
PK_INLINE void drop_row(const Dropout& dropout, float* row, int64_t m, int64_t j0, int64_t keys) {
  if (!dropout.active()) return;
  uint32_t words[kKeys / 32];
  keep_words(words, dropout, m, j0 / 32, blocks(keys, 32));
  for (int64_t j = 0; j < keys; j += kLanes) {
    store(row + j, keep(load(row + j), words[j / 32] >> (j % 32)) * dropout.scale);
  }
}

PK_INLINE bool has_softmax(const Problem& p) {  // the prefix
  return p.composition == Composition::kMerge || p.composition == Composition::kAdd;
}

}  // namespace pk::PK_ISA
