"""The whole loss of TRL's experimental ``CPOTrainer`` and ``ORPOTrainer``, which have no reference model.

TRL computes logits, and from them the loss and the logged values. Here one call at the LM head computes the loss; the
logged mean of all logits, prompts and padding included, is the mean hidden state times the mean row of the LM head.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Trainer

from .. import heads, huggingface
from ..functional import fused_linear_loss
from ..heads.pairs import log1mexp, odds_ratio_loss
from ..huggingface.config import logit_options
from ..huggingface.forward import FusedCall
from ..metrics import LossMetrics

# losses of CPOTrainer that divide log-probabilities by the completions' lengths
LENGTH_AVERAGED = ("ipo", "simpo")


# ---- Which loss it is ----------------------------------------------------------------------------------------------


def cpo_head(trainer: Trainer) -> heads.Head:
    """Return the loss that a ``CPOTrainer``'s settings ask for.

    Raises:
        ValueError: no head is defined as TRL's loss is. The message names the setting.
    """
    if trainer.loss_type != "simpo":
        if trainer.alpha != 0:
            raise ValueError(f"alpha={trainer.alpha} belongs to 'simpo' here, loss_type is {trainer.loss_type!r}")
        smoothing = trainer.label_smoothing if trainer.loss_type == "sigmoid" else 0.0  # TRL ignores it elsewhere
        fields = {"beta": trainer.beta, "cpo_alpha": trainer.cpo_alpha, "label_smoothing": smoothing}
        return heads.make("cpo", loss_type=trainer.loss_type, **fields)
    fields = {"beta": trainer.beta, "gamma": trainer.simpo_gamma, "label_smoothing": trainer.label_smoothing}
    if trainer.alpha != 0:
        preference = heads.make("alphapo", alpha=trainer.alpha, **fields)
    else:
        preference = heads.make("simpo", **fields)
    if trainer.cpo_alpha == 0:
        return preference
    return heads.Mix((1.0, preference), (float(trainer.cpo_alpha), heads.make("sft")))


def why_trl_keeps_cpo_loss(trainer: Trainer) -> str | None:
    """Return why TRL computes the loss of a ``CPOTrainer`` with these settings, or None."""
    try:
        cpo_head(trainer)
    except ValueError as error:
        return str(error)
    return _why_trl_keeps_logits(trainer)


def why_trl_keeps_orpo_loss(trainer: Trainer) -> str | None:
    """Return why TRL computes the loss of an ``ORPOTrainer`` with these settings, or None."""
    try:
        _orpo_head(trainer)
    except ValueError as error:
        return str(error)
    return _why_trl_keeps_logits(trainer)


def _orpo_head(trainer: Trainer) -> heads.Head:
    return heads.make("orpo", beta=trainer.beta, nll_on="all")


def _why_trl_keeps_logits(trainer: Trainer) -> str | None:
    """Return why the values that TRL's experimental trainers compute from logits cannot be computed here, or None."""
    if trainer.aux_loss_enabled:
        return "output_router_logits=True adds a load-balancing loss that only the model's own forward computes"
    if logit_options(huggingface.unwrap(trainer.model).config).get("logit_softcap") is not None:
        return "the model caps its logits, and TRL logs the mean of all capped logits, prompts and padding included"
    return None


# ---- The whole loss ------------------------------------------------------------------------------------------------


def cpo_loss_metrics(
    self: Trainer, model: nn.Module, batch: dict[str, Any], train_eval: str = "train"
) -> tuple[torch.Tensor, dict[str, float]]:
    """Replace ``CPOTrainer.get_batch_loss_metrics``: return the loss and the values to log."""
    if why_trl_keeps_cpo_loss(self) is not None:  # a setting that changed since fuse
        return type(self).get_batch_loss_metrics(self, model, batch, train_eval)
    joined = self.concatenated_inputs(
        batch,
        is_encoder_decoder=self.is_encoder_decoder,
        padding_value=self.pad_token_id,
        device=self.accelerator.device,
    )
    called = _call(model, joined, head=cpo_head(self), labels=joined["concatenated_labels"])
    counts, sums = called.metrics.token_counts.double(), called.metrics.logps
    logps = sums / counts.clamp(min=1) if self.loss_type in LENGTH_AVERAGED else sums
    rewards = self.beta * (logps if self.alpha == 0 else -torch.expm1(-self.alpha * logps) / self.alpha)
    nll = torch.zeros_like(sums[0])
    if self.cpo_alpha != 0:
        nll = -sums.chunk(2)[0].sum() / counts.chunk(2)[0].sum().clamp(min=1)
    return called.loss, _logged(self, called, rewards, logps, train_eval, nll_loss=nll)


def orpo_loss_metrics(
    self: Trainer, model: nn.Module, batch: dict[str, Any], train_eval: str = "train"
) -> tuple[torch.Tensor, dict[str, float]]:
    """Replace ``ORPOTrainer.get_batch_loss_metrics``: return the loss and the values to log."""
    if why_trl_keeps_orpo_loss(self) is not None:  # a setting that changed since fuse
        return type(self).get_batch_loss_metrics(self, model, batch, train_eval)
    joined = self.concatenated_inputs(
        batch,
        is_encoder_decoder=self.is_encoder_decoder,
        padding_value=self.padding_value,
        device=self.accelerator.device,
    )
    is_completion = joined["concatenated_labels"] != -100
    # the likelihood is that of chosen prompts and completions; rejected prompts are not read
    is_chosen = torch.arange(len(is_completion), device=is_completion.device)[:, None] < len(is_completion) // 2
    is_read = is_completion | (is_chosen & (joined["concatenated_attention_mask"] == 1))
    labels = joined["concatenated_input_ids"].masked_fill(~is_read, -100)
    arguments = {"head": _orpo_head(self), "labels": labels, "completion_mask": is_completion}
    called = _call(model, joined, positions=slice(0, -1), **arguments)
    logps = called.metrics.logps / is_completion[:, 1:].sum(1).clamp(min=1)
    chosen, rejected = logps.chunk(2)
    log_odds = chosen - rejected - (log1mexp(chosen) - log1mexp(rejected))
    ratio = -odds_ratio_loss(chosen, rejected).mean()  # log sigma of the log-odds
    means = {
        "nll_loss": called.loss.detach() + self.beta * ratio,
        "log_odds_ratio": ratio,
        "log_odds_chosen": log_odds.mean(),
    }
    return called.loss, _logged(self, called, self.beta * logps, logps, train_eval, **means)


class CalledAtHead(NamedTuple):
    """What one call at the LM head returns."""

    loss: torch.Tensor
    metrics: LossMetrics
    mean_logits: torch.Tensor  # [2] of the chosen and of the rejected sequences


def _call(
    model: nn.Module, joined: dict[str, torch.Tensor], positions: slice = slice(None), **arguments: Any
) -> CalledAtHead:
    """Call a loss at the LM head. The mean of all logits is taken over the ``positions`` of the sequences."""
    # The mask stays, also where padding is on the right: TRL logs the padding's logits.
    gradient_path, outcome = model(
        input_ids=joined["concatenated_input_ids"],
        attention_mask=joined["concatenated_attention_mask"],
        fused_lm_head=FusedCall(_loss_and_mean_logits, {"positions": positions, **arguments}),
    )
    return CalledAtHead(*outcome.results(gradient_path))


def _loss_and_mean_logits(*, hidden: torch.Tensor, positions: slice, **arguments: Any) -> CalledAtHead:
    loss, metrics = fused_linear_loss(hidden=hidden, **arguments)
    with torch.no_grad():
        weight, bias = arguments["lm_head_weight"], arguments["lm_head_bias"]
        mean_hidden = torch.stack([half.mean((0, 1), dtype=torch.float32) for half in hidden[:, positions].chunk(2)])
        mean_logits = mean_hidden @ weight.mean(0, dtype=torch.float32)
        if bias is not None:
            mean_logits = mean_logits + bias.mean(dtype=torch.float32)
    return CalledAtHead(loss, metrics, arguments.get("logit_scale", 1.0) * mean_logits)


def _logged(
    trainer: Trainer,
    called: CalledAtHead,
    rewards: torch.Tensor,
    logps: torch.Tensor,
    train_eval: str,
    **means: torch.Tensor,
) -> dict[str, float]:
    """Return the values that TRL logs, with one wait for the device. ``rewards`` and ``logps`` are [sequences]."""
    gather = trainer.accelerator.gather_for_metrics
    chosen, rejected = rewards.chunk(2)
    of_pairs = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).double(),
        "rewards/margins": chosen - rejected,
        "logps/chosen": logps.chunk(2)[0],
        "logps/rejected": logps.chunk(2)[1],
    }
    of_batches = {"logits/chosen": called.mean_logits[0], "logits/rejected": called.mean_logits[1], **means}
    values = torch.cat(
        [
            gather(torch.stack(list(of_pairs.values()), 1)).mean(0),
            gather(torch.stack([x.double() for x in of_batches.values()])[None]).mean(0),
        ]
    ).tolist()
    prefix = "eval_" if train_eval == "eval" else ""
    return {prefix + name: value for name, value in zip((*of_pairs, *of_batches), values, strict=True)}
