"""Keeps reports beside Inductor's cache: a warm start runs no pass, and still has a report."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import fx

from ..core.report import GraphReport

MAX_BYTES: Final = 64 * 2**20


def report_key(gm: fx.GraphModule, inputs: Sequence[Any], identity: str) -> str:
    """Returns a name for the compilation of one marked graph."""
    digest = hashlib.sha256(f"{torch.__version__} {identity}\n".encode())
    for name, module in gm.named_modules():
        if isinstance(module, fx.GraphModule):
            digest.update(f"{name}\n{module.graph}\n".encode())
    for x in inputs:
        described = (
            f"{tuple(x.shape)} {x.stride()} {x.dtype} {x.device} {x.requires_grad}"
            if isinstance(x, torch.Tensor)
            else str(type(x))
        )
        digest.update(f"{described}\n".encode())
    digest.update(f"{torch.is_grad_enabled()} {_autocast()}".encode())
    return digest.hexdigest()


def save_report(key: str, entry: GraphReport) -> None:
    """Writes the entry; where that cannot be done, a warm start has to find out again."""
    with contextlib.suppress(OSError):
        folder = _folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            path = Path(own, "report.json")
            path.write_text(json.dumps(entry.to_dict()))
            path.replace(folder / f"{key}.json")


def load_report(key: str) -> GraphReport | None:
    """Reads the entry that an earlier compile wrote, None where there is none to be trusted."""
    try:
        path = _folder() / f"{key}.json"
        if path.stat().st_size > MAX_BYTES:
            return None
        return GraphReport.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, RecursionError):  # the last from brackets in brackets
        return None


def _folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "ardd-reports"


def _autocast() -> str:
    devices = ("cpu", "cuda")
    return " ".join(
        str(torch.get_autocast_dtype(d)) if torch.is_autocast_enabled(d) else "-" for d in devices
    )
