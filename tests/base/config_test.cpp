#include "moiety/base/config.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cmath>

using namespace moiety;
using nlohmann::json;

namespace {

struct Part {
  std::string slug;
  std::vector<int64_t> layers;
  double scale = 1;
  void fields(Fields& f) {
    f("slug", slug, "the method").required();
    f("layers", layers, "where it stands").min(0).length(1, 4);
    f("scale", scale, "factor");
  }
  bool operator==(const Part&) const = default;
};

struct RunFile {
  int64_t experts = 8;
  std::string gate = "softmax";
  bool bias = false;
  float rate = 0.5;
  std::optional<int> seed;
  std::vector<Part> parts;
  std::map<std::string, double> weights;
  Part only{"none", {0}, 2};
  json extra = json::object();
  void fields(Fields& f) {
    f("experts", experts, "number of experts").min(1).max(64);
    f("gate", gate, "how scores become gates").choices({"softmax", "sigmoid"});
    f("bias", bias, "add a bias");
    f("rate", rate, "learning rate").min(0);
    f("seed", seed, "seed of all chance").min(0);
    f("parts", parts, "what is put in");
    f("weights", weights, "of losses").min(0);
    f("only", only, "one part");
    f("extra", extra, "kept as it is");
  }
  std::string problem() const { return gate == "sigmoid" && bias ? "`bias` needs gate softmax" : ""; }
  bool operator==(const RunFile&) const = default;
};

std::string error_of(const std::string& yaml) {
  try {
    parse_yaml_as<RunFile>(yaml, "run.yaml");
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace

TEST(Config, ReadsYaml) {
  RunFile run = parse_yaml_as<RunFile>(R"(
# a comment
experts: 16
gate: sigmoid
rate: 1e-4
seed: 0x10
parts:
  - slug: a
    layers: [0, 1]
  - {slug: "b", scale: -2}
weights: {balance: .5, z: 1}
extra: [1, two, {x: null}]
)",
                                       "run.yaml");
  EXPECT_EQ(run.experts, 16);
  EXPECT_EQ(run.gate, "sigmoid");
  EXPECT_FLOAT_EQ(run.rate, 1e-4f);
  EXPECT_EQ(run.seed, 16);
  ASSERT_EQ(run.parts.size(), 2u);
  EXPECT_EQ(run.parts[0].layers, (std::vector<int64_t>{0, 1}));
  EXPECT_EQ(run.parts[1].scale, -2);
  EXPECT_EQ(run.weights.at("balance"), 0.5);
  EXPECT_EQ(run.extra, json::parse(R"([1, "two", {"x": null}])"));
  EXPECT_EQ(run.only.slug, "none");
}

TEST(Config, EmptyGivesDefaults) {
  EXPECT_EQ(parse_yaml_as<RunFile>("", "x"), RunFile());
  EXPECT_EQ(parse<RunFile>(json::object(), "x"), RunFile());
}

TEST(Config, DumpGoesBack) {
  RunFile run = parse_yaml_as<RunFile>("{experts: 3, seed: 5, parts: [{slug: q, layers: [7]}], weights: {a: 2}}", "x");
  EXPECT_EQ(parse<RunFile>(dump(run), "dump"), run);
  EXPECT_TRUE(dump(RunFile())["seed"].is_null());
  EXPECT_EQ(dump(RunFile())["experts"], 8);
}

TEST(Config, ErrorsSayWhatWhereAndWhatIsRight) {
  EXPECT_EQ(error_of("experts: 3\nexpertz: 4\n"),
            "run.yaml:2: unknown key `expertz`; did you mean `experts`?; the keys are experts, gate, bias, rate, seed, "
            "parts, "
            "weights, only and extra");
  EXPECT_EQ(
      error_of("parts:\n  - slug: a\n    layer: [1]\n"),
      "run.yaml:3: unknown key `layer` in `parts[0]`; did you mean `layers`?; the keys are slug, layers and scale");
  EXPECT_EQ(error_of("parts:\n  - scale: 1\n"), "run.yaml:2: `parts[0].slug` is missing: the method");
  EXPECT_EQ(error_of("experts: 0"), "run.yaml:1: `experts` is 0; at least 1 is right");
  EXPECT_EQ(error_of("experts: 65"), "run.yaml:1: `experts` is 65; at most 64 is right");
  EXPECT_EQ(error_of("experts: eight"), "run.yaml:1: `experts` is \"eight\"; a whole number is right");
  EXPECT_EQ(error_of("experts: 1.5"), "run.yaml:1: `experts` is 1.5; a whole number is right");
  EXPECT_EQ(error_of("\ngate: sofmax"),
            "run.yaml:2: `gate` is `sofmax`; softmax or sigmoid is right; did you mean `softmax`?");
  EXPECT_EQ(error_of("gate: 3"), "run.yaml:1: `gate` is 3; text (in quotes) is right");
  EXPECT_EQ(error_of("bias: yes"), "run.yaml:1: `bias` is \"yes\"; true or false is right");
  EXPECT_EQ(error_of("rate: .nan"), "run.yaml:1: `rate` is null; a finite number is right");
  EXPECT_EQ(error_of("rate: 1e39"), "run.yaml:1: `rate` is 1e+39; a number that fits 32-bit floating point is right");
  EXPECT_EQ(error_of("seed: 4294967296"),
            "run.yaml:1: `seed` is 4294967296; a whole number between -2^31 and 2^31 - 1 is right");
  EXPECT_EQ(error_of("seed: -1"), "run.yaml:1: `seed` is -1; at least 0 is right");
  EXPECT_EQ(error_of("parts: 3"), "run.yaml:1: `parts` is 3; a list is right");
  EXPECT_EQ(error_of("parts: [3]"), "run.yaml:1: `parts[0]` is 3; a section of keys and values is right");
  EXPECT_EQ(error_of("only: {slug: a, layers: []}"), "run.yaml:1: `only.layers` has 0 elements; 1 to 4 is right");
  EXPECT_EQ(error_of("only: {slug: a, layers: [1, -2]}"), "run.yaml:1: `only.layers` is -2; at least 0 is right");
  EXPECT_EQ(error_of("weights: {a: -1}"), "run.yaml:1: `weights` is -1; at least 0 is right");
  EXPECT_EQ(error_of("- 1"), "run.yaml:1: the settings are [1]; keys and values are right");
  EXPECT_EQ(error_of("gate: sigmoid\nbias: true"), "run.yaml:1: `bias` needs gate softmax");
}

TEST(Yaml, CoreSchema) {
  json value =
      parse_yaml(
          "[~, null, true, True, yes, 12, -3, +4, 0x1F, 0o17, 1., .5, 1e3, -1.5E-2, 1e, ., '5', \"a\\tb\", 012, "
          "99999999999999999999, 18446744073709551615, -.inf]",
          "x")
          .value;
  json expected = json::array({nullptr, nullptr, true, true,   "yes", 12,     -3,
                               4,       31,      15,   1.0,    0.5,   1000.0, -0.015,
                               "1e",    ".",     "5",  "a\tb", 12,    1e20,   18446744073709551615u});
  ASSERT_EQ(value.size(), expected.size() + 1);
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_EQ(value[i], expected[i]) << i;
  EXPECT_EQ(value[expected.size()].get<double>(), -INFINITY);
}

TEST(Yaml, AliasesAndTheirBound) {
  EXPECT_EQ(parse_yaml("a: &x [1, 2]\nb: *x\n", "x").value, json::parse(R"({"a": [1, 2], "b": [1, 2]})"));
  std::string bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n";
  for (int i = 1; i < 12; ++i) {
    std::string last = "*a" + std::to_string(i - 1);
    bomb += "a" + std::to_string(i) + ": &a" + std::to_string(i) + " [" + last;
    for (int k = 0; k < 8; ++k) bomb += "," + last;
    bomb += "]\n";
  }
  EXPECT_THROW(parse_yaml(bomb, "x"), Error);
  EXPECT_THROW(parse_yaml("&a [*a]", "x"), Error);
}

TEST(Yaml, RefusesWhatIsNoSettings) {
  for (const char* text :
       {"a: 1\na: 2", "[a: b", "{[a]: 1}", "a: 1\n---\nb: 2", "a: *nope", "\t- x", "a: b: c", "{? {x: 1} : 2}"})
    EXPECT_THROW(parse_yaml(text, "x"), Error) << text;
  EXPECT_THROW(parse_yaml(std::string(1000, '['), "x"), Error);
  EXPECT_THROW(parse_yaml(std::string(100000, '['), "x"), Error);
  std::string nested;
  for (int i = 0; i < 1000; ++i) nested += "- ";
  EXPECT_THROW(parse_yaml(nested, "x"), Error);
  try {
    parse_yaml("a: 1\nb: [1, 2\nc: 3", "run.yaml");
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).rfind("run.yaml:", 0), 0u) << error.what();
  }
}

TEST(Json, BoundedDepth) {
  EXPECT_EQ(parse_json("{\"a\": [1]}", "x")["a"][0], 1);
  EXPECT_THROW(parse_json(std::string(100000, '['), "x"), Error);
  EXPECT_THROW(parse_json(std::string(100, '[') + std::string(100, ']'), "x"), Error);
  EXPECT_THROW(parse_json("{", "x"), Error);
  EXPECT_THROW(parse_json("\"\xff\"", "x"), Error);
}

RC_GTEST_PROP(Config, AnyTextIsReadOrRefused, (const std::string& text)) {
  try {
    parse_yaml_as<RunFile>(text, "x");
  } catch (const Error&) {
  }
}

TEST(Config, DescribesItself) {
  auto fields = describe<RunFile>();
  ASSERT_EQ(fields.size(), 9u);
  EXPECT_EQ(fields[0].type, "integer");
  EXPECT_EQ(allowed_text(fields[0]), "integer, 1 to 64");
  EXPECT_EQ(allowed_text(fields[1]), "softmax or sigmoid");
  EXPECT_EQ(fields[5].type, "list of section");
  EXPECT_EQ(fields[5].fields.size(), 3u);
  EXPECT_EQ(fields[6].type, "map of number");
  std::string table = markdown_table(fields);
  EXPECT_NE(table.find("| `experts` | integer, 1 to 64 | `8` | number of experts |"), std::string::npos) << table;
  EXPECT_NE(table.find("| `parts[].slug` | text | required | the method |"), std::string::npos) << table;
  std::string help = help_text(fields);
  EXPECT_NE(help.find("number of experts (integer, 1 to 64; default 8)"), std::string::npos) << help;
  json described = schema(fields);
  EXPECT_EQ(described["properties"]["experts"]["maximum"], 64);
  EXPECT_EQ(described["properties"]["parts"]["items"]["required"][0], "slug");
  EXPECT_EQ(described["properties"]["only"]["properties"]["layers"]["maxItems"], 4);
  EXPECT_EQ(described["properties"]["only"]["properties"]["layers"]["items"]["minimum"], 0);
  EXPECT_EQ(described["properties"]["gate"]["enum"], json::parse(R"(["softmax", "sigmoid"])"));
}
