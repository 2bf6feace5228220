// batched_lora in fp64, for measuring the others against: plain loops, sums in order.
#include "batched_lora/batched_lora.h"

namespace pk::batched_lora {
namespace {

const double* page_row(const void* pages, const int32_t* numbers, int64_t r, int64_t width) {
  return static_cast<const double*>(pages) + (int64_t{numbers[r / kPageRows]} * kPageRows + r % kPageRows) * width;
}

void add_row(const Problem& p, const Piece& piece, int64_t row, std::vector<double>& h) {
  const Slice& slice = p.slice[piece.slice];
  const double* x = static_cast<const double*>(p.x) + row * p.x_stride;
  double* y = static_cast<double*>(slice.y) + row * slice.y_stride;
  const double scaling = static_cast<const double*>(slice.scaling)[piece.slot];
  const double* rows = static_cast<const double*>(slice.pages_out);
  h.assign(piece.rank, 0);
  for (int64_t r = 0; r < piece.rank; ++r) {
    const double* a = page_row(p.pages_in, piece.pages_A, r, p.K);
    for (int64_t k = 0; k < p.K; ++k) h[r] += x[k] * a[k];
  }
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
    for (int64_t m = 0; m < p.piece[i].count; ++m) add_row(p, p.piece[i], p.piece[i].rows[m], h);
  }
}

}  // namespace pk::batched_lora
