"""The whole loss of TRL's ``GRPOTrainer``: one call at the LM head in place of the trainer's ``_compute_loss``.

The old policy's and the reference's log-probabilities, which TRL asks for while it makes a batch, come from this
package too (``trl_model.py``). The call returns each token's log-probability and entropy beside the loss, from which
the clip ratios, the KL divergence and the entropy are logged as TRL logs them.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer

from .. import heads
from ..functional import fused_linear_loss, linear_token_logps
from ..heads.tokens import kl_estimates
from ..huggingface.forward import FusedCall

# losses of TRL that clip PPO's ratio, by what the tokens' sum is divided by, see ``heads.tokens.NORMALIZERS``
CLIPPED = {"grpo": "sequences", "bnpo": "tokens", "dr_grpo": "constant", "luspo": "constant", "dapo": "items"}
# losses of TRL that divide by the number of tokens of all ranks and accumulated batches
PER_ITEM = ("dapo", "cispo", "vespo")


# ---- Which loss it is ----------------------------------------------------------------------------------------------


def grpo_head(trainer: Trainer, on_policy: bool) -> heads.Head:
    """Return the loss that a ``GRPOTrainer``'s settings ask for. ``on_policy``: the batch has no old log-probabilities.

    Raises:
        ValueError: no head is defined as TRL's loss is. The message names the setting.
    """
    loss_type, level, args = trainer.loss_type, trainer.importance_sampling_level, trainer.args
    of_kl = {"kl_beta": trainer.beta, "kl_ratio": args.use_bias_correction_kl}
    if loss_type == "cispo" and level == "token":
        return heads.make("cispo", clip_high=trainer.epsilon_high, on_policy=on_policy, **of_kl)
    if loss_type == "sapo" and level == "token":
        taus = {"tau_pos": args.sapo_temperature_pos, "tau_neg": args.sapo_temperature_neg}
        return heads.make("sapo", on_policy=on_policy, **taus, **of_kl)
    if loss_type == "vespo" and trainer.beta == 0:
        fields = {name: getattr(args, f"vespo_{name}") for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")}
        return heads.make("vespo", normalizer="items", on_policy=on_policy, **fields)
    if loss_type == "vespo":
        raise ValueError(f"beta={trainer.beta} adds losses of tokens to loss_type='vespo'")
    if loss_type not in CLIPPED:
        raise ValueError(
            f"loss_type={loss_type!r} with importance_sampling_level={level!r} is not one of {list(CLIPPED)}"
        )
    if level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level={level!r} is neither 'token' nor 'sequence'")
    if level == "sequence" and trainer.beta != 0:
        raise ValueError(f"beta={trainer.beta} adds losses of tokens to importance_sampling_level='sequence'")
    if args.delta is not None and args.delta <= 0:
        raise ValueError(f"delta={args.delta} is not positive")
    normalizer = CLIPPED[loss_type]
    max_tokens = {"dr_grpo": trainer.max_completion_length, "luspo": 1}.get(loss_type, 0)  # luspo divides by B alone
    fields = {"normalizer": normalizer, "max_tokens": max_tokens, "on_policy": on_policy}
    fields |= {"clip": (trainer.epsilon_low, trainer.epsilon_high), "delta": args.delta or 0.0}
    return heads.make("gspo", **fields) if level == "sequence" else heads.make("ppo", **fields, **of_kl)


def why_trl_keeps_grpo_loss(trainer: Trainer) -> str | None:
    """Return why TRL computes the loss of a ``GRPOTrainer`` with these settings, or None."""
    if trainer.top_entropy_quantile < 1.0:
        return f"top_entropy_quantile={trainer.top_entropy_quantile} chooses tokens by the entropy of all"
    if trainer.off_policy_mask_threshold is not None:
        return f"off_policy_mask_threshold={trainer.off_policy_mask_threshold} drops sequences by their new log-ratio"
    try:
        grpo_head(trainer, on_policy=True)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def why_trl_keeps_grpo(trainer: Trainer) -> str | None:
    """Return why nothing of a ``GRPOTrainer`` with these settings can be taken over, or None."""
    if trainer._entropy_bonus_enabled:
        return "entropy_coef trains by the entropy, which has no gradient here"
    return None


# ---- The whole loss ------------------------------------------------------------------------------------------------


def grpo_loss(self: Trainer, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Replace ``GRPOTrainer._compute_loss``."""
    is_vespo = self.loss_type == "vespo"
    is_of_sequences = is_vespo or self.importance_sampling_level == "sequence"
    advantages, old_logps = inputs["advantages"], inputs.get("old_per_token_logps")
    correction = inputs.get("importance_sampling_ratio")  # of vLLM's log-probabilities, with which old ones come
    is_unknown = (is_of_sequences and advantages.ndim == 2) or (
        is_vespo and correction is not None and old_logps is None
    )
    if is_unknown or why_trl_keeps_grpo_loss(self) is not None:
        return type(self)._compute_loss(self, model, inputs)  # a setting that changed since fuse, or a subclass's batch
    prompt_ids, completion_ids = inputs["prompt_ids"], inputs["completion_ids"]
    completion_mask, num_prompt = inputs["completion_mask"], prompt_ids.shape[1]
    mask = completion_mask * inputs["tool_mask"] if "tool_mask" in inputs else completion_mask
    if advantages.ndim == 1:
        advantages = advantages[:, None]

    weighted_advantages = advantages.expand(mask.shape)
    if self.use_vllm and self.vllm_importance_sampling_correction and not is_vespo:
        # a factor >= 0 of a token's loss without its KL term is a factor of the advantage
        weighted_advantages = weighted_advantages * correction
    tensors = {"advantages": weighted_advantages}
    if old_logps is not None:
        tensors["old_logps"] = old_logps
    if self.beta != 0:
        tensors["ref_token_logps"] = inputs["ref_per_token_logps"]
    # entry t belongs to the token at t: the prompt's entries are not read
    tensors = {name: F.pad(values, (num_prompt, 0)) for name, values in tensors.items()}
    if is_vespo:
        tensors["advantages"] = advantages[:, 0]
        if correction is not None:  # a factor of the sequence's importance ratio
            log_correction = correction.log().clamp(math.log(1e-8), 20.0).sum(-1)
            tensors["old_logps"] = (old_logps * mask).sum(1) - log_correction
    elif is_of_sequences:
        tensors["advantages"] = (weighted_advantages * mask).sum(1) / mask.sum(1).clamp(min=1)
    is_training = self.model.training
    steps = self.current_gradient_accumulation_steps if is_training else 1.0  # an evaluation accumulates nothing
    if self.loss_type in PER_ITEM:
        num_items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if is_training:  # TRL counts the tokens of all batches that were generated together
            num_items = num_items * steps / self.args.steps_per_generation
        tensors["num_items"] = num_items

    router = {"output_router_logits": True} if self.aux_loss_enabled else {}
    arguments = {
        "head": grpo_head(self, on_policy=old_logps is None),
        "labels": F.pad(completion_ids.masked_fill(mask == 0, -100), (num_prompt, 0), value=-100),
        "return_tokens": not is_of_sequences,
        "temperature": self.temperature,  # at which TRL samples and scores
        **tensors,
    }
    gradient_path, outcome = model(
        input_ids=torch.cat([prompt_ids, completion_ids], dim=1),
        attention_mask=torch.cat([inputs["prompt_mask"], completion_mask], dim=1),
        fused_lm_head=FusedCall(fused_linear_loss, arguments),
        **router,
    )
    loss, *values = outcome.results(gradient_path)
    if is_of_sequences:
        (metrics,) = values
        (ratios,) = metrics.reported.values()
        ratios, entropy, kl = ratios[:, None], metrics.entropy * metrics.token_counts, None
    else:
        logps, metrics = values
        predicting = slice(num_prompt - 1, -1)  # the positions that predict the completion's tokens
        logps, entropy = logps[:, predicting], metrics.entropy[:, predicting] * mask
        ratios = torch.ones_like(logps) if old_logps is None else torch.exp(logps - old_logps)
        kl = _kl(self, logps, inputs, ratios) if self.beta != 0 else None
    if self.loss_type not in PER_ITEM:
        loss = loss / steps
    if self.aux_loss_enabled:
        loss = loss + self.router_aux_loss_coef * outcome.aux_loss / steps
    _log(self, mask, entropy, kl, _measured(self, ratios, advantages), outcome.aux_loss)
    return loss


def grpo_token_logps(
    self: Trainer,
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int,
    batch_size: int | None = None,
    compute_entropy: bool = False,
    **others: Any,
) -> tuple[torch.Tensor, None, None]:
    """Replace ``GRPOTrainer._get_per_token_logps_and_entropies`` before TRL 1.15, which reads logits, for the old and
    the reference's log-probabilities of the last ``logits_to_keep`` tokens.
    """
    if compute_entropy:  # TRL's own loss, for a setting that changed since fuse
        others |= {"batch_size": batch_size, "compute_entropy": True}
        method = type(self)._get_per_token_logps_and_entropies
        return method(self, model, input_ids, attention_mask, logits_to_keep, **others)
    parts, size = [], batch_size or len(input_ids)
    for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True):
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :-logits_to_keep] = -100
        call = FusedCall(linear_token_logps, {"labels": labels, "temperature": self.temperature})
        gradient_path, outcome = model(input_ids=ids, attention_mask=mask, fused_lm_head=call)
        (logps,) = outcome.results(gradient_path)
        parts.append(logps[:, -logits_to_keep - 1 : -1])
    return torch.cat(parts), None, None


# ---- The logged values ---------------------------------------------------------------------------------------------


@torch.no_grad()
def _kl(trainer: Trainer, logps: torch.Tensor, inputs: dict[str, Any], ratios: torch.Tensor) -> torch.Tensor:
    estimates = kl_estimates(logps, inputs["ref_per_token_logps"])
    return estimates * ratios if trainer.args.use_bias_correction_kl else estimates


def _measured(trainer: Trainer, ratios: torch.Tensor, advantages: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return by name which importance ratios are clipped: [B, T] of tokens, or [B, 1] of sequences. For ``vespo``,
    whose ``ratios`` are its weights phi, return these.
    """
    low, high = trainer.epsilon_low, trainer.epsilon_high
    if trainer.loss_type == "vespo":
        return {"vespo/phi_seq_mean": ratios}
    if trainer.loss_type == "sapo":
        return {}
    if trainer.loss_type == "cispo":
        return {"cispo_clip_ratio": (ratios > high) & (advantages > 0)}
    if trainer.args.delta is not None:
        ratios = ratios.clamp(max=trainer.args.delta)
    is_low, is_high = (ratios < 1 - low) & (advantages < 0), (ratios > 1 + high) & (advantages > 0)
    names = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
    return dict(zip(names, (is_low, is_high, is_low | is_high), strict=True))


@torch.no_grad()
def _log(
    trainer: Trainer,
    mask: torch.Tensor,
    entropy: torch.Tensor,
    kl: torch.Tensor | None,
    measured: dict[str, torch.Tensor],
    aux_loss: torch.Tensor | None,
) -> None:
    """Append to ``trainer._metrics`` the values that TRL appends, with one wait for the device.

    ``entropy`` is that of tokens, or summed over each sequence's. Means are those of all ranks' tokens or sequences.
    """
    accelerator, num_tokens = trainer.accelerator, mask.sum()
    sums = {} if kl is None else {"kl": ((kl * mask).sum(), num_tokens)}
    sums["entropy"] = entropy.sum(), num_tokens
    shares = {}
    for name, values in measured.items():
        if values.shape[1] == 1:  # of sequences
            sums[name] = values.sum(), torch.tensor(len(values), device=mask.device)
            shares[name] = values[:, 0].double()
        else:
            sums[name] = (values * mask).sum(), num_tokens
            shares[name] = (values * mask).sum(1).double() / mask.sum(1)
    local = torch.stack([torch.stack([total.double(), count.double()]) for total, count in sums.values()])
    totals, counts = accelerator.reduce(local, reduction="sum").unbind(1)
    found = dict(zip(sums, totals / counts.clamp(min=1), strict=True))
    if "clip_ratio/low_mean" in shares:  # a sequence without tokens has no share
        both = torch.stack([shares["clip_ratio/low_mean"], shares["clip_ratio/high_mean"]], 1)
        lows, highs = accelerator.gather(both).unbind(1)
        extremes = lows.nan_to_num(torch.inf).min(), highs.nan_to_num(-torch.inf).max()
        for name, value in zip(("clip_ratio/low_min", "clip_ratio/high_max"), extremes, strict=True):
            found[name] = torch.where(value.isinf(), torch.nan, value)
    if trainer.aux_loss_enabled:
        found["aux_loss"] = accelerator.gather_for_metrics(aux_loss.detach()).double().mean()
    logged = trainer._metrics["train" if trainer.model.training else "eval"]
    for name, value in zip(found, torch.stack([*found.values()]).tolist(), strict=True):
        logged[name].append(value)
