"""The reference model of a run: which model it is, how it is prepared, and its precomputed log-probabilities.

``make_reference`` decides, before training, what the policy is compared with: a model of its own (given, or a frozen
copy of the policy), or adapters of the policy itself, which take no second model's memory. ``Reference.active`` yields
the model to compute the reference's log-probabilities with. ``precompute`` computes them for whole datasets, once.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from .. import huggingface
from ..huggingface.inspect import evaluating
from ..huggingface.running import checked_logits, is_reproduced, keeping_trainable
from . import adapters, fingerprints, models, ranks, reference_cache
from .configs import BASE

if TYPE_CHECKING:
    from .base import FusedTrainer


@dataclass
class AdapterReference:
    """The policy with other adapters active, or with none, as the reference."""

    policy: nn.Module  # the PeftModel
    names: tuple[str, ...] = ()  # of the adapters that are active in the reference's passes; none: adapters off
    copies: tuple[str, ...] = ()  # the names among them of copies that the trainer made
    configs: dict[str, Any] = field(init=False)  # the adapters' configurations, to notice that one was replaced
    fingerprint: str = field(init=False)  # of the adapters' weights

    def __post_init__(self):
        self.configs = {name: self.policy.peft_config[name] for name in self.names}
        self.fingerprint = adapters.fingerprint(self.policy, self.names)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the reference's adapters the active ones, without changing which weights are trained.

        Raises:
            RuntimeError: an adapter was taken out of the model or replaced since.
        """
        if any(self.policy.peft_config.get(name) is not config for name, config in self.configs.items()):
            raise RuntimeError(
                f"adapter {', '.join(map(repr, self.configs))}, this trainer's reference, was taken out of the model "
                "or replaced, as a later trainer of the same PeftModel does: use the later trainer, or give each a "
                "model of its own"
            )
        with keeping_trainable(self.policy), adapters.switched_to(self.policy, self.names):
            yield


@dataclass
class Reference:
    """What the policy is compared with: a model, adapters of the policy, or nothing.

    With neither ``model`` nor ``adapters`` the untrained policy stands for itself. That serves to precompute
    log-probabilities before the first step, and for losses without a reference.
    """

    description: str  # for the log
    model: nn.Module | None = None  # frozen and prepared for the devices
    adapters: AdapterReference | None = None
    fingerprint: str | None = None  # identifies it to a resumed run; a model's is set as the model is dropped
    is_policy_at_start: bool = False  # whether it is the whole policy as it was before training
    is_gone: bool = False  # whether only its precomputed log-probabilities are left

    @contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        """Yield the model to compute with: its own, or ``policy`` with the reference's adapters and without dropout.

        Raises:
            RuntimeError: the log-probabilities were precomputed, and the model that computed them is gone.
        """
        if self.is_gone:
            raise RuntimeError(
                "a batch has no reference log-probabilities, and with precompute_ref_log_probs there is no reference "
                "model left to compute them: pass its data to the trainer's constructor"
            )
        if self.model is not None:
            yield self.model
        elif self.adapters is not None:
            with evaluating(policy), self.adapters.active():
                yield policy
        else:
            yield policy


def make_reference(trainer: "FusedTrainer", ref_model: PreTrainedModel | None) -> Reference:
    """Return the reference of a trainer whose policy has not been trained yet.

    Args:
        trainer: its model, options and accelerator are set up.
        ref_model: the caller's reference model; None: the policy as it is now.
    """
    args = trainer.args
    if not trainer.needs_reference:
        return Reference("none")
    if ref_model is not None:
        return Reference("ref_model, a model of its own", _prepared(trainer, ref_model))
    if models.has_adapters(trainer.model):
        return _adapters_of_policy(trainer)
    is_whole = not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled
    if args.precompute_ref_log_probs and is_whole:
        return Reference("the model as it is before its first step", is_policy_at_start=True)
    description = "a frozen copy of the model as it is before training"
    return Reference(description, _prepared(trainer, _copy_of_policy(trainer)), is_policy_at_start=True)


# ---- adapters of the policy ---------------------------------------------------------------------------------------


def _adapters_of_policy(trainer: "FusedTrainer") -> Reference:
    """Decide which adapters of the policy make the reference.

    All ranks decide alike: an adapter that changes the model on one rank is copied on all ranks.
    """
    policy = trainer.accelerator.unwrap_model(trainer.model)

    def reference(description: str, names: tuple[str, ...] = (), copies: tuple[str, ...] = ()) -> Reference:
        chosen = AdapterReference(policy, names, copies)
        return Reference(description, adapters=chosen, fingerprint=f"adapters {chosen.fingerprint}")

    if trainer.args.reference == BASE:
        return reference("the model with its adapters off (reference='base')")
    named = adapters.named_reference(policy)
    if named is not None:
        adapters.freeze(policy, named)
        return reference(f"the model with its adapter {named!r}, which it came with", (named,))
    models.check_can_be_copied(policy)
    active = list(policy.active_adapters)
    trained = [name for name in active if adapters.is_trained(policy, name)]
    if not trained:
        return reference(
            "the model itself, because none of its adapters is trained: all rewards are 0 (reference='base' compares "
            "with the model without its adapters)",
            tuple(active),
        )
    changing = [name for name in trained if _is_on_any_rank(trainer, not adapters.changes_nothing(policy, name))]
    if not changing:
        frozen = tuple(name for name in active if name not in trained)
        which = f"its frozen adapter {', '.join(map(repr, frozen))}" if frozen else "its adapters off"
        without_effect = ", ".join(map(repr, trained))
        return reference(f"the model with {which} ({without_effect} changes nothing before training)", frozen)
    if any(hasattr(weight, "ds_id") for name in changing for weight in adapters.parameters_of(policy, name)):
        raise NotImplementedError(
            f"adapter {changing[0]!r} changes the model before training, and DeepSpeed ZeRO-3 has partitioned it, so "
            "no copy of it can be kept as the reference: pass ref_model, load the adapter a second time under the "
            "name 'ref', or set reference='base' for the model with its adapters off"
        )
    copy_of = adapters.copy_adapters(policy, changing)
    names = tuple(copy_of.get(name, name) for name in active if name in copy_of or name not in trained)
    which = ", ".join(f"adapter {name!r} as {copied!r}" for name, copied in copy_of.items())
    chosen = reference(
        f"the model with a frozen copy of the adapter that is trained ({which}). The copy stays in the model, and "
        "save_model leaves it out",
        names,
        tuple(copy_of.values()),
    )
    if not models.is_partitioned(policy):  # a partitioned model gives no logits yet
        _check_copies(chosen.adapters)
    return chosen


def _is_on_any_rank(trainer: "FusedTrainer", is_here: bool) -> bool:
    return trainer.accelerator.reduce(torch.tensor(int(is_here), device=trainer.args.device)).item() > 0


def _check_copies(reference: AdapterReference) -> None:
    """Refuse adapters whose copies compute something else, as those of a method that keeps weights elsewhere would."""
    inner = huggingface.unwrap(reference.policy)
    own = checked_logits(inner)
    with evaluating(reference.policy), reference.active():
        copied = checked_logits(inner)
    if not is_reproduced(own, copied):
        configs = reference.policy.peft_config.values()
        kinds = sorted({str(getattr(config.peft_type, "value", "?")) for config in configs})
        raise ValueError(
            f"a copy of the adapter ({', '.join(kinds)}) does not compute what the adapter does, so it cannot be the "
            "reference: pass ref_model, or set reference='base' for the model with its adapters off"
        )


# ---- a model of its own -------------------------------------------------------------------------------------------


def _copy_of_policy(trainer: "FusedTrainer") -> nn.Module:
    if not models.is_partitioned(trainer.model):
        return copy.deepcopy(trainer.model)
    if trainer.model_path is None:
        raise ValueError(
            "ref_model is missing, and model cannot be copied to serve as one, because DeepSpeed ZeRO-3 partitioned "
            "its weights as it was loaded: pass ref_model, or the model's path as model"
        )
    return models.load(trainer.model_path, trainer.path_dtype, trainer.args.trust_remote_code)


def _prepared(trainer: "FusedTrainer", ref_model: nn.Module) -> nn.Module:
    """Return the reference model frozen, without dropout, on the device, and wrapped as FSDP or DeepSpeed needs it."""
    if trainer.place_model_on_device and getattr(ref_model, "hf_device_map", None) is None:  # else it is placed
        trainer._move_model_to_device(ref_model, trainer.args.device)
    models.check_logits(ref_model, trainer.args.loss_from)
    if trainer.args.disable_dropout:
        models.disable_dropout(ref_model)
    ref_model.requires_grad_(False).eval()
    accelerator = trainer.accelerator
    if trainer.is_fsdp_enabled:
        if accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise NotImplementedError("a reference model under FSDP needs version 2 of FSDP: set fsdp_version to 2")
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, ref_model)
    if trainer.is_deepspeed_enabled:
        return _deepspeed_engine(trainer, ref_model)
    ref_model = accelerator.prepare_model(ref_model, evaluation_mode=True)
    accelerator._models.pop()  # evaluate() prepares the policy only where accelerate holds no model yet
    return ref_model


def _deepspeed_engine(trainer: "FusedTrainer", ref_model: nn.Module) -> nn.Module:
    """Return DeepSpeed's engine of the reference model.

    ZeRO-3 partitions the reference as it does the policy. Under the other stages each process holds it whole.
    """
    import deepspeed

    settings = copy.deepcopy(trainer.deepspeed_config())
    for name in ("optimizer", "scheduler", "zero_optimization.offload_optimizer", "train_batch_size"):
        settings.del_config_sub_tree(name)
    settings.trainer_config_finalize(trainer.args, ref_model, num_training_steps=0)
    config = settings.config
    # the reference never steps, but DeepSpeed asks for the batch after which it would
    config["gradient_accumulation_steps"] = 1
    config["train_micro_batch_size_per_gpu"] = trainer.args.per_device_train_batch_size
    if not settings.is_zero3():
        config["zero_optimization"] = {"stage": 0}
    engine, *_ = deepspeed.initialize(model=ref_model, config=config)
    engine.eval()
    return engine


# ---- log-probabilities, precomputed -------------------------------------------------------------------------------


def precompute(trainer: "FusedTrainer", reference: Reference) -> None:
    """Add the reference's log-probabilities to the trainer's datasets, as its ``ref_columns``.

    They come from disk, or the reference computes them. A reference model is dropped afterwards, which frees its
    memory; its fingerprint stays.

    Raises:
        NotImplementedError: the reference is the policy's own, under FSDP or DeepSpeed.
    """
    args, accelerator = trainer.args, trainer.accelerator
    if reference.model is None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        wrapper = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed"
        raise NotImplementedError(
            f"precompute_ref_log_probs with adapters under {wrapper}: leave it out, because a reference that is the "
            "model with other adapters, or none, costs little memory"
        )
    model = trainer.model if reference.model is None else reference.model
    prefix = None
    if reference.adapters is not None:
        prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    weights = reference_cache.hash_model(huggingface.unwrap(model), prefix)
    if reference.adapters is not None and reference.adapters.names:
        weights += reference.adapters.fingerprint
    # the precision counts, because logits are rounded under autocast
    depends_on = (weights, accelerator.mixed_precision, args.loss_from, trainer._logps_depend_on())

    def batches(dataset: Dataset) -> Iterator[tuple[torch.Tensor, ...]]:
        batch_size = args.precompute_ref_batch_size or args.per_device_train_batch_size
        loader = DataLoader(dataset, batch_size, collate_fn=trainer.data_collator)
        progress = tqdm(
            accelerator.prepare(loader),
            desc="Reference log-probabilities",
            disable=args.disable_tqdm or not args.should_log,
        )
        for inputs in progress:
            yield accelerator.gather_for_metrics(trainer._ref_logps_of(model, inputs))

    def with_ref_logps(dataset: Dataset | None) -> Dataset | None:
        if dataset is None:
            return None
        return reference_cache.add_ref_logps(
            dataset, trainer.ref_columns, batches, args.ref_cache_dir, depends_on, partial(ranks.shared, args)
        )

    if reference.fingerprint is None:
        reference.fingerprint = fingerprints.hash_weights(trainer.unwrapped(model))
    model.eval()
    with accelerator.autocast():
        trainer.train_dataset = with_ref_logps(trainer.train_dataset)
        if isinstance(trainer.eval_dataset, dict):
            trainer.eval_dataset = {name: with_ref_logps(data) for name, data in trainer.eval_dataset.items()}
        else:
            trainer.eval_dataset = with_ref_logps(trainer.eval_dataset)
    reference.model, reference.is_gone = None, reference.adapters is None
