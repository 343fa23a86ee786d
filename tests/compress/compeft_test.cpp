#include "moiety/compress/compeft.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "message_of.h"
#include "moiety/base/files.h"
#include "threads.h"

namespace moiety {
namespace {

using torch::Tensor;

CompeftConfig config_of(double density, double alpha = 1.0, const std::string& quantizer = "sign") {
  return {density, alpha, quantizer};
}

Tensor random_vector(int64_t d, uint64_t seed) {
  torch::manual_seed(seed);
  return torch::randn({d});
}

TEST(CompeftKept, IsOneMoreThanTheFloorInIntegers) {
  EXPECT_EQ(compeft_kept(100, 0.29), 30);  // 0.29 * 100 is 28.999... in binary
  EXPECT_EQ(compeft_kept(100, 0.07), 8);
  EXPECT_EQ(compeft_kept(47, 0.2), 10);
  EXPECT_EQ(compeft_kept(3, 0.2), 1);
  EXPECT_EQ(compeft_kept(1000, 0.0005), 1);
  EXPECT_EQ(compeft_kept(1000, 1.0), 1000);
  EXPECT_EQ(compeft_kept(int64_t{70} * 1000 * 1000 * 1000, 0.123456), 8641920001);
  EXPECT_THROW(compeft_kept(10, 0.0), Error);
  EXPECT_THROW(compeft_kept(10, 20.0), Error);
}

TEST(CompeftThreshold, IsThatOfASort) {
  auto x = random_vector(5000, 1);
  x[7] = 0.0;
  x[8] = -0.0;
  x[9] = 1e-42;  // below the smallest normal number
  x[10] = -3e38;
  const auto sorted = std::get<0>(x.abs().sort(0, /*descending=*/true));
  for (const int64_t rank : {1, 2, 17, 1000, 4998, 4999, 5000})
    EXPECT_EQ(compeft_threshold(x, rank), sorted[rank - 1].item<float>()) << rank;
  EXPECT_THROW(compeft_threshold(x, 0), Error);
  EXPECT_THROW(compeft_threshold(x, 5001), Error);
}

TEST(Compeft, KeepsTheLargestEntriesOfTheWholeVector) {
  const auto tau = random_vector(1000, 2);
  const auto c = compeft_compress(tau, config_of(0.2, 2.0));
  const auto back = c.expand();
  EXPECT_EQ(c.signs.kept(), 201);
  EXPECT_EQ(back.count_nonzero().item<int64_t>(), 201);
  const auto kept = back != 0;
  EXPECT_TRUE(torch::equal(back.sign().masked_select(kept), tau.sign().masked_select(kept)));
  EXPECT_GE(tau.abs().masked_select(kept).min().item<float>(),
            tau.abs().masked_select(kept.logical_not()).max().item<float>());
  // One size for all: two deviations of the dense vector, over d - 1.
  EXPECT_NEAR(c.scale, 2.0 * tau.std().item<double>(), 1e-5);
  EXPECT_TRUE(torch::equal(back.abs().masked_select(kept), torch::full({201}, c.scale)));
}

TEST(Compeft, TheDeviationIsThatOfTheDenseVector) {
  auto tau = torch::zeros({5});
  tau[1] = 3.0;
  tau[4] = 1.0;  // mean 0.8: squares 0.64 + 4.84 + 0.64 + 0.64 + 0.04 = 6.8
  EXPECT_NEAR(compeft_deviation(tau), std::sqrt(6.8 / 4.0), 1e-12);
  EXPECT_THROW(compeft_deviation(torch::ones({1})), Error);
}

TEST(Compeft, EntriesThatTieAllStay) {
  const auto c =
      compeft_compress(torch::tensor({1.0f, -2.0f, 2.0f, 2.0f, 0.5f, -2.0f, 0.0f, 0.0f, 0.0f, 0.0f}), config_of(0.2));
  EXPECT_EQ(ternary_signs(c.signs), (std::vector<int8_t>{0, -1, 1, 1, 0, -1, 0, 0, 0, 0}));
}

TEST(Compeft, GrowsWithItsVectorAndTurnsWithIt) {
  const auto tau = random_vector(777, 3);
  const auto back = compeft_compress(tau, config_of(0.1, 3.0)).expand();
  EXPECT_TRUE(torch::equal(compeft_compress(-tau, config_of(0.1, 3.0)).expand(), -back));
  EXPECT_TRUE(torch::allclose(compeft_compress(4.0 * tau, config_of(0.1, 3.0)).expand(), 4.0 * back, 1e-6));
  // Compressed again, what was kept ties and stays.
  EXPECT_EQ(compeft_compress(back, config_of(0.1)).signs, compeft_compress(tau, config_of(0.1)).signs);
}

TEST(Compeft, TheBestScaleIsTheMeanSizeOfWhatIsKept) {
  const auto tau = random_vector(2000, 4);
  const auto kept = compeft_compress(tau, config_of(0.3, 1.0, "prune")).expand();
  const auto error = [&](double alpha) {
    return (compeft_compress(tau, config_of(0.3, alpha)).expand() - kept).norm().item<double>();
  };
  const double best = compeft_compress(tau, config_of(0.3, 1.0, "stc")).scale / compeft_deviation(tau);
  EXPECT_NEAR(best, kept.abs().sum().item<double>() / 601.0 / tau.std().item<double>(), 1e-4);
  for (const double factor : {0.5, 0.9, 0.98, 1.02, 1.1, 2.0}) EXPECT_GT(error(best * factor), error(best)) << factor;
}

TEST(Compeft, PrunedKeepsItsValues) {
  const auto tau = random_vector(500, 5);
  const auto c = compeft_compress(tau, config_of(0.2, 7.0, "prune"));
  const auto back = c.expand();
  EXPECT_EQ(c.form, "prune");
  EXPECT_TRUE(torch::equal(back, torch::where(back != 0, tau, torch::zeros_like(tau))));
  EXPECT_EQ(back.count_nonzero().item<int64_t>(), 101);
}

TEST(Compeft, WholeDensityChangesNothing) {
  const auto tau = random_vector(100, 6);
  const auto c = compeft_compress(tau, config_of(1.0));
  EXPECT_EQ(c.form, "dense");
  EXPECT_TRUE(torch::equal(c.expand(), tau));
}

TEST(Compeft, AVectorOfZerosAddsNothing) {
  const auto c = compeft_compress(torch::zeros({90}), config_of(0.2));
  EXPECT_EQ(c.scale, 0.0f);
  EXPECT_EQ(c.signs.kept(), 0);
  EXPECT_TRUE(torch::equal(c.expand(), torch::zeros({90})));
}

TEST(Compeft, PartsOfAVectorAreItsParts) {
  const auto tau = random_vector(400, 7);
  for (const char* quantizer : {"sign", "prune", "stc"}) {
    const auto c = compeft_compress(tau, config_of(0.3, 1.0, quantizer));
    for (const auto& [begin, end] : std::vector<std::pair<int64_t, int64_t>>{{0, 400}, {3, 64}, {64, 65}, {130, 399}})
      EXPECT_TRUE(torch::equal(c.expand(begin, end), c.expand().slice(0, begin, end))) << quantizer << begin;
  }
  EXPECT_THROW(compeft_compress(tau, config_of(0.3)).expand(0, 401), Error);
}

TEST(Compeft, ThreadsChangeNothing) {
  const auto tau = random_vector(300000, 8);
  CompressedVector one, two;
  {
    const test::Threads threads(1);
    one = compeft_compress(tau, config_of(0.1));
  }
  {
    const test::Threads threads(2);
    two = compeft_compress(tau, config_of(0.1));
  }
  EXPECT_EQ(one.scale, two.scale);
  EXPECT_EQ(one.signs, two.signs);
}

TEST(Compeft, BadInputIsAnError) {
  const auto tau = random_vector(10, 9);
  EXPECT_NE(message_of([&] { compeft_compress(tau, config_of(0.0)); }).find("density"), std::string::npos);
  EXPECT_NE(message_of([&] { compeft_compress(tau, config_of(20.0)); }).find("density"), std::string::npos);
  EXPECT_NE(message_of([&] { compeft_compress(tau, config_of(0.2, 0.0)); }).find("alpha"), std::string::npos);
  EXPECT_NE(message_of([&] { compeft_compress(tau, config_of(0.2, 1.0, "int4")); }).find("int4"), std::string::npos);
  auto bad = tau.clone();
  bad[3] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_NE(message_of([&] { compeft_compress(bad, config_of(0.2)); }).find("index 3"), std::string::npos);
}

// ---- Tensors by name ----

ExpertTensors tensors(uint64_t seed) {
  torch::manual_seed(seed);
  return {{"b.weight", torch::randn({3, 4})}, {"a.bias", torch::randn({5})}, {"B", torch::randn({2})}};
}

TEST(TaskVector, IsFlatInTheOrderOfNamesAsBytes) {
  const auto expert = tensors(1), base = tensors(2);
  const auto tau = task_vector(expert, "full", base);
  // Upper case comes first.
  const auto want = torch::cat({expert.at("B") - base.at("B"), expert.at("a.bias") - base.at("a.bias"),
                                (expert.at("b.weight") - base.at("b.weight")).flatten()});
  EXPECT_TRUE(torch::equal(tau, want));
  EXPECT_EQ(task_vector_entries(expert)[2].begin, 7);
}

TEST(TaskVector, BeginsAtZeroForLoraAndAtOneForIa3) {
  const auto expert = tensors(3);
  const auto lora = task_vector(expert, "lora"), ia3 = task_vector(expert, "ia3");
  EXPECT_TRUE(torch::equal(lora.slice(0, 0, 2), expert.at("B")));
  EXPECT_TRUE(torch::equal(ia3, lora - 1.0));
  for (const char* kind : {"lora", "ia3"}) {
    const auto back = apply_task_vector(task_vector(expert, kind), task_vector_entries(expert), kind);
    for (const auto& [name, t] : expert) EXPECT_TRUE(torch::allclose(back.at(name), t, 1e-6, 1e-6)) << kind << name;
  }
}

TEST(TaskVector, ComesBackInTheTypeOfTheBase) {
  auto expert = tensors(4), base = tensors(5);
  for (auto& [name, t] : expert) t = t.to(torch::kBFloat16);
  for (auto& [name, t] : base) t = t.to(torch::kBFloat16);
  const auto back = apply_task_vector(task_vector(expert, "full", base), task_vector_entries(expert), "full", base);
  for (const auto& [name, t] : expert) EXPECT_TRUE(torch::equal(back.at(name), t)) << name;
}

TEST(TaskVector, ReconstructionTakesThreeValues) {
  const auto expert = tensors(6), base = tensors(7);
  const auto tau = task_vector(expert, "full", base);
  const auto c = compeft_compress(tau, config_of(0.3));
  const auto back = apply_task_vector(c.expand(), task_vector_entries(expert), "full", base);
  const auto added = task_vector(back, "full", base);
  // Up to the rounding of a sum.
  for (int64_t i = 0; i < added.numel(); ++i) {
    const double a = std::abs(added[i].item<double>());
    EXPECT_TRUE(a == 0.0 || std::abs(a - c.scale) < 1e-6) << a;
  }
}

TEST(TaskVector, WhatDiffersIsNamed) {
  auto expert = tensors(8);
  const auto base = tensors(9);
  expert["b.weight"] = torch::zeros({4, 3});
  for (const char* name : {"n1", "n2", "n3", "n4", "n5"}) expert[name] = torch::zeros({1});
  const auto says = message_of([&] { task_vector(expert, "full", base); });
  EXPECT_NE(says.find("'b.weight' is [4, 3] in the expert and [3, 4] in the base"), std::string::npos) << says;
  EXPECT_NE(says.find("and 1 more"), std::string::npos) << says;
  EXPECT_EQ(says.find("n5"), std::string::npos);
  EXPECT_NE(message_of([&] { task_vector(tensors(1), "dora"); }).find("dora"), std::string::npos);
  auto bad = tensors(10);
  bad["b.weight"][1][2] = std::numeric_limits<float>::infinity();
  EXPECT_NE(message_of([&] { task_vector(bad, "lora"); }).find("'b.weight' holds Inf at index 6"), std::string::npos);
  EXPECT_THROW(apply_task_vector(torch::zeros({3}), task_vector_entries(base), "lora"), Error);
}

// ---- Merging ----

TEST(MergeTaskVectors, ArithmeticIsTheSum) {
  const auto taus = torch::tensor({{1.0f, -2.0f, 0.0f}, {3.0f, 2.5f, 0.0f}});
  EXPECT_TRUE(torch::equal(merge_task_vectors(taus, {}), torch::tensor({4.0f, 0.5f, 0.0f})));
}

// Columns: one of two signs by mass, not by count; all agree; a tie of masses; nothing.
Tensor three() {
  return torch::tensor({{5.0f, 1.0f, 2.0f, 0.0f}, {-1.0f, 2.0f, -2.0f, 0.0f}, {-1.0f, 3.0f, 0.0f, 0.0f}});
}

TEST(MergeTaskVectors, TiesElectsByMass) {
  // The tie takes the majority's sign: +1 +1 of the others.
  EXPECT_TRUE(torch::equal(merge_task_vectors(three(), {"ties", "dis-mean"}), torch::tensor({5.0f, 2.0f, 2.0f, 0.0f})));
  EXPECT_TRUE(torch::equal(merge_task_vectors(three(), {"ties", "dis-sum"}), torch::tensor({5.0f, 6.0f, 2.0f, 0.0f})));
  EXPECT_TRUE(torch::equal(merge_task_vectors(three(), {"ties", "dis-max"}), torch::tensor({5.0f, 3.0f, 2.0f, 0.0f})));
  EXPECT_TRUE(
      torch::equal(merge_task_vectors(-three(), {"ties", "dis-max"}), torch::tensor({-5.0f, -3.0f, -2.0f, 0.0f})));
}

TEST(MergeTaskVectors, WithoutAMajorityATieKeepsNothing) {
  const auto taus = torch::tensor({{5.0f, -1.0f, 2.0f}, {1.0f, -1.0f, -2.0f}});
  EXPECT_EQ(ties_balance(taus), 0);
  EXPECT_TRUE(torch::equal(merge_task_vectors(taus, {"ties", "dis-sum"}), torch::tensor({6.0f, -2.0f, 0.0f})));
}

TEST(MergeTaskVectors, PartsUnderTheBalanceOfAllAreParts) {
  const auto whole = merge_task_vectors(three(), {"ties", "dis-mean"});
  const int64_t balance = ties_balance(three().slice(1, 0, 2)) + ties_balance(three().slice(1, 2, 4));
  EXPECT_EQ(balance, ties_balance(three()));
  EXPECT_TRUE(
      torch::equal(merge_task_vectors(three().slice(1, 2, 4), {"ties", "dis-mean"}, balance), whole.slice(0, 2, 4)));
}

TEST(MergeTaskVectors, UnknownNamesAreErrors) {
  EXPECT_NE(message_of([] { merge_task_vectors(three(), {"dare", "dis-mean"}); }).find("dare"), std::string::npos);
  EXPECT_NE(message_of([] { merge_task_vectors(three(), {"ties", "mean"}); }).find("dis-max"), std::string::npos);
}

// ---- Files ----

TEST(CompeftFile, HoldsWhatWasCompressed) {
  const TemporaryFolder folder;
  const auto expert = tensors(11);
  const auto tau = task_vector(expert, "lora");
  TaskVectorHeader header;
  header.kind = "lora";
  header.entries = task_vector_entries(expert);
  for (const char* form : {"golomb", "masks"})
    for (const char* quantizer : {"sign", "prune", "stc"}) {
      header.form = form;
      const auto c = compeft_compress(tau, config_of(0.3, 1.0, quantizer));
      save_task_vector(folder / "x.tv", c, header);
      const auto file = TaskVectorFile::open(folder / "x.tv");
      EXPECT_EQ(file->header().form, std::string(quantizer) == "prune" ? "prune" : form);
      const auto back = load_task_vector(*file);
      EXPECT_EQ(back.signs, c.signs);
      // Kept values are stored in half precision.
      EXPECT_TRUE(torch::allclose(back.expand(), c.expand(), 1e-3)) << quantizer;
      if (c.form == "golomb") {
        EXPECT_TRUE(torch::equal(back.expand(), c.expand()));
      }
    }
  save_task_vector(folder / "x.tv", compeft_compress(tau, config_of(1.0)), header);
  EXPECT_TRUE(torch::equal(load_task_vector(*TaskVectorFile::open(folder / "x.tv")).expand(), tau));
}

TEST(TuneCompeft, TakesTheSmallestLossAndOfEqualsTheSmallerVector) {
  int compressed = 0;
  const auto with = [&](const std::function<double(double, double)>& loss) {
    return tune_compeft({0.1, 0.2}, {1.0, 2.0, 3.0}, [&](double density) {
      ++compressed;
      return [=](double alpha) { return loss(density, alpha); };
    });
  };
  auto trials = with([](double d, double a) { return std::abs(d - 0.2) + std::abs(a - 2.0); });
  ASSERT_EQ(trials.size(), 6u);
  EXPECT_EQ(compressed, 2);
  EXPECT_EQ(trials[0].density, 0.2);
  EXPECT_EQ(trials[0].alpha, 2.0);
  EXPECT_EQ(trials[1].density, 0.1);
  trials = with([](double, double a) { return a == 1.0 ? NAN : 0.0; });
  EXPECT_EQ(trials[0].density, 0.1);
  EXPECT_EQ(trials[0].alpha, 2.0);
  EXPECT_NE(message_of([&] { with([](double, double) { return NAN; }); }).find("no density"), std::string::npos);
}

}  // namespace
}  // namespace moiety
