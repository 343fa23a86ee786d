#include "moiety/stream/task_stream.h"

#include <torch/torch.h>

#include <cmath>
#include <set>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/random.h"
#include "moiety/base/text.h"
#include "moiety/io/peft.h"
#include "moiety/nn/part.h"
#include "moiety/nn/weights.h"
#include "moiety/train/language_task.h"
#include "moiety/train/trainer.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;
namespace fs = std::filesystem;

bool grows(const StreamConfig& c) {
  return c.part.value("slug", std::string("mora")) == "mora";
}

// The run of task t, over `model`; parts only where the model does not bring them.
TrainConfig run_of(const StreamConfig& c, size_t t, const json& model, bool first) {
  const StreamTaskConfig& task = c.tasks[t];
  json run = {
      {"model", model}, {"train", c.train}, {"output", {{"folder", (fs::path(c.output) / task.name).string()}}}};
  if (first) {
    run["parts"] = json::array({c.part});
    if (!run["parts"][0].contains("slug")) run["parts"][0]["slug"] = "mora";
  }
  run["data"] = c.data.is_object() ? c.data : json::object();
  run["data"]["sources"] = task.sources;
  if (!task.held_out_sources.is_null())
    run["data"]["held_out_sources"] = task.held_out_sources;
  else if (!run["data"].contains("held_out"))
    run["data"]["held_out"] = 0.1;
  if (task.steps > 0) run["train"]["steps"] = task.steps;
  if (!c.optimizer.is_null()) run["optimizer"] = c.optimizer;
  if (!c.schedule.is_null()) run["schedule"] = c.schedule;
  return read_train_config(run.dump(), fmt::format("task {}", task.name));
}

Encoder encoder_of(const OpenRun& open, const TrainConfig& config) {
  Encoder e;
  e.tokenizer = open.tokenizer;
  e.chat_template = open.chat_template;
  e.options = encode_options(config);
  return e;
}

struct Score {
  double accuracy, loss;
};

Score score(CausalModel& model, const HeldOut& rows) {
  const auto sums =
      score_batches(model, rows, torch::kCPU, nullptr, [&](const MicroBatch& m, bool) -> std::vector<double> {
        Pass pass;
        set_rows(pass, m);
        const auto logits = model.forward(m.ids, pass);
        const auto right = (logits.argmax(-1) == m.targets).sum().item<double>();
        return {right, token_loss(logits, m.targets).item<double>()};
      });
  const auto n = static_cast<double>(rows.learned);
  return {sums[0] / n, sums[1] / n};
}

// The adapter of a task that is through, with its block among the old ones and a new one beside them.
void consolidate(const StreamConfig& c, const fs::path& from, const fs::path& to, int64_t seed) {
  const auto done = Checkpoint::open(from.string());
  json parts = done->config().at("moiety").at("parts");
  check(parts.size() == 1, "{}: one part was expected", from.string());
  MoraConfig settings;
  {
    json own = parts[0];
    for (const char* key : {"slug", "site", "layers", "target", "name"}) own.erase(key);
    settings = parse<MoraConfig>(own, "mora");
  }
  std::vector<AdapterTensor> tensors;
  const auto put = [&](const std::string& name, const Tensor& t) {
    const auto f = t.detach().to(torch::kFloat32).contiguous();
    tensors.push_back(
        {name, f.sizes().vec(), std::vector<float>(f.const_data_ptr<float>(), f.const_data_ptr<float>() + f.numel())});
  };
  const auto get = [&](const std::string& name) {
    return done->has(name) ? as_tensor(done->get(name)).to(torch::kFloat32) : Tensor();
  };
  for (const TensorInfo& t : done->tensors()) {
    const size_t end = t.name.rfind(".lora_A");
    if (t.name.find(".adapters.") == std::string::npos || end == std::string::npos) continue;
    const std::string front = t.name.substr(0, end);
    const auto a = get(front + ".lora_A"), b = get(front + ".lora_B");
    const auto all =
        mora_consolidate(get(front + ".old_A"), get(front + ".old_B"), a, b, settings.scaling, c.consolidate);
    put(front + ".old_A", all.a);
    put(front + ".old_B", all.b);
    RandomStream stream(static_cast<uint64_t>(seed), fmt::format("mora.{}.{}", front, all.a.size(0)));
    auto fresh = torch::empty_like(a);
    const double bound = 1.0 / std::sqrt(static_cast<double>(a.size(1)));
    for (int64_t i = 0; i < fresh.numel(); ++i)
      fresh.data_ptr<float>()[i] = static_cast<float>(stream.uniform(-bound, bound));
    put(front + ".lora_A", fresh);
    put(front + ".lora_B", torch::zeros_like(b));
  }
  parts[0]["old_ranks"] = settings.old_ranks + settings.rank;
  fs::create_directories(to);
  write_adapter(to, parts, std::move(tensors), *done, adapter_base(from));
}

json matrix(const Tensor& t) {
  json out = json::array();
  for (int64_t i = 0; i < t.size(0); ++i) {
    if (t.dim() == 1) {
      out.push_back(t[i].item<double>());
      continue;
    }
    json row = json::array();
    for (int64_t j = 0; j < t.size(1); ++j) row.push_back(t[i][j].item<double>());
    out.push_back(std::move(row));
  }
  return out;
}

}  // namespace

std::string StreamConfig::problem() const {
  std::set<std::string> names;
  for (const auto& t : tasks) {
    if (!is_adapter_name(t.name))
      return fmt::format("a task is called '{}': letters, digits, - and _ are right", shown(t.name));
    if (t.name == "last") return "a task cannot be called last: the adapter is";
    if (!names.insert(t.name).second) return fmt::format("two tasks are called {}", t.name);
  }
  if (!part.is_object()) return "`part` is a section";
  if (part.contains("old_ranks")) return "`old_ranks` is what the stream counts itself";
  return "";
}

StreamConfig read_stream_config(const std::string& yaml, const std::string& where) {
  const YamlText text = parse_yaml(yaml, where);
  return parse<StreamConfig>(text.value.is_null() ? json::object() : text.value, where, &text.lines);
}

json StreamResult::to_json() const {
  return {{"tasks", tasks},
          {"complete", complete},
          {"accuracy", matrix(accuracy)},
          {"loss", matrix(loss)},
          {"accuracy_before", matrix(before)},
          {"transfer", metrics.transfer},
          {"average", metrics.average},
          {"last", metrics.last},
          {"bwt", metrics.bwt},
          {"transfer_per_task", metrics.transfer_per_task},
          {"adapter", adapter.string()}};
}

StreamResult run_stream(const StreamConfig& c, const StreamOptions& options) {
  const fs::path out = c.output;
  fs::create_directories(out);
  const fs::path state_file = out / "stream.json";
  const json settings = dump(c);
  json state = {{"config", settings}, {"rows", json::array()}};
  if (fs::exists(state_file)) {
    state = parse_json(read_text(state_file), state_file.string());
    check(state.value("config", json()) == settings, "{} was begun with other settings: give the stream another output",
          out.string());
  }
  const auto count = static_cast<int64_t>(c.tasks.size());
  const auto phase = [&](const std::string& what) {
    if (options.on_phase) options.on_phase(what);
  };
  // Held-out rows are the same whatever adapter is measured.
  std::vector<HeldOut> held_out;
  const auto measure = [&](const json& model, bool fresh) {
    const OpenRun open = open_run(run_of(c, 0, model, fresh), torch::kCPU, out / "base");
    if (held_out.empty())
      for (size_t j = 0; j < c.tasks.size(); ++j) {
        const TrainConfig task = run_of(c, j, model, false);
        const Encoder encoder = encoder_of(open, task);
        const auto data = open_data(task.data, encoder, static_cast<uint64_t>(task.train.seed));
        check(data.held_out.size() == 1, "task {}: one set of held-out data was expected", c.tasks[j].name);
        held_out.push_back(held_out_rows(data.held_out[0].data, encoder, task.data, task.train.batch,
                                         c.evaluation_tokens, static_cast<uint64_t>(task.train.seed)));
      }
    json accuracy = json::array(), loss = json::array();
    for (const HeldOut& rows : held_out) {
      const Score s = score(*open.model, rows);
      accuracy.push_back(s.accuracy);
      loss.push_back(s.loss);
    }
    return json{{"accuracy", accuracy}, {"loss", loss}};
  };
  const auto save = [&] { write_file(state_file, state.dump(1) + "\n"); };
  if (!state.contains("before")) {
    phase("measuring the model");
    state["before"] = measure(c.model, true);  // a new part changes nothing
    save();
  }
  bool complete = true;
  for (size_t t = 0; t < c.tasks.size(); ++t) {
    const fs::path folder = out / c.tasks[t].name;
    if (state["rows"].size() > t) continue;
    json model = c.model;
    if (t > 0) {
      const fs::path before = out / c.tasks[t - 1].name;
      const fs::path start = grows(c) ? before / "next" : before / "last";
      if (grows(c) && !fs::exists(start / "adapter_config.json"))
        consolidate(c, before / "last", start, c.train.value("seed", int64_t{0}));
      model = start.string();
    }
    const TrainConfig config = run_of(c, t, model, t == 0);
    phase("learning " + c.tasks[t].name);
    TrainOptions train;
    train.stop = options.stop;
    if (options.on_step)
      train.on_step = [&](int64_t step, int64_t steps, double loss, int64_t) {
        options.on_step(c.tasks[t].name, step, steps, loss);
      };
    const TrainResult result = Trainer(config, train).run();
    if (result.ended == "stopped") {
      complete = false;
      break;
    }
    phase("measuring all tasks");
    state["rows"].push_back(measure((folder / "last").string(), false));
    save();
  }
  StreamResult result;
  for (const auto& t : c.tasks) result.tasks.push_back(t.name);
  result.accuracy = torch::full({count, count}, std::nan(""), torch::kFloat64);
  result.loss = torch::full({count, count}, std::nan(""), torch::kFloat64);
  result.before = torch::empty({count}, torch::kFloat64);
  for (int64_t j = 0; j < count; ++j)
    result.before[j] = state["before"]["accuracy"][static_cast<size_t>(j)].get<double>();
  for (size_t t = 0; t < state["rows"].size(); ++t)
    for (size_t j = 0; j < c.tasks.size(); ++j) {
      const auto row = static_cast<int64_t>(t), column = static_cast<int64_t>(j);
      result.accuracy[row][column] = state["rows"][t]["accuracy"][j].get<double>();
      result.loss[row][column] = state["rows"][t]["loss"][j].get<double>();
    }
  result.complete = complete;
  if (complete) {
    result.metrics = stream_metrics(result.accuracy);
    result.adapter = out / "last";
    std::error_code ec;
    fs::remove(result.adapter, ec);
    fs::create_directory_symlink(fs::path(c.tasks.back().name) / "last", result.adapter, ec);
    check(!ec, "{}: cannot be created: {}", result.adapter.string(), ec.message());
  }
  return result;
}

}  // namespace moiety
