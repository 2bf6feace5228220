// lora_linear on a GPU: check, allocate, launch. The adapters' part is written first and the base product, torch's own
// GEMM, is added on top of it in place: y is read and written once; few rows, and on sm_90 where that is wanted many,
// go through one kernel that computes both. Nothing here waits for the device or reads from it.
// lora_add is the same without a GEMM: the launch that writes the adapters' part adds the residual.
#include <tuple>

#include "bindings/lora_add_check.h"
#include "bindings/lora_linear.h"
#include "bindings/lora_linear_cuda_call.h"

namespace pk {
namespace {

using lora_linear::Expand;
using lora_linear::FewRows;
using lora_linear::Shrink;

struct Forward {
  CudaCall& call;
  const Rows& x;
  const std::vector<Tensor>& weight;
  const std::vector<OptionalTensor> bias;  // contiguous
  const std::vector<Tensor>& y;
  const Tensor& h;
  const Rows* residual = nullptr;  // lora_add, which has neither weight nor bias; y may be this memory

  int64_t N(size_t g) const { return y[g].size(y[g].dim() - 1); }
};

// The whole call in two launches, the second overlapping the first. False where it is not made for this call.
bool run_few_rows(const Forward& f) {
  CudaCall& call = f.call;
  const size_t G = f.weight.size();
  if (call.M > lora_linear::kFewRowsCuda || G > lora_linear::kMostMembers ||
      call.adapters.size() > lora_linear::kMostAdapters) {
    return false;
  }
  FewRows few{};
  few.x = f.x.data();
  few.x_stride = f.x.stride;
  few.M = call.M;
  few.K = call.K;
  few.splits = lora_linear::shrink_splits(call.M, call.K, call.R);
  few.h = static_cast<float*>(f.h.mutable_data_ptr());
  few.R = call.R;
  few.members = static_cast<int>(G);
  for (size_t g = 0; g < G; ++g) {
    if (f.weight[g].stride(1) != 1 && call.K > 1) return false;
    few.member[g] = {f.weight[g].const_data_ptr(), f.weight[g].stride(0), f.N(g),
                     f.bias[g] ? f.bias[g]->const_data_ptr() : nullptr, f.y[g].mutable_data_ptr()};
  }
  const Tensor parts = call.scratch({few.splits, call.M, call.R});
  few.parts = static_cast<const float*>(parts.const_data_ptr());
  call.in_launches(call.all(), Factor::kB, [&](const Adapters& chosen, size_t) { few.adapters = chosen; });
  if (!lora_linear::has_few_rows_kernel(call.type, call.factors, few)) return false;
  call.in_launches(call.all(), Factor::kA, [&](const Adapters& chosen, size_t) {
    const Shrink shrink{
        few.x,      few.x_stride,         call.M, call.K, static_cast<float*>(parts.mutable_data_ptr()), call.R,
        few.splits, call.seed_of(chosen), chosen};
    call.launched("shrink", lora_linear::shrink(call.type, call.factors, shrink, call.on.stream()));
  });
  call.launched("few_rows", lora_linear::few_rows(call.type, call.factors, few, call.on.stream()));
  return true;
}

void run_shrink(const Forward& f) {
  CudaCall& call = f.call;
  const int splits = lora_linear::shrink_splits(call.M, call.K, call.R);
  const Tensor parts = splits > 1 ? call.scratch({splits, call.M, call.R}) : f.h;
  call.in_launches(call.all(), Factor::kA, [&](const Adapters& chosen, size_t) {
    const Shrink shrink{
        f.x.data(), f.x.stride,           call.M, call.K, static_cast<float*>(parts.mutable_data_ptr()), call.R,
        splits,     call.seed_of(chosen), chosen};
    call.launched("shrink", lora_linear::shrink(call.type, call.factors, shrink, call.on.stream()));
  });
  if (splits > 1) {
    call.add_parts(parts, call.M * call.R, call.R, splits, f.h.mutable_data_ptr(), Dtype::kFloat32, call.R, call.M,
                   call.R);
  }
}

void run_expand(const Forward& f, size_t g) {
  CudaCall& call = f.call;
  call.in_launches(call.of_member[g], Factor::kB, [&](const Adapters& chosen, size_t first) {
    const void* bias = first == 0 && f.bias[g] ? f.bias[g]->const_data_ptr() : nullptr;
    Expand expand{f.y[g].mutable_data_ptr(),
                  call.M,
                  f.N(g),
                  static_cast<const float*>(f.h.const_data_ptr()),
                  call.R,
                  bias,
                  false,
                  first > 0,
                  nullptr,
                  chosen};
    if (f.residual && first == 0) {
      expand.residual = f.residual->data();
      expand.residual_stride = f.residual->stride;
    }
    call.launched("expand", lora_linear::expand(call.type, call.factors, expand, call.on.stream()));
  });
}

// Expand and the base product in one GEMM, where it is asked for and made for this call.
bool run_concat(const Forward& f, size_t g) {
  const CudaCall& call = f.call;
  const Tensor& weight = f.weight[g];
  if (!sm90_wanted(call.on) || call.of_member[g].empty() || weight.stride(1) != 1) return false;
  lora_linear::ConcatGemm gemm{};
  gemm.out = f.y[g].mutable_data_ptr();
  gemm.I = call.M;
  gemm.J = f.N(g);
  gemm.members = 1;
  gemm.member[0] = {f.x.data(), weight.const_data_ptr(), f.x.stride, weight.stride(0), call.K};
  return lora_concat_cuda(call, gemm, call.of_member[g], f.h, f.bias[g] ? f.bias[g]->const_data_ptr() : nullptr);
}

// y = `low` (null: nothing) + bias + sum_l s_l bias_l, rounded once; true if there was anything to write.
bool add_biases(const Forward& f, size_t g, const Tensor* low) {
  CudaCall& call = f.call;
  std::vector<lora_linear::SumVector> vectors;
  if (f.bias[g]) vectors.push_back({f.bias[g]->const_data_ptr(), call.type, 1});
  for (const size_t l : call.of_member[g]) {
    const CudaCall::Adapter& a = call.adapters[l];
    if (a.bias) vectors.push_back({a.bias->const_data_ptr(), call.factors, a.scaling});
  }
  if (!low && vectors.empty()) return false;
  void* const y = f.y[g].mutable_data_ptr();
  size_t done = 0;
  if (vectors.empty() && low->const_data_ptr() == y) return true;
  do {
    const size_t count = std::min<size_t>(vectors.size() - done, lora_linear::kMostAdapters);
    const bool last = done + count == vectors.size();
    Sum sum{low ? low->const_data_ptr() : nullptr,
            0,
            f.N(g),
            low ? 1 : 0,
            last ? y : low->mutable_data_ptr(),
            last ? call.type : call.accumulator(),
            f.N(g),
            call.M,
            f.N(g),
            1,
            static_cast<int>(count),
            {}};
    std::copy_n(vectors.begin() + static_cast<std::ptrdiff_t>(done), count, sum.vector);
    call.launched("sum", lora_linear::sum(sum, call.on.stream()));
    done += count;
  } while (done < vectors.size());
  return true;
}

// h and the adapters' part of y by plain-core products, for the dtypes that have no other kernels.
void run_shrink_plain(const Forward& f) {
  CudaCall& call = f.call;
  const Strided x{f.x.data(), call.type, f.x.stride, 1};
  for (const CudaCall::Adapter& a : call.adapters) {
    const Strided A = by_rows(a.A.const_data_ptr(), call.factors, call.K);
    const Strided out = columns_of(call, f.h, a.rank0);
    call.multiply(call.product_of(call.M, a.R, call.K, x, transposed(A), a, a.scaling, Masked::kLeft),
                  const_cast<void*>(out.data), call.accumulator(), call.R);
  }
}

bool run_expand_plain(const Forward& f, size_t g) {
  CudaCall& call = f.call;
  if (call.of_member[g].empty()) return add_biases(f, g, nullptr);
  const Tensor low = call.type == call.accumulator() ? f.y[g] : call.scratch({call.M, f.N(g)});
  bool accumulate = f.residual;
  if (f.residual && f.residual->data() != low.const_data_ptr()) {
    Tensor to = matrix(low, call.M, f.N(g), f.N(g), 1);
    torch::stable::copy_(to, matrix(f.residual->tensor, call.M, f.N(g), f.residual->stride, 1));
  }
  for (const size_t l : call.of_member[g]) {
    const CudaCall::Adapter& a = call.adapters[l];
    const Strided B = by_rows(a.B.const_data_ptr(), call.factors, a.R);
    call.multiply_onto(
        call.product_of(call.M, f.N(g), a.R, columns_of(call, f.h, a.rank0), transposed(B), a, 1, Masked::kNone), low,
        accumulate);
    accumulate = true;
  }
  return add_biases(f, g, &low);
}

void run(const Forward& f) {
  CudaCall& call = f.call;
  if (call.tensor_cores) {
    if (run_few_rows(f)) return;
    run_shrink(f);
  } else {
    run_shrink_plain(f);
  }
  const Tensor x = matrix(f.x.tensor, call.M, call.K, f.x.stride, 1);
  for (size_t g = 0; g < f.weight.size(); ++g) {
    if (call.tensor_cores && run_concat(f, g)) continue;
    bool written = true;
    if (!call.tensor_cores) {
      written = run_expand_plain(f, g);
    } else if (call.of_member[g].empty()) {
      written = add_biases(f, g, nullptr);
    } else {
      run_expand(f, g);
    }
    const Tensor weight = matrix(f.weight[g], call.K, f.N(g), f.weight[g].stride(1), f.weight[g].stride(0));
    cuda_gemm(matrix(f.y[g], call.M, f.N(g), f.N(g), 1), x, weight, written);
  }
}

std::tuple<std::vector<Tensor>, Tensor> forward(const Tensor& x, const std::vector<Tensor>& weight,
                                                const std::vector<OptionalTensor>& bias,
                                                const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B,
                                                const std::vector<OptionalTensor>& lora_bias,
                                                const std::vector<int64_t>& member, const std::vector<double>& scaling,
                                                const std::vector<double>& dropout_p, const OptionalTensor& seed) {
  LoraLinearCheck({x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed}).run();
  CudaCall call("lora_linear", weight, lora_A, lora_B, member, scaling, dropout_p, seed);
  const Rows rows = as_rows(x);
  call.M = rows.count;
  const Tensor h = call.scratch({call.M, call.R});
  std::vector<Tensor> y;
  y.reserve(weight.size());
  for (const Tensor& w : weight) y.push_back(empty_rows(x, w.size(0), dtype_code(x)));
  if (call.M == 0) return {y, h};
  std::vector<OptionalTensor> biases(bias.size());
  for (size_t g = 0; g < bias.size(); ++g) {
    if (bias[g]) biases[g] = dense(*bias[g]);
  }
  for (size_t l = 0; l < lora_bias.size(); ++l) {
    if (lora_bias[l]) call.adapters[l].bias = dense(*lora_bias[l]);
  }
  run({call, rows, weight, biases, y, h});
  return {y, h};
}

}  // namespace

void lora_expand_cuda(CudaCall& call, const Tensor& y, const Rows& residual, const Tensor& h) {
  const std::vector<Tensor> outputs{y}, no_weight;
  const Forward f{call, residual, no_weight, {std::nullopt}, outputs, h, &residual};
  if (call.tensor_cores) {
    run_expand(f, 0);
  } else {
    run_expand_plain(f, 0);
  }
}

namespace {

// Writes y, which may be the residual, and returns h.
Tensor add(const char* op, const Tensor& y, const Tensor& residual, const Tensor& x, const std::vector<Tensor>& lora_A,
           const std::vector<Tensor>& lora_B, const std::vector<OptionalTensor>& lora_bias,
           const std::vector<double>& scaling, const std::vector<double>& dropout_p, const OptionalTensor& seed) {
  const Rows rows = as_rows(x), residual_rows = as_rows(residual);
  CudaCall call(op, x, lora_A, lora_B, scaling, dropout_p, seed);
  call.M = rows.count;
  const Tensor h = call.scratch({call.M, call.R});
  if (call.M == 0) return h;
  for (size_t l = 0; l < lora_bias.size(); ++l) {
    if (lora_bias[l]) call.adapters[l].bias = dense(*lora_bias[l]);
  }
  const std::vector<Tensor> outputs{y}, no_weight;
  const Forward f{call, rows, no_weight, {std::nullopt}, outputs, h, &residual_rows};
  if (call.tensor_cores) {
    run_shrink(f);
  } else {
    run_shrink_plain(f);
  }
  lora_expand_cuda(call, y, residual_rows, h);
  return h;
}

std::tuple<Tensor, Tensor> add_forward(const Tensor& residual, const Tensor& x, const std::vector<Tensor>& lora_A,
                                       const std::vector<Tensor>& lora_B, const std::vector<OptionalTensor>& lora_bias,
                                       const std::vector<double>& scaling, const std::vector<double>& dropout_p,
                                       const OptionalTensor& seed) {
  check_add(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed);
  const Tensor y = empty_rows(residual, residual.size(residual.dim() - 1), dtype_code(residual));
  return {y, add("lora_add", y, residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed)};
}

void add_in_place(const Tensor& residual, const Tensor& x, const std::vector<Tensor>& lora_A,
                  const std::vector<Tensor>& lora_B, const std::vector<OptionalTensor>& lora_bias,
                  const std::vector<double>& scaling, const std::vector<double>& dropout_p,
                  const OptionalTensor& seed) {
  check_add_in_place(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed);
  add("lora_add_", residual, residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed);
}

Tensor dropout_mask(const Tensor& seed, int64_t rows, int64_t cols, double p, int64_t stream) {
  check_dropout_mask(seed, rows, cols, p);
  const Device device = device_of(seed);
  const OnDevice on(device);
  const Tensor mask = empty({rows, cols}, aoti_torch_dtype_bool(), device);
  if (rows == 0 || cols == 0) return mask;
  const cudaError_t error = lora_linear::dropout_mask(static_cast<uint8_t*>(mask.mutable_data_ptr()), rows, cols,
                                                      lora_linear::make_keep(p, static_cast<uint32_t>(stream)),
                                                      static_cast<const uint64_t*>(seed.const_data_ptr()), on.stream());
  STD_TORCH_CHECK(error == cudaSuccess, "lora_dropout_mask: the kernel could not be launched on device ", device.index,
                  ": ", words_of(error));
  return mask;
}

}  // namespace

void bind_lora_linear_cuda(torch::stable::detail::StableLibrary& library) {
  library.impl("lora_linear", TORCH_BOX(&forward));
  library.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward_cuda));
  library.impl("lora_add", TORCH_BOX(&add_forward));
  library.impl("lora_add_", TORCH_BOX(&add_in_place));
  library.impl("lora_add_backward", TORCH_BOX(&lora_add_backward_cuda));
  library.impl("lora_dropout_mask", TORCH_BOX(&dropout_mask));
}

}  // namespace pk
