// Functions of a vector of fp32, within a few units in the last place, the same for every instruction set: e^x, tanh,
// the logistic function, the normal distribution. NaN stays NaN. Polynomials are least maximum errors, fitted to the
// functions in 40 digits; their errors stand beside them.
#pragma once

#include "common/vec.h"

namespace pk::PK_ISA {

PK_INLINE vf absolute(vf x) {
  return (vf)((vu)x & 0x7FFFFFFFu);
}
PK_INLINE vf with_sign_of(vf magnitude, vf x) {
  return (vf)((vu)magnitude | ((vu)x & 0x80000000u));
}

// sum_i c[i] x^i
template <int kTerms>
PK_INLINE vf polynomial(const float (&c)[kTerms], vf x) {
  vf sum = vf{} + c[kTerms - 1];
  PK_UNROLL
  for (int i = kTerms - 2; i >= 0; --i) sum = fma(sum, x, vf{} + c[i]);
  return sum;
}

// e^(x + rest), where the rest is too small to fit into x: n = round(x / ln 2), and e^r of what remains, |r| <= ln 2
// / 2. Below the smallest number it is 0, above the largest infinity.
PK_INLINE vf exponential(vf x, vf rest) {
  constexpr float kLn2High = 11357.f / 16384.f, kLn2Low = -2.9088971857e-5f;  // n kLn2High is exact
  constexpr float kRound = 0x1.8p23f;                                         // has no place for a fraction
  constexpr float kSeries[] = {0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f2p-5f, 0x1.1239e4p-7f, 0x1.6a2430p-10f};
  x = x > 89.f ? vf{} + 89.f : x;
  x = x < -104.f ? vf{} - 104.f : x;
  const vf shifted = fma(x, vf{} + 1.44269504f, vf{} + kRound);
  const vf n = shifted - kRound;
  const vf r = fma(n, vf{} - kLn2Low, fma(n, vf{} - kLn2High, x)) + rest;
  const vf power = fma(polynomial(kSeries, r), r * r, r) + 1.f;  // 3e-9
  const vi whole = (vi)shifted - (vi)(vf{} + kRound), half = whole >> 1;
  return power * (vf)((half + 127) << 23) * (vf)((whole - half + 127) << 23);  // either may be subnormal together only
}
PK_INLINE vf exponential(vf x) {
  return exponential(x, vf{});
}

// 1 / (1 + e^-x), and what it lacks to 1, without the error of a difference.
PK_INLINE vf logistic(vf x, vf& rest) {
  const vf power = exponential(-absolute(x)), greater = 1.f / (1.f + power), lesser = power * greater;
  rest = x < 0.f ? greater : lesser;
  return x < 0.f ? lesser : greater;
}

PK_INLINE vf hyperbolic_tangent(vf x) {
  constexpr float kSeries[] = {-0.3333333134651184f,  0.13333195447921753f,   -0.053945377469062805f,
                               0.021692605689167976f, -0.008156276308000088f, 0.0021227425895631313f};
  const vf a = absolute(x), square = a * a;
  const vf near = fma(polynomial(kSeries, square), square * a, a);  // 2e-10, |x| <= 0.63
  const vf power = exponential(-2.f * a);
  const vf far = (1.f - power) / (1.f + power);
  return with_sign_of(a < 0.625f ? near : far, x);
}

// The normal distribution function, and its density e^(-x^2 / 2) / sqrt(2 pi). With a = |x| the lesser side is the
// density times Mills' ratio, whose product with a + 3 is a polynomial of s = (a - 3) / (a + 3): exact to the last
// places far out too, where 1 + erf cancels.
PK_INLINE vf normal(vf x, vf& density) {
  constexpr float kSeries[] = {1.8275418281555176f,     -1.2767059803009033f,    0.5765688419342041f,
                               -0.11846998978989029f,   -0.026225630193948746f,  0.01746947318315506f,
                               0.0025686773005872965f,  -0.0025882795453071594f, -0.0006134476279839873f,
                               0.00032919744262471795f, 0.00013658468378707767f};
  vf a = absolute(x);
  a = a > 15.f ? vf{} + 15.f : a;
  const vf high = (vf)((vu)a & 0xFFFFF000u);  // its square is exact
  const vf power = exponential(-0.5f * (high * high), -0.5f * ((a - high) * (a + high)));
  density = power * 0.3989422804f;
  const vf reciprocal = 1.f / (a + 3.f);
  const vf lesser = density * (polynomial(kSeries, (a - 3.f) * reciprocal) * reciprocal);  // 1e-9
  return x < 0.f ? lesser : 1.f - lesser;
}

}  // namespace pk::PK_ISA
