// The interpreter: walks the syntax tree, one scope a loop pass, macro, with, set and filter block.
#include <algorithm>

#include "moiety/io/jinja.h"

namespace moiety::jinja {

namespace {
const std::string caller_name = "caller", varargs_name = "varargs", kwargs_name = "kwargs", loop_name = "loop";
}

// A scope for as long as this lives; scopes that a macro refers to are kept until the rendering ends.
struct Run::Entered {
  Entered(Run& run, Scope* parent) : run_(run) {
    if (run.free_.empty()) {
      scope_ = std::make_unique<Scope>();
    } else {
      scope_ = std::move(run.free_.back());
      run.free_.pop_back();
    }
    scope_->parent = parent;
  }
  ~Entered() {
    if (scope_->kept) {
      run_.held_.push_back(std::move(scope_));
    } else {
      scope_->names.clear();
      run_.free_.push_back(std::move(scope_));
    }
  }
  Entered(const Entered&) = delete;
  Entered& operator=(const Entered&) = delete;
  Scope& operator*() { return *scope_; }
  Run& run_;
  std::unique_ptr<Scope> scope_;
};

// Output goes to a string of its own for as long as this lives.
struct Run::Capture {
  explicit Capture(Run& run) : run_(run), before_(run.out_) {
    run.out_ = &text;
    ++run.captures_;
  }
  ~Capture() {
    run_.out_ = before_;
    --run_.captures_;
  }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;
  std::string text;
  Run& run_;
  std::string* before_;
};

void Run::emit(std::string_view text) {
  step(text.size() / 16);
  check(static_cast<int64_t>(out_->size() + text.size()) <= limits_.bytes, "the output exceeds {} bytes",
        limits_.bytes);
  out_->append(text);
}

std::string Run::render(const nlohmann::ordered_json& context, std::vector<std::pair<size_t, size_t>>* generation) {
  const RunningHere here(this);
  check(context.is_object(), "the context of a chat template must be an object");
  for (const auto& [name, value] : context.items()) context_.emplace(name, from_json(value));
  std::string out;
  out_ = &out;
  generation_ = generation;
  Entered scope(*this, nullptr);
  run(template_.body, *scope);
  return out;
}

// --- Names
// -----------------------------------------------------------------------------------------------------------------

Value Run::lookup(const std::string& name, Scope& scope) {
  for (Scope* s = &scope; s; s = s->parent) {
    step();
    for (auto i = s->names.rbegin(); i != s->names.rend(); ++i)
      if (i->first == &name || *i->first == name) return i->second;
  }
  const auto found = context_.find(name);
  if (found != context_.end()) return found->second;
  if (is_global(name)) return Value(std::make_shared<const Function>(Function{name, Value(), true}));
  return Value::undefined("'" + name + "' is undefined");
}

void Run::bind(Scope& scope, const std::string& name, Value value) {
  for (auto& [known, v] : scope.names) {
    if (known == &name || *known == name) {
      v = std::move(value);
      return;
    }
  }
  scope.names.emplace_back(&name, std::move(value));
}

void Run::assign(const Expression& target, Value value, Scope& scope) {
  line_ = target.line;
  switch (target.op) {
    case Op::name:
      bind(scope, target.name, std::move(value));
      return;
    case Op::field: {
      const Value space = lookup(target.parts[0]->name, scope);
      check(space.is(Kind::space), "cannot assign attribute on non-namespace object '{}'", target.parts[0]->name);
      check(!target.name.starts_with("_"), "a namespace cannot hold a name that begins with an underscore: {}",
            target.name);
      space.space().attributes.set(Value(target.name), std::move(value));
      return;
    }
    default: {
      if (!iterable(value)) fail("cannot unpack non-iterable {} object", type_name(value));
      auto items = iterate(*this, value);
      check(items.size() >= target.parts.size(), "not enough values to unpack (expected {}, got {})",
            target.parts.size(), items.size());
      check(items.size() == target.parts.size(), "too many values to unpack (expected {})", target.parts.size());
      for (size_t i = 0; i < items.size(); ++i) assign(*target.parts[i], std::move(items[i]), scope);
    }
  }
}

// --- Statements
// ------------------------------------------------------------------------------------------------------------

Run::Flow Run::run(const Body& body, Scope& scope) {
  for (const auto& s : body) {
    const Flow flow = run(*s, scope);
    if (flow != Flow::normal) return flow;
  }
  return Flow::normal;
}

Run::Flow Run::run(const Statement& s, Scope& scope) {
  const Deeper deeper(*this);
  step();
  line_ = s.line;
  switch (s.what) {
    case Do::data:
      emit(s.text);
      return Flow::normal;
    case Do::print:
      for (const auto& e : s.expressions) {
        const Value v = eval(*e, scope);
        emit(v.is_text() ? std::string_view(v.text()) : std::string_view(to_text(*this, v)));
      }
      return Flow::normal;
    case Do::set:
      run_set(s, scope);
      return Flow::normal;
    case Do::when:
      for (const auto& branch : s.branches)
        if (!branch.test || eval(*branch.test, scope).truth()) return run(branch.body, scope);
      return Flow::normal;
    case Do::loop:
      return run_loop(s, scope, eval(*s.expression, scope), 0);
    case Do::macro:
      bind(scope, s.text, Value::macro(new_macro(s, scope, s.text)));
      return Flow::normal;
    case Do::call:
      run_call(s, scope);
      return Flow::normal;
    case Do::generation:
      run_generation(s, scope);
      return Flow::normal;
    case Do::with: {
      Entered inner(*this, &scope);
      for (size_t i = 0; i < s.targets.size(); ++i) assign(*s.targets[i], eval(*s.expressions[i], scope), *inner);
      return run(s.body, *inner);
    }
    case Do::set_block:
    case Do::filter: {
      Value value;
      Flow flow = Flow::normal;
      {
        Entered inner(*this, &scope);
        Capture capture(*this);
        flow = run(s.body, *inner);
        value = text(std::move(capture.text));
      }
      // A break inside leaves before anything is assigned or printed.
      if (flow != Flow::normal) return flow;
      if (s.expression) value = eval_filter(*s.expression, scope, &value);
      if (s.what == Do::set_block) {
        assign(*s.targets[0], std::move(value), scope);
      } else {
        emit(to_text(*this, value));
      }
      return Flow::normal;
    }
    case Do::stop:
      return Flow::stop;
    case Do::next:
      return Flow::next;
  }
  return Flow::normal;
}

void Run::run_set(const Statement& s, Scope& scope) {
  assign(*s.targets[0], eval(*s.expression, scope), scope);
}

Macro* Run::new_macro(const Statement& statement, Scope& scope, std::string name) {
  for (Scope* s = &scope; s && !s->kept; s = s->parent) s->kept = true;
  macros_.push_back({&statement, &scope, std::move(name)});
  return &macros_.back();
}

void Run::run_call(const Statement& s, Scope& scope) {
  const Expression& e = *s.expression;
  const Value callee = eval(*e.parts[0], scope);
  Arguments a = arguments(e, 1, scope);
  a.keyword.emplace_back(caller_name, Value::macro(new_macro(s, scope, caller_name)));
  emit(to_text(*this, call(callee, std::move(a))));
}

void Run::run_generation(const Statement& s, Scope& scope) {
  check(!generation_ || captures_ == 0,
        "a generation block inside of a macro, set or filter block has no place in the output: its tokens cannot be "
        "marked");
  const size_t start = out_->size();
  {
    // A scope of its own, as the call block that transformers makes of it.
    Entered inner(*this, &scope);
    run(s.body, *inner);
  }
  if (generation_) generation_->emplace_back(start, out_->size());
}

bool Run::fetch(Loop& loop) {
  while (true) {
    Value value;
    if (loop.shared) {
      if (loop.shared->used >= loop.shared->items.size()) return false;
      value = loop.shared->items[loop.shared->used++];
    } else {
      if (loop.cursor >= loop.source.size()) return false;
      value = loop.source[loop.cursor++];
    }
    step();
    if (loop.statement->test) {
      Entered inner(*this, loop.scope);
      assign(*loop.statement->targets[0], value, *inner);
      if (!eval(*loop.statement->test, *inner).truth()) continue;
    }
    loop.ahead.push_back(std::move(value));
    return true;
  }
}

void Run::fetch_all(Loop& loop) {
  while (fetch(loop)) {
  }
}

Run::Flow Run::run_loop(const Statement& s, Scope& outer, const Value& iterable_value, int64_t depth) {
  auto loop = std::make_shared<Loop>();
  loop->statement = &s;
  loop->scope = &outer;
  loop->depth0 = depth;
  if (iterable_value.is(Kind::list) && iterable_value.list().shape == Shape::iterator) {
    loop->shared = std::shared_ptr<const List>(std::make_shared<Value>(iterable_value), &iterable_value.list());
  } else if (iterable_value.is(Kind::loop)) {
    fail("'LoopContext' object cannot be iterated here");
  } else {
    loop->source = iterate(*this, iterable_value);
  }
  // What the loop holds is let go at its end, so that loop objects stored in one another make no chain.
  struct End {
    ~End() {
      loop.done = true;
      loop.source.clear();
      loop.shared.reset();
      loop.ahead.clear();
      loop.current = loop.previous = loop.changed = Value();
    }
    Loop& loop;
  } end{*loop};
  const Value handle{loop};
  bool any = false;  // as in Jinja2: a pass that break or continue leaves does not count
  Flow flow = Flow::normal;
  while (!loop->ahead.empty() || fetch(*loop)) {
    loop->previous = std::move(loop->current);
    loop->current = std::move(loop->ahead.front());
    loop->ahead.pop_front();
    ++loop->index0;
    Entered inner(*this, &outer);
    bind(*inner, loop_name, handle);
    assign(*s.targets[0], loop->current, *inner);
    flow = run(s.body, *inner);
    any |= flow == Flow::normal;
    if (flow == Flow::stop) break;
  }
  if (!any) {
    Entered inner(*this, &outer);
    return run(s.otherwise, *inner);
  }
  return Flow::normal;
}

Value Run::loop_attribute(Loop& loop, const std::string& name) {
  const auto length = [&] {
    fetch_all(loop);
    return loop.index0 + 1 + static_cast<int64_t>(loop.ahead.size());
  };
  if (name == "index") return Value(loop.index0 + 1);
  if (name == "index0") return Value(loop.index0);
  if (name == "first") return Value(loop.index0 == 0);
  if (name == "last") return Value(loop.ahead.empty() && !fetch(loop));
  if (name == "length") return Value(length());
  if (name == "revindex") return Value(length() - loop.index0);
  if (name == "revindex0") return Value(length() - loop.index0 - 1);
  if (name == "depth") return Value(loop.depth0 + 1);
  if (name == "depth0") return Value(loop.depth0);
  if (name == "previtem") return loop.index0 == 0 ? Value::undefined("there is no previous item") : loop.previous;
  if (name == "nextitem")
    return loop.ahead.empty() && !fetch(loop) ? Value::undefined("there is no next item") : loop.ahead.front();
  if (name == "cycle" || name == "changed") {
    // The loop lives at least as long as the scope that asks.
    return Value(std::make_shared<const Function>(Function{name, Value(loop.shared_from_this()), false}));
  }
  return Value::undefined("'jinja2.runtime.LoopContext object' has no attribute '" + name + "'");
}

Value Run::call_loop(Loop& loop, Arguments a) {
  check(loop.statement->recursive, "The loop must have the 'recursive' marker to be called recursively.");
  check(a.positional.size() == 1 && a.keyword.empty(), "loop() takes what it is to run over");
  check(++calls_ <= limits_.depth, "the template calls itself more than {} levels deep", limits_.depth);
  struct Leave {
    ~Leave() { --calls; }
    int& calls;
  } leave{calls_};
  Capture capture(*this);
  run_loop(*loop.statement, *loop.scope, a.positional[0], loop.depth0 + 1);
  return text(std::move(capture.text));
}

Value Run::call_macro(Macro& macro, Arguments a) {
  check(++calls_ <= limits_.depth, "the template calls itself more than {} levels deep", limits_.depth);
  struct Leave {
    ~Leave() { --calls; }
    int& calls;
  } leave{calls_};
  const Statement& s = *macro.definition;
  Entered scope(*this, macro.scope);
  const size_t count = s.parameters.size();
  const auto take = [&](const std::string& name) -> std::optional<Value> {
    for (auto i = a.keyword.begin(); i != a.keyword.end(); ++i) {
      if (i->first != name) continue;
      Value v = std::move(i->second);
      a.keyword.erase(i);
      return v;
    }
    return std::nullopt;
  };
  const size_t plain = count - s.expressions.size();
  for (size_t i = 0; i < count; ++i) {
    const auto& name = s.parameters[i];
    if (i < a.positional.size()) {
      bind(*scope, name, a.positional[i]);
    } else if (auto given = take(name)) {
      bind(*scope, name, std::move(*given));
    } else if (i >= plain) {
      bind(*scope, name, eval(*s.expressions[i - plain], *scope));
    } else {
      bind(*scope, name, Value::undefined("parameter '" + name + "' was not provided"));
    }
  }
  if (s.uses_caller) {
    auto given = take(caller_name);
    bind(*scope, caller_name, given ? std::move(*given) : Value::undefined("No caller defined"));
  }
  if (s.uses_kwargs) {
    auto dict = std::make_shared<Dict>();
    for (auto& [name, value] : a.keyword) dict->set(Value(name), std::move(value));
    bind(*scope, kwargs_name, Value(std::shared_ptr<const Dict>(std::move(dict))));
  } else if (!a.keyword.empty()) {
    fail("macro '{}' takes no keyword argument '{}'", macro.name, a.keyword.front().first);
  }
  if (s.uses_varargs) {
    std::vector<Value> rest;
    if (a.positional.size() > count)
      rest.assign(a.positional.begin() + static_cast<std::ptrdiff_t>(count), a.positional.end());
    bind(*scope, varargs_name, list(std::move(rest), Shape::tuple));
  } else {
    check(a.positional.size() <= count, "macro '{}' takes not more than {} argument(s)", macro.name, count);
  }
  Capture capture(*this);
  run(s.body, *scope);
  return text(std::move(capture.text));
}

Value Run::call(const Value& callee, Arguments a) {
  step();
  switch (callee.kind()) {
    case Kind::undefined:
      fail("{}", callee.missing());
    case Kind::macro:
      return call_macro(callee.macro(), std::move(a));
    case Kind::loop:
      return call_loop(callee.loop(), std::move(a));
    case Kind::joiner: {
      auto& j = callee.object<Joiner>();
      return std::exchange(j.used, true) ? Value(j.separator) : Value("");
    }
    case Kind::function: {
      const Function& f = callee.function();
      if (!f.self.is(Kind::loop)) return call_function(*this, f, std::move(a));
      Loop& loop = f.self.loop();
      if (f.name == "cycle") {
        check(!a.positional.empty(), "no items for cycling given");
        return a.positional[static_cast<size_t>(std::max<int64_t>(loop.index0, 0)) % a.positional.size()];
      }
      const Value now = list(std::move(a.positional), Shape::tuple);
      if (loop.changed_called && equal(loop.changed, now)) return Value(false);
      loop.changed_called = true;
      if (!loop.done) loop.changed = now;
      return Value(true);
    }
    default:
      fail("'{}' object is not callable", type_name(callee));
  }
}

// --- Expressions
// -----------------------------------------------------------------------------------------------------------

Arguments Run::arguments(const Expression& e, size_t first, Scope& scope) {
  Arguments a;
  const size_t positional = e.parts.size() - e.names.size();
  for (size_t i = first; i < positional; ++i) a.positional.push_back(eval(*e.parts[i], scope));
  for (size_t i = 0; i < e.names.size(); ++i) a.keyword.emplace_back(e.names[i], eval(*e.parts[positional + i], scope));
  if (e.star) {
    for (auto& v : iterate(*this, eval(*e.star, scope))) a.positional.push_back(std::move(v));
  }
  if (e.star_star) {
    const Value v = eval(*e.star_star, scope);
    check(v.is(Kind::dict), "argument after ** must be a mapping, not {}", type_name(v));
    for (const auto& [key, value] : v.dict().items) {
      check(key.is_text(), "keywords must be strings");
      for (const auto& [known, unused] : a.keyword)
        check(known != key.text(), "got multiple values for keyword argument '{}'", known);
      a.keyword.emplace_back(key.text(), value);
    }
  }
  return a;
}

Value Run::eval_call(const Expression& e, Scope& scope) {
  const Value callee = eval(*e.parts[0], scope);
  Arguments a = arguments(e, 1, scope);
  line_ = e.line;
  return call(callee, std::move(a));
}

Value Run::eval_filter(const Expression& e, Scope& scope, const Value* input) {
  const Deeper deeper(*this);
  Value value;
  if (!e.parts[0]) {
    value = *input;
  } else if (e.parts[0]->op == Op::filter) {
    value = eval_filter(*e.parts[0], scope, input);
  } else {
    value = eval(*e.parts[0], scope);
  }
  Arguments a = arguments(e, 1, scope);
  line_ = e.line;
  return filter(e.name, value, std::move(a));
}

Value Run::eval_compare(const Expression& e, Scope& scope) {
  Value left = eval(*e.parts[0], scope);
  for (size_t i = 0; i < e.names.size(); ++i) {
    Value right = eval(*e.parts[i + 1], scope);
    const std::string& op = e.names[i];
    bool result = false;
    if (op == "==") {
      result = equal(left, right);
    } else if (op == "!=") {
      result = !equal(left, right);
    } else if (op == "in") {
      result = contains(*this, right, left);
    } else if (op == "not in") {
      result = !contains(*this, right, left);
    } else {
      const int c = compare(*this, left, right, op.c_str());
      result = c != 2 && (op == "<" ? c < 0 : op == "<=" ? c <= 0 : op == ">" ? c > 0 : c >= 0);
    }
    if (!result) return Value(false);
    left = std::move(right);
  }
  return Value(true);
}

Value Run::eval_slice(const Expression& e, Scope& scope) {
  const Value object = eval(*e.parts[0], scope);
  const auto part = [&](size_t i) { return e.parts[i] ? eval(*e.parts[i], scope) : Value::none(); };
  const Value start = part(1), stop = part(2), by = part(3);
  return slice(*this, object, start, stop, by);
}

Value Run::eval_concat(const Expression& e, Scope& scope) {
  std::string out;
  for (const auto& p : e.parts) {
    const Value v = eval(*p, scope);
    if (v.is_text()) {
      out += v.text();
    } else {
      out += to_text(*this, v);
    }
    check(static_cast<int64_t>(out.size()) <= limits_.bytes, "the template makes a string of more than {} bytes",
          limits_.bytes);
  }
  return text(std::move(out));
}

Value Run::eval_container(const Expression& e, Scope& scope) {
  if (e.op == Op::dict) {
    auto dict = std::make_shared<Dict>();
    for (size_t i = 0; i < e.parts.size(); i += 2) {
      Value key = eval(*e.parts[i], scope);
      check_hashable(key);
      dict->set(std::move(key), eval(*e.parts[i + 1], scope));
    }
    step(e.parts.size());
    return Value(std::shared_ptr<const Dict>(std::move(dict)));
  }
  std::vector<Value> items;
  items.reserve(e.parts.size());
  for (const auto& p : e.parts) items.push_back(eval(*p, scope));
  return list(std::move(items), e.op == Op::list ? Shape::list : Shape::tuple);
}

Value Run::eval(const Expression& e, Scope& scope) {
  const Deeper deeper(*this);
  step();
  line_ = e.line;
  switch (e.op) {
    case Op::constant:
      return e.value;
    case Op::name:
      return lookup(e.name, scope);
    case Op::attribute:
      return attribute(*this, eval(*e.parts[0], scope), e.name);
    case Op::item: {
      const Value object = eval(*e.parts[0], scope);
      return item(*this, object, eval(*e.parts[1], scope));
    }
    case Op::slice:
      return eval_slice(e, scope);
    case Op::call:
      return eval_call(e, scope);
    case Op::filter:
      return eval_filter(e, scope, nullptr);
    case Op::test: {
      const Value value = eval(*e.parts[0], scope);
      Arguments a = arguments(e, 1, scope);
      line_ = e.line;
      return Value(test(e.name, value, std::move(a)));
    }
    case Op::list:
    case Op::tuple:
    case Op::dict:
      return eval_container(e, scope);
    case Op::negate:
    case Op::plus: {
      const Value v = eval(*e.parts[0], scope);
      if (v.is_undefined()) fail("{}", v.missing());
      check(v.is_number(), "bad operand type for unary {}: '{}'", e.op == Op::negate ? '-' : '+', type_name(v));
      if (e.op == Op::plus) return v.is(Kind::boolean) ? Value(v.integer()) : v;
      return v.is(Kind::real) ? Value(-v.real()) : arithmetic(*this, Op::subtract, Value(int64_t{0}), v);
    }
    case Op::invert:
      return Value(!eval(*e.parts[0], scope).truth());
    case Op::both: {
      Value v = eval(*e.parts[0], scope);
      return v.truth() ? eval(*e.parts[1], scope) : v;
    }
    case Op::either: {
      Value v = eval(*e.parts[0], scope);
      return v.truth() ? v : eval(*e.parts[1], scope);
    }
    case Op::compare:
      return eval_compare(e, scope);
    case Op::concat:
      return eval_concat(e, scope);
    case Op::choose:
      if (eval(*e.parts[0], scope).truth()) return eval(*e.parts[1], scope);
      if (e.parts[2]) return eval(*e.parts[2], scope);
      return Value::undefined(fmt::format(
          "the inline if-expression on line {} evaluated to false and no else section was defined.", e.line));
    default: {
      const Value a = eval(*e.parts[0], scope);
      const Value b = eval(*e.parts[1], scope);
      line_ = e.line;
      return arithmetic(*this, e.op, a, b);
    }
  }
}

}  // namespace moiety::jinja
