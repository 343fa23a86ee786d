// moiety methods: what is built in.
#include <iostream>
#include <memory>
#include <set>

#include "moiety/base/registry.h"
#include "moiety/base/text.h"
#include "verb.h"

namespace moiety::cli {
namespace {

struct Options {
  std::string slug, kind;
  bool json = false, markdown = false;
};

std::vector<FieldInfo> fields_of(const Method& method) {
  return method.config ? method.config() : std::vector<FieldInfo>{};
}

std::string paper_text(const Paper& paper) {
  std::string text = paper.authors;
  if (!paper.title.empty()) text += fmt::format("{}{}", text.empty() ? "" : ": ", paper.title);
  if (paper.year > 0) text += fmt::format(", {}", paper.year);
  if (!paper.arxiv.empty()) text += fmt::format(", arXiv {}", paper.arxiv);
  return text;
}

nlohmann::json to_json(const Method& method) {
  nlohmann::json out{
      {"slug", method.slug}, {"kind", method.kind}, {"title", method.title}, {"summary", method.summary}};
  out["sites"] = method.sites;
  out["paper"] = {{"title", method.paper.title}, {"authors", method.paper.authors}, {"arxiv", method.paper.arxiv}};
  out["paper"]["year"] = method.paper.year > 0 ? nlohmann::json(method.paper.year) : nlohmann::json();
  out["config"] = schema(fields_of(method));
  return out;
}

void print_text(const Method& method) {
  fmt::print("{} ({})\n{}\n", method.title, method.kind, method.summary);
  std::string paper = paper_text(method.paper);
  if (!paper.empty()) fmt::print("\npaper  {}\n", paper);
  if (!method.sites.empty()) fmt::print("sites  {}\n", list_of(method.sites, "and"));
  auto fields = fields_of(method);
  fmt::print("\n{}", fields.empty() ? "no settings\n" : "settings\n" + help_text(fields));
}

void print_markdown(const Method& method) {
  fmt::print("## {}\n\n`{}`, a {}. {}\n", method.title, method.slug, method.kind, method.summary);
  std::string paper = paper_text(method.paper);
  if (!paper.empty()) fmt::print("\nPaper: {}.\n", paper);
  if (!method.sites.empty()) fmt::print("\nSites: {}.\n", list_of(method.sites, "and"));
  auto fields = fields_of(method);
  if (!fields.empty()) fmt::print("\n{}", markdown_table(fields));
  fmt::print("\n");
}

int run(const Options& options) {
  std::vector<const Method*> chosen;
  std::vector<std::string> slugs;
  std::set<std::string> kinds;
  for (const Method& method : methods()) {
    slugs.push_back(method.slug);
    kinds.insert(method.kind);
    bool fits =
        (options.slug.empty() || method.slug == options.slug) && (options.kind.empty() || method.kind == options.kind);
    if (fits) chosen.push_back(&method);
  }
  if (!options.kind.empty() && kinds.count(options.kind) == 0) {
    std::vector<std::string> known(kinds.begin(), kinds.end());
    fail("there is no method of kind `{}`{}; {}", shown(options.kind), did_you_mean(options.kind, known),
         known.empty() ? "none is built in" : "the kinds are " + list_of(known, "and"));
  }
  if (!options.slug.empty() && chosen.empty()) {
    fail("there is no {} `{}`{}", options.kind.empty() ? "method" : options.kind, shown(options.slug),
         did_you_mean(options.slug, slugs));
  }
  if (options.json) {
    nlohmann::json out = nlohmann::json::array();
    for (const Method* method : chosen) out.push_back(to_json(*method));
    std::cout << out.dump(2) << "\n";
    return 0;
  }
  if (options.slug.empty() && !options.markdown) {
    size_t width = 0;
    for (const Method* method : chosen) width = std::max(width, method->slug.size());
    for (const Method* method : chosen)
      fmt::print("{:<{}}  {:<9}  {}\n", method->slug, width, method->kind, method->summary);
    return 0;
  }
  if (options.slug.empty()) {
    fmt::print("| method | kind | what it is |\n| --- | --- | --- |\n");
    for (const Method* method : chosen) fmt::print("| `{}` | {} | {} |\n", method->slug, method->kind, method->summary);
    return 0;
  }
  for (const Method* method : chosen) options.markdown ? print_markdown(*method) : print_text(*method);
  return 0;
}

const Register registered({
    "methods",
    "what is built in: every method with its paper and settings",
    "moiety methods\nmoiety methods --kind family\nmoiety methods --json",
    [](CLI::App& app) {
      auto options = std::make_shared<Options>();
      app.add_option("SLUG", options->slug, "Describe this one");
      app.add_option("--kind", options->kind,
                     "Only this kind: part, transform, rule, policy, task, study, adapter, family");
      auto* json = app.add_flag("--json", options->json, "Print JSON; `config` is a JSON Schema");
      app.add_flag("--markdown", options->markdown, "Print Markdown")->excludes(json);
      return [options] { return run(*options); };
    },
});

}  // namespace
}  // namespace moiety::cli
