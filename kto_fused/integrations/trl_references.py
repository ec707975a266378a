"""Reference log-probabilities that TRL has precomputed, computed again as this package scores the policy."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import Trainer

from .. import __version__, huggingface
from ..huggingface.running import evaluating
from .trl_preference import REF_COLUMNS, model_inputs_of, pair_logps, reference_of, sequence_logps

# methods of a trainer that precompute the reference log-probabilities
PRECOMPUTES = ("compute_ref_log_probs", "_precompute_ref_logps")


def why_reference_is_lost(trainer: Trainer) -> str | None:
    """Return why the reference that TRL scored the datasets with is no longer there to score them again, or None."""
    if trainer.ref_model is not None:
        return None
    if trainer.is_fsdp_enabled:
        return (
            "precompute_ref_log_probs=True under FSDP, where TRL has dropped the reference that it scored the data "
            "with: pass ref_model, or set precompute_ref_log_probs=False"
        )
    from trl.trainer.utils import hash_module

    is_initial = [hash_module(trainer.model) == trainer._precompute_model_hash]
    broadcast_object_list(is_initial, from_process=0)
    if is_initial[0]:
        return None
    return (
        "the policy's weights changed after TRL precomputed the reference log-probabilities with them, so this "
        "package cannot compute them again: call fuse before training, or pass ref_model"
    )


def precompute_again(trainer: Trainer, is_whole: bool) -> None:
    """Replace the reference log-probabilities that TRL precomputed by this package's.

    TRL names its cache files by a hash of the model. Another hash keeps the two kinds of values apart: a fused trainer
    never reads TRL's, and an unfused one never reads this package's.
    """
    args = trainer.args
    model = trainer.model if trainer.ref_model is None else trainer.ref_model
    trainer._precompute_model_hash = _numerics_hash(trainer, model, is_whole)

    def scored(dataset: Any, name: str, batch_size: int) -> Any:
        dataset = dataset.remove_columns([column for column in REF_COLUMNS if column in dataset.column_names])
        return trainer._precompute_ref_logps(dataset, name, args.precompute_ref_batch_size or batch_size)

    # an iterator over a data loader draws a seed; evaluation mode keeps dropout from drawing
    with torch.random.fork_rng(devices=[]), evaluating(model):
        trainer.train_dataset = scored(trainer.train_dataset, "train", args.per_device_train_batch_size)
        sets, size = trainer.eval_dataset, args.per_device_eval_batch_size
        if isinstance(sets, dict):
            trainer.eval_dataset = {name: scored(dataset, name, size) for name, dataset in sets.items()}
        elif sets is not None:
            trainer.eval_dataset = scored(sets, "eval", size)


def _numerics_hash(trainer: Trainer, model: nn.Module, is_whole: bool) -> str:
    """Return a hash of everything that the reference log-probabilities depend on; TRL's hash covers the weights."""
    from datasets.fingerprint import Hasher

    device = trainer.accelerator.device
    adapters = getattr(trainer.accelerator.unwrap_model(model), "peft_config", {})
    config = huggingface.unwrap(model).config
    depends_on = (
        trainer._precompute_model_hash,
        ("kto_fused", __version__, is_whole, torch.__version__, transformers.__version__),
        (trainer.accelerator.mixed_precision, torch.get_float32_matmul_precision()),
        (device.type, torch.cuda.get_device_name(device) if device.type == "cuda" else None),
        (config.to_json_string(use_diff=False), getattr(config, "_attn_implementation", None)),
        {name: adapter.to_dict() for name, adapter in adapters.items()},
        (repr(trainer.data_collator), getattr(trainer, "ld_alpha", None)),
    )
    return Hasher.hash(depends_on)


def kto_ref_log_probs(
    self: Trainer, model: nn.Module, inputs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Replace ``KTOTrainer.compute_ref_log_probs``: return [B] of the completions and [B] of the mismatched pairs."""
    with _scoring(self, model):
        logps = sequence_logps(self, model, *model_inputs_of(inputs))
        kl_logps = sequence_logps(self, model, *model_inputs_of(inputs, prefix="KL_")) if self.calculate_KL else None
    return logps, kl_logps


def dpo_ref_log_probs(self: Trainer, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace ``DPOTrainer.compute_ref_log_probs``: return [pairs] of the chosen and of the rejected completions."""
    with _scoring(self, model):
        return pair_logps(self, model, *model_inputs_of(inputs)).chunk(2)


@contextmanager
def _scoring(trainer: Trainer, model: nn.Module) -> Iterator[None]:
    """Make ``model`` the reference: its adapters off or "ref" on, in evaluation mode."""
    with reference_of(trainer), evaluating(model):
        yield


def prepare_input(self: Trainer, data: Any) -> Any:
    """Replace ``Trainer._prepare_input``, which under DeepSpeed rounds the precomputed values to the model's dtype."""
    return data.to(self.args.device) if isinstance(data, torch.Tensor) else type(self)._prepare_input(self, data)
