// The whole decoder of several families with random weights: gradients against differences, and batches, packing and
// caches against single sequences.
#include "moiety/models/decoder.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <set>

#include "moiety/base/error.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

constexpr int64_t kVocabulary = 40;

// Families that between them use every part: q/k norms of all kinds, biases, windows, soft caps, sinks, latent
// attention, tied and untied heads, four placements of norms, and every kind of router and expert.
json config_of(const std::string& family) {
  json c = {{"model_type", family},
            {"vocab_size", kVocabulary},
            {"hidden_size", 16},
            {"num_hidden_layers", 2},
            {"num_attention_heads", 4},
            {"num_key_value_heads", 2},
            {"head_dim", 4},
            {"intermediate_size", 12},
            {"max_position_embeddings", 64},
            {"initializer_range", 0.3},
            {"tie_word_embeddings", false}};
  const auto with = [&](const json& more) { c.update(more); };
  if (family == "gemma3_text")
    with({{"tie_word_embeddings", true},
          {"query_pre_attn_scalar", 4},
          {"layer_types", {"sliding_attention", "full_attention"}},
          {"sliding_window", 3},
          {"attn_logit_softcapping", 5.0},
          {"final_logit_softcapping", 8.0}});
  if (family == "cohere2") with({{"layer_types", {"sliding_attention", "full_attention"}}, {"sliding_window", 3}});
  if (family == "phi3") with({{"sliding_window", 3}, {"original_max_position_embeddings", 64}});
  if (family == "qwen2_moe")
    with({{"num_experts", 6},
          {"num_experts_per_tok", 2},
          {"moe_intermediate_size", 10},
          {"shared_expert_intermediate_size", 14},
          {"norm_topk_prob", true}});
  if (family == "gpt_oss")
    with({{"num_local_experts", 4},
          {"num_experts_per_tok", 2},
          {"layer_types", {"sliding_attention", "full_attention"}},
          {"sliding_window", 3}});
  if (family == "deepseek_v3")
    with({{"num_key_value_heads", 4},
          {"n_routed_experts", 8},
          {"num_experts_per_tok", 3},
          {"n_group", 4},
          {"topk_group", 2},
          {"n_shared_experts", 1},
          {"moe_intermediate_size", 10},
          {"first_k_dense_replace", 1},
          {"q_lora_rank", 8},
          {"kv_lora_rank", 6},
          {"qk_nope_head_dim", 4},
          {"qk_rope_head_dim", 2},
          {"v_head_dim", 5}});
  if (family == "olmoe") with({{"num_experts", 4}, {"num_experts_per_tok", 2}});
  return c;
}

std::shared_ptr<CausalModel> make(const std::string& family, bool trainable = false) {
  torch::manual_seed(11);
  auto model = make_causal(config_of(family), {.dtype = "f32", .trainable = trainable});
  // Biases and norms start as zeros and ones, which hides mistakes.
  torch::NoGradGuard frozen;
  for (auto& p : model->parameters())
    if (p.dim() < 2) p.add_(0.2 * torch::randn_like(p));
  return model;
}

Tensor random_ids(int64_t batch, int64_t tokens) {
  return torch::randint(kVocabulary, {batch, tokens}, torch::kInt64);
}

Tensor logits_of(CausalModel& model, const Tensor& ids) {
  Pass pass;
  return model.forward(ids, pass);
}

double distance(const Tensor& a, const Tensor& b) {
  return (a - b).abs().max().item<double>();
}

class Decoding : public testing::TestWithParam<const char*> {};

TEST_P(Decoding, EveryParameterIsALeafWithAGradientOfTheRightSize) {
  auto model = make(GetParam(), /*trainable=*/true);
  const auto ids = random_ids(2, 5);
  const auto weight = torch::randn({2, 5, kVocabulary});
  std::vector<Tensor> choices;
  const auto loss = [&] {
    Trace trace;
    Pass pass;
    pass.trace = &trace;
    const auto value = (model->forward(ids, pass).to(torch::kFloat64) * weight).sum() / 10.0;
    choices.clear();
    for (const auto& r : trace.records) choices.push_back(r.routing.experts);
    return value;
  };
  loss().backward();
  const auto choices_before = choices;
  std::set<const void*> seen;
  for (auto& item : model->named_parameters()) {
    const std::string& name = item.key();
    Tensor p = item.value();
    SCOPED_TRACE(name);
    EXPECT_TRUE(p.is_leaf());
    EXPECT_TRUE(p.requires_grad());
    EXPECT_TRUE(seen.insert(p.unsafeGetTensorImpl()).second) << "registered twice";
    ASSERT_TRUE(p.grad().defined());
    const double size = p.grad().norm().item<double>();
    EXPECT_GT(size, 0.0);
    torch::NoGradGuard frozen;
    const auto kept = p.detach().clone();
    // False when a choice of experts flips on the way: that is a step, not a slope.
    const auto slope = [&](const Tensor& direction, double h, double& numeric) {
      bool smooth = true;
      const auto at = [&](double step) {
        p.copy_(kept + step * direction);
        const double value = loss().item<double>();
        p.copy_(kept);
        for (size_t i = 0; i < choices.size(); ++i) smooth = smooth && torch::equal(choices[i], choices_before[i]);
        return value;
      };
      numeric = (8.0 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12.0 * h);
      return smooth;
    };
    // Along the gradient (its size) and across it (its direction); central differences of the fourth order, in f32
    // with sums in f64: an error of 1e-6 over a step of 1e-3.
    for (int trial = 0; trial < 3; ++trial) {
      auto direction = trial == 0 ? p.grad().clone() : torch::randn_like(p);
      direction /= direction.norm();
      const double analytic = (p.grad() * direction).sum().item<double>();
      double numeric = 0.0, h = 4e-3;
      while (!slope(direction, h, numeric) && h > 2e-4) h /= 2;
      EXPECT_GT(h, 2e-4) << "the choice of experts flips within the shortest step";
      EXPECT_NEAR(numeric, analytic, 2e-3 * size + 2e-3) << "trial " << trial << ", gradient of size " << size;
    }
  }
}

TEST_P(Decoding, PaddedBatchesEqualSingleRows) {
  torch::NoGradGuard frozen;
  auto model = make(GetParam());
  const std::vector<int64_t> lengths = {9, 4, 1};
  const auto ids = random_ids(3, 9);
  for (bool left : {true, false}) {
    Pass pass;
    pass.mask = torch::zeros({3, 9}, torch::kBool);
    auto batch = torch::zeros_like(ids);
    for (int64_t b = 0; b < 3; ++b) {
      const int64_t begin = left ? 9 - lengths[b] : 0;
      pass.mask[b].narrow(0, begin, lengths[b]).fill_(true);
      batch[b].narrow(0, begin, lengths[b]).copy_(ids[b].narrow(0, 0, lengths[b]));
    }
    const auto together = model->forward(batch, pass);
    EXPECT_TRUE(torch::isfinite(together).all().item<bool>());
    for (int64_t b = 0; b < 3; ++b) {
      const auto single = logits_of(*model, ids[b].narrow(0, 0, lengths[b]).unsqueeze(0));
      EXPECT_LT(distance(together[b].narrow(0, left ? 9 - lengths[b] : 0, lengths[b]), single[0]), 3e-5)
          << "row " << b << (left ? " padded on the left" : " padded on the right");
    }
  }
}

TEST_P(Decoding, PackedSequencesEqualRowsOfTheirOwn) {
  auto model = make(GetParam(), /*trainable=*/true);
  const std::vector<int64_t> lengths = {5, 1, 6};
  const auto ids = random_ids(1, 12), weight = torch::randn({12, kVocabulary});
  const auto gradients = [&] {
    std::vector<Tensor> g;
    for (auto& p : model->parameters()) {
      g.push_back(p.grad().clone());
      p.mutable_grad().reset();
    }
    return g;
  };
  Pass packed;
  packed.segments =
      torch::repeat_interleave(torch::tensor({4, 2, 7}, torch::kInt64), torch::tensor(lengths)).unsqueeze(0);
  const auto together = model->forward(ids, packed)[0];
  (together * weight).sum().backward();
  const auto expected = gradients();
  std::vector<Tensor> rows;
  int64_t begin = 0;
  for (int64_t length : lengths) {
    rows.push_back(logits_of(*model, ids.narrow(1, begin, length))[0]);
    begin += length;
  }
  const auto separate = torch::cat(rows);
  EXPECT_LT(distance(together.detach(), separate.detach()), 3e-5);
  (separate * weight).sum().backward();
  const auto found = gradients();
  for (size_t i = 0; i < expected.size(); ++i)
    EXPECT_LT(distance(expected[i], found[i]), 1e-4 * std::max(1.0, found[i].abs().max().item<double>()));
}

TEST_P(Decoding, CachedDecodingEqualsReadingEverything) {
  torch::NoGradGuard frozen;
  auto model = make(GetParam());
  // Two rows of unequal length, padded on the left, decoded greedily: by cache, and by reading the whole row each time.
  const auto prompts = random_ids(2, 5);
  const std::vector<int64_t> lengths = {5, 2};
  auto mask = torch::ones({2, 5}, torch::kBool);
  mask[1].narrow(0, 0, 3).fill_(false);
  KvCache cache = model->make_cache();
  Pass pass;
  pass.cache = &cache;
  pass.mask = mask;
  pass.last_logits_only = true;
  auto last = model->forward(prompts, pass);
  ASSERT_EQ(last.sizes(), (std::vector<int64_t>{2, 1, kVocabulary}));
  std::vector<Tensor> rows;
  for (int64_t b = 0; b < 2; ++b) rows.push_back(prompts[b].narrow(0, 5 - lengths[b], lengths[b]));
  for (int step = 0; step < 12; ++step) {
    const auto next = last.select(1, 0).argmax(-1);
    for (int64_t b = 0; b < 2; ++b) {
      const auto whole = logits_of(*model, rows[b].unsqueeze(0))[0][-1];
      EXPECT_LT(distance(last[b][0], whole), 3e-5) << "row " << b << ", step " << step;
      ASSERT_EQ(next[b].item<int64_t>(), whole.argmax().item<int64_t>()) << "row " << b << ", step " << step;
      rows[b] = torch::cat({rows[b], next[b].unsqueeze(0)});
    }
    Pass more;
    more.cache = &cache;
    more.last_logits_only = true;
    last = model->forward(next.unsqueeze(1), more);
  }
  EXPECT_EQ(cache.length(), 17);
  EXPECT_TRUE(torch::equal(cache.next_position(), torch::tensor({17, 14}, torch::kInt64)));
}

INSTANTIATE_TEST_SUITE_P(Decoder, Decoding,
                         testing::Values("llama", "qwen2", "gemma3_text", "cohere2", "phi", "phi3", "olmo2",
                                         "qwen2_moe", "gpt_oss", "deepseek_v3", "olmoe"),
                         [](const auto& p) { return std::string(p.param); });

// Dense layers only: a rounded input may choose other experts.
TEST(Decoder, CachesInOtherTypesGiveNearlyTheSameLogits) {
  torch::NoGradGuard frozen;
  for (const char* family : {"llama", "gemma3_text", "phi3", "deepseek_v3"}) {
    SCOPED_TRACE(family);
    json config = config_of(family);
    config.update({{"head_dim", 32},
                   {"hidden_size", 128},
                   {"initializer_range", 0.1},
                   {"first_k_dense_replace", 2},
                   {"kv_lora_rank", 32},
                   {"qk_rope_head_dim", 32}});
    torch::manual_seed(11);
    const auto model = make_causal(config, {.dtype = "f32"});
    const auto ids = random_ids(2, 24);
    auto mask = torch::ones({2, 9}, torch::kBool);
    mask[1].narrow(0, 0, 3).fill_(false);
    const auto decode = [&](std::optional<Format> k, std::optional<Format> v) {
      model->cache_formats = {k, v};
      KvCache cache = model->make_cache();
      std::vector<Tensor> logits;
      int64_t at = 0;
      for (const int64_t tokens : {9, 1, 1, 4, 1, 8}) {  // one by one, a few, and more at a time
        Pass pass;
        pass.cache = &cache;
        if (at == 0) pass.mask = mask;
        logits.push_back(model->forward(ids.narrow(1, at, tokens), pass));
        at += tokens;
      }
      return torch::cat(logits, 1).masked_fill(~torch::cat({mask, torch::ones({2, 15}, torch::kBool)}, 1).unsqueeze(-1),
                                               0.0);
    };
    const auto want = decode({}, {});
    const double scale = want.abs().max().item<double>();
    EXPECT_EQ(distance(decode(Format::F32, Format::F32), want), 0.0);
    for (const auto& [k, v, part] : {std::tuple{Format::F16, Format::F16, 2e-3},
                                     {Format::BF16, Format::F16, 2e-2},
                                     {Format::Q8_0, Format::Q8_0, 4e-2},
                                     {Format::F32, Format::Q8_0, 4e-2}}) {
      const double off = distance(decode(k, v), want);
      EXPECT_LT(off, part * scale) << info(k).name << " " << info(v).name;
      EXPECT_GT(off, 0.0);
    }
  }
}

TEST(Decoder, PositionsMaskAndIdsAreChecked) {
  torch::NoGradGuard frozen;
  auto model = make("llama");
  Pass pass;
  EXPECT_THROW(model->forward(torch::tensor({{kVocabulary}}), pass), Error);
  EXPECT_THROW(model->forward(torch::tensor({{int64_t{-1}}}), pass), Error);
  EXPECT_THROW(model->forward(torch::empty({1, 0}, torch::kInt64), pass), Error);
  EXPECT_THROW(model->forward(torch::zeros({3}, torch::kInt64), pass), Error);
  EXPECT_THROW(model->experts(2), Error);
}

// A pass that reads positions given by hand equals one that counts them.
TEST(Decoder, GivenPositionsAreUsed) {
  torch::NoGradGuard frozen;
  auto model = make("llama");
  const auto ids = random_ids(1, 6);
  const auto expected = logits_of(*model, ids);
  Pass counted, moved, spread;
  counted.positions = torch::arange(6, torch::kInt64).unsqueeze(0);
  moved.positions = counted.positions + 20;
  spread.positions = counted.positions * 3;
  EXPECT_LT(distance(model->forward(ids, counted), expected), 1e-6);
  EXPECT_LT(distance(model->forward(ids, moved), expected), 3e-5);  // rotary: only distances matter
  EXPECT_GT(distance(model->forward(ids, spread), expected), 1e-2);
}

}  // namespace
}  // namespace moiety
