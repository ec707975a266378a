"""The trainers' options: ``transformers.TrainingArguments`` and the options of each loss.

An option is a field with its default, its help text and its choices, in this file alone: the command's flags are made
from the fields. The options of the losses come from the registry of losses (``losses.with_loss_options``).
``__post_init__`` refuses values with which a run would not be the one that was asked for. ``TrainingArguments`` and
accelerate refuse others themselves; those checks are not repeated here.
"""

import copy
import json
import math
import re
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, get_type_hints

from transformers import TrainingArguments

from .. import checks, heads
from ..data import layouts
from ..engines import backends
from ..functional import DEFAULT_CHUNK_BYTES
from ..heads.preference import KTO_LOSS_TYPES
from ..heads.protocol import Head, class_of
from . import losses

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
RESERVED_OBJECTIVES = ("rewards", "logps", "logits")  # these names begin other logged values
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


def _checked_weights(given: dict[str, float] | list[str] | str) -> dict[str, float]:
    """Return weights by objective, which the command line gives as name=weight, and a YAML file as one JSON mapping."""
    expected = "expected weights >= 0 by the names of objectives, such as helpful=1 harmless=0.5"
    given = [given] if isinstance(given, str) else given
    if isinstance(given, list):
        try:
            is_json = len(given) == 1 and given[0].startswith("{")
            pairs = json.loads(given[0]).items() if is_json else [text.split("=") for text in given]
            weights = {name: float(weight) for name, weight in pairs}
        except (ValueError, TypeError) as error:
            raise ValueError(f"objective_weights={given}: {expected}") from error
        if len(weights) < len(pairs):
            raise ValueError(f"objective_weights={given} names an objective twice")
    else:
        weights = given
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"objective_weights={given!r}: {expected}")
    for name, weight in weights.items():
        if not (isinstance(name, str) and re.fullmatch(r"\w+", name)) or name in RESERVED_OBJECTIVES:
            raise ValueError(
                f"objective_weights names an objective {name!r}: expected letters, digits and _, and none of "
                f"{list(RESERVED_OBJECTIVES)}"
            )
        checks.number(f"the weight of objective {name!r}", weight, at_least=0)
    return {name: float(weight) for name, weight in weights.items()}


# The order of these types matters: of a union that holds str, ``HfArgumentParser`` takes the type before None.
LossType = list[str] | None | str  # one or several losses
ObjectiveWeights = list[str] | None | str | dict[str, float]  # a mapping, or its entries as texts


@dataclass
class FusedPreferenceConfig(TrainingArguments):
    """The options that all recipes share. A recipe's own class adds ``loss_type`` and the options of its losses.

    An option of a loss is None until it is set, which means the loss's own default; an option that the chosen loss does
    not have is refused. After construction the chosen loss's options hold the values that it has.

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

    loss_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Weights of several losses, in loss_type's order, of which the sum is trained; 1 if not given."
        },
    )
    objective_weights: ObjectiveWeights = field(
        default=None,
        metadata={
            "help": "Weights of several objectives, each with training data of its own, as name=weight; their weighted "
            "sum is trained, and each batch holds equally many examples of each."
        },
    )
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
    columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names that the data's columns have, as field=column: prompt=question completion=answer "
            "label=thumbs. In YAML and Python also a mapping.",
        },
    )
    label_true: list[str] | None = field(
        default=None,
        metadata={"help": "Labels that mean liked: up good 5. True, 1 and their texts are read without it."},
    )
    label_false: list[str] | None = field(
        default=None,
        metadata={"help": "Labels that mean not liked: down bad 1. False, 0, -1 and their texts are read without it."},
    )
    chat: str = _option(
        "auto",
        "Whether plain text is put into the tokenizer's chat template. auto: text is trained as it is, conversations "
        "are rendered. always: a prompt becomes a user's message, a completion the assistant's. never: as auto, but "
        "conversations are refused.",
        choices=list(layouts.CHATS),
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

    # of the recipe, see ``losses.with_loss_options``
    loss_names: ClassVar[tuple[str, ...]]
    loss_options: ClassVar[dict[str, dict[str, Any]]]
    default_loss: ClassVar[str]

    def __post_init__(self):
        super().__post_init__()
        self._settle_loss()
        if self.objective_weights is not None:
            self.objective_weights = _checked_weights(self.objective_weights)
        if isinstance(self.max_length, str) and self.max_length.isdecimal():  # HfArgumentParser leaves it a string
            self.max_length = int(self.max_length)
        self._check_types()
        self.reading = layouts.reading(self.columns, self.label_true, self.label_false, self.chat)
        if isinstance(self.columns, dict):
            self.columns = [f"{name}={column}" for name, column in self.columns.items()]
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
            if option.name == "loss_type":
                continue
            if "choices" in option.metadata:
                or_none = (None,) if option.default is None else ()
                checks.choice(name, value, (*option.metadata["choices"], *or_none))
            elif types[name] is bool:
                checks.flag(name, value)
            elif name in self.loss_options:
                continue  # the loss checks its fields itself
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
        ):
            if getattr(self, name) not in (unset, {}) and not is_there:
                raise ValueError(f"{name}={getattr(self, name)!r} has no meaning without {needed}")
        self.check_reference(losses.needs_reference(self.make_loss()))

    def check_reference(self, needs_reference: bool) -> None:
        """Refuse options of the reference model where the loss has none."""
        for name, unset in (("precompute_ref_log_probs", False), ("reference", POLICY)):
            if getattr(self, name) != unset and not needs_reference:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no meaning without a loss_type that has a reference"
                )

    # ---- the loss ----

    def make_loss(self) -> Head:
        """Return the loss that ``loss_type`` and its options describe. Several losses are a ``heads.Mix``."""
        names = self.loss_type if isinstance(self.loss_type, list) else [self.loss_type]
        made = [heads.make(name, **self._fields_of(name)) for name in names]
        if len(made) == 1 and self.loss_weights is None:
            return made[0]
        return heads.Mix(*zip(self.loss_weights or [1.0] * len(made), made, strict=True))

    def with_loss(self, loss: losses.AnyLoss) -> "FusedPreferenceConfig":
        """Return a copy that says that ``loss`` is trained, which ``loss_type`` and its options do not describe.

        Raises:
            ValueError: an option of a loss was given too.
        """
        if self._loss_options_given:
            given = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._loss_options_given)
            raise ValueError(
                f"loss={losses.describe(loss)} is given, and {given} too: set the numbers of a loss on the loss itself"
            )
        args = copy.copy(self)
        for option in self.loss_options:
            setattr(args, option, None)
        args.loss_type = losses.describe(loss)
        return args

    def _fields_of(self, name: str) -> dict[str, Any]:
        """Return the fields of the loss ``name`` that options set."""
        hints, given = get_type_hints(class_of(name)), {}
        for of_loss in fields(class_of(name)):
            option = losses.option_name(name, of_loss.name, self.taken_names)
            if option in self.loss_options and getattr(self, option) is not None:
                given[of_loss.name] = losses.field_value(getattr(self, option), hints[of_loss.name])
        return given

    def _settle_loss(self) -> None:
        """Check the loss's options, and put the chosen loss's values in place of None."""
        if isinstance(self.loss_type, list):
            self.loss_type = [name for name in self.loss_type if name is not None] or None
        options = ("loss_type", "loss_weights", *self.loss_options)
        self._loss_options_given = tuple(name for name in options if getattr(self, name) is not None)
        if self.loss_type is None:
            self.loss_type = self.default_loss
        names = self.loss_type if isinstance(self.loss_type, list) else [self.loss_type]
        known = [*self.loss_names, *(name for name in heads.names() if not losses.is_ours(name))]
        for name in names:
            checks.choice("loss_type", name, known)
        if self.loss_weights is None and len(names) == 1:
            self.loss_type = names[0]
        elif self.loss_weights is not None and len(self.loss_weights) != len(names):
            raise ValueError(f"loss_weights must hold one weight per loss of {names}, got {self.loss_weights}")
        if len(set(names)) < len(names):
            raise ValueError(f"loss_type names a loss twice: {names}")
        for option, defaults in self.loss_options.items():
            value = getattr(self, option)
            users = [name for name in names if self._has(name, option)]
            if value is not None and not users:
                raise ValueError(
                    f"{option}={value!r} has no meaning for loss_type={self.loss_type!r}: it belongs to {[*defaults]}"
                )
        made = self.make_loss()
        for option in self.loss_options:
            held = {
                getattr(head, of_loss.name)
                for head in losses.parts(made)
                for of_loss in fields(head)
                if losses.option_name(head.name, of_loss.name, self.taken_names) == option
            }
            if len(held) == 1:
                setattr(self, option, *held)

    def _has(self, name: str, option: str) -> bool:
        options = (losses.option_name(name, of_loss.name, self.taken_names) for of_loss in fields(class_of(name)))
        return option in options


@dataclass
@losses.with_loss_options(losses.built_in(losses.trains_completions), left_out=("reference_point",))
class FusedKTOConfig(FusedPreferenceConfig):
    """Options of ``FusedKTOTrainer``.

    ``reference_point`` is z0 of the losses ``kto`` and ``kto_squared``, in one of three forms:

    - ``"mismatched"``: the paper's estimate from prompts with other prompts' completions, which takes two more forward
      passes, without gradient. It is the mean over all ranks and accumulated batches of an optimizer step; in
      evaluation, over one batch of each rank.
    - ``"batch_mean"``: the batch's mean log-ratio, which takes no further pass, but one process and no accumulation.
    - a number in nats.

    >>> FusedKTOConfig(output_dir="out", use_cpu=True, desirable_weight=1.33).loss_type
    'kto'
    """

    default_loss: ClassVar[str] = "kto"

    loss_type: LossType = field(
        default=None,
        metadata={
            "help": "The loss, of single completions with labels; kto if not given. Several losses are summed.",
            "choices": list(losses.built_in(losses.trains_completions)),
        },
    )
    reference_point: str = _option(MISMATCHED, "z0: 'mismatched', 'batch_mean', or a number in nats.")
    reward_shift_decay: float = _option(
        0.9,
        "Loss bco: share of the former mean rewards that an optimizer step keeps in the moving means, whose middle is "
        "the reward shift delta; in [0, 1).",
    )
    average_log_prob: bool = _option(False, "Average a completion's log-probabilities over its tokens, not sum them.")

    def __post_init__(self):
        if self.reference_point not in (MISMATCHED, "batch_mean"):
            given = self.reference_point
            try:
                self.reference_point = math.nan if isinstance(given, bool) else float(given)
            except (TypeError, ValueError):
                self.reference_point = math.nan
            if not math.isfinite(self.reference_point):
                raise ValueError(f"reference_point must be 'mismatched', 'batch_mean' or a number, got {given!r}")
        checks.number("reward_shift_decay", self.reward_shift_decay, at_least=0)
        if not self.reward_shift_decay < 1:
            raise ValueError(f"reward_shift_decay must lie in [0, 1), got {self.reward_shift_decay}")
        super().__post_init__()
        if self.average_log_prob and self.loss_type not in KTO_LOSS_TYPES:
            raise ValueError(
                f"average_log_prob=True has no meaning for loss_type={self.loss_type!r}: it belongs to "
                f"{list(KTO_LOSS_TYPES)}"
            )
        self.check_tensors(self.make_loss())

    def _fields_of(self, name: str) -> dict[str, Any]:
        fields = super()._fields_of(name)
        if name in ("kto", "kto_squared"):
            fields["reference_point"] = "tensor" if self.reference_point == MISMATCHED else self.reference_point
        return fields

    def check_tensors(self, loss: losses.AnyLoss) -> None:
        """Refuse options of z0 and of the reward shift for a loss that has none."""
        has_z0 = any(losses.takes(part, "z0") for part in losses.parts(loss))
        for name, unset, is_there in (
            ("reference_point", MISMATCHED, has_z0),
            ("reward_shift_decay", type(self).reward_shift_decay, losses.takes(loss, "delta")),
        ):
            if getattr(self, name) != unset and not is_there:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no meaning for loss_type={self.loss_type!r}, which reads no "
                    f"{'z0' if name == 'reference_point' else 'delta'}"
                )


@dataclass
@losses.with_loss_options(losses.built_in(losses.trains_pairs))
class FusedDPOConfig(FusedPreferenceConfig):
    """Options of ``FusedDPOTrainer``.

    >>> FusedDPOConfig(output_dir="out", use_cpu=True, loss_type="ipo").beta
    0.1
    >>> FusedDPOConfig(output_dir="out", use_cpu=True, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2]).beta
    0.1
    """

    default_loss: ClassVar[str] = "sigmoid"

    loss_type: LossType = field(
        default=None,
        metadata={
            "help": "The loss, of pairs; sigmoid (DPO) if not given. Several losses are summed.",
            "choices": list(losses.built_in(losses.trains_pairs)),
        },
    )

    @property
    def average_log_prob(self) -> bool:
        return False  # the losses divide by lengths themselves where they do


@dataclass
@losses.with_loss_options(losses.built_in(losses.trains_tokens), left_out=("normalizer", "max_tokens", "chosen_only"))
class FusedSFTConfig(FusedPreferenceConfig):
    """Options of ``FusedSFTTrainer``. The learning rate's default is higher, and dropout stays as the model has it.

    >>> FusedSFTConfig(output_dir="out", use_cpu=True, packing=True).loss_type
    'nll'
    """

    default_loss: ClassVar[str] = "nll"

    learning_rate: float = _option(2e-5, "Initial learning rate of AdamW.")
    loss_type: str | None = _option(
        None, "The loss, of single tokens; nll if not given.", choices=list(losses.built_in(losses.trains_tokens))
    )
    packing: bool = _option(
        False,
        "Put several examples into one row of a training batch, as many as max_length tokens hold; none is split. "
        "per_device_train_batch_size then counts rows.",
    )
    disable_dropout: bool = _option(False, "Set dropout to 0 in the model and its adapters.")

    @property
    def average_log_prob(self) -> bool:
        return False


@dataclass(frozen=True)
class BradleyTerry:
    """The loss of a reward model, see ``FusedRewardTrainer``."""

    centering: float = 0.0

    needs_reference: ClassVar[bool] = False
    group: ClassVar[int] = 2

    def __post_init__(self):
        checks.number("centering", self.centering, at_least=0)


@dataclass
class FusedRewardConfig(FusedPreferenceConfig):
    """Options of ``FusedRewardTrainer``. The learning rate's default is higher.

    >>> FusedRewardConfig(output_dir="out", use_cpu=True, centering=0.01).loss_type
    'bradley_terry'
    """

    loss_names: ClassVar[tuple[str, ...]] = ("bradley_terry",)
    taken_names: ClassVar[frozenset[str]] = frozenset()
    loss_options: ClassVar[dict[str, dict[str, Any]]] = {}
    default_loss: ClassVar[str] = "bradley_terry"

    learning_rate: float = _option(1e-5, "Initial learning rate of AdamW.")
    loss_type: str | None = _option(None, "The loss; bradley_terry if not given.", choices=["bradley_terry"])
    centering: float = _option(
        0.0, "Weight of the squared sum of a pair's scores, >= 0, which keeps their mean near 0."
    )

    def _check_can_be_honoured(self) -> None:
        super()._check_can_be_honoured()
        if self.loss_from != "hidden":
            raise ValueError(f"loss_from={self.loss_from!r} has no meaning for a reward model, which has no logits")

    def _settle_loss(self) -> None:
        self.loss_type = self.default_loss if self.loss_type is None else self.loss_type
        checks.choice("loss_type", self.loss_type, self.loss_names)
        if self.loss_weights is not None:
            raise ValueError(f"loss_weights={self.loss_weights} has no meaning for a reward model's one loss")

    def make_loss(self) -> BradleyTerry:
        return BradleyTerry(self.centering)

    @property
    def average_log_prob(self) -> bool:
        return False
