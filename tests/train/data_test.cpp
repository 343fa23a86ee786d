#include "moiety/train/data.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <map>
#include <set>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/train/byte_tokenizer.h"

namespace moiety {
namespace {

using nlohmann::json;

Encoder bytes() {
  Encoder e;
  e.tokenizer = Tokenizer::from_json(json(byte_tokenizer()), json(byte_tokenizer_config()));
  return e;
}

// Documents "a0 ", "a1 ", ... each `length` bytes.
std::string documents(int count, int length, char mark) {
  std::string out;
  for (int i = 0; i < count; ++i) {
    std::string one = std::string(1, mark) + std::to_string(i) + " ";
    while (static_cast<int>(one.size()) < length) one += mark;
    out += one + "\n";
  }
  return out;
}

DataConfig lines(const std::vector<std::string>& files, int64_t length) {
  DataConfig c;
  for (const auto& f : files) {
    SourceConfig s;
    s.path = f;
    s.document = "line";
    c.sources.push_back(s);
  }
  c.length = length;
  return c;
}

std::vector<int64_t> ids_of(const MicroBatch& m) {
  return {m.ids.const_data_ptr<int64_t>(), m.ids.const_data_ptr<int64_t>() + m.ids.numel()};
}

class Data : public testing::Test {
 protected:
  std::string file(const std::string& name, const std::string& text) {
    write_file(folder_ / name, text);
    return (folder_ / name).string();
  }
  TemporaryFolder folder_;
};

TEST_F(Data, ByteTokenizerIsOneTokenAByte) {
  const auto t = bytes().tokenizer;
  EXPECT_EQ(t->size(), byte_tokenizer_size);
  std::string all;
  for (int c = 1; c < 128; ++c) all += static_cast<char>(c);
  all += "\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80";
  const auto ids = t->encode(all);
  ASSERT_EQ(ids.size(), all.size());
  for (size_t i = 0; i < all.size(); ++i) EXPECT_EQ(ids[i], static_cast<unsigned char>(all[i]));
  EXPECT_EQ(t->decode(ids), all);
  EXPECT_EQ(t->bos(), 256);
  EXPECT_EQ(t->eos(), 257);
  EXPECT_EQ(t->pad(), 258);
}

TEST_F(Data, TargetsFollowAndStayInsideADocument) {
  const auto config = lines({file("a.txt", "abcd\nefg\n")}, 16);
  auto data = open_data(config, bytes(), 1);
  const MicroBatch m = data.rows->next(1);
  EXPECT_EQ(m.tokens, 9);   // two documents and their ends
  EXPECT_EQ(m.learned, 7);  // all but the first of each
  for (int64_t t = 0; t < 16; ++t) {
    const int64_t target = m.targets[0][t].item<int64_t>();
    const bool last_of_document = m.ids[0][t].item<int64_t>() == 257 || t >= 9;
    if (last_of_document)
      EXPECT_EQ(target, -100) << t;
    else
      EXPECT_EQ(target, m.ids[0][t + 1].item<int64_t>()) << t;
    EXPECT_EQ(m.mask[0][t].item<bool>(), t < 9);
  }
  EXPECT_TRUE(m.segments.defined());
  EXPECT_EQ(m.positions[0][5].item<int64_t>(), m.segments[0][4].item<int64_t>() == 1 ? 0 : 1);
}

TEST_F(Data, RowsWithOneDocumentNeedNoMasks) {
  const auto config = lines({file("a.txt", documents(1, 63, 'a'))}, 16);
  auto data = open_data(config, bytes(), 1);
  const MicroBatch m = data.rows->next(4);
  EXPECT_FALSE(m.mask.defined());
  EXPECT_FALSE(m.segments.defined());
  EXPECT_EQ(m.learned, 4 * 15);
}

TEST_F(Data, AnEpochHasEveryTokenOnce) {
  for (const char* packing : {"sequential", "best_fit"}) {
    for (int64_t window : {50, 1 << 20}) {
      auto config = lines({file("a.txt", documents(40, 13, 'a'))}, 20);
      config.packing = packing;
      config.shuffle_tokens = window;
      auto data = open_data(config, bytes(), 7);
      const int64_t rows = data.rows->rows_of_an_epoch();
      std::multiset<int64_t> seen;
      int64_t tokens = 0;
      for (int64_t i = 0; i < rows; ++i) {
        const auto m = data.rows->next(1);
        tokens += m.tokens;
        EXPECT_EQ(data.rows->epoch(), 0);
      }
      EXPECT_EQ(tokens, 40 * 14) << packing << " " << window;
      data.rows->next(1);
      EXPECT_EQ(data.rows->epoch(), 1);
    }
  }
}

TEST_F(Data, EpochsHaveOrdersOfTheirOwnAndSeedsToo) {
  const auto config = lines({file("a.txt", documents(64, 15, 'a'))}, 16);
  auto one = open_data(config, bytes(), 7), same = open_data(config, bytes(), 7), other = open_data(config, bytes(), 8);
  const auto first = ids_of(one.rows->next(64)), second = ids_of(one.rows->next(64));
  EXPECT_EQ(first, ids_of(same.rows->next(64)));
  EXPECT_NE(first, ids_of(other.rows->next(64)));
  EXPECT_NE(first, second);
  auto plain_config = config;
  plain_config.shuffle = false;
  auto plain = open_data(plain_config, bytes(), 7);
  EXPECT_EQ(ids_of(plain.rows->next(1))[1], '0');
}

TEST_F(Data, GoesOnFromEveryPosition) {
  auto config = lines({file("a.txt", documents(30, 11, 'a')), file("b.txt", documents(9, 25, 'b'))}, 24);
  config.shuffle_tokens = 100;
  config.sources[0].weight = 3.0;
  config.sources[1].weight = 1.0;
  auto whole = open_data(config, bytes(), 3);
  std::vector<std::vector<int64_t>> rows;
  std::vector<json> states;
  for (int i = 0; i < 60; ++i) {
    states.push_back(whole.rows->state());
    rows.push_back(ids_of(whole.rows->next(1)));
  }
  for (size_t from : {0u, 1u, 7u, 23u, 40u, 59u}) {
    auto again = open_data(config, bytes(), 3);
    again.rows->restore(json::parse(states[from].dump()));
    for (size_t i = from; i < rows.size(); ++i) ASSERT_EQ(ids_of(again.rows->next(1)), rows[i]) << from << " " << i;
  }
}

TEST_F(Data, RefusesAPositionInOtherData) {
  const auto state = open_data(lines({file("a.txt", documents(30, 11, 'a'))}, 24), bytes(), 3).rows->state();
  auto longer = open_data(lines({file("a.txt", documents(31, 11, 'a'))}, 24), bytes(), 3);
  EXPECT_THROW(longer.rows->restore(state), Error);
}

TEST_F(Data, SourcesGetTheirShares) {
  auto config = lines({file("a.txt", documents(50, 15, 'a')), file("b.txt", documents(50, 15, 'b'))}, 16);
  config.sources[0].weight = 0.75;
  config.sources[1].weight = 0.25;
  auto data = open_data(config, bytes(), 3);
  std::map<int64_t, int> count;
  for (int i = 0; i < 200; ++i) ++count[ids_of(data.rows->next(1))[0]];
  EXPECT_EQ(count['a'], 150);
  EXPECT_EQ(count['b'], 50);
  EXPECT_THROW(data.rows->rows_of_an_epoch(), Error);
}

TEST_F(Data, HeldOutDocumentsAreNeverLearned) {
  auto config = lines({file("a.txt", documents(50, 15, 'a'))}, 16);
  config.held_out = 0.2;
  auto data = open_data(config, bytes(), 3);
  EXPECT_EQ(data.rows->documents(), 40);
  const auto held = held_out_rows(data.held_out.at(0).data, bytes(), config, 4, 1 << 20, 3);
  EXPECT_EQ(held.documents, 10);
  std::set<std::vector<int64_t>> train;
  for (int i = 0; i < 40; ++i) train.insert(ids_of(data.rows->next(1)));
  EXPECT_EQ(train.size(), 40u);
  for (const auto& m : held.batches)
    for (int64_t r = 0; r < m.ids.size(0); ++r) {
      const auto row = m.ids[r].contiguous();
      EXPECT_EQ(train.count({row.const_data_ptr<int64_t>(), row.const_data_ptr<int64_t>() + 16}), 0u);
    }
}

TEST_F(Data, BytesOfHeldOutTokensAreThoseScored) {
  auto config = lines({file("a.txt", "h\xC3\xA9llo\nabc\n")}, 32);
  config.held_out_sources = config.sources;
  auto data = open_data(config, bytes(), 3);
  const auto held = held_out_rows(data.held_out.at(0).data, bytes(), config, 4, 1 << 20, 3);
  // "h" and "a" are not scored, ends stand for no text.
  EXPECT_EQ(held.bytes, 5 + 2);
  EXPECT_EQ(held.learned, 7 + 2);
  // A limit cuts.
  EXPECT_EQ(held_out_rows(data.held_out.at(0).data, bytes(), config, 4, 3, 3).learned, 2);
}

TEST_F(Data, CompletionsLearnTheAnswerOnly) {
  DataConfig config;
  SourceConfig s;
  s.path = file("a.jsonl", "{\"prompt\": \"ab\", \"completion\": \"cde\"}\n");
  config.sources.push_back(s);
  config.length = 8;
  auto data = open_data(config, bytes(), 1);
  const auto m = data.rows->next(1);
  EXPECT_EQ(m.learned, 4);  // c, d, e and the end
  EXPECT_EQ(m.targets[0][0].item<int64_t>(), -100);
  EXPECT_EQ(m.targets[0][1].item<int64_t>(), 'c');
}

TEST_F(Data, SaysWhatIsWrong) {
  const auto message = [&](const DataConfig& config) {
    try {
      auto data = open_data(config, bytes(), 1);
      data.rows->next(1);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  EXPECT_NE(message(lines({(folder_ / "none.txt").string()}, 8)).find("none.txt"), std::string::npos);
  auto one = lines({file("one.txt", "a single document\n")}, 8);
  one.held_out = 0.1;
  EXPECT_NE(message(one).find("held out"), std::string::npos);
}

}  // namespace
}  // namespace moiety
