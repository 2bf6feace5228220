// batched_lora_ for CPU tensors: check, cut the work into pieces, run the phases. y is changed in place.
#include "bindings/batched_lora.h"
#include "bindings/batched_lora_pool_check.h"

namespace pk {
namespace {

using batched_lora::Slice;

constexpr int64_t kActivationCost = 8;  // in multiplications

void add_pooled(const std::vector<Tensor>& y, const Tensor& x, const Tensor& route, const Tensor& pages_in,
                const std::vector<Tensor>& pages_out, const std::vector<Tensor>& table,
                const std::vector<Tensor>& scaling, const std::vector<Tensor>& down_bias) {
  PoolCheck({y, x, route, pages_in, pages_out, table, scaling, down_bias}).run();
  std::vector<Slice> slices;
  slices.reserve(y.size());
  for (size_t g = 0; g < y.size(); ++g) {
    Tensor out = y[g];
    slices.push_back({out.size(1), pages_out[g].const_data_ptr(), pages_out[g].size(0), out.mutable_data_ptr(),
                      out.stride(0), static_cast<const int32_t*>(table[g].const_data_ptr()),
                      (table[g].size(1) - batched_lora::kTablePages) / 2, scaling[g].const_data_ptr(),
                      down_biases(down_bias[g])});
  }
  batched_lora::Problem p{x.size(0),
                          x.size(1),
                          static_cast<int64_t>(slices.size()),
                          table[0].size(0),
                          slices.data(),
                          x.const_data_ptr(),
                          x.stride(0),
                          pages_in.const_data_ptr(),
                          pages_in.size(0),
                          static_cast<const int32_t*>(route.const_data_ptr())};
  batched_lora::Work work;
  const std::string wrong = make_work(p, 0, work);
  STD_TORCH_CHECK(wrong.empty(), "batched_lora_: ", wrong);
  if (work.pieces.empty()) return;
  p.use(work, nullptr);
  const Dtype dtype = *dtype_of(dtype_code(x));
  if (dtype == Dtype::kFloat64) return add_double(p);
  const Tensor h = empty({work.h_floats}, aoti_torch_dtype_float32());
  p.h = static_cast<float*>(h.mutable_data_ptr());
  const batched_lora::Kernels& kernels = *batched_lora::kernels(dtype, *dtype_of(dtype_code(pages_in)));
  const auto run = [&](batched_lora::Phase phase, int64_t units, int64_t multiplications) {
    parallel(units, multiplications, [&](int64_t begin, int64_t end) { phase(p, begin, end); });
  };
  run(kernels.shrink, work.shrink_units, work.multiplications);
  if (p.parts > 1) run(kernels.sum, p.pieces, work.h_floats);
  if (work.activates) run(kernels.activate, p.pieces, kActivationCost * work.h_floats);
  run(kernels.expand, work.expand_units, work.multiplications);
}

}  // namespace

void bind_batched_lora_pool_cpu(torch::stable::detail::StableLibrary& library) {
  library.impl("batched_lora_", TORCH_BOX(&add_pooled));
}

}  // namespace pk
