// Chat templates: a byte that picks a context, then Jinja source, a NUL byte, and (optional) variables as JSON.
#include "fuzz.h"
#include "moiety/base/config.h"
#include "moiety/io/chat_template.h"

using namespace moiety;

namespace {

const nlohmann::ordered_json& context(uint8_t choice) {
  static const std::vector<nlohmann::ordered_json> all = [] {
    const char* texts[] = {R"([])", R"([{"role": "user", "content": "Hi"}])",
                           R"([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 < 2 & \"x\""},
            {"role": "assistant", "content": "<think>so</think>\nYes  "}, {"role": "user", "content": ""}])",
                           R"([{"role": "user", "content": [{"type": "text", "text": "part"}, {"type": "image"}]},
            {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function",
             "function": {"name": "f", "arguments": {"a": [1, 2.5, true, null]}}}]},
            {"role": "tool", "content": "3", "name": "f"}])"};
    std::vector<nlohmann::ordered_json> out;
    for (size_t i = 0; i < 4; ++i) {
      nlohmann::ordered_json tools;
      if (i == 3)
        tools = nlohmann::ordered_json::parse(R"([{"type": "function", "function": {"name": "f", "parameters": {}}}])");
      out.push_back(chat_context(nlohmann::ordered_json::parse(texts[i]), i % 2 == 1,
                                 {{"bos_token", "<s>"}, {"eos_token", "</s>"}}, tools));
    }
    return out;
  }();
  return all[choice % all.size()];
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Input input(data, size);
  uint8_t choice = input.byte();
  std::string source(input.text());
  fuzz::accepted([&] {
    ChatTemplate parsed(source);
    nlohmann::ordered_json variables = context(choice);
    if (!input.rest_text().empty()) {
      nlohmann::ordered_json more = parse_json(input.rest_text(), "variables");
      if (more.is_object()) variables.update(more);
    }
    std::string plain = parsed.render(variables);
    if (parsed.marks_generation()) {
      auto marked = parsed.render_marked(variables);
      for (auto [begin, end] : marked.generation)
        fuzz::require(begin <= end && end <= marked.text.size(), "a generation range outside the text");
    }
  });
  return 0;
}
