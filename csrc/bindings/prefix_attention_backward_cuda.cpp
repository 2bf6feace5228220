// prefix_attention's backward on a GPU: allocate, launch what `needs` asks for (prefix_attention/backward_cuda.h). Like
// the forward it neither waits for the device nor reads from it.
#include "bindings/cuda_device.h"
#include "bindings/prefix_attention.h"
#include "bindings/prefix_attention_call.h"
#include "prefix_attention/backward_cuda.h"

namespace pk {
namespace {

using namespace prefix_attention;

class PrefixBackward {
 public:
  explicit PrefixBackward(const PrefixGradients& g)
      : device_(device_of(g.a.query)), on_(device_), wide_(accumulator_code(g.a.query)), call_(g.a) {
    outputs = prefix_gradients(call_, g);
  }

  std::vector<Tensor> outputs;

  void run() const {
    const Problem& p = call_.problem;
    const int64_t rows = p.rows > 0 ? p.B * p.Hq * p.S : 0;
    const bool merges = p.composition == Composition::kMerge, gates = p.dgate || p.dkey_gate;
    const bool keys = (p.dk || p.dv) && p.B * p.T > 0 && p.rows > 0;
    const bool prefixes = (p.dpk || p.dpv) && p.prefixes * p.P > 0;
    const bool shares = !merges || gates;
    Backward backward{p};
    const Tensor numbers = empty({kNumbers, rows}, wide_, device_);
    void** const places[kNumbers] = {&backward.total, &backward.share, &backward.dc, &backward.own_less,
                                     &backward.prefix_less};
    for (int64_t i = 0; i < kNumbers; ++i) *places[i] = row(numbers, i, rows);
    if (merges) backward.own_less = backward.prefix_less = backward.total;
    if (rows > 0 && (shares || p.dq || keys || prefixes)) {
      launched("totals", backward_totals(backward, on_.stream()));
    }
    if (rows > 0 && shares) launched("shares", backward_shares(backward, on_.stream()));
    if (rows > 0 && p.dq) launched("queries", backward_queries(backward, on_.stream()));
    if (keys) launched("keys", backward_keys(backward, on_.stream()));
    if (prefixes) run_prefixes(backward);
    if (p.dgate) run_gate(backward, p.gate, backward.share, p.dgate);
    if (p.dkey_gate) run_gate(backward, p.key_gate, backward.dc, p.dkey_gate);
  }

 private:
  static constexpr int64_t kNumbers = 5;  // of a row

  void* row(const Tensor& numbers, int64_t i, int64_t size) const {
    const int64_t bytes = call_.problem.type == Dtype::kFloat64 ? 8 : 4;
    return static_cast<char*>(numbers.mutable_data_ptr()) + i * size * bytes;
  }

  void run_prefixes(Backward& backward) const {
    const Problem& p = call_.problem;
    backward.splits = prefix_splits(p);
    const Tensor parts = empty({2, backward.splits, p.prefixes, p.Hkv, p.P, p.D}, wide_, device_);
    backward.parts = parts.mutable_data_ptr();
    launched("prefixes", backward_prefixes(backward, on_.stream()));
    launched("prefix_sums", backward_prefix_sums(backward, on_.stream()));
  }

  void run_gate(const Backward& backward, const Gate& gate, const void* numbers, void* out) const {
    if (gate.row && call_.problem.rows == 0) return;
    launched("gates", backward_gates(backward, gate, numbers, out, on_.stream()));
  }

  void launched(const char* kernel, cudaError_t error) const {
    STD_TORCH_CHECK(error == cudaSuccess, "prefix_attention_backward: the kernel ", kernel,
                    " could not be launched on device ", device_.index, ": ", words_of(error));
  }

  const Device device_;
  const OnDevice on_;
  const int32_t wide_;
  PrefixCall call_;
};

}  // namespace

std::vector<Tensor> prefix_attention_backward_cuda(const PrefixGradients& gradients) {
  const PrefixBackward backward(gradients);
  backward.run();
  return backward.outputs;
}

}  // namespace pk
