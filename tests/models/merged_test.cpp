#include "moiety/models/merged.h"

#include <gtest/gtest.h>

#include <cmath>

#include "adapt/adapt_tools.h"
#include "message_of.h"
#include "moiety/base/files.h"
#include "moiety/io/overlay.h"
#include "moiety/nn/weights.h"
#include "moiety/train/open_run.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

// A model with parts whose B is not zero, as a checkpoint, and what it becomes when it is merged.
struct Merging {
  TemporaryFolder folder{"moiety-test"};
  json config;
  std::shared_ptr<const Checkpoint> adapted;
  Tensor ids = torch::arange(18, torch::kInt64).view({2, 9});

  // `stirred`: other tensors that get random values.
  explicit Merging(const json& parts, const json& more = json::object(), const std::string& dtype = "f32",
                   const std::string& stirred = "nothing")
      : config(model_with(parts, more)) {
    torch::manual_seed(3);
    const auto model = make_causal(config, {.trainable = true});
    stir(*model);
    for (const auto& t : model->stored())
      if (t.name.find(stirred) != std::string::npos) {
        const torch::NoGradGuard frozen;
        t.value().normal_();
      }
    config["dtype"] = dtype == "bf16" ? "bfloat16" : "float32";
    std::filesystem::create_directories(folder.path());
    write_file(folder / "config.json", config.dump());
    write_stored(folder.path(), model->stored(), dtype);
    adapted = Checkpoint::open(folder.path().string());
  }
  std::shared_ptr<const Checkpoint> merged() const { return merged_checkpoint(adapted); }
  // Largest difference of logits, over their deviation.
  double difference(const LoadOptions& options = {}) const {
    const auto before = logits_of(*load_causal(*adapted, options), ids),
               after = logits_of(*load_causal(*merged(), options), ids);
    EXPECT_GT(distance(before, logits_of(*load_causal(*Plain::of(*this), options), ids)), 1e-3);
    return distance(before, after) / before.std().item<double>();
  }
  std::string refusal() const {
    return message_of([&] {
      const auto m = merged();
      for (const TensorInfo& t : m->tensors()) m->get(t.name);
    });
  }

 private:
  // The same checkpoint without what stands beside its matrices.
  class Plain : public Checkpoint {
   public:
    static std::shared_ptr<const Checkpoint> of(const Merging& m) {
      auto out = std::make_shared<Plain>();
      out->under_ = m.adapted;
      out->config_ = m.merged()->config();
      for (const auto& t : m.adapted->tensors())
        if (t.name.find(".adapters.") == std::string::npos) out->tensors_.push_back(t);
      return out;
    }
    const json& config() const override { return config_; }
    const json& generation_config() const override { return under_->generation_config(); }
    const std::vector<TensorInfo>& tensors() const override { return tensors_; }
    bool has(const std::string& name) const override {
      return name.find(".adapters.") == std::string::npos && under_->has(name);
    }
    TensorView get(const std::string& name) const override { return under_->get(name); }
    std::filesystem::path path() const override { return under_->path(); }
    int64_t bytes_on_disk() const override { return 0; }

   private:
    std::shared_ptr<const Checkpoint> under_;
    json config_;
    std::vector<TensorInfo> tensors_;
  };
};

json lora(const json& more = json::object()) {
  json part = {{"slug", "lora"}, {"rank", 2}, {"alpha", 3.0}};
  part.update(more);
  return part;
}

// Sums in another order, and products that are rounded in between.
constexpr double kRounding = 5e-5;

const json kMixtral = {{"model_type", "mixtral"}, {"num_local_experts", 4}, {"num_experts_per_tok", 2}};

TEST(Merged, AnswersAsTheAdaptedModel) {
  const Merging m(json::array({lora()}));
  EXPECT_LT(m.difference(), kRounding);
  const auto merged = m.merged();
  EXPECT_EQ(merged->config().count("moiety"), 0u);
  for (const TensorInfo& t : merged->tensors()) EXPECT_EQ(t.name.find("adapters"), std::string::npos);
}

TEST(Merged, SoDoDoraAndSeveralTogether) {
  EXPECT_LT(Merging(json::array({lora({{"dora", true}})})).difference(), kRounding);
  EXPECT_LT(Merging(json::array({lora({{"name", "a"}}), lora({{"name", "b"}, {"target", "q_proj"}, {"rslora", true}})}))
                .difference(),
            kRounding);
  // The second DoRA divides by the norms of what the first has left.
  EXPECT_LT(Merging(json::array({lora({{"name", "a"}}), lora({{"name", "b"}, {"strength", -0.5}})})).difference(),
            kRounding);
}

TEST(Merged, SoDoMatricesOfExperts) {
  for (const char* experts : {"own", "shared", "all"})
    EXPECT_LT(Merging(json::array({lora({{"target", {"experts.gate_up_proj", "experts.down_proj", "v_proj"}},
                                         {"experts", experts}})}),
                      kMixtral)
                  .difference(),
              kRounding);
}

TEST(Merged, SoDoFusedMatrices) {
  EXPECT_LT(Merging(json::array({lora()}), {{"model_type", "phi3"}, {"pad_token_id", 0}}).difference(), kRounding);
}

TEST(Merged, SoDoMixturesOfOneExpert) {
  EXPECT_LT(Merging(json::array({{{"slug", "mola"}, {"experts", 1}, {"top_k", 1}, {"rank", 2}}})).difference(),
            kRounding);
  EXPECT_LT(Merging(json::array({{{"slug", "lora-mixer"}, {"experts", 1}, {"rank", 2}}})).difference(), kRounding);
  EXPECT_LT(Merging(json::array({{{"slug", "flylora"}, {"rank", 4}, {"top_k", 4}}})).difference(), kRounding);
  EXPECT_LT(
      Merging(json::array(
                  {{{"slug", "adamoe-linear"}, {"experts", 1}, {"null_experts", 0}, {"top_k", 1}, {"dropout", 0.5}}}))
          .difference(),
      kRounding);
}

TEST(Merged, SoDoWeightsOfSixteenBits) {
  for (const json& part : {lora(), json{{"slug", "lora-mixer"}, {"experts", 1}, {"rank", 2}},
                           json{{"slug", "flylora"}, {"rank", 4}, {"top_k", 4}}}) {
    const Merging m(json::array({part}), json::object(), "bf16");
    const auto merged = m.merged();
    for (const TensorInfo& t : merged->tensors()) EXPECT_EQ(t.format, Format::BF16);
    // Sums are rounded to 8 bits.
    EXPECT_LT(m.difference({.dtype = "f32"}), 0.1) << part;
  }
}

TEST(Merged, SoDoTrainedBiases) {
  for (const bool dora : {false, true}) {
    const Merging m(json::array({lora({{"bias", "lora_only"}, {"target", "q_proj"}, {"dora", dora}})}),
                    {{"model_type", "qwen2"}}, "f32", "adapters.q_proj.bias");
    EXPECT_LT(m.difference(), kRounding);
    const std::string name = "model.layers.1.self_attn.q_proj.bias";
    EXPECT_NE(m.merged()->get(name).to_float(), m.adapted->get(name).to_float());
    EXPECT_EQ(m.merged()->get(name).to_float(), m.adapted->get("model.layers.1.adapters.q_proj.bias").to_float());
  }
}

TEST(Merged, KeepsPartsAtOtherSites) {
  const Merging m(
      json::array({json{{"slug", "deepseekmoe"}, {"layers", 0}, {"experts", 3}, {"shared", 1}, {"top_k", 2}},
                   lora({{"target", "q_proj"}})}));
  EXPECT_LT(m.difference(), kRounding);
  EXPECT_EQ(m.merged()->config()["moiety"]["parts"].size(), 1u);
}

TEST(Merged, LeavesWhatIsNotAdaptedAsItIs) {
  const Merging m(json::array({lora({{"target", "q_proj"}, {"layers", 1}})}));
  const auto merged = m.merged();
  for (const TensorInfo& t : merged->tensors()) {
    const bool same = merged->get(t.name).to_float() == m.adapted->get(t.name).to_float();
    EXPECT_EQ(same, t.name != "model.layers.1.self_attn.q_proj.weight") << t.name;
  }
}

// A model whose tensor `name` holds `value` at [1, 2], in `format`, and what merging says.
std::string refusal_of(const std::string& name, float value, Format format = Format::F32) {
  const Merging m(json::array({lora({{"target", "q_proj"}, {"alpha", 100.0}})}));
  std::vector<OverlayTensor> changed;
  for (const TensorInfo& t : m.adapted->tensors()) {
    if (t.name != name && format == Format::F32) continue;
    auto values = m.adapted->get(t.name).to_float();
    if (t.name == name) values[static_cast<size_t>(t.shape[1] + 2)] = value;
    OverlayTensor out = overlay_of(t.name, t.shape, values);
    if (t.name.find(".adapters.") == std::string::npos) {
      out.info.format = format;
      out.get = [values, shape = t.shape, format] { return view_of(torch::tensor(values).view(shape), format); };
    }
    changed.push_back(std::move(out));
  }
  return message_of([&] {
    const auto merged = merged_checkpoint(overlay(m.adapted, m.config, std::move(changed)));
    for (const TensorInfo& t : merged->tensors()) merged->get(t.name);
  });
}

TEST(Merged, RefusesNumbersThatAreNotFinite) {
  const std::string q = "model.layers.1.self_attn.q_proj.weight", up = "model.layers.0.mlp.up_proj.weight",
                    a = "model.layers.1.adapters.q_proj.lora_A";
  EXPECT_EQ(refusal_of(q, 1.f), "");
  EXPECT_NE(refusal_of(q, NAN).find(q + ": the model's weight holds nan at [1, 2]"), std::string::npos);
  // Of matrices that nothing stands beside, too.
  EXPECT_NE(refusal_of(up, -INFINITY).find(up + ": the model's weight holds -inf at [1, 2]"), std::string::npos);
  // Each finite, but not their product, or not in the format of the base.
  EXPECT_NE(refusal_of(a, 3e38f).find(q + ": the sum holds"), std::string::npos);
  EXPECT_EQ(refusal_of(q, 6e4f, Format::F16), "");
  EXPECT_NE(refusal_of(a, 1e6f, Format::F16).find(q + ": the sum, in f16, holds"), std::string::npos);
}

// ---- And back ----

// A merged model with the same adapters beside it, and what becomes of it; the largest error of a weight, over the
// largest merged one.
struct Unmerging {
  Merging before;
  std::shared_ptr<const Checkpoint> again;

  explicit Unmerging(const json& parts, const json& more = json::object(), const std::string& dtype = "f32")
      : before(parts, more, dtype) {
    std::vector<OverlayTensor> own;
    for (const TensorInfo& t : before.adapted->tensors())
      if (t.name.find(".adapters.") != std::string::npos)
        own.push_back(overlay_of(t.name, t.shape, before.adapted->get(t.name).to_float()));
    again = unmerged_checkpoint(overlay(before.merged(), before.config, std::move(own)));
  }
  double error() const {
    double worst = 0.0;
    const auto merged = before.merged();
    for (const TensorInfo& t : merged->tensors()) {
      EXPECT_EQ(again->get(t.name).format, t.format) << t.name;
      const auto was = as_tensor(before.adapted->get(t.name)).to(torch::kFloat32),
                 is = as_tensor(again->get(t.name)).to(torch::kFloat32),
                 between = as_tensor(merged->get(t.name)).to(torch::kFloat32);
      worst = std::max(worst, distance(was, is) / between.abs().max().item<double>());
    }
    EXPECT_EQ(again->tensors().size(), merged->tensors().size());
    EXPECT_EQ(again->config().count("moiety"), 0u);
    return worst;
  }
};

TEST(Unmerged, GivesTheWeightsBack) {
  EXPECT_LT(Unmerging(json::array({lora()})).error(), 1e-6);
  EXPECT_LT(Unmerging(json::array({lora({{"name", "a"}}), lora({{"name", "b"}, {"strength", -0.5}, {"rslora", true}})}))
                .error(),
            1e-6);
  EXPECT_LT(
      Unmerging(json::array({lora({{"target", {"experts.gate_up_proj", "experts.down_proj", "v_proj"}}})}), kMixtral)
          .error(),
      1e-6);
  EXPECT_LT(Unmerging(json::array({lora()}), {{"model_type", "phi3"}, {"pad_token_id", 0}}).error(), 1e-6);
  EXPECT_LT(Unmerging(json::array({{{"slug", "mola"}, {"experts", 1}, {"top_k", 1}, {"rank", 2}}})).error(), 1e-6);
}

TEST(Unmerged, LosesWhatTheMergedWeightsWereRoundedBy) {
  const double error = Unmerging(json::array({lora()}), json::object(), "bf16").error();
  // Half of the last of 8 bits once when it is merged, once when it is stored again.
  EXPECT_LT(error, std::ldexp(1.0, -8));
  EXPECT_GT(error, 1e-5);
}

TEST(Unmerged, SaysWhatCannotBe) {
  const auto says = [](const json& part, const json& more = json::object()) {
    return message_of([&] {
      const Merging m(json::array({part}), more);
      const auto again = unmerged_checkpoint(m.adapted);
      for (const TensorInfo& t : again->tensors()) again->get(t.name);
    });
  };
  EXPECT_NE(says(lora({{"dora", true}})).find("DoRA gives every row a new length"), std::string::npos);
  EXPECT_NE(says(lora({{"bias", "lora_only"}, {"target", "q_proj"}}), {{"model_type", "qwen2"}}).find("a trained one"),
            std::string::npos);
  EXPECT_NE(says(lora({{"bias", "all"}}), {{"model_type", "qwen2"}}).find("trained all biases"), std::string::npos);
  EXPECT_NE(says({{"slug", "mola"}, {"experts", 3}, {"rank", 2}}).find("its router gives every token"),
            std::string::npos);
  EXPECT_NE(message_of([] { unmerged_checkpoint(Merging(json::array()).adapted); }).find("nothing stands beside"),
            std::string::npos);
}

TEST(Merged, SaysWhatCannotBe) {
  const auto says = [](const json& part, const json& more = json::object()) {
    return Merging(json::array({part}), more).refusal();
  };
  EXPECT_NE(says({{"slug", "mola"}, {"experts", 3}, {"rank", 2}}).find("its router gives every token"),
            std::string::npos);
  EXPECT_NE(says({{"slug", "loramoe"}, {"experts", 2}, {"rank", 2}}).find("its router gives every token"),
            std::string::npos);
  EXPECT_NE(says({{"slug", "dynmole"}, {"experts", 3}, {"rank", 2}}).find("its router gives every token"),
            std::string::npos);
  EXPECT_NE(says({{"slug", "lora-mixer"}, {"experts", 2}, {"rank", 2}}).find("its router gives every token"),
            std::string::npos);
  EXPECT_NE(says({{"slug", "llava-mole"}, {"target", {"gate_proj", "up_proj", "down_proj"}}, {"rank", 2}})
                .find("an expert of its own"),
            std::string::npos);
  for (const auto& [experts, null_experts] : {std::pair{3, 2}, std::pair{3, 0}, std::pair{1, 1}})
    EXPECT_NE(says({{"slug", "adamoe-linear"}, {"experts", experts}, {"null_experts", null_experts}, {"top_k", 1}})
                  .find("experts of its own, or none"),
              std::string::npos);
  EXPECT_NE(says({{"slug", "smora"}, {"rank", 4}, {"active", 2}}).find("ranks of its own"), std::string::npos);
  EXPECT_NE(says({{"slug", "mora"}, {"rank", 4}, {"top_k", 2}}).find("depends on the token"), std::string::npos);
  EXPECT_NE(says({{"slug", "flylora"}, {"rank", 4}, {"top_k", 2}}).find("ranks of its own"), std::string::npos);
  EXPECT_NE(message_of([] { merged_checkpoint(Merging(json::array()).adapted); }).find("nothing stands beside"),
            std::string::npos);
}

}  // namespace
}  // namespace moiety
