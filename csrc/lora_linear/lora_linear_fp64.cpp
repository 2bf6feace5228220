// lora_linear in fp64: plain loops that read like the formulas. For gradient checks; nobody waits for them.
#include <vector>

#include "lora_linear/lora_linear.h"

namespace pk::lora_linear {
namespace {

const double* doubles(const void* p) {
  return static_cast<const double*>(p);
}
double* doubles(void* p) {
  return static_cast<double*>(p);
}

// drop_l(x)[m, k] / x[m, k]: 0 or 1 / (1 - p).
double keep_factor(const Problem& p, const Dropout& dropout, int64_t m, int64_t k) {
  if (!dropout.active()) return 1.0;
  const bool keeps = kept(dropout, static_cast<uint32_t>(mask_row(p, m)), static_cast<uint32_t>(k));
  return keeps ? static_cast<double>(kKeepAll) / dropout.threshold : 0.0;
}

double dropped(const Problem& p, const Dropout& dropout, int64_t m, int64_t k) {
  const double factor = keep_factor(p, dropout, m, k);
  return factor == 0 ? 0.0 : factor * doubles(p.x)[m * p.x_stride + k];  // not a product: a dropped NaN is gone
}

}  // namespace

void ds_double(const Problem& p, const Adapter& adapter, double* ds) {
  const Member& member = p.member[adapter.member];
  for (int64_t i = 0; i < p.M * adapter.R; ++i) ds[i] = 0;
  for (int64_t m = 0; m < p.M; ++m) {
    for (int64_t n = 0; n < member.N; ++n) {
      const double g = adapter.scaling * doubles(member.dy)[m * member.dy_stride + n];
      for (int64_t r = 0; r < adapter.R; ++r) ds[m * adapter.R + r] += g * doubles(adapter.B)[n * adapter.R + r];
    }
  }
}

namespace {

void backward_member(const Problem& p, const Member& member) {
  const double* dy = doubles(member.dy);
  for (int64_t n = 0; member.dbias && n < member.N; ++n) {
    double sum = 0;
    for (int64_t m = 0; m < p.M; ++m) sum += dy[m * member.dy_stride + n];
    doubles(member.dbias)[n] = sum;
  }
  for (int64_t m = 0; p.dx && member.weight && m < p.M; ++m) {
    for (int64_t n = 0; n < member.N; ++n) {
      const double* w = doubles(member.weight) + n * member.weight_n;
      for (int64_t k = 0; k < p.K; ++k) {
        doubles(p.dx)[m * p.K + k] += dy[m * member.dy_stride + n] * w[k * member.weight_k];
      }
    }
  }
}

void backward_adapter(const Problem& p, const Adapter& adapter) {
  const Member& member = p.member[adapter.member];
  const int64_t R = adapter.R;
  std::vector<double> ds(p.M * R);
  ds_double(p, adapter, ds.data());
  const double *A = doubles(adapter.A), *dy = doubles(member.dy);
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t k = 0; k < p.K; ++k) {
      double dA = 0;
      for (int64_t m = 0; m < p.M; ++m) {
        if (p.dx) doubles(p.dx)[m * p.K + k] += keep_factor(p, adapter.dropout, m, k) * ds[m * R + r] * A[r * p.K + k];
        if (adapter.dA) dA += ds[m * R + r] * dropped(p, adapter.dropout, m, k);
      }
      if (adapter.dA) doubles(adapter.dA)[r * p.K + k] = dA;
    }
  }
  for (int64_t n = 0; n < member.N; ++n) {
    for (int64_t r = 0; adapter.dB && r < R; ++r) {
      double sum = 0;
      for (int64_t m = 0; m < p.M; ++m) {
        sum += dy[m * member.dy_stride + n] * doubles(p.h)[m * p.R + adapter.rank0 + r];
      }
      doubles(adapter.dB)[n * R + r] = sum;
    }
    double column = 0;
    for (int64_t m = 0; adapter.dbias && m < p.M; ++m) column += dy[m * member.dy_stride + n];
    if (adapter.dbias) doubles(adapter.dbias)[n] = adapter.scaling * column;
  }
}

}  // namespace

void forward_double(const Problem& p) {
  for (int64_t l = 0; p.x && l < p.L; ++l) {  // of all rows first: y may lie where x lies
    const Adapter& adapter = p.adapter[l];
    for (int64_t m = 0; m < p.M; ++m) {
      double* h = doubles(p.h) + m * p.R + adapter.rank0;
      for (int64_t r = 0; r < adapter.R; ++r) {
        double sum = 0;
        for (int64_t k = 0; k < p.K; ++k) sum += dropped(p, adapter.dropout, m, k) * doubles(adapter.A)[r * p.K + k];
        h[r] = adapter.scaling * sum;
      }
    }
  }
  for (int64_t g = 0; g < p.G; ++g) {
    const Member& member = p.member[g];
    for (int64_t m = 0; m < p.M; ++m) {
      for (int64_t n = 0; n < member.N; ++n) {
        double sum = member.bias ? doubles(member.bias)[n] : 0.0;
        if (member.residual) sum += doubles(member.residual)[m * member.residual_stride + n];
        const double* w = doubles(member.weight) + n * member.weight_n;
        for (int64_t k = 0; w && k < p.K; ++k) sum += doubles(p.x)[m * p.x_stride + k] * w[k * member.weight_k];
        doubles(member.y)[m * member.N + n] = sum;
      }
    }
  }
  for (int64_t l = 0; l < p.L; ++l) {
    const Adapter& adapter = p.adapter[l];
    const Member& member = p.member[adapter.member];
    for (int64_t m = 0; m < p.M; ++m) {
      const double* h = doubles(p.h) + m * p.R + adapter.rank0;
      for (int64_t n = 0; n < member.N; ++n) {
        double sum = adapter.bias ? adapter.scaling * doubles(adapter.bias)[n] : 0.0;
        for (int64_t r = 0; r < adapter.R; ++r) sum += h[r] * doubles(adapter.B)[n * adapter.R + r];
        doubles(member.y)[m * member.N + n] += sum;
      }
    }
  }
}

void backward_double(const Problem& p) {
  for (int64_t i = 0; p.dx && i < p.M * p.K; ++i) doubles(p.dx)[i] = 0;
  for (int64_t g = 0; g < p.G; ++g) backward_member(p, p.member[g]);
  for (int64_t l = 0; l < p.L; ++l) backward_adapter(p, p.adapter[l]);
}

}  // namespace pk::lora_linear
