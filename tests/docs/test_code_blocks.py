"""Code in the documents works: Python is run from top to bottom of a page, commands are understood."""

from __future__ import annotations

import shlex

import click
import pytest
import torch
from pages import BLOCKS, PAGES, ROOT, blocks, commands

from kvcal.calibrate.cli import cli
from kvcal.runtime.cla import SharingMap, save_cla, share

PYTHON = [block for block in BLOCKS if block.language == "python" and block.runs]
WITH_PYTHON = sorted({block.page for block in PYTHON})
COMMANDS = [(block.place, line) for block in BLOCKS for line in commands(block)]


def a_shared_model() -> dict[str, object]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=60)).eval()
    share(model, SharingMap.parse("0-1"))
    save_cla(model, "mistral-7b-cla2")
    return {"inputs": {"input_ids": torch.arange(3, 9)[None], "max_new_tokens": 2}}


PREPARED = {"docs/uptraining.md": a_shared_model}
"""What the words of a page say was there before its first block."""


def test_the_reader_of_pages_finds_code_and_why_it_is_not_run():
    assert {"README.md", "docs/README.md", "docs/uptraining.md"} <= set(WITH_PYTHON)
    assert not next(block.runs for block in blocks(ROOT / "docs" / "vllm.md") if block.language == "python")
    assert len(COMMANDS) > 15 and len(PAGES) > 15


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = PREPARED.get(page, dict)()
    for block in PYTHON:
        if block.page == page:
            exec(compile(block.text, block.place, "exec"), names)
    if page == "README.md":
        assert (tmp_path / "demo-stdlib" / "manifest.json").is_file()
        assert capsys.readouterr().out.count("def listdir(path):") == 1  # a text is printed


@pytest.mark.parametrize(("place", "line"), COMMANDS)
def test_commands_are_understood(place, line):
    """They are parsed by the command, not run."""
    words = [word for word in shlex.split(line) if word not in ("2>&1", "|")]
    context = click.Context(cli, info_name="calibrate")
    flags = [word for word in words if not word.startswith("-")]
    name, command, arguments = cli.resolve_command(context, words[words.index(flags[0]) :])
    assert command is not None and name is not None
    command.make_context(name, list(arguments), parent=context)
