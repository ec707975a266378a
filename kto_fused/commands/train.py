"""``kto-fused train``: a model, files of feedback or pairs, and every option of the trainers as a flag or in YAML."""

import errno
import functools
import json
import math
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import datasets
import huggingface_hub.constants
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    get_scheduler,
    set_seed,
)
from transformers.utils import is_peft_available, is_torch_bf16_gpu_available

from .. import preference_data
from ..engines import backends
from ..huggingface import files as model_files
from ..huggingface.files import load_pretrained
from ..trainers import FusedDPOTrainer, FusedKTOTrainer, FusedTrainer, checkpoints, holds_model_alone
from ..trainers.configs import FIXED, FusedDPOConfig, FusedKTOConfig, FusedPreferenceConfig
from .cli import INSTALL
from .errors import CommandError, check_names, sentence
from .flags import SETUP_ERRORS, FlagParser, build, read_yaml, refusals

CONFIGS = {"kto": FusedKTOConfig, "dpo": FusedDPOConfig}
TRAINERS = {"kto": FusedKTOTrainer, "dpo": FusedDPOTrainer}
DESCRIPTION = (
    "Train a model with KTO on feedback (prompt, completion, label) or with DPO on pairs (prompt, chosen, rejected). "
    "Into --output_dir go the model, its tokenizer, metrics.json and curves.png. Ctrl-C saves a checkpoint, from which "
    "--resume_from_checkpoint true goes on. The flags of --loss dpo are listed with it."
)
# flags that would change nothing here: those of but one value, and others of what the command does, of logits that no
# loss returns and of columns that are known; and a stop by SIGTERM, which would be taken for the end of the run
LEFT_OUT = (
    *FIXED,
    *("do_train", "do_eval", "do_predict", "local_rank", "parallelism_config", "enable_jit_checkpoint"),
    *("label_names", "prediction_loss_only", "batch_eval_metrics", "remove_unused_columns"),
    *("skip_memory_metrics", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
)
# what is printed of a log, and how it is called
REWARDS = {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "margin"}
PAIRS_ALONE = "rewards/accuracies"
LINE = {"loss": "loss", **REWARDS, PAIRS_ALONE: "accuracy", "kl": "z0"}
COLORS = {"rewards/chosen": "tab:green", "rewards/rejected": "tab:red", "rewards/margins": "tab:blue"}
# how errors begin where a checkpoint does not fit: its weights have other shapes, its adapter is of other layers, or it
# holds an adapter alone
UNFIT = ("Error(s) in loading state_dict", "loaded state dict", "Can't find a checkpoint index")
# what an evaluation finds
SIDES = [f"{kind}/{side}" for kind in ("rewards", "logits", "logps") for side in ("chosen", "rejected")]
EVALUATED = ["loss", *SIDES, "rewards/margins", "entropy"]
EVALUATED_ALONE = {"kto": ["kl"], "dpo": [PAIRS_ALONE, "mean_token_accuracy"]}
# of what a run leaves behind, and a model's folder holds
RESULTS = ("metrics.json", "adapter_config.json", "config.json")
# what asks for an evaluation, and with what nothing is asked for
OF_EVALUATION = {
    "eval_strategy": ("no", None),
    "eval_steps": (None,),
    "eval_delay": (0, None),
    "save_strategy": ("no", "steps", "epoch", None),
    "eval_on_start": (False,),
    "metric_for_best_model": (None,),
    "load_best_model_at_end": (False,),
}
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DRAFT = "results.part"  # the folder in which results are written before they move into the output folder
LOADER_ENDED = (
    "a process that loads batches was ended from outside, as the system does where memory is short: lower "
    "--dataloader_num_workers; --resume_from_checkpoint true goes on from a checkpoint"
)
INTERRUPTED = b"\nfinishing this step, then saving a checkpoint; Ctrl-C again stops at once\n"


@dataclass
class TrainSettings:
    """What the trainer's constructor takes."""

    _argument_group_name = "what is trained on what"

    model: str = field(metadata={"help": "the policy: a Hugging Face model's folder, or its id on the Hub"})
    data: list[str] = field(metadata={"help": ".jsonl, .json (a record a line) or .parquet files"})
    eval_data: list[str] | None = field(
        default=None,
        metadata={"help": "files to evaluate on; after each epoch, unless --eval_strategy or --eval_steps say"},
    )
    loss: Literal["kto", "dpo"] = field(default="kto", metadata={"help": "the loss; pairs are feedback for kto too"})
    ref_model: str | None = field(
        default=None, metadata={"help": "the reference, as --model; else the policy as it is before training"}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = field(
        default=None,
        metadata={
            "help": "dtype of the loaded weights; auto: the checkpoint's own. If not given, float32, because 16 bits "
            "lose small updates, but auto with --lora_rank"
        },
    )
    lora_rank: int = field(default=0, metadata={"help": "train a LoRA adapter of this rank; 0: train all weights"})
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA's scale; twice the rank if not given"})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "names of the layers to adapt, or one regular expression of whole names; all-linear, the default: "
            "all linear layers but the head"
        },
    )

    def __post_init__(self):
        if self.dtype is None:
            self.dtype = "auto" if self.lora_rank else "float32"
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be at least 0, got {self.lora_rank}")
        if self.lora_alpha is not None and self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be more than 0, got {self.lora_alpha}")
        for name in ("lora_alpha", "lora_target_modules"):
            if not self.lora_rank and getattr(self, name) is not None:
                raise ValueError(f"{name} is given, but lora_rank is 0: there is no adapter")


def main(arguments: list[str]) -> int:
    return run(*parse(arguments))


def run(settings: TrainSettings, config: FusedPreferenceConfig) -> int:
    """Train and write the results. Returns 130 if Ctrl-C ended the training, else 0. Raises ``CommandError``."""
    check_names(config.output_dir, settings.model, *settings.data)  # those of --config too
    check_writable(config.output_dir)
    try:
        with refusals(checkpoints.FolderInUseError, checkpoints.CheckpointError), checkpoints.only_run_in(config):
            return run_alone(settings, config)
    except RuntimeError as error:  # torch raises it in a signal's handler, hence anywhere
        if not str(error).startswith("DataLoader worker"):
            raise
        raise CommandError(f"{sentence(error)}: {LOADER_ENDED}") from error


def run_alone(settings: TrainSettings, config: FusedPreferenceConfig) -> int:
    checkpoint = checkpoints.agreed(config, lambda: starting_checkpoint(config))
    check_schedule(config)
    with setting_up():
        trainer = make_trainer(settings, config)
    with CtrlC() as ctrl_c:
        trainer.add_callback(ctrl_c)
        metrics = fit(trainer, checkpoint)
    if ctrl_c.checkpoint is not None:
        if trainer.is_world_process_zero():
            print(
                f"\nStopped after step {trainer.state.global_step} of {trainer.state.max_steps}, saved in "
                f"{ctrl_c.checkpoint}.\nTo go on: the same command with --resume_from_checkpoint true"
            )
        trainer.accelerator.end_training()
        return 130
    with refusals(Exception, doing=f"{config.output_dir} cannot be written{what_is_left(trainer)}: "):
        described = config.to_dict() | {"max_length": trainer.max_length}
        loaded = vars(settings) | {"dtype": str(trainer.model.dtype).removeprefix("torch.")}
        write_results(trainer, {"settings": loaded, "config": described, **metrics})
    if trainer.is_world_process_zero():
        print_summary(metrics)
        print(f"\nWrote the model, metrics.json and curves.png into {config.output_dir}")
    if config.push_to_hub:
        with refusals(Exception, doing=f"{config.output_dir} holds all results, but could not be uploaded: "):
            trainer.push_to_hub()
    trainer.accelerator.end_training()
    return 0


# ---- what to do ---------------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> tuple[TrainSettings, FusedPreferenceConfig]:
    """From flags and, where they say nothing, the file of ``--config``."""
    first_look = FlagParser([], "train", add_help=False)
    first_look.add_argument("--config", action="append", default=[])
    first_look.add_argument("--loss")
    first, _ = first_look.parse_known_args(arguments)
    if len(first.config) > 1:
        raise CommandError(f"--config is given {len(first.config)} times: expected one file")
    path = next(iter(first.config), None)
    file = read_yaml(path) if path else {}
    loss = str(first.loss or file.get("loss") or "kto")
    parser = flags_of(loss)
    values = parser.values([*parser.arguments_from(file, path), *arguments])
    for name in ("output_dir", "report_to"):  # None is no choice here: another folder, and an error
        if values[name] is None:
            values[name] = parser.get_default(name)
    check_evaluation(values, loss)
    if values["eval_strategy"] is None:
        strategy = "epoch" if values["eval_steps"] is None else "steps"
        values["eval_strategy"] = strategy if values["eval_data"] else "no"
    if values["bf16"] is None:
        values["bf16"] = not (values["fp16"] or values["use_cpu"]) and computes_in_bfloat16()
    return build(TrainSettings, values), build(CONFIGS[loss], values)


def check_evaluation(values: dict[str, Any], loss: str) -> None:
    """Raises ``CommandError`` where an evaluation is asked for that there is none of, or for what it does not find."""
    if not values["eval_data"]:
        for name, unasked in OF_EVALUATION.items():
            is_off = name == "eval_steps" and values["eval_strategy"] == "no"
            if values[name] not in unasked and not is_off:
                raise CommandError(f"--{name} needs --eval_data, files to evaluate on")
    metric, known = values["metric_for_best_model"], EVALUATED + EVALUATED_ALONE.get(loss, [])
    if metric is not None and metric.removeprefix("eval_") not in known:
        raise CommandError(f"--metric_for_best_model {metric} is not evaluated: expected one of {known}")
    if metric is not None and values["eval_strategy"] == "no":
        raise CommandError("--metric_for_best_model needs evaluations, but --eval_strategy is no")


def computes_in_bfloat16() -> bool:
    """Whether there is a GPU that does, and does not emulate it as those before Ampere do."""
    is_emulated = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    return is_torch_bf16_gpu_available() and not is_emulated


def flags_of(loss: str) -> FlagParser:
    elsewhere = {
        name: f"--loss {other}"
        for other, kind in CONFIGS.items()
        for name in {field.name for field in fields(kind)} - {field.name for field in fields(CONFIGS.get(loss, kind))}
    }
    parser = FlagParser(
        [TrainSettings, CONFIGS.get(loss, FusedKTOConfig)],
        "train",
        usage="%(prog)s --model MODEL --data FILE [FILE ...] [FLAGS]",  # all of them would be three pages
        description=DESCRIPTION,
        left_out=LEFT_OUT,
        elsewhere=elsewhere,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="settings under the flags' names; flags come before it")
    parser.set_defaults(output_dir=f"runs/{loss}", logging_first_step=True, save_total_limit=1)
    parser.set_defaults(bf16=None, eval_strategy=None)  # depend on other flags
    return parser


@contextmanager
def setting_up() -> Iterator[None]:
    """Errors of loading and preparing become a ``CommandError``; where a disk is full, it names the caches."""
    try:
        with refusals(*SETUP_ERRORS):
            yield
    except CommandError as error:
        if "HF_DATASETS_CACHE" in str(error) or not of_a_full_disk(error):
            raise
        raise CommandError(
            f"{error}: the disk is full. Prepared data is kept in {datasets.config.HF_DATASETS_CACHE} "
            f"(HF_DATASETS_CACHE), downloaded models in {huggingface_hub.constants.HF_HUB_CACHE} (HF_HUB_CACHE): free "
            "space there, or set these variables to folders on another disk"
        ) from error


def of_a_full_disk(error: BaseException | None) -> bool:
    """Whether the error or what caused it is one of a disk or a quota that is full. Libraries often pass on its text
    alone.
    """
    while error is not None:
        texts = (*map(os.strerror, FULL_DISK), "Not enough disk space")  # the last is of ``datasets``
        if getattr(error, "errno", None) in FULL_DISK or any(text in str(error) for text in texts):
            return True
        error = error.__cause__ or error.__context__
    return False


def check_writable(folder: str | Path) -> None:
    """Raises ``CommandError`` if a page cannot be written in ``folder``, or where it would be. Leaves no trace."""
    folder = Path(folder)
    with refusals(OSError, doing=f"{folder} cannot be written: "):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(4096))  # on a full disk an empty file can still be made


def starting_checkpoint(config: FusedPreferenceConfig) -> str | None:
    """The checkpoint to resume from. A folder that holds another run's is refused: nobody could tell them apart."""
    folder, wanted = config.output_dir, config.resume_from_checkpoint
    if wanted is not None and wanted.lower() == "false":
        wanted = None
    latest = next((str(found.folder) for found in checkpoints.found_in(folder)), None)
    if wanted is not None and wanted.lower() == "true":
        with refusals(checkpoints.CheckpointError, doing="--resume_from_checkpoint true: "):
            wanted = checkpoints.choose(True, folder, config.resume_anyway)
    elif wanted is not None and (Path(wanted) / checkpoints.STATE).is_file():
        with refusals(checkpoints.CheckpointError, doing="--resume_from_checkpoint: "):
            checkpoints.choose(wanted, folder, config.resume_anyway)
    if wanted is None or Path(wanted).resolve().parent != Path(folder).resolve():
        if latest is not None:
            raise CommandError(
                f"--output_dir {folder} holds {Path(latest).name} of another run: go on with it "
                "(--resume_from_checkpoint true), or name another folder"
            )
        held = next((name for name in RESULTS if (Path(folder) / name).exists()), None)
        if held is not None:
            raise CommandError(f"--output_dir {folder} holds {held} of another model or run: name another folder")
    if wanted is not None:
        check_goes_on(wanted, config)
    return wanted


def check_goes_on(checkpoint: str, config: FusedPreferenceConfig) -> None:
    """Raises ``CommandError`` if ``Trainer`` would go on from the checkpoint with another run than it belongs to."""
    named, path = f"--resume_from_checkpoint {checkpoint}", Path(checkpoint) / checkpoints.STATE
    if not path.is_file():
        raise CommandError(f"{named} is no checkpoint: it has no trainer_state.json")
    with refusals(OSError, ValueError, TypeError, doing=f"{path} cannot be read: "):
        state = TrainerState.load_from_json(str(path))
    is_dpo = next((PAIRS_ALONE in entry for entry in state.log_history if "loss" in entry), None)
    if is_dpo is not None and is_dpo != isinstance(config, FusedDPOConfig):
        raise CommandError(f"{named} is of a run with --loss {'dpo' if is_dpo else 'kto'}: go on with that")
    steps = state.global_step
    if 0 < config.max_steps < steps:
        raise CommandError(f"{named} has {steps} steps already, but --max_steps is {config.max_steps}")
    is_left = steps < config.max_steps if config.max_steps > 0 else (state.epoch or 0) < config.num_train_epochs
    if is_left and holds_model_alone(checkpoint):
        raise CommandError(
            f"{named} holds a model alone (--save_only_model), and training cannot go on without its optimizer and "
            f"schedule: start a run of its own from it (--model {checkpoint}, another --output_dir)"
        )


def check_schedule(config: FusedPreferenceConfig) -> None:
    """Raises ``CommandError`` where the learning rate's schedule does not take what ``--lr_scheduler_kwargs`` gives it,
    which the trainer would find after the model is loaded.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    with refusals(ValueError, TypeError, doing=f"--lr_scheduler_kwargs {config.lr_scheduler_kwargs}: "):
        get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=1,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,
        )


def make_trainer(settings: TrainSettings, config: FusedPreferenceConfig) -> FusedTrainer:
    backends.resolve(config.backend, config.device)
    for files in (settings.data, settings.eval_data):
        if files:
            preference_data.load(files)  # a bad record is found before a large model is loaded
    set_seed(config.seed)  # for weights that the checkpoint lacks
    options = settings.dtype, config.trust_remote_code
    tokenizer, model = load(settings.model, *options)
    ref_model = load(settings.ref_model, *options, "ref_model")[1] if settings.ref_model else None
    return TRAINERS[settings.loss](
        model,
        ref_model,
        config,
        train_dataset=settings.data,
        eval_dataset=settings.eval_data,
        processing_class=tokenizer,
        peft_config=lora(settings) if settings.lora_rank else None,
    )


def load(
    name: str, dtype: str, trust_remote_code: bool = False, flag: str = "model"
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Raises ``CommandError`` if the folder or id is not a causal language model with a tokenizer."""
    if (Path(name) / "adapter_config.json").is_file():
        raise CommandError(f"--{flag} {name} is an adapter: merge it into its model first (peft's merge_and_unload)")
    if Path(name).is_dir() and (damage := model_files.damaged_file(name)):
        raise CommandError(f"--{flag} {name} cannot be loaded: {damage}")
    load_one = functools.partial(load_pretrained, name=name, trust_remote_code=trust_remote_code)
    try:
        load_one(AutoConfig)  # its errors are the clearest
        return load_one(AutoTokenizer), model_files.load_model(name, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # files of others, which may fail in any way
        damage = model_files.damaged_file(name)  # of a download
        raise CommandError(f"--{flag} {name} cannot be loaded: {damage or sentence(error)}") from error


def lora(settings: TrainSettings) -> Any:
    if not is_peft_available():
        raise CommandError(f"--lora_rank needs peft: {INSTALL}")
    from peft import LoraConfig

    modules = settings.lora_target_modules or ["all-linear"]
    is_pattern = len(modules) == 1 and (modules[0] == "all-linear" or re.search(r"[^\w.-]", modules[0]))
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,
        target_modules=modules[0] if is_pattern else modules,
    )


# ---- training -----------------------------------------------------------------------------------------------------


def fit(trainer: FusedTrainer, checkpoint: str | None = None, every: int = 1) -> dict[str, Any]:
    """Train, with a line for every ``every``-th step that is logged. Returns what ``metrics.json`` holds of it."""
    show_bar_alone(trainer)
    trainer.add_callback(LogLines(every))
    device, batch_size = trainer.args.device, trainer.args.train_batch_size * trainer.args.world_size
    if trainer.args.dataloader_drop_last and len(trainer.train_dataset) < batch_size:
        raise CommandError(
            f"--dataloader_drop_last leaves nothing to train on: {len(trainer.train_dataset)} examples are less than a "
            f"batch of {batch_size}"
        )
    backend = backends.resolve(trainer.args.backend, device)
    if trainer.is_world_process_zero():
        print(
            f"{len(trainer.train_dataset)} examples, {trainer.model.num_parameters():,} parameters, "
            f"{trainer.get_num_trainable_parameters():,} of them trained, {device}, kernels: {backend}, "
            f"mixed precision: {trainer.accelerator.mixed_precision}"
        )
    with refusals(ValueError, ImportError, OSError):  # some of the trainer's settings are looked at only now
        try:
            timing = trainer.train(resume_from_checkpoint=checkpoint).metrics
        except KeyError as error:  # transformers' own: a metric of both labels, evaluated on one
            if "metric_for_best_model" not in str(error):
                raise
            raise CommandError(sentence(error).strip('"')) from error
        except (RuntimeError, ValueError, OSError, EOFError) as error:
            if trainer.args.dataloader_num_workers and isinstance(error, (ConnectionError, EOFError)):
                raise CommandError(f"{sentence(error)}: {LOADER_ENDED}") from error
            if checkpoint is None or not str(error).startswith(UNFIT):
                raise
            reason = str(error).splitlines()[:2][-1]  # of a list of mismatches the first
            raise CommandError(
                f"--resume_from_checkpoint {checkpoint} does not fit this model: go on with the --model and the LoRA "
                f"flags it was made with ({reason.strip().rstrip('.')})"
            ) from error
    history = trainer.state.log_history
    return {
        "torch": torch.__version__,
        "device": str(device),
        "backend": backend,
        "data": trainer.data_counts,
        "seconds": timing["train_runtime"],
        "samples_per_second": timing["train_samples_per_second"],
        "steps": [entry for entry in history if "loss" in entry],
        "evaluations": [entry for entry in history if "eval_loss" in entry],
    }


def show_bar_alone(trainer: FusedTrainer) -> None:
    """Logs are not printed as they come."""
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Bar())


class CtrlC(TrainerCallback):
    """While entered, a first Ctrl-C ends training after the step, with a checkpoint; a second one at once."""

    def __init__(self):
        self.is_pressed = False
        self._group: Any = None  # of all ranks, through their hosts: asking each other waits for no device
        self.checkpoint: Path | None = None  # set once training has been ended

    def __enter__(self) -> "CtrlC":
        self._previous = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.is_pressed:
            raise KeyboardInterrupt
        self.is_pressed = True
        with suppress(OSError):  # stderr may be lost
            os.write(2, INTERRUPTED)  # print() may be what was interrupted

    def on_step_end(
        self, args: FusedPreferenceConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step < state.max_steps and self._is_pressed_anywhere(args):
            self.checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
            args.save_only_model = False  # nothing could go on from that
            if args.save_total_limit == 1 and state.best_model_checkpoint is not None:  # this would be the one to go
                args.save_total_limit = 2

    def on_epoch_end(self, args, state, control: TrainerControl, **kwargs: Any) -> None:
        if self.checkpoint is not None:  # the epoch was cut short
            control.should_log = control.should_evaluate = control.should_save = False

    def _is_pressed_anywhere(self, args: FusedPreferenceConfig) -> bool:
        """On any rank: all of them must end after the same step."""
        if args.world_size == 1:
            return self.is_pressed
        if self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")
        is_pressed = torch.tensor(self.is_pressed, dtype=torch.int32)
        torch.distributed.all_reduce(is_pressed, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(is_pressed)


class Bar(ProgressCallback):
    """Without the logs."""

    def on_log(self, *_, **__) -> None:
        pass


class LogLines(TrainerCallback):
    """A line of numbers for each log; of training steps for every ``every``-th, the first and the last."""

    def __init__(self, every: int = 1):
        self.every = every
        self.names: list[str] = []  # of the columns, once the first line has been printed

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last step too

    def on_log(self, args, state: TrainerState, control, logs: dict[str, float], **kwargs: Any) -> None:
        prefix = "eval_" if "eval_loss" in logs else ""
        step = state.global_step
        is_due = prefix or step in (1, state.max_steps) or step % self.every == 0
        if not (state.is_world_process_zero and is_due and f"{prefix}loss" in logs):
            return
        if not self.names:
            other_losses = PAIRS_ALONE if isinstance(args, FusedKTOConfig) else "kl"
            self.names = [name for name in LINE if name != other_losses]  # some are missing from a batch of one class
            tqdm.write("  step " + " ".join(f"{LINE[name]:>10}" for name in self.names))
        values = (logs.get(prefix + name) for name in self.names)
        line = f"{step:6d} " + " ".join(f"{'-':>10}" if value is None else f"{value:10.4f}" for value in values)
        tqdm.write(f"{line}  evaluation" if prefix else line)


# ---- results ------------------------------------------------------------------------------------------------------


def print_summary(metrics: dict[str, Any]) -> None:
    steps, evaluations = metrics["steps"], metrics["evaluations"]
    columns = [("", entry) for entry in steps[:1] + steps[-1:]]  # none: a finished run that logged no step
    if evaluations:
        columns += [("eval_", evaluations[0]), ("eval_", evaluations[-1])]
    titles = [("eval, " if prefix else "") + f"step {entry['step']}" for prefix, entry in columns]
    print(f"\n{'':20}" + " ".join(f"{title:>15}" for title in titles))
    for name in (*LINE, "entropy"):
        values = [entry.get(prefix + name) for prefix, entry in columns]
        if any(value is not None for value in values):
            cells = (f"{'-':>15}" if value is None else f"{value:15.4f}" for value in values)
            print(f"{name:20}" + " ".join(cells))
    tokens = f"{steps[-1]['num_tokens']} tokens, " if steps else ""
    print(f"\n{tokens}{metrics['seconds']:.1f} s, {metrics['samples_per_second']:.1f} examples a second")
    for name, count in metrics["data"].items():
        reasons = ", ".join(f"{reason} {number}" for reason, number in count["dropped_for"].items())
        print(
            f"{name} data: {count['examples']} examples, {count['truncated']} with a completion cut at --max_length, "
            f"{count['dropped']} more dropped" + (f" ({reasons})" if reasons else "")
        )
        if count["found"]:
            found = ", ".join(f"{finding} {number}" for finding, number in count["found"].items())
            print(f"{name} data, examples that a warning was given of: {found}")


def plot(metrics: dict[str, Any], path: Path) -> None:
    """Loss and rewards over the steps; evaluations as dots."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, reward_axes = figure.subplots(1, 2)

    def draw(axes: Any, name: str, color: str, label: str | None = None) -> None:
        for entries, prefix, style in ((metrics["steps"], "", "-"), (metrics["evaluations"], "eval_", "o")):
            points = [(entry["step"], entry[prefix + name]) for entry in entries if prefix + name in entry]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=color, label=None if prefix else label)

    draw(loss_axes, "loss", "black")
    loss_axes.set(title="loss", xlabel="step")
    for name, color in COLORS.items():
        draw(reward_axes, name, color, REWARDS[name])
    reward_axes.set(title="rewards (nats x beta)", xlabel="step")
    if metrics["steps"]:
        reward_axes.legend()
    if metrics["evaluations"]:
        figure.supxlabel("dots: evaluation data", fontsize="small")
    figure.savefig(path, dpi=120, format="png")


def what_is_left(trainer: FusedTrainer) -> str:
    """Where the trained weights are if the results cannot be written."""
    checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    if not checkpoint.is_dir():
        return ""
    return f" (the trained model is in {checkpoint}: make room, then --resume_from_checkpoint true writes the results)"


def write_results(trainer: FusedTrainer, metrics: dict[str, Any]) -> None:
    """The model, its tokenizer, ``metrics.json`` and ``curves.png``, all or none. Called on all processes."""
    folder, everyone = Path(trainer.args.output_dir), trainer.accelerator.wait_for_everyone
    if not trainer.is_world_process_zero():
        everyone()
        trainer.save_model(str(folder / DRAFT), _internal_call=True)
        everyone()
        return
    with draft_of(folder) as draft:
        everyone()
        trainer.save_model(str(draft), _internal_call=True)  # an upload comes last: a failure there loses nothing
        everyone()
        write(draft, metrics)


def write(folder: str | Path, metrics: dict[str, Any]) -> None:
    """``metrics.json`` and ``curves.png``, both or neither."""
    with draft_of(Path(folder)) as draft:
        text = json.dumps(_finite(metrics), indent=1, default=str, allow_nan=False)
        (draft / "metrics.json").write_text(text + "\n", encoding="utf-8")
        plot(metrics, draft / "curves.png")


@contextmanager
def draft_of(folder: Path) -> Iterator[Path]:
    """A folder in ``folder``. What is written into it moves into ``folder`` at the end, and is removed on an error."""
    draft = folder / DRAFT
    shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
    draft.mkdir(parents=True)
    try:
        yield draft
        for path in sorted(draft.iterdir()):
            target = folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: _finite(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
