#pragma once
// Chat templates: the Jinja that real checkpoints use (for/if/set/macro/namespace, filters, tests, slices, methods), rendered as
// transformers renders them (trim_blocks, lstrip_blocks, raise_exception, strftime_now, tojson, ...).
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

namespace moiety {

class ChatTemplate {
 public:
  /// Parses Jinja source. Throws Error with line and column.
  explicit ChatTemplate(const std::string& source);
  ~ChatTemplate();
  /// `context`: messages (list of {role, content, ...}), add_generation_prompt, tools, bos_token, eos_token, and any other
  /// variable the template reads. Bounded in steps and output size. Throws Error (also for the template's raise_exception).
  std::string render(const nlohmann::ordered_json& context) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace moiety
