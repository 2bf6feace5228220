// The turns of the forward, and its state for 16 query rows of a warp, in fragments: weighted sums of values, and the
// softmax that they belong to, taken up tile by tile: the greatest logit so far and the sum of the exponentials below
// it.
#pragma once

#include "prefix_attention/attention_tiles.h"

namespace pk::prefix_attention {

constexpr float kLog2e = 1.44269504088896341f;

// What is done with the keys of the prefix or with their own, turn by turn: o = sum of e^l v, the sum of e^l alone, or
// o += w v. An o that a later turn does not share is divided by its sum first.
enum class Role { kSoftmax, kSum, kWeights };

struct Turn {
  bool prefix;
  Role role;
};

__device__ __forceinline__ int count_turns(Composition composition) {
  return composition == Composition::kAdd ? 3 : 2;
}
__device__ __forceinline__ Turn turn_of(Composition composition, int turn) {
  if (composition == Composition::kMerge) return {turn == 0, Role::kSoftmax};
  if (turn == 0) return {false, Role::kSoftmax};
  return {true, composition == Composition::kAdd && turn == 1 ? Role::kSum : Role::kWeights};
}

// e^(l - below), in which a logit of -inf gives 0 even where there is no other.
__device__ __forceinline__ float below_of(float high) {
  return high == -INFINITY ? 0.f : high;
}
// The difference first: below * log2(e) may be infinite (masks of the least number), and the same logit gives
// exactly 1.
__device__ __forceinline__ float power(float logit, float below) {
  return exp2f((logit - below) * kLog2e);
}

template <int kD>
struct Softmax {
  float values[kD / 8][4];
  float high[2], sum[2];  // of the lane's rows; sum: of the lane's columns, until total()

  __device__ __forceinline__ void restart() {
#pragma unroll
    for (int i = 0; i < 2; ++i) high[i] = -INFINITY, sum[i] = 0.f;
  }
  __device__ __forceinline__ void start() {
    restart();
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) values[i / 4][i % 4] = 0.f;
  }

  __device__ __forceinline__ void scale(const float (&factor)[2]) {
    each_element(values, [&](float& value, int row, int) { value *= factor[row]; });
  }

  // Logits become exponentials; what is there already is scaled to them, the values only where they belong to the sum.
  template <int kFragments>
  __device__ __forceinline__ void accumulate(float (&w)[kFragments][4], bool with_values) {
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float found = -INFINITY, part = 0.f;
#pragma unroll
      for (int j = 0; j < 2 * kFragments; ++j) {
        const float l = w[j / 2][2 * i + j % 2];
        found = l > found ? l : found;
      }
      found = warp_max<4>(found);
      const float before = high[i];
      high[i] = found > before ? found : before;
      const float below = below_of(high[i]);
#pragma unroll
      for (int j = 0; j < 2 * kFragments; ++j) {
        float& l = w[j / 2][2 * i + j % 2];
        l = power(l, below);
        part += l;
      }
      factor[i] = power(before, below);
      sum[i] = sum[i] * factor[i] + part;
    }
    if (with_values) scale(factor);
  }

  // The rows' sums, in every lane; returns the log-sum-exps.
  __device__ __forceinline__ void total(float (&lse)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] = warp_sum<4>(sum[i]);
      lse[i] = high[i] + logf(sum[i]);
    }
  }

  // After total(): values of sums become those of weights; zero where nothing was seen.
  __device__ __forceinline__ void normalise() {
    const float factor[2] = {sum[0] == 0 ? 0.f : 1 / sum[0], sum[1] == 0 ? 0.f : 1 / sum[1]};
    scale(factor);
  }
};

// A number of each of the lane's rows, to an array [B, Hq, S].
__device__ __forceinline__ void store_row_numbers(void* out, const float (&number)[2], const Place* places) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = places[lane_index() / 4 + 8 * i].row;
    if (lane_index() % 4 == 0 && row >= 0) static_cast<float*>(out)[row] = number[i];
  }
}

}  // namespace pk::prefix_attention
