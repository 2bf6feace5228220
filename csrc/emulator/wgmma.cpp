// wgmma: products of a warp group that run while its threads go on. Each thread asks by itself; a product is asked for
// when all 128 have, and it is done at the wait that covers its group. Its operands are read then, or at once (the
// schedule's copies say which); until then its accumulators are NaN for the threads. Descriptors are decoded as the PTX
// manual has them ("Matrix descriptor", "Strides", 128-byte swizzle); sums are in the order of k.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>

#include "emulator/cluster.h"
#include "emulator/race.h"
#include "emulator/sm90.h"

namespace emulator {
namespace {

constexpr int kRows = 64, kDepth = 16, kMostColumns = 256, kChunk = 8;  // a chunk: 16 bytes
constexpr uint32_t kFirstAddress = 1024;  // of a block's own; the system has the first KiB

// The d of all threads, as a matrix, from the first product that is asked for until the last is done.
struct Accumulators {
  float* of_thread[kGroupThreads];
  int columns, products;  // products: asked for and not done
  float sum[kRows][kMostColumns];
};

struct Product {
  Format format;
  int columns, group, asked;  // asked: by so many threads
  bool b_along_output, accumulate, added;
  uint64_t a, b;
  Site site;
  Accumulators* to;
};

struct State {  // of a warp group
  std::deque<Product> products;
  size_t done;  // products that were before them
  int groups;   // that are done
  int agent;
  std::vector<std::unique_ptr<Accumulators>> used, free;
};

struct Progress {  // of a thread
  size_t asked;
  int committed;
  bool fenced, uncommitted;
};

State states[kMostGroups * pk::kMostClusterBlocks];
std::vector<Progress> progress;

// -- operands ---------------------------------------------------------------------------------------------------------

struct Operand {
  uint32_t start, leading, stride;
};

Operand decoded(uint64_t descriptor, bool along_output, Site site) {
  if (descriptor >> 62 != 1) fail("wgmma: a descriptor without the 128-byte swizzle", site);
  if ((descriptor >> 49 & 7) != 0) fail("wgmma: a descriptor with a base offset", site);
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3FFF) << 4; };
  const Operand operand{field(0), field(16), field(32)};
  const uint32_t within = operand.start % 1024;
  if (along_output ? within != 0 : within % 32 != 0 || within >= 128) {
    fail("misaligned wgmma: a tile begins at a multiple of 1024 bytes, and a step stays within its row", site);
  }
  if (operand.stride == 0 || operand.stride % 1024 != 0 || (along_output && operand.leading % 1024 != 0)) {
    fail("wgmma: a descriptor whose offsets are not multiples of 1024 bytes", site);
  }
  return operand;
}

// What has the address kFirstAddress: a multiple of 1024 bytes, before dynamic shared memory that is aligned to less.
const char* origin() {
  const char* const begin = dynamic_range().begin;
  return begin - reinterpret_cast<uintptr_t>(begin) % 1024;
}

// 16 bytes at an address before the swizzle.
const char* chunk_at(uint32_t address, Site site) {
  const uint32_t swizzled = address ^ (address >> 7 & 7) << 4;
  const char* const place = origin() + swizzled - kFirstAddress;
  if (!dynamic_range().holds(place, 16)) {
    fail("out of bounds: wgmma reads outside of the block's dynamic shared memory", site);
  }
  return place;
}

float widened(Format format, uint16_t bits) {
  if (format == Format::kFloat16) {
    _Float16 half;
    memcpy(&half, &bits, sizeof half);
    return static_cast<float>(half);
  }
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

// visit(chunk, output, k, along output) for each 16 bytes of an operand of `outputs` rows (of a) or columns (of b).
template <class Visit>
void for_each_chunk(uint64_t descriptor, bool along_output, int outputs, Site site, Visit visit) {
  const Operand operand = decoded(descriptor, along_output, site);
  if (along_output) {
    for (int k = 0; k < kDepth; ++k) {
      for (int n = 0; n < outputs; n += kChunk) {
        const uint32_t column = n / 64 * operand.leading + n % 64 * 2;
        visit(chunk_at(operand.start + column + k / 8 * operand.stride + k % 8 * 128, site), n, k);
      }
    }
  } else {
    for (int n = 0; n < outputs; ++n) {
      for (int k = 0; k < kDepth; k += kChunk) {
        visit(chunk_at(operand.start + n / 8 * operand.stride + n % 8 * 128 + k * 2, site), n, k);
      }
    }
  }
}

// -- the product ------------------------------------------------------------------------------------------------------

template <int kColumns>
void add(const float (&a)[kRows][kDepth], const float (&b)[kDepth][kMostColumns], float (&sum)[kRows][kMostColumns]) {
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < kDepth; ++k) {
      for (int c = 0; c < kColumns; ++c) sum[r][c] += a[r][k] * b[k][c];
    }
  }
}

void compute(Product& product) {
  static float a[kRows][kDepth], b[kDepth][kMostColumns];
  const Format format = product.format;
  for_each_chunk(product.a, false, kRows, product.site, [&](const char* chunk, int row, int k) {
    uint16_t bits[kChunk];
    memcpy(bits, chunk, sizeof bits);
    for (int i = 0; i < kChunk; ++i) a[row][k + i] = widened(format, bits[i]);
  });
  const int along_output = product.b_along_output, along_k = 1 - along_output;
  for_each_chunk(product.b, product.b_along_output, product.columns, product.site,
                 [&](const char* chunk, int column, int k) {
                   uint16_t bits[kChunk];
                   memcpy(bits, chunk, sizeof bits);
                   for (int i = 0; i < kChunk; ++i) {
                     b[k + along_k * i][column + along_output * i] = widened(format, bits[i]);
                   }
                 });
  if (!product.accumulate) memset(product.to->sum, 0, sizeof product.to->sum);
  if (product.columns == 128) {
    add<128>(a, b, product.to->sum);
  } else {
    add<256>(a, b, product.to->sum);
  }
  product.added = true;
}

// -- accumulators -----------------------------------------------------------------------------------------------------

// Number i of thread t of the warp group, as wgmma.h has it.
float& element(Accumulators& accumulators, int t, int i) {
  return accumulators.sum[t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8][i / 4 * 8 + t % 4 * 2 + i % 2];
}

// Those that thread t calls d, if products on them are under way.
Accumulators* find(const State& state, int t, const float* d) {
  for (const auto& used : state.used) {
    if (used->of_thread[t] == d) return used.get();
  }
  return nullptr;
}

Accumulators* take(State& state, int columns) {
  if (state.free.empty()) state.free.push_back(std::make_unique<Accumulators>());
  state.used.push_back(std::move(state.free.back()));
  state.free.pop_back();
  Accumulators* const taken = state.used.back().get();
  memset(taken->of_thread, 0, sizeof taken->of_thread);
  taken->columns = columns;
  taken->products = 0;
  return taken;
}

void give_back(State& state, Accumulators* accumulators) {
  for (int t = 0; t < kGroupThreads; ++t) {
    for (int i = 0; i < accumulators->columns / 2; ++i) accumulators->of_thread[t][i] = element(*accumulators, t, i);
  }
  const auto at =
      std::find_if(state.used.begin(), state.used.end(), [&](auto& used) { return used.get() == accumulators; });
  state.free.push_back(std::move(*at));
  state.used.erase(at);
}

void lend(Accumulators& accumulators, int t, float* d) {
  if (accumulators.of_thread[t] == d) return;
  accumulators.of_thread[t] = d;
  for (int i = 0; i < accumulators.columns / 2; ++i) element(accumulators, t, i) = d[i];
  std::fill_n(d, accumulators.columns / 2, std::numeric_limits<float>::quiet_NaN());
}

bool early() {
  const Copies when = machine.schedule.copies;
  return when == Copies::kEarly || (when == Copies::kRandom && random_number() % 2 == 0);
}

// All threads have asked for it.
void begin(State& state, Product& product, const void* pc) {
  if constexpr (race::kOn) {
    const auto read = [&](const char* chunk, int, int) {
      race::product(chunk, kChunk * 2, state.agent, product.group + 1, pc);
    };
    for_each_chunk(product.a, false, kRows, product.site, read);
    for_each_chunk(product.b, product.b_along_output, product.columns, product.site, read);
  }
  if (!early()) return;
  for (Product& earlier : state.products) {  // in order: the first of a sum may be the one that begins it
    if (!earlier.added) compute(earlier);
    if (&earlier == &product) return;
  }
}

}  // namespace

void start_products() {
  for (State& state : states) {
    state.products.clear();
    state.done = 0;
    state.groups = 0;
    state.agent = -1;
    state.used.clear();
  }
  progress.assign(machine.blocks.size() * machine.block_fibers, Progress{});
}

void check_products() {
  const Progress& mine = progress[machine.running->number];
  if (mine.uncommitted) fail("a thread returns with wgmma in flight: wgmma_commit is missing", {nullptr, 0});
  if (mine.asked == 0) return;
  const State& state = states[my_group({nullptr, 0}).number];
  if (mine.committed > state.groups) {
    fail("a thread returns with wgmma in flight: no wgmma_wait covers it", {nullptr, 0});
  }
}

uint32_t shared_address(const void* place, Site site) {
  if (!dynamic_range().holds(place)) {
    fail("out of bounds: wgmma_operand outside of the block's dynamic shared memory", site);
  }
  return static_cast<uint32_t>(static_cast<const char*>(place) - origin()) + kFirstAddress;
}

void product_fence(Site site) {
  my_group(site);
  progress[machine.running->number].fenced = true;
}

void product_commit(Site site) {
  my_group(site);
  Progress& mine = progress[machine.running->number];
  ++mine.committed;
  mine.uncommitted = false;
}

void start_product(Format format, int columns, bool b_along_output, float* d, uint64_t a, uint64_t b, bool accumulate,
                   Site site) {
  Group& group = my_group(site);
  State& state = states[group.number];
  Progress& mine = progress[machine.running->number];
  const int t = number_in_block(*machine.running) % kGroupThreads;
  if (!mine.fenced) fail("wgmma without wgmma_fence before the first or after a wait", site);
  if (mine.asked - state.done == state.products.size()) {
    Accumulators* to = find(state, t, d);
    if (to == nullptr) to = take(state, columns);
    ++to->products;
    state.products.push_back({format, columns, mine.committed, 0, b_along_output, accumulate, false, a, b, site, to});
  }
  Product& product = state.products[mine.asked - state.done];
  float* const held = product.to->of_thread[t];
  if (product.format != format || product.columns != columns || product.b_along_output != b_along_output ||
      product.a != a || product.b != b || product.accumulate != accumulate || product.group != mine.committed ||
      !same_site(product.site, site) || (held != nullptr && held != d) || product.to->columns != columns) {
    fail("divergent warp group: its threads ask for different products", site);
  }
  lend(*product.to, t, d);
  ++mine.asked;
  mine.uncommitted = true;
  if (++product.asked < kGroupThreads) return;
  if (state.agent < 0) state.agent = race::new_agent();
  begin(state, product, __builtin_return_address(0));
}

void product_wait(int groups_left, Site site) {
  Group& group = my_group(site);
  if (progress[machine.running->number].uncommitted)
    fail("wgmma_wait before wgmma_commit: a product in no group", site);
  if (!gather_group(group, "wgmma_wait", site)) return;
  State& state = states[group.number];
  const Progress& mine = progress[machine.running->number];
  for (int t = 0; t < kGroupThreads; ++t) {
    const Progress& other = progress[thread_of(group, t).number];
    if (other.asked != mine.asked || other.committed != mine.committed) {
      fail("divergent warp group: its threads have asked for different numbers of products", site);
    }
  }
  state.groups = std::max(state.groups, mine.committed - groups_left);
  while (!state.products.empty() && state.products.front().group < state.groups) {
    Product& product = state.products.front();
    if (!product.added) compute(product);
    if (--product.to->products == 0) give_back(state, product.to);
    state.products.pop_front();
    ++state.done;
  }
  for (int t = 0; t < kGroupThreads; ++t) {
    const int number = thread_of(group, t).number;
    progress[number].fenced = false;
    if (state.agent >= 0) race::learn(number, state.agent, state.groups);
  }
}

}  // namespace emulator
