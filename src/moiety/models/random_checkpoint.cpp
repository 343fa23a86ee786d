#include "moiety/models/random_checkpoint.h"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <span>

#include "moiety/base/error.h"
#include "moiety/base/random.h"
#include "moiety/kernels/half.h"
#include "moiety/models/model.h"
#include "moiety/nn/parameters.h"

namespace moiety {
namespace {

using nlohmann::json;

// A prime number of numbers: rows of common lengths do not fall on each other.
constexpr size_t kTable = 1048583;

class RandomCheckpoint : public Checkpoint {
 public:
  RandomCheckpoint(json config, std::filesystem::path folder, uint64_t seed)
      : config_(std::move(config)), folder_(std::move(folder)), seed_(seed) {
    const auto model = make_causal(config_, {.dtype = "f32", .device = torch::kMeta});
    const torch::NoGradGuard frozen;
    for (const StoredTensor& s : model->stored()) {
      TensorInfo t;
      t.name = s.name;
      t.shape = s.value().sizes().vec();
      t.format = t.shape.size() < 2 ? Format::F32 : Format::BF16;
      places_[t.name] = tensors_.size();
      tensors_.push_back(std::move(t));
    }
    RandomStream stream(seed_, "weights");
    // Four uniform numbers added up are near enough to a normal one, and quick.
    const double scale = std::sqrt(3.0) * config_.value("initializer_range", 0.02);
    int64_t largest = 0;
    for (const TensorInfo& t : tensors_)
      if (t.format == Format::BF16) largest = std::max(largest, t.elements());
    numbers_->resize(kTable + static_cast<size_t>(largest));
    for (uint16_t& v : std::span(numbers_->data(), kTable)) {
      const uint64_t bits = stream.bits();
      const auto sum =
          static_cast<double>((bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48));
      v = float_to_bf16(static_cast<float>(scale * (sum / 65535.0 - 2.0)));
    }
    for (size_t i = kTable; i < numbers_->size(); i += kTable)
      std::copy_n(numbers_->data(), std::min(kTable, numbers_->size() - i), numbers_->data() + i);
  }

  const json& config() const override { return config_; }
  const json& generation_config() const override { return generation_; }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  bool has(const std::string& name) const override { return places_.count(name) > 0; }
  TensorView get(const std::string& name) const override {
    const auto it = places_.find(name);
    check(it != places_.end(), "the model has no tensor `{}`", name);
    TensorView view;
    static_cast<TensorInfo&>(view) = tensors_[it->second];
    if (view.format == Format::F32) {
      const float fill = name.find("norm") != std::string::npos && !name.ends_with("bias") ? 1.f : 0.f;
      const auto values = std::make_shared<std::vector<float>>(static_cast<size_t>(view.elements()), fill);
      view.data = std::as_bytes(std::span(*values));
      view.owner = values;
    } else {
      const auto at = static_cast<size_t>(RandomStream(seed_, name).below(kTable));
      view.data = std::as_bytes(std::span(numbers_->data() + at, static_cast<size_t>(view.elements())));
      view.owner = numbers_;
    }
    return view;
  }
  std::filesystem::path path() const override { return folder_; }
  int64_t bytes_on_disk() const override { return 0; }

 private:
  json config_, generation_ = json::object();
  std::filesystem::path folder_;
  uint64_t seed_;
  std::vector<TensorInfo> tensors_;
  std::map<std::string, size_t> places_;
  // One table over and over: every matrix is a piece of it.
  std::shared_ptr<std::vector<uint16_t>> numbers_ = std::make_shared<std::vector<uint16_t>>();
};

}  // namespace

std::shared_ptr<const Checkpoint> random_checkpoint(json config, std::filesystem::path folder, uint64_t seed) {
  return std::make_shared<RandomCheckpoint>(std::move(config), std::move(folder), seed);
}

int64_t parameters_of(const json& config) {
  const auto model = make_causal(config, {.dtype = "f32", .device = torch::kMeta});
  return parameter_count(*model);
}

json config_of_size(const std::string& family, double parameters, const json& fixed) {
  check(parameters >= 1e6 && parameters <= 1e13, "a model of {} parameters cannot be made: 1M to 10T can", parameters);
  const auto at = [&](int64_t hidden, int64_t layers) {
    const int64_t wide = (hidden * 8 / 3 + 255) / 256 * 256, narrow = std::max<int64_t>(256, hidden / 2 / 256 * 256);
    json c = {{"model_type", family},
              {"hidden_size", hidden},
              {"num_hidden_layers", layers},
              {"num_attention_heads", hidden / 64},
              {"num_key_value_heads", hidden / 128},
              {"head_dim", 64},
              {"vocab_size", std::clamp<int64_t>(static_cast<int64_t>(parameters / 2000) / 256 * 256, 512, 32000)},
              {"max_position_embeddings", 4096},
              {"tie_word_embeddings", false}};
    // Families call the same things by different names; the others are not read.
    const int64_t experts = fixed.value("experts", int64_t{32});
    for (const char* key : {"num_local_experts", "num_experts", "n_routed_experts"}) c[key] = experts;
    c["num_experts_per_tok"] = fixed.value("top_k", std::min<int64_t>(4, experts));
    c["moe_intermediate_size"] = fixed.value("expert_width", narrow);
    c["intermediate_size"] = family == "mixtral" ? c["moe_intermediate_size"] : json(wide);
    for (const auto& [key, value] : fixed.items())
      if (key != "experts" && key != "top_k" && key != "expert_width") c[key] = value;
    c["num_hidden_layers"] = layers;
    return c;
  };
  // Blocks behind the third are alike: two small models tell the size of any.
  const auto size = [&](int64_t hidden, int64_t layers) {
    const auto few = static_cast<double>(parameters_of(at(hidden, 3))),
               more = static_cast<double>(parameters_of(at(hidden, 4)));
    return few + static_cast<double>(layers - 3) * (more - few);
  };
  json best;
  double off = 1e9;
  for (int64_t hidden = fixed.value("hidden_size", int64_t{256}); hidden <= 16384; hidden += 256) {
    // About a block for every 64 of the hidden size, as published models have it; up to twice as many or half fit too.
    const double one = size(hidden, 4) - size(hidden, 3), rest = size(hidden, 3) - 3 * one;
    const int64_t usual = fixed.value("num_hidden_layers", std::max<int64_t>(4, hidden / 64));
    const bool free = !fixed.contains("num_hidden_layers");
    const auto layers =
        free ? std::clamp<int64_t>(std::llround((parameters - rest) / one), std::max<int64_t>(2, usual / 2), 2 * usual)
             : usual;
    const double miss = std::abs(std::log((rest + static_cast<double>(layers) * one) / parameters));
    // Of sizes that fit, the shape nearest to the usual one.
    const double odd = 0.1 * std::abs(std::log(static_cast<double>(layers) / static_cast<double>(usual)));
    if (miss + odd < off) {
      off = miss + odd;
      best = at(hidden, layers);
      best["num_hidden_layers"] = layers;
    }
    if (fixed.contains("hidden_size")) break;
    if (rest + 2 * one > 2 * parameters) break;  // larger ones are further away
  }
  off = std::abs(std::log(static_cast<double>(parameters_of(best)) / parameters));
  check(off < std::log(1.25), "no {} comes near {:.3g} parameters under these settings: the nearest has {:.3g}", family,
        parameters, static_cast<double>(parameters_of(best)));
  return best;
}

}  // namespace moiety
