"""The loss over supervised tokens equals the model's own: value and gradients, across architectures and wrappers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from sft_core.pack import IGNORE_INDEX as NO
from sft_core.pack import Sequence
from sft_core.pack.collate import collate
from sft_core.train import loss as loss_module
from sft_core.train.attention import borders_at, use_packed_attention
from sft_core.train.batches import NumberedCollator
from sft_core.train.loss import LossWay, causal_lm, choose_loss, supervised_loss
from tests.sft_core.architectures import SMALL, VOCABULARY

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 0.5},
    "gemma3_text": {},
    "mixtral": {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
}
CHUNKABLE = [name for name in ARCHITECTURES if name != "gemma2"]
"""Gemma 2 caps its logits behind the head."""


def tiny(kind: str, **more: Any) -> Any:
    """Random model of an architecture, fp32, with a head far from zero so that scaling and capping show."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SMALL | ARCHITECTURES[kind] | more))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    return model.float()


def with_lora(model: Any) -> Any:
    """LoRA with B away from zero, on all linear layers of attention."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def sequence_of(length: int, prompt: int, seed: int) -> Sequence:
    ids = torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Sequence(ids, [NO] * prompt + ids[prompt:])


def batch() -> dict[str, torch.Tensor]:
    """Two packed rows, the second padded: 17 + 9 and 12 tokens, 20 of them supervised."""
    return collate([[sequence_of(17, 6, 1), sequence_of(9, 5, 2)], [sequence_of(12, 7, 3)]], 0)


def loss_and_gradients(model: Any, way: LossWay, count: int | None) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    items = None if count is None else torch.tensor(count)
    loss = supervised_loss(model, batch(), items, way)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("count", [None, 50])
@pytest.mark.parametrize(
    ("kind", "way"),
    [*((kind, "selected") for kind in ARCHITECTURES), *((kind, "chunked") for kind in CHUNKABLE)],
)
def test_loss_and_gradients_are_the_models_own(
    kind: str, way: LossWay, count: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * VOCABULARY * 7)  # 7 rows a chunk: the last one is short
    model = with_lora(tiny(kind))
    own, own_gradients = loss_and_gradients(model, "own", count)
    found, gradients = loss_and_gradients(model, way, count)
    assert found == pytest.approx(own, rel=1e-5)
    assert own_gradients.keys() == gradients.keys()
    assert len(gradients) == 8  # layers, modules, A and B
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, own_gradients[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("way", ["selected", "chunked"])
def test_the_head_sees_supervised_rows_only(way: LossWay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * VOCABULARY * 7)
    model = tiny("llama")
    model.requires_grad_(False)
    seen: list[int] = []
    apply_head = model.lm_head.forward

    def counting(hidden: torch.Tensor) -> Any:
        seen.append(hidden.shape[:-1].numel())
        return apply_head(hidden)

    monkeypatch.setattr(model.lm_head, "forward", counting)
    supervised_loss(model, batch(), None, way)  # rows of 15 and 5 supervised tokens: the second filled up to 15
    assert seen == ([30] if way == "selected" else [7, 7, 7, 7, 2])
    one_row = {name: value[:1] for name, value in batch().items()}
    seen.clear()
    supervised_loss(model, one_row, None, way)
    assert seen == ([15] if way == "selected" else [7, 7, 1])


@pytest.mark.parametrize("way", ["selected", "chunked"])
def test_a_batch_of_padding_gives_zero_and_zero_gradients(way: LossWay) -> None:
    model = with_lora(tiny("llama"))
    loss = supervised_loss(model, collate([[]], 0), torch.tensor(9), way)
    loss.backward()
    assert loss.item() == 0
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("way", ["selected", "chunked"])
def test_what_is_counted_on_the_cpu_is_asked_of_no_device(way: LossWay, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the device `meta` have no numbers: whatever would wait for one fails."""
    monkeypatch.setattr(
        "sft_core.train.attention._by_document", lambda module, states, *_: states[0]
    )  # a kernel's place
    model = tiny("llama")
    use_packed_attention(model)
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_()
    model.to("meta")
    plain = NumberedCollator(0)([(0, [sequence_of(17, 6, 1), sequence_of(9, 5, 2)]), (1, [sequence_of(12, 7, 3)])])
    assert [plain.pop(name) for name in ("row_numbers", "row_tokens", "supervised_tokens")] == [[0, 1], [26, 12], 20]
    plain |= borders_at(plain.pop("document_ends"), 26)
    moved = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in plain.items()}
    supervised_loss(model, moved, torch.tensor(20, device="meta"), way).backward()
    assert model.get_input_embeddings().weight.grad.shape == (VOCABULARY, 32)
    for counted in ("supervised_positions", "cu_seq_lens_q"):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            supervised_loss(model, {k: v for k, v in moved.items() if k != counted}, torch.tensor(20), way)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_whole_again_afterwards(fails: bool) -> None:
    model = tiny("llama")
    model.requires_grad_(False)
    before = model(**batch(), use_cache=False)
    if fails:
        with pytest.raises(ValueError, match="exactly one of input_ids"):
            supervised_loss(model, batch() | {"input_ids": None}, None, "chunked")
    else:
        supervised_loss(model, batch(), None, "chunked")
    after = model(**batch(), use_cache=False)
    assert after.logits.shape == (2, 26, VOCABULARY)
    assert torch.equal(after.logits, before.logits)
    assert after.loss == before.loss


@pytest.mark.parametrize(
    ("kind", "vocabulary", "trained_head", "expected"),
    [
        ("llama", VOCABULARY, False, "selected"),
        ("llama", 20_000, False, "chunked"),
        ("llama", 20_000, True, "selected"),
        ("granite", 20_000, False, "chunked"),
        ("gemma2", 20_000, False, "selected"),
    ],
)
def test_the_way_is_chosen_by_vocabulary_head_and_what_follows_it(
    kind: str, vocabulary: int, trained_head: bool, expected: str
) -> None:
    model = with_lora(tiny(kind, vocab_size=vocabulary))
    causal_lm(model).get_output_embeddings().requires_grad_(trained_head)
    model.train()
    way, reason = choose_loss(model)
    assert (way, bool(reason)) == (expected, True)
    assert model.training


def test_a_model_that_scores_its_labels_otherwise_keeps_its_own_way() -> None:
    class Weighted(transformers.LlamaForCausalLM):
        """Twice the usual loss, whatever function it is given."""

        def forward(self, *args: Any, labels: Any = None, shift_labels: Any = None, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            if labels is not None and labels.dim() == 2:
                output.loss = 2 * self.loss_function(output.logits, labels, self.vocab_size)
            elif labels is not None:
                output.loss = self.loss_function(output.logits, labels, self.vocab_size, shift_labels=shift_labels)
            return output

    assert choose_loss(Weighted(tiny("llama").config))[0] == "own"


class OldForm(transformers.LlamaForCausalLM):
    """A forward without keyword arguments for the loss, as remote code may have."""

    def forward(self, input_ids: Any, position_ids: Any = None, labels: Any = None, use_cache: Any = None) -> Any:
        return super().forward(input_ids=input_ids, position_ids=position_ids, labels=labels, use_cache=use_cache)


def test_a_forward_of_an_old_form_gives_the_same_loss() -> None:
    model = tiny("llama")
    old = OldForm(model.config)
    old.load_state_dict(model.state_dict())
    assert choose_loss(old)[0] == "own"
    for count in (None, 50):
        expected, expected_gradients = loss_and_gradients(model, "selected", count)
        found, gradients = loss_and_gradients(old, "own", count)
        assert found == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)
    assert supervised_loss(old, collate([[]], 0), torch.tensor(9), "own").item() == 0


@pytest.mark.parametrize("way", ["own", "selected", "chunked"])
def test_a_routers_loss_counts_by_the_micro_batchs_share_of_the_step(way: LossWay) -> None:
    model = tiny("mixtral").requires_grad_(False)
    output = model(**batch(), use_cache=False)
    assert output.aux_loss > 0.5
    assert supervised_loss(model, batch(), torch.tensor(20), way).item() == pytest.approx(output.loss.item(), rel=1e-5)
    halves = [supervised_loss(model, batch(), torch.tensor(40), way).item() for _ in range(2)]
    assert sum(halves) == pytest.approx(output.loss.item(), rel=1e-5)  # of equal micro-batches


@pytest.mark.slow
def test_steps_under_zero2_are_the_same() -> None:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__]  # a process group of its own
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250.0, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    own, selected, chunked = json.loads(run.stdout.splitlines()[-1])
    assert own[0] > own[-1]
    assert selected == pytest.approx(own, rel=1e-5)
    assert chunked == pytest.approx(own, rel=1e-5)


def zero2_losses(way: LossWay) -> list[float]:
    """Losses of three steps of SGD through DeepSpeed's engine."""
    import deepspeed

    model = with_lora(tiny("llama"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=1.0), config=config)
    losses = []
    for _ in range(3):
        loss = supervised_loss(engine, batch(), torch.tensor(20), way)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # DeepSpeed would import it
    from sft_core.train.launch import training_environment
    from sft_core.train.worker import _avoid_compiled_ops

    os.environ.update(training_environment(os.environ, 1))
    _avoid_compiled_ops(torch.cuda.is_available())
    print(json.dumps([zero2_losses(way) for way in ("own", "selected", "chunked")]))
