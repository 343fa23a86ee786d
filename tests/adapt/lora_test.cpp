#include "moiety/adapt/lora.h"

#include <gtest/gtest.h>

#include "adapt_tools.h"
#include "message_of.h"
#include "moiety/adapt/routed_lora.h"
#include "moiety/base/files.h"
#include "moiety/io/peft.h"
#include "moiety/moe/experts.h"
#include "moiety/nn/weights.h"
#include "moiety/train/open_run.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

json lora(const json& more = json::object()) {
  json part = {{"slug", "lora"}, {"rank", 2}, {"alpha", 3.0}};
  part.update(more);
  return part;
}

const Tensor& ids() {
  static const Tensor t = torch::arange(18, torch::kInt64).view({2, 9});
  return t;
}

TEST(Lora, AddsItsProductTimesAlphaOverRank) {
  torch::manual_seed(1);
  const torch::NoGradGuard frozen;
  const auto w = f64({5, 4}, false), a = f64({2, 4}, false), b = f64({5, 2}, false), x = f64({2, 3, 4}, false);
  Lora part(a, b, 1.5);
  Pass pass;
  EXPECT_LT(distance(applied(part, w, x, pass), torch::matmul(x, (w + 1.5 * torch::matmul(b, a)).t())), 1e-12);
}

TEST(Lora, GradientsEqualCentralDifferences) {
  torch::manual_seed(2);
  const auto w = f64({5, 4}, false), a = f64({2, 4}), b = f64({5, 2}), x = f64({3, 4});
  Lora part(a, b, 1.5);
  const auto f = [&] {
    Pass pass;
    return applied(part, w, x, pass).square().sum();
  };
  for (const Tensor& t : {a, b, x}) EXPECT_LT(gradient_error(f, t), 1e-6);
}

// DoRA divides by norms that carry no gradient: its gradient is that of the formula with the norms as constants.
TEST(Lora, DoraIsTheFormulaWithNormsThatAreConstants) {
  torch::manual_seed(3);
  const auto w = torch::randn({5, 4}), bias = torch::randn({5}), m = (torch::rand({5}) + 0.5).requires_grad_(),
             a = torch::randn({2, 4}).requires_grad_(), b = torch::randn({5, 2}).requires_grad_(),
             x = torch::randn({3, 4}).requires_grad_(), up = torch::randn({3, 5});
  Linear matrix(w, bias);
  Lora part(a, b, 1.5, 0.0, matrix.get(), m);
  std::vector<Tensor> outputs = {matrix->multiply(x)};
  Pass pass;
  part.apply(x, outputs, pass);
  const auto norms = (w + 1.5 * torch::matmul(b, a)).square().sum(1).sqrt().detach();
  const auto want = torch::matmul(x, (w + 1.5 * torch::matmul(b, a)).t()) * (m / norms) + bias;
  EXPECT_LT(distance(outputs[0], want), 1e-5);
  const auto got = torch::autograd::grad({(outputs[0] * up).sum()}, {a, b, m, x}),
             wanted = torch::autograd::grad({(want * up).sum()}, {a, b, m, x});
  for (size_t i = 0; i < got.size(); ++i) EXPECT_LT(distance(got[i], wanted[i]), 1e-4) << i;
}

TEST(Lora, NormsThatInferenceKeepsFollowTheMatrices) {
  torch::manual_seed(4);
  const torch::NoGradGuard frozen;
  auto a = torch::randn({2, 4}), b = torch::randn({5, 2});
  const auto x = torch::randn({3, 4}), m = torch::ones({5});
  Linear matrix(torch::randn({5, 4}));
  Lora part(a, b, 1.0, 0.0, matrix.get(), m);
  const auto answer = [&](Lora& l) {
    Pass pass;
    return applied(l, matrix->weight, x, pass);
  };
  const auto fresh = [&] {
    Lora other(a, b, 1.0, 0.0, matrix.get(), m);
    return answer(other);
  };
  EXPECT_TRUE(torch::equal(answer(part), fresh()));
  b.mul_(2.0);
  EXPECT_TRUE(torch::equal(answer(part), fresh()));
  // As a moving average takes the place of the weights.
  part.b.set_data(torch::randn({5, 2}));
  b = part.b;
  EXPECT_TRUE(torch::equal(answer(part), fresh()));
}

TEST(Lora, DropoutIsOfWhatTheRanksReadAndOfTrainingAlone) {
  torch::manual_seed(5);
  const torch::NoGradGuard frozen;
  const auto w = torch::randn({5, 4}), a = torch::randn({2, 4}), b = torch::randn({5, 2}), x = torch::randn({3, 4});
  Lora part(a, b, 1.0, 0.5);
  Pass still, training;
  training.training = true;
  EXPECT_LT(distance(applied(part, w, x, still), torch::matmul(x, (w + torch::matmul(b, a)).t())), 1e-5);
  EXPECT_GT(distance(applied(part, w, x, training), applied(part, w, x, still)), 1e-2);
}

TEST(Lora, ScalesByPatterns) {
  const auto c = parse<LoraConfig>({{"rank", 4},
                                    {"alpha", 8.0},
                                    {"rank_pattern", {{"layers\\.0\\..*", 16}}},
                                    {"alpha_pattern", {{"v_proj", 2.0}}},
                                    {"strength", 0.5}},
                                   "test");
  EXPECT_DOUBLE_EQ(c.scale_at("model.layers.1.self_attn.q_proj"), 0.5 * 8.0 / 4.0);
  EXPECT_DOUBLE_EQ(c.scale_at("model.layers.0.self_attn.q_proj"), 0.5 * 8.0 / 16.0);
  EXPECT_DOUBLE_EQ(c.scale_at("model.layers.1.self_attn.v_proj"), 0.5 * 2.0 / 4.0);
  auto r = c;
  r.rslora = true;
  EXPECT_DOUBLE_EQ(r.scale_at("model.layers.0.self_attn.q_proj"), 0.5 * 8.0 / 4.0);
}

TEST(Lora, BadSettingsAreErrors) {
  EXPECT_THROW(parse<LoraConfig>({{"rank", 0}}, "test"), Error);
  EXPECT_THROW(parse<LoraConfig>({{"bias", "some"}}, "test"), Error);
  EXPECT_THROW(parse<LoraConfig>({{"rank_pattern", {{"q_proj", 0}}}}, "test").rank_at("x.q_proj"), Error);
  EXPECT_THROW(parse<LoraConfig>({{"alpha_pattern", {{"(", 1.0}}}}, "test").alpha_at("x.q_proj"), Error);
  EXPECT_THROW(Lora(torch::zeros({2, 4}), torch::zeros({5, 3}), 1.0), Error);
  EXPECT_THROW(Lora(torch::zeros({2, 4}), torch::zeros({5, 2}), 1.0, 0.0, nullptr, torch::ones({5})), Error);
  Linear unbiased(4, 5);
  EXPECT_THROW(Lora(torch::zeros({2, 4}), torch::zeros({5, 2}), 1.0, 0.0, unbiased.get(), {}, torch::ones({5})), Error);
  EXPECT_THROW(LoraStack(torch::zeros({2, 4}), torch::zeros({5, 2}), 1.0), Error);
}

TEST(LoraInModel, LearnsBesideAFrozenModelAndIsSaved) {
  check_in_model(lora());
}

TEST(LoraInModel, SoDoesDora) {
  check_in_model(lora({{"dora", true}, {"target", {"q_proj", "down_proj"}}}));
}

TEST(LoraInModel, SoDoBiases) {
  check_in_model(lora({{"bias", "lora_only"}, {"target", {"q_proj", "o_proj"}}}), {},
                 {{"model_type", "qwen2"}, {"vocab_size", 40}});
}

const json kQwen2 = {{"model_type", "qwen2"}};

TEST(LoraInModel, AllBiasesLearnBesideAFrozenModel) {
  torch::manual_seed(15);
  const auto config = model_with(json::array({lora({{"bias", "all"}, {"target", "q_proj"}})}), kQwen2);
  const TemporaryFolder folder("moiety-test");
  const auto plain = make_causal(without_parts(config), {.trainable = true});
  std::filesystem::create_directories(folder / "base");
  write_file(folder / "base" / "config.json", without_parts(config).dump());
  write_stored(folder / "base", plain->stored(), "bf16");
  const auto base = Checkpoint::open((folder / "base").string());
  for (const char* dtype : {"f32", "bf16"}) {
    const auto model = load_causal(*base, config, {.dtype = dtype, .trainable = true, .frozen_base = true});
    int64_t learning = 0;
    for (const auto& p : model->named_parameters()) {
      const bool bias = is_bias(p.key());
      EXPECT_EQ(p.value().requires_grad(), bias || p.key().find(".adapter") != std::string::npos) << p.key();
      if (bias) {
        EXPECT_EQ(p.value().scalar_type(), torch::kFloat32);
        ++learning;
      }
    }
    EXPECT_EQ(learning, 2 * 3);  // q, k and v
    Pass pass;
    train_pass(*model, ids(), pass).backward();
    for (const auto& p : model->named_parameters())
      if (is_bias(p.key())) {
        EXPECT_GT(p.value().grad().abs().max().item<double>(), 0.0) << p.key();
      }
  }
  // Without the setting nothing of the base learns.
  const auto still = load_causal(*base, model_with(json::array({lora({{"target", "q_proj"}})}), kQwen2),
                                 {.trainable = true, .frozen_base = true});
  for (const auto& p : still->named_parameters())
    EXPECT_EQ(p.value().requires_grad(), p.key().find(".adapter") != std::string::npos) << p.key();
}

TEST(LoraInModel, ATrainedBiasIsForOneLoraAlone) {
  const auto says = [](const json& second) {
    auto other = lora({{"name", "b"}, {"target", "q_proj"}});
    other.update(second);
    return message_of([&] {
      make_causal(
          model_with(json::array({lora({{"name", "a"}, {"target", "q_proj"}, {"bias", "lora_only"}}), other}), kQwen2));
    });
  };
  EXPECT_NE(says({{"bias", "lora_only"}}).find("another trained bias cannot join it"), std::string::npos);
  EXPECT_NE(says({{"dora", true}}).find("DoRA cannot join it"), std::string::npos);
  EXPECT_EQ(says(json::object()), "");
}

TEST(LoraInModel, GradientsOfBlocksThatRunAgain) {
  check_recomputed(lora({{"dora", true}, {"dropout", 0.3}}));
}

TEST(LoraInModel, SeveralWithNamesAddUp) {
  torch::manual_seed(6);
  const auto both = make_causal(model_with(
      {lora({{"name", "law"}, {"target", "q_proj"}}), lora({{"name", "code"}, {"target", {"q_proj", "v_proj"}}})}));
  stir(*both);
  const auto with = logits_of(*both, ids());
  const torch::NoGradGuard frozen;
  std::set<std::string> names;
  for (const auto& t : both->stored()) {
    names.insert(t.name);
    // One and the same matrix in place of two: B A + D C.
    if (t.name.find("adapters.law.q_proj.lora_B") != std::string::npos) t.value().zero_();
  }
  EXPECT_EQ(names.count("model.layers.0.adapters.law.q_proj.lora_A"), 1u);
  EXPECT_EQ(names.count("model.layers.0.adapters.code.v_proj.lora_A"), 1u);
  const auto code = logits_of(*both, ids());
  EXPECT_GT(distance(with, code), 1e-4);
  const auto alone = make_causal(model_with(json::array({lora({{"name", "code"}, {"target", {"q_proj", "v_proj"}}})})));
  copy_stored(*both, *alone);
  EXPECT_TRUE(torch::equal(logits_of(*alone, ids()), code));
}

TEST(LoraInModel, TracesKeepWhatEachOfThemGave) {
  torch::manual_seed(14);
  const torch::NoGradGuard frozen;
  const auto part = [](const char* name) {
    return json{{"slug", "mola"}, {"name", name}, {"target", "q_proj"}, {"experts", 2}, {"rank", 2}, {"layers", 0}};
  };
  const auto model = make_causal(model_with(json::array({part("one"), part("two")})));
  stir(*model);
  model->eval();
  Trace trace;
  trace.keep_outputs = true;
  Pass pass;
  pass.trace = &trace;
  model->forward(ids(), pass);
  ASSERT_EQ(trace.records.size(), 2u);
  EXPECT_GT(distance(trace.records[0].output, trace.records[1].output), 1e-4);
}

std::vector<std::string> places(const CausalModel& model) {
  std::vector<std::string> out;
  for (const auto& t : model.stored())
    if (const size_t at = t.name.find(".lora_A"); at != std::string::npos) out.push_back(t.name.substr(13, at - 13));
  return out;
}

TEST(LoraInModel, TargetsByRegularExpression) {
  const auto at = [](const json& target) {
    return places(*make_causal(model_with(json::array({lora({{"target", target}})}))));
  };
  EXPECT_EQ(at(".*layers\\.1\\.self_attn\\.[qv]_proj"),
            (std::vector<std::string>{"1.adapters.q_proj", "1.adapters.v_proj"}));
  EXPECT_EQ(at({"down_proj", "model.layers.(0).self_attn.o_proj"}),
            (std::vector<std::string>{"0.adapters.down_proj", "0.adapters.o_proj", "1.adapters.down_proj"}));
  EXPECT_NE(message_of([&] { at(".*layers\\.7\\..*"); }).find("no layer has a matrix"), std::string::npos);
  EXPECT_NE(message_of([&] { at("q_proj("); }).find("regular expression"), std::string::npos);
  EXPECT_EQ(at("all").size(), 14u);
}

TEST(LoraInModel, OnePlaceOnePart) {
  EXPECT_NE(message_of([&] {
              make_causal(model_with(
                  {lora({{"name", "a"}, {"target", "q_proj"}}), lora({{"name", "a"}, {"target", ".*q_proj"}})}));
            }).find("stands beside the matrix already"),
            std::string::npos);
}

// ---- Beside experts ----

json mixture(const json& part) {
  return model_with(json::array({part}),
                    {{"model_type", "mixtral"}, {"num_local_experts", 4}, {"num_experts_per_tok", 2}});
}

TEST(LoraOfExperts, GradientsEqualCentralDifferences) {
  torch::manual_seed(7);
  for (const int64_t of_a : {1, 3})
    for (const int64_t of_b : {1, 3}) {
      const auto a = f64({of_a, 2, 4}), b = f64({of_b, 5, 2}), x = f64({6, 4});
      LoraStack part(a, b, 0.5);
      const std::vector<int64_t> counts = {2, 0, 4};
      const auto f = [&] { return part.apply(x, counts, torch::ones({6, 5}, torch::kFloat64)).square().sum(); };
      for (const Tensor& t : {a, b, x}) EXPECT_LT(gradient_error(f, t), 1e-6) << of_a << of_b;
      const torch::NoGradGuard frozen;
      EXPECT_LT(distance(part.apply(x, counts, torch::zeros({6, 5}, torch::kFloat64)).slice(0, 2, 6),
                         torch::matmul(x.slice(0, 2, 6), part.delta(2).to(torch::kFloat64).t())),
                1e-5);
    }
}

class LoraOfExperts : public testing::TestWithParam<const char*> {};

TEST_P(LoraOfExperts, LearnsAndIsSaved) {
  // What experts share is saved for each of them: other products, other rounding.
  check_in_model(lora({{"target", {"experts.gate_up_proj", "experts.down_proj", "q_proj"}}, {"experts", GetParam()}}),
                 {}, {{"model_type", "mixtral"}, {"num_local_experts", 4}, {"num_experts_per_tok", 2}},
                 std::string(GetParam()) == "own" ? 0.0 : 1e-5);
}

TEST_P(LoraOfExperts, HasTheShapesThatItSays) {
  const auto model = make_causal(mixture(lora({{"target", "experts.gate_up_proj"}, {"experts", GetParam()}})));
  std::map<std::string, std::vector<int64_t>> shapes;
  for (const auto& t : model->stored()) shapes[t.name] = t.value().sizes().vec();
  const std::string at = "model.layers.0.adapters.experts.gate_up_proj.";
  const bool own = std::string(GetParam()) == "own", all = std::string(GetParam()) == "all";
  EXPECT_EQ(shapes.at(at + "lora_A"), (std::vector<int64_t>{own ? 4 : 1, 2, 16}));
  EXPECT_EQ(shapes.at(at + "lora_B_gate"), (std::vector<int64_t>{all ? 1 : 4, 24, 2}));
  EXPECT_EQ(shapes.at(at + "lora_B_up"), (std::vector<int64_t>{all ? 1 : 4, 24, 2}));
}

TEST_P(LoraOfExperts, ChangesWhatExpertsGive) {
  torch::manual_seed(8);
  const auto model = make_causal(mixture(lora({{"target", "experts.down_proj"}, {"experts", GetParam()}})));
  const auto before = logits_of(*model, ids());
  stir(*model);
  EXPECT_GT(distance(logits_of(*model, ids()), before), 1e-4);
}

INSTANTIATE_TEST_SUITE_P(All, LoraOfExperts, testing::Values("own", "shared", "all"),
                         [](const auto& info) { return std::string(info.param); });

TEST(LoraOfExpertsErrors, SayWhatIsNotDefined) {
  const auto says = [](const json& part) { return message_of([&] { make_causal(mixture(part)); }); };
  EXPECT_NE(says(lora({{"target", "experts.down_proj"}, {"dora", true}})).find("DoRA"), std::string::npos);
  EXPECT_NE(says(lora({{"target", "experts.down_proj"}, {"dropout", 0.1}})).find("dropout"), std::string::npos);
  EXPECT_NE(
      says({{"slug", "mola"}, {"target", "experts.down_proj"}}).find("cannot stand beside the matrices of experts"),
      std::string::npos);
  EXPECT_NE(message_of([] {
              make_causal(model_with(json::array({lora({{"target", "experts.down_proj"}})})));
            }).find("it has q_proj"),
            std::string::npos);
}

// ---- Beside blocks ----

TEST(LoraOfBlocks, GradientsReachABAndX) {
  torch::manual_seed(9);
  const int64_t in = 64, out = 6;
  const auto dense = torch::randn({out, in});
  TensorView view;
  view.format = Format::Q8_0;
  view.shape = {out, in};
  auto data = std::make_shared<std::vector<std::byte>>(static_cast<size_t>(out * row_bytes(Format::Q8_0, in)));
  for (int64_t r = 0; r < out; ++r)
    quantize_row(Format::Q8_0, dense.const_data_ptr<float>() + r * in, data->data() + r * row_bytes(Format::Q8_0, in),
                 in);
  view.data = *data;
  view.owner = data;
  Linear matrix(view);
  ASSERT_TRUE(matrix->quantized());
  const auto w = dequantize(view), a = torch::randn({2, in}).requires_grad_(),
             b = torch::randn({out, 2}).requires_grad_(), x = torch::randn({3, in}).requires_grad_(),
             up = torch::randn({3, out});
  matrix->attach(std::make_shared<Lora>(a, b, 0.5));
  Pass pass;
  const auto got = torch::autograd::grad({(project(matrix, x, pass) * up).sum()}, {a, b, x}),
             want =
                 torch::autograd::grad({(torch::matmul(x, (w + 0.5 * torch::matmul(b, a)).t()) * up).sum()}, {a, b, x});
  for (size_t i = 0; i < got.size(); ++i) EXPECT_LT(distance(got[i], want[i]), 1e-3) << i;
}

// ---- Distances between experts ----

TEST(ExpertDistances, EqualThoseOfTheProducts) {
  torch::manual_seed(10);
  const auto a = torch::randn({3, 2, 5}), b = torch::randn({3, 4, 2});
  const auto d = expert_distance(a, b);
  const auto products = torch::matmul(b, a);
  double sum = 0.0, norms = 0.0;
  for (int64_t i = 0; i < 3; ++i) {
    norms += products[i].norm().item<double>() / 3.0;
    for (int64_t j = 0; j < i; ++j) sum += (products[i] - products[j]).norm().item<double>() / 3.0;
  }
  EXPECT_NEAR(d.absolute, sum, 1e-4);
  EXPECT_NEAR(d.relative, sum / norms, 1e-4);
  EXPECT_NEAR(expert_distance(a.slice(0, 0, 1).expand({3, 2, 5}), b.slice(0, 0, 1).expand({3, 4, 2})).absolute, 0.0,
              1e-4);
  EXPECT_EQ(expert_distance(a, torch::zeros_like(b)).relative, 0.0);
  EXPECT_EQ(expert_distance(a.slice(0, 0, 1), b.slice(0, 0, 1)).absolute, 0.0);
}

}  // namespace
}  // namespace moiety
