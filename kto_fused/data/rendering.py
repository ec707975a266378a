"""Render chat templates with limits on their time, memory and output.

A chat template is a program that comes with a tokenizer. It may loop for ever, or build a string larger than the
memory, and one operation such as ``"x" * 10**10`` cannot be interrupted from within Python. So templates run in a
forked process, which is killed when it exceeds a limit. The training process goes on with an error that names the row.
"""

import contextlib
import json
import os
import re
import signal
import warnings
from collections.abc import Iterator
from multiprocessing import Pipe
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .form import DataError

# The limits of one rendering of one conversation. A template takes about a millisecond for a conversation of 100,000
# characters and a few times its size in memory, so the limits leave honest conversations a factor of 100 or more: the
# longest text within them has some 16 million tokens.
RENDER_SECONDS = 10
RENDER_CHARACTERS = 64 * 2**20
RENDER_BYTES = 4 * 2**30  # on top of the memory that the process held when it was forked

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # begins a block of text that the assistant generates


class Rendered(NamedTuple):
    """The text of a conversation, and start and end of its ``{% generation %}`` blocks in the text, in characters."""

    text: str
    generated: list[tuple[int, int]]


class Renderer:
    """Renders conversations with a tokenizer's chat template, in one forked process.

    The process starts at the first call and ends with the ``with`` block. On a system that cannot fork (Windows),
    templates run without limits.

    Args:
        tokenizer: whose chat template is rendered.
        name: of the data, for messages: "train", "eval".

    >>> with Renderer(tokenizer, "train") as render:  # doctest: +SKIP
    ...     text = render(0, [{"role": "user", "content": "Hi"}], add_generation_prompt=True).text
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str):
        self.tokenizer, self.name = tokenizer, name
        self._process: int | None = None

    def __enter__(self) -> "Renderer":
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def __call__(self, row: int, messages: list[dict[str, str]], tools: str = "", **options: bool) -> Rendered:
        """Return the rendered messages of record ``row``.

        Args:
            row: the record's number, for messages.
            messages: the conversation.
            tools: the tools that the template writes, as JSON; "" for none.
            options: ``add_generation_prompt``: also write what asks for an answer. ``find_generated``: also return the
                ``{% generation %}`` blocks.

        Raises:
            DataError: the template fails or exceeds a limit. The message names the row.
        """
        return self.all([row], [messages], [tools], **options)[0]

    def all(
        self,
        rows: list[int],
        conversations: list[list[dict[str, str]]],
        tools: list[str] | None = None,
        **options: bool,
    ) -> list[Rendered]:
        """Return the rendered conversations of several records, as a call for each of them would.

        Several records are sent to the process at once: taking turns at each record, the two processes would wait
        longer for each other than a rendering takes.
        """
        rendered, tools = [], tools or [""] * len(conversations)
        for start, stop in _parts(conversations):
            outcomes = self._outcomes(conversations[start:stop], tools[start:stop], options)
            for row, outcome in zip(rows[start:stop], outcomes, strict=True):
                if isinstance(outcome, str):
                    self._stop()  # the process may still have results to send
                    raise DataError(f"{self.name} data, row {row}: the chat template does not render it: {outcome}")
                rendered.append(outcome)
        return rendered

    def _outcomes(
        self, conversations: list[list[dict[str, str]]], tools: list[str], options: dict[str, bool]
    ) -> Iterator[Rendered | str]:
        """Yield the renderings of the conversations. A string says why there is none; it is the last item."""
        if not hasattr(os, "fork"):
            yield from (_render(self.tokenizer, *one, **options) for one in zip(conversations, tools, strict=True))
            return
        if self._process is None:
            self._start()
        try:
            self._connection.send((conversations, tools, options))
            for _ in conversations:
                if not self._connection.poll(RENDER_SECONDS):
                    yield f"it did not end within {RENDER_SECONDS} seconds"
                    return
                yield self._connection.recv()
        except (EOFError, OSError):
            yield "its process died"

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        with warnings.catch_warnings():
            # Python warns that locks of other threads stay locked in the new process. It takes none of them: it only
            # runs the template, which is plain Python, and a hang would end at the time limit.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process = os.fork()
        if self._process == 0:
            try:
                self._connection.close()
                _serve(theirs, self.tokenizer)
            finally:
                os._exit(0)  # skip the exit handlers of the training process
        theirs.close()

    def _stop(self) -> None:
        if self._process is None:
            return
        self._connection.close()
        os.kill(self._process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # if SIGCHLD is ignored, the system has waited for it already
            os.waitpid(self._process, 0)
        self._process = None


def _parts(conversations: list[list[dict[str, str]]]) -> Iterator[tuple[int, int]]:
    """Yield start and stop of the conversations to send at once: 100, or fewer with a million characters."""
    start = characters = 0
    for stop, messages in enumerate(conversations, 1):
        characters += sum(len(message["content"]) for message in messages)
        if stop - start == 100 or characters > 10**6 or stop == len(conversations):
            yield start, stop
            start, characters = stop, 0


def _serve(connection, tokenizer: PreTrainedTokenizerBase) -> None:
    """Run in the forked process: send back the result of ``_render`` for each conversation, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; the training process ends this one
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _limit_memory()
    while True:
        conversations, tools, options = connection.recv()
        for one in zip(conversations, tools, strict=True):
            signal.alarm(2 * max(1, int(RENDER_SECONDS)))  # ends this process after the training process was killed
            connection.send(_render(tokenizer, *one, **options))
        signal.alarm(0)


def _limit_memory() -> None:
    import resource  # Windows does not have it

    try:
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux; other systems do not enforce RLIMIT_AS
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = held + RENDER_BYTES
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    tools: str,
    add_generation_prompt: bool = False,
    find_generated: bool = False,
) -> Rendered | str:
    """Return the rendering, or a string that says why there is none."""
    given = json.loads(tools) if tools else None
    try:
        if find_generated:
            texts, generated = render_jinja_template(
                [messages],
                tools=given,
                chat_template=tokenizer.get_chat_template(tools=given),
                return_assistant_tokens_mask=True,
                **tokenizer.special_tokens_map,
            )
            rendered = Rendered(texts[0], generated[0])
        else:
            text = tokenizer.apply_chat_template(
                messages, tools=given, tokenize=False, add_generation_prompt=add_generation_prompt
            )
            rendered = Rendered(text, [])
    except MemoryError:
        return f"it needs more than {RENDER_BYTES / 2**30:g} GiB of memory"
    except Exception as error:  # a template may refuse roles, or fail in any other way
        return str(error) or type(error).__name__
    if len(rendered.text) > RENDER_CHARACTERS:
        return f"it writes {len(rendered.text):,} characters, more than the {RENDER_CHARACTERS:,} that are taken"
    return rendered
