#pragma once
// Chat templates: the Jinja that real checkpoints use (for/if/set/macro/namespace, filters, tests, slices, methods),
// rendered as transformers renders them (trim_blocks, lstrip_blocks, raise_exception, strftime_now, tojson, generation
// blocks, ...).
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

namespace moiety {

class ChatTemplate {
 public:
  /// Parses Jinja source. Throws Error with line and column.
  explicit ChatTemplate(const std::string& source);
  ~ChatTemplate();
  ChatTemplate(ChatTemplate&&) noexcept;
  ChatTemplate& operator=(ChatTemplate&&) noexcept;

  /// `context`: messages (list of {role, content, ...}), add_generation_prompt, tools, bos_token, eos_token, and any
  /// other variable the template reads. As in transformers, `tools` and `documents` are none and
  /// `add_generation_prompt` is false when the context lacks them. Bounded in steps (10^7), call depth (200) and output
  /// (16 MiB). Throws Error that names the template's line (also for the template's raise_exception).
  std::string render(const nlohmann::ordered_json& context) const;

  struct Marked {
    std::string text;
    std::vector<std::pair<size_t, size_t>> generation;  ///< byte ranges [begin, end) that {% generation %} blocks wrote
  };
  /// Like render, and says what the model is to write. Error when a generation block stands inside of a macro or set
  /// block.
  Marked render_marked(const nlohmann::ordered_json& context) const;
  /// Whether the template has {% generation %} blocks.
  bool marks_generation() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// The variables that transformers gives a template: messages without keys that are null and with their reasoning under
/// each of its names (reasoning_content, thinking), tools (null when there are none), add_generation_prompt, and
/// bos_token, eos_token,
/// ... of `special_tokens`; `extra` (enable_thinking, documents, date_string, ...) goes over all of these.
/// Throws Error when a message is no object.
nlohmann::ordered_json chat_context(const nlohmann::ordered_json& messages, bool add_generation_prompt,
                                    const nlohmann::ordered_json& special_tokens = nlohmann::ordered_json::object(),
                                    const nlohmann::ordered_json& tools = nullptr,
                                    const nlohmann::ordered_json& extra = nlohmann::ordered_json::object());

}  // namespace moiety
