"""``transformers.Trainer`` for losses on log-probabilities, computed by the fused losses from the hidden states.

``FusedTrainer`` holds everything that is not specific to one loss: models, data, the reference's log-probabilities,
the batch's path to the loss, evaluation and logging. ``ResumableTrainer`` below it saves and resumes. A recipe (a
subclass in ``recipes``) says which columns its data have, which collator makes batches of them, which losses it trains,
and which tensors of a batch they get.

An optimizer step: for each batch, the reference's log-probabilities (from another model, other adapters, or disk), then
policy and loss in one fused call, then backward. KTO first estimates z0 from all batches of the step, over all ranks.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices
from transformers.trainer_utils import EvalLoopOutput

from .. import huggingface, log
from ..data.collators import PairedCollator, UnpairedCollator
from ..data.form import PREFERENCES, Forms
from ..data.records import Source
from ..data.tokens import Prepared
from ..functional import fused_linear_loss, fused_loss, linear_sequence_logps, sequence_logps
from ..heads.protocol import Head, as_loss, is_registered
from ..huggingface import inspect
from ..huggingface.padding import without_padding_mask
from ..metrics import LossMetrics, Totals
from . import adapters, fingerprints, losses, models, objectives, ranks
from .configs import FusedPreferenceConfig
from .reference import make_reference, precompute
from .resuming import ResumableTrainer

logger = logging.getLogger(__name__)


class Functions(NamedTuple):
    """One computation in the two forms that ``loss_from`` chooses between."""

    from_hidden: Callable
    from_logits: Callable


class Rewards(NamedTuple):
    """The rewards of an evaluation's sequences: [n] with labels [n], or [2, n] of chosen and rejected ones."""

    rewards: torch.Tensor
    desirable: torch.Tensor | None

    @classmethod
    def of(cls, metrics: LossMetrics) -> "Rewards":
        is_labelled = metrics.desirable is not None
        return cls(metrics.rewards if is_labelled else metrics.rewards.view(2, -1), metrics.desirable)

    @classmethod
    def joined(cls, parts: list["Rewards"]) -> "Rewards | None":
        """Return the parts as one, in float64 on the CPU; None without any."""
        if not parts:
            return None
        rewards = torch.cat([part.rewards for part in parts], -1).double().cpu()
        return cls(rewards, None if parts[0].desirable is None else torch.cat([part.desirable for part in parts]).cpu())


class FusedTrainer(ResumableTrainer):
    """The part of the trainers that all losses share. ``FusedKTOTrainer`` documents the arguments."""

    # ---- what a recipe says ----

    config_class: type[FusedPreferenceConfig]
    collator_class: type[UnpairedCollator | PairedCollator]
    forms: Forms = PREFERENCES  # of the records that it trains on
    takes_objectives = False  # whether its batches may hold several objectives, each with data of its own
    tensors: tuple[str, ...]  # those of a loss's tensors that the recipe has, by the names in ``losses`` of the loss
    columns: tuple[str, ...]  # of a prepared dataset
    optional_columns: tuple[str, ...]  # further ones: masks where answers have several messages, weights
    ref_columns: tuple[str, ...]  # further ones, of a dataset with precomputed reference log-probabilities

    def _tokenize(self, source: Source, args: FusedPreferenceConfig, name: str) -> Prepared:
        """Return the records of ``source`` as a dataset with ``columns``."""
        raise NotImplementedError

    @classmethod
    def _check_loss(cls, loss: losses.AnyLoss, args: FusedPreferenceConfig) -> None:
        """Refuse a loss that the recipe's batches do not fit, by name. A recipe adds what it asks of a loss."""
        name = losses.describe(loss)
        if missing := [tensor for tensor in losses.required(loss) if tensor not in cls.tensors]:
            raise ValueError(
                f"{name} needs the tensors {missing}, and {cls.__name__} has none of these names: it has "
                f"{list(cls.tensors)}"
            )
        parts = args.world_size * args.gradient_accumulation_steps
        if getattr(loss, "group", None) is None and parts > 1:
            raise ValueError(
                f"{name} reads the whole batch, which would lie in {parts} parts: {args.world_size} processes, "
                f"gradient_accumulation_steps={args.gradient_accumulation_steps}; train it in one process without "
                "accumulation, or say that it reads less (a class's group = 1 or 2)"
            )

    def _loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], reduction: str = "mean"
    ) -> tuple[torch.Tensor, LossMetrics]:
        """Return a batch's mean loss, or with ``reduction="none"`` each sequence's (pair's), and its metrics."""
        raise NotImplementedError

    def _ref_logps_of(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the values of ``ref_columns`` for a batch, [b] each."""
        raise NotImplementedError

    # ---- setting up ----

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: str | PreTrainedModel | None = None,
        args: FusedPreferenceConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        loss: losses.AnyLoss | str | None = None,
    ):
        log.show()
        args = self.config_class("trainer_output") if args is None else args
        if not isinstance(args, self.config_class):
            raise TypeError(f"args must be a {self.config_class.__name__}, got {type(args).__name__}")
        self.loss = args.make_loss() if loss is None else self._given_loss(loss)
        if loss is not None:
            args = args.with_loss(self.loss)
        self.args = args  # ``Trainer`` sets it too, but only after the data are prepared
        self._check_arguments(args, model, ref_model)
        self._check_loss(self.loss, args)
        if eval_dataset is not None:
            self._check_evaluation(args)
        self._objectives: dict[str, int] = {}  # number of examples by objective, if there are several
        self._check_objectives(args, train_dataset)
        self._tokenizer = models.tokenizer_of(model, processing_class, args.trust_remote_code)
        self.model_path = model if isinstance(model, str) else None
        self.path_dtype = torch.float32 if peft_config is None else "auto"  # of weights loaded from a path
        model, ref_model = (self._load_model(each, args) for each in (model, ref_model))
        inspect.keep_4bit_layers_differentiable(model)
        self.max_length = models.max_length(args.max_length, args.pad_to_multiple_of, model=model, ref_model=ref_model)
        self._embedded_tokens = {
            "model": models.embedded_tokens(model),
            "ref_model": models.embedded_tokens(ref_model),
        }
        pad_token_id = self._pad_token_id(model)
        self._check_embedded(pad_token_id, "processing_class pads with")
        model = models.with_adapters(model, peft_config, args.seed)
        models.check_policy(
            model,
            ref_model,
            args,
            optimizers[0],
            is_trained=train_dataset is not None,
            needs_reference=self.needs_reference,
        )
        self._check_policy(model, is_trained=train_dataset is not None)
        if models.has_adapters(model):
            adapters.drop_copies(model)
            if args.gradient_checkpointing:
                model.enable_input_require_grads()
        if args.disable_dropout:
            models.disable_dropout(model)
        models.warn_of_lost_updates(model, args.learning_rate)
        # of each dataset: examples, prompts, truncated, dropped, and by reason the examples dropped and those warned of
        self.data_counts: dict[str, dict[str, int | dict[str, int]]] = {}
        self.facts = {}
        prepared: list[Any] = []

        def prepare() -> list:
            with args.main_process_first(desc="preparing the data"):  # the others find the result in the cache
                prepared.append(self._prepare_data(train_dataset, args, "train"))
                prepared.append(self._prepare_data(eval_dataset, args, "eval"))
            return []

        ranks.shared(args, prepare)
        train_dataset, eval_dataset = prepared
        super().__init__(
            model=model,
            args=args,
            data_collator=self.collator_class(pad_token_id, args.pad_to_multiple_of),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self._tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # compute_loss itself scales losses for accumulation
        if self.is_deepspeed_enabled:
            self._set_up_deepspeed()
        self._train_totals, self._eval_totals = Totals(), Totals()
        self._num_tokens = torch.zeros((), dtype=torch.int64, device=args.device)
        with models.keeping_random_state():
            models.check_logits(self.model, args.loss_from)
            if train_dataset is not None:
                models.freeze_unreached(self.model, args, is_ddp=self._is_ddp)
            self._reference = make_reference(self, ref_model)
            if args.should_log:
                self._say_how_the_loss_is_computed()
            if self.needs_reference and args.should_log:
                self._say_what_the_reference_is()
            if args.precompute_ref_log_probs:
                precompute(self, self._reference)

    def _load_model(self, model: Any, args: FusedPreferenceConfig) -> Any:
        """Return the model of a path or an id. Anything but a string is returned as it is."""
        return models.load(model, self.path_dtype, args.trust_remote_code)

    def _pad_token_id(self, model: nn.Module) -> int:
        """Return the token id that batches are padded with."""
        return models.pad_token_id(self._tokenizer)

    def _check_policy(self, model: nn.Module, *, is_trained: bool) -> None:
        """Refuse a policy, with its adapters, that the recipe cannot train."""

    @staticmethod
    def _given_loss(loss: Any) -> losses.AnyLoss:
        """Return the loss of the argument ``loss``: a head, a function, or a registered loss by its name."""
        if isinstance(loss, Head):
            return loss
        found = as_loss(loss)
        if not isinstance(found, Head):
            losses.try_function(found)
        return found

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the reference's log-probabilities."""
        return losses.needs_reference(self.loss)

    def _say_what_the_reference_is(self) -> None:
        before = " Its log-probabilities are computed before training." * self.args.precompute_ref_log_probs
        logger.info(f"The reference is {self._reference.description}.{before}")

    def _say_how_the_loss_is_computed(self) -> None:
        """Log what a loss does not say by itself: 4 GEMMs, and a mean over the tokens of single batches."""
        if not isinstance(self.loss, Head) or not is_registered(self.loss):
            logger.info(
                f"The loss {losses.describe(self.loss)} is not registered: it takes 4 GEMMs where a registered class "
                "takes 3 (heads.register)."
            )
        in_parts = self.args.world_size * self.args.gradient_accumulation_steps > 1
        if in_parts and losses.depends_on_batch_tokens(self.loss):
            logger.info(
                f"The loss {losses.describe(self.loss)} divides by the tokens of one device's batch: of accumulated "
                "batches and processes it is the mean over these batches, weighted by their examples."
            )

    def _check_arguments(self, args: Any, model: Any, ref_model: Any) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, and nn.DataParallel is not supported: start a process "
                "per GPU (torchrun, accelerate launch), or show one GPU (CUDA_VISIBLE_DEVICES)"
            )
        if ref_model is not None and not self.needs_reference:
            raise ValueError(
                f"ref_model is given, but loss_type={args.loss_type!r} has no reference: leave ref_model out"
            )
        args.check_reference(self.needs_reference)
        if ref_model is model and not isinstance(model, str):
            raise ValueError("ref_model is the model itself: leave it out, and a copy is made")

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference model; None where the policy's adapters are the reference, or there is none (any more)."""
        return self._reference.model

    @property
    def _is_ddp(self) -> bool:
        return self.args.world_size > 1 and not self.is_fsdp_enabled and not self.is_deepspeed_enabled

    def _set_up_deepspeed(self) -> None:
        started = torch.distributed.get_world_size() if torch.distributed.is_initialized() else None
        if started != self.args.world_size:
            raise ValueError(
                f"DeepSpeed needs processes that Trainer counts too; it counts {self.args.world_size}, and "
                f"{started or 'none'} were started: use torchrun or accelerate launch, and use_cpu=True on CPUs"
            )
        # without this entry DeepSpeed clips at a norm of its own choice
        self.deepspeed_config().config.setdefault("gradient_clipping", self.args.max_grad_norm)

    def deepspeed_config(self) -> Any:
        """Return the configuration of DeepSpeed as transformers holds it."""
        return self.accelerator.state.deepspeed_plugin.hf_ds_config

    # ---- data ----

    def _prepare_data(self, source: Any, args: FusedPreferenceConfig, name: str) -> Any:
        """Return ``source`` tokenized, None for None, and for evaluation a dict of datasets for a dict of sources."""
        if source is None:
            return None
        if args.objective_weights is not None and name == "train":
            parts = {key: self._prepare_data(source[key], args, f"train_{key}") for key in args.objective_weights}
            self._objectives = {key: len(part) for key, part in parts.items()}
            return objectives.joined(parts, args.objective_weights)
        if isinstance(source, dict) and name != "train":
            return {key: self._prepare_data(value, args, f"{name}_{key}") for key, value in source.items()}
        prepared = self._checked_tokens(source, args, name)
        self.data_counts[name] = {
            "examples": len(prepared.dataset),
            "prompts": prepared.prompts,
            "truncated": prepared.truncated,
            "dropped": prepared.dropped,
            "dropped_for": prepared.dropped_for,
            "found": prepared.found,
        }
        return self._arranged(prepared.dataset, args, name)

    def _arranged(self, dataset: Dataset, args: FusedPreferenceConfig, name: str) -> Dataset:
        """Return the prepared examples as the rows of batches."""
        return dataset

    def _checked_tokens(self, source: Any, args: FusedPreferenceConfig, name: str) -> Prepared:
        prepared = self._tokenize(source, args, name)
        self._check_embedded(_largest_token_id(prepared.dataset), f"{name} data: the tokenizer gives")
        return prepared

    def _check_embedded(self, token_id: int, where: str) -> None:
        """Refuse a token that a model has no embedding of. On a GPU the failing index would not be named."""
        for name, count in self._embedded_tokens.items():
            if count is not None and token_id >= count:
                raise ValueError(
                    f"{where} token id {token_id}, but {name} has embeddings of {count} tokens: resize them "
                    f"({name}.resize_token_embeddings(len(processing_class))), or pass a processing_class whose tokens "
                    f"{name} has, padding too (pad_token = eos_token)"
                )

    def _check_evaluation(self, args: FusedPreferenceConfig) -> None:
        """Refuse to evaluate a batch's one loss where accelerate may fill the batch with examples that it repeats."""
        if args.world_size > 1 and losses.is_of_batch(self.loss):
            raise ValueError(
                f"{losses.describe(self.loss)} has one loss for a whole batch, and in {args.world_size} processes the "
                "last batch may hold examples twice: evaluate in one process, without eval_dataset here"
            )

    def _check_objectives(self, args: FusedPreferenceConfig, source: Any) -> None:
        """Refuse objectives that this recipe, its loss or its data do not have."""
        if args.objective_weights is None:
            if type(source) is dict:
                raise ValueError(
                    f"train_dataset is a dict of {list(source)}: expected one of them, or objective_weights for "
                    "several objectives at once"
                )
            return
        if not self.takes_objectives:
            raise ValueError(f"objective_weights has no meaning for {type(self).__name__}")
        objectives.check(args, self.loss)
        if source is None:
            return
        found = list(source) if isinstance(source, dict) else type(source).__name__
        if not isinstance(source, dict) or {*found} != {*args.objective_weights}:
            raise ValueError(
                f"train_dataset must be a dict of data by the names of objective_weights, "
                f"{list(args.objective_weights)}, got {found}"
            )

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*self.columns, *self.optional_columns, *self.ref_columns]

    def _get_train_sampler(self, train_dataset: Dataset) -> torch.utils.data.Sampler | None:
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        if self._objectives:
            return objectives.ObjectiveBatches(
                train_dataset,
                [*self._objectives.values()],
                self._train_batch_size,
                args.train_sampling_strategy,
                seed,
                self._epoch,
                args.world_size,
            )
        if args.train_sampling_strategy == "group_by_length":
            return _LengthGroupedEpochs(self, train_dataset["length"], seed)
        sampler = super()._get_train_sampler(train_dataset)
        if args.train_sampling_strategy == "batch_rebalance":  # ``Trainer`` leaves this sampler its own seed
            sampler.seed = seed
        return sampler

    def _epoch(self) -> int:
        """Return the number of epochs that are done."""
        return int((self.state.epoch or 0) + 1e-6)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Any:
        sampler = super()._get_eval_sampler(eval_dataset)
        # drawn once: persistent workers would draw another order, and with it another z0, at each evaluation
        return list(sampler) if isinstance(sampler, LengthGroupedSampler) else sampler

    # ---- a batch's log-probabilities and loss ----

    logps_functions = Functions(linear_sequence_logps, sequence_logps)
    loss_functions = Functions(fused_linear_loss, fused_loss)

    def _apply_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], **arguments: Any
    ) -> tuple[torch.Tensor, LossMetrics]:
        """Return the loss of a batch and its metrics.

        Args:
            model, inputs: as in ``_apply``.
            arguments: ``ref_logps``, the loss's tensors by their names, and ``reduction``.
        """
        return self._apply(self.loss_functions, model, inputs, head=self.loss, **arguments)

    def _count_objectives(
        self, metrics: LossMetrics, objective: torch.Tensor | None, **tensors: torch.Tensor | None
    ) -> None:
        """Add a training batch's losses and rewards to the sums that are logged by objective, unweighted.

        Args:
            metrics: of the batch, with its log-probabilities, from which the losses are found again.
            objective: [b] the examples' objectives, by number; None: there is one objective.
            tensors: the loss's tensors, without weights.
        """
        if objective is not None and self.model.training:
            self._train_totals.add(objectives.totals(self.loss, metrics, objective, [*self._objectives], tensors))

    def _apply(
        self,
        functions: Functions,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prefix: str = "",
        **arguments: Any,
    ) -> Any:
        """Run the model on a batch and return the result of the function that ``loss_from`` chooses.

        Args:
            functions: the two forms of the computation.
            model: the policy or the reference.
            inputs: the batch; ``prefix`` chooses its ids, mask and labels: "kl_" the mismatched pairs'.
            arguments: what the function takes beside labels and the engine's options.
        """
        args = self.args
        model_inputs = {name: inputs[prefix + name] for name in ("input_ids", "attention_mask")}
        if "position_ids" in inputs:  # packed sequences, which the positions alone tell apart
            model_inputs = {name: inputs[name] for name in ("input_ids", "position_ids")}
            arguments["cu_seqlens"] = inputs["cu_seqlens"]
        arguments |= {
            "labels": inputs[prefix + "labels"],
            "backend": args.backend,
        }
        if args.loss_from == "logits":
            in_place = torch.is_grad_enabled()  # without a backward the logits may share memory with another tensor
            return huggingface.apply_to_logits(
                functions.from_logits, model, model_inputs, inplace_backward=in_place, **arguments
            )
        if "attention_mask" in model_inputs:
            model_inputs = without_padding_mask(model, model_inputs, self.accelerator.mixed_precision)
        return huggingface.apply(functions.from_hidden, model, model_inputs, chunk_bytes=args.chunk_bytes, **arguments)

    def _logps(self, model: nn.Module, inputs: dict[str, torch.Tensor], prefix: str = "") -> torch.Tensor:
        """Return a batch's sequence log-probabilities [B], without a gradient; of ``prefix`` as in ``_apply``."""
        with torch.no_grad():
            options = {"average_log_prob": self.args.average_log_prob, "token_weights": self._token_weights(inputs)}
            return self._apply(self.logps_functions, model, inputs, prefix, **options)

    def _token_weights(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """Return the factors of the tokens' log-probabilities in a sequence's sum, shaped as the labels; None: 1."""
        return None

    def _logps_depend_on(self) -> str:
        """Return a text that differs where the options give other log-probabilities of the same tokens."""
        return str(self.args.average_log_prob)

    def _ref_logps(self, model: nn.Module, inputs: dict[str, torch.Tensor], prefix: str = "") -> torch.Tensor:
        """Return the reference's log-probabilities [B], from the batch where they were precomputed."""
        precomputed = inputs.get(f"ref_{prefix}logps")
        if precomputed is not None:
            return precomputed
        with self._reference.active(model) as reference:
            return self._logps(reference, inputs, prefix)

    # ---- training steps ----

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Train with sums that start at zero: ``auto_find_batch_size`` starts this loop again, as does a new train."""
        self._train_totals, self._num_tokens = Totals(), torch.zeros_like(self._num_tokens)
        return super()._inner_training_loop(*args, **kwargs)

    def _prepare_input(self, data: Any) -> Any:
        """Move to the device. Under DeepSpeed ``Trainer`` would also round log-probabilities to the model's dtype."""
        return data.to(self.args.device) if isinstance(data, torch.Tensor) else super()._prepare_input(data)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """Count what an optimizer step's mean loss divides by, over all ranks. None: the one batch's mean serves.

        At least 1, so that a step without a token to train has a loss of 0.
        """
        if self.args.world_size == 1 and len(batch_samples) == 1:
            return None
        count = sum(self._num_items(batch) for batch in batch_samples)
        if self.args.world_size > 1:
            count = self.accelerator.gather(torch.as_tensor(count, device=device)).sum()
        return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)

    def _num_items(self, batch: dict[str, torch.Tensor]) -> int | torch.Tensor:
        """Return the number by which a batch's mean loss divides: its sequences, or pairs."""
        return len(batch["input_ids"])

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, LossMetrics]:
        """Return a batch's mean loss, with its ``LossMetrics`` where ``return_outputs`` asks for them.

        With ``num_items_in_batch``, the sequences of the optimizer step, it is the batch's share of the step's mean.
        So accumulated batches and ranks, including smaller last ones, add up to the gradient of one large batch.
        """
        loss, metrics = self._loss(model, inputs)
        items = self._num_items(inputs)
        if self.model.training:
            self._train_totals.add(metrics.totals() | {"loss": self._total(loss, items)})
            self._train_totals.add_labelled(metrics)
            self._num_tokens += inputs["attention_mask"].sum()
        if num_items_in_batch is not None:
            share = items * self.accelerator.num_processes / num_items_in_batch
            if not (isinstance(share, float) and share == 1):
                loss = loss * share
        return (loss, metrics) if return_outputs else loss

    def _total(self, losses: torch.Tensor, weights: int | torch.Tensor = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted sum of the losses and the sum of their weights; one number is the weight of each."""
        losses = losses.detach().double()
        weights = torch.ones_like(losses) * weights
        if self.args.logging_nan_inf_filter:
            is_finite = losses.isfinite()
            losses, weights = losses.where(is_finite, 0.0), weights.where(is_finite, 0.0)
        return (losses * weights).sum(), weights.sum()

    # ---- logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the metrics since the last log over all ranks, under TRL's names.

        ``loss`` is the mean over these steps' sequences (pairs). The summary at the end of training holds the metrics
        of the steps after the last log, if there are any. This is the only place that waits for the metrics.
        """
        is_summary_of_rest = "train_loss" in logs and self._train_totals.values
        if "loss" in logs or is_summary_of_rest:
            means = self._train_totals.pop(self.accelerator.reduce, self._joined)
            if is_summary_of_rest:
                means.pop("loss", None)  # the summary has train_loss, the mean of the whole run
            logs |= means
            logs["num_tokens"] = int(self.accelerator.reduce(self._num_tokens).item())
        super().log(logs, start_time)

    def _joined(self, labelled: torch.Tensor) -> torch.Tensor:
        """Return the labelled rewards [2, n] of all ranks, which may hold different numbers of them."""
        if self.args.world_size == 1:
            return labelled
        rows = self.accelerator.pad_across_processes(labelled.T.contiguous(), pad_index=torch.nan)
        rows = self.accelerator.gather(rows)
        return rows[~rows[:, 1].isnan()].T

    # ---- evaluation ----

    evaluated: Rewards | None = None  # of the last evaluation, of all ranks; None for losses without rewards

    def _evaluate(self, trial: Any, ignore_keys: list[str] | None, skip_scheduler: bool = False) -> dict[str, float]:
        """Evaluate. A resumed run has done the evaluation of ``eval_on_start``, the one that skips the scheduler."""
        if skip_scheduler and self.state.global_step > 0:
            return {}
        return super()._evaluate(trial, ignore_keys, skip_scheduler)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return ``Trainer``'s loader; a dataset that is not prepared yet is tokenized first."""
        is_name = isinstance(self.eval_dataset, dict) and isinstance(eval_dataset, str)
        if eval_dataset is None or eval_dataset is self.eval_dataset or (is_name and eval_dataset in self.eval_dataset):
            return super().get_eval_dataloader(eval_dataset)
        new = self._prepare_new(eval_dataset)
        # ``Trainer`` keeps the loaders of persistent workers by name, and would take an unnamed dataset for "eval"
        kept = getattr(self, "_eval_dataloaders", {})
        self._eval_dataloaders = {}
        loader = super().get_eval_dataloader(new)
        self._eval_dataloaders = kept
        return loader

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return ``Trainer``'s loader; a dataset that is not prepared yet is tokenized first."""
        return super().get_test_dataloader(self._prepare_new(test_dataset))

    def _prepare_new(self, source: Any) -> Dataset:
        """Return a dataset for evaluation that the constructor did not get, with reference columns of this run only.

        Raises:
            ValueError: the reference model is gone, because its log-probabilities were precomputed.
        """
        is_prepared = isinstance(source, Dataset) and set(self.columns) <= set(source.column_names)
        if is_prepared:
            dataset = source
        else:
            with models.keeping_random_state():
                dataset = self._checked_tokens(source, self.args, "eval").dataset
        if not self.args.precompute_ref_log_probs:  # then these columns are another trainer's, of another reference
            return dataset.remove_columns([name for name in self.ref_columns if name in dataset.column_names])
        is_scored = set(self.ref_columns) <= set(dataset.column_names)
        if self._reference.is_gone and not is_scored:
            raise ValueError(
                "eval_dataset is new, and with precompute_ref_log_probs there is no reference model left to score it: "
                "pass it to the trainer's constructor"
            )
        return dataset

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate with the loss's metrics. Training draws the same random numbers with evaluations and without."""
        with models.keeping_random_state():
            return self._evaluation_loop(*args, **kwargs)

    def _evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._eval_totals, self._eval_rewards, is_first_use = Totals(), [], not self.accelerator._models
        deepspeed_config = self.deepspeed_config().config if self.is_deepspeed_enabled else {}
        config_of_training = copy.deepcopy(deepspeed_config)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if is_first_use:  # the model was prepared for evaluation; left so, it would be trained without DDP
            self.accelerator._models.clear()
            self.model_wrapped, self.model._is_accelerate_prepared = self.model, False
            original = self.model.__dict__.pop("_original_forward", None)
            if original is not None:  # autocast wraps it, and would wrap it again at each evaluation
                self.model.forward = original
            deepspeed_config.clear()  # evaluation removed the optimizer and other entries of training
            deepspeed_config.update(config_of_training)
        self.evaluated = Rewards.joined(self._eval_rewards)
        means = self._eval_totals.pop()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Return a batch's mean loss, without logits and labels: there are no logits."""
        inputs, gather = self._prepare_inputs(inputs), self.accelerator.gather_for_metrics
        with torch.no_grad(), self.compute_loss_context_manager():
            values, metrics = self._losses(model, inputs)
        # gathered per sequence, because accelerate may fill the last batch with sequences that it repeats
        metrics, values = metrics.gathered(gather), gather(values)
        self._eval_totals.add(metrics.totals() | {"loss": self._total(values, self._loss_weights(metrics))})
        self._eval_totals.add_labelled(metrics)
        if metrics.desirable is not None or metrics.is_paired:
            self._eval_rewards.append(Rewards.of(metrics))
        return values.mean(), None, None

    def _loss_weights(self, metrics: LossMetrics) -> int | torch.Tensor:
        """Return the weights [b] of ``_losses`` in the mean over the dataset; 1: equal ones."""
        return 1

    def _losses(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, LossMetrics]:
        """Return the loss of each sequence (pair) of a batch, [b], and the metrics.

        A loss that has one value for the whole batch gives each the batch's mean, in one process alone.
        """
        if not losses.is_of_batch(self.loss):
            return self._loss(model, inputs, reduction="none")
        self._check_evaluation(self.args)
        loss, metrics = self._loss(model, inputs)
        return loss.expand(self._num_items(inputs)), metrics


class _LengthGroupedEpochs(LengthGroupedSampler):
    """Batches of similar length, in another order each epoch, drawn from the seed and the epoch alone.

    So the order is the same after resuming, and whether one process or several share a global batch.
    """

    def __init__(self, trainer: Trainer, lengths: list[int], seed: int):
        self.trainer, self.seed = trainer, seed
        super().__init__(trainer.get_total_train_batch_size(trainer.args), lengths=list(lengths))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.trainer._epoch())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


def _largest_token_id(dataset: Dataset) -> int:
    columns = [name for name in dataset.column_names if name.endswith("_ids")]
    largest = 0
    for rows in dataset.select_columns(columns).with_format("arrow").iter(fingerprints.ROWS_AT_A_TIME):
        found = (pc.max(pc.list_flatten(rows[column])).as_py() for column in columns)
        largest = max(largest, *(0 if token_id is None else token_id for token_id in found))  # a prompt may be empty
    return largest
