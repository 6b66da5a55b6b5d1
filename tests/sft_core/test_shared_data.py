"""Every row of every real file: fetched, normalised, counted."""

from pathlib import Path

import pytest

from sft_core.account import NO_FAULT
from sft_core.artifacts import check_ledger
from sft_core.errors import SourceError
from sft_core.fetch import fetch_dataset
from sft_core.normalize import (
    MAP_FNS,
    NormalizeSource,
    normalize_dataset,
)
from sft_core.recipe import DatasetConfig, NormalizeConfig

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


class TestSharedData:
    """Real rows, in every format of XTuner's tutorial; `../shared/data/README.md` lists their oddities."""

    UNREADABLE = {"corner/broken_trailing_comma_zh.json", "corner/medical_gb18030.csv"}
    READ_BY = {
        "corner/axolotl_conversation_missingturns.json": "sharegpt",
        "corner/mixed_schema_code_zh.json": "alpaca",
        "extra/dolly_fixture.json": "dolly",
        "extra/gsm8k_train_first500.jsonl": "gsm8k",
        "extra/mlx_wikisql_text.jsonl": "pretrain",
        "medical/medical_sft_1K_sharegpt.jsonl": "sharegpt",
        "openai/cookbook_drone_training_tools.jsonl": "messages",
        "openai/llamafactory_reason_tool_use_50.jsonl": "messages",
    }
    SET_ASIDE = {
        "alpaca/stanford_alpaca_6382-9407.json": {"empty_answer": 2, "no_turns": 2},
        "alpaca/code_alpaca_2k.json": {"empty_answer": 2},
        "corner/axolotl_conversation_missingturns.json": {"empty_answer": 1},
        "corner/broken_lines_user_3.jsonl": {"missing_column": 198, "not_json": 3},
        "corner/nel_u0085_triviaqa.jsonl": {"missing_column": 120},
        "corner/oasst1_messages_nulls.jsonl": {"missing_column": 250},
        "corner/vicuna_lists.jsonl": {"wrong_type": 3},
        "extra/sql_eval_sqlite.csv": {"missing_column": 210},
        "oasst1/oa_questions_open_ended.jsonl": {"empty_answer": 159},
        "openai/azure_math_no_assistant.jsonl": {"no_assistant_turn": 378},
    }
    UNREAD = {
        "alpaca/alpaca_tiny_with_text.json": "text",
        "alpaca/gpteacher_toolformer_0.6.json": "example_input",
        "alpaca_zh/alpaca_zh_bilingual_15323-18280.jsonl": "input instruction output",
        "corner/broken_lines_user_3.jsonl": "instruction",
        "corner/nel_u0085_triviaqa.jsonl": "aliases answer context",
        "corner/oasst1_messages_nulls.jsonl": "created_date deleted detoxify emojis labels lang message_id "
        "message_tree_id parent_id rank review_count review_result role text tree_state user_id",
        "default/litgpt_longform_train.json": "source subset",
        "extra/dolly_fixture.json": "category",
        "extra/sql_eval_sqlite.csv": "db_name db_type instructions query query_category question",
        "medical/huatuo_liver_cancer.json": "id",
        "oasst1/oa_questions_complete.jsonl": "lang",
        "oasst1/oa_questions_open_ended.jsonl": "category input lang message_id output parent_id prompt question_id "
        "rank",
        "openai/xtuner_mllm_sft_text.jsonl": "id",
        "sharegpt/fastchat_dummy.json": "id",
        "tiny_codes/distillanything_train.jsonl": "teacher",
        "tiny_codes/humaneval_x_python_java_js.jsonl": "programming_language task_id",
        "tiny_codes/mbpp.jsonl": "task_id test_list",
        "tiny_codes/selfinstruct_davinci-self-instruct.jsonl": "input instruction target",
        "tiny_codes/selfinstruct_text-davinci-003.jsonl": "input instruction target",
    }

    @pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data beside this checkout")
    def test_every_row_of_every_file(self, tmp_path):
        sources = []
        for path in sorted(SHARED.glob("*/*.*")):
            name, folder = path.relative_to(SHARED).as_posix(), path.parent.name
            if name in self.UNREADABLE:
                with pytest.raises(SourceError, match=path.name):
                    fetch_dataset(DatasetConfig(path=str(path)), tmp_path / name)
                continue
            fetch_dataset(DatasetConfig(path=str(path)), tmp_path / name)
            map_fn = self.READ_BY.get(name, folder if folder in MAP_FNS else "default")
            sources.append(NormalizeSource(rows=tmp_path / name, map_fn=map_fn, name=name))
        outcome = normalize_dataset(sources, NormalizeConfig(), 0.1, 0, tmp_path / "out")
        check_ledger("normalize", outcome.ledger)
        faults = {
            name: {reason: count for reason, count in entry["set_aside"].items() if reason not in NO_FAULT}
            for name, entry in outcome.facts["datasets"].items()
        }
        assert {name: reasons for name, reasons in faults.items() if reasons} == self.SET_ASIDE
        unread = {name: entry.get("unread_columns", {}) for name, entry in outcome.facts["datasets"].items()}
        assert {name: " ".join(sorted(columns)) for name, columns in unread.items() if columns} == self.UNREAD
        left_out = outcome.ledger["rows"]["set_aside"]
        assert (left_out["near_duplicate"], left_out["repeated"]) == (229, 206)
        assert outcome.ledger["rows"]["in"] == 45878
        assert outcome.ledger["rows"]["out"] == 44115
