"""The matrix of chat templates: it calls right sequences exact, and finds every fault that was put into them."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import templates
from benchmarks.template_kinds import KINDS, bare_tokenizer, client_forms, make_talk, special_tokens
from benchmarks.templates import Subject, Verdict, judge, line_of
from sft_core.errors import RowError
from sft_core.pack import IGNORE_INDEX, Sequence

TEMPLATE = (
    "{% for t in tools or [] %}{{ '<|tool|>' + (t | tojson) + '<|im_end|>\\n' }}{% endfor %}"
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
END = "<|im_end|>"


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject("own", TEMPLATE, bare_tokenizer(TEMPLATE), {})


def right(messages: Any, tokenizer: Any, template: str, tools: Any = None, cloak: bool = True) -> list[Sequence]:
    """What TEMPLATE makes of a conversation, piece by piece. Without `cloak` a typed special token is one."""
    ids: list[int] = []
    labels: list[int] = []

    def add(text: str, trained: bool = False) -> None:
        new = tokenizer(text, add_special_tokens=False).input_ids
        ids.extend(new)
        labels.extend(new if trained else [IGNORE_INDEX] * len(new))

    for tool in tools or ():
        add(f"<|tool|>{json.dumps(tool, ensure_ascii=False)}{END}\n")
    for m in messages:
        trained, thought = m["role"] == "assistant" and m["weight"] != 0, m.get("reasoning_content")
        add(f"<|{m['role']}|>")
        body = (f"<think>{thought}</think>" if thought else "") + m["content"]
        for number, part in enumerate(body.split(END)):
            for piece in (END if cloak else [END]) if number else ():  # letter by letter it is text
                add(piece, trained)
            add(part, trained)
        for call in m.get("tool_calls", ()):
            add(f"<tool_call>{json.dumps(call['function'], ensure_ascii=False)}</tool_call>", trained)
        add(END, trained)
        add("\n")
    return [Sequence(ids, labels)]


def verdict(subject: Subject, kind: str, encode: Any) -> Verdict:
    return judge(subject, *make_talk(kind, subject.tokenizer.eos_token), encode)


@pytest.mark.parametrize("kind", KINDS)
def test_right_sequences_are_exact(subject: Subject, kind: str) -> None:
    found = verdict(subject, kind, right)
    assert (found.outcome, found.detail) == ("exact", "")
    assert found.factor is not None
    assert 1.0 <= found.factor < 1.5


def edited(change: Any) -> Any:
    """An encoder that changes what `right` makes; `change` gets the sequence, and where its labels begin and end."""

    def encode(*given: Any) -> list[Sequence]:
        (sequence,) = right(*given)
        trained = [at for at, label in enumerate(sequence.labels) if label != IGNORE_INDEX]
        change(sequence, trained[0], trained[-1])
        return [sequence]

    return encode


def label(sequence: Sequence, at: int, trained: bool = True) -> None:
    sequence.labels[at] = sequence.input_ids[at] if trained else IGNORE_INDEX


def other(change: Any) -> Any:
    """An encoder of other messages than it was given."""
    return lambda messages, *rest: right(change(messages), *rest)


def without(key: str) -> Any:
    return other(lambda messages: [{k: v for k, v in m.items() if k != key} for m in messages])


WRONG = {
    "label later": ("inline", edited(lambda s, first, last: label(s, first, False)), {"prompt_differs"}),
    "label before": ("plain", edited(lambda s, first, last: label(s, first - 1)), {"prompt_differs"}),
    "system gone": ("system", other(lambda m: m[1:]), {"context_lost", "prompt_differs"}),
    "answer gone": ("plain", other(lambda m: [m[0], m[1] | {"content": "so"}]), {"answer_lost"}),
    "answer cut": ("plain", edited(lambda s, first, last: label(s, last - 1, False)), {"answer_lost", "hole"}),
    "thought gone": ("thought", without("reasoning_content"), {"thought_lost"}),
    "call gone": ("call", without("tool_calls"), {"call_lost", "context_lost", "prompt_differs"}),
    "all trained": ("middle_untrained", other(lambda m: [x | {"weight": 1} for x in m]), {"trained_foreign"}),
    "opening": ("system", edited(lambda s, first, last: label(s, 0)), {"trained_foreign"}),
    "question": ("plain", edited(lambda s, first, last: label(s, 2)), {"trained_foreign"}),
    "no end": ("plain", edited(lambda s, first, last: label(s, last, False)), {"no_stop"}),
    "a tag is no end": ("call_last", edited(lambda s, first, last: label(s, last, False)), {"no_stop"}),
    "behind the end": ("plain", edited(lambda s, first, last: label(s, last + 1)), {"trailing"}),
    "both times": ("plain", lambda *given: right(*given) * 2, {"twice"}),
    "not all": ("plain", edited(lambda s, first, last: label(s, first + 5, False)), {"hole"}),
    "other label": ("plain", edited(lambda s, first, last: s.labels.__setitem__(last, 3)), {"label_differs"}),
    "answer types": ("typed_answer", partial(right, cloak=False), {"typed_control"}),
    "user types": ("typed", partial(right, cloak=False), {"typed_control", "prompt_differs"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_sequences_are_silent_faults(subject: Subject, name: str) -> None:
    kind, encode, faults = WRONG[name]
    found = verdict(subject, kind, encode)
    assert (found.outcome, set(found.faults)) == ("silent", faults), found.detail


def test_refused_and_crashed(subject: Subject) -> None:
    def refuse(*given: Any) -> list[Sequence]:
        raise RowError("no", "why")

    def crash(*given: Any) -> list[Sequence]:
        raise KeyError("x")

    assert verdict(subject, "plain", refuse) == Verdict("refused", ("no",), "why")
    assert verdict(subject, "plain", crash).outcome == "crash"


def test_a_template_that_opens_no_conversation_has_no_prompt_for_it(subject: Subject) -> None:
    needy = Subject("needy", "{% if messages[0].role %}{% endif %}" + TEMPLATE, subject.tokenizer, {})
    assert verdict(needy, "assistant_first", right).faults == ("no_prompt",)


def test_a_sequence_a_turn_is_exact_and_costly(subject: Subject) -> None:
    def each(messages: Any, *rest: Any) -> list[Sequence]:
        return [
            right([m | {"weight": int(i == t)} for i, m in enumerate(messages[: t + 1])], *rest)[0]
            for t in range(1, len(messages), 2)
        ]

    found = verdict(subject, "long", each)
    assert found.outcome == "exact"
    assert "COSTLY 10" in line_of("own", True, {"long": found})


def test_clients_may_drop_thoughts_and_send_arguments_as_json() -> None:
    messages, _ = make_talk("inlines", "</s>")
    forms = list(client_forms(messages[:2]))
    assert forms[0][1]["content"].startswith("<think>")
    assert any(form[1].get("reasoning_content", "").startswith("zq") for form in forms)
    assert any("think" not in json.dumps(form) for form in forms)
    calls = [form[1] for form in client_forms(make_talk("call", "</s>")[0][:2])]
    assert {type(call["tool_calls"][0]["function"]["arguments"]) for call in calls} == {dict, str}
    assert {call.get("content", "absent") for call in calls} == {"", None, "absent"}


def test_tokenizer_of_a_bare_template() -> None:
    assert special_tokens("<|user|>x<|end|>{{ eos_token }}") == (
        ["<|user|>", "<|end|>", "<|endoftext|>"],
        None,
        "<|endoftext|>",
    )
    tokenizer = bare_tokenizer("{{ bos_token }}[INST] <think> </think> [/INST]</s>")
    assert tokenizer.tokenize("a\n\nb  the<think></s>[INST]")[:7] == ["a", "ĊĊ", "b", "Ġ", "Ġthe", "<think>", "</s>"]
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    assert special == {"</s>", "<s>"}


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    (tmp_path / "not.jinja").write_text("FROM python")
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["templates.py", str(tmp_path), "--only", "plain", "--json", str(out)])
    assert templates.main() == 0
    assert json.loads(out.read_text())["templates"]["own"]["plain"]["outcome"] == "exact"
    assert "not.jinja: skipped" in capsys.readouterr().out
