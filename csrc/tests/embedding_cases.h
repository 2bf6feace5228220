// Cases of lora_embedding's two products with a one-hot x, for the tests on the CPU and on a GPU: ids that repeat, runs
// over several units, padding, both ends of the table; h and ds wider than the adapter.
#pragma once

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <vector>

#include "lora_linear/embedding.h"
#include "tests/typed_values.h"

namespace pk::test {

struct EmbeddingCase {
  int64_t M, V, R, rank0, pitch;
  int64_t distinct;  // how many ids there are, spread over the table
  int64_t padding;
  bool wide;
};

inline std::vector<EmbeddingCase> embedding_cases() {
  return {
      {1, 1, 1, 0, 1, 1, -1, true},    {37, 67, 5, 0, 5, 67, 3, true},      {200, 9, 17, 2, 20, 1, -1, false},
      {200, 9, 17, 2, 20, 2, 0, true}, {130, 1001, 33, 0, 40, 2, -1, true}, {64, 70, 16, 4, 24, 8, 69, false},
      {129, 50, 3, 0, 3, 3, -1, true}, {300, 31, 8, 1, 10, 31, 30, false},
  };
}

// A case's numbers as doubles, and what its two products should be.
struct EmbeddingNumbers {
  EmbeddingCase c;
  std::vector<int64_t> ids, order;
  std::vector<double> A, ds, h, dA;
  static constexpr double kScaling = -1.5;

  explicit EmbeddingNumbers(const EmbeddingCase& c) : c(c), ids(c.M), order(c.M), A(c.R * c.V), ds(c.M * c.pitch) {
    for (int64_t m = 0; m < c.M; ++m) {
      const int64_t which = m * 7 % c.distinct;
      ids[m] = c.distinct == 1 ? c.V / 2 : which * (c.V - 1) / (c.distinct - 1);
    }
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
    for (size_t i = 0; i < A.size(); ++i) A[i] = exact_value(static_cast<int64_t>(i) + 3);
    for (size_t i = 0; i < ds.size(); ++i) ds[i] = exact_value(static_cast<int64_t>(i) + 8);
    h.assign(c.M * c.R, 0);
    dA.assign(c.R * c.V, 0);
    for (int64_t m = 0; m < c.M; ++m) {
      for (int64_t r = 0; r < c.R; ++r) {
        h[m * c.R + r] = kScaling * A[r * c.V + ids[m]];
        if (ids[m] != c.padding) dA[r * c.V + ids[m]] += ds[m * c.pitch + c.rank0 + r];
      }
    }
  }

  // Pointers are the test's.
  lora_embedding::Problem problem(Dtype factors) const {
    lora_embedding::Problem p{};
    p.M = c.M;
    p.V = c.V;
    p.R = c.R;
    p.rank0 = c.rank0;
    p.pitch = c.pitch;
    p.factors = factors;
    p.scaling = kScaling;
    p.padding = c.padding;
    return p;
  }

  void write_ids(void* to) const {
    for (int64_t m = 0; m < c.M; ++m) {
      if (c.wide) {
        static_cast<int64_t*>(to)[m] = ids[m];
      } else {
        static_cast<int32_t*>(to)[m] = static_cast<int32_t>(ids[m]);
      }
    }
  }

  // h [M, pitch] of type `wide` has the product in the adapter's columns and what was there, `before`, in the others.
  bool has_h(const void* found, Dtype wide, double before) const {
    for (int64_t i = 0; i < c.M * c.pitch; ++i) {
      const int64_t r = i % c.pitch - c.rank0;
      const double wanted = r >= 0 && r < c.R ? h[i / c.pitch * c.R + r] : before;
      if (read(found, wide, i) != wanted) return false;  // the products are exact
    }
    return true;
  }

  bool has_dA(const void* found, Dtype factors) const {
    const double eps = factors == Dtype::kBFloat16 ? 0x1p-8 : factors == Dtype::kFloat16 ? 0x1p-11 : 0;
    for (size_t i = 0; i < dA.size(); ++i) {
      if (!(std::fabs(read(found, factors, static_cast<int64_t>(i)) - dA[i]) <= eps * std::fabs(dA[i]))) return false;
    }
    return true;
  }

  void print(const char* where, const char* what, Dtype factors) const {
    std::printf("FAILED %s: %s: M %lld, V %lld, R %lld, factors %d\n", where, what, static_cast<long long>(c.M),
                static_cast<long long>(c.V), static_cast<long long>(c.R), static_cast<int>(factors));
  }
};

}  // namespace pk::test
