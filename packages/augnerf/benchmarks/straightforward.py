"""NeRF and the released kind of adversarial step, written the obvious way: what the benchmarks compare with.

Encoding in one call a sine and a cosine, concatenations, layer after layer, one graph for the whole batch; the attack by
full backward passes, with the selection rendering of the released code.
"""

from typing import Any

import torch
from torch import nn

from tenfold_augnerf.compositing import composite, intervals
from tenfold_augnerf.sampling import importance, stratified


def encode(x, octaves):
    parts = [x]
    for k in range(octaves):
        parts += [torch.sin(x * 2.0**k), torch.cos(x * 2.0**k)]
    return torch.cat(parts, -1)


class Network(nn.Module):
    """Takes the state dict of `tenfold_augnerf.fields.NeRF`."""

    def __init__(self, depth, width, octaves, view_octaves):
        super().__init__()
        points, views = 3 * (1 + 2 * octaves), 3 * (1 + 2 * view_octaves)
        self.octaves, self.view_octaves = octaves, view_octaves
        self.mlp: Any = nn.Module()
        self.mlp.pts_linears = nn.ModuleList(
            nn.Linear(points if i == 0 else width + points * (i == 5), width) for i in range(depth)
        )
        self.mlp.alpha_linear, self.mlp.feature_linear = nn.Linear(width, 1), nn.Linear(width, width)
        self.mlp.views_linears = nn.ModuleList([nn.Linear(width + views, width // 2)])
        self.mlp.rgb_linear = nn.Linear(width // 2, 3)

    def forward(self, points, views, delta_feature=None):
        x = encode(points, self.octaves)
        h = x
        for i, linear in enumerate(self.mlp.pts_linears):
            h = torch.relu(linear(torch.cat([x, h], -1) if i == 5 else h))
        if delta_feature is not None:
            h = h + delta_feature
        alpha, feature = self.mlp.alpha_linear(h), self.mlp.feature_linear(h)
        towards = encode(views[:, None].expand(points.shape), self.view_octaves)
        h = torch.relu(self.mlp.views_linears[0](torch.cat([feature, towards], -1)))
        return torch.cat([self.mlp.rgb_linear(h), alpha], -1)


def render(coarse, fine, rays, sampling, delta, draws=None, white=True):
    near, far = (rays.origins.new_tensor([[v]]) for v in (sampling.near, sampling.far))
    views = nn.functional.normalize(rays.directions, dim=-1)
    z = stratified(near, far, len(rays.origins), sampling.coarse, jitter=None if draws is None else draws.stratified)
    shown = []
    for which, network in (("c", coarse), ("f", fine)):
        points = rays.origins[:, None] + z[..., None] * rays.directions[:, None]
        if f"pts_{which}" in delta:
            points = points + delta[f"pts_{which}"]
        raw = network(points, views, delta.get(f"feat_{which}"))
        if f"raw_{which}" in delta:
            raw = raw + delta[f"raw_{which}"]
        noise_free = torch.relu(raw[..., 3])
        result = composite(raw[..., :3].sigmoid(), noise_free, intervals(z, rays.directions), z, white=white)
        shown.append(result.rgb)
        if which == "c":
            z, _ = importance(z, result.weights, sampling.fine, None if draws is None else draws.importance)
    return shown


def loss_of(networks, rays, truth, sampling, delta, draws=None):
    coarse, fine = networks
    return sum((rgb - truth).square().mean() for rgb in render(coarse, fine, rays, sampling, delta, draws))


def clean_step(networks, rays, truth, sampling, draws=None):
    loss_of(networks, rays, truth, sampling, {}, draws).backward()


def adversarial_step(networks, rays, truth, sampling, starts, steps, draws=None):
    """One ascent step by a full backward pass, a rendering whose result is not used, then both losses."""
    leaves = {key: value.clone().requires_grad_() for key, value in starts.items()}
    loss_of(networks, rays, truth, sampling, leaves).backward()
    delta = {
        key: (leaf + steps[key].alpha * leaf.grad.sign()).clamp(-steps[key].epsilon, steps[key].epsilon).detach()
        for key, leaf in leaves.items()
    }
    for network in networks:
        network.zero_grad()
    loss_of(networks, rays, truth, sampling, delta)
    worst = loss_of(networks, rays, truth, sampling, delta)
    clean = loss_of(networks, rays, truth, sampling, {}, draws)
    (0.5 * worst + 0.5 * clean).backward()
