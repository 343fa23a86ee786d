// moiety compress --method dern, uncurl, m-smoe: fewer experts, made of those that there were.
#include <memory>

#include "compress_experts.h"
#include "moiety/base/error.h"
#include "moiety/compress/expert_plans.h"

namespace moiety::cli {
namespace {

using Decide = std::function<ExpertPlan(const ExpertRequest&)>;

ExpertPlan plan_of(PlannedExperts planned) {
  return {std::move(planned.layers), std::move(planned.report)};
}

/// With the limits that the settings declare.
template <class Config>
Config checked(const Config& given, const std::string& name) {
  return parse<Config>(dump(given), name);
}

const RegisterExpertMethod dern({
    .name = "dern",
    .summary = "keep what has the largest gates, and move neurons of the others into it (DERN)",
    .setup = [](CLI::App& app) -> Decide {
      auto c = std::make_shared<DernConfig>();
      app.add_option("--threshold", c->threshold, "A neuron moves when its best cosine is above this (dern)")
          ->capture_default_str();
      app.add_option("--components", c->components, "What neurons are compared by: gate, up, down (dern)")
          ->delimiter(',')
          ->capture_default_str();
      app.add_option("--init", c->init, "First centres: own, of the expert's own neurons, or peak, of all (dern)")
          ->capture_default_str();
      app.add_option("--rounds", c->iterations, "Most rounds of clustering (dern)")->capture_default_str();
      app.add_flag("!--no-router-transfer", c->router_transfer, "Leave the rows of the router as they are (dern)");
      return [c](const ExpertRequest& r) {
        return plan_of(plan_dern(r.layers, *r.calibration, r.keep, r.protect, checked(*c, "dern")));
      };
    },
});

const RegisterExpertMethod uncurl({
    .name = "uncurl",
    .summary = "make one expert of those that the router treats alike on a task's text (UNCURL)",
    .keeps = false,
    .setup = [](CLI::App& app) -> Decide {
      auto c = std::make_shared<UncurlConfig>();
      app.add_option("--factor", c->factor, "A layer keeps one of so many experts (uncurl)")->capture_default_str();
      app.add_option("--router", c->router,
                     "map: the router stays, rows share experts; average: its rows are averaged, too (uncurl)")
          ->capture_default_str();
      return [c](const ExpertRequest& r) {
        return plan_of(plan_uncurl(r.layers, *r.calibration, r.protect, checked(*c, "uncurl")));
      };
    },
});

const RegisterExpertMethod m_smoe({
    .name = "m-smoe",
    .summary = "average experts by use into the most used ones of all layers (M-SMoE)",
    .keeps = false,
    .setup = [](CLI::App& app) -> Decide {
      auto c = std::make_shared<MSmoeConfig>();
      app.add_option("--groups", c->groups, "Experts that a merged layer keeps on average (m-smoe)")
          ->capture_default_str();
      app.add_option("--merge-layers", c->layers, "Layers whose experts are merged; left out: all (m-smoe)")
          ->delimiter(',');
      app.add_option("--group-capacity", c->capacity, "Most experts of a group; 0: no limit (m-smoe)")
          ->capture_default_str();
      return [c](const ExpertRequest& r) {
        for (const auto& experts : r.protect)
          check(experts.empty(),
                "--protect and --method m-smoe do not go together: groups are counted over all experts");
        return plan_of(plan_m_smoe(r.layers, *r.calibration, checked(*c, "m-smoe")));
      };
    },
});

}  // namespace
}  // namespace moiety::cli
