// The route of a batch on the CPU, free of torch: made once per step, read by every call. Its layout is in
// batched_lora.h and in peft_kernels/ops/batched_lora/route.py.
#pragma once

#include <cstdint>
#include <vector>

#include "batched_lora/batched_lora.h"

namespace pk::batched_lora {

// Fills route_size(M, adapters) entries. Ids below -1 or not below `adapters` are counted and become -1.
template <class Id>
void make_route(const Id* ids, int64_t M, int64_t adapters, int32_t* route);

struct Segment {  // all the rows of one adapter, or (adapter -1) of none
  int64_t adapter, M;
  const int32_t* rows;  // [M], ascending
};

// The segments of a route, by adapter, that of -1 last. Nothing where the route is not one of M rows: kernels turn what
// stands in it into addresses.
bool read_route(const int32_t* route, int64_t size, int64_t M, std::vector<Segment>& segments);

}  // namespace pk::batched_lora
