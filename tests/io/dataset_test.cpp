#include "moiety/io/dataset.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <set>

#include "message_of.h"
#include "moiety/base/files.h"
#include "moiety/io/examples.h"

namespace moiety {
namespace {

using Json = nlohmann::ordered_json;

class Data : public testing::Test {
 protected:
  DatasetPtr open(const std::string& name, const std::string& text, const DataOptions& options = {}) {
    write_file(folder / name, text);
    return Dataset::open((folder / name).string(), options);
  }
  std::string error(const std::string& name, const std::string& text, const DataOptions& options = {}) {
    return message_of([&] {
      const auto data = open(name, text, options);
      for (int64_t i = 0; i < data->size(); ++i) data->get(i);
    });
  }
  static std::vector<std::string> texts(const DatasetPtr& data) {
    std::vector<std::string> out;
    for (int64_t i = 0; i < data->size(); ++i) out.push_back(data->get(i).text);
    return out;
  }
  TemporaryFolder folder;
};
using Texts = std::vector<std::string>;

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST_F(Data, TextIsCutIntoDocuments) {
  const std::string text = "\xEF\xBB\xBFone\r\ntwo\r\n\r\n  \r\nthree\n\n\nfour";
  EXPECT_EQ(texts(open("a.txt", text)), Texts{text.substr(3)});
  EXPECT_EQ(texts(open("a.txt", text, {.document = "line"})), (Texts{"one", "two", "three", "four"}));
  const auto paragraphs = open("a.txt", text, {.document = "paragraph"});
  EXPECT_EQ(texts(paragraphs), (Texts{"one\r\ntwo", "three", "four"}));
  EXPECT_TRUE(has(paragraphs->get(1).where, "a.txt:5")) << paragraphs->get(1).where;
  const auto parts = open("a.txt", "a\nb<|end|>c<|end|>\n<|end|>d", {.document = "<|end|>"});
  EXPECT_EQ(texts(parts), (Texts{"a\nb", "c", "d"}));
  EXPECT_TRUE(has(parts->get(2).where, "a.txt:3"));
}

TEST_F(Data, EmptyAndOddTextFiles) {
  EXPECT_EQ(open("e.txt", "")->size(), 0);
  EXPECT_EQ(open("e.txt", " \n\r\n")->size(), 0);
  EXPECT_EQ(open("e.jsonl", "\n\n")->size(), 0);
  EXPECT_EQ(open("e.csv", "")->size(), 0);
  EXPECT_EQ(texts(open("i.txt", "a\xFF\xC3(b")), Texts{"a\xEF\xBF\xBD\xEF\xBF\xBD(b"});
  EXPECT_TRUE(has(error("u.txt", std::string("\xFF\xFE"
                                             "a\0",
                                             4)),
                  "UTF-16"));
  EXPECT_TRUE(has(message_of([&] { Dataset::open((folder / "e.text").string()); }), "did you mean `e.t"));
  EXPECT_TRUE(has(error("x.parquet", "PAR1"), "not read"));
}

// Files stay mapped: one that was cut must not be read where it has no bytes any more.
TEST_F(Data, FilesThatChangeAreNoticed) {
  for (const char* name : {"c.txt", "c.jsonl", "c.csv"}) {
    std::string text = "\"text\"\n";
    for (int i = 0; i < 5000; ++i) text += "\"line\"\n";
    const auto data = open(name, text, {.document = "line"});
    EXPECT_TRUE(has(data->get(data->size() - 1).text, "line")) << name;
    std::filesystem::resize_file(folder / name, 20);
    EXPECT_TRUE(has(message_of([&] { data->get(data->size() - 1); }), "has changed")) << name;
    std::filesystem::remove(folder / name);
    EXPECT_TRUE(has(message_of([&] { data->get(0); }), "has changed")) << name;
  }
}

TEST_F(Data, FoldersAndPatterns) {
  write_file(folder / "b.txt", "B");
  write_file(folder / "a.txt", "A");
  EXPECT_EQ(texts(Dataset::open(folder.path().string())), (Texts{"A", "B"}));
  EXPECT_EQ(texts(Dataset::open((folder / "[b]*.txt").string())), Texts{"B"});
  EXPECT_TRUE(has(message_of([&] { Dataset::open((folder / "*.none").string()); }), "no file matches"));
  write_file(folder / "c.csv", "text\nx");
  EXPECT_TRUE(has(message_of([&] { Dataset::open(folder.path().string()); }), "several kinds"));
}

TEST_F(Data, JsonLinesOfAllKinds) {
  EXPECT_EQ(texts(open("t.jsonl", "{\"text\": \"a\"}\r\n\r\n{\"text\": \"\\u00e9\"}")), (Texts{"a", "é"}));
  auto s = open("p.jsonl", R"({"instruction": "Add.", "input": "1 1", "output": "2"})")->get(0);
  EXPECT_EQ(s.kind, SampleKind::completion);
  EXPECT_EQ(s.prompt + "|" + s.completion, "Add.\n\n1 1|2");
  s = open("q.jsonl", R"({"question": "Q?", "answer": "A"})")->get(0);
  EXPECT_EQ(s.prompt + "|" + s.completion, "Q?|A");
  s = open(
          "c.jsonl",
          R"({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "tools": [{"a": 1}]})")
          ->get(0);
  EXPECT_EQ(s.kind, SampleKind::chat);
  EXPECT_EQ(s.messages[1]["content"], "y");
  EXPECT_EQ(s.tools.size(), 1u);
  s = open("g.jsonl", R"({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]})")->get(0);
  EXPECT_EQ(s.messages.dump(), R"([{"role":"user","content":"x"},{"role":"assistant","content":"y"}])");
}

TEST_F(Data, MultipleChoiceInTheFormsPeopleUse) {
  const auto check_answer = [&](const std::string& record, int64_t answer, size_t count) {
    const Sample s = open("m.jsonl", record)->get(0);
    EXPECT_EQ(s.kind, SampleKind::choice) << record;
    EXPECT_EQ(s.answer, answer) << record;
    EXPECT_EQ(s.choices.size(), count) << record;
  };
  check_answer(R"({"question": "Q", "choices": ["x", "y"], "answer": 1})", 1, 2);
  check_answer(R"({"ctx": "Q", "endings": ["x", "y", "z"], "label": "2"})", 2, 3);
  check_answer(R"({"question": "Q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"})", 1, 2);
  check_answer(R"({"question": "Q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "1"})", 0, 2);
  check_answer(R"({"goal": "Q", "sol1": "x", "sol2": "y", "label": 1})", 1, 2);
  check_answer(R"({"sentence": "Q _", "option1": "x", "option2": "y", "answer": "2"})", 1, 2);
  check_answer(R"({"question": "Q", "A": "x", "B": "y", "C": "z", "D": "w", "answer": "D"})", 3, 4);
  check_answer(R"({"question": "Q", "options": {"A": "x", "B": "y"}, "answer": "x"})", 0, 2);
  check_answer(R"({"question": "Q", "choices": ["x", "y"]})", -1, 2);
  EXPECT_TRUE(
      has(error("m.jsonl", R"({"question": "Q", "choices": ["x", "y"], "answer": 2})"), "m.jsonl:1: the answer 2"));
  EXPECT_TRUE(
      has(error("m.jsonl", R"({"question": "Q", "choices": ["x", "y"], "answer": 1e300})"), "m.jsonl:1: the answer"));
  EXPECT_TRUE(has(error("m.jsonl", R"({"question": "Q", "choices": [], "answer": 0})"), "empty"));
}

TEST_F(Data, MalformedRecordsNameFileAndLine) {
  EXPECT_TRUE(has(error("b.jsonl", "{\"text\": \"a\"}\n\n{\"text\": \n"), "b.jsonl:3: malformed JSON"));
  EXPECT_TRUE(
      has(error("b.jsonl", "{\"text\": \"a\"}\n{\"text\": 5}"), "b.jsonl:2: the text must be text, not number"));
  EXPECT_TRUE(has(error("b.jsonl", "{\"text\": \"a\"}\n{\"prompt\": \"x\"}"), "b.jsonl:2: no text"));
  EXPECT_TRUE(has(error("b.jsonl", "{\"text\": \"\xFF\"}"), "b.jsonl:1: malformed JSON"));
  EXPECT_TRUE(has(error("b.jsonl", "[1]"), "b.jsonl:1: message 1 is no object"));
  EXPECT_TRUE(has(error("b.jsonl", "17"), "b.jsonl:1: a record must be a JSON object, not number"));
  EXPECT_TRUE(has(error("b.jsonl", std::string(100000, '[')), "b.jsonl:1: the JSON nests"));
  EXPECT_TRUE(has(error("b.jsonl", "{\"text\": \"a\", \"label\": 1e99}"), "b.jsonl:1: the label"));
  EXPECT_TRUE(has(error("b.jsonl", "{\"text\": \"a\", \"label\": 99999999999999999999}"), "b.jsonl:1: the label"));
  EXPECT_TRUE(has(error("b.jsonl", "{\"messages\": [{\"content\": \"a\"}]}"), "b.jsonl:1: message 1 has no \"role\""));
  EXPECT_TRUE(has(error("b.json", "{\"a\": 1}"), "b.json must be a JSON list"));
  EXPECT_TRUE(has(error("b.json", "[{\"text\": \"a\"}, {}]"), "b.json, record 2"));
}

TEST_F(Data, CsvFollowsRfc4180) {
  const auto data = open("a.csv", "\xEF\xBB\xBFtext,label\r\n\"a, \"\"b\"\"\r\nc\",1\r\n,x\r\n\r\nplain,3");
  ASSERT_EQ(data->size(), 3);
  EXPECT_EQ(data->get(0).text, "a, \"b\"\r\nc");
  EXPECT_EQ(data->get(0).label, 1);
  EXPECT_EQ(data->get(1).text, "");
  EXPECT_EQ(data->get(1).label_name, "x");
  EXPECT_TRUE(has(data->get(2).where, "a.csv:6"));
  EXPECT_EQ(open("a.tsv", "0\tx\n1\ty\n", {.columns = {{"text", "1"}, {"label", "0"}}, .header = false})->get(1).text,
            "y");
  EXPECT_EQ(texts(open("one.csv", "anything\nx\ny\n")), (Texts{"x", "y"}));
  const Sample s = open("q.csv", "question,A,B,C,D,answer\nQ,w,x,y,z,C\n")->get(0);
  EXPECT_EQ(s.choices[static_cast<size_t>(s.answer)], "y");
  EXPECT_EQ(
      open("q.csv", "q,r1,r2,a\nQ,w,x,1\n", {.columns = {{"question", "q"}, {"choices", "r1,r2"}, {"answer", "a"}}})
          ->get(0)
          .answer,
      1);
  EXPECT_TRUE(has(error("b.csv", "text\n\"open"), "b.csv:2: a quoted field is not closed"));
  EXPECT_TRUE(has(error("b.csv", "text,x\n\"a\"b,c"), "b.csv:2: text follows a closing quote"));
  EXPECT_TRUE(has(error("b.csv", "text,x\na,b\nc\n"), "b.csv:3: 1 fields, but there are 2 columns"));
  EXPECT_TRUE(has(error("b.csv", "text,text\na,b"), "named twice"));
  EXPECT_TRUE(has(error("b.csv", "texts,x\na,b", {.columns = {{"text", "text"}}}), "did you mean `texts`"));
}

TEST_F(Data, OptionsAreChecked) {
  EXPECT_TRUE(has(error("a.txt", "x", {.format = "jsonnl"}), "did you mean `jsonl`"));
  EXPECT_TRUE(has(error("a.jsonl", "{}", {.kind = "picture"}), "unknown kind"));
  EXPECT_TRUE(has(error("a.jsonl", "{}", {.columns = {{"texts", "x"}}}), "did you mean `text`"));
}

TEST_F(Data, IdxFindsItsLabels) {
  const auto be = [](uint32_t v) {
    return std::string{static_cast<char>(v >> 24), static_cast<char>(v >> 16), static_cast<char>(v >> 8),
                       static_cast<char>(v)};
  };
  write_file(folder / "t-labels-idx1-ubyte", std::string("\0\0\x08\x01", 4) + be(2) + "\x07\x09");
  const auto data = open("t-images-idx3-ubyte", std::string("\0\0\x08\x03", 4) + be(2) + be(1) + be(2) + "abcd");
  EXPECT_EQ(data->kind(), SampleKind::image);
  const Sample s = data->get(1);
  EXPECT_EQ(s.label, 9);
  EXPECT_EQ(s.image.pixels, (std::vector<uint8_t>{'c', 'd'}));
  write_file(folder / "t-labels-idx1-ubyte", std::string("\0\0\x08\x01", 4) + be(1) + "\x07");
  EXPECT_TRUE(
      has(message_of([&] { Dataset::open((folder / "t-images-idx3-ubyte").string()); }), "1 labels for the 2 images"));
}

TEST_F(Data, ImagesInFoldersAreClasses) {
  const std::string jpeg = read_text(std::string(MOIETY_SOURCE_DIR) + "/tests/data/images/quarters.jpg");
  for (const char* name : {"dog", "cat", "empty"}) std::filesystem::create_directory(folder / name);
  write_file(folder / "dog/1.jpg", jpeg);
  write_file(folder / "cat/2.JPEG", jpeg);
  write_file(folder / "cat/1.jpg", jpeg);
  const auto data = Dataset::open(folder.path().string());
  EXPECT_EQ(data->classes(), (Texts{"cat", "dog"}));
  ASSERT_EQ(data->size(), 3);
  EXPECT_EQ(data->get(0).label, 0);
  EXPECT_EQ(data->get(2).label_name, "dog");
  EXPECT_EQ(data->get(2).image.width, 16);
}

TEST_F(Data, SplitsAndShufflesRepeat) {
  std::string text;
  for (int i = 0; i < 100; ++i) text += std::to_string(i) + "\n";
  const auto data = open("n.txt", text, {.document = "line"});
  const auto a = texts(shuffled(data, 3)), b = texts(shuffled(data, 3)), c = texts(shuffled(data, 4));
  EXPECT_EQ(a, b);
  EXPECT_NE(a, c);
  EXPECT_EQ(std::set<std::string>(a.begin(), a.end()).size(), 100u);
  const auto [train, held] = split(data, 0.1, 1);
  EXPECT_EQ(held->size(), 10);
  std::set<std::string> all;
  for (const auto& part : {train, held})
    for (const auto& t : texts(part)) all.insert(t);
  EXPECT_EQ(all.size(), 100u);
  EXPECT_EQ(texts(split(data, 0.1, 1).second), texts(held));
  EXPECT_EQ(split(subset(data, {0, 1}), 0.01, 1).second->size(), 1);
  EXPECT_EQ(texts(concatenate({subset(data, {1}), subset(data, {}), subset(data, {5, 2})})), (Texts{"1", "5", "2"}));
  EXPECT_THROW(subset(data, {100}), Error);
  EXPECT_THROW(data->get(100), Error);
  EXPECT_THROW(data->get(-1), Error);
}

// --- Encoding, with a tokenizer whose tokens can be seen: one a byte, special ones in <...>.
// -------------------------------

class Bytes : public Tokenizer {
 public:
  std::vector<int64_t> encode(std::string_view text, bool add_special, bool parse_special) const override {
    std::vector<int64_t> out;
    if (add_special) out.push_back(256);
    for (size_t i = 0; i < text.size(); ++i) {
      if (parse_special && text.substr(i).starts_with("<e>")) {
        out.push_back(257);
        i += 2;
      } else if (i + 1 < text.size() && text[i] == 'a' && text[i + 1] == 'b') {
        out.push_back(258);  // a merge, to reach across borders
        ++i;
      } else {
        out.push_back(static_cast<unsigned char>(text[i]));
      }
    }
    return out;
  }
  std::string decode(std::span<const int64_t> ids, bool) const override {
    std::string out;
    for (const int64_t id : ids)
      out += id == 256 ? "<s>" : id == 257 ? "<e>" : id == 258 ? "ab" : std::string(1, static_cast<char>(id));
    return out;
  }
  std::string piece(int64_t id) const override { return decode(std::vector<int64_t>{id}, false); }
  std::optional<int64_t> id(std::string_view) const override { return std::nullopt; }
  int64_t size() const override { return 259; }
  bool is_special(int64_t id) const override { return id == 256 || id == 257; }
  std::string kind() const override { return "bytes"; }
  std::optional<int64_t> bos() const override { return 256; }
  std::optional<int64_t> eos() const override { return 257; }
  std::optional<int64_t> pad() const override { return std::nullopt; }
  std::optional<int64_t> unk() const override { return std::nullopt; }
  std::string chat_template() const override { return ""; }
  std::unique_ptr<Decoding> decoding(bool) const override { fail("these tests decode no streams"); }
};

const Bytes tokenizer;

std::string learned(const Example& e) {
  std::string out;
  bool before = false;
  for (size_t i = 0; i < e.ids.size(); ++i) {
    if (before && !e.loss[i]) out += "|";
    if (e.loss[i]) out += tokenizer.piece(e.ids[i]);
    before = e.loss[i];
  }
  return out;
}

Sample chat(std::initializer_list<std::pair<const char*, const char*>> turns) {
  Sample s;
  s.kind = SampleKind::chat;
  s.messages = Json::array();
  for (const auto& [role, content] : turns) s.messages.push_back({{"role", role}, {"content", content}});
  return s;
}

TEST(Encode, TextAndCompletion) {
  Sample s;
  s.text = "hey";
  Example e = encode_example(s, tokenizer);
  EXPECT_EQ(tokenizer.decode(e.ids, false), "<s>hey<e>");
  EXPECT_EQ(learned(e), "hey<e>");
  s.kind = SampleKind::completion;
  s.prompt = "Q: ";
  s.completion = "yes";
  e = encode_example(s, tokenizer);
  EXPECT_EQ(learned(e), "yes<e>");
  EXPECT_EQ(learned(encode_example(s, tokenizer, nullptr, {.loss_on_prompt = true})), "Q: yes<e>");
  EXPECT_EQ(learned(encode_example(s, tokenizer, nullptr, {.max_length = 5})), "y");
  EXPECT_EQ(learned(encode_example(s, tokenizer, nullptr, {.add_eos = false})), "yes");
  s.prompt = "xa";
  s.completion = "b!";
  EXPECT_EQ(learned(encode_example(s, tokenizer)), "ab!<e>");  // the token that reaches across counts as answer
  s.kind = SampleKind::choice;
  s.choices = {"no", "yes"};
  s.answer = 1;
  EXPECT_EQ(learned(encode_example(s, tokenizer)), " yes<e>");
  s.answer = -1;
  EXPECT_THROW(encode_example(s, tokenizer), Error);
}

TEST(Encode, ChatWithGenerationBlocks) {
  const ChatTemplate t(
      "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}{{ "
      "eos_token }}{% endgeneration %}{% else %}U:{{ m.content }}\n{% endif %}{% endfor %}");
  const Sample s = chat({{"user", "1"}, {"assistant", "one"}, {"user", "2"}, {"assistant", "two"}});
  EXPECT_EQ(learned(encode_example(s, tokenizer, &t)), "one<e>|two<e>");
  EXPECT_EQ(learned(encode_example(s, tokenizer, &t, {.last_answer_only = true})), "two<e>");
  EXPECT_THROW(encode_example(s, tokenizer), Error);
}

TEST(Encode, ChatByRendering) {
  const ChatTemplate t(
      "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt "
      "%}[assistant]{% endif %}");
  const Sample s = chat({{"system", "be"}, {"user", "1"}, {"assistant", "one"}, {"user", "2"}, {"assistant", "two"}});
  const Example e = encode_example(s, tokenizer, &t);
  EXPECT_EQ(learned(e), "one<e>\n|two<e>\n");
  EXPECT_EQ(learned(encode_example(s, tokenizer, &t, {.last_answer_only = true})), "two<e>\n");
  // A prompt that is not in the finished chat (an empty thought) and an end that only finished chats have.
  const ChatTemplate odd(
      "{% for m in messages %}[{{ m.role }}]{{ m.content }}<e>{% endfor %}{% if add_generation_prompt "
      "%}[assistant]<think></think>{% else %}END{% endif %}");
  EXPECT_EQ(learned(encode_example(s, tokenizer, &odd)), "one<e>|two<e>END");
}

TEST(Encode, ChatWhoseTemplateDropsEarlierThoughts) {
  const ChatTemplate t(
      "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ "
      "m.content.split('</think>')[-1] }}<e>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}");
  const Sample s = chat({{"user", "one"}, {"assistant", "<think>hm</think>one"}, {"user", "2"}, {"assistant", "two"}});
  const Example e = encode_example(s, tokenizer, &t);
  EXPECT_EQ(learned(e), "one<e>|<think></think>two<e>");
  EXPECT_EQ(e.loss[std::string("[user]").size()], 0);  // the same word in the question is not learned
  const ChatTemplate none("{% for m in messages %}{{ m.role if loop.last else '' }}{% endfor %}");
  EXPECT_TRUE(has(message_of([&] { encode_example(s, tokenizer, &none); }), "cannot be found"));
}

// --- Packing
// ---------------------------------------------------------------------------------------------------------------

std::vector<Example> random_examples() {
  const auto lengths = *rc::gen::container<std::vector<uint8_t>>(rc::gen::inRange<uint8_t>(0, 40));
  std::vector<Example> out;
  int64_t next = 1;
  for (const uint8_t n : lengths) {
    Example e;
    for (int i = 0; i < n; ++i) {
      e.ids.push_back(next++);
      e.loss.push_back(static_cast<uint8_t>(next * 7 % 3 != 0));
    }
    out.push_back(std::move(e));
  }
  return out;
}

void check_batch(const Batch& b, const std::vector<Example>& examples, bool may_cut_short) {
  std::map<int64_t, uint8_t> loss;
  std::map<int64_t, std::pair<size_t, size_t>> home;  // token -> example, offset
  for (size_t e = 0; e < examples.size(); ++e)
    for (size_t i = 0; i < examples[e].ids.size(); ++i)
      loss[examples[e].ids[i]] = examples[e].loss[i], home[examples[e].ids[i]] = {e, i};
  RC_ASSERT(b.ids.size() == static_cast<size_t>(b.rows * b.length));
  std::set<int64_t> seen;
  for (int64_t r = 0; r < b.rows; ++r) {
    bool any = false;
    for (int64_t t = 0; t < b.length; ++t) {
      const auto at = static_cast<size_t>(r * b.length + t);
      if (b.segments[at] == 0) {
        RC_ASSERT(b.ids[at] == -7);
        RC_ASSERT(b.loss[at] == 0);
        RC_ASSERT(b.positions[at] == 0);
        continue;
      }
      any = true;
      RC_ASSERT(seen.insert(b.ids[at]).second);
      const auto [example, offset] = home.at(b.ids[at]);
      const bool starts = b.positions[at] == 0;
      RC_ASSERT(b.loss[at] == (starts ? 0 : loss.at(b.ids[at])));
      if (!starts) {
        RC_ASSERT(b.segments[at - 1] == b.segments[at]);
        RC_ASSERT(b.ids[at - 1] + 1 == b.ids[at]);
        RC_ASSERT(b.positions[at - 1] + 1 == b.positions[at]);
      } else if (t > 0 && b.segments[at - 1] != 0) {
        RC_ASSERT(b.segments[at - 1] + 1 == b.segments[at]);
      }
      if (starts && !may_cut_short) RC_ASSERT(offset % static_cast<size_t>(b.length) == 0);
    }
    RC_ASSERT(any);
  }
  RC_ASSERT(seen.size() == loss.size());
}

RC_GTEST_PROP(Pack, LosesNoTokenAndMasksRightly, ()) {
  const auto examples = random_examples();
  const auto length = *rc::gen::inRange<int64_t>(1, 50);
  const Batch sequential = pack(examples, length, Packing::sequential, -7);
  check_batch(sequential, examples, true);
  size_t total = 0;
  for (const auto& e : examples) total += e.ids.size();
  RC_ASSERT(sequential.rows == (static_cast<int64_t>(total) + length - 1) / length);
  const Batch best = pack(examples, length, Packing::best_fit, -7);
  check_batch(best, examples, false);
  RC_ASSERT(best.rows >= sequential.rows);
  RC_ASSERT(pack(examples, length, Packing::best_fit, -7).ids == best.ids);
}

RC_GTEST_PROP(Pack, PaddingKeepsEveryRow, ()) {
  const auto examples = random_examples();
  for (const bool left : {false, true}) {
    const Batch b = pad(examples, -7, 0, left);
    RC_ASSERT(b.rows == static_cast<int64_t>(examples.size()));
    for (size_t r = 0; r < examples.size(); ++r) {
      const size_t n = examples[r].ids.size(),
                   start = r * static_cast<size_t>(b.length) + (left ? static_cast<size_t>(b.length) - n : 0);
      for (size_t i = 0; i < n; ++i) {
        RC_ASSERT(b.ids[start + i] == examples[r].ids[i]);
        RC_ASSERT(b.segments[start + i] == 1);
        RC_ASSERT(b.positions[start + i] == static_cast<int64_t>(i));
      }
      RC_ASSERT(std::count(b.segments.begin() + static_cast<std::ptrdiff_t>(r) * b.length,
                           b.segments.begin() + static_cast<std::ptrdiff_t>(r + 1) * b.length,
                           1) == static_cast<std::ptrdiff_t>(n));
    }
  }
}

TEST(Pack, BadSizesAreErrors) {
  const std::vector<Example> one = {{{1, 2, 3}, {1, 1, 1}}};
  EXPECT_THROW(pack(one, 0, Packing::sequential), Error);
  EXPECT_THROW(pad(one, 0, 2), Error);
  EXPECT_THROW(pad(std::vector<Example>{{{1, 2}, {1}}}), Error);
  EXPECT_EQ(pack({}, 4, Packing::best_fit).rows, 0);
}

RC_GTEST_PROP(DataShuffle, IsAPermutation, ()) {
  const auto n = *rc::gen::inRange<int>(0, 60);
  const auto seed = *rc::gen::arbitrary<uint64_t>();
  const TemporaryFolder folder;
  std::string text;
  for (int i = 0; i < n; ++i) text += std::to_string(i) + "\n";
  write_file(folder / "n.txt", text);
  const auto data = Dataset::open((folder / "n.txt").string(), {.document = "line"});
  std::multiset<std::string> seen;
  const auto order = shuffled(data, seed);
  for (int64_t i = 0; i < order->size(); ++i) seen.insert(order->get(i).text);
  RC_ASSERT(seen.size() == static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) RC_ASSERT(seen.count(std::to_string(i)) == 1);
}

}  // namespace
}  // namespace moiety
