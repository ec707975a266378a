"""Work of several processes that ends alike on all of them: with the same result, or with the same error."""

import pickle
from collections.abc import Callable
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainingArguments


def on_first(args: TrainingArguments, work: Callable[[], Any]) -> Any:
    """Do ``work`` on the first process, and return its result, or raise its error, on all of them."""
    if args.world_size == 1:
        return work()
    outcome = _outcome(work) if args.process_index == 0 else [None, None]
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result


def shared(args: TrainingArguments, work: Callable[[], list]) -> list:
    """Do ``work`` on each process, and return the results of all processes in one list, in the order of the processes.

    An error of one process is raised on all of them; of several errors, that of the first process.
    """
    if args.world_size == 1:
        return work()
    own = _outcome(work)
    outcomes = gather_object([own])
    for process, (_, error) in enumerate(outcomes):
        if error is not None:
            raise own[1] if process == args.process_index else error  # this process's keeps its traceback and causes
    return [one for result, _ in outcomes for one in result]


def _outcome(work: Callable[[], Any]) -> list[Any]:
    """Return the result and None, or None and the error, in a form that reaches other processes."""
    try:
        return [work(), None]
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an error whose constructor takes other arguments than its message
            named = RuntimeError(f"{type(error).__name__}: {error}")
            named.__cause__ = error
            return [None, named]
        return [None, error]
