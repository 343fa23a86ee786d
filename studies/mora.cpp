// MoRA: over a stream of tasks, do self-activated ranks keep what earlier tasks taught and leave the rest as it was? On
// images, as the paper's first claim, and on text.
#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <filesystem>
#include <map>

#include "moiety/adapt/mora.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/study/adapters.h"
#include "moiety/study/images.h"
#include "moiety/train/open_run.h"

namespace moiety {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr int64_t kRank = 16, kTuningSeed = 1000;
constexpr double kScale = 2.0, kScaling = 1.0;
constexpr int64_t kImageBatch = 32, kImageSteps = 2;  // times those of a task of text
constexpr int64_t kShots = 16;                        // images of a prototype
constexpr double kSharpness = 20.0;                   // of cosines
constexpr double kLowRates[] = {1e-3, 3e-4, 1e-4};
const std::string kImage = "image-";

std::vector<std::string> tasks() {
  return {"python", "manual-de", "perl", "manual-ja", "manual-fr"};
}

// Percent of bytes that are the likeliest ones.
double accuracy(CausalModel& model, const HeldOut& rows) {
  double right = 0;
  for (const double n :
       score_batches(model, rows, torch::kCPU, nullptr, [&](const MicroBatch&m, bool) -> std::vector<double> {
         Pass pass;
         pass.mask = m.mask;
         pass.segments = m.segments;
         pass.positions = m.positions;
         const auto best = model.forward(m.ids, pass).argmax(-1);
         return {((best == m.targets) & (m.targets != -100)).sum().item<double>()};
       }))
    right += n;
  return 100.0 * right / static_cast<double>(rows.learned);
}

json mora(int64_t old_ranks) {
  return json::array({{{"slug", "mora"},
                       {"target", "all"},
                       {"rank", kRank},
                       {"top_k", kRank},
                       {"old_ranks", old_ranks},
                       {"scaling", kScaling}}});
}

json lora() {
  return json::array({{{"slug", "lora"}, {"target", "all"}, {"rank", kRank}, {"alpha", kScale * kRank}}});
}

json mixture() {
  return json::array({{{"slug", "mola"},
                       {"target", "all"},
                       {"experts", static_cast<int64_t>(tasks().size())},
                       {"rank", kRank},
                       {"alpha", kScale * kRank},
                       {"top_k", 2},
                       {"coef", 0.001},
                       {"dropout", 0.0}}});
}

bool ends(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// New ranks as old ones, in all tensors of a model.
void join_ranks(std::map<std::string, torch::Tensor>& all) {
  std::vector<std::string> sites;
  for (const auto& [name, t] : all)
    if (ends(name, ".lora_A")) sites.push_back(name.substr(0, name.size() - 7));
  check(!sites.empty(), "the model has no adapters to consolidate");
  for (const auto& site : sites) {
    const bool first = all.count(site + ".old_A") == 0;
    const auto blocks = mora_consolidate(first ? torch::Tensor() : all.at(site + ".old_A"),
                                         first ? torch::Tensor() : all.at(site + ".old_B"), all.at(site + ".lora_A"),
                                         all.at(site + ".lora_B"), kScaling);
    all[site + ".old_A"] = blocks.a;
    all[site + ".old_B"] = blocks.b;
    all.erase(site + ".lora_A");
    all.erase(site + ".lora_B");
  }
}

using Learned = std::map<std::string, std::vector<std::pair<torch::Tensor, torch::Tensor>>>;  // A and B by matrix

// Beside a matrix of the base: what the LoRAs of all tasks add together.
std::shared_ptr<Added> sum_of(const Learned& learned, const std::string& matrix) {
  return std::make_shared<Added>([&learned, matrix](const torch::Tensor& x) {
    torch::Tensor y;
    for (const auto& [a, b] : learned.at(matrix)) {
      const auto one = torch::matmul(torch::matmul(x, a.t()), b.t());
      y = y.defined() ? y + one : one;
    }
    return y * kScale;
  });
}

json parts_of_arm(const std::string& arm, int64_t task) {
  return arm == "mora" ? mora(task * kRank) : arm == "mixture" ? mixture() : lora();
}

// Row t: after task t, on each of the tasks.
torch::Tensor stream(const StudyCell& cell, const std::string& arm, const fs::path& base,
                     const std::vector<std::string>& of, Half half, double rate, int64_t steps, int64_t seed) {
  const auto n = static_cast<int64_t>(of.size());
  const auto text = adapter_text(of, half);
  auto acc = torch::zeros({n, n}, torch::kFloat64);
  const auto score = [&](CausalModel& model, int64_t row) {
    for (int64_t j = 0; j < n; ++j) acc[row][j] = accuracy(model, text.at(of[static_cast<size_t>(j)]));
  };
  if (arm == "base") {
    const auto model = open_base_model(base);
    for (int64_t t = 0; t < n; ++t) score(*model, t);
    return acc;
  }
  fs::path now = base;
  Learned learned;
  for (int64_t t = 0; t < n; ++t) {
    Adaptation run;
    run.model = arm == "sum" ? base : now;
    run.parts = parts_of_arm(arm, t);
    run.kinds = {of[static_cast<size_t>(t)]};
    run.rate = rate;
    run.steps = steps;
    run.seed = seed + t;
    const std::string name = fmt::format("task-{}", t);
    const auto trainer = adapt(cell, run, name);
    CausalModel& model = trainer->model();
    if (arm == "sum") {
      for (const auto& [path, m] : matrices_of(model))
        learned[path].emplace_back(adapter_tensor(*m, "lora_A"), adapter_tensor(*m, "lora_B"));
      const auto all = open_base_model(base);
      for (const auto& [path, m] : matrices_of(*all)) m->attach(sum_of(learned, path));
      score(*all, t);
      continue;
    }
    score(model, t);
    if (arm == "mora") {
      now = cell.folder / fmt::format("after-{}", t);
      // The next run names the part: what the folder lacks then starts anew.
      write_changed(model, base, now, nullptr, join_ranks);
    } else {
      now = cell.folder / name / "last";
    }
  }
  return acc;
}

// Matrices with something beside them, and the same ones of the base, by their modules' names.
std::map<std::string, LinearImpl*> matrices_in(torch::nn::Module& model) {
  std::map<std::string, LinearImpl*> out;
  for (const auto& item : model.named_modules())
    if (auto* m = dynamic_cast<LinearImpl*>(item.value().get())) out[item.key()] = m;
  return out;
}

// Unit vectors of the frozen base, one a class of the whole stream: the mean of some images to learn.
torch::Tensor prototypes(VisionModel& base, const std::vector<ImageDomain>& domains) {
  const torch::NoGradGuard frozen;
  std::vector<torch::Tensor> out;
  for (const ImageDomain& d : domains)
    for (int64_t c = d.first; c < d.first + d.classes; ++c) {
      const auto own = torch::nonzero(d.train.labels == c).flatten().narrow(0, 0, kShots);
      Pass pass;
      out.push_back(unit_embeddings(base, d.train.images.index_select(0, own), pass).mean(0));
    }
  return torch::nn::functional::normalize(torch::stack(out));
}

// Percent of images whose class has the nearest prototype, of those of all domains.
double image_accuracy(VisionModel& model, const LabelledImages& data, const torch::Tensor& classes) {
  const torch::NoGradGuard frozen;
  double right = 0;
  const int64_t n = data.labels.size(0), at_once = 500;
  for (int64_t at = 0; at < n; at += at_once) {
    const int64_t count = std::min(at_once, n - at);
    Pass pass;
    const auto found =
        torch::matmul(unit_embeddings(model, data.images.narrow(0, at, count), pass), classes.t()).argmax(1);
    right += (found == data.labels.narrow(0, at, count)).sum().item<double>();
  }
  return 100.0 * right / static_cast<double>(n);
}

torch::Tensor image_stream(const StudyCell& cell, const std::string& arm, const fs::path& base, Half half, double rate,
                           int64_t steps, int64_t seed) {
  const auto domains = image_domains();
  const auto n = static_cast<int64_t>(domains.size());
  const auto classes = prototypes(*open_vision(base, nullptr), domains);
  auto acc = torch::zeros({n, n}, torch::kFloat64);
  const auto score = [&](VisionModel& model, int64_t row) {
    if (half == Half::tuning && row + 1 < n) return;  // rates are chosen by what is left at the end
    for (int64_t j = 0; j < n; ++j) {
      const ImageDomain& d = domains[static_cast<size_t>(j)];
      acc[row][j] = image_accuracy(model, half == Half::test ? d.test : d.tuning, classes);
    }
  };
  if (arm == "base") {
    const auto model = open_vision(base, nullptr);
    for (int64_t t = 0; t < n; ++t) score(*model, t);
    return acc;
  }
  std::shared_ptr<VisionModel> model;
  fs::path now = base;
  Learned learned;
  for (int64_t t = 0; t < n; ++t) {
    const ImageDomain& task = domains[static_cast<size_t>(t)];
    torch::manual_seed(static_cast<uint64_t>(seed + t));
    const bool goes_on = model && (arm == "sequential" || arm == "mixture");
    if (!goes_on) model = open_vision(now, parts_of_arm(arm, t));
    DrawnRows rows(task.train.labels.size(0), static_cast<uint64_t>(seed + t), "image-task");
    const auto own = classes.narrow(0, task.first, task.classes);
    learn_by(*model, slots_at(*model, rate), steps, [&](Pass& pass) {
      const auto drawn = rows.next(kImageBatch);
      const auto cosines =
          torch::matmul(unit_embeddings(*model, task.train.images.index_select(0, drawn), pass), own.t());
      return torch::nn::functional::cross_entropy(kSharpness * cosines,
                                                  task.train.labels.index_select(0, drawn) - task.first);
    });
    if (arm == "sum") {
      for (const auto& [name, m] : matrices_in(*model))
        if (!m->attached().empty())
          learned[name].emplace_back(adapter_tensor(*m, "lora_A"), adapter_tensor(*m, "lora_B"));
      const auto all = open_vision(base, nullptr);
      const auto matrices = matrices_in(*all);
      for (const auto& [name, pairs] : learned) matrices.at(name)->attach(sum_of(learned, name));
      score(*all, t);
      continue;
    }
    score(*model, t);
    if (arm != "mora") continue;
    std::map<std::string, torch::Tensor> tensors;
    for (const auto& stored : model->stored()) tensors[stored.name] = stored.value().detach();
    join_ranks(tensors);
    std::vector<StoredTensor> list;
    for (const auto& [name, value] : tensors) list.push_back({name, [value = value] { return value; }});
    now = cell.folder / fmt::format("images-after-{}", t);
    fs::create_directories(now);
    fs::copy_file(base / "config.json", now / "config.json", fs::copy_options::overwrite_existing);
    write_stored(now, list, "f32");
  }
  return acc;
}

// As tuned_rate(), and all lower rates: where a stream ends below the base, a low one may be best behind worse ones.
json with_lower_rates(const StudyCell& cell, const json& tuned,
                      const std::function<double(const StudyCell& half, double rate)>& score) {
  const auto folder = cell.once("rates-" + cell.arm, [&](const fs::path& to) {
    StudyCell half = cell;
    half.seed = 0;
    half.budget.steps = std::max<int64_t>(1, cell.budget.steps / 2);
    half.folder = to / "runs";
    json out = tuned;
    for (const double rate : kLowRates) {
      json& tried = out["tried"];
      const std::string name = fmt::format("{}", rate);
      if (tried.contains(name)) continue;
      tried[name] = score(half, rate);
      if (tried[name] < tried[fmt::format("{}", out["rate"].get<double>())]) out["rate"] = rate;
      fs::remove_all(half.folder);
    }
    write_file(to / "rate.json", out.dump(1) + "\n");
  });
  return parse_json(read_text(folder / "rate.json"), "rate.json");
}

json measure(const StudyCell& cell) {
  const bool images = cell.arm.rfind(kImage, 0) == 0;
  const std::string arm = images ? cell.arm.substr(kImage.size()) : cell.arm;
  json out;
  double rate = 0;
  if (arm != "base") {
    const auto score = [&](const StudyCell& half, double at) {
      const std::vector<std::string> two{tasks()[0], tasks()[1]};
      const auto acc =
          images ? image_stream(half, arm, image_base(cell, 0), Half::tuning, at, kImageSteps * half.budget.steps,
                                kTuningSeed)
                 : stream(half, arm, adapter_base(cell, 0), two, Half::tuning, at, half.budget.steps, kTuningSeed);
      return -stream_metrics(acc).last;
    };
    json tuned = tuned_rate(cell, cell.arm, score);
    if (images) tuned = with_lower_rates(cell, tuned, score);
    rate = tuned.at("rate");
    out["rate"] = rate;
    out["tried"] = tuned.at("tried");
  }
  const auto acc = images ? image_stream(cell, arm, image_base(cell, cell.seed), Half::test, rate,
                                         kImageSteps * cell.budget.steps, cell.seed * 100)
                          : stream(cell, arm, adapter_base(cell, cell.seed), tasks(), Half::test, rate,
                                   cell.budget.steps, cell.seed * 100);
  const StreamMetrics m = stream_metrics(acc);
  out["transfer"] = m.transfer;
  out["average"] = m.average;
  out["last"] = m.last;
  out["forgetting"] = -m.bwt;
  for (int64_t t = 0; t < acc.size(0); ++t) {
    const auto row = acc[t].contiguous();
    out["accuracy"].push_back(std::vector<double>(row.data_ptr<double>(), row.data_ptr<double>() + row.numel()));
  }
  return out;
}

// One half of the study by the rule; `front` stands before the names of its arms.
StudyOutcome::Verdict judge_half(const StudyTable& t, const std::string& front) {
  const auto of = [&](const std::string& arm, const char* metric) { return t.values(front + arm, metric); };
  const auto last = of("mora", "last"), average = of("mora", "average"), transfer = of("mora", "transfer"),
             frozen = of("base", "transfer");
  bool best = true, worst = true, near = true;
  for (size_t i = 0; i < last.size(); ++i) {
    for (const char* arm : {"sequential", "sum", "mixture"})
      if (t.has(front + arm)) best = best && last[i] > of(arm, "last").at(i) && average[i] > of(arm, "average").at(i);
    worst = worst && last[i] <= of("sequential", "last").at(i);
    near = near && transfer[i] >= frozen.at(i) - 2.0;
  }
  if (last.size() < 2) return StudyOutcome::inconclusive;
  if (best && near) return StudyOutcome::reproduced;
  if (worst || (!best && t.difference(front + "mora", front + "sequential", "last").lower()))
    return StudyOutcome::not_reproduced;
  return StudyOutcome::inconclusive;
}

StudyOutcome judge(const StudyTable& t) {
  StudyOutcome o;
  const auto on_images = judge_half(t, kImage), on_text = judge_half(t, "");
  o.verdict = on_images == StudyOutcome::not_reproduced ? StudyOutcome::not_reproduced
              : on_images == StudyOutcome::reproduced && on_text == StudyOutcome::reproduced
                  ? StudyOutcome::reproduced
                  : StudyOutcome::inconclusive;
  const auto sentence = [&](const std::string& front, const char* unit, StudyOutcome::Verdict verdict) {
    const auto of = [&](const char* arm) {
      const std::string name = front + arm;
      return t.has(name) ? fmt::format("{:.2f} / {:.2f} / {:.2f} / {:.2f}", t.mean(name, "transfer"),
                                       t.mean(name, "average"), t.mean(name, "last"), t.mean(name, "forgetting"))
                         : std::string("not measured");
    };
    return fmt::format(
        "Transfer / average / last / forgetting, percent of {}: MoRA {}; one LoRA after another {}; the sum of one "
        "LoRA a task {}; a routed mixture of LoRA {}; the base {}. By itself this half is {}.",
        unit, of("mora"), of("sequential"), of("sum"), of("mixture"), of("base"), to_string(verdict));
  };
  o.reason = fmt::format("{} {}{}", sentence(kImage, "images", on_images), sentence("", "bytes", on_text),
                         t.values("mora", "last").size() < 2 ? " One seed decides nothing." : "");
  const auto line = [&](const std::string& front) {
    return fmt::format("last {:.1f} % (one LoRA {:.1f} %, base {:.1f} %), forgetting {:.1f} points against {:.1f}",
                       t.mean(front + "mora", "last"), t.mean(front + "sequential", "last"),
                       t.mean(front + "base", "last"), t.mean(front + "mora", "forgetting"),
                       t.mean(front + "sequential", "forgetting"));
  };
  o.headline = fmt::format("images: {}; text: {}", line(kImage), line(""));
  return o;
}

Study study() {
  Study s;
  s.claim =
      "X-TAIL: transfer 63.3, average 72.7, last 80.9 (MoE-Adapter 56.0, 63.0, 70.5); on TRACE Llama-2-7B-Chat 44.54 "
      "with "
      "a backward transfer of 1.37 (O-LoRA 42.78 and 7.16).";
  s.setup =
      "Images: " + image_setup() +
      fmt::format(
          ". The head is fixed before the stream: a class is the mean unit embedding of {} images by the frozen base, "
          "an image belongs to the class with the highest cosine, of all 35; the loss is the cross-entropy of {:.0f} "
          "times the cosines of the task's own classes. {} images a step, {} steps a task ({} in a short run), rates "
          "as below and all lower ones down to 0.0001, tuned by what the whole stream leaves on images that are "
          "neither learned nor measured. Text: ",
          kShots, kSharpness, kImageBatch, kImageSteps * 60, kImageSteps * 16) +
      adapter_setup() +
      ". A stream of five tasks, one kind of text each: Python, the German manual, Perl's manual, the Japanese and "
      "the French manual; measured is how many bytes are the likeliest ones. Rates are tuned by what a stream of the "
      "first two tasks leaves. Both: rank 16 a task beside all matrices.";
  s.arms = {{"image-mora", "images: MoRA: self-activated ranks, temperature 0.01, threshold 0.2"},
            {"image-sequential", "images: one LoRA of rank 16, one task after another"},
            {"image-sum", "images: a LoRA of rank 16 a task, trained apart; what they add is summed up", false},
            {"image-mixture",
             "images: five LoRA experts of rank 16, two a position by a learned router, one task after another", false},
            {"image-base", "images: the frozen base"},
            {"mora", "MoRA: self-activated ranks, temperature 0.01, threshold 0.2"},
            {"sequential", "one LoRA of rank 16, one task after another"},
            {"sum", "a LoRA of rank 16 a task, trained apart; what they add is summed up", false},
            {"mixture", "five LoRA experts of rank 16, two a token by a learned router, one task after another", false},
            {"base", "the frozen base"}};
  s.metrics = {{"transfer", "transfer, %", 2},
               {"average", "average, %", 2},
               {"last", "last, %", 2},
               {"forgetting", "forgetting, points", 2},
               {"rate", "learning rate", 4}};
  s.rule =
      "A half, images or text, is reproduced: on every seed MoRA's last and average are above those of all other "
      "trained arms, and its transfer at most 2 points below the frozen base; not reproduced: its last is not above "
      "one LoRA's on any seed, or clearly below; else, and with one seed, inconclusive. Together: not reproduced when "
      "the half on images is not, which is the paper's first claim; reproduced when both halves are; else "
      "inconclusive.";
  s.full = {.seeds = 3, .steps = 60};
  s.brief = {.seeds = 1, .steps = 16};
  s.measure = measure;
  s.judge = judge;
  s.settings = [] {
    json out = adapter_settings();
    out["images"] = image_settings();
    return out;
  };
  return s;
}

const RegisterStudy registered("mora", "MoRA: ranks that choose themselves, over a stream of tasks",
                               "what a stream of tasks leaves of earlier ones and of the base", study);

}  // namespace
}  // namespace moiety
