"""The method module by module, as it is usually written, to measure against.

One chunk of rays at a time (500 at rendering, all of them in a training step), keys and values per block, full
[rays, samples, views, width] logits, explicit attention matrices, poses inverted for every chunk, one autograd graph.
"""

import torch
from torch import nn
from torch.nn import functional as F


def reflect_conv(inputs, outputs, size, stride=1, bias=False):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=bias, padding_mode="reflect")


def norm(channels):
    return nn.InstanceNorm2d(channels, affine=True, track_running_stats=False)


class Basic(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = reflect_conv(inputs, outputs, 3, stride), norm(outputs)
        self.conv2, self.bn2 = reflect_conv(outputs, outputs, 3), norm(outputs)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ConvELU(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv, self.bn = reflect_conv(inputs, outputs, 3, bias=True), norm(outputs)

    def forward(self, x):
        return F.elu(self.bn(self.conv(x)))


class Up(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = ConvELU(inputs, outputs)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))


class FeatureNet(nn.Module):
    def __init__(self, channels=32):
        super().__init__()
        self.conv1, self.bn1 = reflect_conv(3, 64, 7, 2), norm(64)
        self.layer1 = nn.Sequential(Basic(64, 64, 2), Basic(64, 64, 1), Basic(64, 64, 1))
        self.layer2 = nn.Sequential(Basic(64, 128, 2), *(Basic(128, 128, 1) for _ in range(3)))
        self.layer3 = nn.Sequential(Basic(128, 256, 2), *(Basic(256, 256, 1) for _ in range(5)))
        self.upconv3, self.iconv3 = Up(256, 128), ConvELU(256, 128)
        self.upconv2, self.iconv2 = Up(128, 64), ConvELU(128, channels)
        self.out_conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        x1 = self.layer1(F.relu(self.bn1(self.conv1(x))))
        x2 = self.layer2(x1)
        x = self.iconv3(self.join(self.upconv3(self.layer3(x2)), x2))
        return self.out_conv(self.iconv2(self.join(self.upconv2(x), x1)))

    @staticmethod
    def join(up, skip):
        down, right = up.shape[2] - skip.shape[2], up.shape[3] - skip.shape[3]
        skip = F.pad(skip, (right // 2, right - right // 2, down // 2, down - down // 2))
        return torch.cat([up, skip], 1)


class Feed(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.fc1, self.fc2, self.dp = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.Dropout(dropout)

    def forward(self, x):
        return self.dp(self.fc2(self.dp(F.relu(self.fc1(x)))))


class ViewAttention(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.q_fc, self.k_fc, self.v_fc = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.pos_fc = nn.Sequential(nn.Linear(4, width // 8), nn.ReLU(), nn.Linear(width // 8, width))
        self.attn_fc = nn.Sequential(nn.Linear(width, width // 8), nn.ReLU(), nn.Linear(width // 8, width))
        self.out_fc, self.dp = nn.Linear(width, width), nn.Dropout(dropout)

    def forward(self, q, k, pos, mask):
        q = self.q_fc(q)
        k = self.k_fc(k)
        v = self.v_fc(k)
        pos = self.pos_fc(pos)
        attn = self.attn_fc(k - q[:, :, None, :] + pos)
        attn = attn.masked_fill(mask == 0, -1e9)
        attn = self.dp(torch.softmax(attn, dim=-2))
        return self.dp(self.out_fc(((v + pos) * attn).sum(dim=2)))


class RaySelfAttention(nn.Module):
    def __init__(self, width, dropout, heads=4):
        super().__init__()
        self.q_fc, self.k_fc, self.v_fc = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out_fc, self.dp, self.heads = nn.Linear(width, width), nn.Dropout(dropout), heads

    def forward(self, x):
        q, k, v = (
            fc(x).view(x.shape[0], x.shape[1], self.heads, -1).permute(0, 2, 1, 3)
            for fc in (self.q_fc, self.k_fc, self.v_fc)
        )
        attn = self.dp(torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1))
        out = (attn @ v).permute(0, 2, 1, 3).reshape(x.shape)
        return self.dp(self.out_fc(out)), attn[:, :, 0].mean(1)


class Block(nn.Module):
    def __init__(self, width, attn, dropout):
        super().__init__()
        self.attn_norm, self.ff_norm = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.ff, self.attn = Feed(width, dropout), attn


class ViewBlock(Block):
    def forward(self, q, k, pos, mask):
        q = q + self.attn(self.attn_norm(q), k, pos, mask)
        return q + self.ff(self.ff_norm(q))


class RayBlock(Block):
    def forward(self, x):
        y, attn = self.attn(self.attn_norm(x))
        x = x + y
        return x + self.ff(self.ff_norm(x)), attn


def encode(x):
    parts = [x]
    for octave in range(10):
        parts += [torch.sin(x * 2.0**octave), torch.cos(x * 2.0**octave)]
    return torch.cat(parts, -1)


class Network(nn.Module):
    def __init__(self, width=64, depth=4, channels=32, dropout=0.1):
        super().__init__()
        self.rgbfeat_fc = self.mlp(3 + channels, width)
        self.view_selftrans = nn.ModuleList(
            RayBlock(width, RaySelfAttention(width, dropout), dropout) for _ in range(depth)
        )
        self.view_crosstrans = nn.ModuleList(
            ViewBlock(width, ViewAttention(width, dropout), dropout) for _ in range(depth)
        )
        self.q_fcs = nn.ModuleList(self.mlp(width + 126, width) if i % 2 == 0 else nn.Identity() for i in range(depth))
        self.norm, self.rgb_fc = nn.LayerNorm(width), nn.Linear(width, 3)

    @staticmethod
    def mlp(inputs, width):
        return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, rgb_feat, ray_diff, mask, points, directions):
        directions = directions / directions.norm(dim=-1, keepdim=True)
        directions = encode(directions)[:, None].repeat(1, points.shape[1], 1)
        points = encode(points)
        x = self.rgbfeat_fc(rgb_feat)
        t = x.max(dim=2)[0]
        for i, (view, ray, q_fc) in enumerate(zip(self.view_crosstrans, self.view_selftrans, self.q_fcs, strict=True)):
            t = view(t, x, ray_diff, mask)
            if i % 2 == 0:
                t = q_fc(torch.cat([t, points, directions], -1))
            t, attn = ray(t)
        return self.rgb_fc(self.norm(t).mean(dim=1)), attn


def sample(points, target, images, cameras, features):
    rays, samples = points.shape[:2]
    views, height, width = len(images), images.shape[1], images.shape[2]
    flat = points.reshape(-1, 3)
    homogeneous = torch.cat([flat, torch.ones_like(flat[:, :1])], -1)
    intrinsics, poses = cameras[:, 2:18].reshape(-1, 4, 4), cameras[:, 18:].reshape(-1, 4, 4)
    q = intrinsics.bmm(torch.inverse(poses)).bmm(homogeneous.t()[None].repeat(views, 1, 1)).permute(0, 2, 1)
    pixel = (q[..., :2] / q[..., 2:3].clamp(min=1e-8)).clamp(-1e6, 1e6)
    inside = (pixel[..., 0] >= 0) & (pixel[..., 0] <= width - 1) & (pixel[..., 1] >= 0) & (pixel[..., 1] <= height - 1)
    mask = (inside & (q[..., 2] > 0)).float().t().reshape(rays, samples, views, 1).to(points)
    grid = (2 * pixel / pixel.new_tensor([width - 1.0, height - 1.0]) - 1).view(views, rays, samples, 2)
    colours = F.grid_sample(images.permute(0, 3, 1, 2), grid, align_corners=True).permute(2, 3, 0, 1)
    feats = F.grid_sample(features, grid, align_corners=True).permute(2, 3, 0, 1)
    rgb_feat = torch.cat([colours, feats], -1)
    a = target - points
    a = (a / (a.norm(dim=-1, keepdim=True) + 1e-6))[:, :, None].repeat(1, 1, views, 1)
    b = poses[:, :3, 3] - points[:, :, None]
    b = b / (b.norm(dim=-1, keepdim=True) + 1e-6)
    delta = a - b
    dot = (a * b).sum(-1, keepdim=True)
    ray_diff = torch.cat([delta / delta.norm(dim=-1, keepdim=True).clamp(min=1e-6), dot], -1)
    return rgb_feat, ray_diff, mask


def render(network, features, images, cameras, origins, directions, depths):
    points = origins[:, None] + depths[..., None] * directions[:, None]
    rgb, weights = network(*sample(points, origins[0], images, cameras, features), points, directions)
    return rgb, (weights * depths).sum(-1)
