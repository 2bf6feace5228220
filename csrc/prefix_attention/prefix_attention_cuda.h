// prefix_attention on an NVIDIA GPU (sm_80 and later), free of torch: the launchers of the forward. A launcher launches
// one kernel on `stream`. Every pointer of the Problem is the device's; ids, lengths and ends of sequences are read by
// the kernels alone, which bound them: an id that is no prefix counts as none. A call is
//   forward_rows                   tiles of query rows, the keys of the prefix and their own in turn
// or, where splits_keys says that there are too few rows for that,
//   forward_split, forward_merge   tiles of keys, of the prefix for all rows that share it, and the sum of what they
//   gave
// How work is divided depends on shapes alone.
#pragma once

#include <cuda_runtime.h>

#include "prefix_attention/prefix_attention.h"

namespace pk::prefix_attention {

cudaError_t forward_rows(const Problem& problem, cudaStream_t stream);   // of 16-bit types
cudaError_t forward_plain(const Problem& problem, cudaStream_t stream);  // the same of the others

// The room that forward_split fills for forward_merge, of set_splits.
bool splits_keys(const Problem& problem);
int64_t split_floats(const Problem& problem);
void set_splits(Problem& problem, float* scratch);
cudaError_t forward_split(const Problem& problem, cudaStream_t stream);
cudaError_t forward_merge(const Problem& problem, cudaStream_t stream);

}  // namespace pk::prefix_attention
