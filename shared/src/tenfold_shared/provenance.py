"""What a reader of a result needs to know of its making: versions, device, command line, commit."""

import datetime
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, commit, device and command line: what a reader of a result needs to know of its making."""
    packages = sorted(
        f"{d.metadata['Name']}=={d.version}"
        for d in metadata.distributions()
        if (d.metadata["Name"] or "").split("-")[0]
        in {"torch", "torchvision", "numpy", "accelerate", "timm", "tenfold"}
    )
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "commit": commit(),
        "command": _command(),
    }


def _command() -> str:
    """The command line, but for the folder of this machine that its output went to."""
    program = Path(sys.argv[0])
    name = f"python -m {program.parent.name}" if program.name == "__main__.py" else program.name
    return re.sub(r" --output[ =]\S+", "", " ".join([name, *sys.argv[1:]]))


def commit() -> str | None:
    """The commit of the source tree this module lies in, marked when the tree is dirty; None when installed."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
