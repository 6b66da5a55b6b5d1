"""Marks "do not train": every name, every spelling, through every map_fn that has a place for them."""

import doctest

import pytest

from sft_core.errors import RowError
from sft_core.normalize import MAP_FNS, marks, to_conversation

NAMES = "weight train training trained trainable train_on_turn loss loss_weight loss_mask output_with_loss".split()
YES = [1, True, 1.0, "1", "1.0", "true", "True", "TRUE", " true"]
NO = [0, False, 0.0, "0", "0.0", "false", "False", "FALSE", -0.0]
ODD = [0.5, 2, -1, "maybe", "yes", "", [], [1], {"a": 1}, float("nan"), float("inf"), "0.5", "None"]
OTHERS = [
    "train_detail",
    "training_detail",
    "loss_scale",
    "lossWeight",
    "trainOnTurn",
    "no_train",
    "mask",
    "ignore_loss",
]
OTHERS += ["supervised", "sample_weight", "weights", "loss-mask", "learnable"]


def chat(answer: dict, ask: dict = {}, roles: tuple[str, str] = ("user", "assistant")) -> list[dict]:  # noqa: B006
    return [{"role": roles[0], "content": "A", **ask}, {"role": roles[1], "content": "B", **answer}, LAST[roles[1]]]


def shared(answer: dict, ask: dict = {}, roles: tuple[str, str] = ("human", "gpt")) -> list[dict]:  # noqa: B006
    key = {"content": "value", "role": "from"}
    return [{key.get(name, name): value for name, value in message.items()} for message in chat(answer, ask, roles)]


LAST = {who: {"role": who, "content": "C"} for who in ("assistant", "gpt")}
ROWS = {
    "messages": lambda answer, ask={}: {"messages": chat(answer, ask)},  # noqa: B006
    "openai": lambda answer, ask={}: {"messages": chat(answer, ask)},  # noqa: B006
    "sharegpt": lambda answer, ask={}: {"conversations": shared(answer, ask)},  # noqa: B006
    "wizardlm": lambda answer, ask={}: {"conversations": shared(answer, ask)},  # noqa: B006
    "msagent_react": lambda answer, ask={}: {  # noqa: B006
        "conversations": shared(answer, ask, ("user", "assistant"))
    },
    "default": lambda answer, ask={}: {  # noqa: B006
        "conversation": [{"input": "A", "output": "B", **answer}, {"input": "", "output": "C"}]
    },
}
READERS = list(ROWS)
WITH_REQUESTS = [name for name in READERS if name != "default"]


def weights(name: str, answer: dict, **ask: object) -> list[int]:
    messages = to_conversation(MAP_FNS[name](ROWS[name](answer, ask))).messages
    return [message["weight"] for message in messages if message["role"] == "assistant"]


def refusal(name: str, answer: dict, **ask: object) -> RowError:
    with pytest.raises(RowError) as caught:
        weights(name, answer, **ask)
    return caught.value


@pytest.mark.parametrize("map_fn", READERS)
class TestEveryMapFn:
    @pytest.mark.parametrize("name", NAMES)
    def test_all_spellings_mean_the_same(self, map_fn, name):
        for value in YES:
            assert weights(map_fn, {name: value}) == [1, 1], value
        for value in NO:
            assert weights(map_fn, {name: value}) == [0, 1], value
        assert weights(map_fn, {name: None}) == [1, 1]

    @pytest.mark.parametrize("name", NAMES)
    def test_other_values_are_refused(self, map_fn, name):
        for value in ODD:
            error = refusal(map_fn, {name: value})
            assert (error.reason, name in error.detail) == ("bad_mark", True), value

    def test_masked_is_the_other_way_round(self, map_fn):
        assert [weights(map_fn, {"masked": value})[0] for value in (True, "1", False, 0.0, None)] == [0, 0, 1, 1, 1]
        assert refusal(map_fn, {"masked": "x"}).reason == "bad_mark"

    @pytest.mark.parametrize("name", OTHERS)
    def test_names_that_are_not_known_are_refused(self, map_fn, name):
        for value in (0, 1, True, "x", [{"begin_offset": 0, "end_offset": 1, "train": False}]):
            assert refusal(map_fn, {name: value}).reason == "bad_mark", value
        assert weights(map_fn, {name: None}) == [1, 1]

    def test_marks_that_differ(self, map_fn):
        assert refusal(map_fn, {"weight": 1, "train": False}).reason == "bad_mark"
        assert weights(map_fn, {"weight": 0, "train": "false", "masked": True, "loss": None}) == [0, 1]

    @pytest.mark.parametrize("name", ["constraint", "glossary", "weightlifting", "id", "name", "timestamp", "model"])
    def test_other_keys_are_no_marks(self, map_fn, name):
        assert weights(map_fn, {name: "x"}) == [1, 1]


@pytest.mark.parametrize("map_fn", WITH_REQUESTS)
class TestRequests:
    @pytest.mark.parametrize("name", [*NAMES, "masked"])
    def test_a_request_may_be_marked_as_not_trained_only(self, map_fn, name):
        no, yes = (YES, NO) if name == "masked" else (NO, YES)
        for value in [*no, None]:
            assert weights(map_fn, {}, **{name: value}) == [1, 1], value
        for value in [*yes, *ODD]:
            assert refusal(map_fn, {}, **{name: value}).reason == "bad_mark", value

    def test_names_that_are_not_known(self, map_fn):
        assert refusal(map_fn, {}, train_detail=[1]).reason == "bad_mark"


@pytest.mark.parametrize("map_fn", ["messages", "openai", "sharegpt"])
class TestParts:
    def parts(self, map_fn: str, *marked: dict) -> dict:
        key = "value" if map_fn == "sharegpt" else "content"
        return {key: [{"type": "text", "text": "B", **mark} for mark in marked]}

    def test_parts_that_agree(self, map_fn):
        for mark in ({"weight": 0}, {"train": "False"}, {"loss_weight": 0.0}):
            assert weights(map_fn, self.parts(map_fn, mark)) == [0, 1]
            assert weights(map_fn, self.parts(map_fn, mark, {"train": 0})) == [0, 1]
            assert weights(map_fn, {**self.parts(map_fn, mark), "weight": 0}) == [0, 1]
        assert weights(map_fn, self.parts(map_fn, {"weight": 1}, {})) == [1, 1]

    def test_parts_that_do_not(self, map_fn):
        for marked in ([{"weight": 0}, {"weight": 1}], [{"weight": 0}, {}], [{"train": "x"}], [{"train_detail": [1]}]):
            assert refusal(map_fn, self.parts(map_fn, *marked)).reason == "bad_mark", marked
        assert refusal(map_fn, {**self.parts(map_fn, {"weight": 0}), "weight": 1}).reason == "bad_mark"

    def test_parts_of_a_request(self, map_fn):
        assert weights(map_fn, {}, **self.parts(map_fn, {"weight": 0})) == [1, 1]
        assert refusal(map_fn, {}, **self.parts(map_fn, {"weight": 1})).reason == "bad_mark"


def test_marks_on_a_call():
    call = {"name": "f", "arguments": {"weight": 0.5}}
    assert weights("messages", {"tool_calls": [call]}) == [1, 1]
    assert weights("messages", {"tool_calls": [{**call, "train": False}]}) == [0, 1]
    assert refusal("messages", {"tool_calls": [{**call, "train_on_turn": 0.5}]}).reason == "bad_mark"


def test_a_turn_of_xtuner_s_plain_text():
    turn = {"input": "", "output": "T", "need_eos_token": False}
    with pytest.raises(RowError, match="all_weights_zero"):
        to_conversation({"conversation": [{**turn, "train": 0}]})


def test_doctests():
    assert doctest.testmod(marks).failed == 0
