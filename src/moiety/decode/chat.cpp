#include "moiety/decode/chat.h"

#include <filesystem>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/text.h"

namespace moiety {
namespace {

struct NamedTemplate {
  const char* name;
  const char* source;
  std::vector<std::string> stops;
};

const std::vector<NamedTemplate>& named_templates() {
  static const std::vector<NamedTemplate> all = {
      {"chatml",
       "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
       "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
       {"<|im_end|>"}},
      {"llama3",
       "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
       "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
       "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
       {"<|eot_id|>"}},
      {"gemma",
       "{{ bos_token }}{% set first = namespace(text='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
       "{% set first.text = m['content'] | trim + '\n\n' %}{% else %}<start_of_turn>"
       "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ first.text }}{{ m['content'] | trim "
       "}}<end_of_turn>\n"
       "{% set first.text = '' %}{% endif %}{% endfor %}"
       "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
       {"<end_of_turn>"}},
      {"mistral",
       "{{ bos_token }}{% set first = namespace(text='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
       "{% set first.text = m['content'] + '\n\n' %}{% elif m['role'] == 'user' %}[INST] {{ first.text }}{{ "
       "m['content'] }} "
       "[/INST]{% set first.text = '' %}{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}",
       {"[INST]"}},
      {"phi3",
       "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
       "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
       {"<|end|>"}},
      {"zephyr",
       "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
       "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
       {"<|user|>"}},
      {"plain",
       "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n\n{% else %}"
       "{{ 'Answer' if m['role'] == 'assistant' else 'Question' }}: {{ m['content'] }}\n{% endif %}{% endfor %}"
       "{% if add_generation_prompt %}Answer:{% endif %}",
       {"\nQuestion:"}},
  };
  return all;
}

std::string special(const Tokenizer& tokenizer, std::optional<int64_t> id) {
  return id ? tokenizer.piece(*id) : "";
}

}  // namespace

std::vector<std::string> ChatFormat::names() {
  std::vector<std::string> all;
  for (const NamedTemplate& format : named_templates()) all.push_back(format.name);
  return all;
}

ChatFormat::ChatFormat(std::shared_ptr<const Tokenizer> tokenizer, const std::string& choice,
                       nlohmann::ordered_json arguments)
    : tokenizer_(std::move(tokenizer)), context_(std::move(arguments)) {
  check(context_.is_object(), "template arguments must be a JSON object, such as {{\"enable_thinking\": false}}");
  std::string source;
  if (choice.empty()) {
    source = tokenizer_->chat_template();
    check(!source.empty(),
          "the model has no chat template, so it was probably not trained to chat; choose one with --template ({} or a "
          "file with Jinja source), or continue text with `moiety generate`",
          list_of(names(), "or"));
  } else {
    for (const NamedTemplate& format : named_templates())
      if (choice == format.name) {
        source = format.source;
        stops_ = format.stops;
      }
    if (source.empty()) {
      std::error_code error;
      check(std::filesystem::is_regular_file(choice, error),
            "there is no chat format or file `{}`: the formats are {}{}", shown(choice), list_of(names(), "and"),
            did_you_mean(choice, names()));
      source = read_text(choice);
    }
  }
  template_ = std::make_unique<ChatTemplate>(source);
  for (const auto& [name, id] : {std::pair{"bos_token", tokenizer_->bos()}, std::pair{"eos_token", tokenizer_->eos()},
                                 std::pair{"pad_token", tokenizer_->pad()}, std::pair{"unk_token", tokenizer_->unk()}})
    if (!context_.contains(name)) context_[name] = special(*tokenizer_, id);
}

std::string ChatFormat::render(const nlohmann::ordered_json& messages, bool add_generation_prompt) const {
  auto context = context_;
  context["messages"] = messages;
  context["add_generation_prompt"] = add_generation_prompt;
  return template_->render(context);
}

std::vector<int64_t> ChatFormat::encode(const nlohmann::ordered_json& messages, bool add_generation_prompt) const {
  return tokenizer_->encode(render(messages, add_generation_prompt), false);
}

void check_messages(const nlohmann::ordered_json& messages, const std::string& where) {
  check(messages.is_array(), "{}: a conversation is a JSON list of messages", where);
  for (size_t i = 0; i < messages.size(); ++i) {
    const auto& m = messages[i];
    check(m.is_object() && m.contains("role") && m["role"].is_string() && m.contains("content"),
          "{}: message {} must be an object with \"role\" and \"content\"", where, i);
  }
}

}  // namespace moiety
