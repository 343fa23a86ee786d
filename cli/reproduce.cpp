// moiety reproduce: runs the study of a system and says whether the paper's claim holds here.
#include <fcntl.h>
#include <fmt/format.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <iostream>
#include <map>
#include <thread>

#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/log.h"
#include "moiety/base/memory.h"
#include "moiety/base/progress.h"
#include "moiety/base/text.h"
#include "moiety/study/runner.h"
#include "verb.h"

extern char** environ;

namespace moiety::cli {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

struct ReproduceArguments : Common {
  std::vector<std::string> slugs;
  std::string budget = "short", report, work, cell;
  int64_t seeds = 0, jobs = 0;
  bool restart = false, list = false;
};

std::string last_lines(const fs::path& file, size_t count) {
  std::string text = fs::exists(file) ? read_text(file) : "";
  while (!text.empty() && text.back() == '\n') text.pop_back();
  size_t begin = text.size();
  for (size_t lines = 0; begin > 0; --begin)
    if (text[begin - 1] == '\n' && begin != text.size() && ++lines == count) break;
  return text.substr(begin);
}

// Cells run in processes of one thread each: small models leave a second thread idle, and random streams stay apart.
void run_in_processes(const Study& study, const ReproduceArguments& a, const StudyOptions& options,
                      const std::vector<std::pair<std::string, int64_t>>& cells) {
  const TemporaryFolder logs("moiety-study");
  Progress progress("reproduce " + study.slug, static_cast<int64_t>(cells.size()), "cell");
  std::map<pid_t, size_t> running;
  std::string failure;
  size_t next = 0;
  const auto log_of = [&](size_t i) { return logs / fmt::format("{}.log", i); };
  const auto start = [&](size_t i) {
    std::vector<std::string> words{"moiety",
                                   "reproduce",
                                   study.slug,
                                   "--budget",
                                   a.budget,
                                   "--cell",
                                   fmt::format("{}:{}", cells[i].first, cells[i].second),
                                   "--threads",
                                   "1",
                                   "--quiet"};
    if (a.seeds > 0) words.insert(words.end(), {"--seeds", std::to_string(a.seeds)});
    if (!a.work.empty()) words.insert(words.end(), {"--work", a.work});
    std::vector<char*> argv;
    for (auto& w : words) argv.push_back(w.data());
    argv.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 1, log_of(i).c_str(), O_CREAT | O_WRONLY | O_TRUNC, 0644);
    posix_spawn_file_actions_adddup2(&actions, 1, 2);
    pid_t pid = 0;
    const int error = ::posix_spawn(&pid, "/proc/self/exe", &actions, nullptr, argv.data(), environ);
    posix_spawn_file_actions_destroy(&actions);
    check(error == 0, "a process for arm {} cannot be started", cells[i].first);
    running[pid] = i;
  };
  std::map<std::string, int64_t> done;
  while (!running.empty() || (next < cells.size() && failure.empty())) {
    while (failure.empty() && next < cells.size() && static_cast<int64_t>(running.size()) < options.jobs) start(next++);
    int status = 0;
    const pid_t pid = ::waitpid(-1, &status, 0);
    if (pid < 0 && errno == EINTR) continue;
    const auto it = running.find(pid);
    if (it == running.end()) continue;
    const auto& [arm, seed] = cells[it->second];
    if (!(WIFEXITED(status) && WEXITSTATUS(status) == 0) && failure.empty())
      failure = fmt::format("arm {}, seed {} of {} failed: {}", arm, seed, study.slug,
                            WIFSIGNALED(status) ? fmt::format("signal {}", WTERMSIG(status))
                                                : shown(last_lines(log_of(it->second), 3), 600));
    running.erase(it);
    progress.note(fmt::format("{}, seed {}", arm, seed));
    progress.add();
  }
  check(failure.empty(), "{}", failure);
}

void print_table(const json& r) {
  size_t width = 4;
  for (const auto& arm : r["arms"]) width = std::max(width, arm["name"].get<std::string>().size());
  std::cout << fmt::format("{:<{}}", "arm", width);
  std::map<std::string, size_t> columns;
  for (const auto& m : r["metrics"]) {
    const auto text = m["text"].get<std::string>();
    columns[m["name"]] = std::max<size_t>(text.size(), 15);
    std::cout << fmt::format("  {:>{}}", text, columns[m["name"]]);
  }
  std::cout << "\n";
  for (const auto& arm : r["arms"]) {
    std::cout << fmt::format("{:<{}}", arm["name"].get<std::string>(), width);
    for (const auto& m : r["metrics"]) {
      const auto& v = arm["values"];
      const auto name = m["name"].get<std::string>();
      const int digits = m["digits"];
      std::string text;
      if (v.contains(name))
        text = v[name]["seeds"].get<int64_t>() > 1 ? fmt::format("{:.{}f} +- {:.{}f}", v[name]["mean"].get<double>(),
                                                                 digits, v[name]["spread"].get<double>(), digits)
                                                   : fmt::format("{:.{}f}", v[name]["mean"].get<double>(), digits);
      std::cout << fmt::format("  {:>{}}", text, columns[name]);
    }
    std::cout << "\n";
  }
}

int run_reproduce(ReproduceArguments a) {
  if (a.list) {
    json list = json::array();
    for (const auto& slug : study_slugs()) {
      const Study s = get_study(slug);
      if (a.json)
        list.push_back({{"slug", slug}, {"title", s.title}, {"claim", s.claim}, {"rule", s.rule}});
      else
        std::cout << fmt::format("{:<20} {}\n", slug, s.title);
    }
    if (a.json) std::cout << list.dump(2) << "\n";
    return 0;
  }
  check(!a.slugs.empty(), "name a system, or all; `moiety reproduce --list` shows those that have a study");
  if (a.slugs.size() == 1 && a.slugs[0] == "all") a.slugs = study_slugs();
  std::vector<Study> studies;
  for (const auto& slug : a.slugs) studies.push_back(get_study(slug));
  StudyOptions options;
  options.budget = a.budget;
  options.seeds = a.seeds;
  options.work = a.work;
  options.restart = a.restart;
  options.jobs = a.jobs > 0 ? a.jobs : std::max<int64_t>(1, std::thread::hardware_concurrency());
  if (!a.cell.empty()) {
    const size_t colon = a.cell.rfind(':');
    check(studies.size() == 1 && colon != std::string::npos, "--cell is ARM:SEED of one study");
    keep_freed_memory();
    measure_cell(studies[0], options, a.cell.substr(0, colon), std::stoll(a.cell.substr(colon + 1)));
    return 0;
  }
  for (const Study& study : studies) study_budget(study, options);  // complain before anything runs
  json all = json::array();
  for (const Study& study : studies) {
    options.run_cells = [&](const auto& cells) { run_in_processes(study, a, options, cells); };
    const json r = run_study(study, options);
    if (!a.report.empty()) {
      fs::create_directories(a.report);
      write_file(fs::path(a.report) / (study.slug + ".json"), r.dump(1) + "\n");
      write_file(fs::path(a.report) / (study.slug + ".html"), study_html(r));
    }
    all.push_back(r);
    if (a.json) continue;
    std::cout << fmt::format("{}: {}\n\nClaim    {}\nHere     {}\nRule     {}\n\n", study.slug, study.title,
                             study.claim, study.setup, study.rule);
    print_table(r);
    std::cout << fmt::format("\nVerdict  {} ({} budget, {} seed{})\n         {}\n", r["verdict"].get<std::string>(),
                             a.budget, r["budget"]["seeds"].get<int64_t>(),
                             r["budget"]["seeds"].get<int64_t>() == 1 ? "" : "s", r["reason"].get<std::string>());
    if (!a.report.empty())
      std::cout << fmt::format("Report   {}\n", (fs::path(a.report) / (study.slug + ".html")).string());
    std::cout << "\n";
  }
  if (a.json) std::cout << (all.size() == 1 ? all[0] : all).dump(2) << "\n";
  return 0;
}

const Register reproduce({
    "reproduce",
    "Run the study of a system: does the paper's claim hold here?",
    "moiety reproduce deepseekmoe\n"
    "moiety reproduce deepseekmoe --budget full --seeds 5 --report report\n"
    "moiety reproduce all --json\n"
    "moiety reproduce --list",
    [](CLI::App& app) {
      auto a = std::make_shared<ReproduceArguments>();
      app.add_option("SLUG", a->slugs, "Systems by their slugs, or all");
      add_common(app, *a, /*model=*/false);
      app.remove_option(app.get_option("--dtype"));
      app.remove_option(app.get_option("--device"));
      app.add_option("--budget", a->budget, "short (about five minutes, fewer arms and seeds) or full")
          ->check(CLI::IsMember({"short", "full"}));
      app.add_option("--seeds", a->seeds, "Seeds, in place of the budget's")->check(CLI::Range(1, 100));
      app.add_option("--report", a->report, "Folder for SLUG.json and SLUG.html");
      app.add_option("--jobs", a->jobs, "Cells (arm and seed) at once, one thread each; default: one a core")
          ->check(CLI::Range(1, 1024));
      app.add_option("--work", a->work, "Where measured cells are kept, so that a stopped study goes on");
      app.add_flag("--restart", a->restart, "Measure again what is there");
      app.add_flag("--list", a->list, "List the studies");
      app.add_option("--cell", a->cell)->group("");  // one cell, for the processes that this verb starts
      return [a] { return run_reproduce(*a); };
    },
});

}  // namespace
}  // namespace moiety::cli
