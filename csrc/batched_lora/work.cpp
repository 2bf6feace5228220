// From a route and the pool's tables to the pieces that the kernels run over, with every number checked on the way.
#include <type_traits>
#include <utility>

#include "batched_lora/batched_lora.h"
#include "common/activation.h"

namespace pk::batched_lora {
namespace {

template <class... Parts>
std::string text(const Parts&... parts) {
  std::string out;
  const auto add = [&](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>) {
      out += std::to_string(part);
    } else {
      out += part;
    }
  };
  (add(parts), ...);
  return out;
}

std::string bad_route(const Problem& p) {
  const int32_t* route = p.route;
  const int64_t tiles = route[kTilesUsed], capacity = tile_capacity(p.M, p.slots);
  if (route[kRouteRows] != p.M || route[kRouteAdapters] != p.slots) {
    return text("route must be made for ", p.M, " rows and ", p.slots, " adapters, got ", route[kRouteRows], " and ",
                route[kRouteAdapters]);
  }
  if (tiles < 0 || tiles > capacity) {
    return text("route must use 0 to ", capacity, " tiles, got ", tiles);
  }
  const int32_t* order = route + kRouteHeader + p.M;
  const int32_t* tile = order + p.M;
  std::vector<bool> taken(p.M);  // two tiles with one row would be two threads on one row of y
  for (int64_t t = 0; t < tiles; ++t, tile += kTileFields) {
    const int64_t slot = tile[kTileAdapter], first = tile[kTileFirst], rows = tile[kTileRows];
    if (slot < 0 || slot >= p.slots || rows < 1 || rows > kTile || first < 0 || first + rows > p.M) {
      return text("route has a tile outside its rows or adapters: (", slot, ", ", first, ", ", rows, ")");
    }
    for (int64_t i = first; i < first + rows; ++i) {
      const int64_t row = order[i];
      if (row < 0 || row >= p.M || taken[row]) return text("route names row ", row, " twice or out of range");
      taken[row] = true;
    }
  }
  return "";
}

// Copies the page numbers of a table row to the end of `numbers`, A's and then B^T's, and checks the copies: the pool
// may be rewriting the row of a slot that nobody pinned.
std::string take_row(const Problem& p, int64_t g, const int32_t* row, Piece& piece, std::vector<int32_t>& numbers) {
  const Slice& slice = p.slice[g];
  const int64_t rank = piece.rank = row[kTableRank];
  if (rank < 0 || rank > slice.T * kPageRows) {
    return text("table[", g, "] must have ranks from 0 to ", slice.T * kPageRows, ", got ", rank);
  }
  if (rank == 0) return "";
  piece.bias = row[kTableBias];
  piece.gain = row[kTableGain];
  piece.activation = row[kTableActivation];
  if (piece.activation < 0 || piece.activation >= kActivations) {
    return text("table[", g, "] must have activations from 0 to ", kActivations - 1, ", got ", piece.activation);
  }
  for (const auto& [number, name] : {std::pair{piece.bias, "bias"}, std::pair{piece.gain, "gain"}}) {
    if (number >= -1 && number < slice.pages * kPageRows) continue;
    return text("table[", g, "] must have ", name, " rows from -1 to ", slice.pages * kPageRows - 1, ", got ", number);
  }
  const auto take = [&](const int32_t* from, int64_t pages, const char* name) -> std::string {
    for (int64_t q = 0; q < piece.pages(); ++q) {
      numbers.push_back(from[q]);
      if (numbers.back() < 0 || numbers.back() >= pages) {
        return text("table[", g, "] must name pages from 0 to ", pages - 1, " of ", name, ", got ", numbers.back());
      }
    }
    return "";
  };
  const std::string wrong = take(row + kTablePages, p.pages, "pages_in");
  return wrong.empty() ? take(row + kTablePages + slice.T, slice.pages, "pages_out") : wrong;
}

int64_t widest_block(int64_t rows, int64_t N) {
  int64_t block = kBlock;
  while (block < kWidest && block < N && 2 * block * rows <= kTile * kBlock) block *= 2;
  return block;
}

}  // namespace

std::string make_work(const Problem& p, int64_t parts, Work& work) {
  work = {};
  std::string wrong = bad_route(p);
  if (!wrong.empty()) return wrong;
  const int32_t* order = p.route + kRouteHeader + p.M;
  const int32_t* tile = order + p.M;
  int64_t pages = 0, blocks = 0;
  work.pieces.reserve(p.route[kTilesUsed] * p.G);
  for (int64_t t = 0; t < p.route[kTilesUsed]; ++t, tile += kTileFields) {
    for (int64_t g = 0; g < p.G; ++g) {
      const int32_t* row = p.slice[g].table + tile[kTileAdapter] * (kTablePages + 2 * p.slice[g].T);
      Piece piece{};
      wrong = take_row(p, g, row, piece, work.numbers);
      if (!wrong.empty()) return wrong;
      if (piece.rank == 0) continue;
      piece.rows = order + tile[kTileFirst];
      piece.count = tile[kTileRows];
      piece.slot = tile[kTileAdapter];
      piece.slice = g;
      piece.block = widest_block(piece.count, p.slice[g].N);
      blocks += ceil_div(p.slice[g].N, piece.block);
      pages += piece.pages();
      work.activates = work.activates || piece.activation != kIdentity || p.slice[g].down_bias != nullptr;
      work.multiplications += piece.count * piece.rank * (p.K + p.slice[g].N);
      work.pieces.push_back(piece);
    }
  }
  work.parts = parts > 0 ? parts : pages < kFewUnits ? p.chunks() : 1;
  const int32_t* numbers = work.numbers.data();
  for (Piece& piece : work.pieces) {
    if (blocks < kFewUnits) piece.block = kBlock;
    piece.pages_A = numbers;
    piece.pages_B = numbers += piece.pages();
    numbers += piece.pages();
    piece.shrink = work.shrink_units;
    piece.expand = work.expand_units;
    piece.h = work.h_floats;
    work.shrink_units += piece.pages() * work.parts;
    work.expand_units += ceil_div(p.slice[piece.slice].N, piece.block);
    work.h_floats += work.parts * piece.count * piece.pages() * kPageRows;
  }
  return "";
}

}  // namespace pk::batched_lora
