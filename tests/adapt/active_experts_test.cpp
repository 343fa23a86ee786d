// How many of the experts beside a matrix a token takes, chosen at run time.
#include <gtest/gtest.h>

#include "adapt_tools.h"
#include "message_of.h"
#include "moiety/moe/router.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

struct Case {
  const char* slug;
  json settings;  // with `number` as the model has it
  const char* number;
  int64_t least, most;
};

const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {"mola", {{"experts", 4}, {"top_k", 2}, {"rank", 2}}, "top_k", 1, 4},
      {"lora-mixer", {{"experts", 4}, {"top_k", 2}, {"rank", 2}}, "top_k", 1, 4},
      {"adamoe-linear", {{"experts", 4}, {"null_experts", 2}, {"top_k", 3}, {"rank", 2}}, "top_k", 1, 4},
      {"dynmole",
       {{"experts", 4}, {"keep_top_k", 2}, {"top_p", 0.01}, {"entropy_threshold", 1.0}, {"rank", 2}},
       "keep_top_k",
       1,
       4},
      {"smora", {{"rank", 6}, {"active", 4}, {"block", 2}}, "active", 2, 6},
      {"flylora", {{"rank", 6}, {"top_k", 3}}, "top_k", 1, 6},
      {"mora", {{"rank", 6}, {"top_k", 3}, {"threshold", 0.0}, {"temperature", 1.0}}, "top_k", 2, 6}};
  return all;
}

json part_of(const Case& c, int64_t k = 0) {
  json part = c.settings;
  part["slug"] = c.slug;
  if (k > 0) part[c.number] = k;
  return part;
}

const Tensor& ids() {
  static const Tensor t = torch::arange(18, torch::kInt64).view({2, 9});
  return t;
}

TEST(ActiveExpertsBeside, AreThoseOfAModelThatWasMadeWithThem) {
  for (const Case& c : cases()) {
    torch::manual_seed(3);
    const auto model = make_causal(model_with(json::array({part_of(c)})));
    stir(*model);
    const auto before = logits_of(*model, ids());
    for (const int64_t k : {c.least, c.most}) {
      set_active_experts(*model, k);
      const auto got = logits_of(*model, ids());
      const auto made = make_causal(model_with(json::array({part_of(c, k)})));
      const torch::NoGradGuard frozen;
      copy_stored(*model, *made);
      EXPECT_LT(distance(got, logits_of(*made, ids())), 1e-5) << c.slug << k;
      EXPECT_GT(distance(got, before), 1e-5) << c.slug << k;
    }
  }
}

TEST(ActiveExpertsBeside, AreInTheirBounds) {
  for (const Case& c : cases()) {
    const auto model = make_causal(model_with(json::array({part_of(c)})));
    for (const int64_t k : {int64_t{0}, c.least - 1, c.most + 1})
      EXPECT_NE(message_of([&] { set_active_experts(*model, k); }).find("impossible"), std::string::npos)
          << c.slug << k;
  }
  const auto smora = make_causal(model_with(json::array({part_of(cases()[4])})));
  EXPECT_NE(message_of([&] { set_active_experts(*smora, 3); }).find("no multiple of a block"), std::string::npos);
}

TEST(ActiveExpertsBeside, AreRefusedWhereThereIsNoSuchNumber) {
  const auto says = [](const json& part, int64_t k) {
    const auto model = make_causal(model_with(json::array({part})));
    return message_of([&] { set_active_experts(*model, k); });
  };
  const json loramoe = {{"slug", "loramoe"}, {"experts", 4}, {"rank", 2}, {"target", {"up_proj", "down_proj"}}};
  EXPECT_NE(says(loramoe, 2).find("all of its 4 experts"), std::string::npos);
  EXPECT_EQ(says(loramoe, 4), "");
  json mole = {{"slug", "llava-mole"}, {"experts", 3}, {"rank", 2}, {"target", {"gate_proj", "up_proj", "down_proj"}}};
  EXPECT_NE(says(mole, 2).find("gives every token one expert"), std::string::npos);
  EXPECT_EQ(says(mole, 1), "");
  mole["dense"] = true;
  EXPECT_NE(says(mole, 1).find("all of its 3 experts"), std::string::npos);
  EXPECT_NE(says({{"slug", "lora"}, {"rank", 2}}, 1).find("no mixture of experts"), std::string::npos);
}

// Where the model is a mixture itself, its own experts are meant.
TEST(ActiveExpertsBeside, AreLeftAloneBesideAMixture) {
  torch::manual_seed(4);
  const json more = {{"model_type", "mixtral"}, {"num_local_experts", 4}, {"num_experts_per_tok", 2}};
  const json part = {{"slug", "lora-mixer"}, {"experts", 2}, {"top_k", 1}, {"rank", 2}, {"target", "q_proj"}};
  const auto model = make_causal(model_with(json::array({part}), more));
  set_active_experts(*model, 4);  // more than the part has
  Trace trace;
  Pass pass;
  pass.trace = &trace;
  const torch::NoGradGuard frozen;
  model->eval();
  model->forward(ids(), pass);
  for (const auto& r : trace.records)
    EXPECT_EQ((r.routing.experts >= 0).sum(1).max().item<int64_t>(), r.experts == 4 ? 4 : 1);
}

}  // namespace
}  // namespace moiety
