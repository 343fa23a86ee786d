#include "moiety/adapt/lora_mixer.h"

#include <gtest/gtest.h>

#include <cmath>

#include "adapt_tools.h"
#include "message_of.h"
#include "moiety/adapt/lora.h"
#include "moiety/adapt/peft_experts.h"
#include "moiety/base/files.h"
#include "moiety/io/peft.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

json mixer(const json& more = json::object()) {
  json part = {{"slug", "lora-mixer"},
               {"target", {"q_proj", "k_proj", "v_proj", "o_proj"}},
               {"experts", 3},
               {"rank", 2},
               {"top_k", 2}};
  part.update(more);
  return part;
}

Tensor labels() {
  return torch::tensor({2, 0}, torch::kInt64);
}

struct One {
  LoraMixerConfig config;
  Tensor rows = f64({3, 4}), a = f64({3, 2, 4}), b = f64({3, 5, 2}),
         scale = torch::tensor({0.5, 1.0, 2.0}, torch::kFloat64);
  std::shared_ptr<LoraMixer> part() {
    LoraMixer::Target t;
    t.site = "q_proj";
    t.router = Linear(rows);
    t.a = a;
    t.b = b;
    t.scale = scale;
    return std::make_shared<LoraMixer>(std::vector{t}, config);
  }
  Tensor formula(const Tensor& w, const Tensor& x, const Tensor& weights) const {
    auto y = torch::matmul(x, w.t());
    for (int64_t e = 0; e < 3; ++e)
      y = y + weights.select(-1, e).unsqueeze(-1) * scale[e] * torch::matmul(x, torch::matmul(b[e], a[e]).t());
    return y;
  }
};

TEST(LoraMixer, WeightsOfEveryMode) {
  const auto logits = torch::tensor({{1.0, 3.0, 2.0}, {0.0, 0.0, 0.0}}, torch::kFloat64);
  const auto p = torch::softmax(logits, -1);
  EXPECT_TRUE(torch::equal(mixer_weights(logits, "soft", 2), p));
  const auto g = mixer_weights(logits, "topk", 2);
  EXPECT_NEAR(g[0][1].item<double>(), p[0][1].item<double>() / (p[0][1] + p[0][2]).item<double>(), 1e-12);
  EXPECT_EQ(g[0][0].item<double>(), 0.0);
  // Equal ones: the lower indices.
  EXPECT_EQ(g[1][2].item<double>(), 0.0);
  EXPECT_TRUE(torch::equal(mixer_weights(logits, "hard", 2, torch::tensor({2, 0})),
                           torch::tensor({{0., 0., 1.}, {1., 0., 0.}}, torch::kFloat64)));
  EXPECT_LT(distance(mixer_weights(logits, "hard_soft", 2), g), 1e-15);
  EXPECT_LT(distance(mixer_weights(logits, "topk", 3), p), 1e-15);
}

TEST(LoraMixer, HardEqualsSoftWhereTheRouterIsSure) {
  const auto sure = torch::tensor({{0.0, 0.0, 900.0}, {900.0, 0.0, 0.0}}, torch::kFloat64);
  const auto hard = mixer_weights(sure, "hard", 1, labels());
  EXPECT_LT(distance(mixer_weights(sure, "soft", 1), hard), 1e-9);
  EXPECT_LT(distance(mixer_weights(sure, "topk", 1), hard), 1e-9);
}

TEST(LoraMixer, HardSoftHasTheGradientOfSoft) {
  torch::manual_seed(1);
  const auto logits = f64({4, 3}), up = f64({4, 3}, false);
  const auto of = [&](const char* mode) {
    return torch::autograd::grad({(mixer_weights(logits, mode, 2) * up).sum()}, {logits})[0];
  };
  EXPECT_LT(distance(of("hard_soft"), of("soft")), 1e-12);
  EXPECT_GT(distance(of("topk"), of("soft")), 1e-3);
}

TEST(LoraMixer, MixesExpertsWithScalesOfTheirOwn) {
  torch::manual_seed(2);
  const torch::NoGradGuard frozen;
  One one;
  one.config.top_k = 2;
  const auto w = f64({5, 4}, false), x = f64({2, 3, 4}, false);
  const auto p = torch::softmax(torch::matmul(x, one.rows.t()), -1);
  const auto part = one.part();
  Pass training;
  training.training = true;
  EXPECT_LT(distance(applied(*part, w, x, training), one.formula(w, x, p)), 1e-6);
  Pass still;
  EXPECT_LT(distance(applied(*part, w, x, still),
                     one.formula(
                         w, x, mixer_weights(torch::matmul(x, one.rows.t()).view({6, 3}), "topk", 2).view({2, 3, 3}))),
            1e-6);
}

TEST(LoraMixer, HardTrainsTheExpertOfTheLabelAlone) {
  torch::manual_seed(3);
  One one;
  one.config.stage = "hard";
  const auto part = one.part();
  Pass pass;
  pass.training = true;
  pass.labels = labels();
  const auto w = f64({5, 4}, false), x = f64({2, 3, 4}, false);
  const auto y = applied(*part, w, x, pass);
  auto weights = torch::zeros({2, 3, 3}, torch::kFloat64);
  weights[0].select(-1, 2).fill_(1.0);
  weights[1].select(-1, 0).fill_(1.0);
  EXPECT_LT(distance(y, one.formula(w, x, weights)), 1e-9);
  y.sum().backward();
  EXPECT_EQ(one.a.grad()[1].abs().max().item<double>(), 0.0);
  EXPECT_GT(one.a.grad()[2].abs().max().item<double>(), 0.0);
  EXPECT_FALSE(one.rows.grad().defined());
  EXPECT_TRUE(pass.losses.empty());
}

TEST(LoraMixer, WhatAPassDoes) {
  One one;
  Pass training, still, labelled;
  training.training = true;
  labelled.labels = labels();
  EXPECT_EQ(one.part()->mode(training), "soft");
  EXPECT_EQ(one.part()->mode(still), "topk");
  EXPECT_EQ(one.part()->mode(labelled), "topk");
  one.config.stage = "hard";
  EXPECT_EQ(one.part()->mode(training), "hard");
  EXPECT_EQ(one.part()->mode(still), "topk");
  EXPECT_EQ(one.part()->mode(labelled), "hard");
}

TEST(LoraMixer, GradientsEqualCentralDifferences) {
  for (const char* stage : {"soft", "hard"}) {
    torch::manual_seed(4);
    One one;
    one.config.stage = stage;
    one.config.sbl_alpha = one.config.sbl_lambda = 0.0;
    const auto part = one.part();
    const auto w = f64({5, 4}, false), x = f64({2, 2, 4});
    const auto f = [&] {
      Pass pass;
      pass.training = true;
      pass.labels = labels();
      return applied(*part, w, x, pass).square().sum();
    };
    for (const Tensor& t : {one.rows, one.a, one.b, x}) EXPECT_LT(gradient_error(f, t), 1e-5) << stage;
  }
}

TEST(LoraMixer, OneExpertIsPlainLora) {
  torch::manual_seed(5);
  const torch::NoGradGuard frozen;
  const auto w = f64({5, 4}, false), a = f64({1, 2, 4}, false), b = f64({1, 5, 2}, false), x = f64({2, 3, 4}, false);
  for (const char* stage : {"soft", "hard", "hard_soft"}) {
    LoraMixer::Target t;
    t.site = "q_proj";
    t.router = Linear(f64({1, 4}, false));
    t.a = a;
    t.b = b;
    t.scale = torch::tensor({1.5}, torch::kFloat64);
    LoraMixerConfig config;
    config.experts = 1;
    config.stage = stage;
    LoraMixer part({t}, config);
    Lora plain(a[0], b[0], 1.5);
    Pass pass;
    pass.training = true;
    pass.labels = torch::zeros({2}, torch::kInt64);
    EXPECT_LT(distance(applied(part, w, x, pass), applied(plain, w, x, pass)), 1e-9) << stage;
    for (const auto& [name, value] : pass.losses) EXPECT_NEAR(value.item<double>(), 1.0, 1e-9);
  }
}

TEST(LoraMixer, LossOfEvenWeights) {
  // Ties go to the lower index: usage is not even, its sum with an even p is.
  const auto even = torch::zeros({6, 4}, torch::kFloat64);
  EXPECT_NEAR(sbl_loss(even, {}, 1.0, 0.5, 2, "published").loss.item<double>(), 0.25 - 0.5 * std::log(4.0), 1e-9);
  EXPECT_NEAR(sbl_loss(even, {}, 1.0, 0.5, 2, "specialize").loss.item<double>(), 0.25 + 0.5 * std::log(4.0), 1e-9);
  EXPECT_THROW(sbl_loss(even, {}, 1.0, 0.5, 2, "both"), Error);
  EXPECT_NEAR(sbl_loss(torch::randn({6, 4}), {}, 1.0, 0.0, 3, "published").usage.sum().item<double>(), 1.0, 1e-6);
}

TEST(LoraMixer, BalanceOfUsageThatIsEvenHasNoGradientWhereWeightsAre) {
  // Every expert is best for one token; p is even but for a hair.
  auto logits = (torch::eye(4, torch::kFloat64) * 1e-9).requires_grad_();
  sbl_loss(logits, {}, 1.0, 0.0, 1, "published").loss.backward();
  EXPECT_LT(logits.grad().abs().max().item<double>(), 1e-9);
}

TEST(LoraMixer, LossHasTheGradientOfItsFormula) {
  torch::manual_seed(6);
  const auto logits = f64({5, 4});
  EXPECT_LT(gradient_error([&] { return sbl_loss(logits, {}, 0.7, 0.3, 2, "published").loss; }, logits), 1e-7);
}

TEST(LoraMixer, OneStepMovesTheEntropyAsItsSignSays) {
  torch::manual_seed(7);
  for (const bool published : {true, false}) {
    const auto logits = torch::randn({6, 4}).requires_grad_();
    const auto before = sbl_loss(logits, {}, 0.0, 1.0, 2, published ? "published" : "specialize");
    before.loss.backward();
    const torch::NoGradGuard frozen;
    const auto after = sbl_loss(logits - 0.5 * logits.grad(), {}, 0.0, 1.0, 2, "published").entropy;
    EXPECT_EQ((after > before.entropy).item<bool>(), published);
  }
}

TEST(LoraMixer, PaddingDoesNotCount) {
  torch::manual_seed(8);
  const auto logits = torch::randn({5, 4});
  const auto real = torch::tensor({1, 0, 1, 1, 0}).to(torch::kBool);
  const auto with = sbl_loss(logits, real, 1.0, 0.5, 2, "published"),
             alone = sbl_loss(logits.index_select(0, real.nonzero().squeeze(1)), {}, 1.0, 0.5, 2, "published");
  EXPECT_NEAR(with.loss.item<double>(), alone.loss.item<double>(), 1e-6);
  EXPECT_LT(distance(with.usage, alone.usage), 1e-6);
}

TEST(LoraMixer, RoutersAreAveraged) {
  torch::manual_seed(9);
  const auto ids = torch::arange(12, torch::kInt64).view({2, 6});
  for (const char* scope : {"site", "block"}) {
    const auto model = make_causal(model_with(json::array({mixer({{"router_scope", scope}})})), {.trainable = true});
    Trace trace;
    Pass pass;
    pass.trace = &trace;
    train_pass(*model, ids, pass);
    double sum = 0.0;
    int64_t routers = 0;
    for (const auto& r : trace.records) {
      if (std::string(scope) == "block" && (r.site.site == "k_proj" || r.site.site == "v_proj")) continue;
      sum += sbl_loss(r.routing.logits, {}, 1.0, 0.1, 2, "published").loss.item<double>();
      ++routers;
    }
    EXPECT_EQ(routers, std::string(scope) == "block" ? 4 : 8);
    EXPECT_NEAR(loss_of(pass, "lora-mixer.sbl").item<double>(), sum / static_cast<double>(routers), 1e-5);
    EXPECT_EQ(pass.losses.size(), 1u);
  }
}

TEST(LoraMixer, OneRouterForWhatReadsOneInput) {
  std::vector<std::string> routers;
  for (const auto& t :
       make_causal(model_with(json::array({mixer({{"router_scope", "block"}, {"layers", 0}})})))->stored())
    if (t.name.find(".router.") != std::string::npos) routers.push_back(t.name);
  EXPECT_EQ(routers, (std::vector<std::string>{"model.layers.0.adapters.o_proj.router.weight",
                                               "model.layers.0.adapters.q_proj+k_proj+v_proj.router.weight"}));
}

TEST(LoraMixer, PreservesExpertsThatAreNamed) {
  torch::manual_seed(10);
  const auto a = f64({3, 2, 4}), b = f64({3, 5, 2}), a0 = f64({3, 2, 4}, false), b0 = f64({3, 5, 2}, false);
  const auto f = [&] { return preserve_loss({a, b}, {a0, b0}, {0, 2}, 0.5); };
  double want = 0.0;
  for (const int64_t e : {0, 2})
    want += 0.5 * ((a[e] - a0[e]).square().sum() + (b[e] - b0[e]).square().sum()).item<double>();
  EXPECT_NEAR(f().item<double>(), want, 1e-9);
  EXPECT_LT(gradient_error(f, a), 1e-6);
  EXPECT_EQ(a.grad()[1].abs().max().item<double>(), 0.0);
}

TEST(LoraMixer, FrozenExpertsStayAndTheRouterLearns) {
  torch::manual_seed(11);
  const auto model = make_causal(model_with(json::array({mixer({{"freeze_experts", true}})})), {.trainable = true});
  stir(*model);
  Pass pass;
  train_pass(*model, torch::arange(12, torch::kInt64).view({2, 6}), pass).backward();
  for (const auto& p : model->named_parameters()) {
    if (p.key().find(".adapter") == std::string::npos) continue;
    EXPECT_EQ(p.value().requires_grad(), p.key().find("router") != std::string::npos) << p.key();
    if (p.value().requires_grad()) {
      EXPECT_GT(p.value().grad().abs().max().item<double>(), 0.0) << p.key();
    }
  }
}

TEST(LoraMixer, BadInputIsAnError) {
  const auto says = [](const json& part, const Tensor& of) {
    return message_of([&] {
      const auto model = make_causal(model_with(json::array({part})), {.trainable = true});
      Pass pass;
      pass.labels = of;
      train_pass(*model, torch::arange(12, torch::kInt64).view({2, 6}), pass);
    });
  };
  EXPECT_NE(says(mixer({{"stage", "hard"}}), {}).find("needs the label of every sample"), std::string::npos);
  EXPECT_NE(says(mixer({{"stage", "hard"}}), torch::tensor({3, 0}, torch::kInt64))
                .find("label 3 is no expert: there are 0 to 2"),
            std::string::npos);
  EXPECT_NE(says(mixer({{"stage", "hard"}}), torch::tensor({-1, 0}, torch::kInt64)).find("label -1"),
            std::string::npos);
  EXPECT_NE(says(mixer({{"experts", 0}}), {}).find("experts"), std::string::npos);
  EXPECT_NE(says(mixer({{"usage_top_k", 4}}), {}).find("usage_top_k is 4"), std::string::npos);
  EXPECT_NE(says(mixer({{"preserve", {3}}}), {}).find("expert 3 of 3"), std::string::npos);
  // More than there are means all.
  EXPECT_EQ(says(mixer({{"top_k", 9}}), {}), "");
}

// ---- Experts that are brought along ----

class Brought : public testing::Test {
 protected:
  // A PEFT adapter beside q_proj of layer 0 with values of its own.
  std::string adapter(const std::string& name, int64_t rank, double alpha, int64_t in = 16,
                      const json& more = json::object()) {
    const auto at = folder_ / name;
    std::filesystem::create_directories(at);
    json config = {{"r", rank}, {"lora_alpha", alpha}};
    config.update(more);
    write_file(at / "adapter_config.json", config.dump());
    const std::string front = "base_model.model.model.layers.0.self_attn.q_proj.";
    std::vector<TensorInfo> infos = {{front + "lora_A.weight", Format::F32, {rank, in}},
                                     {front + "lora_B.weight", Format::F32, {16, rank}}};
    if (more.contains("bias")) infos.push_back({front + "base_layer.bias", Format::F32, {16}});
    if (more.contains("use_dora")) infos.push_back({front + "lora_magnitude_vector", Format::F32, {16}});
    SafetensorsWriter writer(at / "adapter_model.safetensors", infos);
    for (const auto& t : infos) {
      const auto values = torch::randn({t.elements()}) * 0.3;
      writer.write(t.name, std::as_bytes(std::span(values.const_data_ptr<float>(), static_cast<size_t>(t.elements()))));
    }
    writer.finish();
    return at.string();
  }
  TemporaryFolder folder_{"moiety-test"};
};

constexpr const char* kQ = "model.layers.0.self_attn.q_proj";

TEST_F(Brought, KeepTheirScalesAndAreFilledUpWithZeros) {
  torch::manual_seed(12);
  const auto e = read_peft_experts({adapter("one", 2, 8.0), adapter("two", 3, 3.0)}, kQ, 16, 16, 3);
  EXPECT_TRUE(torch::equal(e.scale, torch::tensor({4.0, 1.0})));
  EXPECT_EQ(e.a[0][2].abs().max().item<double>(), 0.0);
  EXPECT_GT(e.a[1][2].abs().max().item<double>(), 0.0);
  EXPECT_EQ(e.b[0].select(1, 2).abs().max().item<double>(), 0.0);
  const auto none = read_peft_experts({(folder_ / "one").string()}, "model.layers.1.self_attn.q_proj", 16, 16, 3);
  EXPECT_EQ(none.scale.item<double>(), 0.0);
}

TEST_F(Brought, ThatDoNotFitAreErrors) {
  const auto says = [](const std::string& at, int64_t rank) {
    return message_of([&] { read_peft_experts({at}, kQ, 16, 16, rank); });
  };
  EXPECT_NE(says(adapter("wide", 2, 8.0, 12), 2).find("is [16, 12] there, and the model's is [16, 16]"),
            std::string::npos);
  EXPECT_NE(says(adapter("deep", 4, 8.0), 2).find("set `rank` to 4"), std::string::npos);
  EXPECT_NE(says(adapter("dora", 2, 8.0, 16, {{"use_dora", true}}), 2).find("DoRA"), std::string::npos);
  EXPECT_NE(says(adapter("biased", 2, 8.0, 16, {{"bias", "lora_only"}}), 2).find("trained with biases"),
            std::string::npos);
  EXPECT_NE(says((folder_ / "nowhere").string(), 2).find("not an adapter"), std::string::npos);
}

TEST_F(Brought, BecomeExpertsOfAModel) {
  torch::manual_seed(13);
  const json list = {adapter("one", 2, 8.0), adapter("two", 1, 3.0)};
  const auto model = make_causal(
      model_with(json::array({mixer({{"adapters", list}, {"target", "q_proj"}, {"freeze_experts", true}})})));
  std::map<std::string, Tensor> stored;
  for (const auto& t : model->stored()) stored[t.name] = t.value();
  const auto want = read_peft_experts(list.get<std::vector<std::string>>(), kQ, 16, 16, 2);
  EXPECT_TRUE(torch::equal(stored.at("model.layers.0.adapters.q_proj.experts.lora_A"), want.a));
  EXPECT_TRUE(torch::equal(stored.at("model.layers.0.adapters.q_proj.experts.scale"), want.scale));
  EXPECT_EQ(stored.at("model.layers.1.adapters.q_proj.experts.scale").abs().max().item<double>(), 0.0);
  EXPECT_EQ(stored.at("model.layers.0.adapters.q_proj.router.weight").size(0), 2);
}

TEST(LoraMixerInModel, LearnsBesideAFrozenModelAndIsSaved) {
  check_in_model(mixer());
  check_in_model(mixer({{"stage", "hard_soft"}, {"router_scope", "block"}}));
}

// ---- Beside state-space layers ----

const json kSsm = {{"moiety", {{"parts", {{{"slug", "mamba"}, {"state", 4}}}}}}};

json ssm_mixer(const json& more = json::object()) {
  json part = mixer({{"target", {"in_proj", "x_proj", "dt_proj", "out_proj"}}});
  part.update(more);
  return part;
}

TEST(LoraMixerInModel, LearnsBesideStateSpaceLayers) {
  check_in_model(ssm_mixer(), {}, kSsm);
  check_in_model(ssm_mixer({{"stage", "hard_soft"}, {"router_scope", "block"}}), {}, kSsm);
}

TEST(LoraMixerInModel, EveryStageBesideStateSpaceLayers) {
  torch::manual_seed(15);
  const auto ids = torch::arange(12, torch::kInt64).view({2, 6});
  const auto base = make_causal(without_parts(model_with({}, kSsm)));
  const auto model = [&](const json& settings) {
    auto made = make_causal(model_with(json::array({ssm_mixer(settings)}), kSsm));
    copy_stored(*base, *made);
    return made;
  };
  const auto hard = model({{"stage", "hard"}});
  // B is 0 in all experts.
  EXPECT_TRUE(torch::equal(logits_of(*hard, ids, labels()), logits_of(*base, ids)));
  stir(*hard);
  const auto by_label = logits_of(*hard, ids, labels());
  EXPECT_GT(distance(by_label, logits_of(*base, ids)), 1e-4);
  EXPECT_LT(distance(by_label[0], logits_of(*hard, ids.slice(0, 0, 1), labels().slice(0, 0, 1))[0]), 1e-5);
  // A router that is sure of the label's expert.
  const auto sure = model({{"stage", "soft"}, {"top_k", 1}});
  copy_stored(*hard, *sure);
  struct OfLabel : Edit {
    void logits(const Site&, const Pass&, Tensor& logits) override {
      logits = torch::zeros_like(logits);
      logits.view({2, -1, 3})[0].select(-1, 2).fill_(1e4);
      logits.view({2, -1, 3})[1].select(-1, 0).fill_(1e4);
    }
  };
  const torch::NoGradGuard frozen;
  for (const bool training : {false, true}) {
    Pass pass;
    pass.edits = {std::make_shared<OfLabel>()};
    pass.training = training;
    EXPECT_LT(distance(sure->forward(ids, pass), by_label), 1e-5);
  }
  // Eight sites, each with a router of its own.
  Trace trace;
  Pass traced;
  traced.trace = &trace;
  sure->forward(ids, traced);
  std::set<std::string> sites;
  for (const auto& r : trace.records) sites.insert(r.site.site);
  EXPECT_EQ(sites, (std::set<std::string>{"dt_proj", "in_proj", "out_proj", "x_proj"}));
  EXPECT_EQ(trace.records.size(), 8u);
}

TEST(LoraMixerInModel, FrozenExpertsBesideStateSpaceLayersStay) {
  torch::manual_seed(16);
  const auto model =
      make_causal(model_with(json::array({ssm_mixer({{"freeze_experts", true}})}), kSsm), {.trainable = true});
  stir(*model);
  Pass pass;
  train_pass(*model, torch::arange(12, torch::kInt64).view({2, 6}), pass).backward();
  for (const auto& p : model->named_parameters()) {
    if (p.key().find(".adapter") == std::string::npos) continue;
    EXPECT_EQ(p.value().requires_grad(), p.key().find("router") != std::string::npos) << p.key();
    if (p.value().requires_grad()) {
      EXPECT_GT(p.value().grad().abs().max().item<double>(), 0.0) << p.key();
    }
  }
}

TEST(LoraMixerInModel, TargetsThatAModelLacksAreAnError) {
  EXPECT_NE(message_of([] {
              make_causal(model_with(json::array({ssm_mixer()})));
            }).find("has no matrix 'in_proj' that a part could stand beside; it has q_proj"),
            std::string::npos);
  EXPECT_NE(message_of([] {
              make_causal(model_with(json::array({mixer()}), kSsm));
            }).find("has no matrix 'q_proj' that a part could stand beside; it has in_proj"),
            std::string::npos);
}

TEST(LoraMixerInModel, LearnsByLabelsToo) {
  // The router does not learn then, but it is there.
  torch::manual_seed(14);
  check_recomputed(mixer({{"stage", "hard"}}), labels());
}

TEST(LoraMixerInModel, GradientsOfBlocksThatRunAgain) {
  check_recomputed(mixer({{"preserve_beta", 0.1}, {"dropout", 0.3}}));
}

}  // namespace
}  // namespace moiety
