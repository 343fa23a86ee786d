#include "moiety/decode/generator.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <random>

#include "decode/mock_model.h"
#include "moiety/base/error.h"

namespace moiety {
namespace {

using test::ByteTokenizer;
using test::MockModel;

std::vector<int64_t> bytes(std::string_view text) {
  return ByteTokenizer().encode(text, false, false);
}

Request request(std::vector<int64_t> prompt, int64_t max_tokens = 20) {
  Request r;
  r.prompt = std::move(prompt);
  r.max_tokens = max_tokens;
  return r;
}

Generator generator() {
  return Generator(std::make_shared<ByteTokenizer>(), {256});
}

// A model that says `text` whatever it is asked, its first byte behind one token.
std::shared_ptr<MockModel> parrot(std::string_view text, bool end = true) {
  auto model = std::make_shared<MockModel>();
  auto ids = bytes(text);
  if (end) ids.push_back(256);
  model->favourite.push_back(ids.back());
  model->favourite.insert(model->favourite.end(), ids.begin(), ids.end() - 1);
  return model;
}

TEST(Session, ChunksAndCacheDoNotChangeLogits) {
  auto model = std::make_shared<MockModel>();
  std::vector<int64_t> ids(37);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int64_t>(i * 7 % 250);
  Pass pass;
  const auto want = model->forward(torch::tensor(ids).unsqueeze(0), pass);
  for (const int64_t chunk : {1, 5, 64}) {
    Session session(model, chunk);
    EXPECT_TRUE(torch::equal(session.feed_all({ids}), want)) << chunk;
    Session last(model, chunk);
    EXPECT_TRUE(torch::equal(last.feed({ids}), want.select(1, -1))) << chunk;
  }
}

TEST(Session, ForkCropAndSelect) {
  auto model = std::make_shared<MockModel>();
  const auto fresh = [&](std::vector<int64_t> ids) {
    Session session(model);
    return session.feed({ids});
  };
  Session session(model, 2);
  session.feed({{1, 2, 3}});
  Session branch = session.fork();
  EXPECT_TRUE(torch::equal(session.feed({{4, 5}}), fresh({1, 2, 3, 4, 5})));
  EXPECT_TRUE(torch::equal(branch.feed({{9}}), fresh({1, 2, 3, 9})));
  session.crop(2);
  EXPECT_TRUE(torch::equal(session.feed({{7}}), fresh({1, 2, 7})));

  Session batch(model, 2);
  const auto logits = batch.feed({{1, 2, 3, 4, 5}, {6}, {7, 8}});
  EXPECT_TRUE(torch::equal(logits[1], fresh({6})[0]));
  EXPECT_TRUE(torch::equal(logits[2], fresh({7, 8})[0]));
  batch.select({2, 0, 2});
  const auto next = batch.feed({{1}, {1, 2, 3}, {2}});
  EXPECT_TRUE(torch::equal(next[0], fresh({7, 8, 1})[0]));
  EXPECT_TRUE(torch::equal(next[1], fresh({1, 2, 3, 4, 5, 1, 2, 3})[0]));
  EXPECT_TRUE(torch::equal(next[2], fresh({7, 8, 2})[0]));
}

TEST(Session, RestartReadsOnlyWhatIsNew) {
  auto model = std::make_shared<MockModel>();
  Session session(model);
  int64_t reused = -1;
  session.restart({{1, 2, 3, 4}}, &reused);
  EXPECT_EQ(reused, 0);
  model->fed = 0;
  Session other(model);
  const auto want = other.feed({{1, 2, 3, 9, 8}});
  model->fed = 0;
  EXPECT_TRUE(torch::equal(session.restart({{1, 2, 3, 9, 8}}, &reused), want));
  EXPECT_EQ(reused, 3);
  EXPECT_EQ(model->fed, 2);
  // The whole prompt is there already: its last token is read again for its logits.
  EXPECT_TRUE(torch::equal(session.restart({{1, 2, 3, 9, 8}}, &reused), want));
  EXPECT_EQ(reused, 4);
}

TEST(Session, BadInputIsOneSentence) {
  auto model = std::make_shared<MockModel>(300, 8);
  Session session(model);
  EXPECT_THROW(session.feed({}), Error);
  EXPECT_THROW(session.feed({{}}), Error);
  EXPECT_THROW(session.feed({{300}}), Error);
  EXPECT_THROW(session.feed({{-1}}), Error);
  session.feed({std::vector<int64_t>(8, 1)});
  EXPECT_THROW(session.feed({{1}, {2}}), Error);
}

// Rotary positions have no end: where to stop is for the caller, who knows what the model was trained for.
TEST(Session, RunsBeyondTheTrainedContext) {
  auto model = std::make_shared<MockModel>(300, 8);
  Session session(model);
  session.feed({std::vector<int64_t>(9, 1)});
  EXPECT_EQ(session.length(), 9);
}

TEST(Generator, ABatchGivesWhatEachPromptGivesAlone) {
  auto model = std::make_shared<MockModel>();
  std::mt19937 random(5);
  std::vector<Request> requests;
  for (int i = 0; i < 7; ++i) {
    std::vector<int64_t> prompt(1 + random() % 30);
    for (auto& id : prompt) id = random() % 250;
    requests.push_back(request(prompt, 1 + static_cast<int64_t>(random() % 40)));
    if (i % 2) {
      requests.back().sampler.greedy = false;
      requests.back().sampler.top_k = 40;
      requests.back().sampler.repetition_penalty = 1.3;
      requests.back().seed = static_cast<uint64_t>(i);
    }
  }
  requests.push_back(requests[3]);
  requests.back().seed = 99;
  Session together(model, 4);
  const auto batch = generator().run(together, requests);
  for (size_t i = 0; i < requests.size(); ++i) {
    Session alone(model);
    const auto single = generator().run(alone, {requests[i]});
    EXPECT_EQ(batch[i].ids, single[0].ids) << i;
    EXPECT_EQ(batch[i].text, single[0].text) << i;
    EXPECT_EQ(batch[i].finish, single[0].finish) << i;
  }
  EXPECT_NE(batch[3].ids, batch.back().ids);
}

TEST(Generator, StreamedTextIsTheWholeText) {
  const std::string said = "h\xC3\xA9llo \xF0\x9F\x98\x80 w\xC3\xB6rld";
  Session session(parrot(said));
  std::string streamed;
  bool last = false;
  const auto done = generator().run(session, {request({65}, 100)}, [&](const Piece& piece) {
    streamed += piece.text;
    last = piece.last;
    // Never half a character.
    EXPECT_EQ(piece.text.find("\xEF\xBF\xBD"), std::string::npos);
    return true;
  });
  EXPECT_EQ(streamed, said);
  EXPECT_EQ(done[0].text, said);
  EXPECT_TRUE(last);
  EXPECT_EQ(done[0].finish, Finish::eos);
  EXPECT_EQ(done[0].ids.back(), 256);
}

TEST(Generator, StopStringAcrossTokensIsNeverShown) {
  Session session(parrot("The end. STOP and more"));
  auto r = request({65}, 100);
  r.stop = {"STOP"};
  std::string streamed;
  const auto done = generator().run(session, {r}, [&](const Piece& piece) {
    streamed += piece.text;
    EXPECT_EQ(streamed.find('S'), std::string::npos);
    return true;
  });
  EXPECT_EQ(streamed, "The end. ");
  EXPECT_EQ(done[0].text, "The end. ");
  EXPECT_EQ(done[0].finish, Finish::stop);
  EXPECT_EQ(done[0].stop, "STOP");
  EXPECT_EQ(done[0].ids.size(), 13u);
}

TEST(Generator, WhatWasHeldBackComesAtTheEnd) {
  auto r = request({65}, 9);
  r.stop = {"STOP"};
  Session session(parrot("I am ST."));
  auto done = generator().run(session, {r});
  EXPECT_EQ(done[0].text, "I am ST.");
  EXPECT_EQ(done[0].finish, Finish::eos);
  r.max_tokens = 7;
  done = generator().run(session, {r});
  EXPECT_EQ(done[0].text, "I am ST");
  EXPECT_EQ(done[0].finish, Finish::length);
  // Half a character at the end shows as U+FFFD.
  Session half(parrot("a\xC3\xA9"));
  EXPECT_EQ(generator().run(half, {request({65}, 2)})[0].text, "a\xEF\xBF\xBD");
}

TEST(Generator, ThePromptIsNoPartOfTheAnswer) {
  // The decoder still holds the prompt's end when the answer begins.
  auto tokenizer = std::make_shared<ByteTokenizer>();
  tokenizer->hold = 3;
  Session session(parrot("xcd"));
  EXPECT_EQ(Generator(tokenizer, {256}).run(session, {request(bytes("A"), 9)})[0].text, "xcd");
  // A character that the prompt leaves open belongs to the answer.
  Session open(parrot("\xA9t\xC3\xA9"));
  EXPECT_EQ(generator().run(open, {request({0xC3}, 9)})[0].text, "\xC3\xA9t\xC3\xA9");
}

TEST(Generator, Limits) {
  auto model = std::make_shared<MockModel>(300, 16);
  Session session(model);
  auto r = request({1, 2, 3, 4, 5, 6}, -1);
  r.ignore_eos = true;
  auto done = generator().run(session, {r});
  EXPECT_EQ(done[0].finish, Finish::context);
  EXPECT_EQ(done[0].ids.size(), 10u);
  r.max_tokens = 0;
  done = generator().run(session, {r});
  EXPECT_TRUE(done[0].ids.empty());
  r.prompt.clear();
  EXPECT_THROW(generator().run(session, {r}), Error);
  r.prompt.assign(17, 1);
  EXPECT_THROW(generator().run(session, {r}), Error);
  EXPECT_THROW(generator().run(session, {}), Error);
}

TEST(Generator, CallbackStopsOneRow) {
  auto model = std::make_shared<MockModel>();
  Session session(model);
  auto a = request({1, 2}, 30), b = request({3}, 30);
  a.ignore_eos = b.ignore_eos = true;
  int seen = 0;
  const auto done = generator().run(session, {a, b}, [&](const Piece& piece) { return piece.row != 0 || ++seen < 4; });
  EXPECT_EQ(done[0].finish, Finish::cancelled);
  EXPECT_EQ(done[0].ids.size(), 4u);
  EXPECT_EQ(done[1].ids.size(), 30u);
}

TEST(Generator, LogprobsAreTheModels) {
  auto model = std::make_shared<MockModel>();
  Session session(model), check(model);
  auto r = request({1, 2, 3}, 5);
  r.ignore_eos = true;
  r.logprobs = 4;
  r.sampler.repetition_penalty = 1.5;
  const auto done = generator().run(session, {r});
  ASSERT_EQ(done[0].logprobs.size(), 5u);
  auto logits = check.feed({r.prompt});
  for (size_t i = 0; i < 5; ++i) {
    const auto want = torch::log_softmax(logits[0].to(torch::kFloat64), 0);
    const auto& got = done[0].logprobs[i];
    EXPECT_EQ(got.id, done[0].ids[i]);
    // f32 exponentials summed over 300 tokens.
    EXPECT_NEAR(got.logprob, want[got.id].item<double>(), 1e-5);
    ASSERT_EQ(got.top.size(), 4u);
    EXPECT_EQ(got.top[0].first, want.argmax().item<int64_t>());
    EXPECT_NEAR(got.top[3].second, std::get<0>(want.topk(4))[3].item<double>(), 1e-5);
    logits = check.feed({{got.id}});
  }
}

TEST(Generator, AChatReadsOnlyItsNewTurn) {
  auto model = std::make_shared<MockModel>();
  Session session(model);
  auto g = generator();
  auto r = request({1, 2, 3, 4}, 6);
  r.ignore_eos = true;
  const auto first = g.run(session, {r});
  EXPECT_EQ(g.stats().reused_tokens, 0);
  auto history = r.prompt;
  history.insert(history.end(), first[0].ids.begin(), first[0].ids.end());
  history.insert(history.end(), {9, 9});
  r.prompt = history;
  const auto second = g.run(session, {r});
  // The last generated token was never fed.
  EXPECT_EQ(g.stats().reused_tokens, 4 + 5);
  EXPECT_EQ(g.stats().prompt_tokens, 12);
  Session fresh(model);
  EXPECT_EQ(second[0].ids, generator().run(fresh, {r})[0].ids);
}

}  // namespace
}  // namespace moiety
