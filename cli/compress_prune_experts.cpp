// moiety compress --method prune-experts: single experts out of a model, their down projections zeroed.
#include <fmt/format.h>

#include <iostream>
#include <nlohmann/json.hpp>

#include "compress.h"
#include "moiety/base/error.h"
#include "moiety/compress/prune_experts.h"
#include "write_checkpoint.h"

namespace moiety::cli {
namespace {

using nlohmann::json;

CompressWay setup(CLI::App& app, std::shared_ptr<const CompressArguments> a) {
  struct Options {
    std::string experts, report;
  };
  auto o = std::make_shared<Options>();
  auto* list = app.add_option("--experts", o->experts,
                              "Experts to take out: LAYER,EXPERT;LAYER,EXPERT (-1: the shared expert) (prune-experts)");
  app.add_option("--super-experts", o->report,
                 "Or those that a report of `moiety analyze super-experts` names (prune-experts)")
      ->excludes(list);
  return {"--method prune-experts", [a] { return a->method == "prune-experts"; },
          [a, o] {
            check(!o->experts.empty() || !o->report.empty(),
                  "say which experts: --experts \"1,68;2,92\", or --super-experts REPORT");
            const auto base = Checkpoint::open(a->model);
            const auto experts =
                o->report.empty() ? parse_experts(o->experts) : reported_experts(o->report, base->config());
            WriteOptions write;
            write.overwrite = a->overwrite;
            write.dry_run = a->dry_run;
            write_checkpoint(*prune_experts(base, experts), a->out, write, "compress");
            if (a->json) {
              json pairs = json::array();
              for (const auto& e : experts) pairs.push_back({e.layer, e.expert});
              std::cout << json{{"output", a->out}, {"written", !a->dry_run}, {"experts", std::move(pairs)}}.dump(2)
                        << "\n";
            } else {
              fmt::print("{} {}: {} expert{} silenced\n", a->dry_run ? "would write" : "wrote", a->out, experts.size(),
                         experts.size() == 1 ? "" : "s");
            }
            return 0;
          }};
}

const RegisterCompress prune_experts_way("prune-experts", setup);

}  // namespace
}  // namespace moiety::cli
