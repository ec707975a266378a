"""Compile every kernel for one kind of GPU, on a machine without one, and print facts about the compiled code as JSON.

Usage: python ahead_of_time.py {sm_80,sm_90,sm_100,gfx942}

The public functions run on CPU tensors with Triton's driver replaced: each launch compiles exactly the code that the
GPU would run, and runs nothing. The functions' results are undefined. ``test_ahead_of_time.py`` reads the printed
facts: registers, spills, loads and stores, and how many variants of each kernel there are.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from kto_fused.kernels import rows
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import kto_fused
from kto_fused import heads
from kto_fused.engines import backends
from kto_fused.engines import chunks as chunk_module
from kto_fused.engines import hidden as hidden_module
from kto_fused.engines import logits as from_logits
from kto_fused.heads.base import REDUCTIONS
from kto_fused.heads.preference import DPO_LOSS_TYPES, KTO_LOSS_TYPES, LENGTH_AVERAGED, REFERENCE_FREE

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Kernels whose instructions tests read. Others are not disassembled, which takes as long as compiling.
DISASSEMBLED = ("token_logprobs", "fold_tile", "fold_register_tiles", "keep_register_tiles")
launched: dict[str, JITFunction] = {}
grids: list[tuple[int, ...]] = []


class CompileOnlyDriver:
    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(kernel: JITFunction, grid: object):
    """Stand in for ``kernel[grid]``: compile for the arguments of the launch, and note the kernel and its grid."""
    launched[kernel.fn.__name__] = kernel
    grids.append(grid)
    return lambda *args, **kwargs: kernel.run(*args, grid=grid, warmup=True, **kwargs)


def prepare(target: GPUTarget) -> None:
    """Make the package launch Triton kernels on CPU tensors, compiled for ``target``."""
    driver.set_active(CompileOnlyDriver(target))
    JITFunction.__getitem__ = compile_only
    backends.resolve = lambda backend, device: "triton"
    # an H200 has 132 multiprocessors; with so many, a batch of few rows is split
    from_logits.multiprocessors = chunk_module.multiprocessors = lambda device: 132
    chunk_module._is_hopper = lambda device: target.arch == 90
    token_grads = hidden_module.Engine.token_grads

    def launch_and_return_ones(engine: hidden_module.Engine, logp_grads: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(token_grads(engine, logp_grads))  # a second visit leaves out tokens whose gradient is 0

    hidden_module.Engine.token_grads = launch_and_return_ones


def launch(dtype: torch.dtype, batch: int, seq_len: int, vocab: int, packed: bool = False, **options: object) -> None:
    """Launch the forward and backward of a loss from logits. No kernel runs, so the memory is never touched."""
    logits, labels = torch.empty(batch, seq_len, vocab, dtype=dtype), torch.zeros(batch, seq_len, dtype=torch.long)
    if packed:
        options["cu_seqlens"] = torch.arange(0, batch * seq_len + 1, seq_len, dtype=torch.int32)
        logits, labels = logits.view(-1, vocab), labels.view(-1)
    logits.requires_grad_()
    loss, _ = kto_fused.fused_kto_loss(
        logits, labels, torch.ones(batch, dtype=torch.bool), ref_logps=torch.zeros(batch), **options
    )
    loss.sum().backward()


def launch_hidden(
    seq_len: int, vocab: int, dtype: torch.dtype = torch.bfloat16, hidden_size: int = 896, **options: object
) -> None:
    """Launch the forward and backward of a loss from hidden states, with a reference model's."""
    hidden = torch.empty(2, seq_len, hidden_size, dtype=dtype, requires_grad=True)
    weight, bias = (torch.empty(vocab, *size, dtype=dtype) for size in ((hidden_size,), ()))
    labels = torch.zeros(2, seq_len, dtype=torch.long)
    for lm_head_bias in (None, bias):
        # a frozen head; a trained head with its loss known on the first visit; a trained head with a second visit
        for weight.requires_grad, reduction in ((False, "mean"), (True, "mean"), (True, "none")):
            loss, _ = kto_fused.fused_linear_kto_loss(
                hidden,
                weight,
                labels,
                labels[:, 0],
                lm_head_bias=lm_head_bias,
                ref_hidden=hidden,
                reduction=reduction,
                **options,
            )
            loss.sum().backward()


def launch_weighted(hidden_size: int) -> None:
    """Launch a loss that asks for the sum of squared probabilities: from logits, and from hidden states."""
    head, vocab = heads.make("sigmoid", use_weighting=True), 32000
    for dtype, (seq_len, softcap) in itertools.product((torch.bfloat16, torch.float32), ((300, None), (3, 30.0))):
        logits, labels = torch.empty(2, seq_len, vocab, dtype=dtype), torch.zeros(2, seq_len, dtype=torch.long)
        kto_fused.fused_loss(head, logits, labels, ref_logps=torch.zeros(2), logit_softcap=softcap)
    hidden, labels = torch.empty(2, 3, hidden_size, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.long)
    weight, bias = torch.empty(vocab, hidden_size, dtype=torch.bfloat16), torch.empty(vocab, dtype=torch.bfloat16)
    weight.requires_grad_()
    for softcap, lm_head_bias in itertools.product((None, 30.0), (None, bias)):
        options = {"ref_hidden": hidden, "lm_head_bias": lm_head_bias, "logit_softcap": softcap}
        kto_fused.fused_linear_loss(head, hidden, weight, labels, **options)


def launch_gae(dtype: torch.dtype, batch: int, seq_len: int, packed: bool = False, masked: bool = False) -> None:
    """Advantages of rewards that start one element behind a 16-byte boundary."""
    rewards = torch.empty(batch * seq_len + 1, dtype=dtype)[1:].view(batch, seq_len)
    options = {}
    if masked:
        options = {"mask": torch.ones(batch, seq_len, dtype=torch.bool), "bootstrap": torch.zeros(batch)}
    if packed:
        options["cu_seqlens"] = torch.arange(0, batch * seq_len + 1, seq_len, dtype=torch.int32)
        rewards = rewards.flatten()
        if masked:
            options["mask"] = options["mask"].flatten()
    kto_fused.gae(rewards, rewards, gamma=1.0, lam=0.95, **options)


def nvidia_tool(name: str, *flags: str) -> str:
    return subprocess.run([NVIDIA_TOOLS / name, *flags], capture_output=True, text=True, check=True).stdout


def nvidia_report(kernel: str, cubin: bytes) -> dict[str, object]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = nvidia_tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = nvidia_tool("nvdisasm", "-c", file.name) if kernel.startswith(DISASSEMBLED) else None
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    result = {"registers": resources["REG"], "stack": resources["STACK"], "local": resources["LOCAL"]}
    if sass is not None:
        loads = Counter(re.findall(r"\bLDG\.[\w.]+", sass))
        stores = sorted(set(re.findall(r"\bSTG\.[\w.]+", sass)))
        after = instructions_after_product(sass)
        result.update(loads=loads, stores=stores, instructions_after_product=after)
    return result


def instructions_after_product(sass: str) -> int:
    """Count a thread's instructions after its last product of warp groups.

    Leaves out instructions that a branch skips, and those behind the end of the kernel, where the compiler puts
    shuffles for warps that have diverged.
    """
    _, _, after = sass.rpartition("HGMMA")
    after, _, _ = after.rpartition("  EXIT")  # the EXIT without a predicate ends the kernel
    after = re.sub(r"BRA `\((\.L_x_\d+)\).*?^\1:", "", after, flags=re.DOTALL | re.MULTILINE)
    return len(re.findall(r"/\*[0-9a-f]{4,}\*/ +\S", after))


def report(target: str) -> list[dict[str, object]]:
    """Return one entry per compiled variant of each kernel, for sm_90 with registers, spills and instructions."""
    entries = []
    for name, kernel in launched.items():
        for compiled in kernel.device_caches[0][0].values():
            entry: dict[str, object] = {"kernel": name, "variant": variant(compiled)}
            entry["fuses_multiply_add"] = compiled.metadata.enable_fp_fusion
            if target == "sm_90":
                entry.update(nvidia_report(name, compiled.asm["cubin"]))
                entry["shared_memory"] = compiled.metadata.shared
                entry["warp_group_products"] = compiled.asm["ptx"].count("wgmma.mma_async")
            entries.append(entry)
    return entries


def variant(compiled: object) -> str:
    """Return the dtype of the first pointer and the compile-time constants of a compiled kernel."""
    source = compiled.src
    names = source.fn.arg_names
    constants = {names[path[0]]: value for path, value in source.constants.items() if len(path) == 1}
    pointers = [kind for kind in source.signature.values() if str(kind).startswith("*")]
    return f"{pointers[0]} " + " ".join(f"{name}={value}" for name, value in constants.items())


def launch_everything(reductions: tuple[str, ...]) -> None:
    """Launch every kernel in every variant that tests ask for."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        launch(dtype, 2, 300, 32000)  # one program per row
        launch(dtype, 2, 3, 32000, logit_softcap=30.0, packed=True, average_log_prob=True)  # several programs per row
        launch(dtype, 2, 3, 1001, logit_softcap=30.0)  # rows that do not start at 16-byte boundaries
    for softcap in (None, 30.0):
        launch_hidden(3, 32000, logit_softcap=softcap)
    is_hopper = chunk_module._is_hopper(torch.device("cuda"))
    if is_hopper:  # kernels that fold in registers: one variant per hidden size
        for hidden_size in (2048, 2560):
            launch_hidden(3, 32000, hidden_size=hidden_size)
    launch_weighted(2560 if is_hopper else 896)  # where registers are scarcest
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        rows.scale_(
            torch.empty(4096, dtype=dtype),
            torch.ones((), dtype=torch.float64 if dtype.itemsize == 8 else torch.float32),
        )
        launch_gae(dtype, 2, 300)
        launch_gae(dtype, 2, 300, masked=True)
        launch_gae(dtype, 2, 300, masked=True, packed=True)
    logps = torch.zeros(4)
    for loss_type, reduction in itertools.product(KTO_LOSS_TYPES, reductions):
        desirable = torch.ones(4, dtype=torch.bool)
        for z0 in (0.0, "batch_mean") if loss_type == "apo_zero_unpaired" else (0.5, torch.zeros(()), "batch_mean"):
            kto_fused.kto_loss_from_logps(
                logps, logps, desirable, loss_type=loss_type, reduction=reduction, reference_point=z0
            )
    for loss_type, reduction in itertools.product(DPO_LOSS_TYPES, reductions):
        kto_fused.dpo_loss_from_logps(
            logps,
            None if loss_type in REFERENCE_FREE else logps,
            loss_type=loss_type,
            reduction=reduction,
            token_counts=torch.ones(4, dtype=torch.long) if loss_type in LENGTH_AVERAGED else None,
        )


def variants_per_length(dtype: torch.dtype, vocab: int) -> dict[str, dict[str, int]]:
    """Return how many variants of each kernel batches of many lengths compile; some have 2^31 logits and more."""
    for kernel in launched.values():
        kernel.device_caches.clear()
    counts, before = {}, Counter()
    lengths = {
        "many rows": [(1, 300), (2, 1024), (16, 17), (3, 1000), (5, 14_001)],
        "few rows": [(1, 2), (2, 16), (7, 11)],
    }
    for name, shapes in lengths.items():
        for batch, seq_len in shapes:
            launch(dtype, batch, seq_len, vocab)
        compiled = Counter({name: len(kernel.device_caches[0][0]) for name, kernel in launched.items()})
        counts[name] = dict(compiled - before)
        before = compiled
    return counts


def variants_of_hidden_lengths() -> list[dict[str, int]]:
    """Return how many variants of each kernel there are after one length from hidden states, and after several."""
    for kernel in launched.values():
        kernel.device_caches.clear()
    counts = []
    for seq_lens in ([300], [64, 17, 150]):
        for seq_len in seq_lens:
            launch_hidden(seq_len, 32000, hidden_size=128)
            launch_hidden(seq_len, 1024, torch.float32, chunk_bytes=2**21)  # in several chunks
        counts.append({name: len(kernel.device_caches[0][0]) for name, kernel in launched.items()})
    return counts


def variants_of_gae_lengths() -> int:
    """How many times the scan is compiled for batches of several lengths."""
    kernel = launched["gae_kernel"]
    kernel.device_caches.clear()
    for batch, seq_len in ((1, 1), (2, 16), (7, 300), (1, 100_000)):
        launch_gae(torch.float32, batch, seq_len, masked=True)
    return len(kernel.device_caches[0][0])


def main(target: str) -> None:
    prepare(TARGETS[target])
    # every reduction on one target; on the others it suffices that each kernel compiles
    launch_everything(REDUCTIONS if target == "sm_90" else REDUCTIONS[:1])
    kernels = report(target)
    lengths = {str(vocab): variants_per_length(torch.bfloat16, vocab) for vocab in (32000, 50257)}
    result = {
        "kernels": kernels,
        "variants_per_length": lengths,
        "variants_of_hidden_lengths": variants_of_hidden_lengths(),
        "variants_of_gae_lengths": variants_of_gae_lengths(),
        "grids": sorted(set(grids)),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
