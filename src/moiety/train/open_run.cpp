#include "moiety/train/open_run.h"

#include <torch/torch.h>

#include <algorithm>
#include <regex>
#include <set>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/registry.h"
#include "moiety/base/text.h"
#include "moiety/io/checkpoint_writer.h"
#include "moiety/io/moduleformer_names.h"
#include "moiety/io/peft.h"
#include "moiety/models/vision.h"
#include "moiety/nn/weights.h"
#include "moiety/train/byte_tokenizer.h"
#include "moiety/train/routing.h"

namespace moiety {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr const char* kTokenizerFiles[] = {"tokenizer.json",
                                           "tokenizer_config.json",
                                           "special_tokens_map.json",
                                           "added_tokens.json",
                                           "vocab.json",
                                           "merges.txt",
                                           "vocab.txt",
                                           "tokenizer.model",
                                           "chat_template.jinja"};

json read_json_file(const fs::path& file) {
  return parse_json(read_text(file), file.string());
}

void take_tokenizer_files(const fs::path& folder, OpenRun& run) {
  for (const char* name : kTokenizerFiles)
    if (fs::exists(folder / name)) run.files[name] = read_text(folder / name, int64_t{1} << 30);
}

/// The checkpoint to start from. GGUF holds rows in another order and stacks under other names: converted once.
std::shared_ptr<const Checkpoint> open_base(const std::string& location, const fs::path& scratch, bool weights) {
  auto checkpoint = Checkpoint::open(location);
  if (!checkpoint->gguf() || !weights) return checkpoint;
  const fs::path folder = scratch / "base";
  if (!fs::exists(folder / "config.json")) {
    fs::create_directories(scratch);
    WriteOptions options;
    options.dtype = "f32";
    options.overwrite = true;
    write_hf(*checkpoint, folder, options);
  }
  return Checkpoint::open(folder.string());
}

void open_tokenizer(const TrainConfig& config, const Checkpoint* checkpoint, const fs::path& scratch, OpenRun& run) {
  const std::string& location = config.model.tokenizer;
  if (location == "bytes") {
    const auto tokenizer = byte_tokenizer(), settings = byte_tokenizer_config();
    run.files["tokenizer.json"] = tokenizer.dump();
    run.files["tokenizer_config.json"] = settings.dump(2);
    run.tokenizer = Tokenizer::from_json(json(tokenizer), json(settings), "the byte tokenizer");
    return;
  }
  if (location.empty()) {
    run.tokenizer = Tokenizer::load(*checkpoint);
    if (!checkpoint->gguf())
      take_tokenizer_files(fs::is_directory(checkpoint->path()) ? checkpoint->path() : checkpoint->path().parent_path(),
                           run);
    return;
  }
  run.tokenizer = Tokenizer::open(location);
  fs::path path = resolve_model(location);
  if (path.extension() == ".gguf" || (fs::is_directory(path) && !fs::exists(path / "tokenizer.json") &&
                                      !fs::exists(path / "vocab.json") && !fs::exists(path / "vocab.txt"))) {
    // Only a conversion writes the tokenizer of a GGUF file as the files of Hugging Face.
    const auto other = Checkpoint::open(location);
    if (other->gguf()) {
      const TemporaryFolder folder("moiety-tokenizer");
      fs::create_directories(scratch);
      write_hf(*other, folder / "model", {});
      take_tokenizer_files(folder / "model", run);
      return;
    }
  }
  if (fs::is_directory(path)) {
    take_tokenizer_files(path, run);
  } else {
    take_tokenizer_files(path.parent_path(), run);
    run.files["tokenizer.json"] = read_text(path, int64_t{1} << 30);
  }
}

void fill_ids(json& config, const char* key, const std::optional<int64_t>& id) {
  if (id && (!config.contains(key) || config[key].is_null())) config[key] = *id;
}

std::regex compiled(const std::string& pattern, const char* key) {
  try {
    return std::regex(pattern);
  } catch (const std::regex_error& e) {
    fail("{}: '{}' is no regular expression: {}", key, shown(pattern), e.what());
  }
}

// Which names the patterns match; each has to match some.
std::set<std::string> matched(const std::vector<std::string>& patterns, const std::vector<std::string>& names,
                              const char* key) {
  std::set<std::string> out;
  for (const auto& pattern : patterns) {
    const auto regex = compiled(pattern, key);
    bool any = false;
    for (const auto& name : names)
      if (std::regex_search(name, regex)) {
        out.insert(name);
        any = true;
      }
    check(any, "{}: '{}' matches no parameter; names are like {}", key, shown(pattern),
          list_of(std::vector<std::string>(
                      names.begin(), names.begin() + static_cast<std::ptrdiff_t>(std::min<size_t>(6, names.size()))),
                  "and"));
  }
  return out;
}

}  // namespace

namespace {

// All parts that a run brings stand beside matrices, so that the model itself need not learn. An adapter brings what it
// has added to its base.
bool stands_beside(const TrainConfig& config, const json& model) {
  const json own = parts_of(model);
  if (config.parts.is_null() && is_adapter(resolve_model(config.model.checkpoint)))
    return std::any_of(own.begin(), own.end(), stands_beside_matrices);
  const json& parts = config.parts.is_null() ? own : config.parts;
  return parts.is_array() && !parts.empty() && std::all_of(parts.begin(), parts.end(), stands_beside_matrices);
}

}  // namespace

bool adapts(const TrainConfig& config, const Checkpoint& checkpoint) {
  return stands_beside(config, checkpoint.config()) && config.train.train.empty();
}

std::string base_name(const std::string& location) {
  const fs::path path = resolve_model(location);
  return is_adapter(path) ? adapter_base(path) : location;
}

std::string parameter_name(const std::string& name) {
  static const std::regex layer("^layer([0-9]+)\\."), block("^body\\.block([0-9]+)_");
  return std::regex_replace(std::regex_replace(name, layer, "layers.$1."), block, "blocks.$1.");
}

OpenRun open_run(const TrainConfig& config, torch::Device device, const fs::path& scratch, bool weights) {
  OpenRun run;
  std::shared_ptr<const Checkpoint> checkpoint;
  bool adapting = false;
  if (!config.model.checkpoint.empty()) {
    checkpoint = Checkpoint::open(config.model.checkpoint);
    adapting = adapts(config, *checkpoint);
    if (adapting && checkpoint->config().value("moiety_rope_interleaved", false))
      for (const auto& part : config.parts.is_array() ? config.parts : json::array())
        check(!part.contains("adapters"),
              "part {}: `adapters` have their rows of queries and keys as a directory has them, and {} is a GGUF file "
              "with another order: convert it first (`moiety convert`)",
              part.value("slug", std::string()), config.model.checkpoint);
    if (!adapting) checkpoint = open_base(config.model.checkpoint, scratch, weights);
    check(!is_encoder(checkpoint->config()),
          "{} is an encoder: `moiety train` trains models that predict the next token", config.model.checkpoint);
    check(!is_vision(checkpoint->config()), "{} classifies images: the run needs `task: image-classification`",
          config.model.checkpoint);
    run.config = checkpoint->config();
    run.generation_config = checkpoint->generation_config();
  } else if (config.model.config.is_string()) {
    run.config = read_json_file(config.model.config.get<std::string>());
  } else {
    run.config = config.model.config;
  }
  open_tokenizer(config, checkpoint.get(), scratch, run);
  if (!checkpoint) {
    run.config = moduleformer_config(run.config);
    if (!run.config.contains("vocab_size")) run.config["vocab_size"] = run.tokenizer->size();
    check(run.config["vocab_size"].is_number_integer() &&
              run.config["vocab_size"].get<int64_t>() >= run.tokenizer->size(),
          "model.config.vocab_size is {}, but the tokenizer has {} tokens", run.config["vocab_size"].dump(),
          run.tokenizer->size());
    if (!run.config.contains("max_position_embeddings")) run.config["max_position_embeddings"] = config.data.length;
    fill_ids(run.config, "bos_token_id", run.tokenizer->bos());
    fill_ids(run.config, "eos_token_id", run.tokenizer->eos());
    fill_ids(run.config, "pad_token_id", run.tokenizer->pad());
  }
  if (!run.generation_config.is_object()) run.generation_config = json::object();
  for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"})
    if (!run.generation_config.contains(key) && run.config.contains(key) && !run.config[key].is_null())
      run.generation_config[key] = run.config[key];
  if (!config.parts.is_null()) run.config["moiety"]["parts"] = parts_beside(run.config, config.parts);
  prepare_routing(run.config, config.routing);
  torch::manual_seed(static_cast<uint64_t>(config.train.seed));
  LoadOptions options;
  options.dtype = config.train.dtype;
  options.device = device;
  options.trainable = true;
  options.frozen_base = adapting;
  if (adapting) {
    run.adapted = checkpoint;
    run.adapted_name = base_name(config.model.checkpoint);
  }
  if (checkpoint && weights)
    run.model = load_causal(*checkpoint, run.config, options);
  else
    run.model = make_causal(run.config, options);
  apply_routing(*run.model, config.routing);
  const std::string source =
      config.model.chat_template.empty() ? run.tokenizer->chat_template() : read_text(config.model.chat_template);
  if (!source.empty()) run.chat_template = std::make_shared<const ChatTemplate>(source);
  if (!config.model.chat_template.empty()) run.files["chat_template.jinja"] = source;
  return run;
}

std::vector<Slot> trained_slots(torch::nn::Module& model, const TrainConfig& config) {
  std::vector<std::string> names;
  std::map<std::string, torch::Tensor> parameters;
  std::set<const void*> seen;  // shared modules are listed once for every place
  for (const auto& item : model.named_parameters()) {
    if (!item.value().is_floating_point() || !seen.insert(item.value().unsafeGetTensorImpl()).second) continue;
    names.push_back(parameter_name(item.key()));
    parameters[names.back()] = item.value();
  }
  check(!names.empty(), "the model has no parameters to train");
  // A base that is held as for inference lies in its file.
  check(!config.train.train.empty() ||
            std::any_of(parameters.begin(), parameters.end(), [](const auto& p) { return p.second.requires_grad(); }),
        "the parts of the model bring nothing that learns, and beside them its weights are held as they are: "
        "`train.train` has to say which of them learn");
  const auto train = matched(config.train.train, names, "train.train"),
             freeze = matched(config.train.freeze, names, "train.freeze");
  std::vector<std::pair<std::regex, const GroupConfig*>> groups;
  for (const auto& group : config.groups) {
    matched({group.match}, names, "groups.match");
    groups.emplace_back(compiled(group.match, "groups.match"), &group);
  }
  // Beside adapters and modules that are added everything else is frozen, unless the run says what learns.
  const auto is_added = [](const std::string& name) {
    static const std::regex beside("\\.adapter[0-9]*\\.");
    return std::regex_search(name, beside) || name.find(".new.") != std::string::npos;
  };
  const bool added = std::any_of(names.begin(), names.end(), is_added);
  const auto* causal = dynamic_cast<const CausalModel*>(&model);
  const bool biases = added && causal != nullptr && biases_learn(parts_of(causal->config()));
  std::vector<Slot> slots;
  for (const auto& name : names) {
    auto& parameter = parameters[name];
    // What a part brings frozen stays so.
    const bool chosen = config.train.train.empty()
                            ? (!added || ((is_added(name) || (biases && is_bias(name))) && parameter.requires_grad()))
                            : train.count(name) != 0;
    const bool learns = chosen && freeze.count(name) == 0;
    parameter.set_requires_grad(learns);
    if (!learns) continue;
    Slot slot;
    slot.name = name;
    slot.parameter = parameter;
    slot.lr = config.optimizer.lr;
    const bool embedding = name.find("embed") != std::string::npos;
    const bool vector = parameter.dim() < 2 || name.find("norm") != std::string::npos ||
                        name.find("bias") != std::string::npos || name.ends_with(".scales") || name.ends_with(".A_log");
    slot.weight_decay = embedding || vector ? 0.0 : config.optimizer.weight_decay;
    for (const auto& [regex, group] : groups) {
      if (!std::regex_search(name, regex)) continue;
      if (group->lr) slot.lr = *group->lr;
      if (group->lr_scale) slot.lr *= *group->lr_scale;
      if (group->weight_decay) slot.weight_decay = *group->weight_decay;
      break;
    }
    slots.push_back(std::move(slot));
  }
  check(!slots.empty(), "train.train and train.freeze leave nothing to learn");
  return slots;
}

std::string dtype_name(const std::string& dtype) {
  return dtype == "bf16" ? "bfloat16" : dtype == "f16" ? "float16" : "float32";
}

void write_stored(const fs::path& folder, const std::vector<StoredTensor>& tensors, const std::string& dtype) {
  const auto type = dtype == "bf16" ? torch::kBFloat16 : dtype == "f16" ? torch::kFloat16 : torch::kFloat32;
  const torch::NoGradGuard frozen;
  ShardedWriter writer(folder);
  for (const StoredTensor& stored : tensors) {
    auto t = stored.value().detach().to(torch::kCPU);
    if (t.is_floating_point()) t = t.to(type);
    t = t.contiguous();
    TensorInfo info;
    info.name = stored.name;
    info.format = format_of(t.scalar_type());
    info.shape = t.sizes().vec();
    writer.add(info, {static_cast<const std::byte*>(t.const_data_ptr()), static_cast<size_t>(t.nbytes())});
  }
  writer.finish();
}

void write_stored_adapter(const fs::path& folder, const std::vector<StoredTensor>& all, const json& parts,
                          const Checkpoint& base, const std::string& base_name) {
  const torch::NoGradGuard frozen;
  const bool biases = biases_learn(parts);
  std::vector<AdapterTensor> tensors;
  for (const StoredTensor& stored : all) {
    if (stored.name.find(".adapters.") == std::string::npos &&
        !(biases && is_bias(stored.name) && base.has(stored.name)))
      continue;
    const auto t = stored.value().detach().to(torch::kCPU, torch::kFloat32).contiguous();
    tensors.push_back({stored.name, t.sizes().vec(),
                       std::vector<float>(t.const_data_ptr<float>(), t.const_data_ptr<float>() + t.numel())});
  }
  json beside = json::array();
  for (const json& part : parts)
    if (stands_beside_matrices(part)) beside.push_back(part);
  write_adapter(folder, beside, std::move(tensors), base, base_name);
}

void write_model(const fs::path& folder, const OpenRun& run, const std::string& dtype) {
  if (run.adapted) {
    write_stored_adapter(folder, run.model->stored(), parts_of(run.config), *run.adapted, run.adapted_name);
    const auto chat = run.files.find("chat_template.jinja");
    if (chat != run.files.end()) write_file(folder / chat->first, chat->second);
    return;
  }
  json config = run.config;
  config.erase("torch_dtype");
  config.erase("quantization_config");
  config["dtype"] = dtype_name(dtype);
  write_file(folder / "config.json", config.dump(2) + "\n");
  if (!run.generation_config.empty())
    write_file(folder / "generation_config.json", run.generation_config.dump(2) + "\n");
  for (const auto& [name, content] : run.files) write_file(folder / name, content);
  write_stored(folder, run.model->stored(), dtype);
}

}  // namespace moiety
