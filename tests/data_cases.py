"""Records and tokenizers for the tests of ``kto_fused.data``."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kto_fused.preference_data import BUNDLED

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ["<unk>", "</s>", "<user>", "<assistant>", "red", "green", "blue", "one", "two", "three", "four"]


def one_token_a_word(vocabulary=tuple(WORDS), **settings) -> PreTrainedTokenizerFast:
    """Return a tokenizer that turns every word of ``vocabulary`` into one token."""
    ids = {word: number for number, word in enumerate(vocabulary)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    settings = {"eos_token": "</s>", "pad_token": "</s>", "chat_template": TEMPLATE} | settings
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **settings)


def byte_pair_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer like Llama's: it merges bytes, and begins every text with a token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "</s>", "<user>", "<assistant>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(BUNDLED.read_text(encoding="utf-8").split("\n"), trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
    )


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def conversation(record: dict) -> dict:
    """Return the same record as a conversation."""
    roles = dict.fromkeys(record, "assistant") | {"prompt": "user"}
    return {
        field: value if field == "label" else [{"role": roles[field], "content": value}]
        for field, value in record.items()
    }


UNPAIRED = [
    {"prompt": "red", "completion": " one two", "label": True},
    {"prompt": "green blue", "completion": " three", "label": False},
    {"prompt": "", "completion": " four", "label": True},
]
PAIRED = [
    {"prompt": "red", "chosen": " one two", "rejected": " three"},
    {"prompt": "green blue", "chosen": " four", "rejected": " one two three"},
]
COMPLETIONS = [{"prompt": record["prompt"], "completion": record["completion"]} for record in UNPAIRED]
WITH_MARGINS = [record | {"margin": margin} for record, margin in zip(PAIRED, (0.5, 2.0), strict=True)]
MESSAGES = [
    {
        "messages": [
            {"role": "user", "content": "red"},
            {"role": "assistant", "content": "one two"},
            {"role": "user", "content": "green"},
            {"role": "assistant", "content": "three"},
        ]
    },
    {"messages": [{"role": "user", "content": "blue"}, {"role": "assistant", "content": "four"}]},
]
TEXTS = [{"text": "red one two"}, {"text": "blue four"}]
FORMS = {
    "unpaired": UNPAIRED,
    "paired": PAIRED,
    "unpaired conversations": [conversation(record) for record in UNPAIRED],
    "paired conversations": [conversation(record) for record in PAIRED],
}


def write(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
