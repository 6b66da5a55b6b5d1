"""How quick is preparing? Run by hand: `python benchmarks/prepare.py [--rows N] [--file ROWS.json] [--memory N]`.

In: alpaca-like rows made here from a seed (or a JSON file of alpaca rows), and a tokenizer. Out: ratios that were taken
within one run, several times over, because a machine's own speed comes and goes:

    pack      tokens a second of pack_dataset, from messages to files, over raw `tokenizers` encode_batch of its texts
    bins      seconds, fill, and evenness in squares of 1,000,000 alpaca-like lengths at 2048
    trl       the same rows through TRL's preparation (assistant-only loss, bfd), where TRL is installed; or from a
              Python that has it: `--trl-python PYTHON`
    --incremental  only this: all of preparing again with 1% more rows over preparing from nothing
    --memory N     only this: peak RSS of fetch, normalize and pack over 10 N rows and over N (100000: the real thing)
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MINIMIND = ROOT.parent / "shared" / "models" / "minimind-tokenizer"
TEMPLATE = "chatml"
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ROWS_A_SHARD = 2_048
"""As normalize cuts them, on average."""


def main() -> None:
    """Take the figures asked for and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="conversations to pack")
    parser.add_argument("--repeat", type=int, default=3, help="times each ratio is taken")
    parser.add_argument("--file", type=Path, help="a JSON list of alpaca rows to take in turn, instead of made ones")
    parser.add_argument("--lengths", type=int, default=1_000_000, help="lengths to pack")
    parser.add_argument(
        "--memory", type=int, default=0, help="measure only memory, at so many rows and ten times as many"
    )
    parser.add_argument("--incremental", action="store_true", help="measure preparing again with 1%% more rows")
    parser.add_argument("--template", default=TEMPLATE, help="a shipped one, or `own`: the tokenizer's")
    parser.add_argument("--trl-python", default=sys.executable, help="a Python that has TRL")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    template = None if options.template == "own" else options.template
    with tempfile.TemporaryDirectory(prefix="sft-prepare-") as name:
        folder = Path(name)
        tokenizer = MINIMIND if MINIMIND.is_dir() else trained_tokenizer(folder / "tokenizer")
        if options.incremental:
            from prepare_incremental import measure_incremental

            measure_incremental(folder, tokenizer, template, islice(made_rows(seed=0), 2 * options.rows), options.rows)
            return
        if options.memory:
            from prepare_incremental import line
            from prepare_memory import measure_memory

            measure_memory(folder, tokenizer, template, (line(*pair) for pair in made_rows(seed=0)), options.memory)
            return
        print(f"tokenizer {tokenizer.name}, template {options.template}, {options.rows} rows")
        conversations = write_conversations(folder / "rows", options.rows, options.file)
        from prepare_bins import measure_bins

        measure_pack(conversations, tokenizer, template, options.repeat)
        measure_bins(options.lengths)
        measure_trl(folder, conversations, tokenizer, options)


def measure_pack(conversations: Path, tokenizer: Path, template: str | None, repeat: int) -> None:
    """pack_dataset against encode_batch, by turns: raw, ours, raw."""
    from transformers import AutoTokenizer

    from sft_core.pack import load_chat_template
    from sft_core.pack.rendering import render_conversation

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    text = load_chat_template(template, loaded)
    texts = [r.text for messages in read_messages(conversations) for r in render_conversation(messages, loaded, text)]
    figures = []
    for turn in range(repeat + 1):
        tokens, before = encode_raw(loaded.backend_tokenizer, texts)
        packed, ours = pack_once(conversations, tokenizer, template)
        assert packed == tokens, (packed, tokens)
        raw = (before + encode_raw(loaded.backend_tokenizer, texts)[1]) / 2
        wall, cpu = raw / ours
        print(
            f"  raw {tokens / raw[0]:12,.0f} pack {tokens / ours[0]:12,.0f} tokens/s: {wall:.3f} of raw, CPU {cpu:.3f}"
        )
        if turn:  # the first warms caches
            figures.append((wall, cpu))
    wall, cpu = map(statistics.median, zip(*figures, strict=True))
    print(f"pack    {wall:.3f} of raw encode_batch (target 0.8), {cpu:.3f} by CPU")


def pack_once(conversations: Path, tokenizer: Path, template: str | None) -> tuple[int, Any]:
    """Tokens that pack_dataset writes, and what it took."""
    from sft_core.pack import pack_dataset
    from sft_core.recipe import PackConfig

    with tempfile.TemporaryDirectory() as out:
        started = clocks()
        outcome = pack_dataset(conversations, tokenizer, PackConfig(chat_template=template), 42, Path(out))
        return outcome.ledger["tokens"]["in"], clocks() - started


def encode_raw(backend: Any, texts: list[str]) -> tuple[int, Any]:
    """Tokens that encode_batch makes of the texts, a thousand at a time, and what it took."""
    started, tokens = clocks(), 0
    for start in range(0, len(texts), 1000):
        tokens += sum(map(len, backend.encode_batch(texts[start : start + 1000], add_special_tokens=False)))
    return tokens, clocks() - started


def clocks() -> Any:
    """Seconds by the wall, and of CPU over all threads: the latter hears less of a machine's other users."""
    import numpy as np

    return np.array([time.perf_counter(), time.process_time()])


def measure_trl(folder: Path, conversations: Path, tokenizer: Path, options: argparse.Namespace) -> None:
    """The same messages through TRL, on all cores, if that Python has it, and through pack_dataset, by turns."""
    if subprocess.run([options.trl_python, "-c", "import trl"], check=False, capture_output=True).returncode:
        print(f"trl     not installed in {options.trl_python}")
        return
    import numpy as np

    rows = folder / "messages.jsonl"
    rows.write_text(
        "".join(json.dumps({"messages": messages}) + "\n" for messages in read_messages(conversations)), "utf-8"
    )
    template = ROOT / "sft_core" / "pack" / "templates" / f"{TEMPLATE}.jinja"
    figures = []
    for turn in range(options.repeat):
        script = [options.trl_python, str(Path(__file__).with_name("prepare_trl.py"))]
        command = [*script, str(rows), str(tokenizer), str(folder / f"trl-{turn}"), str(template)]
        child = subprocess.run(command, check=False, capture_output=True, text=True)
        if child.returncode:
            print(f"trl     failed: {child.stderr.strip().splitlines()[-1]}")
            return
        theirs = json.loads(child.stdout.splitlines()[-1])
        tokens, ours = pack_once(conversations, tokenizer, TEMPLATE)
        speed = theirs["tokens"] / theirs["seconds"]
        wall, cpu = tokens / ours / (theirs["tokens"] / np.array([theirs["seconds"], theirs["cpu_seconds"]]))
        lost = 1 - theirs["tokens"] / tokens
        print(f"  TRL {speed:,.0f} tokens/s, {lost:.2%} of the tokens lost; pack {wall:.2f} times, {cpu:.2f} by CPU")
        figures.append((wall, cpu))
    wall, cpu = map(statistics.median, zip(*figures, strict=True))
    print(f"trl     {wall:.2f} times TRL {theirs['version']} (target 2.4), {cpu:.2f} by CPU")


def write_conversations(folder: Path, count: int, file: Path | None) -> Path:
    """A folder as normalize writes it, of one-turn rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "train").mkdir(parents=True)
    pairs = alpaca_rows(file) if file else made_rows(seed=0)
    rows: list[dict[str, Any]] = []
    for number, (question, answer) in zip(range(count), pairs, strict=False):
        messages = [
            {"role": "user", "content": question, "weight": None},
            {"role": "assistant", "content": answer, "weight": 1},
        ]
        origin = {"dataset": "alpaca", "file": "made", "row_number": number}
        rows.append({"row_id": f"{number:032x}", "messages": messages, **origin})
        if len(rows) == ROWS_A_SHARD or number == count - 1:
            path = folder / "train" / f"part-{number // ROWS_A_SHARD:05d}.parquet"
            pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")
            rows = []
    return folder


def read_messages(conversations: Path) -> Iterator[list[dict[str, Any]]]:
    """Messages of all rows."""
    from sft_core.shard_rows import read_shards

    return (row["messages"] for row in read_shards(conversations / "train"))


def alpaca_rows(file: Path) -> Iterator[tuple[str, str]]:
    """Questions and answers of a JSON list of alpaca rows, over and over."""
    rows = json.loads(file.read_text("utf-8"))
    while True:
        for row in rows:
            yield f"{row['instruction']}\n{row.get('input') or ''}".strip(), row["output"]


def made_rows(seed: int) -> Iterator[tuple[str, str]]:
    """English-like rows with alpaca's lengths: words of a Zipf law, sentences, now and then a list or a number."""
    drawn = random.Random(seed)
    syllables = (
        "ta re mi con pro ing er ation ly ment al the un sta ble port ver ex press st and ous qu i o ness".split()
    )
    words = ["".join(drawn.choices(syllables, k=drawn.randint(1, 4))) for _ in range(20_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    stock = drawn.choices(words, weights, k=400_000)

    def text(median: float, spread: float) -> str:
        count = min(700, max(3, int(drawn.lognormvariate(0, spread) * median)))
        start = drawn.randrange(len(stock) - count)
        chosen = stock[start : start + count]
        for at in range(0, count, 13):
            chosen[at] = chosen[at].capitalize() if at % 3 else f"{drawn.randrange(2000)}."
        return " ".join(chosen).replace(". ", ".\n\n", 1) + "."

    while True:
        yield text(12, 0.5), text(50, 1.0)


def trained_tokenizer(folder: Path) -> Path:
    """A byte-level BPE of 6400 tokens, trained on made rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend, pairs = Tokenizer(models.BPE()), made_rows(seed=1)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=6400, special_tokens=CONTROLS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator((" ".join(next(pairs)) for _ in range(5000)), trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
