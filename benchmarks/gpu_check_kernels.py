"""Stages of `gpu_check.py` that look at one kernel each: facts, attention, nf4, head."""

import inspect
from typing import Any

import torch
from gpu_check_bench import Bench, relative

DTYPE = torch.bfloat16


def facts(bench: Bench) -> dict[str, Any]:
    """Versions, what torch and the product see, and the two speeds that a forecast begins with."""
    import bitsandbytes
    import peft
    import transformers

    from sft_core.train.liger import liger_reason

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(bench.device) if bench.cuda else "cpu",
        "devices": torch.cuda.device_count(),
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "bitsandbytes": bitsandbytes.__version__,
        "liger": liger_reason("llama", bench.device.type) or "yes",
    }
    try:
        from torch.nn.attention.varlen import varlen_attn

        parameters = inspect.signature(varlen_attn).parameters.values()
        found["varlen"] = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    except ImportError as error:
        found["varlen"] = str(error)
    n = 256 if bench.toy else 8192
    a = torch.randn(n, n, dtype=DTYPE, device=bench.device)
    source = torch.randn(4 * n, n, dtype=DTYPE, device=bench.device)
    target = torch.empty_like(source)
    found["gemm_tflops"] = round(2 * n**3 / bench.milliseconds(lambda: a @ a) / 1e9, 3)
    copy = bench.milliseconds(lambda: target.copy_(source))
    found["copy_gb_s"] = round(2 * source.nbytes / copy / 1e6, 1)
    return found


def attention(bench: Bench) -> dict[str, Any]:
    """`packed_attention` against float32, forward and backward; and whether it gives the same bits twice."""
    heads, groups, size, tokens = (4, 2, 8, 96) if bench.toy else (32, 8, 128, 4096)
    return {
        name: _attention_of(bench, [tokens // parts] * parts, (heads, groups, size))
        for name, parts in {"eight documents": 8, "one document": 1}.items()
    }


def _attention_of(bench: Bench, lengths: list[int], sizes: tuple[int, int, int]) -> dict[str, Any]:
    from sft_core.train import attention as product

    heads, groups, size = sizes
    tokens = sum(lengths)
    torch.manual_seed(0)
    made = [torch.randn(1, n, tokens, size, device=bench.device, dtype=DTYPE) for n in (heads, groups, groups)]
    query, key, value = (tensor.requires_grad_() for tensor in made)
    gradient = torch.randn(1, tokens, heads, size, device=bench.device, dtype=DTYPE)
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, heads // groups  # type: ignore[assignment]
    borders = product.borders(torch.cat([torch.arange(n) for n in lengths])[None].to(bench.device))

    def run() -> tuple[torch.Tensor, ...]:
        result = product.packed_attention(module, query, key, value, None, scaling=size**-0.5, **borders)[0]
        return result, *torch.autograd.grad(result, (query, key, value), gradient)

    found = run()
    exact = [tensor.detach().float().requires_grad_() for tensor in (query, key, value)]
    parts, start = [], 0
    for length in lengths:
        document = (tensor[:, :, start : start + length] for tensor in exact)
        parts.append(torch.nn.functional.scaled_dot_product_attention(*document, is_causal=True, enable_gqa=True))
        start += length
    result = torch.cat(parts, 2).transpose(1, 2)
    expected = (result, *torch.autograd.grad(result, exact, gradient.float()))
    names = ("result", "of_query", "of_key", "of_value")
    errors = {name: relative(*pair) for name, *pair in zip(names, found, expected, strict=True)}
    assert max(errors.values()) < 0.02, errors
    same = all(torch.equal(one, other) for one, other in zip(found, run(), strict=True))
    return {**errors, "same_bits_twice": same, "ms": bench.milliseconds(run)}


def nf4(bench: Bench) -> dict[str, Any]:
    """Dequantising, and the 4-bit product over the plain one; whether a CPU quantises to this device's bits."""
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    outputs, inputs = (256, 128) if bench.toy else (14_336, 4096)
    weight = (torch.randn(outputs, inputs) * 0.02).to(DTYPE)
    options = {"blocksize": 64, "compress_statistics": True, "quant_type": "nf4"}
    packed, state = quantize_4bit(weight.to(bench.device), **options)
    on_cpu, state_on_cpu = quantize_4bit(weight, **options)
    whole = dequantize_4bit(packed, state)
    found: dict[str, Any] = {
        "codes_that_differ_from_a_cpu": float((packed.cpu() != on_cpu).float().mean()),
        "weights_off_a_cpu": relative(whole.cpu(), dequantize_4bit(on_cpu, state_on_cpu)),
        "dequantize_ms": bench.milliseconds(lambda: dequantize_4bit(packed, state)),
    }
    for rows in (32,) if bench.toy else (2048, 4096, 16_384):
        x = torch.randn(rows, inputs, device=bench.device, dtype=DTYPE)
        plain = bench.milliseconds(lambda x=x: x @ whole.t())
        found[f"{rows}_rows_ms"] = {
            "plain": plain,
            "nf4": bench.milliseconds(lambda x=x: matmul_4bit(x, packed, quant_state=state)),
        }
    return found


def head(bench: Bench) -> dict[str, Any]:
    """The product's chunked loss against liger's fused one, 70% of 4,096 tokens supervised."""
    from sft_core.train import loss as product

    tokens, width, vocabulary = (50, 64, 20_000) if bench.toy else (2867, 4096, 128_256)
    torch.manual_seed(0)
    linear = torch.nn.Linear(width, vocabulary, bias=False, device=bench.device, dtype=DTYPE).requires_grad_(False)
    hidden = torch.randn(tokens, width, device=bench.device, dtype=DTYPE, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,), device=bench.device)

    def own() -> tuple[torch.Tensor, ...]:
        rows = max(1, product.CHUNK_BYTES // (4 * vocabulary))
        total = product._ChunkedSum.apply(hidden, targets, linear.forward, rows)
        return total, *torch.autograd.grad(total, hidden)

    def liger() -> tuple[torch.Tensor, ...]:
        total = product._liger_sum(hidden, linear, targets)
        return total, *torch.autograd.grad(total, hidden)

    bench.forget_peak()
    found: dict[str, Any] = {"own": {"ms": bench.milliseconds(own), "peak_gib": bench.peak_gib()}}
    if bench.cuda and product._has_liger():
        expected = own()
        bench.forget_peak()
        found["liger"] = {"ms": bench.milliseconds(liger), "peak_gib": bench.peak_gib()}
        found["liger"] |= {"off": [relative(*pair) for pair in zip(liger(), expected, strict=True)]}
    return found
