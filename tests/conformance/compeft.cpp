// ComPEFT: compression of a whole expert, the Golomb position code, merging of compressed experts.
#include "moiety/compress/compeft.h"

#include <torch/torch.h>

#include <cstring>

#include "conform.h"

namespace moiety::conform {
namespace {

CompeftConfig config_of(const Case& c) {
  CompeftConfig config;
  config.density = c.config.at("k").get<double>() / 100.0;
  config.alpha = c.config.at("alpha");
  return config;
}

ExpertTensors tensors_of(const Case& c, const std::string& front) {
  ExpertTensors out;
  for (const auto& [name, value] : c.inputs)
    if (name.rfind(front, 0) == 0) out[name.substr(front.size())] = value;
  return out;
}

torch::Tensor signs_of(const TernaryMasks& masks) {
  const auto signs = ternary_signs(masks);
  auto out = torch::empty({masks.d}, torch::kInt8);
  if (!signs.empty()) std::memcpy(out.data_ptr<int8_t>(), signs.data(), signs.size());
  return out;
}

MOIETY_OP("compeft", "compress", [](const Case& c) -> Outputs {
  const std::string kind = c.config.at("kind");
  const auto expert = tensors_of(c, "ft."), base = tensors_of(c, "init.");
  const auto tau = task_vector(expert, kind, base);
  const auto entries = task_vector_entries(expert);
  const auto compressed = compeft_compress(tau, config_of(c));
  Outputs out{{"scale", torch::scalar_tensor(compressed.scale)}};
  for (const auto& [name, value] : apply_task_vector(compressed.expand(), entries, kind, base))
    out["ft." + name] = value;
  // A vector that stays as it is has the signs that it has.
  const auto signs = compressed.form == "dense" ? tau.sign().to(torch::kInt8) : signs_of(compressed.signs);
  for (const auto& e : entries) out["sign." + e.name] = signs.slice(0, e.begin, e.end).view(e.shape);
  return out;
});

MOIETY_OP("compeft", "golomb", [](const Case& c) -> Outputs {
  const auto signs = c.in("signs").to(torch::kInt8);
  const auto masks = ternary_masks({signs.const_data_ptr<int8_t>(), static_cast<size_t>(signs.numel())});
  const int64_t kept = masks.kept(), b = golomb_low_bits(kept, masks.d);
  const auto code = golomb_encode(masks, b);
  auto bits = torch::empty({code.bits}, torch::kUInt8);
  for (int64_t i = 0; i < code.bits; ++i)
    bits.data_ptr<uint8_t>()[i] = static_cast<uint8_t>(code.bytes[static_cast<size_t>(i / 8)] >> (7 - i % 8)) & 1;
  return {{"b", torch::scalar_tensor(b, torch::kInt64)},
          {"bits", bits},
          {"entropy_bits", torch::scalar_tensor(ternary_entropy_bits(kept, masks.d), torch::kFloat64)}};
});

MOIETY_OP("compeft", "merge", [](const Case& c) -> Outputs {
  const auto tau = c.in("tau").to(torch::kFloat32);
  std::vector<torch::Tensor> rows;
  for (int64_t n = 0; n < tau.size(0); ++n)
    rows.push_back(compeft_compress(tau[n].contiguous(), config_of(c)).expand());
  const auto compressed = torch::stack(rows);
  TaskMergeConfig config;
  config.method = c.config.at("method");
  if (config.method == "ties") config.merge_func = c.config.at("merge_func");
  const auto merged = merge_task_vectors(compressed, config);
  return {{"compressed", compressed},
          {"merged_tau", merged},
          {"theta", c.in("init") + c.config.at("lam").get<double>() * merged}};
});

}  // namespace
}  // namespace moiety::conform
