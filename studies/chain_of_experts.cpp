// Chain-of-Experts: at equal compute, do two rounds of four experts do more than one round of eight?
#include <fmt/format.h>

#include "moiety/study/language.h"

namespace moiety {
namespace {

using nlohmann::json;

LanguageRecipe recipe() {
  LanguageRecipe r;
  r.width = 198;  // 8 of 31 experts of 22 and a shared one; every arm replaces the dense layer
  return r;
}

json parts_of(const std::string& arm) {
  json part = {
      {"slug", "chain-of-experts"}, {"experts", 31}, {"shared", 1}, {"width", 22}, {"rounds", 1}, {"top_k", 8}};
  if (arm == "moe-8-plain") {
    part["inner_residual"] = false;
    part["outer_residual"] = true;
  } else if (arm == "moe-16") {
    part["top_k"] = 16;
  } else if (arm.rfind("chain", 0) == 0) {
    part["rounds"] = 2;
    part["top_k"] = 4;
    part["per_round_router"] = arm != "chain-one-router";
    part["outer_residual"] = arm == "chain-outer-residual";
  }
  return json::array({part});
}

json measure(const StudyCell& cell) {
  const LanguageRecipe r = recipe();
  const auto trainer = train_language(cell, {.recipe = r, .parts = parts_of(cell.arm)});
  json out = measure_language(trainer->model(), held_out_text(r));
  out["parameters"] = static_cast<double>(parameter_count(trainer->model())) / 1e6;
  return out;
}

StudyOutcome judge(const StudyTable& t) {
  const auto against = [&](const std::string& base) { return t.difference("chain", base, "nats"); };
  const auto same = against("moe-8"), plain = against("moe-8-plain");
  StudyOutcome o;
  o.verdict = same.lower() && plain.lower()     ? StudyOutcome::reproduced
              : same.higher() || plain.higher() ? StudyOutcome::not_reproduced
                                                : StudyOutcome::inconclusive;
  o.reason = fmt::format(
      "Nats a byte of two rounds of 4 experts against one round of 8 with the same residual switches: {}; against one "
      "round of 8 in an ordinary pre-norm block: {}; against one round of 16: {}; against two rounds behind one "
      "router: {}; against two rounds with the input added at the end: {}.",
      same.text(), plain.text(), against("moe-16").text(), against("chain-one-router").text(),
      against("chain-outer-residual").text());
  o.headline = fmt::format("nats a byte {:+.2f} % against one round of 8, {:+.2f} % against the ordinary block",
                           same.mean, plain.mean);
  return o;
}

Study study() {
  Study s;
  s.claim =
      "Validation loss after 1000 steps on MetaMathQA: one round of 8 of 64 experts 1.196, two rounds of 4 1.121, one "
      "round of 16 1.166; two rounds behind one router 1.244, with an outer residual 1.175.";
  s.setup = recipe().text() +
            "; every block has 31 experts of 22 hidden units and a shared one. The method replaces the residual stream "
            "by its norm, in the paper's baseline too; the ordinary pre-norm block is the baseline besides that.";
  s.arms = {{"moe-8-plain", "one round of 8 in an ordinary pre-norm block"},
            {"moe-8", "one round of 8 with the method's residual switches"},
            {"chain", "two rounds of 4: Chain-of-Experts"},
            {"chain-one-router", "the same, one router for both rounds", false},
            {"chain-outer-residual", "the same as chain, the input added at the end", false},
            {"moe-16", "one round of 16 with the method's residual switches", false}};
  s.metrics = {
      {"nats", "nats a byte", 4}, {"bits_per_byte", "bits a byte", 4}, {"parameters", "million parameters", 2}};
  s.rule =
      "Reproduced: nats a byte of two rounds of 4 lower than those of one round of 8, with the same switches and in "
      "the "
      "ordinary block, on every seed and by more than two standard errors. Not reproduced: clearly higher than one of "
      "the two. Else inconclusive. The other arms are reported.";
  s.full = {.seeds = 3, .steps = 400};
  s.brief = {.seeds = 1, .steps = 100};
  s.measure = measure;
  s.judge = judge;
  s.settings = [] { return recipe().settings(); };
  return s;
}

const RegisterStudy registered(
    "chain-of-experts", "Chain-of-Experts: two rounds of half as many experts",
    "two rounds of four experts against one round of eight, and what the residual switches cost", study);

}  // namespace
}  // namespace moiety
