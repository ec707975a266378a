"""The public names of ``kto_fused.data``: load files of records, turn them into tokens, and collate batches."""

from .data.collators import IGNORE_INDEX, CompletionCollator, PairedCollator, UnpairedCollator
from .data.form import DataError
from .data.layouts import Reading, reading
from .data.partners import mismatched_partners
from .data.records import BUNDLED, Checked, Source, load
from .data.tokens import Prepared, fingerprint, pack_completions, prepare_completions, prepare_paired, prepare_unpaired

__all__ = [
    "BUNDLED",
    "IGNORE_INDEX",
    "Checked",
    "CompletionCollator",
    "DataError",
    "PairedCollator",
    "Prepared",
    "Reading",
    "Source",
    "UnpairedCollator",
    "fingerprint",
    "load",
    "mismatched_partners",
    "pack_completions",
    "prepare_completions",
    "prepare_paired",
    "prepare_unpaired",
    "reading",
]
