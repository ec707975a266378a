"""How the options of ``kto-fused train`` are read from flags and from a YAML file."""

# ruff: noqa: E402 (where packages are missing, the skip must come before the imports that need them)

import re
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

for package in ("datasets", "accelerate", "matplotlib"):
    pytest.importorskip(package, reason=f"kto-fused train needs {package}")

from command_runs import command, losses

from kto_fused import heads
from kto_fused.commands import cli, own_loss, train
from kto_fused.commands.arguments import ALIASES
from kto_fused.commands.errors import CommandError
from kto_fused.commands.flags import FlagParser
from kto_fused.commands.settings_file import read_settings
from kto_fused.trainers import FusedPPOConfig, LoopSettings

pytestmark = pytest.mark.usefixtures("module_cache", "in_a_new_folder")


def test_every_field_is_a_flag_but_those_that_would_change_nothing():
    for loss, kind in train.CONFIGS.items():
        settings, config = train.parse(["--model", "m", "--data", "d", "--loss", loss, "--use_cpu"])
        names = {field.name for field in fields(kind) if field.init}
        assert names > set(train.LEFT_OUT)
        parser = train.flags_of(loss)
        flags = {action.dest for action in parser._actions} - {"help", "config"}
        assert flags == names - set(train.LEFT_OUT) | {
            field.name for field in fields(train.TrainSettings) if field.init
        }
        assert (settings.loss, type(config)) == (loss, kind)


GIVEN = ["--model", "m", "--data", "d", "--use_cpu"]


@pytest.mark.parametrize("name", [*heads.names(), "bradley_terry"])
def test_every_registered_loss_is_trained_by_its_name_or_refused_with_the_command_that_trains_it(name):
    recipe = own_loss.known(heads.names())["losses"][name]
    if recipe in (None, "ppo"):
        where = "in a loop of your own" if recipe is None else "kto-fused ppo "
        with pytest.raises(CommandError, match=f"--loss {name} is trained by .*{where}"):
            train.parse([*GIVEN, "--loss", name])
        return
    settings, config = train.parse([*GIVEN, "--loss", name])
    if name not in train.CONFIGS:
        assert (config.loss_type, config.output_dir) == (name, f"runs/{name}")
        assert options_from([*GIVEN, "--loss", name], recipe) == [vars(settings), config.to_dict()]
        other = next((other for other in train.CONFIGS[recipe].loss_names if other != name), "other")
        with pytest.raises(CommandError, match=r"name different losses|invalid choice"):
            train.parse([*GIVEN, "--loss", name, "--loss_type", other])
    assert type(config) is train.CONFIGS[name if name in train.CONFIGS else recipe]


def test_a_command_trains_the_losses_of_its_recipe_alone():
    for recipe, kind in train.CONFIGS.items():
        settings, config = train.parse(GIVEN, recipe)
        assert (settings.loss, type(config), config.output_dir) == (recipe, kind, f"runs/{recipe}")
    with pytest.raises(CommandError, match="--loss simpo is trained by another command: kto-fused dpo --loss simpo"):
        train.parse([*GIVEN, "--loss", "simpo"], "kto")


def test_aliases_are_names_of_the_same_flags():
    aliases = [
        "--model_name_or_path",
        "m",
        "--data",
        "d",
        "--use_cpu",
        "--lr=0.5",
        "--batch-size",
        "3",
        "--epochs",
        "2",
    ]
    plain = [*GIVEN, "--learning_rate=0.5", "--per_device_train_batch_size", "3", "--num_train_epochs", "2"]
    assert options_from(aliases) == options_from(plain)
    Path("file.yaml").write_text("model_name_or_path: m\ndata: d\nuse_cpu: true\nlr: 0.5\nbatch_size: 3\nepochs: 2\n")
    assert options_from(["--config", "file.yaml"]) == options_from(plain)
    assert train.parse(["--config", "file.yaml", "--lr", "0.25"])[1].learning_rate == 0.25
    with pytest.raises(CommandError, match=r"^--lr and --learning_rate are two names of one setting: give one of them"):
        train.parse([*GIVEN, "--lr", "1", "--learning-rate", "1"])
    Path("file.yaml").write_text("epochs: 2\nnum_train_epochs: 2\n")
    with pytest.raises(CommandError, match=r"^file.yaml: epochs and file.yaml: num_train_epochs are two names"):
        train.parse(["--config", "file.yaml"])


def test_no_option_has_the_name_of_an_alias():
    for kind in (train.TrainSettings, LoopSettings, FusedPPOConfig, *train.CONFIGS.values()):
        assert not {*ALIASES} & {field.name for field in fields(kind)}
        assert {*ALIASES.values()} <= {
            field.name for field in (*fields(train.TrainSettings), *fields(train.FusedKTOConfig))
        }


def test_defaults_train_at_once():
    _, config = train.parse(["--model", "m", "--data", "d", "--use_cpu"])
    assert (config.output_dir, config.report_to, config.save_total_limit) == ("runs/kto", [], 1)
    assert train.parse(["--model", "m", "--data", "d", "--use_cpu", "--loss", "dpo"])[1].output_dir == "runs/dpo"
    assert config.eval_strategy == "no"
    assert config.max_length == "auto"


@pytest.mark.parametrize(
    ("flags", "expected"), [([], "epoch"), (["--eval_steps", "5"], "steps"), (["--eval_strategy", "no"], "no")]
)
def test_evaluation_data_turn_evaluation_on(flags, expected):
    _, config = train.parse(["--model", "m", "--data", "d", "--use_cpu", "--eval_data", "e", *flags])
    assert config.eval_strategy == expected


def bf16_alone(self, values):
    """In place of ``FlagParser.build``, whose configuration would look for the GPU."""
    return None, values["bf16"]


@pytest.mark.parametrize(("flags", "expected"), [([], True), (["--fp16"], False), (["--bf16", "false"], False)])
def test_a_gpu_with_bfloat16_computes_in_it(monkeypatch, flags, expected):
    monkeypatch.setattr(train, "is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr(FlagParser, "build", bf16_alone)
    assert train.parse(["--model", "m", "--data", "d", *flags])[1] is expected


def test_a_gpu_that_emulates_bfloat16_computes_in_it_only_if_asked(monkeypatch):
    monkeypatch.setattr(train, "is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(FlagParser, "build", bf16_alone)
    flags = ["--model", "m", "--data", "d"]
    assert [train.parse([*flags, *more])[1] for more in ([], ["--bf16"])] == [False, True]


FILE = """
model: m
data: [a.jsonl, b.jsonl]
loss: dpo
loss_type: simpo
learning_rate: 1e-3
max_length: null
save_strategy: no
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
lora_rank: 4
lora_target_modules: [q_proj]
backend: torch
gamma: 0.25
use_cpu: yes
columns: {prompt: question, chosen: better}
label_true: [up, 1]
"""


FLAGS = [
    *("--model", "m", "--data", "a.jsonl", "b.jsonl", "--loss", "dpo", "--loss_type", "simpo"),
    *("--learning_rate", "1e-3"),
    *("--max_length", "null", "--save_strategy", "no", "--gradient_checkpointing"),
    *("--gradient_checkpointing_kwargs", '{"use_reentrant": false}', "--lora_rank", "4"),
    *("--lora_target_modules", "q_proj", "--backend", "torch", "--gamma", "0.25", "--use_cpu"),
    *("--columns", "prompt=question", "chosen=better", "--label_true", "up", "1"),
]


def options_from(arguments: list[str], recipe: str | None = None) -> list[dict]:
    settings, config = train.parse(arguments, recipe)
    return [vars(settings), config.to_dict()]


def test_a_file_sets_the_same_as_flags():
    Path("file.yaml").write_text(FILE)
    settings, config = train.parse(["--config", "file.yaml"])
    assert options_from(["--config", "file.yaml"]) == options_from(FLAGS)
    assert settings.data == ["a.jsonl", "b.jsonl"]
    assert (config.max_length, config.learning_rate, config.save_strategy) == (None, 1e-3, "no")
    assert config.gradient_checkpointing_kwargs == {"use_reentrant": False}


def parsed(text: str) -> tuple[train.TrainSettings, train.FusedPreferenceConfig]:
    Path("file.yaml").write_text(f"model: m\ndata: d\nuse_cpu: true\n{text}\n")
    return train.parse(["--config", "file.yaml"])


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("{min_lr: 1e-7, num_cycles: 2}", {"min_lr": 1e-7, "num_cycles": 2}),
        ("{a: -1, b: -.5, c: +2.5E+3}", {"a": -1, "b": -0.5, "c": 2500.0}),
        ("{a: true, b: False, c: null, d: ~, e: }", {"a": True, "b": False, "c": None, "d": None, "e": None}),
        (
            "{a: nan, b: inf, c: no, d: 1e999, e: 'null'}",
            {"a": "nan", "b": "inf", "c": "no", "d": "1e999", "e": "null"},
        ),
        ("{a: {b: [1, 1e-2, x, null]}}", {"a": {"b": [1, 0.01, "x", None]}}),
    ],
)
def test_a_mapping_keeps_its_numbers(written, value):
    given = parsed(f"lr_scheduler_kwargs: {written}")[1].lr_scheduler_kwargs
    assert given == value
    assert repr(given) == repr(value)  # equal values may differ in type: 1 == 1.0 == True


def test_a_setting_that_must_be_a_mapping_is_checked():
    """transformers annotates this field with dict[str, bool], and other mappings with dict | str."""
    assert parsed("liger_kernel_config: {fused_linear_cross_entropy: false}")[1].liger_kernel_config == {
        "fused_linear_cross_entropy": False
    }
    with pytest.raises(
        CommandError, match="liger_kernel_config/--liger-kernel-config: invalid JSON mapping value: '3'"
    ):
        parsed("liger_kernel_config: 3")


@pytest.mark.parametrize("null", ["null", "~", "", "Null"])
def test_null_counts_as_not_given(null):
    names = ["ref_model", "run_name", "eval_data", "lora_alpha", "lora_target_modules", "report_to", "loss"]
    names += ["output_dir", "learning_rate", "save_strategy", "bf16", "resume_from_checkpoint"]
    settings, config = parsed("\n".join(f"{name}: {null}" for name in names))
    plain_settings, plain = parsed("")
    assert settings == plain_settings
    for name in ("run_name", "report_to", "output_dir", "learning_rate", "save_strategy", "bf16"):
        assert getattr(config, name) == getattr(plain, name)
    assert config.resume_from_checkpoint is None


@pytest.mark.parametrize("null", ["null", "~", ""])
def test_null_is_no_limit_where_there_is_one_by_default(null):
    config = parsed(f"max_length: {null}\nsave_total_limit: {null}")[1]
    assert (config.max_length, config.save_total_limit) == (None, None)


def test_a_quoted_null_is_a_word():
    assert parsed("run_name: '~'")[1].run_name == "~"


@pytest.mark.parametrize(("written", "value"), [("[none]", []), ("none", []), ("[tensorboard]", ["tensorboard"])])
def test_reports_are_a_name_or_a_list(written, value):
    assert parsed(f"report_to: {written}")[1].report_to == value


def test_modules_are_a_pattern_or_a_list():
    """A single name is a pattern, but the same name in a list is a name."""
    for written, value in (("[attn]", ["attn"]), ("[a, b]", ["a", "b"]), ("[qv]_proj", "[qv]_proj")):
        quoted = written if isinstance(value, list) else f"'{written}'"
        assert parsed(f"optim_target_modules: {quoted}")[1].optim_target_modules == value


def test_flags_override_the_file():
    Path("file.yaml").write_text(FILE)
    over = ["--data", "c.jsonl", "--gamma", "1", "--backend", "null", "--no_disable_dropout"]
    settings, config = train.parse(["--config", "file.yaml", *over])
    assert (settings.data, config.gamma, config.backend, config.disable_dropout) == (["c.jsonl"], 1.0, None, False)


def test_the_files_command_trains(files):
    arguments = command(files, "kto", "--max_steps", "2")[1:]
    settings = {"model": str(files / "model"), "data": str(files / "kto.jsonl"), "max_steps": 2, "output_dir": "yaml"}
    settings |= {"use_cpu": True, "disable_tqdm": True, "learning_rate": 0.01, "per_device_train_batch_size": 4}
    Path("file.yaml").write_text(yaml.safe_dump(settings))
    assert cli.main(["train", "--config", "file.yaml"]) == 0
    assert cli.main(["train", *arguments]) == 0
    assert losses("yaml") == losses("runs/kto")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "file.yaml: 'lerning_rate' is not a setting; did you mean learning_rate?"),
        ("gamma: 1", "file.yaml: 'gamma' is not a setting here: it belongs to --loss dpo"),
        ("xyzzy: red", "file.yaml: 'xyzzy' is not a setting; --help lists all of them"),
        ("label_smoothing_factor: 0.1", "file.yaml: 'label_smoothing_factor' is not a setting"),
        ("config: other.yaml", "file.yaml: 'config' is not a setting"),
        ("max_steps: [1, 2]", "file.yaml: 'max_steps' takes one value, but the file gives the list ['1', '2']"),
        ("data: [a, ~]", "file.yaml: the list of 'data' must not hold null, got ['a', None]"),
        ("max_steps: many", "--max_steps/--max-steps: invalid int value: 'many'"),
        ("loss: fly", "--loss fly is unknown: choose one of kto, dpo"),
        ("beta: 0.1\nloss: kto\nbeta: 0.2", "--config file.yaml is not valid YAML: 'beta' is set 2 times"),
        ("max_steps: 1: 2", "--config file.yaml is not valid YAML: mapping values are not allowed here"),
        ("- a", "--config file.yaml must hold lines of the form 'name: value', but it holds a list"),
        ("", "--config file.yaml must hold lines of the form 'name: value', but it holds nothing"),
    ],
)
def test_an_unusable_file_is_refused(text, message):
    Path("file.yaml").write_text(text)
    with pytest.raises(CommandError, match=re.escape(message)):
        train.parse(["--model", "m", "--data", "d", "--use_cpu", "--config", "file.yaml"])


def yaml_bomb() -> str:
    levels = (f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 10))
    return "\n".join(["a0: &a0 [x, x]", *levels])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (yaml_bomb(), "has more than 2000 values"),
        ("a: &a [*a]\n", "is nested more than 32 deep"),
        ("a: " + "[" * 5000 + "]" * 5000, "is nested more than 32 deep"),
        ("{a: " * 5000, "is nested more than 32 deep"),
        ("a: [" + "1, " * 20000 + "]", "has more than 2000 values"),
        ("beta: 0.1\n" * 10**6, "is longer than 65536 bytes"),
    ],
    ids=["aliases", "an alias of itself", "brackets", "braces", "a long list", "a long file"],
)
def test_a_hostile_config_is_refused_at_once(content, message, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    start = time.process_time()
    with pytest.raises(CommandError, match=f"^--config {re.escape(str(path))} {message}: it must hold the settings"):
        read_settings(str(path))
    assert time.process_time() - start < 1


def test_an_alias_in_a_config_is_replaced_by_its_value(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("lora_target_modules: &names [q_proj, v_proj]\ndata: *names\n")
    assert read_settings(str(path)) == {"lora_target_modules": ["q_proj", "v_proj"], "data": ["q_proj", "v_proj"]}


def test_the_best_model_needs_no_save_strategy_of_its_own():
    flags = ["--model", "m", "--data", "d", "--use_cpu", "--eval_fraction", "0.2", "--load_best_model_at_end"]
    for more, strategy, steps in (([], "epoch", 500), (["--eval_steps", "7"], "steps", 7)):
        config = train.parse([*flags, *more])[1]
        assert (config.eval_strategy, config.save_strategy, config.save_steps) == (strategy, strategy, steps)
    config = train.parse([*flags[:-1], "--eval_steps", "7"])[1]
    assert (config.save_strategy, config.save_steps) == ("steps", 500)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_fraction", "1"], "eval_fraction must lie between 0 and 1, got 1.0"),
        (["--eval_fraction", "0.1", "--eval_data", "e"], "eval_fraction and eval_data are given"),
        (["--columns", "question"], "columns must have the form field=column"),
        (["--label_true", "up", "--label_false", "UP"], "label_true and label_false both name ['up']"),
        (["--chat", "maybe"], "argument --chat: invalid choice"),
    ],
)
def test_wrong_settings_of_the_data_are_refused(flags, message):
    with pytest.raises(CommandError, match=re.escape(message)):
        train.parse(["--model", "m", "--data", "d", "--use_cpu", *flags])
