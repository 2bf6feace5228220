// batched_lora in fp64, for measuring the others against: plain loops, sums in order.
#include "batched_lora/batched_lora.h"
#include "common/activation.h"

namespace pk::batched_lora {
namespace {

const double* page_row(const void* pages, const int32_t* numbers, int64_t r, int64_t width) {
  return static_cast<const double*>(pages) + (int64_t{numbers[r / kPageRows]} * kPageRows + r % kPageRows) * width;
}

// h[r] = f(sum_k x[k] A[r, k] + a[r])
void shrink_row(const Problem& p, const Piece& piece, int64_t row, double* h) {
  const Slice& slice = p.slice[piece.slice];
  const double* x = static_cast<const double*>(p.x) + row * p.x_stride;
  const double* bias = static_cast<const double*>(slice.down_bias);
  for (int64_t r = 0; r < piece.rank; ++r) {
    const double* a = page_row(p.pages_in, piece.pages_A, r, p.K);
    double sum = 0;
    for (int64_t k = 0; k < p.K; ++k) sum += x[k] * a[k];
    if (bias != nullptr) sum += bias[piece.slot * slice.T * kPageRows + r];
    h[r] = activated(static_cast<int>(piece.activation), sum);
  }
}

void expand_row(const Problem& p, const Piece& piece, int64_t row, const double* h) {
  const Slice& slice = p.slice[piece.slice];
  double* y = static_cast<double*>(slice.y) + row * slice.y_stride;
  const double scaling = static_cast<const double*>(slice.scaling)[piece.slot];
  const double* rows = static_cast<const double*>(slice.pages_out);
  for (int64_t n = 0; n < slice.N; ++n) {
    const double bias = piece.bias < 0 ? 0 : rows[piece.bias * slice.N + n];
    double sum = piece.gain < 0 ? bias : 0;
    for (int64_t r = 0; r < piece.rank; ++r) sum += h[r] * page_row(slice.pages_out, piece.pages_B, r, slice.N)[n];
    y[n] += scaling * sum;
    if (piece.gain >= 0) y[n] = y[n] + rows[piece.gain * slice.N + n] * y[n] + scaling * bias;
  }
}

}  // namespace

void add_double(const Problem& p) {
  std::vector<double> h;
  for (int64_t i = 0; i < p.pieces; ++i) {
    const Piece& piece = p.piece[i];
    for (int64_t m = 0; m < piece.count; ++m) {
      h.resize(h.size() + piece.rank);
      shrink_row(p, piece, piece.rows[m], h.data() + h.size() - piece.rank);
    }
  }
  const double* of_row = h.data();  // in the same order
  for (int64_t i = 0; i < p.pieces; ++i) {
    const Piece& piece = p.piece[i];
    for (int64_t m = 0; m < piece.count; ++m, of_row += piece.rank) expand_row(p, piece, piece.rows[m], of_row);
  }
}

}  // namespace pk::batched_lora
