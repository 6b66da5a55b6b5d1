"""Is what is trained what a row says and what a server will feed? `python benchmarks/templates.py FOLDER...`

In: folders of chat templates (`.jinja`), or of tokenizers (tokenizer.json with a template). Out: a table, template by
template, of what `encode_conversation` makes of the kinds of conversation in template_kinds.py, judged from `input_ids`
and `labels` alone. `exact` is when, for every trained turn,

    its words (content, thought, calls' names, keys and values) are labelled once, and nothing of any other piece;
    the ids before its first label are those that transformers' own `apply_chat_template` makes of the messages before
        it with `add_generation_prompt`, in one of the forms in which clients send them (`client_forms`);
    those ids hold all words of the messages before it and of the tools; thoughts of earlier answers may be gone;
    all from its first label to its last is labelled; the last is a special token or eos, and behind the turn's words
        no token that stops a server (`ENDS`, eos) is followed by further labels.

`refused` is an SftError, `crash` any other exception; everything else is `silent`, with its faults. A special token
that somebody typed must be text: for such messages the text before the first label is compared, its special tokens
and its last ids. A turn that opens a conversation is held against the prompt of no messages; `no_prompt` is where a
template makes none. `strftime_now(...)` in a template is put to a constant first: what a date does is not judged here.
White space that a template trims from an answer is no fault. COSTLY: the long talk makes so many times the tokens of
its one whole rendering.
"""

import argparse
import inspect
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.template_kinds import (
    ENDS,
    KINDS,
    SENTINEL,
    Message,
    bare_tokenizer,
    client_forms,
    make_talk,
    pieces_of,
    words_of,
)

IGNORE_INDEX = -100
COSTLY = 1.5
OUTCOMES = ("exact", "refused", "silent", "crash")
LOST = {"answer": "answer_lost", "thought": "thought_lost", "call": "call_lost"}
DATE = re.compile(r"strftime_now\(\s*(?:'[^']*'|\"[^\"]*\"|\w+)\s*\)")
Tools = list[dict[str, Any]] | None
Encode = Callable[..., list[Any]]
Fault = tuple[str, str]


@dataclass(frozen=True)
class Verdict:
    """What became of one kind with one template. `factor`: tokens of all sequences over those of the whole talk."""

    outcome: str
    faults: tuple[str, ...] = ()
    detail: str = ""
    factor: float | None = None


@dataclass(frozen=True)
class Subject:
    """A template with its tokenizer, and what else it is rendered with."""

    name: str
    template: str
    tokenizer: Any
    kwargs: dict[str, Any]

    def render(self, messages: list[Message], tools: Tools, prompt: bool) -> str | None:
        """The text that transformers makes of it; None if the template refuses."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [messages],  # in a list: transformers takes no single conversation without messages
                    tools=tools,
                    chat_template=self.template,
                    add_generation_prompt=prompt,
                    tokenize=False,
                    **self.kwargs,
                )[0]
            )
        except Exception:  # noqa: BLE001 - whatever a template raises
            return None

    def ids(self, text: str) -> list[int]:
        """Token ids of a rendered text, as `apply_chat_template` makes them."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special ones too."""
        return str(self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False))

    def special(self, names: Iterable[str] | None = None) -> set[int]:
        """Ids of special tokens, or of those of these names, and eos."""
        added = {
            number: token.content for number, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        return {number for number, name in added.items() if not names or name in names} | {self.tokenizer.eos_token_id}


class Sight:
    """A sequence as text: where words stand in it, and what of it is labelled."""

    def __init__(self, subject: Subject, sequence: Any) -> None:
        self.ids, self.labels = list(sequence.input_ids), list(sequence.labels)
        cuts = [subject.decode([token]) for token in self.ids]
        owners = [number for number, cut in enumerate(cuts) for _ in cut]
        found = SENTINEL.finditer("".join(cuts))
        self.words = [(m.group(), owners[m.start()], owners[m.end() - 1] + 1) for m in found]
        self.trained = [spot for spot in self.words if all(map(self.labelled, range(*spot[1:])))]
        self.touched = {spot[0] for spot in self.words if any(map(self.labelled, range(*spot[1:])))}

    def region(self, own: set[str]) -> tuple[list[int], int, int]:
        """Labelled tokens of the turn that these words are of: those between other messages' words; where its last word
        is over, and where the next message's first begins."""
        spots = [spot for spot in self.trained if spot[0] in own]
        begin, end = min(spot[1] for spot in spots), max(spot[2] for spot in spots)
        others = [spot for spot in self.words if spot[0] not in own]
        before = max((spot[2] for spot in others if spot[1] < begin), default=0)
        behind = min((spot[1] for spot in others if spot[1] >= end), default=len(self.ids))
        return [at for at in range(before, behind) if self.labelled(at)], end, behind

    def labelled(self, at: int) -> bool:
        """Whether token `at` is trained."""
        return bool(self.labels[at] != IGNORE_INDEX)


def judge(subject: Subject, messages: list[Message], tools: Tools, encode: Encode) -> Verdict:
    """Encode a conversation, and hold the outcome against what the row says and what transformers would feed."""
    from sft_core.errors import RowError, SftError

    more = {"template_kwargs": subject.kwargs} if "template_kwargs" in inspect.signature(encode).parameters else {}
    try:
        sequences = encode(messages, subject.tokenizer, subject.template, tools, **more)
    except RowError as error:
        return Verdict("refused", (error.reason,), error.detail)
    except SftError as error:
        return Verdict("refused", (type(error).__name__,), str(error))
    except Exception as error:  # noqa: BLE001 - that is what it looks for
        return Verdict("crash", (type(error).__name__,), str(error))
    faults: dict[str, str] = {}
    for fault, where in find_faults(subject, messages, tools, [Sight(subject, sequence) for sequence in sequences]):
        faults.setdefault(fault, where)
    whole = next(filter(None, (subject.render(form, tools, False) for form in client_forms(messages))), None)
    factor = sum(len(s.input_ids) for s in sequences) / len(subject.ids(whole)) if whole else None
    details = "; ".join(f"{fault}: {detail}" for fault, detail in faults.items())
    return Verdict("silent" if faults else "exact", tuple(sorted(faults)), details, factor)


def find_faults(subject: Subject, messages: list[Message], tools: Tools, sights: list[Sight]) -> Iterator[Fault]:
    """All faults by name, with where."""
    trained = [turn for turn, message in enumerate(messages) if is_trained(message)]
    own = {word for turn in trained for word, _ in pieces_of(messages[turn])}
    for sight in sights:
        if any(label not in (IGNORE_INDEX, token) for token, label in zip(sight.ids, sight.labels, strict=True)):
            yield "label_differs", "a label is not the token's id"
        if foreign := sight.touched - own:
            yield "trained_foreign", " ".join(sorted(foreign))
        yield from typed_faults(subject, messages, sight)
    unclaimed = [{at for at in range(len(sight.ids)) if sight.labelled(at)} for sight in sights]
    lost = False
    counts = Counter(word for sight in sights for word, _, _ in sight.trained)
    for turn in trained:
        pieces = pieces_of(messages[turn])
        for word, part in pieces:
            if counts[word] != 1:
                yield ("twice" if counts[word] else LOST[part]), f"message {turn}: {word}, {counts[word]} times"
        words = {word for word, _ in pieces}
        homes = [number for number, sight in enumerate(sights) if words & {word for word, _, _ in sight.trained}]
        if len(homes) > 1:
            yield "twice", f"message {turn} is trained in {len(homes)} sequences"
        for home in homes:
            unclaimed[home] -= set(sights[home].region(words)[0])
            yield from turn_faults(subject, messages[: turn + 1], tools, sights[home])
        lost |= not homes
    if not lost and (stray := [(number, sorted(left)) for number, left in enumerate(unclaimed) if left]):
        number, left = stray[0]
        yield "trained_foreign", f"in no answer: {subject.decode([sights[number].ids[at] for at in left])!r}"


def turn_faults(subject: Subject, messages: list[Message], tools: Tools, sight: Sight) -> Iterator[Fault]:
    """Faults of the last message, which is trained in `sight`: what stands before it, holes in it, how it ends."""
    turn = len(messages) - 1
    own = {word for word, _ in pieces_of(messages[-1])}
    labels, end, behind = sight.region(own)
    first, last = labels[0], labels[-1]
    if len(labels) <= last - first:
        yield "hole", f"message {turn}: {subject.decode(sight.ids[first : last + 1])!r} has untrained tokens in it"
    if all(subject.render(form, tools, True) is None for form in client_forms(messages[:-1])):
        yield "no_prompt", f"message {turn}: the template refuses the messages before it"
    elif difference := prompt_difference(subject, messages[:-1], tools, sight.ids[:first]):
        yield "prompt_differs", f"message {turn}: {difference}"
    seen = Counter(word for word, _, stop in sight.words if stop <= first)
    context = Counter(w for m in messages[:-1] for w in {w for w, part in pieces_of(m) if part != "thought"})
    context.update({word for tool in tools or () for word in words_of(tool)})
    if missing := context - seen:
        yield "context_lost", f"message {turn}: not before it: {' '.join(sorted(missing))}"
    stops = [at for at in range(end, behind) if sight.ids[at] in subject.special(ENDS)]
    tail = subject.decode(sight.ids[end : last + 3])
    if stops and last > stops[0]:
        yield "trailing", f"message {turn}: {tail!r} goes on behind its end"
    elif sight.ids[last] not in subject.special() or (stops and last < stops[0]):
        yield "no_stop", f"message {turn}: ends with {subject.decode(sight.ids[max(first, last - 3) : last + 1])!r}"


def prompt_difference(subject: Subject, messages: list[Message], tools: Tools, ids: list[int]) -> str:
    """Empty if a server would feed `ids` for the messages in one of their forms; else how they differ."""
    typed = typed_in(subject, messages)
    near, served = -1, ""
    for form in client_forms(messages):
        text = subject.render(form, tools, True)
        if text is None:
            continue
        if typed:
            if not (served := typed_difference(subject, form, tools, text, ids)):
                return ""
            near = 0
            continue
        feed = subject.ids(text)
        if feed == ids:
            return ""
        same = next((i for i, (a, b) in enumerate(zip(feed, ids, strict=False)) if a != b), min(len(feed), len(ids)))
        if same > near:
            near, served = same, repr(subject.decode(feed[max(0, same - 3) : same + 12]))
    return f"trained behind {subject.decode(ids[max(0, near - 3) : near + 12])!r}, served {served}"


def typed_in(subject: Subject, messages: list[Message]) -> list[str]:
    """Special tokens' strings that somebody typed into the messages."""
    written = json.dumps(messages, ensure_ascii=False)
    special = [token.content for token in subject.tokenizer.added_tokens_decoder.values() if token.special]
    return [string for string in special if string in written]


def typed_difference(subject: Subject, form: list[Message], tools: Tools, text: str, ids: list[int]) -> str:
    """Like `prompt_difference`, for one form in which special tokens are typed and rendered as `text`: its characters
    must be those of `ids`; special tokens, and the last three ids, those of the same with other words typed."""
    other = json.dumps(form)
    for string in typed_in(subject, form):
        other = other.replace(json.dumps(string)[1:-1], "typed")
    feed = subject.ids(subject.render(json.loads(other), tools, True) or "")
    got, wanted = ([token for token in some if token in subject.special()] for some in (ids, feed))
    exact = subject.decode(subject.ids(text)) == text  # not so where a tokenizer adds or drops a space
    same = subject.decode(ids) == text if exact else subject.decode(ids).split() == text.split()
    return "" if same and got == wanted and ids[-3:] == feed[-3:] else f"{text!r}, special tokens {wanted}, not {got}"


def typed_faults(subject: Subject, messages: list[Message], sight: Sight) -> Iterator[Fault]:
    """Special tokens that stand between a message's words and were typed there."""
    spots = {word: (begin, end) for word, begin, end in sight.words}
    for turn, message in enumerate(messages):
        if typed_in(subject, [message]):
            words = [word for word in words_of(message["content"]) if word in spots]
            for one, next_one in itertools.pairwise(words):
                if found := subject.special().intersection(sight.ids[spots[one][1] : spots[next_one][0]]):
                    yield "typed_control", f"message {turn}: {subject.decode(list(found))!r} is a control token"


def is_trained(message: Message) -> bool:
    """Whether it is an answer with a weight."""
    return message["role"] == "assistant" and message.get("weight") != 0


def subjects_in(folder: Path, kwargs: dict[str, Any]) -> Iterator[Subject]:
    """What is in a folder: its tokenizer's templates, or template files and folders of tokenizers."""
    if (folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        own = tokenizer.chat_template or {}
        for name, text in (own if isinstance(own, dict) else {"": own}).items():
            yield Subject(f"{folder.name}:{name}".rstrip(":"), undated(text), tokenizer, kwargs)
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (path / "tokenizer.json").is_file():
            yield from subjects_in(path, kwargs)
        elif path.suffix in (".jinja", ".jinja2"):
            text = path.read_text("utf-8")
            if "messages" in text:
                yield Subject(path.stem, undated(text), bare_tokenizer(text), kwargs)
            else:
                print(f"{path.name}: skipped, it is no chat template: `messages` does not occur")


def undated(template: str) -> str:
    """The template with a constant for every date that it asks for."""
    return DATE.sub("'26 Jul 2024'", template)


def is_plain_exact(subject: Subject, verdicts: dict[str, Verdict]) -> bool:
    """Whether plain exchanges are exact: one, three, and with a system message where the template knows such."""
    messages, _ = make_talk("system", subject.tokenizer.eos_token)
    text = subject.render(messages[:-1], None, True) or ""
    wanted = ["plain", "three"] + ["system"] * (words_of(messages[0])[0] in text)
    return all(verdicts[kind].outcome == "exact" for kind in wanted if kind in verdicts)


def line_of(name: str, plain: bool, verdicts: dict[str, Verdict]) -> str:
    """One template: counts, and silent kinds by their faults."""
    counts = Counter(verdict.outcome for verdict in verdicts.values())
    groups: dict[str, list[str]] = {}
    for kind, verdict in verdicts.items():
        if verdict.outcome in ("silent", "crash"):
            groups.setdefault("+".join(verdict.faults), []).append(kind)
    faults = "; ".join(f"{faults}: {' '.join(kinds)}" for faults, kinds in groups.items())
    long = verdicts.get("long")
    costly = f" COSTLY {long.factor:.1f}" if long and long.factor and long.factor > COSTLY else ""
    return f"{name:55.55} {'yes' if plain else 'NO':5} {figures(counts)}{costly}  {faults}".rstrip()


def figures(counts: Counter[str]) -> str:
    """Counts of the outcomes, in order."""
    return " ".join(f"{counts[outcome]:7}" for outcome in OUTCOMES)


def main() -> int:
    """Print the table; 1 if anything is silent or crashes."""
    from sft_core.pack import encode_conversation

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of templates or of tokenizers")
    parser.add_argument("--only", action="append", choices=KINDS, metavar="KIND", help=f"one of {', '.join(KINDS)}")
    parser.add_argument(
        "--template-kwargs", type=json.loads, default={}, metavar="JSON", help="such as enable_thinking"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all verdicts there")
    parser.add_argument("--details", action="store_true", help="say why, for all that is not exact")
    options = parser.parse_args()
    table: dict[str, dict[str, Verdict]] = {}
    plain: dict[str, bool] = {}
    heads = " ".join(f"{outcome:>7}" for outcome in OUTCOMES)
    print(f"{'template':55} plain {heads}  faults: kinds")
    for subject in itertools.chain.from_iterable(
        subjects_in(folder, options.template_kwargs) for folder in options.folders
    ):
        verdicts = {}
        for kind in options.only or KINDS:
            messages, tools = make_talk(kind, subject.tokenizer.eos_token)
            verdicts[kind] = judge(subject, messages, tools, encode_conversation)
        table[subject.name], plain[subject.name] = verdicts, is_plain_exact(subject, verdicts)
        print(line_of(subject.name, plain[subject.name], verdicts), flush=True)
        for kind, verdict in verdicts.items():
            if options.details and verdict.outcome != "exact":
                print(f"    {kind} {verdict.outcome} {'+'.join(verdict.faults)}: {verdict.detail}")
    print()
    totals: Counter[str] = Counter()
    for kind in options.only or KINDS:
        found = [verdicts[kind] for verdicts in table.values()]
        counts = Counter(verdict.outcome for verdict in found)
        faults = Counter(
            fault for verdict in found if verdict.outcome in ("silent", "crash") for fault in verdict.faults
        )
        totals += counts
        print(f"{kind:61} {figures(counts)}  {', '.join(f'{n} {fault}' for fault, n in faults.most_common())}".rstrip())
    print(f"{'total':61} {figures(totals)}")
    print(f"plain exchanges exact: {sum(plain.values())} of {len(plain)} templates")
    if options.json:
        every = {name: {kind: asdict(verdict) for kind, verdict in kinds.items()} for name, kinds in table.items()}
        options.json.write_text(json.dumps({"totals": totals, "plain": plain, "templates": every}, indent=1))
    return int(totals["silent"] + totals["crash"] > 0)


if __name__ == "__main__":
    sys.exit(main())
