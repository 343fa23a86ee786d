#include "moiety/io/peft.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "message_of.h"
#include "moiety/base/files.h"
#include "moiety/io/overlay.h"

namespace moiety {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using Shape = std::vector<int64_t>;

/// A base of which only the config and the names of tensors matter.
class Outline : public Checkpoint {
 public:
  explicit Outline(json config, const std::vector<std::string>& names = {"model.embed_tokens.weight"})
      : config_(std::move(config)) {
    for (const auto& name : names) infos_.push_back({name, Format::F32, {1}});
  }
  const json& config() const override { return config_; }
  const json& generation_config() const override { return none_; }
  const std::vector<TensorInfo>& tensors() const override { return infos_; }
  bool has(const std::string& name) const override {
    for (const auto& t : infos_)
      if (t.name == name) return true;
    return false;
  }
  TensorView get(const std::string& name) const override { fail("nobody asks for {}", name); }
  fs::path path() const override { return "outline"; }
  int64_t bytes_on_disk() const override { return 0; }

 protected:
  json config_, none_ = json::object();
  std::vector<TensorInfo> infos_;
};

json llama() {
  return {{"model_type", "llama"}, {"hidden_size", 8},         {"num_hidden_layers", 2}, {"num_attention_heads", 2},
          {"head_dim", 4},         {"num_key_value_heads", 1}, {"intermediate_size", 6}};
}

struct Stored {
  std::string name;
  Shape shape;
};

// Values 0, 1, 2, ... in every tensor.
void write_tensors(const fs::path& folder, const std::vector<Stored>& tensors) {
  std::vector<TensorInfo> infos;
  for (const auto& t : tensors) infos.push_back({t.name, Format::F32, t.shape});
  SafetensorsWriter writer(folder / "adapter_model.safetensors", infos);
  for (const auto& t : infos) {
    std::vector<float> values(static_cast<size_t>(t.elements()));
    std::iota(values.begin(), values.end(), 0.f);
    writer.write(t.name, std::as_bytes(std::span(values)));
  }
  writer.finish();
}

constexpr const char* kQ = "base_model.model.model.layers.0.self_attn.q_proj";

class Peft : public testing::Test {
 protected:
  fs::path folder(const std::string& name = "adapter") const {
    fs::create_directories(dir_ / name);
    return dir_ / name;
  }
  fs::path write(const json& config, const std::vector<Stored>& tensors, const std::string& name = "adapter") const {
    write_file(folder(name) / "adapter_config.json", config.dump());
    write_tensors(folder(name), tensors);
    return folder(name);
  }
  // A good adapter of rank 2 at q_proj of layer 0, with other settings and tensors.
  fs::path one(const json& more = json::object(), const std::vector<Stored>& besides = {},
               const std::string& name = "adapter") const {
    json config = {{"peft_type", "LORA"}, {"r", 2}, {"lora_alpha", 8}};
    if (!more.is_null()) config.update(more);
    std::vector<Stored> tensors = {{std::string(kQ) + ".lora_A.weight", {2, 8}},
                                   {std::string(kQ) + ".lora_B.weight", {8, 2}}};
    tensors.insert(tensors.end(), besides.begin(), besides.end());
    return write(config, tensors, name);
  }
  static std::string refusal(const fs::path& folder) {
    return message_of([&] { PeftAdapter::open(folder); });
  }
  static std::string refusal(const fs::path& folder, const json& config) {
    return message_of([&] { with_adapters(std::make_shared<Outline>(config), {{folder, 1.0}}); });
  }
  TemporaryFolder dir_;
};

#define EXPECT_SAYS(message, words) EXPECT_NE((message).find(words), std::string::npos) << (message)

TEST_F(Peft, ReadsWhatIsStored) {
  const auto adapter = PeftAdapter::open(one());
  ASSERT_EQ(adapter->matrices().size(), 1u);
  const auto* m = adapter->find("model.layers.0.self_attn.q_proj");
  ASSERT_NE(m, nullptr);
  EXPECT_EQ(m->rank, 2);
  EXPECT_DOUBLE_EQ(m->scale, 4.0);
  EXPECT_EQ(m->a.shape, (Shape{2, 8}));
  EXPECT_EQ(m->b.to_float()[3], 3.f);
  EXPECT_FALSE(adapter->dora());
  EXPECT_EQ(adapter->find("q_proj"), nullptr);
}

TEST_F(Peft, ScaleOfRankStabilizedLora) {
  EXPECT_DOUBLE_EQ(PeftAdapter::open(one({{"use_rslora", true}}))->matrices()[0].scale, 8.0 / std::sqrt(2.0));
}

TEST_F(Peft, PatternsMeanWholePathsOrWhatFollowsADot) {
  const std::string path = "model.layers.1.self_attn.q_proj";
  for (const char* yes : {"q_proj", "self_attn.q_proj", "layers\\.1\\.self_attn\\.q_proj", ".*q_proj", "[qk]_proj",
                          "model.layers.1.self_attn.q_proj", "layers.(0|1).self_attn.q_proj", "layersX?.1.*"})
    EXPECT_TRUE(means_path(yes, path, "test")) << yes;
  for (const char* no :
       {"proj", "_proj", "q_pro", "layers.1", "layers\\.11\\.self_attn\\.q_proj", "self_attn\\.q.proj ", "attn.q_proj",
        "xmodel.layers.1.self_attn.q_proj", "k_proj|proj", "self_attn\\.q\\.proj"})
    EXPECT_FALSE(means_path(no, path, "test")) << no;
  EXPECT_SAYS(message_of([&] { means_path("(", path, "rank_pattern"); }), "rank_pattern");
}

TEST_F(Peft, APatternThatNeverEndsIsAnError) {
  const std::string path = "q_proj" + std::string(200, 'a');
  EXPECT_SAYS(message_of([&] { means_path("q_proj(a|a|aa)*[bc]", path, "rank_pattern"); }), "rank_pattern");
}

TEST_F(Peft, TheFirstPatternOfTheFileCounts) {
  // In the order of the file, not of the alphabet.
  for (const auto& [patterns, scale] : {std::pair{R"({"q_proj": 6, "layers.0.self_attn.q_proj": 4})", 3.0},
                                        std::pair{R"({"layers.0.self_attn.q_proj": 4, "q_proj": 6})", 2.0}}) {
    const auto at = one();
    write_file(at / "adapter_config.json",
               std::string(R"({"r": 2, "lora_alpha": 1, "alpha_pattern": )") + patterns + "}");
    EXPECT_DOUBLE_EQ(PeftAdapter::open(at)->matrices()[0].scale, scale);
  }
}

TEST_F(Peft, RefusesWhatIsNoAdapter) {
  EXPECT_SAYS(refusal(dir_ / "nothing"), "not an adapter");
  EXPECT_FALSE(is_adapter(dir_ / "nothing"));
  write_file(folder("list") / "adapter_config.json", "[]");
  EXPECT_SAYS(refusal(folder("list")), "JSON object");
  write_file(folder("cut") / "adapter_config.json", "{\"r\": ");
  EXPECT_SAYS(refusal(folder("cut")), "adapter_config.json");
  write_file(folder("bare") / "adapter_config.json", "{}");
  EXPECT_SAYS(refusal(folder("bare")), "no adapter_model.safetensors");
  write_file(folder("bare") / "adapter_model.bin", "x");
  EXPECT_SAYS(refusal(folder("bare")), "pickle");
  EXPECT_SAYS(refusal(write(json::object(), {}, "empty")), "no tensors");
  EXPECT_TRUE(is_adapter(folder("empty")));
  write_file(folder("empty") / "config.json", "{}");
  EXPECT_FALSE(is_adapter(folder("empty")));
}

TEST_F(Peft, RefusesOtherKindsOfAdapters) {
  EXPECT_SAYS(refusal(one({{"peft_type", "LOHA"}})), "type LOHA");
  EXPECT_SAYS(refusal(one({{"peft_type", 3}})), "type must be string");
  for (const auto& [key, value] : {std::pair<const char*, json>{"modules_to_save", {"lm_head"}},
                                   {"layer_replication", json::array({{0, 1}})},
                                   {"trainable_token_indices", {1}},
                                   {"use_qalora", true},
                                   {"fan_in_fan_out", true},
                                   {"lora_bias", true}})
    EXPECT_SAYS(refusal(one({{key, value}})), std::string("`") + key + "`");
  // Off is as good as absent.
  EXPECT_EQ(
      refusal(one({{"modules_to_save", nullptr}, {"fan_in_fan_out", false}, {"layer_replication", json::array()}})),
      "");
}

TEST_F(Peft, RefusesAnAdapterOfAChangedBase) {
  for (const char* init : {"pissa", "pissa_niter_4", "corda", "olora", "loftq"})
    EXPECT_SAYS(refusal(one({{"init_lora_weights", init}})), "path_initial_model_for_weight_conversion");
  for (const json& init : {json(true), json(false), json("gaussian"), json("eva")})
    EXPECT_EQ(refusal(one({{"init_lora_weights", init}})), "");
}

TEST_F(Peft, RefusesTensorsThatItDoesNotKnow) {
  EXPECT_SAYS(refusal(one({}, {{"base_model.model.lm_head.weight", {2}}})), "'base_model.model.lm_head.weight'");
  EXPECT_SAYS(refusal(one({}, {{std::string(kQ) + ".lora_embedding_A", {2, 8}}})), "lora_embedding_A");
  EXPECT_SAYS(refusal(one({}, {{"base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight", {2, 8}}})),
              "needs matrices lora_A and lora_B");
  EXPECT_SAYS(refusal(one({}, {{std::string(600, 'x') + ".lora_A.weight", {2, 8}}})), "614 bytes");
}

TEST_F(Peft, RefusesNumbersThatAreNotFinite) {
  const auto put = [](const fs::path& at, const std::string& name, float value) {
    SafetensorsWriter writer(at / "adapter_model.safetensors", {{name, Format::F32, {2, 8}}});
    std::vector<float> values(16, 1.f);
    values[11] = value;
    writer.write(name, std::as_bytes(std::span(values)));
    writer.finish();
  };
  // PEFT's layout and our own.
  const auto peft = one();
  const std::string name = std::string(kQ) + ".lora_A.weight";
  put(peft, name, NAN);
  EXPECT_SAYS(refusal(peft), "'" + name + "' holds nan at [1, 3]");
  const auto own = folder("own");
  write_file(own / "adapter_config.json",
             R"({"peft_type": "MOIETY", "moiety": {"parts": [{"slug": "mola", "target": "q_proj"}]}})");
  put(own, "layers.0.adapters.q_proj.lora_A", -INFINITY);
  EXPECT_SAYS(refusal(own, llama()), "'layers.0.adapters.q_proj.lora_A' holds -inf at [1, 3]");
}

TEST_F(Peft, WritesNoNumbersThatAreNotFinite) {
  AdapterTensor t{"model.layers.0.adapters.q_proj.lora_A", {1, 8}, std::vector<float>(8, 1.f)};
  t.values[6] = INFINITY;
  const auto at = dir_ / "none";
  EXPECT_SAYS(message_of([&] {
                write_adapter(at, json::array({{{"slug", "lora"}, {"rank", 1}}}), {t}, Outline(llama()), "base");
              }),
              "'model.layers.0.adapters.q_proj.lora_A' holds inf at [0, 6]");
  EXPECT_FALSE(fs::exists(at));
}

TEST_F(Peft, RefusesSizesThatDoNotFit) {
  const std::string q = kQ;
  const auto two = [&](const json& config, const Shape& a, const Shape& b) {
    return refusal(write(config, {{q + ".lora_A.weight", a}, {q + ".lora_B.weight", b}}));
  };
  EXPECT_SAYS(two({{"r", 2}}, {2, 8}, {8, 3}), "lora_A has rank 2, lora_B 3");
  EXPECT_SAYS(two({{"r", 4}}, {2, 8}, {8, 2}), "2 rows of lora_A, and the config says rank 4");
  EXPECT_SAYS(two({{"r", 2}}, {2, 8, 1}, {8, 2}), "needs matrices");
  EXPECT_SAYS(two({{"r", 2}, {"rank_pattern", {{"q_proj", 3}}}}, {2, 8}, {8, 2}), "rank 3");
  EXPECT_SAYS(two({{"r", 2}, {"rank_pattern", {{"q_proj", "two"}}}}, {2, 8}, {8, 2}), "is no number");
  EXPECT_SAYS(two({{"r", 2}, {"alpha_pattern", {{"(", 3}}}}, {2, 8}, {8, 2}), "alpha_pattern");
  EXPECT_SAYS(two({{"r", 0}}, {2, 8}, {8, 2}), "rank of 0");
  EXPECT_SAYS(two({{"r", 1.5}}, {2, 8}, {8, 2}), "rank of 1.5");
  EXPECT_SAYS(two({{"r", "two"}}, {2, 8}, {8, 2}), "numbers");
  EXPECT_SAYS(refusal(one({}, {{q + ".lora_magnitude_vector", {5}}})), "5 magnitudes for 8 rows");
}

TEST_F(Peft, RefusesAnAdapterOfAnotherModel) {
  const auto at = [&](const std::string& path) {
    return write({{"r", 2}}, {{"base_model.model." + path + ".lora_A.weight", {2, 8}},
                              {"base_model.model." + path + ".lora_B.weight", {8, 2}}});
  };
  EXPECT_SAYS(refusal(at("model.layers.2.self_attn.q_proj"), llama()), "which has 2 layers");
  EXPECT_SAYS(refusal(at("model.layers.2.mlp.experts"), llama()), "no layer of this model");
  EXPECT_SAYS(refusal(at("lm_head"), llama()), "lm_head is no matrix");
  EXPECT_SAYS(refusal(at("model.layers.0.self_attn.qkv_proj"), llama()), "has 8 rows, and 16 were expected");
}

TEST_F(Peft, RefusesHalfADora) {
  const auto folder = one({}, {{std::string(kQ) + ".lora_magnitude_vector", {8}},
                               {"base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight", {2, 8}},
                               {"base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight", {8, 2}}});
  EXPECT_TRUE(PeftAdapter::open(folder)->dora());
  EXPECT_SAYS(refusal(folder, llama()), "some matrices have magnitudes");
}

TEST_F(Peft, BecomesAPartOfTheModel) {
  const auto model = with_adapters(std::make_shared<Outline>(llama()), {{one(), 0.5}});
  const auto& parts = model->config().at("moiety").at("parts");
  ASSERT_EQ(parts.size(), 1u);
  EXPECT_EQ(parts[0]["slug"], "lora");
  EXPECT_EQ(parts[0]["rank"], 2);
  EXPECT_EQ(parts[0]["alpha"], 8.0);
  EXPECT_EQ(parts[0]["strength"], 0.5);
  EXPECT_EQ(parts[0]["target"], json::array({"q_proj"}));
  EXPECT_EQ(parts[0]["layers"], json::array({0}));
  EXPECT_EQ(parts[0].count("name"), 0u);
  EXPECT_EQ(model->get("model.layers.0.adapters.q_proj.lora_A").shape, (Shape{2, 8}));
  EXPECT_EQ(model->tensors().size(), 3u);
}

TEST_F(Peft, RanksThatDifferBecomePatterns) {
  const auto folder = one({{"rank_pattern", {{"v_proj", 3}}}, {"alpha_pattern", {{"v_proj", 1}}}},
                          {{"base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight", {3, 8}},
                           {"base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight", {4, 3}},
                           {"base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight", {2, 8}},
                           {"base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight", {8, 2}}});
  const auto part = with_adapters(std::make_shared<Outline>(llama()), {{folder, 1.0}})->config()["moiety"]["parts"][0];
  const std::string v = "model\\.layers\\.1\\.self_attn\\.v_proj";
  EXPECT_EQ(part["rank_pattern"], json({{v, 3}}));
  EXPECT_EQ(part["alpha_pattern"], json({{v, 1.0}}));
  // v_proj stands in layer 1 alone: targets are paths.
  EXPECT_EQ(part["target"].size(), 3u);
}

TEST_F(Peft, SeveralAreCalledByTheirFolders) {
  fs::create_directories(dir_ / "other");
  const std::string longest(90, 'n');
  const auto a = one({}, {}, "law"), b = one({}, {}, "other/law"), c = one({}, {}, "my model.v2"),
             d = one({}, {}, longest);
  const auto model = with_adapters(std::make_shared<Outline>(llama()), {{a, 1.0}, {b, 1.0}, {c, 1.0}, {d, 1.0}});
  std::vector<std::string> names;
  for (const auto& part : model->config()["moiety"]["parts"]) names.push_back(part["name"]);
  EXPECT_EQ(names, (std::vector<std::string>{"law", "law-2", "my_model_v2", std::string(64, 'n')}));
  EXPECT_TRUE(model->has("model.layers.0.adapters.law-2.q_proj.lora_B"));
}

TEST_F(Peft, ANameOfTheBaseIsNotTakenTwice) {
  auto config = llama();
  config["moiety"]["parts"] = json::array({{{"slug", "lora"}, {"name", "law"}, {"target", "q_proj"}}});
  const auto model = with_adapters(std::make_shared<Outline>(config), {{one({}, {}, "law"), 1.0}});
  EXPECT_EQ(model->config()["moiety"]["parts"][1]["name"], "law-2");
}

TEST_F(Peft, FusedMatricesAreTakenApart) {
  const std::string at = "base_model.model.model.layers.1.";
  const auto folder = write({{"r", 2}}, {{at + "self_attn.qkv_proj.lora_A.weight", {2, 8}},
                                         {at + "self_attn.qkv_proj.lora_B.weight", {16, 2}},
                                         {at + "mlp.gate_up_proj.lora_A.weight", {2, 8}},
                                         {at + "mlp.gate_up_proj.lora_B.weight", {12, 2}}});
  const auto model = with_adapters(std::make_shared<Outline>(llama()), {{folder, 1.0}});
  const auto b = [&](const std::string& name) { return model->get("model.layers.1.adapters." + name + ".lora_B"); };
  // Rows 8 to 11 are those of k.
  EXPECT_EQ(b("q_proj").shape, (Shape{8, 2}));
  EXPECT_EQ(b("k_proj").to_float(), (std::vector<float>{16, 17, 18, 19, 20, 21, 22, 23}));
  EXPECT_EQ(b("v_proj").to_float()[0], 24.f);
  EXPECT_EQ(b("up_proj").to_float()[0], 12.f);
  EXPECT_EQ(model->get("model.layers.1.adapters.k_proj.lora_A").to_float(),
            model->get("model.layers.1.adapters.q_proj.lora_A").to_float());
}

TEST_F(Peft, RowsFollowTheFileWhoseRotaryPairsAreNeighbours) {
  auto config = llama();
  config["moiety_rope_interleaved"] = true;
  const auto folder = one({{"r", 1}}, {});
  write_tensors(folder, {{std::string(kQ) + ".lora_A.weight", {1, 8}}, {std::string(kQ) + ".lora_B.weight", {8, 1}}});
  const auto model = with_adapters(std::make_shared<Outline>(config), {{folder, 1.0}});
  // Heads of 4: rows 0, 2 and 1, 3 become neighbours.
  EXPECT_EQ(model->get("model.layers.0.adapters.q_proj.lora_B").to_float(),
            (std::vector<float>{0, 2, 1, 3, 4, 6, 5, 7}));
}

TEST_F(Peft, RefusesRowsThatAreNoHeads) {
  auto config = llama();
  config["moiety_rope_interleaved"] = true;
  const auto folder =
      write({{"r", 2}}, {{std::string(kQ) + ".lora_A.weight", {2, 8}}, {std::string(kQ) + ".lora_B.weight", {7, 2}}});
  EXPECT_SAYS(refusal(folder, config), "7 rows, which are no heads of 4");
  config.erase("head_dim");
  config.erase("hidden_size");
  EXPECT_SAYS(refusal(folder, config), "no heads of 0");
}

json mixtral(int64_t width) {
  auto config = llama();
  config.update({{"model_type", "mixtral"}, {"num_local_experts", 3}, {"intermediate_size", width}});
  return config;
}

// Gate and up of three experts with rank 2, B [12, 2 * 3] with the rank slowest.
TEST_F(Peft, MatricesOfExpertsAreSorted) {
  const std::string at = "base_model.model.model.layers.0.mlp.experts";
  const auto folder = write({{"r", 2}}, {{at + ".base_layer.lora_A.weight", {6, 8}},
                                         {at + ".base_layer.lora_B.weight", {12, 6}},
                                         {at + ".lora_A.weight", {6, 6}},
                                         {at + ".lora_B.weight", {8, 6}}});
  const auto model = with_adapters(std::make_shared<Outline>(mixtral(6)), {{folder, 1.0}});
  const auto get = [&](const std::string& name) { return model->get("model.layers.0.adapters.experts." + name); };
  EXPECT_EQ(get("gate_up_proj.lora_A").shape, (Shape{3, 2, 8}));
  EXPECT_EQ(get("down_proj.lora_B").shape, (Shape{3, 8, 2}));
  // Row o of expert e and rank i stands at [o, i * 3 + e].
  const auto up = get("gate_up_proj.lora_B_up");
  EXPECT_EQ(up.shape, (Shape{3, 6, 2}));
  for (int64_t e = 0; e < 3; ++e)
    for (int64_t o = 0; o < 6; ++o)
      for (int64_t i = 0; i < 2; ++i)
        ASSERT_EQ(up.to_float()[static_cast<size_t>((e * 6 + o) * 2 + i)], static_cast<float>((6 + o) * 6 + i * 3 + e));
  EXPECT_EQ(get("gate_up_proj.lora_A").to_float()[0], 0.f);
}

TEST_F(Peft, ExpertsAsWideAsTheModelAreToldApartByTheirRows) {
  const std::string at = "base_model.model.model.layers.0.mlp.experts";
  const auto folder = write({{"r", 2}}, {{at + ".lora_A.weight", {6, 8}}, {at + ".lora_B.weight", {8, 6}}});
  const auto down = with_adapters(std::make_shared<Outline>(mixtral(8)), {{folder, 1.0}}),
             both = with_adapters(std::make_shared<Outline>(mixtral(4)), {{folder, 1.0}});
  EXPECT_TRUE(down->has("model.layers.0.adapters.experts.down_proj.lora_B"));
  EXPECT_TRUE(both->has("model.layers.0.adapters.experts.gate_up_proj.lora_B_gate"));
}

// ---- Writing ----

AdapterTensor tensor(const std::string& name, const Shape& shape) {
  AdapterTensor t{name, shape, {}};
  t.values.resize(static_cast<size_t>(std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>())));
  std::iota(t.values.begin(), t.values.end(), 1.f);
  return t;
}

const std::vector<std::string>& dense_names() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> out = {"model.embed_tokens.weight"};
    for (const char* l : {"0", "1"})
      for (const char* m : {"self_attn.q_proj", "mlp.down_proj"})
        out.push_back(std::string("model.layers.") + l + "." + m + ".weight");
    return out;
  }();
  return names;
}

TEST_F(Peft, WritesWhatItReads) {
  std::vector<AdapterTensor> tensors;
  for (const char* l : {"0", "1"}) {
    const std::string at = std::string("model.layers.") + l + ".adapters.";
    tensors.push_back(tensor(at + "q_proj.lora_A", {3, 8}));
    tensors.push_back(tensor(at + "q_proj.lora_B", {8, 3}));
    tensors.push_back(tensor(at + "q_proj.magnitude", {8}));
    tensors.push_back(tensor(at + "down_proj.lora_A", {2, 6}));
    tensors.push_back(tensor(at + "down_proj.lora_B", {8, 2}));
    tensors.push_back(tensor(at + "down_proj.magnitude", {8}));
  }
  const json parts = json::array({{{"slug", "lora"},
                                   {"target", {"q_proj", "down_proj"}},
                                   {"rank", 3},
                                   {"alpha", 4.5},
                                   {"dora", true},
                                   {"strength", 2.0},
                                   {"rank_pattern", {{"down_proj", 2}}}}});
  for (const bool turned : {false, true}) {
    auto config = llama();
    if (turned) config["moiety_rope_interleaved"] = true;
    const auto base = std::make_shared<Outline>(config, dense_names());
    EXPECT_TRUE(write_adapter(folder(), parts, tensors, *base, "the/base"));
    const auto adapter = PeftAdapter::open(folder());
    EXPECT_EQ(adapter->config()["base_model_name_or_path"], "the/base");
    EXPECT_EQ(adapter->config()["lora_alpha"], 9);
    EXPECT_EQ(adapter->config()["target_modules"], json({"down_proj", "q_proj"}));
    EXPECT_EQ(adapter->matrices().size(), 4u);
    EXPECT_TRUE(adapter->dora());
    const auto again = with_adapters(base, {{folder(), 1.0}});
    for (const auto& t : tensors) {
      EXPECT_EQ(again->get(t.name).shape, t.shape) << t.name;
      EXPECT_EQ(again->get(t.name).to_float(), t.values) << t.name << turned;
    }
  }
}

TEST_F(Peft, WritesRowsInTheOrderOfHuggingFace) {
  auto config = llama();
  config["moiety_rope_interleaved"] = true;
  const Outline base(config, dense_names());
  std::vector<AdapterTensor> tensors = {tensor("model.layers.0.adapters.q_proj.lora_A", {1, 8}),
                                        tensor("model.layers.0.adapters.q_proj.lora_B", {8, 1})};
  write_adapter(folder(), json::array({{{"slug", "lora"}, {"rank", 1}, {"layers", 0}}}), tensors, base, "base");
  EXPECT_EQ(PeftAdapter::open(folder())->matrices()[0].b.to_float(), (std::vector<float>{1, 3, 2, 4, 5, 7, 6, 8}));
}

TEST_F(Peft, LayersThatAreLeftOutAreLeftOutOfTheTargets) {
  const Outline base(llama(), dense_names());
  const std::vector<AdapterTensor> tensors = {tensor("model.layers.1.adapters.q_proj.lora_A", {1, 8}),
                                              tensor("model.layers.1.adapters.q_proj.lora_B", {8, 1})};
  EXPECT_TRUE(
      write_adapter(folder(), json::array({{{"slug", "lora"}, {"rank", 1}, {"layers", 1}}}), tensors, base, "b"));
  EXPECT_EQ(PeftAdapter::open(folder())->config()["target_modules"], ".*layers\\.(1)\\.[a-z_]+\\.q_proj");
}

TEST_F(Peft, WritesExpertsAsItReadsThem) {
  const auto base = std::make_shared<Outline>(mixtral(6));
  for (const bool shared : {false, true}) {
    std::vector<AdapterTensor> tensors;
    for (const char* l : {"0", "1"}) {
      const std::string at = std::string("model.layers.") + l + ".adapters.experts.";
      tensors.push_back(tensor(at + "gate_up_proj.lora_A", {shared ? 1 : 3, 2, 8}));
      tensors.push_back(tensor(at + "gate_up_proj.lora_B_gate", {3, 6, 2}));
      tensors.push_back(tensor(at + "gate_up_proj.lora_B_up", {3, 6, 2}));
      tensors.push_back(tensor(at + "down_proj.lora_A", {3, 2, 6}));
      tensors.push_back(tensor(at + "down_proj.lora_B", {3, 8, 2}));
    }
    EXPECT_TRUE(write_adapter(folder(), json::array({{{"slug", "lora"}, {"rank", 2}}}), tensors, *base, "base"));
    EXPECT_EQ(PeftAdapter::open(folder())->config()["target_parameters"],
              json({"mlp.experts.down_proj", "mlp.experts.gate_up_proj"}));
    const auto again = with_adapters(base, {{folder(), 1.0}});
    for (const auto& t : tensors) {
      auto values = t.values;
      // What experts share is written for each.
      if (t.shape[0] == 1)
        for (int e = 1; e < 3; ++e) values.insert(values.end(), t.values.begin(), t.values.end());
      EXPECT_EQ(again->get(t.name).to_float(), values) << t.name;
    }
  }
}

TEST_F(Peft, WhatPeftHasNoWordForIsWrittenInOurOwn) {
  const auto base = std::make_shared<Outline>(llama(), dense_names());
  const std::vector<AdapterTensor> tensors = {tensor("model.layers.0.adapters.q_proj.lora_A", {3, 2, 8}),
                                              tensor("model.layers.0.adapters.q_proj.router.weight", {3, 8})};
  const json parts = json::array({{{"slug", "mola"}, {"target", "q_proj"}, {"experts", 3}, {"layers", 0}}});
  EXPECT_FALSE(write_adapter(folder(), parts, tensors, *base, "base"));
  EXPECT_SAYS(refusal(folder()), "MOIETY");
  const auto again = with_adapters(base, {{folder(), 1.0}});
  EXPECT_EQ(again->config()["moiety"]["parts"], parts);
  for (const auto& t : tensors) EXPECT_EQ(again->get(t.name).to_float(), t.values);
  EXPECT_SAYS(message_of([&] { with_adapters(base, {{folder(), 0.5}}); }), "only LoRA and FlyLoRA have a strength");
  // Beside another adapter it goes by its folder's name.
  const auto two = with_adapters(base, {{folder(), 1.0}, {one({}, {}, "lora"), 1.0}});
  EXPECT_EQ(two->config()["moiety"]["parts"][0]["name"], "adapter");
  EXPECT_TRUE(two->has("model.layers.0.adapters.adapter.q_proj.router.weight"));
  EXPECT_TRUE(two->has("model.layers.0.adapters.lora.q_proj.lora_A"));
  auto turned = llama();
  turned["moiety_rope_interleaved"] = true;
  EXPECT_SAYS(message_of([&] {
                with_adapters(std::make_shared<Outline>(turned, dense_names()), {{folder(), 1.0}});
              }),
              "lie in another order");
  write_file(folder() / "adapter_config.json", R"({"peft_type": "MOIETY", "moiety": {"parts": []}})");
  EXPECT_SAYS(message_of([&] { with_adapters(base, {{folder(), 1.0}}); }), "no `moiety.parts`");
  write_file(folder() / "adapter_config.json", R"({"peft_type": "MOIETY", "moiety": 3})");
  EXPECT_SAYS(message_of([&] { with_adapters(base, {{folder(), 1.0}}); }), "adapter_config.json");
}

TEST_F(Peft, NoPartIsNoAdapter) {
  EXPECT_THROW(write_adapter(folder(), json::array(), {}, Outline(llama(), dense_names()), "base"), Error);
}

// ---- Trained biases ----

// A base of the usual names with biases, whose values are 100, 101, ...
class Biased : public Outline {
 public:
  explicit Biased(json config = llama()) : Outline(std::move(config), dense_names()) {
    for (const char* name : {"model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.q_proj.bias",
                             "model.layers.0.self_attn.v_proj.bias", "model.norm.bias", "lm_head.bias"})
      infos_.push_back({name, Format::F32, {8}});
  }
  TensorView get(const std::string& name) const override {
    std::vector<float> values(8);
    std::iota(values.begin(), values.end(), 100.f);
    TensorView v = overlay_of(name, {8}, values).get();
    v.name = name;
    return v;
  }
};

const Stored kBias{std::string(kQ) + ".base_layer.bias", {8}};

TEST_F(Peft, ReadsBiasesOfAdaptedMatrices) {
  for (const char* name : {".base_layer.bias", ".bias"}) {
    const auto at = one({{"bias", "lora_only"}}, {{kQ + std::string(name), {8}}});
    const auto adapter = PeftAdapter::open(at);
    EXPECT_EQ(adapter->bias(), "lora_only");
    ASSERT_EQ(adapter->biases().size(), 1u);
    EXPECT_EQ(adapter->biases()[0].path, "model.layers.0.self_attn.q_proj.bias");
    const auto model = with_adapters(std::make_shared<Biased>(), {{at, 1.0}});
    EXPECT_EQ(model->config()["moiety"]["parts"][0]["bias"], "lora_only");
    EXPECT_EQ(model->get("model.layers.0.adapters.q_proj.bias").to_float()[3], 3.f);
    EXPECT_EQ(model->get("model.layers.0.self_attn.q_proj.bias").to_float()[3], 103.f);
  }
}

TEST_F(Peft, BiasesThatWereNotStoredAreTheBases) {
  const auto config = json{{"bias", "lora_only"}};
  const std::string next = "base_model.model.model.layers.1.self_attn.q_proj";
  const auto half = one(config, {kBias, {next + ".lora_A.weight", {2, 8}}, {next + ".lora_B.weight", {8, 2}}});
  const auto model = with_adapters(std::make_shared<Biased>(), {{half, 1.0}});
  EXPECT_EQ(model->get("model.layers.1.adapters.q_proj.bias").to_float()[3], 103.f);
  // As old versions of PEFT write them: none at all.
  const auto none = with_adapters(std::make_shared<Biased>(), {{one(config), 1.0}});
  EXPECT_FALSE(none->has("model.layers.0.adapters.q_proj.bias"));
  EXPECT_EQ(none->config()["moiety"]["parts"][0].count("bias"), 0u);
}

TEST_F(Peft, AllBiasesTakeThePlaceOfTheBases) {
  const auto at = one({{"bias", "all"}}, {kBias,
                                          {"base_model.model.model.layers.0.self_attn.v_proj.bias", {8}},
                                          {"base_model.model.model.norm.bias", {8}},
                                          {"base_model.model.lm_head.bias", {8}}});
  const auto model = with_adapters(std::make_shared<Biased>(), {{at, 1.0}});
  EXPECT_EQ(model->config()["moiety"]["parts"][0]["bias"], "all");
  for (const char* name : {"model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.v_proj.bias",
                           "model.norm.bias", "lm_head.bias"})
    EXPECT_EQ(model->get(name).to_float()[3], 3.f) << name;
  EXPECT_EQ(model->get("model.layers.1.self_attn.q_proj.bias").to_float()[3], 103.f);
  EXPECT_FALSE(model->has("model.layers.0.adapters.q_proj.bias"));
}

TEST_F(Peft, BiasesThatDoNotFitAreErrors) {
  const auto says = [&](const json& bias, const std::vector<Stored>& besides, double strength = 1.0) {
    return message_of([&] { with_adapters(std::make_shared<Biased>(), {{one({{"bias", bias}}, besides), strength}}); });
  };
  EXPECT_SAYS(says("some", {}), "none, lora_only and all are known");
  EXPECT_SAYS(says("none", {kBias}), "is no part of a LoRA");
  EXPECT_SAYS(says("lora_only", {{"base_model.model.model.norm.bias", {8}}}), "is no bias of an adapted matrix");
  EXPECT_SAYS(says("lora_only", {{kBias.name, {7}}}), "7 biases for 8 rows");
  EXPECT_SAYS(says("lora_only", {kBias, {std::string(kQ) + ".bias", {8}}}), "is there twice");
  EXPECT_SAYS(says("all", {{"base_model.model.model.layers.9.mlp.up_proj.bias", {8}}}), "has no place in this model");
  EXPECT_SAYS(says("all", {{"base_model.model.model.norm.bias", {2, 4}}}), "has the shape");
  EXPECT_SAYS(says("all", {kBias}, 0.5), "which have no strength");
  const auto a = one({{"bias", "all"}}, {kBias}, "a"), b = one({{"bias", "lora_only"}}, {kBias}, "b"),
             c = one({}, {}, "c");
  EXPECT_SAYS(message_of([&] {
                with_adapters(std::make_shared<Biased>(), {{a, 1.0}, {b, 1.0}});
              }),
              "of which there can be one only");
  EXPECT_NO_THROW(with_adapters(std::make_shared<Biased>(), {{a, 1.0}, {c, 0.5}}));
}

TEST_F(Peft, WritesBiasesAsItReadsThem) {
  for (const bool turned : {false, true})
    for (const bool all : {false, true}) {
      auto config = llama();
      if (turned) config["moiety_rope_interleaved"] = true;
      const auto base = std::make_shared<Biased>(config);
      std::vector<AdapterTensor> tensors = {tensor("model.layers.0.adapters.q_proj.lora_A", {1, 8}),
                                            tensor("model.layers.0.adapters.q_proj.lora_B", {8, 1})};
      if (all)
        for (const char* name : {"model.layers.0.self_attn.q_proj.bias", "model.norm.bias", "lm_head.bias"})
          tensors.push_back(tensor(name, {8}));
      else
        tensors.push_back(tensor("model.layers.0.adapters.q_proj.bias", {8}));
      const json parts =
          json::array({{{"slug", "lora"}, {"rank", 1}, {"layers", 0}, {"bias", all ? "all" : "lora_only"}}});
      EXPECT_TRUE(write_adapter(folder(), parts, tensors, *base, "base"));
      const auto adapter = PeftAdapter::open(folder());
      EXPECT_EQ(adapter->bias(), all ? "all" : "lora_only");
      const auto stored = SafetensorsFile::open(folder() / "adapter_model.safetensors");
      const auto expected =
          turned ? std::vector<float>{1, 3, 2, 4, 5, 7, 6, 8} : std::vector<float>{1, 2, 3, 4, 5, 6, 7, 8};
      EXPECT_EQ(stored->get(kBias.name).to_float(), expected);
      EXPECT_EQ(stored->has("base_model.model.lm_head.bias"), all);
      const auto again = with_adapters(base, {{folder(), 1.0}});
      for (const auto& t : tensors) EXPECT_EQ(again->get(t.name).to_float(), t.values) << t.name << turned;
    }
}

TEST_F(Peft, BiasesStandInOurOwnLayoutToo) {
  const auto base = std::make_shared<Biased>();
  const std::vector<AdapterTensor> tensors = {tensor("model.layers.0.adapters.low.q_proj.lora_A", {1, 8}),
                                              tensor("model.layers.0.adapters.low.q_proj.lora_B", {8, 1}),
                                              tensor("model.layers.0.adapters.high.q_proj.lora_A", {1, 8}),
                                              tensor("model.layers.0.adapters.high.q_proj.lora_B", {8, 1}),
                                              tensor("model.norm.bias", {8}),
                                              tensor("lm_head.bias", {8})};
  const json part = {{"slug", "lora"}, {"site", "linear"},   {"rank", 1},
                     {"layers", 0},    {"target", "q_proj"}, {"name", "low"}};
  json other = part;
  other["name"] = "high";
  other["bias"] = "all";
  EXPECT_FALSE(write_adapter(folder(), json::array({part, other}), tensors, *base, "base"));
  const auto again = with_adapters(base, {{folder(), 1.0}});
  for (const auto& t : tensors) EXPECT_EQ(again->get(t.name).to_float(), t.values) << t.name;
  EXPECT_SAYS(refusal(folder(), llama()), "has no place in this model");
}

// ---- The base that an adapter names ----

TEST_F(Peft, WhatWasTrainedOnGivesWay) {
  fs::create_directories(dir_ / "base");
  auto config = llama();
  config["moiety"]["parts"] =
      json::array({{{"slug", "lora"}, {"site", "linear"}, {"target", "q_proj"}, {"layers", 0}}});
  write_file(dir_ / "base" / "config.json", config.dump());
  const std::string at = "model.layers.0.adapters.q_proj.lora_A";
  SafetensorsWriter writer(dir_ / "base" / "model.safetensors",
                           {{"model.embed_tokens.weight", Format::F32, {1}}, {at, Format::F32, {1, 1}}});
  const float value = 123.f;
  for (const auto* name : {"model.embed_tokens.weight", at.c_str()})
    writer.write(name, std::as_bytes(std::span(&value, 1)));
  writer.finish();
  const auto folder = one({{"base_model_name_or_path", "../base"}});
  const auto model = Checkpoint::open(folder.string());
  EXPECT_EQ(model->config()["moiety"]["parts"].size(), 1u);
  EXPECT_FALSE(model->config()["moiety"]["parts"][0].contains("name"));
  EXPECT_NE(model->get(at).to_float()[0], value);
  // Beside a base that is named it stands as well as what is there.
  const auto both = with_adapters(Checkpoint::open((dir_ / "base").string()), {{folder, 1.0}});
  EXPECT_EQ(both->config()["moiety"]["parts"].size(), 2u);
  EXPECT_EQ(both->get(at).to_float()[0], value);
}

TEST_F(Peft, ABaseIsNamed) {
  EXPECT_SAYS(message_of([&] { open_adapter(one()); }), "does not say which model");
  EXPECT_SAYS(message_of([&] { open_adapter(one({{"base_model_name_or_path", "no/where"}})); }), "no/where");
}

TEST_F(Peft, ABaseIsFoundBesideTheAdapter) {
  fs::create_directories(dir_ / "base");
  write_file(dir_ / "base" / "config.json", llama().dump());
  SafetensorsWriter writer(dir_ / "base" / "model.safetensors", {{"model.embed_tokens.weight", Format::F32, {1}}});
  const float value = 1.f;
  writer.write("model.embed_tokens.weight", std::as_bytes(std::span(&value, 1)));
  writer.finish();
  const auto model = Checkpoint::open(one({{"base_model_name_or_path", "../base"}}).string());
  EXPECT_TRUE(model->has("model.layers.0.adapters.q_proj.lora_A"));
}

TEST_F(Peft, AnAdapterIsNoBase) {
  const auto self = one({{"base_model_name_or_path", "../adapter"}});
  EXPECT_SAYS(message_of([&] { open_adapter(self); }), "adapter itself");
  const auto other = one({{"base_model_name_or_path", self.string()}}, {}, "other");
  EXPECT_SAYS(message_of([&] { Checkpoint::open(other.string()); }), "adapter itself");
}

}  // namespace
}  // namespace moiety
