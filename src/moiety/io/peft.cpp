#include "moiety/io/peft.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <regex>
#include <set>
#include <unordered_map>

#include "moiety/base/atomic_file.h"
#include "moiety/base/config.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/log.h"
#include "moiety/base/registry.h"
#include "moiety/base/text.h"
#include "moiety/io/finite.h"
#include "moiety/io/overlay.h"
#include "moiety/io/regex.h"

namespace fs = std::filesystem;
using nlohmann::json;

namespace moiety {
namespace {

constexpr const char* kConfig = "adapter_config.json";
constexpr const char* kWeights = "adapter_model.safetensors";
constexpr const char* kFront = "base_model.model.";
constexpr size_t kFrontSize = std::char_traits<char>::length(kFront);
constexpr size_t kLongestName = 512;

std::string config_text(const fs::path& folder) {
  const fs::path file = folder / kConfig;
  check(fs::exists(file), "{}: no {} in it: not an adapter", folder.string(), kConfig);
  return read_text(file);
}

json read_config(const fs::path& folder) {
  const fs::path file = folder / kConfig;
  json out = parse_json(config_text(folder), file.string());
  check(out.is_object(), "{}: a JSON object was expected", file.string());
  return out;
}

std::shared_ptr<const SafetensorsFile> read_weights(const fs::path& folder) {
  const fs::path file = folder / kWeights;
  check(!fs::exists(folder / "adapter_model.bin") || fs::exists(file),
        "{}: the weights are a pickle (adapter_model.bin), which runs code when loaded; save the adapter again as "
        "safetensors",
        folder.string());
  check(fs::exists(file), "{}: no {} in it", folder.string(), kWeights);
  return SafetensorsFile::open(file);
}

bool set_in(const json& config, const char* key) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) return false;
  if (it->is_boolean()) return it->get<bool>();
  if (it->is_string()) return !it->get<std::string>().empty();
  if (it->is_array() || it->is_object()) return !it->empty();
  return true;
}

// Patterns in the order of the file, in which PEFT tries them.
using Patterns = std::vector<std::pair<std::string, json>>;
Patterns patterns_of(const std::string& text, const char* key) {
  const auto config = nlohmann::ordered_json::parse(text);
  Patterns out;
  const auto it = config.find(key);
  if (it == config.end() || !it->is_object()) return out;
  for (const auto& [pattern, value] : it->items()) out.emplace_back(pattern, value);
  return out;
}

// The value of the first pattern that matches a path, else `otherwise`.
double by_pattern(const Patterns& patterns, const char* key, const std::string& path, double otherwise,
                  const std::string& where) {
  for (const auto& [pattern, value] : patterns) {
    if (!means_path(pattern, path, fmt::format("{}: {}", where, key))) continue;
    check(value.is_number(), "{}: {} of '{}' is no number", where, key, shown(pattern));
    return value.get<double>();
  }
  return otherwise;
}

// A stored name or path as the base calls it: without PEFT's front and the wrappers that it puts around modules.
std::string without_wrappers(std::string path) {
  if (path.rfind(kFront, 0) == 0) path = path.substr(kFrontSize);
  constexpr const char* kWrapper = ".base_layer";
  for (size_t at; (at = path.find(kWrapper)) != std::string::npos;) {
    const size_t end = at + std::char_traits<char>::length(kWrapper);
    if (end < path.size() && path[end] != '.') break;
    path.erase(at, end - at);
  }
  return path;
}

// The numbers of a stored tensor; PEFT takes whatever there is.
std::vector<float> finite_floats(const SafetensorsFile& weights, const std::string& name, const fs::path& folder) {
  const TensorView view = weights.get(name);
  auto values = view.to_float();
  const auto problem = not_finite(values, view.shape);
  check(problem.empty(), "{}: tensor '{}' {}: such an adapter gives no answer; take an earlier checkpoint of it",
        folder.string(), shown(name), problem);
  return values;
}

bool rslora(const json& config) {
  return set_in(config, "use_rslora");
}

}  // namespace

bool means_path(const std::string& pattern, const std::string& path, const std::string& where) {
  // Most patterns are names, whose dots may be escaped: no need for an expression.
  std::string plain;
  std::vector<bool> any;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const bool escaped = pattern[i] == '\\' && i + 1 < pattern.size() && pattern[i + 1] == '.';
    if (escaped) ++i;
    const char c = pattern[i];
    if (std::isalnum(static_cast<unsigned char>(c)) == 0 && c != '_' && c != '.') {
      const Regex regex("\\A(?:.*\\.)?(?:" + pattern + ")\\z", where);
      size_t begin = 0, end = 0;
      return Regex::Matches(regex, path).next(begin, end);
    }
    plain += c;
    any.push_back(c == '.' && !escaped);
  }
  if (plain.size() > path.size()) return false;
  const size_t begin = path.size() - plain.size();
  if (begin > 0 && path[begin - 1] != '.') return false;
  for (size_t i = 0; i < plain.size(); ++i)
    if (!any[i] && plain[i] != path[begin + i]) return false;
  return true;
}

bool stands_beside_matrices(const json& part) {
  if (!part.is_object() || !part.contains("slug") || !part["slug"].is_string()) return false;
  if (part.contains("site")) return part["site"] == "linear";
  for (const Method* m : find_methods(part.value("slug", std::string())))
    if (m->kind == "part") return m->sites == std::vector<std::string>{"linear"};
  return false;
}

json parts_of(const json& config) {
  const auto own = config.find("moiety");
  return own != config.end() && own->is_object() ? own->value("parts", json()) : json();
}

namespace {

// Known to stand at another site: what nobody knows may stand beside matrices.
bool stands_elsewhere(const json& part) {
  if (!part.is_object() || !part.contains("slug") || !part["slug"].is_string()) return false;
  return (part.contains("site") || !find_methods(part["slug"].get<std::string>()).empty()) &&
         !stands_beside_matrices(part);
}

}  // namespace

json other_parts_of(const json& config) {
  json rest = json::array();
  for (const auto& part : parts_of(config))
    if (!stands_beside_matrices(part)) rest.push_back(part);
  return rest;
}

json parts_beside(const json& config, const json& parts) {
  if (!parts.is_array() || !std::all_of(parts.begin(), parts.end(), stands_beside_matrices)) return parts;
  json all = other_parts_of(config);
  all.insert(all.end(), parts.begin(), parts.end());
  return all;
}

bool is_bias(const std::string& name) {
  const size_t dot = name.rfind('.');
  return name.find("bias", dot == std::string::npos ? 0 : dot + 1) != std::string::npos;
}

namespace {

// What a part says about biases.
std::string bias_of(const json& part) {
  if (!part.is_object() || !part.contains("bias") || !part["bias"].is_string()) return "none";
  return part["bias"];
}

bool biased(const json& parts) {
  return parts.is_array() &&
         std::any_of(parts.begin(), parts.end(), [](const json& part) { return bias_of(part) != "none"; });
}

}  // namespace

bool biases_learn(const json& parts) {
  return parts.is_array() && std::any_of(parts.begin(), parts.end(), [](const json& part) {
           return bias_of(part) == "all" && stands_beside_matrices(part);
         });
}

bool is_adapter(const fs::path& folder) {
  return fs::is_directory(folder) && fs::exists(folder / kConfig) && !fs::exists(folder / "config.json");
}

bool PeftAdapter::dora() const {
  return std::any_of(matrices_.begin(), matrices_.end(), [](const PeftMatrix& m) { return m.has_magnitude; });
}

const PeftMatrix* PeftAdapter::find(const std::string& path) const {
  for (const auto& m : matrices_)
    if (m.path == path) return &m;
  return nullptr;
}

std::shared_ptr<const PeftAdapter> PeftAdapter::open(const fs::path& folder) {
  auto out = std::make_shared<PeftAdapter>();
  out->path_ = folder;
  out->config_ = read_config(folder);
  const json& c = out->config_;
  const std::string where = (folder / kConfig).string();
  const auto weights = read_weights(folder);
  return reading_json(where, [&] {
    const auto type = c.value("peft_type", std::string("LORA"));
    check(type == "LORA", "{}: the adapter is of the type {}; LORA was expected", where, shown(type));
    for (const char* key : {"modules_to_save", "layer_replication", "trainable_token_indices",
                            "alora_invocation_tokens", "use_qalora", "arrow_config", "use_bdlora", "monteclora_config",
                            "velora_config", "kasa_config", "fan_in_fan_out", "lora_bias"})
      check(!set_in(c, key), "{}: `{}` is set, which LoRA here has no word for", where, key);
    if (const auto it = c.find("init_lora_weights"); it != c.end() && it->is_string()) {
      const auto init = it->get<std::string>();
      check(init.rfind("pissa", 0) != 0 && init != "corda" && init != "olora" && init != "loftq",
            "{}: the adapter began as {}, which changes the base; save it from PEFT with "
            "path_initial_model_for_weight_conversion, so that it fits the base as it was",
            where, shown(init));
    }
    const auto rank = c.value("r", json(8)), alpha = c.value("lora_alpha", json(8));
    check(rank.is_number() && alpha.is_number(), "{}: `r` and `lora_alpha` are numbers", where);
    out->bias_ = c.value("bias", std::string("none"));
    check(out->bias_ == "none" || out->bias_ == "lora_only" || out->bias_ == "all",
          "{}: `bias` is {}; none, lora_only and all are known", where, shown(out->bias_));
    const std::string text = config_text(folder);
    const auto ranks = patterns_of(text, "rank_pattern"), alphas = patterns_of(text, "alpha_pattern");
    std::map<std::string, PeftMatrix> by_path;  // by stored path, "base_layer" included
    std::set<std::string> adapted, biases;
    for (const TensorInfo& t : weights->tensors()) {
      check(t.name.size() <= kLongestName, "{}: tensor '{}' has a name of {} bytes", folder.string(), shown(t.name),
            t.name.size());
      finite_floats(*weights, t.name, folder);
      const size_t at = t.name.find(".lora_");
      if (at == std::string::npos && out->bias_ != "none" && is_bias(t.name)) {
        PeftBias bias{without_wrappers(t.name), weights->get(t.name)};
        check(biases.insert(bias.path).second, "{}: the bias '{}' is there twice", folder.string(), shown(bias.path));
        out->biases_.push_back(std::move(bias));
        continue;
      }
      check(at != std::string::npos, "{}: tensor '{}' is no part of a LoRA", folder.string(), shown(t.name));
      std::string path = t.name.substr(0, at);
      const std::string what = t.name.substr(at + 1);
      if (path.rfind(kFront, 0) == 0) path = path.substr(kFrontSize);
      PeftMatrix& m = by_path[path];
      if (what == "lora_A.weight")
        m.a = weights->get(t.name);
      else if (what == "lora_B.weight")
        m.b = weights->get(t.name);
      else if (what == "lora_magnitude_vector" || what == "lora_magnitude_vector.weight") {
        m.magnitude = weights->get(t.name);
        m.has_magnitude = true;
      } else {
        fail("{}: tensor '{}' is no part of a LoRA that is known here", folder.string(), shown(t.name));
      }
    }
    check(!by_path.empty(), "{}: no tensors in it", (folder / kWeights).string());
    for (auto& [stored, m] : by_path) {
      check(m.a.shape.size() == 2 && m.b.shape.size() == 2, "{}: '{}' needs matrices lora_A and lora_B",
            folder.string(), shown(stored));
      m.path = without_wrappers(stored);
      adapted.insert(m.path);
      m.experts = m.path.size() > 8 && m.path.compare(m.path.size() - 8, 8, ".experts") == 0;
      check(m.a.shape[0] == m.b.shape[1], "{}: '{}': lora_A has {} {}, lora_B {}", folder.string(), shown(stored),
            m.experts ? "rows" : "rank", m.a.shape[0], m.b.shape[1]);
      const double r = by_pattern(ranks, "rank_pattern", m.path, rank.get<double>(), where),
                   a = by_pattern(alphas, "alpha_pattern", m.path, alpha.get<double>(), where);
      check(r >= 1 && r == std::floor(r) && r <= 1e6, "{}: a rank of {} at {}", where, r, m.path);
      m.rank = static_cast<int64_t>(r);
      check(m.experts ? m.a.shape[0] % m.rank == 0 : m.a.shape[0] == m.rank,
            "{}: '{}' has {} rows of lora_A, and the config says rank {}", folder.string(), shown(stored), m.a.shape[0],
            m.rank);
      check(!m.has_magnitude || m.magnitude.elements() == m.b.shape[0],
            "{}: '{}' has {} magnitudes for {} rows of lora_B", folder.string(), shown(stored), m.magnitude.elements(),
            m.b.shape[0]);
      m.scale = rslora(c) ? a / std::sqrt(r) : a / r;
      out->matrices_.push_back(m);
    }
    if (out->bias_ == "lora_only")
      for (const std::string& path : biases)
        check(path.size() > 5 && path.compare(path.size() - 5, 5, ".bias") == 0 &&
                  adapted.count(path.substr(0, path.size() - 5)) != 0,
              "{}: '{}' is no bias of an adapted matrix, and `bias` is lora_only", folder.string(), shown(path));
    return std::shared_ptr<const PeftAdapter>(out);
  });
}

namespace {

// ---- A checkpoint with more tensors ----

// What stands before "layers." in the names of a base; nothing before the "blocks." of a vision model.
std::string front_of(const Checkpoint& base) {
  bool inner = false;
  for (const TensorInfo& t : base.tensors()) {
    if (const size_t at = t.name.find("embed_tokens.weight"); at != std::string::npos) return t.name.substr(0, at);
    inner = inner || t.name.rfind("model.", 0) == 0;
  }
  return inner ? "model." : "";
}

int64_t number(const json& config, const char* key, int64_t otherwise) {
  const auto it = config.find(key);
  return it != config.end() && it->is_number_integer() ? it->get<int64_t>() : otherwise;
}

struct Heads {
  int64_t q = 0, kv = 0, size = 0;
};
Heads heads_of(const json& config) {
  Heads h;
  h.q = std::max<int64_t>(1, number(config, "num_attention_heads", 1));
  h.kv = number(config, "num_key_value_heads", h.q);
  h.size = number(config, "head_dim", number(config, "hidden_size", 0) / h.q);
  return h;
}

// Where row i of q or k of the Hugging Face order lies in a file whose rotary pairs are neighbours.
int64_t interleaved_row(int64_t row, int64_t size) {
  const int64_t head = row / size, i = row % size, half = size / 2;
  return head * size + 2 * (i % half) + i / half;
}

std::vector<int64_t> shape_in(const Checkpoint& checkpoint, const std::string& name) {
  for (const TensorInfo& t : checkpoint.tensors())
    if (t.name == name) return t.shape;
  return {};
}

// Rows of a matrix [n, width] or vector [n, 1], to the order of the file or back.
void reorder(std::vector<float>& values, int64_t n, int64_t width, int64_t size, bool back) {
  std::vector<float> out(values.size());
  for (int64_t r = 0; r < n; ++r) {
    const int64_t there = interleaved_row(r, size), from = back ? there : r, to = back ? r : there;
    std::copy_n(values.begin() + from * width, width, out.begin() + to * width);
  }
  values = std::move(out);
}

bool interleaved(const json& config) {
  return config.value("moiety_rope_interleaved", false);
}
bool turns(const std::string& name) {
  return name == "q_proj" || name == "k_proj";
}

// "layers.3" and "q_proj" of "model.layers.3.self_attn.q_proj".
struct Place {
  int64_t layer = 0;
  std::string name;
};
std::optional<Place> place_of(const std::string& path) {
  static const std::regex layers("^(?:.*\\.)?layers\\.([0-9]{1,9})\\.(?:[a-z_]+\\.)?([a-z_]+)$");
  std::smatch m;
  if (!std::regex_match(path, m, layers)) return {};
  return Place{std::stoll(m[1]), m[2]};
}

// Collects parts with explicit places: every (layer, matrix) may have a rank and a scale of its own.
struct Collected {
  struct One {
    int64_t rank;
    double alpha;
  };
  std::map<std::string, std::map<int64_t, One>> by_name;  // matrix -> layer
  bool dora = false;
  std::string bias = "none";
};

std::string escaped(const std::string& path) {
  std::string out;
  for (const char c : path) out += c == '.' ? std::string("\\.") : std::string(1, c);
  return out;
}

json part_of(const Collected& c, const std::string& adapter, double strength) {
  json part = {{"slug", "lora"}, {"site", "linear"}};
  if (!adapter.empty()) part["name"] = adapter;
  // The most frequent rank and alpha stand for all, the others as patterns.
  std::map<std::pair<int64_t, double>, int64_t> count;
  std::set<int64_t> layers;
  for (const auto& [name, places] : c.by_name)
    for (const auto& [layer, one] : places) {
      ++count[{one.rank, one.alpha}];
      layers.insert(layer);
    }
  const auto most =
      std::max_element(count.begin(), count.end(), [](auto& a, auto& b) { return a.second < b.second; })->first;
  part["rank"] = most.first;
  part["alpha"] = most.second;
  bool grid = true;
  for (const auto& [name, places] : c.by_name) grid = grid && places.size() == layers.size();
  json targets = json::array(), ranks = json::object(), alphas = json::object();
  const auto half_of = [](const std::string& name) {
    return name.find("gate") != std::string::npos || name.find("up_") != std::string::npos ||
                   name.find("down") != std::string::npos || name.find("experts") != std::string::npos
               ? "mlp"
               : "self_attn";
  };
  for (const auto& [name, places] : c.by_name) {
    if (grid) targets.push_back(name);
    for (const auto& [layer, one] : places) {
      const auto path = escaped(fmt::format("model.layers.{}.{}.{}", layer, half_of(name), name));
      if (!grid) targets.push_back(path);
      if (one.rank != most.first) ranks[path] = one.rank;
      if (one.alpha != most.second) alphas[path] = one.alpha;
    }
  }
  part["target"] = std::move(targets);
  part["layers"] = std::vector<int64_t>(layers.begin(), layers.end());
  if (!ranks.empty()) part["rank_pattern"] = std::move(ranks);
  if (!alphas.empty()) part["alpha_pattern"] = std::move(alphas);
  if (c.dora) part["dora"] = true;
  if (c.bias != "none") part["bias"] = c.bias;
  if (strength != 1.0) part["strength"] = strength;
  return part;
}

// What a base calls a tensor that transformers calls `path`.
std::string base_tensor(const std::string& path, const std::string& front) {
  constexpr const char* kModel = "model.";
  return path.rfind(kModel, 0) == 0 ? front + path.substr(std::strlen(kModel)) : path;
}

// The other way.
std::string peft_path(const std::string& name, const std::string& front) {
  return name.rfind(front, 0) == 0 ? "model." + name.substr(front.size()) : name;
}

bool turned_bias(const json& config, const std::string& name) {
  static const std::regex rows(".*\\.[qk]_proj\\.bias$");
  return interleaved(config) && std::regex_match(name, rows);
}

// The biases of an adapter as overlay tensors that take the place of the base's.
void add_biases(const PeftAdapter& adapter, const Checkpoint& base, std::vector<OverlayTensor>& own) {
  const std::string front = front_of(base), where = adapter.path().string();
  const int64_t size = heads_of(base.config()).size;
  for (const PeftBias& bias : adapter.biases()) {
    const std::string name = base_tensor(bias.path, front);
    check(base.has(name), "{}: the bias '{}' has no place in this model", where, shown(bias.path));
    const auto shape = shape_in(base, name);
    check(bias.value.shape == shape, "{}: the bias '{}' has the shape {}, and the model's {}", where, shown(bias.path),
          bias.value.shape, shape);
    auto values = bias.value.to_float();
    if (turned_bias(base.config(), name)) {
      const auto rows = static_cast<int64_t>(values.size());
      check(size > 0 && size % 2 == 0 && rows % size == 0, "{}: '{}' has {} numbers, which are no heads of {}", where,
            shown(bias.path), rows, size);
      reorder(values, rows, 1, size, false);
    }
    own.push_back(overlay_of(name, shape, std::move(values)));
  }
}

void add_peft(const PeftAdapter& adapter, const Checkpoint& base, const std::string& adapter_name, double strength,
              std::vector<OverlayTensor>& own, json& parts) {
  const json& config = base.config();
  const std::string front = front_of(base), middle = adapter_name.empty() ? "" : adapter_name + ".";
  const Heads heads = heads_of(config);
  const std::string where = adapter.path().string();
  const int64_t layers = number(config, "num_hidden_layers", 0), hidden = number(config, "hidden_size", 0);
  Collected collected;
  std::map<std::string, const TensorView*> biases;  // of adapted matrices, by their paths
  if (adapter.bias() == "lora_only")
    for (const PeftBias& bias : adapter.biases()) biases[bias.path.substr(0, bias.path.size() - 5)] = &bias.value;
  if (!adapter.biases().empty()) collected.bias = adapter.bias();
  if (adapter.bias() == "all") add_biases(adapter, base, own);
  bool lacking = false;
  for (const PeftMatrix& m : adapter.matrices()) {
    if (m.experts) {
      check(biases.count(m.path) == 0, "{}: {} has a bias, and matrices of experts have none of their own", where,
            shown(m.path));
      const auto place = place_of(m.path.substr(0, m.path.size() - 8));
      check(place.has_value() && place->layer < layers, "{}: {} is no layer of this model, which has {}", where,
            shown(m.path), layers);
      const int64_t in = m.a.shape[1], rows = m.b.shape[0], experts = m.a.shape[0] / m.rank, r = m.rank;
      // Gate and up read the hidden size, down its own; where an expert is as wide as the model, the rows tell.
      const int64_t width = number(config, "moe_intermediate_size", number(config, "intermediate_size", 0));
      const bool both = in == hidden && rows % 2 == 0 && (rows != hidden || 2 * width == hidden);
      const std::string name = both ? "experts.gate_up_proj" : "experts.down_proj";
      const auto a = m.a.to_float(), b = m.b.to_float();
      const std::string at = fmt::format("{}layers.{}.adapters.{}{}.", front, place->layer, middle, name);
      own.push_back(overlay_of(at + "lora_A", {experts, r, in}, a));
      // B [out, r E], rank slowest.
      const auto part = [&](int64_t begin, int64_t step, int64_t count) {
        std::vector<float> out(static_cast<size_t>(experts * count * r));
        for (int64_t e = 0; e < experts; ++e)
          for (int64_t o = 0; o < count; ++o)
            for (int64_t i = 0; i < r; ++i)
              out[static_cast<size_t>((e * count + o) * r + i)] =
                  b[static_cast<size_t>(((begin + o * step) * r + i) * experts + e)];
        return out;
      };
      if (both) {
        const bool alternate = config.value("model_type", std::string()) == "gpt_oss";
        const int64_t f = rows / 2;
        own.push_back(overlay_of(at + "lora_B_gate", {experts, f, r}, part(0, alternate ? 2 : 1, f)));
        own.push_back(overlay_of(at + "lora_B_up", {experts, f, r}, part(alternate ? 1 : f, alternate ? 2 : 1, f)));
      } else {
        own.push_back(overlay_of(at + "lora_B", {experts, rows, r}, part(0, 1, rows)));
      }
      collected.by_name[name][place->layer] = {r, m.scale * static_cast<double>(r)};
      continue;
    }
    const auto place = place_of(m.path);
    check(place.has_value() && place->layer < layers, "{}: {} is no matrix of this model, which has {} layers", where,
          shown(m.path), layers);
    // Fused matrices of some families are several here, with one A.
    struct Piece {
      std::string name;
      int64_t rows;
    };
    std::vector<Piece> pieces = {{place->name, m.b.shape[0]}};
    if (place->name == "qkv_proj")
      pieces = {{"q_proj", heads.q * heads.size}, {"k_proj", heads.kv * heads.size}, {"v_proj", heads.kv * heads.size}};
    if (place->name == "gate_up_proj") pieces = {{"gate_proj", m.b.shape[0] / 2}, {"up_proj", m.b.shape[0] / 2}};
    int64_t begin = 0;
    for (const Piece& p : pieces) begin += p.rows;
    check(begin == m.b.shape[0], "{}: {} has {} rows, and {} were expected", where, shown(m.path), m.b.shape[0], begin);
    check(pieces.size() == 1 || !m.has_magnitude, "{}: DoRA of {} cannot be taken apart", where, shown(m.path));
    const auto a = m.a.to_float(), b = m.b.to_float();
    const std::string base_bias = base_tensor(m.path + ".bias", front);
    const auto stored_bias = biases.find(m.path);
    std::vector<float> all_biases;
    if (stored_bias != biases.end()) {
      check(stored_bias->second->elements() == m.b.shape[0], "{}: {} has {} biases for {} rows", where, shown(m.path),
            stored_bias->second->elements(), m.b.shape[0]);
      all_biases = stored_bias->second->to_float();
    } else if (adapter.bias() != "none" && base.has(base_bias)) {
      lacking = lacking || adapter.biases().empty();
      // Those that were not stored are the base's.
      if (!biases.empty()) all_biases = base.get(base_bias).to_float();
    }
    begin = 0;
    for (const Piece& p : pieces) {
      const std::string at = fmt::format("{}layers.{}.adapters.{}{}.", front, place->layer, middle, p.name);
      std::vector<float> rows(b.begin() + begin * m.rank, b.begin() + (begin + p.rows) * m.rank);
      std::vector<float> bias;
      if (static_cast<int64_t>(all_biases.size()) == m.b.shape[0])
        bias.assign(all_biases.begin() + begin, all_biases.begin() + begin + p.rows);
      begin += p.rows;
      std::vector<float> magnitude = m.has_magnitude ? m.magnitude.to_float() : std::vector<float>();
      if (interleaved(config) && turns(p.name)) {
        check(heads.size > 0 && heads.size % 2 == 0 && p.rows % heads.size == 0,
              "{}: {} has {} rows, which are no heads of {}", where, shown(m.path), p.rows, heads.size);
        reorder(rows, p.rows, m.rank, heads.size, false);
        if (m.has_magnitude) reorder(magnitude, p.rows, 1, heads.size, false);
        // The base's own lie in its order already.
        if (!bias.empty() && stored_bias != biases.end()) reorder(bias, p.rows, 1, heads.size, false);
      }
      own.push_back(overlay_of(at + "lora_A", {m.rank, m.a.shape[1]}, a));
      own.push_back(overlay_of(at + "lora_B", {p.rows, m.rank}, std::move(rows)));
      if (m.has_magnitude) {
        own.push_back(overlay_of(at + "magnitude", {p.rows}, std::move(magnitude)));
        collected.dora = true;
      }
      if (!bias.empty()) own.push_back(overlay_of(at + "bias", {p.rows}, std::move(bias)));
      collected.by_name[p.name][place->layer] = {m.rank, m.scale * static_cast<double>(m.rank)};
    }
  }
  check(!collected.dora || std::all_of(adapter.matrices().begin(), adapter.matrices().end(),
                                       [](const PeftMatrix& m) { return m.has_magnitude; }),
        "{}: some matrices have magnitudes (DoRA) and some have none", where);
  if (lacking)
    log::warn("{}: `bias` is {}, and it holds no biases, as some versions of PEFT write it: the model's own are used",
              where, adapter.bias());
  parts.push_back(part_of(collected, adapter_name, strength));
}

// A tensor of the base that an adapter may bring anew.
bool is_replaced(const std::string& name) {
  return is_bias(name) && name.find(".adapters.") == std::string::npos;
}

bool is_own(const json& config) {
  return config.value("peft_type", std::string()) == "MOIETY";
}

}  // namespace

std::shared_ptr<const Checkpoint> with_adapters(std::shared_ptr<const Checkpoint> base,
                                                const std::vector<AdapterChoice>& adapters) {
  if (adapters.empty()) return base;
  json config = base->config();
  check(config.is_object(), "{}: a model without a config cannot take an adapter", base->path().string());
  json& parts = config["moiety"]["parts"];
  if (!parts.is_array()) parts = json::array();
  std::vector<OverlayTensor> own;
  std::set<std::string> names;
  std::vector<std::string> with_biases;  // adapters
  for (const json& part : parts)
    if (part.is_object() && part.contains("name") && part["name"].is_string()) names.insert(part["name"]);
  for (const AdapterChoice& choice : adapters) {
    const json description = read_config(choice.folder);
    std::string name;
    if (adapters.size() > 1 || !std::all_of(parts.begin(), parts.end(), stands_elsewhere)) {
      for (const char c : fs::absolute(choice.folder).lexically_normal().filename().string())
        name += std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '-' || c == '_' ? c : '_';
      if (name.empty()) name = "adapter";
      name = name.substr(0, 64);
      const std::string stem = name.substr(0, 56);
      for (int i = 2; !names.insert(name).second; ++i) name = fmt::format("{}-{}", stem, i);
    }
    const std::string where = (choice.folder / kConfig).string();
    reading_json(where, [&] {
      const auto count_biased = [&] {
        with_biases.push_back(choice.folder.string());
        check(with_biases.size() == 1,
              "{} and {} were both trained with biases, of which there can be one only: merge one of them first",
              with_biases[0], with_biases.back());
        check(choice.strength == 1.0, "{} was trained with biases, which have no strength", choice.folder.string());
      };
      if (!is_own(description)) {
        const auto adapter = PeftAdapter::open(choice.folder);
        if (!adapter->biases().empty()) count_biased();
        add_peft(*adapter, *base, name, choice.strength, own, parts);
        return 0;
      }
      const auto list = description.value("moiety", json::object()).value("parts", json());
      check(list.is_array() && !list.empty(), "{}: no `moiety.parts` in it", where);
      if (biased(list)) count_biased();
      for (json part : list) {
        check(part.is_object() && part.contains("slug"), "{}: `moiety.parts` holds something that is no part", where);
        if (!name.empty()) {
          check(!part.contains("name"), "{}: its parts have names already, so that it cannot stand beside another",
                where);
          part["name"] = name;
        }
        if (choice.strength != 1.0) {
          check(part["slug"] == "lora" || part["slug"] == "flylora", "{}: only LoRA and FlyLoRA have a strength",
                where);
          part["strength"] = part.value("strength", 1.0) * choice.strength;
        }
        parts.push_back(std::move(part));
      }
      const auto weights = read_weights(choice.folder);
      const std::string front = front_of(*base);
      const bool turned = description["moiety"].value("rope_interleaved", false);
      for (const TensorInfo& t : weights->tensors())
        check(turned == interleaved(base->config()) ||
                  (t.name.find("q_proj") == std::string::npos && t.name.find("k_proj") == std::string::npos),
              "{}: it was trained over a {}, whose rows of queries and keys lie in another order than this model's",
              where, turned ? "GGUF file" : "directory");
      for (const TensorInfo& t : weights->tensors()) {
        std::string own_name = t.name;
        const size_t at = own_name.find(".adapters.");
        if (at == std::string::npos && biases_learn(list) && is_bias(t.name)) {
          const std::string bias = base->has(front + own_name) ? front + own_name : own_name;
          check(base->has(bias) && shape_in(*base, bias) == t.shape, "{}: the bias '{}' {} has no place in this model",
                where, shown(t.name), t.shape);
          own.push_back(overlay_of(bias, t.shape, finite_floats(*weights, t.name, choice.folder)));
          continue;
        }
        check(at != std::string::npos, "{}: tensor '{}' is no adapter's", where, shown(t.name));
        if (!name.empty()) own_name.insert(at + 10, name + ".");
        own.push_back(overlay_of(front + own_name, t.shape, finite_floats(*weights, t.name, choice.folder)));
      }
      return 0;
    });
  }
  for (const auto& t : own)
    check(!base->has(t.info.name) || is_replaced(t.info.name), "{}: tensor '{}' is there already",
          base->path().string(), shown(t.info.name));
  return overlay(std::move(base), std::move(config), std::move(own));
}

std::string adapter_base(const fs::path& folder) {
  const json config = read_config(folder);
  const auto it = config.find("base_model_name_or_path");
  check(it != config.end() && it->is_string() && !it->get<std::string>().empty(),
        "{}: it does not say which model it adapts; name the model, and the adapter with --adapter",
        (folder / kConfig).string());
  const auto name = it->get<std::string>();
  const fs::path beside = folder / name;
  return !fs::exists(name) && fs::exists(beside) ? beside.string() : name;
}

std::shared_ptr<const Checkpoint> open_adapter(const fs::path& folder, std::shared_ptr<const Checkpoint> base) {
  if (!base) {
    const std::string at = adapter_base(folder);
    try {
      check(!is_adapter(at), "that is an adapter itself: merge it into its base first");
      base = Checkpoint::open(at);
    } catch (const Error& e) {
      fail("{} adapts {}, which cannot be opened ({}); name the model, and the adapter with --adapter", folder.string(),
           shown(at), e.what());
    }
  }
  // What stood beside the base's matrices is what was trained on: the adapter takes its place.
  if (json own = base->config(); own.contains("moiety") && own["moiety"].contains("parts")) {
    std::set<std::string> removed;
    for (const TensorInfo& t : base->tensors())
      if (t.name.find(".adapters.") != std::string::npos) removed.insert(t.name);
    own["moiety"]["parts"] = other_parts_of(own);
    if (!removed.empty()) base = overlay(std::move(base), std::move(own), {}, removed);
  }
  return with_adapters(std::move(base), {{folder, 1.0}});
}

// ---- Writing ----

namespace {

const std::vector<float>* values_of(const std::vector<AdapterTensor>& tensors, const std::string& name,
                                    std::vector<int64_t>& shape) {
  for (const auto& t : tensors)
    if (t.name == name) {
      shape = t.shape;
      return &t.values;
    }
  return nullptr;
}

// The LoRA as PEFT has it, or nothing where PEFT has no word for it.
struct AsPeft {
  json config;
  std::vector<AdapterTensor> tensors;
};
std::optional<AsPeft> as_peft(const json& parts, const std::vector<AdapterTensor>& tensors, const Checkpoint& base) {
  if (parts.size() != 1 || parts[0].value("slug", std::string()) != "lora") return {};
  const json& part = parts[0];
  const json& model = base.config();
  const Heads heads = heads_of(model);
  const std::string front = front_of(base), middle = part.contains("name") ? part["name"].get<std::string>() + "." : "";
  static const std::regex shape_of("layers\\.([0-9]+)\\.adapters\\.(.*)\\.lora_A$");
  AsPeft out;
  std::set<std::string> modules, parameters, adapted;
  std::map<std::string, std::set<int64_t>> layers;
  bool biases = false;
  int64_t model_layers = number(model, "num_hidden_layers", 0);
  for (const AdapterTensor& t : tensors) {
    if (is_replaced(t.name)) continue;
    if (t.name.rfind(front, 0) != 0) return {};
    const std::string rest = t.name.substr(front.size());
    if (rest.rfind("layers.", 0) != 0) return {};  // no model of transformers
    std::smatch m;
    if (!std::regex_match(rest, m, shape_of)) continue;
    const int64_t layer = std::stoll(m[1]);
    std::string name = m[2];
    if (!middle.empty() && name.rfind(middle, 0) == 0) name = name.substr(middle.size());
    const std::string at = t.name.substr(0, t.name.size() - 6);
    layers[name].insert(layer);
    std::vector<int64_t> shape;
    if (name.rfind("experts.", 0) == 0) {
      // One pair an expert; what experts share is written out for each.
      int64_t experts = 0;
      for (const char* key : {"num_local_experts", "num_experts", "n_routed_experts"})
        if (experts == 0) experts = number(model, key, 0);
      const int64_t r = t.shape[1], in = t.shape[2];
      if (experts == 0) return {};
      std::vector<const std::vector<float>*> bs;
      std::vector<int64_t> rows;
      const bool both = name == "experts.gate_up_proj";
      for (const char* suffix : {"lora_B_gate", "lora_B_up", "lora_B"})
        if (const auto* b = values_of(tensors, at + suffix, shape)) {
          bs.push_back(b);
          rows.push_back(shape[1]);
        }
      if (bs.size() != (both ? 2 : 1)) return {};
      const bool alternate = both && model.value("model_type", std::string()) == "gpt_oss";
      const int64_t all = both ? rows[0] + rows[1] : rows[0];
      AdapterTensor a{"", {experts * r, in}, std::vector<float>(static_cast<size_t>(experts * r * in))};
      AdapterTensor b{"", {all, r * experts}, std::vector<float>(static_cast<size_t>(all * r * experts))};
      for (int64_t e = 0; e < experts; ++e) {
        const int64_t ea = t.shape[0] == 1 ? 0 : e;
        std::copy_n(t.values.begin() + ea * r * in, r * in, a.values.begin() + e * r * in);
        for (size_t half = 0; half < bs.size(); ++half) {
          const int64_t f = rows[half], eb = static_cast<int64_t>(bs[half]->size()) == f * r ? 0 : e;
          for (int64_t o = 0; o < f; ++o) {
            const int64_t h = static_cast<int64_t>(half), to = alternate ? 2 * o + h : h * rows[0] + o;
            for (int64_t i = 0; i < r; ++i)
              b.values[static_cast<size_t>((to * r + i) * experts + e)] =
                  (*bs[half])[static_cast<size_t>((eb * f + o) * r + i)];
          }
        }
      }
      // PEFT wraps gate_up_proj first, down_proj around it.
      const bool wrapped =
          both &&
          values_of(tensors, at.substr(0, at.size() - name.size() - 1) + "experts.down_proj.lora_A", shape) != nullptr;
      const std::string place =
          fmt::format("{}model.layers.{}.mlp.experts{}.", kFront, layer, wrapped ? ".base_layer" : "");
      a.name = place + "lora_A.weight";
      b.name = place + "lora_B.weight";
      out.tensors.push_back(std::move(a));
      out.tensors.push_back(std::move(b));
      continue;
    }
    const bool attention = name.find("gate") == std::string::npos && name.find("up_") == std::string::npos &&
                           name.find("down") == std::string::npos;
    // Families whose file has q, k and v (gate and up) in one matrix: PEFT would know that one only.
    const std::string stored =
        fmt::format("{}layers.{}.{}.{}.weight", front, layer, attention ? "self_attn" : "mlp", name);
    if (!base.has(stored)) return {};
    const std::string place =
        fmt::format("{}model.layers.{}.{}.{}.", kFront, layer, attention ? "self_attn" : "mlp", name);
    const auto* b = values_of(tensors, at + "lora_B", shape);
    if (b == nullptr) return {};
    AdapterTensor second{place + "lora_B.weight", shape, *b};
    if (interleaved(model) && turns(name)) reorder(second.values, shape[0], shape[1], heads.size, true);
    out.tensors.push_back({place + "lora_A.weight", t.shape, t.values});
    out.tensors.push_back(std::move(second));
    if (const auto* m2 = values_of(tensors, at + "magnitude", shape)) {
      AdapterTensor magnitude{place + "lora_magnitude_vector", shape, *m2};
      if (interleaved(model) && turns(name)) reorder(magnitude.values, shape[0], 1, heads.size, true);
      out.tensors.push_back(std::move(magnitude));
    }
    if (const auto* own = values_of(tensors, at + "bias", shape)) {
      AdapterTensor bias{place + "base_layer.bias", shape, *own};
      if (interleaved(model) && turns(name)) reorder(bias.values, shape[0], 1, heads.size, true);
      out.tensors.push_back(std::move(bias));
      biases = true;
    }
    adapted.insert(place);
  }
  // Biases of the base, those of adapted matrices inside of PEFT's wrapper.
  const bool wraps_experts =
      std::any_of(layers.begin(), layers.end(), [](const auto& l) { return l.first.rfind("experts.", 0) == 0; });
  for (const AdapterTensor& t : tensors) {
    if (!is_replaced(t.name)) continue;
    AdapterTensor bias{kFront + peft_path(t.name, front), t.shape, t.values};
    if (wraps_experts && bias.name.find(".experts.") != std::string::npos) return {};
    const size_t last = bias.name.rfind('.') + 1;
    if (adapted.count(bias.name.substr(0, last)) != 0) bias.name.insert(last, "base_layer.");
    if (turned_bias(model, t.name)) reorder(bias.values, t.shape[0], 1, heads.size, true);
    out.tensors.push_back(std::move(bias));
    biases = true;
  }
  bool everywhere = true;
  for (const auto& [name, of] : layers) everywhere = everywhere && static_cast<int64_t>(of.size()) == model_layers;
  std::vector<std::string> patterns;
  for (const auto& [name, of] : layers) {
    const bool experts = name.rfind("experts.", 0) == 0;
    if (experts) {
      if (everywhere) parameters.insert("mlp." + name);
      for (const int64_t l : of)
        if (!everywhere) parameters.insert(fmt::format("model.layers.{}.mlp.{}", l, name));
      continue;
    }
    modules.insert(name);
    std::vector<std::string> numbers;
    for (const int64_t l : of) numbers.push_back(std::to_string(l));
    patterns.push_back(fmt::format(".*layers\\.({})\\.[a-z_]+\\.{}", fmt::join(numbers, "|"), name));
  }
  json& c = out.config;
  c = {{"peft_type", "LORA"},
       {"task_type", "CAUSAL_LM"},
       {"inference_mode", true},
       {"r", part.value("rank", json(8))},
       {"lora_alpha", part.value("alpha", 8.0) * part.value("strength", 1.0)},
       {"lora_dropout", part.value("dropout", 0.0)},
       {"use_rslora", part.value("rslora", false)},
       {"use_dora", part.value("dora", false)},
       {"bias", biases ? bias_of(part) : "none"},
       {"fan_in_fan_out", false},
       {"init_lora_weights", part.value("init", std::string("uniform")) == "gaussian" ? json("gaussian") : json(true)},
       {"rank_pattern", part.value("rank_pattern", json::object())},
       {"alpha_pattern", json::object()}};
  const json alphas = part.value("alpha_pattern", json::object());
  for (const auto& [pattern, alpha] : alphas.items())
    c["alpha_pattern"][pattern] = alpha.get<double>() * part.value("strength", 1.0);
  // PEFT wants an integer where it is one.
  if (const double alpha = c["lora_alpha"].get<double>(); alpha == std::floor(alpha))
    c["lora_alpha"] = static_cast<int64_t>(alpha);
  if (everywhere || modules.empty())
    c["target_modules"] = std::vector<std::string>(modules.begin(), modules.end());
  else
    c["target_modules"] = fmt::format("{}", fmt::join(patterns, "|"));
  c["target_parameters"] =
      parameters.empty() ? json() : json(std::vector<std::string>(parameters.begin(), parameters.end()));
  return out;
}

}  // namespace

bool write_adapter(const fs::path& folder, const json& parts, std::vector<AdapterTensor> tensors,
                   const Checkpoint& base, const std::string& base_name) {
  check(parts.is_array() && !parts.empty(), "there is no part to write as an adapter");
  for (const auto& t : tensors) {
    const auto problem = not_finite(t.values, t.shape);
    check(problem.empty(), "{}: '{}' {}: such an adapter is not written", folder.string(), t.name, problem);
  }
  std::optional<AsPeft> peft = as_peft(parts, tensors, base);
  const bool readable = peft.has_value();
  if (!readable) {
    peft.emplace();
    peft->config = {{"peft_type", "MOIETY"}, {"moiety", {{"parts", parts}}}};
    if (interleaved(base.config())) peft->config["moiety"]["rope_interleaved"] = true;
    const std::string front = front_of(base);
    for (auto& t : tensors) {
      if (t.name.rfind(front, 0) == 0) t.name = t.name.substr(front.size());
      peft->tensors.push_back(std::move(t));
    }
  }
  peft->config["base_model_name_or_path"] = base_name;
  std::vector<TensorInfo> infos;
  for (const auto& t : peft->tensors) {
    TensorInfo info;
    info.name = t.name;
    info.format = Format::F32;
    info.shape = t.shape;
    infos.push_back(std::move(info));
  }
  fs::create_directories(folder);
  SafetensorsWriter writer(folder / kWeights, infos, {{"format", "pt"}});
  for (const auto& t : peft->tensors) writer.write(t.name, std::as_bytes(std::span(t.values)));
  writer.finish();
  write_file(folder / kConfig, peft->config.dump(2) + "\n");
  return readable;
}

}  // namespace moiety
