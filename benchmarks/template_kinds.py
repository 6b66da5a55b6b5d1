"""What the matrix of chat templates is made of: kinds of conversation, and a tokenizer for a bare template.

In: nothing, or a template's text. Out: conversations in the stored form that pack gets, in which every piece of text
holds words that occur nowhere else (`zq17k`: no template's `trim`, `tojson` or sorting changes them), which piece a
word is of, and the forms in which clients send such messages to a server; a byte-level BPE tokenizer with the special
tokens that the template names, and with Qwen's way of cutting text: white space, line ends and a space with its letter
become one token.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
Talk = tuple[list[Message], list[dict[str, Any]] | None]
SENTINEL = re.compile(r"zq\d+k|90\d{5}")
INLINE = re.compile(r"<think>(.*?)</think>\s*", re.DOTALL)


@dataclass
class Words:
    """Gives words that occur once in a conversation. `special` is a special token's string, for someone to type."""

    special: str = "</s>"
    given: int = 0
    tools: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, text: str = "") -> str:
        """A word; or `text` between two of them."""
        self.given += 1
        word = f"zq{self.given}k"
        return f"{word} {text} {self()}" if text else word

    def number(self) -> int:
        """A number that occurs once."""
        self.given += 1
        return 9_000_000 + self.given

    def call(self, **more: Any) -> dict[str, Any]:
        """A call of a function of its own, which is declared in `tools`."""
        name, number = f"look_{self()}", len(self.tools) + 1
        arguments = {f"city_{self()}": self("old town"), **more}
        kinds = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
        inside: dict[str, dict[str, Any]] = {"array": {"items": {"type": "string"}}, "object": {"properties": {}}}
        types = {key: kinds[type(value)] for key, value in arguments.items()}
        properties = {key: {"type": t, "description": "a part", **inside.get(t, {})} for key, t in types.items()}
        schema = {"type": "object", "properties": properties, "required": list(arguments)}
        function = {"name": name, "description": self("looks it up"), "parameters": schema}
        self.tools.append({"type": "function", "function": function})
        return {"type": "function", "id": f"call{number:05}", "function": {"name": name, "arguments": arguments}}

    def result(self, call: dict[str, Any]) -> Message:
        """What the function answered."""
        content = self("degrees")
        return said("tool", content) | {"tool_call_id": call["id"], "name": call["function"]["name"]}

    def user(self) -> Message:
        """A question."""
        return said("user", self("what is the time"))

    def answer(self, weight: int = 1, thought: bool = False, inline: bool = False, **more: Any) -> Message:
        """An answer, with a thought in a field of its own or in the content."""
        content = self("it is late")
        if inline:
            content = f"<think>\n{self('let me think')}\n</think>\n\n{content}"
        if thought:
            more["reasoning_content"] = self("let me think")
        return {"role": "assistant", "content": content, "weight": weight, **more}


def said(role: str, content: str) -> Message:
    """A message that is never trained."""
    return {"role": role, "content": content, "weight": None}


def turns(w: Words, count: int, system: bool = False, weights: str = "", **more: Any) -> Talk:
    """Questions and answers by turns; `weights` has a digit an answer, all 1 without."""
    messages = [said("system", w("be kind"))] if system else []
    for number in range(count):
        messages += [w.user(), w.answer(int(weights[number]) if weights else 1, **more)]
    return messages, None


def exchange(w: Words, user: str | None, answer: str | None) -> Talk:
    """A question and an answer with contents of one's own."""
    question = w.user() if user is None else said("user", user)
    return [question, w.answer() if answer is None else w.answer() | {"content": answer}], None


def calls(w: Words, number: int = 1, text: bool = False, thought: bool = False, **options: Any) -> Talk:
    """A question, a message with `number` calls, their results and an answer. Options: `rounds`, `weight` (of the
    calls), `last` (nothing behind the calls), `arguments` (further ones)."""
    messages = [w.user()]
    for _ in range(options.get("rounds", 1)):
        made = [w.call(**options.get("arguments", {})) for _ in range(number)]
        message = w.answer(options.get("weight", 1), thought, tool_calls=made)
        messages += [message if text else message | {"content": ""}, *map(w.result, made)]
    if options.get("last"):
        return messages[: -number or None], w.tools
    return [*messages, w.answer(thought=thought)], w.tools


def middle_system(w: Words) -> Talk:
    """A system message behind the first answer."""
    first, second = turns(w, 1)[0], turns(w, 1)[0]
    return [*first, said("system", w("from here on in rhyme")), *second], None


def assistant_first(w: Words, weight: int) -> Talk:
    """The assistant speaks first."""
    return [w.answer(weight), *turns(w, 1)[0]], None


def same_question(w: Words) -> Talk:
    """The user asks the same thing twice."""
    messages, _ = turns(w, 2)
    return [*messages[:2], messages[0], messages[3]], None


def nested(w: Words) -> Talk:
    """Arguments of all types, with more of them inside."""
    inner: dict[str, Any] = {f"in_{w()}": {f"k_{w()}": w("deep")}, f"of_{w()}": [w(), w.number(), True, None]}
    arguments: dict[str, Any] = {f"d_{w()}": inner, f"l_{w()}": [w("one"), w("two")], f"n_{w()}": w.number()}
    return calls(w, arguments=arguments | {f"b_{w()}": False, f"f_{w()}": 0.5, f"u_{w()}": f'{w()} Grüße "你好" \\ 🙂'})


def unused(w: Words) -> Talk:
    """Tools are declared, and nobody calls one."""
    w.call()
    return turns(w, 2)[0], w.tools


def typed(w: Words, answer: bool = False) -> Talk:
    """The user, or the answer, types what ends an answer."""
    text = f"{w()} here is {w.special} {w()} please"
    return exchange(w, *((None, text) if answer else (text, None)))


KINDS: dict[str, Callable[[Words], Talk]] = {
    "plain": lambda w: turns(w, 1),
    "system": lambda w: turns(w, 1, system=True),
    "three": lambda w: turns(w, 3),
    "system_three": lambda w: turns(w, 3, system=True),
    "middle_untrained": lambda w: turns(w, 3, weights="101"),
    "last_only": lambda w: turns(w, 3, weights="001"),
    "middle_system": middle_system,
    "assistant_first": lambda w: assistant_first(w, 1),
    "assistant_first_untrained": lambda w: assistant_first(w, 0),
    "thought": lambda w: turns(w, 1, thought=True),
    "thought_last_of_three": lambda w: ([*turns(w, 2)[0], *turns(w, 1, thought=True)[0]], None),
    "thoughts": lambda w: turns(w, 3, thought=True),
    "inline": lambda w: turns(w, 1, inline=True),
    "inlines": lambda w: turns(w, 3, inline=True),
    "call": calls,
    "call_text": lambda w: calls(w, text=True),
    "calls": lambda w: calls(w, 2),
    "thought_call": lambda w: calls(w, thought=True),
    "two_rounds": lambda w: calls(w, rounds=2),
    "call_last": lambda w: calls(w, last=True),
    "call_untrained": lambda w: calls(w, weight=0),
    "tools_unused": unused,
    "nested": nested,
    "leading_newline": lambda w: exchange(w, None, "\n" + w("it is late")),
    "leading_spaces": lambda w: exchange(w, None, "  " + w("it is late")),
    "trailing_space": lambda w: exchange(w, None, w("it is late") + " \n\n"),
    "empty_user": lambda w: exchange(w, "", None),
    "unicode": lambda w: exchange(w, w("现在几点？\n\n请说 🙂"), w("很晚了。\n第二行 🚀\n\n完") + "！"),
    "same_question": same_question,
    "typed": typed,
    "typed_answer": lambda w: typed(w, answer=True),
    "long": lambda w: turns(w, 20),
}
"""Kinds of conversation by name; each a function that makes messages and tools."""


def make_talk(kind: str, special: str) -> Talk:
    """Messages and tools of a kind."""
    return KINDS[kind](Words(special))


def words_of(value: Any) -> list[str]:
    """The sentinels in a text, or in all texts, keys and numbers of a structure."""
    return SENTINEL.findall(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def pieces_of(message: Message) -> list[tuple[str, str]]:
    """Every sentinel of a message with what it is of: `answer` (any content), `thought` or `call`."""
    content = message.get("content") or ""
    inline = "".join(INLINE.findall(content)) if message["role"] == "assistant" else ""
    thoughts = words_of(inline) + words_of(message.get("reasoning_content") or "")
    parts = {"answer": [word for word in words_of(content) if word not in thoughts], "thought": thoughts}
    parts["call"] = [word for call in message.get("tool_calls", ()) for word in words_of(call["function"])]
    return [(word, part) for part, found in parts.items() for word in found]


def client_forms(messages: list[Message]) -> Iterator[list[Message]]:
    """The forms in which clients send these messages: thoughts as stored, in `reasoning_content`, only those behind the
    last question, none; a call's arguments as an object or JSON, its empty content as "", null or absent; contents as
    text or parts. The commonest first."""
    made: set[str] = set()
    ways = (("stored", "field", "recent", "none"), (dict, str), ("", None, "absent"), (str, list))
    for thoughts, arguments, empty, contents in itertools.product(*ways):
        form = []
        asked = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        for number, message in enumerate(messages):
            message = {key: value for key, value in message.items() if key != "weight" and value is not None}
            if message["role"] == "assistant" and thoughts != "stored":
                message = thought_in_field(message)
                if thoughts == "none" or (thoughts == "recent" and number < asked):
                    message.pop("reasoning_content", None)
            if "tool_calls" in message:
                message["tool_calls"] = [with_arguments(call, arguments) for call in message["tool_calls"]]
            if contents is list and (message["content"] or "tool_calls" not in message):
                message["content"] = [{"type": "text", "text": message["content"]}]
            if "tool_calls" in message and not message["content"]:
                message["content"] = empty
                if empty == "absent":
                    del message["content"]
            form.append(message)
        key = json.dumps(form)
        if key not in made:
            made.add(key)
            yield form


def thought_in_field(message: Message) -> Message:
    """The message with a thought in its content moved to `reasoning_content`."""
    found = INLINE.match(message["content"])
    if not found:
        return dict(message)
    return message | {"content": message["content"][found.end() :], "reasoning_content": found.group(1).strip("\n")}


def with_arguments(call: dict[str, Any], kind: type) -> dict[str, Any]:
    """The call with arguments as an object, or as its JSON text."""
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False) if kind is str else function["arguments"]
    return call | {"function": function | {"arguments": arguments}}


ENDS = (
    "<|im_end|> <|eot_id|> <|eot|> <|eom_id|> <end_of_turn> <turn|> <|return|> <|call|> <|end|> <|END_OF_TURN_TOKEN|> "
    "<｜end▁of▁sentence｜> [|endofturn|] <|end_of_text|> <|endoftext|> <|end_of_turn|> "
    "<end_of_utterance> <EOS_TOKEN> </s> <eos>"
).split()
"""Tokens at which servers stop, by what models call them; the likeliest eos first."""
BEGINNINGS = "<|begin_of_text|> <｜begin▁of▁sentence｜> <|startoftext|> <BOS_TOKEN> [BOS] <bos> <s>".split()
WRITTEN = re.compile(
    r"<[|｜][^<>|｜\s{}']{1,40}[|｜]>|<\|[a-z_]+>|<[a-z_]+\|>|\[\|[a-z_]+\|\]|</?s>|\[/?[A-Z_]{3,}\]|\[gMASK\]|<sop>"
    r"|<(?:bos|eos|pad|unk|image|start_of_turn|end_of_turn|start_of_image|end_of_image|end_of_utterance|extra_id_\d|BOS_TOKEN|EOS_TOKEN"
    r"|SPECIAL_\d+)>"
)
TAGS = re.compile(r"</?(?:think|tool_call|tool_response|arg_key|arg_value)>")
"""Added tokens that are not special, as in Qwen and GLM."""
BY_ROLE = re.compile(r"""<\|['"]\s*[+~]\s*[^{}|]{1,40}?[+~]\s*['"]\|>""")
MISTRAL = ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[SYSTEM_PROMPT]", "[IMG]")
"""Beside one of these `[INST]` is a token; with Llama 2 and the first Mistral it is text."""
CUT = r"(?i:'[stmd]|'re|'ve|'ll)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def special_tokens(template: str) -> tuple[list[str], str | None, str]:
    """The special tokens that a template's text names, its bos (None if it has none) and its eos, by a guess."""
    template = re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)
    found = list(dict.fromkeys(WRITTEN.findall(template)))
    if not any(mark in found for mark in MISTRAL):
        found = [token for token in found if token[0] != "[" or token[1] == "|" or token in ("[gMASK]", "[BOS]")]
    if BY_ROLE.search(template):
        found += ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    bos = next((token for token in BEGINNINGS if token in found), "<s>" if "bos_token" in template else None)
    eos = next((token for token in ENDS if token in found), "</s>")
    if eos == "<|end|>" and "eos_token" in template:  # Phi-3: ends with one, and then with the other
        eos = "<|endoftext|>"
    return list(dict.fromkeys([*found, *filter(None, [bos, eos])])), bos, eos


def bare_tokenizer(template: str) -> Any:
    """A tokenizer for a template that came without one."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    space, line = "Ġ", "Ċ"
    merges = [(line, line), (line + line, line), (space, space), *((end, line) for end in ".:>}]|")]
    merges += [(space, letter) for letter in map(chr, [*range(65, 91), *range(97, 123)])]
    for word in "the it is late what time let me think assistant user system".split():
        for start in (word[0], space + word[0]):
            for number in range(1, len(word)):
                merges.append((start + word[1:number], word[number]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*alphabet, *map("".join, merges)]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(dict.fromkeys(merges))))
    cut = pre_tokenizers.Split(Regex(CUT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special, bos, eos = special_tokens(template)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tags = [tag for tag in dict.fromkeys([*TAGS.findall(template), "<think>", "</think>"]) if tag not in special]
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
