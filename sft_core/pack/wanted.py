"""What the recipe wants of a row before it is rendered: its thoughts or none (`pack.reasoning`), all answers or the
last (`pack.train_on`).

In: messages and a chat template, in whose text both stand (see `template`), so that every reader of it does the same.
Out: messages.
"""

from collections.abc import Sequence as SequenceOf
from typing import Any

from sft_core.pack.template import drops_reasoning, trains_the_last
from sft_core.pack.thoughts import drop_thoughts


def wanted_of(messages: SequenceOf[dict[str, Any]], chat_template: str) -> list[dict[str, Any]]:
    """The messages as they are trained, evaluated and certified. RowError where nothing is left of one."""
    talk: list[dict[str, Any]] = drop_thoughts(messages)[0] if drops_reasoning(chat_template) else list(messages)
    if not trains_the_last(chat_template):
        return talk
    last = max((place for place, message in enumerate(talk) if message["role"] == "assistant"), default=None)
    earlier = [message["role"] == "assistant" and place != last for place, message in enumerate(talk)]
    return [{**message, "weight": 0} if given else message for message, given in zip(talk, earlier, strict=True)]
