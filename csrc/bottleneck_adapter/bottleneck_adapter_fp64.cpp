// bottleneck_adapter in fp64: plain loops that read like the formulas. For gradient checks; nobody waits for them.
#include <cmath>

#include "bottleneck_adapter/bottleneck_adapter.h"

namespace pk::bottleneck_adapter {
namespace {

using Numbers = std::vector<double>;

const double* doubles(const void* p) {
  return static_cast<const double*>(p);
}
double* doubles(void* p) {
  return static_cast<double*>(p);
}
double entry(const void* numbers, int64_t i, double otherwise) {
  return numbers ? doubles(numbers)[i] : otherwise;
}

// drop(value) of element (m, i) of the masked matrix: not a product, a dropped NaN is gone.
double dropped(const Problem& p, bool here, int64_t m, int64_t i, double value) {
  if (!here || !p.dropout.active()) return value;
  const bool keeps = kept(p.dropout, static_cast<uint32_t>(m), static_cast<uint32_t>(i));
  return keeps ? value * (static_cast<double>(kKeepAll) / p.dropout.threshold) : 0;
}

double scale_of(const Problem& p, int64_t n) {
  return p.scaling * (p.scales ? doubles(p.scale)[p.scales == 1 ? 0 : n] : 1);
}

// Row m of x before the norm's weight and bias; returns the reciprocal deviation.
double normed(const Problem& p, int64_t m, Numbers& row) {
  row.assign(doubles(p.x) + m * p.x_stride, doubles(p.x) + m * p.x_stride + p.K);
  if (p.norm == Norm::kNone) return 1;
  double mean = 0, square = 0;
  for (double value : row) mean += value / p.K;
  for (double& value : row) {
    if (p.norm == Norm::kLayer) value -= mean;
    square += value * value / p.K;
  }
  const double reciprocal = 1 / std::sqrt(square + p.eps);
  for (double& value : row) value *= reciprocal;
  return reciprocal;
}

double affine(const Problem& p, const Numbers& row, int64_t k) {
  return row[k] * entry(p.norm_weight, k, 1) + entry(p.norm_bias, k, 0);
}

// What a row of the backward adds to, in fp64 whatever the gradients wanted are.
struct Gradients {
  explicit Gradients(const Problem& p)
      : dA(p.E * p.K), da(p.E), up(p.N * p.E), up_bias(p.N), norm_weight(p.K), norm_bias(p.K) {}
  Numbers dA, da, up, up_bias, norm_weight, norm_bias;  // up = d^T (g u), up_bias = colsum(g d)
};

// dx of row m from out = dh A.
void store_dx(const Problem& p, int64_t m, Numbers& out, const Numbers& row, double reciprocal) {
  double mean = 0, product = 0;
  for (int64_t k = 0; p.norm != Norm::kNone && k < p.K; ++k) {
    out[k] *= entry(p.norm_weight, k, 1);
    if (p.norm == Norm::kLayer) mean += out[k] / p.K;
    product += out[k] * row[k] / p.K;
  }
  for (int64_t k = 0; k < p.K; ++k) {
    const double inner = p.norm == Norm::kNone ? out[k] : reciprocal * (out[k] - mean - row[k] * product);
    doubles(p.dx)[m * p.K + k] = inner + (p.serial ? doubles(p.dy)[m * p.dy_stride + k] : 0);
  }
}

void backward_row(const Problem& p, int64_t m, Gradients& sums) {
  Numbers d(p.N), dh(p.E), row, out(p.K);
  const double gate = entry(p.gate, m, 1), reciprocal = normed(p, m, row);
  double dgate = 0;
  for (int64_t n = 0; n < p.N; ++n) {
    d[n] = dropped(p, p.drops_output, m, n, doubles(p.dy)[m * p.dy_stride + n]);
    sums.up_bias[n] += gate * d[n];
    dgate += d[n] * scale_of(p, n) * entry(p.b, n, 0);
  }
  for (int64_t e = 0; e < p.E; ++e) {
    const double h = doubles(p.h)[m * p.E + e];
    const double u = dropped(p, !p.drops_output, m, e, activated(p.activation, h));
    double v = 0;
    for (int64_t n = 0; n < p.N; ++n) {
      v += d[n] * scale_of(p, n) * doubles(p.B)[n * p.E + e];
      sums.up[n * p.E + e] += d[n] * gate * u;
    }
    dgate += v * u;
    dh[e] = slope_of(p.activation, h) * dropped(p, !p.drops_output, m, e, gate * v);
    sums.da[e] += dh[e];
    for (int64_t k = 0; k < p.K; ++k) {
      out[k] += dh[e] * doubles(p.A)[e * p.K + k];
      sums.dA[e * p.K + k] += dh[e] * affine(p, row, k);
    }
  }
  if (p.dgate) doubles(p.dgate)[m] = dgate;
  for (int64_t k = 0; k < p.K; ++k) {
    sums.norm_weight[k] += out[k] * row[k];
    sums.norm_bias[k] += out[k];
  }
  if (p.dx) store_dx(p, m, out, row, reciprocal);
}

void copy(void* to, const Numbers& from) {
  for (size_t i = 0; to && i < from.size(); ++i) doubles(to)[i] = from[i];
}

}  // namespace

void forward_double(const Problem& p) {
  Numbers row, u(p.E);
  for (int64_t m = 0; m < p.M; ++m) {
    normed(p, m, row);
    for (int64_t e = 0; e < p.E; ++e) {
      double h = entry(p.a, e, 0);
      for (int64_t k = 0; k < p.K; ++k) h += affine(p, row, k) * doubles(p.A)[e * p.K + k];
      doubles(p.h)[m * p.E + e] = h;
      u[e] = dropped(p, !p.drops_output, m, e, activated(p.activation, h));
    }
    for (int64_t n = 0; n < p.N; ++n) {
      double t = entry(p.b, n, 0);
      for (int64_t e = 0; e < p.E; ++e) t += u[e] * doubles(p.B)[n * p.E + e];
      const double added = dropped(p, p.drops_output, m, n, t) * scale_of(p, n) * entry(p.gate, m, 1);
      doubles(p.y)[m * p.N + n] = doubles(p.residual)[m * p.residual_stride + n] + added;
    }
  }
}

void backward_double(const Problem& p) {
  Gradients sums(p);
  for (int64_t m = 0; m < p.M; ++m) backward_row(p, m, sums);
  Numbers ds(p.scales);
  for (int64_t n = 0; n < p.N; ++n) {
    double channel = entry(p.b, n, 0) * sums.up_bias[n];
    for (int64_t e = 0; e < p.E; ++e) {
      channel += doubles(p.B)[n * p.E + e] * sums.up[n * p.E + e];
      sums.up[n * p.E + e] *= scale_of(p, n);
    }
    sums.up_bias[n] *= scale_of(p, n);
    if (p.dscale) ds[p.scales == 1 ? 0 : n] += p.scaling * channel;
  }
  copy(p.dA, sums.dA);
  copy(p.da, sums.da);
  copy(p.dB, sums.up);
  copy(p.db, sums.up_bias);
  copy(p.dscale, ds);
  copy(p.dnorm_weight, sums.norm_weight);
  copy(p.dnorm_bias, sums.norm_bias);
}

}  // namespace pk::bottleneck_adapter
