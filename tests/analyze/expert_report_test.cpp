#include "moiety/analyze/expert_report.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "../compress/small_mixture.h"

namespace moiety {
namespace {

std::vector<int64_t> text() {
  std::vector<int64_t> out;
  for (int64_t i = 0; i < 96; ++i) out.push_back((i * 7 + i * i) % 40);
  return out;
}

Calibration read(const Checkpoint& checkpoint, const ExpertLayers& layers) {
  const auto model = load_causal(checkpoint, {.dtype = "f32"});
  CalibrationOptions options;
  options.windows = {16, 3, -1};
  return calibrate(*model, layers, {text()}, options);
}

TEST(ExpertReport, NamesCopiesAndWhatStays) {
  const auto base = small_mixture::make("mixtral");
  const ExpertLayers whole(base);
  NewExperts twin;
  twin.block = 1;
  twin.rows = {0, 1, 2, 3, 4, 5};
  twin.from = {0, 1, 2, 1, 4, 5};
  const auto with_twin = with_experts(whole, {twin});
  const ExpertLayers layers(with_twin);
  const auto report = expert_report(layers, read(*with_twin, layers), /*weights=*/true);
  ASSERT_EQ(report["layers"].size(), 3u);
  const auto& pair = report["layers"][1]["closest_weights"];
  EXPECT_EQ(pair["a"], 1);
  EXPECT_EQ(pair["b"], 3);
  EXPECT_NEAR(pair["similarity"].get<double>(), 1.0, 1e-5);
  EXPECT_LT(report["layers"][0]["closest_weights"]["similarity"].get<double>(), 0.5);
  for (const auto& s : report["suggestions"]) {
    int64_t kept = 0;
    for (const auto& k : s["keep"]) kept += k.get<int64_t>();
    EXPECT_GE(s["saliency_kept"].get<double>(), s["share"].get<double>() - 0.1);
    EXPECT_NEAR(static_cast<double>(kept) / 18.0, s["share"].get<double>(), 0.1);
  }
  EXPECT_EQ(report["summary"]["experts"], 18);
  EXPECT_EQ(report["tokens"], 96);
}

TEST(ExpertReport, PageHoldsTheNumbersAndNeedsNothingElse) {
  const auto base = small_mixture::make("qwen3_moe");
  const ExpertLayers layers(base);
  auto report = expert_report(layers, read(*base, layers), false);
  report["model"] = "a </script> model";
  const auto page = expert_page(report);
  EXPECT_NE(page.find("\"saliency\""), std::string::npos);
  EXPECT_EQ(page.find("{{"), std::string::npos);
  EXPECT_EQ(page.find("</script> model"), std::string::npos);
  EXPECT_EQ(page.find("src=\"http"), std::string::npos);
}

}  // namespace
}  // namespace moiety
