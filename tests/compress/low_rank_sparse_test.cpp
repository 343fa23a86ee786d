#include "moiety/compress/low_rank_sparse.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "../train/tiny.h"
#include "message_of.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/models/merged.h"
#include "small_mixture.h"

namespace moiety {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using torch::Tensor;

json part(int64_t rank = 3) {
  return {{"slug", "low-rank-sparse"},
          {"target", {"experts.gate_up_proj", "experts.down_proj"}},
          {"rank", rank},
          {"final_threshold", 0.25},
          {"warmup_steps", 2}};
}

double distance(const Tensor& a, const Tensor& b) {
  return (a - b).abs().max().item<double>();
}

Tensor logits_of(CausalModel& model) {
  const torch::NoGradGuard frozen;
  model.eval();
  Pass pass;
  return model.forward((torch::arange(40, torch::kInt64) * 7 % 200).view({2, 20}), pass);
}

Tensor logits_of(const Checkpoint& checkpoint) {
  return logits_of(*load_causal(checkpoint, {.dtype = "f32"}));
}

// A mixture that has learned a little, stored as the family is: experts in one tensor, or in tensors of their own.
std::string base(const TemporaryFolder& folder, const std::string& family = "qwen3_moe") {
  auto c = tiny::run(folder, "base-" + family, 20);
  c.model.config = tiny::mixture_config();
  c.model.config["model_type"] = family;
  if (family == "mixtral") c.model.config["num_local_experts"] = 4, c.model.config["intermediate_size"] = 16;
  Trainer(c).run();
  const std::string last = (fs::path(c.output.folder) / "last").string();
  if (family == "qwen3_moe") return last;
  const std::string out = (folder / "separate").string();
  write_hf(*small_mixture::separate(Checkpoint::open(last)), out);
  return out;
}

TrainConfig recovery(const TemporaryFolder& folder, const std::string& model, const std::string& output,
                     int64_t steps) {
  auto c = tiny::run(folder, output, steps);
  c.model.config = nullptr;
  c.model.tokenizer = "bytes";
  c.model.checkpoint = model;
  c.parts = json::array({part()});
  c.routing.balance = "none";
  return c;
}

int64_t nonzero_entries(const Trainer& trainer) {
  int64_t rows = 0;
  for (const auto& p : const_cast<Trainer&>(trainer).module().named_parameters())
    if (p.key().ends_with("adapter.sparse")) rows += p.value().ne(0).any(-1).sum().item<int64_t>() * p.value().size(-1);
  return rows;
}

int64_t entries(const Trainer& trainer) {
  int64_t all = 0;
  for (const auto& p : const_cast<Trainer&>(trainer).module().named_parameters())
    if (p.key().ends_with("adapter.sparse")) all += p.value().numel();
  return all;
}

TEST(LowRankSparsePart, ChangesNothingAtFirst) {
  const TemporaryFolder folder;
  const std::string model = base(folder);
  Trainer trainer(recovery(folder, model, "run", 24));
  EXPECT_LT(distance(logits_of(trainer.model()), logits_of(*Checkpoint::open(model))), 2e-5);
}

class Compact : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Layouts, Compact, testing::Values("qwen3_moe", "mixtral"),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(Compact, HoldsWhatWasTrainedInFewerNumbers) {
  const TemporaryFolder folder;
  const std::string model = base(folder, GetParam());
  const auto config = recovery(folder, model, "small", 24);
  Trainer trainer(config);
  trainer.run();
  // A quarter of the entries stays, and a row at most.
  EXPECT_LE(nonzero_entries(trainer), entries(trainer) / 4 + 24);
  EXPECT_GT(nonzero_entries(trainer), entries(trainer) / 8);
  const std::string last = (fs::path(config.output.folder) / "last").string();
  const auto trained = Checkpoint::open(last);
  const auto want = logits_of(*trained);
  EXPECT_LT(distance(logits_of(*merged_checkpoint(trained)), want), 2e-5);
  const std::string out = (folder / "compact").string();
  write_hf(*compact_low_rank_sparse(trained), out);
  const auto compact = Checkpoint::open(out);
  EXPECT_LT(distance(logits_of(*compact), want), 2e-5);
  // The reader gives whole matrices, under a config of the family's own.
  EXPECT_FALSE(compact->config().contains("moiety"));
  EXPECT_LT(compact->bytes_on_disk(), Checkpoint::open(model)->bytes_on_disk());
  write_hf(*compact, folder / "whole");
  EXPECT_LT(distance(logits_of(*Checkpoint::open((folder / "whole").string())), want), 2e-5);
}

TEST(LowRankSparsePart, ARunThatWasStoppedGoesOnAsIfItHadNot) {
  const TemporaryFolder folder;
  const std::string model = base(folder);
  const auto whole = recovery(folder, model, "whole", 16), stopped = recovery(folder, model, "stopped", 16);
  Trainer(whole).run();
  int64_t steps = 0;
  TrainOptions options;
  options.stop = [&] { return ++steps == 9; };
  EXPECT_EQ(Trainer(stopped, options).run().ended, "stopped");
  Trainer(stopped).run();
  const auto a = Checkpoint::open((fs::path(whole.output.folder) / "last").string()),
             b = Checkpoint::open((fs::path(stopped.output.folder) / "last").string());
  EXPECT_TRUE(torch::equal(logits_of(*a), logits_of(*b)));
}

TEST(LowRankSparsePart, OnlyTheExpertsLearn) {
  const TemporaryFolder folder;
  const std::string model = base(folder);
  Trainer trainer(recovery(folder, model, "run", 12));
  for (const auto& p : trainer.module().named_parameters())
    EXPECT_EQ(p.value().requires_grad(), p.key().find(".adapter.") != std::string::npos) << p.key();
}

TEST(LowRankSparsePart, BadInputIsAnError) {
  const TemporaryFolder folder;
  const std::string model = base(folder);
  const auto with = [&](const json& one, int64_t steps) {
    auto c = recovery(folder, model, "bad", steps);
    c.parts = json::array({one});
    TrainOptions options;
    options.resume = TrainOptions::restart;
    return message_of([&] { Trainer(c, options).run(); });
  };
  EXPECT_NE(with(part(16), 24).find("a rank of 16"), std::string::npos);
  EXPECT_NE(with(part(), 10).find("schedule longer than training"), std::string::npos);
  auto elsewhere = part();
  elsewhere["target"] = "q_proj";
  EXPECT_NE(with(elsewhere, 24).find("experts only"), std::string::npos);
  const auto plain = Checkpoint::open(model);
  EXPECT_NE(message_of([&] { compact_low_rank_sparse(plain); }).find("has 0 parts"), std::string::npos);
}

TEST(Teacher, ThatIsTheModelItselfAddsNothingAtFirst) {
  const TemporaryFolder folder;
  const std::string model = base(folder);
  auto config = tiny::run(folder, "student", 3);
  config.model.config = nullptr;
  config.model.checkpoint = model;
  config.routing.balance = "none";
  config.task = {{"slug", "language"}, {"teacher", {{"model", model}, {"temperature", 2.0}}}};
  Trainer(config).run();
  const auto trace = tiny::trace(config.output.folder);
  EXPECT_NEAR(trace.at(0).at("auxiliary").at("distillation").get<double>(), 0.0, 1e-5);
  EXPECT_GT(trace.at(2).at("auxiliary").at("distillation").get<double>(), 1e-4);
}

TEST(Teacher, OfAnotherVocabularyIsAnError) {
  const TemporaryFolder folder;
  write_hf(*small_mixture::make("mixtral"), folder / "other");
  auto config = tiny::run(folder, "student", 3);
  config.task = {{"slug", "language"}, {"teacher", {{"model", (folder / "other").string()}}}};
  EXPECT_NE(message_of([&] { Trainer{config}; }).find("a vocabulary of 40"), std::string::npos);
}

}  // namespace
}  // namespace moiety
