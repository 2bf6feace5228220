// batched_lora_ and its route on a GPU: check, allocate, launch. y is changed in place. Nothing here waits for the
// device or reads from it; the numbers inside route and table are trusted, see batched_lora_cuda.h.
#include <algorithm>

#include "batched_lora/batched_lora_cuda.h"
#include "bindings/batched_lora.h"
#include "bindings/batched_lora_check.h"
#include "bindings/batched_lora_pool_check.h"
#include "bindings/cuda_device.h"

namespace pk {
namespace {

using batched_lora::Pool;

void launched(const char* op, const char* kernel, Device device, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the kernel ", kernel, " could not be launched on device ", device.index,
                  ": ", words_of(error));
}

Tensor route(const Tensor& adapter_ids, int64_t adapters) {
  check_ids(adapter_ids, adapters);
  const Device device = device_of(adapter_ids);
  const OnDevice on(device);
  const Tensor ids = dense(adapter_ids);
  const int64_t M = ids.size(0);
  const Tensor out = empty({batched_lora::route_size(M, adapters)}, aoti_torch_dtype_int32(), device);
  const bool wide = dtype_code(ids) == aoti_torch_dtype_int64();
  launched("batched_lora_route", "route", device,
           batched_lora::route({ids.const_data_ptr(), wide, M, adapters, static_cast<int32_t*>(out.mutable_data_ptr())},
                               on.stream()));
  return out;
}

// As many slices from `first` on as travel in one launch, without h.
Pool pool_of(const PoolArguments& a, size_t first) {
  Pool pool{a.x.size(0),
            a.x.size(1),
            a.table[0].size(0),
            a.x.const_data_ptr(),
            a.x.stride(0),
            a.pages_in.const_data_ptr(),
            static_cast<const int32_t*>(a.route.const_data_ptr()),
            0,
            {},
            nullptr,
            1};
  for (size_t g = first; g < a.y.size() && pool.slices < batched_lora::kMostSlices; ++g) {
    Tensor y = a.y[g];
    pool.slice[pool.slices++] = {y.size(1),
                                 a.pages_out[g].const_data_ptr(),
                                 a.pages_out[g].size(0),
                                 y.mutable_data_ptr(),
                                 y.stride(0),
                                 static_cast<const int32_t*>(a.table[g].const_data_ptr()),
                                 (a.table[g].size(1) - batched_lora::kTablePages) / 2,
                                 a.scaling[g].const_data_ptr(),
                                 down_biases(a.down_bias[g])};
  }
  return pool;
}

// h is scratch of a size that shapes give, on the current stream: let go at the end of the call, it is not used again
// before the kernels are done.
struct Turn {
  Pool pool;
  Tensor h;
};

Turn shrink(const PoolArguments& a, size_t first, Dtype type, Dtype pages, Device device, cudaStream_t stream) {
  Pool pool = pool_of(a, first);
  pool.parts = h_parts(pool);
  const int32_t wide = type == Dtype::kFloat64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  const Tensor h = empty({pool.parts, pool.M, h_columns(pool)}, wide, device);
  pool.h = h.mutable_data_ptr();
  launched("batched_lora_", "pool_shrink", device, pool_shrink(type, pages, pool, stream));
  return {pool, h};
}

// Whether one launch did it all.
bool in_one_launch(const PoolArguments& a, Dtype type, Dtype pages, Device device, const OnDevice& on) {
  if (!sm90_wanted(on) || a.y.size() > batched_lora::kMostSlices) return false;
  const Pool pool = pool_of(a, 0);
  if (!has_cluster_kernel(type, pages, pool)) return false;
  launched("batched_lora_", "pool_cluster", device, pool_cluster(type, pool, on.stream()));
  return true;
}

void add_pooled(const std::vector<Tensor>& y, const Tensor& x, const Tensor& route, const Tensor& pages_in,
                const std::vector<Tensor>& pages_out, const std::vector<Tensor>& table,
                const std::vector<Tensor>& scaling, const std::vector<Tensor>& down_bias) {
  const PoolArguments arguments{y, x, route, pages_in, pages_out, table, scaling, down_bias};
  PoolCheck(arguments).run();
  if (x.size(0) == 0) return;
  const Device device = device_of(x);
  const OnDevice on(device);
  const Dtype type = *dtype_of(dtype_code(x)), pages = *dtype_of(dtype_code(pages_in));
  if (in_one_launch(arguments, type, pages, device, on)) return;
  std::vector<Turn> turns;  // no y is written before all have read x, which may lie where it lies
  for (size_t g = 0; g < y.size(); g += batched_lora::kMostSlices) {
    turns.push_back(shrink(arguments, g, type, pages, device, on.stream()));
  }
  for (const Turn& turn : turns) {
    launched("batched_lora_", "pool_expand", device, pool_expand(type, pages, turn.pool, on.stream()));
  }
}

}  // namespace

void bind_batched_lora_pool_cuda(torch::stable::detail::StableLibrary& library) {
  library.impl("batched_lora_", TORCH_BOX(&add_pooled));
  library.impl("batched_lora_route", TORCH_BOX(&route));
}

}  // namespace pk
