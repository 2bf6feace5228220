// The primitives of sm_90a (csrc/common: cluster.h, mbarrier.h, tma.h, wgmma.h), as the emulator has them. Those
// headers say what each does.
#pragma once

#include <cuda.h>

#include "emulator/emulator.h"

namespace emulator {

// cluster.cpp
int cluster_rank();
int cluster_blocks();
void cluster_arrive(Site site);
void cluster_wait(Site site);
void* of_block(void* mine, int rank, Site site);
void named_barrier(int id, int threads, Site site);
void set_registers(int count, bool more, Site site);

// transfers.cpp
void mbarrier_init(uint64_t* barrier, int arrivals, Site site);
void mbarrier_init_fence();
void mbarrier_arrive(uint64_t* barrier, int expected_bytes, Site site);
void mbarrier_arrive_at(uint64_t* barrier, int rank, Site site);
void mbarrier_wait(uint64_t* barrier, int parity, Site site);
cudaError_t make_tensor_map(CUtensorMap* map, const void* data, int64_t rows, int64_t cols, int64_t row_stride,
                            int box_rows, int box_cols);
void tensor_load(void* shared, const CUtensorMap* map, uint64_t* barrier, int col, int row, Site site);
void tensor_load_multicast(void* shared, const CUtensorMap* map, uint64_t* barrier, int col, int row, uint16_t blocks,
                           Site site);
void check_tensor_map(const CUtensorMap* map, Site site);
void bulk_load(void* shared, const void* global, int bytes, uint64_t* barrier, Site site);
void async_proxy_fence();

// wgmma.cpp
uint32_t shared_address(const void* place, Site site);  // as a GPU numbers a block's shared memory
void product_fence(Site site);
void product_commit(Site site);
void product_wait(int groups_left, Site site);
// d of the calling thread: columns / 2 numbers. b_along_output: its major.
void start_product(Format format, int columns, bool b_along_output, float* d, uint64_t a, uint64_t b, bool accumulate,
                   Site site);

}  // namespace emulator
