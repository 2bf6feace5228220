// The device primitives of csrc/common against what the PTX manual says they do, in the emulator and, by the same
// program, on a GPU: who passes both has emulator == GPU. Small whole numbers, so that sums are exact in any order.
#include <cstdio>
#include <cstring>

#include "tests/device_array.h"
#include "tests/primitives_kernels.h"

using namespace pk::test;

namespace {

int failures = 0;

void expect(bool condition, const char* what, int detail = 0) {
  if (condition) return;
  ++failures;
  printf("FAILED %s: %s %d\n", kWhere, what, detail);
}

void ldmatrix_follows_the_manual() {
  Array<uint16_t> matrices(4 * 64);
  for (int i = 0; i < 4 * 64; ++i) matrices[i] = static_cast<uint16_t>(i * 251 + 17);
  for (const int count : {1, 2, 4}) {
    for (const bool transposed : {false, true}) {
      Array<uint32_t> out(count * 32);
      bool right = ran([&] { return load_matrices(count, transposed, matrices.data(), out.data()); });
      for (int i = 0; i < count * 32; ++i) {
        const int m = i / 32, r = i % 32 / 4, c = i % 4 * 2;
        const uint32_t low = matrices[m * 64 + (transposed ? c * 8 + r : r * 8 + c)];
        const uint32_t high = matrices[m * 64 + (transposed ? (c + 1) * 8 + r : r * 8 + c + 1)];
        right = right && out[i] == (low | high << 16);
      }
      expect(right, transposed ? "ldmatrix_trans" : "ldmatrix", count);
    }
  }
}

void products_are_products() {
  Array<uint16_t> a(16 * 16), b(16 * 8);
  Array<float> d(16 * 8);
  for (const Type type : {Type::kBFloat16, Type::kFloat16}) {
    for (const bool transposed : {false, true}) {
      for (int i = 0; i < 16 * 16; ++i) a[i] = bits(type, whole(i));
      for (int i = 0; i < 16 * 8; ++i) b[i] = bits(type, whole(i + 5));
      for (int i = 0; i < 16 * 8; ++i) d[i] = static_cast<float>(whole(i + 9));
      bool right = ran([&] { return multiply(type, transposed, a.data(), b.data(), d.data()); });
      for (int i = 0; i < 16 * 8; ++i) {
        int sum = whole(i + 9);
        for (int k = 0; k < 16; ++k)
          sum += whole(i / 8 * 16 + k) * whole((transposed ? k * 8 + i % 8 : i % 8 * 16 + k) + 5);
        right = right && d[i] == static_cast<float>(sum);
      }
      expect(right, type == Type::kBFloat16 ? "mma bf16" : "mma fp16", transposed);
    }
  }
}

void tf32_drops_thirteen_bits() {
  Array<float> a(16 * 8), b(8 * 8), d(16 * 8);
  for (int i = 0; i < 16 * 8; ++i) a[i] = static_cast<float>(whole(i)) * (1.f + 0x1p-11f);  // the last part is dropped
  for (int i = 0; i < 8 * 8; ++i) b[i] = static_cast<float>(whole(i + 5));
  for (int i = 0; i < 16 * 8; ++i) d[i] = static_cast<float>(whole(i + 9));
  bool right = ran([&] { return multiply_tf32(a.data(), b.data(), d.data()); });
  for (int i = 0; i < 16 * 8; ++i) {
    int sum = whole(i + 9);
    for (int k = 0; k < 8; ++k) sum += whole(i / 8 * 8 + k) * whole(k * 8 + i % 8 + 5);
    right = right && d[i] == static_cast<float>(sum);
  }
  expect(right, "mma tf32");
}

void copies_fill_with_zeros() {
  Array<uint8_t> from(32 * 16);
  for (int i = 0; i < 32 * 16; ++i) from[i] = static_cast<uint8_t>(i % 255 + 1);
  for (const int size : {4, 8, 16}) {
    Array<uint8_t> to(32 * size);
    bool right = ran([&] { return copy(size, from.data(), to.data()); });
    for (int i = 0; i < 32 * size; ++i) {
      const int lane = i / size, valid = lane % (size + 1);
      right = right && to[i] == (i % size < valid ? from[i] : 0);
    }
    expect(right, "cp.async", size);
  }
}

void lanes_exchange() {
  Array<int> x(32), out(kExchanges * 32);
  int sum = 0, most = -100;
  unsigned positive = 0;
  for (int l = 0; l < 32; ++l) {
    x[l] = whole(l) * 10 + l % 3;
    sum += x[l];
    most = x[l] > most ? x[l] : most;
    positive |= static_cast<unsigned>(x[l] > 0) << l;
  }
  expect(ran([&] { return exchange(x.data(), out.data()); }), "exchange runs");
  for (int l = 0; l < 32; ++l) {
    const int first = l / 4 * 4;
    const int expected[kExchanges] = {x[l ^ 5],
                                      x[l < 3 ? l : l - 3],
                                      x[l > 28 ? l : l + 3],
                                      x[7],
                                      x[l ^ 1],
                                      x[l % 8 < 2 ? l : l - 2],
                                      sum,
                                      x[first] + x[first + 1] + x[first + 2] + x[first + 3],
                                      most,
                                      static_cast<int>(positive),
                                      positive != 0,
                                      positive == ~0u};
    for (int i = 0; i < kExchanges; ++i) expect(out[i * 32 + l] == expected[i], "exchange", i);
  }
}

}  // namespace

int main() {
  if (!device_present()) {
    printf("gpu: 0 of 5 primitives run: no device\n");
    return kSkipped;
  }
  ldmatrix_follows_the_manual();
  products_are_products();
  tf32_drops_thirteen_bits();
  copies_fill_with_zeros();
  lanes_exchange();
  printf("%s: %d failures\n", kWhere, failures);
  return failures != 0;
}
