// The CPU kernels of bottleneck_adapter against its fp64 loops, for every instruction set that this processor has:
// ragged sizes, few and many rows, with a GEMM and without, every pair of types, norms, gates, scales, both dropouts;
// and the activations and their slopes against the C library's in fp64.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "bottleneck_adapter/bottleneck_adapter.h"
#include "common/instruction_set.h"

namespace {

using namespace pk;
using namespace pk::bottleneck_adapter;

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("FAILED: %s: %s\n", instruction_set_name(), what.c_str());
  ++failures;
}

int64_t size_of(Dtype type) {
  return type == Dtype::kFloat64 ? 8 : type == Dtype::kFloat32 ? 4 : 2;
}

// Numbers stored as a type, with a guard after their end that no kernel may touch.
class Array {
 public:
  Array(Dtype type, int64_t count) : type_(type), bytes_(count * size_of(type) + kGuard, kPattern) {}

  void* data() { return bytes_.data(); }
  int64_t count() const { return (static_cast<int64_t>(bytes_.size()) - kGuard) / size_of(type_); }
  double at(int64_t i) const {
    const char* from = bytes_.data() + i * size_of(type_);
    if (type_ == Dtype::kFloat64) return read<double>(from);
    if (type_ == Dtype::kFloat32) return read<float>(from);
    const uint16_t bits = read<uint16_t>(from);
    if (type_ == Dtype::kBFloat16) {
      const uint32_t wide = static_cast<uint32_t>(bits) << 16;
      return read<float>(reinterpret_cast<const char*>(&wide));
    }
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double magnitude = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    return bits >> 15 ? -magnitude : magnitude;
  }
  // A 16-bit type holds multiples of 1/64 in [-2, 2) exactly.
  void set(int64_t i, double value) {
    char* to = bytes_.data() + i * size_of(type_);
    const float narrow = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof bits);
    if (type_ == Dtype::kFloat64) std::memcpy(to, &value, 8);
    if (type_ == Dtype::kFloat32) std::memcpy(to, &narrow, 4);
    const uint32_t exponent = bits >> 23 & 255;
    const uint32_t half = exponent < 113 ? 0 : (bits >> 16 & 0x8000u) | (exponent - 112) << 10 | (bits >> 13 & 1023);
    const uint16_t narrowest = static_cast<uint16_t>(type_ == Dtype::kFloat16 ? half : bits >> 16);
    if (size_of(type_) == 2) std::memcpy(to, &narrowest, 2);
  }
  bool guard_holds() const {
    for (size_t i = bytes_.size() - kGuard; i < bytes_.size(); ++i) {
      if (bytes_[i] != kPattern) return false;
    }
    return true;
  }

 private:
  static constexpr int64_t kGuard = 64;
  static constexpr char kPattern = 0x7B;

  template <class T>
  static T read(const char* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }

  Dtype type_;
  std::vector<char> bytes_;
};

void plain_gemm(const Matrix& c, const Matrix& a, const Matrix& b, float alpha, bool accumulate) {
  for (int64_t i = 0; i < c.rows; ++i) {
    for (int64_t j = 0; j < c.cols; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < a.cols; ++k) {
        const float x = a.data[i * a.row_stride + k * a.col_stride];
        sum += double(x) * b.data[k * b.row_stride + j * b.col_stride];
      }
      float& out = c.data[i * c.row_stride + j * c.col_stride];
      out = static_cast<float>(alpha * sum + (accumulate ? out : 0));
    }
  }
}

struct Case {
  int64_t M, K, N, E;
  int activation = kRelu;
  Norm norm = Norm::kNone;
  int64_t scales = 0;
  bool gated = false, drops_output = false, serial = false;
  double p = 0;
};

// A problem and all that it points to, stored as a pair of types.
struct Bench {
  Bench(const Case& c, Dtype type, Dtype factors) {
    const Dtype wide = type == Dtype::kFloat64 ? type : Dtype::kFloat32;
    problem.M = c.M;
    problem.K = c.K;
    problem.N = c.N;
    problem.E = c.E;
    problem.type = type;
    problem.factors = factors;
    problem.x = input(type, c.M * c.K);
    problem.x_stride = c.K;
    problem.residual = c.serial ? problem.x : input(type, c.M * c.N);
    problem.residual_stride = c.N;
    problem.dy = input(type, c.M * c.N);
    problem.dy_stride = c.N;
    problem.A = input(factors, c.E * c.K);
    problem.a = input(factors, c.E);
    problem.B = input(factors, c.N * c.E);
    problem.b = input(factors, c.N);
    problem.scales = c.scales;
    if (c.scales) problem.scale = input(factors, c.scales);
    if (c.gated) problem.gate = input(factors, c.M);
    problem.norm = c.norm;
    if (c.norm != Norm::kNone) problem.norm_weight = input(factors, c.K);
    if (c.norm == Norm::kLayer) problem.norm_bias = input(factors, c.K);
    problem.eps = 1e-3;
    problem.scaling = -1.5;
    problem.activation = c.activation;
    problem.dropout = make_dropout(c.p, 0x0123456789ABCDEFull, 0);
    problem.drops_output = c.drops_output;
    problem.serial = c.serial;
    problem.y = output("y", type, c.M * c.N);
    problem.h = output("h", wide, c.M * c.E);
  }

  void* input(Dtype type, int64_t count) {
    Array& array = *arrays.emplace_back(std::make_unique<Array>(type, count));
    for (int64_t i = 0; i < count; ++i) {
      state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
      array.set(i, (static_cast<int>(state_ >> 57) - 64) / 64.0);
    }
    return array.data();
  }
  void* output(const char* name, Dtype type, int64_t count) {
    names.push_back(name);
    outputs.push_back(arrays.emplace_back(std::make_unique<Array>(type, count)).get());
    return outputs.back()->data();
  }

  void run(bool backward) {
    if (problem.type == Dtype::kFloat64) return backward ? backward_double(problem) : forward_double(problem);
    problem.gemm = suits_gemm(problem) ? plain_gemm : nullptr;
    std::vector<float> scratch(scratch_floats(problem, backward), NAN);
    set_scratch(problem, backward, scratch.data());
    for (const Step& step : backward ? backward_steps(problem) : forward_steps(problem)) {
      for (int64_t unit = step.units; unit-- > 0;) step.phase(problem, unit, unit + 1);  // in any order
    }
  }

  void run() {
    Problem& p = problem;
    run(false);
    p.dx = output("dx", p.type, p.M * p.K);
    p.dA = output("dA", p.factors, p.E * p.K);
    p.da = output("da", p.factors, p.E);
    p.dB = output("dB", p.factors, p.N * p.E);
    p.db = output("db", p.factors, p.N);
    if (p.scales) p.dscale = output("dscale", p.factors, p.scales);
    if (p.gate) p.dgate = output("dgate", p.factors, p.M);
    if (p.norm_weight) p.dnorm_weight = output("dnorm_weight", p.factors, p.K);
    if (p.norm_bias) p.dnorm_bias = output("dnorm_bias", p.factors, p.K);
    run(true);
  }

  Problem problem{};
  std::vector<std::unique_ptr<Array>> arrays;
  std::vector<const char*> names;
  std::vector<Array*> outputs;

 private:
  uint64_t state_ = 1;
};

double epsilon_of(Dtype type) {
  return type == Dtype::kFloat32 ? 2e-5 : type == Dtype::kFloat16 ? 1e-3 : 8e-3;
}

void compare(const Case& c, Dtype type, Dtype factors) {
  Bench got(c, type, factors), want(c, Dtype::kFloat64, Dtype::kFloat64);
  got.run();
  want.run();
  static const char* const types[] = {"fp32", "fp16", "bf16", "fp64"};
  for (size_t i = 0; i < got.outputs.size(); ++i) {
    double error = 0, largest = 1;
    for (int64_t j = 0; j < want.outputs[i]->count(); ++j) {
      const double expected = want.outputs[i]->at(j), difference = std::fabs(got.outputs[i]->at(j) - expected);
      largest = std::fmax(largest, std::fabs(expected));
      if (!(difference <= error)) error = difference;  // NaN counts
    }
    const double epsilon = std::fmax(epsilon_of(type), epsilon_of(factors));
    char text[200];
    std::snprintf(text, sizeof text, "%s of %s/%s M=%d K=%d N=%d E=%d f=%d norm=%d p=%g: error %g of %g", got.names[i],
                  types[int(type)], types[int(factors)], int(c.M), int(c.K), int(c.N), int(c.E), c.activation,
                  int(c.norm), c.p, error, largest);
    expect(error <= epsilon * largest, text);
    expect(got.outputs[i]->guard_holds(), std::string(got.names[i]) + ": written past its end");
  }
}

void test_kernels() {
  std::vector<Case> cases = {
      {1, 1, 1, 1},
      {64, 128, 256, 64},
      {37, 67, 131, 5},
      {100, 300, 140, 70, kGelu, Norm::kNone, 1, true},
      {5, 140, 270, 33, kSilu, Norm::kNone, 270, true, false, false, 0.3},
      {33, 40, 40, 300, kTanh, Norm::kNone, 0, false, false, true, 0.3},
      {49, 67, 67, 16, kGeluTanh, Norm::kLayer, 1, true, false, true, 0.3},
      {3, 331, 70, 32, kSigmoid, Norm::kRms, 0, true, true, false, 0.3},
      {70, 131, 300, 24, kLeakyRelu, Norm::kLayer, 300, true, true, false, 0.3},
      {70, 300, 283, 70, kGelu, Norm::kNone, 1, false, false, false, 0.3},
      {260, 270, 270, 40, kSilu, Norm::kNone, 270, false, false, true},
      {70, 300, 300, 70, kTanh, Norm::kNone, 0, true, false, true},
      {8, 256, 256, 48, kIdentity, Norm::kNone, 0, false, false, true},
  };
  const Dtype narrow[] = {Dtype::kFloat32, Dtype::kFloat16, Dtype::kBFloat16};
  for (const Case& c : cases) {
    for (Dtype type : narrow) {
      for (Dtype factors : narrow) compare(c, type, factors);
    }
  }
}

double argument(double h) {  // of gelu_tanh's logistic function
  return 2 * std::sqrt(2 / M_PI) * (h + 0.044715 * h * h * h);
}

double exact(int activation, double h) {  // activated(), but for what cancels there
  if (activation == kGelu) return h * std::erfc(-h / std::sqrt(2)) / 2;
  if (activation == kGeluTanh) return h / (1 + std::exp(-argument(h)));
  return activated(activation, h);
}

// Half units in the last place; an argument of e^x is rounded itself, which costs its size.
double error_of(int activation, float h, double got) {
  const double want = exact(activation, h), cost = activation == kGeluTanh ? 1 + std::fabs(argument(h)) : 1;
  return std::fabs(want) < 1e-37 ? 0 : std::fabs(got - want) / std::fabs(want) / 0x1p-24 / cost;
}

// f and f' of many numbers: with every size but M one and all factors 1, y = 0 + f(x) and dx = f'(x).
void test_activations() {
  std::vector<float> x, one = {1};
  for (float h = -20; h <= 20; h += 1.f / 128) x.push_back(h);
  for (float h = 1e-30f; h < 1e30f; h *= 7) x.insert(x.end(), {h, -h});
  x.push_back(NAN);
  const int64_t M = static_cast<int64_t>(x.size());
  std::vector<float> y(M), h(M), dy(M, 1), dx(M), zeros(M);
  for (int f = 0; f < kActivations; ++f) {
    Problem p{};
    p.x_stride = p.residual_stride = p.dy_stride = 1;
    p.M = M;
    p.K = p.N = p.E = 1;
    p.x = x.data();
    p.residual = zeros.data();
    p.dy = dy.data();
    p.A = p.B = one.data();
    p.scaling = 1;
    p.activation = f;
    p.y = y.data();
    p.h = h.data();
    for (bool backward : {false, true}) {
      if (backward) p.dx = dx.data();
      std::vector<float> scratch(scratch_floats(p, backward));
      set_scratch(p, backward, scratch.data());
      for (const Step& step : backward ? backward_steps(p) : forward_steps(p)) step.phase(p, 0, step.units);
    }
    double units = 0, slope = 0;
    for (int64_t i = 0; i + 1 < M; ++i) {
      const double step = 1e-5 * std::fmax(1, std::fabs(x[i]));
      units = std::fmax(units, error_of(f, x[i], y[i]));
      const bool edge = std::fabs(x[i]) < step;  // where relu has two slopes
      const double difference = (exact(f, x[i] + step) - exact(f, x[i] - step)) / (2 * step);
      if (!edge) slope = std::fmax(slope, std::fabs(dx[i] - difference));
    }
    char text[120];
    std::snprintf(text, sizeof text, "activation %d: %.1f half units in the last place, slope off by %g", f, units,
                  slope);
    expect(units <= 6 && slope <= 4e-7, text);
    expect(std::isnan(y.back()), "an activation hides a NaN");
  }
}

}  // namespace

int main() {
  int sets = 0;
  for (const char* set : {"default", "avx2", "avx512", "avx512_bf16"}) {
    if (!use_instruction_set(set)) {
      std::printf("%s: not run, this processor or build lacks it\n", set);
      continue;
    }
    test_activations();
    test_kernels();
    ++sets;
  }
  std::printf("bottleneck_adapter: %d instruction sets, %d failures\n", sets, failures);
  return failures == 0 ? 0 : 1;
}
