"""A chat template that exceeds a limit of time, memory or output is an error that names the row."""

# ruff: noqa: E402 (the imports below need datasets)

import os
import time

import pytest

datasets = pytest.importorskip("datasets", reason="datasets is not installed: there is no data to prepare")

from data_cases import FORMS, one_token_a_word
from datasets import Dataset

from kto_fused.data import rendering
from kto_fused.preference_data import DataError, prepare_paired, prepare_unpaired

pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="limits need fork, which every GPU machine has"),
]
LOOP, END = "{% for i in range(99999) %}", "{% endfor %}"
FOR_EVER = 3 * LOOP + 3 * END
DOUBLING = "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"
RUNAWAYS = {
    "loops": (FOR_EVER, "did not end within 0.5 seconds"),
    "recursion": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion"),
    "multiplication": ("{{ 'x' * 10 ** 11 }}", "needs more than 0.125 GiB of memory"),
    "lists": ("{{ [0] * 10 ** 10 }}", "needs more than 0.125 GiB of memory"),
    "widths": ("{{ 'x'.ljust(10 ** 11) }}{{ '%100000000000d' % 1 }}", "needs more than 0.125 GiB of memory"),
    "doubling": (DOUBLING, "needs more than 0.125 GiB of memory"),
    "powers": ("{{ 10 ** (10 ** 10 * messages | length) }}", "did not end within 0.5 seconds"),
    "output": ("{{ 'x' * 2990 }}", "writes 3,000 characters, more than the 2,000 that are taken"),
}


@pytest.fixture
def small_limits(monkeypatch):
    monkeypatch.setattr(rendering, "RENDER_BYTES", 2**27)
    monkeypatch.setattr(rendering, "RENDER_CHARACTERS", 2000)


@pytest.mark.parametrize("runaway", RUNAWAYS)
def test_a_template_that_runs_away_is_an_error_with_its_row(runaway, small_limits, monkeypatch):
    template, reason = RUNAWAYS[runaway]
    if "seconds" in reason:
        monkeypatch.setattr(rendering, "RENDER_SECONDS", 0.5)
    template = "{% if messages[0].content == 'green blue' %}" + template + "{% endif %}{{ messages[0].content }}"
    tokenizer = one_token_a_word(chat_template=template)
    begun = time.monotonic()
    with pytest.raises(DataError, match=rf"^eval data, row 1: the chat template does not render it: .*{reason}"):
        prepare_paired(Dataset.from_list(FORMS["paired conversations"]), tokenizer, name="eval")
    assert time.monotonic() - begun < 2 * rendering.RENDER_SECONDS + 5


def test_a_template_that_runs_away_ends_in_worker_processes_too(monkeypatch):
    monkeypatch.setattr(rendering, "RENDER_SECONDS", 0.5)
    tokenizer = one_token_a_word(chat_template=FOR_EVER)
    with pytest.raises(DataError, match=r"did not end within 0\.5 seconds"):
        prepare_unpaired(Dataset.from_list(FORMS["unpaired conversations"]), tokenizer, num_proc=2)


def test_the_rendering_process_ends_with_the_rendering():
    with rendering.Renderer(one_token_a_word(), "train") as render:
        assert render(0, [{"role": "user", "content": "red"}], add_generation_prompt=True).text == (
            "<user> red </s> <assistant>"
        )
        process = render._process
        os.kill(process, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_rendering_process_that_dies_is_an_error(monkeypatch):
    monkeypatch.setattr(rendering, "_render", lambda *_, **__: os._exit(9))
    with (
        rendering.Renderer(one_token_a_word(), "train") as render,
        pytest.raises(DataError, match=r"^train data, row 7: the chat template does not render it: its process died"),
    ):
        render(7, [{"role": "user", "content": "red"}])


def test_a_long_honest_conversation_is_rendered():
    """It has two million characters in 2,000 messages."""
    messages = [{"role": ("user", "assistant")[turn % 2], "content": "red " * 250} for turn in range(2000)]
    with rendering.Renderer(one_token_a_word(), "train") as render:
        assert len(render(0, messages).text) > 2_000_000


def test_records_that_are_sent_together_keep_their_order_and_name_the_one_that_fails():
    """There are more records than are sent at once, and one of them is longer than all that is sent at once."""
    template = "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    conversations = [[{"role": "user", "content": f"record {row}"}] for row in range(250)]
    conversations[120][0]["content"] = "x" * 1_100_000
    with rendering.Renderer(one_token_a_word(chat_template=template), "train") as render:
        rendered = render.all(range(250), conversations)
        assert [one.text for one in rendered] == [messages[0]["content"] for messages in conversations]
        conversations[207][0]["content"] = "bad"
        with pytest.raises(DataError, match=r"^train data, row 1207: the chat template does not render it: no$"):
            render.all(range(1000, 1250), conversations)
        assert render(0, conversations[3]).text == "record 3"  # not a result that was left in the pipe
        assert render.all([], []) == []
