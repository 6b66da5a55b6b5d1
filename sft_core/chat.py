"""Talk to a model: a merged folder, or a base folder with an adapter. Answers come piece by piece."""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from sft_core.devices import placement
from sft_core.errors import ModelError, RowError
from sft_core.memory_faults import naming_memory_faults
from sft_core.pack import load_chat_template
from sft_core.pack.renders import AS_STORED, Form, Renders, forms_of, in_form, plain_message
from sft_core.pack.texts import text_of_content

SHORTER = "forget the talk (/reset), or lower --max-new-tokens"


@dataclass(frozen=True, slots=True)
class ChatModel:
    """A loaded model with its tokenizer and the Jinja text of its chat template."""

    network: Any
    tokenizer: Any
    chat_template: str

    def answer(self, messages: list[dict[str, Any]], max_new_tokens: int, temperature: float) -> Generator[str]:
        """Pieces of the next assistant message; greedy at temperature 0. Closed early, it ends within a token."""
        import torch  # slow to import
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        from sft_core.evaluate.generation import stop_ids_of

        chat = [plain_message(message, None) for message in messages]
        encoded = self.tokenizer.apply_chat_template(
            in_form(chat, self._form(chat)),
            chat_template=self.chat_template,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.network.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        enough = Event()

        def heard_enough(ids: Any, scores: Any, **_: Any) -> Any:
            return torch.full((ids.shape[0],), enough.is_set(), dtype=torch.bool, device=ids.device)

        stops = stop_ids_of(self.network, self.tokenizer, self.chat_template)  # a base under an adapter has others
        stopping = {"eos_token_id": stops, "pad_token_id": pad, "max_new_tokens": max_new_tokens}
        arguments = {**encoded, "streamer": streamer, **stopping, **sampling}
        with ThreadPoolExecutor(1) as worker:  # a thread at work while the interpreter ends would abort it
            done = worker.submit(
                self.network.generate, **arguments, stopping_criteria=StoppingCriteriaList([heard_enough])
            )
            done.add_done_callback(lambda _: streamer.end())  # after an error too: nobody waits for more
            try:
                yield from streamer
            finally:
                enough.set()
        with naming_memory_faults(f"an answer to {encoded['input_ids'].shape[1]} tokens", SHORTER):
            done.result()

    def _form(self, chat: list[dict[str, Any]]) -> Form:
        """In which form the template shows what the user says, as training found it; as stored if in none."""
        asked = [text_of_content(message).strip() for message in chat if message["role"] == "user"]
        for form in forms_of(chat):
            try:
                text, _ = Renders(in_form(chat, form), self.tokenizer, self.chat_template, None).upto(len(chat), True)
            except RowError:
                continue
            if all(words in text for words in asked):
                return form
        return AS_STORED


def load_chat_model(folder: Path, adapter: Path | None, chat_template: str | None) -> ChatModel:
    """Load from folders. The adapter's tokenizer is preferred: it carries the template of training."""
    import transformers  # slow to import

    for path in filter(None, (folder, adapter)):
        if not path.is_dir():
            raise ModelError(f"{path}: no such folder; give a model folder, or models:/NAME@ALIAS")
    if not (folder / "config.json").is_file():
        hint = (
            "; it is an adapter: sft chat BASE --adapter ADAPTER" if (folder / "adapter_config.json").is_file() else ""
        )
        raise ModelError(f"{folder}: no config.json{hint}")
    transformers.utils.logging.set_verbosity_error()
    with_tokenizer = adapter if adapter is not None and (adapter / "tokenizer_config.json").is_file() else folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(with_tokenizer)
    if chat_template is None and not tokenizer.chat_template:
        raise ModelError(f"{with_tokenizer}: its tokenizer has no chat template; name one with --chat-template")
    template = load_chat_template(chat_template, tokenizer)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **placement())
    if adapter is not None:
        from peft import PeftModel

        network = PeftModel.from_pretrained(network, adapter)
    return ChatModel(network.eval(), tokenizer, template)
