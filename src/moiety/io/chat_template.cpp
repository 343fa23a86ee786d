#include "moiety/io/chat_template.h"

#include "moiety/base/error.h"
#include "moiety/io/jinja.h"

namespace moiety {

namespace {
bool has_generation(const jinja::Body& body) {
  for (const auto& s : body) {
    if (s->what == jinja::Do::generation || has_generation(s->body) || has_generation(s->otherwise)) return true;
    for (const auto& b : s->branches)
      if (has_generation(b.body)) return true;
  }
  return false;
}
}  // namespace

struct ChatTemplate::Impl {
  jinja::Template parsed;
  bool marks = false;

  Marked render(nlohmann::ordered_json context, bool mark) const {
    check(context.is_object(), "chat template: its variables must be a JSON object");
    for (const char* name : {"tools", "documents"})
      if (!context.contains(name)) context[name] = nullptr;
    if (!context.contains("add_generation_prompt")) context["add_generation_prompt"] = false;
    jinja::Run run(parsed, {});
    Marked out;
    try {
      out.text = run.render(context, mark ? &out.generation : nullptr);
    } catch (const Error& e) {
      fail("chat template, line {}: {}", run.line(), e.what());
    }
    return out;
  }
};

ChatTemplate::ChatTemplate(const std::string& source) : impl_(std::make_unique<Impl>()) {
  impl_->parsed = jinja::parse(source);
  impl_->marks = has_generation(impl_->parsed.body);
}
ChatTemplate::~ChatTemplate() = default;
ChatTemplate::ChatTemplate(ChatTemplate&&) noexcept = default;
ChatTemplate& ChatTemplate::operator=(ChatTemplate&&) noexcept = default;

std::string ChatTemplate::render(const nlohmann::ordered_json& context) const {
  return impl_->render(context, false).text;
}
ChatTemplate::Marked ChatTemplate::render_marked(const nlohmann::ordered_json& context) const {
  return impl_->render(context, true);
}
bool ChatTemplate::marks_generation() const {
  return impl_->marks;
}

nlohmann::ordered_json chat_context(const nlohmann::ordered_json& messages, bool add_generation_prompt,
                                    const nlohmann::ordered_json& special_tokens, const nlohmann::ordered_json& tools,
                                    const nlohmann::ordered_json& extra) {
  check(messages.is_array(), "a chat must be a list of messages like {{\"role\": \"user\", \"content\": \"...\"}}");
  auto chat = nlohmann::ordered_json::array();
  for (size_t i = 0; i < messages.size(); ++i) {
    check(messages[i].is_object(),
          "message {} of the chat is no object: it must be like {{\"role\": \"user\", \"content\": \"...\"}}", i + 1);
    auto message = nlohmann::ordered_json::object();
    const nlohmann::ordered_json* reasoning = nullptr;
    for (const char* name : {"reasoning_content", "thinking", "reasoning"})
      if (!reasoning && messages[i].contains(name) && !messages[i][name].is_null()) reasoning = &messages[i][name];
    if (reasoning) message["thinking"] = *reasoning;
    for (const auto& [key, value] : messages[i].items())
      if (!value.is_null()) message[key] = value;
    if (reasoning) message["reasoning_content"] = *reasoning;
    chat.push_back(std::move(message));
  }
  auto context = nlohmann::ordered_json::object();
  context["messages"] = std::move(chat);
  context["tools"] = tools;
  context["documents"] = nullptr;
  context["add_generation_prompt"] = add_generation_prompt;
  for (const auto* more : {&special_tokens, &extra})
    for (const auto& [key, value] : more->items()) context[key] = value;
  return context;
}

}  // namespace moiety
