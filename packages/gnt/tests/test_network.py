"""The networks against the straightforward implementation, and the properties that hold for any weights."""

import pytest
import straightforward
import torch
from torch import nn

from tenfold_gnt.baselines import (
    IBRNet,
    NeRF,
    OneStageTransformer,
    VolumeRenderedGNT,
    composite,
    mean_view,
    nearest_view,
)
from tenfold_gnt.cameras import pixel_grid
from tenfold_gnt.compat import load_official_state, official_network_key
from tenfold_gnt.data import evaluation_views
from tenfold_gnt.dropout import dropout
from tenfold_gnt.encoding import encode
from tenfold_gnt.features import FeatureMaps, ResUNet
from tenfold_gnt.network import GNT, confidence_of, occlusion_of, parameter_count
from tenfold_gnt.objective import (
    Optimisation,
    accumulate_gradients,
    build_optimiser,
    choose_pixels,
    rays_in_step,
    train_step,
)
from tenfold_gnt.projection import ViewSamples, source_views
from tenfold_gnt.ray_transformer import RayAttention
from tenfold_gnt.render import Model, prepare_views, rays_per_chunk, render_picture, render_pixels, render_rays
from tenfold_gnt.seen_views import seen_views
from tenfold_gnt.train import Recipe
from tenfold_gnt.view_transformer import SubtractionAttention
from tenfold_shared.cli import load_recipe
from tenfold_shared.scenes import tabletop_views

RAYS, SAMPLES, VIEWS, CHANNELS = 3, 6, 5, 8


def inputs(seed: int = 0, views: int = VIEWS):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    mask = (torch.rand(RAYS, SAMPLES, views, 1, generator=generator) > 0.3).to(draw(1))
    mask[0, 0] = 0
    samples = ViewSamples(draw(RAYS, SAMPLES, views, 3 + CHANNELS), draw(RAYS, SAMPLES, views, 4), mask)
    return samples, draw(RAYS, SAMPLES, 3), draw(RAYS, 3)


def small(**options) -> GNT:
    torch.manual_seed(1)
    return GNT(16, 3, CHANNELS, **options)


class TinyFeatures(nn.Module):
    """A feature network small enough for tests of everything after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 3, 2, 1)

    def forward(self, images):
        maps = self.conv(images).relu()
        return FeatureMaps(maps, maps)


@pytest.fixture(scope="module")
def views():
    return evaluation_views(tabletop_views(1, count=7, size=20), 2, 4, "vector")


@pytest.mark.usefixtures("double")
def test_network_and_its_gradients_equal_the_straightforward_one():
    torch.manual_seed(0)
    reference = straightforward.Network(16, 3, CHANNELS).eval()
    network = GNT(16, 3, CHANNELS).eval()
    load_official_state(network, reference.state_dict())
    samples, points, directions = inputs()
    leaf = samples.rgb_feat.requires_grad_()
    rgb, weights = reference(*samples, points, directions)
    (rgb.sum() + (weights * torch.arange(SAMPLES)).sum()).backward()
    expected, leaf.grad = leaf.grad, None
    found = network(samples, points, directions, return_weights=True)
    (found.rgb.sum() + (found.weights * torch.arange(SAMPLES)).sum()).backward()
    torch.testing.assert_close(found.rgb, rgb, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.weights, weights, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-9, atol=1e-11)
    theirs = dict(reference.named_parameters())
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.grad, theirs[official_network_key(name)].grad, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (40, 56)])
def test_feature_network_equals_the_straightforward_one(size):
    torch.manual_seed(0)
    reference, network = straightforward.FeatureNet(8), ResUNet(8)
    load_official_state(network, reference.state_dict())
    images = torch.rand(2, 3, *size)
    maps = network(images)
    torch.testing.assert_close(maps.coarse, reference(images), rtol=1e-9, atol=1e-9)
    assert maps.coarse is maps.fine
    assert maps.coarse.shape[2:] == tuple(4 * -(-side // 16) for side in size)


def test_small_images_are_refused():
    with pytest.raises(ValueError, match="at least 17"):
        ResUNet()(torch.zeros(1, 3, 16, 40))


def test_parameter_counts_of_the_paper():
    assert parameter_count(GNT(64, 4)) == 444_739
    assert parameter_count(GNT(64, 8)) == 882_691
    assert parameter_count(ResUNet()) == 8_877_056
    assert parameter_count(ResUNet(single_net=False)) == 8_917_120
    assert parameter_count(IBRNet()) == 20_136
    assert parameter_count(GNT(32, 2)) == 59_891


@pytest.mark.usefixtures("double")
def test_order_of_views_does_not_matter():
    network = small().eval()
    samples, points, directions = inputs()
    turned = ViewSamples(*(x.flip(2) for x in samples))
    first, second = (network(s, points, directions, return_view_weights=True) for s in (samples, turned))
    torch.testing.assert_close(first.rgb, second.rgb, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(first.view_weights, second.view_weights.flip(2), rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("double_projection", [True, False])
def test_masked_views_have_no_say_and_no_view_at_all_means_the_mean(double_projection):
    torch.manual_seed(0)
    attention = SubtractionAttention(16, double_projection=double_projection).eval()
    tokens, features = torch.randn(4, 16), torch.randn(4, 3, 16)
    directions = torch.randn(4, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1.0]])[..., None]
    found = attention(tokens, features, directions, mask, return_weights=True)
    torch.testing.assert_close(found.view_weights[2], torch.full((3,), 1 / 3))
    assert found.view_weights[0, 2] == 0
    changed = features.clone()
    changed[0, 2] += 5
    torch.testing.assert_close(attention(tokens, changed, directions, mask).values[0], found.values[0])
    # Against the equations, view by view.
    keys = attention.key(features)
    values = attention.value(keys if double_projection else features)
    position = attention.position(directions)
    logits = attention.weight(keys - attention.query(tokens)[:, None] + position).masked_fill(mask == 0, -1e9)
    expected = attention.out((logits.softmax(1) * (values + position)).sum(1))
    torch.testing.assert_close(found.values, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_hold_under_autocast(dtype):
    network = small().eval()
    samples, points, directions = inputs()
    with torch.autocast("cpu", dtype=dtype):
        rays = network(samples, points, directions, return_weights=True, return_view_weights=True)
    assert rays.rgb.isfinite().all()
    assert (rays.view_weights[(samples.mask == 0).squeeze(-1) & (samples.mask.amax(2) > 0)] == 0).all()
    full = network(samples, points, directions)
    assert (rays.rgb.float() - full.rgb).abs().max() < 0.1


def test_leaving_out_masked_views_changes_nothing():
    """Colours, attention over the views and gradients, with a point that no view sees and some that all see."""
    samples, points, directions = (x.double() if isinstance(x, torch.Tensor) else x for x in inputs())
    mask = samples.mask.clone()
    mask[1] = 1
    found = []
    for packs in (True, False):
        network = small().double().eval()
        network.packs_views = packs
        features = samples.rgb_feat.double().requires_grad_()
        pairs = ViewSamples(features, samples.ray_diff.double(), mask.double())
        rays = network(pairs, points, directions, return_weights=True, return_view_weights=True)
        (rays.rgb.square().sum() + (rays.view_weights * torch.arange(VIEWS)).sum()).backward()
        found.append([*rays, features.grad, *(p.grad for p in network.parameters())])
    for ours, dense in zip(*found, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-12)
    assert seen_views(torch.zeros(2, VIEWS, 8), torch.zeros(2, VIEWS, 4), torch.ones(2, VIEWS, 1)) is None
    seen = seen_views(torch.zeros(RAYS, SAMPLES, VIEWS, 8), torch.zeros(RAYS, SAMPLES, VIEWS, 4), mask)
    assert seen is not None
    assert seen.blind
    assert len(seen.pairs) == int(mask.sum()) + int((mask.sum(2) == 0).sum()) * VIEWS


def test_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(3, 5, 20001, dtype=torch.float64, requires_grad=True)
    dropped = dropout(x, 0.1, training=True)
    share = (dropped == 0).double().mean()
    assert abs(share - 0.1) < 0.003  # five standard deviations
    assert dropped.max().item() == pytest.approx(1 / 0.9, rel=1e-4)
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped.detach())
    torch.manual_seed(0)
    assert torch.equal(dropout(x, 0.1, training=True), dropped)
    assert dropout(x, 0.1, training=False) is x
    assert dropout(x, 0.0, training=True) is x


def test_gradients_are_finite_where_no_view_sees_a_point():
    network = small()
    samples, points, directions = inputs()
    samples = samples._replace(mask=torch.zeros_like(samples.mask), rgb_feat=samples.rgb_feat.requires_grad_())
    network(samples, points, directions).rgb.sum().backward()
    assert samples.rgb_feat.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_attention_sums_to_one_also_in_training():
    samples, points, directions = inputs()
    network = small().train()
    weights = network(samples, points, directions, return_weights=True).weights
    torch.testing.assert_close(weights.sum(-1), torch.ones(RAYS))
    attention = RayAttention(16, weights_after_dropout=True).train()
    torch.manual_seed(0)
    released = attention(torch.randn(5, 12, 16), return_weights=True).weights
    assert (released.sum(-1) - 1).abs().max() > 1e-3


def test_no_rays_have_no_colours():
    samples, points, directions = inputs()
    none = ViewSamples(*(x[:0] for x in samples))
    rays = small().eval()(none, points[:0], directions[:0], return_weights=True, return_view_weights=True)
    assert [tuple(x.shape) for x in rays] == [(0, 3), (0, SAMPLES), (0, SAMPLES, VIEWS)]


def test_position_every_block_and_dot_attention():
    samples, points, directions = inputs()
    assert len(small(position_every=1).position_mlps) == 3
    assert len(small().position_mlps) == 2
    for network in (small(position_every=1), small(view_attention="dot"), small(double_projection=False)):
        assert network.eval()(samples, points, directions).rgb.shape == (RAYS, 3)
    with pytest.raises(ValueError, match="multiple of 8"):
        GNT(20)


@pytest.mark.parametrize("make", [
    lambda: VolumeRenderedGNT(16, 2, CHANNELS),
    lambda: OneStageTransformer(16, 2, CHANNELS),
    lambda: IBRNet(CHANNELS),
    lambda: NeRF(32),
    lambda: GNT(16, 2, CHANNELS),
])  # fmt: skip
def test_every_arm_renders_and_learns(make):
    torch.manual_seed(0)
    network = make()
    samples, points, directions = inputs()
    rays = network(samples, points, directions, return_weights=True, return_view_weights=True)
    assert rays.rgb.shape == (RAYS, 3)
    assert rays.weights.shape == (RAYS, SAMPLES)
    assert (rays.weights >= 0).all()
    assert (rays.weights.sum(-1) <= 1 + 1e-5).all()
    rays.rgb.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("seed", [4, 11])
def test_nerf_has_density_to_begin_with(seed):
    """A rectifier that is zero everywhere would never learn, as these seeds' would."""
    torch.manual_seed(seed)
    network = NeRF()
    points = torch.rand(16, 12, 3, generator=torch.Generator().manual_seed(0)) * 3 - 1.5
    samples = ViewSamples(torch.zeros(16, 12, 1, 3), torch.zeros(16, 12, 1, 4), torch.ones(16, 12, 1, 1))
    rays = network(samples, points.sort(1).values, torch.ones(16, 3), return_weights=True)
    assert (rays.weights[:, :-1] > 0).any()
    rays.rgb.sum().backward()
    assert network.density.weight.grad.any()


@pytest.mark.usefixtures("double")
def test_compositing_against_a_loop():
    rgb, sigma = torch.rand(2, 7, 3), torch.rand(2, 7) * 2
    for white in (False, True):
        found = composite(rgb, sigma, white=white)
        for r in range(2):
            through, colour = 1.0, torch.zeros(3)
            for s in range(7):
                alpha = 1 - torch.exp(-sigma[r, s])
                colour = colour + through * alpha * rgb[r, s]
                assert float(found.weights[r, s]) == pytest.approx(float(through * alpha))
                through = through * (1 - alpha + 1e-10)
            rest = 1 - found.weights[r].sum() if white else 0
            torch.testing.assert_close(found.rgb[r], colour + rest)


def test_floors(views):
    rgb = nearest_view(views.camera, views.images, views.cameras)
    assert any(torch.equal(rgb, image) for image in views.images)
    scene = tabletop_views(1, count=7, size=20, specular=0.0)
    flat = evaluation_views(scene, 2, 6, "vector")
    batch = flat.rays(400, torch.Generator().manual_seed(0))
    depth = torch.from_numpy(scene.depth[2]).float()
    pixels = choose_pixels(20, 20, 400, torch.Generator().manual_seed(0))
    depth = depth[pixels[:, 1], pixels[:, 0]]
    hit = depth.isfinite()
    assert len(batch.rgb) == 400  # never more pixels than there are
    mean = mean_view(batch.origins[hit], batch.directions[hit], depth[hit], source_views(flat.images, flat.cameras))
    middle = mean_view(
        batch.origins[hit],
        batch.directions[hit],
        torch.full_like(depth[hit], 2.2),
        source_views(flat.images, flat.cameras),
    )
    assert (mean - batch.rgb[hit]).abs().mean() < (middle - batch.rgb[hit]).abs().mean()


def test_encoding_order():
    x = torch.tensor([[0.3, -0.2, 0.5]])
    code = encode(x)
    assert code.shape == (1, 63)
    torch.testing.assert_close(code[:, 9:12], torch.sin(2 * x))
    torch.testing.assert_close(code[:, 60:], torch.cos(512 * x))


def test_confidence_and_occlusion():
    uniform, certain = torch.full((1, 8), 1 / 8), torch.eye(8)[:1]
    torch.testing.assert_close(
        confidence_of(torch.cat([uniform, certain])), torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0
    )
    assert confidence_of(torch.zeros(2, 8)).tolist() == [0.0, 0.0]  # a composited ray that meets nothing
    torch.testing.assert_close(confidence_of(certain / 4), torch.tensor([0.25]))
    weights = torch.zeros(1, 5, 3)
    weights[0, :, 1], weights[0, 0, 2], weights[0, 1, 0] = 0.5, 0.9, 0.8
    assert occlusion_of(weights).tolist() == [1]


# --- rendering -------------------------------------------------------------------------------------------------------


def in_double(views):
    return views._replace(**{k: getattr(views, k).double() for k in ("rgb", "camera", "images", "cameras")})


def model() -> Model:
    torch.manual_seed(0)
    return Model(TinyFeatures(), GNT(16, 2, CHANNELS))


def test_maps_to_render_from_lie_pixel_by_pixel(views):
    model = Model(ResUNet(8), small()).eval()
    images, cameras = views.images, views.cameras
    with torch.no_grad():
        maps = prepare_views(model, images, cameras).maps
    assert maps.coarse.is_contiguous(memory_format=torch.channels_last)
    assert maps.fine is maps.coarse
    torch.testing.assert_close(maps.coarse, prepare_views(model, images, cameras).maps.coarse)


@pytest.mark.usefixtures("double")
def test_chunks_do_not_change_the_picture(views):
    whole = model().eval()
    views = in_double(views)
    prepared = prepare_views(whole, views.images, views.cameras)
    sampling = views.sampling(8, 4)
    pixels = pixel_grid(20, 20)
    one = render_pixels(whole, prepared, views.camera, pixels, sampling, occlusion=True)
    small_chunks = render_pixels(whole, prepared, views.camera, pixels, sampling, occlusion=True, memory=1)
    for a, b in zip(one[:3], small_chunks[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert (one[3] == small_chunks[3]).float().mean() > 0.99  # ties may fall either way


def test_pictures(views):
    network = model().train()
    prepared = prepare_views(network, views.images, views.cameras)
    picture = render_picture(network, prepared, views.camera, views.sampling(8), stride=2, occlusion=True)
    assert network.training
    again = render_picture(network, prepared, views.camera, views.sampling(8), stride=2)
    torch.testing.assert_close(picture.rgb, again.rgb, rtol=0, atol=0)  # no dropout, no jitter
    assert picture.rgb.shape == (10, 10, 3)
    assert picture.occlusion.shape == (10, 10)
    assert again.occlusion is None
    assert picture.rgb.min() >= 0
    assert picture.rgb.max() <= 1
    assert views.near <= picture.depth.min()
    assert picture.depth.max() <= views.far
    half = render_picture(network, prepared, views.camera, views.sampling(8), resize=0.5)
    assert half.rgb.shape == (10, 10, 3)


def test_memory_budget_bounds_the_chunk():
    like = torch.zeros(1)
    assert rays_per_chunk(192, 10, 64, like, memory=1) == 1
    assert rays_per_chunk(8, 4, 16, like) > rays_per_chunk(192, 10, 64, like) >= 1


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("importance", [0, 4])
def test_gradients_by_chunk_are_those_of_the_whole(importance):
    scene = tabletop_views(1, count=5, size=20)
    item = evaluation_views(scene, 2, 3, "vector")
    item = in_double(item)
    batch = item.rays(9, torch.Generator().manual_seed(0), wanted_views=3)
    both = []
    for memory in (1, 10**12):
        network = model().eval()
        result = accumulate_gradients(network, batch, item.sampling(6, importance), jitter=False, memory=memory)
        assert len(result.losses) == 1 + (importance > 0)
        both.append((result, {name: p.grad for name, p in network.named_parameters()}))
    torch.testing.assert_close(both[0][0].loss, both[1][0].loss)
    for name, gradient in both[0][1].items():
        torch.testing.assert_close(gradient, both[1][1][name], rtol=1e-9, atol=1e-12)
    # And against one graph over all rays.
    network = model().eval()
    levels = render_rays(
        network, prepare_views(network, batch.images, batch.cameras), batch.origins, batch.directions,
        item.sampling(6, importance),
    )  # fmt: skip
    torch.stack([(level.rgb - batch.rgb).square().mean() for level in levels]).sum().backward()
    for name, p in network.named_parameters():
        torch.testing.assert_close(both[0][1][name], p.grad, rtol=1e-9, atol=1e-12)


def test_training_lowers_the_loss(views):
    network = model().train()
    optimiser, scheduler = build_optimiser(network, Optimisation(5e-3, 5e-3, decay_every=40))
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        batch = views.rays(64, generator, wanted_views=4)
        losses.append(train_step(network, batch, views.sampling(8), optimiser, scheduler, generator=generator).loss)
    losses = torch.stack(losses)
    assert losses[-10:].mean() < 0.6 * losses[:5].mean()
    assert optimiser.param_groups[0]["lr"] == 2.5e-3


def test_the_exponential_schedule_decays_at_every_step():
    """NeRF's: a step schedule over as many steps as it is trained for would never decay."""
    network = Model(TinyFeatures(), NeRF())
    settings = load_recipe("tenfold_gnt", "llff-nerf", Recipe).optimisation
    optimiser, scheduler = build_optimiser(network, settings)
    rates = []
    for _ in range(3):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    assert rates == pytest.approx([5e-4 * 0.1 ** (step / 250_000) for step in range(3)], rel=1e-12)


def test_pixels_are_distinct_and_central():
    pixels = choose_pixels(20, 30, 200, torch.Generator().manual_seed(0), centre=0.8)
    assert len(pixels.unique(dim=0)) == 200
    assert pixels[:, 0].min() >= 3
    assert pixels[:, 0].max() <= 26
    assert pixels[:, 1].min() >= 2
    assert pixels[:, 1].max() <= 17
    middle = choose_pixels(20, 31, 200, torch.Generator().manual_seed(0), centre=0.01)
    assert middle.unique(dim=0).tolist() == [[15, 9], [15, 10]]
    assert rays_in_step(2048, 10, 8) == 2560
    assert rays_in_step(1, 10, 12) == 1


def test_position_codes_reach_as_far_as_there_are_samples():
    torch.manual_seed(0)
    long = IBRNet(CHANNELS).eval()
    short = IBRNet(CHANNELS, samples=SAMPLES - 2).eval()
    short.load_state_dict(long.state_dict())
    torch.testing.assert_close(short(*inputs()).rgb, long(*inputs()).rgb)
