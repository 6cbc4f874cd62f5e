"""Solid worlds, ray-cast: rooms, streets and table tops with textured, lit, moving solids.

One scene gives two frames with exact depth, exact flow and, for one object, its visible part and its whole. Plain torch
without loops over pixels, so it runs on any device; a scene's randomness comes from one NumPy generator.

World axes: x right, y down, z forward at the start pose. A solid is a unit shape (|x|, |y|, |z| <= 1) scaled by `half`,
turned by `pose` and put at `centre`. Rays carry z = 1 in the camera's frame, so the ray's parameter is the depth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.scenes.assets import CUTOUT_PX, TEXTURE_PX, Assets

BOX, ELLIPSOID, CYLINDER, CARD = range(4)
FAR = 1e6
HORIZON = int((TEXTURE_PX - 1) / 1.2)  # the sky's row at eye level


@dataclass(frozen=True)
class Atlas:
    """Assets as uint8 tensors: `textures` [L, T, 256, 256, 3] in L ever blurrier levels, `cutouts` [C, 224, 224, 4]."""

    textures: Tensor
    cutouts: Tensor

    @classmethod
    def of(cls, assets: Assets, rng: np.random.Generator, levels: int = 4) -> Atlas:
        """Of the assets; half of the textures are muted, as most walls and floors are."""
        base = torch.from_numpy(assets.textures).float().permute(0, 3, 1, 2)
        contrast = np.where(rng.random(len(base)) < 0.5, rng.uniform(0.1, 0.6, len(base)), 1.0)
        mean = base.mean((2, 3), keepdim=True)
        base = mean + (base - mean) * torch.from_numpy(contrast).float()[:, None, None, None]
        pyramid = [base]
        for level in range(1, levels):
            small = F.pad(F.avg_pool2d(base, 2**level), (1, 1, 1, 1), mode="circular")  # textures repeat
            wide = F.interpolate(small, scale_factor=2**level, mode="bilinear", align_corners=False)
            pyramid.append(wide[..., 2**level : -(2**level), 2**level : -(2**level)])
        textures = torch.stack(pyramid).permute(0, 1, 3, 4, 2).round().byte()
        return cls(textures.contiguous(), torch.from_numpy(assets.cutouts))


@dataclass(frozen=True)
class Solids:
    """P solids: `kind` [P], `pose` [P, 3, 3] (local to world), `centre`, `half` [P, 3], `sheet` [P] texture or cut-out,
    `tint` [P, 3], `density` [P] texture repeats per metre."""

    kind: Tensor
    pose: Tensor
    centre: Tensor
    half: Tensor
    sheet: Tensor
    tint: Tensor
    density: Tensor


@dataclass(frozen=True)
class Camera:
    """`pose` [3, 3] camera to world, `centre` [3], focal length in pixels."""

    pose: Tensor
    centre: Tensor
    focal_px: float

    def rays(self, size: int) -> Tensor:
        """World directions [size * size, 3] with z = 1 in the camera's frame."""
        axis = (torch.arange(size) + 0.5 - size / 2) / self.focal_px
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        return torch.stack([x, y, torch.ones_like(x)], -1).reshape(-1, 3) @ self.pose.T

    def project(self, points: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """World points [N, 3] -> pixel coordinates [N, 2] and depth [N]."""
        local = (points - self.centre) @ self.pose
        depth = local[:, 2].clamp(min=1e-3)
        return local[:, :2] / depth[:, None] * self.focal_px + size / 2 - 0.5, local[:, 2]


@dataclass(frozen=True)
class Light:
    """`at` [3]: a point light, or (if `sun`) the direction towards the sun."""

    at: Tensor
    sun: bool
    ambient: float
    colour: Tensor
    shadows: bool


@dataclass(frozen=True)
class World:
    """Solids now and at the second frame, two cameras, light, and what lies behind everything."""

    solids: Solids
    moved: Solids
    cameras: tuple[Camera, Camera]
    light: Light
    sky: Tensor | None
    haze_m: float
    far_m: float


@dataclass(frozen=True)
class Scene:
    """`first`, `second` [H, W, 3] uint8; `depth` [H, W] float32 metres; `flow` [H, W, 2] float32 pixels; `visible`,
    `whole` [H, W] bool of one object and `whole_rgb` [H, W, 3] uint8, or None where no object was fit to ask about."""

    first: np.ndarray
    second: np.ndarray
    depth: np.ndarray
    flow: np.ndarray
    visible: np.ndarray | None
    whole: np.ndarray | None
    whole_rgb: np.ndarray | None


def cast(world: World, atlas: Atlas, rng: np.random.Generator, size: int) -> Scene:
    """Render a world."""
    first, second = world.cameras
    rays = first.rays(size)
    hits = intersect(world.solids, first.centre, rays, atlas)
    depth, index = hits.min(1)
    radiance = _exposure(rng)
    one = shade(world, world.solids, first, rays, depth, index, atlas)
    frame = _to_uint8(one * radiance, size, rng)
    rays2 = second.rays(size)
    depth2, index2 = intersect(world.moved, second.centre, rays2, atlas).min(1)
    frame2 = _to_uint8(shade(world, world.moved, second, rays2, depth2, index2, atlas) * radiance, size, rng)
    flow = _flow(world, rays, depth, index, size)
    clipped = depth.clamp(max=world.far_m).reshape(size, size).numpy()
    return Scene(frame, frame2, clipped, flow, *_half_hidden(world, hits, index, rays, atlas, radiance, size, rng))


def intersect(solids: Solids, origin: Tensor, rays: Tensor, atlas: Atlas) -> Tensor:
    """Ray parameter [N, P] of the first hit with every solid, FAR where there is none. `origin` [3] or [N, 3]."""
    near = _reaches(solids, origin, rays)
    out = torch.full(near.shape, FAR)
    for p, kind in enumerate(solids.kind.tolist()):
        some = near[p].nonzero()[:, 0]
        start = origin if origin.ndim == 1 else origin[some]
        o = ((start - solids.centre[p]) @ solids.pose[p]) / solids.half[p]
        d = (rays[some] @ solids.pose[p]) / solids.half[p]
        d = torch.where(d.abs() < 1e-9, torch.full_like(d, 1e-9), d)
        out[p, some] = _UNIT[kind](o, d, solids.sheet[p], atlas)
    return out.T


def _reaches(solids: Solids, origin: Tensor, rays: Tensor) -> Tensor:
    """[P, N] bool: which rays may hit which solid, by a sphere around it with some room for rounding."""
    along = (solids.centre @ rays.T) - (origin * rays).sum(-1)
    apart = solids.centre.square().sum(-1, keepdim=True) - 2 * (solids.centre @ origin.reshape(-1, 3).T)
    scale = origin.square().sum(-1)
    apart = apart + scale
    radius = 1.02 * solids.half.square().sum(-1, keepdim=True) + 1e-3 + 1e-5 * scale
    return (apart <= radius) | ((along > 0) & (apart - along.square() / rays.square().sum(-1) <= radius))


def _box(o: Tensor, d: Tensor, sheet: Tensor, atlas: Atlas) -> Tensor:
    """Slabs; from inside the far wall is hit."""
    low, high = (-1 - o) / d, (1 - o) / d
    near, far = torch.minimum(low, high).amax(-1), torch.maximum(low, high).amin(-1)
    t = torch.where(near > 1e-3, near, far)
    return torch.where((near <= far) & (t > 1e-3), t, FAR)


def _quadratic(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Smaller positive root of a t^2 + 2 b t + c, FAR without one (rays that start inside see nothing)."""
    root = b * b - a * c
    t = (-b - root.clamp(min=0).sqrt()) / a.clamp(min=1e-12)
    return torch.where((root > 0) & (t > 1e-3), t, FAR)


def _ellipsoid(o: Tensor, d: Tensor, sheet: Tensor, atlas: Atlas) -> Tensor:
    return _quadratic((d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - 1)


def _cylinder(o: Tensor, d: Tensor, sheet: Tensor, atlas: Atlas) -> Tensor:
    """Upright (axis y), with caps."""
    ox, dx = o[..., ::2], d[..., ::2]
    side = _quadratic((dx * dx).sum(-1), (ox * dx).sum(-1), (ox * ox).sum(-1) - 1)
    side = torch.where((o[..., 1] + side * d[..., 1]).abs() <= 1, side, FAR)
    cap = (-torch.sign(d[..., 1]) - o[..., 1]) / d[..., 1]
    inside = ((ox + cap[..., None] * dx) ** 2).sum(-1) <= 1
    return torch.minimum(side, torch.where((cap > 1e-3) & inside, cap, FAR))


def _card(o: Tensor, d: Tensor, sheet: Tensor, atlas: Atlas) -> Tensor:
    """A flat cut-out in the plane z = 0; hit only where its picture is opaque."""
    t = -o[..., 2] / d[..., 2]
    at = o[..., :2] + t[..., None] * d[..., :2]
    inside = (t > 1e-3) & (at.abs() < 1).all(-1)
    u, v = (((at.clamp(-1, 1) + 1) / 2 * (CUTOUT_PX - 1)).long()).unbind(-1)
    return torch.where(inside & (atlas.cutouts[sheet, v, u, 3] > 127), t, FAR)


_UNIT = {BOX: _box, ELLIPSOID: _ellipsoid, CYLINDER: _cylinder, CARD: _card}


def shade(
    world: World, solids: Solids, camera: Camera, rays: Tensor, depth: Tensor, index: Tensor, atlas: Atlas
) -> Tensor:
    """Radiance [N, 3] of the hits (depth [N] on solid index [N]); the sky where depth is FAR."""
    seen = depth < FAR
    points = camera.centre + rays * depth.clamp(max=1e4)[:, None]
    local = torch.einsum("nj,njk->nk", points - solids.centre[index], solids.pose[index]) / solids.half[index]
    normal, uv = _surface(local, solids, index)
    normal = torch.einsum("njk,nk->nj", solids.pose[index], normal)
    normal = torch.where((normal * rays).sum(-1, keepdim=True) > 0, -normal, normal)
    footprint = depth * solids.density[index] * TEXTURE_PX / camera.focal_px
    albedo = _albedo(local, uv, footprint, solids, index, atlas) * solids.tint[index]
    lit = albedo * _irradiance(world.light, solids, points, normal, atlas)[:, None] * world.light.colour
    if world.sky is None:
        return torch.where(seen[:, None], lit, 0.5)
    sky = _sky(world.sky, rays)
    clear = torch.exp(-depth.clamp(max=world.far_m * 4) / world.haze_m)[:, None]
    haze = world.sky[HORIZON].mean(0)
    return torch.where(seen[:, None], lit * clear + haze * (1 - clear), sky)


def _surface(local: Tensor, solids: Solids, index: Tensor) -> tuple[Tensor, Tensor]:
    """Local normals [N, 3] and texture coordinates in metres [N, 2] of points on unit solids."""
    half, kind = solids.half[index], solids.kind[index]
    face = F.one_hot(local.abs().argmax(-1), 3).float() * torch.sign(local)
    side = torch.stack([local[:, 0], torch.zeros_like(local[:, 0]), local[:, 2]], -1)
    cap = torch.stack([torch.zeros_like(local[:, 0]), torch.sign(local[:, 1]), torch.zeros_like(local[:, 0])], -1)
    round_ = torch.where((local[:, 1].abs() > 0.999)[:, None], cap, side)
    flat = torch.tensor([0.0, 0.0, 1.0]).expand_as(local)
    options = torch.stack([face, local, round_, flat])
    normal = options[kind, torch.arange(len(kind))] / half
    metres = local * half
    angle = torch.atan2(local[:, 2], local[:, 0]) * (half[:, 0] + half[:, 2]) / 2
    across = face.abs().argmax(-1)
    box_uv = torch.stack(
        [torch.where(across == 0, metres[:, 2], metres[:, 0]), torch.where(across == 1, metres[:, 2], metres[:, 1])], -1
    )
    curved_uv = torch.stack([angle, metres[:, 1]], -1)
    uv = torch.where((kind == BOX)[:, None], box_uv, curved_uv)
    return F.normalize(normal, dim=-1), uv


def _albedo(local: Tensor, uv: Tensor, footprint: Tensor, solids: Solids, index: Tensor, atlas: Atlas) -> Tensor:
    sheet = solids.sheet[index]
    is_card = solids.kind[index] == CARD
    texel = uv * solids.density[index][:, None] * TEXTURE_PX
    u, v = (texel.floor().long() % TEXTURE_PX).unbind(-1)
    level = footprint.clamp(1, 100).log2().long().clamp(0, atlas.textures.shape[0] - 1)
    texture = atlas.textures[level, torch.where(is_card, 0, sheet), v, u]
    cu, cv = (((local[:, :2].clamp(-1, 1) + 1) / 2 * (CUTOUT_PX - 1)).long()).unbind(-1)
    card = atlas.cutouts[torch.where(is_card, sheet, 0), cv, cu, :3]
    return torch.where(is_card[:, None], card, texture).float() / 255


def _irradiance(light: Light, solids: Solids, points: Tensor, normal: Tensor, atlas: Atlas) -> Tensor:
    """[N]: ambient (stronger from above) plus one light with Lambert's law and, if it casts them, shadows."""
    towards = light.at.expand_as(points) if light.sun else light.at - points
    distance = towards.norm(dim=-1, keepdim=True).clamp(min=1e-3)
    direction = towards / distance
    cosine = (normal * direction).sum(-1).clamp(min=0)
    falloff = 1.0 if light.sun else 4 / (1 + distance[:, 0] ** 2 * 0.3)
    if light.shadows:
        lit = (cosine > 0).nonzero()[:, 0]
        reach = torch.full_like(cosine, FAR / 2) if light.sun else distance[:, 0] - 2e-2
        away = Solids(*(getattr(solids, f)[1:] for f in solids.__dataclass_fields__))
        start = points[lit] + normal[lit] * 1e-2
        blocked = intersect(away, start, direction[lit], atlas).amin(1) < reach[lit]
        cosine[lit[blocked]] *= 0.12
    ambient = light.ambient * (0.75 - 0.25 * normal[:, 1])
    return ambient + (1 - light.ambient) * cosine * falloff


def _sky(sheet: Tensor, rays: Tensor) -> Tensor:
    """A photograph's upper half or a gradient [256, 256, 3], by the ray's elevation and azimuth."""
    unit = F.normalize(rays, dim=-1)
    v = ((1 + unit[:, 1].clamp(-1, 0.2)) * HORIZON).long()
    u = ((torch.atan2(unit[:, 0], unit[:, 2]) / np.pi + 1) / 2 * TEXTURE_PX * 2).long() % TEXTURE_PX
    return sheet[v, u]


def _flow(world: World, rays: Tensor, depth: Tensor, index: Tensor, size: int) -> np.ndarray:
    """Each seen point's way to its place in the second frame; the sky only turns with the camera."""
    one, two = world.cameras
    points = one.centre + rays * depth[:, None]
    local = torch.einsum("nj,njk->nk", points - world.solids.centre[index], world.solids.pose[index])
    moved = torch.einsum("njk,nk->nj", world.moved.pose[index], local) + world.moved.centre[index]
    sky = two.centre + rays * 1e4
    target, _ = two.project(torch.where((depth < FAR)[:, None], moved, sky), size)
    source, _ = one.project(one.centre + rays, size)
    return (target - source).reshape(size, size, 2).clamp(-size, size).numpy()


def _half_hidden(
    world: World,
    hits: Tensor,
    index: Tensor,
    rays: Tensor,
    atlas: Atlas,
    radiance: Tensor,
    size: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | tuple[None, None, None]:
    """Choose one solid that is partly hidden (or, rarely, not at all) and shade it as if alone."""
    whole = hits < FAR
    whole[:, 0] = False
    visible = F.one_hot(index, hits.shape[1]).bool() & whole
    area, share = whole.float().mean(0), visible.sum(0) / whole.sum(0).clamp(min=1)
    welcome_whole = torch.from_numpy(rng.random(len(area))) < 0.15
    good = (area > 0.01) & (area < 0.5) & (share > 0.25) & ((share < 0.97) | welcome_whole)
    choices = torch.nonzero(good)[:, 0].tolist()
    if not choices:
        return None, None, None
    chosen = int(rng.choice(choices))
    inside = whole[:, chosen].nonzero()[:, 0]
    alone = torch.full_like(inside, chosen)
    lit = shade(world, world.solids, world.cameras[0], rays[inside], hits[inside, chosen], alone, atlas)
    picture = torch.zeros(len(index), 3, dtype=torch.uint8)
    picture[inside] = (lit * radiance).clamp(0, 1).pow(1 / 2.2).mul(255).byte()
    masks = (m[:, chosen].reshape(size, size).numpy() for m in (visible, whole))
    return *masks, picture.reshape(size, size, 3).numpy()


def _exposure(rng: np.random.Generator) -> Tensor:
    """Gain and white balance [3], linear."""
    return torch.tensor(np.exp(rng.normal(0.25, 0.3)) * np.exp(rng.normal(0, 0.06, 3)), dtype=torch.float32)


def _to_uint8(radiance: Tensor, size: int, rng: np.random.Generator) -> np.ndarray:
    """Gamma, sensor noise, quantisation -> [size, size, 3]."""
    picture = radiance.clamp(0, 1).pow(1 / 2.2).reshape(size, size, 3).numpy() * 255
    picture += rng.standard_normal(picture.shape, np.float32) * rng.choice([0.0, 2.0, 4.0, 8.0])
    return np.clip(picture, 0, 255).astype(np.uint8)


def turned(solids: Solids, shift: Tensor, yaw: Tensor) -> Solids:
    """Every solid moved by shift [P, 3] and turned about its upright by yaw [P]."""
    return replace(solids, centre=solids.centre + shift, pose=upright(yaw) @ solids.pose)


def upright(yaw: Tensor) -> Tensor:
    """Rotations about y, [P, 3, 3]."""
    c, s, zero, one = yaw.cos(), yaw.sin(), torch.zeros_like(yaw), torch.ones_like(yaw)
    return torch.stack([c, zero, s, zero, one, zero, -s, zero, c], -1).reshape(-1, 3, 3)


def tilt(pitch: float, roll: float) -> Tensor:
    """Pitch (positive looks down) then roll, [3, 3]."""
    cp, sp, cr, sr = np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
    about_x = torch.tensor([[1, 0, 0], [0, cp, sp], [0, -sp, cp]], dtype=torch.float32)
    about_z = torch.tensor([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]], dtype=torch.float32)
    return about_x @ about_z
