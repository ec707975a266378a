"""The answer to "did it work?": comparisons of held-out rewards, the sentence on them, the page and ``compare``."""

# ruff: noqa: E402 (where packages are missing, the skip must come before the imports that need them)

import json
from pathlib import Path

import pytest
import torch
import transformers

for package in ("datasets", "accelerate", "matplotlib"):
    pytest.importorskip(package, reason=f"kto-fused train needs {package}")

import numpy as np
from command_runs import command, read_metrics
from huggingface_hub import ModelCard
from matplotlib.figure import Figure
from tiny_training import make_trainer

from kto_fused.commands import cli, early, report, results
from kto_fused.metrics import auc, label_accuracy
from kto_fused.trainers import FusedTrainer, held_out
from kto_fused.trainers.base import Rewards

pytestmark = pytest.mark.usefixtures("in_a_new_folder")


def test_the_auc_is_the_share_of_comparisons_won_with_ties_as_halves():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 7, (60,), generator=generator).double()
    desirable = torch.rand(60, generator=generator) < 0.4
    liked, disliked = scores[desirable, None], scores[None, ~desirable]
    expected = ((liked > disliked).double() + (liked == disliked) / 2).mean()
    assert auc(scores, desirable).item() == pytest.approx(expected.item(), abs=1e-12)
    assert auc(torch.zeros(4), torch.tensor([True, True, True, False])).item() == 0.5
    assert auc(torch.tensor([1.0, torch.nan]), torch.tensor([True, False])).isnan()
    right = label_accuracy(torch.tensor([2.0, -1.0, 0.0, -3.0]), torch.tensor([True, True, False, False]))
    assert right.tolist() == [1.0, 0.0, 0.5, 1.0]


def test_the_interval_is_that_of_the_normal_approximation_and_repeatable():
    generator = torch.Generator().manual_seed(1)
    pairs = Rewards(torch.randn(2, 400, generator=generator) + torch.tensor([[0.5], [0.0]]), None)
    share, low, high = held_out.compared(pairs, seed=3, prompts=400)
    assert share == pytest.approx((pairs.rewards[0] > pairs.rewards[1]).double().mean().item())
    error = 1.96 * (share * (1 - share) / 400) ** 0.5
    assert (low, high) == (pytest.approx(share - error, abs=0.01), pytest.approx(share + error, abs=0.01))
    assert held_out.compared(pairs, seed=3, prompts=400) == [share, low, high]
    assert held_out.compared(pairs, seed=3, prompts=held_out.FEWEST_PROMPTS - 1) == [share, None, None]
    labels = torch.arange(400) % 2 == 0
    labelled = Rewards(pairs.rewards[0] + labels, labels)
    share, low, high = held_out.compared(labelled, seed=3, prompts=400)
    assert low < share < high
    assert share == pytest.approx(auc(*labelled).item())
    assert held_out.compared(Rewards(labels.double(), labels), seed=3, prompts=400) == [1.0, None, None]  # no loss
    assert held_out.compared(Rewards(labelled.rewards, labels | True), seed=0, prompts=400) is None  # one label
    assert held_out.compared(Rewards(torch.tensor([[torch.nan], [1.0]]), None), seed=0, prompts=1) is None


@pytest.mark.parametrize("loss", ["kto", "reward"])
def test_a_merged_adapter_gives_the_logits_of_the_adapter_on_its_base(files, module_cache, capsys, loss):
    peft = pytest.importorskip("peft")
    lora = ["--lora_rank", "2", "--max_steps", "2", "--learning_rate", "0.5"]
    assert cli.main(command(files, loss, *lora)) == 0
    assert cli.main(["merge", "--model", f"runs/{loss}", "--to", "merged"]) == 0
    ids = torch.tensor([[5, 6, 7, 8]])
    name = "ForSequenceClassification" if loss == "reward" else "ForCausalLM"
    more = {"num_labels": 1} if loss == "reward" else {}
    with torch.no_grad():
        adapted = getattr(peft, f"AutoPeftModel{name}").from_pretrained(f"runs/{loss}", **more)(input_ids=ids).logits
        merged = getattr(transformers, f"AutoModel{name}").from_pretrained("merged")(input_ids=ids).logits
        base = getattr(transformers, f"AutoModel{name}").from_pretrained(files / "model", **more)(input_ids=ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(merged, base, atol=1e-3)
    assert not Path("merged/adapter_config.json").exists()
    config = json.loads(Path(f"runs/{loss}/adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).is_absolute()
    assert cli.main(["merge", "--model", f"runs/{loss}", "--to", "merged"]) == 2
    assert "is no empty folder" in capsys.readouterr().err
    assert cli.main(["merge", "--model", "merged", "--to", "again"]) == 2
    assert "holds no adapter_config.json" in capsys.readouterr().err


def test_both_models_of_a_chat_answer_each_line_greedily(files, module_cache, capsys, monkeypatch):
    pytest.importorskip("peft")
    assert cli.main(command(files, "kto", "--lora_rank", "2", "--max_steps", "2", "--learning_rate", "0.5")) == 0
    capsys.readouterr()
    lines = iter(["w1 w2 w3", "w4", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    base = str(files / "model")
    assert cli.main(["chat", "--model", "runs/kto", "--compare", base, "--max_new_tokens", "5"]) == 0
    printed = capsys.readouterr().out.splitlines()
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    expected = []
    for line in ("w1 w2 w3", "w4"):
        inputs = tokenizer(line, return_tensors="pt")
        ids = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=5, do_sample=False
        )
        expected.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    places = [number for number, line in enumerate(printed) if line == f"[{base}]"]
    assert [printed[place + 1].strip() for place in places] == [text.strip() for text in expected]
    assert printed.count("[runs/kto]") == 2
    assert cli.main(["chat", "--model", "nothing-here"]) == 2
    assert "nothing-here cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("loss", "flags", "of", "library"),
    [
        ("kto", ["--lora_rank", "2"], "An adapter of `model`", "peft"),
        ("reward", [], "All weights of `model`", "transformers"),
        ("sft", ["--load_best_model_at_end", "--loss_type", "dft"], "All weights of `model`", "transformers"),
    ],
    ids=["kto", "reward", "dft"],
)
def test_the_card_holds_the_runs_figures_and_its_lines_load_the_model(
    files, module_cache, capsys, loss, flags, of, library
):
    if library == "peft":
        pytest.importorskip("peft")
    evaluated = ["--eval_data", str(files / f"{loss}-eval.jsonl"), "--eval_steps", "2", "--save_steps", "2"]
    assert cli.main(command(files, loss, *flags, *evaluated, "--max_steps", "4", "--learning_rate", "0.5")) == 0
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("held-out: "))
    assert ("nats per token" in told) == (loss == "sft" and "dft" not in flags)
    card, metrics = ModelCard.load(f"runs/{loss}/README.md"), read_metrics(f"runs/{loss}")
    if loss != "sft":
        few = f"(over {metrics['data']['eval']['prompts']} prompts: too few for an interval)"
        assert few in told
        assert few in Path(f"runs/{loss}/report.html").read_text()
        assert all(entry["eval_comparisons"][1:] == [None, None] for entry in metrics["evaluations"])
    assert card.data.library_name == library
    assert card.data.pipeline_tag == ("text-classification" if loss == "reward" else "text-generation")
    assert {"kto-fused", metrics["config"]["loss_type"]} <= {*card.data.tags}
    assert of in card.text
    assert f"{told[0].upper()}{told[1:]}" in card.text
    assert f"| train | {loss}.jsonl | 16 | 0 | 0 |" in card.text
    assert f"| eval | {loss}-eval.jsonl | 8 | 0 | 0 |" in card.text
    assert str(files) not in card.text
    step = metrics["model"]["step"]
    first, last = (next(one for one in metrics["evaluations"] if one["step"] == each) for each in (0, step))
    assert f"| loss | {first['eval_loss']:.6g} | {last['eval_loss']:.6g} |" in card.text
    assert "| learning_rate | 0.5 |" in card.text
    assert "| dtype | float32 |" in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    exec(code, loaded := {})
    assert {"model", "tokenizer"} <= loaded.keys()
    assert (loaded["model"].config.num_labels == 1) == (loss == "reward")
    if library == "peft":
        assert "| adapter: r | 2 |" in card.text
        of_checkpoint = ModelCard.load("runs/kto/checkpoint-4/README.md").text
        assert "An adapter of `model`, trained by `FusedKTOTrainer`" in of_checkpoint
        assert "with the loss kto, step 4." in of_checkpoint
        assert 'from_pretrained("runs/kto/checkpoint-4")' in of_checkpoint
        assert str(files) not in of_checkpoint


def test_an_uploaded_card_is_the_runs_own(files, module_cache, monkeypatch):
    cards = []

    def upload(trainer):
        """Do what ``Trainer.push_to_hub`` does before it uploads the output folder."""
        trainer.save_model(_internal_call=True)
        trainer.create_model_card(model_name="mine", tags=["of-a-model"])
        cards.append(ModelCard.load(Path(trainer.args.output_dir) / "README.md"))
        with pytest.raises(TypeError, match="got \\['dataset'\\]"):
            trainer.create_model_card(dataset="mine")

    monkeypatch.setattr(early, "check_upload", lambda *_: None)
    monkeypatch.setattr(FusedTrainer, "init_hf_repo", lambda self, **_: setattr(self, "hub_model_id", "someone/mine"))
    monkeypatch.setattr(FusedTrainer, "push_to_hub", upload)
    flags = ["--push_to_hub", "--lora_rank", "2", "--max_steps", "1", "--save_strategy", "no"]
    assert cli.main(command(files, "dpo", *flags)) == 0
    (card,) = cards
    assert card.data.tags == ["kto-fused", "lora", "of-a-model", "sigmoid"]
    assert card.text.strip().startswith("# mine\n")
    assert 'AutoPeftModelForCausalLM.from_pretrained("someone/mine")' in card.text
    assert "| train | dpo.jsonl | 16 | 0 | 0 |" in card.text
    assert str(files) not in card.content


def test_a_rank_that_saves_nothing_writes_no_card(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    trainer = make_trainer("dpo", tmp_path / "run", peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"]))
    monkeypatch.setattr(type(trainer.args), "should_save", property(lambda self: False))
    trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_the_change_of_the_judges_score_has_an_interval_over_prompts():
    draw = np.random.default_rng(0)
    of_prompts = draw.normal(0, 3, 200)
    first = {number: (of_prompts[number] + draw.normal(0, 0.3, 4)).tolist() for number in range(200)}
    last = {number: (of_prompts[number] + 0.5 + draw.normal(0, 0.3, 4)).tolist() for number in range(200)}
    best = {number: [9.0] for number in range(3)}
    found = held_out.judged([first, best, last], seed=1)
    assert found == held_out.judged([first, best, last], seed=1)
    means = [np.mean(list(of.values())) for of in (first, last)]
    assert (found.first, found.last) == (pytest.approx(means[0]), pytest.approx(means[1]))
    assert (found.best_round, found.best) == (2, 9.0)
    change, low, high = found.change
    assert change == pytest.approx(means[1] - means[0])
    differences = np.array([np.mean(last[number]) - np.mean(first[number]) for number in range(200)])
    error = 1.96 * differences.std() / 200**0.5
    assert (low, high) == (pytest.approx(change - error, abs=0.01), pytest.approx(change + error, abs=0.01))
    wins = [(ours > theirs) + (ours == theirs) / 2 for n in first for ours in last[n] for theirs in first[n]]
    assert found.wins == pytest.approx(np.mean(wins))
    others = {number + 500: scores for number, scores in last.items()}
    _, wide_low, wide_high = held_out.judged([first, others], seed=1).change  # other prompts: their spread counts
    assert wide_low < 0 < wide_high
    assert held_out.judged([first, others], seed=1).wins is None
    assert held_out.judged([first], seed=1) is None
    few = held_out.judged([{number: of[number] for number in range(9)} for of in (first, last)], seed=1)
    assert few.change[1:] == [None, None]
    assert "(over 9 prompts: too few for an interval)" in held_out.sentence({"judged": few._asdict()})
    told = held_out.sentence({"judged": found._asdict()})
    assert told.startswith(f"the samples of round 3 have a mean score of {found.last:.3g} by the judge")
    assert told.endswith("the best round is 2 (9)")


def entries(shares: list[float], name: str = "eval_rewards/auc") -> list[dict]:
    found = []
    for number, share in enumerate(shares):
        comparisons = {held_out.COMPARISONS: [share, share - 0.1, share + 0.1]}
        found.append({"step": 10 * number, "eval_loss": 1 - share, name: share, **comparisons})
    return found


def test_the_sentence_compares_the_saved_model_with_the_start():
    metrics = {"evaluations": entries([0.5, 0.87, 0.6]), "model": {"step": 10}}
    assert held_out.sentence(metrics) == (
        "held-out: liked answers score above disliked ones in 87 % of comparisons (95 % interval 77 % to 97 %), 50 % "
        "before training"
    )
    metrics = {"evaluations": entries([0.5, 0.55], "eval_rewards/accuracies"), "model": {"step": 10}}
    told = held_out.sentence(metrics)
    assert "the chosen answer scores above the rejected one in 55 % of pairs" in told
    assert told.endswith("the interval holds the value before, so these data show no difference")
    assert "95 % interval 45 % to 65 %" in told
    for ends, prompts, said in (
        ([None, None], 6, "over 6 prompts: too few for an interval"),
        ([None, None], 1, "over 1 prompt: too few for an interval"),
        ([None, None], 40, "all resamples of 40 prompts agree, which gives no interval"),
        ([1.0, 1.0], None, "all resamples agree, which gives no interval"),  # of an earlier version
        ([0.996, 1.0], 400, "95 % interval 99.6 % to 100.0 %"),
    ):
        metrics["evaluations"][1][held_out.COMPARISONS] = [1.0, *ends]
        metrics["data"] = {"eval": {} if prompts is None else {"prompts": prompts}}
        assert held_out.sentence(metrics).endswith(f" in 100 % of pairs ({said}), 50 % before training")
    entry = {"step": 2, "eval_loss": 1.25, "eval_mean_token_accuracy": 0.5}
    metrics = {"evaluations": [entry | {"step": 0}, entry], "model": {"step": 2}, "config": {"loss_type": "nll"}}
    assert "the loss is 1.250 nats per token, 1.250 before training" in held_out.sentence(metrics)
    metrics["config"]["loss_type"] = "dft"
    assert "the loss is 1.250, 1.250 before training" in held_out.sentence(metrics)
    for nothing in ({}, {"evaluations": []}, {"evaluations": entries([0.5])}):
        assert held_out.sentence(nothing) is None


def test_a_last_shorter_interval_does_not_bend_the_curve():
    axes = Figure().subplots()
    report.draw_curve(axes, [{"step": step, "loss": step} for step in (1, 10, 20, 30, 32)], "loss")
    line, cross = axes.lines
    assert list(line.get_xdata()) == [1, 10, 20, 30]
    assert (list(cross.get_xdata()), cross.get_marker()) == ([32], "x")
    axes = Figure().subplots()
    report.draw_curve(axes, [{"step": step, "loss": step} for step in (1, 10, 20, 30)], "loss")
    (line,) = axes.lines
    assert list(line.get_xdata()) == [1, 10, 20, 30]


def test_runs_are_compared_from_their_pages_data(capsys):
    for name, share in (("one", 0.7), ("two", 0.9)):
        steps = [{"step": step, "loss": share / step, "grad_norm": 1.0} for step in (1, 5, 10)]
        results.write(f"runs/{name}", {"steps": steps, "evaluations": entries([0.5, share]), "seconds": 2.0})
        page = Path(f"runs/{name}/report.html").read_text()
        assert f"score above disliked ones in {100 * share:.0f} % of comparisons" in page
        assert "http" not in page.replace("data:image", "")  # nothing is loaded from elsewhere
        assert page.count("data:image/svg+xml") == 3  # loss, AUC, gradient norm
    assert cli.main(["compare", "runs/one", "runs/two"]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["one", "two"] in printed
    assert ["loss", "0.07", "0.09"] in printed
    assert Path("compare.html").read_text().count("data:image/svg+xml") == 3
    Path("runs/three").mkdir()
    Path("runs/three/metrics.json").write_text(json.dumps([]))
    for folder, message in (("runs/none", "holds no metrics.json"), ("runs/three", "holds no steps")):
        assert cli.main(["compare", folder]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["compare", "runs/one", "runs/one"]) == 2
