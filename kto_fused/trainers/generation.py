"""Sample completions of prompts: by transformers' ``generate``, or by a server over its OpenAI-compatible address.

A sample depends on the seed, the round, the prompt and the sample's number alone. Batches, ranks and the order of the
prompts change nothing but the rounding of the logits.
"""

import hashlib
import http.client
import json
import os
import shlex
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from .. import huggingface
from ..data.prompts import Prompt
from ..huggingface.inspect import evaluating
from . import checkpoints, models, ranks

ADAPTER_FILE = "adapter_config.json"
IN_FLIGHT = 32  # requests that a server answers at a time
REQUEST_SECONDS = 600


class GenerationError(ValueError):
    """A server, or the command that loads its weights, failed; the message names its address or the command."""


class Sample(NamedTuple):
    """One completion of one prompt."""

    prompt: int  # the number of the prompt in the data
    sample: int  # from 0
    ids: list[int]  # the completion's tokens, with the end token if the model wrote one
    is_cut: bool  # whether max_new_tokens ended it


class Sampling(NamedTuple):
    """How completions are drawn."""

    samples: int  # per prompt
    max_new_tokens: int
    temperature: float  # 0: the most likely token
    batch_size: int  # completions that a model generates at a time
    ends: tuple[int, ...]  # the tokens that end a completion
    seed: int
    round: int


def seed_of(sampling: Sampling, prompt: int, sample: int) -> int:
    """Return the seed of one sample, in [0, 2^63)."""
    name = f"{sampling.seed} {sampling.round} {prompt} {sample}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that end a completion, the tokenizer's own first.

    Ask it of the model that a run begins with: ``Trainer`` aligns the model's own end tokens with the tokenizer's.
    """
    of_model = getattr(model.generation_config, "eos_token_id", None)
    of_model = of_model if isinstance(of_model, list) else [of_model]
    return tuple(token for token in dict.fromkeys([tokenizer.eos_token_id, *of_model]) if token is not None)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Return a completion's text, as judges read it."""
    return tokenizer.decode(ids, skip_special_tokens=True)


# ---- transformers -------------------------------------------------------------------------------------------------


class GumbelNoise(LogitsProcessor):
    """Makes the most likely token of greedy decoding a draw from softmax(logits / temperature).

    argmax_v (z_v + g_v) with independent Gumbel g_v = -log(-log u_v) is distributed as softmax(z) (the Gumbel-max
    trick). Each row draws its g from a generator of its own, so a draw does not depend on the other rows. A different
    rounding of the logits changes it only where the two largest sums differ by no more than that rounding.
    """

    def __init__(self, seeds: list[int], temperature: float, device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)  # -log of it is a Gumbel variable
        return scores.double() / self.temperature - noise.log()


class ModelGenerator:
    """Samples from the policy in this process, with transformers' ``generate``. Ranks share the prompts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments):
        self.tokenizer, self.args = tokenizer, args

    def __call__(
        self, policy: torch.nn.Module, checkpoint: str | None, prompts: list[Prompt], sampling: Sampling
    ) -> list[Sample]:
        """Return the samples of all prompts, in order. ``checkpoint`` is where the policy came from; unused here."""
        args = self.args
        wanted = [(prompt, sample) for prompt in prompts for sample in range(sampling.samples)]
        mine = sorted(wanted[args.process_index :: args.world_size], key=lambda one: len(one[0].ids))

        def drawn() -> list[Sample]:
            policy.to(args.device)
            found = []
            with evaluating(policy), plain_generation(policy), autocast(args), models.keeping_random_state():
                for start in range(0, len(mine), sampling.batch_size):
                    found += self._batch(policy, mine[start : start + sampling.batch_size], sampling)
            return found

        return sorted(ranks.shared(args, drawn), key=lambda one: (one.prompt, one.sample))

    def _batch(self, policy: torch.nn.Module, batch: list[tuple[Prompt, int]], sampling: Sampling) -> Iterator[Sample]:
        device, ends, pad = self.args.device, sampling.ends, models.pad_token_id(self.tokenizer)
        width = max(len(prompt.ids) for prompt, _ in batch)
        padded = [[pad] * (width - len(prompt.ids)) + prompt.ids for prompt, _ in batch]
        mask = [[0] * (width - len(prompt.ids)) + [1] * len(prompt.ids) for prompt, _ in batch]
        processors = LogitsProcessorList()
        if sampling.temperature:
            seeds = [seed_of(sampling, prompt.number, sample) for prompt, sample in batch]
            processors.append(GumbelNoise(seeds, sampling.temperature, device))
        generated = policy.generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_new_tokens,
                do_sample=False,
                eos_token_id=list(ends) or None,
                pad_token_id=pad,
                use_cache=True,
            ),
            logits_processor=processors,
        )
        for (prompt, sample), ids in zip(batch, generated[:, width:].tolist(), strict=True):
            length = next((position + 1 for position, token in enumerate(ids) if token in ends), None)
            yield Sample(prompt.number, sample, ids[:length], length is None)


@contextmanager
def plain_generation(policy: torch.nn.Module) -> Iterator[None]:
    """Generate without what the model's own ``generation_config`` would add, such as top_p or a repetition penalty.

    The policy's log-probabilities, which the losses compare, know nothing of them.
    """
    model = huggingface.unwrap(policy)
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def autocast(args: TrainingArguments) -> torch.autocast:
    """Return the autocast in which training computes, for passes outside of the trainer."""
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    return torch.autocast(args.device.type, dtype, enabled=args.bf16 or args.fp16)


# ---- a server -----------------------------------------------------------------------------------------------------


class ServerGenerator:
    """Samples from a server with an OpenAI-compatible address, such as vLLM's, which gets the weights of each round.

    The server is asked for token ids (``return_token_ids``, vLLM 0.10.2 and later), because a text that is tokenized
    again may give other tokens. How it gets a round's weights:

    - ``reload_command``: a command line that is run before a round's first request, with ``{folder}`` replaced by the
      checkpoint, in the first round by ``model``. The server must serve these weights when the command ends. This works
      with any server.
    - without it, an adapter alone can be handed over, by vLLM's ``POST /v1/load_lora_adapter`` (a server started with
      ``--enable-lora`` and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True``), under a name that holds the checkpoint's
      checksum. The server must serve ``model`` when the run starts.

    The server must be able to read the checkpoint's folder. The environment variable ``VLLM_API_KEY`` is sent as its
    key, if it is set. The first process alone asks the server.
    """

    def __init__(self, address: str, model: str, args: TrainingArguments, reload_command: str | None):
        self.address, self.model, self.args = address.rstrip("/").removesuffix("/v1"), model, args
        self.reload_command = reload_command
        self._loaded: str | None = None  # the weights that the server was seen to serve or told to load
        self._name = ""  # of these weights in requests

    def __call__(
        self, policy: torch.nn.Module, checkpoint: str | None, prompts: list[Prompt], sampling: Sampling
    ) -> list[Sample]:
        """Return the samples of all prompts, in order, from the weights in ``checkpoint`` (None: the start's).

        Raises:
            GenerationError: the server cannot be reached, refuses a request, or answers without token ids; on all
                processes.
        """
        wanted = [(prompt, sample) for prompt in prompts for sample in range(sampling.samples)]

        def drawn() -> list[Sample]:
            self._hand_over(checkpoint)
            with ThreadPoolExecutor(IN_FLIGHT) as pool:
                return list(pool.map(lambda one: self._sample(*one, sampling), wanted))

        return ranks.on_first(self.args, drawn)

    def _hand_over(self, checkpoint: str | None) -> None:
        wanted = checkpoint or self.model
        if wanted == self._loaded:
            return
        if self.reload_command is not None:
            self._reload(wanted)
            self._name = self._served()[0]
        elif checkpoint is None:
            self._name = self._served()[0]
        elif (Path(checkpoint) / ADAPTER_FILE).is_file():
            folder = Path(checkpoint).resolve()
            # another run's adapter of this round, or this one's before it was resumed, may be there already
            self._name = "-".join((*folder.parts[-2:], checkpoints.read_manifest(folder)["xxh3_128"][:12]))
            if self._name not in self._served():
                self._ask("/v1/load_lora_adapter", {"lora_name": self._name, "lora_path": str(folder)})
        else:
            raise GenerationError(
                f"--generator {self.address} cannot be told to serve {checkpoint}: give --reload_command, or train an "
                "adapter (--lora_rank)"
            )
        self._loaded = wanted

    def _served(self) -> list[str]:
        """Return the names of what the server serves, its own model first."""
        served = self._ask("/v1/models").get("data")
        if not served:
            raise GenerationError(f"--generator {self.address} serves no model")
        return [model["id"] for model in served]

    def _reload(self, folder: str) -> None:
        command = [part.replace("{folder}", folder) for part in shlex.split(self.reload_command)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise GenerationError(f"--reload_command {command[0]} cannot be run: {error.strerror}") from error
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it printed no reason"])[-1]
            raise GenerationError(f"--reload_command ended with code {done.returncode}: {reason}")

    def _sample(self, prompt: Prompt, sample: int, sampling: Sampling) -> Sample:
        ends = sampling.ends
        request = {
            "model": self._name,
            "prompt": prompt.ids,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "seed": seed_of(sampling, prompt.number, sample),
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(ends),
            "return_token_ids": True,
        }
        choice = next(iter(self._ask("/v1/completions", request).get("choices") or [{}]))
        ids = choice.get("token_ids")
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            raise GenerationError(
                f"--generator {self.address} answers without token_ids: expected a server that knows "
                "return_token_ids, such as vLLM 0.10.2 or later"
            )
        if (reason := choice.get("finish_reason")) not in ("stop", "length"):
            raise GenerationError(
                f"--generator {self.address} ended a sample of prompt {prompt.number} by {reason!r}: expected 'stop' "
                "or 'length'"
            )
        is_cut, end = reason == "length", choice.get("stop_reason")  # vLLM's: the end token, unless it is the model's
        if not is_cut and ends and (not ids or ids[-1] not in ends):  # some servers leave the end token out
            ids = [*ids, end if end in ends else ends[0]]
        if not ids:
            raise GenerationError(f"--generator {self.address} generated no token for prompt {prompt.number}")
        return Sample(prompt.number, sample, ids, is_cut)

    def _ask(self, path: str, content: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        if key := os.environ.get("VLLM_API_KEY"):
            request.add_header("Authorization", f"Bearer {key}")
        where = f"--generator {self.address}{path}"
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            reason = " ".join(error.read().decode(errors="replace").split())[:300] or error.reason
            raise GenerationError(f"{where} refuses a request ({error.code}): {reason}") from error
        except (OSError, http.client.HTTPException) as error:  # the second one: an answer that was cut off, a bad port
            raise GenerationError(f"{where} cannot be reached: {getattr(error, 'reason', error)}") from error
        try:
            answer = json.loads(text) if path != "/v1/load_lora_adapter" else {}  # its answer is a sentence
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise GenerationError(f"{where} answers {text[:60]!r}, expected a JSON object")
        return answer
