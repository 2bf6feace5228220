// DoRA for CPU tensors: check, allocate, fill a problem, run its phases.
#include "bindings/dora.h"

#include "bindings/dora_check.h"
#include "lora_linear/dora.h"
#include "lora_linear/lora_linear.h"

namespace pk {
namespace {

using dora::blocks;
using dora::kColumns;
using dora::kRows;
using dora::Norm;
using dora::Scale;

bool is_narrow(const Tensor& tensor) {
  return dtype_code(tensor) == aoti_torch_dtype_float16() || dtype_code(tensor) == aoti_torch_dtype_bfloat16();
}

// Contiguous, 16-bit types in fp32.
Tensor widened(const Tensor& tensor) {
  const Tensor from = dense(tensor);
  if (!is_narrow(from)) return from;
  const Tensor wide = empty({from.numel()}, aoti_torch_dtype_float32());
  lora_linear::table().convert(*dtype_of(dtype_code(from)), from.const_data_ptr(), Dtype::kFloat32,
                               wide.mutable_data_ptr(), from.numel());
  return wide;
}

// A gradient that a kernel writes in fp32 (fp64): itself, or an fp32 copy that finish() narrows.
class WideGradient {
 public:
  WideGradient(const Tensor& gradient, bool wanted) : gradient_(gradient), wide_(gradient), wanted_(wanted) {
    if (wanted_ && is_narrow(gradient)) wide_ = empty({gradient.numel()}, aoti_torch_dtype_float32());
  }
  void* data() const { return wanted_ ? wide_.mutable_data_ptr() : nullptr; }
  void finish() const {
    if (!wanted_ || !is_narrow(gradient_)) return;
    lora_linear::table().convert(Dtype::kFloat32, wide_.const_data_ptr(), *dtype_of(dtype_code(gradient_)),
                                 gradient_.mutable_data_ptr(), gradient_.numel());
  }

 private:
  Tensor gradient_, wide_;
  bool wanted_;
};

Tensor norm(const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B, double scaling) {
  DoraNormCheck(weight).run(lora_A, lora_B, scaling);
  const int64_t N = weight.size(0), K = weight.size(1), R = lora_A.size(0);
  const Tensor A = widened(lora_A), B = widened(lora_B), out = empty({N}, accumulator_code(weight));
  // The stride of a dimension of size 1 says nothing.
  const bool along = weight.stride(1) == 1 || K == 1, across = weight.stride(0) == 1 || N == 1;
  const Tensor w = along || across ? weight : torch::stable::contiguous(weight);
  const Dtype type = *dtype_of(dtype_code(weight));
  const bool by_rows = along || !across;
  Norm p{N,
         K,
         R,
         type,
         w.const_data_ptr(),
         w.stride(0),
         by_rows ? 1 : w.stride(1),
         A.const_data_ptr(),
         B.const_data_ptr(),
         scaling,
         nullptr,
         out.mutable_data_ptr()};
  if (type == Dtype::kFloat64) {
    dora::norm_double(p);
    return out;
  }
  const Tensor gram = empty({R, R}, aoti_torch_dtype_float32());
  p.gram = static_cast<float*>(gram.mutable_data_ptr());
  const auto run = [&](dora::NormPhase phase, int64_t rows, int64_t work) {
    parallel(blocks(rows, kRows), work, [&](int64_t begin, int64_t end) { phase(p, begin, end); });
  };
  run(dora::table().gram, R, R * R * K);
  run(dora::kernels(type).rows, N, N * (K + R) * (R + 1));
  return out;
}

// A Scale filled from tensors, and the tensors that keep the memory alive.
class ScaleCall {
 public:
  Scale problem{};

  ScaleCall(const Tensor& z, const OptionalTensor& magnitude, const Tensor& norm, const OptionalTensor& ids)
      : norm_(dense(norm)) {
    Scale& p = problem;
    p.N = z.size(z.dim() - 1);
    p.M = z.numel() / p.N;
    p.L = norm.numel() / p.N;
    p.type = *dtype_of(dtype_code(z));
    p.norm = norm_.const_data_ptr();
    if (magnitude) p.magnitude = magnitude_.emplace(widened(*magnitude)).const_data_ptr();
    if (ids) p.ids = static_cast<const int32_t*>(ids_.emplace(dense(*ids)).const_data_ptr());
  }

  const Tensor& ids() const { return *ids_; }
  bool is_double() const { return problem.type == Dtype::kFloat64; }

  const void* rows(const Tensor& tensor, int64_t& stride) {
    const Rows found = as_rows(tensor);
    stride = found.stride;
    alive_.push_back(found.tensor);
    return found.data();
  }

  float* scratch(int64_t floats) {
    alive_.push_back(empty({floats}, aoti_torch_dtype_float32()));
    return static_cast<float*>(alive_.back().mutable_data_ptr());
  }

  void run(dora::ScalePhase phase, int64_t units, int64_t work) const {
    parallel(units, work, [&](int64_t begin, int64_t end) { phase(problem, begin, end); });
  }

  void make_gains() {
    const int64_t L = problem.L, N = problem.N;
    problem.gain = scratch(L * N);
    run(dora::table().gains, L * blocks(N, kColumns), L * N);
  }

 private:
  const Tensor norm_;
  OptionalTensor magnitude_, ids_;
  std::vector<Tensor> alive_;
};

constexpr int64_t kElementCost = 4;  // in multiplications

Tensor scale(const Tensor& z, const Tensor& magnitude, const Tensor& norm, const OptionalTensor& bias,
             const OptionalTensor& residual, const OptionalTensor& ids) {
  const DoraScaleCheck check("dora_scale", "z", z);
  check.forward(magnitude, norm, bias, residual, ids);
  ScaleCall call(z, magnitude, norm, ids);
  Scale& p = call.problem;
  if (ids) check.in_range(call.ids(), p.L);
  const Tensor y = empty_rows(z, p.N, dtype_code(z));
  if (p.M == 0) return y;
  const OptionalTensor vector = bias ? OptionalTensor(dense(*bias)) : std::nullopt;
  p.z = call.rows(z, p.z_stride);
  if (residual) p.residual = call.rows(*residual, p.residual_stride);
  if (vector) p.bias = vector->const_data_ptr();
  p.y = y.mutable_data_ptr();
  if (call.is_double()) {
    dora::scale_double(p);
    return y;
  }
  call.make_gains();
  call.run(dora::kernels(p.type).scale, blocks(p.M, kRows) * blocks(p.N, kColumns), kElementCost * p.M * p.N);
  return y;
}

std::vector<Tensor> scale_backward(const Tensor& dy, const OptionalTensor& z, const OptionalTensor& magnitude,
                                   const Tensor& norm, const OptionalTensor& ids, const std::vector<bool>& needs) {
  const DoraScaleCheck check("dora_scale_backward", "dy", dy);
  check.backward(z, magnitude, norm, ids, needs);
  ScaleCall call(dy, magnitude, norm, ids);
  Scale& p = call.problem;
  if (ids) check.in_range(call.ids(), p.L);
  const std::vector<Tensor> gradients = new_dora_gradients(dy, magnitude, norm, needs);
  if (p.M == 0) {
    for (Tensor gradient : gradients) torch::stable::zero_(gradient);
    return gradients;
  }
  const WideGradient dm(gradients[1], needs[1]), db(gradients[2], needs[2]);
  p.dy = call.rows(dy, p.dy_stride);
  if (needs[1]) p.z = call.rows(*z, p.z_stride);
  if (needs[0]) p.dz = gradients[0].mutable_data_ptr();
  p.dm = dm.data();
  p.db = db.data();
  if (call.is_double()) {
    dora::backward_double(p);
    return gradients;
  }
  if (p.dz) call.make_gains();
  const int64_t chunks = dora::row_chunks(p), across = blocks(p.N, kColumns);
  if (p.dm) p.dm_parts = call.scratch(chunks * p.L * p.N);
  if (p.db) p.db_parts = call.scratch(chunks * p.N);
  call.run(dora::kernels(p.type).backward, chunks * across, kElementCost * p.M * p.N);
  if (p.dm || p.db) call.run(dora::table().sums, across, chunks * p.L * p.N);
  dm.finish();
  db.finish();
  return gradients;
}

}  // namespace

void bind_dora_cpu(torch::stable::detail::StableLibrary& library) {
  library.impl("dora_norm", TORCH_BOX(&norm));
  library.impl("dora_scale", TORCH_BOX(&scale));
  library.impl("dora_scale_backward", TORCH_BOX(&scale_backward));
}

}  // namespace pk
