"""The whole loss of TRL's ``GRPOTrainer``: one call at the LM head in place of the trainer's ``_compute_loss``.

The old policy's and the reference's log-probabilities, which TRL asks for while it makes a batch, come from this
package too (``trl_model.py``). The call returns each token's log-probability and entropy beside the loss, from which
the clip ratios, the KL divergence and the entropy are logged as TRL logs them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer

from .. import heads
from ..functional import fused_linear_loss
from ..huggingface.forward import FusedCall

# losses of TRL that clip the ratio of PPO, and their names here
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo")
# losses of TRL that divide by the number of tokens of all ranks and accumulated batches
PER_ITEM = ("dapo", "cispo")


# ---- Which loss it is ----------------------------------------------------------------------------------------------


def grpo_head(trainer: Trainer, on_policy: bool) -> heads.Head:
    """Return the loss that a ``GRPOTrainer``'s settings ask for. ``on_policy``: the batch has no old log-probabilities.

    Raises:
        ValueError: no head is defined as TRL's loss is. The message names the setting.
    """
    loss_type, args = trainer.loss_type, trainer.args
    fields = {"kl_beta": trainer.beta, "kl_ratio": args.use_bias_correction_kl, "on_policy": on_policy}
    if loss_type == "cispo":
        return heads.make("cispo", clip_high=trainer.epsilon_high, **fields)
    if loss_type not in CLIPPED:
        raise ValueError(f"loss_type={loss_type!r} is not one of {[*CLIPPED, 'cispo']}")
    if loss_type == "dr_grpo":
        fields["max_tokens"] = trainer.max_completion_length
    if args.delta is not None and args.delta <= 0:
        raise ValueError(f"delta={args.delta} is not positive")
    delta = 0.0 if args.delta is None else args.delta
    return heads.make(loss_type, clip=(trainer.epsilon_low, trainer.epsilon_high), delta=delta, **fields)


def why_trl_keeps_grpo_loss(trainer: Trainer) -> str | None:
    """Return why TRL computes the loss of a ``GRPOTrainer`` with these settings, or None."""
    if trainer.importance_sampling_level != "token":
        return f"importance_sampling_level={trainer.importance_sampling_level!r} is not 'token'"
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
    if why_trl_keeps_grpo_loss(self) is not None:  # a setting that changed since fuse
        return type(self)._compute_loss(self, model, inputs)
    prompt_ids, completion_ids = inputs["prompt_ids"], inputs["completion_ids"]
    completion_mask, num_prompt = inputs["completion_mask"], prompt_ids.shape[1]
    mask = completion_mask * inputs["tool_mask"] if "tool_mask" in inputs else completion_mask
    labels = completion_ids.masked_fill(mask == 0, -100)
    advantages, old_logps = inputs["advantages"], inputs.get("old_per_token_logps")
    if advantages.ndim == 1:
        advantages = advantages[:, None]

    tensors = {"advantages": advantages.expand(mask.shape)}
    if self.use_vllm and self.vllm_importance_sampling_correction:
        # a factor >= 0 of a token's loss without its KL term is a factor of the advantage
        tensors["advantages"] = tensors["advantages"] * inputs["importance_sampling_ratio"]
    if old_logps is not None:
        tensors["old_logps"] = old_logps
    if self.beta != 0:
        tensors["ref_token_logps"] = inputs["ref_per_token_logps"]
    # entry t belongs to the token at t: the prompt's entries are not read
    tensors = {name: F.pad(values, (num_prompt, 0)) for name, values in tensors.items()}
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
        "labels": F.pad(labels, (num_prompt, 0), value=-100),
        "return_tokens": True,
        **tensors,
    }
    gradient_path, outcome = model(
        input_ids=torch.cat([prompt_ids, completion_ids], dim=1),
        attention_mask=torch.cat([inputs["prompt_mask"], completion_mask], dim=1),
        fused_lm_head=FusedCall(fused_linear_loss, arguments),
        **router,
    )
    loss, logps, values = outcome.results(gradient_path)
    if self.loss_type not in PER_ITEM:
        loss = loss / steps
    if self.aux_loss_enabled:
        loss = loss + self.router_aux_loss_coef * outcome.aux_loss / steps
    predicting = slice(num_prompt - 1, -1)  # the positions that predict the completion's tokens
    _log(self, inputs, mask, advantages, logps[:, predicting], values.entropy[:, predicting], outcome.aux_loss)
    return loss


@torch.no_grad()
def _log(
    trainer: Trainer,
    inputs: dict[str, Any],
    mask: torch.Tensor,
    advantages: torch.Tensor,
    logps: torch.Tensor,
    entropy: torch.Tensor,
    aux_loss: torch.Tensor | None,
) -> None:
    """Append to ``trainer._metrics`` the values that TRL appends, with one wait for the device."""
    old_logps = inputs.get("old_per_token_logps")
    ratio = torch.exp(logps - (logps if old_logps is None else old_logps))
    low, high = trainer.epsilon_low, trainer.epsilon_high
    per_token = {}  # means over all ranks' tokens
    if trainer.beta != 0:
        d = inputs["ref_per_token_logps"] - logps
        per_token["kl"] = torch.expm1(d) - d
        if trainer.args.use_bias_correction_kl:
            per_token["kl"] = per_token["kl"] * ratio
    per_token["entropy"] = entropy
    of_sequences = []
    if trainer.loss_type == "cispo":
        per_token["cispo_clip_ratio"] = (ratio > high) & (advantages > 0)
    else:
        if trainer.args.delta is not None:
            ratio = ratio.clamp(max=trainer.args.delta)
        is_low, is_high = (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)
        per_token["clip_ratio/low_mean"] = is_low
        per_token["clip_ratio/high_mean"] = is_high
        per_token["clip_ratio/region_mean"] = is_low | is_high
        of_sequences = [(clipped * mask).sum(1) / mask.sum(1) for clipped in (is_low, is_high)]

    accelerator = trainer.accelerator
    sums = torch.stack([*((values * mask).sum(dtype=torch.float64) for values in per_token.values()), mask.sum()])
    *sums, count = accelerator.reduce(sums, reduction="sum")
    found = {name: total / count.clamp(min=1) for name, total in zip(per_token, sums, strict=True)}
    if of_sequences:  # a sequence without tokens has no share
        lows, highs = accelerator.gather(torch.stack(of_sequences, 1)).double().unbind(1)
        extremes = lows.nan_to_num(torch.inf).min(), highs.nan_to_num(-torch.inf).max()
        for name, value in zip(("clip_ratio/low_min", "clip_ratio/high_max"), extremes, strict=True):
            found[name] = torch.where(value.isinf(), torch.nan, value)
    if trainer.aux_loss_enabled:
        found["aux_loss"] = accelerator.gather_for_metrics(aux_loss.detach()).double().mean()
    logged = trainer._metrics["train" if trainer.model.training else "eval"]
    for name, value in zip(found, torch.stack([*found.values()]).tolist(), strict=True):
        logged[name].append(value)
