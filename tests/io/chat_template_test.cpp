#include "moiety/io/chat_template.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cstdlib>
#include <fstream>
#include <sstream>

#include "moiety/base/error.h"

namespace moiety {
namespace {

using Json = nlohmann::ordered_json;
const std::string folder = std::string(MOIETY_SOURCE_DIR) + "/tests/data/chat_templates/";

std::string read(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in) << path;
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

std::string message_of(const std::string& source, const Json& context = Json::object()) {
  try {
    const std::string text = ChatTemplate(source).render(context);
    return "no error, but: " + text;
  } catch (const Error& e) {
    return e.what();
  }
}
std::string render(const std::string& source, const Json& context = Json::object()) {
  return ChatTemplate(source).render(context);
}

// Every committed answer of transformers (tools/chat_template_parity.py writes them), or those of $MOIETY_CHAT_CASES.
TEST(ChatTemplateCases, EqualTransformers) {
  const char* other = std::getenv("MOIETY_CHAT_CASES");
  std::istringstream lines(read(other ? other : folder + "cases.jsonl"));
  std::string line;
  ASSERT_TRUE(std::getline(lines, line));
  const Json header = Json::parse(line);
  size_t count = 0, failures = 0;
  for (int number = 2; std::getline(lines, line); ++number) {
    const Json c = Json::parse(line);
    const std::string source =
        c.contains("template") ? read(folder + c["template"].get<std::string>()) : c["source"].get<std::string>();
    Json context = header["variables"];
    if (c.contains("chat")) {
      const Json& conversation = header["conversations"][c["chat"].get<std::string>()];
      const Json& options = header["options"][c["options"].get<size_t>()];
      Json extra = Json::object();
      for (const auto* from : {&conversation, &options})
        if (from->contains("extra"))
          for (const auto& [key, value] : (*from)["extra"].items()) extra[key] = value;
      context = chat_context(conversation["messages"], options["add_generation_prompt"].get<bool>(), header["tokens"],
                             conversation.value("tools", Json()), extra);
    }
    std::string got;
    bool failed = false;
    std::vector<std::string> spans;
    try {
      const auto marked = ChatTemplate(source).render_marked(context);
      got = marked.text;
      for (const auto& [begin, end] : marked.generation) spans.push_back(got.substr(begin, end - begin));
    } catch (const Error& e) {
      failed = true;
      got = e.what();
    }
    ++count;
    const bool good = c.contains("error")   ? failed
                      : c.contains("spans") ? !failed && c["spans"].get<std::vector<std::string>>() == spans
                                            : !failed && got == c["expected"].get<std::string>();
    if (!good && ++failures <= 25) {
      ADD_FAILURE() << "case in line " << number << "\n  source:   "
                    << (c.contains("template") ? c["template"].get<std::string>() + ", chat '" +
                                                     c["chat"].get<std::string>() + "', options " + c["options"].dump()
                                               : source)
                    << "\n  expected: "
                    << (c.contains("error")   ? "error " + c["error"].dump()
                        : c.contains("spans") ? c["spans"].dump()
                                              : c["expected"].dump())
                    << "\n  got:      " << (failed ? "error " : "") << Json(got).dump();
    }
  }
  EXPECT_GT(count, 0u);
  EXPECT_EQ(failures, 0u) << "of " << count;
}

TEST(ChatTemplate, ErrorsNameTheLine) {
  EXPECT_EQ(message_of("a\n{{ raise_exception('roles must alternate') }}"),
            "chat template, line 2: roles must alternate");
  EXPECT_EQ(message_of("a\n\n{{ x.y.z }}", {{"x", Json::object()}}),
            "chat template, line 3: 'dict object' has no attribute 'y'");
  EXPECT_EQ(message_of("\n{% if x %}\n"),
            "chat template, line 2, column 11: the template ends, but elif or else or endif is missing for the tag in "
            "line 2");
  EXPECT_EQ(message_of("{{ 1 +"), "chat template, line 1, column 1: this expression is not closed: }} is missing");
  EXPECT_EQ(message_of("é{{ $ }}"), "chat template, line 1, column 5: unexpected character '$'");
  EXPECT_NE(message_of("{% include 'x' %}").find("'include' is not supported"), std::string::npos);
  EXPECT_NE(message_of("{{ [1].append(2) }}").find("unsafe"), std::string::npos);
  EXPECT_EQ(message_of("{{ 9223372036854775807 + 1 }}"), "chat template, line 1: an integer exceeds 64 bits");
}

TEST(ChatTemplate, WorkIsBounded) {
  EXPECT_NE(
      message_of("{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}").find("steps"),
      std::string::npos);
  EXPECT_NE(message_of("{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}").find("deep"), std::string::npos);
  EXPECT_NE(
      message_of(
          "{% set ns = namespace(s='0123456789') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}")
          .find("bytes"),
      std::string::npos);
  EXPECT_NE(message_of("{{ 'x' * 99999999999 }}").find("bytes"), std::string::npos);
  EXPECT_NE(message_of("{{ 'x'.center(99999999999) }}").find("bytes"), std::string::npos);
  EXPECT_NE(message_of("{{ '%99999999999d' % 1 }}").find("width"), std::string::npos);
  EXPECT_NE(message_of("{{ [0] * 99999999999 }}").find("steps"), std::string::npos);
  EXPECT_NE(message_of("{{ range(999999999999) }}").find("Range too big"), std::string::npos);
  EXPECT_NE(message_of("{% set ns = namespace(v=[]) %}{% for i in range(9999) %}{% set ns.v = [ns.v] %}{% endfor %}")
                .find("nest"),
            std::string::npos);
  EXPECT_NE(message_of("{% set ns = namespace() %}{% set ns.v = ns %}{{ ns }}").find("recurses"), std::string::npos);
  EXPECT_NE(message_of("{% set ns = namespace(v=[1]) %}{% for i in range(60) %}{% set ns.v = [ns.v, ns.v] %}{% endfor "
                       "%}{{ ns.v == [[1]] }}{{ ns.v }}")
                .find("chat template"),
            std::string::npos);
  EXPECT_NE(message_of("{{ " + std::string(5000, '(') + "1" + std::string(5000, ')') + " }}").find("nest more than"),
            std::string::npos);
  std::string sum = "1";
  for (int i = 0; i < 5000; ++i) sum += "+1";
  EXPECT_NE(message_of("{{ " + sum + " }}").find("nest more than"), std::string::npos);
  std::string blocks;
  for (int i = 0; i < 5000; ++i) blocks += "{% if 1 %}";
  EXPECT_NE(message_of(blocks).find("tags nest more than"), std::string::npos);
  Json deep = 1;
  for (int i = 0; i < 1000; ++i) deep = Json::array({deep});
  EXPECT_NE(message_of("{{ x }}", {{"x", deep}}).find("nests more than"), std::string::npos);
}

TEST(ChatTemplate, LoopsAndMacrosLeaveNothingBehind) {
  // Cells that refer to one another must not leak: the sanitizer build checks this one.
  EXPECT_EQ(render("{% set ns = namespace() %}{% for x in [1, 2] %}{% macro m() %}{{ x }}{% endmacro %}{% set ns.m = m "
                   "%}{% set ns.l = loop %}{{ loop.changed(loop) }}{% endfor %}{{ ns.m() }}"),
            "TrueFalse2");
}

TEST(ChatTemplate, ContextFollowsTransformers) {
  const Json context = chat_context(Json::parse(R"([{"role": "assistant", "content": null, "reasoning": "hm"}])"), true,
                                    {{"bos_token", "<s>"}}, nullptr, {{"enable_thinking", false}});
  EXPECT_EQ(
      render("{{ messages[0] }}|{{ tools }}|{{ documents }}|{{ add_generation_prompt }}|{{ bos_token }}|{{ "
             "enable_thinking }}",
             context),
      "{'thinking': 'hm', 'role': 'assistant', 'reasoning': 'hm', 'reasoning_content': 'hm'}|None|None|True|<s>|False");
  EXPECT_THROW(chat_context(Json::parse(R"(["x"])"), true), Error);
  EXPECT_THROW(chat_context(Json::parse(R"({"a": 1})"), true), Error);
}

TEST(ChatTemplate, GenerationIsMarked) {
  const ChatTemplate t(
      "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}!{% "
      "endgeneration %}{% endif %};{% endfor %}");
  EXPECT_TRUE(t.marks_generation());
  const auto out = t.render_marked(
      {{"messages",
        Json::parse(R"([{"role":"user"},{"role":"assistant","content":"é"},{"role":"assistant","content":"b"}])")}});
  EXPECT_EQ(out.text, "user:;assistant:é!;assistant:b!;");
  ASSERT_EQ(out.generation.size(), 2u);
  EXPECT_EQ(out.text.substr(out.generation[0].first, out.generation[0].second - out.generation[0].first), "é!");
  EXPECT_EQ(out.text.substr(out.generation[1].first, out.generation[1].second - out.generation[1].first), "b!");
  const ChatTemplate inside("{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x }}");
  EXPECT_EQ(inside.render(Json::object()), "a");
  EXPECT_THROW(inside.render_marked(Json::object()), Error);
}

TEST(ChatTemplate, DateHasTheFormat) {
  const std::string date = render("{{ strftime_now('%Y-%m-%d') }}");
  ASSERT_EQ(date.size(), 10u);
  EXPECT_EQ(date[4], '-');
  EXPECT_EQ(render("{{ strftime_now('') }}"), "");
}

TEST(ChatTemplate, OneTemplateServesManyThreadsAndTimes) {
  const ChatTemplate t(
      "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}");
  for (int i = 0; i < 3; ++i) EXPECT_EQ(t.render({{"messages", {1, 2, 3}}}), "3");
}

// Damage to a template ends in text or in an Error, nothing else.
RC_GTEST_PROP(ChatTemplate, AnyBytesEndInTextOrError, ()) {
  static const std::vector<std::string> pieces = {"{{",      "}}",
                                                  "{%",      "%}",
                                                  "{#",      "#}",
                                                  "-",       "+",
                                                  " for ",   " x ",
                                                  " in ",    " if ",
                                                  " endif ", " endfor ",
                                                  " set ",   "=",
                                                  "'a'",     "1",
                                                  "[",       "]",
                                                  "(",       ")",
                                                  "{",       "}",
                                                  "|",       "upper",
                                                  "raw",     "endraw",
                                                  "\n",      " ",
                                                  ".",       ":",
                                                  ",",       " is ",
                                                  " not ",   "defined",
                                                  "macro",   "endmacro",
                                                  "loop",    "~",
                                                  "**",      "//",
                                                  "%",       "\xff",
                                                  "é",       "9999999999999999999",
                                                  "1e999",   "'\\x",
                                                  "\\",      "namespace",
                                                  "endset",  "call",
                                                  "endcall"};
  const auto picks = *rc::gen::container<std::vector<std::string>>(rc::gen::elementOf(pieces));
  std::string source;
  for (const auto& p : picks) source += p;
  try {
    ChatTemplate(source).render({{"x", {1, 2}}});
  } catch (const Error&) {
  }
}

RC_GTEST_PROP(ChatTemplate, TextWithoutTagsIsKept, ()) {
  const auto text = *rc::gen::container<std::string>(rc::gen::elementOf(std::string("ab c\n<>&'\"%#}")));
  std::string expected = text;
  if (!expected.empty() && expected.back() == '\n') expected.pop_back();
  RC_ASSERT(render(text) == expected);
}

RC_GTEST_PROP(ChatTemplate, RepeatedTextIsTheTextAgainAndAgain, ()) {
  const auto text = *rc::gen::container<std::string>(rc::gen::elementOf(std::string("abc")));
  const auto times = *rc::gen::inRange(-2, 20);
  std::string expected;
  for (int i = 0; i < times; ++i) expected += text;
  RC_ASSERT(render("{{ x * n }}", {{"x", text}, {"n", times}}) == expected);
}

RC_GTEST_PROP(ChatTemplate, JsonOfAnyValueReadsBack, ()) {
  const auto text = *rc::gen::container<std::vector<uint32_t>>(rc::gen::inRange<uint32_t>(0, 0x500));
  std::string utf8;
  for (const uint32_t c : text) {
    if (c < 0x80) {
      utf8 += static_cast<char>(c);
    } else {
      utf8 += static_cast<char>(0xC0 | c >> 6);
      utf8 += static_cast<char>(0x80 | (c & 0x3F));
    }
  }
  const Json value = {{"k", {utf8, 1, -2.5, nullptr, true}}, {utf8, {}}};
  RC_ASSERT(Json::parse(render("{{ x|tojson }}", {{"x", value}})) == value);
  RC_ASSERT(Json::parse(render("{{ x|tojson(indent=3, ensure_ascii=true) }}", {{"x", value}})) == value);
  RC_ASSERT(render("{{ x[::-1][::-1] }}", {{"x", utf8}}) == utf8);
  RC_ASSERT(render("{{ x|length }}", {{"x", utf8}}) == std::to_string(text.size()));
  RC_ASSERT(render("{{ x.split('a')|join('a') }}", {{"x", utf8}}) == utf8);
}

}  // namespace
}  // namespace moiety
