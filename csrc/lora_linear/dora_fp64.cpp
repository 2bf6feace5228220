// DoRA in fp64: plain loops that read like the formulas. For gradient checks; nobody waits for them.
#include <cmath>

#include "lora_linear/dora.h"

namespace pk::dora {
namespace {

const double* doubles(const void* p) {
  return static_cast<const double*>(p);
}
double* doubles(void* p) {
  return static_cast<double*>(p);
}

double gain(const Scale& p, int64_t m, int64_t n) {
  const int64_t adapter = adapter_of(p, m);
  return adapter < 0 ? 1 : doubles(p.magnitude)[adapter * p.N + n] / doubles(p.norm)[adapter * p.N + n];
}

}  // namespace

void norm_double(const Norm& p) {
  for (int64_t n = 0; n < p.N; ++n) {
    double square = 0;
    for (int64_t k = 0; k < p.K; ++k) {
      double low_rank = 0;
      for (int64_t r = 0; r < p.R; ++r) low_rank += doubles(p.B)[n * p.R + r] * doubles(p.A)[r * p.K + k];
      const double element = doubles(p.weight)[n * p.weight_n + k * p.weight_k] + p.scaling * low_rank;
      square += element * element;
    }
    doubles(p.norm)[n] = std::sqrt(square);
  }
}

void scale_double(const Scale& p) {
  for (int64_t m = 0; m < p.M; ++m) {
    for (int64_t n = 0; n < p.N; ++n) {
      double y = gain(p, m, n) * doubles(p.z)[m * p.z_stride + n];
      if (p.bias) y += doubles(p.bias)[n];
      if (p.residual) y += doubles(p.residual)[m * p.residual_stride + n];
      doubles(p.y)[m * p.N + n] = y;
    }
  }
}

void backward_double(const Scale& p) {
  for (int64_t i = 0; p.dm && i < p.L * p.N; ++i) doubles(p.dm)[i] = 0;
  for (int64_t n = 0; p.db && n < p.N; ++n) doubles(p.db)[n] = 0;
  for (int64_t m = 0; m < p.M; ++m) {
    const int64_t adapter = adapter_of(p, m);
    for (int64_t n = 0; n < p.N; ++n) {
      const double dy = doubles(p.dy)[m * p.dy_stride + n];
      if (p.dz) doubles(p.dz)[m * p.N + n] = gain(p, m, n) * dy;
      if (p.dm && adapter >= 0) doubles(p.dm)[adapter * p.N + n] += dy * doubles(p.z)[m * p.z_stride + n];
      if (p.db) doubles(p.db)[n] += dy;
    }
  }
  for (int64_t i = 0; p.dm && i < p.L * p.N; ++i) doubles(p.dm)[i] /= doubles(p.norm)[i];
}

}  // namespace pk::dora
