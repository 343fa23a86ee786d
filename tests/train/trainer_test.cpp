#include "moiety/train/trainer.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>

#include "moiety/base/error.h"
#include "moiety/io/checkpoint.h"
#include "moiety/train/byte_tokenizer.h"
#include "moiety/train/data.h"
#include "tiny.h"

namespace moiety {
namespace {

namespace fs = std::filesystem;
using torch::Tensor;

std::map<std::string, Tensor> parameters(Trainer& trainer) {
  std::map<std::string, Tensor> out;
  for (const auto& p : trainer.model().named_parameters()) out[p.key()] = p.value().detach().clone();
  return out;
}

void expect_equal(const std::map<std::string, Tensor>& a, const std::map<std::string, Tensor>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (const auto& [name, t] : a) EXPECT_TRUE(torch::equal(t, b.at(name))) << name;
}

TEST(Trainer, LearnsAndWritesEverything) {
  const TemporaryFolder folder;
  auto config = tiny::run(folder, "run", 60);
  config.evaluation.every = 20;
  Trainer trainer(config);
  const auto result = trainer.run();
  EXPECT_EQ(result.ended, "complete");
  const auto trace = tiny::trace(config.output.folder);
  EXPECT_EQ(trace.size(), 60u + 3u);
  EXPECT_NEAR(trace[0]["loss"].get<double>(), std::log(259.0), 0.3);
  EXPECT_LT(result.loss, 3.0);
  ASSERT_TRUE(result.evaluation.has_value());
  EXPECT_LT(result.evaluation->loss, 3.2);
  // One byte a token; the ends, one a line of about 25, stand for no bytes.
  EXPECT_NEAR(result.evaluation->bits_per_byte, result.evaluation->loss / std::log(2.0), 0.3);
  const fs::path out = config.output.folder;
  for (const char* name : {"last/config.json", "last/model.safetensors", "last/tokenizer.json",
                           "last/generation_config.json", "last/training/state.json", "best/config.json", "report.html",
                           "run.json", "tensorboard/events.out.tfevents.0000000001.moiety"})
    EXPECT_TRUE(fs::exists(out / name)) << name;
  // What was saved is the model that was trained.
  const auto checkpoint = Checkpoint::open((out / "last").string());
  const auto loaded = load_causal(*checkpoint);
  const auto tokenizer = Tokenizer::load(*checkpoint);
  const auto list = tokenizer->encode("one two three four");
  const auto ids = torch::tensor(list).unsqueeze(0);
  const torch::NoGradGuard frozen;
  trainer.model().eval();
  Pass a, b;
  EXPECT_TRUE(torch::equal(loaded->forward(ids, a), trainer.model().forward(ids, b)));
  EXPECT_EQ(Trainer(config).run().ended, "already complete");
}

TEST(Trainer, AccumulationEqualsOneBigBatch) {
  const TemporaryFolder folder;
  auto whole = tiny::run(folder, "whole", 1), parts = tiny::run(folder, "parts", 1);
  // Rows with different numbers of learned tokens, so that equal weights of micro-batches would be wrong.
  for (auto* c : {&whole, &parts}) {
    c->data.packing = "best_fit";
    c->optimizer.name = "sgd";
    c->optimizer.momentum = 0;
    c->optimizer.lr = 1.0;
    c->optimizer.clip = 0;
    c->schedule.warmup = 0;
  }
  whole.train.batch = 12;
  parts.train.batch = 3;
  parts.train.accumulate = 4;
  Trainer a(whole), b(parts);
  const auto start = parameters(a);
  const double loss_a = a.run().loss, loss_b = b.run().loss;
  EXPECT_NEAR(loss_a, loss_b, 1e-5);
  const auto pa = parameters(a), pb = parameters(b);
  for (const auto& [name, t] : pa) {
    // Sums are taken in another order: 1e-5 of the update's size.
    const double size = (t - start.at(name)).abs().max().item<double>();
    EXPECT_GT(size, 0) << name;
    EXPECT_LT((t - pb.at(name)).abs().max().item<double>(), 1e-5 * std::max(size, 0.1)) << name;
  }
}

TEST(Trainer, PaddingContributesNothing) {
  torch::manual_seed(5);
  auto json = tiny::mixture_config();
  json["vocab_size"] = 259;
  LoadOptions options;
  options.trainable = true;
  const auto model = make_causal(json, options);
  const auto gradients = [&](const Batch& batch) {
    std::vector<int64_t> rows;
    for (int64_t i = 0; i < batch.rows; ++i) rows.push_back(i);
    const auto m = micro_batch(batch, rows, true);
    Pass pass;
    pass.training = true;
    pass.mask = m.mask;
    pass.segments = m.segments;
    pass.positions = m.positions;
    model->zero_grad();
    const auto loss = token_loss(model->forward(m.ids, pass), m.targets);
    loss.backward();
    std::vector<Tensor> out{loss.detach()};
    for (const auto& p : model->parameters())
      out.push_back(p.grad().defined() ? p.grad().clone() : torch::zeros_like(p));
    return out;
  };
  const Example one{{5, 6, 7, 8}, {1, 1, 1, 1}}, two{{9, 10, 11}, {1, 1, 1}};
  const std::vector<Example> both{one, two};
  const auto tight = gradients(pack(both, 7, Packing::sequential, 258));
  const auto padded = gradients(pack(both, 20, Packing::sequential, 258));
  const auto apart = gradients(pad(both, 258));
  for (size_t i = 0; i < tight.size(); ++i) {
    EXPECT_TRUE(torch::allclose(tight[i], padded[i], 1e-4, 1e-5)) << i;
    EXPECT_TRUE(torch::allclose(tight[i], apart[i], 1e-4, 1e-5)) << i;
  }
}

TEST(Trainer, ResumesBitForBit) {
  for (const bool mixture : {false, true}) {
    const TemporaryFolder folder;
    const auto make = [&](const std::string& name) {
      auto c = tiny::run(folder, name, 12);
      if (mixture) c.model.config = tiny::mixture_config();
      c.train.accumulate = 2;
      c.train.ema.decay = 0.9;
      c.train.log_every = 3;  // a record's window crosses the stops
      c.evaluation.every = 4;
      c.data.shuffle_tokens = 300;
      return c;
    };
    const auto config = make("whole");
    Trainer whole(config);
    whole.run();
    const auto stopped = make("stopped");
    for (int sitting = 0; sitting < 5; ++sitting) {
      TrainOptions options;
      int steps = 0;
      options.stop = [&] { return ++steps == 3; };
      Trainer part(stopped, options);
      const auto result = part.run();
      if (result.ended == "complete") {
        expect_equal(parameters(whole), parameters(part));
        break;
      }
      EXPECT_EQ(result.ended, "stopped");
    }
    EXPECT_EQ(tiny::trace(config.output.folder), tiny::trace(stopped.output.folder));
    EXPECT_EQ(tiny::trace(config.output.folder).back()["step"], 12);
    const auto weights = [&](const TrainConfig& c) {
      return read_tensors(fs::path(c.output.folder) / "last" / "model.safetensors");
    };
    expect_equal(weights(config), weights(stopped));
  }
}

TEST(Trainer, RefusesOtherSettingsAndRestartsWhenTold) {
  const TemporaryFolder folder;
  auto config = tiny::run(folder, "run", 2);
  Trainer(config).run();
  auto other = config;
  other.optimizer.lr = 1e-4;
  try {
    Trainer trainer(other);
    FAIL();
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("optimizer.lr"), std::string::npos);
  }
  config.train.steps = 4;
  Trainer longer(config);
  EXPECT_EQ(longer.step(), 2);
  EXPECT_EQ(longer.run().step, 4);
  TrainOptions restart;
  restart.resume = TrainOptions::restart;
  Trainer anew(other, restart);
  EXPECT_EQ(anew.step(), 0);
  anew.run();
  EXPECT_EQ(tiny::trace(other.output.folder).size(), 3u);
  auto empty = tiny::run(folder, "empty", 2);
  TrainOptions required;
  required.resume = TrainOptions::required;
  EXPECT_THROW(Trainer(empty, required), Error);
}

TEST(Trainer, AverageIsWhatItSays) {
  const TemporaryFolder folder;
  auto config = tiny::run(folder, "run", 3);
  config.train.ema.decay = 0.7;
  std::map<std::string, Tensor> average;
  Trainer* running = nullptr;
  TrainOptions options;
  options.on_step = [&](int64_t, int64_t, double, int64_t) {
    for (const auto& [name, t] : parameters(*running)) average[name] = average[name] * 0.7 + t * (1 - 0.7);
  };
  Trainer trainer(config, options);
  running = &trainer;
  average = parameters(trainer);
  trainer.run();
  const auto state = read_tensors(fs::path(config.output.folder) / "last" / "training" / "state.safetensors");
  const auto saved = read_tensors(fs::path(config.output.folder) / "last" / "model.safetensors");
  for (const auto& [name, t] : average)
    EXPECT_TRUE(torch::allclose(state.at("average." + parameter_name(name)), t, 1e-5, 1e-7)) << name;
  EXPECT_TRUE(torch::equal(saved.at("model.norm.weight"), state.at("average.norm.weight")));
  EXPECT_FALSE(torch::equal(saved.at("model.norm.weight"), state.at("parameter.norm.weight")));
  // The weights themselves are back in place.
  EXPECT_TRUE(torch::equal(parameters(trainer).at("norm.weight"), state.at("parameter.norm.weight")));
}

TEST(Trainer, ChoosesWhatLearnsAndHow) {
  const TemporaryFolder folder;
  auto config = tiny::run(folder, "run", 2);
  config.train.train = {"mlp", "norm"};
  config.train.freeze = {"layers\\.0\\."};
  GroupConfig group;
  group.match = "down_proj";
  group.lr_scale = 0.5;
  group.weight_decay = 0.3;
  config.groups.push_back(group);
  const auto plan = plan_training(config);
  std::map<std::string, const Slot*> slots;
  for (const Slot& s : plan.slots) slots[s.name] = &s;
  EXPECT_EQ(slots.count("layers.1.mlp.up_proj.weight"), 1u);
  EXPECT_EQ(slots.count("layers.0.mlp.up_proj.weight"), 0u);
  EXPECT_EQ(slots.count("layers.1.self_attn.q_proj.weight"), 0u);
  EXPECT_DOUBLE_EQ(slots.at("layers.1.mlp.up_proj.weight")->weight_decay, 0.1);
  EXPECT_DOUBLE_EQ(slots.at("norm.weight")->weight_decay, 0.0);
  EXPECT_DOUBLE_EQ(slots.at("layers.1.mlp.down_proj.weight")->weight_decay, 0.3);
  EXPECT_DOUBLE_EQ(slots.at("layers.1.mlp.down_proj.weight")->lr, 1.5e-3);
  EXPECT_GT(plan.parameters, plan.trained);
  Trainer trainer(config);
  const auto before = parameters(trainer);
  trainer.run();
  const auto after = parameters(trainer);
  EXPECT_TRUE(torch::equal(before.at("embed_tokens.weight"), after.at("embed_tokens.weight")));
  EXPECT_FALSE(torch::equal(before.at("layer1.mlp.up_proj.weight"), after.at("layer1.mlp.up_proj.weight")));
  config.train.train = {"nothing_like_this"};
  EXPECT_THROW(plan_training(config), Error);
  config.train.train = {"("};
  EXPECT_THROW(plan_training(config), Error);
}

TEST(Trainer, StopsEarly) {
  const TemporaryFolder folder;
  auto config = tiny::run(folder, "run", 50);
  config.optimizer.lr = 0;  // the loss cannot get better
  config.evaluation.every = 5;
  config.evaluation.patience = 2;
  const auto result = Trainer(config).run();
  EXPECT_EQ(result.ended, "early stop");
  EXPECT_EQ(result.step, 15);
  EXPECT_EQ(result.best_step, 5);
  EXPECT_EQ(Trainer(config).run().ended, "already complete");
}

TEST(Trainer, SaysHowTheLossOfEverySourceChanged) {
  const TemporaryFolder folder;
  auto config = tiny::run(folder, "run", 8);
  config.evaluation.start = true;
  config.data.sources[0].name = "words";
  config.data.sources[0].label = 1;
  config.data.sources[0].weight = 1.0;
  auto other = config.data.sources[0];
  other.name = "again";
  other.label = 0;
  config.data.sources.push_back(other);
  TrainOptions options;
  int steps = 0;
  options.stop = [&] { return ++steps == 3; };
  EXPECT_EQ(Trainer(config, options).run().ended, "stopped");
  const auto result = Trainer(config).run();
  ASSERT_TRUE(result.before.has_value() && result.evaluation.has_value());
  for (const char* name : {"words", "again"})
    EXPECT_GT(result.before->by_source.at(name), result.evaluation->by_source.at(name) + 0.01) << name;
  // Once, and before the first step.
  const auto trace = tiny::trace(config.output.folder);
  EXPECT_EQ(trace.front()["step"], 0);
  EXPECT_EQ(std::count_if(trace.begin(), trace.end(), [](const auto& r) { return r.contains("evaluation"); }), 2);
}

TEST(Labels, RowsCarryThoseOfTheirSources) {
  const TemporaryFolder folder;
  auto config = tiny::run(folder, "run", 1);
  write_file(folder / "other.txt", "zzz zzz zzz zzz zzz zzz zzz zzz zzz zzz zzz zzz zzz zzz\n");
  config.data.sources[0].label = 3;
  config.data.sources[0].weight = 1.0;
  auto other = config.data.sources[0];
  other.path = (folder / "other.txt").string();
  other.label = 5;
  other.document = "file";
  config.data.sources.push_back(other);
  config.data.held_out = 0.0;
  config.evaluation.every = 0;
  Trainer trainer(config);
  Encoder encoder;
  encoder.tokenizer = Tokenizer::from_json(nlohmann::json(byte_tokenizer()), nlohmann::json(byte_tokenizer_config()));
  const int64_t z = encoder.tokenizer->encode("z", false).at(0);
  auto data = open_data(config.data, encoder, 1);
  const auto batch = data.rows->next(6);
  ASSERT_EQ(batch.labels.sizes(), (std::vector<int64_t>{6}));
  for (int64_t i = 0; i < 6; ++i) {
    const bool zs = (batch.ids[i] == z).sum().item<int64_t>() > 10;
    EXPECT_EQ(batch.labels[i].item<int64_t>(), zs ? 5 : 3) << i;
  }
  config.data.sources[1].label.reset();
  EXPECT_NE(config.data.problem().find("label"), std::string::npos);
}

TEST(Trainer, CountsEpochs) {
  const TemporaryFolder folder;
  auto config = tiny::run(folder, "run", 0);
  config.train.epochs = 2;
  const auto plan = plan_training(config);
  ASSERT_TRUE(plan.rows_of_an_epoch.has_value());
  EXPECT_EQ(plan.steps, (2 * *plan.rows_of_an_epoch + 3) / 4);
  EXPECT_EQ(plan.documents, 144);
}

TEST(Trainer, Bf16ComputesCloseToF32WithF32Weights) {
  const TemporaryFolder folder;
  double losses[2];
  for (int i = 0; i < 2; ++i) {
    auto config = tiny::run(folder, i == 0 ? "f32" : "bf16", 25);
    config.model.config = tiny::mixture_config();
    config.train.dtype = i == 0 ? "f32" : "bf16";
    Trainer trainer(config);
    for (const auto& p : trainer.model().parameters()) EXPECT_EQ(p.scalar_type(), torch::kFloat32);
    losses[i] = trainer.run().loss;
  }
  EXPECT_LT(losses[0], 4.5);
  EXPECT_NEAR(losses[0], losses[1], 0.1);  // bf16 has 8 bits of mantissa
}

TEST(Trainer, CheckpointedActivationsGiveTheSameRun) {
  const TemporaryFolder folder;
  auto plain = tiny::run(folder, "plain", 4), again = tiny::run(folder, "again", 4);
  plain.model.config = again.model.config = tiny::mixture_config();
  again.train.checkpoint_activations = true;
  Trainer a(plain), b(again);
  a.run();
  b.run();
  EXPECT_EQ(tiny::trace(plain.output.folder), tiny::trace(again.output.folder));
  expect_equal(parameters(a), parameters(b));
}

TEST(Trainer, LogsRouters) {
  const TemporaryFolder folder;
  auto config = tiny::run(folder, "run", 3);
  config.model.config = tiny::mixture_config();
  Trainer(config).run();
  const auto trace = tiny::trace(config.output.folder);
  const auto& routing = trace[0].at("routing");
  ASSERT_EQ(routing.size(), 2u);
  const auto& site = routing.at("0");
  double sum = 0;
  for (const double share : site.at("share")) sum += share;
  EXPECT_NEAR(sum, 1.0, 1e-4);
  EXPECT_NEAR(site.at("per_token").get<double>(), 2.0, 1e-9);
  EXPECT_GE(site.at("imbalance").get<double>(), 1.0);
  EXPECT_LE(site.at("evenness").get<double>(), 1.0 + 1e-9);
}

TEST(Trainer, GoesOnFromACheckpoint) {
  const TemporaryFolder folder;
  auto first = tiny::run(folder, "first", 10);
  Trainer a(first);
  a.run();
  auto second = tiny::run(folder, "second", 1);
  second.model.config = nullptr;
  second.model.tokenizer = "";
  second.model.checkpoint = first.output.folder + "/last";
  Trainer b(second);
  expect_equal(parameters(a), parameters(b));
  EXPECT_LT(b.run().loss, tiny::trace(first.output.folder)[5]["loss"].get<double>());
}

TEST(Trainer, SaysWhatDoesNotFit) {
  const TemporaryFolder folder;
  auto config = tiny::run(folder, "run", 1);
  config.data.length = 65;
  EXPECT_THROW(plan_training(config), Error);
  config = tiny::run(folder, "run", 1);
  config.model.config["vocab_size"] = 100;
  EXPECT_THROW(plan_training(config), Error);
}

// A module of a model may change with the steps; a stand-in for one, at a norm's place.
class Clock : public torch::nn::Module, public Scheduled {
 public:
  void before_step(int64_t step, int64_t steps) override { seen.emplace_back(step, steps); }
  void after_step() override { ++after; }
  void before_evaluation() override { evaluating = true; }
  void after_evaluation() override { evaluations += std::exchange(evaluating, false); }
  std::vector<std::pair<int64_t, int64_t>> seen;
  int64_t after = 0, evaluations = 0;
  bool evaluating = false;
};

TEST(Trainer, CallsScheduledModulesOncePerStep) {
  const TemporaryFolder folder;
  auto config = tiny::run(folder, "run", 3);
  config.train.accumulate = 2;
  config.train.checkpoint_activations = true;
  config.evaluation.every = 1;
  const auto clock = std::make_shared<Clock>();
  TrainOptions options;
  options.prepare = [&](torch::nn::Module& model) { model.register_module("clock", clock); };
  Trainer(config, options).run();
  EXPECT_EQ(clock->seen, (std::vector<std::pair<int64_t, int64_t>>{{0, 3}, {1, 3}, {2, 3}}));
  EXPECT_EQ(clock->after, 3);
  EXPECT_EQ(clock->evaluations, 3);
}

TEST(Trainer, LearnsOnlyWhatIsAddedToATrainedModel) {
  const TemporaryFolder folder("moiety-test");
  auto base = tiny::run(folder, "base", 3);
  base.parts = nlohmann::json::array({{{"slug", "moduleformer"}, {"modules", 4}, {"top_k", 2}, {"gating_size", 8}}});
  Trainer(base).run();
  const auto before = read_tensors(folder / "base" / "last" / "model.safetensors");
  auto grown = tiny::run(folder, "grown", 3);
  grown.model.config = nullptr;
  grown.model.tokenizer.clear();
  grown.model.checkpoint = (folder / "base" / "last").string();
  grown.parts = base.parts;
  grown.parts[0]["new_modules"] = 2;
  Trainer trainer(grown);
  for (const auto& p : trainer.model().named_parameters())
    EXPECT_EQ(p.value().requires_grad(), p.key().find(".new.") != std::string::npos) << p.key();
  trainer.run();
  const auto records = tiny::trace(grown.output.folder);
  EXPECT_GT(records.at(0).at("auxiliary").at("moduleformer.added").get<double>(), 0.0);
  const auto after = read_tensors(folder / "grown" / "last" / "model.safetensors");
  EXPECT_GT(after.size(), before.size());
  for (const auto& [name, value] : before) EXPECT_TRUE(torch::equal(value, after.at(name))) << name;
}

TEST(Trainer, FreezesTheModelBesideItsAdapters) {
  const TemporaryFolder folder("moiety-test");
  Trainer(tiny::run(folder, "base", 2)).run();
  const auto before = read_tensors(folder / "base" / "last" / "model.safetensors");
  auto adapted = tiny::run(folder, "adapted", 6);
  adapted.model.config = nullptr;
  adapted.model.tokenizer.clear();
  adapted.model.checkpoint = (folder / "base" / "last").string();
  adapted.parts = nlohmann::json::array({{{"slug", "adamoe-linear"},
                                          {"target", {"q_proj", "down_proj"}},
                                          {"experts", 2},
                                          {"null_experts", 2},
                                          {"top_k", 2},
                                          {"rank", 2}}});
  Trainer trainer(adapted);
  for (const auto& p : trainer.model().named_parameters())
    EXPECT_EQ(p.value().requires_grad(), p.key().find(".adapter.") != std::string::npos) << p.key();
  trainer.run();
  std::map<std::string, torch::Tensor> now;
  for (const auto& t : trainer.model().stored()) now[t.name] = t.value();
  for (const auto& [name, value] : before) EXPECT_TRUE(torch::equal(value, now.at(name))) << name;
  // What is saved is the adapter alone.
  const auto after = read_tensors(folder / "adapted" / "last" / "adapter_model.safetensors");
  bool learned = false;
  for (const auto& [name, value] : after) {
    EXPECT_NE(name.find(".adapters."), std::string::npos) << name;
    learned |= name.ends_with("lora_B") && value.abs().max().item<double>() > 0.0;
  }
  EXPECT_TRUE(learned);
  EXPECT_FALSE(std::filesystem::exists(folder / "adapted" / "last" / "model.safetensors"));
  // What was saved loads with its adapters, and answers as the run's model does.
  const auto loaded = load_causal(*Checkpoint::open((folder / "adapted" / "last").string()));
  loaded->eval();
  trainer.model().eval();
  const torch::NoGradGuard frozen;
  const auto ids = torch::arange(12, torch::kInt64).view({1, 12});
  Pass a, b;
  EXPECT_TRUE(torch::equal(loaded->forward(ids, a), trainer.model().forward(ids, b)));
}

}  // namespace
}  // namespace moiety
