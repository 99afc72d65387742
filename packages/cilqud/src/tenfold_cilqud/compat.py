"""The released checkpoints (section 4): reading them, telling what they are, and writing their layout."""

import dataclasses
import pickle
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold_cilqud.models import IncrementalNet, PreActResNet
from tenfold_shared.checkpoint import load_pickled_tensors
from tenfold_shared.errors import UserError

MAY_MISS = "num_batches_tracked"


class CheckpointError(UserError):
    """A checkpoint that is not of the released layout, or not one of the network."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the keys and shapes of a checkpoint say it is."""

    classes_per_task: int
    tasks: int
    width: int
    block: str
    blocks: tuple[int, ...]
    in_channels: int
    pruned: bool

    def build(self, **options: Any) -> PreActResNet:
        """A network of that form."""
        return PreActResNet(
            self.classes_per_task,
            self.tasks,
            width=self.width,
            block=self.block,  # type: ignore[arg-type]
            blocks=self.blocks,
            in_channels=self.in_channels,
            **options,
        )


def plain_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], bool]:
    """The state without `module.` in front of its names and with pruned weights (`weight_orig * weight_mask`) multiplied
    out, and whether there were any.
    """
    named = {name.removeprefix("module."): value for name, value in state.items()}
    strange = [name for name, value in named.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(
            f"the checkpoint's {strange[0]!r} is no tensor: give it a state dict, or one under 'state_dict'"
        )
    plain: dict[str, Tensor] = {}
    for name, value in named.items():
        if name.endswith("weight_mask"):
            continue
        if name.endswith("weight_orig"):
            mask = named.get(name.removesuffix("_orig") + "_mask")
            if mask is None:
                raise CheckpointError(f"the checkpoint has {name} and no mask for it")
            plain[name.removesuffix("_orig")] = value * mask
        else:
            plain[name] = value
    return plain, len(plain) != len(named)


def load_official_state(net: IncrementalNet, state: Mapping[str, Any]) -> IncrementalNet:
    """Fill a network from a released state, dense or pruned. Counters may be missing.

    Raises:
        CheckpointError: names or shapes that do not fit, listed.

    """
    plain, _ = plain_state(state)
    own = net.state_dict()
    missing = [name for name in own if name not in plain and not name.endswith(MAY_MISS)]
    unknown = [name for name in plain if name not in own]
    shapes = [
        f"{name} {list(plain[name].shape)} for {list(own[name].shape)}"
        for name in own
        if name in plain and plain[name].shape != own[name].shape
    ]
    problems = [
        f"{what}: {', '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''}"
        for what, names in (("missing", missing), ("not known", unknown), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise CheckpointError(f"the checkpoint does not fit the network; {'; '.join(problems)}")
    net.load_state_dict(plain, strict=False)
    return net


def recognise(state: Mapping[str, Any]) -> Layout:
    """Classes per task, tasks, width, blocks and pruning, from names and shapes.

    Raises:
        CheckpointError: the names are not those of the released networks.

    """
    plain, pruned = plain_state(state)
    heads = [name for name in plain if re.fullmatch(r"linear_main\.\d+\.weight", name)]
    if "conv1.weight" not in plain or "linear_main.0.weight" not in plain or plain["conv1.weight"].ndim != 4:
        shown = ", ".join(list(plain)[:4]) or "nothing"
        raise CheckpointError(
            f"the checkpoint is none of the released layout: conv1.weight and linear_main.0.weight are missing (it has {shown})"
        )
    block = "bottleneck" if "layer1.0.conv3.weight" in plain else "basic"
    blocks = tuple(
        len({name.split(".")[1] for name in plain if name.startswith(f"layer{stage}.")}) for stage in range(1, 5)
    )
    return Layout(
        classes_per_task=plain["linear_main.0.weight"].shape[0],
        tasks=len(heads),
        width=plain["conv1.weight"].shape[0],
        block=block,
        blocks=blocks,
        in_channels=plain["conv1.weight"].shape[1],
        pruned=pruned,
    )


def read_official(path: Path) -> dict[str, Any]:
    """The state in a released file: under `state_dict`, or the file itself. Nothing in it is executed.

    The files carry a pickled `torch.optim.SGD`; an empty object takes its place, and that of NumPy's numbers. No other class
    is looked up.
    """
    try:
        content = load_pickled_tensors(path)
    except UserError as refused:
        content = _without_optimiser(path, refused)
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path} holds no state: neither a 'state_dict' nor tensors by name")
    return state


class _Dropped:
    """What stands in for an optimiser or a number of NumPy's: it takes anything and keeps none."""

    def __init__(self, *given: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Table(dict):
    """What stands in for `defaultdict(dict)`, whose factory is not kept."""

    def __init__(self, factory: Any = None):
        super().__init__()


STAND_INS = {
    "torch.optim.sgd.SGD": _Dropped,
    "collections.defaultdict": _Table,
    "numpy.core.multiarray.scalar": _Dropped,  # such as the best accuracy, where it is a mean by NumPy
    "numpy._core.multiarray.scalar": _Dropped,
    "numpy.dtype": _Dropped,
}
LOOKED_UP = {
    "collections.OrderedDict",
    "_codecs.encode",
    "builtins.dict",
    "__builtin__.dict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.Size",
}


class _Restricted(pickle.Unpickler):
    """An unpickler that looks up tensors and plain containers alone."""

    def find_class(self, module: str, name: str) -> Any:
        wanted = f"{module}.{name}"
        if wanted in STAND_INS:
            return STAND_INS[wanted]
        if wanted not in LOOKED_UP:
            raise pickle.UnpicklingError(f"{wanted} is not looked up")
        return super().find_class(module, name)


def _without_optimiser(path: Path, refused: UserError) -> dict[str, Any]:
    """The file's content with its optimiser left out; `refused` again for anything else that is wrong with it."""
    restricted = types.ModuleType("restricted")
    restricted.Unpickler = _Restricted  # type: ignore[attr-defined]
    restricted.load = lambda file, **options: _Restricted(file, **options).load()  # type: ignore[attr-defined]
    try:
        content = torch.load(path, map_location="cpu", pickle_module=restricted, weights_only=False)
    except Exception as error:  # a damaged file can raise anything
        raise refused from error
    if not isinstance(content, dict):
        raise refused
    return content


def load_official_checkpoint(path: str | Path, **options: Any) -> PreActResNet:
    """The network of a released `task{k}_best_model.pt`, `full_model.pt` or `BU_ticket.pt`, recognised by its keys.

    `options` go to `PreActResNet`, such as the `mean` and `std` that the released code normalises images with.

    Raises:
        CheckpointError: the keys that do not fit.
        UserError: the file is unreadable, or holds other objects than tensors.

    """
    state = read_official(Path(path))
    net = recognise(state).build(**options)
    load_official_state(net, state)
    return net.eval()


def to_official(net: nn.Module, path: str | Path | None = None) -> dict[str, Any]:
    """The released layout, {'state_dict': ...}, of a network; written to `path` where one is given.

    Raises:
        CheckpointError: the network is none that the release has.

    """
    if not isinstance(net, PreActResNet):
        raise CheckpointError(f"a {type(net).__name__} has no released layout: only the pre-activation ResNets do")
    state = {name: value.detach().cpu() for name, value in net.state_dict().items() if not name.startswith("decision.")}
    content = {"state_dict": state}
    if path is not None:
        torch.save(content, path)
    return content
