#include "moiety/adapt/corda_model.h"

#include <gtest/gtest.h>

#include <limits>

#include "adapt_tools.h"
#include "message_of.h"
#include "moiety/base/files.h"
#include "moiety/io/safetensors.h"
#include "moiety/nn/weights.h"
#include "moiety/train/open_run.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

const auto kNoProgress = [](const char*, int64_t, int64_t) {};

class Moments : public testing::Test {
 protected:
  // A model in a folder; another `seed` is another model.
  std::shared_ptr<const Checkpoint> model(const std::string& name, uint64_t seed, const json& more = json::object(),
                                          const std::string& dtype = "f32") const {
    torch::manual_seed(seed);
    const auto config = without_parts(model_with(json::array(), more));
    std::filesystem::create_directories(dir_ / name);
    write_file(dir_ / name / "config.json", config.dump());
    write_stored(dir_ / name, make_causal(config)->stored(), dtype);
    return Checkpoint::open((dir_ / name).string());
  }
  CordaMoments calibrated(const Checkpoint& checkpoint) const {
    return corda_calibrate(checkpoint, options_, samples_);
  }
  std::string refusal(const Checkpoint& checkpoint) const {
    return message_of([&] { read_moments(file_, checkpoint, options_); });
  }
  // The file with other metadata, or with `value` at the first place of its first tensor.
  void change(const std::map<std::string, std::string>& metadata, float value = 0.f) const {
    const auto was = SafetensorsFile::open(file_);
    auto all = was->metadata();
    for (const auto& [key, text] : metadata) all[key] = text;
    SafetensorsWriter writer(file_, was->tensors(), all);
    bool first = true;
    for (const TensorInfo& t : was->tensors()) {
      auto values = was->get(t.name).to_float();
      if (first && value != 0.f) values[0] = value;
      first = false;
      writer.write(t.name, std::as_bytes(std::span(values)));
    }
    writer.finish();
  }

  TemporaryFolder dir_;
  std::filesystem::path file_ = dir_ / "moments.safetensors";
  CordaOptions options_{.targets = {"q_proj", "k_proj", "down_proj"}, .rank = 2};
  std::vector<std::vector<int64_t>> samples_ = {{1, 2, 3, 4, 5, 6, 7}, {8, 9, 10, 30, 31}};
};

TEST_F(Moments, ComeBackBitForBit) {
  const auto base = model("base", 1);
  const auto fresh = calibrated(*base);
  write_moments(file_, fresh, *base, {"my-model", "a.txt, b.txt", 12});
  const auto stored = SafetensorsFile::open(file_);
  EXPECT_EQ(stored->metadata().at("model"), "my-model");
  EXPECT_EQ(stored->metadata().at("text"), "a.txt, b.txt");
  EXPECT_EQ(stored->metadata().at("tokens"), "12");
  // One for q and k together, one for down, with the mean sizes of each, in both layers.
  EXPECT_EQ(stored->tensors().size(), 2u * 2u * 2u);
  const auto again = read_moments(file_, *base, options_);
  ASSERT_EQ(again.size(), fresh.size());
  for (const auto& [path, moment] : fresh) {
    EXPECT_TRUE(torch::equal(moment->value(), again.at(path)->value())) << path;
    EXPECT_TRUE(torch::equal(moment->mean_sizes(), again.at(path)->mean_sizes())) << path;
    EXPECT_EQ(moment->samples(), again.at(path)->samples());
  }
  EXPECT_EQ(again.at("model.layers.0.self_attn.q_proj"), again.at("model.layers.0.self_attn.k_proj"));
  const auto one = corda_checkpoint(base, options_, fresh, kNoProgress),
             other = corda_checkpoint(base, options_, again, kNoProgress);
  for (const TensorInfo& t : one->tensors()) EXPECT_EQ(one->get(t.name).to_float(), other->get(t.name).to_float());
}

TEST_F(Moments, ServeSomeOfTheirMatrices) {
  const auto base = model("base", 1);
  const auto fresh = calibrated(*base);
  write_moments(file_, fresh, *base, {});
  // k alone: in the file it goes by the name of q.
  options_.targets = {"k_proj"};
  const auto some = read_moments(file_, *base, options_);
  ASSERT_EQ(some.size(), 2u);
  for (const auto& [path, moment] : some) EXPECT_TRUE(torch::equal(moment->value(), fresh.at(path)->value())) << path;
  options_.targets = {"up_proj"};
  EXPECT_NE(refusal(*base).find("nothing of model.layers.0.mlp.up_proj"), std::string::npos);
}

TEST_F(Moments, BelongToTheirModelInWhateverTypeItIsStored) {
  const auto base = model("base", 1, json::object(), "bf16");
  write_moments(file_, calibrated(*base), *base, {"my-model", "", 12});
  EXPECT_NE(refusal(*model("other", 2)).find("of another model (my-model), whose model.layers.0."), std::string::npos);
  EXPECT_NE(refusal(*model("wide", 1, {{"intermediate_size", 28}})).find("of another model"), std::string::npos);
  // The same numbers in another type.
  std::vector<StoredTensor> wide;
  for (const TensorInfo& t : base->tensors())
    wide.push_back({t.name, [base, name = t.name] { return as_tensor(base->get(name)); }});
  std::filesystem::create_directories(dir_ / "f32");
  write_file(dir_ / "f32" / "config.json", base->config().dump());
  write_stored(dir_ / "f32", wide, "f32");
  EXPECT_EQ(refusal(*Checkpoint::open((dir_ / "f32").string())), "");
}

TEST_F(Moments, FilesThatAreNoneAreErrors) {
  const auto base = model("base", 1);
  write_moments(file_, calibrated(*base), *base, {});
  const auto says = [&](const std::map<std::string, std::string>& metadata, float value = 0.f) {
    write_moments(file_, calibrated(*base), *base, {});
    change(metadata, value);
    return refusal(*base);
  };
  EXPECT_EQ(says({}), "");
  EXPECT_NE(says({{"format", "pt"}}).find("no second moments"), std::string::npos);
  EXPECT_NE(says({{"samples", "0"}}).find("`samples` is `0`"), std::string::npos);
  EXPECT_NE(says({{"samples", "many"}}).find("`samples` is `many`"), std::string::npos);
  EXPECT_NE(says({{"matrices", "{"}}), "");
  EXPECT_NE(says({{"matrices", "[]"}}), "");
  EXPECT_NE(says({{"matrices", R"({"model.layers.0.self_attn.q_proj": 3})"}}), "");
  EXPECT_NE(says({}, std::numeric_limits<float>::quiet_NaN()).find("holds nan at [0"), std::string::npos);
  EXPECT_NE(message_of([&] { read_moments(dir_ / "nothing", *base, options_); }), "");
  EXPECT_NE(message_of([&] { write_moments(file_, {}, *base, {}); }).find("no second moments"), std::string::npos);
}

TEST_F(Moments, AModelThatCannotBeDecomposedIsRefusedBeforeItRuns) {
  EXPECT_NE(message_of([&] {
              calibrated(*model("fused", 1, {{"model_type", "phi3"}, {"pad_token_id", 0}}));
            }).find("stores several matrices in one"),
            std::string::npos);
  samples_.clear();
  EXPECT_NE(message_of([&] { calibrated(*model("base", 1)); }).find("no calibration data"), std::string::npos);
}

}  // namespace
}  // namespace moiety
