"""The documentation is true: its examples run, and its lists, messages and figures are those of the package.

It covers the docstrings, the README and the pages in docs/.
"""

import ast
import doctest
import importlib
import importlib.util
import json
import pkgutil
import re
import shlex
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest
from cases import ON_HOPPER

import kto_fused
from kto_fused import heads
from kto_fused.heads import preference

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
MEASUREMENTS = PAGES["measurements.md"]
MODULES = ["kto_fused", *(module.name for module in pkgutil.walk_packages(kto_fused.__path__, "kto_fused."))]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    if name == "kto_fused.integrations.trl":
        pytest.importorskip("trl", reason="TRL is not installed: its integration cannot be imported")
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


@pytest.mark.parametrize("name", [name for name in kto_fused.__all__ if name != "reference"])
def test_every_public_name_has_an_example(name):
    finder = doctest.DocTestFinder(recurse=True)
    tests = finder.find(getattr(kto_fused, name), name, module=False)
    assert any(test.examples for test in tests)


@pytest.mark.parametrize(
    ("function", "formulas", "loss_types"),
    [
        (kto_fused.fused_kto_loss, preference.kto_losses, preference.KTO_LOSS_TYPES),
        (kto_fused.fused_dpo_loss, preference.dpo_losses, preference.DPO_LOSS_TYPES),
    ],
)
def test_help_has_each_losss_formula_and_source(function, formulas, loss_types):
    listed = re.findall(r"^ {8}(\w+) {2,}\S", function.__doc__, re.MULTILINE)
    assert tuple(listed) == loss_types
    papers = [set(re.findall(r"\d{4}\.\d{5}", text.__doc__)) for text in (function, formulas)]
    assert papers[0] == papers[1]


@pytest.fixture
def users_folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with the files that the pages name: a model and two files of feedback."""
    for package in ("accelerate", "datasets", "trl"):
        pytest.importorskip(package, reason=f"the pages' code needs {package}")
    import tiny_training  # imports these packages

    tiny_training.tokenizer().save_pretrained(tmp_path / "my-model")
    tiny_training.model(vocab_size=1000).save_pretrained(tmp_path / "my-model")
    unpaired = [{"prompt": f"{i} ", "completion": "good", "label": i % 2 == 0} for i in range(12)]
    pairs = [{"prompt": f"{i} ", "chosen": "good", "rejected": "bad"} for i in range(12)]
    for name, records in (("feedback.jsonl", unpaired), ("pairs.jsonl", pairs)):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_blocks(text: str, name: str) -> int:
    """Run a text's Python blocks in one namespace; returns the number of blocks."""
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)
    return len(blocks)


def test_the_readmes_code_runs(users_folder):
    """Each section runs by itself."""
    assert sum(run_blocks(section, "README.md") for section in README.split("\n## ")) >= 3


@pytest.mark.parametrize("name", [name for name, text in PAGES.items() if "```python" in text])
def test_a_pages_code_runs(users_folder, name):
    assert run_blocks(PAGES[name], name) >= 1


def test_the_json_records_of_the_data_page_are_read(tmp_path):
    preference_data = pytest.importorskip("kto_fused.preference_data", reason="reading records needs datasets")
    records = re.findall(r"```json\n(.*?)```", PAGES["data.md"], re.DOTALL)
    assert len(records) == 12
    for number, record in enumerate(records):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(record)
        assert len(preference_data.load(str(path))) == 1


def strings(tree: ast.AST) -> list[str]:
    """The string literals of a module; ``...`` stands for each value that is formatted into one."""

    def content(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(map(content, node.values))
        if isinstance(node, ast.BinOp):
            return content(node.left) + content(node.right)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "..."

    return [content(node) for node in ast.walk(tree) if isinstance(node, (ast.BinOp, ast.Constant, ast.JoinedStr))]


def test_the_messages_of_the_troubleshooting_page_are_the_packages():
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "kto_fused").rglob("*.py"))
    messages = "\n".join(string for source in sources for string in strings(ast.parse(source)))
    symptoms = [row.split(" | ")[0] for row in PAGES["troubleshooting.md"].splitlines() if row.startswith("| `")]
    quoted = [quote for symptom in symptoms for quote in re.findall(r"`([^`]+)`", symptom) if " " in quote]
    assert len(quoted) > 20
    missing = [quote for quote in quoted if any(part not in messages for part in quote.split("..."))]
    assert not missing


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for name in PAGES:
        assert f": {name}\n" in navigation
    for folder, text in [(ROOT, README), *((ROOT / "docs", text) for text in PAGES.values())]:
        for target in re.findall(r"\]\(([^)#]+)", text):
            assert target.startswith("https://") or (folder / target).exists(), target


def table_of(text: str, header: str) -> list[str]:
    """The rows of the table with this header."""
    table = text.split(f"\n{header}\n")[1].split("\n\n")[0]
    return table.splitlines()[1:]  # the first line separates header and rows


def test_the_readmes_table_has_the_public_names_and_no_others():
    first_cells = [row.split(" | ")[0] for row in table_of(README, "| | takes | gives |")]
    names = re.findall(r"`([\w.]+)", " ".join(first_cells))
    of_huggingface = [f"huggingface.{name}" for name in ("apply", "apply_to_logits", "attach")]
    assert sorted(names) == sorted([*kto_fused.__all__, *of_huggingface])


def docs_script(name: str):
    """The module of a script in docs/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_catalogue_is_the_registrys():
    catalogue = docs_script("catalogue")
    page = catalogue.PAGE.read_text(encoding="utf-8")
    assert catalogue.with_table(page) == page, "run python docs/catalogue.py"
    listed = {name for losses in catalogue.TRL_TRAINERS.values() for name in losses}
    assert listed <= set(heads.names())


def test_every_version_of_trl_that_fuse_knows_was_tested_or_is_named():
    pytest.importorskip("trl", reason="TRL is not installed: its integration cannot be imported")
    from kto_fused.integrations.trl import TRL_VERSIONS

    header = "| TRL | KTO | DPO | GRPO | CPO | ORPO | tests passed | skipped | failed |"
    rows = [row.strip("| ").split(" | ") for row in table_of(PAGES["trl.md"], header)]
    assert all(int(row[-3]) > 100 and int(row[-1]) == 0 for row in rows)
    untested = re.search(r"^Not run as a whole yet: ([\d., ]+)\.$", PAGES["trl.md"], re.MULTILINE)
    named = untested[1].split(", ") if untested else []
    versions = [".".join(map(str, version)) for version in TRL_VERSIONS]
    assert sorted([row[0].rsplit(".", 1)[0] for row in rows] + named) == sorted(versions)


def test_the_readme_lists_the_loss_types():
    kto, dpo = re.search(r"- KTO `loss_type`: (.*?)\. DPO: (.*?)\. `help", README, re.DOTALL).groups()
    assert tuple(re.findall(r"`(\w+)`", kto)) == preference.KTO_LOSS_TYPES
    assert tuple(re.findall(r"`(\w+)`", dpo)) == preference.DPO_LOSS_TYPES


# ---- the methods ----------------------------------------------------------------------------------------------------

NO_METHODS = ("Files to try them on", "Rounds of generation", "Measured on the toy files")
METHODS = {
    section.partition("\n")[0]: section
    for section in PAGES["methods.md"].split("\n## ")[1:]
    if section.partition("\n")[0] not in NO_METHODS
}
OTHER_PROGRAMS = {"--enable-lora", "--max-lora-rank", "--run"}  # flags of vLLM and of method_curves.py


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_formula_source_use_data_command_and_curves(method):
    section = METHODS[method]
    assert "- **Formula**: [" in section or "\n```\n" in section
    assert re.search(r"- \*\*Sources?\*\*:[^*]*\(https://arxiv\.org/abs/", section)
    for part in ("When", "Data", "Command"):
        assert f"- **{part}**: " in section
    (command,) = re.findall(r"```bash\nkto-fused [^`]*--output_dir runs/([\w-]+)\n```", section)
    (picture,) = re.findall(r"!\[.+\]\((.+)\)", section)
    assert picture == f"curves/{command}.png"
    content = (ROOT / "docs" / picture).read_bytes()
    assert int.from_bytes(content[16:20], "big") == 700  # pixels of width, by the header of a PNG
    assert len(content) < 45_000


def test_the_measured_methods_are_the_pages():
    curves = docs_script("method_curves")
    page = PAGES["methods.md"]
    results = json.loads(curves.RESULTS.read_text(encoding="utf-8"))
    assert curves.commands(page).keys() == curves.METHODS.keys() == results["methods"].keys()
    assert len(curves.METHODS) == len(METHODS)
    assert curves.with_table(page, results) == page, "run python docs/method_curves.py"


def test_the_pages_commands_and_flags_are_the_programs(capsys):
    for package in ("accelerate", "datasets"):
        pytest.importorskip(package, reason=f"kto-fused train needs {package}")
    from kto_fused.commands import cli, loops, train

    parsed = 0
    for block in re.findall(r"```bash\n(.*?)```", "\n".join([README, *PAGES.values()]), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if not line.startswith("kto-fused "):
                continue
            command, *arguments = shlex.split(line, comments=True)[1:]
            if "my_losses:MyLoss" in arguments or "--help" in arguments:
                continue
            if command == "train" or command in train.CONFIGS:
                train.parse(arguments, None if command == "train" else command)
                parsed += 1
            elif command in loops.LOOPS:
                loops.parse(command, arguments)
                parsed += 1
    assert parsed > len(METHODS)
    for arguments in (
        *(["train", "--loss", name] for name in train.CONFIGS),
        *([name] for name in loops.LOOPS),
        ["online", "--loss", "kto"],
    ):
        with pytest.raises(SystemExit):
            cli.main([*arguments, "--help-all"])
    known = set(re.findall(r"--[a-z_]+", capsys.readouterr().out))
    inline = " ".join(re.findall(r"`([^`\n]+)`", PAGES["methods.md"]))
    named = set(re.findall(r"--[a-z][\w-]*", inline))
    assert len(named) > 20
    assert named - known <= OTHER_PROGRAMS


# ---- tables of measurements; the functions return the header first --------------------------------------------------


def results(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def from_logits_on_a_cpu() -> list[str]:
    size = "B=4 T=256 V=32000 float32"
    rows = [row for row in results("cpu.json")["rows"] if (row["loss"], row["size"]) == ("kto", size)]
    return [
        "| KTO forward + backward | ms | peak MiB, gradient included | worst error of a sequence's log-prob, nats |",
        *(
            f"| {row['contender']} | {row['forward_ms'] + row['backward_ms']:.1f} | {row['peak_mib']:.0f} "
            f"| {row['logp_error']:.0e} |"
            for row in rows
        ),
    ]


def from_hidden_states_on_a_cpu() -> list[str]:
    rows = [row for row in results("cpu-hidden.json")["rows"] if row["size"].startswith("medium head")]
    cases = {
        case: {row["contender"]: row for row in rows if row["case"] == case} for case in ("kto trained", "kto frozen")
    }
    lines = ["| KTO, ms (x GEMMs) | head trained | peak MiB | head frozen | peak MiB |"]
    for name, trained in cases["kto trained"].items():
        frozen = cases["kto frozen"].pop(name)
        ms = [f"{row['ms']:.0f} ({row['times_gemms']:.2f})" for row in (trained, frozen)]
        peaks = ["-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}" for row in (trained, frozen)]
        lines.append(f"| {name} | {ms[0]} | {peaks[0]} | {ms[1]} | {peaks[1]} |")
    assert not cases["kto frozen"]
    return lines


def losses_from_hidden_states_on_a_cpu() -> list[str]:
    rows = [row for row in results("cpu-hidden.json")["rows"] if row["size"].startswith("medium head")]
    losses = ("kto", "dpo", "orpo", "nll", "ppo", "ppo-clipped")
    lines = ["| head trained, ms (x GEMMs) | KTO | DPO | ORPO | SFT | PPO | PPO, a quarter clipped |"]
    for name in ("kto-fused", "eager", "TRL", "Liger", "Liger, compiled", "GEMMs alone"):
        found = {row["case"].split()[0]: row for row in rows if row["contender"] == name and "trained" in row["case"]}
        cells = [f"{found[x]['ms']:.0f} ({found[x]['times_gemms']:.2f})" if x in found else "-" for x in losses]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def long_sequences_on_a_cpu() -> list[str]:
    rows = [row for row in results("cpu-hidden.json")["rows"] if row["size"].startswith("long sequences")]
    times = {(row["case"], row["contender"]): row for row in rows}
    title = "2 sequences of 4096 completion tokens, chunks of 1024"
    lines = [f"| {title} | GEMMs alone, ms | kto-fused, ms (x GEMMs) | peak MiB |"]
    for loss, name in (("kto", "KTO"), ("dpo", "DPO"), ("nll", "SFT")):
        gemms, ours = times[f"{loss} trained", "GEMMs alone"], times[f"{loss} trained", "kto-fused"]
        lines.append(
            f"| {name} | {gemms['ms']:.0f} | {ours['ms']:.0f} ({ours['times_gemms']:.2f}) | {ours['peak_mib']:.0f} |"
        )
    return lines


METHOD_NAMES = {"simpo": "SimPO", "dft": "SFT, dft", "reward": "reward model", "online-dpo": "online DPO"}


def by_method(head: str, cells: dict[tuple[str, str], str]) -> list[str]:
    """A line per method, a column per contender."""
    contenders = list(dict.fromkeys(contender for _, contender in cells))
    lines = [f"| {head} | {' | '.join(contenders)} |"]
    for method in dict.fromkeys(method for method, _ in cells):
        found = (cells.get((method, contender), "-") for contender in contenders)
        lines.append(f"| {METHOD_NAMES.get(method, method.upper())} | {' | '.join(found)} |")
    return lines


def training_steps_on_a_cpu() -> list[str]:
    rows = results("cpu-training.json")["rows"]
    cells = {(row["loss"], row["contender"]): f"{row['ms']:.0f} / {row['peak_mib']:.0f}" for row in rows}
    return by_method("ms / peak MiB", cells)


def longest_sequences_on_a_cpu() -> list[str]:
    report = results("cpu-training.json")
    cells = {}
    for row in report["longest"]:
        bound = "at least " if row["seq_len"] == report["longest_tried"] else ""
        cells[row["loss"], row["contender"]] = f"{bound}{row['seq_len']}"
    return by_method("longest, tokens", cells)


def adapters_on_a_cpu() -> list[str]:
    lines = ["| ms / allocated / resident, MiB | without gradient checkpointing | with it |"]
    rows = results("cpu-adapters.json")["rows"]
    for contender in dict.fromkeys(row["contender"] for row in rows):
        without, checkpointed = (
            f"{row['ms']:.0f} / {row['peak_mib']:.0f} / {row['resident_mib']:.0f}"
            for row in sorted(rows, key=lambda row: row["checkpointing"])
            if row["contender"] == contender
        )
        lines.append(f"| {contender} | {without} | {checkpointed} |")
    return lines


def from_logits_on_a_gpu() -> list[str]:
    """A line per vocabulary. The page leaves out `reference`, and in place, which is as fast as out of place."""
    rows = results("nvidia-h200.json")["rows"]
    rows = [row for row in rows if row["loss"] == "kto" and "T=2048" in row["size"] and "bf" in row["size"]]
    lines = ["| V | forward GB/s | backward GB/s | kto-fused ms | eager ms | torch.compile ms | TRL kernel ms |"]
    for vocab in sorted({row["vocab"] for row in rows}):
        by_name = {row["contender"]: row for row in rows if row["vocab"] == vocab}
        ours = by_name["kto-fused"]
        others = ("eager log_softmax", "torch.compile of eager", "TRL kernel")
        ms = [f"{row['forward_ms'] + row['backward_ms']:.2f}" for row in (ours, *(by_name[name] for name in others))]
        lines.append(f"| {vocab} | {ours['forward_gb_s']:.0f} | {ours['backward_gb_s']:.0f} | {' | '.join(ms)} |")
    return lines


def one_digit_less(cell: str) -> str:
    """Round each decimal fraction in a cell to one digit less."""
    return re.sub(r"\d+\.\d+", lambda x: str(Decimal(x[0]).quantize(Decimal(x[0][:-1]), ROUND_HALF_UP)), cell)


def from_hidden_states_in_turns_on_a_gpu() -> list[str]:
    """A line per LM head and length, with the default `chunk_bytes`.

    At H=896 and T=2048 the default now makes the chunks that half of it made when this was measured, and twice the
    default makes the chunks that the default made. The lines follow the chunks.
    """
    case = r"kto (trained|frozen), (.+): B=8 T=(\d+) H=(\d+) V=(\d+) bfloat16(.*)"
    step = r"([\d.]+ \([\d.]+\) \| \d+)"
    text = (RESULTS / "nvidia-h200-tune.md").read_text(encoding="utf-8")
    trained, frozen = {}, {}  # by size: cells of GEMMs alone, of 1 GiB chunks, of 512 MiB chunks
    for head, *size, gemms, whole, half in re.findall(rf"^\| {case} \| ([\d.]+) \| {step} \| {step} \|$", text, re.M):
        by_size = trained if head == "trained" else frozen
        by_size[tuple(size)] = [one_digit_less(cell) for cell in (gemms, whole, half)]
    assert len(trained) + len(frozen) == text.count("\n| kto ")  # every row was matched

    lines = []
    for size in sorted(trained, key=lambda size: (int(size[1]), int(size[2]), int(size[3]), size[4])):
        name, seq_len, hidden, vocab, softcap = size
        gemms, whole, half = trained[size]
        both, of_frozen = gemms, "|"
        if size in frozen:
            gemms_of_frozen, of_frozen, _ = frozen.pop(size)
            both = f"{gemms}, {gemms_of_frozen}"
        was_halved = (hidden, seq_len) == ("896", "2048")
        capped = ", soft cap" if softcap else ""
        ours = half if was_halved else whole
        lines.append(f"| {name} ({hidden}, {vocab}){capped}, {seq_len} | {both} | {ours} | {of_frozen} |")
        if was_halved:
            lines.append(f"| the same, `chunk_bytes=2**31` | {gemms} | {whole} | | |")
    assert not frozen
    header = (
        "| head (H, V), T | GEMMs alone, ms | head trained, ms (x GEMMs) | peak MiB | head frozen, ms (x GEMMs) "
        "| peak MiB |"
    )
    return [header, *lines]


def of_one_case(size: str, case: str = "kto trained") -> dict[str, dict]:
    """The rows of one case, by contender."""
    rows = results("nvidia-h200-hidden.json")["rows"]
    return {row["contender"]: row for row in rows if (row["case"], row["size"]) == (case, size)}


def from_hidden_states_on_a_gpu() -> list[str]:
    """A line per LM head. Compiled contenders, measured for two heads only, are left out."""
    rows = [row for row in results("nvidia-h200-hidden.json")["rows"] if "T=2048" in row["size"]]
    names = ("kto-fused", "TRL", "cut-cross-entropy", "Liger", "eager")
    lines = [
        "| head (H, V) | GEMMs alone, ms | kto-fused, x GEMMs | kto-fused, ms / MiB | " + " | ".join(names[1:]) + " |"
    ]
    for size in dict.fromkeys(row["size"] for row in rows):
        head, hidden, vocab, softcap = re.fullmatch(r"(.+): .* H=(\d+) V=(\d+) bfloat16(.*)", size).groups()
        capped = ", soft cap" if softcap else ""
        by_name = of_one_case(size)
        cells = [
            f"{by_name[name]['ms']:.1f} / {by_name[name]['peak_mib']:.0f}" if name in by_name else "-" for name in names
        ]
        gemms, ratio = by_name["GEMMs alone"]["ms"], by_name["kto-fused"]["times_gemms"]
        lines.append(f"| {head} ({hidden}, {vocab}){capped} | {gemms:.1f} | {ratio:.2f} | {' | '.join(cells)} |")
    return lines


def predicted_on_a_gpu() -> list[str]:
    """Units times the measured milliseconds per unit of KTO, on two heads at T=2048."""
    text = (RESULTS / "nvidia-h200-tune.md").read_text(encoding="utf-8")
    kto = {}  # by hidden size: milliseconds of a step with the default `chunk_bytes`
    for row in re.findall(r"^\| kto trained, .*T=2048 H=(?:896|4096) V=151936 .*$", text, re.MULTILINE):
        case, _, whole, _, half, _ = row.strip("| ").split(" | ")
        hidden = re.search(r" H=(\d+) ", case)[1]
        kto[hidden] = Decimal((half if hidden == "896" else whole).split()[0])
    lines = [
        "| B=8 T=2048, bfloat16, head trained, predicted ms | units | Qwen2.5-0.5B (896, 151936) "
        "| Qwen3-8B (4096, 151936) |",
    ]
    for name, units in (
        ("DPO", "4"),
        ("ORPO, SFT (`nll`) or PPO", "3"),
        ("PPO, a quarter of the tokens clipped", "2.5"),
    ):
        cells = [f"{kto[hidden] / 4 * Decimal(units):.1f}" for hidden in ("896", "4096")]
        lines.append(f"| {name} | {units} | {' | '.join(cells)} |")
    return lines


TABLES = [
    from_logits_on_a_cpu,
    from_hidden_states_on_a_cpu,
    losses_from_hidden_states_on_a_cpu,
    long_sequences_on_a_cpu,
    training_steps_on_a_cpu,
    longest_sequences_on_a_cpu,
    adapters_on_a_cpu,
    from_logits_on_a_gpu,
    from_hidden_states_in_turns_on_a_gpu,
    from_hidden_states_on_a_gpu,
    predicted_on_a_gpu,
]


@pytest.mark.parametrize("table", TABLES)
def test_the_tables_are_the_measured_ones(table):
    header, *rows = table()
    assert len(rows) >= 2
    assert table_of(MEASUREMENTS, header) == rows


@pytest.mark.parametrize("table", [from_hidden_states_on_a_cpu, from_hidden_states_in_turns_on_a_gpu])
def test_the_readmes_tables_are_the_measured_ones(table):
    header, *rows = table()
    assert table_of(README, header) == rows


# ---- sentences with measured or counted figures ---------------------------------------------------------------------

NARROW, WIDE, LONG = (
    f"{name}: B=8 T={seq_len} H={hidden} V=151936 bfloat16"
    for name, seq_len, hidden in (("Qwen2.5-0.5B", 2048, 896), ("Qwen3-8B", 2048, 4096), ("Qwen2.5-0.5B", 8192, 896))
)


def the_largest_copy() -> str:
    return f"a large copy reached {results('nvidia-h200.json')['copy_gb_s']:.0f} GB/s"


def the_longest_sequences_budget() -> str:
    return f"with which it stays within {results('cpu-training.json')['budget_mib']:.0f} MiB"


def the_size_at_which_trl_was_faster() -> str:
    row = of_one_case(LONG)
    return f"slower than TRL at T=8192 ({row['kto-fused']['ms']:.0f} ms and {row['TRL']['ms']:.0f})"


def the_memory_that_trl_took() -> str:
    narrow, wide = (of_one_case(size, "kto frozen")["TRL"]["peak_mib"] for size in (NARROW, WIDE))
    long = of_one_case(LONG)["TRL"]["peak_mib"]
    return (
        f"TRL took {narrow:.0f} and {wide:.0f} MiB with the first two heads frozen, and {long:.0f} MiB at T=8192: "
        "more than this version everywhere"
    )


def the_memory_of_a_small_budget() -> str:
    """The counted bytes are those of `ON_HOPPER`, which a test of the engine's costs checks."""
    (default, _, _, least, _), (wide_default, _, _, wide_least, _) = (
        ON_HOPPER[hidden, 151936, 2048] for hidden in (896, 4096)
    )
    grads, wide_grads = (of_one_case(size)["kto-fused"]["gradient_mib"] for size in (NARROW, WIDE))
    return (
        f"`chunk_bytes=2**27` comes to {least} MiB at H = 896 and {wide_least} MiB at H = 4096 (V = 151936, a Hopper "
        f"GPU; {grads:.0f} and {wide_grads:.0f} MiB of that are the gradients themselves; {default} and "
        f"{wide_default} MiB by default)"
    )


SENTENCES = [
    the_largest_copy,
    the_longest_sequences_budget,
    the_size_at_which_trl_was_faster,
    the_memory_that_trl_took,
    the_memory_of_a_small_budget,
]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_the_sentences_have_the_measured_numbers(sentence):
    assert sentence() in " ".join(" ".join(PAGES.values()).split())


def test_the_version_of_then_was_faster_than_the_others_at_each_size_of_the_table():
    sizes = {row["size"] for row in results("nvidia-h200-hidden.json")["rows"] if "T=2048" in row["size"]}
    for size in sizes:
        times = {name: row["ms"] for name, row in of_one_case(size).items() if name != "GEMMs alone"}
        assert min(times, key=times.get) == "kto-fused", size


def test_trl_took_more_than_this_version():
    for size, case, ours in (
        (NARROW, "kto frozen", ON_HOPPER[896, 151936, 2048][4]),
        (WIDE, "kto frozen", ON_HOPPER[4096, 151936, 2048][4]),
        (LONG, "kto trained", ON_HOPPER[896, 151936, 8192][0]),
    ):
        assert ours < of_one_case(size, case)["TRL"]["peak_mib"]
