// batched_lora for CPU tensors: each adapter's rows run lora_linear's phases as a Part, and torch's GEMM adds the base
// product of all rows on top.
#include "bindings/batched_lora.h"

#include <tuple>

#include "bindings/batched_lora_check.h"
#include "bindings/batched_lora_parts.h"

namespace pk {
namespace {

using lora_linear::Adapter;
using lora_linear::Kernels;
using lora_linear::Member;
using lora_linear::Problem;

constexpr const char* kName = "batched_lora";

// Where each member's block of h begins, and last the width of h.
std::vector<int64_t> h_columns(const std::vector<Tensor>& lora_A, const std::vector<int64_t>& member, size_t G) {
  std::vector<int64_t> begins(1, 0);
  for (size_t g = 0; g < G; ++g) {
    int64_t widest = 0;
    for (size_t l = 0; l < std::min(lora_A.size(), member.size()); ++l) {
      if (member[l] == static_cast<int64_t>(g)) widest = std::max(widest, lora_A[l].size(0));
    }
    begins.push_back(begins.back() + widest);
  }
  return begins;
}

char* row(void* matrix, int64_t i, int64_t bytes) {
  return static_cast<char*>(matrix) + i * bytes;
}

// Whether each row is in a part that has the member, or (member -1) in any part.
std::vector<bool> rows_in_parts(Parts& parts, int64_t M, int64_t member) {
  std::vector<bool> covered(M, false);
  for (const Part& part : parts.all()) {
    const bool has = std::find(part.member.begin(), part.member.end(), member) != part.member.end();
    for (int64_t i = 0; (has || member < 0) && i < part.problem.M; ++i) covered[part.rows[i]] = true;
  }
  return covered;
}

void run_forward(const LoraLinearCall& call, Parts& parts) {
  if (call.is_double()) {
    for (const Part& part : parts.all()) lora_linear::forward_double(part.problem);
    return;
  }
  parts.run(
      call.kernels->shrink, [](const Problem& p) { return lora_linear::row_units(p.M) * p.L; },
      [](const Problem& p) { return p.M * p.K * p.R; });
  parts.run(call.kernels->expand, lora_linear::member_units,
            [](const Problem& p) { return p.M * p.R * lora_linear::member_units(p) * lora_linear::kBlock; });
}

std::tuple<std::vector<Tensor>, Tensor> forward(const Tensor& x, const Tensor& route, const std::vector<Tensor>& weight,
                                                const std::vector<OptionalTensor>& bias,
                                                const std::vector<Tensor>& lora_A, const std::vector<Tensor>& lora_B,
                                                const std::vector<OptionalTensor>& lora_bias,
                                                const std::vector<int64_t>& member, const std::vector<int64_t>& adapter,
                                                const std::vector<double>& scaling,
                                                const std::vector<double>& dropout_p, const OptionalTensor& seed) {
  const ForwardArguments arguments{x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed, kName};
  const std::vector<batched_lora::Segment> segments = BatchedLoraCheck(arguments, route, adapter).run();
  LoraLinearCall call(weight, lora_A, lora_B, member, scaling, dropout_p, seed);
  Problem& p = call.problem;
  const Rows rows = as_rows(x);
  call.set_rows(rows.count);
  call.set_x(rows);
  const std::vector<int64_t> column = h_columns(lora_A, member, weight.size());
  const Tensor h = empty({p.M, column.back()}, call.accumulator());
  const int64_t item = size_of(*dtype_of(dtype_code(x))), h_item = size_of(*dtype_of(call.accumulator()));
  std::vector<Tensor> y;
  for (size_t g = 0; g < weight.size(); ++g) {
    y.push_back(empty_rows(x, call.members[g].N, dtype_code(x)));
    if (bias[g]) call.members[g].bias = call.vector(*bias[g]);
  }
  for (size_t l = 0; l < lora_bias.size(); ++l) {
    if (lora_bias[l]) call.adapters[l].bias = call.factor(*lora_bias[l]);
  }
  if (p.M == 0) return {y, h};
  std::memset(h.mutable_data_ptr(), 0, h.numel() * h_item);
  Parts parts(call, segments, adapter, column);
  for (Part& part : parts.all()) {
    Problem& own = part.problem;
    own.x = parts.gathered(part, p.x, p.K, own.x_stride, item);
    own.h = parts.scattered(part, h.mutable_data_ptr(), column.back(), h_item);
    if (!part.in_place) std::memset(own.h, 0, own.M * column.back() * h_item);
    for (size_t g = 0; g < part.members.size(); ++g) {
      Member& m = part.members[g];
      m.y = parts.scattered(part, y[part.member[g]].mutable_data_ptr(), m.N, item);
    }
    own.scratch = call.scratch(lora_linear::member_scratch(own));
  }
  std::vector<bool> on_top(weight.size());  // of what the parts and the bias left in y
  for (size_t g = 0; g < weight.size(); ++g) {
    const Member& m = call.members[g];
    const std::vector<bool> covered = rows_in_parts(parts, p.M, g);
    on_top[g] = m.bias || std::find(covered.begin(), covered.end(), true) != covered.end();
    for (int64_t i = 0; on_top[g] && i < p.M; ++i) {
      if (!covered[i]) parts.fill(row(y[g].mutable_data_ptr(), i, m.N * item), m.bias, m.N * item);
    }
  }
  parts.gather();
  run_forward(call, parts);
  parts.scatter();
  for (size_t g = 0; !call.is_double() && g < weight.size(); ++g) {
    const Member& m = call.members[g];
    gemm(matrix(y[g], p.M, m.N, m.N, 1), matrix(rows.tensor, p.M, p.K, p.x_stride, 1),
         matrix(weight[g], p.K, m.N, m.weight_k, m.weight_n), on_top[g]);
  }
  return {y, h};
}

// Gradients of the adapters that no row has.
void zero_absent(const LoraLinearCall& call, const std::vector<batched_lora::Segment>& segments,
                 const std::vector<int64_t>& adapter) {
  for (size_t l = 0; l < adapter.size(); ++l) {
    const auto has_rows = [&](const batched_lora::Segment& segment) { return segment.adapter == adapter[l]; };
    if (std::any_of(segments.begin(), segments.end(), has_rows)) continue;
    const Adapter& entry = call.adapters[l];
    const int64_t N = call.members[entry.member].N;
    call.zero_factor_gradient(entry.dA, entry.R * call.problem.K);
    call.zero_factor_gradient(entry.dB, entry.R * N);
    call.zero_factor_gradient(entry.dbias, N);
  }
}

bool any_dA(const Problem& p) {
  return std::any_of(p.adapter, p.adapter + p.L, [](const Adapter& adapter) { return adapter.dA; });
}
bool reads_dy(const Problem& p) {
  return p.ds || std::any_of(p.member, p.member + p.G, [](const Member& m) { return m.dbias; }) ||
         std::any_of(p.adapter, p.adapter + p.L, [](const Adapter& adapter) { return adapter.dB || adapter.dbias; });
}

// What the parts read and write. h: of the call, or null.
void set_part(Parts& parts, Part& part, const void* h, int64_t item, int64_t h_item) {
  Problem& own = part.problem;
  for (Member& m : part.members) m.dy = parts.gathered(part, m.dy, m.N, m.dy_stride, item);
  int64_t h_stride = own.R;
  own.h = h ? const_cast<void*>(parts.gathered(part, h, own.R, h_stride, h_item)) : nullptr;  // read only
  if (any_dA(own)) own.x = parts.gathered(part, own.x, own.K, own.x_stride, item);
  if (own.dx) own.dx = parts.scattered(part, own.dx, own.K, item);
}

// The pass over dy, a panel of rows of each part at a time, as in lora_linear.
void run_dy_panels(Parts& parts, const Kernels& kernels) {
  bool more = true;
  for (int64_t i = 0; more; ++i) {
    more = false;
    for (Part& part : parts.all()) {
      Problem& p = part.problem;
      const int64_t length = lora_linear::ds_parts(p) > 1 ? lora_linear::kPanelRows : p.M;
      p.ds_part = p.ds && lora_linear::ds_parts(p) > 1 ? p.ds + p.M * p.R : p.ds;
      p.panel0 = std::min(p.M, i * length);
      p.panel1 = std::min(p.M, p.panel0 + length);
      more = more || p.panel1 < p.M;
    }
    const auto rows = [](const Problem& p) { return p.panel1 - p.panel0; };
    parts.run(
        kernels.dy_pass,
        [&](const Problem& p) { return rows(p) > 0 && reads_dy(p) ? lora_linear::member_units(p) : 0; },
        [&](const Problem& p) { return 2 * rows(p) * p.R * lora_linear::member_units(p) * lora_linear::kBlock; });
    parts.run(
        kernels.sum_ds, [&](const Problem& p) { return p.ds_part != p.ds ? lora_linear::row_units(rows(p)) : 0; },
        [&](const Problem& p) { return lora_linear::ds_parts(p) * rows(p) * p.R; });
  }
}

void run_backward(LoraLinearCall& call, Parts& parts) {
  if (call.is_double()) {
    for (const Part& part : parts.all()) lora_linear::backward_double(part.problem);
    return;
  }
  const auto reads_x = [](const Problem& p) { return p.dx || any_dA(p); };
  for (Part& part : parts.all()) {
    Problem& p = part.problem;
    const int64_t sums = std::max(lora_linear::member_scratch(p), lora_linear::x_pass_scratch(p));
    p.scratch = call.scratch(sums + (reads_x(p) ? lora_linear::ds_scratch(p) : 0));
    p.ds = reads_x(p) ? p.scratch + sums : nullptr;
  }
  run_dy_panels(parts, *call.kernels);
  parts.run(
      call.kernels->x_pass, [&](const Problem& p) { return reads_x(p) ? lora_linear::blocks(p.K) : 0; },
      [](const Problem& p) { return 2 * p.K * p.M * p.R; });
}

std::vector<Tensor> backward(const std::vector<Tensor>& dy, const OptionalTensor& x, const OptionalTensor& h,
                             const Tensor& route, const std::vector<Tensor>& weight, const std::vector<Tensor>& lora_A,
                             const std::vector<Tensor>& lora_B, const std::vector<int64_t>& member,
                             const std::vector<int64_t>& adapter, const std::vector<double>& scaling,
                             const std::vector<double>& dropout_p, const OptionalTensor& seed,
                             const std::vector<bool>& needs) {
  const size_t G = weight.size(), L = lora_A.size();
  const GradientOrder at{G, L};
  const std::vector<int64_t> column = h_columns(lora_A, member, G);
  check_backward(dy, x, h, weight, lora_A, lora_B, member, scaling, dropout_p, seed, needs, kName, column.back());
  const std::vector<OptionalTensor> no_bias(G), no_lora_bias(L);
  const ForwardArguments arguments{x ? *x : weight[0], weight, no_bias, lora_A, lora_B, no_lora_bias, member, scaling,
                                   dropout_p,          seed,   kName};
  const int64_t rows_of_dy = dy[0].numel() / weight[0].size(0);
  const std::vector<batched_lora::Segment> segments = BatchedLoraCheck(arguments, route, adapter).run(rows_of_dy);
  LoraLinearCall call(weight, lora_A, lora_B, member, scaling, dropout_p, seed);
  const std::vector<Tensor> gradients = new_gradients(dy, weight, lora_A, lora_B, needs);
  Problem& p = call.problem;
  std::vector<Rows> dy_rows;
  for (size_t g = 0; g < G; ++g) {
    dy_rows.push_back(as_rows(dy[g]));
    call.members[g].dy = dy_rows[g].data();
    call.members[g].dy_stride = dy_rows[g].stride;
  }
  call.set_rows(dy_rows[0].count);
  if (p.M == 0) {
    for (Tensor gradient : gradients) torch::stable::zero_(gradient);
    return gradients;
  }
  std::optional<Rows> x_rows;
  if (x) call.set_x(x_rows.emplace(as_rows(*x)));
  set_outputs(call, at, gradients, needs);
  zero_absent(call, segments, adapter);
  Parts parts(call, segments, adapter, column);
  const int64_t item = size_of(*dtype_of(dtype_code(dy[0]))), h_item = size_of(*dtype_of(call.accumulator()));
  for (Part& part : parts.all()) set_part(parts, part, h ? h->const_data_ptr() : nullptr, item, h_item);
  if (p.dx) {
    const std::vector<bool> covered = rows_in_parts(parts, p.M, -1);
    for (int64_t i = 0; i < p.M; ++i) {
      if (!covered[i]) parts.fill(row(p.dx, i, p.K * item), nullptr, p.K * item);
    }
  }
  parts.add_whole();
  parts.gather();
  run_backward(call, parts);
  parts.scatter();
  for (size_t g = 0; g < G; ++g) {
    const Member& m = call.members[g];
    if (p.dx && !call.is_double()) {
      gemm(matrix(gradients[0], p.M, p.K, p.K, 1), matrix(dy_rows[g].tensor, p.M, m.N, m.dy_stride, 1),
           matrix(weight[g], m.N, p.K, m.weight_n, m.weight_k), true);
    }
    if (needs[at.weight(g)]) {
      gemm(gradients[at.weight(g)], matrix(dy_rows[g].tensor, m.N, p.M, 1, m.dy_stride),
           matrix(x_rows->tensor, p.M, p.K, p.x_stride, 1), false);
    }
  }
  call.finish();
  return gradients;
}

Tensor route(const Tensor& adapter_ids, int64_t adapters) {
  check_ids(adapter_ids, adapters);
  const Tensor ids = dense(adapter_ids);
  const int64_t M = ids.size(0);
  const Tensor out = empty({batched_lora::route_size(M, adapters)}, aoti_torch_dtype_int32());
  auto* to = static_cast<int32_t*>(out.mutable_data_ptr());
  if (dtype_code(ids) == aoti_torch_dtype_int32()) {
    batched_lora::make_route(static_cast<const int32_t*>(ids.const_data_ptr()), M, adapters, to);
  } else {
    batched_lora::make_route(static_cast<const int64_t*>(ids.const_data_ptr()), M, adapters, to);
  }
  return out;
}

}  // namespace

void bind_batched_lora_cpu(torch::stable::detail::StableLibrary& library) {
  library.impl("batched_lora_route", TORCH_BOX(&route));
  library.impl("batched_lora", TORCH_BOX(&forward));
  library.impl("batched_lora_backward", TORCH_BOX(&backward));
}

}  // namespace pk
