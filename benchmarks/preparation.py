"""Time how records become token ids for KTO: ``python benchmarks/preparation.py 10000 100000 1000000``.

For each number of records it writes a file of JSON lines with about 300 tokens a record and no prompt twice, and calls
``prepare_unpaired`` on it in a new process, once without and once with the cache that the first call wrote. A table
shows the CPU time of all processes in seconds, the wall time, the peak memory of the process that prepares, and the
files' sizes. That memory is counted from the moment when the imports are done; workers of ``--num_proc`` are left out.
Texts come from the feedback that the package brings, and so does the tokenizer; nothing is
downloaded. ``--chat`` makes conversations of the records, which a chat template renders.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

TOKENS = 300
PROMPT_TOKENS = 100
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer(folder: Path) -> None:
    from kto_fused.commands.demo import small_llama
    from kto_fused.preference_data import BUNDLED, load

    tokenizer, _ = small_llama(load(BUNDLED))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def write_records(file: Path, count: int, tokenizer: Any, is_chat: bool) -> None:
    """Write records whose prompts and completions are sentences of the bundled feedback in a random order."""
    from kto_fused.preference_data import BUNDLED, load

    texts = {text for record in load(BUNDLED) for text in (record["prompt"], record["completion"])}
    sentences = sorted({sentence for text in texts for sentence in text.split(". ") if sentence.strip()})
    lengths = list(map(len, tokenizer([f"{sentence}. " for sentence in sentences])["input_ids"]))
    choices, draw = list(zip(sentences, lengths, strict=True)), random.Random(0)

    def text_of(tokens: int) -> str:
        parts, left = [], tokens
        while left > 0:
            sentence, length = draw.choice(choices)
            parts.append(sentence)
            left -= length
        return ". ".join(parts)

    with file.open("w", encoding="utf-8") as lines:
        for number in range(count):
            prompt, completion = f"{number}: {text_of(PROMPT_TOKENS)}", text_of(TOKENS - PROMPT_TOKENS)
            record: dict[str, Any] = {"prompt": prompt, "completion": completion, "label": draw.random() < 0.5}
            if is_chat:
                record["prompt"] = [{"role": "user", "content": prompt}]
                record["completion"] = [{"role": "assistant", "content": completion}]
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")


class Cost(NamedTuple):
    """What one preparation took. Bytes are the process's peak minus what it held once its imports were done."""

    examples: int
    tokens_per_example: float
    cpu_seconds: float
    seconds: float
    peak_bytes: int  # in RAM, with pages of the files that it reads; the system drops them where memory is short
    own_peak_bytes: int  # of these, what the process allocated itself


def resident() -> tuple[int, int]:
    """Return the bytes that this process has in RAM, and how many of them it allocated, without mapped files."""
    found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(found[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))


def prepare(file: Path, folder: Path, num_proc: int | None, results: Any) -> None:
    """Run in a process of its own: prepare the records of ``file``, and send what it took."""
    from transformers import AutoTokenizer

    from kto_fused import log
    from kto_fused.preference_data import prepare_unpaired

    log.show()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer("warm")
    before, peaks, is_done = resident(), [0, 0], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.05):
            peaks[:] = map(max, peaks, resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start, cpu_start = time.perf_counter(), os.times()
    dataset = prepare_unpaired(str(file), tokenizer, num_proc=num_proc).dataset
    seconds, cpu = time.perf_counter() - start, os.times()
    is_done.set()
    watcher.join()
    length = sum(sum(batch["length"]) for batch in dataset.select_columns("length").iter(10_000)) / len(dataset)
    cpu_seconds = sum(cpu[:4]) - sum(cpu_start[:4])
    results.put(Cost(len(dataset), length, cpu_seconds, seconds, *(p - b for p, b in zip(peaks, before, strict=True))))


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def measure(count: int, folder: Path, settings: argparse.Namespace) -> list[str]:
    """Return the rows of the table for one number of records: the first preparation, and one from the cache."""
    from transformers import AutoTokenizer

    file, cache = folder / f"{count}.jsonl", folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    write_records(file, count, AutoTokenizer.from_pretrained(folder / "tokenizer"), settings.chat)
    os.environ["HF_DATASETS_CACHE"] = str(cache)
    context, rows = multiprocessing.get_context("spawn"), []
    for what in ("first", "from the cache"):
        results = context.Queue()
        process = context.Process(target=prepare, args=(file, folder, settings.num_proc, results))
        process.start()
        cost = results.get()
        process.join()
        cells = (
            f"{cost.examples:,}",
            what,
            f"{cost.tokens_per_example:.0f}",
            f"{cost.cpu_seconds:.1f}",
            f"{1e3 * cost.cpu_seconds / count:.2f}",
            f"{cost.seconds:.1f}",
            f"{cost.own_peak_bytes / 2**20:.0f}",
            f"{cost.peak_bytes / 2**20:.0f}",
            f"{file.stat().st_size / 2**20:,.0f}",
            f"{size_of(cache) / 2**20:,.0f}",
        )
        rows.append(f"| {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    file.unlink()
    shutil.rmtree(cache, ignore_errors=True)
    return rows


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("counts", nargs="+", type=int, help="numbers of records")
    flags.add_argument("--chat", action="store_true", help="make conversations of the records")
    flags.add_argument("--num_proc", type=int, help="processes that tokenize; this one if not given")
    flags.add_argument("--folder", type=Path, default=Path("runs/preparation"), help="for the files, removed again")
    settings = flags.parse_args()
    settings.folder.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # seconds of CPU time then are those of one core's work
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    make_tokenizer(settings.folder / "tokenizer")
    table = [
        "| records | run | tokens each | CPU s | CPU ms a record | wall s | own MiB | with mapped files, MiB "
        "| file MiB | cache MiB |",
        "|" + "---:|" * 10,
    ]
    print("\n".join(table))
    table += [row for count in settings.counts for row in measure(count, settings.folder.absolute(), settings)]
    (settings.folder / "table.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
