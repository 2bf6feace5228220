// Warp operations: shuffles, ballots, __syncwarp, ldmatrix and mma.sync. The last lane of the mask to arrive does the
// work for all. Fragment layouts are those of the PTX manual ("Matrix fragments for mma.m16n8k16" and k8, "ldmatrix").
#include <cstring>

#include "emulator/machine.h"
#include "emulator/race.h"

namespace emulator {
namespace {

const void* argument(int lane) {
  return machine.threads[machine.running->warp * 32 + lane].argument;
}

// Waits for all lanes of the mask, then all(mask) runs once; it finds what lane l brought by argument(l).
template <class All>
void gather(const char* operation, unsigned mask, const void* mine, Site site, All all) {
  Thread& me = *machine.running;
  Warp& warp = machine.warps[me.warp];
  if ((mask >> me.lane & 1) == 0) fail("divergent warp operation: the calling lane is not in its mask", site);
  if ((mask & ~warp.alive) != 0) {
    fail("divergent warp operation: the mask names lanes that have returned or do not exist", site);
  }
  size_t at = 0;
  while (at < warp.gatherings.size() && (warp.gatherings[at].mask & mask) == 0) ++at;
  if (at == warp.gatherings.size()) warp.gatherings.push_back({operation, mask, 0, site});
  Gathering& gathering = warp.gatherings[at];
  if (gathering.mask != mask || gathering.operation != operation || !same_site(gathering.site, site)) {
    fail("divergent warp operation: lanes of one mask are in different operations", site);
  }
  me.argument = mine;
  gathering.arrived |= 1u << me.lane;
  if (gathering.arrived != mask) return wait(operation, site);
  warp.gatherings.erase(warp.gatherings.begin() + at);
  all(mask);
  for (int l = 0; l < 32; ++l) {
    if (mask >> l & 1) machine.threads[me.warp * 32 + l].waits_for = nullptr;
  }
}

constexpr unsigned kWholeWarp = ~0u;

float widened(Format format, uint32_t bits) {
  if (format == Format::kFloat16) {
    const uint16_t half = static_cast<uint16_t>(bits);
    _Float16 value;
    memcpy(&value, &half, sizeof value);
    return static_cast<float>(value);
  }
  bits = format == Format::kBFloat16 ? bits << 16 : bits & 0xFFFFE000u;  // tf32: the hardware drops 13 bits
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Element `index` of a register array that holds 16-bit pairs, or one tf32 number per register.
float element(Format format, const uint32_t* registers, int index) {
  if (format == Format::kTf32) return widened(format, registers[index]);
  return widened(format, registers[index / 2] >> (16 * (index % 2)) & 0xFFFFu);
}

struct Product {
  float* d;
  const uint32_t *a, *b;
};

}  // namespace

void warp_barrier(unsigned mask, Site site) {
  gather("__syncwarp", mask, nullptr, site, [](unsigned lanes) { race::warp_barrier(lanes); });
}

void shuffle(unsigned mask, void* result, const void* value, size_t bytes, int source, Site site) {
  struct Exchange {
    void* result;
    const void* value;
    int source;
  } const mine{result, value, source};
  gather("__shfl_sync", mask, &mine, site, [&](unsigned lanes) {
    for (int l = 0; l < 32; ++l) {
      if ((lanes >> l & 1) == 0) continue;
      const Exchange& to = *static_cast<const Exchange*>(argument(l));
      if ((lanes >> to.source & 1) == 0) fail("a shuffle reads a lane outside its mask", site);
      memcpy(to.result, static_cast<const Exchange*>(argument(to.source))->value, bytes);
    }
  });
}

unsigned ballot(unsigned mask, bool vote, Site site) {
  struct Ballot {
    bool vote;
    unsigned result;
  } mine{vote, 0};
  gather("__ballot_sync", mask, &mine, site, [](unsigned lanes) {
    unsigned result = 0;
    for (int l = 0; l < 32; ++l) {
      if (lanes >> l & 1) result |= static_cast<unsigned>(static_cast<const Ballot*>(argument(l))->vote) << l;
    }
    for (int l = 0; l < 32; ++l) {
      if (lanes >> l & 1) static_cast<Ballot*>(const_cast<void*>(argument(l)))->result = result;
    }
  });
  return mine.result;
}

void load_matrices(uint32_t* result, int count, const void* row, bool transposed, Site site) {
  struct Rows {
    uint16_t row[8];
    uint32_t* result;
  } mine{{}, result};
  if (lane() < 8 * count) {  // lane l brings row l % 8 of matrix l / 8
    check_shared(row, 16, 16, "ldmatrix", site);
    check_access(row, 16, false);
    race::access(row, 16, race::Kind::kRead, __builtin_return_address(0));
    memcpy(mine.row, row, sizeof mine.row);
  }
  gather("ldmatrix", kWholeWarp, &mine, site, [=](unsigned) {
    auto value = [](int matrix, int r, int c) {
      return static_cast<uint32_t>(static_cast<const Rows*>(argument(8 * matrix + r))->row[c]);
    };
    for (int l = 0; l < 32; ++l) {
      uint32_t* to = static_cast<const Rows*>(argument(l))->result;
      const int r = l / 4, c = l % 4 * 2;
      for (int m = 0; m < count; ++m) {
        to[m] = transposed ? value(m, c, r) | value(m, c + 1, r) << 16 : value(m, r, c) | value(m, r, c + 1) << 16;
      }
    }
  });
}

// d += a b, a [16, depth], b [depth, 8]. Lane l holds, of every 8 rows of a and of every 8 columns of b, number l / 4,
// and of every half of depth (8 deep for 16-bit types, 4 for tf32) the elements from (l % 4) * width on.
void multiply(Format format, int depth, float* d, const uint32_t* a, const uint32_t* b, Site site) {
  const Product mine{d, a, b};
  gather(format == Format::kTf32 ? "mma.sync tf32" : "mma.sync", kWholeWarp, &mine, site, [=](unsigned) {
    float left[16][16], right[16][8], sum[16][8];
    const int half = depth / 2, width = half / 4;
    for (int l = 0; l < 32; ++l) {
      const Product& of = *static_cast<const Product*>(argument(l));
      const int g = l / 4, t = l % 4;
      for (int h = 0; h < 2; ++h) {
        for (int e = 0; e < width; ++e) {
          const int k = h * half + t * width + e;
          left[g][k] = element(format, of.a, 2 * h * width + e);
          left[g + 8][k] = element(format, of.a, (2 * h + 1) * width + e);
          right[k][g] = element(format, of.b, h * width + e);
        }
        for (int e = 0; e < 2; ++e) sum[g + 8 * h][2 * t + e] = of.d[2 * h + e];
      }
    }
    for (int k = 0; k < depth; ++k) {
      for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 8; ++j) sum[i][j] += left[i][k] * right[k][j];
      }
    }
    for (int l = 0; l < 32; ++l) {
      float* to = static_cast<const Product*>(argument(l))->d;
      for (int i = 0; i < 4; ++i) to[i] = sum[l / 4 + 8 * (i / 2)][l % 4 * 2 + i % 2];
    }
  });
}

}  // namespace emulator
