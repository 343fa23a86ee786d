#include "moiety/models/image_tokens.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "adapt/adapt_tools.h"
#include "message_of.h"

namespace moiety {
namespace {

using nlohmann::json;
using torch::Tensor;

std::shared_ptr<CausalModel> model(bool trainable = false) {
  torch::manual_seed(1);
  auto out = make_causal(without_parts(model_with(nullptr)), {.dtype = "f32", .trainable = trainable});
  out->eval();
  return out;
}

// The first `count` tokens of every row.
Tensor front(int64_t rows, int64_t time, int64_t count) {
  auto where = torch::zeros({rows, time}, torch::kBool);
  where.narrow(1, 0, count).fill_(true);
  return where;
}

Tensor embeddings(CausalModel& m, const Tensor& ids) {
  for (const auto& t : m.stored())
    if (t.name.find("embed_tokens") != std::string::npos) return t.value().index({ids});
  return {};
}

TEST(PlacedVectors, OfTokensAreThoseTokens) {
  const auto m = model();
  const torch::NoGradGuard frozen;
  const auto ids = torch::randint(40, {2, 6}, torch::kInt64);
  const auto expected = logits_of(*m, ids);
  auto blank = ids.clone();
  blank.narrow(1, 0, 3).fill_(0);
  Pass pass;
  place_vectors(pass, front(2, 6, 3), embeddings(*m, ids.narrow(1, 0, 3)).reshape({6, 16}));
  EXPECT_TRUE(torch::equal(m->forward(blank, pass), expected));
  EXPECT_TRUE(pass.state.empty());
  // The pass has them no more.
  EXPECT_TRUE(torch::equal(m->forward(blank, pass), logits_of(*m, blank)));
}

TEST(PlacedVectors, StandAnywhereRowByRow) {
  const auto m = model();
  const torch::NoGradGuard frozen;
  const auto ids = torch::randint(40, {2, 5}, torch::kInt64);
  auto where = torch::zeros({2, 5}, torch::kBool);
  where[0][3] = true;
  where[1][0] = true;
  where[1][4] = true;
  auto blank = ids.masked_fill(where, 7);
  Pass pass;
  place_vectors(pass, where, embeddings(*m, ids.masked_select(where)));
  EXPECT_TRUE(torch::equal(m->forward(blank, pass), logits_of(*m, ids)));
}

TEST(PlacedVectors, PaddingAndCacheAreAsWithTokens) {
  const auto m = model();
  const torch::NoGradGuard frozen;
  torch::manual_seed(2);
  const auto vectors = torch::randn({4, 16});
  const auto text = torch::randint(40, {1, 3}, torch::kInt64);
  const auto row = torch::cat({torch::zeros({1, 4}, torch::kInt64), text}, 1);
  const auto plain = [&] {
    Pass pass;
    place_vectors(pass, front(1, 7, 4), vectors);
    return m->forward(row, pass);
  }();
  // Two positions of padding in front.
  Pass padded;
  padded.mask = torch::ones({1, 9}, torch::kBool);
  padded.mask.narrow(1, 0, 2).fill_(false);
  auto where = torch::zeros({1, 9}, torch::kBool);
  where.narrow(1, 2, 4).fill_(true);
  place_vectors(padded, where, vectors);
  const auto shifted = m->forward(torch::cat({torch::zeros({1, 2}, torch::kInt64), row}, 1), padded);
  EXPECT_LT((shifted.narrow(1, 2, 7) - plain).abs().max().item<double>(), 1e-5);
  // The image and one token first, then token by token.
  auto cache = m->make_cache();
  Pass first;
  first.cache = &cache;
  place_vectors(first, front(1, 5, 4), vectors);
  EXPECT_LT((m->forward(row.narrow(1, 0, 5), first) - plain.narrow(1, 0, 5)).abs().max().item<double>(), 1e-5);
  for (int64_t t = 5; t < 7; ++t) {
    Pass next;
    next.cache = &cache;
    EXPECT_LT((m->forward(row.narrow(1, t, 1), next) - plain.narrow(1, t, 1)).abs().max().item<double>(), 1e-5);
  }
}

TEST(PlacedVectors, GetTheGradientAlsoOfBlocksThatRunAgain) {
  const auto m = model(true);
  torch::manual_seed(3);
  ImageTokens adaptor(4, 1, 2, 16);
  const auto images = torch::randn({2, 1, 4, 4});
  const auto ids = torch::randint(40, {2, 7}, torch::kInt64);
  const auto gradients = [&](bool recompute) {
    for (auto& p : adaptor.parameters()) p.mutable_grad() = Tensor();
    Pass pass;
    pass.training = true;
    pass.recompute_blocks = recompute;
    place_vectors(pass, front(2, 7, adaptor.tokens()), adaptor.forward(images).flatten(0, 1));
    m->forward(ids, pass).narrow(1, 4, 3).square().sum().backward();
    return std::vector<Tensor>{adaptor.parameters()[0].grad().clone(), adaptor.parameters()[1].grad().clone()};
  };
  const auto once = gradients(false), again = gradients(true);
  for (size_t i = 0; i < once.size(); ++i) {
    EXPECT_GT(once[i].abs().max().item<double>(), 0.0);
    EXPECT_LT((once[i] - again[i]).abs().max().item<double>(), 1e-5);
  }
}

TEST(PlacedVectors, AreTokensToRoutersAndTheirLosses) {
  torch::manual_seed(5);
  const json mole = {{"slug", "llava-mole"}, {"experts", 3},   {"rank", 2},
                     {"coef", 1.0},          {"dropout", 0.0}, {"target", {"gate_proj", "up_proj", "down_proj"}}};
  const auto m = make_causal(model_with(json::array({mole})), {.dtype = "f32"});
  m->eval();
  const auto ids = torch::randint(40, {2, 6}, torch::kInt64);
  const auto vectors = embeddings(*m, ids.narrow(1, 0, 4)).reshape({8, 16});
  const auto balance = [&](bool placed, const Tensor& mask) {
    Trace trace;
    Pass pass;
    pass.training = true;
    pass.trace = &trace;
    pass.mask = mask;
    auto row = ids.clone();
    if (placed) {
      row.narrow(1, 0, 4).fill_(0);
      place_vectors(pass, front(2, 6, 4), vectors);
    }
    m->forward(row, pass);
    EXPECT_EQ(trace.records.at(0).routing.experts.size(0), 12);
    return pass.losses.at(0).second.item<double>();
  };
  const auto text_only = torch::zeros({2, 6}, torch::kBool);
  text_only.narrow(1, 4, 2).fill_(true);
  EXPECT_EQ(balance(true, {}), balance(false, {}));
  // It would be another number without the image.
  EXPECT_NE(balance(true, {}), balance(true, text_only));
}

TEST(PlacedVectors, SayWhatDoesNotFit) {
  const auto m = model();
  const auto vectors = torch::zeros({4, 16});
  Pass pass;
  EXPECT_NE(message_of([&] { place_vectors(pass, front(1, 7, 3), vectors); }).find("4 vectors for 3 places"),
            std::string::npos);
  EXPECT_NE(message_of([&] { place_vectors(pass, torch::ones({1, 4}), vectors); }).find("bool"), std::string::npos);
  EXPECT_NE(message_of([&] { place_vectors(pass, front(1, 4, 4), vectors.to(torch::kInt64)); }).find("floats"),
            std::string::npos);
  place_vectors(pass, front(1, 7, 4), vectors);
  EXPECT_NE(message_of([&] {
              m->forward(torch::zeros({1, 6}, torch::kInt64), pass);
            }).find("1 rows of 7 tokens"),
            std::string::npos);
  Pass narrow;
  place_vectors(narrow, front(1, 7, 4), torch::zeros({4, 8}));
  EXPECT_NE(message_of([&] {
              m->forward(torch::zeros({1, 7}, torch::kInt64), narrow);
            }).find("embeddings have 16"),
            std::string::npos);
}

TEST(ImageTokens, AreOneProductAPatchRowByRow) {
  torch::manual_seed(4);
  ImageTokens adaptor(6, 2, 3, 5);
  EXPECT_EQ(adaptor.tokens(), 4);
  const auto images = torch::randn({2, 2, 6, 6});
  const auto out = adaptor.forward(images);
  const auto stored = adaptor.stored();
  const auto weight = stored[0].value(), bias = stored[1].value();
  for (int64_t p = 0; p < 4; ++p) {
    const auto patch = images.slice(2, p / 2 * 3, p / 2 * 3 + 3).slice(3, p % 2 * 3, p % 2 * 3 + 3).reshape({2, 18});
    EXPECT_LT((out.select(1, p) - (torch::matmul(patch, weight.t()) + bias)).abs().max().item<double>(), 1e-5);
  }
  EXPECT_NE(message_of([&] {
              adaptor.forward(torch::zeros({1, 1, 6, 6}));
            }).find("2 channel(s) and 6 x 6"),
            std::string::npos);
  EXPECT_NE(message_of([] { ImageTokens(7, 1, 2, 4); }).find("patches of 2"), std::string::npos);
}

}  // namespace
}  // namespace moiety
