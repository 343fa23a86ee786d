#include "moiety/nn/recompute.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "moiety/base/error.h"
#include "tiny.h"

namespace moiety {
namespace {

using torch::Tensor;

// Uses everything a block may: parameters, chance, state across depth, losses, and counts outside of the gradient.
struct Body {
  Tensor weight = torch::randn({6, 6}).requires_grad_(true);
  int64_t counted = 0;

  Tensor operator()(const Tensor& x, Pass& pass) {
    if (pass.training && !pass.recomputing) ++counted;
    auto h = torch::matmul(x, weight);
    if (pass.state.count("memory") != 0) h = h + pass.state.at("memory");
    const auto mask = torch::rand_like(h) > 0.4;
    h = torch::tanh(h) * mask;
    pass.state["memory"] = h * 0.5;
    pass.add_loss("size", h.square().mean() * 0.1);
    return x + h;
  }
};

struct Gradients {
  Tensor x, first, second, loss;
  std::vector<double> losses;
  int64_t counted;
};

Gradients run(bool again) {
  torch::manual_seed(11);
  const auto one = std::make_shared<Body>(), two = std::make_shared<Body>();
  Tensor x = torch::randn({3, 6}).requires_grad_(true);
  Pass pass;
  pass.training = true;
  Tensor h = x * 1.5;
  for (const auto& body : {one, two}) {
    const auto call = [body](const Tensor& t, Pass& p) { return (*body)(t, p); };
    h = again ? recompute(h, pass, call) : call(h, pass);
  }
  Tensor total = (h * torch::arange(6)).sum() + pass.state.at("memory").sum();
  std::vector<double> losses;
  for (const auto& [name, value] : pass.losses) {
    total = total + value;
    losses.push_back(value.item<double>());
  }
  total.backward();
  return {x.grad(), one->weight.grad(), two->weight.grad(), total.detach(), losses, one->counted + two->counted};
}

TEST(Recompute, GivesTheSameGradients) {
  const auto plain = run(false), again = run(true);
  EXPECT_TRUE(torch::equal(plain.loss, again.loss));
  EXPECT_EQ(plain.losses, again.losses);
  EXPECT_TRUE(torch::equal(plain.x, again.x));
  EXPECT_TRUE(torch::equal(plain.first, again.first));
  EXPECT_TRUE(torch::equal(plain.second, again.second));
}

TEST(Recompute, CountsOnce) {
  EXPECT_EQ(run(true).counted, 2);
}

TEST(Recompute, LeavesTheStreamOfRandomNumbersAsItWas) {
  torch::manual_seed(1);
  run(false);
  const auto after_plain = torch::rand({4});
  torch::manual_seed(1);
  run(true);
  EXPECT_TRUE(torch::equal(after_plain, torch::rand({4})));
}

TEST(Recompute, LearnsWhenOnlyTheParametersDo) {
  torch::manual_seed(2);
  const auto weight = torch::randn({4, 4}).requires_grad_(true);
  const auto x = torch::randn({2, 4});
  Pass pass;
  recompute(x, pass, [weight](const Tensor& t, Pass&) { return torch::matmul(t, weight); }).sum().backward();
  EXPECT_TRUE(torch::allclose(weight.grad(), torch::matmul(x.t(), torch::ones({2, 4}))));
}

TEST(Recompute, RefusesACache) {
  KvCache cache(1);
  Pass pass;
  pass.cache = &cache;
  EXPECT_THROW(recompute(torch::zeros({1, 2}), pass, [](const Tensor& t, Pass&) { return t; }), Error);
}

std::map<std::string, Tensor> model_gradients(const nlohmann::json& config, bool again, size_t* records) {
  torch::manual_seed(4);
  auto json = config;
  json["vocab_size"] = 50;
  LoadOptions options;
  options.trainable = true;
  const auto model = make_causal(json, options);
  const auto ids = torch::randint(50, {2, 16});
  Trace trace;
  Pass pass;
  pass.training = true;
  pass.recompute_blocks = again;
  pass.trace = &trace;
  pass.segments = torch::cat({torch::ones({2, 9}, torch::kInt64), torch::full({2, 7}, 2, torch::kInt64)}, 1);
  token_loss(model->forward(ids, pass), ids).backward();
  *records = trace.records.size();
  std::map<std::string, Tensor> out;
  for (const auto& p : model->named_parameters()) out[p.key()] = p.value().grad();
  return out;
}

TEST(Recompute, GivesWholeModelsTheSameGradients) {
  for (const auto& config : {tiny::dense_config(), tiny::mixture_config()}) {
    size_t records = 0, records_again = 0;
    const auto plain = model_gradients(config, false, &records), again = model_gradients(config, true, &records_again);
    EXPECT_EQ(records, records_again);
    for (const auto& [name, gradient] : plain) {
      ASSERT_EQ(gradient.defined(), again.at(name).defined()) << name;
      if (gradient.defined()) {
        EXPECT_TRUE(torch::equal(gradient, again.at(name))) << name;
      }
    }
  }
}

}  // namespace
}  // namespace moiety
