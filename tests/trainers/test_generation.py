"""Samples are exact draws that depend on seed, round, prompt and number alone; servers give the same ones."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from loop_cases import make_loop
from tiny_training import lora_config, model, tokenizer
from transformers import GenerationConfig, LogitsProcessorList

from kto_fused.data.prompts import Prompt
from kto_fused.trainers.configs import FusedDPOConfig
from kto_fused.trainers.generation import GenerationError, GumbelNoise, ModelGenerator, Sampling, ServerGenerator
from kto_fused.trainers.rounds import read_samples

pytestmark = pytest.mark.usefixtures("own_cache", "small_machine")
PROMPTS = [Prompt(number, "", list(range(3, 4 + number)), None, []) for number in range(6)]
SAMPLING = Sampling(samples=3, max_new_tokens=7, temperature=0.7, batch_size=4, ends=(1,), seed=5, round=2)


def sample(tmp_path, policy=None, prompts=PROMPTS, **changes):
    args = FusedDPOConfig(output_dir=str(tmp_path), use_cpu=True)
    policy = model(max_position_embeddings=64) if policy is None else policy
    return ModelGenerator(tokenizer(), args)(policy, None, prompts, SAMPLING._replace(**changes))


def test_a_sample_depends_on_seed_round_prompt_and_number_alone(tmp_path):
    samples = sample(tmp_path)
    assert [(one.prompt, one.sample) for one in samples] == [(p, s) for p in range(6) for s in range(3)]
    assert len({tuple(one.ids) for one in samples}) > 12
    for batch_size in (1, 18):
        assert sample(tmp_path, batch_size=batch_size) == samples
    assert sample(tmp_path, prompts=[PROMPTS[4], PROMPTS[1]]) == [*samples[3:6], *samples[12:15]]
    for changes in ({"seed": 6}, {"round": 3}):
        assert sample(tmp_path, **changes) != samples
    policy = model(max_position_embeddings=64)
    state = torch.get_rng_state()
    assert sample(tmp_path, policy) == samples
    assert torch.get_rng_state().equal(state), "sampling draws from the training's random numbers"


def test_draws_are_those_of_the_softmax():
    logits, rows = torch.tensor([2.0, 0.0, -1.0, 1.0]), 20_000
    noise = GumbelNoise(list(range(rows)), temperature=0.5, device=torch.device("cpu"))
    drawn = noise(torch.zeros(rows, 1), logits.expand(rows, 4)).argmax(-1)
    expected = (logits / 0.5).softmax(-1)
    shares = drawn.bincount(minlength=4) / rows
    assert (shares - expected).abs().max() < 4 * (0.25 / rows) ** 0.5
    again = noise(torch.zeros(rows, 1), logits.expand(rows, 4)).argmax(-1)
    assert ((drawn == again).float().mean() - (expected**2).sum()).abs() < 0.015, "a row's draws depend on each other"


def test_greedy_samples_are_the_most_likely_tokens(tmp_path):
    policy = model(max_position_embeddings=64)
    for one in sample(tmp_path, policy, samples=1, temperature=0.0):
        ids = list(PROMPTS[one.prompt].ids)
        for token in one.ids:
            assert token == policy(input_ids=torch.tensor([ids])).logits[0, -1].argmax()
            ids.append(token)
        assert one.is_cut == (one.ids[-1] != tokenizer().eos_token_id)
        assert len(one.ids) == 7 or not one.is_cut


def test_the_models_own_generation_settings_change_nothing(tmp_path):
    policy = model(max_position_embeddings=64)
    expected = sample(tmp_path, policy)
    policy.generation_config = GenerationConfig(
        do_sample=True, top_k=2, repetition_penalty=3.0, eos_token_id=9, max_length=9, min_new_tokens=7
    )
    before = policy.generation_config
    assert sample(tmp_path, policy) == expected
    assert policy.generation_config is before


# ---- a server ------------------------------------------------------------------------------------------------------


class StandIn(ThreadingHTTPServer):
    """Answers as a vLLM server does, with the weights that it was told to load."""

    request_queue_size = 64

    def __init__(self, policy, **answers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.policy, self.answers, self.adapters, self.lock = policy, answers, [], threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def complete(self, request):
        noise = GumbelNoise([request["seed"]], request["temperature"], torch.device("cpu"))
        ids = torch.tensor([request["prompt"]])
        with self.lock, torch.no_grad():
            policy = self.policy
            policy.eval()
            generated = policy.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=GenerationConfig(
                    max_new_tokens=request["max_tokens"], eos_token_id=request["stop_token_ids"], pad_token_id=2
                ),
                logits_processor=LogitsProcessorList([noise]),
            )[0, ids.shape[1] :].tolist()
        is_cut = generated[-1] not in request["stop_token_ids"]
        assert request["min_p"] == 0, "the server would take the model's own"
        choice = {"text": "", "token_ids": generated, "finish_reason": "length" if is_cut else "stop"}
        return {"choices": [{**choice, **self.answers}]}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, content, code=200):
        body = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer({"data": [{"id": "the-model"}, *({"id": name} for name, _ in self.server.adapters)]})

    def do_POST(self):
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        if self.path == "/v1/completions":
            known = content["model"] in ("the-model", *(name for name, _ in server.adapters))
            self.answer(server.complete(content) if known else {"error": "no such model"}, 200 if known else 404)
        elif self.path == "/v1/load_lora_adapter":
            from peft import PeftModel

            if content["lora_name"] in (name for name, _ in server.adapters):
                return self.answer({"error": "has already been loaded"}, 400)
            server.adapters.append((content["lora_name"], content["lora_path"]))
            server.policy = PeftModel.from_pretrained(model(max_position_embeddings=64), content["lora_path"])
            self.answer("Success: the adapter was added")


def test_a_server_gives_the_samples_of_the_model_and_follows_its_adapter(tmp_path):
    pytest.importorskip("peft")
    config = lora_config(init_lora_weights=True)
    here = make_loop("dpo", tmp_path / "here", peft_config=config, rounds=2, max_steps=2)
    here.run()
    server = StandIn(model(max_position_embeddings=64))
    there = make_loop(
        "dpo", tmp_path / "there", peft_config=config, rounds=2, max_steps=2, generator=f"{server.address}/v1"
    )
    there.run()
    settings = {"peft_config": config, "max_steps": 2, "generator": server.address}
    make_loop("dpo", tmp_path / "there", rounds=3, **settings).run()
    # as if it were resumed before the samples of its last round
    (tmp_path / "there" / "run.json").write_text(json.dumps({**there.state, "rounds": there.state["rounds"][:2]}))
    make_loop("dpo", tmp_path / "there", rounds=3, **settings).run()
    make_loop("dpo", tmp_path / "other", rounds=2, seed=1, **settings).run()  # has a round-1/checkpoint-2 of its own
    server.shutdown()
    names = [name.rpartition("-")[0] for name, _ in server.adapters]
    assert names == ["round-1-checkpoint-2", "round-2-checkpoint-2", "round-1-checkpoint-2"]
    for number in (1, 2):
        lines = [read_samples(tmp_path / name / f"round-{number}") for name in ("here", "there")]
        assert [line["ids"] for line in lines[0]] == [line["ids"] for line in lines[1]]


def test_a_reload_command_gets_the_checkpoint_and_its_failure_is_told(tmp_path):
    args, server = FusedDPOConfig(output_dir=str(tmp_path), use_cpu=True), StandIn(model(max_position_embeddings=64))
    note = [sys.executable, "-c", f'\'import sys; open(r"{tmp_path}/told", "a").write(sys.argv[1])\'', "{folder}"]
    generator = ServerGenerator(server.address, "start", args, " ".join(note))
    policy = server.policy
    first = generator(policy, None, PROMPTS, SAMPLING)
    assert first == sample(tmp_path, policy)
    for _ in range(2):
        generator(policy, "a/checkpoint-3", PROMPTS[:1], SAMPLING)
    assert (tmp_path / "told").read_text() == "starta/checkpoint-3", "told once for each checkpoint"
    generator.reload_command = f"{sys.executable} -c 'raise SystemExit(\"no room\")' {{folder}}"
    with pytest.raises(GenerationError, match="--reload_command ended with code 1: no room"):
        generator(policy, "b", PROMPTS[:1], SAMPLING)
    generator.reload_command = None
    with pytest.raises(GenerationError, match="cannot be told to serve b: give --reload_command, or train an adapter"):
        generator(policy, "b", PROMPTS[:1], SAMPLING)
    server.answers["finish_reason"] = "abort"
    with pytest.raises(GenerationError, match="ended a sample of prompt 0 by 'abort': expected 'stop' or 'length'"):
        generator(policy, "a/checkpoint-3", PROMPTS[:1], SAMPLING)
    server.answers["token_ids"] = None
    with pytest.raises(GenerationError, match="answers without token_ids"):
        generator(policy, "a/checkpoint-3", PROMPTS[:1], SAMPLING)
    server.shutdown()
    server.server_close()
    for address in (server.address, "http://127.0.0.1:80x"):
        with pytest.raises(GenerationError, match="cannot be reached"):
            ServerGenerator(address, "start", args, None)(policy, None, PROMPTS[:1], SAMPLING)
