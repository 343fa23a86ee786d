#include "moiety/models/sentence.h"

#include <torch/torch.h>
#include <utf8proc.h>

#include <algorithm>
#include <filesystem>
#include <numeric>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/io/safetensors.h"
#include "moiety/nn/weights.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;
namespace fs = std::filesystem;

/// The JSON object or list of a file; nullopt when there is no such file.
std::optional<json> read_json(const fs::path& path) {
  std::error_code ec;
  if (!fs::is_regular_file(path, ec)) return std::nullopt;
  json value = json::parse(read_text(path), nullptr, false);
  check(!value.is_discarded(), "{} is not valid JSON", path.string());
  return value;
}

template <class T>
T field(const json& object, const char* key, T fallback, const fs::path& where) {
  check(object.is_object(), "{} must hold a JSON object", where.string());
  const auto it = object.find(key);
  if (it == object.end() || it->is_null()) return fallback;
  try {
    return it->get<T>();
  } catch (const json::exception&) {
    fail("{}: {} has an unusable value {}", where.string(), key, it->dump());
  }
}

Tensor read_tensor(const SafetensorsFile& file, const fs::path& where, const std::string& name,
                   const std::vector<int64_t>& shape) {
  check(file.has(name), "{}: tensor '{}' is missing", where.string(), name);
  const TensorView view = file.get(name);
  check(view.shape == shape, "{}: tensor '{}' has shape [{}], the config asks for [{}]", where.string(), name,
        fmt::join(view.shape, ", "), fmt::join(shape, ", "));
  const Tensor t = as_tensor(view);
  check(t.is_floating_point(), "{}: tensor '{}' holds {}, not numbers with a fraction", where.string(), name,
        info(view.format).name);
  return t.to(torch::kFloat32);
}

/// torch's class names, as sentence-transformers writes them.
Activation module_activation(const std::string& name, const fs::path& where) {
  const std::string tail = name.substr(name.rfind('.') + 1);
  if (tail == "Identity") return nullptr;
  if (tail == "Tanh") return activation("tanh");
  if (tail == "ReLU") return activation("relu");
  if (tail == "GELU") return activation("gelu");
  if (tail == "SiLU") return activation("silu");
  if (tail == "Sigmoid") return activation("sigmoid");
  fail("{}: activation_function '{}' is not supported; known are Identity, Tanh, ReLU, GELU, SiLU, Sigmoid",
       where.string(), name);
}

void read_pooling(const fs::path& where, SentenceSettings& settings) {
  const json config = read_json(where).value_or(json::object());
  settings.pooling.clear();
  if (config.contains("pooling_mode")) {
    const json& mode = config["pooling_mode"];
    if (mode.is_string()) {
      settings.pooling.push_back(pooling_mode(mode.get<std::string>()));
    } else {
      for (const auto& m : field(config, "pooling_mode", std::vector<std::string>{}, where))
        settings.pooling.push_back(pooling_mode(m));
    }
  } else {
    static const std::pair<const char*, const char*> flags[] = {
        {"pooling_mode_cls_token", "cls"},
        {"pooling_mode_max_tokens", "max"},
        {"pooling_mode_mean_tokens", "mean"},
        {"pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens"},
        {"pooling_mode_weightedmean_tokens", "weightedmean"},
        {"pooling_mode_lasttoken", "lasttoken"},
    };
    for (const auto& [flag, mode] : flags)
      if (field(config, flag, false, where)) settings.pooling.push_back(mode);
  }
  if (settings.pooling.empty()) settings.pooling = {"mean"};
  settings.include_prompt = field(config, "include_prompt", true, where);
}

void read_length_and_case(const fs::path& folder, SentenceSettings& settings) {
  for (const char* family : {"bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"}) {
    const fs::path where = folder / fmt::format("sentence_{}_config.json", family);
    const auto config = read_json(where);
    if (!config) continue;
    settings.max_length = field(*config, "max_seq_length", int64_t{0}, where);
    settings.lower_case = field(*config, "do_lower_case", false, where);
    break;
  }
  const fs::path where = folder / "tokenizer_config.json";
  if (settings.max_length > 0) return;
  if (const auto config = read_json(where)) {
    // Absent limits are written as a number like 1e30.
    const double limit = field(*config, "model_max_length", 0.0, where);
    if (limit > 0 && limit < 1e9) settings.max_length = static_cast<int64_t>(limit);
  }
}

/// A module's folder inside the checkpoint; a name that leads out of it is refused.
fs::path module_folder(const fs::path& folder, const std::string& relative) {
  const fs::path inside = fs::path(relative).lexically_normal();
  check(inside.is_relative() && (inside.empty() || *inside.begin() != ".."), "modules.json: path '{}' leads out of {}",
        relative, folder.string());
  return folder / inside;
}

std::string lower(const std::string& text) {
  std::string out;
  const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  auto left = static_cast<utf8proc_ssize_t>(text.size());
  while (left > 0) {
    utf8proc_int32_t c = 0;
    const auto used = utf8proc_iterate(bytes, left, &c);
    if (used <= 0) {  // not UTF-8: left for the tokenizer to judge
      out.push_back(static_cast<char>(*bytes++));
      --left;
      continue;
    }
    utf8proc_uint8_t buffer[4];
    out.append(reinterpret_cast<const char*>(buffer),
               static_cast<size_t>(utf8proc_encode_char(utf8proc_tolower(c), buffer)));
    bytes += used;
    left -= used;
  }
  return out;
}

}  // namespace

std::string pooling_mode(const std::string& name) {
  static const std::map<std::string, std::string> names = {
      {"cls", "cls"},
      {"max", "max"},
      {"mean", "mean"},
      {"mean_sqrt_len_tokens", "mean_sqrt_len_tokens"},
      {"mean_sqrt_len", "mean_sqrt_len_tokens"},
      {"weightedmean", "weightedmean"},
      {"weighted_mean", "weightedmean"},
      {"lasttoken", "lasttoken"},
      {"last", "lasttoken"},
  };
  const auto it = names.find(name);
  check(it != names.end(),
        "unknown pooling '{}'; known are cls, max, mean, mean_sqrt_len_tokens, weightedmean, lasttoken", name);
  return it->second;
}

Tensor pool(const Tensor& hidden, const Tensor& mask, const std::vector<std::string>& modes, int64_t prompt) {
  check(hidden.dim() == 3, "pooling needs hidden states [batch, tokens, features]");
  const int64_t batch = hidden.size(0), tokens = hidden.size(1);
  const Tensor x = hidden.to(torch::kFloat32);
  const Tensor real =
      mask.defined() ? mask.to(torch::kBool) : torch::ones({batch, tokens}, hidden.options().dtype(torch::kBool));
  const Tensor order = real.to(torch::kInt64).cumsum(1);  // 1 for the first real token
  const Tensor used = prompt > 0 ? real & (order > prompt) : real;
  const Tensor any = used.any(1, true);  // [B, 1]
  const Tensor weight = used.to(torch::kFloat32).unsqueeze(-1);
  const auto pick = [&](const Tensor& index) {  // index [B]
    return x.gather(1, index.view({batch, 1, 1}).expand({batch, 1, x.size(2)})).squeeze(1);
  };
  std::vector<Tensor> out;
  for (const auto& name : modes) {
    const std::string mode = pooling_mode(name);
    Tensor y;
    if (mode == "cls") {
      y = pick(used.to(torch::kInt64).argmax(1));
    } else if (mode == "lasttoken") {
      y = pick(tokens - 1 - used.flip(1).to(torch::kInt64).argmax(1));
    } else if (mode == "max") {
      y = std::get<0>(x.masked_fill(~used.unsqueeze(-1), -std::numeric_limits<float>::infinity()).max(1));
    } else if (mode == "weightedmean") {
      // Leaving out a prompt keeps the weights that the other tokens have by their place in the row.
      const Tensor w = weight * order.to(torch::kFloat32).unsqueeze(-1);
      y = (x * w).sum(1) / w.sum(1).clamp_min(1e-9);
    } else {
      const Tensor count = weight.sum(1).clamp_min(1e-9);
      y = (x * weight).sum(1) / (mode == "mean" ? count : count.sqrt());
    }
    out.push_back(torch::where(any, y, torch::zeros_like(y)));
  }
  check(!out.empty(), "pooling needs at least one mode");
  return torch::cat(out, 1);
}

SentenceHead::SentenceHead(const Checkpoint& checkpoint, const LoadOptions& options) {
  const auto place = [&](const Tensor& t) {
    Tensor own = t.to(options.device);
    if (options.trainable) own = (own.is_same(t) ? own.clone() : own).requires_grad_(true);
    return own;
  };
  const auto add_l2 = [&] { steps_.push_back(Step{}); };
  if (const auto gguf = checkpoint.gguf()) {
    const auto type = gguf->integer(gguf->string("general.architecture").value_or("") + ".pooling_type").value_or(1);
    // 0 none, 4 rank: no sentence vector is defined, so the default holds.
    settings.pooling = {type == 2 ? "cls" : type == 3 ? "lasttoken" : "mean"};
    add_l2();
    return;
  }
  std::error_code ec;
  const fs::path folder = fs::is_directory(checkpoint.path(), ec) ? checkpoint.path() : checkpoint.path().parent_path();
  read_length_and_case(folder, settings);
  // Old folders keep the model, and with it this head's checkpoint, in a folder of its own (0_Transformer).
  fs::path root = folder;
  fs::path list_path = root / "modules.json";
  auto list = read_json(list_path);
  if (!list && folder.filename().string().starts_with("0_")) {
    root = folder.parent_path();
    list_path = root / "modules.json";
    list = read_json(list_path);
  }
  if (const auto config = read_json(root / "config_sentence_transformers.json")) {
    const fs::path where = root / "config_sentence_transformers.json";
    settings.prompts = field(*config, "prompts", std::map<std::string, std::string>{}, where);
    settings.default_prompt = field(*config, "default_prompt_name", std::string(), where);
    settings.similarity = field(*config, "similarity_fn_name", std::string("cosine"), where);
  }
  if (!list) {
    add_l2();
    return;
  }
  check(list->is_array(), "{} must hold a list of modules", list_path.string());
  for (const json& entry : *list) {
    const std::string type = field(entry, "type", std::string(), list_path);
    const std::string kind = type.substr(type.rfind('.') + 1);
    const fs::path at = module_folder(root, field(entry, "path", std::string(), list_path));
    const fs::path config_path = at / "config.json", weights_path = at / "model.safetensors";
    if (kind == "Transformer" || kind == "Dropout") continue;
    if (kind == "Pooling") {
      read_pooling(config_path, settings);
    } else if (kind == "Normalize") {
      add_l2();
    } else if (kind == "Dense" || kind == "LayerNorm") {
      const auto config = read_json(config_path);
      check(config.has_value(), "{} is missing", config_path.string());
      check(fs::exists(weights_path, ec),
            "{} is missing (weights in pytorch_model.bin must be converted to safetensors)", weights_path.string());
      const auto file = SafetensorsFile::open(weights_path);
      const std::string name = field(entry, "name", std::to_string(steps_.size()), list_path);
      Step step;
      if (kind == "LayerNorm") {
        step.kind = Step::norm;
        const auto size = field(*config, "dimension", int64_t{0}, config_path);
        step.weight = register_parameter("norm_" + name + "_weight",
                                         place(read_tensor(*file, weights_path, "norm.weight", {size})), false);
        step.bias = register_parameter("norm_" + name + "_bias",
                                       place(read_tensor(*file, weights_path, "norm.bias", {size})), false);
      } else {
        step.kind = Step::dense;
        for (const char* key : {"module_input_name", "module_output_name"}) {
          const auto what = field(*config, key, std::string("sentence_embedding"), config_path);
          check(what == "sentence_embedding", "{}: {} '{}' is not supported; only 'sentence_embedding' is",
                config_path.string(), key, what);
        }
        const auto in = field(*config, "in_features", int64_t{0}, config_path),
                   out = field(*config, "out_features", int64_t{0}, config_path);
        Tensor bias;
        if (field(*config, "bias", true, config_path))
          bias = place(read_tensor(*file, weights_path, "linear.bias", {out}));
        step.linear = Linear(place(read_tensor(*file, weights_path, "linear.weight", {out, in})), bias);
        register_module("dense_" + name, step.linear);
        step.activation =
            module_activation(field(*config, "activation_function", std::string("Tanh"), config_path), config_path);
        step.use_residual = field(*config, "use_residual", false, config_path);
        if (step.use_residual && in != out) {
          step.residual = Linear(place(read_tensor(*file, weights_path, "residual.weight", {out, in})));
          register_module("residual_" + name, step.residual);
        }
      }
      steps_.push_back(std::move(step));
    } else {
      fail(
          "{}: module type '{}' is not supported; known are Transformer, Pooling, Dense, LayerNorm, Normalize, Dropout",
          list_path.string(), type);
    }
  }
}

Tensor SentenceHead::forward(const Tensor& hidden, const Tensor& mask, int64_t prompt,
                             const std::vector<std::string>& pooling, std::optional<bool> normalize) {
  const bool own = pooling.empty();
  const auto unit = [](const Tensor& y) { return y / y.norm(2, -1, true).clamp_min(1e-12); };
  Tensor y = pool(hidden, mask, own ? settings.pooling : pooling, settings.include_prompt ? 0 : prompt);
  bool is_unit = false;
  for (auto& step : steps_) {
    switch (step.kind) {
      case Step::l2:
        is_unit = true;
        if (normalize.value_or(true)) y = unit(y);
        break;
      case Step::norm:
        if (own) y = torch::layer_norm(y, {y.size(-1)}, step.weight, step.bias, 1e-5);
        break;
      case Step::dense:
        if (!own) break;
        check(y.size(-1) == step.linear->in(), "the pooled vector has {} features, the dense module takes {}",
              y.size(-1), step.linear->in());
        {
          Tensor z = step.linear(y);
          if (step.activation) z = step.activation(z);
          if (step.use_residual) z = z + (step.residual.is_empty() ? y : step.residual(y));
          y = z;
        }
        break;
    }
  }
  if (normalize.value_or(false) && !is_unit) y = unit(y);
  return y;
}

SentenceModel::SentenceModel(const std::string& location, const LoadOptions& options) : device_(options.device) {
  fs::path path = resolve_model(location);
  // Folders of the first sentence-transformers keep the model one level down.
  if (!fs::exists(path / "config.json") || fs::exists(path / "0_Transformer" / "config.json")) {
    if (const auto list = read_json(path / "modules.json"); list && list->is_array() && !list->empty()) {
      const auto inner = field(list->front(), "path", std::string(), path / "modules.json");
      if (!inner.empty()) path = module_folder(path, inner);
    }
  }
  checkpoint_ = Checkpoint::open(path.string());
  tokenizer_ = Tokenizer::load(*checkpoint_);
  if (is_encoder(checkpoint_->config())) {
    encoder_ = load_encoder(*checkpoint_, options);
    max_length_ = encoder_->max_length();
  } else {
    causal_ = load_causal(*checkpoint_, options);
    causal_->eval();
    max_length_ = causal_->context_length();
  }
  head_ = std::make_shared<SentenceHead>(*checkpoint_, options);
  if (head_->settings.max_length > 0) max_length_ = std::min(max_length_, head_->settings.max_length);
}

Tensor SentenceModel::hidden(const Tensor& ids, const Tensor& mask) {
  if (encoder_) return encoder_->forward(ids, mask);
  Pass pass;
  pass.mask = mask;
  return causal_->hidden(ids, pass);
}

std::vector<int64_t> SentenceModel::encode(const std::string& text, int64_t max_length) const {
  const std::string input = settings().lower_case ? lower(text) : text;
  std::vector<int64_t> ids = tokenizer_->encode(input);
  const auto limit = static_cast<size_t>(std::max<int64_t>(max_length, 1));
  if (ids.size() <= limit) return ids;
  // Cut the text, not what the post-processor puts around it.
  const std::vector<int64_t> plain = tokenizer_->encode(input, false);
  const auto at = std::search(ids.begin(), ids.end(), plain.begin(), plain.end());
  const size_t around = ids.size() - plain.size();
  if (plain.size() > ids.size() || at == ids.end() || around >= limit) {
    ids.resize(limit);
    return ids;
  }
  ids.erase(at + static_cast<ptrdiff_t>(limit - around), at + static_cast<ptrdiff_t>(plain.size()));
  return ids;
}

Tensor SentenceModel::embed(const std::vector<std::string>& texts, const EmbedOptions& options,
                            const std::function<void(int64_t)>& progress) {
  check(options.batch_size > 0, "batch size {} must be at least 1", options.batch_size);
  const int64_t limit = options.max_length > 0 ? options.max_length : max_length_;
  const int64_t most = encoder_ ? encoder_->max_length() : causal_->context_length();
  check(limit <= most, "max length {} is more than the {} tokens that the model takes", limit, most);
  std::string prompt;
  if (options.prompt) {
    prompt = *options.prompt;
  } else {
    const std::string& name = options.prompt_name.empty() ? settings().default_prompt : options.prompt_name;
    if (!name.empty()) {
      const auto it = settings().prompts.find(name);
      if (it == settings().prompts.end()) {
        std::string known;
        for (const auto& [k, v] : settings().prompts) known += (known.empty() ? "" : ", ") + k;
        fail("this model has no prompt named '{}'; it has {}", name, known.empty() ? "none" : known);
      }
      prompt = it->second;
    }
  }
  int64_t prompt_tokens = 0;
  if (!prompt.empty() && !settings().include_prompt) {
    const auto ids = encode(prompt, limit);
    prompt_tokens = static_cast<int64_t>(ids.size());
    if (!ids.empty() && tokenizer_->is_special(ids.back())) --prompt_tokens;
  }
  std::vector<std::vector<int64_t>> ids;
  ids.reserve(texts.size());
  for (const auto& t : texts) ids.push_back(encode(prompt + t, limit));
  std::vector<size_t> order(ids.size());
  std::iota(order.begin(), order.end(), size_t{0});
  // Longest first: the batch that needs most memory comes first.
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return ids[a].size() > ids[b].size(); });
  torch::NoGradGuard no_grad;
  const int64_t pad = tokenizer_->pad().value_or(0);
  const auto total = static_cast<int64_t>(ids.size());
  Tensor result;
  for (int64_t begin = 0; begin < total; begin += options.batch_size) {
    const int64_t rows = std::min(options.batch_size, total - begin);
    const auto width = std::max<int64_t>(1, static_cast<int64_t>(ids[order[begin]].size()));
    Tensor batch = torch::full({rows, width}, pad, torch::kInt64), mask = torch::zeros({rows, width}, torch::kBool);
    for (int64_t r = 0; r < rows; ++r) {
      const auto& row = ids[order[begin + r]];
      std::copy(row.begin(), row.end(), batch.data_ptr<int64_t>() + r * width);
      std::fill_n(mask.data_ptr<bool>() + r * width, row.size(), true);
    }
    batch = batch.to(device_);
    mask = mask.to(device_);
    const Tensor y =
        head_->forward(hidden(batch, mask), mask, prompt_tokens, options.pooling, options.normalize).to(torch::kCPU);
    if (!result.defined()) result = torch::zeros({total, y.size(1)});
    for (int64_t r = 0; r < rows; ++r) result[static_cast<int64_t>(order[begin + r])].copy_(y[r]);
    if (progress) progress(begin + rows);
  }
  return result.defined() ? result : torch::zeros({0, 0});
}

Tensor similarity(const Tensor& a, const Tensor& b, const std::string& kind) {
  if (kind == "dot") return at::matmul(a, b.t());
  if (kind == "euclidean") return -torch::cdist(a, b, 2.0);
  if (kind == "manhattan") return -torch::cdist(a, b, 1.0);
  check(kind == "cosine", "unknown similarity '{}'; known are cosine, dot, euclidean, manhattan", kind);
  const auto unit = [](const Tensor& x) { return x / x.norm(2, -1, true).clamp_min(1e-12); };
  return at::matmul(unit(a), unit(b).t());
}

}  // namespace moiety
