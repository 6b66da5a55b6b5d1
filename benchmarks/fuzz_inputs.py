"""The inputs of `benchmarks/fuzz.py`: a kind is a function that makes, of a folder, what one input is and is given to.

In: a folder to write to; for each input a `random.Random`. Out: nothing, or what the code under attack raises.
"""

import bz2
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Attack = Callable[[random.Random], object]
TEXTS = (
    *[
        "",
        "a",
        "\x1b[2J",
        "\r",
        "\u202e",
        "é",
        "\ud800",
        "1e999",
        "NaN",
        "null",
        "<|im_end|>",
        "</think>",
        "{",
        "[]",
        "{}",
    ],
    *["```", "### Human: a### Assistant: b", "[{'from': 'user', 'value': 'a'}]", '{"a": [1]}', "x" * 5000, "{" * 2000],
    *["%s", "{{ a }}"],
)
ROLES = ("user", "assistant", "system", "tool", "human", "gpt", "text", "", "function", "bot")
NAMES = (
    "messages conversations conversation role content from value text instruction input output prompt response chosen "
    "history "
    "question answer system tools tool_calls function name arguments reasoning_content weight id parameters type"
).split()
SUFFIXES = (
    ".jsonl",
    ".json",
    ".csv",
    ".parquet",
    ".arrow",
    ".jsonl.gz",
    ".jsonl.bz2",
    ".jsonl.xz",
    ".json.zst",
    ".jsonl.zip",
)


def value(draw: random.Random, depth: int = 4) -> Any:
    """JSON of any shape."""
    kind = draw.randrange(9 if depth else 6)
    if kind == 0:
        return draw.choice([None, True, False, 0, -1, 1 << 70, 10**400, 1.5, float("inf"), float("nan"), 1e300])
    if kind < 4:
        return draw.choice(TEXTS)
    if kind == 4:
        return draw.choice(ROLES)
    if kind == 5:
        return draw.choice(NAMES)
    if kind == 6:
        return [value(draw, depth - 1) for _ in range(draw.randrange(4))]
    return {draw.choice(NAMES): value(draw, depth - 1) for _ in range(draw.randrange(5))}


def row(draw: random.Random) -> Any:
    """A row: of any shape, or nearly one that a map_fn reads, with a part of it changed."""
    if draw.random() < 0.3:
        return value(draw)
    turns = [{"role": draw.choice(ROLES), "content": draw.choice(TEXTS)} for _ in range(draw.randrange(1, 4))]
    shaped = {
        "messages": turns,
        "conversations": [{"from": turn["role"], "value": turn["content"]} for turn in turns],
        "instruction": draw.choice(TEXTS),
        "output": draw.choice(TEXTS),
        "text": draw.choice(TEXTS),
        "tools": value(draw),
    }
    kept = {name: shaped[name] for name in draw.sample(sorted(shaped), draw.randrange(1, 4))}
    changed = draw.choice(sorted(kept))
    return {**kept, changed: value(draw)} if draw.random() < 0.5 else kept


def mutated(draw: random.Random, data: bytes) -> bytes:
    """The bytes with some changed, cut out, doubled or cut off."""
    made = bytearray(data)
    for _ in range(draw.randrange(4)):
        at = draw.randrange(len(made) + 1)
        match draw.randrange(4):
            case 0:
                made[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                del made[at : at + draw.randrange(1, 20)]
            case 2:
                made[at:at] = made[at : at + draw.randrange(1, 2000)]
            case _:
                made[at : at + 8] = draw.randrange(1 << 63).to_bytes(8, "little")
    return bytes(made)


def rows(folder: Path) -> Attack:
    """Rows through every map_fn, and files of rows through fetch."""
    from sft_core.errors import RowError
    from sft_core.normalize.map_fns import MAP_FNS
    from sft_core.normalize.rows import read_conversation

    def attack(draw: random.Random) -> None:
        if draw.random() < 0.2:
            return _fetch(draw, folder)
        text = json.dumps(row(draw))
        for map_fn in MAP_FNS.values():
            try:
                read_conversation({"row": text, "problem": None}, map_fn)
            except RowError as error:
                if not error.reason.isidentifier():
                    raise AssertionError(error.reason) from error
        return None

    return attack


def _fetch(draw: random.Random, folder: Path) -> None:
    import shutil

    from sft_core.fetch import fetch_dataset
    from sft_core.recipe import DatasetConfig

    path = folder / f"rows{draw.choice(SUFFIXES)}"
    path.write_bytes(mutated(draw, _file(draw, path.name)))
    out = folder / "out"
    try:
        fetch_dataset(DatasetConfig(path=str(path)), out)
    finally:
        path.unlink()
        shutil.rmtree(out, ignore_errors=True)


def _file(draw: random.Random, name: str) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = [row(draw) for _ in range(draw.randrange(1, 6))]
    lines = "\n".join(map(json.dumps, made)).encode()
    if name.endswith((".parquet", ".arrow")):
        table = pa.table({"text": [json.dumps(r) for r in made], "n": [[{"a": "x"}] * draw.randrange(3) for _ in made]})
        sink = io.BytesIO()
        if name.endswith(".parquet"):
            pq.write_table(table, sink, compression=draw.choice(["zstd", "none", "gzip", "snappy"]))
        else:
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
        return sink.getvalue()
    if name.endswith(".csv"):
        return b"text,role\n" + b"\n".join(
            f"{draw.choice(TEXTS[:10])},{draw.choice(ROLES)}".encode("utf-8", "replace") for _ in made
        )
    if ".json." in name or name.endswith(".json"):
        lines = json.dumps(made).encode()
    return _packed(name, lines)


def _packed(name: str, data: bytes) -> bytes:
    import zipfile

    import pyarrow as pa

    if name.endswith(".zst"):
        return bytes(pa.compress(data, "zstd", asbytes=True))
    if name.endswith(".zip"):
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a", data)
        return sink.getvalue()
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(name[name.rfind(".") :])
    return pack(data) if pack else data


def recipes(folder: Path) -> Attack:
    """YAML: shipped recipes with lines and bytes changed, and made ones; overrides too."""
    from sft_core.recipe import parse_settings, resolve
    from sft_core.recipe.resolve import shipped_recipes

    texts = list(shipped_recipes().values())
    path = folder / "recipe.yaml"

    def attack(draw: random.Random) -> None:
        lines = draw.choice(texts).splitlines()
        for _ in range(draw.randrange(4)):
            at = draw.randrange(len(lines) + 1)
            lines[at:at] = [
                draw.choice(YAML_LINES) if draw.random() < 0.6 else f"{draw.choice(NAMES)}: {value(draw)!r}"
            ]
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
        path.write_bytes(mutated(draw, data) if draw.random() < 0.5 else data)
        key = draw.choice(["train.learning_rate", "name", "datasets", "a.b", ".", "pack", "seed", ""])
        setting = f"{key}={draw.choice([*YAML_LINES, *TEXTS])}"
        resolve(path, parse_settings([setting] if draw.random() < 0.3 else []))

    return attack


YAML_LINES = (
    *[
        "a: &a [1, 2]",
        "b: *a",
        "<<: *a",
        "a: &a [*a]",
        "name: [",
        "? [1]",
        "seed: 2026-99-99",
        "1: 2",
        "null: 1",
        "{",
        "- a",
    ],
    *[
        "seed: !!python/object:os.system x",
        "seed: 9" + "9" * 5000,
        "a: " + "[" * 500,
        "name: !!binary x",
        "--- ",
        "name: |",
    ],
    *["train: {lora: null}", "name: \x1b[2J", "train: {learning_rate: .inf}", "seed: 1:1:1:1", "seed: 0x" + "f" * 99],
    *[
        "%YAML 9.9",
        "datasets: {}",
        "datasets: [{path: {}}]",
        "pack: {template_kwargs: {a: .nan}}",
        "store: s3://a:b@c/d",
    ],
    *[
        "name: !!set {a, b}",
        "seed: !!float x",
        "seed: !!int x",
        "seed: !!timestamp x",
        "seed: !!bool x",
        "name: !!omap [a]",
    ],
)


def manifests(folder: Path) -> Attack:
    """Manifests and leases of a store with parts of their JSON changed."""
    from datetime import UTC, datetime

    from sft_core.lease import Holder, live_holder
    from sft_core.shards import read_shard_list
    from sft_core.store import Store
    from sft_core.store_survey import damage, survey

    stored = {
        "kind": "RawDataset", "step": "fetch", "name": "a", "fingerprint": "f" * 64, "parts": {}, "inputs": {},
        "ledger": {},
        "files": {"a": {"size": 1, "sha256": "0" * 64}}, "facts": {}, "versions": {}, "device": "cpu",
        "started": "2026-01-01T00:00:00+00:00", "took_seconds": 1.0,
    }  # fmt: skip
    lease = json.loads(Holder(seconds=60.0, renewed="2026-01-01T00:00:00+00:00").as_bytes())
    shards = [{"name": "part-00000", "key": "k", "files": {}, "place": {}, "facts": {}}]
    artifact, training = folder / "fetch" / ("f" * 64), folder / "train" / ("e" * 64) / "checkpoints" / "lease"
    for made in (artifact, training):
        made.mkdir(parents=True)
    (artifact / "a").write_bytes(b"x")

    def attack(draw: random.Random) -> None:
        for path, held in (
            (artifact / "manifest.json", stored),
            (training / "00000001.json", lease),
            (artifact / "shards.json", shards),
        ):
            changed = json.dumps(_changed(draw, held)).encode()
            path.write_bytes(mutated(draw, changed) if draw.random() < 0.4 else changed)
        store = Store(str(folder))
        store.find("fetch", "f" * 64)
        for entry in survey(store, datetime.now(UTC)):
            if entry.kind == "artifact":
                damage(store, entry)
        live_holder(store.files, str(training), datetime.now(UTC))
        read_shard_list(artifact)

    return attack


def _changed(draw: random.Random, held: Any) -> Any:
    """The value with one part of it replaced, dropped or added."""
    if isinstance(held, dict) and held and draw.random() < 0.9:
        key = draw.choice(sorted(held))
        match draw.randrange(4):
            case 0:
                return {name: part for name, part in held.items() if name != key}
            case 1:
                return {**held, draw.choice(NAMES): value(draw)}
            case _:
                return {**held, key: _changed(draw, held[key])}
    if isinstance(held, list) and held and draw.random() < 0.9:
        return [_changed(draw, held[0]), *held[1:]]
    return value(draw)


def checkpoints(folder: Path) -> Attack:
    """Small files of torch.save with bytes changed, in the file and in the pickle."""
    import zipfile

    import torch

    from sft_core.convert.reader import read_pickle

    state = {
        "model.a.weight": torch.ones(2, 3),
        "b": {"c": [1, "x", None, 2.5, (1, 2)]},
        "d": torch.zeros(4, dtype=torch.bfloat16),
    }
    torch.save(state, folder / "whole.pth")
    whole = (folder / "whole.pth").read_bytes()
    with zipfile.ZipFile(folder / "whole.pth") as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    path = folder / "changed.pth"

    def attack(draw: random.Random) -> None:
        if draw.random() < 0.3:
            path.write_bytes(mutated(draw, whole))
        else:
            with zipfile.ZipFile(path, "w") as archive:
                for name, data in entries.items():
                    archive.writestr(name, mutated(draw, data) if name.endswith("data.pkl") else data)
        for tensor in _tensors(read_pickle(path)):
            tensor.float().sum()

    return attack


def _tensors(held: Any, depth: int = 5) -> list[Any]:
    if hasattr(held, "storage"):
        return [held]
    parts = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part, depth - 1)] if depth else []


KINDS: dict[str, Callable[[Path], Attack]] = {
    "recipes": recipes,
    "rows": rows,
    "manifests": manifests,
    "checkpoints": checkpoints,
}
