"""The released layout of checkpoints: there and back, and what is refused."""

import pytest
import straightforward
import torch

from tenfold_gnt.baselines import VolumeRenderedGNT
from tenfold_gnt.compat import (
    CheckpointError,
    load_official_checkpoint,
    load_official_state,
    official_feature_state,
    official_network_state,
    save_official_checkpoint,
)
from tenfold_gnt.features import ResUNet
from tenfold_gnt.network import GNT
from tenfold_shared.errors import UserError


def test_official_layout_round_trip(tmp_path):
    torch.manual_seed(0)
    coarse, fine, features = GNT(16, 5, 8), GNT(16, 5, 8), ResUNet(8, 8, single_net=False)
    path = tmp_path / "model_720000.pth"
    save_official_checkpoint(path, coarse, features, fine, {"optimizer": {"a": 1}})
    loaded = load_official_checkpoint(path)
    assert loaded.step == 720_000
    assert loaded.coarse.depth == 5
    assert not loaded.features.single_net
    assert loaded.training_state == {"optimizer": {"a": 1}}
    for ours, theirs in ((coarse, loaded.coarse), (fine, loaded.fine), (features, loaded.features)):
        for key, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[key])


def test_official_order_is_that_of_the_straightforward_modules():
    assert list(official_network_state(GNT(16, 3))) == list(straightforward.Network(16, 3).state_dict())
    assert list(official_feature_state(ResUNet())) == list(straightforward.FeatureNet().state_dict())


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    state = official_network_state(GNT(16, 2, 8))
    with pytest.raises(CheckpointError, match=r"missing: .*view_crosstrans\.2"):
        load_official_state(GNT(16, 3, 8), state)
    with pytest.raises(CheckpointError, match=r"of another shape: .*instead of"):
        load_official_state(GNT(24, 2, 8), state)
    with pytest.raises(UserError, match="no checkpoint at"):
        load_official_checkpoint(tmp_path / "none.pth")
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"bad\.pth is truncated or corrupted"):
        load_official_checkpoint(tmp_path / "bad.pth")
    torch.save({"net_coarse": state}, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match="lacks feature_net"):
        load_official_checkpoint(tmp_path / "part.pth")
    torch.save({"net_coarse": {"a": torch.zeros(1)}, "feature_net": {}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no GNT network"):
        load_official_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"feature_net": None}, "feature_net of .* is no dictionary of tensors"),
        ({"net_fine": None}, "net_fine of .* is no dictionary of tensors"),
        ({"net_coarse": {"norm.weight": 3}}, "net_coarse of .* is no dictionary of tensors"),
        ({"net_coarse": "width"}, "no GNT network: one of width 12"),
        ({"feature_net": {}}, r"missing: .*bn1\.bias"),
    ],
)
def test_parts_of_files_that_are_no_weights_are_refused(changes, words, tmp_path):
    state = official_network_state(GNT(16, 1, 8))
    if changes.get("net_coarse") == "width":
        changes = {"net_coarse": {**state, "rgb_fc.weight": torch.zeros(3, 12)}}
    torch.save({"net_coarse": state, "feature_net": official_feature_state(ResUNet(8)), **changes}, tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match=words):
        load_official_checkpoint(tmp_path / "m.pth")


def test_only_what_is_read_back_as_it_was_is_exported(tmp_path):
    features, rare = ResUNet(8), GNT(16, 4, 8, position_every=4)
    for ablation in (
        GNT(16, 1, 8, double_projection=False),
        GNT(16, 1, 8, view_attention="dot"),
        VolumeRenderedGNT(16, 1, 8),
    ):
        with pytest.raises(CheckpointError, match="the released layout holds"):
            save_official_checkpoint(tmp_path / "m.pth", ablation, features)
    save_official_checkpoint(tmp_path / "m.pth", rare, features)
    assert load_official_checkpoint(tmp_path / "m.pth").coarse.state_dict().keys() == rare.state_dict().keys()
