"""SECURITY.md and the attacks that are carried out name each other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HELPER_TESTS = {"test_a_period_would_be_found"}  # they hold a tool of the attacks to its word


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def named_tests():
    return set(re.findall(r"`(test_\w+)`", text_of("SECURITY.md")))


def attacks():
    tree = ast.parse(text_of("tests/test_attacks.py"))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert len(set(names)) == len(names)
    return {name for name in names if name.startswith("test_")}


def test_every_attack_is_in_the_text_and_the_other_way_round():
    assert attacks() >= HELPER_TESTS
    assert named_tests() == attacks() - HELPER_TESTS


def test_every_name_of_a_test_stands_on_one_line_in_code():
    """Otherwise the test above would not see it."""
    assert set(re.findall(r"\btest_\w+(?!\.py)\b", text_of("SECURITY.md"))) == named_tests()


def test_links_lead_somewhere_and_the_readme_links_here():
    targets = re.findall(r"\]\(([^)\s]+)\)", text_of("SECURITY.md"))
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target
    assert "](SECURITY.md)" in text_of("README.md")
