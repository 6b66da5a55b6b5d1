"""XTuner's configs as recipes: written as XTuner lays them out, read without running them."""

from contextlib import suppress
from pathlib import Path

import pytest

from sft_core.errors import RecipeError
from sft_core.recipe import resolve
from sft_core.recipe.xtuner import Imported, import_config

SETTINGS = """
import torch
from datasets import load_dataset
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook, LoggerHook
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR
from peft import LoraConfig
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from xtuner.dataset import ConcatDataset, process_hf_dataset
from xtuner.dataset.map_fns import alpaca_map_fn, alpaca_zh_map_fn, oasst1_map_fn, template_map_fn_factory
from xtuner.engine.hooks import DatasetInfoHook, EvaluateChatHook
from xtuner.engine.runner import TrainLoop
from xtuner.model import SupervisedFinetune
from xtuner.parallel.sequence import SequenceParallelSampler
from xtuner.utils import PROMPT_TEMPLATE, SYSTEM_TEMPLATE

pretrained_model_name_or_path = 'internlm/internlm2-chat-7b'
use_varlen_attn = False
data_path = 'timdettmers/openassistant-guanaco'
prompt_template = PROMPT_TEMPLATE.internlm2_chat
max_length = 2048
pack_to_max_length = True
sequence_parallel_size = 1
batch_size = 1  # per device
accumulative_counts = 16
accumulative_counts *= sequence_parallel_size
dataloader_num_workers = 0
max_epochs = 3
optim_type = AdamW
lr = 2e-4
betas = (0.9, 0.999)
weight_decay = 0
max_norm = 1
warmup_ratio = 0.03
save_steps = 500
save_total_limit = 2
evaluation_freq = 500
SYSTEM = ''
evaluation_inputs = ['Please tell me five scenic spots in Shanghai']
tokenizer = dict(type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path=pretrained_model_name_or_path,
                 trust_remote_code=True, padding_side='right')
"""
QLORA = """
model = dict(
    type=SupervisedFinetune, use_varlen_attn=use_varlen_attn,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, trust_remote_code=True, torch_dtype=torch.float16,
             pretrained_model_name_or_path=pretrained_model_name_or_path,
             quantization_config=dict(type=BitsAndBytesConfig, load_in_4bit=True, load_in_8bit=False,
                                      llm_int8_threshold=6.0, bnb_4bit_compute_dtype=torch.float16,
                                      bnb_4bit_use_double_quant=True, bnb_4bit_quant_type='nf4')),
    lora=dict(type=LoraConfig, r=64, lora_alpha=16, lora_dropout=0.1, bias='none', task_type='CAUSAL_LM'))
"""
FULL = """
model = dict(type=SupervisedFinetune, use_varlen_attn=use_varlen_attn,
             llm=dict(type=AutoModelForCausalLM.from_pretrained, trust_remote_code=True,
                      pretrained_model_name_or_path=pretrained_model_name_or_path))
"""
OASST1 = """
train_dataset = dict(
    type=process_hf_dataset, dataset=dict(type=load_dataset, path=data_path), tokenizer=tokenizer,
    max_length=max_length, dataset_map_fn=oasst1_map_fn,
    template_map_fn=dict(type=template_map_fn_factory, template=prompt_template), remove_unused_columns=True,
    shuffle_before_pack=True, pack_to_max_length=pack_to_max_length, use_varlen_attn=use_varlen_attn)
"""
ALPACA_TWO = """
alpaca_en = dict(type=process_hf_dataset, dataset=dict(type=load_dataset, path='tatsu-lab/alpaca'),
                 max_length=max_length, dataset_map_fn=alpaca_map_fn, pack_to_max_length=True,
                 template_map_fn=dict(type=template_map_fn_factory, template=prompt_template))
alpaca_zh = dict(alpaca_en, dataset_map_fn=alpaca_zh_map_fn,
                 dataset=dict(type=load_dataset, path='json', data_files=dict(train=['zh1.json', 'zh2.json'])))
train_dataset = dict(type=ConcatDataset, datasets=[alpaca_en, alpaca_zh])
"""
REST = """
sampler = SequenceParallelSampler if sequence_parallel_size > 1 else DefaultSampler
train_dataloader = dict(batch_size=batch_size, num_workers=dataloader_num_workers, dataset=train_dataset,
                        sampler=dict(type=sampler, shuffle=True))
optim_wrapper = dict(
    type=AmpOptimWrapper, optimizer=dict(type=optim_type, lr=lr, betas=betas, weight_decay=weight_decay),
    clip_grad=dict(max_norm=max_norm, error_if_nonfinite=False), accumulative_counts=accumulative_counts,
    loss_scale='dynamic', dtype='float16')
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-5, by_epoch=True, begin=0, end=warmup_ratio * max_epochs,
         convert_to_iter_based=True),
    dict(type=CosineAnnealingLR, eta_min=0.0, by_epoch=True, begin=warmup_ratio * max_epochs, end=max_epochs,
         convert_to_iter_based=True)]
train_cfg = dict(type=TrainLoop, max_epochs=max_epochs)
custom_hooks = [
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
    dict(type=EvaluateChatHook, tokenizer=tokenizer, every_n_iters=evaluation_freq,
         evaluation_inputs=evaluation_inputs, system=SYSTEM, prompt_template=prompt_template)]
default_hooks = dict(logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=10),
                     checkpoint=dict(type=CheckpointHook, by_epoch=False, interval=save_steps,
                                     max_keep_ckpts=save_total_limit))
env_cfg = dict(cudnn_benchmark=False, dist_cfg=dict(backend='nccl'))
visualizer = None
load_from = None
resume = False
randomness = dict(seed=None, deterministic=False)
"""


def imported(folder: Path, *parts: str, name: str = "config", **changes: str) -> Imported:
    """Import the config made of the parts, with `old: new` changes of single lines by their name."""
    text = "".join(parts)
    for key, value in changes.items():
        (line,) = [line for line in text.split("\n") if line.startswith(f"{key} = ")]
        text = text.replace(line, f"{key} = {value}")
    (folder / f"{name}.py").write_text(text)
    return import_config(folder / f"{name}.py")


def remarks(result: Imported) -> dict[str, str]:
    return {remark.name: remark.value for remark in result.remarks}


def test_xtuners_oasst1_config_is_the_shipped_recipe(tmp_path: Path) -> None:
    name = "internlm2_chat_7b_qlora_oasst1_e3"
    assert imported(tmp_path, SETTINGS, QLORA, OASST1, REST, name=name).recipe == resolve(name)


def test_a_full_fine_tuning_is_the_shipped_mixtral_but_for_what_the_config_cannot_know(tmp_path: Path) -> None:
    name = "mixtral_8x7b_instruct_full_oasst1_e3"
    changes = {
        "pretrained_model_name_or_path": "'mistralai/Mixtral-8x7B-Instruct-v0.1'",
        "prompt_template": "PROMPT_TEMPLATE.mixtral",
        "lr": "2e-5",
    }
    recipe = imported(tmp_path, SETTINGS, FULL, OASST1, REST, name=name, **changes).recipe
    overrides = {"base_model": {"trust_remote_code": True}, "train": {"deepspeed": "zero2"}}
    assert recipe == resolve(name, overrides)


def test_several_data_sets_and_files_become_as_many_entries(tmp_path: Path) -> None:
    recipe = imported(tmp_path, SETTINGS, QLORA, ALPACA_TWO, REST).recipe
    found = [(dataset.path, dataset.map_fn) for dataset in recipe.datasets]
    assert found == [("tatsu-lab/alpaca", "alpaca"), ("zh1.json", "alpaca_zh"), ("zh2.json", "alpaca_zh")]


def test_what_the_text_says_is_what_was_imported_and_where_from(tmp_path: Path) -> None:
    result = imported(tmp_path, SETTINGS, QLORA, OASST1, REST)
    (tmp_path / "recipe.yaml").write_text(result.text)
    assert resolve(tmp_path / "recipe.yaml") == result.recipe
    assert "\n    r: 64  # model.lora.r\n" in result.text
    assert "save_steps: 31  # default_hooks.checkpoint.interval: 500 micro-batches, in optimizer steps" in result.text
    assert "deepspeed: zero2  # not in the config: XTuner takes it on its command line" in result.text


def test_what_has_no_counterpart_is_named_with_its_value(tmp_path: Path) -> None:
    """Nothing else is: a config of XTuner's own holds no setting that the import does not know."""
    found = remarks(imported(tmp_path, SETTINGS, QLORA, OASST1, REST))
    assert found == {
        "custom_hooks.0": "DatasetInfoHook()",
        "custom_hooks.1": "EvaluateChatHook(every_n_iters=500, evaluation_inputs=['Please tell me five scenic spots in "
        "Shanghai'], system='', prompt_template=xtuner.utils.PROMPT_TEMPLA...",
        "randomness.seed": "None",
        "env_cfg": "dict(cudnn_benchmark=False, dist_cfg=dict(backend='nccl'))",
        "train_dataloader.sampler": "DefaultSampler(shuffle=True)",
        "model.use_varlen_attn": "False",
        "model.llm.quantization_config.llm_int8_threshold": "6.0",
        "train_dataloader.num_workers": "0",
        "train_dataloader.dataset.shuffle_before_pack": "True",
        "optim_wrapper.loss_scale": "'dynamic'",
        "optim_wrapper.dtype": "'float16'",
    }


@pytest.mark.parametrize(
    ("old", "new", "name", "value"),
    [
        ("load_in_8bit=False", "load_in_8bit=True", "model.llm.quantization_config.load_in_8bit", "True"),
        ("bias='none'", "bias='all'", "model.lora.bias", "'all'"),
        ("bias='none'", "rank_pattern={'q': 1}", "model.lora.rank_pattern.q", "1"),
        ("eta_min=0.0", "eta_min=1e-6", "param_scheduler.1.eta_min", "1e-06"),
        ("optim_type = AdamW", "optim_type = 'SGD'", "optim_wrapper.optimizer.type", "'SGD'"),
        ("visualizer = None", "visualizer = dict(type='Visualizer')", "visualizer", "Visualizer()"),
        ("resume = False", "resume = True", "resume", "True"),
        ("resume = False", "my_own = 12345", "my_own", "12345"),
        ("r=64", "r=rank()", "model.lora.r", "rank()"),
        ("by_epoch=False, interval=save_steps", "interval=1", "default_hooks.checkpoint.interval", "1"),
        ("save_total_limit = 2", "save_total_limit = -1", "default_hooks.checkpoint.max_keep_ckpts", "-1"),
        ("PROMPT_TEMPLATE.internlm2_chat", "dict(SYSTEM='s')", "train_dataloader.dataset.template_map_fn", None),
        (
            "dataset_map_fn=oasst1_map_fn",
            "dataset_map_fn=llava_map_fn",
            "train_dataloader.dataset.dataset_map_fn",
            None,
        ),
        (
            "path=data_path)",
            "path=data_path, keep_in_memory=True)",
            "train_dataloader.dataset.dataset.keep_in_memory",
            "True",
        ),
    ],
)
def test_a_setting_that_cannot_come_over_is_named(
    tmp_path: Path, old: str, new: str, name: str, value: str | None
) -> None:
    text = SETTINGS + QLORA + OASST1 + REST
    assert old in text
    found = remarks(imported(tmp_path, text.replace(old, new)))
    assert name in found
    assert value is None or found[name] == value


def test_adamws_settings_come_over(tmp_path: Path) -> None:
    text = (SETTINGS + QLORA + OASST1 + REST).replace("betas=betas", "betas=(0.8, 0.95), eps=1e-6")
    train = imported(tmp_path, text).recipe.train
    assert (train.adam_beta1, train.adam_beta2, train.adam_epsilon) == (0.8, 0.95, 1e-6)


def test_sequence_parallelism_comes_over_with_its_accumulation(tmp_path: Path) -> None:
    result = imported(tmp_path, SETTINGS, QLORA, OASST1, REST, sequence_parallel_size="4")
    train = result.recipe.train
    assert (train.sequence_parallel_size, train.gradient_accumulation_steps) == (4, 64)  # 16 * 4, by a quarter of ranks
    assert train.save_steps == 8  # 500 micro-batches of 64 a step
    assert "sequence_parallel_size" not in remarks(result)


def test_a_model_that_is_not_fine_tuning_of_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model is xtuner\.model\.DPO: only SupervisedFinetune"):
        imported(tmp_path, SETTINGS, "from xtuner.model import DPO\nmodel = dict(type=DPO)", OASST1, REST)


NAMES = [line.split(" = ")[0] for line in SETTINGS.split("\n") if " = " in line and not line.startswith((" ", "token"))]


@pytest.mark.parametrize("name", NAMES)
def test_whatever_a_setting_holds_there_is_a_recipe_or_one_clear_error(tmp_path: Path, name: str) -> None:
    for value in ("None", "'x'", "-1", "[]", "{}", "1j", "f()", "[1, f()]", "dict(type=5)", "True", "1e999", "..."):
        with suppress(RecipeError):
            result = imported(tmp_path, SETTINGS, QLORA, OASST1, REST, **{name: value})
            (tmp_path / "recipe.yaml").write_text(result.text)
            assert resolve(tmp_path / "recipe.yaml") == result.recipe
