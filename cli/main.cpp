// Finds the verbs, parses the command line, and turns every error into one sentence.
// Exit codes: 0 ok, 1 failed, 2 wrong use.
#include <c10/util/Exception.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "moiety/base/error.h"
#include "moiety/base/text.h"
#include "moiety/base/version.h"
#include "moiety/io/mapped_file.h"
#include "verb.h"

namespace {

using namespace moiety;
using moiety::cli::Verb;

constexpr int failed = 1, wrong_use = 2;

/// The first command of a verb's examples.
std::string first_example(const Verb& verb) {
  std::istringstream lines(verb.examples);
  for (std::string line; std::getline(lines, line);) {
    size_t start = line.find_first_not_of(" \t");
    if (start != std::string::npos && line.compare(start, 7, "moiety ") == 0) return line.substr(start);
  }
  return "";
}

std::string examples_text(const std::string& examples) {
  std::string text = "EXAMPLES\n";
  std::istringstream lines(examples);
  for (std::string line; std::getline(lines, line);) text += line.empty() ? "\n" : "  " + line + "\n";
  return text;
}

std::string main_help() {
  std::string text =
      "moiety gives a transformer experts: it runs, measures and changes real checkpoints.\n\n"
      "Usage: moiety VERB [OPTIONS]\n\nVERBS\n";
  size_t width = 0;
  for (const Verb& verb : cli::verbs()) width = std::max(width, verb.name.size());
  for (const Verb& verb : cli::verbs()) text += fmt::format("  {:<{}}  {}\n", verb.name, width, verb.summary);
  text +=
      "\nOPTIONS\n"
      "  -h, --help  this help; `moiety VERB --help` shows a verb's options and examples\n"
      "  --version   the version\n";
  std::string examples;
  for (const Verb& verb : cli::verbs()) {
    std::string line = first_example(verb);
    if (!line.empty()) examples += "  " + line + "\n";
  }
  if (!examples.empty()) text += "\nEXAMPLES\n" + examples;
  return text + "\nExit codes: 0 ok, 1 failed, 2 wrong use.\n";
}

std::string one_line(std::string text) {
  while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) text.pop_back();
  for (size_t at; (at = text.find('\n')) != std::string::npos;) text.replace(at, 1, " ");
  return text;
}

struct Failure {
  int code;
  std::string sentence;
};

int report(const std::string& who, const Failure& failure, bool json) {
  std::cout.flush();
  std::cerr << who << ": " << failure.sentence << "\n";
  // The error is part of the answer for a program that reads JSON.
  if (json) {
    std::cout << nlohmann::json{{"error", failure.sentence}}.dump(-1, ' ', false,
                                                                  nlohmann::json::error_handler_t::replace)
              << std::endl;
  }
  return failure.code;
}

/// What is wrong with a command line that did not parse.
std::string usage_sentence(const CLI::ParseError& error, CLI::App& app) {
  std::vector<std::string> flags, parts;
  for (const CLI::App* part : app.get_subcommands([](CLI::App*) { return true; })) parts.push_back(part->get_name());
  const CLI::App* used = app.get_subcommands().empty() ? &app : app.get_subcommands().front();
  for (const CLI::Option* option : used->get_options()) {
    for (const std::string& name : option->get_lnames()) flags.push_back("--" + name);
  }
  for (const std::string& extra : app.remaining(true)) {
    if (extra.size() > 1 && extra[0] == '-') {
      std::string flag = extra.substr(0, extra.find('='));
      return fmt::format("unknown option {}{}", shown(flag), did_you_mean(flag, flags));
    }
  }
  auto extras = app.remaining(true);
  if (!parts.empty() && used == &app) {
    const std::string known = "say which: " + list_of(parts);
    if (extras.empty() || extras.front()[0] == '-') return known;
    return fmt::format("unknown `{}`{}; {}", shown(extras.front()), did_you_mean(extras.front(), parts), known);
  }
  if (dynamic_cast<const CLI::ExtrasError*>(&error) != nullptr && !extras.empty())
    return fmt::format("unexpected argument `{}`", shown(extras.front()));
  return one_line(error.what());
}

int run_verb(const Verb& verb, int argc, char** argv) {
  std::string who = "moiety " + verb.name;
  // The options are not parsed yet when parsing fails: look for the flag itself.
  bool json = std::any_of(argv + 2, argv + argc, [](const char* word) { return std::strcmp(word, "--json") == 0; });
  CLI::App app(verb.summary, who);
  app.get_formatter()->column_width(34);
  app.set_help_flag("-h,--help", "This help");
  if (!verb.examples.empty()) app.footer(examples_text(verb.examples));
  try {
    auto body = verb.setup(app);
    try {
      app.parse(argc - 1, argv + 1);
    } catch (const CLI::CallForHelp&) {
      std::cout << app.help();
      return 0;
    } catch (const CLI::ParseError& error) {
      std::string sentence = usage_sentence(error, app);
      return report(who, {wrong_use, fmt::format("{} (see `{} --help`)", sentence, who)}, json);
    }
    return body();
  } catch (const Error& error) {
    return report(who, {failed, error.what()}, json);
  } catch (const c10::Error& error) {
    return report(who, {failed, one_line(error.what_without_backtrace())}, json);
  } catch (const std::bad_alloc&) {
    return report(who, {failed, "out of memory"}, json);
  } catch (const std::exception& error) {
    return report(who, {failed, one_line(error.what())}, json);
  }
}

int run(int argc, char** argv) {
  std::sort(cli::verbs().begin(), cli::verbs().end(), [](const Verb& a, const Verb& b) { return a.name < b.name; });
  std::vector<std::string> words(argv + 1, argv + argc);
  if (words.empty()) {
    std::cerr << main_help();
    return wrong_use;
  }
  if (words[0] == "help" && words.size() == 1) words[0] = "--help";
  if (words[0] == "--help" || words[0] == "-h") {
    std::cout << main_help();
    return 0;
  }
  if (words[0] == "--version") {
    std::cout << "moiety " MOIETY_VERSION "\n";
    return 0;
  }
  std::vector<std::string> names{"--help", "--version"};
  for (const Verb& verb : cli::verbs()) {
    if (verb.name == words[0]) return run_verb(verb, argc, argv);
    names.push_back(verb.name);
  }
  const char* kind = words[0][0] == '-' ? "option" : "verb";
  std::string sentence = fmt::format("unknown {} `{}`{}", kind, shown(words[0]), did_you_mean(words[0], names));
  return report("moiety", {wrong_use, sentence + " (see `moiety --help`)"}, false);
}

}  // namespace

int main(int argc, char** argv) {
  // `moiety ... | head` ends quietly, whatever the parent process did with the signal.
  std::signal(SIGPIPE, SIG_DFL);
  MappedFile::explain_lost_pages("moiety");
  int code = run(argc, argv);
  std::cout.flush();
  if (code == 0 && (!std::cout || std::fflush(stdout) != 0)) {
    std::cerr << "moiety: cannot write to standard output\n";
    return failed;
  }
  return code;
}
