"""Where the solids stand: random rooms, streets and table tops for `raycast`.

Everything is drawn from one NumPy generator, so a seed is a world.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from training.scenes.raycast import (
    BOX,
    CARD,
    CYLINDER,
    ELLIPSOID,
    Atlas,
    Camera,
    Light,
    Solids,
    World,
    tilt,
    turned,
    upright,
)

Rng = np.random.Generator


class Builder:
    """Collects solids; y is down, so what stands on the floor has a negative half height above it.

    Solids of one group move together: `groups` has each solid's, and group 0 never moves.
    """

    def __init__(self, atlas: Atlas, rng: Rng) -> None:
        self.atlas, self.rng = atlas, rng
        self.groups: list[int] = []
        self._group: int | None = None
        self.rows: list[tuple[int, float, list[float], list[float], int, list[float], float]] = []

    @contextmanager
    def as_one(self, fixed: bool = False) -> Iterator[None]:
        """What is added meanwhile is one group."""
        self._group = 0 if fixed else self._next_group()
        yield
        self._group = None

    def _next_group(self) -> int:
        return max(self.groups, default=0) + 1

    def add(
        self,
        kind: int,
        centre: list[float],
        half: list[float],
        yaw: float = 0.0,
        density: float | None = None,
        paint: bool = False,
    ) -> None:
        """`density`: texture repeats per metre; `paint` blows the texture up until it is nearly plain."""
        rng = self.rng
        sheets = self.atlas.cutouts.shape[0] if kind == CARD else self.atlas.textures.shape[1]
        tint = rng.uniform(0.55, 1.1) * np.exp(rng.normal(0, 0.08, 3))
        if density is None:
            density = float(np.exp(rng.uniform(-1.2, 0.7))) / max(half[0], half[1])
        if paint or rng.random() < 0.3:
            density *= 0.03
        self.groups.append(self._next_group() if self._group is None else self._group)
        self.rows.append((kind, yaw, centre, half, int(rng.integers(sheets)), list(tint), density))

    def stand(self, kind: int, x: float, z: float, floor: float, half: list[float], yaw: float | None = None) -> None:
        """Put a solid on the floor."""
        turn = self.rng.uniform(0, np.pi) if yaw is None else yaw
        self.add(kind, [x, floor - half[1], z], half, turn)

    def table(self, x: float, z: float, floor: float) -> None:
        """A top on four legs, with things on it."""
        rng = self.rng
        w, h, d, yaw = rng.uniform(0.4, 0.9), rng.uniform(0.4, 0.9), rng.uniform(0.3, 0.6), rng.uniform(0, np.pi)
        turn = upright(torch.tensor([yaw]))[0].numpy()
        with self.as_one():
            self.add(BOX, [x, floor - h, z], [w, 0.03, d], yaw)
            for sx, sz in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
                at = turn @ np.array([sx * (w - 0.05), 0, sz * (d - 0.05)])
                self.add(BOX, [x + at[0], floor - h / 2, z + at[2]], [0.03, h / 2, 0.03], yaw)
            for _ in range(rng.integers(1, 4)):
                at = turn @ np.array([rng.uniform(-0.8, 0.8) * w, 0, rng.uniform(-0.8, 0.8) * d])
                kind, half = int(rng.choice([BOX, ELLIPSOID, CYLINDER])), list(rng.uniform(0.05, 0.18, 3))
                self.stand(kind, x + at[0], z + at[2], floor - h - 0.03, half)

    def parts(self, x: float, z: float, floor: float, yaw: float, boxes: list[tuple[float, ...]]) -> None:
        """One piece of furniture of boxes (right, above the floor, behind, and their halves), all of one texture but
        for a few, turned by `yaw`."""
        turn = upright(torch.tensor([yaw]))[0].numpy()
        first = len(self.rows)
        with self.as_one():
            for right, above, behind, *half in boxes:
                at = turn @ np.array([right, 0, behind])
                self.add(BOX, [x + at[0], floor - above, z + at[2]], half, yaw)
        kind, _, _, _, sheet, tint, density = self.rows[first]
        for i in range(first + 1, len(self.rows)):
            if self.rng.random() < 0.8:
                self.rows[i] = (kind, *self.rows[i][1:4], sheet, tint, density)

    def chair(self, x: float, z: float, floor: float) -> None:
        """A seat, a back and four legs."""
        rng = self.rng
        w, h, d, back = *rng.uniform(0.18, 0.28, 3), rng.uniform(0.2, 0.4)
        legs = [(sx * (w - 0.03), h, sz * (d - 0.03), 0.025, h, 0.025) for sx in (-1, 1) for sz in (-1, 1)]
        seat = [(0.0, 2 * h, 0.0, w, 0.03, d), (0.0, 2 * h + back, d - 0.02, w, back, 0.02)]
        self.parts(x, z, floor, rng.uniform(0, 2 * np.pi), [*seat, *legs])

    def sofa(self, x: float, z: float, floor: float) -> None:
        """A sofa, an armchair or a bed: a body, a back, perhaps arms and a cushion or two."""
        rng = self.rng
        w, h, d = rng.uniform(0.4, 1.1), rng.uniform(0.15, 0.28), rng.uniform(0.35, 1.0)
        boxes = [(0.0, h, 0.0, w, h, d), (0.0, h + 0.25, d, w, h + 0.25, 0.1)]
        if rng.random() < 0.7:
            boxes += [(side * w, h + 0.1, 0.0, 0.1, h + 0.1, d) for side in (-1, 1)]
        for _ in range(rng.integers(0, 3)):
            boxes.append((rng.uniform(-0.7, 0.7) * w, 2 * h + 0.12, 0.6 * d, 0.2, 0.14, 0.08))
        self.parts(x, z, floor, rng.choice([0, np.pi / 2, np.pi, -np.pi / 2]) + rng.normal(0, 0.15), boxes)

    def shelf(self, x: float, z: float, floor: float, yaw: float, half: list[float]) -> None:
        """An open case against a wall, with books and boxes on its boards."""
        rng = self.rng
        w, h, d = half
        count = int(rng.integers(2, 5))
        sides = [(side * w, h, 0.0, 0.02, h, d) for side in (-1, 1)]
        self.parts(x, z, floor, yaw, [(0.0, h, d, w, h, 0.01), *sides])
        turn = upright(torch.tensor([yaw]))[0].numpy()
        for board in range(count + 1):
            top = 2 * h * board / count
            self.add(BOX, [x, floor - top, z], [w, 0.015, d], yaw)
            for _ in range(rng.integers(0, 4) if board < count else 0):
                thing = [rng.uniform(0.03, 0.3) * w, rng.uniform(0.3, 0.9) * h / count, 0.7 * d]
                at = turn @ np.array([rng.uniform(-0.8, 0.8) * w, 0, 0])
                self.add(BOX, [x + at[0], floor - top - thing[1], z + at[2]], thing, yaw)

    def solids(self) -> Solids:
        kind, yaw, centre, half, sheet, tint, density = zip(*self.rows, strict=True)
        floats = [torch.tensor(np.array(v), dtype=torch.float32) for v in (centre, half, tint, density)]
        poses = upright(torch.tensor(np.array(yaw), dtype=torch.float32))
        return Solids(torch.tensor(kind), poses, floats[0], floats[1], torch.tensor(sheet), floats[2], floats[3])


def room(atlas: Atlas, rng: Rng, size: int) -> World:
    """A closed room seen from inside at eye, sitting or robot height."""
    b = Builder(atlas, rng)
    w, h, d = rng.uniform(1.2, 3.5), rng.uniform(1.1, 1.7), rng.uniform(1.5, 5)
    with b.as_one(fixed=True):
        _shell(b, w, h, d)
    for _ in range(rng.integers(0, 3)):
        b.table(rng.uniform(-0.8, 0.8) * w, rng.uniform(-0.5, 0.9) * d, h)
    for _ in range(rng.integers(1, 9)):
        size3 = np.exp(rng.uniform(np.log(0.08), np.log(0.7), 3))
        kind = int(rng.choice([BOX, BOX, ELLIPSOID, CYLINDER]))
        b.stand(kind, rng.uniform(-0.9, 0.9) * w, rng.uniform(-0.6, 0.95) * d, h, list(size3))
    for _ in range(rng.integers(0, 4)):  # shelves and cupboards against the walls
        tall = [rng.uniform(0.2, 0.6), rng.uniform(0.4, 0.95) * h, rng.uniform(0.15, 0.35)]
        back = rng.random() < 0.6
        x = rng.uniform(-0.8, 0.8) * w if back else rng.choice([-1, 1]) * (w - tall[2])
        z = d - tall[2] if back else rng.uniform(-0.3, 0.9) * d
        yaw = 0.0 if back else np.sign(x) * np.pi / 2
        if rng.random() < 0.4:
            b.shelf(x, z, h, yaw, tall)
        else:
            b.stand(BOX, x, z, h, tall, yaw)
    for put in (b.chair, b.sofa):
        for _ in range(rng.integers(0, 3)):
            put(rng.uniform(-0.8, 0.8) * w, rng.uniform(-0.5, 0.9) * d, h)
    for _ in range(rng.integers(0, 3)):
        _person(b, rng.uniform(-0.7, 0.7) * w, rng.uniform(-0.2, 0.8) * d, h, rng.uniform(0.5, 0.85))
    eye = torch.tensor([rng.uniform(-0.5, 0.5) * w, rng.uniform(-0.5, 0.6) * h, -d * rng.uniform(0.3, 0.95)])
    camera = _camera(eye, rng, size, pitch=rng.normal(0.12, 0.17), yaw=rng.normal(0, 0.4))
    lamp = torch.tensor([rng.uniform(-0.6, 0.6) * w, -0.9 * h, rng.uniform(-0.6, 0.6) * d])
    light = Light(lamp.float(), False, rng.uniform(0.35, 0.7), _warmth(rng), rng.random() < 0.5)
    return _world(b, camera, rng, light, None, 40.0)


def _shell(b: Builder, w: float, h: float, d: float) -> None:
    """Walls, a floor and often a ceiling of other stuff, pictures and windows on the far wall."""
    rng = b.rng
    b.add(BOX, [0, 0, 0], [w, h, d], density=float(rng.uniform(0.2, 1.2)), paint=rng.random() < 0.6)
    b.add(BOX, [0, h + 0.499, 0], [w, 0.5, d], density=float(rng.uniform(0.3, 2)))
    if rng.random() < 0.7:
        b.add(BOX, [0, -h - 0.499, 0], [w, 0.5, d], density=0.3, paint=True)
    for _ in range(rng.integers(0, 4)):
        half = [rng.uniform(0.2, 0.7), rng.uniform(0.2, 0.5), 0.02]
        at = [rng.uniform(-0.8, 0.8) * w, rng.uniform(-0.7, 0.2) * h, d - 0.02]
        b.add(BOX, at, half, density=1 / (2 * half[0]))


def _still_street(b: Builder, floor: float, gap: float, far: float) -> None:
    """Ground, houses along both sides `gap` metres from the middle, trees."""
    rng = b.rng
    b.add(BOX, [0, floor + 0.5, 0], [400, 0.5, 400], density=float(np.exp(rng.uniform(-3, -0.5))))
    for side in (-1, 1):
        z = rng.uniform(0, 10)
        while z < far and rng.random() < 0.93:
            half = [rng.uniform(2, 6), rng.uniform(1.5, 7), rng.uniform(2, 7)]
            b.stand(BOX, side * (gap + half[0] + rng.uniform(0, 4)), z + half[2], floor, half, 0.0)
            z += 2 * half[2] + rng.choice([0.0, rng.uniform(0, 12)])
    for _ in range(rng.integers(0, 7)):
        x, z, tall = rng.choice([-1, 1]) * rng.uniform(2, gap + 3), rng.uniform(4, 40), rng.uniform(1, 2.5)
        crown = rng.uniform(0.8, 2.2)
        b.stand(CYLINDER, x, z, floor, [rng.uniform(0.1, 0.3), tall / 2 + 0.5, 0.2])
        b.add(ELLIPSOID, [x, floor - tall - crown * 0.8, z], [crown, crown, crown])


def _car(b: Builder, x: float, z: float, floor: float) -> None:
    """A body and a cabin, along the street or across."""
    yaw = b.rng.normal(0, 0.1) + b.rng.choice([0, np.pi / 2], p=[0.8, 0.2])
    with b.as_one():
        b.stand(BOX, x, z, floor - 0.25, [0.85, 0.35, 2.0], yaw)
        b.stand(BOX, x, z, floor - 0.95, [0.75, 0.28, 1.1], yaw)


def street(atlas: Atlas, rng: Rng, size: int) -> World:
    """Open ground under a sky, with houses along the sides, trees, cars and people."""
    b = Builder(atlas, rng)
    floor = float(rng.uniform(1.2, 2.0))
    far = float(rng.uniform(30, 120))
    gap = rng.uniform(3, 12)
    with b.as_one(fixed=True):
        _still_street(b, floor, gap, far)
    for _ in range(rng.integers(0, 6)):
        _car(b, rng.uniform(-gap, gap), rng.uniform(5, 40), floor)
    for _ in range(rng.integers(0, 6)):
        _person(b, rng.uniform(-gap, gap), rng.uniform(2.5, 25), floor, rng.uniform(0.75, 1.0))
    eye = torch.tensor([rng.uniform(-1.5, 1.5), rng.uniform(-0.6, 0.4), 0.0])
    camera = _camera(eye, rng, size, pitch=rng.normal(0.03, 0.08), yaw=rng.normal(0, 0.25))
    sun = torch.tensor([rng.normal(), -rng.uniform(0.5, 2), rng.normal()]).float()
    light = Light(sun / sun.norm(), True, rng.uniform(0.3, 0.7), _warmth(rng), rng.random() < 0.5)
    return _world(b, camera, rng, light, _sky_sheet(atlas, rng), far)


def table_top(atlas: Atlas, rng: Rng, size: int) -> World:
    """Things on a surface, near, seen from the side or from above; a wall or open space behind."""
    b = Builder(atlas, rng)
    floor = float(rng.uniform(0.25, 0.8))
    pitch = rng.uniform(0, 1.4)
    seen = -0.3 + floor / np.tan(max(pitch, 0.35))  # where the camera looks, its eye being at (0, 0, -0.3)
    depth = seen + rng.uniform(0.3, 3.0)
    with b.as_one(fixed=True):
        b.add(BOX, [0, floor - 1.5, depth - 4], [rng.uniform(1.2, 3), 1.5, 4], density=float(rng.uniform(0.8, 4)))
        if rng.random() < 0.6:  # the surface is not of the walls' stuff
            b.add(BOX, [0, floor + 0.499, depth - 4], [4, 0.5, 4], density=float(rng.uniform(0.8, 5)))
    spread = rng.uniform(0.12, 0.4)
    for _ in range(rng.integers(4, 16)):
        kind = int(rng.choice([BOX, BOX, ELLIPSOID, CYLINDER]))
        half = np.exp(rng.uniform(np.log(0.03), np.log(0.06 + 0.3 * floor), 3))
        b.stand(kind, rng.normal(0, spread), min(rng.normal(seen, spread), depth - 0.1), floor, list(half))
    for _ in range(rng.integers(0, 4)):
        _person(b, rng.normal(0, spread), min(rng.normal(seen, spread), depth - 0.1), floor, rng.uniform(0.1, 0.3))
    camera = _camera(torch.tensor([rng.normal(0, 0.1), 0.0, -0.3]), rng, size, pitch, yaw=rng.normal(0, 0.15))
    lamp = torch.tensor([rng.normal(0, 1), -rng.uniform(0.8, 1.8), rng.uniform(-0.5, 1.5)]).float()
    light = Light(lamp, False, rng.uniform(0.4, 0.7), _warmth(rng), rng.random() < 0.7)
    return _world(b, camera, rng, light, None, 20.0)


KINDS: tuple[tuple[Callable[[Atlas, Rng, int], World], float], ...] = ((room, 0.5), (street, 0.25), (table_top, 0.25))


def random_world(atlas: Atlas, rng: Rng, size: int) -> World:
    """A world of a random kind, rendered at size x size pixels."""
    makers, weights = zip(*KINDS, strict=True)
    return makers[rng.choice(len(makers), p=weights)](atlas, rng, size)


def _person(b: Builder, x: float, z: float, floor: float, half_height: float) -> None:
    """A standing cut-out, roughly facing the camera."""
    b.stand(CARD, x, z, floor, [half_height, half_height, 0.01], float(b.rng.normal(0, 0.25)))


def _camera(eye: Tensor, rng: Rng, size: int, pitch: float, yaw: float) -> Camera:
    focal = size * float(np.exp(rng.uniform(np.log(0.55), np.log(1.5))))
    pose = upright(torch.tensor([yaw], dtype=torch.float32))[0] @ tilt(pitch, rng.normal(0, 0.04))
    return Camera(pose, eye.float(), focal)


def _warmth(rng: Rng) -> Tensor:
    return torch.tensor(np.exp(rng.normal(0, 0.08, 3)), dtype=torch.float32)


def _sky_sheet(atlas: Atlas, rng: Rng) -> Tensor:
    """[256, 256, 3]: a gradient, or a blurred photograph."""
    if rng.random() < 0.3:
        return atlas.textures[-1, rng.integers(atlas.textures.shape[1])].float() / 255
    low, high = rng.uniform(0.5, 1.0, 3), rng.uniform([0.2, 0.35, 0.5], [0.7, 0.8, 1.0])
    ramp = torch.linspace(0, 1, 256)[:, None]
    sheet = torch.tensor(high).float() * (1 - ramp) + torch.tensor(low).float() * ramp
    return sheet[:, None].expand(256, 256, 3)


def _world(b: Builder, camera: Camera, rng: Rng, light: Light, sky: Tensor | None, far: float) -> World:
    """Add the second moment: the camera goes a little way, and some things move on their own."""
    solids, groups = b.solids(), torch.tensor(b.groups)
    free = (groups == 0) | ~_inside(solids, camera.centre, margin=0.15)  # nothing that stands about holds the eye
    solids, groups = Solids(*(getattr(solids, f)[free] for f in solids.__dataclass_fields__)), groups[free]
    pace = float(np.exp(rng.normal(-3.6, 0.7)))
    moved = _move(solids, groups, camera, rng, pace)
    haze = float(np.exp(rng.uniform(np.log(60), np.log(2000)))) if sky is not None else 1e6
    return World(solids, moved, (camera, _step(solids, moved, camera, rng, pace)), light, sky, haze, far)


def _move(solids: Solids, group: Tensor, camera: Camera, rng: Rng, pace: float) -> Solids:
    """Three in ten groups move, in proportion to their distance; group 0 stays. Single solids also turn."""
    count = int(group.max()) + 1
    reach = (solids.centre - camera.centre).norm(dim=-1).clamp(0.3, 30)
    size = torch.zeros(count).index_add(0, group, torch.ones(len(group)))
    distance = torch.zeros(count).index_add(0, group, reach) / size.clamp(min=1)
    moving = torch.from_numpy(rng.random(count) < 0.3) & (torch.arange(count) > 0)
    shift = torch.from_numpy(rng.normal(0, pace, (count, 3))).float() * torch.tensor([1, 0.2, 1]) * distance[:, None]
    yaw = torch.from_numpy(rng.normal(0, 2 * pace, count)).float() * (size == 1)
    return turned(solids, (shift * moving[:, None])[group], (yaw * moving)[group])


def _step(solids: Solids, moved: Solids, camera: Camera, rng: Rng, pace: float) -> Camera:
    """Where the camera is at the second moment: outside of every solid that it was outside of."""
    near = float((solids.centre - camera.centre).norm(dim=-1).clamp(0.3, 30)[1:].median())
    turn = upright(torch.tensor([rng.normal(0, pace)], dtype=torch.float32))[0] @ tilt(*rng.normal(0, pace * 0.6, 2))
    for _ in range(8):
        centre = camera.centre + torch.from_numpy(rng.normal(0, pace * near, 3)).float()
        if not (_inside(moved, centre) & ~_inside(solids, camera.centre)).any():
            return Camera(camera.pose @ turn, centre, camera.focal_px)
    return Camera(camera.pose @ turn, camera.centre, camera.focal_px)


def _inside(solids: Solids, point: Tensor, margin: float = 0.05) -> Tensor:
    """Which solids' boxes, `margin` metres wider, hold the point, [P] bool."""
    local = torch.einsum("pj,pjk->pk", point - solids.centre, solids.pose)
    return (local.abs() < solids.half + margin).all(-1)
