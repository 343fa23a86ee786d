#include "moiety/moe/site_experts.h"

#include <torch/torch.h>

#include <algorithm>

#include "moiety/base/error.h"
#include "moiety/moe/cut.h"

namespace moiety {

std::shared_ptr<GatedExperts> experts_at(PartSite& s, int64_t count, int64_t width, double scale) {
  check(count >= 1 && width >= 1, "{} experts of {} hidden units are impossible", count, width);
  Init gate = normal_init(s.init_std), up = gate, down = gate;
  if (!s.own.has("experts.gate_proj") && s.dense) {
    const DenseLayer dense = s.dense();
    if (dense.gate.defined() && dense.gate.size(0) % width == 0) {
      const int64_t pieces = dense.gate.size(0) / width;
      const auto which = torch::arange(count, torch::kInt64).remainder(pieces);
      const auto sets = contiguous_sets(dense.gate.size(0), pieces).index_select(0, which);
      const auto copy = [](torch::Tensor from) { return [from](torch::Tensor t) { t.copy_(from); }; };
      gate = copy(cut_rows(dense.gate, sets));
      up = copy(cut_rows(dense.up, sets));
      down = copy(cut_columns(dense.down, sets) * scale);
    }
  }
  auto g = s.own.stack("experts.gate_proj", count, s.hidden, width, false, gate);
  auto u = s.own.stack("experts.up_proj", count, s.hidden, width, false, up);
  auto d = s.own.stack("experts.down_proj", count, width, s.hidden, false, down);
  return std::make_shared<GatedExperts>(g, u, d, activation(s.act));
}

std::shared_ptr<FeedForward> shared_at(PartSite& s, int64_t width) {
  if (width == 0) return nullptr;
  const Init init = normal_init(s.init_std);
  auto gate = s.own.linear("shared_experts.gate_proj", s.hidden, width, false, init);
  auto up = s.own.linear("shared_experts.up_proj", s.hidden, width, false, init);
  auto down = s.own.linear("shared_experts.down_proj", width, s.hidden, false, init);
  return std::make_shared<FeedForward>(gate, up, down, activation(s.act));
}

torch::Tensor choice_bias_at(PartSite& s, const std::string& name, int64_t experts, bool has_rule) {
  if (!s.choice_bias || has_rule) return {};
  return s.own.get(name + ".e_score_correction_bias", {experts}, constant_init(0.0)).set_requires_grad(false);
}

int64_t width_at(const PartSite& s, int64_t given, int64_t active) {
  return given > 0 ? given : std::max<int64_t>(1, s.width / std::max<int64_t>(1, active));
}

}  // namespace moiety
