"""A chat template cannot take a machine: what never ends, or grows without end, is one error; the thread goes on."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sft_core.errors import RowError
from sft_core.pack import template_bounds
from sft_core.pack.rendering import render_conversation

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]
LOOP = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
GROW = (
    "{%% set ns = namespace(x='ab') %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}{{ ns.x|length }}"
)
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
    "power": "{{ 10 ** (10 ** 10) }}",
    "center": "{{ 'a'.center(10000000000) }}",
    "center filter": "{{ 'a'|center(10000000000) }}",
    "indent": "{{ 'a\n'|indent(10000000000) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "width": "{{ '{:10000000000}'.format(1) }}",
    "JSON": "{{ [1]|tojson(indent=10000000000) }}",
    "squares": GROW.replace("'ab'", "9") % "ns.x * ns.x",
}
SECONDS = 300
"""Bound on all of them; each takes a second here, where half a second of CPU time are the most."""
MOST_MEGABYTES = 2_500
"""600 were measured, most of it torch."""
SCRIPT = """
import json, resource, sys
from transformers import AutoTokenizer
from sft_core.errors import SftError
from sft_core.pack import template_bounds
from sft_core.pack.rendering import render_conversation
template_bounds.RENDER_SECONDS = 0.5
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
said = {}
for name, template in json.loads(sys.argv[2]).items():
    try:
        render_conversation(json.loads(sys.argv[3]), tokenizer, template)
        said[name] = "rendered"
    except SftError as error:
        said[name] = str(error)
print(json.dumps([said, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000]))
"""


@pytest.mark.slow
def test_hostile_templates_are_one_error_each(tiny_model: Path):
    command = [sys.executable, "-c", SCRIPT, str(tiny_model), json.dumps(HOSTILE), json.dumps(CHAT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
    said, megabytes = json.loads(done.stdout)
    assert said.keys() == HOSTILE.keys()
    for name, words in said.items():
        assert words.startswith("pack.chat_template: it "), (name, words)
        assert words.endswith("for a conversation of 1 short messages") or "of 2 short messages" in words, (name, words)
    assert megabytes < MOST_MEGABYTES


def test_a_row_that_is_too_costly_is_set_aside_and_the_next_one_is_rendered(tiny_model: Path, monkeypatch):
    monkeypatch.setattr(template_bounds, "RENDER_SECONDS", 1.0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    loop = f"{{% if messages[0]['content']|length > 5 %}}{LOOP}{{% endif %}}"
    template = loop + "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    reasons, rendered = [], []

    def work() -> None:
        for content in ("x" * 200_000, "x", "y"):
            try:
                rendered.append(render_conversation([{**CHAT[0], "content": content}], tokenizer, template)[0].text)
            except RowError as error:
                reasons.append(error.reason)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert reasons == ["template_cost"] * 3
    assert sorted(rendered) == ["user: x</s>"] * 3 + ["user: y</s>"] * 3
