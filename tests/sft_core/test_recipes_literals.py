"""Reading values out of Python text: what is known, what is not, and that nothing is run."""

from pathlib import Path

import pytest

from sft_core.errors import RecipeError
from sft_core.recipe.xtuner import import_config
from sft_core.recipe.xtuner.config import read_config
from sft_core.recipe.xtuner.literals import Symbol, Unread

MODEL = "model = dict(llm=dict(pretrained_model_name_or_path='base'))\n"
DATA = (
    "train_dataset = dict(type='xtuner.dataset.process_hf_dataset', max_length=64, dataset_map_fn={map_fn},\n"
    "    dataset=dict({loader}), template_map_fn=dict(type='f', template={template}))\n"
)


def config(folder: Path, text: str) -> Path:
    path = folder / "config.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x = 1 + 2 * 3 - 4 / 8", 6.5),
        ("x = int(2048 - (336 / 14) ** 2)", 1472),
        ("x = -1", -1),
        ("a = 2\na *= 3\nx = a", 6),
        ("x = 'a' + 'b'", "ab"),
        ("x: int = 5", 5),
        ("a = b = 7\nx = a + b", 14),
        ("a = dict(k=1)\nx = dict(a, j=2, **{'l': 3})", {"k": 1, "j": 2, "l": 3}),
        ("x = dict(k=dict(j=1))\nx['k']['j'] = 2\nx.k.i = 3", {"k": {"j": 2, "i": 3}}),
        ("a = [dict(k=5)]\nx = a[0]['k']", 5),
        ("x = 1 if 2 > 3 else 4", 4),
        ("x = 1\nif not False:\n    x += 1\nelse:\n    x = 0", 2),
        ("x = 1\nif x > 1:\n    x = 5\nelse:\n    x = 2", 2),
        ("import torch\nx = torch.float16", Symbol("torch", "float16")),
        ("from a.b import c as x", Symbol("a.b", "c")),
        ("from mmengine.config import read_base\nwith read_base():\n    from .m import x", Symbol(".m", "x")),
        ("x = nowhere", Unread("nowhere")),
        ("x = 1 / 0", Unread("1 / 0")),
        ("x = 9 ** 9 ** 9", Unread("9 ** 9 ** 9")),
        ("x = 'a' * 10 ** 9", Unread("'a' * 10 ** 9")),
        ("x = open('f').read()", Unread("open('f').read()")),
        ("x = [i for i in range(3)]", Unread("[i for i in range(3)]")),
    ],
)
def test_a_value_is_read_as_python_would_have_it_or_said_to_be_unread(tmp_path: Path, text: str, value: object) -> None:
    assert read_config(config(tmp_path, text)).values["x"] == value


def test_a_text_cannot_grow_without_bound(tmp_path: Path) -> None:
    doubling = "x = 'a'\n" + "x = x + x\n" * 60
    assert isinstance(read_config(config(tmp_path, doubling)).values["x"], Unread)


def test_statements_that_only_running_would_tell_are_named(tmp_path: Path) -> None:
    text = MODEL + DATA.format(map_fn="None", loader="path='p'", template="None")
    text += "from os import *\nfor i in range(3):\n    pass\nif nowhere:\n    lr = 1\n_base_ = ['../base.py']\n"
    result = import_config(config(tmp_path, text))
    for line in ("line 4: from os import *", "line 5: for i in range(3):", "line 7: if nowhere:"):
        assert f"#   {line}: only running it would tell" in result.text
    assert "_base_" in [remark.name for remark in result.remarks]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model = dict(", "config.py, line 1: not Python"),
        ("x = 1\x00", "config.py"),
        ("x = " + "(" * 5000 + ")" * 5000, "config.py"),
        ("", "model.llm.pretrained_model_name_or_path is not there. If it comes from another file"),
        (
            "model = dict(llm=dict(pretrained_model_name_or_path=f()))",
            "is f(), which only running the config would tell",
        ),
        ("model = 3", "model.llm.pretrained_model_name_or_path is not there"),
        (MODEL, "no data set found"),
        (MODEL + "train_dataset = dict(type='MOSSSFTDataset')", "train_dataset is MOSSSFTDataset()"),
        (MODEL + DATA.format(map_fn="None", loader="type=f()", template="None"), "no data set found"),
        (
            "model = dict(llm=dict(pretrained_model_name_or_path='b', quantization_config=dict(load_in_4bit=True)))",
            "the weights of a 4-bit base cannot be trained",
        ),
    ],
)
def test_a_bad_config_is_one_clear_error(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(RecipeError) as fault:
        import_config(config(tmp_path, text))
    assert words in str(fault.value)


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        ("type='datasets.load_dataset', path='p', name='n'", {"path": "p", "name": "n"}),
        ("type='datasets.load_dataset', path='p', split='test'", {"path": "p", "split": "test"}),
        ("path='json', data_files=['rows.json']", {"path": "rows.json"}),
        ("path='csv', data_dir='rows'", {"path": "rows"}),
        ("path='org/set', data_files='a.json'", {"path": "hf://datasets/org/set/a.json"}),
        ("type='datasets.load_from_disk', dataset_path='saved'", {"path": "saved"}),
        ("type='openmind.OmDataset.load_dataset', path='p'", {"path": "p", "source": "openmind"}),
        ("type='modelscope.MsDataset.load', dataset_name='p'", {"path": "p", "source": "modelscope"}),
    ],
)
def test_a_loader_is_a_path_and_a_source(tmp_path: Path, loader: str, expected: dict[str, str]) -> None:
    text = MODEL + DATA.format(map_fn="None", loader=loader, template="None")
    (dataset,) = import_config(config(tmp_path, text)).recipe.datasets
    found = dataset.model_dump(exclude_defaults=True)
    assert found == expected


@pytest.mark.parametrize(
    ("top", "map_fn", "expected"),
    [
        ("", "'xtuner.dataset.map_fns.oasst1_map_fn'", "oasst1"),
        ("from xtuner.dataset.map_fns import sql_map_fn as f\n", "f", "sql"),
        ("", "None", "default"),
        ("from mine.rows import read\n", "read", "mine.rows:read"),
        ("with read_base():\n    from .rows import read\n", "read", "{folder}/rows.py:read"),
        ("def read(row): ...\n", "read", "my_map_fns.py:read"),
    ],
)
def test_a_map_fn_is_found_again(tmp_path: Path, top: str, map_fn: str, expected: str) -> None:
    text = top + MODEL + DATA.format(map_fn=map_fn, loader="path='p'", template="None")
    recipe = import_config(config(tmp_path, text)).recipe
    assert recipe.datasets[0].map_fn == expected.format(folder=tmp_path)


def test_a_dumped_config_has_names_as_texts(tmp_path: Path) -> None:
    """What XTuner writes to its work directory: sorted, without imports, every name a text."""
    text = "lr = 1.0\nmodel = dict(llm=dict(pretrained_model_name_or_path='b', torch_dtype='torch.bfloat16'))\n"
    text += "optim_wrapper = dict(optimizer=dict(lr=3e-05, type='torch.optim.AdamW'), type='AmpOptimWrapper')"
    data = DATA.format(map_fn="'xtuner.dataset.map_fns.alpaca_map_fn'", loader="path='p'", template="'{}'")
    recipe = import_config(
        config(tmp_path, f"{text}\n{data.format('xtuner.utils.PROMPT_TEMPLATE.llama3_chat')}")
    ).recipe
    assert (recipe.train.learning_rate, recipe.train.dtype) == (3e-05, "bfloat16")
    assert (recipe.datasets[0].map_fn, recipe.pack.chat_template) == ("alpaca", "llama3_chat")
