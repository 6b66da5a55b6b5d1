"""The base's safetensors files, copied tensor by tensor through a function; one tensor is in memory at a time.

In: `model.safetensors`, or shards with `model.safetensors.index.json`. Out: files of the same names, headers and
sizes. Source of the format: https://github.com/huggingface/safetensors (8 bytes of length, JSON header, raw data).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sft_core.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

Change = Callable[[str, torch.Tensor], torch.Tensor]


def base_shards(base: Path) -> dict[str, frozenset[str]]:
    """Shard file -> names of its tensors. ModelError if a file is missing, torn, or not as the index says."""
    if (base / SINGLE).is_file():
        return {SINGLE: frozenset(_header(base / SINGLE)[1])}
    if not (base / INDEX).is_file():
        raise ModelError(f"base {base}: neither {SINGLE} nor {INDEX}; save it with safetensors (save_pretrained does)")
    weight_map: dict[str, str] = json.loads((base / INDEX).read_text("utf-8"))["weight_map"]
    shards = {name: frozenset(_header(base / name)[1]) for name in sorted(set(weight_map.values()))}
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard]:
            raise ModelError(f"{base / INDEX}: says that {tensor} is in {shard}, which does not hold it")
    return shards


def rewrite_shards(base: Path, out: Path, change: Change) -> None:
    """Write each tensor of the base, as `change` returns it, to a file of the same name in `out`."""
    total = 0
    shards = base_shards(base)
    for shard in shards:
        total += _rewrite(base / shard, out / shard, change)
    if SINGLE in shards:
        return
    index = json.loads((base / INDEX).read_text("utf-8"))
    index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
    (out / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def _rewrite(source: Path, target: Path, change: Change) -> int:
    """Copy one file through `change`; dtype and shape stay, so the header does too. Bytes of tensors written."""
    header, entries = _header(source)
    written = 0
    with safe_open(source, framework="pt") as tensors, target.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
            before = tensors.get_tensor(name)
            after = change(name, before)
            assert (after.dtype, after.shape) == (before.dtype, before.shape), f"{name} must keep its dtype and shape"
            data = after.contiguous().reshape(-1).view(torch.uint8).numpy()
            start, end = entries[name]["data_offsets"]
            assert (start, end - start) == (written, data.nbytes), f"{name} must follow the tensor before it"
            file.write(data.data)
            written += data.nbytes
    return written


def _header(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The header's bytes and its entries. The library opens the file first: it checks offsets and length."""
    try:
        with safe_open(path, framework="pt"), path.open("rb") as file:
            header = file.read(min(int.from_bytes(file.read(8), "little"), MAX_HEADER_BYTES))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: missing or torn ({error}); download the base model again") from None
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    return header, entries
