"""Whether a model folder can be served: its bytes, its tokenizer, its weights, one pass through the network.

In: a folder, and where known the manifest it was written with. Out: nothing, or ModelError. Done before an alias moves.
"""

from pathlib import Path
from typing import Any

from sft_core.artifacts import Manifest
from sft_core.errors import ModelError, StoreError
from sft_core.store import verify_files

PROBE = [{"role": "user", "content": "ping"}]


def check_loads(folder: Path, manifest: Manifest | None = None, *, trust_remote_code: bool = False) -> None:
    """Load tokenizer and weights and take one step. ModelError if bytes, tensors or logits are not whole."""
    import torch  # slow to import
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if manifest is not None:
        try:
            verify_files(folder, manifest)
        except StoreError as error:
            raise ModelError(f"{folder}: not the files that were registered: {error}") from None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        network, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except Exception as error:  # noqa: BLE001 - readers of weights and tokenizers raise their own errors
        reason = (str(error).splitlines() or [""])[0]
        raise ModelError(f"{folder}: does not load: {type(error).__name__}: {reason}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(f"{folder}: {len(missing)} weights are missing, such as {missing[0]}")
    ids = tokenizer.apply_chat_template(PROBE, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        logits = network(input_ids=ids["input_ids"]).logits
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(f"{folder}: its logits are not finite")
