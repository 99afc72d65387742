"""Tomography, shapes, video, patches, corruptions and the embedded data."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tenfold_nid as nid
from tenfold_nid import ct, embedded, metrics, patches, shapes
from tenfold_nid.baselines.classical import fbp, interpolate, median_background, projection_matrix, rpca, tv
from tenfold_nid.patches import blend_windows, extract_windows
from tenfold_nid.solvers import residual_outliers
from tenfold_nid.video import mask_scores


def dictionary(**fields: object) -> nid.NeuralDictionary:
    torch.manual_seed(0)
    base: dict = {
        "num_experts": 24,
        "num_topk": 6,
        "hidden_dim": 16,
        "ffm_map_size": 16,
        "ffm_map_scale": 2.0,
        "gate": "conv",
        "gate_hidden": 8,
        "size": (8, 8),
        "num_signals": 4,
    }
    return nid.NeuralDictionary(nid.DictionaryConfig(**{**base, **fields}))


# --- tomography


@pytest.mark.parametrize("size", [(6, 9), (8, 5)])
def test_projection_is_the_mean_of_bilinear_samples(size: tuple[int, int]) -> None:
    image = torch.rand(*size, dtype=torch.float64)
    angles = nid.view_angles(4)
    assert float(angles[0]) == 0
    assert float(angles[-1]) == pytest.approx(math.pi)
    coords = nid.ray_coordinates(size, angles)
    found = nid.sinogram(image[None, ..., None], coords.double())[0, :, 0]
    grid = nid.lattice(size).double().view(*size, 2)
    for view, theta in enumerate(angles.double()):
        for i in range(size[0]):
            total = 0.0
            for j in range(size[1]):
                x, y = grid[i, j].tolist()
                u = x * math.cos(theta) - y * math.sin(theta)
                v = x * math.sin(theta) + y * math.cos(theta)
                row, col = (u + 1) / 2 * (size[0] - 1), (v + 1) / 2 * (size[1] - 1)
                for r in (math.floor(row), math.floor(row) + 1):
                    for c in (math.floor(col), math.floor(col) + 1):
                        if 0 <= r < size[0] and 0 <= c < size[1]:
                            total += float(image[r, c]) * max(0, 1 - abs(row - r)) * max(0, 1 - abs(col - c))
            assert float(found[view * size[0] + i]) == pytest.approx(total / size[1], abs=1e-6)
    matrix = projection_matrix(size, coords)
    assert torch.allclose(matrix @ image.flatten(), found, atol=1e-6)


@pytest.mark.parametrize("atoms", ["shared", "independent"])
def test_projecting_features_equals_projecting_values(atoms: str) -> None:
    model = dictionary(out_dim=1, atoms=atoms).double()
    coords = nid.ray_coordinates((8, 8), nid.view_angles(5)).double()
    images = torch.rand(2, 8, 8, 1, dtype=torch.float64)
    found = nid.project(model, images, coords).preds
    expected = model(images, coords.flatten(0, 1)).preds.view(2, *coords.shape[:2], 1).mean(2)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-13)
    design = nid.projection_design(model, coords, chunk=50)
    assert torch.allclose((model.sparse_code(images) @ design.T)[..., None], expected, rtol=1e-10, atol=1e-12)


def test_closed_form_line_integrals_agree_with_fine_projections() -> None:
    ellipses = ct.random_ellipses(2, seed=3)
    coords = nid.ray_coordinates((65, 257), nid.view_angles(5))
    exact = ct.ellipse_line_integrals(ellipses, coords)
    fine = ct.render_ellipses(ellipses, (513, 513))
    sampled = nid.sinogram(fine, coords)
    assert float((exact - sampled).abs().max()) < 0.02
    assert float((exact - sampled).abs().mean()) < 0.002
    assert float(exact.abs().max()) > 0.1


def test_a_line_integral_is_the_mean_from_the_first_sample_to_the_last() -> None:
    """Of a disc of radius 1/2 and value 2: chords of a ray of length 2 through the centre, and of half of it."""
    disc = torch.tensor([[[2.0, 0.5, 0.5, 0.0, 0.0, 0.0]]])
    across = torch.tensor([[[0.0, -1.0], [0.0, -0.9], [0.0, 1.0]], [[-1.0, 0.3], [0.5, 0.3], [1.0, 0.3]]])
    chords = [2 * 0.5, 2 * 2 * (0.5**2 - 0.3**2) ** 0.5 / 2]
    assert ct.ellipse_line_integrals(disc, across).flatten().tolist() == pytest.approx(chords)
    assert ct.ellipse_line_integrals(disc, across[:, :2])[0, 0] == 0  # which ends outside


def test_tomography_controls_recover_a_phantom() -> None:
    angles = nid.view_angles(41)
    for size in (32, 31):
        image = embedded.phantoms(1, size, seed=1)
        coords = nid.ray_coordinates((size, size), angles)
        scan = nid.sinogram(image, coords)
        found = fbp(scan, angles, size)
        assert float(nid.psnr(found, image)) > 18
        for turned in (
            found.flip(1),
            found.rot90(2, (1, 2)),
            found.transpose(1, 2),
            found.roll(1, 1),
            found.roll(-1, 2),
        ):
            assert float(nid.psnr(turned, image)) < float(nid.psnr(found, image)) - 1
    assert float(nid.psnr(tv(scan, coords, (31, 31), weight=1e-4, steps=200), image)) > 24


def test_few_views_are_spread_and_leave_the_closing_one_out() -> None:
    rays = nid.pick_views(9, 4, 4)
    assert rays.tolist() == [v * 4 + i for v in (0, 2, 4, 6) for i in range(4)]
    with pytest.raises(ValueError, match="distinct"):
        nid.pick_views(9, 4, 9)


def test_a_dictionary_fits_a_sinogram_as_it_fits_pixels() -> None:
    model = dictionary(out_dim=1, gate="codebook").double()
    coords = nid.ray_coordinates((8, 8), nid.view_angles(13)).double()
    truth = torch.randn(2, 25, dtype=torch.float64)
    design = nid.projection_design(model, coords).detach()
    scan = (truth @ design.T)[..., None]
    code = nid.ridge(nid.system(design, scan), penalty=1e-14)
    assert torch.allclose(code @ design.T, scan[..., 0], atol=1e-6)


# --- shapes


def test_marching_cubes_finds_the_sphere() -> None:
    mesh = nid.extract_mesh(lambda p: p.norm(dim=-1, keepdim=True) - 0.6, 32)
    assert float((mesh.vertices.norm(dim=-1) - 0.6).abs().max()) < 5e-3
    assert float((mesh.normals * mesh.vertices / 0.6).sum(-1).abs().min()) > 0.99
    points, normals = shapes.sample_surface(mesh, 500, torch.Generator().manual_seed(0))
    assert float((points.norm(dim=-1) - 0.6).abs().max()) < 1e-2
    distance = nid.surface_distance(points, mesh.vertices.double(), normals, mesh.normals.double())
    assert 0 < float(distance.chamfer) < float(distance.hausdorff) < 0.15
    assert distance.normal_consistency is not None
    assert float(distance.normal_consistency) > 0.98


def test_a_field_without_a_surface_is_refused() -> None:
    with pytest.raises(ValueError, match="never crosses 0"):
        nid.marching_cubes(torch.ones(8, 8, 8))


@pytest.mark.parametrize("kind", shapes.PRIMITIVES)
def test_primitives_are_distances(kind: str) -> None:
    points = (torch.rand(500, 3, dtype=torch.float64) * 2 - 1).requires_grad_()
    values = shapes.primitive_sdf(kind, points)
    (gradient,) = torch.autograd.grad(values.sum(), points)
    outside = values > 0.01
    assert int(outside.sum()) > 50
    assert torch.allclose(
        gradient[outside].norm(dim=-1), torch.ones(int(outside.sum()), dtype=torch.float64), atol=1e-6
    )
    assert bool((values < 0).any())


def test_mesh_round_trip_and_leaky_meshes(tmp_path) -> None:
    pytest.importorskip("open3d", reason="mesh files need the extra tenfold-nid[mesh]", exc_type=ImportError)
    mesh = nid.extract_mesh(lambda p: p.norm(dim=-1, keepdim=True) - 0.6, 24)
    nid.save_mesh(mesh, tmp_path / "sphere.ply")
    field = nid.sdf_from_mesh(tmp_path / "sphere.ply", 17)
    expected = nid.lattice((17, 17, 17)).norm(dim=-1).view(17, 17, 17) - 1
    assert float((field - expected).abs().max()) < 0.05
    again = shapes.read_mesh(tmp_path / "sphere.ply")
    assert float((again.vertices.norm(dim=-1) - 1).abs().max()) < 0.02
    assert float((again.vertices * again.normals).sum(-1).abs().min()) > 0.95
    nid.save_mesh(mesh._replace(faces=mesh.faces[30:]), tmp_path / "leaky.ply")
    with pytest.raises(nid.DataError, match="not watertight"):
        nid.sdf_from_mesh(tmp_path / "leaky.ply", 9)
    with pytest.raises(nid.DataError, match="suffix"):
        nid.save_mesh(mesh, tmp_path / "sphere.unknown")


def test_the_missing_mesh_library_is_named(monkeypatch) -> None:
    from tenfold_nid import errors  # noqa: PLC0415

    def fail(name: str):
        raise OSError("libusb-1.0.so.0: cannot open shared object file")

    monkeypatch.setattr(errors.importlib, "import_module", fail)
    with pytest.raises(ImportError, match=r"libusb-1\.0"):
        errors.import_open3d()


def test_the_point_cloud_loss_vanishes_for_the_true_field() -> None:
    directions = torch.nn.functional.normalize(torch.randn(200, 3, dtype=torch.float64), dim=-1)
    away = torch.full((50, 3), 0.95, dtype=torch.float64)
    loss = nid.point_cloud_loss(lambda p: p.norm(dim=-1, keepdim=True) - 0.6, 0.6 * directions, directions, away)
    assert float(loss.total.detach()) < 1e-9
    inverted = nid.point_cloud_loss(lambda p: 0.6 - p.norm(dim=-1, keepdim=True), 0.6 * directions, directions, away)
    assert inverted.normals is not None
    assert float(inverted.normals.detach()) == pytest.approx(200)


def test_meshes_are_centred_and_scaled_as_described() -> None:
    vertices = torch.rand(50, 3) * torch.tensor([1.0, 2.0, 5.0]) + 3
    scaled = shapes.normalise_vertices(vertices)
    assert float(scaled.min()) == pytest.approx(-1)
    assert float(scaled.max()) == pytest.approx(1)
    ratio = (scaled[1:] - scaled[:-1]) / (vertices[1:] - vertices[:-1])
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-2)


# --- video


def test_robust_pca_and_median_separate_what_they_must() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(30, 2, generator=generator, dtype=torch.float64) @ torch.randn(
        2, 50, generator=generator, dtype=torch.float64
    )
    sparse = torch.zeros(30, 50, dtype=torch.float64)
    where = torch.rand(30, 50, generator=generator) < 0.05
    sparse[where] = 5 * torch.randn(int(where.sum()), generator=generator, dtype=torch.float64)
    parts = rpca(low + sparse)
    assert float((parts.low_rank - low).norm() / low.norm()) < 1e-3
    video = embedded.moving_discs(40, 32)
    assert 0.02 < float(video.mask.float().mean()) < 0.6
    covered = video.mask.float().mean(dim=0) < 0.4
    assert torch.allclose(median_background(video.frames)[covered], video.background[covered])


def test_scores_of_a_mask() -> None:
    """One of three found pixels is among the two that are there: 1/3, 1/2, and their harmonic mean."""
    found, truth = torch.tensor([1, 1, 1, 0]).bool(), torch.tensor([1, 0, 0, 1]).bool()
    assert mask_scores(found, truth) == pytest.approx((1 / 3, 1 / 2, 2 / 5))
    assert mask_scores(~truth & ~found, truth) == (0.0, 0.0, 0.0)


def test_a_background_dictionary_finds_what_moves() -> None:
    video = embedded.moving_discs(24, 24, discs=2, seed=4)
    config = nid.DictionaryConfig(num_experts=8, num_topk=8, hidden_dim=48, ffm_map_size=64, ffm_map_scale=6.0)
    model = nid.background_dictionary(video.frames, config, steps=300, lr=5e-3, chunk_size=576)
    found = nid.separate(model, video.frames, background_atoms=2, floor=0.1)
    assert torch.allclose(found.background + found.foreground, video.frames, atol=1e-6)
    _, _, f1 = mask_scores(found.mask, video.mask)
    everything = mask_scores(torch.ones_like(video.mask), video.mask)[2]
    assert f1 > everything + 0.15
    again = nid.background_dictionary(video.frames, config, steps=3, lr=5e-3)
    once_more = nid.background_dictionary(video.frames, config, steps=3, lr=5e-3)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), once_more.parameters(), strict=True))


# --- patches, corruptions, inpainting


@given(height=st.integers(5, 14), width=st.integers(5, 14), stride=st.integers(1, 5), linear=st.booleans())
@settings(max_examples=40, deadline=None)
def test_windows_blend_back_to_the_image(height: int, width: int, stride: int, linear: bool) -> None:
    images = torch.rand(2, height, width, 3, dtype=torch.float64)
    windows = extract_windows(images, (5, 5), stride)
    back = blend_windows(windows, (height, width), stride, "linear" if linear else "none")
    assert torch.allclose(back, images, rtol=1e-12)


def test_patches_must_come_complete() -> None:
    with pytest.raises(ValueError, match="consecutive"):
        nid.merge_patches(torch.rand(7, 16, 3), (4, 4), (8, 8))
    with pytest.raises(ValueError, match="does not divide"):
        nid.split_patches(torch.rand(1, 9, 8, 3), (4, 4))


def test_whole_images_are_fitted_patch_by_patch_at_any_resolution() -> None:
    model = dictionary()
    images = torch.rand(2, 19, 16, 3) * 0.1 + 0.4
    patched = nid.PatchModel(model, stride=4)
    fitted = patched.reconstruct(images)
    assert fitted.shape == images.shape
    assert float(nid.psnr(fitted, images).min()) > 25
    assert patched.reconstruct(images, scale=2).shape == (2, 38, 32, 3)
    with pytest.raises(ValueError, match="smaller than a patch"):
        patched.reconstruct(torch.rand(1, 7, 16, 3))
    for stride in (-1, 0, 9):
        with pytest.raises(ValueError, match=r"lies in 1\.\.8"):
            nid.PatchModel(model, stride=stride).reconstruct(images)


class Places(nid.NeuralDictionary):
    """In the place of a dictionary of patches: a code is where a patch lies, its values are the pixels' own places."""

    def __init__(self) -> None:
        super().__init__(nid.DictionaryConfig(size=(4, 4), out_dim=2))

    def render(self, codes: torch.Tensor, coords: torch.Tensor) -> torch.Tensor:
        return (coords + 1) / 2 * 3 + codes[:, None]


@pytest.mark.parametrize("stride", [4, 3, 1])
@pytest.mark.parametrize("scale", [1, 2, 3])
def test_enlarged_patches_go_on_where_the_one_before_ends(stride: int, scale: int) -> None:
    rows, cols = patches.window_starts(10, 4, stride), patches.window_starts(7, 4, stride)
    codes = torch.cartesian_prod(torch.tensor(rows), torch.tensor(cols)).double()
    image = nid.PatchModel(Places(), stride).render(codes, (10, 7), scale)[0]
    centres = [(torch.arange(n * scale).double() + 0.5) / scale - 0.5 for n in (10, 7)]
    expected = torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1)
    assert torch.allclose(image, expected, atol=1e-5)


def test_inpainting_replaces_the_hidden_and_nothing_else() -> None:
    model = dictionary()
    images = torch.full((1, 16, 16, 3), 0.5)
    images[..., 1] = 0.3
    mask = torch.ones(1, 16, 16, dtype=torch.bool)
    mask[0, 4:7, 3:9] = False
    spoilt = torch.where(mask[..., None], images, 1.0)
    known, hidden = nid.inpaint(model, spoilt, mask)
    assert torch.equal(hidden, ~mask)
    assert torch.equal(known[mask], images[mask])
    assert float((known - images).abs().max()) < 0.1
    blind, found = nid.inpaint(model, spoilt)
    assert float((found & ~mask).sum()) == float((~mask).sum())
    assert float((blind - images)[~mask].abs().max()) < 0.1


def test_outliers_are_found_against_the_spread_of_the_residual() -> None:
    clean = torch.zeros(1, 10, 10, 3)
    noisy = clean + 0.01 * torch.randn(1, 10, 10, 3, generator=torch.Generator().manual_seed(0))
    noisy[0, 2, 3] = 1
    assert residual_outliers(noisy, clean).nonzero().tolist() == [[0, 2, 3]]


def test_the_occluded_pixels_are_those_that_changed() -> None:
    image = torch.rand(40, 50, 3)
    changed = (nid.occlude(image, 3, size=15, stripes=5) - image).abs().amax(-1) > 1 / 255
    place = nid.occluded_pixels(image, 3, size=15)
    assert not bool((changed & ~place).any())
    assert float(changed[place].float().mean()) > 0.95
    with pytest.raises(ValueError, match="does not fit"):
        nid.occlude(image, 0, size=40)


def test_masks_observe_the_same_number_everywhere() -> None:
    mask = nid.observe_fraction(5, 256, 0.1, torch.Generator().manual_seed(0))
    assert mask.sum(dim=1).tolist() == [26] * 5
    with pytest.raises(ValueError, match="at least one"):
        nid.observe_fraction(1, 4, 0.05)


def test_interpolation_keeps_observed_pixels_and_reproduces_planes() -> None:
    ramp = nid.lattice((12, 10)).sum(-1).view(1, 12, 10, 1)
    mask = nid.observe_fraction(1, 120, 0.3, torch.Generator().manual_seed(0)).view(1, 12, 10)
    mask[0, 0, 0] = mask[0, 0, -1] = mask[0, -1, 0] = mask[0, -1, -1] = True
    assert torch.allclose(interpolate(ramp, mask), ramp, atol=1e-5)
    single = torch.zeros(1, 12, 10, dtype=torch.bool)
    single[0, 3, 3] = True
    assert torch.allclose(interpolate(ramp, single), ramp[0, 3, 3].expand_as(ramp))


# --- embedded data


def test_embedded_data_is_what_it_says() -> None:
    assert embedded.photograph_patches("train").shape == (5476, 16, 16, 3)
    test = embedded.photograph_patches("test")
    assert test.shape == (64, 16, 16, 3)
    assert torch.equal(test, embedded.photograph_patches("test"))
    assert 0 <= float(test.min()) < float(test.max()) <= 1
    assert embedded.faces("train").shape == (160, 25, 25, 1)
    assert embedded.faces("test").shape == (20, 25, 25, 1)
    assert embedded.phantoms(3, 32).shape == (3, 32, 32, 1)
    fields = embedded.distance_fields(5, 16)
    assert fields.shape == (5, 16, 16, 16, 1)
    assert all(float(f.min()) < 0 < float(f.max()) for f in fields)
    with pytest.raises(ValueError, match="there are astronaut"):
        embedded.photograph("nobody")


def test_psnr_and_ssim_of_simple_cases() -> None:
    image = torch.rand(2, 3, 16, 16)
    assert torch.allclose(nid.ssim(image, image), torch.ones(2))
    assert torch.allclose(nid.psnr(image + 0.1, image), torch.full((2,), 20.0), atol=1e-4)
    np.testing.assert_array_less(nid.ssim(image, 1 - image).numpy(), 0.5)


def test_usage_and_overlap_of_supports(monkeypatch) -> None:
    codes = torch.tensor([[1.0, 0, 2, 0], [1.0, 0, 0, 3], [1.0, 0, 2, 0]])
    used, overlap = nid.atom_usage(codes)
    assert torch.allclose(used, torch.tensor([1.0, 0.0, 2 / 3, 1 / 3]))
    assert float(overlap) == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)
    monkeypatch.setattr(metrics, "USED", 2)
    assert float(nid.atom_usage(codes)[1]) == pytest.approx(float(overlap))
