"""The options of rounds of generation, beside those of the trainer that trains in them."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class LoopSettings:
    """The options of a loop beside those of its trainer.

    Raises:
        ValueError: an option's value, or two options that contradict each other.
    """

    _argument_group_name: ClassVar[str] = "rounds"

    model: str = field(metadata={"help": "model to train: a folder in Hugging Face format, or a model id on the Hub"})
    data: list[str] = field(
        metadata={
            "help": "prompts, or prompts with answers: files, folders, patterns or a data set of the Hub, as kto-fused "
            "train takes them, with records that hold 'prompt', and 'completion' or 'chosen' where answers are needed"
        }
    )
    judge: str | None = _option(
        None,
        "what scores the samples: a reward model's folder or id, a Python function as module:function, called as "
        "function(prompt, completions), or a command that reads and writes JSON lines",
    )
    rounds: int = _option(3, "number of rounds of generate, judge, train")
    prompts: int | None = _option(None, "prompts of a round, drawn without repetition; all of them if not given")
    samples: int | None = _option(None, "samples per prompt; if not given, 1 for spin and 4 otherwise")
    max_new_tokens: int = _option(128, "longest sample in tokens")
    temperature: float = _option(1.0, "temperature that samples are drawn at; 0 takes the most likely tokens")
    generation_batch_size: int = _option(32, "samples that are generated at a time; their number changes no sample")
    generator: str | None = _option(
        None,
        "address of a server that generates, such as http://localhost:8000 (OpenAI-compatible, with token ids: vLLM); "
        "transformers' generate in this process if not given",
    )
    reload_command: str | None = _option(
        None,
        "command that makes the server of --generator serve the weights in {folder}: --model, then each round's "
        "checkpoint; an adapter needs none with vLLM",
    )
    threshold: str = _option(
        "mean",
        "score above which a sample is desirable, for losses of single completions: 'mean' (of the round's scores), "
        "'prompt_mean' (of the prompt's) or a number; a sample at the threshold is left out",
    )
    max_kl: float = _option(
        100.0, "a round diverges if it moves the policy by more than this KL divergence, in nats per sample"
    )
    ref_model: str | None = _option(
        None, "reference model, given like --model; --model itself if not given. spin's is the last round's model"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = _option(
        None, "dtype to load the weights in; if not given: float32, or auto (the checkpoint's own) with --lora_rank"
    )
    lora_rank: int = _option(0, "train a LoRA adapter of this rank; 0 trains all weights")
    lora_alpha: int | None = _option(None, "LoRA's scale; twice --lora_rank if not given")
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "layers to adapt: their names, or one regular expression; all linear layers except the LM head if "
            "not given"
        },
    )

    def __post_init__(self):
        for name in ("rounds", "prompts", "samples", "max_new_tokens", "generation_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be a finite number of at least 0, got {self.temperature}")
        if not self.max_kl > 0:
            raise ValueError(f"max_kl must be more than 0, got {self.max_kl}")
        if self.threshold not in ("mean", "prompt_mean"):
            try:
                is_number = math.isfinite(float(self.threshold))
            except ValueError:
                is_number = False
            if not is_number:
                raise ValueError(f"threshold must be 'mean', 'prompt_mean' or a number, got {self.threshold!r}")
        if self.temperature == 0 and (self.samples or 1) > 1:
            raise ValueError(
                f"temperature is 0, so all {self.samples} samples of a prompt would be equal: set it above 0"
            )
        if self.generator is not None and not self.generator.startswith(("http://", "https://")):
            raise ValueError(f"generator must be the http:// address of a server, got {self.generator!r}")
        if self.reload_command is not None and self.generator is None:
            raise ValueError("reload_command is given, but there is no server to reload: set generator too")
        if self.dtype is None:
            self.dtype = "auto" if self.lora_rank else "float32"
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be at least 0, got {self.lora_rank}")
        for name in ("lora_alpha", "lora_target_modules"):
            if not self.lora_rank and getattr(self, name) is not None:
                raise ValueError(f"{name} is given, but there is no adapter: set lora_rank too")
