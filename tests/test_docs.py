"""The documentation is true: its Python runs and prints what is shown, its links lead somewhere.

The blocks of a file run one after the other, as a reader would type them. A ``text`` block shows
what the Python before it printed; lines and columns may be left out, the rest has to be there.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ardd
from ardd.passes import cost_model
from ardd.passes.rules import rule_table

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
)
WITH_CODE = [page for page in PAGES if page == "README.md" or page.startswith("docs/")]

needs_checkout = pytest.mark.skipif(not WITH_CODE, reason="needs the checkout: here are no pages")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.M)


@dataclasses.dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int  # of its first line in the page


def read(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def blocks(page: str) -> Iterator[Block]:
    text = read(page)
    for match in FENCE.finditer(text):
        yield Block(match[1], match[2], text.count("\n", 0, match.start(2)) + 1)


def tokens(line: str) -> list[str]:
    """Returns the words of a line; the numbers that torch gives to equal names do not count."""
    return re.sub(r"(?<=[a-z])(_\d+)\b", "", line.replace(";", " ; ")).split()


def shows(printed: str, line: str) -> bool:
    """Tells whether a line of the output has the words of ``line``, in their order."""
    for candidate in printed.splitlines():
        rest = iter(tokens(candidate))
        if all(token in rest for token in tokens(line)):
            return True
    return False


@pytest.fixture(autouse=True)
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs ardd op by op where a page names no target, and forgets what a page has registered."""
    compile_ = torch.compile

    @functools.wraps(compile_)
    def compile_quickly(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") == "ardd":
            kwargs["options"] = {"target": "eager"} | kwargs.get("options", {})
        return compile_(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", compile_quickly)
    monkeypatch.setattr(cost_model, "_registered", {})
    rules, level = dict(rule_table()), logging.getLogger("ardd").level
    yield
    rule_table().clear()
    rule_table().update(rules)
    cost_model.find_cost_model.cache_clear()
    logging.getLogger("ardd").setLevel(level)


@needs_checkout
@pytest.mark.parametrize("page", WITH_CODE)
def test_page_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    printed = ""
    for block in blocks(page):
        if block.language == "python":
            padding = "\n" * (block.line - 1)  # a failure then names the line of the page
            exec(compile(padding + block.text, ROOT / page, "exec", dont_inherit=True), names)
            printed = capsys.readouterr().out
        elif block.language == "text":
            for number, line in enumerate(block.text.splitlines(), block.line):
                assert shows(printed, line), f"{page}:{number} is not in\n{printed}"


@needs_checkout
@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in LINK.findall(FENCE.sub("", read(page))):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        to = (ROOT / page).parent / path if path else ROOT / page
        assert to.exists(), f"{page}: {target}"
        if anchor:
            headings = [h.lower().replace(" ", "-") for h in HEADING.findall(to.read_text("utf-8"))]
            assert anchor in headings, f"{page}: {target}"


@needs_checkout
def test_every_reason_is_documented() -> None:
    names = [reason.name for reason in ardd.Reason]
    assert [h for h in HEADING.findall(read("docs/reasons.md")) if h.isupper()] == names
    assert re.findall(r"^\| \[`([A-Z_]+)`\]", read("README.md"), re.M) == names


@needs_checkout
def test_every_option_is_documented() -> None:
    fields = dataclasses.fields(ardd.Options)
    names = [field.name for field in fields]
    assert [h for h in HEADING.findall(read("docs/options.md")) if h in names] == names
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", read("README.md"), re.M))
    assert rows == {f.name: repr(f.default).replace("'", '"') for f in fields}


@needs_checkout
def test_the_example_of_a_cost_model_is_the_one_in_the_examples() -> None:
    block = next(b.text for b in blocks("docs/writing-a-cost-model.md") if b.language == "python")
    example = (ROOT / "examples" / "custom_cost_model.py").read_text("utf-8")
    assert block[block.index("class") :] in example
