#include "adapt_tools.h"

#include <gtest/gtest.h>

#include "moiety/base/files.h"
#include "moiety/io/peft.h"
#include "moiety/nn/weights.h"
#include "moiety/train/open_run.h"

namespace moiety {

using nlohmann::json;

void check_in_model(const json& part, const torch::Tensor& labels, const json& more, double rounding) {
  const auto config = model_with(json::array({part}), more);
  // A base in a file, and the model that is trained beside it.
  const TemporaryFolder folder("moiety-test");
  torch::manual_seed(11);
  const auto ids = torch::randint(0, 40, {2, 9}, torch::kInt64);
  const auto plain = make_causal(without_parts(config), {.trainable = true});
  std::filesystem::create_directories(folder / "base");
  write_file(folder / "base" / "config.json", without_parts(config).dump());
  write_stored(folder / "base", plain->stored(), "f32");
  const auto base = Checkpoint::open((folder / "base").string());
  const auto model = load_causal(*base, config, {.trainable = true, .frozen_base = true});
  EXPECT_TRUE(torch::equal(logits_of(*model, ids, labels), logits_of(*plain, ids)));

  std::map<std::string, torch::Tensor> before;
  std::vector<torch::Tensor> learning;
  for (const auto& t : model->stored())
    if (t.name.find(".adapters.") == std::string::npos) before[t.name] = t.value().clone();
  for (const auto& p : model->named_parameters()) {
    EXPECT_EQ(p.value().requires_grad(), p.key().find(".adapter") != std::string::npos) << p.key();
    if (p.value().requires_grad()) learning.push_back(p.value());
  }
  ASSERT_FALSE(learning.empty());
  torch::optim::AdamW optimizer(learning, torch::optim::AdamWOptions(1e-2));
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    Pass pass;
    pass.labels = labels;
    train_pass(*model, ids, pass).backward();
    optimizer.step();
  }
  for (const auto& t : model->stored())
    if (const auto it = before.find(t.name); it != before.end()) {
      EXPECT_TRUE(torch::equal(it->second, t.value())) << t.name;
    }
  const auto learned = logits_of(*model, ids, labels);
  EXPECT_GT(distance(learned, logits_of(*plain, ids)), 1e-4);

  const torch::NoGradGuard frozen;
  std::vector<AdapterTensor> tensors;
  for (const auto& t : model->stored()) {
    if (t.name.find(".adapters.") == std::string::npos) continue;
    const auto v = t.value().contiguous();
    tensors.push_back({t.name, v.sizes().vec(), {v.const_data_ptr<float>(), v.const_data_ptr<float>() + v.numel()}});
  }
  write_adapter(folder / "adapter", json::array({part}), tensors, *base, "../base");
  const auto loaded = load_causal(*Checkpoint::open((folder / "adapter").string()));
  EXPECT_LE(distance(logits_of(*loaded, ids, labels), learned), rounding);
}

void check_recomputed(const json& part, const torch::Tensor& labels) {
  const auto ids = torch::randint(0, 40, {2, 9}, torch::kInt64);
  std::map<std::string, torch::Tensor> gradients[2], stored[2];
  for (const bool again : {false, true}) {
    torch::manual_seed(12);
    const auto model = make_causal(model_with(json::array({part})), {.trainable = true});
    stir(*model);
    for (int step = 0; step < 2; ++step) {
      Pass pass;
      pass.labels = labels;
      pass.recompute_blocks = again;
      train_pass(*model, ids, pass).backward();
    }
    for (const auto& p : model->named_parameters())
      if (p.value().grad().defined()) gradients[again][p.key()] = p.value().grad();
    for (const auto& t : model->stored()) stored[again][t.name] = t.value().detach().clone();
  }
  ASSERT_EQ(gradients[0].size(), gradients[1].size());
  for (const auto& [name, gradient] : gradients[0]) EXPECT_TRUE(torch::equal(gradient, gradients[1].at(name))) << name;
  for (const auto& [name, value] : stored[0]) EXPECT_TRUE(torch::equal(value, stored[1].at(name))) << name;
}

}  // namespace moiety
