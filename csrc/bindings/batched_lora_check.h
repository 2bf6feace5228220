// What the kernels of batched_lora need to be safe, in the words of `check` in peft_kernels/ops/batched_lora/op.py.
#pragma once

#include <map>
#include <utility>

#include "batched_lora/route.h"
#include "bindings/lora_linear_check.h"

namespace pk {

inline void check_ids(const Tensor& adapter_ids, int64_t adapters) {
  const int32_t code = dtype_code(adapter_ids);
  STD_TORCH_CHECK(code == aoti_torch_dtype_int32() || code == aoti_torch_dtype_int64(),
                  "batched_lora_route: adapter_ids must be an int32 or int64 tensor");
  STD_TORCH_CHECK(adapter_ids.dim() == 1, "batched_lora_route: adapter_ids must have shape [rows]");
  STD_TORCH_CHECK(1 <= adapters && adapters <= INT32_MAX,
                  "batched_lora_route: adapters must be from 1 to 2^31 - 1, got ", adapters);
}

class BatchedLoraCheck : LoraLinearCheck {
 public:
  BatchedLoraCheck(const ForwardArguments& arguments, const Tensor& route, const std::vector<int64_t>& adapter)
      : LoraLinearCheck(arguments), route_(route), adapter_(adapter) {}

  // Returns the segments of the route; M, the rows of x, only where another tensor stands in for x.
  std::vector<batched_lora::Segment> run(std::optional<int64_t> M = std::nullopt) const {
    LoraLinearCheck::run();
    same_length("adapter", adapter_.size(), a_.lora_A.size());
    places();
    return segments(M ? *M : a_.x.numel() / a_.x.size(a_.x.dim() - 1));
  }

 private:
  void places() const {
    std::map<std::pair<int64_t, int64_t>, size_t> places;
    for (size_t i = 0; i < adapter_.size(); ++i) {
      require(adapter_[i] >= 0, "adapter[", i, "] must be 0 or more, got ", adapter_[i]);
      const size_t before = places.try_emplace({a_.member[i], adapter_[i]}, i).first->second;
      require(before == i, "an adapter must have one entry per member, got entries ", before, " and ", i,
              " of adapter ", adapter_[i], " for member ", a_.member[i]);
    }
  }

  std::vector<batched_lora::Segment> segments(int64_t M) const {
    const int32_t code = dtype_code(route_);
    if (code != aoti_torch_dtype_int32()) require(false, "route must have dtype int32, got ", name_of(code));
    const Device device = device_of(route_);
    if (!(device == device_)) {
      require(false, "route must be on x's device ", words_of(device_), ", got ", words_of(device));
    }
    const int64_t numbers = route_.numel() - batched_lora::kRouteHeader - 2 * M;
    const int64_t tiles = numbers / batched_lora::kTileFields, whole = M / batched_lora::kTile;
    const bool fits = route_.dim() == 1 && route_.is_contiguous() && numbers % batched_lora::kTileFields == 0 &&
                      (M > 0 ? 1 : 0) <= tiles - whole && tiles - whole <= M;
    const char* const rule = "route must come from batched_lora_route for the ";
    if (!fits) require(false, rule, M, " rows of x, got shape ", shape_of(route_));
    const auto* data = static_cast<const int32_t*>(route_.const_data_ptr());
    std::vector<batched_lora::Segment> segments;
    const bool read = batched_lora::read_route(data, route_.numel(), M, segments);
    require(read, rule, M, " rows of x, got ", data[batched_lora::kRouteRows], " rows or another tensor");
    return segments;
  }

  const Tensor& route_;
  const std::vector<int64_t>& adapter_;
};

}  // namespace pk
