// peft_kernels._C: launch plans and build info as Python data. Optional, free of torch, never on an op's path.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "plan/build_info.h"
#include "plan/lora_linear_plan.h"

namespace py = pybind11;

namespace {

py::object text_or_none(const char* text) {
  return *text ? py::object(py::str(text)) : py::none();
}

py::list split(const char* text) {
  py::list parts;
  std::istringstream stream{std::string(text)};
  for (std::string part; std::getline(stream, part, ';');) parts.append(part);
  return parts;
}

py::dict build_info() {
  const pk::BuildInfo& info = pk::build_info();
  py::dict facts;
  facts["version"] = info.version;
  facts["revision"] = text_or_none(info.revision);
  facts["cuda"] = text_or_none(info.cuda);
  facts["cuda_archs"] = split(info.cuda_archs);
  facts["instruction_sets"] = split(info.instruction_sets);
  return facts;
}

py::list steps(const std::vector<pk::lora_linear::Step>& all) {
  py::list pairs;
  for (const auto& step : all) pairs.append(py::make_tuple(step.name, step.units));
  return pairs;
}

py::dict lora_linear_plan(int64_t M, int64_t N, int64_t K, int64_t R, int64_t dtype_size) {
  if (M < 0 || N < 1 || K < 1 || R < 1)
    throw py::value_error("lora_linear_plan: M must be 0 or more, N, K and R 1 or more");
  if (dtype_size != 2 && dtype_size != 4 && dtype_size != 8) {
    throw py::value_error("lora_linear_plan: dtype_size must be 2, 4 or 8, got " + std::to_string(dtype_size));
  }
  const pk::lora_linear::Plan plan = pk::lora_linear::plan(M, N, K, R, dtype_size);
  py::dict shown;
  shown["path"] = plan.path;
  shown["block"] = plan.block;
  shown["row_block"] = plan.row_block;
  shown["forward"] = steps(plan.forward);
  shown["backward"] = steps(plan.backward);
  shown["scratch_bytes"] = py::make_tuple(plan.forward_scratch, plan.backward_scratch);
  return shown;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Launch plans and build info as data; nothing here runs an operator.";
  module.def("build_info", &build_info,
             "version, revision (None if the build was not told), cuda (toolkit, None if built without), cuda_archs,\n"
             "instruction_sets (of the CPU kernels)");
  module.def(
      "lora_linear_plan", &lora_linear_plan, py::arg("M"), py::arg("N"), py::arg("K"), py::arg("R"),
      py::arg("dtype_size"),
      "How the CPU runs one projection with one adapter: path, block sizes, (phase, units) in order for forward\n"
      "and backward, scratch bytes of both. M rows, N out_features, K in_features, R rank, bytes of an element.");
}
