"""``transformers.Trainer`` for KTO and DPO: the model's hidden states go to the fused loss, and logits never exist.

An optimizer step: [KTO: mismatched pairs of all its batches -> z0 over all ranks] -> per batch: reference
log-probabilities (another model, other adapters or none, from disk) -> policy and loss in one fused call -> backward.
"""

import copy
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from .. import huggingface, log, preference_data
from ..functional import (
    linear_sequence_logps,
    sequence_logps,
)
from ..huggingface.files import load_pretrained
from ..huggingface.inspect import check_is_causal, check_is_decoder, head_layers
from ..huggingface.padding import without_padding_mask
from ..huggingface.running import checked_logits, evaluating, is_reproduced, keeping_trainable
from ..huggingface.unreached import parts_of, unreached_by_text
from ..metrics import LossMetrics, Totals
from ..preference_data import PairedCollator, Prepared, UnpairedCollator
from . import adapters, checkpoints, fingerprints, reference_cache
from .configs import BASE, FusedPreferenceConfig
from .models import (
    check_adapters_alone_are_trained,
    check_adds_nothing_to_the_loss,
    check_base_is_reference,
    check_can_be_copied,
    check_optimizer,
    check_shares_no_trained_weight,
    disable_dropout,
    embedded_tokens,
    is_partitioned,
    keeping_random_state,
    load,
    max_length,
    pad_token_id,
    warn_of_lost_updates,
    with_adapter,
)

logger = logging.getLogger(__name__)


class FusedTrainer(Trainer):
    """What the KTO and the DPO trainer share: models, data, reference log-probabilities, logging, resuming."""

    config_class: type[FusedPreferenceConfig]
    collator_class: type[UnpairedCollator | PairedCollator]
    loss_functions: tuple[Callable, Callable]  # from hidden states, from logits
    logps_functions: tuple[Callable, Callable] = (linear_sequence_logps, sequence_logps)
    columns: tuple[str, ...]  # of a prepared dataset
    mask_columns: tuple[str, ...]  # of one whose answers have several messages
    ref_columns: tuple[str, ...]  # those added when the reference is precomputed
    _reference_hash: str | None = None  # of a reference that is gone once it is precomputed

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
    ):
        log.show()
        args = self.config_class("trainer_output") if args is None else args
        if not isinstance(args, self.config_class):
            raise TypeError(f"args must be a {self.config_class.__name__}, got {type(args).__name__}")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, and nn.DataParallel is not supported: start a process "
                "per GPU (torchrun, accelerate launch), or show one GPU (CUDA_VISIBLE_DEVICES)"
            )
        if ref_model is not None and not args.needs_reference:
            raise ValueError(f"ref_model is given, but loss_type={args.loss_type!r} has no reference")
        if ref_model is model and not isinstance(model, str):
            raise ValueError("ref_model is the model itself: leave it out, and a copy is made")
        if processing_class is None:
            name = model if isinstance(model, str) else huggingface.unwrap(model).config._name_or_path
            if not name:
                raise ValueError(
                    "processing_class is missing, and model was made in memory, with no path to load a tokenizer "
                    "from: pass the tokenizer"
                )
            processing_class = load_pretrained(AutoTokenizer, name, trust_remote_code=args.trust_remote_code)
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise TypeError(f"processing_class must be a transformers tokenizer, got {type(processing_class).__name__}")
        self._tokenizer = processing_class
        self._model_path = model if isinstance(model, str) else None
        self._path_dtype = torch.float32 if peft_config is None else "auto"  # of weights loaded from a path
        model, ref_model = (load(each, self._path_dtype, args.trust_remote_code) for each in (model, ref_model))
        self.max_length = max_length(args.max_length, args.pad_to_multiple_of, model=model, ref_model=ref_model)
        self._embedded_tokens = {"model": embedded_tokens(model), "ref_model": embedded_tokens(ref_model)}
        self._check_embedded(pad_token_id(processing_class), "processing_class pads with")
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                "model carries adapters without being a PeftModel, so its reference cannot be told from it: wrap it "
                "with peft (get_peft_model, PeftModel.from_pretrained) instead of add_adapter or load_adapter"
            )
        if peft_config is not None:
            model = with_adapter(model, peft_config, args.seed)
        if train_dataset is not None and not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "model has no parameter that requires a gradient, so nothing would be trained: load adapters with "
                "PeftModel.from_pretrained(..., is_trainable=True), or requires_grad_() what is to be trained"
            )
        if train_dataset is not None:
            check_optimizer(optimizers[0], model)
            if ref_model is not None:
                check_shares_no_trained_weight(model, ref_model)
        check_is_decoder(model)
        if args.loss_from == "hidden":
            head_layers(huggingface.unwrap(model))
        self._is_peft = hasattr(model, "disable_adapter")
        is_own_reference = args.needs_reference and ref_model is None
        self._starts_as_reference = is_own_reference and not self._is_peft
        if self._is_peft and train_dataset is not None:
            check_adds_nothing_to_the_loss(model)
        if args.reference == BASE:
            check_base_is_reference(model, ref_model)
        if self._is_peft and is_own_reference:
            check_adapters_alone_are_trained(model)
        if self._is_peft:
            adapters.drop_copies(model)
        if self._is_peft and args.gradient_checkpointing:
            model.enable_input_require_grads()
        if args.disable_dropout:
            disable_dropout(model)
        warn_of_lost_updates(model, args.learning_rate)
        # of each dataset: examples, truncated, dropped, and by reason what was dropped and what was warned of
        self.data_counts: dict[str, dict[str, int | dict[str, int]]] = {}
        with args.main_process_first(desc="preparing the data"):
            train_dataset = self._prepare_data(train_dataset, args, "train")
            eval_dataset = self._prepare_data(eval_dataset, args, "eval")
        super().__init__(
            model=model,
            args=args,
            data_collator=self.collator_class(pad_token_id(processing_class), args.pad_to_multiple_of),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.is_deepspeed_enabled:
            self._check_deepspeed()
        with keeping_random_state():
            self._check_logits(self.model)
            if train_dataset is not None:
                self._freeze_unreached()
        self.model_accepts_loss_kwargs = True  # that losses are scaled for accumulation is compute_loss's work
        self._options = {"backend": args.backend, "average_log_prob": args.average_log_prob}
        if args.loss_from == "hidden":
            self._options["chunk_bytes"] = args.chunk_bytes
        self._train_totals, self._eval_totals = Totals(), Totals()
        self._num_tokens = torch.zeros((), dtype=torch.int64, device=args.device)
        self._ref_adapters: tuple[str, ...] = ()  # active in the reference's passes; none: adapters off
        self._ref_configs: dict[str, Any] = {}  # theirs, by which they are known to be the same
        self._ref_copies: tuple[str, ...] = ()  # those of them that are copies made here
        self._reference_key: str | None = None  # of a reference that is made of adapters: what a resumed run must have
        self._reference_is_gone = args.precompute_ref_log_probs and not (self._is_peft and is_own_reference)
        with keeping_random_state():
            self.ref_model, described = None, "none"
            if self._is_peft and is_own_reference:
                described = self._choose_adapters()
                policy = self.accelerator.unwrap_model(self.model)
                self._ref_configs = {name: policy.peft_config[name] for name in self._ref_adapters}
                self._reference_key = adapters.fingerprint(policy, self._ref_adapters)
            else:
                self.ref_model, described = self._make_reference(ref_model)
            if args.needs_reference and args.should_log:
                before = " Its log-probabilities are computed before training." * args.precompute_ref_log_probs
                logger.info(f"The reference is {described}.{before}")
            if args.precompute_ref_log_probs:
                self._precompute_references()

    # ---- of each loss ----

    def _tokenize(self, source: preference_data.Source, args: FusedPreferenceConfig, name: str) -> Prepared:
        raise NotImplementedError

    def _loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], reduction: str = "mean"
    ) -> tuple[torch.Tensor, LossMetrics]:
        """The batch's mean loss, or with ``reduction="none"`` each sequence's (pair's)."""
        raise NotImplementedError

    def _ref_logps_of(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What ``ref_columns`` hold of a batch, [b] each."""
        raise NotImplementedError

    # ---- data ----

    def _prepare_data(self, source: Any, args: FusedPreferenceConfig, name: str) -> Any:
        if source is None:
            return None
        if isinstance(source, dict) and name != "train":
            return {key: self._prepare_data(value, args, f"{name}_{key}") for key, value in source.items()}
        prepared = self._checked_tokens(source, args, name)
        self.data_counts[name] = {
            "examples": len(prepared.dataset),
            "truncated": prepared.truncated,
            "dropped": prepared.dropped,
            "dropped_for": prepared.dropped_for,
            "found": prepared.found,
        }
        return prepared.dataset

    def _checked_tokens(self, source: Any, args: FusedPreferenceConfig, name: str) -> Prepared:
        prepared = self._tokenize(source, args, name)
        self._check_embedded(_largest_token_id(prepared.dataset), f"{name} data: the tokenizer gives")
        return prepared

    def _check_embedded(self, token_id: int, where: str) -> None:
        """A forward pass would fail on an index, on a GPU without a word of what it is."""
        for name, count in self._embedded_tokens.items():
            if count is not None and token_id >= count:
                raise ValueError(
                    f"{where} token id {token_id}, but {name} has embeddings of {count} tokens: resize them "
                    f"({name}.resize_token_embeddings(len(processing_class))), or pass a processing_class whose tokens "
                    f"{name} has, padding too (pad_token = eos_token)"
                )

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*self.columns, *self.mask_columns, *self.ref_columns]

    def _get_train_sampler(self, train_dataset: Dataset) -> torch.utils.data.Sampler | None:
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        if args.train_sampling_strategy == "group_by_length":
            return _LengthGroupedEpochs(self, train_dataset["length"], seed)
        sampler = super()._get_train_sampler(train_dataset)
        if args.train_sampling_strategy == "batch_rebalance":  # ``Trainer`` leaves it the seed of its own
            sampler.seed = seed
        return sampler

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Any:
        sampler = super()._get_eval_sampler(eval_dataset)
        # drawn once: persistent workers would draw another order, and with it z0, at each evaluation
        return list(sampler) if isinstance(sampler, LengthGroupedSampler) else sampler

    # ---- models ----

    def _freeze_unreached(self) -> None:
        """Freeze what text never reaches (a vision tower), which gets no gradient: DistributedDataParallel would wait
        for one, and the optimizer would keep a state for it.
        """
        inner = next((part for part in self.model.modules() if isinstance(part, PreTrainedModel)), None)
        if inner is None or is_partitioned(self.model) or embedded_tokens(inner) is None:
            return
        outside, inside = unreached_by_text(inner)
        args, parameters = self.args, dict(inner.named_parameters())
        for name in outside:
            parameters[name].requires_grad_(False)
        if outside and args.should_log:
            parts = parts_of(inner, outside)
            count = sum(parameters[name].numel() for name in outside)
            logger.info(
                f"Text never reaches {', '.join(parts)}: its {count:,} parameters get no gradient and are frozen."
            )
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(
                f"text reaches none of the parameters to train ({outside[0]} among them): train parameters of the "
                "language model"
            )
        waits = args.ddp_find_unused_parameters is False or (
            args.ddp_find_unused_parameters is None
            and isinstance(self.model, PreTrainedModel)
            and args.gradient_checkpointing
        )
        if inside and waits and self._is_ddp and args.should_log:
            logger.warning(
                f"{len(inside)} parameters to train ({inside[0]} among them) get no gradient from a few tokens, as "
                "experts of a mixture that no token is sent to; DistributedDataParallel fails at the step after one in "
                "which a parameter gets none: set ddp_find_unused_parameters=True (--ddp_find_unused_parameters true)"
            )

    @property
    def _is_ddp(self) -> bool:
        return self.args.world_size > 1 and not self.is_fsdp_enabled and not self.is_deepspeed_enabled

    def _check_logits(self, model: nn.Module) -> None:
        """Refuse a model whose logits the loss would not reproduce (from hidden states) or that is not causal (from
        logits). It runs on the device, for some kernels run nowhere else, and before accelerate prepares the model.
        """
        is_from_hidden = self.args.loss_from == "hidden"
        if is_partitioned(model):  # it gives no logits yet: ``apply`` attaches it
            if is_from_hidden:
                head_layers(huggingface.unwrap(model))
            return
        if is_from_hidden:
            huggingface.attach(model)
            return
        inner = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
        if inner is not None and embedded_tokens(inner) is not None:
            check_is_causal(inner)

    # ---- the reference ----

    def _choose_adapters(self) -> str:
        """Decide which adapters of the policy make the reference, and describe it.

        All ranks decide alike: an adapter that is not the identity on one of them is copied on all.
        """
        policy = self.accelerator.unwrap_model(self.model)
        active = list(policy.active_adapters)
        if self.args.reference == BASE:
            return "the model with its adapters off (reference='base')"
        named = adapters.named_reference(policy)
        if named is not None:
            adapters.freeze(policy, named)
            self._ref_adapters = (named,)
            return f"the model with its adapter {named!r}, which it came with"
        check_can_be_copied(policy)
        trained = [name for name in active if adapters.is_trained(policy, name)]
        if not trained:
            self._ref_adapters = tuple(active)
            return (
                "the model itself, for none of its adapters is trained: all rewards are 0 (reference='base' compares "
                "with the model without its adapters)"
            )
        kept = [name for name in trained if self._is_on_any_rank(not adapters.changes_nothing(policy, name))]
        unchanging = ", ".join(repr(name) for name in trained if name not in kept)
        if not kept:
            self._ref_adapters = tuple(name for name in active if name not in trained)
            if not self._ref_adapters:
                return f"the model with its adapters off ({unchanging} changes nothing before training)"
            frozen = ", ".join(map(repr, self._ref_adapters))
            return f"the model with its frozen adapter {frozen} ({unchanging} changes nothing before training)"
        if any(hasattr(parameter, "ds_id") for name in kept for parameter in adapters.parameters_of(policy, name)):
            raise NotImplementedError(
                f"adapter {kept[0]!r} changes the model before training, and DeepSpeed ZeRO-3 has partitioned it, so "
                "no copy can be kept of it as the reference: pass ref_model, load the adapter a second time under the "
                "name 'ref', or set reference='base' for the model with its adapters off"
            )
        names = adapters.copy_adapters(policy, kept)
        self._ref_adapters = tuple(names.get(name, name) for name in active if name in names or name not in trained)
        self._ref_copies = tuple(names.values())
        if not is_partitioned(policy):  # else it gives no logits yet
            self._check_copies(policy)
        which = ", ".join(f"adapter {name!r} as {copied!r}" for name, copied in names.items())
        return (
            f"the model with a frozen copy of the adapter that is trained ({which}). The copy stays in the model, and "
            "save_model leaves it out"
        )

    def _is_on_any_rank(self, is_here: bool) -> bool:
        return self.accelerator.reduce(torch.tensor(int(is_here), device=self.args.device)).item() > 0

    def _check_copies(self, policy: nn.Module) -> None:
        """Refuse adapters of a method whose copy does not compute what they do."""
        inner = huggingface.unwrap(policy)
        own = checked_logits(inner)
        with self._reference(policy):
            copied = checked_logits(inner)
        if not is_reproduced(own, copied):
            kinds = sorted({str(getattr(config.peft_type, "value", "?")) for config in policy.peft_config.values()})
            raise ValueError(
                f"a copy of the adapter ({', '.join(kinds)}) does not compute what the adapter does, so it cannot be "
                "the reference: pass ref_model, or set reference='base' for the model with its adapters off"
            )

    def _make_reference(self, ref_model: PreTrainedModel | None) -> tuple[nn.Module | None, str]:
        """A given model, else a copy of the untrained policy, on its devices; and a description of it. None where the
        policy itself serves, before its first step.
        """
        if not self.args.needs_reference:
            return None, "none"
        described = "ref_model, a model of its own"
        if ref_model is None:
            is_whole = not self.is_fsdp_enabled and not self.is_deepspeed_enabled
            if self.args.precompute_ref_log_probs and is_whole:
                return None, "the model as it is before its first step"
            ref_model, described = self._copy_of_policy(), "a frozen copy of the model as it is before training"
        return self._prepared_reference(ref_model), described

    def _prepared_reference(self, ref_model: nn.Module) -> nn.Module:
        if self.place_model_on_device and getattr(ref_model, "hf_device_map", None) is None:  # else it is placed
            self._move_model_to_device(ref_model, self.args.device)
        self._check_logits(ref_model)
        if self.args.disable_dropout:
            disable_dropout(ref_model)
        ref_model.requires_grad_(False).eval()
        if self.is_fsdp_enabled:
            if self.accelerator.state.fsdp_plugin.fsdp_version != 2:
                raise NotImplementedError("a reference model under FSDP needs its version 2 (fsdp_version: 2)")
            from accelerate.utils.fsdp_utils import fsdp2_prepare_model

            return fsdp2_prepare_model(self.accelerator, ref_model)
        if self.is_deepspeed_enabled:
            return self._deepspeed_engine(ref_model)
        ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        self.accelerator._models.pop()  # evaluate() prepares the policy only where accelerate holds no model yet
        return ref_model

    def _copy_of_policy(self) -> nn.Module:
        if not is_partitioned(self.model):
            return copy.deepcopy(self.model)
        if self._model_path is None:
            raise ValueError(
                "ref_model is missing, and model cannot be copied to serve as one, for DeepSpeed ZeRO-3 partitioned "
                "its weights as it was loaded: pass ref_model, or the model's path as model"
            )
        return load(self._model_path, self._path_dtype, self.args.trust_remote_code)

    def _check_deepspeed(self) -> None:
        started = torch.distributed.get_world_size() if torch.distributed.is_initialized() else None
        if started != self.args.world_size:
            raise ValueError(
                f"DeepSpeed needs processes that Trainer counts too; it counts {self.args.world_size}, and "
                f"{started or 'none'} were started: use torchrun or accelerate launch, and use_cpu=True on CPUs"
            )
        # left out, DeepSpeed clips at a norm of its own choice
        self._deepspeed_config().config.setdefault("gradient_clipping", self.args.max_grad_norm)

    def _deepspeed_config(self) -> Any:
        return self.accelerator.state.deepspeed_plugin.hf_ds_config

    def _deepspeed_engine(self, ref_model: nn.Module) -> nn.Module:
        """ZeRO-3 partitions the reference as it does the policy; under the other stages each process holds it whole."""
        import deepspeed

        described = copy.deepcopy(self._deepspeed_config())
        for name in ("optimizer", "scheduler", "zero_optimization.offload_optimizer", "train_batch_size"):
            described.del_config_sub_tree(name)
        described.trainer_config_finalize(self.args, ref_model, num_training_steps=0)
        config = described.config
        # it never steps, but DeepSpeed asks for the batch it would step after
        config["gradient_accumulation_steps"] = 1
        config["train_micro_batch_size_per_gpu"] = self.args.per_device_train_batch_size
        if not described.is_zero3():
            config["zero_optimization"] = {"stage": 0}
        engine, *_ = deepspeed.initialize(model=ref_model, config=config)
        engine.eval()
        return engine

    @contextmanager
    def _reference(self, model: nn.Module) -> Iterator[nn.Module]:
        """The reference model: its own, or ``model``, the policy, with the reference's adapters and without dropout."""
        if self.ref_model is not None:
            yield self.ref_model
        elif self._is_peft:
            policy = self.accelerator.unwrap_model(self.model)
            if any(policy.peft_config.get(name) is not config for name, config in self._ref_configs.items()):
                raise RuntimeError(
                    f"adapter {', '.join(map(repr, self._ref_configs))}, this trainer's reference, was taken out of "
                    "the model or replaced, as a later trainer of the same PeftModel does: use the later trainer, or "
                    "give each a model of its own"
                )
            with (
                evaluating(model),
                keeping_trainable(policy),
                adapters.switched_to(policy, self._ref_adapters),
            ):
                yield model
        else:
            yield model

    def _logps(self, model: nn.Module, inputs: dict[str, torch.Tensor], prefix: str = "") -> torch.Tensor:
        """[B] sequence log-probabilities of a batch, with "kl_" of its mismatched pairs; without a gradient."""
        with torch.no_grad():
            return self._apply(self.logps_functions, model, inputs, prefix)

    def _ref_logps(self, model: nn.Module, inputs: dict[str, torch.Tensor], prefix: str = "") -> torch.Tensor:
        """The same of the reference, which the batch may hold already."""
        kept = inputs.get(f"ref_{prefix}logps")
        if kept is not None:
            return kept
        with self._reference(model) as reference:
            return self._logps(reference, inputs, prefix)

    def _apply(
        self,
        functions: tuple[Callable, Callable],
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prefix: str = "",
        **arguments,
    ) -> Any:
        """The one of (from hidden states, from logits) that ``loss_from`` says, of a batch."""
        from_hidden, from_logits = functions
        model_inputs = {name: inputs[prefix + name] for name in ("input_ids", "attention_mask")}
        arguments |= {"labels": inputs[prefix + "labels"], **self._options}
        if self.args.loss_from == "logits":
            in_place = torch.is_grad_enabled()
            return huggingface.apply_to_logits(from_logits, model, model_inputs, inplace_backward=in_place, **arguments)
        model_inputs = without_padding_mask(model, model_inputs, self.accelerator.mixed_precision)
        return huggingface.apply(from_hidden, model, model_inputs, **arguments)

    def _precompute_references(self) -> None:
        """Add ``ref_columns`` to the datasets, from disk or by the reference, which is not needed afterwards."""
        args, has_policy = self.args, self.ref_model is None
        if has_policy and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            wrapper = "FSDP" if self.is_fsdp_enabled else "DeepSpeed"
            raise NotImplementedError(
                f"precompute_ref_log_probs with adapters under {wrapper}: leave it out, for a reference that is the "
                "model with other adapters, or none, costs little memory"
            )
        model = self.model if has_policy else self.ref_model
        prefix = getattr(getattr(model, "base_model", None), "prefix", None) if self._is_peft and has_policy else None
        weights = reference_cache.hash_model(huggingface.unwrap(model), prefix)
        if self._ref_adapters:
            weights += self._reference_key

        def batches(dataset: Dataset) -> Iterator[tuple[torch.Tensor, ...]]:
            batch_size = args.precompute_ref_batch_size or args.per_device_train_batch_size
            loader = DataLoader(dataset, batch_size, collate_fn=self.data_collator)
            progress = tqdm(
                self.accelerator.prepare(loader),
                desc="Reference log-probabilities",
                disable=args.disable_tqdm or not args.should_log,
            )
            for inputs in progress:
                yield self.accelerator.gather_for_metrics(self._ref_logps_of(model, inputs))

        def on_every_rank(is_found: bool) -> bool:
            found = self.accelerator.reduce(torch.tensor(int(is_found), device=args.device))
            return found.item() == self.accelerator.num_processes

        def add(dataset: Dataset) -> Dataset:
            precision = (self.accelerator.mixed_precision, args.loss_from)  # logits are rounded under autocast
            depends_on = (weights, *precision, str(args.average_log_prob))
            return reference_cache.add_ref_logps(
                dataset, self.ref_columns, batches, args.ref_cache_dir, depends_on, on_every_rank
            )

        if self._reference_key is None:
            self._reference_hash = fingerprints.hash_weights(self._unwrapped(model))
        model.eval()
        with self.accelerator.autocast():
            if self.train_dataset is not None:
                self.train_dataset = add(self.train_dataset)
            if isinstance(self.eval_dataset, dict):
                self.eval_dataset = {name: add(dataset) for name, dataset in self.eval_dataset.items()}
            elif self.eval_dataset is not None:
                self.eval_dataset = add(self.eval_dataset)
        self.ref_model = None

    # ---- steps ----

    def _inner_training_loop(self, *args, **kwargs):
        """Sets the logged sums to zero: auto_find_batch_size starts this loop again, and so does a second ``train``."""
        self._train_totals, self._num_tokens = Totals(), torch.zeros_like(self._num_tokens)
        return super()._inner_training_loop(*args, **kwargs)

    def _prepare_input(self, data: Any) -> Any:
        """As ``Trainer``'s, which under DeepSpeed would round reference log-probabilities to the model's dtype."""
        return data.to(self.args.device) if isinstance(data, torch.Tensor) else super()._prepare_input(data)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """Sequences, or pairs, of an optimizer step over all ranks."""
        count = sum(len(batch["input_ids"]) for batch in batch_samples)
        if self.args.world_size == 1:
            return count
        return self.accelerator.gather(torch.tensor(count, device=device)).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, LossMetrics]:
        """The batch's mean loss; with ``num_items_in_batch`` its share of the optimizer step's, so that accumulated
        batches and ranks, the last and smaller ones too, add up to the gradient of one large batch.
        """
        loss, metrics = self._loss(model, inputs)
        rows = len(inputs["input_ids"])
        if self.model.training:
            self._train_totals.add(metrics.totals() | {"loss": self._loss_total(loss, rows)})
            self._num_tokens += inputs["attention_mask"].sum()
        if num_items_in_batch is not None:
            share = rows * self.accelerator.num_processes / num_items_in_batch
            if not (isinstance(share, float) and share == 1):
                loss = loss * share
        return (loss, metrics) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """The loss alone: there are no logits to return."""
        inputs, gather = self._prepare_inputs(inputs), self.accelerator.gather_for_metrics
        with torch.no_grad(), self.compute_loss_context_manager():
            losses, metrics = self._loss(model, inputs, reduction="none")
        # of single sequences, for a last batch may hold some that accelerate repeats to fill it
        self._eval_totals.add(metrics.gathered(gather).totals() | {"loss": self._loss_total(gather(losses))})
        return losses.mean(), None, None

    def _loss_total(self, losses: torch.Tensor, weight: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """(weighted sum, weight) of losses that weigh the same."""
        losses = losses.detach().double()
        weights = torch.full_like(losses, weight)
        if self.args.logging_nan_inf_filter:
            is_finite = losses.isfinite()
            losses, weights = losses.where(is_finite, 0.0), weights.where(is_finite, 0.0)
        return (losses * weights).sum(), weights.sum()

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        """As ``Trainer``'s, with our metrics. Whether and when a run is evaluated changes nothing that it draws."""
        with keeping_random_state():
            return self._evaluation_loop(*args, **kwargs)

    def _evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        self._eval_totals, is_first_use = Totals(), not self.accelerator._models
        deepspeed_config = self._deepspeed_config().config if self.is_deepspeed_enabled else {}
        of_training = copy.deepcopy(deepspeed_config)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if is_first_use:  # the model was prepared to evaluate: left so, it would be trained without DDP
            self.accelerator._models.clear()
            self.model_wrapped, self.model._is_accelerate_prepared = self.model, False
            original = self.model.__dict__.pop("_original_forward", None)
            if original is not None:  # autocast stands around it, and would once more each time
                self.model.forward = original
            deepspeed_config.clear()  # to evaluate, the optimizer and what else it says of training was taken out
            deepspeed_config.update(of_training)
        means = self._eval_totals.pop()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As ``Trainer``'s; a dataset that is not prepared yet is tokenized first."""
        is_name = isinstance(self.eval_dataset, dict) and isinstance(eval_dataset, str)
        if eval_dataset is None or eval_dataset is self.eval_dataset or (is_name and eval_dataset in self.eval_dataset):
            return super().get_eval_dataloader(eval_dataset)
        new = self._prepare_new(eval_dataset)
        # workers that stay: ``Trainer`` keeps their loaders by name, and whatever has none is "eval"
        kept = getattr(self, "_eval_dataloaders", {})
        self._eval_dataloaders = {}
        loader = super().get_eval_dataloader(new)
        self._eval_dataloaders = kept
        return loader

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As ``Trainer``'s; a dataset that is not prepared yet is tokenized first."""
        return super().get_test_dataloader(self._prepare_new(test_dataset))

    def _prepare_new(self, source: Any) -> Dataset:
        is_prepared = isinstance(source, Dataset) and set(self.columns) <= set(source.column_names)
        if is_prepared:
            dataset = source
        else:
            with keeping_random_state():
                dataset = self._checked_tokens(source, self.args, "eval").dataset
        if not self.args.precompute_ref_log_probs:  # another trainer's are of another reference
            dataset = dataset.remove_columns([name for name in self.ref_columns if name in dataset.column_names])
        if self._reference_is_gone and not set(self.ref_columns) <= set(dataset.column_names):
            raise ValueError(
                "eval_dataset is new, and with precompute_ref_log_probs there is no reference model to score it: "
                "pass it to the trainer's constructor"
            )
        return dataset

    # ---- logging and resuming ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics since the last log, over all ranks, under TRL's names; the one place that waits for them.

        ``loss`` is the mean over these steps' sequences (pairs). The summary at the end of training holds the metrics
        of the steps after the last log, where there are any.
        """
        is_last = "train_loss" in logs and self._train_totals.values  # of steps that no log was due for
        if "loss" in logs or is_last:
            means = self._train_totals.pop(self.accelerator.reduce)
            if is_last:
                means.pop("loss", None)  # train_loss, the whole run's, stands for it
            logs |= means
            logs["num_tokens"] = int(self.accelerator.reduce(self._num_tokens).item())
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **options: Any) -> TrainOutput:
        """As ``Trainer``'s. True resumes from the newest complete checkpoint in ``args.output_dir``.

        Raises:
            checkpoints.CheckpointError: the checkpoint is incomplete, damaged or of another run, or none is complete;
                a new one cannot be saved.
            checkpoints.FolderInUseError: another run writes into ``args.output_dir``.
        """
        args, checkpoint = self.args, None
        with checkpoints.only_run_in(args):
            if resume_from_checkpoint:
                wanted = resume_from_checkpoint if resume_from_checkpoint is True else str(resume_from_checkpoint)
                checkpoint = checkpoints.agreed(
                    args, lambda: checkpoints.choose(wanted, args.output_dir, args.resume_anyway)
                )
            self._run = checkpoints.describe_run(
                args,
                model=self._unwrapped(self.model),
                reference=self._describe_reference(),
                tokenizer=self._tokenizer,
                train_dataset=self.train_dataset,
                eval_dataset=self.eval_dataset,
                columns=[*self.columns, *self.mask_columns],
            )
            if checkpoint is not None:
                checkpoints.agreed(args, lambda: checkpoints.check_same_run(checkpoint, self._run, args))
            return super().train(checkpoint, *arguments, **options)

    def _describe_reference(self) -> str | None:
        """A hash of its weights; None where there is none, or where the policy's frozen weights are the reference."""
        if self._reference_key is not None:
            return f"adapters {self._reference_key}"
        if self.ref_model is not None:
            return fingerprints.hash_weights(self._unwrapped(self.ref_model))
        return self._reference_hash

    def _unwrapped(self, model: nn.Module) -> nn.Module:
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def _init_training_state(self, max_steps: int, steps_per_epoch: int, epochs: int, *rest: Any) -> tuple[int, int]:
        """Resumed after the last step, nothing is trained; in the middle of an epoch ``Trainer`` would take a step."""
        checkpoint = rest[0]
        if checkpoint is not None:
            state = TrainerState.load_from_json(os.path.join(checkpoint, checkpoints.STATE))
            checkpoints.warn_of_another_end(state.max_steps, max_steps, self.args)
        start = super()._init_training_state(max_steps, steps_per_epoch, epochs, *rest)
        if self.state.global_step < max_steps:
            if checkpoint is not None and holds_model_alone(checkpoint):
                begun = ", with the reference that this one began with as ref_model" * self._starts_as_reference
                raise ValueError(
                    f"{checkpoint} holds a model alone (save_only_model), and training would go on with an optimizer "
                    f"and a schedule that begin anew: start a run of its own from that model{begun}"
                )
            return start
        self.accelerator.print(f"The checkpoint has all {max_steps} steps: nothing is trained, its results are written")
        return epochs, 0  # as many epochs as there are lie behind

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As ``Trainer``'s, without the copies of adapters that are the reference."""
        if not self._ref_copies:
            return super()._save(output_dir, state_dict)
        with adapters.saving_all_but(self.accelerator.unwrap_model(self.model), self._ref_copies):
            return super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As ``Trainer``'s, which of several active adapters would leave the first one active, and would unfreeze its
        frozen weights.
        """
        if not self._is_peft:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        policy = self.accelerator.unwrap_model(self.model)
        active = policy.base_model.active_adapter
        with keeping_trainable(policy):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            if policy.base_model.active_adapter != active:
                policy.base_model.set_adapter(active)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As ``Trainer``'s, with a manifest as the last file; uploading and removing older ones come after it."""
        args = self.args
        folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        afterwards = {name: getattr(args, name) for name in ("save_total_limit", "push_to_hub")}
        try:
            if args.should_save:
                checkpoints.begin(folder)
            self.accelerator.wait_for_everyone()
            args.save_total_limit, args.push_to_hub = None, False
            try:
                super()._save_checkpoint(model, trial)
            finally:
                for name, value in afterwards.items():
                    setattr(args, name, value)
            self.accelerator.wait_for_everyone()
            if args.should_save:
                if (folder / TRAINING_ARGS_NAME).exists():
                    torch.save(args, folder / TRAINING_ARGS_NAME)  # as they are, not as they were while saving
                checkpoints.end(folder, self._run)
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            if args.should_save:
                checkpoints.abandon(folder)
            way_out = "start again, for there is no earlier checkpoint"
            if checkpoints.found_in(folder.parent):
                way_out = "resume from the newest checkpoint (resume_from_checkpoint); earlier ones are as they were"
            raise checkpoints.CheckpointError(
                f"{folder} could not be saved ({_reason(error)}): make room or mend the disk, then {way_out}"
            ) from error
        if args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if args.should_save:
            checkpoints.rotate(folder.parent, args.save_total_limit, folder, self.state.best_model_checkpoint)

    def _load_best_model(self) -> None:
        """As ``Trainer``'s, of a checkpoint that is verified first. Of adapters ``Trainer`` would load a single one,
        and only where its name is "default".
        """
        best = self.state.best_model_checkpoint
        if not self.args.resume_anyway or (Path(best) / checkpoints.MANIFEST).exists():
            checkpoints.agreed(self.args, lambda: checkpoints.verify(Path(best)))
        is_whole = not self.is_fsdp_enabled and not self.is_deepspeed_enabled
        if self._is_peft and is_whole and list(self.accelerator.unwrap_model(self.model).peft_config) != ["default"]:
            self._load_from_checkpoint(best)
        else:
            super()._load_best_model()

    def _metrics_file(self, folder: str) -> str:
        return os.path.join(folder, f"metrics_{self.args.process_index}.pt")

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        torch.save(
            {"totals": self._train_totals.values, "num_tokens": self._num_tokens}, self._metrics_file(output_dir)
        )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and os.path.exists(self._metrics_file(checkpoint)):
            state = torch.load(self._metrics_file(checkpoint), map_location="cpu", weights_only=True)
            device = self.args.device  # not a map_location where it is a "cpu:0"
            self._train_totals.values = {name: values.to(device) for name, values in state["totals"].items()}
            self._num_tokens = state["num_tokens"].to(device)


class _LengthGroupedEpochs(LengthGroupedSampler):
    """Batches of similar length in an order of each epoch's own, drawn from the seed and the epoch alone: the same
    after resuming, and whether one process or several share a global batch.
    """

    def __init__(self, trainer: Trainer, lengths: list[int], seed: int):
        self.trainer, self.seed = trainer, seed
        super().__init__(trainer.get_total_train_batch_size(trainer.args), lengths=list(lengths))

    def __iter__(self) -> Iterator[int]:
        epoch = int((self.trainer.state.epoch or 0) + 1e-6)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


def _reason(error: Exception) -> str:
    """The system's word where an error has one behind it. Where ``torch.save`` notices alone that less was written
    than it asked for, as on a full disk, the error names a line of its source and two positions.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    if "unexpected pos" in str(error):
        return "a file could not be written to its end"
    return " ".join(str(error).split()) or type(error).__name__


def holds_model_alone(checkpoint: str) -> bool:
    """Whether a checkpoint lacks what a run needs to go on as if it had not been stopped."""
    # of all that is saved beside the model, only this has the same name under DeepSpeed and FSDP
    return not any(Path(checkpoint).glob("rng_state*.pth"))


def _largest_token_id(dataset: Dataset) -> int:
    columns = [name for name in dataset.column_names if name.endswith("_ids")]
    largest = 0
    for rows in dataset.select_columns(columns).with_format("arrow").iter(fingerprints.ROWS_AT_A_TIME):
        found = (pc.max(pc.list_flatten(rows[column])).as_py() for column in columns)
        largest = max(largest, *(0 if token_id is None else token_id for token_id in found))  # a prompt may be empty
    return largest
