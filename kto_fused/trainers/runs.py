"""Which run a checkpoint belongs to.

``describe_run`` collects what a run's training curve depends on: options, data, tokenizer and weights. The trainer
writes the description into each checkpoint's manifest. ``check_same_run`` compares it with the description of the run
that resumes, and refuses a checkpoint of another run.
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from . import fingerprints, ranks
from .checkpoints import MANIFEST, CheckpointError, read_manifest
from .configs import SCHEDULES_BY_EVALUATION, SCHEDULES_WITHOUT_END

logger = logging.getLogger(__name__)

REFERENCE = "reference_weights"  # the entry of a run's description that identifies its reference
FROZEN = "model.frozen_weights"
SHOWN = 60  # characters that a message shows of a value
# The options that do not change the training curve. All others do: an option that a later version adds counts until it
# is listed here.
CURVE_NEUTRAL = frozenset(
    (
        # where to stop; a warning says so where the learning-rate schedule depends on it (``warn_of_another_end``)
        *("max_steps", "num_train_epochs"),
        # names, logging, reports
        *("output_dir", "run_name", "project", "logging_strategy", "logging_steps", "logging_first_step"),
        *("log_on_each_node", "logging_nan_inf_filter", "include_num_input_tokens_seen", "log_level"),
        *("log_level_replica", "disable_tqdm", "report_to", "trackio_space_id", "trackio_bucket_id"),
        *("trackio_static_space_id", "debug", "skip_memory_metrics", "include_for_metrics"),
        # saving and uploading
        *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node"),
        *("enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"),
        *("hub_always_push", "hub_revision", "resume_from_checkpoint", "resume_anyway"),
        "restore_callback_states_from_checkpoint",
        # evaluation; its data counts where it chooses the best model or changes the learning rate (``describe_run``)
        *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
        *("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
        *("batch_eval_metrics", "load_best_model_at_end"),
        # how the work is done: the formula is the same, only rounding may differ
        *("use_cpu", "backend", "chunk_bytes", "use_cache", "torch_empty_cache_steps", "torch_compile"),
        *("torch_compile_backend", "torch_compile_mode", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
        *("activation_checkpointing", "activation_checkpointing_kwargs", "ddp_find_unused_parameters"),
        *("ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout"),
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataset_num_proc"),
        *("precompute_ref_batch_size", "ref_cache_dir", "local_rank", "do_train", "do_eval", "do_predict"),
        # options whose effects are hashed: on the data's tokens, the reference, and the model's weights
        *("max_length", "remove_unused_columns", "label_names", "length_column_name", "reference"),
        *("columns", "label_true", "label_false", "chat"),
        "trust_remote_code",
    )
)
# entries of a model's configuration that training and saving set, or that name the place it was loaded from
CONFIG_NEUTRAL = frozenset(
    (
        *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    )
)
# entries of an adapter's configuration that say nothing about its numbers
ADAPTER_NEUTRAL = frozenset(
    ("inference_mode", "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "task_type")
)


def describe_run(
    args: TrainingArguments,
    *,
    model: nn.Module,
    reference: str | None,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Dataset | None,
    eval_dataset: Dataset | dict[str, Dataset] | None,
    columns: Iterable[str],
) -> dict[str, Any]:
    """Return what the training curve depends on, as names with JSON values: options, and hashes of data and weights.

    Only the model's frozen weights are hashed, because a checkpoint holds the trained ones. Evaluation data counts
    where it chooses the best model or changes the learning rate.

    Args:
        args: the trainer's options.
        model: the policy, without wrappers.
        reference: a fingerprint of the reference; None if there is none.
        tokenizer, train_dataset, eval_dataset: as the trainer has them.
        columns: the columns of the datasets that training reads.
    """
    entries = {"processes": args.world_size}
    options = args.to_dict()
    for option in fields(args):
        if option.name not in CURVE_NEUTRAL:
            entries[option.name] = options[option.name]
    if isinstance(args.deepspeed, str) and Path(args.deepspeed).is_file():
        entries["deepspeed"] = json.loads(Path(args.deepspeed).read_bytes())
    entries["train_data"] = _describe_data(train_dataset, columns)
    if args.metric_for_best_model is not None or args.lr_scheduler_type in SCHEDULES_BY_EVALUATION:
        entries["eval_data"] = _describe_data(eval_dataset, columns)
    vocabulary = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, tokenizer.chat_template]
    entries["tokenizer"] = f"{len(tokenizer)} tokens, {fingerprints.hash_json(_plain(vocabulary))}"
    config = getattr(model, "config", None)
    if hasattr(config, "to_diff_dict"):
        entries |= {f"model.{name}": value for name, value in _without_neutral(config.to_diff_dict()).items()}
    entries["model.dtypes"] = sorted({str(parameter.dtype) for parameter in model.parameters()})
    entries[FROZEN] = fingerprints.hash_weights(model, lambda name, tensor: not tensor.requires_grad)
    for adapter, peft_config in getattr(model, "peft_config", {}).items():
        for option in fields(peft_config):
            value = getattr(peft_config, option.name)
            if option.name not in ADAPTER_NEUTRAL and value != default_of(option):
                entries[f"adapter.{adapter}.{option.name}"] = value
    entries[REFERENCE] = reference
    return _plain(entries)


def _without_neutral(config: Any) -> Any:
    """Return a model's configuration without the entries of ``CONFIG_NEUTRAL``, also in its text or vision part."""
    if not isinstance(config, dict):
        return config
    return {name: _without_neutral(value) for name, value in config.items() if name not in CONFIG_NEUTRAL}


def check_same_run(checkpoint: str, run: dict[str, Any], args: TrainingArguments) -> None:
    """Compare a checkpoint's run with this one.

    Raises:
        CheckpointError: they differ; the message lists each difference. With ``args.resume_anyway`` a warning does.
    """
    if not (Path(checkpoint) / MANIFEST).exists():  # resume_anyway has taken it
        return logger.warning(
            f"{checkpoint} does not say which run it belongs to: data, model and options are not compared"
        )
    saved = read_manifest(Path(checkpoint))["run"]
    defaults = _plain({option.name: default_of(option) for option in fields(args)})
    absent = "none or the default"
    found = []
    for name in sorted(saved.keys() | run.keys()):
        # an option that a later version added counts as if the checkpoint's run had had its default
        before = saved.get(name, defaults.get(name, absent) if name in run else absent)
        now = run.get(name, absent)
        if before != now:
            found.append(f"{name}: {_shortened(before)} in the checkpoint, {_shortened(now)} now")
    if not found:
        return
    differences = "; ".join(found)
    if saved.get(REFERENCE) != run.get(REFERENCE):
        differences += (
            "; without ref_model the reference is the policy as it was before the run began: pass the model that the "
            "run began with, as model or as ref_model, and not one of its checkpoints"
        )
    if not args.resume_anyway:
        raise CheckpointError(
            f"{checkpoint} belongs to another run ({differences}): resume with the options, data and models of that "
            "run, or go on regardless with resume_anyway=True (--resume_anyway)"
        )
    logger.warning(f"{checkpoint} belongs to another run, and resume_anyway goes on with it: {differences}")


def check_same_everywhere(run: dict[str, Any], args: TrainingArguments) -> None:
    """Refuse processes that have other data, another tokenizer or other options than the first one.

    Their batches would be no parts of one batch, and after the shorter data's last batch the others would wait forever.
    Weights are not compared: with some wrappers the first process alone loads them.

    Args:
        run: as ``describe_run`` returns it, or another description by name.
        args: the trainer's options.

    Raises:
        ValueError: a process has something else; raised on all processes.
    """
    first, *others = ranks.shared(args, lambda: [run])
    for process, other in enumerate(others, 1):
        for name in sorted((first.keys() | other.keys()) - {REFERENCE, FROZEN}):
            values = [_shortened(each.get(name, "none or the default")) for each in (other, first)]
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"process {process} does not train what process 0 trains ({name}: {values[0]} there, {values[1]} "
                    "in process 0): start all processes with the same options, files and tokenizer"
                )


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"


def warn_of_another_end(before: int, now: int, args: TrainingArguments) -> None:
    """Warn that the learning rate follows another curve, where its schedule depends on the number of steps."""
    depends = args.lr_scheduler_type not in SCHEDULES_WITHOUT_END or 0 < args.warmup_steps < 1
    if before != now and depends:
        logger.warning(
            f"the checkpoint's run was to end after {before} steps, this one after {now}: "
            f"lr_scheduler_type={args.lr_scheduler_type.value!r} depends on that, so the learning rate follows "
            "another curve from here on"
        )


def _describe_data(data: Dataset | dict[str, Dataset] | None, columns: Iterable[str]) -> Any:
    if isinstance(data, dict):
        return {name: _describe_data(dataset, columns) for name, dataset in data.items()}
    if data is None:
        return None
    return f"{len(data)} examples, {fingerprints.hash_data(data, set(columns) & set(data.column_names))}"


def default_of(option: Any) -> Any:
    """Return the default of a dataclass's field."""
    return option.default_factory() if option.default_factory is not MISSING else option.default


def _plain(value: Any) -> Any:
    """Return a value as JSON holds it, so that it compares equal to the value that is read back."""

    def as_json(value: Any) -> Any:
        if isinstance(value, (set, frozenset)):
            return sorted(value, key=str)
        return value.value if isinstance(value, Enum) else str(value)

    return json.loads(json.dumps(value, default=as_json, sort_keys=True))
