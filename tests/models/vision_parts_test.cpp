#include <gtest/gtest.h>
#include <torch/torch.h>

#include <set>

#include "message_of.h"
#include "moiety/base/files.h"
#include "moiety/io/peft.h"
#include "moiety/models/merged.h"
#include "moiety/models/vision.h"
#include "moiety/train/open_run.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

VisionConfig plain() {
  VisionConfig c;
  c.image = 8;
  c.patch = 4;
  c.hidden = 8;
  c.blocks = 3;
  c.heads = 2;
  c.width = 12;
  c.classes = 3;
  c.dropout = 0.0;
  c.mixture = c.share_attention = c.share_ffn = false;
  return c;
}

VisionConfig shared() {
  VisionConfig c = plain();
  c.share_attention = c.share_ffn = true;
  return c;
}

json one(const std::string& slug, const json& more = json::object()) {
  json part = {{"slug", slug}, {"rank", 2}};
  part.update(more);
  return json::array({part});
}

void save(VisionModel& model, const std::filesystem::path& folder) {
  write_stored(folder, model.stored(), "f32");
  write_file(folder / "config.json", model.json().dump());
}

std::shared_ptr<VisionModel> adapting(const std::filesystem::path& folder, const json& parts) {
  auto model = load_vision(*Checkpoint::open(folder.string()), parts,
                           {.dtype = "f32", .device = torch::kCPU, .trainable = true, .frozen_base = true});
  model->eval();
  return model;
}

Tensor logits(VisionModel& model, const Tensor& images) {
  const torch::NoGradGuard frozen;
  model.eval();
  Pass pass;
  return model.forward(images, pass);
}

// What parts add is not nothing any more.
void stir(VisionModel& model) {
  const torch::NoGradGuard frozen;
  torch::manual_seed(7);
  for (const auto& t : model.stored())
    if (t.name.find("lora_B") != std::string::npos) t.value().normal_(0.0, 0.5);
}

TEST(VisionParts, BeginAsTheBaseAndAloneLearn) {
  const TemporaryFolder folder("moiety-test");
  torch::manual_seed(1);
  const auto base = make_vision(plain());
  save(*base, folder / "base");
  const auto images = torch::randn({4, 1, 8, 8});
  const auto before = logits(*base, images);
  for (const auto& parts : {one("lora"), one("mora", {{"top_k", 2}}), one("mola", {{"experts", 3}, {"top_k", 2}}),
                            one("dynmole", {{"experts", 3}}), one("loramoe", {{"experts", 4}, {"coef", 0.0}}),
                            one("smora", {{"rank", 4}, {"active", 2}}), one("flylora", {{"rank", 4}, {"top_k", 2}}),
                            one("adamoe-linear", {{"experts", 2}, {"null_experts", 2}, {"top_k", 2}})}) {
    const std::string slug = parts[0]["slug"];
    const auto model = adapting(folder / "base", parts);
    EXPECT_TRUE(torch::equal(logits(*model, images), before)) << slug;
    Pass pass;
    pass.training = true;
    model->forward(images, pass).square().sum().backward();
    int64_t learning = 0;
    for (const auto& p : model->named_parameters()) {
      const bool added = p.key().find("adapter") != std::string::npos;
      EXPECT_TRUE(added || !p.value().requires_grad()) << slug << " " << p.key();
      learning += p.value().grad().defined() && p.value().grad().abs().max().item<double>() > 0 ? 1 : 0;
    }
    EXPECT_GT(learning, 0) << slug;
    stir(*model);
    const auto changed = logits(*model, images);
    EXPECT_GT((changed - before).abs().max().item<double>(), 1e-4) << slug;
    // It comes back from an adapter beside the base, and from a whole checkpoint.
    const auto checkpoint = Checkpoint::open((folder / "base").string());
    write_stored_adapter(folder / "adapter", model->stored(), parts, *checkpoint, (folder / "base").string());
    const auto again = load_vision(*Checkpoint::open((folder / "adapter").string()));
    EXPECT_TRUE(torch::equal(logits(*again, images), changed)) << slug;
    save(*model, folder / "whole");
    EXPECT_TRUE(torch::equal(logits(*load_vision(*Checkpoint::open((folder / "whole").string())), images), changed))
        << slug;
  }
}

TEST(VisionParts, BlocksThatShareAMatrixShareWhatStandsBesideIt) {
  torch::manual_seed(2);
  const auto count = [](const VisionConfig& c, const json& parts) {
    const auto model = make_vision(c, {}, parts);
    std::set<std::string> names;
    for (const auto& t : model->stored())
      if (t.name.find(".adapters.") != std::string::npos) names.insert(t.name);
    return names;
  };
  EXPECT_EQ(count(plain(), one("lora")).size(), 2U * 6 * 3);
  EXPECT_EQ(count(shared(), one("lora")).size(), 2U * 6);
  EXPECT_EQ(count(shared(), one("lora", {{"target", json::array({"q_proj", "up_proj"})}})),
            (std::set<std::string>{"blocks.0.adapters.q_proj.lora_A", "blocks.0.adapters.q_proj.lora_B",
                                   "blocks.0.adapters.up_proj.lora_A", "blocks.0.adapters.up_proj.lora_B"}));
  // Of what the blocks have themselves beside it.
  VisionConfig half = shared();
  half.share_ffn = false;
  EXPECT_EQ(count(half, one("lora", {{"target", json::array({"q_proj", "up_proj"})}})).size(), 2U * (1 + 3));
}

TEST(VisionParts, MergeIntoTheirMatrices) {
  const TemporaryFolder folder("moiety-test");
  torch::manual_seed(3);
  const auto images = torch::randn({4, 1, 8, 8});
  for (const VisionConfig& c : {plain(), shared()}) {
    const auto model = make_vision(c, {}, one("lora", {{"alpha", 4}}));
    stir(*model);
    save(*model, folder / "model");
    const auto merged = merged_checkpoint(Checkpoint::open((folder / "model").string()));
    EXPECT_TRUE(parts_of(merged->config()).is_null());
    const auto alone = load_vision(*merged);
    EXPECT_LT((logits(*alone, images) - logits(*model, images)).abs().max().item<double>(), 1e-5);
  }
  const auto routed = make_vision(plain(), {}, one("mora", {{"top_k", 2}}));
  save(*routed, folder / "routed");
  const auto merged = merged_checkpoint(Checkpoint::open((folder / "routed").string()));
  EXPECT_NE(message_of([&] { load_vision(*merged); }).find("depends on the token"), std::string::npos);
}

TEST(VisionParts, SayWhatDoesNotFit) {
  const auto message = [](const VisionConfig& c, const json& parts) {
    return message_of([&] { make_vision(c, {}, parts); });
  };
  EXPECT_NE(message(plain(), json::array({{{"slug", "widenet"}}})).find("site linear"), std::string::npos);
  EXPECT_NE(message(plain(), one("lora", {{"target", "gate_proj"}})).find("q_proj, k_proj, v_proj, o_proj, up_proj"),
            std::string::npos);
  EXPECT_NE(message(plain(), one("lora", {{"bias", "all"}})).find("lora_only"), std::string::npos);
  EXPECT_NE(message(plain(), one("lora", {{"layers", 3}})).find("layers 0 to 2"), std::string::npos);
  EXPECT_NE(message(shared(), one("lora", {{"layers", 1}})).find("no layer has a matrix"), std::string::npos);
  // A tensor of the base that is missing is not made anew beside a new part.
  const TemporaryFolder folder("moiety-test");
  const auto model = make_vision(plain());
  auto tensors = model->stored();
  std::erase_if(tensors, [](const StoredTensor& t) { return t.name == "blocks.1.attention.k.weight"; });
  write_stored(folder / "base", tensors, "f32");
  write_file(folder / "base" / "config.json", model->json().dump());
  EXPECT_NE(message_of([&] { adapting(folder / "base", one("lora")); }).find("blocks.1.attention.k.weight"),
            std::string::npos);
}

}  // namespace
}  // namespace moiety
