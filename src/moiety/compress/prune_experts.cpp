#include "moiety/compress/prune_experts.h"

#include <fmt/ranges.h>
#include <torch/torch.h>

#include <algorithm>
#include <charconv>
#include <map>
#include <regex>
#include <set>

#include "moiety/base/config.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/text.h"
#include "moiety/io/overlay.h"
#include "moiety/io/sha256.h"

namespace moiety {
namespace {

using nlohmann::json;

int64_t number_of(const std::string& text, const std::string& whole) {
  int64_t n = 0;
  const auto [rest, error] = std::from_chars(text.data(), text.data() + text.size(), n);
  check(error == std::errc() && rest == text.data() + text.size() && !text.empty(),
        "'{}' names no experts: LAYER,EXPERT;LAYER,EXPERT is wanted, as 1,68;2,92", shown(whole));
  return n;
}

}  // namespace

std::vector<ExpertAt> parse_experts(const std::string& text) {
  std::vector<ExpertAt> out;
  std::set<ExpertAt> seen;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find(';', at), text.size());
    const std::string pair = text.substr(at, end - at);
    const size_t comma = pair.find(',');
    check(comma != std::string::npos, "'{}' names no experts: LAYER,EXPERT;LAYER,EXPERT is wanted, as 1,68;2,92",
          shown(text));
    const ExpertAt one{number_of(pair.substr(0, comma), text), number_of(pair.substr(comma + 1), text)};
    check(one.layer >= 0 && one.expert >= -1,
          "'{}' names layer {}, expert {}: layers and experts count from 0, and -1 is the shared expert", shown(text),
          one.layer, one.expert);
    check(seen.insert(one).second, "'{}' names expert {} of layer {} twice", shown(text), one.expert, one.layer);
    out.push_back(one);
    at = end + 1;
  }
  return out;
}

torch::Tensor without_experts(const torch::Tensor& down, const std::vector<int64_t>& experts) {
  auto out = down.clone();
  for (const int64_t e : experts) {
    check(e >= 0 && e < down.size(0), "expert {} does not exist: there are 0 to {}", e, down.size(0) - 1);
    out.select(0, e).zero_();
  }
  return out;
}

namespace {

// Where the down projections of one layer lie.
struct DownTensors {
  std::map<int64_t, std::vector<std::string>> separate;  // by expert
  std::vector<std::string> stacked;                      // [E, ...]
  std::vector<std::string> shared;
  int64_t experts = 0;
};

std::map<int64_t, DownTensors> down_tensors(const Checkpoint& checkpoint) {
  static const std::regex place(R"((?:.*\.)?layers\.([0-9]{1,9})\.(.*))"),
      separate(R"((?:mlp|block_sparse_moe)\.experts\.([0-9]{1,9})\.(?:down_proj|w2)\.(?:weight|bias))"),
      stacked(R"((?:mlp|block_sparse_moe)\.experts\.down_proj(?:_bias|_blocks|_scales)?)"
              R"(|block_sparse_moe\.output_linear\.weight)"),
      shared(
          R"((?:mlp|block_sparse_moe)\.shared_experts?\.down_proj\.(?:weight|bias)|shared_mlp\.output_linear\.weight)");
  std::map<int64_t, DownTensors> out;
  for (const TensorInfo& t : checkpoint.tensors()) {
    std::smatch at, found;
    if (!std::regex_match(t.name, at, place)) continue;
    const int64_t layer = std::stoll(at[1]);
    const std::string rest = at[2];
    if (std::regex_match(rest, found, separate)) {
      const int64_t e = std::stoll(found[1]);
      out[layer].separate[e].push_back(t.name);
      out[layer].experts = std::max(out[layer].experts, e + 1);
    } else if (std::regex_match(rest, stacked)) {
      check(!t.shape.empty(), "tensor '{}' is no stack of experts", shown(t.name));
      out[layer].stacked.push_back(t.name);
      out[layer].experts = t.shape[0];
    } else if (std::regex_match(rest, shared)) {
      out[layer].shared.push_back(t.name);
    }
  }
  std::erase_if(out, [](const auto& layer) { return layer.second.experts == 0; });
  return out;
}

// Zero bytes are zeros in every plain format, and in all block formats: their scales are zero too.
std::vector<OverlayTensor> zeroed(const std::shared_ptr<const Checkpoint>& base,
                                  const std::map<std::string, std::vector<int64_t>>& rows) {
  std::vector<OverlayTensor> out;
  for (const auto& [name, experts] : rows) {
    OverlayTensor t;
    t.info = base->get(name);
    t.get = [base, name = name, experts = experts] {
      TensorView v = base->get(name);
      const auto bytes = std::make_shared<std::vector<std::byte>>(v.data.begin(), v.data.end());
      // None: the whole tensor.
      const size_t one = experts.empty() ? bytes->size() : bytes->size() / static_cast<size_t>(v.shape[0]);
      for (const int64_t e : experts.empty() ? std::vector<int64_t>{0} : experts)
        std::fill_n(bytes->begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(e) * one), one, std::byte{0});
      v.data = *bytes;
      v.owner = bytes;
      return v;
    };
    out.push_back(std::move(t));
  }
  return out;
}

}  // namespace

std::shared_ptr<const Checkpoint> prune_experts(std::shared_ptr<const Checkpoint> base,
                                                const std::vector<ExpertAt>& experts) {
  const auto layers = down_tensors(*base);
  check(!layers.empty(), "{}: no layer has experts", base->path().string());
  std::vector<int64_t> known;
  for (const auto& [layer, unused] : layers) known.push_back(layer);
  std::map<std::string, std::vector<int64_t>> rows;
  for (const ExpertAt& e : experts) {
    const auto found = layers.find(e.layer);
    check(found != layers.end(), "layer {} has no experts; layers with experts are {}", e.layer,
          fmt::join(known, ", "));
    const DownTensors& down = found->second;
    if (e.expert < 0) {
      check(!down.shared.empty(), "layer {} has no shared expert", e.layer);
      for (const auto& name : down.shared) rows[name];
      continue;
    }
    check(e.expert < down.experts, "layer {} has no expert {}; it has 0 to {}", e.layer, e.expert, down.experts - 1);
    for (const auto& name : down.stacked) rows[name].push_back(e.expert);
    if (const auto own = down.separate.find(e.expert); own != down.separate.end())
      for (const auto& name : own->second) rows[name];
  }
  json config = base->config();
  auto tensors = zeroed(base, rows);
  return overlay(std::move(base), std::move(config), std::move(tensors));
}

std::string config_hash(const json& config) {
  json same = config;
  // What a conversion may change without another model coming of it.
  for (const char* key : {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures"})
    same.erase(key);
  const std::string text = same.dump(-1, ' ', false, json::error_handler_t::replace);
  Sha256 hash;
  hash.update(std::as_bytes(std::span(text)));
  return hash.hex();
}

std::vector<ExpertAt> reported_experts(const std::string& file, const json& config) {
  const json report = parse_json(read_text(file), file);
  check(report.is_object() && report.contains("super_experts") && report.contains("config_hash"),
        "{} is no report of `moiety analyze super-experts`", file);
  return reading_json(file, [&] {
    const auto made_for = report.at("config_hash").get<std::string>(), here = config_hash(config);
    check(made_for == here, "{} was made for another model: its config has the hash {}, this one's is {}", file,
          shown(made_for, 16), here.substr(0, 12));
    std::vector<ExpertAt> out;
    for (const json& one : report.at("super_experts"))
      out.push_back({one.at("layer_index").get<int64_t>(), one.at("expert_index").get<int64_t>()});
    return out;
  });
}

}  // namespace moiety
