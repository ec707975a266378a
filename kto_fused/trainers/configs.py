"""What the trainers can be told: ``transformers.TrainingArguments`` and the losses' own options."""

import math
from dataclasses import dataclass, field

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
LOSS_FROM = ("hidden", "logits")
AUTO = "auto"
POLICY, BASE = REFERENCES = ("policy", "base")
AUTO_MAX_LENGTH = 1024
# options of ``TrainingArguments`` that mean nothing for these losses: name, the only value, why
FIXED = {
    "label_smoothing_factor": (0.0, "these losses have no classes to smooth; DPO has label_smoothing"),
    "average_tokens_across_devices": (True, "a loss is the mean over the sequences of all devices"),
    "length_column_name": ("length", "that is what tokenized data calls it"),
    "include_for_metrics": ([], "there are no logits to pass to compute_metrics"),
    "bf16_full_eval": (False, "it would round the model for good, not its reference; bf16=True computes in bfloat16"),
    "fp16_full_eval": (False, "it would round the model for good, not its reference; fp16=True computes in float16"),
}
# the least that these may be, where they are given; NaN is refused too, infinity but for max_grad_norm (no clipping)
AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "neftune_noise_alpha": 0,
    "logging_steps": 0,
    "eval_steps": 0,
    "save_steps": 0,
    "seed": 0,
    "dataloader_prefetch_factor": 1,
}
# schedules to which transformers passes no lr_scheduler_kwargs, and no warmup_steps
WITHOUT_OPTIONS = ("constant", "constant_with_warmup")
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")


def _is_count(value: object) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)


def _option(default, text: str, **metadata):
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class FusedPreferenceConfig(TrainingArguments):
    """What ``FusedKTOConfig`` and ``FusedDPOConfig`` share. Of ``TrainingArguments`` these defaults differ:
    ``learning_rate`` 1e-6, ``logging_steps`` 10, ``train_sampling_strategy`` "group_by_length" (batches of similar
    length), and ``logging_nan_inf_filter`` False, which would wait for the device at every step.
    """

    learning_rate: float = _option(1e-6, "Initial learning rate of AdamW.")
    logging_steps: float = _option(10, "Log every so many optimizer steps; a fraction below 1 is of all steps.")
    logging_nan_inf_filter: bool = _option(False, "Leave NaN and infinite losses out of the logged mean.")
    train_sampling_strategy: str = _option(
        "group_by_length",
        "Order of the training examples.",
        choices=["random", "sequential", "group_by_length", "batch_rebalance"],
    )

    beta: float = _option(0.1, "Pull towards the reference model, > 0.")
    reference: str = _option(
        POLICY,
        "The reference where no ref_model is given. 'policy': the policy as it is before training; of a model with "
        "adapters, its adapter named ref or reference, else a frozen copy of the trained adapter, else (that adapter "
        "changes nothing yet) the model with its adapters off. 'base': the model with its adapters off, whatever they "
        "hold at the start.",
        choices=list(REFERENCES),
    )
    max_length: int | str | None = _option(
        AUTO,
        "Longest sequence in tokens; completions are cut to it, and prompts that fill it are dropped. A number may not "
        f"be more than the model's positions; {AUTO!r}: {AUTO_MAX_LENGTH}, or the model's positions where those are "
        "fewer; None: the model's positions, if it has a limit.",
    )
    precompute_ref_log_probs: bool = _option(
        False, "Compute the reference's log-probabilities once, before training, and keep them on disk."
    )
    precompute_ref_batch_size: int | None = _option(
        None, "Sequences (pairs) per device while precomputing; per_device_train_batch_size if not given."
    )
    ref_cache_dir: str | None = _option(
        None, "Folder of the precomputed log-probabilities; kto_fused/ in the Hugging Face cache if not given."
    )
    dataset_num_proc: int | None = _option(None, "Processes that tokenize.")
    pad_to_multiple_of: int | None = _option(None, "Pad batches to a multiple of this many tokens.")
    disable_dropout: bool = _option(True, "Set dropout to 0 in the model, its adapters and its reference.")
    loss_from: str = _option(
        "hidden",
        "What the loss takes: the model's hidden states and LM head, or its logits, which need more memory and suit "
        "any model.",
        choices=list(LOSS_FROM),
    )
    chunk_bytes: int = _option(
        DEFAULT_CHUNK_BYTES, "Memory for a chunk of logits, in bytes, where the loss takes hidden states."
    )
    trust_remote_code: bool = _option(
        False,
        "Run Python code that comes with a model, tokenizer or configuration that is loaded from a folder or the Hub.",
    )
    backend: str | None = _option(
        None, "Kernels of the loss: the faster on the device if not given.", choices=list(backends.BACKENDS)
    )

    resume_anyway: bool = _option(
        False,
        "Resume from a checkpoint of a run with other data, weights or options too, or from one without a manifest; "
        "the log says what differs.",
    )

    def __post_init__(self):
        super().__post_init__()
        for name, least in AT_LEAST.items():
            value = getattr(self, name)
            is_norm = name == "max_grad_norm" and value == math.inf
            if value is not None and not is_norm and not least <= value < math.inf:
                raise ValueError(f"{name} must be a finite number of at least {least}, got {value}")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, or -1 for num_train_epochs, got {self.max_steps}")
        if self.max_steps == -1 and self.num_train_epochs == 0:
            raise ValueError("num_train_epochs must be more than 0, or max_steps given")
        if self.fp16 and self.device.type == "cpu":
            raise ValueError(
                "fp16=True has no effect on a CPU, which would compute in float32: use bf16=True or neither"
            )
        for name, value in (("save_strategy", "best"), ("load_best_model_at_end", True)):
            if self.eval_strategy == "no" and getattr(self, name) == value:
                raise ValueError(f"{name}={value!r} needs evaluations, but eval_strategy is 'no'")
        for name, (value, why) in FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} must be {value!r}, got {getattr(self, name)!r}: {why}")
        patches_head = (self.liger_kernel_config or {}).get("fused_linear_cross_entropy", True)
        if self.use_liger_kernel and self.loss_from == "hidden" and patches_head:
            raise ValueError(
                "use_liger_kernel replaces the model's forward with a loss of its own: keep that one out with "
                "liger_kernel_config={'fused_linear_cross_entropy': False}"
            )
        checks.choice("loss_from", self.loss_from, LOSS_FROM)
        checks.choice("reference", self.reference, REFERENCES)
        checks.choice("backend", self.backend, (*backends.BACKENDS, None))
        checks.integer("chunk_bytes", self.chunk_bytes, at_least=1)
        for name in ("precompute_ref_log_probs", "disable_dropout", "resume_anyway"):
            checks.flag(name, getattr(self, name))
        for name in ("precompute_ref_batch_size", "dataset_num_proc", "pad_to_multiple_of"):
            if not _is_count(getattr(self, name)):
                raise ValueError(f"{name} must be a positive integer or None, got {getattr(self, name)!r}")
        schedule = str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type))
        for name, default, needed, is_on in (
            ("lr_scheduler_kwargs", None, "an lr_scheduler_type that takes them", schedule not in WITHOUT_OPTIONS),
            ("warmup_steps", 0, "an lr_scheduler_type that warms up", schedule not in WITHOUT_WARMUP),
            ("chunk_bytes", DEFAULT_CHUNK_BYTES, "loss_from='hidden'", self.loss_from == "hidden"),
            (
                "auto_find_batch_size",
                False,
                "a train_sampling_strategy whose batches can shrink",
                self.train_sampling_strategy != "batch_rebalance",
            ),
            ("hub_model_id", None, "push_to_hub", self.push_to_hub),
            ("precompute_ref_batch_size", None, "precompute_ref_log_probs", self.precompute_ref_log_probs),
            ("ref_cache_dir", None, "precompute_ref_log_probs", self.precompute_ref_log_probs),
            ("reference", POLICY, "a loss_type that has a reference", self.needs_reference),
        ):
            if getattr(self, name) not in (default, {}) and not is_on:
                raise ValueError(f"{name}={getattr(self, name)!r} has no meaning without {needed}")
        if isinstance(self.max_length, str) and self.max_length.isdecimal():  # HfArgumentParser leaves it a string
            self.max_length = int(self.max_length)
        if self.max_length != AUTO and not _is_count(self.max_length):
            raise ValueError(f"max_length must be a positive integer, {AUTO!r} or None, got {self.max_length!r}")
        if self.max_length == 1:
            raise ValueError("max_length must hold a prompt and a completion, at least 2 tokens, got 1")


@dataclass
class FusedKTOConfig(FusedPreferenceConfig):
    """Options of ``FusedKTOTrainer``.

    ``reference_point`` is z0: ``"mismatched"``, the paper's estimate from prompts with other prompts' completions (two
    more forward passes, without gradient), its mean over all ranks and accumulated batches of an optimizer step (in
    evaluation, over all ranks' batches at a time);
    ``"batch_mean"``, the batch's mean log-ratio (no more passes; one process, no accumulation); or a number in nats.

    >>> FusedKTOConfig(output_dir="out", use_cpu=True, desirable_weight=1.33).loss_type
    'kto'
    """

    loss_type: str = _option("kto", "The loss.", choices=list(KTO_LOSS_TYPES))
    desirable_weight: float = _option(1.0, "Weight of desirable completions, >= 0.")
    undesirable_weight: float = _option(1.0, "Weight of undesirable completions, >= 0.")
    reference_point: str = _option(MISMATCHED, "z0: 'mismatched', 'batch_mean', or a number in nats.")
    average_log_prob: bool = _option(False, "Mean instead of sum over a completion's tokens.")

    def __post_init__(self):
        super().__post_init__()
        checks.flag("average_log_prob", self.average_log_prob)
        if self.reference_point not in (MISMATCHED, "batch_mean"):
            given = self.reference_point
            try:
                self.reference_point = math.nan if isinstance(given, bool) else float(given)
            except (TypeError, ValueError):
                self.reference_point = math.nan
            if not math.isfinite(self.reference_point):
                raise ValueError(f"reference_point must be 'mismatched', 'batch_mean' or a number, got {given!r}")
        number = 0.0 if self.reference_point == MISMATCHED else self.reference_point
        if number == "batch_mean" and self.loss_type == "apo_zero_unpaired":  # the functions' default, but none here
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

    loss_type: str = _option(
        "sigmoid",
        "The loss.",
        choices=list(DPO_LOSS_TYPES),
    )
    label_smoothing: float = _option(
        0.0, "Probability that a preference is wrong, in [0, 0.5): sigmoid, robust, simpo."
    )
    gamma: float = _option(DEFAULT_GAMMA, "Target reward margin of simpo: log sigmoid(beta x difference - gamma).")

    def __post_init__(self):
        super().__post_init__()
        check_dpo_options(self.loss_type, self.beta, self.label_smoothing, self.gamma, "mean")
        if self.precompute_ref_log_probs and not self.needs_reference:
            raise ValueError(f"precompute_ref_log_probs has no meaning for loss_type={self.loss_type!r}: no reference")

    @property
    def needs_reference(self) -> bool:
        return self.loss_type not in REFERENCE_FREE

    @property
    def average_log_prob(self) -> bool:
        return False  # the losses that average do it themselves
