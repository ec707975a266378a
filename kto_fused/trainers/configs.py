"""The trainers' options: ``transformers.TrainingArguments`` and the options of each loss.

An option is a field with its default, its help text and its choices, in this file alone: the command's flags are made
from the fields. ``__post_init__`` refuses values with which a run would not be the one that was asked for.
``TrainingArguments`` and accelerate refuse others themselves; those checks are not repeated here.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from transformers import TrainingArguments

from .. import checks
from ..engines import backends
from ..functional import DEFAULT_CHUNK_BYTES
from ..heads.preference import (
    DEFAULT_GAMMA,
    DPO_LOSS_TYPES,
    KTO_LOSS_TYPES,
    REFERENCE_FREE,
    check_dpo_options,
    check_kto_options,
)

MISMATCHED = "mismatched"
AUTO = "auto"
POLICY, BASE = REFERENCES = ("policy", "base")
AUTO_MAX_LENGTH = 1024
# options of ``TrainingArguments`` that these losses cannot honour: name, the only value, why
FIXED = {
    "label_smoothing_factor": (0.0, "these losses have no classes to smooth; DPO has label_smoothing"),
    "average_tokens_across_devices": (True, "a loss is the mean over the sequences of all devices"),
    "length_column_name": ("length", "tokenized data has its lengths in this column"),
    "include_for_metrics": ([], "there are no logits to pass to compute_metrics"),
    "bf16_full_eval": (
        False,
        "it would round the model for good, but not its reference; bf16=True computes in bfloat16",
    ),
    "fp16_full_eval": (
        False,
        "it would round the model for good, but not its reference; fp16=True computes in float16",
    ),
}
# The least value of options that transformers takes without a check. NaN is refused too, and infinity, except for
# max_grad_norm, where it means no clipping.
AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "neftune_noise_alpha": 0,
    "logging_steps": 0,
    "eval_steps": 0,
    "save_steps": 0,
    "dataloader_prefetch_factor": 1,
}
# Learning-rate schedules, values of ``lr_scheduler_type``: those that ignore ``lr_scheduler_kwargs``, those that step
# by the loss of evaluations, those that ignore ``warmup_steps``, and those that do not depend on a run's last step.
SCHEDULES_WITHOUT_OPTIONS = ("constant", "constant_with_warmup")
SCHEDULES_BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")
SCHEDULES_WITHOUT_WARMUP = ("constant", *SCHEDULES_BY_EVALUATION)
SCHEDULES_WITHOUT_END = (*SCHEDULES_WITHOUT_OPTIONS, "inverse_sqrt", *SCHEDULES_BY_EVALUATION)


def _is_count(value: object) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)


def _option(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class FusedPreferenceConfig(TrainingArguments):
    """The options that ``FusedKTOConfig`` and ``FusedDPOConfig`` share.

    Four defaults differ from ``TrainingArguments``: the first four fields below. Examples are grouped by length, so
    that batches pad little. NaN losses are not filtered, because the filter would wait for the device at every step.

    Raises:
        ValueError, TypeError: an option that cannot be honoured, by name.
    """

    learning_rate: float = _option(1e-6, "Initial learning rate of AdamW.")
    logging_steps: float = _option(10, "Log every this many optimizer steps; below 1, a fraction of all steps.")
    logging_nan_inf_filter: bool = _option(False, "Leave NaN and infinite losses out of the logged mean.")
    train_sampling_strategy: str = _option(
        "group_by_length",
        "Order of the training examples.",
        choices=["random", "sequential", "group_by_length", "batch_rebalance"],
    )

    beta: float = _option(0.1, "Pull towards the reference model, > 0.")
    reference: str = _option(
        POLICY,
        "The reference if no ref_model is given. 'policy': the policy as it is before training; for a model with "
        "adapters, its adapter named ref or reference, else a frozen copy of the trained adapter, or the model with "
        "its adapters off if that adapter changes nothing yet. 'base': the model with its adapters off, whatever they "
        "hold at the start.",
        choices=list(REFERENCES),
    )
    max_length: int | str | None = _option(
        AUTO,
        "Longest sequence in tokens; completions are cut to it, and prompts that fill it are dropped. A number may not "
        f"be more than the model's positions. {AUTO!r}: {AUTO_MAX_LENGTH}, or the model's positions if they are fewer. "
        "None: the model's positions, if it has a limit.",
    )
    precompute_ref_log_probs: bool = _option(
        False, "Compute the reference's log-probabilities once, before training, and keep them on disk."
    )
    precompute_ref_batch_size: int | None = _option(
        None, "Sequences (or pairs) per device while precomputing; per_device_train_batch_size if not given."
    )
    ref_cache_dir: str | None = _option(
        None, "Folder for the precomputed log-probabilities; kto_fused/ in the Hugging Face cache if not given."
    )
    dataset_num_proc: int | None = _option(None, "Number of processes that tokenize the data.")
    pad_to_multiple_of: int | None = _option(None, "Pad batches to a multiple of this many tokens.")
    disable_dropout: bool = _option(True, "Set dropout to 0 in the model, its adapters and its reference.")
    loss_from: str = _option(
        "hidden",
        "What the loss is computed from: the model's hidden states and LM head, or its logits, which need more memory "
        "but work with any model.",
        choices=["hidden", "logits"],
    )
    chunk_bytes: int = _option(
        DEFAULT_CHUNK_BYTES, "Memory for a chunk of logits, in bytes, if the loss is computed from hidden states."
    )
    trust_remote_code: bool = _option(
        False,
        "Run Python code that comes with a model, tokenizer or configuration loaded from a folder or the Hub.",
    )
    backend: str | None = _option(
        None, "Kernels of the loss; the faster ones on the device if not given.", choices=list(backends.BACKENDS)
    )

    resume_anyway: bool = _option(
        False,
        "Also resume from a checkpoint of a run with other data, weights or options, or from one without a manifest; "
        "the log says what differs.",
    )

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.max_length, str) and self.max_length.isdecimal():  # HfArgumentParser leaves it a string
            self.max_length = int(self.max_length)
        self._check_types()
        self._check_numbers()
        self._check_can_be_honoured()

    def _check_types(self) -> None:
        """Check the options declared in this file by their choices and types, which ``TrainingArguments`` does not."""
        inherited = TrainingArguments.__dataclass_fields__
        types = get_type_hints(type(self))  # HfArgumentParser changes the types that the fields hold
        for option in fields(self):
            if option is inherited.get(option.name):
                continue
            name, value = option.name, getattr(self, option.name)
            if "choices" in option.metadata:
                or_none = (None,) if option.default is None else ()
                checks.choice(name, value, (*option.metadata["choices"], *or_none))
            elif types[name] is bool:
                checks.flag(name, value)
            elif types[name] == int | None and not _is_count(value):
                raise ValueError(f"{name} must be a positive integer or None, got {value!r}")

    def _check_numbers(self) -> None:
        for name, least in AT_LEAST.items():
            value = getattr(self, name)
            is_no_clipping = name == "max_grad_norm" and value == math.inf
            if value is not None and not is_no_clipping and not least <= value < math.inf:
                raise ValueError(f"{name} must be a finite number of at least {least}, got {value}")
        # transformers would take these for "all epochs" and "no epoch", without a word
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, or -1 for num_train_epochs, got {self.max_steps}")
        if self.max_steps == -1 and self.num_train_epochs == 0:
            raise ValueError("num_train_epochs must be more than 0, or max_steps given")
        checks.integer("chunk_bytes", self.chunk_bytes, at_least=1)
        if self.max_length != AUTO and not _is_count(self.max_length):
            raise ValueError(f"max_length must be a positive integer, {AUTO!r} or None, got {self.max_length!r}")
        if self.max_length == 1:
            raise ValueError("max_length must hold a prompt and a completion, at least 2 tokens, got 1")

    def _check_can_be_honoured(self) -> None:
        """Refuse options that would be ignored, alone or together with others."""
        if self.fp16 and self.device.type == "cpu":  # accelerate would go on in float32, without a word
            raise ValueError("fp16=True has no effect on a CPU, which computes in float32: use bf16=True or neither")
        for name, (value, why) in FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} must be {value!r}, got {getattr(self, name)!r}: {why}")
        for name, value in (("save_strategy", "best"), ("load_best_model_at_end", True)):
            if self.eval_strategy == "no" and getattr(self, name) == value:
                raise ValueError(f"{name}={value!r} needs evaluations, but eval_strategy is 'no'")
        patches_head = (self.liger_kernel_config or {}).get("fused_linear_cross_entropy", True)
        if self.use_liger_kernel and self.loss_from == "hidden" and patches_head:
            raise ValueError(
                "use_liger_kernel replaces the model's forward with a loss of its own: keep that loss out with "
                "liger_kernel_config={'fused_linear_cross_entropy': False}"
            )
        schedule = self.lr_scheduler_type
        # an option, the value that does nothing, what the option needs, and whether that is there
        for name, unset, needed, is_there in (
            (
                "lr_scheduler_kwargs",
                None,
                "an lr_scheduler_type that takes them",
                schedule not in SCHEDULES_WITHOUT_OPTIONS,
            ),
            ("warmup_steps", 0, "an lr_scheduler_type that warms up", schedule not in SCHEDULES_WITHOUT_WARMUP),
            ("chunk_bytes", DEFAULT_CHUNK_BYTES, "loss_from='hidden'", self.loss_from == "hidden"),
            (
                "auto_find_batch_size",
                False,
                "a train_sampling_strategy whose batches can shrink",
                self.train_sampling_strategy != "batch_rebalance",
            ),
            ("greater_is_better", None, "metric_for_best_model", self.metric_for_best_model is not None),
            ("hub_model_id", None, "push_to_hub", self.push_to_hub),
            ("precompute_ref_batch_size", None, "precompute_ref_log_probs", self.precompute_ref_log_probs),
            ("ref_cache_dir", None, "precompute_ref_log_probs", self.precompute_ref_log_probs),
            ("precompute_ref_log_probs", False, "a loss_type that has a reference", self.needs_reference),
            ("reference", POLICY, "a loss_type that has a reference", self.needs_reference),
        ):
            if getattr(self, name) not in (unset, {}) and not is_there:
                raise ValueError(f"{name}={getattr(self, name)!r} has no meaning without {needed}")


@dataclass
class FusedKTOConfig(FusedPreferenceConfig):
    """Options of ``FusedKTOTrainer``.

    ``reference_point`` is z0, in one of three forms:

    - ``"mismatched"``: the paper's estimate from prompts with other prompts' completions, which takes two more forward
      passes, without gradient. It is the mean over all ranks and accumulated batches of an optimizer step; in
      evaluation, over one batch of each rank.
    - ``"batch_mean"``: the batch's mean log-ratio, which takes no further pass, but one process and no accumulation.
    - a number in nats.

    >>> FusedKTOConfig(output_dir="out", use_cpu=True, desirable_weight=1.33).loss_type
    'kto'
    """

    loss_type: str = _option("kto", "The loss.", choices=list(KTO_LOSS_TYPES))
    desirable_weight: float = _option(1.0, "Weight of desirable completions, >= 0.")
    undesirable_weight: float = _option(1.0, "Weight of undesirable completions, >= 0.")
    reference_point: str = _option(MISMATCHED, "z0: 'mismatched', 'batch_mean', or a number in nats.")
    average_log_prob: bool = _option(False, "Average a completion's log-probabilities over its tokens, not sum them.")

    def __post_init__(self):
        super().__post_init__()
        if self.reference_point not in (MISMATCHED, "batch_mean"):
            given = self.reference_point
            try:
                self.reference_point = math.nan if isinstance(given, bool) else float(given)
            except (TypeError, ValueError):
                self.reference_point = math.nan
            if not math.isfinite(self.reference_point):
                raise ValueError(f"reference_point must be 'mismatched', 'batch_mean' or a number, got {given!r}")
        number = 0.0 if self.reference_point == MISMATCHED else self.reference_point
        # check_kto_options accepts "batch_mean" with this loss, because it is the functions' default; it is not this
        # option's default
        if number == "batch_mean" and self.loss_type == "apo_zero_unpaired":
            raise ValueError("loss_type='apo_zero_unpaired' fixes reference_point at 0, got 'batch_mean'")
        check_kto_options(self.loss_type, self.beta, self.desirable_weight, self.undesirable_weight, number, "mean")

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def needs_mismatched(self) -> bool:
        return self.reference_point == MISMATCHED and self.loss_type != "apo_zero_unpaired"


@dataclass
class FusedDPOConfig(FusedPreferenceConfig):
    """Options of ``FusedDPOTrainer``.

    >>> FusedDPOConfig(output_dir="out", use_cpu=True, loss_type="ipo").beta
    0.1
    """

    loss_type: str = _option("sigmoid", "The loss.", choices=list(DPO_LOSS_TYPES))
    label_smoothing: float = _option(
        0.0, "Probability that a preference is wrong, in [0, 0.5); for sigmoid, robust and simpo."
    )
    gamma: float = _option(
        DEFAULT_GAMMA, "Target reward margin of simpo: its loss is -log sigmoid(beta x difference - gamma)."
    )

    def __post_init__(self):
        super().__post_init__()
        check_dpo_options(self.loss_type, self.beta, self.label_smoothing, self.gamma, "mean")

    @property
    def needs_reference(self) -> bool:
        return self.loss_type not in REFERENCE_FREE

    @property
    def average_log_prob(self) -> bool:
        return False  # ipo and simpo average by themselves
