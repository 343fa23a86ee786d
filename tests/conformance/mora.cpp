// MoRA: the ranks beside a matrix, the end of a task, metrics of a stream.
#include "moiety/adapt/mora.h"

#include <torch/torch.h>

#include "conform.h"

namespace moiety::conform {
namespace {

torch::Tensor or_nothing(const Case& c, const std::string& name) {
  return c.has(name) ? c.in(name) : torch::Tensor();
}

MOIETY_OP("mora", "mora_forward", [](const Case& c) -> Outputs {
  auto x = c.leaf("x"), a = c.leaf("new_A"), b = c.leaf("new_B");
  MoraConfig config;
  config.top_k = c.config.at("topk");
  config.temperature = c.config.at("temperature");
  config.threshold = c.config.at("threshold");
  config.scaling = c.config.at("scaling");
  config.eps = c.config.at("eps");
  Linear matrix(c.in("weight"), or_nothing(c, "bias"));
  matrix->attach(std::make_shared<Mora>("q_proj", or_nothing(c, "old_A"), or_nothing(c, "old_B"), a, b, config));
  Trace trace;
  Pass pass;
  pass.training = c.config.at("training").get<bool>();
  pass.trace = &trace;
  const auto y = project(matrix, x, pass);
  (y * c.in("grad_y")).sum().backward();
  const Routing& r = trace.records.at(0).routing;
  const auto weights =
      mora_choose(r.logits.detach(), config.top_k, config.temperature, config.threshold, pass.training, config.eps)
          .weights;
  const auto shape = [&](const torch::Tensor& t) { return t.view({x.size(0), x.size(1), -1}); };
  return {{"y", y},
          {"scores", shape(r.scores)},
          {"weights", shape(weights)},
          {"grad_x", x.grad()},
          {"grad_new_A", a.grad()},
          {"grad_new_B", b.grad()}};
});

MOIETY_OP("mora", "mora_consolidate", [](const Case& c) -> Outputs {
  const auto all = mora_consolidate(or_nothing(c, "old_A"), or_nothing(c, "old_B"), c.in("new_A"), c.in("new_B"),
                                    c.config.at("scaling"), c.config.at("mode"));
  return {{"old_A", all.a}, {"old_B", all.b}};
});

MOIETY_OP("mora", "stream_metrics", [](const Case& c) -> Outputs {
  const auto m = stream_metrics(c.in("acc"));
  const auto f = [](double v) { return torch::tensor(v, torch::kFloat64); };
  return {{"transfer", f(m.transfer)},
          {"average", f(m.average)},
          {"last", f(m.last)},
          {"bwt", f(m.bwt)},
          {"transfer_per_task", torch::tensor(m.transfer_per_task, torch::kFloat64)}};
});

}  // namespace
}  // namespace moiety::conform
