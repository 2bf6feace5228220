// prefix_attention for CPU tensors: check, allocate, fill the Problem, run its phases.
#include "bindings/prefix_attention.h"

#include "bindings/prefix_attention_call.h"

namespace pk {
namespace {

using namespace prefix_attention;

void run(PrefixCall& call, bool backward) {
  Problem& p = call.problem;
  if (p.seed) p.own_dropout.seed = p.prefix_dropout.seed = *p.seed;
  const Plan plan = make_plan(p);
  if (p.type == Dtype::kFloat64) return backward ? backward_double(p, plan) : forward_double(p, plan);
  const Tensor scratch = empty({scratch_floats(p, backward)}, aoti_torch_dtype_float32());
  set_scratch(p, backward, static_cast<float*>(scratch.mutable_data_ptr()));
  const Table& t = table();
  const int64_t prefix = static_cast<int64_t>(plan.queries.size()) * p.Hq * p.P * p.D;
  const int64_t own = p.B * p.Hq * p.S * p.T * p.D;
  const auto phase = [&](Phase f, int64_t units, int64_t work) {
    parallel(units, work, [&](int64_t begin, int64_t end) { f(p, plan, begin, end); });
  };
  if (!backward) {
    phase(t.prefix, static_cast<int64_t>(plan.prefix_units.size()), 2 * prefix);
    phase(t.own, static_cast<int64_t>(plan.units.size()), 2 * own);
    return;
  }
  phase(t.prefix_backward, p.prefixes * p.Hkv, 5 * prefix);
  if (p.dq || p.dk || p.dv) phase(t.own_backward, p.rows * p.Hkv, 5 * own);
  phase(t.gather, p.dgate || p.dkey_gate ? 1 : 0, 0);
}

PrefixOutputs forward(const PrefixArguments& arguments) {
  PrefixCheck(arguments).values();
  PrefixCall call(arguments);
  const PrefixOutputs outputs = prefix_outputs(call, arguments.query);
  run(call, false);
  return outputs;
}

std::vector<Tensor> backward(const PrefixGradients& gradients) {
  PrefixCheck(gradients.a).values();
  PrefixCall call(gradients.a);
  std::vector<Tensor> outputs = prefix_gradients(call, gradients);
  run(call, true);
  return outputs;
}

}  // namespace

void bind_prefix_attention_cpu(torch::stable::detail::StableLibrary& library) {
  library.impl("prefix_attention", TORCH_BOX(&call_prefix<forward>));
  library.impl("prefix_attention_backward", TORCH_BOX(&call_prefix_backward<backward>));
}

}  // namespace pk
