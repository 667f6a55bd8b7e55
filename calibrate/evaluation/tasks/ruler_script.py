"""Run RULER's generating scripts in a process of their own; `ruler_process.Scripts` starts it and talks with it.

The scripts parse the command line and load a tokenizer when they are imported, and they retry without end where a
sample does not fit. Here they import stand-ins: a tokenizer that asks the other end of the pipe how many tokens a text
has, and loops that give up. This file is run by its path, without kvcal: it imports the standard library only.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import itertools
import json
import os
import re
import signal
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

MOST_ATTEMPTS = 100
"""At one sample. Each attempt takes less text than the one before; once there is no less, other words."""


class Pipe:
    """JSON lines from and to the process that started this one."""

    def __init__(self) -> None:
        self.lines = io.TextIOWrapper(os.fdopen(os.dup(0), "rb"), encoding="utf-8")
        self.file = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(2, 1)  # the scripts print

    def send(self, message: Any) -> None:
        self.file.write(json.dumps(message) + "\n")
        self.file.flush()

    def receive(self) -> Any:
        line = self.lines.readline()
        if not line:
            os._exit(0)  # an exception would be caught by the scripts
        return json.loads(line)

    def give_up(self, why: str) -> None:
        self.send({"stuck": why})
        os._exit(0)


class Tokenizer:
    """Stands in for the scripts' own."""

    def __init__(self, pipe: Pipe):
        self.pipe = pipe
        self.asked = 0
        """Counts that were asked for since the last attempt began."""

    def text_to_tokens(self, text: str) -> range:
        self.asked += 1
        if self.asked > MOST_ATTEMPTS:
            self.pipe.give_up("too long")
        self.pipe.send({"count": text})
        return range(self.pipe.receive())


class Attempts:
    """Counts what the scripts would repeat without end."""

    def __init__(self, pipe: Pipe, tokenizer: Tokenizer):
        self.pipe, self.tokenizer = pipe, tokenizer
        self.made: int | None = None
        """Attempts at this sample; None: the script is still finding out how much text fits."""
        self.problem = "too long"

    def samples(self, numbers: Any) -> Iterator[Any]:
        """In place of tqdm, which the scripts put around the loop over samples."""
        for number in numbers:
            self.made = 0
            self.pipe.send({"sample": number})
            yield number
        self.made = None

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*args: Any, **kwargs: Any) -> Any:
            self.tokenizer.asked = 0
            if self.made is not None:
                self.made += 1
                if self.made > MOST_ATTEMPTS:
                    self.pipe.give_up(self.problem)
            self.problem = "too long"
            try:
                return function(*args, **kwargs)
            except Exception as error:
                self.problem = f"{type(error).__name__}: {error}"
                raise

        return attempt


class Words:
    """Makes, quickly and once, the millions of pairs of words that keys are drawn from.

    The script sorts a set of all pairs, which takes 14 seconds. Pairs of sorted words are nearly in order and quick to
    sort, so here a list takes the place of the set, which would lose the order. Later tasks of this process take the
    same pairs.
    """

    def __init__(self) -> None:
        self.made: Any = None

    def prepare(self, script: Any) -> None:
        with contextlib.suppress(ImportError):  # the script says so itself
            import wonderwords

            reader: Any = wonderwords.random_word
            read = getattr(reader, "_kvcal_read", reader._get_words_from_text_file)
            reader._kvcal_read = read
            reader._get_words_from_text_file = (
                (lambda name: sorted(set(read(name)))) if self.made is None else lambda name: []
            )
            script.set = lambda values=(): [value for value, _ in itertools.groupby(sorted(values))]

    def keep(self, script: Any) -> None:
        if self.made is None:
            self.made = script.words
        script.words = self.made


def stand_in(name: str, **names: Any) -> None:
    found = types.ModuleType(name)
    found.__path__ = []
    found.__dict__.update(names)
    sys.modules[name] = found


@functools.cache
def sentence_splitter() -> tuple[str, Callable[[str], list[str]]]:
    """Its name, and text -> sentences: nltk's where it and its data are there."""
    for name in ("nltk", "nltk.tokenize"):
        sys.modules.pop(name, None)  # stand-ins
    try:
        import nltk
        from nltk.tokenize import sent_tokenize

        sent_tokenize("One. Two.")
        return f"punkt_tab of nltk {nltk.__version__}", sent_tokenize
    except (ImportError, LookupError):
        return "at white space after . ! or ?", lambda text: re.split(r"(?<=[.!?])\s+", text)


def run(job: dict[str, Any], pipe: Pipe, words: Words) -> None:
    tokenizer = Tokenizer(pipe)
    attempts = Attempts(pipe, tokenizer)
    splitter, split = sentence_splitter() if job["sentences"] else ("", list)
    written: list[Any] = []
    for package in ("long_context_eval", "long_context_eval.data", "long_context_eval.pred", "nltk"):
        stand_in(package)
    for name in ("tokenizer", "long_context_eval.data.tokenizer"):
        stand_in(name, select_tokenizer=lambda *_: tokenizer)
    stand_in("nltk.tokenize", sent_tokenize=split)
    stand_in("constants", TASKS=job["tasks"])
    stand_in("long_context_eval.pred.nemo_utils", write_manifest=lambda path, rows: written.extend(rows))
    stand_in("tqdm", tqdm=attempts.samples)
    sys.argv = [job["script"], *job["arguments"]]
    spec = importlib.util.spec_from_file_location("script", job["script"])
    assert spec is not None and spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    pairs = job["script"].endswith("niah.py")
    if pairs:
        words.prepare(script)
    spec.loader.exec_module(script)
    if pairs:
        words.keep(script)
    script.generate_input_output = attempts.counted(script.generate_input_output)
    script.main()
    pipe.send({"rows": written, "sentences": splitter})


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other end ends this process
    pipe, words = Pipe(), Words()
    sys.path[:] = pipe.receive()["path"]
    while True:
        job = pipe.receive()
        try:
            run(job, pipe, words)
        except BaseException as error:
            missing = error.name if isinstance(error, ImportError) else None
            pipe.send({"failed": f"{type(error).__name__}: {error}", "missing": missing})
            return


if __name__ == "__main__":
    main()
