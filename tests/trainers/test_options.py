"""Options reach the losses and the data; options that cannot be honoured are refused by name."""

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
from tiny_training import CONFIGS, by_kind, make_trainer, model
from transformers import HfArgumentParser

from kto_fused import heads
from kto_fused.data import tokens
from kto_fused.trainers.base import Functions
from kto_fused.trainers.configs import AT_LEAST

pytestmark = pytest.mark.usefixtures("own_cache", "small_machine")


def spied(function: Callable, calls: list[dict[str, Any]], **replaced: Any) -> Callable:
    """Return ``function`` with ``replaced`` arguments; its named arguments are appended to ``calls``."""

    @functools.wraps(function)
    def spying(*args, **named):
        calls.append(named)
        return function(*args, **{**named, **replaced})

    return spying


def spied_functions(functions: Functions, calls: list[dict[str, Any]]) -> Functions:
    return Functions(*(spied(function, calls) for function in functions))


@pytest.mark.parametrize("loss_from", ["hidden", "logits"])
@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("kto", "kto_squared", {"desirable_weight": 1.5, "undesirable_weight": 0.5, "reference_point": 0.2}),
        ("kto", "bco", {"desirable_weight": 1.5}),
        ("dpo", "simpo", {"label_smoothing": 0.1, "gamma": 0.7}),
        ("dpo", "discopop", {"discopop_tau": 0.1, "f_divergence_type": "js_divergence"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_option_of_a_loss_reaches_it(tmp_path, kind, name, options, loss_from, monkeypatch):
    engine_options = {"chunk_bytes": 2**20} if loss_from == "hidden" else {}
    calls = []
    trainer = make_trainer(
        kind,
        tmp_path,
        train=4,
        loss_from=loss_from,
        loss_type=name,
        beta=0.3,
        backend="torch",
        **options,
        **engine_options,
    )
    monkeypatch.setattr(trainer, "loss_functions", spied_functions(trainer.loss_functions, calls))
    trainer.train()
    assert len(calls) == 1
    expected = {"head": heads.make(name, beta=0.3, **options), "backend": "torch", **engine_options}
    if loss_from == "logits":
        expected["inplace_backward"] = True
    assert expected.items() <= calls[0].items()


@pytest.mark.parametrize("loss_from", ["hidden", "logits"])
def test_averaged_log_probabilities_reach_the_loss_of_kto(tmp_path, loss_from, monkeypatch):
    calls = []
    options = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5, "reference_point": 0.2}
    trainer = make_trainer("kto", tmp_path, train=4, loss_from=loss_from, average_log_prob=True, **options)
    monkeypatch.setattr(trainer, "averaged_functions", spied_functions(trainer.averaged_functions, calls))
    trainer.train()
    assert len(calls) == 1
    assert {**options, "loss_type": "kto", "average_log_prob": True}.items() <= calls[0].items()


@by_kind
def test_logits_without_a_backward_are_not_written_over(tmp_path, kind, monkeypatch):
    """A reference's logits may share memory with something else."""
    loss_calls, logps_calls = [], []
    trainer = make_trainer(kind, tmp_path, ref_model=model(seed=1), train=4, evaluation=4, loss_from="logits")
    for name, calls in (("loss_functions", loss_calls), ("logps_functions", logps_calls)):
        monkeypatch.setattr(trainer, name, spied_functions(getattr(trainer, name), calls))
    trainer.train()
    trainer.evaluate()
    assert [call["inplace_backward"] for call in loss_calls] == [True, False]
    assert {call["inplace_backward"] for call in logps_calls} == {False}


@pytest.mark.parametrize(("kind", "prepare"), [("kto", "prepare_unpaired"), ("dpo", "prepare_paired")])
def test_options_of_the_data_reach_their_preparation(tmp_path, kind, prepare, monkeypatch):
    calls = []
    monkeypatch.setattr(tokens, prepare, spied(getattr(tokens, prepare), calls, num_proc=None))
    make_trainer(kind, tmp_path, train=4, dataset_num_proc=3, max_length=12, seed=5)
    expected = {"max_length": 12, "num_proc": 3, **({"seed": 5, "mismatch": True} if kind == "kto" else {})}
    assert len(calls) == 1
    assert expected.items() <= calls[0].items()


@by_kind
def test_options_out_of_range_are_refused_by_name(tmp_path, kind):
    config = CONFIGS[kind]

    def refused(match, **options):
        with pytest.raises((ValueError, TypeError), match=match):
            config(output_dir=str(tmp_path), use_cpu=True, **options)

    refused("loss_type must be one of .*('kto_squared'|'sigmoid').*, got 'squared'", loss_type="squared")
    refused("loss_from.*'hidden'.*'logits'.*'text'", loss_from="text")
    refused("train_sampling_strategy must be one of", train_sampling_strategy="by_length")
    refused("beta", beta=0.0)
    refused("max_steps must be at least 1, or -1 for num_train_epochs, got 0", max_steps=0)
    refused("num_train_epochs must be more than 0, or max_steps given", num_train_epochs=0)
    refused("learning_rate must be a finite number of at least 0, got nan", learning_rate=float("nan"))
    for name, least in AT_LEAST.items():
        said = f"{name} must be a finite number of at least {least}, got {least - 1}"
        refused(said, **{"dataloader_num_workers": 1, name: least - 1})
    refused("fp16=True has no effect on a CPU", fp16=True)
    refused("save_strategy='best' needs evaluations", save_strategy="best", metric_for_best_model="loss")
    for rubbish in (0, -3, 2.5, "-64", "long", True):
        refused(f"max_length must be a positive integer, 'auto' or None, got {rubbish!r}", max_length=rubbish)
    refused("max_length must hold a prompt and a completion", max_length=1)
    for name in ("precompute_ref_batch_size", "dataset_num_proc", "pad_to_multiple_of"):
        refused(f"{name} must be a positive integer or None, got 0", **{name: 0})
    refused("chunk_bytes", chunk_bytes=-1)
    refused(r"backend must be one of \['triton', 'torch', None\], got 'cuda'", backend="cuda")
    flags = ["precompute_ref_log_probs", "disable_dropout", "trust_remote_code"]
    for name in [*flags, *(["average_log_prob"] if kind == "kto" else [])]:
        for rubbish in ("no", "false", 1, None):
            refused(f"{name} must be True or False, got {rubbish!r}", **{name: rubbish})
    if kind == "dpo":
        refused("label_smoothing", label_smoothing=0.5)
    else:
        refused("undesirable_weight", undesirable_weight=-1.0)
        for other in ("batch_mean", 0.5):
            fixed = f"reference_point={other!r} has no meaning for loss_type='apo_zero_unpaired', which reads no z0"
            refused(fixed, loss_type="apo_zero_unpaired", reference_point=other)
        for rubbish in ("mean", "nan", "inf", None, [0.1], True):
            refused("reference_point must be 'mismatched', 'batch_mean' or a number, got", reference_point=rubbish)


@by_kind
@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("label_smoothing_factor", 0.3, "no classes to smooth"),
        ("average_tokens_across_devices", False, "sequences of all devices"),
        ("length_column_name", "size", "tokenized data"),
        ("include_for_metrics", ["inputs"], "compute_metrics"),
        ("bf16_full_eval", True, "round the model for good, but not its reference"),
        ("fp16_full_eval", True, "round the model for good, but not its reference"),
        ("use_liger_kernel", True, "fused_linear_cross_entropy"),
    ],
)
def test_options_that_would_be_ignored_are_refused(tmp_path, monkeypatch, kind, option, value, why):
    monkeypatch.setattr("transformers.training_args.is_liger_kernel_available", lambda: True, raising=False)
    with pytest.raises(ValueError, match=f"{option}.*{why}"):
        CONFIGS[kind](output_dir=str(tmp_path), use_cpu=True, **{option: value})


@by_kind
@pytest.mark.parametrize(
    ("needed", "options"),
    [
        ("loss_from='hidden'", {"chunk_bytes": 2**20, "loss_from": "logits"}),
        ("precompute_ref_log_probs", {"precompute_ref_batch_size": 2}),
        ("precompute_ref_log_probs", {"ref_cache_dir": "cache"}),
        ("metric_for_best_model", {"greater_is_better": True}),
        ("push_to_hub", {"hub_model_id": "mine"}),
        (
            "a train_sampling_strategy whose batches can shrink",
            {"auto_find_batch_size": True, "train_sampling_strategy": "batch_rebalance"},
        ),
        ("an lr_scheduler_type that warms up", {"warmup_steps": 5, "lr_scheduler_type": "constant"}),
        (
            "an lr_scheduler_type that takes them",
            {"lr_scheduler_kwargs": {"power": 2}, "lr_scheduler_type": "constant"},
        ),
    ],
)
def test_options_without_what_they_belong_to_are_refused(tmp_path, kind, needed, options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} has no meaning without {needed}")):
        CONFIGS[kind](output_dir=str(tmp_path), use_cpu=True, **options)
    nothing = {} if name == "lr_scheduler_kwargs" else CONFIGS[kind].__dataclass_fields__[name].default
    CONFIGS[kind](output_dir=str(tmp_path), use_cpu=True, **{**options, name: nothing})


def test_precomputing_is_refused_for_a_loss_without_a_reference(tmp_path):
    with pytest.raises(ValueError, match="precompute_ref_log_probs=True has no meaning without a loss_type that"):
        CONFIGS["dpo"](output_dir=str(tmp_path), use_cpu=True, loss_type="simpo", precompute_ref_log_probs=True)


@pytest.mark.parametrize(("given", "expected"), [([], "auto"), (["--max_length", "64"], 64)])
def test_the_parser_of_transformers_reads_max_length(tmp_path, given, expected):
    parser = HfArgumentParser(CONFIGS["kto"])
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", *given])
    assert args.max_length == expected
    with pytest.raises(ValueError, match="pad_to_multiple_of must be a positive integer or None, got 0"):
        CONFIGS["kto"](str(tmp_path), use_cpu=True, pad_to_multiple_of=0)  # the parser changes the types of the fields


def test_batch_mean_is_refused_where_a_batch_lies_in_parts(tmp_path):
    with pytest.raises(ValueError, match=r"reference_point='batch_mean'.*gradient_accumulation_steps=2"):
        make_trainer("kto", tmp_path, reference_point="batch_mean", gradient_accumulation_steps=2)
