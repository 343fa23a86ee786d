#include "moiety/moe/rmoe.h"

#include <gtest/gtest.h>

#include "moe_tools.h"
#include "moiety/base/error.h"

namespace moiety {
namespace {

struct Stack {
  std::shared_ptr<RecurrentCell> cell;
  std::vector<std::shared_ptr<RecurrentRouter>> routers;
  Stack(int64_t layers, RmoeConfig config, int64_t hidden = 6) {
    cell = std::make_shared<RecurrentCell>(config.cell, config.width);
    for (int64_t l = 0; l < layers; ++l)
      routers.push_back(std::make_shared<RecurrentRouter>(Linear(hidden, config.width),
                                                          Linear(config.width, config.experts), cell, l == 0, config));
  }
  std::vector<Routing> run(const std::vector<torch::Tensor>& x, Pass& pass) {
    std::vector<Routing> out;
    for (size_t l = 0; l < routers.size(); ++l) {
      pass.block = static_cast<int64_t>(l);
      out.push_back(routers[l]->route(x[l], pass.at("ffn"), pass));
    }
    pass.finish();
    return out;
  }
};

RmoeConfig small(const std::string& cell = "gru") {
  RmoeConfig c;
  c.cell = cell;
  c.width = 5;
  c.experts = 4;
  c.top_k = 2;
  return c;
}

TEST(RecurrentCell, GruEqualsTorch) {
  torch::manual_seed(1);
  torch::NoGradGuard frozen;
  RecurrentCell cell("gru", 5);
  torch::nn::GRUCell right(torch::nn::GRUCellOptions(5, 5));
  const auto p = cell.named_parameters();
  const auto joined = [&](const std::string& what) {
    return torch::cat({p[what + "r"], p[what + "z"], p[what + "n"]});
  };
  right->weight_ih.copy_(joined("weight_i"));
  right->weight_hh.copy_(joined("weight_h"));
  right->bias_ih.copy_(joined("bias_i"));
  right->bias_hh.copy_(joined("bias_h"));
  const auto u = torch::randn({7, 5}), h = torch::randn({7, 5});
  EXPECT_LT(distance(cell.forward(u, h), right->forward(u, h)), 1e-6);
  EXPECT_LT(distance(cell.forward(u, {}), right->forward(u, torch::zeros({7, 5}))), 1e-6);
}

TEST(Rmoe, WithoutRecurrenceLayersRouteOnTheirOwn) {
  torch::manual_seed(2);
  torch::NoGradGuard frozen;
  Stack stack(2, small());
  for (const auto& part : stack.cell->named_parameters()) {
    if (part.key().rfind("weight_h", 0) == 0 || part.key().rfind("bias_h", 0) == 0) part.value().zero_();
    if (part.key() == "bias_iz") part.value().fill_(-1e4);
    if (part.key() == "weight_iz") part.value().zero_();
  }
  const auto x = torch::randn({3, 6}), first = torch::randn({3, 6}), other = torch::randn({3, 6});
  Pass a, b;
  EXPECT_LT(distance(stack.run({first, x}, a)[1].logits, stack.run({other, x}, b)[1].logits), 1e-6);
}

TEST(Rmoe, EarlierLayersReachLaterOnes) {
  for (const bool detach : {false, true}) {
    torch::manual_seed(3);
    auto config = small();
    config.detach = detach;
    Stack stack(3, config);
    auto first = torch::randn({4, 6}).requires_grad_();
    const auto x = torch::randn({4, 6});
    Pass pass;
    const auto r = stack.run({first, x, x}, pass);
    r[2].logits.square().sum().backward();
    if (detach)
      EXPECT_FALSE(first.grad().defined());
    else
      EXPECT_GT(first.grad().abs().max().item<double>(), 0.0);
  }
}

TEST(Rmoe, WithoutCarryEveryLayerStartsFromZeros) {
  torch::manual_seed(6);
  torch::NoGradGuard frozen;
  auto config = small();
  config.carry = false;
  Stack stack(2, config);
  const auto x = torch::randn({3, 6}), z = torch::randn({3, 6});
  Pass both, alone;
  const auto r = stack.run({x, z}, both);
  EXPECT_LT(distance(stack.routers[1]->route(z, alone.at("ffn"), alone).logits, r[1].logits), 1e-6);
  stack.routers[1]->config.carry = true;
  Pass carried;
  EXPECT_GT(distance(stack.run({x, z}, carried)[1].logits, r[1].logits), 1e-3);
}

TEST(Rmoe, TokensAreIndependent) {
  torch::manual_seed(4);
  torch::NoGradGuard frozen;
  for (const char* cell : {"gru", "rnn"}) {
    Stack stack(2, small(cell));
    const auto x = torch::randn({6, 6}), z = torch::randn({6, 6});
    Pass whole;
    const auto all = stack.run({x, z}, whole);
    const auto order = torch::randperm(6);
    Pass permuted;
    EXPECT_LT(distance(stack.run({x.index_select(0, order), z.index_select(0, order)}, permuted)[1].logits,
                       all[1].logits.index_select(0, order)),
              1e-6);
    for (int64_t t = 0; t < 6; ++t) {
      Pass step;  // a token decoded on its own starts from a state of zeros
      EXPECT_LT(distance(stack.run({x.narrow(0, t, 1), z.narrow(0, t, 1)}, step)[1].logits[0], all[1].logits[t]), 1e-5);
    }
    EXPECT_LT(distance(all[0].gates.sum(-1), torch::ones({6})), 1e-6);
  }
}

TEST(Rmoe, WithOneExpertATokenRoutersLearnFromTheLossAlone) {
  torch::manual_seed(5);
  auto config = small();
  config.top_k = 1;
  config.aux_coef = 1.0;
  Stack stack(1, config);
  Pass pass;
  pass.training = true;
  const auto r = stack.run({torch::randn({5, 6})}, pass)[0];
  EXPECT_TRUE(torch::allclose(r.gates, torch::ones({5, 1})));
  r.gates.sum().backward({}, true);
  EXPECT_LT(stack.routers[0]->head->weight.grad().abs().max().item<double>(), 1e-6);
  loss_of(pass, "rmoe.balance").backward();
  EXPECT_GT(stack.routers[0]->head->weight.grad().abs().max().item<double>(), 1e-4);
}

TEST(Rmoe, TheCellCountsOnce) {
  const auto count = [](const std::string& cell) {
    auto config = small(cell);
    Stack stack(3, config);
    int64_t n = 0;
    for (const auto& router : stack.routers)
      for (const auto& p : router->parameters()) n += p.numel();
    return n;
  };
  EXPECT_EQ(count("gru"), 3 * (5 * 6 + 4 * 5) + 6 * 25 + 6 * 5);
  EXPECT_EQ(count("rnn"), 3 * (5 * 6 + 4 * 5) + 2 * 25 + 2 * 5);
}

TEST(Rmoe, WrongPartsAreErrors) {
  EXPECT_THROW(RecurrentCell("lstm", 4), Error);
  EXPECT_THROW(RecurrentCell("gru", {{"weight_ir", torch::zeros({3, 3})}}), Error);
  const auto cell = std::make_shared<RecurrentCell>("gru", 5);
  EXPECT_THROW(RecurrentRouter(Linear(6, 4), Linear(5, 4), cell, true, small()), Error);
  RecurrentRouter router(Linear(6, 5), Linear(5, 4), cell, true, small());
  Pass pass;
  pass.state[RecurrentRouter::kState] = torch::zeros({2, 5});
  EXPECT_THROW(router.route(torch::randn({3, 6}), pass.at("ffn"), pass), Error);
  EXPECT_THROW(parse<RmoeConfig>({{"cell", "lstm"}}, "run.yaml"), Error);
  EXPECT_THROW(parse<RmoeConfig>({{"experts", 2}, {"top_k", 3}}, "run.yaml"), Error);
}

}  // namespace
}  // namespace moiety
