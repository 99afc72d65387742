"""The command line in a folder, and small checkpoints to give it."""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tenfold_nid as nid
from tenfold_nid import cli, train
from tenfold_nid.recipe import Recipe
from tenfold_shared.checkpoint import save_weights


def call(folder: Path, *arguments: str) -> tuple[int, list[dict], str]:
    """Exit code, the JSON lines of the output, and the errors of a command."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["tenfold-nid", *arguments])
        patch.setenv("TENFOLD_DATA", str(folder / "data"))
        patch.chdir(folder)
        with pytest.raises(SystemExit) as leaving:
            cli.main()
    return (
        int(leaving.value.code or 0),
        [json.loads(x) for x in out.getvalue().splitlines() if x[:1] == "{"],
        err.getvalue(),
    )


def keep(folder: Path, **shape: object) -> Path:
    """The checkpoint of a dictionary that has learned nothing."""
    torch.manual_seed(0)
    base: dict[str, Any] = {
        "num_experts": 24,
        "num_topk": 8,
        "hidden_dim": 32,
        "num_layers": 3,
        "ffm_map_size": 32,
        "ffm_map_scale": 3.0,
    }
    base |= {"gate": "strided", "gate_hidden": 8, "size": (16, 16), **shape}
    model = nid.NeuralDictionary(nid.DictionaryConfig(**base))
    path = folder / "dictionary.safetensors"
    save_weights(path, model.state_dict(), train.about(Recipe(), model))
    return path
