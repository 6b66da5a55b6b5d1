"""A chat template cannot take a machine: what never ends, or grows without end, is one error; the thread goes on."""

import json
import resource
import subprocess
import sys
import threading

import pytest

from sft_core import bounds
from sft_core.errors import RecipeError, RowError
from sft_core.pack import encode_messages, load_chat_template, template_bounds
from sft_core.pack.rendering import render_conversation

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
GROW = "{%% set ns = namespace(x='ab') %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}{{ ns.x|length }}"
HOSTILE = {
    "loop": LOOP,
    "printing loop": LOOP.replace("{% endfor %}", "x{% endfor %}", 1),
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "plus": GROW % "ns.x + ns.x",
    "tilde": GROW % "ns.x ~ ns.x",
    "replace": GROW % "ns.x.replace('a', ns.x)",
    "replace filter": GROW % "ns.x|replace('a', ns.x)",
    "join": GROW % "ns.x.join([ns.x, ns.x])",
    "format": GROW % "'%s%s' % (ns.x, ns.x)",
    "lists": GROW % "[ns.x, ns.x]" + "{{ ns.x }}",
    "lists as JSON": GROW % "[ns.x, ns.x]" + "{{ ns.x|tojson }}",
    "lists joined": GROW % "[ns.x, ns.x]" + "{{ 'a' ~ ns.x }}",
    "times": "{{ 'a' * 10000000000 }}",
    "list times": "{{ ([1] * 10000000000)|length }}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "center": "{{ 'a'.center(10000000000) }}",
    "center filter": "{{ 'a'|center(10000000000) }}",
    "indent": "{{ 'a\n'|indent(10000000000) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "width": "{{ '{:10000000000}'.format(1) }}",
    "JSON": "{{ [1]|tojson(indent=10000000000) }}",
    "squares": GROW.replace("'ab'", "9") % "ns.x * ns.x",
}
SECONDS = 300
"""Bound on all of them; each takes a second here, where two seconds of CPU time are the most."""
MOST_MEGABYTES = 2_500
"""600 were measured, most of it torch."""
SCRIPT = """
import json, resource, sys
from transformers import AutoTokenizer
from sft_core.errors import RecipeError
from sft_core.pack import template_bounds
from sft_core.pack.rendering import render_conversation
template_bounds.RENDER_SECONDS = 2.0
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
said = {}
for name, template in json.loads(sys.argv[2]).items():
    try:
        render_conversation(json.loads(sys.argv[3]), tokenizer, template)
        said[name] = "rendered"
    except RecipeError as error:
        said[name] = str(error)
print(json.dumps([said, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000]))
"""


@pytest.mark.slow
def test_hostile_templates_are_one_error_each(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), json.dumps(HOSTILE), json.dumps(CHAT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
    said, megabytes = json.loads(done.stdout)
    assert said.keys() == HOSTILE.keys()
    for name, words in said.items():
        assert words.startswith("pack.chat_template: it "), (name, words)
        assert words.endswith("for a conversation of 1 short messages") or "of 2 short messages" in words, (name, words)
    assert megabytes < MOST_MEGABYTES
