// prefix_attention on a GPU: allocate, launch; one launch, or two where keys are split. Nothing here waits for the
// device or reads from it.
#include "prefix_attention/prefix_attention_cuda.h"

#include "bindings/cuda_device.h"
#include "bindings/prefix_attention.h"
#include "bindings/prefix_attention_call.h"

namespace pk {
namespace {

using namespace prefix_attention;

PrefixOutputs forward(const PrefixArguments& arguments) {
  const Device device = device_of(arguments.query);
  const OnDevice on(device);
  PrefixCall call(arguments);
  Problem& p = call.problem;
  const PrefixOutputs outputs = prefix_outputs(call, arguments.query);
  const auto launched = [&](const char* kernel, cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "prefix_attention: the kernel ", kernel, " could not be launched on device ",
                    device.index, ": ", words_of(error));
  };
  if (p.type == Dtype::kFloat32 || p.type == Dtype::kFloat64) {
    launched("plain", forward_plain(p, on.stream()));
    return outputs;
  }
  if (!splits_keys(p)) {
    launched("rows", forward_rows(p, on.stream()));
    return outputs;
  }
  const Tensor scratch = empty({split_floats(p)}, aoti_torch_dtype_float32(), device);
  set_splits(p, static_cast<float*>(scratch.mutable_data_ptr()));
  launched("split", forward_split(p, on.stream()));
  launched("merge", forward_merge(p, on.stream()));
  return outputs;
}

}  // namespace

void bind_prefix_attention_cuda(torch::stable::detail::StableLibrary& library) {
  library.impl("prefix_attention", TORCH_BOX(&call_prefix<forward>));
  library.impl("prefix_attention_backward", TORCH_BOX(&call_prefix_backward<prefix_attention_backward_cuda>));
}

}  // namespace pk
