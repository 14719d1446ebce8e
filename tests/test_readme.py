"""Whatever README.md shows can be run as it stands there."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.numpy
from shards import make_checkpoint

from deeplock_kernels.cli import main
from deeplock_kernels.runtime.pool import set_num_threads
from deeplock_kernels.runtime.tiers import use_tier

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
SHELLS = ("sh", "bash", "shell", "console")
NOT_RUN = (
    "pip ",
    "git ",
    "pytest",
    "deeplock demo",
    "deeplock bench",
)  # what these lines do is tested elsewhere
FRAMEWORKS = (
    "torch",
    "jax",
    "tensorflow",
    "onnx",
    "onnxruntime",
)  # a block that imports one needs it installed


class Block(NamedTuple):
    language: str
    line: int
    text: str


def text_of_readme() -> str:
    return README.read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    fences = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
    return [
        Block(found[1], text.count("\n", 0, found.start(2)) + 1, found[2]) for found in fences.finditer(text)
    ]


def shell_lines(block: Block) -> list[str]:
    """Give the lines that a reader would type, those with a backslash at the end put together."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def missing_framework(block: Block) -> str | None:
    if ">>> " in block.text:
        return None
    for node in ast.walk(ast.parse(block.text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            top = name.partition(".")[0]
            if top in FRAMEWORKS and importlib.util.find_spec(top) is None:
                return top
    return None


def run_python_block(block: Block, namespace: dict) -> None:
    if ">>> " in block.text:
        example = doctest.DocTestParser().get_doctest(
            block.text, namespace, "README.md", "README.md", block.line - 1
        )
        doctest.DebugRunner(optionflags=doctest.ELLIPSIS).run(example, clear_globs=False)
        namespace.update(example.globs)
    else:
        code = compile("\n" * (block.line - 1) + block.text, str(README), "exec")
        exec(code, namespace)


def run_shell_line(line: str, folder: Path) -> None:
    words = shlex.split(line, comments=True)
    if words[:2] == ["deeplock", "lock"] and not (folder / words[2]).exists():
        (make_checkpoint if words[2].endswith("/") else save_model)(folder / words[2])
    programs = folder / ".programs"
    programs.mkdir(exist_ok=True)
    script = programs / "deeplock"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -W error -m deeplock_kernels "$@"\n')
    script.chmod(0o755)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }
    done = subprocess.run(
        ["sh", "-ec", line],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), f"{line}\n{done.stdout}{done.stderr}"


def save_model(path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors = {
        "embedding": rng.normal(size=(100, 16)).astype(np.float32),
        "dense.weight": rng.normal(size=(16, 16)).astype(np.float32),
        "dense.bias": np.zeros(16, np.float32),
    }
    safetensors.numpy.save_file(tensors, path, metadata={"format": "np"})


def test_there_is_something_to_run():
    languages = [block.language for block in blocks(text_of_readme())]
    assert "python" in languages
    assert any(
        line.startswith("deeplock ") and not line.startswith(NOT_RUN)
        for block in blocks(text_of_readme())
        if block.language in SHELLS
        for line in shell_lines(block)
    )
    assert text_of_readme().count("\n```") % 2 == 0, "a fence is not closed"
    assert set(languages) <= {"python", "text", "", "json", *SHELLS}, (
        "a block in a language that is not known here"
    )


def test_every_block_runs(tmp_path, monkeypatch):
    """One after the other in one directory, the Python blocks in one namespace."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model.safetensors")
    model = (tmp_path / "model.safetensors").read_bytes()
    namespace = {"__name__": "__main__"}
    run = 0
    try:
        for block in blocks(text_of_readme()):
            if block.language == "python":
                if missing_framework(block) is None:
                    run_python_block(block, namespace)
                    run += 1
            elif block.language in SHELLS:
                for line in shell_lines(block):
                    if line.startswith(NOT_RUN):
                        continue
                    assert line.startswith("deeplock "), (
                        f"README.md:{block.line}: {line}: what is to be done with it?"
                    )
                    run_shell_line(line, tmp_path)
                    run += 1
    finally:
        set_num_threads(None)
        use_tier(None)
    assert run >= 2
    if (tmp_path / "restored.safetensors").exists():
        assert (tmp_path / "restored.safetensors").read_bytes() == model
    assert (tmp_path / "model.safetensors").read_bytes() == model


def test_every_command_and_option_exists(capsys, monkeypatch):
    """Also those that are only spoken of in a sentence or a table."""
    monkeypatch.setenv("PYTHON_COLORS", "0")
    found = 0
    for code in re.findall(r"`(deeplock [^`]+)`", text_of_readme()):
        _, command, *words = code.replace("\\|", "|").split()
        if command.startswith("-"):
            command, words = "--help", [command]
        with pytest.raises(SystemExit) as end:
            main([command, *["--help"] * (command != "--help")])
        assert end.value.code == 0, code
        shown = capsys.readouterr().out
        for option in re.findall(r"--[a-z-]+", " ".join(words)):
            assert option in shown, code
        found += 1
    assert found


def test_every_link_leads_somewhere():
    text = text_of_readme()
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith(("https://", "http://", "mailto:")):
            assert (ROOT / target.partition("#")[0]).exists(), target
