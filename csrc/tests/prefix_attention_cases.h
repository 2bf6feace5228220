// What the tests of prefix_attention's CUDA kernels share: a case, its numbers in double and in a type, and the problem
// that they make.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "prefix_attention/prefix_attention.h"
#include "tests/device_array.h"
#include "tests/typed_values.h"

namespace pk::test {

using prefix_attention::Composition;
using prefix_attention::Problem;

enum class Masks { kNone, kBoolean, kAdditive };

struct Case {
  const char* name;
  int64_t B, Hq, Hkv, S, T, P, D, prefixes;
  Composition composition;
  bool causal, gated, packed;
  Masks masks;
  int64_t window;
  double softcap, p;
  bool strided = false;  // rows that are not aligned to 16 bytes

  int64_t rows() const { return packed ? 4 : B; }
};

constexpr Composition kMerge = Composition::kMerge, kAdd = Composition::kAdd, kRelu = Composition::kRelu,
                      kLinear = Composition::kLinear;

// The same numbers in double and in a type, where the kernels read or write them.
struct Numbers {
  Dtype type;
  std::vector<double> wide;
  Array<char> narrow;

  Numbers(Dtype type, int64_t count, uint32_t seed = 0)
      : type(type), wide(count), narrow(static_cast<size_t>(count * bytes_of(type))) {
    memset(narrow.host(), 0xFF, static_cast<size_t>(count * bytes_of(type)));  // NaN until it is written
    if (!seed) return;
    for (double& number : wide) {  // multiples of 1/64 in [-1, 1), which every type holds
      seed = seed * 1664525u + 1013904223u;
      number = (static_cast<int>(seed >> 25) - 64) / 64.;
    }
    round();
  }
  void round() {
    for (size_t i = 0; i < wide.size(); ++i) {
      const bool tiny = type == Dtype::kFloat16 && std::fabs(wide[i]) < 0x1p-14;  // write() has no subnormal numbers
      write(narrow.host(), type, static_cast<int64_t>(i), tiny ? 0 : wide[i]);
    }
  }
  double largest() const {
    double most = 1;
    for (double number : wide) most = std::fmax(most, std::fabs(number));
    return most;
  }
  void* data(bool exact) { return exact ? static_cast<void*>(wide.data()) : narrow.data(); }
};

// Everything that a case reads and writes.
struct Operands {
  Dtype type, wide;  // wide: the accumulator's
  int64_t pad;       // of a row of q, k and v
  Numbers q, k, v, pk, pv, gate, key_gate, bias, mask, out, lse, prefix_lse;
  Array<uint8_t> seen;
  Array<int32_t> ids, lengths, cu_q, cu_k;
  Array<uint64_t> seed;

  Operands(const Case& c, Dtype type)
      : type(type),
        wide(type == Dtype::kFloat64 ? type : Dtype::kFloat32),
        pad(c.strided ? 3 : 0),
        q(type, c.B * c.S * c.Hq * (c.D + pad), 1),
        k(type, c.B * c.T * c.Hkv * (c.D + pad), 2),
        v(type, c.B * c.T * c.Hkv * (c.D + pad), 3),
        pk(type, c.prefixes * c.Hkv * c.P * c.D, 4),
        pv(type, c.prefixes * c.Hkv * c.P * c.D, 5),
        gate(wide, c.rows() * c.Hq, 6),
        key_gate(wide, c.Hq, 7),
        bias(wide, c.Hq * c.S * c.P, 9),
        mask(type, c.S * c.T, 10),
        out(type, c.B * c.S * c.Hq * c.D),
        lse(wide, c.B * c.S * c.Hq),
        prefix_lse(wide, c.B * c.S * c.Hq),
        seen(static_cast<size_t>(c.B * c.S * c.T)),
        ids(static_cast<size_t>(c.rows())),
        lengths(static_cast<size_t>(c.prefixes)),
        cu_q(5),
        cu_k(5),
        seed(1) {
    const int32_t ends_q[] = {0, 3, 4, 4, 9}, ends_k[] = {0, 5, 6, 8, 15};
    for (size_t r = 0; r < 5; ++r) cu_q[r] = ends_q[r], cu_k[r] = ends_k[r];
    const int64_t kinds = c.prefixes + 1;  // the last of which is that there is none
    for (int64_t r = 0; r < c.rows(); ++r) ids[r] = c.prefixes == 1 ? 0 : static_cast<int32_t>((r + 1) % kinds) - 1;
    for (int64_t n = 0; n < c.prefixes; ++n) lengths[n] = static_cast<int32_t>(c.P - (n ? c.P / (n + 1) : 0));
    for (int64_t i = 0; i < c.B * c.S * c.T; ++i) seen[i] = i * 7919 % 5 != 0;
    seed[0] = 0x0123456789ABCDEFull;
  }

  // exact: of the fp64 loops.
  Problem problem(const Case& c, bool exact) {
    Problem p{};
    const int64_t row = c.D + pad;
    const Dtype gates = exact ? Dtype::kFloat64 : wide;
    p.B = c.B, p.Hq = c.Hq, p.Hkv = c.Hkv, p.S = c.S, p.T = c.T, p.P = c.P, p.D = c.D;
    p.prefixes = c.prefixes, p.rows = c.rows(), p.type = exact ? Dtype::kFloat64 : type;
    p.q = {q.data(exact), c.S * c.Hq * row, row, c.Hq * row};
    p.k = {k.data(exact), c.T * c.Hkv * row, row, c.Hkv * row};
    p.v = {v.data(exact), c.T * c.Hkv * row, row, c.Hkv * row};
    p.pk = {pk.data(exact), c.Hkv * c.P * c.D, c.P * c.D, c.D};
    p.pv = {pv.data(exact), c.Hkv * c.P * c.D, c.P * c.D, c.D};
    p.ids = exact ? ids.host() : ids.data(), p.lengths = exact ? lengths.host() : lengths.data();
    if (c.packed) {
      p.cu_q = exact ? cu_q.host() : cu_q.data();
      p.cu_k = exact ? cu_k.host() : cu_k.data();
    }
    if (c.gated) p.gate = {gate.data(exact), gates, c.Hq, 1}, p.key_gate = {key_gate.data(exact), gates, 0, 1};
    if (c.masks == Masks::kBoolean) p.mask = {exact ? seen.host() : seen.data(), true, gates, c.S * c.T, 0, c.T};
    if (c.masks == Masks::kAdditive) {
      p.mask = {mask.data(exact), false, p.type, 0, 0, c.T};
      p.bias = {bias.data(exact), false, gates, 0, c.S * c.P, c.P};
    }
    p.composition = c.composition, p.scale = 0.5, p.softcap = c.softcap, p.causal = c.causal, p.window = c.window;
    p.window_over_prefix = c.window > 0;
    const uint64_t key = exact ? seed[0] : 0;  // the kernels read it where it is
    p.own_dropout = make_dropout(c.p, key, 0), p.prefix_dropout = make_dropout(c.p, key, 1);
    p.seed = exact || c.p == 0 ? nullptr : seed.data();
    p.out = out.data(exact), p.lse = lse.data(exact), p.prefix_lse = prefix_lse.data(exact);
    return p;
  }
};

}  // namespace pk::test
