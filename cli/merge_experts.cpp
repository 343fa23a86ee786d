// moiety merge --method task-arithmetic|ties|dare|average: compressed experts or whole models added to their base.
#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>

#include "merge.h"
#include "moiety/base/error.h"
#include "moiety/compress/compeft_model.h"

namespace moiety::cli {
namespace {

namespace fs = std::filesystem;

struct Options {
  TaskMergeConfig merge;
  double lambda = 1.0, density = 0.0;  // 0: as the method has it
  double drop = 0.9;                   // of dare
  uint64_t seed = 0;
};

// The files of an expert list that are compressed; empty entries are models.
std::vector<std::shared_ptr<const TaskVectorFile>> compressed(const MergeArguments& a) {
  std::vector<std::shared_ptr<const TaskVectorFile>> out;
  for (const auto& e : a.experts) out.push_back(is_task_vector(e) ? TaskVectorFile::open(e) : nullptr);
  return out;
}

int run_adapters(const MergeArguments& a, const TaskMergeConfig& merge, double lambda,
                 const std::vector<std::shared_ptr<const TaskVectorFile>>& files) {
  for (size_t i = 0; i < files.size(); ++i)
    check(files[i] != nullptr, "{} is no compressed adapter, and {} is one: adapters are merged with adapters",
          a.experts[i], files[0]->where());
  check(a.type.empty() && a.dtype.empty(),
        "compressed adapters become an adapter folder: --type and --dtype are for models");
  check(a.overwrite || !fs::exists(a.out), "{} exists already: --overwrite replaces it", a.out);
  if (!a.dry_run) merge_adapters(files, merge, lambda, a.common.model, a.out);
  if (a.common.json)
    std::cout << nlohmann::json{{"output", a.out},
                                {"written", !a.dry_run},
                                {"kind", files[0]->header().kind},
                                {"tensors", files[0]->header().entries.size()}}
                     .dump(2)
              << "\n";
  else
    fmt::print("{} {}: an adapter over {}, of {} compressed one{}\n", a.dry_run ? "would write" : "wrote", a.out,
               a.common.model, files.size(), files.size() == 1 ? "" : "s");
  return 0;
}

int run(const MergeArguments& a, const Options& o) {
  TaskMergeConfig merge = o.merge;
  merge.method = a.method == "ties" ? "ties" : "task-arithmetic";
  const double lambda = a.method == "average" ? o.lambda / static_cast<double>(a.experts.size()) : o.lambda;
  const auto files = compressed(a);
  const bool dare = a.method == "dare";
  check(!dare || std::none_of(files.begin(), files.end(), [](const auto& f) { return f != nullptr; }),
        "dare drops entries of whole models at random; what is compressed has dropped its own");
  if (files[0] && files[0]->header().kind != "full") return run_adapters(a, merge, lambda, files);
  // What TIES trims of whole models; compressed ones are sparse already.
  const double density = o.density > 0.0 ? o.density : a.method == "ties" ? 0.2 : 1.0;
  const auto base = Checkpoint::open(a.common.model);
  std::vector<std::shared_ptr<const ExpertDelta>> deltas;
  for (size_t i = 0; i < files.size(); ++i)
    deltas.push_back(files[i] ? compressed_delta(files[i], *base)
                              : model_delta(Checkpoint::open(a.experts[i]), base, density));
  if (dare)
    for (size_t i = 0; i < deltas.size(); ++i) deltas[i] = dropped_delta(deltas[i], o.drop, o.seed + i);
  return write_merged(*merged_experts(base, std::move(deltas), merge, lambda), a);
}

std::function<int()> setup(CLI::App& app, std::shared_ptr<const MergeArguments> a) {
  auto o = std::make_shared<Options>();
  app.add_option("--lambda", o->lambda, "What experts add counts so many times (task-arithmetic, ties, dare, average)")
      ->check(CLI::Range(0.0, 1e6))
      ->capture_default_str();
  app.add_option("--merge-func", o->merge.merge_func, "What becomes of entries that agree (ties)")
      ->check(CLI::IsMember({"dis-mean", "dis-sum", "dis-max"}))
      ->capture_default_str();
  app.add_option("--trim", o->density,
                 "Share of a whole model's differences that counts, the largest of all (default: 0.2 for ties, else 1)")
      ->check(CLI::Range(1e-6, 1.0));
  app.add_option("--drop", o->drop, "Share of every expert's differences that is dropped at random (dare)")
      ->check(CLI::Range(0.0, 0.9999))
      ->capture_default_str();
  app.add_option("--drop-seed", o->seed, "Of what is dropped (dare)")->capture_default_str();
  return [a, o] { return run(*a, *o); };
}

const RegisterMerge experts({"task-arithmetic", "ties", "dare", "average"}, setup);

}  // namespace
}  // namespace moiety::cli
