// Tensors through torch's stable ABI: allocation, views, the library GEMM, parallel loops. On the CPU nothing of it
// goes through PyTorch's dispatcher but the copy of a tensor that has to be made contiguous; on CUDA (cuda_device.h)
// the allocation and the GEMM do, below autograd.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

namespace pk {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// torch's number of a tensor's dtype.
inline int32_t dtype_code(const Tensor& tensor) {
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

struct Device {
  int32_t type, index;

  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

inline Device device_of(const Tensor& tensor) {
  Device device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device.type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
  return device;
}

inline std::string words_of(Device device) {
  if (device.type == aoti_torch_device_type_cpu()) return "cpu";
  if (device.type == aoti_torch_device_type_meta()) return "meta";
  const bool cuda = device.type == aoti_torch_device_type_cuda();
  return (cuda ? "cuda:" : "device " + std::to_string(device.type) + ":") + std::to_string(device.index);
}

inline Device cpu() {
  return {aoti_torch_device_type_cpu(), 0};
}

inline bool poisoned = false;  // set by poison() alone

// An uninitialised contiguous tensor.
inline Tensor empty(const int64_t* sizes, int64_t dim, int32_t dtype, Device device) {
  constexpr int64_t kMostDims = 64;  // torch's own limit
  int64_t strides[kMostDims];
  STD_TORCH_CHECK(dim <= kMostDims, "a tensor has at most 64 dimensions, got ", dim);
  int64_t stride = 1;
  for (int64_t i = dim; i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, dtype, device.type, device.index, &handle));
  Tensor tensor(handle);
  if (poisoned) torch::stable::fill_(tensor, dtype == aoti_torch_dtype_int32() ? -1 : NAN);
  return tensor;
}

inline Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype, Device device = cpu()) {
  return empty(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype, device);
}

// For tests: from now on, what is allocated here is full of NaN (integers of -1), so that what nobody wrote shows, or
// again what it happens to be. torch's own fill_uninitialized_memory does not reach the stable ABI. Returns a float
// that is allocated afterwards.
inline float poison(bool on) {
  poisoned = on;
  return *static_cast<const float*>(empty({1}, aoti_torch_dtype_float32()).const_data_ptr());
}

// The [..., last] tensor whose leading sizes and device are those of `like`.
inline Tensor empty_rows(const Tensor& like, int64_t last, int32_t dtype) {
  const auto sizes = like.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.back() = last;
  return empty(shape.data(), static_cast<int64_t>(shape.size()), dtype, device_of(like));
}

// A tensor [..., C] seen as a matrix [M, C] with unit stride along C: itself where its strides allow, else a copy.
struct Rows {
  Tensor tensor;
  int64_t count, stride;

  const void* data() const { return tensor.const_data_ptr(); }
};

inline Rows as_rows(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const int64_t last = static_cast<int64_t>(sizes.size()) - 1;
  int64_t count = 1, stride = 0;
  bool in_place = sizes[last] == 1 || strides[last] == 1;
  for (int64_t i = last; i-- > 0;) {
    if (sizes[i] == 1) continue;
    if (count == 1) stride = strides[i];
    in_place = in_place && (count == 1 || strides[i] == stride * count);
    count *= sizes[i];
  }
  if (count <= 1) stride = sizes[last];
  if (in_place || count == 0) return {tensor, count, stride};
  return {torch::stable::contiguous(tensor), count, sizes[last]};
}

// A contiguous tensor: itself, or a copy.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A matrix that starts at the same element.
inline Tensor matrix(const Tensor& tensor, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  const int64_t sizes[2] = {rows, cols}, strides[2] = {row_stride, col_stride};
  AtenTensorHandle handle;
  constexpr int64_t kFurther = 0;  // relative to the tensor's own storage offset
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), 2, sizes, strides, kFurther, &handle));
  return Tensor(handle);
}

// out (+)= a b, on the CPU.
inline void gemm(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  if (accumulate) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
}

// The order that sorts a contiguous tensor's numbers, equal ones as they are: int64 [numel].
inline Tensor sorting_order(const Tensor& numbers) {
  const int64_t count = numbers.numel();
  StableIValue stack[4] = {torch::stable::detail::from(matrix(numbers, 1, count, count, 1)),
                           torch::stable::detail::from(true), torch::stable::detail::from(int64_t{-1}),
                           torch::stable::detail::from(false)};  // stable, dim, descending
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::argsort", "stable", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// f(begin, end) over [0, units), in one thread where the work (multiplications) is not worth waking another.
template <class F>
void parallel(int64_t units, int64_t work, const F& f) {
  constexpr int64_t kWorthwhile = 1 << 19;  // about 5 us of one core with AVX-512
  if (units <= 1 || work < kWorthwhile) {
    if (units > 0) f(int64_t{0}, units);
  } else {
    torch::stable::parallel_for(0, units, 1, f);
  }
}

}  // namespace pk
