"""PPO and the group-relative methods: rounds whose training data are the samples with their advantages.

``PPOLoop`` samples, asks the judge, and makes of the scores one advantage per token: generalised advantage estimates
from a value model, or scores relative to those of the prompt's other samples. ``FusedPPOTrainer`` trains policy and
value model on them, on minibatches, by the token-level losses of ``heads.tokens``.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForTokenClassification, PretrainedConfig

from .. import checks, huggingface
from ..advantages import gae
from ..data.collators import IGNORE_INDEX, UnpairedCollator
from ..data.tokens import TOKENS
from ..functional import fused_linear_loss, linear_token_logps
from ..heads.protocol import Head
from ..heads.reward import value_loss
from ..huggingface import files
from ..huggingface.inspect import check_is_causal
from ..huggingface.padding import without_padding_mask
from . import losses, models
from .base import FusedTrainer
from .configs import FusedPreferenceConfig
from .round_settings import LoopSettings
from .rounds import Loop, Scored, TakesTokens, TokenValues, TrainingData

GAE, GROUP = ADVANTAGES = ("gae", "group")
LOSSES = ("ppo", "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")
BACKBONE = "backbone"
CRITIC = "critic.safetensors"  # beside the policy in a checkpoint
TOKEN_COLUMNS = ("old_logps", "advantages", "returns", "values", "ref_token_logps")  # one entry per completion token


def _option(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
@losses.with_loss_options(LOSSES, left_out=("normalizer", "kl_beta"))
class FusedPPOConfig(FusedPreferenceConfig):
    """Options of ``FusedPPOTrainer`` and ``PPOLoop``.

    >>> FusedPPOConfig(output_dir="out", use_cpu=True, advantage="group").loss_type
    'grpo'
    """

    default_loss: ClassVar[str] = "ppo"

    beta: float = _option(
        0.05,
        "Coefficient of the KL divergence to the reference model, >= 0: in the tokens' rewards with advantage='gae', "
        "in the loss with 'group'.",
    )
    num_train_epochs: float = _option(4.0, "Passes over a round's samples, in minibatches of the batch size.")
    advantage: str = _option(
        GAE,
        "'gae': generalised advantage estimates from a value model; 'group': the score relative to the scores of the "
        "prompt's other samples, as GRPO does.",
        choices=list(ADVANTAGES),
    )
    loss_type: str | None = _option(
        None, "Loss of a token; ppo if not given, grpo with advantage='group'.", choices=list(LOSSES)
    )
    gamma: float = _option(1.0, "Discount of later tokens' rewards, in [0, 1]; for 'gae'.")
    lam: float = _option(0.95, "GAE's lambda, in [0, 1]; for 'gae'.")
    whiten: bool = _option(True, "Shift and scale a round's advantages to mean 0 and variance 1; for 'gae'.")
    scale_by_std: bool = _option(True, "Divide by the standard deviation of a prompt's scores; for 'group'.")
    value_model: str = _option(
        BACKBONE,
        "Value model: 'backbone' for a linear head on the policy's hidden states, or the folder or id of a model of "
        "its own; for 'gae'.",
    )
    value_coef: float = _option(0.1, "Weight of the value model's loss, >= 0; for 'gae'.")
    value_clip: float | None = _option(0.2, "How far values may move before their gradient is cut off; None: no clip.")
    kl_target: float | None = _option(
        None, "Adapt beta towards this KL divergence to the reference, in nats per sample; None: keep beta. For 'gae'."
    )
    kl_horizon: int = _option(
        10_000, "Samples after which an adapted beta may have changed by a fifth, the most that a round changes it."
    )
    sampling_temperature: float = _option(1.0, "Temperature of the samples, at which their probabilities are compared.")

    average_log_prob = False

    def __post_init__(self):
        if self.loss_type is None:
            self.loss_type = "grpo" if self.advantage == GROUP else "ppo"
        super().__post_init__()
        checks.number("beta", self.beta, at_least=0)
        checks.number("value_coef", self.value_coef, at_least=0)
        checks.number("sampling_temperature", self.sampling_temperature, above=0)
        checks.integer("kl_horizon", self.kl_horizon, at_least=1)
        if self.kl_target is not None and not self.beta:
            raise ValueError(f"kl_target={self.kl_target} adapts beta, which stays 0 once it is 0: set beta above 0")
        for name in ("value_clip", "kl_target"):
            if getattr(self, name) is not None:
                checks.number(name, getattr(self, name), above=0)
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.loss_from != "hidden":
            raise ValueError("loss_from='logits' is not supported here: the value head reads hidden states")
        # an option, the value that does nothing, and the advantage that it belongs to
        for name, default, advantage in (
            ("value_model", BACKBONE, GAE),
            ("kl_target", None, GAE),
            ("gamma", 1.0, GAE),
            ("lam", 0.95, GAE),
            ("whiten", True, GAE),
            ("value_coef", 0.1, GAE),
            ("value_clip", 0.2, GAE),
            ("scale_by_std", True, GROUP),
        ):
            if getattr(self, name) != default and self.advantage != advantage:
                raise ValueError(f"{name}={getattr(self, name)!r} has no meaning without advantage={advantage!r}")

    def _fields_of(self, name: str) -> dict[str, Any]:
        return super()._fields_of(name) | {"kl_beta": self.beta if self.advantage == GROUP else 0.0}


# ---- value models -------------------------------------------------------------------------------------------------


class ValueHead(nn.Module):
    """A linear head on the policy's hidden states, which starts at the value 0."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the value of the state after each position, [B, T] float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.float()).squeeze(-1)


class ValueModel(nn.Module):
    """A model of its own with one output per position."""

    def __init__(self, name: str, args: FusedPPOConfig):
        super().__init__()
        with models.keeping_random_state():
            torch.manual_seed(args.seed)  # for the head, which most checkpoints lack
            options = {"trust_remote_code": args.trust_remote_code}
            config = _value_config(args)
            self.model = files.load_pretrained(AutoModelForTokenClassification, name, config=config, **options)
            check_is_causal(self.model)  # a value must not know the tokens after it
        self.model.float()
        models.disable_dropout(self.model)

    def forward(self, hidden: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the value of the state after each position, [B, T] float32."""
        return self.model(**inputs).logits[..., 0].float()


def _value_config(args: FusedPPOConfig) -> PretrainedConfig:
    """Return the configuration of a value model of its own.

    Raises:
        ValueError: it cannot be loaded.
    """
    name, options = args.value_model, {"trust_remote_code": args.trust_remote_code, "num_labels": 1}
    try:
        return files.load_pretrained(AutoConfig, name, **options)
    except Exception as error:  # files that others wrote can fail in any way
        raise ValueError(f"value_model {name} cannot be loaded: {files.damaged_file(name) or error}") from error


def critic_of(policy: nn.Module, args: FusedPPOConfig, checkpoint: str | None) -> nn.Module | None:
    """Return the value model, with a checkpoint's weights if there is one; None where no value is needed."""
    if args.advantage == GROUP:
        return None
    if args.value_model == BACKBONE:
        critic: nn.Module = ValueHead(huggingface.unwrap(policy).config.get_text_config().hidden_size)
    else:
        critic = ValueModel(args.value_model, args)
    if checkpoint is not None:
        critic.load_state_dict(load_file(Path(checkpoint) / CRITIC))
    return critic.to(args.device)


# ---- a minibatch --------------------------------------------------------------------------------------------------


class PPOCollator(UnpairedCollator):
    """Pads samples to a batch. A column of ``TOKEN_COLUMNS`` becomes [B, T] float32, aligned with ``labels``."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self._pad(*([example[name] for example in examples] for name in ("prompt_ids", "completion_ids")))
        width = batch["labels"].shape[1]
        for name in examples[0].keys() & set(TOKEN_COLUMNS):
            rows = torch.zeros(len(examples), width)
            for row, example in zip(rows, examples, strict=True):
                start = len(example["prompt_ids"])
                row[start : start + len(example[name])] = torch.tensor(example[name])
            batch[name] = rows
        return batch


class Measures(NamedTuple):
    """What a minibatch says beside its loss: (sum, weight) of each name."""

    totals: dict[str, tuple[torch.Tensor, torch.Tensor]]


def ppo_loss(
    *,
    head: Head,
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    lm_head_bias: torch.Tensor | None,
    batch: dict[str, torch.Tensor],
    inputs: dict[str, torch.Tensor],
    critic: nn.Module | None,
    args: FusedPPOConfig,
    measures_ratios: bool,
    **options: Any,
) -> tuple[torch.Tensor, Measures]:
    """Return a minibatch's loss, policy and value model together, as the mean that ``head`` takes.

    loss = sum_t w_t [loss_t + value_coef (V_t - R_t)^2] / n, the squared error clipped as ``value_loss`` does. For a
    loss that averages over tokens w_t = 1 and n is their number; over sequences w_t = 1 / (the sequence's tokens), for
    a constant w_t = 1 / ``max_tokens``, and n is the number of sequences.

    ``measures_ratios`` also measures the clip fraction and the KL divergence to the policy that sampled: one more visit
    to the LM head, without a gradient.
    """
    labels = batch["labels"]
    mask = labels != IGNORE_INDEX
    counts = mask.sum(1)
    weights = token_weights(head, counts)
    norm = normalizer(head, labels)
    tensors = {name: batch[name] for name in ("old_logps", "advantages", "ref_token_logps") if name in batch}
    if not getattr(head, "kl_beta", 0.0):
        tensors.pop("ref_token_logps", None)
    if head.normalizer == "items":
        tensors["num_items"] = counts.sum()
    options |= {"lm_head_bias": lm_head_bias, "temperature": args.sampling_temperature}
    policy_loss, metrics = fused_linear_loss(
        head, hidden, lm_head_weight, labels, reduction="sum", weights=weights, **tensors, **options
    )
    tokens = counts.sum()
    loss = policy_loss / norm
    totals = {
        "policy_loss": (policy_loss.detach().double(), norm.double()),
        "entropy": ((metrics.entropy.double() * counts).sum(), tokens.double()),
    }
    if critic is not None:
        shifted = mask[:, 1:]
        returns, old_values = batch["returns"][:, 1:], batch["values"][:, 1:]
        values = critic(hidden, inputs)[:, :-1]
        clipping = {} if args.value_clip is None else {"old_values": old_values, "clip": args.value_clip}
        errors = value_loss(values, returns, mask=shifted, reduction="none", **clipping)
        of_values = (errors * weights[:, None]).sum() / norm
        loss = loss + args.value_coef * of_values
        plain = ((values.detach() - returns).double() ** 2)[shifted].sum()
        totals["value_error"] = plain, tokens.double()
    if measures_ratios:
        totals |= _ratios(head, hidden, lm_head_weight, labels, batch, options)
    totals["loss"] = (loss.detach().double() * norm, norm.double())
    return loss, Measures(totals)


@torch.no_grad()
def _ratios(head: Head, hidden, lm_head_weight, labels, batch, options: dict[str, Any]) -> dict[str, Any]:
    """Return the share of tokens whose gradient is clipped away, and the KL divergence to the policy that sampled.

    The divergence is the mean over the tokens of exp(d) - 1 - d, d = l - lold.
    """
    logps = linear_token_logps(hidden, lm_head_weight, labels, **options)[:, :-1]
    mask = labels[:, 1:] != IGNORE_INDEX
    d = (logps - batch["old_logps"][:, 1:])[mask].double()
    advantages, ratio = batch["advantages"][:, 1:][mask], d.exp()
    tokens = mask.sum().double()
    totals = {"approx_kl": ((torch.expm1(d) - d).sum(), tokens)}
    if hasattr(head, "clip"):  # cispo clips a weight, which has no gradient
        low, high = head.clip if isinstance(head.clip, tuple) else (head.clip, head.clip)
        bound = head.delta or math.inf
        above = torch.where(advantages > 0, min(1 + high, bound), max(1 + high, bound))
        is_clipped = (advantages != 0) & ((ratio > above) | ((advantages < 0) & (ratio < 1 - low)))
        totals["clip_fraction"] = is_clipped.double().sum(), tokens
    return totals


def token_weights(head: Head, counts: torch.Tensor) -> torch.Tensor:
    """Return the weight of each sequence's tokens in ``ppo_loss``, [B] float32."""
    counts = counts.float()
    if head.normalizer == "sequences":
        return 1 / counts.clamp(min=1)
    return torch.full_like(counts, 1 / head.max_tokens if head.normalizer == "constant" else 1.0)


def normalizer(head: Head, labels: torch.Tensor) -> torch.Tensor:
    """Return what ``ppo_loss`` divides by: the number of a batch's completion tokens, or of its sequences."""
    if head.normalizer in ("tokens", "items"):
        return (labels != IGNORE_INDEX).sum().clamp(min=1)
    return torch.tensor(len(labels), device=labels.device)


class FusedPPOTrainer(TakesTokens, FusedTrainer):
    """Trains a policy, and a value model with it, on samples that have advantages.

    Takes the arguments of ``FusedKTOTrainer`` without ``ref_model``, with ``FusedPPOConfig``, and ``critic``, the value
    model (``critic_of``) or None. The training data hold ``prompt_ids``, ``completion_ids``, ``length`` and, one entry
    per completion token, ``old_logps`` and ``advantages``; ``returns`` and ``values`` with a value model;
    ``ref_token_logps`` where the loss has a KL term.

    Accumulated batches and ranks add up to the gradient of one large batch. The value model is saved beside the policy
    as ``critic.safetensors``; the policy's own files are those of a model without one.
    """

    config_class = FusedPPOConfig
    collator_class = PPOCollator
    columns = ("prompt_ids", "completion_ids", "length", *TOKEN_COLUMNS)
    optional_columns = ()
    ref_columns = ()
    tensors = ("old_logps", "advantages", "ref_token_logps")

    def __init__(self, model: nn.Module, *arguments: Any, critic: nn.Module | None = None, **named_arguments: Any):
        super().__init__(model, *arguments, **named_arguments)
        # within the policy, so that wrappers and the optimizer find it; after its checks, which look at the policy
        self._inner = huggingface.unwrap(self.model)
        if critic is not None:
            self._inner.critic = critic
        self.columns = tuple(name for name in type(self).columns if name in self.train_dataset.column_names)

    @property
    def critic(self) -> nn.Module | None:
        return getattr(self._inner, "critic", None)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Measures]:
        """Return a minibatch's mean loss, or with ``num_items_in_batch`` its share of the optimizer step's mean."""
        args, step = self.args, self.state.global_step + 1
        every = max(1, int(self.state.logging_steps or 1))
        model_inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        loss, measures = huggingface.apply(
            ppo_loss,
            model,
            without_padding_mask(model, model_inputs, self.accelerator.mixed_precision),
            head=self.loss,
            batch=inputs,
            inputs=model_inputs,
            critic=self.critic,
            args=args,
            measures_ratios=step % every == 0 or step in (1, self.state.max_steps),
            backend=args.backend,
            chunk_bytes=args.chunk_bytes,
        )
        self._train_totals.add(measures.totals)
        self._num_tokens += inputs["attention_mask"].sum()
        if num_items_in_batch is not None:
            own = normalizer(self.loss, inputs["labels"])
            loss = loss * (own * self.accelerator.num_processes / num_items_in_batch)
        return (loss, measures) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Count what the loss divides by, over the batches of an optimizer step and all ranks."""
        counts = [normalizer(self.loss, batch["labels"]) for batch in batch_samples]
        count = torch.stack(counts).sum().to(device) if counts else torch.ones((), device=device)
        return count if self.args.world_size == 1 else self.accelerator.gather(count[None]).sum()

    # ---- saving and loading: the value model is beside the policy, not in it ----

    @contextmanager
    def _without_critic(self) -> Iterator[None]:
        critic = self.critic
        if critic is not None:
            del self._inner.critic
        try:
            yield
        finally:
            if critic is not None:
                self._inner.critic = critic

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with self._without_critic():
            super()._save(output_dir, state_dict)
        if self.critic is not None and self.args.should_save:
            state = {name: tensor.contiguous().clone() for name, tensor in self.critic.state_dict().items()}
            save_file(state, Path(output_dir or self.args.output_dir) / CRITIC)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._without_critic():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.critic is not None:
            self.critic.load_state_dict(load_file(Path(resume_from_checkpoint) / CRITIC))


# ---- the loop -----------------------------------------------------------------------------------------------------


class PPOLoop(Loop):
    """PPO (Schulman et al. 2017, arXiv 1707.06347; on language models Ouyang et al. 2022, arXiv 2203.02155), or GRPO
    (Shao et al. 2024, arXiv 2402.03300) and its relatives with ``advantage="group"``.

    With l, lref the log-probabilities of a sample's token under policy and reference, c = ``beta`` and S the sample's
    score: its tokens' rewards are -c (l - lref), plus S at the last one, and the advantages GAE's; or the advantage of
    all its tokens is S minus the mean score of the prompt's samples (over their standard deviation).
    """

    config: FusedPPOConfig

    def __init__(self, settings: LoopSettings, config: FusedPPOConfig, **arguments: Any):
        if settings.temperature != config.sampling_temperature:
            raise ValueError(
                f"sampling_temperature={config.sampling_temperature} is not the samples' temperature, "
                f"{settings.temperature}"
            )
        if arguments.get("loss") is not None:
            raise ValueError("loss is given, and PPOLoop trains the token-level losses that config.loss_type names")
        if settings.threshold != "mean":
            raise ValueError("threshold has no meaning here: the scores themselves are the rewards")
        if config.value_model != BACKBONE:
            _value_config(config)  # before the first round's samples are drawn
        self.least_samples = 2 if config.advantage == GROUP else 1
        super().__init__(settings, config, **arguments)
        if config.value_model != BACKBONE:
            known, needed = _value_config(config).get_text_config().vocab_size, len(self.tokenizer)
            if known < needed:
                raise ValueError(
                    f"value_model {config.value_model} has embeddings of {known} tokens, and the policy's tokenizer "
                    f"has {needed}: expected a model with the policy's tokenizer"
                )

    def training_data(self, number: int, policy: nn.Module, samples: list[Scored]) -> TrainingData:
        args = self.config
        rows = [(self._by_number[one.sample.prompt].ids, one.sample.ids) for one in samples]
        columns: dict[str, list] = {
            "prompt_ids": [prompt for prompt, _ in rows],
            "completion_ids": [ids for _, ids in rows],
            "length": [len(prompt) + len(ids) for prompt, ids in rows],
            "old_logps": [one.logps for one in samples],
        }
        found: dict[str, Any] = {}
        scores = np.array([one.score for one in samples])
        if args.beta or args.kl_target is not None:
            ref_logps = [one.logps for one in self._reference_values(policy, rows)]
            kls = [sum(one.logps) - sum(ref) for one, ref in zip(samples, ref_logps, strict=True)]
            found["kl_reference"] = float(np.mean(kls))
        else:
            ref_logps = columns["old_logps"]
        if args.advantage == GROUP:
            columns["advantages"] = self._relative(number, samples, scores)
            if args.beta:
                columns["ref_token_logps"] = ref_logps
        else:
            found |= self._estimated(number, policy, rows, samples, ref_logps, columns)
        features = {name: List(Value("float32")) for name in columns}
        features |= {"prompt_ids": TOKENS, "completion_ids": TOKENS, "length": Value("int32")}
        return TrainingData(Dataset.from_dict(columns, features=Features(features)), found)

    def _relative(self, number: int, samples: list[Scored], scores: np.ndarray) -> list[list[float]]:
        groups = scores.reshape(-1, self.samples)
        # the exact mean, so that equal scores have the advantage 0 whatever their rounding
        advantages = groups - np.array([[mean(group)] for group in groups.tolist()])
        if not advantages.any():
            self._nothing(number)
        if self.config.scale_by_std:
            advantages = advantages / (groups.std(1, ddof=1, keepdims=True) + 1e-4)  # TRL's epsilon
        every = advantages.flatten().tolist()
        return [[value] * len(one.sample.ids) for value, one in zip(every, samples, strict=True)]

    def _estimated(
        self,
        number: int,
        policy: nn.Module,
        rows: list[tuple[list[int], list[int]]],
        samples: list[Scored],
        ref_logps: list[list[float]],
        columns: dict[str, list],
    ) -> dict[str, Any]:
        """Add GAE's ``advantages`` and ``returns``, and the ``values``; return what is logged."""
        args, beta = self.config, self._beta(number)
        critic = critic_of(policy, args, self.checkpoint_before(number))
        counts = torch.tensor([len(ids) for _, ids in rows], device=args.device)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])

        def packed(of_samples: list[list[float]]) -> torch.Tensor:
            every = [value for of_tokens in of_samples for value in of_tokens]
            return torch.tensor(every, dtype=torch.float64, device=args.device)

        values = packed([one.values for one in self.token_values(policy, rows, critic)])
        rewards = -beta * (packed([one.logps for one in samples]) - packed(ref_logps))
        rewards[offsets[1:] - 1] += packed([[one.score] for one in samples])
        advantages, returns = gae(
            rewards, values, gamma=args.gamma, lam=args.lam, cu_seqlens=offsets, backend=args.backend
        )
        explained = 1 - (returns - values).var() / returns.var()
        found = {"beta": beta, "return": returns.mean().item(), "explained_variance": explained.item()}
        if not math.isfinite(found["explained_variance"]):
            found.pop("explained_variance")  # all returns are equal
        if args.whiten:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        for name, each in (("advantages", advantages), ("returns", returns), ("values", values)):
            columns[name] = [part.tolist() for part in each.split(counts.tolist())]
        return found

    def _beta(self, number: int) -> float:
        """Return the KL coefficient of a round, adapted by the divergence of the round before it.

        Ziegler et al. 2019, arXiv 1909.08593: beta (1 + clip(KL / target - 1, -0.2, 0.2) min(samples / horizon, 1)).
        The minimum is of this package: without it, a round of more samples than the horizon could make beta negative.
        """
        if number == 1 or self.config.kl_target is None:
            return self.config.beta
        before = self.state["rounds"][number - 2]
        error = min(max(before["kl_reference"] / self.config.kl_target - 1, -0.2), 0.2)
        return before["beta"] * (1 + error * min(before["samples"] / self.config.kl_horizon, 1.0))

    def _reference_values(self, policy: nn.Module, rows: list[tuple[list[int], list[int]]]) -> list[TokenValues]:
        reference = self.reference()
        if reference is not None:
            return self.token_values(reference, rows)
        with policy.disable_adapter():
            return self.token_values(policy, rows)

    def make_trainer(self, number: int, policy: nn.Module, **arguments: Any) -> FusedTrainer:
        critic = critic_of(policy, self.config, self.checkpoint_before(number))
        return FusedPPOTrainer(policy, critic=critic, **arguments)
