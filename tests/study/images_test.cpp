#include "moiety/study/images.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <filesystem>
#include <set>

#include "message_of.h"
#include "moiety/base/error.h"

namespace moiety {
namespace {

namespace fs = std::filesystem;
using torch::Tensor;

bool there_are_images() {
  if (!fs::exists("/usr/share/datasets/fashion-mnist")) return false;
  try {
    digit_images();
    return true;
  } catch (const Error&) {
    return false;
  }
}

TEST(DrawnRows, TakesEveryRowOnceEachTimeThrough) {
  DrawnRows rows(5, 1, "test"), again(5, 1, "test"), other(5, 2, "test");
  std::multiset<int64_t> seen;
  std::vector<int64_t> first, second, third;
  for (int i = 0; i < 5; ++i) {
    const auto drawn = rows.next(3), same = again.next(3), changed = other.next(3);
    for (int64_t j = 0; j < 3; ++j) {
      seen.insert(drawn[j].item<int64_t>());
      first.push_back(drawn[j].item<int64_t>());
      second.push_back(same[j].item<int64_t>());
      third.push_back(changed[j].item<int64_t>());
    }
  }
  for (int64_t r = 0; r < 5; ++r) EXPECT_EQ(seen.count(r), 3U);
  EXPECT_EQ(first, second);
  EXPECT_NE(first, third);
  EXPECT_THROW(DrawnRows(0, 1, "test"), Error);
}

TEST(LearnBy, GoesDownAndCountsAuxiliaryLosses) {
  torch::manual_seed(1);
  torch::nn::Linear line(3, 1);
  const auto x = torch::randn({32, 3}), y = torch::matmul(x, torch::tensor({{1.0F}, {-2.0F}, {0.5F}}));
  double first = 0, last = 0;
  learn_by(*line, slots_at(*line, 0.1), 120, [&](Pass& pass) {
    EXPECT_TRUE(pass.training);
    pass.add_loss("size", 0.0 * line->weight.square().sum());
    const auto loss = (line(x) - y).square().mean();
    last = loss.item<double>();
    if (first == 0) first = last;
    return loss;
  });
  EXPECT_LT(last, 1e-2 * first);
  EXPECT_FALSE(line->is_training());
  torch::nn::Linear still(3, 1);
  EXPECT_NE(message_of([&] {
              learn_by(*still, slots_at(*still, 0.1), 1, [&](Pass& pass) {
                pass.add_loss("nan", still->weight.sum() * std::nan(""));
                return still(x).sum();
              });
            }).find("step 0"),
            std::string::npos);
}

TEST(ImageDomains, ShareNoClassAndNoImageBetweenLearningAndMeasuring) {
  if (!there_are_images()) GTEST_SKIP() << "dataset-fashion-mnist or scikit-learn is not there";
  const auto domains = image_domains();
  ASSERT_EQ(domains.size(), 5U);
  int64_t first = 0;
  for (const ImageDomain& d : domains) {
    EXPECT_EQ(d.first, first) << d.name;
    std::set<std::string> learned;
    const auto key = [](const Tensor& t) {
      const auto c = t.contiguous();
      return std::string(reinterpret_cast<const char*>(c.data_ptr<float>()), static_cast<size_t>(c.nbytes()));
    };
    for (int64_t i = 0; i < d.train.images.size(0); ++i) learned.insert(key(d.train.images[i]));
    for (const LabelledImages* part : {&d.train, &d.tuning, &d.test}) {
      EXPECT_EQ(part->images.sizes(), (std::vector<int64_t>{part->labels.size(0), 1, 28, 28})) << d.name;
      EXPECT_EQ(part->labels.min().item<int64_t>(), first) << d.name;
      EXPECT_EQ(part->labels.max().item<int64_t>(), first + d.classes - 1) << d.name;
      EXPECT_LE(part->images.abs().max().item<double>(), 1.0) << d.name;
    }
    for (int64_t i = 0; i < d.test.images.size(0); ++i) EXPECT_EQ(learned.count(key(d.test.images[i])), 0U) << d.name;
    first += d.classes;
  }
  EXPECT_EQ(first, 35);
  // Turned by a quarter: the top row of what is turned is the right column of what was.
  const auto &upright = domains[2].test.images, &turned = domains[4].test.images;
  EXPECT_TRUE(torch::equal(turned.select(2, 0), upright.select(3, 27)));
  EXPECT_EQ(digit_images().labels.size(0), 1797);
  EXPECT_NE(message_of([] { fashion_images("train", {3}, 5990, 20); }).find("6000 images of class 3"),
            std::string::npos);
}

}  // namespace
}  // namespace moiety
