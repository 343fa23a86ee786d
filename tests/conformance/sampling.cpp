// Sampling against transformers' logits processors; tests/scripts/sampling_parity.py writes the cases.
#include "moiety/decode/sampling.h"

#include <torch/torch.h>

#include "conform.h"

namespace moiety::conform {
namespace {

std::vector<int64_t> ids(const Case& c, const std::string& name) {
  const auto tensor = c.in(name);
  return {tensor.data_ptr<int64_t>(), tensor.data_ptr<int64_t>() + tensor.numel()};
}

// logits [V] f32, prompt and generated token ids -> scores [V], -inf where a token is cut away.
MOIETY_OP("sampling", "process", [](const Case& c) -> Outputs {
  Sampler sampler(parse<SamplerConfig>(c.config, "config"), RandomStream(0, "conformance"));
  sampler.see_prompt(ids(c, "prompt"));
  for (const int64_t id : ids(c, "generated")) sampler.accept(id);
  auto scores = c.in("logits");
  sampler.process({scores.data_ptr<float>(), static_cast<size_t>(scores.numel())});
  return {{"scores", scores}};
});

}  // namespace
}  // namespace moiety::conform
