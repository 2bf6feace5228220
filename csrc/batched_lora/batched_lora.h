// batched_lora on the CPU, free of torch: what many adapters add to one batch, in place.
//   y_g[i] += s (sum_r h[i, r] B^T[r] + b),  h[i, r] = f(sum_k x[i, k] A[r, k] + a[r])     all of the slot of row i
//   y_g[i] <- (1 + d) (y_g[i] + s sum_r h[i, r] B^T[r]) + s b                    where the slot has a gain 1 + d
// LoRA: f is the identity, without a. x may lie where a y lies: all of it is read before any y is written.
// M rows of x, K in_features, N_g out_features of slice g, R rank of a slot in a slice (0: it does not touch the
// slice). Pool: pages of kPageRows rank rows; A has rows of K, B^T rows of N. Accumulation is fp32 for fp32, fp16 and
// bf16.
//
// A route sorts rows by slot and cuts them into tiles of up to kTile rows of one slot. A tile and a slice make a Piece;
//   shrink   unit: one piece, one page of A, all of K or one chunk of it   -> h
//   activate unit: one piece, where its slot has f or its slice a          -> h
//   expand   unit: one piece, a block of columns of y                      -> y
// so every factor is read from memory once per tile, in long runs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/dtype.h"

namespace pk::batched_lora {

// A route: header, ids [M], order [M], tiles [capacity][kTileFields]; see peft_kernels/ops/batched_lora/route.py.
constexpr int64_t kTile = 16;  // the most rows of a tile
constexpr int64_t kRouteHeader = 8, kTileFields = 3;
enum RouteField { kTilesUsed, kRowsRouted, kBadIds, kRouteRows, kRouteAdapters };
enum TileField { kTileAdapter, kTileFirst, kTileRows };

constexpr int64_t tile_capacity(int64_t M, int64_t adapters) {
  return (M < adapters ? M : adapters) + M / kTile;
}
constexpr int64_t route_size(int64_t M, int64_t adapters) {
  return kRouteHeader + 2 * M + tile_capacity(M, adapters) * kTileFields;
}

// A table row: rank, row of the bias (or -1), row of the gain minus one (or -1), f, T pages of A and T pages of B^T.
constexpr int64_t kPageRows = 8;
enum TableField { kTableRank, kTableBias, kTableGain, kTableActivation, kTablePages };

constexpr int64_t kChunk = 512;    // elements of K that are summed on their own; the sums are added in order
constexpr int64_t kBlock = 512;    // columns of y in one unit, at least: for kTile rows
constexpr int64_t kWidest = 4096;  // and at most, for few rows: a processor's prefetcher wants long runs
constexpr int64_t kFewUnits = 32;  // with fewer units than that they are cut smaller, the shrink along K too

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

struct Slice {            // one y, sharing x with the others
  int64_t N;              // out_features
  const void* pages_out;  // [pages][kPageRows][N]
  int64_t pages;
  void* y;  // [M, N], rows y_stride apart
  int64_t y_stride;
  const int32_t* table;  // [slots][kTablePages + 2 T]
  int64_t T;
  const void* scaling;    // [slots], fp32 (fp64 for fp64)
  const void* down_bias;  // [slots][kPageRows T], as scaling; null: no slot has an a
};

struct Piece {          // the rows of one tile in one slice
  const int32_t* rows;  // numbers of rows of x and y
  int64_t count;
  int64_t slot, slice, rank, bias, gain, activation;
  const int32_t* pages_A;
  const int32_t* pages_B;
  int64_t block;           // columns of y in one unit: kBlock times a power of 2, at most kTile kBlock / count
  int64_t h;               // floats before its h, [parts][count][kPageRows * pages()]
  int64_t shrink, expand;  // its first unit of each phase

  int64_t pages() const { return ceil_div(rank, kPageRows); }
};

struct Work {
  std::vector<Piece> pieces;
  std::vector<int32_t> numbers;  // of pages; pieces point into it
  int64_t parts = 1, h_floats = 0, shrink_units = 0, expand_units = 0, multiplications = 0;
  bool activates = false;  // whether some piece needs the phase
};

struct Problem {
  int64_t M, K, G, slots;
  const Slice* slice;  // [G]
  const void* x;       // [M, K], rows x_stride apart
  int64_t x_stride;
  const void* pages_in;  // [pages][kPageRows][K]
  int64_t pages;
  const int32_t* route;
  const Piece* piece;  // [pieces], of its Work
  int64_t pieces;
  int64_t parts;  // of h: 1, or one for each chunk of K
  float* h;

  int64_t chunks() const { return ceil_div(K, kChunk); }
  void use(const Work& work, float* h_floats) {
    piece = work.pieces.data();
    pieces = static_cast<int64_t>(work.pieces.size());
    parts = work.parts;
    h = h_floats;
  }
};

// The pieces of a problem whose other fields are set. Every number of the route and of the table rows that it names is
// checked, because kernels turn them into addresses: returns what is wrong, or an empty text. parts: 0 chooses.
std::string make_work(const Problem& problem, int64_t parts, Work& work);

// A range of units [begin, end) of one phase.
using Phase = void (*)(const Problem&, int64_t begin, int64_t end);

struct Kernels {
  Phase shrink;    // see above
  Phase sum;       // unit: one piece; where h has parts, adds them in order
  Phase activate;  // unit: one piece; does nothing to one without f and a
  Phase expand;
};

struct Table {                                // everything of one instruction set
  Kernels float32, float16, bfloat16;         // x and pages of one type
  Kernels float16_float32, bfloat16_float32;  // fp32 pages
};

const Table& table();  // of the instruction set in use, see common/instruction_set.h

const Kernels* kernels(Dtype x, Dtype pages);  // null: no kernels for the pair

void add_double(const Problem& problem);  // fp64 throughout: plain loops

}  // namespace pk::batched_lora
