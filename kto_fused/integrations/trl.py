"""TRL's trainers on this package: ``trainer = fuse(KTOTrainer(...))``.

``fuse`` changes one trainer object, in this order:

1. It asks whether anything keeps this package from taking the trainer over ("What TRL keeps"). If so, the trainer stays
   as it is, and a warning names the reason.
2. It patches the policy and the reference, so that both compute log-probabilities here (``trl_model.py``).
3. If TRL and this package define the loss alike, methods of ``trl_preference.py``, ``trl_reference_free.py`` or
   ``trl_grpo.py`` replace the trainer's own. Otherwise TRL computes the loss from this package's log-probabilities, and
   a warning says why.
4. If TRL has precomputed reference log-probabilities, they are computed again here (``trl_references.py``).
"""

import logging
from collections.abc import Callable
from types import MethodType
from typing import NamedTuple

import trl
from packaging.version import Version
from transformers import Trainer

from .. import huggingface
from .trl_grpo import grpo_loss, grpo_token_logps, why_trl_keeps_grpo, why_trl_keeps_grpo_loss
from .trl_model import PATCHED, fuse_models
from .trl_preference import (
    ExactReference,
    dpo_loss,
    kto_loss,
    overridden,
    why_trl_keeps_dpo_loss,
    why_trl_keeps_kto_loss,
)
from .trl_reference_free import (
    cpo_loss_metrics,
    orpo_loss_metrics,
    why_trl_keeps_cpo_loss,
    why_trl_keeps_orpo_loss,
)
from .trl_references import (
    PRECOMPUTES,
    dpo_ref_log_probs,
    kto_ref_log_probs,
    precompute_again,
    prepare_input,
    why_reference_is_lost,
)

# Everything else of TRL is imported where it is used, after the check of its version.
TRL_VERSIONS = [(1, minor) for minor in range(9, 17)]
# from here on TRL asks its models for log-probabilities (``fused_lm_head``); before, its losses read logits
FUSED_HEAD_SINCE = (1, 15)


class Takeover(NamedTuple):
    """How one of TRL's trainers is taken over. The functions ``why_...`` return a reason in words, or None."""

    methods: dict[str, Callable]  # of the fused trainer, where its whole loss is computed here
    computes_loss: tuple[str, ...]  # TRL's methods that these replace: a subclass's own are kept
    why_trl_keeps_the_loss: Callable[[Trainer], str | None]
    # why nothing can be taken over; TRL's loss takes this package's log-probabilities unless it computes logits
    why_trl_keeps_all: Callable[[Trainer], str | None] = lambda trainer: None
    reads_logits: bool = False
    methods_without_fused_head: dict[str, Callable] = {}  # noqa: RUF012 (never changed), more of them before 1.15


TAKEOVERS = {
    "KTOTrainer": Takeover(
        {"_compute_loss": kto_loss, "compute_ref_log_probs": kto_ref_log_probs},
        ("compute_loss", "_compute_loss", "_compute_kl_logps"),
        why_trl_keeps_kto_loss,
    ),
    "DPOTrainer": Takeover(
        {"_compute_loss": dpo_loss, "compute_ref_log_probs": dpo_ref_log_probs},
        ("compute_loss", "_compute_loss"),
        why_trl_keeps_dpo_loss,
    ),
    "GRPOTrainer": Takeover(
        {"_compute_loss": grpo_loss},
        ("compute_loss", "_compute_loss", "_get_per_token_logps_and_entropies"),
        why_trl_keeps_grpo_loss,
        why_trl_keeps_all=why_trl_keeps_grpo,
        methods_without_fused_head={"_get_per_token_logps_and_entropies": grpo_token_logps},
    ),
    "CPOTrainer": Takeover(
        {"get_batch_loss_metrics": cpo_loss_metrics},
        ("compute_loss", "get_batch_loss_metrics", "concatenated_forward", "get_batch_logps", "cpo_loss"),
        why_trl_keeps_cpo_loss,
        reads_logits=True,
    ),
    "ORPOTrainer": Takeover(
        {"get_batch_loss_metrics": orpo_loss_metrics},
        ("compute_loss", "get_batch_loss_metrics", "concatenated_forward", "get_batch_logps", "odds_ratio_loss"),
        why_trl_keeps_orpo_loss,
        reads_logits=True,
    ),
}

logger = logging.getLogger(__name__)


def fuse(trainer: Trainer) -> Trainer:
    """Let one of TRL's trainers compute with this package: same losses, same gradients, same logged values.

    - The whole loss is taken over: the policy's LM head and the loss become one call, which takes 3 GEMMs instead of 4
      (2 instead of 3 with a frozen head) and waits for the device once for all logged values. That holds for every
      ``loss_type`` of KTO, DPO and the experimental CPO, for the experimental ORPO, for DPO's weighted lists,
      f-divergences, ``ld_alpha`` and ``use_weighting``, and for GRPO's ``grpo``, ``bnpo``, ``dr_grpo``, ``dapo``,
      ``luspo``, ``cispo``, ``sapo`` and ``vespo``. CPO and ORPO compute logits for the tokens of their loss alone.
      GRPO's tokens without a gradient (clipped ratios, advantages of 0) take part in 1 GEMM only, and its old and
      reference log-probabilities come from this package too.
    - TRL computes the loss from this package's log-probabilities, with 4 GEMMs, in these cases: a setting that no loss
      of this package takes, such as a negative weight or a ``label_smoothing`` of 0.5; a subclass with a loss of its
      own; ``ipo`` and ``sigmoid_norm`` for a batch with an empty prompt, and for every batch if the reference
      log-probabilities are precomputed; GRPO's ``importance_sampling_level="sequence"`` with ``beta``, ``cispo`` or
      ``sapo``, ``vespo`` with ``beta``, ``top_entropy_quantile`` and ``off_policy_mask_threshold``.
    - TRL before 1.15 computes logits, not log-probabilities. Of its trainers, ``fuse`` takes over whole losses only,
      and leaves to TRL ``use_liger_kernel`` and load-balancing losses, before 1.14 also precomputed references, and
      in 1.9 f-divergences and ``luspo``.

    **Where this package cannot take a trainer over, TRL computes everything as before.** ``fuse`` then returns the
    trainer and its models unchanged, and one warning names the reason. That happens with vision-language models,
    DeepSpeed ZeRO-3, FSDP1, tensor, context and sequence parallelism, MPS, with every model that
    ``huggingface.attach`` refuses (prompt tuning, p-tuning, prefix tuning, a quantised LM head, ...), and where
    reference log-probabilities were precomputed and the reference is no longer there (see below). With CPO and ORPO it
    happens wherever TRL keeps the loss, for models with a soft cap of the logits, and with router logits; with DPO for
    ``use_weighting`` beside ``sft``, ``ipo``, ``sigmoid_norm`` or ``ld_alpha``; with GRPO for
    ``entropy_coef`` and ``use_adaptive_entropy``.

    **Policy and reference are always scored by the same code at the same precision.** With
    ``precompute_ref_log_probs=True`` TRL scores the datasets in the trainer's ``__init__``, with logits rounded to the
    autocast dtype. ``fuse`` therefore scores them again: one more forward pass over the training and evaluation data,
    which a later run reads from the ``datasets`` cache. The reference must still be there: as ``ref_model``, or as the
    policy with the weights that TRL scored. Call ``fuse`` before ``train``, also when a run is resumed: the checkpoint
    is loaded by ``train``, so the reference is the initial model. ``evaluate(dataset)`` scores a new dataset in the
    same way, or is refused by TRL once the policy has been trained. Under FSDP, precomputing needs a ``ref_model``.

    A fused trainer differs from TRL's in these ways:

    - Logits are not rounded to half precision.
    - A soft cap of the logits is applied under every name it has in a configuration. TRL misses RecurrentGemma's and
      xLSTM's.
    - Random operations during training (dropout that is still active, router jitter, NEFTune noise) draw other
      numbers, because the reference is scored before the policy.
    - If the log-probability of one sequence is NaN, KTO's loss and the logged values of its class are NaN. TRL leaves
      the sequence out of the loss, but its gradient is NaN.
    - If several tokens share the highest logit, each of them counts as right for ``mean_token_accuracy``. In TRL only
      the first does.
    - GRPO's ``vespo`` holds the log-ratio of a sequence within its bounds, as TRL does, but not the log-ratio of a
      single token within [-20, 20].
    - A CPO or ORPO batch without a chosen completion token has a loss; TRL's is NaN.
    - Frozen weights of an adapter stay frozen. TRL's reference pass unfreezes them, and from the second step on their
      gradients count towards the norm that clips the gradient.

    Args:
        trainer: a ``KTOTrainer``, ``DPOTrainer``, ``GRPOTrainer``, ``experimental.cpo.CPOTrainer`` or
            ``experimental.orpo.ORPOTrainer`` of TRL 1.9 to 1.16. Fusing it again changes nothing.

    Returns:
        The same trainer.

    Raises:
        ImportError: TRL has another version.
        TypeError: ``trainer`` is none of these.

    After an error, also one while the datasets are scored again, the trainer and its models are what they were.
    """
    version = _trl_version()
    own = _own_class(trainer)
    if getattr(trainer, "_is_fused", False):
        return trainer
    takeover, is_precomputed = TAKEOVERS[own.__name__], getattr(trainer, "precompute_ref_logps", False)
    restore = _restorer(trainer)
    try:
        reads_logits = takeover.reads_logits or version < FUSED_HEAD_SINCE
        # the sum of squared probabilities, which TRL's loss would read, is known to a whole loss only
        reads_logits = reads_logits or getattr(trainer, "use_weighting", False)
        keeps_all = _why_this_version_keeps_all(trainer, version) or _why_trl_keeps_all(trainer)
        keeps_all, keeps_loss = keeps_all or takeover.why_trl_keeps_all(trainer), None
        if keeps_all is None:
            keeps_loss = overridden(trainer, own, takeover.computes_loss) or takeover.why_trl_keeps_the_loss(trainer)
            keeps_all = keeps_loss if reads_logits else None
        keeps_all = keeps_all or fuse_models(trainer)
        if keeps_all is not None:
            restore()
            logger.warning("TRL computes everything as before: %s.", keeps_all)
            return trainer
        if is_precomputed:
            keeps_loss = overridden(trainer, own, PRECOMPUTES) or keeps_loss
        if keeps_loss is None:
            older = takeover.methods_without_fused_head if version < FUSED_HEAD_SINCE else {}
            for name, method in {**takeover.methods, **older}.items():
                setattr(trainer, name, MethodType(method, trainer))
        if is_precomputed:
            trainer.data_collator = ExactReference(trainer.data_collator)
            trainer._prepare_input = MethodType(prepare_input, trainer)
            precompute_again(trainer, is_whole=keeps_loss is None)
        trainer._is_fused = True
    except BaseException:
        restore()
        raise
    if keeps_loss is not None:
        logger.warning("TRL computes the loss, from this package's log-probabilities: %s.", keeps_loss)
    difference = _rounding_difference(trainer)
    if difference is not None:
        logger.warning("Equal weights of policy and reference would not give a log-ratio of 0: %s.", difference)
    return trainer


def _trl_version() -> tuple[int, int]:
    """Return TRL's version, (major, minor), if this module knows it."""
    found = Version(trl.__version__)
    version = found.major, found.minor
    if version not in TRL_VERSIONS:
        first, last = (".".join(map(str, each)) for each in (TRL_VERSIONS[0], TRL_VERSIONS[-1]))
        raise ImportError(
            f"kto_fused.integrations.trl knows TRL {first} to {last}, found TRL {trl.__version__}: "
            f"pip install 'trl=={last}.*'"
        )
    return version


def _own_class(trainer: Trainer) -> type:
    """Return the class of TRL that the trainer is an object of."""
    for kind in type(trainer).__mro__:
        if kind.__name__ in TAKEOVERS and kind.__module__.split(".")[0] == "trl":
            return kind
    raise TypeError(f"trainer must be one of TRL's {', '.join(TAKEOVERS)}, got {type(trainer).__name__}")


def _restorer(trainer: Trainer) -> Callable[[], None]:
    """Return a function that undoes every change to the trainer and its models since this call."""
    attributes = dict(vars(trainer))
    models = [model for model in (trainer.model, getattr(trainer, "ref_model", None)) if model is not None]
    patches = []
    for module in (module for model in models for module in model.modules()):
        patch = {name: module.__dict__[name] for name in PATCHED if name in module.__dict__}
        if "_forwards_before_fuse" in patch:  # fuse appends to this list
            patch["_forwards_before_fuse"] = [*patch["_forwards_before_fuse"]]
        patches.append((module, patch))

    def restore() -> None:
        vars(trainer).clear()
        vars(trainer).update(attributes)
        for module, patch in patches:
            for name in PATCHED:
                module.__dict__.pop(name, None)
            module.__dict__.update(patch)

    return restore


# ---- What TRL keeps ------------------------------------------------------------------------------------------------
# Each function returns a reason in words, for a warning, or None.


def _why_this_version_keeps_all(trainer: Trainer, version: tuple[int, int]) -> str | None:
    """Return which setting makes a version of TRL compute something else than TRL 1.16, or None."""
    is_precomputed, name = getattr(trainer, "precompute_ref_logps", False), f"TRL {version[0]}.{version[1]}"
    if version < FUSED_HEAD_SINCE and getattr(trainer, "use_liger_kernel", False):
        return f"use_liger_kernel=True changes the loss in {name}"
    if version < FUSED_HEAD_SINCE and trainer.aux_loss_enabled:
        return f"{name} takes the load-balancing loss from the model's own forward: set router_aux_loss_coef=0.0"
    if version < (1, 14) and is_precomputed:
        return f"precompute_ref_log_probs=True in {name} has no cache apart for this package's values"
    if version < (1, 10) and getattr(trainer, "f_divergence_type", "reverse_kl") != "reverse_kl":
        return f"f_divergence_type={trainer.f_divergence_type!r} has other scores in {name}"
    if version < (1, 10) and getattr(trainer, "loss_type", None) == "luspo":
        return f"loss_type='luspo' weighs its tokens in another way in {name}"
    return None


def _why_trl_keeps_all(trainer: Trainer) -> str | None:
    """Return why nothing of this trainer can be taken over, or None."""
    state, parallel = trainer.accelerator.state, trainer.accelerator.parallelism_config
    if trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
        return "DeepSpeed ZeRO-3 shards the LM head, use FSDP2"
    if trainer.is_fsdp_enabled and state.fsdp_plugin.fsdp_version == 1:
        return "FSDP1 flattens the LM head, set fsdp_version=2"
    if parallel is not None and (parallel.tp_enabled or parallel.cp_enabled or parallel.sp_enabled):
        return "tensor, context and sequence parallelism split the LM head or the sequences, which the loss needs whole"
    if getattr(trainer, "_is_vlm", False):
        return "vision-language models are not supported"
    if trainer.accelerator.device.type == "mps":
        return "MPS has no float64"
    return why_reference_is_lost(trainer) if getattr(trainer, "precompute_ref_logps", False) else None


def _rounding_difference(trainer: Trainer) -> str | None:
    """Return how the user's settings round the policy and the reference differently, or None."""
    args, ref_model = trainer.args, getattr(trainer, "ref_model", None)
    if ref_model is not None:
        policy, reference = huggingface.unwrap(trainer.model), huggingface.unwrap(ref_model)
        if policy.dtype != reference.dtype:
            return f"the policy is {policy.dtype} and the reference {reference.dtype}, load both in one dtype"
        attentions = [getattr(model.config, "_attn_implementation", None) for model in (policy, reference)]
        if attentions[0] != attentions[1]:
            return f"their attn_implementation is {attentions[0]} and {attentions[1]}, load both with one"
    elif not getattr(trainer, "precompute_ref_logps", False):
        return None
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            return f"{name}=True rounds the weights of the policy alone, leave it out"
    return None
