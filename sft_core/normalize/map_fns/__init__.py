"""The shipped map_fns: one row in, `{"conversation": [turn, ...]}` or `{"messages": [...]}` out, under XTuner's names.

In: a row (dict). Out: what XTuner 0.2.0 returns for it, wherever the row is well formed; a row that is not raises
RowError (reasons: `sft_core.normalize`). They differ from XTuner where XTuner damages data: docs/adr/0003-map-fns.md.
"""

from collections.abc import Callable

from sft_core.normalize.columns import Returned, Row
from sft_core.normalize.map_fns.dialogues import messages, oasst1, openai, prompt_completion, sharegpt, wizardlm
from sft_core.normalize.map_fns.msagent import msagent_react
from sft_core.normalize.map_fns.one_turn import (
    alpaca,
    alpaca_zh,
    arxiv,
    code_alpaca,
    colors,
    crime_kg_assitant,
    default,
    dolly,
    gsm8k,
    law_reference,
    medical,
    openorca,
    pretrain,
    sql,
    squad,
    stack_exchange,
    tiny_codes,
)

MAP_FNS_VERSION = 4
"""Raised when a shipped map_fn's output changes."""

MAP_FNS: dict[str, Callable[[Row], Returned]] = {
    function.__name__: function
    for function in (
        alpaca,
        alpaca_zh,
        arxiv,
        code_alpaca,
        colors,
        crime_kg_assitant,
        default,
        dolly,
        gsm8k,
        law_reference,
        medical,
        messages,
        msagent_react,
        oasst1,
        openai,
        openorca,
        pretrain,
        prompt_completion,
        sharegpt,
        sql,
        squad,
        stack_exchange,
        tiny_codes,
        wizardlm,
    )
}

ALIASES = {"crime_kg_assitan": "crime_kg_assitant", "crime_kg_assistant": "crime_kg_assitant"}
"""XTuner's registry key and the right spelling, for XTuner's function."""

__all__ = ["ALIASES", "MAP_FNS", "MAP_FNS_VERSION", *MAP_FNS]
