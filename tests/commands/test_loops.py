"""``kto-fused spin``, ``online``, ``ppo``: they write their results, resume, and refuse bad input in one sentence."""

# ruff: noqa: E402 (where packages are missing, the skip must come before the imports that need them)

import json
import signal
import sys
from pathlib import Path

import pytest

for package in ("datasets", "accelerate", "matplotlib"):
    pytest.importorskip(package, reason=f"kto-fused online needs {package}")

import torch
from command_runs import read_metrics, refusal
from tiny_training import model, tokenizer
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from kto_fused.commands import cli, report
from kto_fused.trainers import FusedTrainer, judges
from kto_fused.trainers.configs import FusedDPOConfig

pytestmark = pytest.mark.usefixtures("module_cache", "in_a_new_folder", "small_machine")
FEW = ["--use_cpu", "--rounds", "2", "--max_steps", "2", "--max_new_tokens", "6", "--learning_rate", "0.01"]
JUDGE = "judge_of_tests:few_words"
OWN_LOSS = """
from dataclasses import dataclass
import torch
from kto_fused import heads

@dataclass(frozen=True)
class Margin(heads.Head):
    margin: float = 1.0
    group = 2
    def losses(self, logps, counts, ref_logps):
        chosen, rejected = (logps - ref_logps).chunk(2)
        return torch.relu(self.margin - chosen + rejected)
"""


@pytest.fixture(autouse=True)
def judge_module(tmp_path, monkeypatch):
    """A module of judges in the working directory."""
    functions = {
        "few_words": "[-float(len(text.split())) for text in completions]",
        "nan": "[float('nan')] * len(completions)",
        "too_few": "[1.0]",
        "text": "['good'] * len(completions)",
        "one_number": "1.0",
        "fails": "1 / 0",
    }
    text = "".join(f"def {name}(prompt, completions):\n    return {value}\n" for name, value in functions.items())
    (tmp_path / "loss_of_tests.py").write_text(OWN_LOSS)
    (tmp_path / "judge_of_tests.py").write_text(text + "number = 3\n")
    yield
    for name in ("judge_of_tests", "loss_of_tests"):
        sys.modules.pop(name, None)
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


def rounds_of(files, command: str, *more: str) -> list[str]:
    data = ["--model", str(files / "model"), "--data", str(files / "kto.jsonl"), "--prompts", "6"]
    judge = [] if command == "spin" or "--judge" in more else ["--judge", JUDGE]
    return [command, *data, *judge, *FEW, "--disable_tqdm", *more]


@pytest.mark.parametrize(
    ("command", "flags", "logged"),
    [
        ("spin", ["--judge", JUDGE], {"rewards/margins", "rewards/accuracies"}),
        ("online", [], {"rewards/margins", "rewards/accuracies"}),
        ("online", ["--loss", "loss_of_tests:Margin", "--margin", "2.5"], {"rewards/margins", "rewards/accuracies"}),
        ("online", ["--loss", "kto", "--config", "settings.yaml"], {"rewards/margins", "kl"}),
        ("ppo", [], {"clip_fraction", "approx_kl", "value_error", "policy_loss", "entropy"}),
        (
            "ppo",
            ["--advantage", "group", "--lora_rank", "2", "--clip", "[0.2, 0.28]"],
            {"clip_fraction", "approx_kl", "policy_loss", "entropy"},
        ),
    ],
    ids=["spin", "dpo", "own", "kto", "ppo", "group"],
)
def test_a_command_writes_model_metrics_curves_and_samples(files, capsys, command, flags, logged):
    Path("settings.yaml").write_text("samples: 3\nthreshold: prompt_mean\n")
    assert cli.main(rounds_of(files, command, *flags)) == 0
    folder, printed = Path("runs", command), capsys.readouterr().out
    assert printed.splitlines()[0].split()[:2] == ["round", "score"]
    metrics = read_metrics(folder)
    assert [entry["round"] for entry in metrics["rounds"]] == [1, 2]
    assert [step["step"] for step in metrics["steps"]] == [1, 2, 3, 4]
    assert logged <= metrics["steps"][0].keys()
    assert {"score", "kl", "samples", "examples"} <= metrics["rounds"][0].keys()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (folder / "round-2" / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == metrics["rounds"][1]["samples"]
    mean = sum(-len(line["completion"].split()) for line in lines) / len(lines)
    assert metrics["rounds"][1]["score"] == pytest.approx(mean)
    (told,) = (line for line in printed.splitlines() if line.startswith("the samples of round 2 have a mean score of"))
    scores = [metrics["rounds"][number]["score"] for number in (1, 0)]
    assert f"{scores[0]:.3g} by the judge, those of round 1, before training, {scores[1]:.3g}: " in told
    kind = "an adapter of" if "--lora_rank" in flags else "a model with all its weights"
    assert f"{folder} holds {kind}" in printed
    assert "of round 2, the last one." in printed
    assert "The best samples by the judge" in printed
    card, page = (folder / "README.md").read_text(), (folder / "report.html").read_text()
    assert told[1:] in card
    assert "| prompts | kto.jsonl | " in card
    assert str(files) not in card
    assert ("loss Margin(margin=2.5)," in card) == ("--margin" in flags)
    assert len(metrics["samples"]["rows"]) >= 3
    assert all(report.text_of(row["after"]) in page for row in metrics["samples"]["rows"])
    if "--lora_rank" in flags:
        assert (folder / "adapter_config.json").is_file()
        return
    trained = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert any(not torch.equal(tensor, trained[name]) for name, tensor in model().state_dict().items())
    assert not any("critic" in name for name in trained)


def test_ctrl_c_saves_and_the_same_command_continues(files, monkeypatch, capsys):
    arguments = rounds_of(files, "online", "--loss", "orpo", "--lr_scheduler_type", "constant")
    assert cli.main([*arguments, "--output_dir", "whole"]) == 0
    with monkeypatch.context() as patch:
        step, count = FusedTrainer.training_step, []

        def pressing(self, *arguments, **named):
            count.append(0)
            if len(count) == 3:
                signal.raise_signal(signal.SIGINT)
            return step(self, *arguments, **named)

        patch.setattr(FusedTrainer, "training_step", pressing)
        assert cli.main(arguments) == 130
    assert "Stopped in round 2, with a checkpoint" in capsys.readouterr().out
    assert cli.main(arguments) == 2
    assert "already holds run.json of another model or run: add --resume_from_checkpoint" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume_from_checkpoint", "true"]) == 0
    for name in ("steps", "rounds"):
        ours, theirs = (read_metrics(folder)[name] for folder in ("runs/online", "whole"))
        for one, other in zip(ours, theirs, strict=True):
            assert all(one[key] == other[key] for key in other if "second" not in key)
    assert read_metrics(Path("whole"))["config"]["loss_type"] == "orpo"
    weights = [Path(folder, "model.safetensors").read_bytes() for folder in ("runs/online", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("online", ["--judge", "judge_of_tests:nan"], "hold float nan: expected a finite number"),
        ("online", ["--judge", "judge_of_tests:too_few"], "are 1 numbers: expected one for each of 4 completions"),
        ("online", ["--judge", "judge_of_tests:text"], "hold str 'good': expected a finite number"),
        ("online", ["--judge", "judge_of_tests:one_number"], "are float 1.0: expected a list of 4 numbers"),
        ("online", ["--judge", "judge_of_tests:fails"], "--judge judge_of_tests:fails failed: ZeroDivisionError"),
        ("online", ["--judge", "judge_of_tests:number"], "is int 3, expected a function of a prompt"),
        ("online", ["--judge", "no_module:score"], "--judge no_module:score cannot be imported"),
        ("online", ["--judge", "no-such-command now"], "is none of these: the folder or the Hub's name of a reward"),
        ("online", ["--judge", "false"], "--judge false ended with code 1: it printed no reason"),
        ("online", ["--judge", "echo good"], "--judge echo wrote str 'good', expected a line with a list of scores"),
        ("online", ["--samples", "1"], "samples must be at least 2 to compare them, got 1"),
        ("spin", ["--temperature", "0", "--samples", "2"], "temperature is 0, so all 2 samples of a prompt"),
        ("online", ["--temperature", "0"], "--temperature must be more than 0 for online"),
        ("online", ["--judge", "broken:score"], "--judge broken:score cannot be imported: NameError: name 'words'"),
        ("online", ["--judge", "score 'it"], "is no command line: No closing quotation"),
        (
            "online",
            ["--loss", "kto", "--threshold", "high"],
            "must be 'mean', 'prompt_mean' or a number, got 'high'",
        ),
        ("online", ["--generator", "localhost:8000"], "generator must be the http:// address of a server"),
        ("online", ["--reload_command", "true"], "reload_command is given, but there is no server to reload"),
        ("online", ["--max_new_tokens", "2000"], "max_new_tokens=2000 leaves no room for a prompt: max_length is 1024"),
        ("online", ["--prompts", "90"], "prompts=90 are more than the data's 16"),
        ("online", ["--loss", "unknown"], "--loss unknown is unknown"),
        ("online", ["--loss", "ppo"], "--loss ppo is trained by another command: kto-fused ppo --loss_type ppo"),
        ("online", ["--loss", "orpo", "--loss_type", "ipo"], "--loss orpo and --loss_type ipo name different losses"),
        ("online", ["--loss", "orpo", "--threshold", "3"], "--threshold is not a flag here: it belongs to"),
        ("online", ["--label_true", "up"], "--label_true is not a flag here: it belongs to kto-fused spin and train"),
        ("spin", ["--objective_weights", "a=1"], "--objective_weights is not a flag here: it belongs to kto-fused"),
        ("online", ["--resume_from_checkpoint", "true"], "runs/online holds no run.json of a run to continue"),
        ("online", ["--generator", "http://127.0.0.1:9"], "--generator http://127.0.0.1:9/v1/models cannot be reached"),
        ("online", ["--loss", "orpo", "--ref_model", "x"], "ref_model=x is given, but ORPO(beta=0.1, nll_on='complet"),
        ("online", ["--ref_model", "nowhere/at-all"], "ref_model nowhere/at-all cannot be loaded: "),
        ("online", ["--loss_type", "aot", "--gradient_accumulation_steps", "2"], "reads the whole batch, which would"),
        ("ppo", ["--temperature", "0"], "--temperature must be more than 0 for ppo"),
        ("ppo", ["--value_model", "nowhere/at-all"], "value_model nowhere/at-all cannot be loaded: "),
        ("spin", ["--data", "prompts.jsonl"], "prompts.jsonl, line 1: expected an answer beside the prompt"),
        ("spin", ["--data", "none.jsonl"], "--data none.jsonl: no such file or folder"),
        (
            "spin",
            ["--threshold", "1"],
            "--threshold is not a flag here: it belongs to kto-fused online with",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else None,
)
def test_bad_input_is_one_sentence(files, capsys, command, flags, message):
    Path("prompts.jsonl").write_text('{"prompt": "w1 w2"}\n')
    Path("broken.py").write_text("words + 1\n")
    arguments = rounds_of(files, command, *flags)
    assert cli.main(arguments) == 2
    (line,) = (one for one in capsys.readouterr().err.splitlines() if one.startswith(f"kto-fused {command}: "))
    assert message in line
    assert "\n" not in line
    assert len(line) < 500


def test_a_loop_without_a_judge_is_refused_before_anything_heavy_is_done(files, capsys):
    arguments = [part for part in rounds_of(files, "ppo") if part not in ("--judge", JUDGE)]
    assert "--judge must be given: kto-fused ppo learns from its scores" in refusal(capsys, arguments)


def test_help_names_every_flag_of_the_loops(capsys):
    for command in ("spin", "online", "ppo"):
        assert cli.main([command, "--help"]) == 0
        text = capsys.readouterr().out
        for flag in ("data", "rounds", "max_steps", "samples", "max_new_tokens", "temperature", "generator", "judge"):
            assert f"--{flag} " in text


# ---- judges --------------------------------------------------------------------------------------------------------


def test_a_command_judges_through_lines_of_json(tmp_path):
    script = tmp_path / "judge.py"
    script.write_text(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    record = json.loads(line)\n"
        "    print(json.dumps([len(text) + len(record['prompt']) for text in record['completions']]))\n"
    )
    args = FusedDPOConfig(output_dir=str(tmp_path), use_cpu=True)
    judge = judges.judge_of(f"{sys.executable} {script}", args, batch_size=2)
    assert judges.scored(judge, ["ab", "c"], [["x", "xy"], ["", "\u2028"]]) == [[3.0, 4.0], [1.0, 2.0]]


def test_a_reward_model_scores_the_last_token_of_each_completion(tmp_path):
    """Also where the tokenizer pads with the token that ends a completion, which transformers takes for padding."""
    torch.manual_seed(0)
    config = model(max_position_embeddings=64).config
    config.num_labels = 1
    reward = LlamaForSequenceClassification(config).eval()
    reward.save_pretrained(tmp_path / "reward")
    words = tokenizer()
    words.pad_token = words.eos_token
    words.save_pretrained(tmp_path / "reward")
    args = FusedDPOConfig(output_dir=str(tmp_path), use_cpu=True)
    judge = judges.judge_of(str(tmp_path / "reward"), args, batch_size=3)
    prompts, completions = ["w1 w2", " w3"], [[" w4", " w5 w6 w7"], [" w8", ""]]
    scores = judges.scored(judge, prompts, completions)
    for prompt, texts, found in zip(prompts, completions, scores, strict=True):
        for text, score in zip(texts, found, strict=True):
            ids = [*words(prompt + text)["input_ids"], words.eos_token_id]
            hidden = reward.model(torch.tensor([ids])).last_hidden_state[0, -1]
            assert score == pytest.approx(reward.score(hidden).item(), abs=1e-5)
    model(max_position_embeddings=64).save_pretrained(tmp_path / "policy")
    words.save_pretrained(tmp_path / "policy")
    with pytest.raises(judges.JudgeError, match=r"is no reward model: its files lack score\.weight"):
        judges.judge_of(str(tmp_path / "policy"), args, batch_size=3)
