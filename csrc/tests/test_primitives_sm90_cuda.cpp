// The device primitives of sm_90a against what the PTX manual says they do, in the emulator and, by the same program,
// on a GPU: who passes both has emulator == GPU. Small whole numbers, so that sums are exact in any order.
#include <cstdio>

#include "tests/device_array.h"
#include "tests/emulator_kernels.h"
#include "tests/primitives_sm90.h"
#ifdef EMULATOR_BUILD
#include "emulator/emulator.h"
#endif

using namespace pk::test;

namespace {

int failures = 0;

void expect(bool condition, const char* what, int detail = 0) {
  if (condition) return;
  ++failures;
  printf("FAILED %s: %s %d\n", kWhere, what, detail);
}

void blocks_of_a_cluster_exchange() {
  for (const int blocks : {1, 2, 4, 8}) {
    Array<int> x(blocks * 64), out(blocks * 64);
    for (int i = 0; i < blocks * 64; ++i) x[i] = whole(i);
    expect(ran([&] { return exchange(blocks, x.data(), out.data(), nullptr); }), "a cluster runs", blocks);
    for (int i = 0; i < blocks * 64; ++i) {
      int sum = 100 * x[(i + (blocks - 1) * 64) % (blocks * 64)];
      for (int r = 0; r < blocks; ++r) sum += (r + 1) * x[r * 64 + i % 64];
      expect(out[i] == sum, "a cluster of blocks", blocks);
    }
  }
}

// Chunk c of row r at chunk c ^ (r % 8), zeros outside of the matrix: above, below, on the left and on the right.
void boxes_are_swizzled_and_filled() {
  constexpr int kRows = 70, kCols = 90, kStride = 96;
  Array<uint16_t> matrix(kRows * kStride);
  for (int i = 0; i < kRows * kStride; ++i) matrix[i] = static_cast<uint16_t>(i + 1);
  for (const int box_rows : {8, 64}) {
    for (const int at : {0, 1, 2, 3}) {
      const int row = at == 1 ? -3 : at == 2 ? 60 : 0, col = at == 1 ? -8 : at == 2 ? 64 : at == 3 ? 8 : 0;
      Array<uint16_t> out(box_rows * 64 + 8);
      expect(ran([&] { return box(matrix.data(), kRows, kCols, kStride, box_rows, row, col, out.data(), nullptr); }),
             "tma_load runs", at);
      for (int i = 0; i < box_rows * 64; ++i) {
        const int r = i / 64, c = i % 64, y = row + r, x = col + c;
        const bool inside = y >= 0 && y < kRows && x >= 0 && x < kCols;
        const int lies = r * 64 + (c / 8 ^ r % 8) * 8 + c % 8;
        expect(out[lies] == (inside ? matrix[y * kStride + x] : 0), "tma_load", at);
      }
      for (int i = 0; i < 8; ++i) expect(out[box_rows * 64 + i] == matrix[i], "bulk_load", i);
    }
  }
}

void check_product(const Product& problem) {
  const int N = problem.N, K = problem.K;
  Array<uint16_t> a(64 * K), b(N * K);
  Array<float> d(64 * N);
  for (int i = 0; i < 64 * K; ++i) a[i] = bits(problem.type, whole(i));
  for (int i = 0; i < N * K; ++i) b[i] = bits(problem.type, whole(i + 5));
  for (int i = 0; i < 64 * N; ++i) d[i] = static_cast<float>(whole(i + 9));
  const int detail = N + 1000 * problem.along_output + 2000 * problem.by_stores + 4000 * (K / 64);
  expect(ran([&] { return product(problem, a.data(), b.data(), d.data(), nullptr); }), "wgmma runs", detail);
  int wrong = 0;
  for (int i = 0; i < 64 * N; ++i) {
    const int m = i / N, n = i % N;
    int sum = problem.accumulate ? whole(i + 9) : 0;
    for (int k = 0; k < K; ++k) sum += whole(m * K + k) * whole((problem.along_output ? k * N + n : n * K + k) + 5);
    wrong += d[i] != static_cast<float>(sum);
  }
  expect(wrong == 0, problem.type == Type::kBFloat16 ? "wgmma bf16" : "wgmma fp16", detail);
}

void products_are_products() {
  for (const Type type : {Type::kBFloat16, Type::kFloat16}) {
    for (const int N : {128, 256}) {
      for (const bool along_output : {false, true}) {
        check_product({type, N, 64, along_output, true, true});
        check_product({type, N, 128, along_output, false, true});
        check_product({type, N, 64, along_output, false, false});
      }
    }
  }
}

// What the emulator's own tests run too: a producer and a consumer by mbarriers, setmaxnreg and a named barrier.
void warp_groups_work_together() {
  Array<int> x(128), y(128);
  for (int i = 0; i < 128; ++i) x[i] = whole(i) * 10 + i;
  expect(ran([&] { return relay(Bug::kNone, x.data(), y.data(), nullptr); }), "warp groups run");
  for (int i = 0; i < 128; ++i) expect(y[i] == x[127 - i], "named_barrier", i);
  constexpr int M = 70, N = 136, K = 456;
  Array<uint16_t> A(M * K), B(N * K);
  for (int i = 0; i < M * K; ++i) A[i] = bits(Type::kBFloat16, whole(i));
  for (int i = 0; i < N * K; ++i) B[i] = bits(Type::kBFloat16, whole(i + 5));
  for (const int with : {0, 1, 2, 3}) {
    const bool along_output = with % 2;
    const int blocks = 1 + with / 2;
    Array<float> C(M * N);
    const auto of = [](Array<uint16_t>& from) { return reinterpret_cast<const pk::bf16*>(from.data()); };
    expect(ran([&] {
             return warp_group_gemm(Bug::kNone, along_output, blocks, of(A), of(B), C.data(), M, N, K, nullptr);
           }),
           "a pipeline runs", with);
    int wrong = 0;
    for (int i = 0; i < M * N; ++i) {
      int sum = 0;
      for (int k = 0; k < K; ++k) {
        sum += whole(i / N * K + k) * whole((along_output ? k * N + i % N : i % N * K + k) + 5);
      }
      wrong += C[i] != static_cast<float>(sum);
    }
    expect(wrong == 0, "a pipeline of warp groups", with);
  }
}

void all() {
  blocks_of_a_cluster_exchange();
  boxes_are_swizzled_and_filled();
  products_are_products();
  warp_groups_work_together();
}

}  // namespace

int main() {
  if (!sm90_present()) {
    printf("gpu: no primitive of sm_90a was run: no device of compute capability 9.0\n");
    return kSkipped;
  }
#ifdef EMULATOR_BUILD
  using emulator::Copies;
  for (const emulator::Schedule schedule :
       {emulator::Schedule{0, Copies::kLate}, {0, Copies::kEarly}, {5, Copies::kRandom}, {6, Copies::kLate}}) {
    emulator::set_schedule(schedule);
    all();
  }
#else
  all();
#endif
  printf("%s: %d failures\n", kWhere, failures);
  return failures != 0;
}
