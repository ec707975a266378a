"""``kto-fused chat``: talk with a trained model on the terminal, also beside the model that it was trained from."""

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli import INSTALL, description
from .early import check_model
from .errors import CommandError, check_names, sentence
from .failures import setup_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT = "> "


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="kto-fused chat",
        description=f"{description('chat')} A line is a message; an empty line or the end of the input ends it. With "
        "the tokenizer's chat template the conversation goes on; without one each line is a prompt of its own.",
    )
    parser.add_argument("--model", required=True, help="folder or id of a model, or folder of an adapter")
    parser.add_argument("--compare", metavar="BASE", help="a second model, which answers each message too")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="tokens of an answer (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples at a temperature (default: 0)")
    options = parser.parse_args(arguments)
    if options.max_new_tokens < 1 or options.temperature < 0:
        raise CommandError("--max_new_tokens must be at least 1, and --temperature at least 0")
    names = [options.model] if options.compare is None else [options.model, options.compare]
    check_names(*names)
    for flag, name in zip(("model", "compare"), names, strict=False):
        check_model(flag, name)
    with setup_errors():
        speakers = {name: Speaker(name, options) for name in names}
    while line := read_line():
        for name, speaker in speakers.items():
            if len(speakers) > 1:
                print(f"[{name}]")
            speaker.answer(line)
    return 0


def read_line() -> str:
    try:
        return input(PROMPT).strip()
    except EOFError:
        return ""


class Speaker:
    """A model with its own side of the conversation."""

    def __init__(self, name: str, options: argparse.Namespace):
        self.options, self.messages = options, []
        self.tokenizer, self.model = load(name)

    def answer(self, line: str) -> str:
        """Stream the model's answer to stdout, and return it."""
        import torch
        from transformers import TextStreamer

        tokenizer, model = self.tokenizer, self.model
        if tokenizer.chat_template is None:
            inputs = tokenizer(line, return_tensors="pt")
        else:
            self.messages.append({"role": "user", "content": line})
            inputs = tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        torch.manual_seed(self.options.seed)
        sampled: dict[str, Any] = {"do_sample": False}
        if self.options.temperature:
            sampled = {"do_sample": True, "temperature": self.options.temperature}
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        ids = model.generate(
            **inputs,
            **sampled,
            max_new_tokens=self.options.max_new_tokens,
            pad_token_id=pad,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": text})
        return text


def load(name: str) -> "tuple[PreTrainedTokenizerBase, PreTrainedModel]":
    """Return the tokenizer and the causal language model of a folder or an id, on the GPU if there is one."""
    import torch
    from transformers import AutoTokenizer

    from ..huggingface.files import load_model  # refuses a checkpoint without an LM head, such as a reward model's

    read = partial(load_model, trust_remote_code=False)
    if (Path(name) / "adapter_config.json").is_file():
        try:
            from peft import AutoPeftModelForCausalLM
        except ImportError as error:
            raise CommandError(f"--model {name} is an adapter, which needs the package peft: {INSTALL}") from error
        read = AutoPeftModelForCausalLM.from_pretrained
    try:
        model = read(name, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (ValueError, OSError, RuntimeError) as error:
        raise CommandError(f"{name} cannot be loaded as a causal language model: {sentence(error)}") from error
    return tokenizer, model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
