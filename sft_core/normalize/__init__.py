"""Step 2, normalize: `RawDataset` and a map_fn become `Conversations`: a train side, a held-out side, a quarantine.

In: folders that fetch wrote. Out: a shard for each of fetch's (`train/part-*.parquet` and others, see `shard`; rows as
`sft_core.shard_rows.read_shards` gives them), `heldout/part-*.parquet` (columns: CONVERSATION_SCHEMA) and
`quarantine/part-00000.jsonl` (dataset, file, row_number, reason, detail, row). Why a row is set aside:

reason             what is wrong
not_utf8           a line, or half of a surrogate pair in a text, is not UTF-8
not_json           a line is not JSON
bad_csv_row        a row of a CSV has more or fewer fields than its header
missing_column     the map_fn's column is not in the row
null_value         it is there, and null
wrong_type         it is not a text (messages: not a list of messages), or the row is neither a mapping nor messages
no_turns           no turn at all: an empty list, a text without `### Human:`, alpaca's `<nooutput>`
no_assistant_turn  messages, but none is the assistant's
empty_answer       an answer is empty, blank or invisible, or the only request has none
bad_turn_order     oasst1: turns do not alternate from Human on, or text stands before the first
unknown_role       a role that the map_fn does not know (tool messages: `messages` and `sharegpt` keep them)
content_part       a content is a list, and a part of it is no text; or beside it stand images, audio or a refusal
two_thoughts       an assistant's message has two thoughts that differ, under two names
bad_thought        a thought that is no text, under a name that is not read, or on another's message
too_large          a row of over 16 MiB; its beginning is kept
unread_column      a column that is known to carry context and that the map_fn does not use (`reads`)
tool_calls         calls or tools that cannot be read, or a map_fn that has no place for them
bad_arguments      a call's arguments are no JSON object
undeclared_tool    a call of a tool that the row does not declare, though it declares tools
result_without_call a tool's message, and no call before it that it could answer
bad_mark           a mark "do not train" that is not understood: its value, its name, its place (`marks`)
all_weights_zero   answers, but none is to be trained
map_fn_error       a user's map_fn raised; the detail holds the exception
bad_conversation   a map_fn returned something of another shape
left_out           a user's map_fn returned None: left out on purpose, no fault
also_in_training   a conversation of an evaluation data set that training has too; in the quarantine, but no fault
near_duplicate     held out, but as near to a training conversation as `normalize.near_duplicates`; no fault
repeated           held out already, word for word; no fault
not_sampled        left out by the data set's `weight`; not in the quarantine, and no fault

An empty request (`input`, user message) is no fault: XTuner trains such rows, as continuation. Duplicates in training
are kept. `row_id` is a digest of the conversation's content: equal conversations have equal ids.
"""

from sft_core.normalize.check import Asked, CheckReport, check_dataset
from sft_core.normalize.conversation import (
    TEXT_ROLE,
    Conversation,
    Message,
    content_digest,
    to_conversation,
    to_messages,
)
from sft_core.normalize.dataset import STEP_VERSION, NormalizeSource, normalize_dataset
from sft_core.normalize.identity import map_fn_source
from sft_core.normalize.load import load_map_fn
from sft_core.normalize.map_fns import MAP_FNS, MAP_FNS_VERSION
from sft_core.normalize.reads import added_system, suggest_map_fns
from sft_core.normalize.tables import CONVERSATION_SCHEMA

__all__ = [
    "CONVERSATION_SCHEMA",
    "MAP_FNS",
    "MAP_FNS_VERSION",
    "STEP_VERSION",
    "TEXT_ROLE",
    "Asked",
    "CheckReport",
    "Conversation",
    "Message",
    "NormalizeSource",
    "added_system",
    "check_dataset",
    "content_digest",
    "load_map_fn",
    "map_fn_source",
    "normalize_dataset",
    "suggest_map_fns",
    "to_conversation",
    "to_messages",
]
