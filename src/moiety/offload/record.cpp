#include "moiety/offload/record.h"

#include <torch/torch.h>

#include <algorithm>
#include <map>

#include "moiety/base/error.h"
#include "moiety/offload/offload.h"

namespace moiety {

ExpertTraces record_experts(CausalModel& model, const std::vector<int64_t>& ids, int64_t bos, int64_t context,
                            const std::function<void(int64_t, int64_t)>& progress) {
  check(!ids.empty(), "there is no text to record");
  check(context > (bos >= 0 ? 1 : 0), "windows of {} tokens are too short", context);
  const torch::NoGradGuard frozen;
  ExpertTraces out;
  std::map<int64_t, Routing> of;  // by block
  int64_t experts = 0;
  Trace trace;
  trace.on_record = [&](const Trace::Record& r) {
    if (r.site.site != "ffn" || r.experts == 0) return;
    check(experts == 0 || experts == r.experts, "layers of {} and {} experts cannot be recorded together", experts,
          r.experts);
    experts = r.experts;
    of[r.site.block] = r.routing;
  };
  const auto total = static_cast<int64_t>(ids.size());
  const int64_t step = context - (bos >= 0 ? 1 : 0);
  for (int64_t begin = 0; begin < total; begin += step) {
    const int64_t end = std::min(total, begin + step);
    std::vector<int64_t> window;
    if (bos >= 0) window.push_back(bos);
    window.insert(window.end(), ids.begin() + begin, ids.begin() + end);
    const auto tokens = static_cast<int64_t>(window.size());
    Pass pass;
    pass.trace = &trace;
    of.clear();
    model.hidden(torch::tensor(window, torch::kInt64).unsqueeze(0), pass);
    check(!of.empty(), "the model has no expert layers: there is nothing to record");
    std::vector<torch::Tensor> chosen, gates;
    for (const auto& [block, r] : of) {
      check(chosen.empty() || chosen[0].size(1) == r.experts.size(1),
            "block {} chooses {} experts a token, another one {}: only equal numbers can be recorded", block,
            r.experts.size(1), chosen.empty() ? 0 : chosen[0].size(1));
      check((r.experts >= 0).all().item<bool>(), "block {} leaves experts of some tokens out: that cannot be recorded",
            block);
      chosen.push_back(r.experts.to(torch::kCPU));
      const auto g = r.gates.to(torch::kCPU, torch::kFloat32);
      gates.push_back(g / g.sum(-1, true));
    }
    const auto e = torch::stack(chosen, 1).contiguous();  // [T, L, K]
    const auto g = torch::stack(gates, 1).contiguous();
    out.layers = e.size(1);
    out.top_k = e.size(2);
    out.experts.insert(out.experts.end(), e.const_data_ptr<int64_t>(), e.const_data_ptr<int64_t>() + e.numel());
    out.gates.insert(out.gates.end(), g.const_data_ptr<float>(), g.const_data_ptr<float>() + g.numel());
    for (int64_t t = 0; t < tokens; ++t) out.sequence_start.push_back(t == 0);
    out.tokens += tokens;
    if (progress) progress(end, total);
  }
  out.num_experts = experts;
  out.router_hash = router_hash(model);
  return out;
}

}  // namespace moiety
