// Parts of the first systems in a whole model: made, trained a step, saved, loaded, decoded.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <set>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/models/decoder.h"
#include "moiety/models/model.h"
#include "moiety/moe/router.h"
#include "moiety/nn/beside.h"
#include "moiety/nn/part.h"

namespace moiety {
namespace {

using nlohmann::json;

json model_with(json parts) {
  return {{"model_type", "llama"},       {"vocab_size", 40},
          {"hidden_size", 16},           {"intermediate_size", 24},
          {"num_hidden_layers", 3},      {"num_attention_heads", 4},
          {"num_key_value_heads", 2},    {"max_position_embeddings", 64},
          {"tie_word_embeddings", true}, {"moiety", {{"parts", std::move(parts)}}}};
}

json part_of(const std::string& slug) {
  static const std::map<std::string, json> settings = {
      {"deepseekmoe", {{"experts", 5}, {"shared", 1}, {"top_k", 2}}},
      {"dynamic-routing", {{"experts", 4}}},
      {"adamoe", {{"experts", 4}, {"null_experts", 4}, {"top_k", 3}}},
      {"adamoe-linear", {{"experts", 3}, {"null_experts", 2}, {"top_k", 2}, {"rank", 2}, {"dropout", 0.0}}},
      {"lora", {{"rank", 2}, {"dora", true}}},
      {"mola", {{"experts", 3}, {"rank", 2}, {"dropout", 0.0}, {"coef", 0.1}}},
      {"llava-mole", {{"target", {"gate_proj", "up_proj", "down_proj"}}, {"rank", 2}, {"dropout", 0.0}}},
      {"dynmole", {{"experts", 3}, {"rank", 2}, {"dropout", 0.0}}},
      {"loramoe", {{"experts", 2}, {"rank", 2}, {"dropout", 0.0}}},
      {"lora-mixer", {{"experts", 3}, {"rank", 2}, {"top_k", 2}}},
      {"smora", {{"rank", 6}, {"active", 2}}},
      {"mora", {{"rank", 4}, {"top_k", 3}}},
      {"flylora", {{"rank", 6}, {"top_k", 2}}},
      {"smoe-dropout", {{"experts", 4}, {"k_min", 2}, {"k_max", 4}}},
      {"rmoe", {{"experts", 4}, {"width", 6}, {"bias", true}, {"shared_width", 8}}},
      {"chain-of-experts", {{"experts", 5}, {"top_k", 2}}},
      {"moduleformer", {{"modules", 4}, {"gating_size", 6}}},
      {"moduleformer-attention", {{"modules", 4}, {"gating_size", 6}, {"heads", 2}}},
      {"widenet", {{"experts", 4}, {"capacity_factor", 10.0}, {"dropout", 0.0}, {"noise", false}}}};
  json part = settings.at(slug);
  part["slug"] = slug;
  return part;
}

class Parts : public testing::TestWithParam<const char*> {};

TEST_P(Parts, EveryParameterLearnsAndCountsOnce) {
  torch::manual_seed(1);
  auto model = make_causal(model_with(json::array({part_of(GetParam())})), {.trainable = true});
  model->train();
  std::set<void*> seen;
  for (const auto& p : model->parameters()) EXPECT_TRUE(seen.insert(p.unsafeGetTensorImpl()).second);
  Pass pass;
  pass.training = true;
  auto loss = model->forward(torch::randint(0, 40, {3, 12}, torch::kInt64), pass).logsumexp(-1).square().mean();
  for (const auto& [name, value] : pass.losses) loss = loss + value;
  loss.backward();
  for (const auto& p : model->named_parameters()) {
    if (!p.value().requires_grad()) continue;
    EXPECT_TRUE(p.value().grad().defined() && p.value().grad().isfinite().all().item<bool>()) << p.key();
  }
  std::set<std::string> names;
  for (const auto& t : model->stored()) EXPECT_TRUE(names.insert(t.name).second) << t.name;
}

TEST_P(Parts, StepsWithTheCacheEqualOnePass) {
  torch::manual_seed(2);
  torch::NoGradGuard frozen;
  auto model = make_causal(model_with(json::array({part_of(GetParam())})));
  model->eval();
  const auto ids = torch::randint(0, 40, {2, 9}, torch::kInt64);
  Pass whole;
  const auto logits = model->forward(ids, whole);
  auto cache = model->make_cache();
  for (int64_t t = 0; t < 9; ++t) {
    Pass step;
    step.cache = &cache;
    const auto one = model->forward(ids.narrow(1, t, 1), step);
    EXPECT_LT((one - logits.narrow(1, t, 1)).abs().max().item<double>(), 1e-4) << t;
  }
}

TEST_P(Parts, PackedSequencesDoNotSeeEachOther) {
  torch::manual_seed(3);
  torch::NoGradGuard frozen;
  auto model = make_causal(model_with(json::array({part_of(GetParam())})));
  model->eval();
  const auto ids = torch::randint(0, 40, {1, 9}, torch::kInt64);
  Pass packed;
  packed.segments = torch::tensor({{1, 1, 1, 1, 2, 2, 2, 2, 2}}, torch::kInt64);
  const auto logits = model->forward(ids, packed);
  for (const auto& [from, count] : {std::pair{0, 4}, {4, 5}}) {
    Pass alone;
    const auto one = model->forward(ids.narrow(1, from, count), alone);
    EXPECT_LT((one - logits.narrow(1, from, count)).abs().max().item<double>(), 1e-4) << from;
  }
}

INSTANTIATE_TEST_SUITE_P(All, Parts,
                         testing::Values("deepseekmoe", "dynamic-routing", "adamoe", "adamoe-linear", "lora", "mola",
                                         "llava-mole", "dynmole", "loramoe", "lora-mixer", "smora", "mora", "flylora",
                                         "smoe-dropout", "rmoe", "chain-of-experts", "moduleformer",
                                         "moduleformer-attention", "widenet"),
                         [](const auto& info) {
                           std::string name = info.param;
                           for (char& c : name)
                             if (c == '-') c = '_';
                           return name;
                         });

TEST(LinearParts, StandBesideTheMatricesThatTheyName) {
  torch::manual_seed(5);
  const torch::NoGradGuard frozen;
  auto part = part_of("adamoe-linear");
  part["target"] = {"q_proj", "down_proj"};
  part["layers"] = "0,2";
  const auto model = make_causal(model_with(json::array({part})));
  model->eval();
  Trace trace;
  Pass pass;
  pass.trace = &trace;
  const auto ids = torch::arange(12, torch::kInt64).view({2, 6});
  const auto logits = model->forward(ids, pass);
  std::vector<std::string> sites;
  for (const auto& r : trace.records) sites.push_back(std::to_string(r.site.block) + r.site.site);
  EXPECT_EQ(sites, (std::vector<std::string>{"0q_proj", "0down_proj", "2q_proj", "2down_proj"}));
  // B is zero at the start: the model is the one without parts.
  std::set<std::string> names;
  for (const auto& t : model->stored()) names.insert(t.name);
  EXPECT_EQ(names.count("model.layers.2.adapters.down_proj.lora_B"), 1u);
  EXPECT_EQ(names.count("model.layers.1.adapters.q_proj.lora_A"), 0u);
  for (const auto& p : model->named_parameters())
    if (p.key().find("lora_A") != std::string::npos) p.value().mul_(3.0);
  Pass again;
  EXPECT_TRUE(torch::equal(model->forward(ids, again), logits));
  for (const auto& p : model->named_parameters())
    if (p.key().find("lora_B") != std::string::npos) p.value().fill_(0.5);
  Pass changed;
  EXPECT_GT((model->forward(ids, changed) - logits).abs().max().item<double>(), 1e-3);
}

TEST(LinearParts, MayGiveEveryLayerItsOwnNumbers) {
  auto part = part_of("adamoe-linear");
  part["target"] = "v_proj";
  part["null_experts"] = {0, 1, 4};
  const auto model = make_causal(model_with(json::array({part})));
  std::vector<int64_t> nulls;
  for (const auto& t : model->stored())
    if (t.name.find("gate2") != std::string::npos) nulls.push_back(t.value().size(0));
  EXPECT_EQ(nulls, (std::vector<int64_t>{1, 4}));
}

// Adds a shared direction to every matrix that reads one input.
class OneForAll : public Beside {
 public:
  explicit OneForAll(torch::Tensor v) { v_ = register_parameter("v", v, v.requires_grad()); }
  void apply(const torch::Tensor& x, std::vector<torch::Tensor>& outputs, Pass&) override {
    const auto seen = torch::matmul(x, v_).unsqueeze(-1);
    for (auto& y : outputs) y = y + seen;
    called += 1;
  }
  int64_t called = 0;

 private:
  torch::Tensor v_;
};

const RegisterMethod one_for_all(
    {.slug = "test-one-for-all",
     .kind = "part",
     .title = "test",
     .summary = "a part of the tests",
     .paper = {},
     .sites = {"linear"},
     .config = {},
     .make = MakeBeside{.per_input = true, .make = [](LinearSite& site, const json&) -> std::shared_ptr<Beside> {
                          EXPECT_EQ(site.targets[0].matrix->dense(torch::kFloat32).sizes(),
                                    (std::vector<int64_t>{site.targets[0].out, site.targets[0].in}));
                          return std::make_shared<OneForAll>(
                              site.own.get("v", {site.targets[0].in}, constant_init(0.25)));
                        }}});

TEST(LinearParts, MatricesThatReadOneInputMayShareOne) {
  torch::manual_seed(6);
  const torch::NoGradGuard frozen;
  const auto model = make_causal(
      model_with({{{"slug", "test-one-for-all"}, {"target", {"q_proj", "v_proj", "gate_proj", "up_proj"}}}}));
  model->eval();
  std::vector<std::string> names;
  for (const auto& t : model->stored())
    if (t.name.find("adapters") != std::string::npos && t.name.find(".0.") != std::string::npos)
      names.push_back(t.name);
  EXPECT_EQ(names, (std::vector<std::string>{"model.layers.0.adapters.gate_proj+up_proj.v",
                                             "model.layers.0.adapters.q_proj+v_proj.v"}));
  Pass pass;
  model->forward(torch::arange(6, torch::kInt64).view({1, 6}), pass);
  int64_t objects = 0;
  std::set<const void*> seen;
  for (const auto& m : model->modules())
    if (const auto* one = dynamic_cast<OneForAll*>(m.get()); one && seen.insert(one).second) {
      ++objects;
      EXPECT_EQ(one->called, 1);
    }
  EXPECT_EQ(objects, 6);
}

std::string message_of(const json& config) {
  try {
    make_causal(config);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST(PartErrors, SayWhatIsWrong) {
  EXPECT_NE(message_of(model_with({{{"slug", "deepsekmoe"}}})).find("deepseekmoe"), std::string::npos);
  EXPECT_NE(message_of(model_with(json::array({part_of("rmoe"), part_of("adamoe")}))).find("taken by another part"),
            std::string::npos);
  auto beyond = part_of("rmoe");
  beyond["layers"] = "1-3";
  EXPECT_NE(message_of(model_with(json::array({beyond}))).find("0 to 2"), std::string::npos);
  beyond["layers"] = "one";
  EXPECT_NE(message_of(model_with(json::array({beyond}))).find("0-3,5"), std::string::npos);
  auto key = part_of("rmoe");
  key["widht"] = 3;
  EXPECT_NE(message_of(model_with(json::array({key}))).find("width"), std::string::npos);
  auto site = part_of("rmoe");
  site["site"] = "attention";
  EXPECT_NE(message_of(model_with(json::array({site}))).find("cannot stand"), std::string::npos);
  auto linear = part_of("adamoe-linear");
  linear["target"] = "qproj";
  EXPECT_NE(message_of(model_with(json::array({linear}))).find("it has q_proj, k_proj"), std::string::npos);
  linear["target"] = json::array({"q_proj", "v_proj"});
  EXPECT_NE(message_of(model_with(json::array({linear, linear}))).find("`q_proj` of layer 0 is taken"),
            std::string::npos);
  auto all = part_of("adamoe-linear");
  EXPECT_NE(message_of(model_with(json::array({linear, all}))).find("something stands beside"), std::string::npos);
  linear["top_k"] = json::array({2, 2});
  EXPECT_NE(message_of(model_with(json::array({linear}))).find("`top_k` has 2 entries, and the model has 3 layers"),
            std::string::npos);
  linear["top_k"] = 6;
  EXPECT_NE(message_of(model_with(json::array({linear}))).find("3 true and 2 null experts"), std::string::npos);
  linear["top_k"] = 2;
  linear["null_experts"] = -1;
  EXPECT_NE(message_of(model_with(json::array({linear}))).find("null_experts"), std::string::npos);
  auto cut = part_of("smoe-dropout");
  cut["experts"] = 5;
  cut["k_max"] = 5;
  EXPECT_NE(message_of(model_with(json::array({cut}))).find("24 hidden units"), std::string::npos);
}

TEST(ActiveExperts, AreChosenAtRunTimeInEveryMixture) {
  const torch::NoGradGuard frozen;
  const auto ids = torch::arange(24, torch::kInt64).view({2, 12});
  for (const char* slug : {"deepseekmoe", "dynamic-routing", "adamoe", "smoe-dropout", "rmoe", "chain-of-experts",
                           "moduleformer", "moduleformer-attention", "widenet"}) {
    const auto model = make_causal(model_with(json::array({part_of(slug)})));
    for (const int64_t k : {1, 3, 4}) {
      set_active_experts(*model, k);
      Trace trace;
      Pass pass;
      pass.trace = &trace;
      EXPECT_TRUE(model->forward(ids, pass).isfinite().all().item<bool>()) << slug;
      ASSERT_FALSE(trace.records.empty()) << slug;
      for (const auto& r : trace.records) {
        const auto used = (r.routing.experts >= 0).sum(1);
        EXPECT_EQ(used.max().item<int64_t>(), std::string(slug) == "adamoe" ? used.max().item<int64_t>() : k) << slug;
        EXPECT_LE(used.max().item<int64_t>(), k) << slug;
      }
    }
    EXPECT_THROW(set_active_experts(*model, 6), Error) << slug;
    EXPECT_THROW(set_active_experts(*model, 0), Error) << slug;
  }
  json dense = model_with(json::array());
  EXPECT_THROW(set_active_experts(*make_causal(dense), 1), Error);
}

TEST(PartLayers, AreChosenAndOthersStayDense) {
  auto part = part_of("deepseekmoe");
  part["layers"] = "0,2";
  const auto model = make_causal(model_with(json::array({part})));
  EXPECT_EQ(model->experts(0), 5);
  EXPECT_EQ(model->experts(1), 0);
  EXPECT_EQ(model->experts(2), 5);
}

TEST(PartRmoe, LayersMayHaveCellsOfTheirOwn) {
  const auto cells = [](bool shared) {
    auto part = part_of("rmoe");
    part["shared_cell"] = shared;
    std::vector<std::string> names;
    for (const auto& t : make_causal(model_with(json::array({part})))->stored())
      if (t.name.find("rnn_router.weight_hn") != std::string::npos) names.push_back(t.name);
    return names;
  };
  EXPECT_EQ(cells(true).size(), 1u);
  EXPECT_EQ(cells(false).size(), 3u);
}

TEST(PartRmoe, WeighsTheRoutedSumAndTheSharedExpert) {
  torch::NoGradGuard frozen;
  const auto ids = torch::arange(12, torch::kInt64).view({2, 6});
  std::vector<torch::Tensor> logits, halved;
  for (const double weight : {0.5, 1.0}) {
    torch::manual_seed(4);
    auto part = part_of("rmoe");
    part["moe_weight"] = weight;
    part["share_weight"] = weight;
    const auto model = make_causal(model_with(json::array({part})));
    model->eval();
    Pass first;
    halved.push_back(model->forward(ids, first));
    // The part's output doubles; so it does when its last matrices do (the bias starts at zero).
    if (weight < 1.0)
      for (const auto& p : model->named_parameters())
        if (p.key().find("expert") != std::string::npos && p.key().find("down_proj") != std::string::npos)
          p.value().mul_(2.0);
    Pass pass;
    logits.push_back(model->forward(ids, pass));
  }
  EXPECT_GT((halved[0] - halved[1]).abs().max().item<double>(), 1e-4);
  EXPECT_LT((logits[0] - logits[1]).abs().max().item<double>(), 1e-5);
}

}  // namespace
}  // namespace moiety
