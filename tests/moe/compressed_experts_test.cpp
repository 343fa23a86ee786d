#include "moiety/moe/compressed_experts.h"

#include <gtest/gtest.h>

#include "message_of.h"
#include "moe_tools.h"
#include "moiety/base/files.h"
#include "moiety/models/decoder.h"
#include "moiety/train/open_run.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

constexpr int64_t kExperts = 6, kHidden = 5, kWidth = 4, kTopK = 4;

std::shared_ptr<TopKRouter> router_of(const Linear& rows, int64_t top_k = kTopK, bool normalize = false) {
  TopKRouterOptions options;
  options.top_k = top_k;
  options.normalize = normalize;
  return std::make_shared<TopKRouter>(rows, options);
}

struct Layer {
  Linear rows{kHidden, kExperts};
  std::shared_ptr<GatedExperts> experts;
  Tensor ces;
  explicit Layer(int64_t width = kWidth)
      : experts(gated_experts(kExperts, kHidden, width)),
        ces((torch::rand({kExperts, 3, std::max(kHidden, width)}) + 0.5).requires_grad_()) {}
  CompressedExperts module(int64_t n, bool normalize = false, int64_t top_k = kTopK) const {
    return {router_of(rows, top_k, normalize), *experts, ces, n};
  }
  Tensor run(int64_t n, const Tensor& x, bool normalize = false) const {
    auto m = module(n, normalize);
    Pass pass;
    return m.forward(x, pass);
  }
  // By the definition, a token and an expert at a time.
  Tensor plainly(int64_t n, const Tensor& x) const {
    const auto r = router_of(rows);
    Pass pass;
    const Routing routing = r->route(x, {}, pass);
    auto y = torch::zeros_like(x);
    for (int64_t t = 0; t < x.size(0); ++t) {
      const auto gates = routing.gates[t], alpha = gates.narrow(0, kTopK - n, n) / gates.narrow(0, kTopK - n, n).sum();
      auto c = torch::zeros({3, ces.size(2)});
      for (int64_t j = 0; j < n; ++j) c = c + alpha[j] * ces[routing.experts[t][kTopK - n + j].item<int64_t>()];
      for (int64_t j = 0; j < kTopK - n; ++j) {
        const auto e = routing.experts[t][j].item<int64_t>();
        const auto g = experts->gate->weight[e].mv(x[t] * c[0].narrow(0, 0, kHidden)),
                   u = experts->up->weight[e].mv(x[t] * c[2].narrow(0, 0, kHidden));
        const auto h = torch::silu(g) * u * c[1].narrow(0, 0, g.size(0));
        y[t] += gates[j] * experts->down->weight[e].mv(h);
      }
    }
    return y;
  }
};

TEST(CompressedExperts, AreTheDefinition) {
  torch::manual_seed(1);
  const torch::NoGradGuard frozen;
  const auto x = torch::randn({7, kHidden});
  for (const int64_t width : {kWidth, kHidden + 3}) {  // the second: hidden units beyond the hidden size
    const Layer l(width);
    for (const int64_t n : {1, 2, 3}) EXPECT_LT(distance(l.run(n, x.unsqueeze(0))[0], l.plainly(n, x)), 1e-6) << n;
  }
}

TEST(CompressedExperts, OnesAreThePlainMixtureWithItsFirstSlots) {
  torch::manual_seed(2);
  const torch::NoGradGuard frozen;
  const Layer l;
  l.ces.fill_(1.0);
  const auto x = torch::randn({3, 4, kHidden});
  for (const int64_t n : {1, 2, 3}) {
    const auto flat = x.reshape({-1, kHidden});
    Pass pass;
    Routing routing = router_of(l.rows)->route(flat, {}, pass);
    routing.experts = routing.experts.narrow(1, 0, kTopK - n);
    routing.gates = routing.gates.narrow(1, 0, kTopK - n);
    const Dispatch d = Dispatch::of(routing, kExperts);
    // The same matrices one after another, as where gates and products are not one step.
    const auto want = d.reduce(l.experts->forward(d.gather(flat), d.counts), flat.size(0));
    EXPECT_TRUE(torch::equal(l.run(n, x).reshape({-1, kHidden}), want)) << n;
  }
}

TEST(CompressedExperts, NoneIsThePlainMixture) {
  torch::manual_seed(3);
  const Layer l;
  const auto x = torch::randn({2, 5, kHidden});
  Mixture plain(router_of(l.rows, kTopK, true), l.experts);
  Pass pass;
  const auto y = l.run(0, x, true);
  EXPECT_TRUE(torch::equal(y, plain.forward(x, pass)));
  y.sum().backward();
  EXPECT_TRUE(!l.ces.grad().defined() || l.ces.grad().abs().max().item<double>() == 0.0);
}

TEST(CompressedExperts, GatesOfTheMainOnesStayWhatTheyAre) {
  torch::manual_seed(4);
  const torch::NoGradGuard frozen;
  const Layer l;
  auto m = l.module(2, /*normalize=*/true);
  Trace trace;
  Pass pass;
  pass.trace = &trace;
  m.forward(torch::randn({1, 8, kHidden}), pass);
  const auto& gates = trace.records.at(0).routing.gates;
  ASSERT_EQ(gates.size(1), kTopK);
  EXPECT_LT(distance(gates.sum(1), torch::ones({8})), 1e-6);
  EXPECT_LT(gates.narrow(1, 0, 2).sum(1).max().item<double>(), 1.0);
}

TEST(CompressedExperts, VectorsOfOthersGetNoGradient) {
  torch::manual_seed(5);
  const Layer l;
  const auto x = torch::randn({1, 3, kHidden});
  Pass pass;
  const auto auxiliary = router_of(l.rows)->route(x[0], {}, pass).experts.narrow(1, 2, 2);
  l.run(2, x).square().sum().backward();
  const auto size = l.ces.grad().abs();
  int64_t used = 0;
  for (int64_t e = 0; e < kExperts; ++e) {
    const bool is = (auxiliary == e).any().item<bool>();
    used += is ? 1 : 0;
    EXPECT_EQ(size[e].max().item<double>() > 0.0, is) << e;
  }
  EXPECT_LT(used, kExperts);
  // The down projections read fewer numbers than the vectors have.
  EXPECT_EQ(size.select(1, 1).narrow(1, kWidth, kHidden - kWidth).max().item<double>(), 0.0);
}

TEST(CompressedExperts, AVectorScalesWhatAMatrixReads) {
  torch::manual_seed(6);
  const torch::NoGradGuard frozen;
  const auto x = torch::randn({1, 6, kHidden});
  const struct {
    int64_t which;
    LinearStack GatedExperts::*matrix;
  } pairs[] = {{0, &GatedExperts::gate}, {1, &GatedExperts::down}, {2, &GatedExperts::up}};
  for (const auto& pair : pairs) {
    torch::manual_seed(7);
    Layer l;
    l.ces.select(1, pair.which).mul_(1.7);
    const auto y = l.run(2, x);
    l.ces.select(1, pair.which).div_(1.7);
    (l.experts.get()->*pair.matrix)->weight.mul_(1.7);
    EXPECT_LT(distance(l.run(2, x), y), 1e-6) << pair.which;
  }
}

TEST(CompressedExperts, OneTripleForAllHidesWhoIsAuxiliary) {
  torch::manual_seed(8);
  const torch::NoGradGuard frozen;
  const Layer l;
  l.ces.copy_(l.ces[0].expand_as(l.ces).clone());
  const auto routing = [](std::vector<int64_t> auxiliary) {
    Routing r;
    r.experts = torch::tensor({{0l, 1l, auxiliary[0], auxiliary[1]}}, torch::kInt64);
    r.gates = torch::tensor({{0.4f, 0.3f, 0.2f, 0.05f}});
    return r;
  };
  EXPECT_LT(distance(compressed_inputs(routing({2, 3}), 2, l.ces), compressed_inputs(routing({5, 4}), 2, l.ces)), 1e-6);
  // Slots without an expert have no weight, and a token without any reads what it would read else.
  EXPECT_LT(distance(compressed_inputs(routing({2, -1}), 2, l.ces)[0], l.ces[2]), 1e-6);
  EXPECT_TRUE(torch::equal(compressed_inputs(routing({-1, -1}), 2, l.ces), torch::ones({1, 3, kHidden})));
}

TEST(CompressedExperts, DoNotKnowTheOrderOfExperts) {
  torch::manual_seed(9);
  const torch::NoGradGuard frozen;
  Layer l;
  const auto x = torch::randn({1, 6, kHidden});
  const auto y = l.run(2, x);
  const auto order = torch::tensor({3, 0, 5, 1, 4, 2}, torch::kInt64);
  for (Tensor t : {l.rows->weight, l.experts->gate->weight, l.experts->up->weight, l.experts->down->weight, l.ces})
    t.copy_(t.index_select(0, order).clone());
  EXPECT_LT(distance(l.run(2, x), y), 1e-6);
}

TEST(CompressedExperts, GradientsAreThoseOfTheSum) {
  torch::manual_seed(10);
  const auto f64 = [](std::vector<int64_t> shape) { return torch::randn(shape, torch::kFloat64).requires_grad_(); };
  auto x = f64({4, kHidden}), logits = f64({4, kExperts}), ces = f64({kExperts, 3, kHidden}), out = f64({4, kHidden});
  ScaledExperts experts(LinearStack(f64({kExperts, kWidth, kHidden})), LinearStack(f64({kExperts, kWidth, kHidden})),
                        LinearStack(f64({kExperts, kHidden, kWidth})), activation("silu"));
  const auto chosen = std::get<1>(torch::softmax(logits, -1).topk(kTopK)).detach();
  const auto f = [&] {
    Routing all, main;
    all.experts = chosen;
    all.gates = torch::softmax(logits, -1).gather(1, chosen);
    main.experts = chosen.narrow(1, 0, 2);
    main.gates = all.gates.narrow(1, 0, 2);
    return (experts.mix_scaled(x, compressed_inputs(all, 2, ces), Dispatch::of(main, kExperts)) * out.detach()).sum();
  };
  for (Tensor t : {x, logits, ces, experts.down->weight}) EXPECT_LT(gradient_error(f, t), 1e-6);
}

TEST(CompressedExperts, TheRouterLearnsThroughWeightsOfAuxiliaryOnes) {
  torch::manual_seed(11);
  const auto gradient_of_last = [&](int64_t n) {
    auto gates = torch::tensor({{0.4f, 0.3f, 0.2f, 0.1f}}).requires_grad_();
    const Layer l;
    Routing r;
    r.experts = torch::tensor({{0l, 1l, 2l, 3l}}, torch::kInt64);
    r.gates = gates;
    compressed_inputs(r, n, l.ces).sum().backward();
    return gates.grad()[0][3].item<double>();
  };
  EXPECT_NE(gradient_of_last(2), 0.0);
  EXPECT_NEAR(gradient_of_last(1), 0.0, 1e-6);  // one auxiliary expert has the weight 1
}

TEST(CompressedExperts, BadSettingsAreErrors) {
  const Layer l;
  const auto x = torch::randn({1, 2, kHidden});
  EXPECT_NE(message_of([&] { l.run(kTopK, x); }).find("at least one main expert is needed: top_k=4, n_ce=4"),
            std::string::npos);
  EXPECT_THROW(CompressedExperts(router_of(l.rows), *l.experts, torch::ones({kExperts, 3, kWidth}), 2), Error);
  EXPECT_THROW(parse<CompressedExpertsConfig>({{"n_ce", -2}}, "run.yaml"), Error);
  ClampedExperts clamped(LinearStack(2, 3, 4), LinearStack(2, 3, 4), LinearStack(2, 4, 3), 1.7, 7.0);
  EXPECT_NE(message_of([&] {
              CompressedExperts(router_of(Linear(3, 2), 2), clamped, torch::ones({2, 3, 4}), 1);
            }).find("no plain activation"),
            std::string::npos);
  EXPECT_EQ(auxiliary_experts(-1, 8), 4);
  EXPECT_EQ(auxiliary_experts(-1, 1), 0);
}

TEST(ActiveParameters, CountWhatATokenUses) {
  ActiveSizes s;
  s.hidden = 8;
  s.intermediate = 16;
  s.experts = 4;
  s.top_k = 2;
  s.n_ce = 1;
  s.layers = 3;
  s.heads = 2;
  s.kv_heads = 1;
  s.head_dim = 4;
  s.vocab = 10;
  s.tied = true;
  const auto tied = active_parameters(s);
  EXPECT_EQ(tied.full, 10 * 8 + 8 + 3 * (16 + 8 * 8 * 2 + 2 * 8 * 4 + 4 * 8 + 2 * 3 * 8 * 16));
  EXPECT_EQ(tied.full - tied.compressed, 3 * (3 * 8 * 16 - (2 * 8 + 16)));
  EXPECT_EQ(tied.added, 3 * 3 * 4 * 16);
  s.tied = false;
  s.qk_norm = true;
  EXPECT_EQ(active_parameters(s).full - tied.full, 10 * 8 + 3 * (8 + 4));
}

// In a whole model.

json olmoe(const json& more = json::object()) {
  json c = {{"model_type", "olmoe"},
            {"vocab_size", 40},
            {"hidden_size", 16},
            {"intermediate_size", 12},
            {"num_hidden_layers", 2},
            {"num_attention_heads", 4},
            {"num_key_value_heads", 4},
            {"num_experts", 6},
            {"num_experts_per_tok", 4},
            {"norm_topk_prob", false},
            {"max_position_embeddings", 64},
            {"tie_word_embeddings", false}};
  c.update(more);
  return c;
}

void save(const CausalModel& model, json config, const std::filesystem::path& folder) {
  config["dtype"] = "float32";
  std::filesystem::create_directories(folder);
  write_file(folder / "config.json", config.dump());
  write_stored(folder, model.stored(), "f32");
}

Tensor logits_of(CausalModel& model, const Tensor& ids) {
  const torch::NoGradGuard frozen;
  model.eval();
  Pass pass;
  return model.forward(ids, pass);
}

TEST(CompressedExpertsModel, APartKeepsTheFamilysRouterAndExperts) {
  torch::manual_seed(12);
  const TemporaryFolder folder("moiety-test");
  const auto ids = torch::arange(12, torch::kInt64).view({2, 6});
  save(*make_causal(olmoe()), olmoe(), folder.path());
  const auto base = Checkpoint::open(folder.path().string());
  const auto plain = load_causal(*base);
  // Without auxiliary experts nothing changes; with some, their share is missing.
  const auto with = [&](int64_t n) {
    const json part = {{"slug", "compressed-experts"}, {"n_ce", n}};
    return load_causal(*base, olmoe({{"moiety", {{"parts", json::array({part})}}}}), {});
  };
  EXPECT_TRUE(torch::equal(logits_of(*with(0), ids), logits_of(*plain, ids)));
  EXPECT_GT(distance(logits_of(*with(2), ids), logits_of(*plain, ids)), 1e-4);
  EXPECT_THROW(with(4), Error);
}

TEST(CompressedExpertsModel, ReadsTheAuthorsKeys) {
  torch::manual_seed(13);
  const TemporaryFolder folder("moiety-test"), tuned("moiety-test");
  const auto ids = torch::arange(12, torch::kInt64).view({2, 6});
  save(*make_causal(olmoe()), olmoe(), folder.path());
  const json config = olmoe({{"use_ce", true}, {"n_ce", 2}});
  // A file without vectors starts with ones.
  write_file(folder / "config.json", config.dump());
  auto model = load_causal(*Checkpoint::open(folder.path().string()), {.trainable = true});
  model->train();
  Pass pass;
  pass.training = true;
  model->forward(ids, pass).logsumexp(-1).square().mean().backward();
  int64_t vectors = 0;
  {
    const torch::NoGradGuard frozen;
    for (const auto& p : model->named_parameters()) {
      ASSERT_TRUE(p.value().grad().defined()) << p.key();
      if (!p.key().ends_with(".scales")) continue;
      ++vectors;
      EXPECT_TRUE((p.value() == 1.0).all().item<bool>());
      EXPECT_GT(p.value().grad().abs().max().item<double>(), 0.0);
      p.value().sub_(p.value().grad());
    }
  }
  EXPECT_EQ(vectors, 2);
  save(*model, config, tuned.path());
  const auto saved = Checkpoint::open(tuned.path().string());
  EXPECT_EQ(saved->get("model.layers.1.mlp.ces").shape, (std::vector<int64_t>{6, 3, 16}));
  const auto loaded = load_causal(*saved);
  EXPECT_TRUE(torch::equal(logits_of(*loaded, ids), logits_of(*model, ids)));
}

TEST(CompressedExpertsModel, StepsWithTheCacheEqualOnePass) {
  torch::manual_seed(14);
  const torch::NoGradGuard frozen;
  const auto model = make_causal(olmoe({{"use_ce", true}, {"n_ce", 2}}));
  for (auto& p : model->named_parameters())
    if (p.key().ends_with(".scales")) p.value().uniform_(0.5, 1.5);
  const auto ids = torch::randint(0, 40, {2, 7}, torch::kInt64);
  const auto whole = logits_of(*model, ids);
  auto cache = model->make_cache();
  for (int64_t t = 0; t < 7; ++t) {
    Pass step;
    step.cache = &cache;
    EXPECT_LT(distance(model->forward(ids.narrow(1, t, 1), step), whole.narrow(1, t, 1)), 1e-5) << t;
  }
}

TEST(CompressedExpertsModel, DenseModelsAreErrors) {
  json dense = olmoe({{"model_type", "llama"}, {"use_ce", true}, {"n_ce", 2}});
  EXPECT_NE(message_of([&] { make_causal(dense); }).find("no layer is a mixture"), std::string::npos);
  dense.erase("use_ce");
  dense["moiety"]["parts"] = json::array({json{{"slug", "compressed-experts"}}});
  EXPECT_NE(message_of([&] { make_causal(dense); }).find("the layer is dense"), std::string::npos);
  EXPECT_NE(message_of([&] {
              make_causal(olmoe({{"use_ce", true}, {"n_ce", 4}}));
            }).find("top_k=4, n_ce=4"),
            std::string::npos);
  EXPECT_THROW(make_causal(olmoe({{"use_ce", 1}})), Error);
}

}  // namespace
}  // namespace moiety
