#include "moiety/compress/compeft_model.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <map>
#include <nlohmann/json.hpp>

#include "message_of.h"
#include "moiety/base/files.h"
#include "moiety/nn/weights.h"
#include "moiety/train/run_folder.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;
namespace fs = std::filesystem;

NamedTensors tensors(uint64_t seed) {
  torch::manual_seed(seed);
  return {
      {"model.a.weight", torch::randn({6, 5})}, {"model.b.bias", torch::randn({7})}, {"model.steps", torch::arange(3)}};
}

std::shared_ptr<const Checkpoint> saved(const fs::path& folder, const NamedTensors& t,
                                        const json& config = {{"model_type", "llama"}}) {
  fs::create_directories(folder);
  write_tensors(folder / "model.safetensors", t);
  write_file(folder / "config.json", config.dump());
  return Checkpoint::open(folder.string());
}

NamedTensors added(NamedTensors t, uint64_t seed, double size = 0.1) {
  torch::manual_seed(seed);
  for (auto& [name, value] : t)
    if (value.is_floating_point()) value = value + size * torch::randn_like(value);
  return t;
}

Tensor of(const Checkpoint& c, const std::string& name) {
  return as_tensor(c.get(name)).clone();
}

struct Set {
  TemporaryFolder folder;
  NamedTensors first = tensors(1), second = added(first, 2), third = added(first, 3);
  std::shared_ptr<const Checkpoint> base = saved(folder / "base", first), one = saved(folder / "one", second),
                                    two = saved(folder / "two", third);

  std::shared_ptr<const TaskVectorFile> compressed(const Checkpoint& expert, const std::string& name,
                                                   CompeftOptions options = {}) {
    compress_expert(expert, *base, "base", options, folder / name);
    return TaskVectorFile::open(folder / name);
  }
};

TEST(CompressExpert, ComesBackAsTheBaseAndSigns) {
  Set s;
  const auto report = compress_expert(*s.one, *s.base, "./base", {}, s.folder / "one.tv");
  EXPECT_EQ(report.d, 37);
  EXPECT_EQ(report.kept, 8);  // floor(7.4) + 1
  EXPECT_EQ(report.bytes_before, 37 * 4);
  EXPECT_EQ(report.bytes, static_cast<int64_t>(fs::file_size(s.folder / "one.tv")));
  const auto file = TaskVectorFile::open(s.folder / "one.tv");
  EXPECT_EQ(file->header().notes.at("base"), "./base");
  const auto back = merged_experts(s.base, {compressed_delta(file, *s.base)}, {}, 1.0);
  int64_t changed = 0;
  for (const char* name : {"model.a.weight", "model.b.bias"}) {
    const auto off = of(*back, name) - s.first.at(name);
    const auto moved = off.abs() > 1e-7;
    changed += moved.sum().item<int64_t>();
    EXPECT_TRUE(torch::allclose(off.abs().masked_select(moved),
                                torch::full({moved.sum().item<int64_t>()}, report.scale), 1e-4));
    EXPECT_TRUE(torch::equal(off.sign().masked_select(moved),
                             (s.second.at(name) - s.first.at(name)).sign().masked_select(moved)));
  }
  EXPECT_EQ(changed, 8);
  EXPECT_TRUE(torch::equal(of(*back, "model.steps"), torch::arange(3)));
}

TEST(CompressExpert, MasksHoldTheSame) {
  Set s;
  CompeftOptions masks;
  masks.masks = true;
  const auto file = s.compressed(*s.one, "masks.tv", masks);
  EXPECT_EQ(file->header().form, "masks");
  EXPECT_EQ(file->masks(), s.compressed(*s.one, "code.tv")->masks());
}

TEST(CompressExpert, HeadsAreStoredAsTheyAre) {
  Set s;
  s.second["classifier.weight"] = torch::randn({2, 5});
  const auto expert = saved(s.folder / "headed", s.second);
  const auto file = s.compressed(*expert, "headed.tv");
  EXPECT_EQ(file->header().d, 37);
  const auto back = merged_experts(s.base, {compressed_delta(file, *s.base)}, {}, 1.0);
  EXPECT_TRUE(torch::equal(of(*back, "classifier.weight"), s.second.at("classifier.weight")));
  // Heads of several experts are none of the merged model.
  const auto both = merged_experts(
      s.base, {compressed_delta(file, *s.base), compressed_delta(s.compressed(*s.two, "two.tv"), *s.base)}, {}, 1.0);
  EXPECT_FALSE(both->has("classifier.weight"));
  // In place of a head that the base has.
  s.first["classifier.weight"] = torch::zeros({3, 5});
  const auto headed = saved(s.folder / "headed-base", s.first);
  const auto other = merged_experts(headed, {compressed_delta(file, *headed)}, {}, 1.0);
  EXPECT_TRUE(torch::equal(of(*other, "classifier.weight"), s.second.at("classifier.weight")));
}

TEST(CompressExpert, TiedTensorsAreOne) {
  const TemporaryFolder folder;
  torch::manual_seed(5);
  const auto embedding = torch::randn({4, 3});
  const json config = {{"model_type", "llama"}, {"tie_word_embeddings", true}};
  NamedTensors first = {{"model.embed_tokens.weight", embedding}, {"lm_head.weight", embedding.clone()}};
  NamedTensors second = first;
  for (auto& [name, t] : second) t = t + torch::arange(12).view({4, 3}).to(torch::kFloat32);
  const auto base = saved(folder / "base", first, config), expert = saved(folder / "expert", second, config);
  CompeftOptions options;
  options.config.density = 1.0;
  EXPECT_EQ(compress_expert(*expert, *base, "base", options, folder / "x.tv").d, 12);
  const auto file = TaskVectorFile::open(folder / "x.tv");
  EXPECT_EQ(file->header().aliases.at("lm_head.weight"), "model.embed_tokens.weight");
  const auto back = merged_experts(base, {compressed_delta(file, *base)}, {}, 1.0);
  for (const char* name : {"model.embed_tokens.weight", "lm_head.weight"})
    EXPECT_TRUE(torch::allclose(of(*back, name), second.at(name), 1e-6, 1e-6)) << name;
}

TEST(CompressExpert, BadInputIsAnError) {
  Set s;
  const auto says = [&](NamedTensors t, const std::string& name, CompeftOptions o = {}) {
    const auto expert = saved(s.folder / name, t);
    return message_of([&] { compress_expert(*expert, *s.base, "base", o, s.folder / "x.tv"); });
  };
  auto other = s.second;
  other["model.steps"] = torch::arange(1, 4);
  EXPECT_NE(says(other, "integers").find("'model.steps' holds integers"), std::string::npos);
  other = s.second;
  other["model.c"] = torch::ones({1});
  EXPECT_NE(says(other, "more").find("'model.c' is not in the base"), std::string::npos);
  other = s.second;
  other["model.b.bias"] = s.second.at("model.b.bias").clone();
  other["model.b.bias"][2] = NAN;
  EXPECT_NE(says(other, "nan").find("'model.b.bias' holds NaN at index 2"), std::string::npos);
  CompeftOptions o;
  o.exclude = {"("};
  EXPECT_NE(says(s.second, "pattern", o), "");
  EXPECT_FALSE(fs::exists(s.folder / "x.tv"));
  o = {};
  o.dry_run = true;
  EXPECT_EQ(says(s.second, "dry", o), "");
  EXPECT_FALSE(fs::exists(s.folder / "x.tv"));
}

TEST(MergedExperts, FollowTheirDefinitions) {
  Set s;
  const auto a = s.compressed(*s.one, "one.tv"), b = s.compressed(*s.two, "two.tv");
  const auto taus = torch::stack({load_task_vector(*a).expand(), load_task_vector(*b).expand()});
  for (const TaskMergeConfig& config : {TaskMergeConfig{"task-arithmetic", "dis-mean"},
                                        TaskMergeConfig{"ties", "dis-mean"}, TaskMergeConfig{"ties", "dis-max"}}) {
    const auto merged =
        merged_experts(s.base, {compressed_delta(a, *s.base), compressed_delta(b, *s.base)}, config, 0.7);
    const auto want = 0.7 * merge_task_vectors(taus, config);
    EXPECT_TRUE(torch::allclose(of(*merged, "model.a.weight").flatten() - s.first.at("model.a.weight").flatten(),
                                want.slice(0, 0, 30), 1e-4, 1e-6))
        << config.method;
    EXPECT_TRUE(
        torch::allclose(of(*merged, "model.b.bias") - s.first.at("model.b.bias"), want.slice(0, 30, 37), 1e-4, 1e-6))
        << config.method;
  }
}

TEST(MergedExperts, WholeModelsAverage) {
  Set s;
  const auto merged = merged_experts(s.base, {model_delta(s.one, s.base), model_delta(s.two, s.base)}, {}, 0.5);
  EXPECT_TRUE(torch::allclose(of(*merged, "model.a.weight"),
                              (s.second.at("model.a.weight") + s.third.at("model.a.weight")) / 2.0, 1e-5, 1e-6));
}

TEST(MergedExperts, WholeModelsAreTrimmedOverAllTensors) {
  Set s;
  const auto merged = merged_experts(s.base, {model_delta(s.one, s.base, 0.3)}, {}, 1.0);
  int64_t changed = 0;
  for (const char* name : {"model.a.weight", "model.b.bias"}) {
    const auto moved = (of(*merged, name) - s.first.at(name)).abs() > 1e-7;
    changed += moved.sum().item<int64_t>();
    EXPECT_TRUE(torch::allclose(of(*merged, name).masked_select(moved), s.second.at(name).masked_select(moved), 1e-5));
  }
  EXPECT_EQ(changed, 12);  // floor(11.1) + 1
}

TEST(DroppedDelta, KeepsSomeEntriesLargerAndTheSameEveryTime) {
  Set s;
  const auto whole = model_delta(s.one, s.base), dropped = dropped_delta(whole, 0.6, 3);
  const auto all = whole->get("model.a.weight"), some = dropped->get("model.a.weight");
  const auto kept = some != 0;
  const int64_t left = kept.sum().item<int64_t>();
  EXPECT_GT(left, 2);  // of 30, 12 expected
  EXPECT_LT(left, 24);
  EXPECT_TRUE(torch::allclose(some.masked_select(kept), all.masked_select(kept) / 0.4, 1e-6));
  EXPECT_TRUE(torch::equal(some, dropped->get("model.a.weight")));
  EXPECT_FALSE(torch::equal(some, dropped_delta(whole, 0.6, 4)->get("model.a.weight")));
  EXPECT_TRUE(torch::equal(dropped_delta(whole, 0.0, 3)->get("model.a.weight"), all));
  EXPECT_THROW(dropped_delta(whole, 1.0, 3), Error);
}

TEST(MergedExperts, BadInputIsAnError) {
  Set s;
  EXPECT_NE(message_of([&] { merged_experts(s.base, {}, {}, 1.0); }).find("no expert"), std::string::npos);
  const auto file = s.compressed(*s.one, "one.tv");
  NamedTensors other = {{"model.a.weight", torch::zeros({5, 6})}};
  const auto base = saved(s.folder / "other", other);
  EXPECT_NE(message_of([&] { compressed_delta(file, *base); }).find("made for another base: 2 of its tensors"),
            std::string::npos);
  EXPECT_NE(message_of([&] { model_delta(s.one, base); }).find("model.a.weight"), std::string::npos);
}

// ---- Adapters ----

constexpr const char* kA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
constexpr const char* kB = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";

fs::path adapter(const fs::path& folder, uint64_t seed, const json& more = json::object(), NamedTensors other = {}) {
  torch::manual_seed(seed);
  json config = {{"peft_type", "LORA"}, {"r", 2}, {"lora_alpha", 4}, {"base_model_name_or_path", "somewhere"}};
  config.update(more);
  other[kA] = torch::randn({2, 6});
  other[kB] = torch::randn({5, 2});
  fs::create_directories(folder);
  write_tensors(folder / "adapter_model.safetensors", other);
  write_file(folder / "adapter_config.json", config.dump());
  return folder;
}

TEST(CompressAdapter, TakesItsMatricesAsTheyAre) {
  const TemporaryFolder folder;
  const auto head = torch::randn({3});
  const auto path = adapter(folder / "one", 1, json::object(), {{"base_model.model.classifier.bias", head}});
  const auto report = compress_adapter(path, {}, folder / "one.tv");
  EXPECT_EQ(report.kind, "lora");
  EXPECT_EQ(report.d, 22);
  EXPECT_EQ(report.kept, 5);
  const auto file = TaskVectorFile::open(folder / "one.tv");
  merge_adapters({file}, {}, 1.0, "./base", folder / "back");
  const auto back = read_tensors(folder / "back/adapter_model.safetensors");
  const auto before = read_tensors(path / "adapter_model.safetensors");
  EXPECT_TRUE(torch::equal(back.at("base_model.model.classifier.bias"), head));
  int64_t kept = 0;
  for (const char* name : {kA, kB}) {
    const auto sign = back.at(name).sign();
    kept += sign.count_nonzero().item<int64_t>();
    EXPECT_TRUE(torch::equal(sign, before.at(name).sign() * sign.abs()));
    EXPECT_NEAR(back.at(name).abs().max().item<double>(), report.scale, 1e-6);
  }
  EXPECT_EQ(kept, 5);
  const json config = parse_json(read_text(folder / "back/adapter_config.json"), "config");
  EXPECT_EQ(config.at("lora_alpha"), 4);
  EXPECT_EQ(config.at("base_model_name_or_path"), "./base");
}

TEST(CompressAdapter, Ia3BeginsAtOne) {
  const TemporaryFolder folder;
  CompeftOptions whole;
  whole.config.density = 1.0;
  const auto path = adapter(folder / "one", 2, {{"peft_type", "IA3"}});
  EXPECT_EQ(compress_adapter(path, whole, folder / "one.tv").kind, "ia3");
  merge_adapters({TaskVectorFile::open(folder / "one.tv")}, {}, 0.0, "base", folder / "none");
  EXPECT_TRUE(torch::equal(read_tensors(folder / "none/adapter_model.safetensors").at(kA), torch::ones({2, 6})));
  merge_adapters({TaskVectorFile::open(folder / "one.tv")}, {}, 1.0, "base", folder / "same");
  EXPECT_TRUE(torch::allclose(read_tensors(folder / "same/adapter_model.safetensors").at(kA),
                              read_tensors(path / "adapter_model.safetensors").at(kA), 1e-6, 1e-6));
}

TEST(MergeAdapters, AddsWhatIsOfOneShapeAndSetting) {
  const TemporaryFolder folder;
  std::vector<std::shared_ptr<const TaskVectorFile>> files;
  Tensor sum = torch::zeros({22});
  for (const uint64_t seed : {1, 2}) {
    const auto name = fmt::format("{}", seed);
    compress_adapter(adapter(folder / name, seed), {}, folder / (name + ".tv"));
    files.push_back(TaskVectorFile::open(folder / (name + ".tv")));
    sum = sum + load_task_vector(*files.back()).expand();
  }
  merge_adapters(files, {}, 0.5, "base", folder / "both");
  const auto both = read_tensors(folder / "both/adapter_model.safetensors");
  EXPECT_TRUE(torch::allclose(torch::cat({both.at(kA).flatten(), both.at(kB).flatten()}), 0.5 * sum));
  compress_adapter(adapter(folder / "x", 3, {{"lora_alpha", 8}}), {}, folder / "x.tv");
  const auto says = message_of([&] {
    merge_adapters({files[0], TaskVectorFile::open(folder / "x.tv")}, {}, 1.0, "base", folder / "no");
  });
  EXPECT_NE(says.find("`lora_alpha` differs"), std::string::npos) << says;
  EXPECT_FALSE(fs::exists(folder / "no"));
}

TEST(MergeAdapters, AFileHasToBeWorthItsEntries) {
  const TemporaryFolder folder;
  TaskVectorHeader h;
  h.kind = "lora";
  h.entries = {{"a", {10000000}, 0, 0}};
  h.notes["adapter_config"] = "{}";
  write_task_vector(folder / "x.tv", h, TernaryMasks(10000000));
  const auto says =
      message_of([&] { merge_adapters({TaskVectorFile::open(folder / "x.tv")}, {}, 1.0, "base", folder / "no"); });
  EXPECT_NE(says.find("10000000 entries cannot be what a file of"), std::string::npos) << says;
}

TEST(CompressAdapter, BadInputIsAnError) {
  const TemporaryFolder folder;
  EXPECT_NE(message_of([&] {
              compress_adapter(adapter(folder / "one", 1, {{"peft_type", "LOHA"}}), {}, folder / "x.tv");
            }).find("of the type LOHA"),
            std::string::npos);
  EXPECT_THROW(compress_adapter(folder / "absent", {}, folder / "x.tv"), Error);
  compress_adapter(adapter(folder / "two", 1), {}, folder / "two.tv");
  const auto base = saved(folder / "base", tensors(1));
  EXPECT_NE(message_of([&] {
              compressed_delta(TaskVectorFile::open(folder / "two.tv"), *base);
            }).find("adapters are merged with adapters"),
            std::string::npos);
}

}  // namespace
}  // namespace moiety
