// A base product whose contraction goes on over the adapters' operands (concat_operands_sm90.cu):
//   out[i, j] = (out[i, j] +) sum over segments s, c: left_s[i, c] right_s(c, j)  + biases[j]
// left_s [I, C_s]; right_s [J, C_s] (y: W, and B's parts) or [C_s, J] (dx: W, and A's parts); T, those of the adapters
// bf16. With dropout, in dx, the adapters' segment comes first, the sums are masked, and the base segments follow.
// fp32 accumulation (wgmma), rounded once to T.
// Grid: at most call.blocks blocks, in clusters of 1 or 2; cluster c of n has the tiles c, c + n ..., one of 128 x
// kCols for each of its blocks, one above the other, numbered so that tiles of the same time share rows and columns in
// the L2. 384 threads: one of the first warp group has TMA fill a ring of stages of 64 columns of the contraction,
// while the stores of a tile run as well; the other two groups multiply 64 rows each. Each block of a cluster
// loads half of the tile of right, for both. Every stage has two mbarriers: `full` counts the bytes of its tiles,
// `empty` the warps that have read them. With adapters the launch overlaps the end of concat_operands: a block needs
// nearly all registers of a multiprocessor, which must have drained; it waits where it reads those operands.
#include "common/cluster.h"
#include "common/tma.h"
#include "common/wgmma.h"
#include "lora_linear/concat_tile.h"

namespace pk::lora_linear {

namespace {

constexpr int kRows = 128, kDepth = kSwizzledColumns, kStep = 16;  // of a tile; of a stage; of a wgmma
constexpr int kGroup = 128, kThreads = 3 * kGroup, kReaders = 8;   // threads of a warp group; warps that multiply
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;   // 128 (40 + 2 * 232) <= 65536
constexpr int kTallestGroup = 16;                                  // tiles one above the other that follow each other

template <int kCols>
struct Shape {
  static constexpr int kStages = kCols == 256 ? 4 : 6;
  static constexpr int kLeftBytes = kRows * kDepth * 2, kStageBytes = kLeftBytes + kCols * kDepth * 2;
  static constexpr int kPieces = kStages * kStageBytes, kBarriers = kPieces + kReaders * kPiece * 2;  // in bytes
  static constexpr int kShared = kBarriers + 2 * kStages * static_cast<int>(sizeof(Mbarrier));
  static_assert(kShared <= static_cast<int>(kMostSharedSm90), "what a block may have");
};

struct Segment {
  TensorMap left, right;
  int columns;
};

struct Plan {
  Segment segment[kMostConcatMembers + 1];
  int segments, adapters;            // `adapters` is the adapters' one, or -1
  int blocks, row_tiles, col_tiles;  // blocks: of a cluster; row_tiles: of clusters
  ConcatOut out;
  bool masked;
  Keep keep;
  const uint64_t* seed;
};

// Of the block's own tile. Tiles go down kTallestGroup rows of tiles, then one to the right. The last row of clusters'
// tiles may leave the second block nothing inside of out: it loads zeros and its half of right, and stores nothing.
template <int kCols>
__device__ __forceinline__ TilePlace place_of(const Plan& plan, int tile) {
  const int tallest = kTallestGroup / plan.blocks, of_group = tallest * plan.col_tiles;
  const int first = tile / of_group * tallest, rest = tile % of_group;
  const int height = plan.row_tiles - first < tallest ? plan.row_tiles - first : tallest;
  return {((first + rest % height) * plan.blocks + cluster_rank()) * kRows, rest / height * kCols};
}

// The tiles of the block's cluster: first, and those that all clusters have at a time.
struct Walk {
  int first, step, end;

  __device__ __forceinline__ explicit Walk(const Plan& plan)
      : first(static_cast<int>(blockIdx.x) / plan.blocks),
        step(static_cast<int>(gridDim.x) / plan.blocks),
        end(plan.row_tiles * plan.col_tiles) {}
};

// The ring of stages, as one side of it goes round: `parity` is that of the phase in which a stage is filled.
template <int kStages>
struct Ring {
  int stage = 0, parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

template <int kCols>
struct Stages {
  unsigned char* const memory;
  Mbarrier *const full, *const empty;

  __device__ __forceinline__ explicit Stages(unsigned char* shared)
      : memory(shared),
        full(reinterpret_cast<Mbarrier*>(shared + Shape<kCols>::kBarriers)),
        empty(full + Shape<kCols>::kStages) {}
  __device__ __forceinline__ unsigned char* left(int stage) const { return memory + stage * Shape<kCols>::kStageBytes; }
  __device__ __forceinline__ unsigned char* right(int stage) const { return left(stage) + Shape<kCols>::kLeftBytes; }
};

// The block's share of a stage's tile of right, from `col` of out and `c` of the contraction on, for all of the
// cluster.
template <Major kMajor, int kCols>
__device__ __forceinline__ void load_right(unsigned char* tile, const Segment& segment, Mbarrier* full, int col, int c,
                                           int blocks) {
  const int box = kMajor == Major::kOutput ? kSwizzledColumns : kCols / blocks;  // columns of out in each
  for (int j = cluster_rank() * box; j < kCols; j += blocks * box) {
    unsigned char* const to = tile + j * kDepth * 2;
    const int box_col = kMajor == Major::kOutput ? col + j : c, box_row = kMajor == Major::kOutput ? c : col + j;
    if (blocks == 1) {
      tma_load(to, &segment.right, full, box_col, box_row);
    } else {
      tma_load_multicast(to, &segment.right, full, box_col, box_row, 0b11);
    }
  }
}

// One thread. What lies outside of the operands comes as zeros. `empty` counts the readers of all blocks, so that both
// blocks' stage may be written when it is over here; the other's producer may be behind, and then its `full` gets bytes
// that it has not yet announced, but its phase lacks that producer's arrival and does not end.
template <Major kMajor, int kCols>
__device__ __forceinline__ void fill(const Plan& plan, const Stages<kCols>& stages) {
  using S = Shape<kCols>;
  const Walk walk(plan);
  Ring<S::kStages> ring;
  for (int s = 0; s < plan.segments; ++s) {
    tma_prefetch(&plan.segment[s].left);
    tma_prefetch(&plan.segment[s].right);
  }
  for (int tile = walk.first; tile < walk.end; tile += walk.step) {
    const TilePlace place = place_of<kCols>(plan, tile);
#pragma unroll 1
    for (int s = 0; s < plan.segments; ++s) {
      const Segment& segment = plan.segment[s];
      if (s == plan.adapters) wait_for_previous_launch();  // of concat_operands
#pragma unroll 1
      for (int c = 0; c < segment.columns; c += kDepth, ring.next()) {
        Mbarrier* const full = stages.full + ring.stage;
        mbarrier_wait(stages.empty + ring.stage, ring.parity ^ 1);
        mbarrier_arrive_expect(full, S::kStageBytes);
        tma_load(stages.left(ring.stage), &segment.left, full, c, place.row);
        load_right<kMajor, kCols>(stages.right(ring.stage), segment, full, place.col, c, plan.blocks);
      }
    }
  }
}

// sums (+)= left right over `steps` times 16 columns of a stage. Groups of products: one of a whole stage, whose fence
// and commit stand beside them in one basic block (else ptxas adds groups of its own), or one of each step.
template <class T, Major kMajor, int kCols>
__device__ __forceinline__ void multiply(float (&sums)[kCols / 2], uint64_t left, uint64_t right, int steps,
                                         bool accumulate) {
  const auto step = [&](int k) {
    wgmma_m64k16<T, kCols, kMajor>(sums, wgmma_step<Major::kContraction>(left, k), wgmma_step<kMajor>(right, k),
                                   accumulate || k > 0);
  };
  if (steps == kDepth / kStep) {
    wgmma_fence(sums);
#pragma unroll
    for (int k = 0; k < kDepth / kStep; ++k) step(k);
    wgmma_commit();
  } else {
#pragma unroll 1
    for (int k = 0; k < steps; ++k) {
      wgmma_fence(sums);
      step(k);
      wgmma_commit();
    }
  }
}

// A warp group: rows 64 group ... 64 group + 63 of every tile.
template <class T, Major kMajor, int kCols>
__device__ __forceinline__ void consume(const Plan& plan, const Stages<kCols>& stages, T* piece, int group) {
  const int warp_row = 64 * group + warp_index() % 4 * 16;
  const Walk walk(plan);
  const bool masked = kMajor == Major::kOutput && plan.masked;
  const uint64_t seed = masked ? *plan.seed : 0;
  float sums[kCols / 2];
  TileMask<kCols> mask;
  Ring<Shape<kCols>::kStages> ring;
  int read = -1;  // the stage that the products in flight read
  const auto release = [&] {
    if (read >= 0 && lane_index() < plan.blocks) {
      if (plan.blocks == 1) {
        mbarrier_arrive(stages.empty + read);
      } else {
        mbarrier_arrive_at(stages.empty + read, lane_index());
      }
    }
    read = -1;
  };
  const auto place_of_warp = [&](int tile) {
    const TilePlace place = place_of<kCols>(plan, tile);
    return TilePlace{place.row + warp_row, place.col};
  };
  if (masked) mask.make_rest(plan.keep, seed, place_of_warp(walk.first));
#pragma unroll 1
  for (int tile = walk.first; tile < walk.end; tile += walk.step) {
    const bool masks_next = masked && tile + walk.step < walk.end;
    const TilePlace next = masks_next ? place_of_warp(tile + walk.step) : TilePlace{};
    bool accumulate = false;
#pragma unroll 1
    for (int s = 0; s < plan.segments; ++s) {
      const int columns = plan.segment[s].columns;
#pragma unroll 1
      for (int c = 0; c < columns; c += kDepth, ring.next()) {
        const int steps = columns - c < kDepth ? (columns - c + kStep - 1) / kStep : kDepth / kStep;
        mbarrier_wait(stages.full + ring.stage, ring.parity);
        const uint64_t left = wgmma_operand<Major::kContraction>(stages.left(ring.stage) + group * 64 * kDepth * 2);
        const uint64_t right = wgmma_operand<kMajor>(stages.right(ring.stage), kDepth);
        if (std::is_same_v<T, bf16> || s == plan.adapters) {
          multiply<bf16, kMajor, kCols>(sums, left, right, steps, accumulate);
        } else {
          multiply<T, kMajor, kCols>(sums, left, right, steps, accumulate);
        }
        accumulate = true;
        if (masks_next && mask.made < mask.kWords) mask.make_word(plan.keep, seed, next);
        wgmma_wait<1>();
        release();
        read = ring.stage;
      }
      if (masked && s == 0) {
        wgmma_wait<0>(sums);
        mask.apply(sums, plan.keep.scale);
      }
    }
    wgmma_wait<0>(sums);
    release();
    if (plan.out.biases) wait_for_previous_launch();
    store<T, kCols>(sums, plan.out, piece, place_of_warp(tile));
    if (masks_next) mask.make_rest(plan.keep, seed, next);
  }
}

template <class T, Major kMajor, int kCols>
__global__ void __launch_bounds__(kThreads, 1)
    lora_linear_forward_concat_gemm_sm90_kernel(const __grid_constant__ Plan plan) {
  PK_SWIZZLED_SHARED(unsigned char, shared);
  const Stages<kCols> stages(shared);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Shape<kCols>::kStages; ++stage) {
      mbarrier_init(stages.full + stage, 1);
      mbarrier_init(stages.empty + stage, kReaders * plan.blocks);
    }
    mbarrier_init_fence();
  }
  cluster_sync();
  const int group = threadIdx.x / kGroup - 1;
  if (group < 0) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) fill<kMajor, kCols>(plan, stages);
    __syncwarp();
  } else {
    take_registers<kConsumerRegisters>();
    T* const pieces = reinterpret_cast<T*>(shared + Shape<kCols>::kPieces);
    consume<T, kMajor, kCols>(plan, stages, pieces + (warp_index() - kGroup / 32) * kPiece, group);
  }
  cluster_sync();  // the other block's last loads and arrivals have come here
}

cudaError_t make_segment(Segment& to, const ConcatSegment& from, const ConcatGemm& call, int box_cols) {
  to.columns = static_cast<int>(from.columns);
  const cudaError_t error = make_tensor_map(&to.left, from.left, call.I, from.columns, from.left_stride, kRows, kDepth);
  if (error != cudaSuccess) return error;
  if (call.across) {
    return make_tensor_map(&to.right, from.right, from.columns, call.J, from.right_stride, kDepth, kSwizzledColumns);
  }
  return make_tensor_map(&to.right, from.right, call.J, from.columns, from.right_stride, box_cols, kDepth);
}

// How often each cluster has a tile, at most.
int64_t turns(const ConcatGemm& call, int64_t cols, int cluster) {
  const int64_t rows = kRows * cluster, clusters = call.blocks / cluster;
  return ((call.I + rows - 1) / rows * ((call.J + cols - 1) / cols) + clusters - 1) / clusters;
}

int width_of(const ConcatGemm& call) {
  return call.width > 0 ? call.width : concat_width(call);
}

template <class T, Major kMajor, int kCols>
cudaError_t run(const ConcatGemm& call, cudaStream_t stream) {
  Plan plan = {};
  plan.blocks = call.cluster > 0 ? call.cluster : concat_cluster(call);
  const bool masked = call.keep.threshold != kKeepAll, has_adapters = call.adapters.columns > 0;
  cudaError_t error = cudaSuccess;
  const auto add = [&](const ConcatSegment& from) {
    if (error == cudaSuccess) error = make_segment(plan.segment[plan.segments++], from, call, kCols / plan.blocks);
  };
  plan.adapters = !has_adapters ? -1 : masked ? 0 : call.members;
  if (plan.adapters == 0) add(call.adapters);
  for (int g = 0; g < call.members; ++g) add(call.member[g]);
  if (plan.adapters > 0) add(call.adapters);
  if (error != cudaSuccess) return error;
  plan.out = {call.out, call.biases, static_cast<int>(call.I), static_cast<int>(call.J), call.accumulate};
  plan.row_tiles = (plan.out.I + kRows * plan.blocks - 1) / (kRows * plan.blocks);
  plan.col_tiles = (plan.out.J + kCols - 1) / kCols;
  plan.masked = masked && has_adapters;
  plan.keep = call.keep;
  plan.seed = call.seed;
  const int tiles = plan.row_tiles * plan.col_tiles, most = call.blocks / plan.blocks;
  const dim3 grid(static_cast<unsigned>((tiles < most ? tiles : most) * plan.blocks)), block(kThreads);
  return PK_LAUNCH_CLUSTER((lora_linear_forward_concat_gemm_sm90_kernel<T, kMajor, kCols>), plan.blocks, has_adapters,
                           grid, block, static_cast<size_t>(Shape<kCols>::kShared), stream, plan);
}

template <class T, Major kMajor>
cudaError_t run_width(const ConcatGemm& call, cudaStream_t stream) {
  return width_of(call) == 128 ? run<T, kMajor, 128>(call, stream) : run<T, kMajor, 256>(call, stream);
}

template <class T>
cudaError_t run_direction(const ConcatGemm& call, cudaStream_t stream) {
  return call.across ? run_width<T, Major::kOutput>(call, stream) : run_width<T, Major::kContraction>(call, stream);
}

// Rows that lie apart, as TMA takes them.
bool has_aligned_rows(const void* data, int64_t stride, int64_t columns) {
  constexpr int64_t kMostStride = int64_t{1} << 38;  // elements; 2^40 bytes are too many
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0 && stride >= columns && stride < kMostStride;
}

}  // namespace

bool has_concat_gemm(Dtype x, const ConcatGemm& call) {
  constexpr int64_t kLeastRows = 128, kMost = INT32_MAX / 4;
  if (x != Dtype::kBFloat16 && x != Dtype::kFloat16) return false;
  if (call.members < 1 || call.members > kMostConcatMembers || call.blocks < 1) return false;
  if (call.cluster < 0 || call.cluster > 2 || call.cluster > call.blocks) return false;
  if (call.width != 0 && call.width != 128 && call.width != 256) return false;
  if (call.I < kLeastRows || call.I > kMost || call.J < 8 || call.J > kMost || call.J % 8 != 0) return false;
  if ((call.I / kRows + 1) * (call.J / 128 + 1) > kMost) return false;
  for (int g = 0; g < call.members; ++g) {
    const ConcatSegment& member = call.member[g];
    const int64_t right_columns = call.across ? call.J : member.columns;
    if (member.columns < 1 || member.columns > kMost ||
        !has_aligned_rows(member.left, member.left_stride, member.columns) ||
        !has_aligned_rows(member.right, member.right_stride, right_columns)) {
      return false;
    }
  }
  return call.adapters.columns <= kMost && reinterpret_cast<uintptr_t>(call.out) % 16 == 0;
}

bool has_tensor_maps() {
  return tensor_map_encoder() != nullptr;
}

// Narrow tiles read more of every operand, a tenth is allowed for it; but the last tiles may leave fewer blocks idle.
int concat_width(const ConcatGemm& call) {
  return 11 * turns(call, 128, 1) < 20 * turns(call, 256, 1) ? 128 : 256;
}

int concat_cluster(const ConcatGemm& call) {
  const int cols = width_of(call);
  return call.I > kRows && call.blocks > 1 && turns(call, cols, 2) <= turns(call, cols, 1) ? 2 : 1;
}

cudaError_t concat_gemm(Dtype x, const ConcatGemm& call, cudaStream_t stream) {
  if (!has_concat_gemm(x, call) || (call.keep.threshold != kKeepAll && !call.across)) return cudaErrorInvalidValue;
  return x == Dtype::kFloat16 ? run_direction<fp16>(call, stream) : run_direction<bf16>(call, stream);
}

}  // namespace pk::lora_linear
