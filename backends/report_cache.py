"""Keeps reports beside Inductor's cache: on a warm start no pass runs, and there still is a report."""

from __future__ import annotations

import hashlib
import json
import os
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
    """Writes the entry; a folder that cannot be written to only costs the report of a warm start."""
    folder = _folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            json.dump(entry.to_dict(), file)
        os.replace(file.name, folder / f"{key}.json")
    except OSError:
        pass


def load_report(key: str) -> GraphReport | None:
    """Reads the entry that an earlier process wrote, None where there is none to be trusted."""
    path = _folder() / f"{key}.json"
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        return GraphReport.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def _folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "ardd-reports"


def _autocast() -> str:
    devices = ("cpu", "cuda")
    return " ".join(
        str(torch.get_autocast_dtype(d)) if torch.is_autocast_enabled(d) else "-" for d in devices
    )
