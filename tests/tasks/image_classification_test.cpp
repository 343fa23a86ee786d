#include "moiety/tasks/image_classification.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <limits>
#include <set>

#include "moiety/base/error.h"

namespace moiety {
namespace {

VisionConfig tiny() {
  VisionConfig c;
  c.image = 8;
  c.patch = 4;
  c.hidden = 8;
  c.blocks = 3;
  c.heads = 2;
  c.width = 6;
  c.classes = 3;
  return c;
}

int64_t parameters(const VisionConfig& c) {
  const VisionModel model(c);
  std::set<const void*> seen;
  int64_t n = 0;
  for (const auto& p : model.parameters())
    if (seen.insert(p.unsafeGetTensorImpl()).second) n += p.numel();
  return n;
}

// The label is the third of the image that is bright.
ImageSet stripes(int64_t count) {
  ImageSet s;
  s.labels = torch::arange(count) % 3;
  s.pixels = torch::randint(0, 60, {count, 1, 8, 8}, torch::kUInt8);
  for (int64_t i = 0; i < count; ++i) s.pixels[i].slice(1, 3 * (i % 3), 3 * (i % 3) + 2).fill_(250);
  return s;
}

TEST(VisionModel, CountsParametersOfWhatIsShared) {
  const int64_t d = 8, f = 6, e = 4, blocks = 3;
  const int64_t around = 16 * d + d + 5 * d + 2 * d + (d * d + d) + (3 * d + 3), norms = 2 * 2 * d;
  const int64_t attention = 4 * (d * d + d), dense = 2 * d * f + f + d;
  EXPECT_EQ(parameters(tiny()), around + attention + e * dense + e * d + blocks * norms);
  VisionConfig own = tiny();
  own.mixture = own.share_attention = own.share_ffn = false;
  EXPECT_EQ(parameters(own), around + blocks * (attention + dense + norms));
  VisionConfig routers = tiny();
  routers.share_router = false;
  EXPECT_EQ(parameters(routers), around + attention + e * dense + blocks * (e * d + norms));
  VisionConfig norm = tiny();
  norm.share_norms = true;
  EXPECT_EQ(parameters(norm), around + attention + e * dense + e * d + norms);
  VisionConfig groups = tiny();
  groups.group = 2;  // blocks 0 and 1 dense, block 2 a mixture
  EXPECT_EQ(parameters(groups), around + 2 * attention + dense + e * dense + e * d + blocks * norms);
}

TEST(VisionModel, ImagesOfABatchAreIndependentWithRoomForAll) {
  torch::manual_seed(1);
  torch::NoGradGuard frozen;
  VisionConfig c = tiny();
  c.dropout = c.moe.dropout = 0.0;
  c.moe.capacity_factor = std::numeric_limits<double>::infinity();
  VisionModel model(c);
  model.eval();
  // With room for all tokens an image's logits do not depend on the batch.
  const auto images = torch::randn({4, 1, 8, 8});
  Pass a, b;
  EXPECT_LT(
      (model.forward(images, a).narrow(0, 2, 1) - model.forward(images.narrow(0, 2, 1), b)).abs().max().item<double>(),
      1e-5);
  Pass pass;
  EXPECT_THROW(model.forward(torch::randn({1, 1, 8, 4}), pass), Error);
}

TEST(VisionModel, RefusesWhatDoesNotFit) {
  VisionConfig patch = tiny(), heads = tiny();
  patch.patch = 3;
  heads.heads = 3;
  EXPECT_THROW(VisionModel{patch}, Error);
  EXPECT_THROW(VisionModel{heads}, Error);
}

TEST(ImageClassification, LearnsWhichThirdIsBright) {
  torch::manual_seed(2);
  VisionModel model(tiny());
  const auto data = stripes(96);
  ImageTraining t;
  t.optimizer.lr = 1e-2;
  t.batch = 32;
  t.epochs = 40;
  double first = 0, last = 0;
  t.on_step = [&](int64_t step, int64_t, double loss) { (step == 1 ? first : last) = loss; };
  train_images(model, data, t);
  EXPECT_LT(last, first);
  EXPECT_GT(image_accuracy(model, data, 20), 0.9);
}

TEST(ImageClassification, SameSeedsGiveTheSameModel) {
  const auto trained = [] {
    torch::manual_seed(3);
    VisionModel model(tiny());
    ImageTraining t;
    t.batch = 16;
    train_images(model, stripes(48), t);
    return model.parameters().front().detach().clone();
  };
  EXPECT_TRUE(torch::equal(trained(), trained()));
}

TEST(ImageClassification, RefusesLabelsThatTheModelLacks) {
  VisionModel model(tiny());
  auto data = stripes(4);
  data.labels[0] = 3;
  EXPECT_THROW(train_images(model, data, {}), Error);
}

}  // namespace
}  // namespace moiety
