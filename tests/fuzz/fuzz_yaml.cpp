// YAML run files: text to typed settings. What is read is written and read again unchanged.
#include "fuzz.h"
#include "moiety/base/config.h"

using namespace moiety;

namespace {

struct Part {
  std::string slug;
  std::vector<int64_t> layers;
  std::optional<double> rate;
  void fields(Fields& f) {
    f("slug", slug, "the method").required();
    f("layers", layers, "where it stands").min(0).length(0, 100);
    f("rate", rate, "learning rate").min(0);
  }
};

struct RunFile {
  int64_t experts = 8;
  int steps = 10;
  float scale = 1;
  bool bias = false;
  std::string gate = "softmax";
  std::vector<Part> parts;
  std::map<std::string, Part> named;
  std::vector<std::vector<std::string>> words;
  nlohmann::json extra;
  void fields(Fields& f) {
    f("experts", experts, "number of experts").min(1).max(4096);
    f("steps", steps, "steps");
    f("scale", scale, "factor");
    f("bias", bias, "bias");
    f("gate", gate, "gate").choices({"softmax", "sigmoid"});
    f("parts", parts, "parts");
    f("named", named, "named parts");
    f("words", words, "lists of lists");
    f("extra", extra, "anything");
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string text(reinterpret_cast<const char*>(data), size);
  fuzz::accepted([&] {
    auto run = parse_yaml_as<RunFile>(text, "fuzz.yaml");
    nlohmann::json dumped = dump(run);
    // As text: NaN, which `extra` may hold, is not equal to itself.
    auto text_of = [](const nlohmann::json& json) {
      return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    };
    std::string again = text_of(dump(parse<RunFile>(dumped, "again")));
    fuzz::require(again == text_of(dumped), "settings that change on the way through JSON");
  });
  return 0;
}
