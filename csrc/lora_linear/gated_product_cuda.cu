// gated_product, element by element, in fp32 (fp64 for fp64), each result rounded once:
//   y = f(gate) up,   dgate = dy up f'(gate),   dup = dy f(gate)
// Grid: blocks of 256 threads side by side; a thread has one vector of 16 bytes of each matrix, or one number where a
// matrix does not begin at a multiple of 16 bytes. What is left of the last vector is done by one thread, one by one.
#include <initializer_list>
#include <type_traits>

#include "common/activation.h"
#include "common/parts.h"
#include "lora_linear/gated_product_cuda.h"

namespace pk::gated_product {
namespace {

constexpr int kThreads = 256;

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
__device__ __forceinline__ Accumulator<T> widened(T value) {
  if constexpr (std::is_same_v<T, double>) {
    return value;
  } else {
    return to_float(value);
  }
}
template <class T>
__device__ __forceinline__ T rounded(Accumulator<T> value) {
  if constexpr (std::is_same_v<T, double>) {
    return value;
  } else {
    return from_float<T>(value);
  }
}

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T entry[kCount];
};
template <int kCount, class T>
__device__ __forceinline__ Vector<T, kCount> vector_at(const void* numbers, int64_t at, T) {
  return *reinterpret_cast<const Vector<T, kCount>*>(static_cast<const T*>(numbers) + at);
}
template <int kCount, class T>
__device__ __forceinline__ void store_at(void* numbers, int64_t at, const Vector<T, kCount>& vector) {
  *reinterpret_cast<Vector<T, kCount>*>(static_cast<T*>(numbers) + at) = vector;
}

// f(std::integral_constant<int, activation>{}): the branch is outside of the loops over a vector.
template <class F>
__device__ __forceinline__ void with_activation(int activation, const F& f) {
  switch (activation) {
    case kRelu:
      return f(std::integral_constant<int, kRelu>{});
    case kGelu:
      return f(std::integral_constant<int, kGelu>{});
    case kGeluTanh:
      return f(std::integral_constant<int, kGeluTanh>{});
    default:
      return f(std::integral_constant<int, kSilu>{});
  }
}

template <int kCount, class T>
__device__ __forceinline__ void multiply(const Product& call, int64_t at, T type) {
  const auto gate = vector_at<kCount>(call.gate, at, type), up = vector_at<kCount>(call.up, at, type);
  Vector<T, kCount> y;
  with_activation(call.activation, [&](auto f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      y.entry[i] = rounded<T>(activated(f.value, widened(gate.entry[i])) * widened(up.entry[i]));
    }
  });
  store_at<kCount>(call.y, at, y);
}

template <int kCount, class T>
__device__ __forceinline__ void differentiate(const Gradients& call, int64_t at, T type) {
  const auto gate = vector_at<kCount>(call.gate, at, type), up = vector_at<kCount>(call.up, at, type),
             dy = vector_at<kCount>(call.dy, at, type);
  Vector<T, kCount> dgate, dup;
  with_activation(call.activation, [&](auto f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const auto g = widened(gate.entry[i]), d = widened(dy.entry[i]);
      dgate.entry[i] = rounded<T>(d * widened(up.entry[i]) * slope_of(f.value, g));
      dup.entry[i] = rounded<T>(d * activated(f.value, g));
    }
  });
  store_at<kCount>(call.dgate, at, dgate);
  store_at<kCount>(call.dup, at, dup);
}

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) gated_product_forward_kernel(const Product call) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kCount;
  if (at + kCount <= call.n) {
    multiply<kCount>(call, at, T{});
  } else {
#pragma unroll 1
    for (int64_t i = at; i < call.n; ++i) multiply<1>(call, i, T{});
  }
}

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) gated_product_backward_kernel(const Gradients call) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kCount;
  if (at + kCount <= call.n) {
    differentiate<kCount>(call, at, T{});
  } else {
#pragma unroll 1
    for (int64_t i = at; i < call.n; ++i) differentiate<1>(call, i, T{});
  }
}

bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  }
  return true;
}

dim3 grid_of(int64_t n, int count) {
  const int64_t each = static_cast<int64_t>(kThreads) * count;
  return dim3(static_cast<unsigned>((n + each - 1) / each));
}

template <class T>
cudaError_t product_of(const Product& call, cudaStream_t stream) {
  constexpr int kCount = 16 / sizeof(T);
  const dim3 block(kThreads);
  if (aligned({call.gate, call.up, call.y})) {
    return PK_LAUNCH((gated_product_forward_kernel<T, kCount>), grid_of(call.n, kCount), block, 0, stream, call);
  }
  return PK_LAUNCH((gated_product_forward_kernel<T, 1>), grid_of(call.n, 1), block, 0, stream, call);
}

template <class T>
cudaError_t gradients_of(const Gradients& call, cudaStream_t stream) {
  constexpr int kCount = 16 / sizeof(T);
  const dim3 block(kThreads);
  if (aligned({call.dy, call.gate, call.up, call.dgate, call.dup})) {
    return PK_LAUNCH((gated_product_backward_kernel<T, kCount>), grid_of(call.n, kCount), block, 0, stream, call);
  }
  return PK_LAUNCH((gated_product_backward_kernel<T, 1>), grid_of(call.n, 1), block, 0, stream, call);
}

}  // namespace

cudaError_t product(Dtype type, const Product& call, cudaStream_t stream) {
  switch (type) {
    case Dtype::kFloat16:
      return product_of<fp16>(call, stream);
    case Dtype::kBFloat16:
      return product_of<bf16>(call, stream);
    case Dtype::kFloat64:
      return product_of<double>(call, stream);
    default:
      return product_of<float>(call, stream);
  }
}

cudaError_t gradients(Dtype type, const Gradients& call, cudaStream_t stream) {
  switch (type) {
    case Dtype::kFloat16:
      return gradients_of<fp16>(call, stream);
    case Dtype::kBFloat16:
      return gradients_of<bf16>(call, stream);
    case Dtype::kFloat64:
      return gradients_of<double>(call, stream);
    default:
      return gradients_of<float>(call, stream);
  }
}

}  // namespace pk::gated_product
