#include "moiety/tasks/image_classification.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <limits>
#include <map>
#include <regex>
#include <set>

#include "message_of.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/random.h"
#include "moiety/train/open_run.h"
#include "moiety/train/trainer.h"

namespace moiety {
namespace {

using torch::Tensor;

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

// IDX files of images whose label is the third of the image that is bright.
std::string stripes(const TemporaryFolder& folder, const std::string& name, int64_t count, int64_t first_label = 0) {
  const auto number = [](std::string& out, uint32_t n) {
    for (int shift = 24; shift >= 0; shift -= 8) out += static_cast<char>(n >> shift & 0xff);
  };
  std::string images{0, 0, 8, 3}, labels{0, 0, 8, 1};
  for (const auto n : {count, int64_t{8}, int64_t{8}}) number(images, static_cast<uint32_t>(n));
  number(labels, static_cast<uint32_t>(count));
  RandomStream noise(7, name);
  for (int64_t i = 0; i < count; ++i) {
    labels += static_cast<char>(first_label + i % 3);
    for (int64_t row = 0; row < 8; ++row)
      for (int64_t column = 0; column < 8; ++column)
        images += static_cast<char>(row / 3 == i % 3 ? 250 : static_cast<int>(noise.below(60)));
  }
  write_file(folder / (name + "-images-idx3-ubyte"), images);
  write_file(folder / (name + "-labels-idx1-ubyte"), labels);
  return (folder / (name + "-images-idx3-ubyte")).string();
}

TrainConfig run(const TemporaryFolder& folder, const std::string& images, int64_t steps) {
  TrainConfig c;
  c.task = {{"slug", "image-classification"}};
  c.model.config = dump(tiny());
  SourceConfig source;
  source.path = images;
  c.data.sources.push_back(source);
  c.data.held_out = 0.25;
  c.train.steps = steps;
  c.train.batch = 32;
  c.optimizer.lr = 1e-2;
  c.output.folder = (folder / "run").string();
  return c;
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

TEST(VisionModel, ComesBackFromItsCheckpoint) {
  const TemporaryFolder folder("moiety-test");
  torch::manual_seed(4);
  VisionConfig groups = tiny(), own = tiny(), plain = tiny();
  groups.group = 2;
  own.share_router = false;
  own.share_norms = true;
  own.moe.capacity_factor = std::numeric_limits<double>::infinity();
  plain.mixture = plain.share_attention = plain.share_ffn = false;
  const auto images = torch::randn({5, 1, 8, 8});
  for (const VisionConfig& c : {tiny(), groups, own, plain}) {
    const auto model = make_vision(c);
    model->eval();
    write_stored(folder / "model", model->stored(), "f32");
    write_file(folder / "model" / "config.json", model->json().dump());
    const auto checkpoint = Checkpoint::open((folder / "model").string());
    const auto again = load_vision(*checkpoint);
    again->eval();
    const torch::NoGradGuard frozen;
    Pass a, b;
    EXPECT_TRUE(torch::equal(model->forward(images, a), again->forward(images, b)));
    std::filesystem::remove_all(folder / "model");
  }
}

TEST(VisionModel, SaysWhatACheckpointSharesOtherwise) {
  const TemporaryFolder folder("moiety-test");
  VisionConfig plain = tiny();
  plain.mixture = plain.share_attention = plain.share_ffn = false;
  const auto model = make_vision(plain);
  write_stored(folder / "model", model->stored(), "f32");
  const auto message = [&](const VisionConfig& c) {
    auto config = dump(c);
    config["model_type"] = "moiety_vision";
    write_file(folder / "model" / "config.json", config.dump());
    return message_of([&] { load_vision(*Checkpoint::open((folder / "model").string())); });
  };
  VisionConfig attention = plain, ffn = plain, blocks = plain;
  attention.share_attention = true;
  ffn.share_ffn = true;
  blocks.blocks = 5;
  EXPECT_NE(message(attention).find("share_attention: false"), std::string::npos);
  EXPECT_NE(message(ffn).find("share_ffn: false"), std::string::npos);
  EXPECT_NE(message(blocks).find("norms for 3 blocks, and its config has 5"), std::string::npos);
}

TEST(VisionModel, RecomputedBlocksGiveTheSameGradients) {
  torch::manual_seed(5);
  VisionConfig c = tiny();
  c.dropout = c.moe.dropout = 0.3;
  const auto model = make_vision(c, {.dtype = "auto", .device = torch::kCPU, .trainable = true});
  const auto images = torch::randn({4, 1, 8, 8});
  const auto gradients = [&](bool recompute) {
    torch::manual_seed(6);
    for (auto& p : model->parameters()) p.mutable_grad() = Tensor();
    Pass pass;
    pass.training = true;
    pass.recompute_blocks = recompute;
    auto loss = model->forward(images, pass).square().sum();
    for (const auto& [name, value] : pass.losses) loss = loss + value;
    loss.backward();
    std::vector<Tensor> out;
    for (const auto& p : model->parameters()) out.push_back(p.grad().clone());
    return out;
  };
  const auto plain = gradients(false), again = gradients(true);
  for (size_t i = 0; i < plain.size(); ++i) EXPECT_LT((plain[i] - again[i]).abs().max().item<double>(), 1e-5);
}

TEST(VisionModel, ABlockThatRunsForAllGetsTheSumOfTheirGradients) {
  // The gradient of a shared matrix is that of three blocks of their own with equal values.
  torch::manual_seed(8);
  VisionConfig shared = tiny(), own = tiny();
  shared.dropout = own.dropout = 0.0;
  shared.mixture = own.mixture = false;
  own.share_attention = own.share_ffn = false;
  const auto one = make_vision(shared, {.dtype = "auto", .device = torch::kCPU, .trainable = true}),
             many = make_vision(own, {.dtype = "auto", .device = torch::kCPU, .trainable = true});
  std::map<std::string, Tensor> values;
  for (const auto& t : one->stored()) values[t.name] = t.value();
  const auto of_shared = [](const std::string& name) {
    static const std::regex form("^blocks\\.[0-9]+\\.(attention|ffn)\\.");
    return std::regex_replace(name, form, "shared.$1.");
  };
  {
    const torch::NoGradGuard frozen;
    for (const auto& t : many->stored()) t.value().copy_(values.at(of_shared(t.name)));
  }
  const auto images = torch::randn({3, 1, 8, 8});
  for (const auto& model : {one, many}) {
    Pass pass;
    model->forward(images, pass).square().sum().backward();
  }
  // What is stored of a dense layer is a view of the parameter.
  const auto gradient = [](const Tensor& v) { return v.is_view() ? Tensor(v._base()).grad().view_as(v) : v.grad(); };
  std::map<std::string, Tensor> sums;
  for (const auto& t : many->stored()) {
    auto& sum = sums[of_shared(t.name)];
    sum = sum.defined() ? sum + gradient(t.value()) : gradient(t.value()).clone();
  }
  for (const auto& t : one->stored())
    EXPECT_LT((gradient(t.value()) - sums.at(t.name)).abs().max().item<double>(), 1e-4) << t.name;
}

TEST(ImageClassification, LearnsWhichThirdIsBright) {
  const TemporaryFolder folder("moiety-test");
  const auto images = stripes(folder, "train", 128);
  Trainer trainer(run(folder, images, 120));
  const TrainResult r = trainer.run();
  ASSERT_TRUE(r.evaluation && r.evaluation->accuracy);
  EXPECT_EQ(r.evaluation->tokens, 32);
  EXPECT_GT(*r.evaluation->accuracy, 0.9);
  EXPECT_EQ(r.unit, "image");
  EXPECT_EQ(r.tokens, 120 * 32);
  // The checkpoint, on images that the run has not seen.
  const auto model = load_vision(*Checkpoint::open((folder / "run" / "last").string()));
  const auto test = Dataset::open(stripes(folder, "test", 60));
  const auto score = score_images(*model, *test, {.batch = 20});
  EXPECT_EQ(score.images, 60);
  EXPECT_GT(score.accuracy(), 0.9);
  EXPECT_LT(score.loss(), std::log(3.0));
}

TEST(ImageClassification, ScoresAsTheModelAnswers) {
  const TemporaryFolder folder("moiety-test");
  torch::manual_seed(9);
  VisionConfig c = tiny();
  c.moe.unlimited = true;
  const auto model = make_vision(c);
  model->eval();
  const auto data = Dataset::open(stripes(folder, "test", 11));
  const auto score = score_images(*model, *data, {.batch = 4});
  int64_t right = 0;
  double nll = 0;
  const torch::NoGradGuard frozen;
  for (int64_t i = 0; i < 11; ++i) {
    const auto m = image_batch(*data, std::vector<int64_t>{i}, c);
    EXPECT_EQ(m.images[0][0][3 * (i % 3)][0].item<int64_t>(), 250);
    Pass pass;
    const auto p = torch::log_softmax(classify(*model, m, pass)[0], 0);
    right += p.argmax().item<int64_t>() == i % 3;
    nll -= p[i % 3].item<double>();
  }
  EXPECT_EQ(score.right, right);
  EXPECT_NEAR(score.nll, nll, 1e-4);
}

TEST(ImageClassification, EveryImageIsLearnedOnceAnEpoch) {
  const TemporaryFolder folder("moiety-test");
  auto config = run(folder, stripes(folder, "train", 40), 1);
  config.data.held_out = 0.0;
  const auto task = open_task(config, {});
  task->open_data();
  std::map<std::string, int> seen;
  const auto take = [&](int64_t rows) {
    const auto m = task->rows().next(rows);
    for (int64_t r = 0; r < rows; ++r)
      ++seen[std::string(m.images[r].data_ptr<uint8_t>(), m.images[r].data_ptr<uint8_t>() + 64)];
    return m;
  };
  take(32);
  const auto state = task->rows().state();
  const auto over = take(16);  // 8 of this epoch, 8 of the next
  EXPECT_EQ(task->rows().epoch(), 1);
  task->rows().restore(state);
  EXPECT_TRUE(torch::equal(task->rows().next(16).images, over.images));
  take(32);
  EXPECT_EQ(seen.size(), 40);
  for (const auto& [image, times] : seen) EXPECT_EQ(times, 2);
}

TEST(ImageClassification, RefusesLabelsThatTheModelLacks) {
  const TemporaryFolder folder("moiety-test");
  const auto config = run(folder, stripes(folder, "train", 12, 1), 1);
  EXPECT_NE(message_of([&] { Trainer(config).run(); }).find("the model has 3 classes"), std::string::npos);
}

}  // namespace
}  // namespace moiety
