#include "moiety/tasks/multiple_choice.h"

#include <gtest/gtest.h>

#include "fake_model.h"
#include "whole_decoding.h"

namespace moiety {
namespace {

/// Bytes are tokens; "ab" is one token 256 (so that a boundary may fall inside a token); 257 is BOS, 258 EOS.
class ByteTokenizer : public Tokenizer {
 public:
  bool bos_first = false;
  bool has_bos = true;
  std::vector<int64_t> encode(std::string_view text, bool add_special, bool) const override {
    std::vector<int64_t> out;
    if (add_special && bos_first) out.push_back(257);
    for (size_t i = 0; i < text.size(); ++i) {
      if (text.substr(i, 2) == "ab") {
        out.push_back(256);
        ++i;
      } else {
        out.push_back(static_cast<unsigned char>(text[i]));
      }
    }
    return out;
  }
  std::string decode(std::span<const int64_t> ids, bool) const override {
    std::string s;
    for (const int64_t id : ids) s += id == 256 ? std::string("ab") : std::string(1, static_cast<char>(id));
    return s;
  }
  std::string piece(int64_t id) const override { return std::to_string(id); }
  std::optional<int64_t> id(std::string_view) const override { return std::nullopt; }
  int64_t size() const override { return 259; }
  bool is_special(int64_t id) const override { return id > 256; }
  std::string kind() const override { return "bytes"; }
  std::optional<int64_t> bos() const override { return has_bos ? std::optional<int64_t>(257) : std::nullopt; }
  std::optional<int64_t> eos() const override { return 258; }
  std::optional<int64_t> pad() const override { return std::nullopt; }
  std::optional<int64_t> unk() const override { return std::nullopt; }
  std::string chat_template() const override { return ""; }
  std::unique_ptr<Decoding> decoding(bool skip_special) const override {
    return std::make_unique<test::WholeDecoding>(*this, skip_special);
  }
};

using Ids = std::vector<int64_t>;

TEST(EncodeChoice, SplitsAsLmEval) {
  ByteTokenizer t;
  auto r = encode_choice(t, "xy", " z", -1);
  EXPECT_EQ(r.context, (Ids{'x', 'y'}));
  EXPECT_EQ(r.continuation, (Ids{' ', 'z'}));
  // Spaces at the end of the context go to the continuation, line feeds and no-break spaces too.
  r = encode_choice(t, "x \n\xc2\xa0", "z", -1);
  EXPECT_EQ(r.context, (Ids{'x'}));
  EXPECT_EQ(r.continuation, (Ids{' ', '\n', 0xc2, 0xa0, 'z'}));
  // A token over the boundary: the whole has as many tokens less, and the continuation is what is left behind the
  // context's count.
  r = encode_choice(t, "xa", "bz", -1);
  EXPECT_EQ(r.context, (Ids{'x', 'a'}));
  EXPECT_EQ(r.continuation, (Ids{'z'}));
  EXPECT_EQ(encode_choice(t, "x", "z", 257).context, (Ids{257, 'x'}));
  EXPECT_EQ(encode_choice(t, "", "z", -1).context, (Ids{257}));
  t.has_bos = false;
  EXPECT_EQ(encode_choice(t, "", "z", -1).context, (Ids{258}));
  EXPECT_THROW(encode_choice(t, "xa", "b", -1), Error);
}

TEST(PickChoice, Normalizations) {
  // logprob, unconditional, tokens, characters, bytes
  const std::vector<ChoiceScore> s = {
      {-4.0, -1.0, 1, 4, 12, false}, {-6.0, -7.0, 2, 8, 9, false}, {-5.0, -3.0, 5, 2, 6, true}};
  EXPECT_EQ(pick_choice(s, "acc"), 0);              // -4, -6, -5
  EXPECT_EQ(pick_choice(s, "acc_norm"), 1);         // -1, -0.75, -2.5
  EXPECT_EQ(pick_choice(s, "acc_bytes"), 0);        // -0.333, -0.667, -0.833
  EXPECT_EQ(pick_choice(s, "acc_tokens"), 2);       // -4, -3, -1
  EXPECT_EQ(pick_choice(s, "acc_mutual_info"), 1);  // -3, 1, -2
  EXPECT_EQ(pick_choice({s[1], s[1]}, "acc"), 0);   // the lowest index wins ties
  EXPECT_THROW(pick_choice(s, "acc_log"), Error);
}

TEST(ScoreChoices, MatchesTheModelTokenByToken) {
  FakeModel model(259, 64);
  ByteTokenizer t;
  std::vector<ChoiceQuestion> questions = {
      {"Is it so?", {"yes", "no", "who knows, \xe2\x82\xac?"}, 1}, {"cab ", {"driver", "ab"}, 0}, {"", {"q", "rs"}, 0}};
  for (const int64_t batch : {1, 3, 16}) {
    for (const bool bos : {false, true}) {
      t.bos_first = bos;
      MultipleChoiceOptions options;
      options.batch_size = batch;
      options.mutual_info = true;
      const auto scores = score_choices(model, t, questions, options);
      ASSERT_EQ(scores.size(), 3u);
      for (size_t q = 0; q < questions.size(); ++q) {
        ASSERT_EQ(scores[q].size(), questions[q].choices.size());
        for (size_t c = 0; c < questions[q].choices.size(); ++c) {
          for (const bool conditional : {true, false}) {
            const auto r = encode_choice(t, conditional ? questions[q].context : "", " " + questions[q].choices[c],
                                         bos ? 257 : -1);
            Ids prefix = r.context;
            double sum = 0.0;
            bool greedy = true;
            for (const int64_t id : r.continuation) {
              const auto logits = model.after(prefix);
              greedy = greedy && std::max_element(logits.begin(), logits.end()) - logits.begin() == id;
              sum += model.logprob(prefix, id);
              prefix.push_back(id);
            }
            EXPECT_NEAR(conditional ? scores[q][c].logprob : scores[q][c].unconditional, sum, 1e-4);
            if (conditional) {
              EXPECT_EQ(scores[q][c].greedy, greedy);
            }
            if (conditional) {
              EXPECT_EQ(scores[q][c].tokens, static_cast<int64_t>(r.continuation.size()));
            }
          }
        }
      }
      EXPECT_EQ(scores[0][2].characters, 13);
      EXPECT_EQ(scores[0][2].bytes, 15);
    }
  }
}

TEST(ScoreChoices, LongContextLosesItsStart) {
  FakeModel model(259, 8);
  ByteTokenizer t;
  const std::vector<ChoiceQuestion> questions = {{"0123456789", {"xyz"}, 0}};
  const auto scores = score_choices(model, t, questions, {});
  // Nine tokens are kept: eight are fed, the last is only predicted.
  Ids prefix = {'5', '6', '7', '8', '9'};
  double sum = 0.0;
  for (const char c : std::string(" xyz")) {
    sum += model.logprob(prefix, c);
    prefix.push_back(c);
  }
  EXPECT_NEAR(scores[0][0].logprob, sum, 1e-4);
}

TEST(Accuracy, ValueAndStandardError) {
  const std::vector<ChoiceQuestion> q(5, {"c", {"a", "b"}, 0});
  std::vector<std::vector<ChoiceScore>> s(5, {{-1, 0, 1, 1, 1, false}, {-2, 0, 1, 1, 1, false}});
  std::swap(s[4][0], s[4][1]);
  const auto a = accuracy("acc", s, q);
  EXPECT_DOUBLE_EQ(a.value, 0.8);
  // Sample: 1 1 1 1 0, variance over n - 1 = 0.2, divided by n = 0.04.
  EXPECT_NEAR(a.standard_error, 0.2, 1e-12);
}

TEST(ScoreChoices, BadQuestionsAreNamed) {
  FakeModel model(259, 8);
  ByteTokenizer t;
  EXPECT_THROW(score_choices(model, t, {{"c", {}, 0}}, {}), Error);
  EXPECT_THROW(score_choices(model, t, {{"c", {"a"}, 1}}, {}), Error);
  EXPECT_THROW(score_choices(model, t, {{"c", {"longer than the context"}, 0}}, {}), Error);
}

}  // namespace
}  // namespace moiety
