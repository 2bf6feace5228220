// lora_linear's base products on sm_90, in one GEMM with the adapters (csrc/lora_linear/concat_gemm_sm90.cu), for the
// forward and the backward: memory for the adapters' operands, the launch that writes them, the GEMM.
#include "bindings/lora_linear_cuda_call.h"

namespace pk {
namespace {

using lora_linear::concat_stride;

// Operands of the adapters, and the biases, written for a GEMM that is to read them.
struct Operands {
  Tensor left, right;
  OptionalTensor biases;
};

Operands write_operands(const CudaCall& call, lora_linear::ConcatGemm& gemm, const Adapters& chosen, const Tensor& low,
                        const void* bias) {
  const int64_t columns = lora_linear::concat_columns(call.factors, chosen), stride = concat_stride(columns);
  const int64_t halves = gemm.across ? columns * gemm.J : gemm.J * stride;  // both even: scratch is of fp32
  Operands operands{call.scratch({gemm.I * stride / 2}), call.scratch({halves / 2}), std::nullopt};
  bool any_bias = bias != nullptr;
  for (int l = 0; l < chosen.count; ++l) any_bias = any_bias || chosen.at[l].bias;
  if (any_bias) operands.biases = call.scratch({gemm.J});
  float* const biases = any_bias ? static_cast<float*>(operands.biases->mutable_data_ptr()) : nullptr;
  const lora_linear::ConcatOperands write{static_cast<const float*>(low.const_data_ptr()),
                                          gemm.I,
                                          gemm.J,
                                          call.R,
                                          gemm.across,
                                          bias,
                                          chosen,
                                          operands.left.mutable_data_ptr(),
                                          operands.right.mutable_data_ptr(),
                                          biases};
  call.launched("concat_operands", lora_linear::concat_operands(call.type, call.factors, write, call.on.stream()));
  gemm.adapters = {write.left, write.right, stride, gemm.across ? gemm.J : stride, columns};
  gemm.biases = biases;
  return operands;
}

}  // namespace

bool lora_concat_cuda(const CudaCall& call, lora_linear::ConcatGemm gemm, const std::vector<size_t>& which,
                      const Tensor& low, const void* bias) {
  gemm.blocks = call.on.multiprocessors();
  if (which.size() > lora_linear::kMostAdapters || !lora_linear::has_concat_gemm(call.type, gemm)) return false;
  if (!lora_linear::has_tensor_maps()) return false;  // now: an error behind concat_operands could not be undone
  std::optional<Operands> operands;
  call.in_launches(which, gemm.across ? Factor::kA : Factor::kB, [&](const Adapters& chosen, size_t) {
    if (chosen.count == 1) gemm.keep = chosen.at[0].keep;
    gemm.seed = call.seed_of(chosen);
    operands = write_operands(call, gemm, chosen, low, bias);
  });
  call.launched("concat_gemm", lora_linear::concat_gemm(call.type, gemm, call.on.stream()));
  return true;
}

}  // namespace pk
