#pragma once
// Conformance ops: tests/conformance/<slug>.cpp calls the public API on a case's inputs, and main.cpp compares what
// comes back.
//
//   MOIETY_OP("layernorm-scaling", "scale", [](const Case& c) -> Outputs {
//     return {{"y", layer_norm_scaled(c.in("x"), c.config.at("layer"))}};
//   });
#include <torch/types.h>

#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

namespace moiety::conform {

/// One case file: its settings and its `in.*` tensors (f32, f64, i64, i32, u8, i8, bool), on the CPU.
class Case {
 public:
  nlohmann::json config;                        ///< an object
  std::map<std::string, torch::Tensor> inputs;  ///< without the prefix `in.`

  bool has(const std::string& name) const { return inputs.count(name) != 0; }
  /// A contiguous copy that the op may change. Throws Error when the case has no such input.
  torch::Tensor in(const std::string& name) const;
  /// The same asking for a gradient.
  torch::Tensor leaf(const std::string& name) const { return in(name).requires_grad_(true); }
};

/// Named results, without the prefix `out.`; names that the case does not ask for are ignored.
using Outputs = std::map<std::string, torch::Tensor>;
using Op = std::function<Outputs(const Case&)>;

/// Every registered op by "system/op".
std::map<std::string, Op>& ops();

struct RegisterOp {
  RegisterOp(const std::string& system, const std::string& op, Op body) { ops()[system + "/" + op] = std::move(body); }
};

}  // namespace moiety::conform

#define MOIETY_OP_JOIN(a, b) a##b
#define MOIETY_OP_NAME(line) MOIETY_OP_JOIN(moiety_op_, line)
/// At namespace scope: registers a function or lambda `Outputs(const Case&)`; it may contain commas.
#define MOIETY_OP(system, op, ...) \
  static const ::moiety::conform::RegisterOp MOIETY_OP_NAME(__LINE__)(system, op, __VA_ARGS__)
