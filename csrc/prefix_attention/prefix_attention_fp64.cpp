// prefix_attention in fp64: plain loops that read like the formulas. For gradient checks; nobody waits for them.
#include <cmath>

#include "prefix_attention/prefix_attention.h"

namespace pk::prefix_attention {
namespace {

using Numbers = std::vector<double>;

double entry(const void* data, int64_t at) {
  return static_cast<const double*>(data)[at];
}
const double* row_at(const View& view, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const double*>(view.data) + batch * view.batch + head * view.head + row * view.row;
}
double gate_at(const Gate& gate, int64_t row, int64_t head) {
  return gate.data ? entry(gate.data, row * gate.row + head * gate.head) : 1;
}
double dot(const double* a, const double* b, int64_t D) {
  double sum = 0;
  for (int64_t d = 0; d < D; ++d) sum += a[d] * b[d];
  return sum;
}
void add(double* to, double factor, const double* from, int64_t D) {
  for (int64_t d = 0; d < D; ++d) to[d] += factor * from[d];
}
double dropped(const Dropout& dropout, int64_t m, int64_t j, double value) {  // not a product: a dropped NaN is gone
  if (!dropout.active()) return value;
  const bool keeps = kept(dropout, static_cast<uint32_t>(m), static_cast<uint32_t>(j));
  return keeps ? value * (static_cast<double>(kKeepAll) / dropout.threshold) : 0;
}

// One query of a head: its logits and weights with own keys and with the prefix.
struct Row {
  int64_t sequence, batch, head, kv_head, query, m;
  double g, c;
  Numbers q, own, prefix, own_slope, prefix_slope, raw;  // q: the prefix's side, scaled or as a feature
  double lse, prefix_lse;
};

// Logits -> weights; returns the log-sum-exp that they were divided by.
double log_sum_exp(const Numbers& a, const Numbers& b) {
  double high = -INFINITY, sum = 0;
  for (const Numbers* logits : {&a, &b}) {
    for (double l : *logits) high = l > high || std::isnan(l) ? l : high;
  }
  if (high == -INFINITY) return high;
  for (const Numbers* logits : {&a, &b}) {
    for (double l : *logits) sum += std::exp(l - high);
  }
  return high + std::log(sum);
}
void normalise(Numbers& logits, double lse) {
  for (double& l : logits) l = lse == -INFINITY ? 0 : std::exp(l - lse);
}

double capped(const Problem& p, double l, double& slope) {
  slope = 1;
  if (p.softcap == 0) return l;
  const double t = std::tanh(l / p.softcap);
  slope = 1 - t * t;
  return p.softcap * t;
}

double masked(const Mask& mask, const Row& row, int64_t j, double l) {
  if (!mask.data) return l;
  const int64_t at = row.batch * mask.batch + row.head * mask.head + row.query * mask.row + j;
  if (mask.boolean) return static_cast<const uint8_t*>(mask.data)[at] ? l : -INFINITY;
  return l + entry(mask.data, at);
}

void prefix_weights(const Problem& p, const Sequence& s, int64_t at, Row& row) {
  for (int64_t j = 0; j < s.P; ++j) {
    const double raw = dot(row.q.data(), row_at(p.pk, s.prefix, row.kv_head, j), p.D);
    const bool hidden = p.window && p.window_over_prefix && j - s.P <= at - p.window;
    double slope = 1, l = row.c * raw;
    if (p.composition == Composition::kMerge || p.composition == Composition::kAdd) {
      l = masked(p.bias, row, j, capped(p, l, slope));
      if (hidden) l = -INFINITY;
    } else {
      slope = hidden ? 0 : p.composition == Composition::kLinear ? 1 : std::isnan(l) ? l : l > 0;
      l = hidden || (p.composition == Composition::kRelu && l < 0) ? 0 : l;
    }
    row.raw.push_back(raw);
    row.prefix.push_back(l);
    row.prefix_slope.push_back(slope);
  }
}

Row make_row(const Problem& p, const Plan& plan, int64_t r, int64_t head, int64_t i) {
  const Sequence& s = plan.sequences[r];
  const int64_t query = s.q0 + i, at = i + s.T - s.S, kv_head = head / group(p);
  Row row{r,
          s.batch,
          head,
          kv_head,
          query,
          row_of(p, s.batch, head, query),
          gate_at(p.gate, r, head),
          gate_at(p.key_gate, r, head),
          {},
          {},
          {},
          {},
          {},
          {},
          0,
          -INFINITY};
  const double* const q = row_at(p.q, s.batch, head, query);
  for (int64_t d = 0; d < p.D; ++d) {
    const double feature = q[d] > 0 ? q[d] + 1 : std::exp(q[d]);
    row.q.push_back(p.composition == Composition::kLinear ? feature : p.scale * q[d]);
  }
  prefix_weights(p, s, at, row);
  for (int64_t j = 0; j < s.T; ++j) {
    double slope, l = p.scale * dot(q, row_at(p.k, s.batch, kv_head, s.k0 + j), p.D);
    l = masked(p.mask, row, j, capped(p, l, slope));
    if ((p.causal && j > at) || (p.window && j <= at - p.window)) l = -INFINITY;
    row.own.push_back(l);
    row.own_slope.push_back(slope);
  }
  const bool merges = p.composition == Composition::kMerge;
  row.lse = log_sum_exp(row.own, merges ? row.prefix : Numbers{});
  normalise(row.own, row.lse);
  if (p.composition == Composition::kAdd) row.prefix_lse = log_sum_exp(row.prefix, {});
  if (merges || p.composition == Composition::kAdd) normalise(row.prefix, merges ? row.lse : row.prefix_lse);
  return row;
}

template <class F>
void each_row(const Problem& p, const Plan& plan, const F& f) {
  for (int64_t r = 0; r < p.rows; ++r) {
    for (int64_t head = 0; head < p.Hq; ++head) {
      for (int64_t i = 0; i < plan.sequences[r].S; ++i) f(plan.sequences[r], make_row(p, plan, r, head, i));
    }
  }
}

// Gradients of one row, added to where they belong.
struct Gradients {
  Numbers dq, dk, dv, dpk, dpv, dgate, dkey_gate;
};

void own_gradients(const Problem& p, const Sequence& s, const Row& row, const double* d, double less, double* dq,
                   Gradients& grads) {
  for (int64_t j = 0; j < s.T; ++j) {
    const int64_t to = ((s.batch * p.T + s.k0 + j) * p.Hkv + row.kv_head) * p.D;
    const double* const k = row_at(p.k, s.batch, row.kv_head, s.k0 + j);
    const double dw = dropped(p.own_dropout, row.m, j, dot(d, row_at(p.v, s.batch, row.kv_head, s.k0 + j), p.D));
    const double dl = row.own[j] == 0 ? 0 : row.own[j] * (dw - less) * row.own_slope[j] * p.scale;
    add(dq, dl, k, p.D);
    add(&grads.dk[to], dl, row_at(p.q, s.batch, row.head, row.query), p.D);
    add(&grads.dv[to], dropped(p.own_dropout, row.m, j, row.own[j]), d, p.D);
  }
}

void row_gradients(const Problem& p, const Sequence& s, const Row& row, Gradients& grads) {
  const double* const d = row_at(p.dout, s.batch, row.head, row.query);
  const double* const q = row_at(p.q, s.batch, row.head, row.query);
  double* const dq = &grads.dq[((s.batch * p.S + row.query) * p.Hq + row.head) * p.D];
  const double total = dot(d, row_at(p.saved_out, s.batch, row.head, row.query), p.D);
  const bool merges = p.composition == Composition::kMerge, softmax = merges || p.composition == Composition::kAdd;
  Numbers dw;
  double share = 0, dc = 0;
  for (int64_t j = 0; j < s.P; ++j) {
    dw.push_back(dropped(p.prefix_dropout, row.m, j, dot(d, row_at(p.pv, s.prefix, row.kv_head, j), p.D)));
    share += row.prefix[j] * dw[j];
  }
  for (int64_t j = 0; j < s.P; ++j) {
    const int64_t to = ((s.prefix * p.Hkv + row.kv_head) * p.P + j) * p.D;
    double dl = (row.g * dw[j] - (merges ? total : softmax ? row.g * share : 0)) * row.prefix_slope[j];
    if (softmax) dl *= row.prefix[j];
    dc += dl * row.raw[j];
    const double* const pk = row_at(p.pk, s.prefix, row.kv_head, j);
    for (int64_t i = 0; i < p.D; ++i) {
      const double slope = p.composition != Composition::kLinear ? p.scale : q[i] > 0 ? 1 : std::exp(q[i]);
      dq[i] += row.c * dl * pk[i] * slope;
    }
    add(&grads.dpk[to], row.c * dl, row.q.data(), p.D);
    add(&grads.dpv[to], row.g * dropped(p.prefix_dropout, row.m, j, row.prefix[j]), d, p.D);
  }
  own_gradients(p, s, row, d, merges ? total : total - row.g * share, dq, grads);
  if (p.dgate) grads.dgate[row.sequence * p.gate.row + row.head * p.gate.head] += share;
  if (p.dkey_gate) grads.dkey_gate[row.sequence * p.key_gate.row + row.head * p.key_gate.head] += dc;
}

void copy(void* to, const Numbers& from) {
  for (size_t i = 0; to && i < from.size(); ++i) static_cast<double*>(to)[i] = from[i];
}

// Numbers of a contiguous gate.
int64_t size_of(const Problem& p, const Gate& gate) {
  return (gate.row ? p.rows : 1) * (gate.head ? p.Hq : 1);
}

}  // namespace

void forward_double(const Problem& p, const Plan& plan) {
  each_row(p, plan, [&](const Sequence& s, const Row& row) {
    double* const out = static_cast<double*>(p.out) + ((s.batch * p.S + row.query) * p.Hq + row.head) * p.D;
    for (int64_t d = 0; d < p.D; ++d) out[d] = 0;
    for (int64_t j = 0; j < s.P; ++j) {
      const double w = row.g * dropped(p.prefix_dropout, row.m, j, row.prefix[j]);
      add(out, w, row_at(p.pv, s.prefix, row.kv_head, j), p.D);
    }
    for (int64_t j = 0; j < s.T; ++j) {
      const double w = dropped(p.own_dropout, row.m, j, row.own[j]);
      add(out, w, row_at(p.v, s.batch, row.kv_head, s.k0 + j), p.D);
    }
    static_cast<double*>(p.lse)[row.m] = row.lse;
    if (p.composition == Composition::kAdd) static_cast<double*>(p.prefix_lse)[row.m] = row.prefix_lse;
  });
}

void backward_double(const Problem& p, const Plan& plan) {
  const int64_t own = p.B * p.T * p.Hkv * p.D, prefix = p.prefixes * p.Hkv * p.P * p.D;
  Gradients grads{Numbers(p.B * p.S * p.Hq * p.D),
                  Numbers(own),
                  Numbers(own),
                  Numbers(prefix),
                  Numbers(prefix),
                  Numbers(size_of(p, p.gate)),
                  Numbers(size_of(p, p.key_gate))};
  each_row(p, plan, [&](const Sequence& s, const Row& row) { row_gradients(p, s, row, grads); });
  copy(p.dq, grads.dq);
  copy(p.dk, grads.dk);
  copy(p.dv, grads.dv);
  copy(p.dpk, grads.dpk);
  copy(p.dpv, grads.dpv);
  copy(p.dgate, grads.dgate);
  copy(p.dkey_gate, grads.dkey_gate);
}

}  // namespace pk::prefix_attention
