#include "moiety/train/routing.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "moiety/base/error.h"
#include "moiety/io/checkpoint.h"
#include "moiety/moe/mixture.h"
#include "moiety/train/trainer.h"
#include "tiny.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

json config_with(const json& more = json::object()) {
  json c = tiny::mixture_config();
  c["vocab_size"] = 30;
  c.update(more);
  return c;
}

std::shared_ptr<CausalModel> model_of(const json& config, const RoutingConfig& routing) {
  json whole = config;
  prepare_routing(whole, routing);
  torch::manual_seed(5);
  LoadOptions options;
  options.trainable = true;
  auto model = make_causal(whole, options);
  apply_routing(*model, routing);
  return model;
}

std::map<std::string, Tensor> losses_of_pass(CausalModel& model, bool training, Trace* trace = nullptr) {
  Pass pass;
  pass.training = training;
  pass.trace = trace;
  model.forward(torch::arange(24, torch::kInt64).view({2, 12}), pass);
  std::map<std::string, Tensor> out;
  for (const auto& [name, value] : pass.losses) out[name] = out.count(name) ? out[name] + value : value;
  return out;
}

std::string problem_of(const json& config, const RoutingConfig& routing) {
  try {
    model_of(config, routing);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST(Routing, TheConfigOfAFamilyAsksForItsLoss) {
  EXPECT_TRUE(losses_of_pass(*model_of(config_with(), {}), true).empty());
  const auto model = model_of(config_with({{"router_aux_loss_coef", 0.5}}), {});
  EXPECT_TRUE(losses_of_pass(*model, false).empty());
  Trace trace;
  auto losses = losses_of_pass(*model, true, &trace);
  ASSERT_EQ(losses.size(), 1u);
  std::vector<Tensor> experts, scores;
  for (const auto& r : trace.records) {
    experts.push_back(r.routing.experts);
    scores.push_back(r.routing.scores);
  }
  const auto pooled = pooled_balance_loss(torch::cat(experts), torch::cat(scores)).item<double>();
  EXPECT_NEAR(losses.at("balance").item<double>(), 0.5 * pooled, 1e-6);
  losses.at("balance").backward();
  int64_t reached = 0;
  for (const auto& p : model->named_parameters())
    if (p.key().find("gate.projection") != std::string::npos)
      reached += p.value().grad().abs().max().item<double>() > 0;
  EXPECT_EQ(reached, 2);
  // DeepSeek's own rule: within every sequence, layer by layer.
  const json deepseek = {{"model_type", "deepseek"},     {"vocab_size", 30},           {"hidden_size", 24},
                         {"num_hidden_layers", 2},       {"num_attention_heads", 2},   {"intermediate_size", 40},
                         {"moe_intermediate_size", 8},   {"n_routed_experts", 4},      {"num_experts_per_tok", 2},
                         {"n_shared_experts", 1},        {"first_k_dense_replace", 0}, {"aux_loss_alpha", 0.5},
                         {"max_position_embeddings", 64}};
  Trace other;
  const double found = losses_of_pass(*model_of(deepseek, {}), true, &other).at("balance").item<double>();
  double sum = 0;
  for (const auto& r : other.records)
    for (int64_t row = 0; row < 2; ++row)
      sum += balance_loss(load_of(r.routing.experts.narrow(0, row * 12, 12), r.routing.scores.narrow(0, row * 12, 12)),
                          2.0)
                 .item<double>() /
             2.0;
  EXPECT_NEAR(found, 0.5 * sum, 1e-6);
}

TEST(Routing, TheRunHasTheLastWord) {
  RoutingConfig none, kinds, weight;
  none.balance = "none";
  EXPECT_TRUE(losses_of_pass(*model_of(config_with({{"router_aux_loss_coef", 0.5}}), none), true).empty());
  for (const char* kind : {"switch", "sequence", "pooled", "device"}) {
    kinds = RoutingConfig();
    kinds.balance = kind;
    kinds.coef = 0.1;
    kinds.z_coef = 0.2;
    if (kinds.balance == "device") kinds.devices = 2;
    const auto losses = losses_of_pass(*model_of(config_with(), kinds), true);
    ASSERT_EQ(losses.size(), 2u) << kind;
    EXPECT_GT(losses.at("balance").item<double>(), 0.0);
    EXPECT_GT(losses.at("router_z").item<double>(), 0.0);
  }
  weight.coef = 1.0;
  const auto once = losses_of_pass(*model_of(config_with({{"router_aux_loss_coef", 0.5}}), {}), true);
  const auto twice = losses_of_pass(*model_of(config_with({{"router_aux_loss_coef", 0.5}}), weight), true);
  EXPECT_NEAR(twice.at("balance").item<double>(), 2.0 * once.at("balance").item<double>(), 1e-6);
}

TEST(Routing, CapacityDropsWhileTrainingOnly) {
  RoutingConfig routing;
  routing.capacity_factor = 0.5;
  const auto model = model_of(config_with(), routing);
  for (const bool training : {true, false}) {
    Trace trace;
    losses_of_pass(*model, training, &trace);
    for (const auto& r : trace.records) {
      const auto& e = r.routing.experts;
      // 24 tokens * 2 choices / 4 experts * 0.5
      const int64_t most = torch::bincount(e.masked_select(e >= 0), {}, 4).max().item<int64_t>();
      EXPECT_EQ((e < 0).any().item<bool>(), training);
      if (training) {
        EXPECT_LE(most, 6);
      } else {
        EXPECT_GT(most, 6);
      }
    }
  }
}

TEST(Routing, JitterIsTheRunsOrTheConfigs) {
  RoutingConfig routing;
  routing.jitter = 0.25;
  const auto model = model_of(config_with(), routing);
  for (const auto& m : model->modules())
    if (const auto* mixture = dynamic_cast<Mixture*>(m.get())) {
      EXPECT_EQ(mixture->jitter, 0.25);
    }
  const json mixtral = {{"model_type", "mixtral"},
                        {"vocab_size", 30},
                        {"hidden_size", 24},
                        {"num_hidden_layers", 1},
                        {"num_attention_heads", 2},
                        {"num_key_value_heads", 2},
                        {"intermediate_size", 8},
                        {"num_local_experts", 4},
                        {"num_experts_per_tok", 2},
                        {"router_jitter_noise", 0.1},
                        {"max_position_embeddings", 64}};
  int64_t seen = 0;
  for (const auto& m : model_of(mixtral, {})->modules())
    if (const auto* mixture = dynamic_cast<Mixture*>(m.get())) {
      EXPECT_EQ(mixture->jitter, 0.1);
      ++seen;
    }
  EXPECT_EQ(seen, 1);
}

TEST(Routing, SaysWhatCannotApply) {
  json dense = tiny::dense_config();
  dense["vocab_size"] = 30;
  RoutingConfig r;
  r.balance = "switch";
  r.coef = 0.1;
  EXPECT_NE(problem_of(dense, r).find("no mixture of experts"), std::string::npos);
  r.coef.reset();
  EXPECT_NE(problem_of(config_with(), r).find("weight"), std::string::npos);
  r.coef = 0.1;
  json parts = dense;
  parts["moiety"]["parts"] = {{{"slug", "deepseekmoe"}, {"experts", 4}, {"shared", 0}, {"top_k", 2}, {"alpha1", 0.01}}};
  EXPECT_NE(problem_of(parts, r).find("rule of its own"), std::string::npos);
  parts["moiety"]["parts"][0]["alpha1"] = 0.0;
  EXPECT_EQ(problem_of(parts, r), "");
  EXPECT_EQ(losses_of_pass(*model_of(parts, r), true).count("balance"), 1u);
  r = RoutingConfig();
  r.bias_rate = 0.1;
  EXPECT_EQ(problem_of(parts, r), "");
  parts["moiety"]["parts"] = {
      {{"slug", "dynamic-routing"}, {"experts", 4}, {"balance_coef", 0.0}, {"dynamic_coef", 0.0}}};
  EXPECT_NE(problem_of(parts, r).find("bias"), std::string::npos);
  r = RoutingConfig();
  r.balance = "device";
  r.coef = 0.1;
  r.devices = 3;
  EXPECT_NE(problem_of(config_with(), r).find("4 experts"), std::string::npos);
  EXPECT_EQ(problem_of(dense, {}), "");
}

double last_imbalance(const std::string& folder) {
  const auto trace = tiny::trace(folder);
  double worst = 0;
  for (const auto& site : trace.back().at("routing")) worst = std::max(worst, site.at("imbalance").get<double>());
  return worst;
}

TEST(ChoiceBias, EvensTheLoadAndComesBack) {
  const TemporaryFolder folder;
  auto plain = tiny::run(folder, "plain", 60), biased = tiny::run(folder, "biased", 60);
  for (auto* c : {&plain, &biased}) {
    c->model.config = tiny::mixture_config();
    c->model.config["num_experts"] = 8;
    c->data.held_out = 0;
    c->output.every = 25;
    // Routers that stand still: only the bias can even the load.
    c->train.freeze = {"gate\\.projection"};
  }
  biased.routing.bias_rate = 2e-3;
  Trainer(plain).run();
  Trainer whole(biased);
  whole.run();
  const double before = last_imbalance(plain.output.folder), after = last_imbalance(biased.output.folder);
  EXPECT_GT(before, 1.5);
  EXPECT_LT(after, 1.0 + 0.6 * (before - 1.0));
  // Stopped in between, the run goes on with the bias it had.
  auto stopped = biased;
  stopped.output.folder = (folder / "stopped").string();
  int64_t steps = 0;
  TrainOptions options;
  options.stop = [&] { return ++steps == 20; };
  EXPECT_EQ(Trainer(stopped, options).run().ended, "stopped");
  Trainer resumed(stopped);
  EXPECT_EQ(resumed.step(), 20);
  resumed.run();
  EXPECT_EQ(tiny::trace(biased.output.folder), tiny::trace(stopped.output.folder));
  const auto a = whole.model().named_buffers(), b = resumed.model().named_buffers();
  int64_t biases = 0;
  for (const auto& item : a) {
    EXPECT_TRUE(torch::equal(item.value(), b[item.key()])) << item.key();
    if (item.key().find("choice_bias") == std::string::npos) continue;
    ++biases;
    EXPECT_GT(item.value().abs().max().item<double>(), 0.0);
  }
  EXPECT_EQ(biases, 2);
  // The saved model chooses with it.
  const auto loaded = load_causal(*Checkpoint::open(biased.output.folder + "/last"));
  const torch::NoGradGuard frozen;
  whole.model().eval();
  const auto ids = torch::arange(20, torch::kInt64).view({1, 20});
  Pass p, q;
  // Experts that are not trained are multiplied one by one, which rounds otherwise.
  EXPECT_TRUE(torch::allclose(loaded->forward(ids, p), whole.model().forward(ids, q), 1e-4, 1e-5));
}

TEST(ChoiceBias, MovesOnceAStepHoweverOftenBlocksRun) {
  const TemporaryFolder folder;
  std::vector<Tensor> biases;
  for (const bool again : {false, true}) {
    auto config = tiny::run(folder, again ? "again" : "once", 3);
    config.model.config = tiny::mixture_config();
    config.train.accumulate = 2;
    config.evaluation.every = 1;
    config.routing.bias_rate = 0.5;
    config.train.checkpoint_activations = again;
    Trainer trainer(config);
    trainer.run();
    for (const auto& buffer : trainer.model().named_buffers())
      if (buffer.key() == "layer0.mlp.gate.choice_bias") biases.push_back(buffer.value().clone());
  }
  ASSERT_EQ(biases.size(), 2u);
  EXPECT_TRUE(torch::equal(biases[0], biases[1]));
  EXPECT_LE(biases[0].abs().max().item<double>(), 1.5);
}

TEST(ChoiceBias, OfDeepseekV3IsItsOwn) {
  const json deepseek = {{"model_type", "deepseek_v3"},
                         {"vocab_size", 30},
                         {"hidden_size", 24},
                         {"num_hidden_layers", 1},
                         {"num_attention_heads", 2},
                         {"num_key_value_heads", 2},
                         {"intermediate_size", 40},
                         {"moe_intermediate_size", 8},
                         {"n_routed_experts", 4},
                         {"num_experts_per_tok", 2},
                         {"n_shared_experts", 1},
                         {"first_k_dense_replace", 0},
                         {"q_lora_rank", nullptr},
                         {"kv_lora_rank", 8},
                         {"qk_nope_head_dim", 8},
                         {"qk_rope_head_dim", 4},
                         {"v_head_dim", 8},
                         {"n_group", 1},
                         {"topk_group", 1},
                         {"aux_loss_alpha", 0.1},
                         {"max_position_embeddings", 64}};
  RoutingConfig routing;
  routing.bias_rate = 0.01;
  json config = deepseek;
  prepare_routing(config, routing);
  EXPECT_EQ(config, deepseek);
  const auto model = model_of(config, routing);
  Scheduled* scheduled = nullptr;
  for (const auto& m : model->modules())
    if (auto* s = dynamic_cast<Scheduled*>(m.get())) scheduled = s;
  ASSERT_NE(scheduled, nullptr);
  scheduled->before_step(0, 1);
  Trace trace;
  const auto losses = losses_of_pass(*model, true, &trace);
  // The scores of a sigmoid are balanced as shares.
  const auto& r = trace.records.at(0).routing;
  const auto scores = r.scores / r.scores.sum(-1, true);
  double sum = 0;
  for (int64_t row = 0; row < 2; ++row)
    sum +=
        balance_loss(load_of(r.experts.narrow(0, row * 12, 12), scores.narrow(0, row * 12, 12)), 2.0).item<double>() /
        2;
  EXPECT_NEAR(losses.at("balance").item<double>(), 0.1 * sum, 1e-6);
  EXPECT_EQ(scheduled->counts().at(0).sum().item<double>(), 48.0);
  scheduled->after_step();
  const auto bias = model->named_buffers()["layer0.mlp.gate.choice_bias"];
  EXPECT_TRUE(torch::allclose(bias, 0.01 * torch::sign(12.0 - scheduled->counts()[0])));
}

}  // namespace
}  // namespace moiety
