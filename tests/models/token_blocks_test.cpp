#include "moiety/models/token_blocks.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>

#include "moiety/base/files.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/kernels/packed.h"
#include "moiety/models/decoder.h"
#include "moiety/models/random_checkpoint.h"
#include "moiety/moe/mixture.h"
#include "threads.h"

namespace moiety {
namespace {

using nlohmann::json;

json config_of(const char* family, json changes = json::object()) {
  json c = {{"model_type", family},
            {"hidden_size", 256},
            {"num_hidden_layers", 3},
            {"num_attention_heads", 4},
            {"num_key_value_heads", 2},
            {"head_dim", 64},
            {"vocab_size", 300},
            {"intermediate_size", 512},
            {"max_position_embeddings", 64},
            {"moe_intermediate_size", 256},
            {"num_experts", 6},
            {"num_local_experts", 6},
            {"num_experts_per_tok", 2},
            {"initializer_range", 0.08}};
  c.update(changes);
  return c;
}

// Weights with some life in them: norms, biases and sinks of a random checkpoint are ones and zeros.
void stir(torch::nn::Module& model) {
  const torch::NoGradGuard frozen;
  for (auto& p : model.named_parameters())
    if (p.value().dim() == 1 || p.key().ends_with("bias"))
      p.value().set_data(p.value() + 0.3 * torch::randn_like(p.value()));  // mapped memory cannot be written
}

class TokenBlocks : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!can_pack(Format::Q8_0)) GTEST_SKIP() << "this machine has no products of packed rows";
    torch::manual_seed(1);
  }

  std::shared_ptr<Decoder> model(const json& config, const std::string& type) {
    const auto file = folder_ / (type + std::to_string(count_++) + ".gguf");
    last_ = file;
    WriteOptions options;
    options.type = type;
    write_gguf(*random_checkpoint(config, "/nowhere", 3), file, options);
    auto decoder = std::dynamic_pointer_cast<Decoder>(load_causal(*Checkpoint::open(file.string()), {}));
    stir(*decoder);
    return decoder;
  }

  // Reads a prompt with the modules, then tokens one by one both ways, and compares every hidden state and the caches.
  void compare(Decoder& m, int64_t rows) {
    const bool exact =
        std::all_of(m.parsed.layers.begin(), m.parsed.layers.end(), [](const auto& l) { return l.window == 0; });
    const torch::NoGradGuard frozen;
    KvCache cache = m.make_cache();
    Pass prompt;
    prompt.cache = &cache;
    m.forward(torch::randint(m.vocab_size(), {rows, 9}), prompt);
    for (int step = 0; step < 3; ++step) {
      KvCache other = cache.fork();
      const int64_t past = cache.length();
      const auto positions = torch::full({rows, 1}, past, torch::kInt64);
      const AttentionContext context(positions, past, {}, {});
      const auto x = torch::randn({rows, 1, m.parsed.hidden});
      Pass pass, by_modules;
      pass.cache = &cache;
      by_modules.cache = &other;
      const auto y = run_token_blocks(m.layers, x, context, pass);
      ASSERT_TRUE(y.defined());
      auto want = x;
      for (int64_t i = 0; i < m.blocks(); ++i) {
        by_modules.block = by_modules.slot = i;
        want = m.layers[static_cast<size_t>(i)]->forward(want, context, by_modules);
      }
      // Bit for bit, but where a window leaves out positions at the start and sums begin elsewhere.
      if (exact)
        EXPECT_TRUE(torch::equal(y, want)) << (y - want).abs().max().item<float>();
      else
        EXPECT_LT((y - want).abs().max().item<float>(), 1e-5 * want.abs().max().item<float>());
      cache.advance(1, {}, positions.squeeze(1) + 1);
      other.advance(1, {}, positions.squeeze(1) + 1);
    }
  }

  // Of a model of plain numbers, read token by token without the modules: how far its hidden states are from those of
  // the same numbers computed by modules in f32, against the largest. Nothing in between is rounded to bf16.
  static double distance(Decoder& m, const Checkpoint& checkpoint, int64_t rows) {
    const torch::NoGradGuard frozen;
    LoadOptions options;
    options.dtype = "f32";
    const auto reference = std::dynamic_pointer_cast<Decoder>(load_causal(checkpoint, options));
    auto stirred = m.named_parameters();
    for (auto& p : reference->named_parameters())
      if (p.value().dim() == 1 || p.key().ends_with("bias")) p.value().set_data(stirred[p.key()].to(torch::kFloat32));
    m.cache_formats = {Format::F32, Format::F32};
    KvCache cache = m.make_cache(), other = reference->make_cache();
    double most = 0;
    for (int64_t past = 0; past < 9; ++past) {
      const auto positions = torch::full({rows, 1}, past, torch::kInt64);
      const AttentionContext context(positions, past, {}, {});
      const auto x = torch::randn({rows, 1, m.parsed.hidden}).to(m.dtype());
      Pass pass, by_modules;
      pass.cache = &cache;
      by_modules.cache = &other;
      const auto y = run_token_blocks(m.layers, x, context, pass);
      EXPECT_TRUE(y.defined());
      if (!y.defined()) return 0.0;
      EXPECT_EQ(y.scalar_type(), x.scalar_type());
      auto want = x.to(torch::kFloat32);
      for (int64_t i = 0; i < m.blocks(); ++i) {
        by_modules.block = by_modules.slot = i;
        want = reference->layers[static_cast<size_t>(i)]->forward(want, context, by_modules);
      }
      most =
          std::max(most, (y.to(torch::kFloat32) - want).abs().max().item<double>() / want.abs().max().item<double>());
      for (KvCache* c : {&cache, &other}) c->advance(1, {}, positions.squeeze(1) + 1);
    }
    return most;
  }

  TemporaryFolder folder_;
  std::filesystem::path last_;
  int count_ = 0;
};

TEST_F(TokenBlocks, EqualTheModulesInDenseFamilies) {
  for (const char* type : {"q8_0", "q4_k"})
    for (const auto& config :
         {config_of("llama"), config_of("qwen2"), config_of("qwen3"), config_of("gemma3_text", {{"sliding_window", 6}}),
          config_of("gemma2", {{"sliding_window", 6}, {"hidden_activation", "gelu_pytorch_tanh"}})}) {
      SCOPED_TRACE(config["model_type"].get<std::string>() + " " + type);
      const auto m = model(config, type);
      for (const int64_t rows : {1, 3}) compare(*m, rows);
    }
}

TEST_F(TokenBlocks, EqualTheModulesInMixtures) {
  for (const char* type : {"q8_0", "q4_0", "q4_k", "mxfp4"})
    for (const auto& config : {config_of("mixtral"), config_of("qwen3_moe"), config_of("olmoe"),
                               config_of("qwen2_moe", {{"shared_expert_intermediate_size", 512}})}) {
      SCOPED_TRACE(config["model_type"].get<std::string>() + " " + type);
      const auto m = model(config, type);
      for (const int64_t rows : {1, 2, 11}) compare(*m, rows);
    }
}

TEST_F(TokenBlocks, EqualTheModulesWhereExpertsHaveBiasesAndAClampedGate) {
  const json biased = {{"attention_bias", true}, {"swiglu_limit", 1.5}};
  json whole = biased, windows = biased;
  whole["layer_types"] = json::array({"full_attention", "full_attention", "full_attention"});
  windows["sliding_window"] = 6;  // in every second layer
  for (const char* type : {"q8_0", "q4_k", "mxfp4"})
    for (const auto& changes : {whole, windows}) {
      SCOPED_TRACE(changes.dump() + " " + type);
      const auto m = model(config_of("gpt_oss", changes), type);
      const auto& mixture = dynamic_cast<const Mixture&>(*m->layers[0]->ffn);
      const auto& experts = dynamic_cast<const GatedExperts&>(*mixture.experts);
      for (const auto& bias : {experts.gate->bias, experts.up->bias, experts.down->bias})
        ASSERT_GT(bias.abs().min().item<float>(), 0.f);
      for (const int64_t rows : {1, 2, 11}) compare(*m, rows);
    }
}

TEST_F(TokenBlocks, FollowTheModulesInPlainNumbers) {
  for (const auto& [type, most] : {std::pair("f32", 1e-5), std::pair("f16", 4e-3), std::pair("bf16", 4e-3)})
    for (const auto& config :
         {config_of("llama"), config_of("qwen2"), config_of("qwen3"), config_of("gemma3_text", {{"sliding_window", 6}}),
          config_of("gemma2", {{"sliding_window", 6}, {"hidden_activation", "gelu_pytorch_tanh"}})}) {
      SCOPED_TRACE(config["model_type"].get<std::string>() + " " + type);
      const auto m = model(config, type);
      for (const int64_t rows : {1, 2, 8}) EXPECT_LT(distance(*m, *Checkpoint::open(last_.string()), rows), most);
    }
}

TEST_F(TokenBlocks, EqualTheModulesOnAnyNumberOfThreads) {
  const auto m = model(config_of("mixtral"), "q8_0");
  for (const int threads : {1, 2, 3, 7}) {
    const test::Threads use(threads);
    compare(*m, 2);
  }
}

TEST_F(TokenBlocks, EqualTheModulesOverCachesInOtherTypes) {
  for (const auto& config : {config_of("llama"), config_of("gemma3_text", {{"sliding_window", 6}})}) {
    const auto m = model(config, "q8_0");
    for (const auto& formats : {CacheFormats{Format::F16, Format::F16}, CacheFormats{Format::Q8_0, Format::BF16},
                                CacheFormats{std::nullopt, Format::Q8_0}}) {
      m->cache_formats = formats;
      for (const int64_t rows : {1, 3}) compare(*m, rows);
    }
  }
}

TEST_F(TokenBlocks, FollowTheNumberOfActiveExperts) {
  const auto m = model(config_of("mixtral"), "q8_0");
  for (const int64_t k : {1, 5}) {
    set_active_experts(*m, k);
    compare(*m, 3);
  }
}

TEST_F(TokenBlocks, RunOnPlainNumbersInFewRowsOfDenseModels) {
  // Experts of mixtures may be on disk as well, with the same bits.
  const torch::NoGradGuard frozen;
  const AttentionContext context(torch::zeros({1, 1}, torch::kInt64), 0, {}, {});
  const auto runs = [&](Decoder& m, torch::Dtype dtype, int64_t rows = 1) {
    KvCache cache = m.make_cache();
    Pass pass;
    pass.cache = &cache;
    return run_token_blocks(m.layers, torch::randn({rows, 1, 256}).to(dtype), context, pass).defined();
  };
  const auto packed = model(config_of("mixtral"), "q8_0");
  EXPECT_TRUE(runs(*packed, torch::kFloat32));
  EXPECT_FALSE(runs(*packed, torch::kBFloat16));
  EXPECT_FALSE(runs(*model(config_of("mixtral"), "f32"), torch::kFloat32));
  const auto dense = model(config_of("llama"), "f32");
  EXPECT_TRUE(runs(*dense, torch::kFloat32, 8));
  EXPECT_FALSE(runs(*dense, torch::kFloat32, 9));  // matrix products are faster
  packed->layers[1]->attention->as<Attention>()->parts.v->exact = true;
  EXPECT_FALSE(runs(*packed, torch::kFloat32));
}

TEST_F(TokenBlocks, LeaveAloneWhatOnlyModulesCanDo) {
  const torch::NoGradGuard frozen;
  const auto m = model(config_of("mixtral"), "q8_0");
  KvCache cache = m->make_cache();
  const auto x = torch::randn({1, 1, 256});
  const AttentionContext context(torch::zeros({1, 1}, torch::kInt64), 0, {}, {});
  const auto runs = [&](auto change) {
    Pass pass;
    pass.cache = &cache;
    change(pass);
    return run_token_blocks(m->layers, x, context, pass).defined();
  };
  Trace trace;
  EXPECT_FALSE(runs([&](Pass& p) { p.trace = &trace; }));
  EXPECT_FALSE(runs([](Pass& p) { p.edits.push_back(std::make_shared<Edit>()); }));
  EXPECT_FALSE(runs([](Pass& p) { p.training = true; }));
  EXPECT_FALSE(runs([](Pass& p) { p.cache = nullptr; }));
  Pass pass;
  pass.cache = &cache;
  EXPECT_FALSE(run_token_blocks(m->layers, torch::randn({1, 2, 256}), context, pass).defined());
  EXPECT_FALSE(run_token_blocks(m->layers, torch::randn({17, 1, 256}), context, pass).defined());
  const AttentionContext padded(torch::zeros({1, 1}, torch::kInt64), 0, torch::ones({1, 1}, torch::kBool), {});
  EXPECT_FALSE(run_token_blocks(m->layers, x, padded, pass).defined());
  {
    const torch::AutoGradMode graph(true);
    EXPECT_FALSE(run_token_blocks(m->layers, x, context, pass).defined());
  }
  EXPECT_EQ(cache.bytes(), 0);  // nothing was touched
  EXPECT_TRUE(runs([](Pass&) {}));
  for (auto& module : m->modules())
    if (auto* linear = dynamic_cast<LinearImpl*>(module.get())) linear->exact = true;
  EXPECT_FALSE(runs([](Pass&) {}));
}

}  // namespace
}  // namespace moiety
