// Runs that train adapters beside a frozen model: what they write, how they go on, labels and names of sources, bases
// of blocks.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "message_of.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/io/peft.h"
#include "moiety/models/merged.h"
#include "moiety/nn/weights.h"
#include "tiny.h"

namespace moiety {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using torch::Tensor;

json part_of(const std::string& slug) {
  static const std::map<std::string, json> settings = {
      {"lora", {{"rank", 2}, {"dora", true}, {"target", {"q_proj", "down_proj"}}}},
      {"mola", {{"experts", 3}, {"top_k", 2}, {"rank", 2}, {"coef", 0.01}}},
      {"llava-mole",
       {{"target", {"gate_proj", "up_proj", "down_proj"}}, {"rank", 2}, {"gate_weighting", "straight_through"}}},
      {"dynmole", {{"experts", 3}, {"rank", 2}}},
      {"loramoe", {{"experts", 2}, {"rank", 2}, {"coef", 0.1}, {"target", {"up_proj", "down_proj"}}}},
      {"lora-mixer", {{"experts", 2}, {"rank", 2}, {"top_k", 1}, {"stage", "hard"}, {"target", {"q_proj", "o_proj"}}}},
      {"smora", {{"rank", 4}, {"active", 2}, {"bias_rate", 0.01}}},
      {"mora", {{"rank", 4}, {"top_k", 2}}},
      {"flylora", {{"rank", 4}, {"top_k", 2}, {"bias_rate", 0.01}}},
      {"adamoe-linear", {{"experts", 3}, {"null_experts", 2}, {"top_k", 2}, {"rank", 2}, {"coef", 0.1}}}};
  json part = settings.at(slug);
  part["slug"] = slug;
  return part;
}

// A run beside a base; two sources of two kinds.
TrainConfig beside(const TemporaryFolder& folder, const std::string& output, const json& part, int64_t steps) {
  if (!fs::exists(folder / "base")) {
    auto base = tiny::run(folder, "base", 2);
    base.model.config["hidden_size"] = 32;
    base.model.config["intermediate_size"] = 64;
    Trainer(base).run();
    write_file(folder / "upper.txt", "ONE TWO THREE FOUR FIVE SIX\nSEVEN EIGHT NINE TEN\n" + tiny::text(60));
  }
  auto c = tiny::run(folder, output, steps);
  c.model.config = nullptr;
  c.model.tokenizer.clear();
  c.model.checkpoint = (folder / "base" / "last").string();
  c.parts = json::array({part});
  c.data.sources[0].label = 0;
  c.data.sources[0].name = "lower";
  c.data.sources[0].weight = 1.0;
  c.data.sources.push_back(c.data.sources[0]);
  c.data.sources[1].path = (folder / "upper.txt").string();
  c.data.sources[1].label = 1;
  c.data.sources[1].name = "upper";
  return c;
}

const Tensor& ids() {
  static const Tensor t = torch::arange(24, torch::kInt64).view({2, 12});
  return t;
}

Tensor logits(CausalModel& model) {
  const torch::NoGradGuard frozen;
  model.eval();
  Pass pass;
  return model.forward(ids(), pass);
}

class Adapters : public testing::TestWithParam<const char*> {};

TEST_P(Adapters, AreWrittenAloneAndLoad) {
  const TemporaryFolder folder("moiety-test");
  const auto config = beside(folder, "run", part_of(GetParam()), 3);
  const auto before = read_tensors(folder / "base" / "last" / "model.safetensors");
  Trainer trainer(config);
  trainer.run();
  const auto after = read_tensors(folder / "run" / "last" / "adapter_model.safetensors");
  for (const auto& [name, value] : before) EXPECT_EQ(after.count(name), 0u) << name;
  std::map<std::string, Tensor> stored;
  for (const auto& t : trainer.model().stored()) stored[t.name] = t.value();
  for (const auto& [name, value] : before) EXPECT_TRUE(torch::equal(value, stored.at(name))) << name;
  // The adapter knows its base.
  const auto learned = logits(trainer.model());
  const auto checkpoint = Checkpoint::open((folder / "run" / "last").string());
  EXPECT_TRUE(torch::equal(logits(*load_causal(*checkpoint)), learned));
  EXPECT_GT((logits(*load_causal(*Checkpoint::open((folder / "base" / "last").string()))) - learned)
                .abs()
                .max()
                .item<double>(),
            1e-6);
  // Beside another copy of the base it is named.
  const auto beside_it =
      with_adapters(Checkpoint::open((folder / "base" / "last").string()), {{folder / "run" / "last", 1.0}});
  EXPECT_TRUE(torch::equal(logits(*load_causal(*beside_it)), learned));
}

TEST_P(Adapters, GoOnBitForBit) {
  const TemporaryFolder folder("moiety-test");
  auto config = beside(folder, "whole", part_of(GetParam()), 4);
  Trainer(config).run();
  config.output.folder = (folder / "stopped").string();
  TrainOptions options;
  int steps = 0;
  options.stop = [&] { return ++steps == 2; };
  EXPECT_EQ(Trainer(config, options).run().ended, "stopped");
  EXPECT_EQ(Trainer(config).run().ended, "complete");
  EXPECT_EQ(tiny::trace((folder / "whole").string()), tiny::trace((folder / "stopped").string()));
  const auto whole = read_tensors(folder / "whole" / "last" / "adapter_model.safetensors"),
             stopped = read_tensors(folder / "stopped" / "last" / "adapter_model.safetensors");
  ASSERT_EQ(whole.size(), stopped.size());
  for (const auto& [name, value] : whole) EXPECT_TRUE(torch::equal(value, stopped.at(name))) << name;
}

// A base with a part at another site: that is the base's own, the adapter holds what stands beside.
TEST(AdaptersOfParts, StandBesideStateSpaceLayers) {
  const TemporaryFolder folder("moiety-test");
  auto base = tiny::run(folder, "base", 2);
  base.model.config["hidden_size"] = 32;
  base.model.config["intermediate_size"] = 64;
  base.parts = json::array({{{"slug", "mamba"}, {"state", 4}}});
  Trainer(base).run();
  write_file(folder / "upper.txt", "ONE TWO THREE FOUR FIVE SIX\nSEVEN EIGHT NINE TEN\n" + tiny::text(60));
  json part = part_of("lora-mixer");
  part["target"] = {"in_proj", "x_proj", "dt_proj", "out_proj"};
  const auto before = read_tensors(folder / "base" / "last" / "model.safetensors");
  Trainer hard(beside(folder, "hard", part, 3));
  hard.run();
  const auto written = read_tensors(folder / "hard" / "last" / "adapter_model.safetensors");
  for (const auto& [name, value] : before) EXPECT_EQ(written.count(name), 0u) << name;
  EXPECT_EQ(written.count("layers.0.adapters.x_proj.experts.lora_A"), 1u);
  const auto config = parse_json(read_text(folder / "hard" / "last" / "adapter_config.json"), "adapter_config.json");
  EXPECT_EQ(config.at("moiety").at("parts").size(), 1u);
  EXPECT_TRUE(
      torch::equal(logits(*load_causal(*Checkpoint::open((folder / "hard" / "last").string()))), logits(hard.model())));
  // The second stage goes on from the first, and nothing else moves.
  part["stage"] = "soft";
  part["freeze_experts"] = true;
  auto soft = beside(folder, "soft", part, 2);
  soft.model.checkpoint = (folder / "hard" / "last").string();
  Trainer(soft).run();
  const auto routed = read_tensors(folder / "soft" / "last" / "adapter_model.safetensors");
  for (const auto& [name, value] : routed)
    EXPECT_EQ(torch::equal(value, written.at(name)), name.find("router") == std::string::npos) << name;
  // LoRA can be merged.
  Trainer lora(beside(folder, "lora", {{"slug", "lora"}, {"rank", 2}, {"target", "all"}}, 2));
  lora.run();
  const auto merged = merged_checkpoint(Checkpoint::open((folder / "lora" / "last").string()));
  const auto with = logits(lora.model());
  EXPECT_LT((logits(*load_causal(*merged)) - with).abs().max().item<double>(), 1e-4);
  EXPECT_GT(
      (logits(*load_causal(*Checkpoint::open((folder / "base" / "last").string()))) - with).abs().max().item<double>(),
      1e-5);
}

INSTANTIATE_TEST_SUITE_P(All, Adapters,
                         testing::Values("lora", "mola", "llava-mole", "dynmole", "loramoe", "lora-mixer", "smora",
                                         "mora", "flylora", "adamoe-linear"),
                         [](const auto& info) {
                           std::string name = info.param;
                           for (char& c : name)
                             if (c == '-') c = '_';
                           return name;
                         });

TEST(AdapterRuns, ReportHeldOutLossesByTheNamesOfSources) {
  const TemporaryFolder folder("moiety-test");
  auto config = beside(folder, "run", part_of("lora-mixer"), 2);
  config.evaluation.every = 2;
  const auto result = Trainer(config).run();
  ASSERT_TRUE(result.evaluation.has_value());
  ASSERT_EQ(result.evaluation->by_source.size(), 2u);
  EXPECT_GT(std::abs(result.evaluation->by_source.at("lower") - result.evaluation->by_source.at("upper")), 1e-6);
  const auto record = tiny::trace(config.output.folder).back();
  EXPECT_EQ(record["evaluation"]["by_source"].size(), 2u);
}

TEST(AdapterRuns, NeedTheLabelsThatTheyAskFor) {
  const TemporaryFolder folder("moiety-test");
  auto config = beside(folder, "run", part_of("loramoe"), 2);
  for (auto& source : config.data.sources) source.label.reset();
  EXPECT_NE(message_of([&] { Trainer(config).run(); }).find("give every source a `label`"), std::string::npos);
  config.data.sources[0].label = 0;
  EXPECT_NE(config.data.problem().find("some have none"), std::string::npos);
}

TEST(AdapterRuns, GoOnFromAnAdapter) {
  const TemporaryFolder folder("moiety-test");
  auto first = beside(folder, "first", part_of("lora"), 2);
  Trainer(first).run();
  auto second = beside(folder, "second", json(), 1);
  second.parts = nullptr;
  second.model.checkpoint = (folder / "first" / "last").string();
  Trainer trainer(second);
  EXPECT_TRUE(torch::equal(logits(trainer.model()),
                           logits(*load_causal(*Checkpoint::open((folder / "first" / "last").string())))));
  trainer.run();
  // It adapts the base, not the adapter.
  EXPECT_EQ(json::parse(read_text(folder / "second" / "last" / "adapter_config.json"))["base_model_name_or_path"],
            (folder / "base" / "last").string());
}

// A base with biases, and what a run of a LoRA that trains them writes.
TEST(AdapterRuns, TrainBiasesOfTheBase) {
  const TemporaryFolder folder("moiety-test");
  auto base = tiny::run(folder, "biased", 4);
  base.model.config["model_type"] = "qwen2";
  Trainer(base).run();
  const auto before = read_tensors(folder / "biased" / "last" / "model.safetensors");
  for (const char* mode : {"none", "lora_only", "all"}) {
    auto config =
        beside(folder, mode, {{"slug", "lora"}, {"rank", 2}, {"target", {"q_proj", "o_proj"}}, {"bias", mode}}, 3);
    config.model.checkpoint = (folder / "biased" / "last").string();
    Trainer trainer(config);
    trainer.run();
    const auto last = folder / mode / "last";
    const auto adapter = PeftAdapter::open(last);
    const std::string all = mode;
    EXPECT_EQ(adapter->bias(), mode);
    // q alone, or q, k and v of both layers.
    EXPECT_EQ(adapter->biases().size(), all == "none" ? 0u : all == "all" ? 6u : 2u);
    for (const auto& bias : adapter->biases())
      EXPECT_FALSE(torch::equal(as_tensor(bias.value), before.at(bias.path))) << bias.path;
    std::map<std::string, Tensor> stored;
    for (const auto& t : trainer.model().stored()) stored[t.name] = t.value();
    for (const auto& [name, value] : before)
      EXPECT_EQ(torch::equal(value, stored.at(name)), all != "all" || !is_bias(name)) << name;
    const auto checkpoint = Checkpoint::open(last.string());
    EXPECT_TRUE(torch::equal(logits(*load_causal(*checkpoint)), logits(trainer.model())));
    EXPECT_LT(
        (logits(*load_causal(*merged_checkpoint(checkpoint))) - logits(trainer.model())).abs().max().item<double>(),
        1e-4);
  }
}

TEST(AdapterRuns, GoOnBitForBitWhereAllBiasesLearn) {
  const TemporaryFolder folder("moiety-test");
  auto base = tiny::run(folder, "biased", 2);
  base.model.config["model_type"] = "qwen2";
  Trainer(base).run();
  auto config = beside(folder, "whole", {{"slug", "lora"}, {"rank", 2}, {"bias", "all"}}, 4);
  config.model.checkpoint = (folder / "biased" / "last").string();
  Trainer(config).run();
  config.output.folder = (folder / "stopped").string();
  TrainOptions options;
  int steps = 0;
  options.stop = [&] { return ++steps == 2; };
  EXPECT_EQ(Trainer(config, options).run().ended, "stopped");
  EXPECT_EQ(Trainer(config).run().ended, "complete");
  EXPECT_EQ(tiny::trace((folder / "whole").string()), tiny::trace((folder / "stopped").string()));
  EXPECT_EQ(read_text(folder / "whole" / "last" / "adapter_model.safetensors"),
            read_text(folder / "stopped" / "last" / "adapter_model.safetensors"));
}

TEST(AdapterRuns, LearnBesideBlocks) {
  const TemporaryFolder folder("moiety-test");
  auto config = beside(folder, "run", {{"slug", "lora"}, {"rank", 2}}, 4);
  WriteOptions options;
  options.type = "q8_0";
  write_gguf(*Checkpoint::open(config.model.checkpoint), folder / "base.gguf", options);
  config.model.checkpoint = (folder / "base.gguf").string();
  Trainer trainer(config);
  const LoadOptions exact{.dtype = "f32"};  // as the run computes: without rounded activations
  const auto before = logits(trainer.model());
  EXPECT_TRUE(torch::equal(before, logits(*load_causal(*Checkpoint::open((folder / "base.gguf").string()), exact))));
  // Nothing but the adapter learns or is a parameter: blocks stay blocks.
  for (const auto& p : trainer.model().named_parameters())
    if (p.value().requires_grad()) {
      EXPECT_NE(p.key().find("adapter"), std::string::npos) << p.key();
    }
  trainer.run();
  EXPECT_GT((logits(trainer.model()) - before).abs().max().item<double>(), 1e-4);
  const auto adapted = Checkpoint::open((folder / "run" / "last").string());
  EXPECT_TRUE(torch::equal(logits(*load_causal(*adapted, exact)), logits(trainer.model())));
  EXPECT_NE(message_of([&] { merged_checkpoint(adapted); }).find("has to be converted"), std::string::npos);
  // The rows of the adapter are those of the unquantized model: there it does much the same.
  const auto plain =
      with_adapters(Checkpoint::open((folder / "base" / "last").string()), {{folder / "run" / "last", 1.0}});
  EXPECT_LT((logits(*load_causal(*plain)) - logits(trainer.model())).abs().max().item<double>(), 0.1);
}

}  // namespace
}  // namespace moiety
