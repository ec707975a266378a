"""PPO and the group-relative methods: rounds whose training data are the samples with their advantages.

``PPOLoop`` samples, asks the judge, and makes of the scores one advantage per token: generalised advantage estimates
from a value model, or scores relative to those of the prompt's other samples. ``FusedPPOTrainer`` trains policy and
value model on them, on minibatches, by the token-level losses of ``heads.tokens`` or by ``gspo``.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from safetensors.torch import load_file, save_file
from torch import nn

from .. import huggingface
from ..advantages import gae
from ..data.collators import IGNORE_INDEX, UnpairedCollator
from ..data.tokens import TOKENS
from ..functional import fused_linear_loss, fused_loss, linear_token_logps, token_logps
from ..heads.protocol import Head, Mix
from ..heads.reward import value_loss
from . import losses
from .base import Functions, FusedTrainer
from .ppo_config import BACKBONE, GROUP, FusedPPOConfig
from .round_settings import LoopSettings
from .rounds import Loop, Scored, TakesTokens, TrainingData
from .token_values import Row, TokenValues
from .value_models import CRITIC, critic_of, value_config

logger = logging.getLogger(__name__)

TOKEN_COLUMNS = ("old_logps", "advantages", "returns", "values", "ref_token_logps")  # one entry per completion token


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


def loss_from_hidden(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    *,
    values_of: Callable[[torch.Tensor | None], torch.Tensor] | None,
    **arguments: Any,
) -> tuple[torch.Tensor, Measures]:
    """Return ``ppo_loss`` of hidden states. ``values_of`` is the value model on the batch."""
    source = {"hidden": hidden, "lm_head_weight": lm_head_weight}
    values = None if values_of is None else values_of(hidden)
    return ppo_loss(fused_linear_loss, linear_token_logps, source, values, **arguments)


def loss_from_logits(
    logits: torch.Tensor,
    *,
    values_of: Callable[[torch.Tensor | None], torch.Tensor] | None,
    inplace_backward: bool,
    **arguments: Any,
) -> tuple[torch.Tensor, Measures]:
    """Return ``ppo_loss`` of logits, which its backward may overwrite."""
    values = None if values_of is None else values_of(None)

    def loss_of(head: Head, policy_logits: torch.Tensor, **options: Any) -> Any:
        return fused_loss(head, policy_logits, inplace_backward=inplace_backward, **options)

    def logps_of(policy_logits: torch.Tensor, **options: Any) -> torch.Tensor:
        return token_logps(policy_logits, **options)

    return ppo_loss(loss_of, logps_of, {"policy_logits": logits}, values, **arguments)


def ppo_loss(
    loss_of: Callable[..., Any],
    logps_of: Callable[..., torch.Tensor],
    source: dict[str, torch.Tensor],
    values: torch.Tensor | None,
    *,
    head: Head,
    labels: torch.Tensor,
    batch: dict[str, torch.Tensor],
    args: FusedPPOConfig,
    measures_ratios: bool,
    **options: Any,
) -> tuple[torch.Tensor, Measures]:
    """Return a minibatch's loss, policy and value model together, as the mean that ``head`` takes.

    loss = sum_t w_t [loss_t + value_coef (V_t - R_t)^2] / n, the squared error clipped as ``value_loss`` does. For a
    loss that averages over tokens w_t = 1 and n is their number; over sequences w_t = 1 / (the sequence's tokens), for
    a constant w_t = 1 / ``max_tokens``, and n is the number of sequences. ``gspo`` is the mean over the sequences.

    Args:
        loss_of, logps_of: ``fused_linear_loss`` and ``linear_token_logps``, or their twins from logits.
        source: the hidden states and the LM head, or the logits, by the names of these functions' arguments.
        values: [B, T] of the state after each position; None without a value model.
        measures_ratios: whether to measure the clip fraction and the KL divergence to the policy that sampled too: one
            more visit to the LM head, without a gradient.
    """
    mask = labels != IGNORE_INDEX
    counts = mask.sum(1)
    tokens, norm = counts.sum(), normalizer(head, labels)
    options |= source | {"labels": labels, "temperature": args.sampling_temperature}
    totals = {}
    if measures_ratios:
        with torch.no_grad():
            totals |= ratio_totals(head, logps_of(**options), labels, batch)
    tensors = {name: batch[name] for name in ("old_logps", "advantages") if name in batch}
    if isinstance(head, Mix) or getattr(head, "kl_beta", 0.0):
        tensors["ref_token_logps"] = batch["ref_token_logps"]
    if losses.parts(head)[0].level == "sequence":
        tensors["advantages"] = of_sequences(batch["advantages"], mask)
        loss, metrics = loss_of(head, **tensors, **options)
    else:
        weights = token_weights(head, counts)
        if head.normalizer == "items":
            tensors["num_items"] = tokens
        total, metrics = loss_of(head, reduction="sum", weights=weights, **tensors, **options)
        loss = total / norm
    totals["policy_loss"] = loss.detach().double() * norm, norm.double()
    totals["entropy"] = (metrics.entropy.double() * counts).sum(), tokens.double()
    if values is not None:
        shifted = mask[:, 1:]
        returns, old_values = batch["returns"][:, 1:], batch["values"][:, 1:]
        values = values[:, :-1]
        clipping = {} if args.value_clip is None else {"old_values": old_values, "clip": args.value_clip}
        errors = value_loss(values, returns, mask=shifted, reduction="none", **clipping)
        of_values = (errors * weights[:, None]).sum() / norm
        loss = loss + args.value_coef * of_values
        plain = ((values.detach() - returns).double() ** 2)[shifted].sum()
        totals["value_error"] = plain, tokens.double()
    totals["loss"] = (loss.detach().double() * norm, norm.double())
    return loss, Measures(totals)


def ratio_totals(head: Head, logps: torch.Tensor, labels: torch.Tensor, batch: dict[str, torch.Tensor]) -> dict:
    """Return the share of ratios whose gradient is clipped away, and the KL divergence to the policy that sampled.

    The ratios are those of the tokens, for ``gspo`` those of the sequences. The divergence is the mean over the tokens
    of exp(d) - 1 - d, d = l - lold.

    Args:
        logps: [B, T] of the tokens ``labels[:, t + 1]``.
    """
    mask = labels[:, 1:] != IGNORE_INDEX
    every = (logps[:, :-1] - batch["old_logps"][:, 1:]).double().where(mask, 0.0)
    d, advantages, tokens = every[mask], batch["advantages"][:, 1:][mask], mask.sum().double()
    totals = {"approx_kl": ((torch.expm1(d) - d).sum(), tokens)}
    main = losses.parts(head)[0]
    if not hasattr(main, "clip"):  # cispo clips a weight, which has no gradient, and sapo has a soft gate
        return totals
    if main.level == "sequence":
        d, advantages = every.sum(1) / mask.sum(1).clamp(min=1), of_sequences(batch["advantages"][:, 1:], mask)
    ratio, count = d.exp(), torch.tensor(float(len(d)), dtype=torch.float64, device=d.device)
    low, high = main.clip if isinstance(main.clip, tuple) else (main.clip, main.clip)
    bound = main.delta or math.inf
    above = torch.where(advantages > 0, min(1 + high, bound), max(1 + high, bound))
    is_clipped = (advantages != 0) & ((ratio > above) | ((advantages < 0) & (ratio < 1 - low)))
    return totals | {"clip_fraction": (is_clipped.double().sum(), count)}


def of_sequences(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the one advantage that all tokens of a sequence share, [B], of [B, T]."""
    return advantages.gather(1, mask.int().argmax(1, keepdim=True))[:, 0]


def token_weights(head: Head, counts: torch.Tensor) -> torch.Tensor:
    """Return the weight of each sequence's tokens in ``ppo_loss``, [B] float32."""
    counts = counts.float()
    if head.normalizer == "sequences":
        return 1 / counts.clamp(min=1)
    return torch.full_like(counts, 1 / head.max_tokens if head.normalizer == "constant" else 1.0)


def normalizer(head: Head, labels: torch.Tensor) -> torch.Tensor:
    """Return what ``ppo_loss`` divides by: the number of a batch's completion tokens, or of its sequences."""
    if losses.parts(head)[0].normalizer in ("tokens", "items"):
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
    loss_functions = Functions(loss_from_hidden, loss_from_logits)

    def __init__(self, model: nn.Module, *arguments: Any, critic: nn.Module | None = None, **named_arguments: Any):
        super().__init__(model, *arguments, **named_arguments)
        # within the policy, so that wrappers and the optimizer find it; after its checks, which look at the policy
        self._inner = huggingface.unwrap(self.model)
        if critic is not None:
            self._inner.critic = critic
        self.columns = tuple(name for name in type(self).columns if name in self.train_dataset.column_names)

    def _say_how_the_loss_is_computed(self) -> None:
        pass  # it is registered, and its mean is that of all batches of a step

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
        loss, measures = self._apply(
            self.loss_functions,
            model,
            inputs,
            head=self.loss,
            batch=inputs,
            values_of=None if self.critic is None else partial(self.critic, inputs=model_inputs),
            args=args,
            measures_ratios=step % every == 0 or step in (1, self.state.max_steps),
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

    trainer_class = FusedPPOTrainer
    config: FusedPPOConfig

    def __init__(self, settings: LoopSettings, config: FusedPPOConfig, **arguments: Any):
        if settings.temperature != config.sampling_temperature:
            raise ValueError(
                f"sampling_temperature={config.sampling_temperature} is not the samples' temperature, "
                f"{settings.temperature}"
            )
        if arguments.get("loss") is not None:
            raise ValueError("loss is given, and PPOLoop trains the losses that config.loss_type names")
        if settings.threshold != "mean":
            raise ValueError("threshold has no meaning here: the scores themselves are the rewards")
        if config.value_model != BACKBONE:
            value_config(config)  # before the first round's samples are drawn
        self.least_samples = 2 if config.advantage == GROUP else 1
        super().__init__(settings, config, **arguments)
        if config.value_model != BACKBONE:
            known, needed = value_config(config).get_text_config().vocab_size, len(self.tokenizer)
            if known < needed:
                raise ValueError(
                    f"value_model {config.value_model} has embeddings of {known} tokens, and the policy's tokenizer "
                    f"has {needed}: expected a model with the policy's tokenizer"
                )

    def takes_ref_model(self) -> bool:
        return self.config.beta > 0

    def why_no_ref_model(self) -> str:
        return "beta=0 leaves the KL divergence to it out"

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
        if args.beta:
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
        rows: list[Row],
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
        if len({one.score for one in samples}) == 1:
            logger.warning(
                f"Round {number}: all samples have the score {samples[0].score:g}, from which a policy learns nothing: "
                "only the KL divergence tells them apart."
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

    def _reference_values(self, policy: nn.Module, rows: list[Row]) -> list[TokenValues]:
        reference = self.reference()
        if reference is not None:
            return self.token_values(reference, rows)
        with policy.disable_adapter():
            return self.token_values(policy, rows)

    def make_trainer(self, number: int, policy: nn.Module, **arguments: Any) -> FusedTrainer:
        critic = critic_of(policy, self.config, self.checkpoint_before(number))
        return FusedPPOTrainer(policy, critic=critic, **arguments)
