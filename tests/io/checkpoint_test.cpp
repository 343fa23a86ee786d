#include "moiety/io/checkpoint.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cstdlib>
#include <fstream>
#include <random>

#include "message_of.h"
#include "moiety/base/files.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/io/sha256.h"

namespace moiety {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

std::string sha(std::string_view text) {
  Sha256 h;
  for (size_t at = 0; at < text.size(); at += 7)
    h.update(std::as_bytes(std::span(text.substr(at, 7))));  // pieces must not matter
  return h.hex();
}

TEST(Sha256, PublishedVectors) {
  EXPECT_EQ(sha(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sha("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(sha(std::string(1000000, 'a')), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

struct Tensor {
  std::string name;
  std::vector<int64_t> shape;
};

std::vector<float> random_values(const std::string& name, int64_t n) {
  std::mt19937 random(static_cast<unsigned>(std::hash<std::string>()(name)));
  std::normal_distribution<float> normal(0, 0.5f);
  std::vector<float> out(static_cast<size_t>(n));
  for (float& v : out) v = normal(random);
  return out;
}

void save(const fs::path& file, const std::vector<Tensor>& tensors) {
  std::vector<TensorInfo> infos;
  for (const auto& t : tensors) infos.push_back({t.name, Format::F32, t.shape});
  SafetensorsWriter writer(file, infos);
  for (const auto& t : infos) {
    const auto values = random_values(t.name, t.elements());
    writer.write(t.name, std::as_bytes(std::span(values)));
  }
  writer.finish();
}

TEST(Checkpoint, OneFileAndShards) {
  const TemporaryFolder folder;
  write_file(folder / "config.json", R"({"model_type": "llama", "unknown_key": {"x": 1}})");
  save(folder / "model.safetensors", {{"a", {2, 3}}, {"b", {4}}});
  auto c = Checkpoint::open(folder.path().string());
  EXPECT_EQ(c->tensors().size(), 2u);
  EXPECT_EQ(c->config()["unknown_key"]["x"], 1);
  EXPECT_EQ(c->generation_config(), json::object());
  EXPECT_EQ(c->get("a").to_float(), random_values("a", 6));
  EXPECT_NE(message_of([&] { c->get("c"); }).find("no tensor"), std::string::npos);
  EXPECT_GT(c->bytes_on_disk(), 40);
  EXPECT_EQ(Checkpoint::open((folder / "model.safetensors").string())->config()["model_type"], "llama");

  fs::remove(folder / "model.safetensors");
  save(folder / "model-00001-of-00002.safetensors", {{"a", {2}}});
  save(folder / "model-00002-of-00002.safetensors", {{"b", {2}}});
  const std::string index = (folder / "model.safetensors.index.json").string();
  write_file(index,
             R"({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})");
  EXPECT_EQ(Checkpoint::open(folder.path().string())->tensors().size(), 2u);
  for (const char* bad :
       {R"({"weight_map": {"a": "../x.safetensors"}})", R"({"weight_map": {"a": "missing.safetensors"}})",
        R"({"weight_map": []})", R"({"weight_map": {"a": 3}})", "{", "[]"}) {
    write_file(index, bad);
    EXPECT_THROW(Checkpoint::open(folder.path().string()), Error) << bad;
  }
}

TEST(Checkpoint, SaysWhatIsWrong) {
  const TemporaryFolder folder;
  EXPECT_NE(message_of([&] { Checkpoint::open(folder.path().string()); }).find("config.json"), std::string::npos);
  write_file(folder / "config.json", "{}");
  EXPECT_NE(message_of([&] { Checkpoint::open(folder.path().string()); }).find("safetensors"), std::string::npos);
  write_file(folder / "pytorch_model.bin", "x");
  EXPECT_NE(message_of([&] { Checkpoint::open(folder.path().string()); }).find("pickle"), std::string::npos);
  write_file(folder / "config.json", "{\"a\": ");
  EXPECT_NE(message_of([&] { Checkpoint::open(folder.path().string()); }).find("JSON"), std::string::npos);
  write_file(folder / "notes.txt", "hello");
  EXPECT_NE(message_of([&] { Checkpoint::open((folder / "notes.txt").string()); }).find("not a model"),
            std::string::npos);
  EXPECT_NE(message_of([&] { Checkpoint::open((folder / "note.txt").string()); }).find("did you mean"),
            std::string::npos);
  EXPECT_THROW(Checkpoint::open(""), Error);
  EXPECT_THROW(Checkpoint::open("pip:"), Error);
}

/// A Python prefix with packages, which MOIETY_PYTHON names.
class Packages : public ::testing::Test {
 protected:
  void SetUp() override {
    fs::create_directories(site_);
    fs::create_directories(folder_ / "bin");
    ::setenv("MOIETY_PYTHON", (folder_ / "bin" / "python").c_str(), 1);
    ::setenv("MOIETY_CACHE", (folder_ / "cache").c_str(), 1);
  }
  void TearDown() override {
    ::unsetenv("MOIETY_PYTHON");
    ::unsetenv("MOIETY_CACHE");
  }
  void package(const std::string& name, const std::vector<std::pair<std::string, std::string>>& files) {
    std::string record;
    for (const auto& [path, text] : files) {
      fs::create_directories((site_ / path).parent_path());
      write_file(site_ / path, text);
      record += path + ",sha256=x,1\n";
    }
    fs::create_directories(site_ / (name + "-1.0.dist-info"));
    write_file(site_ / (name + "-1.0.dist-info") / "RECORD", record);
  }
  struct Folder : TemporaryFolder {
    fs::path operator/(const std::string& name) const { return path() / name; }
  } folder_;
  fs::path site_ = folder_ / "lib" / "python3.11" / "site-packages";
};

TEST_F(Packages, WholeFilesAndFolders) {
  package("one_model", {{"one_model/__init__.py", ""}, {"one_model/data/m.gguf", "GGUF"}});
  EXPECT_EQ(resolve_model("pip:One.Model"), site_ / "one_model/data/m.gguf");
  package("an_encoder", {{"an_encoder/model/config.json", "{}"},
                         {"an_encoder/model/1_Pooling/config.json", "{}"},
                         {"an_encoder/model/model.safetensors", ""}});
  EXPECT_EQ(resolve_model("pip:an-encoder"), site_ / "an_encoder/model");
  package("empty_one", {{"empty_one/__init__.py", ""}});
  EXPECT_NE(message_of([] { resolve_model("pip:empty-one"); }).find("holds no model"), std::string::npos);
  EXPECT_NE(message_of([] { resolve_model("pip:one-modle"); }).find("did you mean `one-model`"), std::string::npos);
}

TEST_F(Packages, PartsAreJoinedOnceAndChecked) {
  const std::string first(100000, 'x'), second = "GGUF and the rest";
  package("split_model", {{"split_model/data/SHA256SUMS", sha(first + second) + "  whole.gguf\n"}});
  package("split_model_part1", {{"split_model_part1/data/whole.gguf.part00", first}});
  package("split_model_part2", {{"split_model_part2/data/whole.gguf.part01", second}});
  const fs::path joined = resolve_model("pip:split-model");
  EXPECT_EQ(read_text(joined), first + second);
  EXPECT_TRUE(joined.string().starts_with((folder_ / "cache").string()));
  // The second time the parts are not read: they may even be gone.
  const auto time = fs::last_write_time(joined);
  write_file(site_ / "split_model_part2/data/whole.gguf.part01", "other");
  EXPECT_EQ(resolve_model("pip:split-model"), joined);
  EXPECT_EQ(fs::last_write_time(joined), time);
  // A joined file that was touched is joined again, and then the change shows.
  write_file(joined, "damaged");
  EXPECT_NE(message_of([] { resolve_model("pip:split-model"); }).find("SHA-256"), std::string::npos);
  write_file(site_ / "split_model_part2/data/whole.gguf.part01", second);
  EXPECT_EQ(read_text(resolve_model("pip:split-model")), first + second);
}

TEST_F(Packages, MissingPartsAreNamed) {
  package("split_model", {{"split_model/data/SHA256SUMS", sha("x") + "  whole.gguf\n"}});
  package("split_model_part1", {{"split_model_part1/data/whole.gguf.part00", "x"}});
  package("split_model_part3", {{"split_model_part3/data/whole.gguf.part02", "x"}});
  EXPECT_NE(message_of([] { resolve_model("pip:split-model"); }).find("part 1"), std::string::npos);
}

// ---- Conversion ----

json small_config(const char* type, json more = json::object()) {
  json c = {{"model_type", type},
            {"hidden_size", 64},
            {"intermediate_size", 96},
            {"num_hidden_layers", 1},
            {"num_attention_heads", 4},
            {"num_key_value_heads", 2},
            {"max_position_embeddings", 128},
            {"vocab_size", 40},
            {"rms_norm_eps", 1e-6},
            {"an_unknown_key", "kept"}};
  c.update(more);
  return c;
}

std::vector<Tensor> dense_tensors() {
  const std::string l = "model.layers.0.";
  return {{"model.embed_tokens.weight", {40, 64}},
          {"model.norm.weight", {64}},
          {"lm_head.weight", {40, 64}},
          {l + "input_layernorm.weight", {64}},
          {l + "post_attention_layernorm.weight", {64}},
          {l + "self_attn.q_proj.weight", {64, 64}},
          {l + "self_attn.q_proj.bias", {64}},
          {l + "self_attn.k_proj.weight", {32, 64}},
          {l + "self_attn.v_proj.weight", {32, 64}},
          {l + "self_attn.o_proj.weight", {64, 64}},
          {l + "mlp.gate_proj.weight", {96, 64}},
          {l + "mlp.up_proj.weight", {96, 64}},
          {l + "mlp.down_proj.weight", {64, 96}}};
}

void model(const fs::path& folder, const json& config, const std::vector<Tensor>& tensors) {
  fs::create_directories(folder);
  write_file(folder / "config.json", config.dump());
  save(folder / "model.safetensors", tensors);
}

/// HF -> GGUF (f32) -> HF must be the same tensors; returns the GGUF view.
std::shared_ptr<const Checkpoint> round_trip(const TemporaryFolder& folder, const json& config,
                                             const std::vector<Tensor>& tensors, float tolerance = 0) {
  model(folder / "in", config, tensors);
  write_gguf(*Checkpoint::open((folder / "in").string()), folder / "m.gguf",
             {.type = "f32", .tensor_types = {}, .dtype = "", .threads = 2, .progress = {}});
  auto view = Checkpoint::open((folder / "m.gguf").string());
  write_hf(*view, folder / "out");
  const auto back = Checkpoint::open((folder / "out").string());
  EXPECT_EQ(back->tensors().size(), tensors.size());
  for (const auto& t : tensors) {
    EXPECT_TRUE(back->has(t.name)) << t.name;
    if (!back->has(t.name)) continue;
    EXPECT_EQ(back->get(t.name).shape, t.shape) << t.name;
    const auto got = back->get(t.name).to_float(), want = random_values(t.name, back->get(t.name).elements());
    for (size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i], want[i], tolerance) << t.name << " " << i;
  }
  json c = back->config();
  c.erase("dtype");
  EXPECT_EQ(c, config);
  return view;
}

TEST(Convert, DenseThereAndBack) {
  const TemporaryFolder folder;
  const auto view = round_trip(folder, small_config("llama"), dense_tensors());
  // Inside head 0 (16 rows) the file has rows 0, 8, 1, 9, ...
  const auto q = view->get("model.layers.0.self_attn.q_proj.weight").to_float(),
             hf = random_values("model.layers.0.self_attn.q_proj.weight", 64 * 64);
  EXPECT_EQ(view->config()["moiety_rope_interleaved"], true);
  for (int64_t i = 0; i < 64; ++i) {
    EXPECT_EQ(q[static_cast<size_t>(64 + i)], hf[static_cast<size_t>(8 * 64 + i)]);
    EXPECT_EQ(q[static_cast<size_t>(2 * 64 + i)], hf[static_cast<size_t>(64 + i)]);
  }
  const auto bias = view->get("model.layers.0.self_attn.q_proj.bias").to_float(),
             hf_bias = random_values("model.layers.0.self_attn.q_proj.bias", 64);
  EXPECT_EQ(bias[1], hf_bias[8]);
}

TEST(Convert, HalfSplitFamiliesKeepTheirRows) {
  const TemporaryFolder folder;
  const auto view = round_trip(folder, small_config("qwen2"), dense_tensors());
  EXPECT_EQ(view->get("model.layers.0.self_attn.q_proj.weight").to_float(),
            random_values("model.layers.0.self_attn.q_proj.weight", 64 * 64));
}

TEST(Convert, GemmaNormsHoldOneMore) {
  const TemporaryFolder folder;
  auto tensors = dense_tensors();
  std::erase_if(tensors, [](const Tensor& t) { return t.name == "lm_head.weight" || t.name.ends_with("bias"); });
  // 1 + w and back rounds in the last bit of numbers near 1.
  const auto view =
      round_trip(folder, small_config("gemma", {{"head_dim", 16}, {"tie_word_embeddings", true}}), tensors, 2e-7f);
  EXPECT_EQ(view->config()["moiety_norm_offset_folded"], true);
  EXPECT_FLOAT_EQ(view->get("model.norm.weight").to_float()[5], 1 + random_values("model.norm.weight", 64)[5]);
}

TEST(Convert, ExpertsAreStacked) {
  const TemporaryFolder folder;
  auto tensors = dense_tensors();
  std::erase_if(tensors,
                [](const Tensor& t) { return t.name.find(".mlp.") != std::string::npos || t.name.ends_with("bias"); });
  const std::string moe = "model.layers.0.block_sparse_moe.";
  tensors.push_back({moe + "gate.weight", {3, 64}});
  for (int e = 0; e < 3; ++e)
    for (const auto& [w, shape] : {std::pair{"w1", std::vector<int64_t>{96, 64}}, {"w3", {96, 64}}, {"w2", {64, 96}}})
      tensors.push_back({fmt::format("{}experts.{}.{}.weight", moe, e, w), shape});
  const auto view =
      round_trip(folder, small_config("mixtral", {{"num_local_experts", 3}, {"num_experts_per_tok", 2}}), tensors);
  const auto stack = view->get("model.layers.0.mlp.experts.up_proj");
  EXPECT_EQ(stack.shape, (std::vector<int64_t>{3, 96, 64}));
  EXPECT_EQ(stack.to_float()[2 * 96 * 64 + 5], random_values(moe + "experts.2.w3.weight", 96 * 64)[5]);
}

TEST(Convert, FusedLayoutsComeApartAndTogether) {
  const TemporaryFolder folder;
  auto tensors = dense_tensors();
  std::erase_if(tensors,
                [](const Tensor& t) { return t.name.find(".mlp.") != std::string::npos || t.name.ends_with("bias"); });
  const std::string l = "model.layers.0.";
  tensors.push_back({l + "block_sparse_moe.router.layer.weight", {3, 64}});
  tensors.push_back({l + "block_sparse_moe.input_linear.weight", {3, 192, 64}});
  tensors.push_back({l + "block_sparse_moe.output_linear.weight", {3, 64, 96}});
  tensors.push_back({l + "shared_mlp.input_linear.weight", {80, 64}});
  tensors.push_back({l + "shared_mlp.output_linear.weight", {64, 40}});
  round_trip(folder,
             small_config("granitemoeshared",
                          {{"num_local_experts", 3}, {"num_experts_per_tok", 2}, {"shared_intermediate_size", 40}}),
             tensors);
}

TEST(Convert, GptOssGateAndUpInterleave) {
  const TemporaryFolder folder;
  auto tensors = dense_tensors();
  std::erase_if(tensors, [](const Tensor& t) { return t.name.find(".mlp.") != std::string::npos; });
  const std::string l = "model.layers.0.";
  tensors.push_back({l + "self_attn.sinks", {4}});
  tensors.push_back({l + "mlp.router.weight", {3, 64}});
  tensors.push_back({l + "mlp.router.bias", {3}});
  tensors.push_back({l + "mlp.experts.gate_up_proj", {3, 64, 192}});
  tensors.push_back({l + "mlp.experts.gate_up_proj_bias", {3, 192}});
  tensors.push_back({l + "mlp.experts.down_proj", {3, 96, 64}});
  tensors.push_back({l + "mlp.experts.down_proj_bias", {3, 64}});
  const auto view = round_trip(
      folder,
      small_config("gpt_oss",
                   {{"num_local_experts", 3}, {"num_experts_per_tok", 2}, {"head_dim", 16}, {"sliding_window", 8}}),
      tensors);
  // up[e, o, i] is gate_up[e, i, 2 o + 1]
  const auto up = view->get(l + "mlp.experts.up_proj").to_float(),
             both = random_values(l + "mlp.experts.gate_up_proj", 3 * 64 * 192);
  EXPECT_EQ(up[(1 * 96 + 7) * 64 + 9], both[(1 * 64 + 9) * 192 + 15]);
}

TEST(Convert, DeepSeekSplitsKeysAndValues) {
  const TemporaryFolder folder;
  auto tensors = dense_tensors();
  std::erase_if(tensors, [](const Tensor& t) {
    return t.name.find("_proj.") != std::string::npos && t.name.find("self_attn") != std::string::npos;
  });
  const std::string a = "model.layers.0.self_attn.";
  for (const Tensor& t : std::vector<Tensor>{{a + "q_a_proj.weight", {24, 64}},
                                             {a + "q_a_layernorm.weight", {24}},
                                             {a + "q_b_proj.weight", {96, 24}},
                                             {a + "kv_a_proj_with_mqa.weight", {40, 64}},
                                             {a + "kv_a_layernorm.weight", {32}},
                                             {a + "kv_b_proj.weight", {4 * (16 + 12), 32}},
                                             {a + "o_proj.weight", {64, 48}}})
    tensors.push_back(t);
  const json config = small_config("deepseek_v3", {{"num_key_value_heads", 4},
                                                   {"q_lora_rank", 24},
                                                   {"kv_lora_rank", 32},
                                                   {"qk_rope_head_dim", 8},
                                                   {"qk_nope_head_dim", 16},
                                                   {"v_head_dim", 12},
                                                   {"first_k_dense_replace", 1},
                                                   {"n_routed_experts", 8},
                                                   {"num_experts_per_tok", 2},
                                                   {"moe_intermediate_size", 32},
                                                   {"n_group", 4},
                                                   {"topk_group", 2}});
  const auto view = round_trip(folder, config, tensors);
  EXPECT_EQ(view->get(a + "k_b_proj").shape, (std::vector<int64_t>{4, 32, 16}));
  EXPECT_EQ(view->get(a + "v_b_proj").shape, (std::vector<int64_t>{4, 12, 32}));
  const auto kv = random_values(a + "kv_b_proj.weight", 4 * 28 * 32), k = view->get(a + "k_b_proj").to_float();
  EXPECT_EQ(k[(2 * 32 + 3) * 16 + 5], kv[(2 * 28 + 5) * 32 + 3]);
}

RC_GTEST_PROP(Mxfp4, NibblesThereAndBack, ()) {
  const auto bytes = *rc::gen::container<std::vector<uint8_t>>(17, rc::gen::arbitrary<uint8_t>());
  const auto* raw = reinterpret_cast<const std::byte*>(bytes.data());
  std::byte packed[17], back[16], scale;
  mxfp4_to_gguf(raw, raw[16], packed);
  mxfp4_from_gguf(packed, back, scale);
  RC_ASSERT(scale == raw[16]);
  RC_ASSERT(std::equal(back, back + 16, raw));
  // Element i of a file's block: low nibbles first, then high ones.
  for (size_t i = 0; i < 32; ++i) {
    const auto hf = bytes[i / 2] >> (i % 2 * 4) & 15,
               gguf = std::to_integer<int>(packed[1 + i % 16]) >> (i / 16 * 4) & 15;
    RC_ASSERT(hf == gguf);
  }
}

TEST(Convert, FormatsFollowTheRule) {
  const TemporaryFolder folder;
  std::vector<Tensor> tensors = {
      {"model.embed_tokens.weight", {40, 256}}, {"model.norm.weight", {256}}, {"lm_head.weight", {40, 256}}};
  for (int i = 0; i < 8; ++i) {
    const std::string l = fmt::format("model.layers.{}.", i);
    for (const Tensor& t : std::vector<Tensor>{{l + "input_layernorm.weight", {256}},
                                               {l + "self_attn.q_proj.weight", {64, 256}},
                                               {l + "self_attn.v_proj.weight", {64, 256}},
                                               {l + "self_attn.o_proj.weight", {256, 64}},
                                               {l + "mlp.down_proj.weight", {256, 512}},
                                               {l + "mlp.gate_proj.weight", {512, 256}}})
      tensors.push_back(t);
  }
  model(folder / "in", small_config("qwen2", {{"num_hidden_layers", 8}, {"hidden_size", 256}}), tensors);
  const auto in = Checkpoint::open((folder / "in").string());
  auto formats = [&](WriteOptions options) {
    options.dry_run = true;
    std::map<std::string, std::string> out;
    for (const auto& t : write_gguf(*in, folder / "x.gguf", options).tensors) out[t.name] = info(t.format).name;
    return out;
  };
  auto m = formats({.type = "q4_k_m", .tensor_types = {}, .dtype = "", .progress = {}});
  EXPECT_EQ(m["output.weight"], "Q6_K");
  EXPECT_EQ(m["token_embd.weight"], "Q4_K");
  EXPECT_EQ(m["output_norm.weight"], "F32");
  EXPECT_EQ(m["blk.0.attn_v.weight"], "Q6_K");  // first eighth
  EXPECT_EQ(m["blk.1.attn_v.weight"], "Q4_K");
  EXPECT_EQ(m["blk.3.ffn_down.weight"], "Q6_K");  // every third between
  EXPECT_EQ(m["blk.7.ffn_down.weight"], "Q6_K");  // last eighth
  EXPECT_EQ(m["blk.4.attn_q.weight"], "Q4_K");
  EXPECT_FALSE(info(Format::Q4_K).block == 64);
  EXPECT_EQ(m["blk.4.attn_output.weight"], info(Format::Q5_0).can_quantize ? "Q5_0" : "Q8_0");  // rows of 64
  m = formats(
      {.type = "Q8_0", .tensor_types = {{"ffn_down", "f16"}, {"layers\\.2\\.", "q4_0"}}, .dtype = "", .progress = {}});
  EXPECT_EQ(m["output.weight"], "Q8_0");
  EXPECT_EQ(m["blk.2.ffn_down.weight"], "F16");
  EXPECT_EQ(m["blk.2.attn_q.weight"], "Q4_0");
  EXPECT_EQ(m["blk.1.attn_q.weight"], "Q8_0");
  m = formats({.type = "", .tensor_types = {}, .dtype = "", .progress = {}});
  EXPECT_EQ(m["blk.1.attn_q.weight"], "F32");
  EXPECT_NE(message_of([&] {
              formats({.type = "q4_k_n", .tensor_types = {}, .dtype = "", .progress = {}});
            }).find("did you mean"),
            std::string::npos);
  EXPECT_THROW(formats({.type = "q8_0", .tensor_types = {{"(", "f16"}}, .dtype = "", .progress = {}}), Error);
  EXPECT_THROW(formats({.type = "q8_0", .tensor_types = {{"a", "f17"}}, .dtype = "", .progress = {}}), Error);
  EXPECT_FALSE(fs::exists(folder / "x.gguf"));
}

TEST(Convert, NothingIsLeftOfAFailure) {
  const TemporaryFolder folder;
  auto tensors = dense_tensors();
  model(folder / "in", small_config("llama"), tensors);
  // A value that no half can hold.
  std::fstream file(folder / "in" / "model.safetensors", std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(-4, std::ios::end);
  const float huge = 1e30f;
  file.write(reinterpret_cast<const char*>(&huge), 4);
  file.close();
  fs::create_directories(folder / "out");
  const std::string message = message_of([&] {
    write_gguf(*Checkpoint::open((folder / "in").string()), folder / "out" / "m.gguf",
               {.type = "q8_0", .tensor_types = {{".", "q8_0"}}, .dtype = "", .progress = {}});
  });
  EXPECT_NE(message.find("tensor '"), std::string::npos) << message;
  EXPECT_TRUE(fs::is_empty(folder / "out"));
  // Nor does a plain half become infinity.
  WriteOptions half;
  half.dtype = "f16";
  const std::string plain =
      message_of([&] { write_hf(*Checkpoint::open((folder / "in").string()), folder / "half", half); });
  EXPECT_NE(plain.find("which is beyond f16"), std::string::npos) << plain;
  EXPECT_FALSE(fs::exists(folder / "half" / "model.safetensors"));
}

TEST(Convert, RefusesToOverwrite) {
  const TemporaryFolder folder;
  model(folder / "in", small_config("llama"), dense_tensors());
  const auto in = Checkpoint::open((folder / "in").string());
  write_file(folder / "m.gguf", "x");
  EXPECT_THROW(write_gguf(*in, folder / "m.gguf"), Error);
  EXPECT_THROW(write_hf(*in, folder / "in"), Error);
  WriteOptions options;
  options.overwrite = true;
  EXPECT_THROW(write_hf(*in, folder / "in", options), Error);
  write_gguf(*in, folder / "m.gguf", options);
  EXPECT_EQ(Checkpoint::open((folder / "m.gguf").string())->tensors().size(), dense_tensors().size());
}

TEST(Convert, FolderToFolderChangesTypeAndSplits) {
  const TemporaryFolder folder;
  model(folder / "in", small_config("llama", {{"torch_dtype", "float32"}}), dense_tensors());
  write_file(folder / "in" / "tokenizer.json", "{}");
  WriteOptions options;
  options.dtype = "bf16";
  options.shard_bytes = 16384;
  write_hf(*Checkpoint::open((folder / "in").string()), folder / "out", options);
  const auto out = Checkpoint::open((folder / "out").string());
  EXPECT_TRUE(fs::exists(folder / "out" / "model.safetensors.index.json"));
  EXPECT_TRUE(fs::exists(folder / "out" / "tokenizer.json"));
  EXPECT_EQ(out->config()["torch_dtype"], "bfloat16");
  EXPECT_EQ(out->config()["an_unknown_key"], "kept");
  for (const auto& t : out->tensors()) EXPECT_EQ(t.format, Format::BF16) << t.name;
}

TEST(Convert, UnplaceableTensorsAreNamed) {
  const TemporaryFolder folder;
  auto tensors = dense_tensors();
  tensors.push_back({"model.layers.0.self_attn.mystery.weight", {4, 4}});
  model(folder / "in", small_config("llama"), tensors);
  EXPECT_NE(
      message_of([&] { write_gguf(*Checkpoint::open((folder / "in").string()), folder / "m.gguf"); }).find("mystery"),
      std::string::npos);
}

}  // namespace
}  // namespace moiety
