// DoRA on a GPU: check, allocate, launch. Nothing here waits for the device or reads from it.
#include "lora_linear/dora_cuda.h"

#include "bindings/dora.h"
#include "bindings/dora_check.h"
#include "bindings/lora_linear_cuda_call.h"

namespace pk {
namespace {

// [splits][N, R] parts of W A^T and [splits][N] squares of W's rows, from one read of W. Returns how many.
int read_weight(const CudaCall& call, const Tensor& weight, OptionalTensor& low, OptionalTensor& squares) {
  const int64_t N = weight.size(0), K = call.K, R = call.R;
  const bool along = weight.stride(1) == 1 || K == 1;
  const bool tensor_cores = call.tensor_cores && along;
  const int splits = tensor_cores ? lora_linear::shrink_splits(N, K, R) : 1;
  low = call.scratch({splits, N, R});
  squares = call.scratch({splits, N});
  if (tensor_cores) {
    call.in_launches(call.all(), Factor::kA, [&](Adapters chosen, size_t) {
      chosen.at[0].scaling = 1;
      const lora_linear::Shrink shrink{weight.const_data_ptr(),
                                       weight.stride(0),
                                       N,
                                       K,
                                       static_cast<float*>(low->mutable_data_ptr()),
                                       R,
                                       splits,
                                       nullptr,
                                       chosen,
                                       static_cast<float*>(squares->mutable_data_ptr())};
      call.launched("shrink", lora_linear::shrink(call.type, call.factors, shrink, call.on.stream()));
    });
  } else {
    const dora_cuda::NormRows rows{weight.const_data_ptr(),
                                   call.type,
                                   weight.stride(0),
                                   along ? 1 : weight.stride(1),
                                   call.adapters[0].A.const_data_ptr(),
                                   call.factors,
                                   N,
                                   K,
                                   R,
                                   low->mutable_data_ptr(),
                                   squares->mutable_data_ptr()};
    call.launched("norm_rows", dora_cuda::norm_rows(rows, call.on.stream()));
  }
  return splits;
}

Tensor norm(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling) {
  DoraNormCheck(weight).run(lora_A, lora_B, scaling);
  const CudaCall call("dora_norm", {weight}, {lora_A}, {lora_B}, {0}, {scaling}, {0}, std::nullopt);
  const int64_t N = weight.size(0), R = call.R;
  const Tensor out = empty({N}, accumulator_code(weight), call.device);
  OptionalTensor low, squares;
  const int splits = read_weight(call, weight, low, squares);
  const CudaCall::Adapter& adapter = call.adapters[0];
  const Strided A = by_rows(adapter.A.const_data_ptr(), call.factors, call.K);
  const Strided B = by_rows(adapter.B.const_data_ptr(), call.factors, R);
  const Tensor gram = call.scratch({R, R}), cross = call.scratch({N, R});
  call.multiply(call.product_of(R, R, call.K, A, transposed(A), adapter, scaling * scaling, Masked::kNone),
                gram.mutable_data_ptr(), call.accumulator(), R);
  call.multiply_onto(
      call.product_of(N, R, R, B, by_rows(gram.const_data_ptr(), call.accumulator(), R), adapter, 1, Masked::kNone),
      cross, false);
  const dora_cuda::NormFinish finish{
      low->const_data_ptr(), squares->const_data_ptr(), splits, 2 * scaling, cross.const_data_ptr(), B.data, N, R,
      out.mutable_data_ptr()};
  call.launched("norm_finish", dora_cuda::norm_finish(call.factors, finish, call.on.stream()));
  return out;
}

// What the two calls over z share: the device, sizes, and the gains as kernels take them.
class ScaleCall {
 public:
  const char* const op;
  const Device device;
  const OnDevice on;
  const Dtype type;
  const int64_t N, M;
  dora_cuda::Gains gains{};

  ScaleCall(const char* op, const Tensor& z, const OptionalTensor& magnitude, const Tensor& norm,
            const OptionalTensor& ids)
      : op(op),
        device(device_of(z)),
        on(device),
        type(*dtype_of(dtype_code(z))),
        N(z.size(z.dim() - 1)),
        M(z.numel() / N),
        norm_(dense(norm)) {
    gains.norm = norm_.const_data_ptr();
    gains.L = norm.numel() / N;
    if (magnitude) {
      gains.magnitude = magnitude_.emplace(dense(*magnitude)).const_data_ptr();
      gains.type = *dtype_of(dtype_code(*magnitude));
    }
    if (ids) gains.ids = static_cast<const int32_t*>(ids_.emplace(dense(*ids)).const_data_ptr());
  }

  Tensor scratch(int64_t splits, int64_t rows) const {
    return empty({splits, rows, N}, accumulator_code(norm_), device);
  }

  void launched(const char* kernel, cudaError_t error) const {
    STD_TORCH_CHECK(error == cudaSuccess, op, ": the kernel ", kernel, " could not be launched on device ",
                    device.index, ": ", words_of(error));
  }

  // out [rows, N] = the sum of `splits` parts, in order.
  void add_parts(const Tensor& parts, int64_t splits, int64_t rows, const Tensor& out) const {
    const Sum sum{parts.const_data_ptr(),
                  rows * N,
                  N,
                  static_cast<int>(splits),
                  out.mutable_data_ptr(),
                  *dtype_of(dtype_code(out)),
                  N,
                  rows,
                  N,
                  1,
                  0,
                  {}};
    launched("sum", lora_linear::sum(sum, on.stream()));
  }

 private:
  const Tensor norm_;
  OptionalTensor magnitude_, ids_;
};

Tensor scale(const Tensor& z, const Tensor& magnitude, const Tensor& norm, const OptionalTensor& bias,
             const OptionalTensor& residual, const OptionalTensor& ids) {
  DoraScaleCheck("dora_scale", "z", z).forward(magnitude, norm, bias, residual, ids);
  const ScaleCall call("dora_scale", z, magnitude, norm, ids);
  const Tensor y = empty_rows(z, call.N, dtype_code(z));
  if (call.M == 0) return y;
  const OptionalTensor vector = bias ? OptionalTensor(dense(*bias)) : std::nullopt;
  const Rows rows = as_rows(z), onto = residual ? as_rows(*residual) : rows;
  const dora_cuda::Scale scale{rows.data(),
                               rows.stride,
                               call.M,
                               call.N,
                               call.gains,
                               vector ? vector->const_data_ptr() : nullptr,
                               residual ? onto.data() : nullptr,
                               onto.stride,
                               y.mutable_data_ptr()};
  call.launched("scale", dora_cuda::scale(call.type, scale, call.on.stream()));
  return y;
}

std::vector<Tensor> scale_backward(const Tensor& dy, const OptionalTensor& z, const OptionalTensor& magnitude,
                                   const Tensor& norm, const OptionalTensor& ids, const std::vector<bool>& needs) {
  DoraScaleCheck("dora_scale_backward", "dy", dy).backward(z, magnitude, norm, ids, needs);
  const ScaleCall call("dora_scale_backward", dy, magnitude, norm, ids);
  const std::vector<Tensor> gradients = new_dora_gradients(dy, magnitude, norm, needs);
  if (call.M == 0) {
    for (Tensor gradient : gradients) torch::stable::zero_(gradient);
    return gradients;
  }
  const int64_t L = call.gains.L, chunks = dora_cuda::row_chunks(call.M, L),
                db_parts = chunks * dora_cuda::owners(call.gains);
  OptionalTensor dm, db;
  if (needs[1]) dm = call.scratch(chunks, L);
  if (needs[2]) db = call.scratch(db_parts, 1);
  const Rows rows = as_rows(dy), z_rows = needs[1] ? as_rows(*z) : rows;
  const dora_cuda::ScaleBackward backward{rows.data(),
                                          rows.stride,
                                          needs[1] ? z_rows.data() : nullptr,
                                          z_rows.stride,
                                          call.M,
                                          call.N,
                                          call.gains,
                                          needs[0] ? gradients[0].mutable_data_ptr() : nullptr,
                                          dm ? dm->mutable_data_ptr() : nullptr,
                                          db ? db->mutable_data_ptr() : nullptr};
  call.launched("scale_backward", dora_cuda::scale_backward(call.type, backward, call.on.stream()));
  if (dm) call.add_parts(*dm, chunks, L, gradients[1]);
  if (db) call.add_parts(*db, db_parts, 1, gradients[2]);
  return gradients;
}

}  // namespace

void bind_dora_cuda(torch::stable::detail::StableLibrary& library) {
  library.impl("dora_norm", TORCH_BOX(&norm));
  library.impl("dora_scale", TORCH_BOX(&scale));
  library.impl("dora_scale_backward", TORCH_BOX(&scale_backward));
}

}  // namespace pk
