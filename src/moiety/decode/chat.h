#pragma once
// Conversations: messages to the text and ids a model was trained on, by its own chat template or a named one.
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "moiety/io/chat_template.h"
#include "moiety/io/tokenizer.h"

namespace moiety {

class ChatFormat {
 public:
  /// `choice`: "" for the model's own template, else the name of a known format or a file with Jinja source.
  /// `arguments`: variables for the template beside the usual ones (an object). Throws Error: the model has no template
  /// (naming the formats to choose from), an unreadable file, a template that does not parse.
  ChatFormat(std::shared_ptr<const Tokenizer> tokenizer, const std::string& choice = "",
             nlohmann::ordered_json arguments = nlohmann::ordered_json::object());

  /// `messages`: [{"role": ..., "content": ...}, ...]. Throws Error, also for what the template itself refuses.
  std::string render(const nlohmann::ordered_json& messages, bool add_generation_prompt = true) const;
  /// The ids of the rendered text. The template writes the special tokens itself, none are added.
  std::vector<int64_t> encode(const nlohmann::ordered_json& messages, bool add_generation_prompt = true) const;
  /// What ends a turn in a named format, for models to which it is plain text; empty for the model's own template.
  const std::vector<std::string>& stops() const { return stops_; }

  static std::vector<std::string> names();  ///< the known formats

 private:
  std::shared_ptr<const Tokenizer> tokenizer_;
  std::unique_ptr<ChatTemplate> template_;
  nlohmann::ordered_json context_;
  std::vector<std::string> stops_;
};

/// Checks that `messages` is a list of objects with a role and a content, as a conversation file must be. Throws Error
/// naming `where`.
void check_messages(const nlohmann::ordered_json& messages, const std::string& where);

}  // namespace moiety
