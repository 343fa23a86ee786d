#include "compress_experts.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <optional>

#include "calibrate.h"
#include "moiety/base/config.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/log.h"
#include "write_checkpoint.h"

namespace moiety::cli {

std::vector<ExpertMethod>& expert_methods() {
  static std::vector<ExpertMethod> all;
  return all;
}

namespace {

using nlohmann::json;

struct Options {
  double keep = 0.5;
  bool across = false;
  std::string protect, plan, save_plan, calibration_file;
  uint64_t seed = 0;
};

const ExpertMethod* method_of(const std::string& name) {
  for (const auto& m : expert_methods())
    if (m.name == name) return &m;
  return nullptr;
}

// A plan as a person may edit it: which experts of every layer stay.
json plan_of(const ExpertLayers& layers, const std::string& method, const std::vector<NewExperts>& plan) {
  json list = json::array();
  for (const auto& layer : layers.layers()) {
    const auto it = std::find_if(plan.begin(), plan.end(), [&](const auto& n) { return n.block == layer.block; });
    std::vector<int64_t> keep;
    if (it == plan.end())
      for (int64_t e = 0; e < layer.experts; ++e) keep.push_back(e);
    else
      keep = it->from;
    list.push_back({{"layer", layer.block}, {"experts", layer.experts}, {"keep", keep}});
  }
  return {{"method", method}, {"layers", list}};
}

std::vector<NewExperts> planned(const ExpertLayers& layers, const std::string& file) {
  const json plan = parse_json(read_text(file), file);
  check(plan.is_object() && plan.contains("layers") && plan["layers"].is_array(), "{} is no plan: it has no 'layers'",
        file);
  std::vector<std::vector<int64_t>> kept(layers.layers().size());
  for (size_t i = 0; i < kept.size(); ++i)
    for (int64_t e = 0; e < layers.layers()[i].experts; ++e) kept[i].push_back(e);
  std::set<size_t> seen;
  for (const json& entry : plan["layers"]) {
    check(entry.is_object() && entry.contains("layer") && entry["layer"].is_number_integer() &&
              entry.contains("keep") && entry["keep"].is_array(),
          "{}: a layer of a plan has 'layer' and a list 'keep', not {}", file, entry.dump());
    const size_t at = layers.of_block(entry["layer"].get<int64_t>());
    check(seen.insert(at).second, "{}: layer {} is there twice", file, layers.layers()[at].block);
    kept[at].clear();
    for (const json& e : entry["keep"]) {
      check(e.is_number_integer() && e >= 0 && e < layers.layers()[at].experts,
            "{}: layer {} has no expert {}: it has {}", file, layers.layers()[at].block, e.dump(),
            layers.layers()[at].experts);
      kept[at].push_back(e.get<int64_t>());
    }
    check(!kept[at].empty(), "{}: layer {} would be left without experts", file, layers.layers()[at].block);
    std::sort(kept[at].begin(), kept[at].end());
    check(std::adjacent_find(kept[at].begin(), kept[at].end()) == kept[at].end(), "{}: layer {} keeps an expert twice",
          file, layers.layers()[at].block);
  }
  return keep_experts(layers, kept);
}

// Parameters that a token goes through, and all of them.
struct Size {
  int64_t parameters = 0, active = 0, experts = 0;
};
Size size_of(const ExpertLayers& layers) {
  Size s;
  for (const auto& t : layers.checkpoint()->tensors()) s.parameters += t.elements();
  s.active = s.parameters;
  for (size_t i = 0; i < layers.layers().size(); ++i) {
    const auto& l = layers.layers()[i];
    s.experts += l.experts;
    s.active -= (l.experts - std::min(l.top_k, l.experts)) * layers.expert_parameters(i);
  }
  return s;
}

int run(const CompressArguments& a, const Options& o, const std::function<ExpertPlan(const ExpertRequest&)>& decide,
        const ExpertMethod* method) {
  const ExpertLayers layers(Checkpoint::open(a.model));
  ExpertPlan plan;
  if (method == nullptr) {
    plan.layers = planned(layers, o.plan);
  } else {
    std::optional<Calibration> calibration;
    if (method->calibrated)
      calibration =
          calibration_of(a, {a.calibration, o.calibration_file, a.context, a.batch_size, a.limit_tokens}, layers);
    ExpertRequest request{layers, calibration ? &*calibration : nullptr, {o.keep, o.across}, {}, o.seed};
    std::vector<ExpertAt> protect;
    if (!o.protect.empty())
      protect = std::filesystem::exists(o.protect) ? reported_experts(o.protect, layers.checkpoint()->config())
                                                   : parse_experts(o.protect);
    request.protect = protected_experts(layers, protect);
    plan = decide(request);
  }
  for (const NewExperts& n : plan.layers) {
    const auto& l = layers.layers()[layers.of_block(n.block)];
    if (static_cast<int64_t>(n.rows.size()) < l.top_k)
      log::warn("layer {} keeps {} experts, a token took {}: it takes {} from now on", n.block, n.rows.size(), l.top_k,
                n.rows.size());
  }
  const Size before = size_of(layers);
  const std::string name = method != nullptr ? method->name : "plan";
  const json kept = plan_of(layers, name, plan.layers);
  const auto small = with_experts(layers, std::move(plan.layers));
  const ExpertLayers now(small);
  const Size after = size_of(now);
  if (!o.save_plan.empty()) {
    for (const auto& layer : kept["layers"])
      for (const auto& e : layer["keep"])
        check(e != -1, "--save-plan: a plan says which experts stay, and {} makes new ones", name);
    write_file(o.save_plan, kept.dump(1) + "\n");
  }
  const bool uniform = uniform_experts(small->config());
  WriteOptions write;
  write.overwrite = a.overwrite;
  write.dry_run = a.dry_run;
  const WriteReport report = write_checkpoint(*small, a.out, write, "compress");
  if (!uniform)
    log::warn(
        "layers have different numbers of experts, or rows of a router share some: moiety reads that, "
        "transformers and llama.cpp do not");
  json lines = json::array();
  for (size_t i = 0; i < layers.layers().size(); ++i) {
    json line = i < plan.report.size() ? plan.report[i] : json::object();
    line["layer"] = layers.layers()[i].block;
    line["experts"] = layers.layers()[i].experts;
    line["left"] = now.layers()[i].experts;
    const auto& keep = kept["layers"][i]["keep"];
    if (std::find(keep.begin(), keep.end(), -1) == keep.end()) line["keep"] = keep;
    lines.push_back(std::move(line));
  }
  if (a.json) {
    std::cout << json{{"output", a.out},
                      {"written", !a.dry_run},
                      {"method", name},
                      {"layers", lines},
                      {"experts", before.experts},
                      {"left", after.experts},
                      {"parameters_before", before.parameters},
                      {"parameters", after.parameters},
                      {"active_before", before.active},
                      {"active", after.active},
                      {"bytes_before", layers.checkpoint()->bytes_on_disk()},
                      {"bytes", report.bytes},
                      {"standard", uniform}}
                     .dump(2, ' ', false, json::error_handler_t::replace)
              << "\n";
    return 0;
  }
  fmt::print("{:>5} {:>8} {:>5}  kept\n", "layer", "experts", "left");
  for (const auto& line : lines) {
    std::string which = "new ones";
    if (line.contains("keep"))
      which = line["left"] == line["experts"]
                  ? "all"
                  : fmt::format("{}", fmt::join(line["keep"].get<std::vector<int64_t>>(), " "));
    fmt::print("{:>5} {:>8} {:>5}  {}\n", line["layer"].get<int64_t>(), line["experts"].get<int64_t>(),
               line["left"].get<int64_t>(), which);
  }
  fmt::print("\n{} {}: {} of {} experts, {:.1f} M of {:.1f} M parameters ({:.1f} M of {:.1f} M active), {:.1f} MiB\n",
             a.dry_run ? "would write" : "wrote", a.out, after.experts, before.experts,
             static_cast<double>(after.parameters) / 1e6, static_cast<double>(before.parameters) / 1e6,
             static_cast<double>(after.active) / 1e6, static_cast<double>(before.active) / 1e6,
             static_cast<double>(report.bytes) / 1048576);
  return 0;
}

CompressWay setup(CLI::App& app, std::shared_ptr<const CompressArguments> a) {
  auto o = std::make_shared<Options>();
  std::vector<std::string> keeping;
  for (const auto& m : expert_methods())
    if (m.keeps) keeping.push_back(m.name);
  app.add_option("--keep", o->keep,
                 fmt::format("Experts of a layer that stay, or their share below 1 ({})", fmt::join(keeping, ", ")))
      // A number with a point from 1 on is a share that went wrong: 1.0 would leave one expert.
      ->check([](const std::string& text) {
        const bool meant = text.find('.') == std::string::npos || std::strtod(text.c_str(), nullptr) < 1.0;
        return meant ? std::string()
                     : fmt::format("{} is neither a share below 1 nor a number of experts, such as {}", text,
                                   static_cast<int64_t>(std::strtod(text.c_str(), nullptr)));
      })
      ->capture_default_str();
  app.add_flag("--across", o->across,
               "Keep that share of all experts, more of them in layers where they matter more (frequency, importance, "
               "reap, random)");
  app.add_option("--protect", o->protect,
                 "Experts that stay as they are: LAYER,EXPERT;... or the report of analyze super-experts");
  app.add_option("--plan", o->plan, "Keep what this plan says (--save-plan); no --method then");
  app.add_option("--save-plan", o->save_plan, "Write which experts stay to this file, to look at and edit");
  app.add_option("--calibration-file", o->calibration_file,
                 "Keep what was found out about the experts in this file: methods share it, a stopped run goes on");
  app.add_option("--seed", o->seed, "Of all chance (random)")->capture_default_str();
  auto decide = std::make_shared<std::map<std::string, std::function<ExpertPlan(const ExpertRequest&)>>>();
  for (const auto& m : expert_methods()) (*decide)[m.name] = m.setup(app);
  return {"--plan or a --method over experts", [a, o] { return method_of(a->method) != nullptr || !o->plan.empty(); },
          [a, o, decide] {
            const ExpertMethod* method = method_of(a->method);
            check(method == nullptr || o->plan.empty(), "--plan and --method do not go together: one at a time");
            return run(*a, *o, method != nullptr ? decide->at(a->method) : nullptr, method);
          }};
}

const RegisterCompress experts("", setup);

// Pruning by one number an expert: what the other methods are measured against.
ExpertPlan by_scores(const ExpertRequest& r, const std::vector<torch::Tensor>& scores) {
  ExpertPlan plan;
  plan.layers = keep_experts(r.layers, select_experts(r.layers, scores, r.keep, r.protect));
  for (const auto& s : scores) {
    const auto d = s.to(torch::kFloat64).contiguous();
    plan.report.push_back(
        {{"score", std::vector<double>(d.const_data_ptr<double>(), d.const_data_ptr<double>() + d.numel())}});
  }
  return plan;
}

RegisterExpertMethod scored(const std::string& name, const std::string& by, const std::string& summary) {
  return RegisterExpertMethod(
      {.name = name, .summary = summary, .setup = [by](CLI::App&) -> std::function<ExpertPlan(const ExpertRequest&)> {
         return [by](const ExpertRequest& r) { return by_scores(r, expert_scores(r.layers, *r.calibration, by)); };
       }});
}

const RegisterExpertMethod frequency = scored("frequency", "frequency", "keep what is chosen most often");
const RegisterExpertMethod importance = scored("importance", "importance", "keep what has the largest gates");
const RegisterExpertMethod reap = scored("reap", "reap", "keep what writes most, gates included (REAP)");
const RegisterExpertMethod random_choice({.name = "random",
                                          .summary = "keep what chance keeps, for comparison",
                                          .calibrated = false,
                                          .setup = [](CLI::App&) -> std::function<ExpertPlan(const ExpertRequest&)> {
                                            return [](const ExpertRequest& r) {
                                              return by_scores(r, random_scores(r.layers, r.seed));
                                            };
                                          }});

}  // namespace
}  // namespace moiety::cli
