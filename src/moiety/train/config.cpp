#include "moiety/train/config.h"

#include <algorithm>

#include "moiety/base/error.h"
#include "moiety/base/text.h"

namespace moiety {
namespace {

using nlohmann::json;

void expand_sources(json& sources) {
  if (sources.is_string()) sources = json::array({sources});
  if (!sources.is_array()) return;
  for (json& source : sources)
    if (source.is_string()) source = json{{"path", source}};
}

// Short forms: a text where a section is meant.
void expand(json& run) {
  if (!run.is_object()) return;
  const auto section = [&](const char* key, const char* inner) {
    if (run.contains(key) && run[key].is_string()) run[key] = json{{inner, run[key]}};
  };
  section("task", "slug");
  if (run.contains("task") && run["task"].is_object() && run["task"].contains("teacher") &&
      run["task"]["teacher"].is_string())
    run["task"]["teacher"] = json{{"model", run["task"]["teacher"]}};
  section("model", "checkpoint");
  section("output", "folder");
  if (!run.contains("data")) return;
  json& data = run["data"];
  if (data.is_string() || data.is_array()) data = json{{"sources", data}};
  if (!data.is_object()) return;
  for (const char* key : {"sources", "held_out_sources"})
    if (data.contains(key)) expand_sources(data[key]);
}

void override(json& run, const std::string& assignment) {
  const size_t equals = assignment.find('=');
  check(equals != std::string::npos && equals > 0, "--set {}: KEY=VALUE is wanted, e.g. optimizer.lr=1e-3",
        shown(assignment));
  const std::string path = assignment.substr(0, equals);
  const json value = parse_yaml(assignment.substr(equals + 1), "--set " + shown(assignment)).value;
  if (path == "output" && value.is_string()) return override(run, "output.folder=" + assignment.substr(equals + 1));
  json* at = &run;
  for (size_t begin = 0; begin <= path.size();) {
    const size_t dot = std::min(path.find('.', begin), path.size());
    const std::string key = path.substr(begin, dot - begin);
    begin = dot + 1;
    check(!key.empty(), "--set {}: the key has an empty part", shown(assignment));
    if (at->is_array()) {
      const bool number = std::all_of(key.begin(), key.end(), [](char c) { return c >= '0' && c <= '9'; });
      check(number && key.size() < 6 && std::stoul(key) < at->size(), "--set {}: '{}' is no item of a list with {}",
            shown(assignment), shown(key), at->size());
      at = &(*at)[std::stoul(key)];
      continue;
    }
    if (at->is_null()) *at = json::object();
    check(at->is_object(), "--set {}: '{}' lies below something that has no keys", shown(assignment), shown(key));
    at = &(*at)[key];
  }
  *at = value;
}

void compare(const json& before, const json& now, const std::string& path, std::vector<std::string>& out) {
  if (before == now) return;
  if (before.is_object() && now.is_object()) {
    for (const auto& [key, value] : now.items())
      compare(before.contains(key) ? before[key] : json(), value, path.empty() ? key : path + "." + key, out);
    for (const auto& [key, value] : before.items())
      if (!now.contains(key)) compare(value, json(), path.empty() ? key : path + "." + key, out);
    return;
  }
  // What may change between the sittings of one run.
  for (const char* free : {"output", "evaluation", "parallel", "train.steps", "train.epochs", "train.log_every"})
    if (path == free || path.rfind(std::string(free) + ".", 0) == 0) return;
  out.push_back(fmt::format("{} (was {}, is {})", path, shown(before.dump(), 60), shown(now.dump(), 60)));
}

}  // namespace

std::string ModelConfig::problem() const {
  if (checkpoint.empty() == config.is_null()) return "either checkpoint or config is needed, and not both";
  if (!config.is_null() && !config.is_object() && !config.is_string())
    return "config has to be a section of a Hugging Face config's keys, or the path of a config.json";
  return "";
}

std::string LoopConfig::problem() const {
  if ((steps > 0) == (epochs > 0)) return "either steps or epochs is needed, and not both";
  return "";
}

std::string RoutingConfig::problem() const {
  if (balance == "none" && coef) return "balance: none has no coef";
  if ((balance == "device") != (devices > 0)) return "balance: device and devices belong together";
  return "";
}

std::string TrainConfig::problem() const {
  if (!task.is_object() || !task.contains("slug") || !task["slug"].is_string())
    return "task has to be a name, or a section with a `slug` and the task's settings";
  if (task_slug() == "language" && model.checkpoint.empty() && model.tokenizer.empty())
    return "a model from scratch needs a tokenizer; `model: {tokenizer: bytes}` needs no files";
  if (evaluation.every > 0 && data.held_out == 0 && data.held_out_sources.empty())
    return "evaluation.every is set, but no data is held out: set data.held_out (e.g. 0.05) or data.held_out_sources";
  if (evaluation.patience > 0 && evaluation.every == 0) return "evaluation.patience needs evaluation.every";
  if (train.keep_zeros && model.checkpoint.empty())
    return "train.keep_zeros holds the zeros of a checkpoint, but the model is a new one";
  if (train.keep_zeros && !parts.is_null())
    return "train.keep_zeros and parts exclude each other: a part's matrices may begin at zero to learn";
  return "";
}

TrainConfig read_train_config(const std::string& yaml, const std::string& where,
                              const std::vector<std::string>& overrides) {
  YamlText text = parse_yaml(yaml, where);
  json& run = text.value;
  if (run.is_null()) run = json::object();
  expand(run);
  for (const auto& assignment : overrides) {
    override(run, assignment);
    expand(run);
  }
  return parse<TrainConfig>(run, where, &text.lines);
}

std::vector<std::string> changed_keys(const json& before, const json& now) {
  // A run that was begun by an older program lacks keys that came later: they had their defaults.
  json filled = dump(TrainConfig());
  filled.update(before, /*merge_objects=*/true);
  std::vector<std::string> out;
  compare(filled, now, "", out);
  return out;
}

}  // namespace moiety
