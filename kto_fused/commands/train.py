"""``kto-fused train``: trains a model with KTO, DPO or supervised fine-tuning, or a reward model, on files of records.

Every option of the trainers is a flag, or a setting in the YAML file of ``--config``. This module reads the options,
loads the model, builds the trainer and runs it. ``resuming`` chooses the checkpoint, ``progress`` prints while the run
trains, and ``results`` writes what it leaves behind.
"""

import functools
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerState,
    TrainingArguments,
    get_scheduler,
    set_seed,
)
from transformers.utils import is_peft_available, is_torch_bf16_gpu_available

from .. import preference_data
from ..data.records import split_by_prompt
from ..engines import backends
from ..huggingface import files as model_files
from ..metrics import LossMetrics
from ..trainers import (
    FusedDPOTrainer,
    FusedKTOTrainer,
    FusedRewardTrainer,
    FusedSFTTrainer,
    FusedTrainer,
    cards,
    checkpoints,
    folder_lock,
    held_out,
    ranks,
)
from ..trainers.configs import (
    FIXED,
    FusedDPOConfig,
    FusedKTOConfig,
    FusedPreferenceConfig,
    FusedRewardConfig,
    FusedSFTConfig,
)
from ..trainers.reward import ScoreMetrics
from ..trainers.supervised import TokenLossMetrics
from . import own_loss, progress, results, resuming, samples
from .arguments import ALIASES, first_look, folder_of, objective_and_file, trained_elsewhere
from .cli import INSTALL
from .errors import CommandError, check_names, sentence
from .failures import check_writable, setup_errors, user_errors
from .flags import FlagParser

CONFIGS = {"kto": FusedKTOConfig, "dpo": FusedDPOConfig, "sft": FusedSFTConfig, "reward": FusedRewardConfig}
TRAINERS = {"kto": FusedKTOTrainer, "dpo": FusedDPOTrainer, "sft": FusedSFTTrainer, "reward": FusedRewardTrainer}
METRICS = {"sft": TokenLossMetrics, "reward": ScoreMetrics}  # the others have ``LossMetrics``
DESCRIPTION = (
    "Train a model with KTO on feedback (prompt, completion, label), with DPO or as a reward model on pairs (prompt, "
    "chosen, rejected), or with supervised fine-tuning on demonstrations (prompt and completion, text, or messages). "
    "--output_dir receives the model, its tokenizer and card, metrics.json, curves.png and report.html. Ctrl-C saves a "
    "checkpoint; the same command with --resume_from_checkpoint true continues from it. Add --loss dpo to list the "
    "flags of DPO."
)
# Options of TrainingArguments that are no flags, because they would change nothing here: options with one allowed
# value, what the command itself decides, and options about logits or columns. enable_jit_checkpoint is left out too: it
# stops a run on SIGTERM in a way that would be taken for the run's end.
LEFT_OUT = (
    *FIXED,
    *("do_train", "do_eval", "do_predict", "local_rank", "parallelism_config", "enable_jit_checkpoint"),
    *("label_names", "prediction_loss_only", "batch_eval_metrics", "remove_unused_columns"),
    *("skip_memory_metrics", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
)
# flags that mean nothing in a run without evaluations
EVALUATION_FLAGS = (
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start"),
    *("load_best_model_at_end", "metric_for_best_model"),
)
# How libraries begin an error about a checkpoint that does not fit the model: weights of other shapes, an adapter on
# other layers, or an adapter where a whole model was expected.
MISFITS = ("Error(s) in loading state_dict", "loaded state dict", "Can't find a checkpoint index")
LOADER_ENDED = (
    "a process that loads batches was killed from outside, as the system does when memory is short: lower "
    "--dataloader_num_workers, then continue from a checkpoint with --resume_from_checkpoint true"
)


@dataclass
class TrainSettings:
    """The command's own options; all others are fields of the trainer's configuration."""

    _argument_group_name = "model and data"

    model: str = field(metadata={"help": "model to train: a folder in Hugging Face format, or a model id on the Hub"})
    data: list[str] = field(
        metadata={
            "help": "training data: .jsonl, .json, .csv, .tsv, .parquet or .arrow files, also with .gz; folders or "
            "quoted patterns of them; a data set of the Hub with its split, as in owner/name:train. NAME=FILE gives a "
            "file to an objective of --objective_weights. kto-fused data FILE shows the records that a file holds"
        }
    )
    eval_data: list[str] | None = field(
        default=None,
        metadata={
            "help": "evaluation data, in the same formats; the model is evaluated before the first step (not with "
            "--eval_on_start false) and after each epoch unless --eval_strategy or --eval_steps says otherwise"
        },
    )
    eval_fraction: float | None = field(
        default=None,
        metadata={
            "help": "share of the training data's prompts to keep for evaluation instead of --eval_data, between 0 and "
            "1; all records of such a prompt are kept. --data_seed, or else --seed, draws them"
        },
    )
    loss: str = field(
        default="kto",
        metadata={
            "help": "kto: losses of single completions, also of pairs, both of whose answers are feedback; dpo: losses "
            "of pairs; sft: losses of single tokens, on demonstrations; reward: a reward model, on pairs, with a score "
            "in the place of the LM head. Or the name of a loss, such as simpo or orpo, which --loss_type names too. "
            "module:Name: a loss of your own, from a module in the current folder or an installed one; its fields are "
            "flags"
        },
    )
    ref_model: str | None = field(
        default=None,
        metadata={
            "help": "reference model, given like --model; if not given, the reference is the model as it is before "
            "training"
        },
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = field(
        default=None,
        metadata={
            "help": "dtype to load the weights in; auto keeps the checkpoint's own dtype. If not given: float32, "
            "because 16 bits lose small updates, or auto with --lora_rank, where the loaded weights are not trained"
        },
    )
    lora_rank: int = field(default=0, metadata={"help": "train a LoRA adapter of this rank; 0 trains all weights"})
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA's scale; twice --lora_rank if not given"})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "layers to adapt: their names, or one regular expression that matches whole names; if not given, "
            "all linear layers except the LM head"
        },
    )
    sample_prompts: int = field(
        default=0,
        metadata={
            "help": "number of prompts that the model answers before and after training, of the evaluation data, or "
            "else of the training data; --seed draws them. The answers are printed, and in report.html"
        },
    )
    sample_max_new_tokens: int | None = field(
        default=None, metadata={"help": f"longest of these answers in tokens; {samples.MAX_NEW_TOKENS} if not given"}
    )
    sample_temperature: float | None = field(
        default=None, metadata={"help": "temperature of these answers; if not given 0, the most likely tokens"}
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "keep the model's linear layers in 4 bits (nf4 of the package bitsandbytes), which compute in "
            "bfloat16; the LM head and --ref_model are not quantised. Needs --lora_rank"
        },
    )
    own_loss: Any = field(default=None, init=False)  # the loss of ``--loss module:Name``

    def __post_init__(self):
        if self.load_in_4bit and not self.lora_rank:
            raise ValueError(
                "load_in_4bit needs an adapter, because weights of 4 bits are not trained: set lora_rank too"
            )
        if self.dtype is None:
            self.dtype = "auto" if self.lora_rank else "float32"
        if self.eval_fraction is not None:
            if not 0 < self.eval_fraction < 1:
                raise ValueError(f"eval_fraction must lie between 0 and 1, got {self.eval_fraction}")
            if self.eval_data:
                raise ValueError("eval_fraction and eval_data are given: evaluate on one of them")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be at least 0, got {self.lora_rank}")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be more than 0, got {self.lora_alpha}")
        for name in ("lora_alpha", "lora_target_modules"):
            if not self.lora_rank and getattr(self, name) is not None:
                raise ValueError(f"{name} is given, but there is no adapter: set lora_rank too")
        samples.check(self)


def main(arguments: list[str], recipe: str | None = None) -> int:
    """Train with the losses of a recipe, or where ``--loss`` alone decides (``kto-fused train``) of any one."""
    return run(*parse(arguments, recipe))


def run(settings: TrainSettings, config: FusedPreferenceConfig) -> int:
    """Train and write the results. Returns the exit code: 0, or 130 if Ctrl-C ended the training.

    Raises:
        CommandError: the run cannot start, or its results cannot be written.
    """
    check_names(config.output_dir, settings.model, *settings.data)  # names from the YAML file too
    check_writable(config.output_dir)
    try:
        with user_errors(checkpoints.FolderInUseError, checkpoints.CheckpointError), folder_lock.only_run_in(config):
            return run_alone(settings, config)
    except RuntimeError as error:
        # torch raises this from a signal handler, so it can come from any line
        if not str(error).startswith("DataLoader worker"):
            raise
        raise CommandError(f"{sentence(error)}: {LOADER_ENDED}") from error


def run_alone(settings: TrainSettings, config: FusedPreferenceConfig) -> int:
    """Do what ``run`` says, in an output folder that no other run writes into."""
    checkpoint = checkpoints.agreed(config, lambda: resuming.starting_checkpoint(config))
    check_schedule(config)
    with setup_errors():
        trainer = make_trainer(settings, config)
        sampler = sampler_of(trainer, settings)
        before = None if sampler is None else sampler.before(is_resumed=checkpoint is not None)
    with progress.StopOnCtrlC() as ctrl_c:
        trainer.add_callback(ctrl_c)
        metrics = fit(trainer, checkpoint)
    if ctrl_c.checkpoint is not None:
        if trainer.is_world_process_zero():
            print(
                f"\nStopped after step {trainer.state.global_step} of {trainer.state.max_steps}. The checkpoint is "
                f"{ctrl_c.checkpoint}.\nTo continue, run the same command with --resume_from_checkpoint true"
            )
        trainer.accelerator.end_training()
        return 130
    with user_errors(Exception, prefix=f"{config.output_dir} cannot be written{results.saved_model_note(trainer)}: "):
        written_config = trainer.args.to_dict() | {"max_length": trainer.max_length}
        written_settings = vars(settings) | {"dtype": str(trainer.model.dtype).removeprefix("torch.")}
        written_settings.pop("own_loss", None)  # the configuration's loss_type describes it
        metrics |= {"settings": written_settings, "config": written_config, "model": held_out.saved_model(trainer)}
        trainer.facts = metrics
        results.write_all(trainer, metrics)
    if sampler is not None:
        with user_errors(Exception, prefix=f"{config.output_dir} holds all results, but the model gives no answers: "):
            metrics["samples"] = sampler.compared(before)
            ranks.on_first(config, lambda: results.write_again(trainer, metrics))
    if trainer.is_world_process_zero():
        results.print_summary(metrics)
        print(f"\nWrote the model, README.md, metrics.json, curves.png and report.html into {config.output_dir}")
    if config.push_to_hub:
        try:
            trainer.push_to_hub()
        except Exception as error:  # of the network, the token or the Hub, of many kinds
            raise CommandError(
                f"--push_to_hub: the upload failed ({sentence(error)}); {config.output_dir} holds the trained model "
                f"and all results; to upload them later: {cards.upload_by_hand(trainer)}"
            ) from error
    trainer.accelerator.end_training()
    return 0


# ---- options ------------------------------------------------------------------------------------------------------


def parse(arguments: list[str], recipe: str | None = None) -> tuple[TrainSettings, FusedPreferenceConfig]:
    """Return the options from flags and from the file of ``--config``. A flag overrides the file.

    ``recipe`` is the command's, None for ``kto-fused train``.

    Raises:
        CommandError: a flag or setting is unknown, has a wrong value, or contradicts another one.
    """
    look = first_look(recipe or "train", arguments)
    loss = look.loss or recipe or "kto"
    choice = own_loss.choose(loss, CONFIGS)  # the loss decides which flags there are
    if recipe not in (None, choice.recipe):
        raise trained_elsewhere(loss, choice.recipe)
    command, (recipe, _, own) = recipe or "train", choice
    taken = taken_names(recipe)
    parser = flags_of(recipe, own, command)
    parser.set_defaults(output_dir=folder_of(loss), loss=loss)
    values = parser.values([*parser.arguments_from(look.settings, look.path), *look.arguments])
    choice.settle(values, loss)
    if own is not None:
        made = own.make({name: values.pop(name) for name in own.flag_names(taken)}, taken)
    for name in ("output_dir", "report_to"):  # to transformers, None would mean another folder and an error
        if values[name] is None:
            values[name] = parser.get_default(name)
    check_evaluation(values, recipe)
    if values["eval_strategy"] is None:
        strategy = "epoch" if values["eval_steps"] is None else "steps"
        values["eval_strategy"] = strategy if is_evaluated(values) else "no"
    if values["save_strategy"] is None:
        values["save_strategy"] = values["eval_strategy"] if values["load_best_model_at_end"] else "steps"
    if values["save_steps"] is None:
        # only an evaluated checkpoint can be the best one
        is_evaluated_too = values["load_best_model_at_end"] and values["eval_steps"] is not None
        values["save_steps"] = values["eval_steps"] if is_evaluated_too else TrainingArguments.save_steps
    if values["eval_on_start"] is None:
        values["eval_on_start"] = values["eval_strategy"] != "no"
    if values["bf16"] is None:
        values["bf16"] = not (values["fp16"] or values["use_cpu"]) and computes_in_bfloat16()
    if values["sample_prompts"] and recipe == "reward":
        raise CommandError("--sample_prompts has no meaning for a reward model, which scores answers and writes none")
    if values["sample_prompts"] and (values["fsdp"] or values["deepspeed"]):
        raise CommandError(f"--{samples.NO_SHARDS}")
    settings, config = parser.build(values)
    if own is not None:
        settings.own_loss = made
    return settings, config


def flags_of(loss: str, own: own_loss.OwnLoss | None = None, command: str = "train") -> FlagParser:
    """Return the parser for the flags of a recipe, which suggests ``--loss`` for a flag of another recipe.

    With a loss of the user's ``own``, the fields of that loss are flags in place of those of the built-in ones.
    """
    names = {name: {field.name for field in fields(kind)} for name, kind in CONFIGS.items()}
    of_losses = () if own is None else ("loss_type", "loss_weights", *CONFIGS[loss].loss_options)
    parser = FlagParser(
        [TrainSettings, CONFIGS[loss]],
        command,
        usage="%(prog)s --model MODEL --data FILE [FILE ...] [FLAGS]",  # all flags would take three pages
        description=DESCRIPTION,
        left_out=(*LEFT_OUT, *of_losses),
        belongs_to={
            name: f"--loss {other}" for other in CONFIGS for name in names[other] - (names[loss] - {*of_losses})
        },
        more=None if own is None else own.flags(taken_names(loss)),
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="YAML file of settings, named like the flags; flags override it"
    )
    parser.set_defaults(output_dir=f"runs/{loss}", logging_first_step=True, save_total_limit=1)
    # parse() derives them from other flags
    parser.set_defaults(bf16=None, eval_strategy=None, save_strategy=None, save_steps=None, eval_on_start=None)
    return parser


def taken_names(recipe: str) -> frozenset[str]:
    """Return the names that the fields of a loss cannot have as flags, because other flags have them."""
    others = {field.name for field in fields(TrainSettings)} | {"config", "help", *ALIASES}
    return CONFIGS[recipe].taken_names | others


def is_evaluated(values: dict[str, Any]) -> bool:
    """Return whether there are data to evaluate on."""
    return bool(values["eval_data"] or values["eval_fraction"])


def check_evaluation(values: dict[str, Any], recipe: str) -> None:
    """Check that flags about evaluations come with evaluations, and that those report ``--metric_for_best_model``.

    transformers would ignore such a flag, or refuse it only once the model is loaded. It would look the metric up after
    the first evaluation, perhaps hours later.
    """
    is_off, metric = values["eval_strategy"] == "no", values["metric_for_best_model"]
    if is_evaluated(values) and not is_off:
        reported = evaluation_metrics(recipe)
        if metric is not None and metric.removeprefix("eval_") not in reported:
            raise CommandError(f"--metric_for_best_model {metric} is unknown: choose one of {', '.join(reported)}")
        return
    for name in EVALUATION_FLAGS:
        is_unused = name == "eval_steps" and is_off  # a settings file that several runs share may hold it
        if values[name] not in (None, False, "no") and not is_unused:
            missing = "so --eval_data or --eval_fraction must be given"
            if is_evaluated(values):
                missing = "but --eval_strategy is no"
            raise CommandError(f"--{name} needs evaluations, {missing}")


def evaluation_metrics(loss: str) -> list[str]:
    """Return the names of the values that an evaluation with ``loss`` reports, without their prefix ``eval_``."""
    values = torch.ones(2)  # two sequences; only the names of their metrics count
    per_token = dict.fromkeys(("token_counts", "entropy", "mean_logits", "token_accuracy"), values)
    of_kto = {"desirable": values.bool(), "reference_point": values[0]} if loss == "kto" else {}
    names = METRICS.get(loss, LossMetrics)(values, values, values, **per_token, **of_kto).summary()
    return ["loss", *names, *((progress.ACCURACY, progress.AUC) if of_kto else ())]


def check_schedule(config: FusedPreferenceConfig) -> None:
    """Build the learning rate's schedule once, so that wrong ``--lr_scheduler_kwargs`` fail before the model loads."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    with user_errors(ValueError, TypeError, prefix=f"--lr_scheduler_kwargs {config.lr_scheduler_kwargs}: "):
        get_scheduler(config.lr_scheduler_type, optimizer, 0, 1, scheduler_specific_kwargs=config.lr_scheduler_kwargs)


def computes_in_bfloat16() -> bool:
    """Return whether there is a GPU that computes in bfloat16 itself. GPUs older than Ampere only emulate it."""
    is_emulated = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    return is_torch_bf16_gpu_available() and not is_emulated


# ---- the trainer --------------------------------------------------------------------------------------------------


def make_trainer(settings: TrainSettings, config: FusedPreferenceConfig) -> FusedTrainer:
    """Return the trainer, with its model and data loaded. The data are checked before the model is loaded."""
    backends.resolve(config.backend, config.device)
    recipe = next(name for name, kind in CONFIGS.items() if isinstance(config, kind))
    train_data, eval_data = training_data(settings.data, config.objective_weights), settings.eval_data
    if isinstance(train_data, dict) and settings.eval_fraction is not None:
        raise ValueError("eval_fraction has no meaning for files by objective: give the held-out records as eval_data")
    by_objective = train_data.values() if isinstance(train_data, dict) else [train_data]
    for files in (*by_objective, settings.eval_data):
        if files:
            # finds a bad record before a large model is loaded
            records = preference_data.load(files, TRAINERS[recipe].forms, config.reading)
            if settings.eval_fraction is not None:
                seed = config.seed if config.data_seed is None else config.data_seed
                train_data, eval_data = split_by_prompt(records, settings.eval_fraction, seed)
    set_seed(config.seed)  # for weights that the checkpoint lacks
    options = settings.dtype, config.trust_remote_code
    is_reward = recipe == "reward"
    tokenizer, model = load(settings.model, *options, scores=is_reward, in_4bit=settings.load_in_4bit)
    ref_model = load(settings.ref_model, *options, "ref_model")[1] if settings.ref_model else None
    return TRAINERS[recipe](
        model,
        ref_model,
        config,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        peft_config=lora(settings, is_reward) if settings.lora_rank else None,
        loss=settings.own_loss,
    )


def training_data(data: list[str], weights: dict[str, float] | None) -> list[str] | dict[str, list[str]]:
    """Return the files of ``--data``; with ``--objective_weights`` by the names that the files are given with.

    Raises:
        CommandError: a file has no name of an objective, or has one and there are no objectives.
    """
    named = [objective_and_file(text) for text in data]
    if weights is None:
        for text, (name, _) in zip(data, named, strict=True):
            if name is not None:
                raise CommandError(f"--data {text} names an objective: add --objective_weights, such as {name}=1")
        return data
    files: dict[str, list[str]] = {}
    for text, (name, path) in zip(data, named, strict=True):
        if name not in weights:
            raise CommandError(
                f"--data {text} must begin with the name of an objective of --objective_weights and =: expected one of "
                f"{', '.join(weights)}"
            )
        files.setdefault(name, []).append(path)
    if missing := [name for name in weights if name not in files]:
        raise CommandError(f"--objective_weights names {', '.join(missing)}, but no --data {missing[0]}=FILE is given")
    return files


def load(
    name: str,
    dtype: str,
    trust_remote_code: bool = False,
    flag: str = "model",
    *,
    scores: bool = False,
    in_4bit: bool = False,
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Return the tokenizer and the model of a folder or a Hub id; with ``scores`` a reward model.

    ``in_4bit`` quantises its linear layers to nf4 by bitsandbytes, but for the head.

    ``flag`` is the flag that named it, for errors.

    Raises:
        CommandError: it is no causal language model with a tokenizer, or it cannot be loaded.
    """
    if (Path(name) / "adapter_config.json").is_file():
        raise CommandError(
            f"--{flag} {name} is an adapter, not a model: merge it into its base model first (kto-fused merge "
            f"--model {name} --to NEW_FOLDER)"
        )
    if Path(name).is_dir() and (damage := model_files.damaged_file(name)):
        raise CommandError(f"--{flag} {name} cannot be loaded: {damage}")
    load_part = functools.partial(model_files.load_pretrained, name=name, trust_remote_code=trust_remote_code)
    try:
        load_part(AutoConfig)  # first, because its errors are the clearest
        options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "scores": scores}
        if in_4bit:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.bfloat16,
                llm_int8_skip_modules=["score"] if scores else None,  # None keeps the LM head out
            )
        tokenizer, model = load_part(AutoTokenizer), model_files.load_model(name, **options)
    except Exception as error:  # files that others wrote can fail in any way
        damage = model_files.damaged_file(name)  # a file that was downloaded just now may be damaged
        how = " with --load_in_4bit, by the package bitsandbytes" * (in_4bit and damage is None)
        raise CommandError(f"--{flag} {name} cannot be loaded{how}: {damage or sentence(error)}") from error
    return tokenizer, model


def lora(settings: TrainSettings, is_reward: bool = False) -> Any:
    """Return peft's ``LoraConfig`` for the settings; peft itself trains the score of a "SEQ_CLS" model whole."""
    if not is_peft_available():
        raise CommandError(f"--lora_rank needs the package peft: {INSTALL}")
    from peft import LoraConfig

    modules = settings.lora_target_modules or ["all-linear"]
    is_pattern = len(modules) == 1 and (modules[0] == "all-linear" or re.search(r"[^\w.-]", modules[0]))
    return LoraConfig(
        task_type="SEQ_CLS" if is_reward else "CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,
        target_modules=modules[0] if is_pattern else modules,
    )


# ---- training -----------------------------------------------------------------------------------------------------


def sampler_of(trainer: FusedTrainer, settings: Any) -> samples.Sampler | None:
    """Return what ``--sample_prompts`` asks for; None without it."""
    if not settings.sample_prompts:
        return None
    return samples.Sampler(
        trainer, settings.sample_prompts, settings.sample_max_new_tokens, settings.sample_temperature
    )


def fit(trainer: FusedTrainer, checkpoint: str | None = None, every: int = 1) -> dict[str, Any]:
    """Train, and print a line for every ``every``-th step that is logged. Returns the contents of ``metrics.json``.

    Raises:
        CommandError: the trainer refuses a setting, the checkpoint does not fit the model, or a worker was killed.
    """
    progress.print_lines(trainer, every)
    device, batch_size = trainer.args.device, trainer.args.train_batch_size * trainer.args.world_size
    if trainer.args.dataloader_drop_last and len(trainer.train_dataset) < batch_size:
        raise CommandError(
            f"--dataloader_drop_last leaves nothing to train on: {len(trainer.train_dataset)} examples are fewer than "
            f"a batch of {batch_size}"
        )
    backend = backends.resolve(trainer.args.backend, device)
    if trainer.is_world_process_zero():
        print(
            f"{len(trainer.train_dataset)} examples, {trainer.model.num_parameters():,} parameters "
            f"({trainer.get_num_trainable_parameters():,} trained), device {device}, backend {backend}, "
            f"mixed precision {trainer.accelerator.mixed_precision}"
        )
    resumed_at = 0
    if checkpoint is not None:  # which the run may remove
        resumed_at = TrainerState.load_from_json(str(Path(checkpoint) / checkpoints.STATE)).global_step
    with training_errors(trainer, checkpoint):
        timing = trainer.train(resume_from_checkpoint=checkpoint).metrics
    history = trainer.state.log_history
    return {
        "torch": torch.__version__,
        "device": str(device),
        "backend": backend,
        "data": trainer.data_counts,
        "memory": peak_memory(device),
        "seconds": timing["train_runtime"],
        "samples_per_second": timing["train_samples_per_second"],
        "resumed_at": resumed_at,
        "steps": [entry for entry in history if "loss" in entry],
        "evaluations": [entry for entry in history if "eval_loss" in entry],
    }


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the most memory that this process has held so far, in MiB."""
    if sys.platform == "win32":
        import psutil  # accelerate needs it too

        peak = psutil.Process().memory_info().peak_wset
    else:
        import resource  # Windows does not have it

        # Linux counts the resident set in KiB, macOS in bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)
    found = {"peak memory of the process": peak / 2**20}
    if device.type == "cuda":
        found["peak memory of the GPU"] = torch.cuda.max_memory_allocated(device) / 2**20
    return found


@contextmanager
def training_errors(trainer: FusedTrainer, checkpoint: str | None) -> Iterator[None]:
    """Raise a ``CommandError`` in place of the errors of ``trainer.train`` that the user can fix."""
    with user_errors(ValueError, ImportError, OSError):  # the trainer checks some settings only when it trains
        try:
            yield
        except KeyError as error:  # transformers raises it for a metric that no evaluation reports, and lists all
            if "metric_for_best_model" not in str(error):
                raise
            raise CommandError(sentence(error).strip('"')) from error
        except (RuntimeError, ValueError, OSError, EOFError) as error:
            if trainer.args.dataloader_num_workers and isinstance(error, (ConnectionError, EOFError)):
                raise CommandError(f"{sentence(error)}: {LOADER_ENDED}") from error
            if checkpoint is None or not str(error).startswith(MISFITS):
                raise
            reason = str(error).splitlines()[:2][-1]  # the first entry where the error is a list of mismatches
            raise CommandError(
                f"--resume_from_checkpoint {checkpoint} does not fit this model: resume with the --model and the LoRA "
                f"flags that it was trained with ({reason.strip().rstrip('.')})"
            ) from error
