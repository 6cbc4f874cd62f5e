"""Generated scenes against geometry done by hand, and the command that writes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from tests.training.conftest import SIZE
from training.data import Scenes
from training.scenes import assets, layered, make, raycast, worlds
from training.scenes.raycast import BOX, CARD, CYLINDER, ELLIPSOID, FAR, Camera, Solids

EDGE = 33  # odd, so that one ray runs along the axis
FOCAL = 30.0
MIDDLE = EDGE // 2


def one_solid(
    atlas: raycast.Atlas, kind: int, centre: list[float], half: list[float], yaw: float = 0.0, sheet: int | None = None
) -> Solids:
    builder = worlds.Builder(atlas, np.random.default_rng(0))
    builder.add(kind, centre, half, yaw)
    solids = builder.solids()
    return solids if sheet is None else replace(solids, sheet=torch.tensor([sheet]))


def depth_of(atlas: raycast.Atlas, solids: Solids, origin: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    camera = Camera(torch.eye(3), torch.tensor(origin, dtype=torch.float32), FOCAL)
    hits = raycast.intersect(solids, camera.centre, camera.rays(EDGE), atlas)
    return hits.amin(1).reshape(EDGE, EDGE).double().numpy()


def pinhole() -> np.ndarray:
    """Ray directions [EDGE, EDGE, 3] float64 with z = 1, through pixel centres."""
    axis = (np.arange(EDGE) - MIDDLE) / FOCAL
    x, y = np.meshgrid(axis, axis)
    return np.stack([x, y, np.ones_like(x)], -1)


def test_a_sphere_is_where_the_quadratic_says(atlas: raycast.Atlas) -> None:
    centre, radius = np.array([0.3, -0.2, 5.0]), 1.2
    seen = depth_of(atlas, one_solid(atlas, ELLIPSOID, centre.tolist(), [radius] * 3, yaw=0.7))
    rays = pinhole()
    along, square = rays @ centre, (rays**2).sum(-1)
    inner = along**2 - square * (centre @ centre - radius**2)
    hit = inner > 0
    expected = (along - np.sqrt(np.where(hit, inner, 0))) / square
    clear = np.abs(inner) > 1e-2
    assert hit.sum() > 100
    np.testing.assert_array_equal(seen[clear] < FAR, hit[clear])
    np.testing.assert_allclose(seen[hit & clear], expected[hit & clear], rtol=1e-4)


def test_a_box_shows_its_face_and_turned_its_edge(atlas: raycast.Atlas) -> None:
    seen = depth_of(atlas, one_solid(atlas, BOX, [0, 0, 4], [1, 0.5, 1]))
    rays = pinhole()
    face = (np.abs(rays[..., 0] * 3) < 0.99) & (np.abs(rays[..., 1] * 3) < 0.49)
    np.testing.assert_allclose(seen[face], 3, rtol=1e-5)
    assert (seen[(np.abs(rays[..., 0] * 3) > 1.01) | (np.abs(rays[..., 1] * 3) > 0.51)] == FAR).all()
    turned = depth_of(atlas, one_solid(atlas, BOX, [0, 0, 4], [1, 0.5, 1], yaw=np.pi / 4))
    assert turned[MIDDLE, MIDDLE] == pytest.approx(4 - np.sqrt(2), abs=1e-4)


def test_a_room_is_seen_from_inside(atlas: raycast.Atlas) -> None:
    seen = depth_of(atlas, one_solid(atlas, BOX, [0, 0, 0], [2, 1.5, 6]), origin=(0.5, 0.25, -3))
    x, y, _ = np.moveaxis(pinhole(), -1, 0)
    with np.errstate(divide="ignore"):
        walls = [np.where(x > 0, 1.5 / x, -2.5 / x), np.where(y > 0, 1.25 / y, -1.75 / y), np.full_like(x, 9)]
    np.testing.assert_allclose(seen, np.min(np.abs(walls), axis=0), rtol=1e-4)


def test_ground_is_a_plane(atlas: raycast.Atlas) -> None:
    seen = depth_of(atlas, one_solid(atlas, BOX, [0, 2.0, 0], [400, 0.5, 400]))
    y = pinhole()[..., 1]
    np.testing.assert_allclose(seen[y > 0], 1.5 / y[y > 0], rtol=1e-4)
    assert (seen[y < 0] == FAR).all()


def test_a_cylinder_has_a_side_and_a_lid(atlas: raycast.Atlas) -> None:
    cylinder = one_solid(atlas, CYLINDER, [0, 0, 4], [0.5, 1, 0.5])
    assert depth_of(atlas, cylinder)[MIDDLE, MIDDLE] == pytest.approx(3.5, abs=1e-4)
    above = raycast.intersect(cylinder, torch.tensor([0.1, -3.0, 4.1]), torch.tensor([[0.0, 1.0, 0.0]]), atlas)
    assert float(above) == pytest.approx(2, abs=1e-4)


def test_a_card_is_hit_only_where_it_is_opaque(atlas: raycast.Atlas) -> None:
    cutout = np.zeros((1, assets.CUTOUT_PX, assets.CUTOUT_PX, 4), np.uint8)
    cutout[0, :, : assets.CUTOUT_PX // 2] = 255
    half = replace(atlas, cutouts=torch.from_numpy(cutout))
    seen = depth_of(half, one_solid(half, CARD, [0, 0, 2], [1, 1, 0.01], sheet=0))
    x, y, _ = np.moveaxis(pinhole() * 2, -1, 0)
    left = (x < -0.02) & (x > -0.99) & (np.abs(y) < 0.99)
    np.testing.assert_allclose(seen[left], 2, rtol=1e-5)
    assert (seen[x > 0.02] == FAR).all()


@pytest.mark.parametrize("maker", [worlds.room, worlds.street, worlds.table_top])
def test_flow_of_a_still_world_follows_from_depth_and_the_cameras(
    atlas: raycast.Atlas, maker: Callable[..., raycast.World]
) -> None:
    rng = np.random.default_rng(3)
    world = maker(atlas, rng, SIZE)
    world = replace(world, moved=world.solids)
    scene = raycast.cast(world, atlas, rng, SIZE)
    one, two = ((c.pose.double().numpy(), c.centre.double().numpy()) for c in world.cameras)
    focal, at = world.cameras[0].focal_px, np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE)), -1)
    rays = np.concatenate([(at - (SIZE - 1) / 2) / focal, np.ones((SIZE, SIZE, 1))], -1)
    points = (rays * scene.depth[..., None]) @ one[0].T + one[1]
    local = (points - two[1]) @ two[0]
    expected = local[..., :2] / local[..., 2:] * focal + (SIZE - 1) / 2 - at
    near = (scene.depth < 0.99 * world.far_m) & (local[..., 2] > 0.05) & (np.abs(expected) < SIZE - 1).all(-1)
    assert near.mean() > 0.4
    assert np.abs(expected[near]).max() > 0.1
    np.testing.assert_allclose(scene.flow[near], expected[near], atol=2e-2)


def warped(second: np.ndarray, flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The second frame fetched along the flow, and where the way ends inside it."""
    height, width = flow.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    to_x, to_y = x + flow[..., 0], y + flow[..., 1]
    fetched = cv2.remap(second, to_x, to_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return fetched, (to_x >= 0) & (to_y >= 0) & (to_x <= width - 1) & (to_y <= height - 1)


def test_a_solid_that_moves_and_turns_takes_its_pixels_along(atlas: raycast.Atlas) -> None:
    """A box in a room, shifted by (0.4, -0.2, 0.3) m and turned by 0.3 about its upright; the camera stays."""
    builder = worlds.Builder(atlas, np.random.default_rng(0))
    builder.add(BOX, [0, 0, 0], [5, 5, 8])
    builder.add(BOX, [0, 0, 4], [1, 1, 1])
    solids = builder.solids()
    shift, turn = np.array([0.4, -0.2, 0.3]), 0.3
    moving = torch.tensor([[0.0], [1.0]])
    moved = raycast.turned(solids, moving * torch.tensor(shift).float(), moving[:, 0] * turn)
    camera = Camera(torch.eye(3), torch.zeros(3), FOCAL)
    light = raycast.Light(torch.tensor([0.0, -1, 0]), False, 0.5, torch.ones(3), shadows=False)
    world = raycast.World(solids, moved, (camera, camera), light, None, 1e6, 40.0)
    flow = raycast.cast(world, atlas, np.random.default_rng(0), EDGE).flow
    rays = pinhole()
    face, outside = ((np.abs(rays[..., :2]).max(-1) * 3 < 0.99), (np.abs(rays[..., :2]).max(-1) * 3 > 1.01))
    c, s = np.cos(turn), np.sin(turn)
    local = rays[face] * 3 - [0, 0, 4]
    points = local @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]).T + [0, 0, 4] + shift
    expected = (points[:, :2] / points[:, 2:] - rays[face][:, :2]) * FOCAL
    np.testing.assert_allclose(flow[face], expected, atol=1e-3)
    np.testing.assert_allclose(flow[outside], 0, atol=1e-3)


class Noiseless:
    """A generator that leaves the cameras' noise out."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rng, name)

    def standard_normal(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.zeros(shape, dtype)


@pytest.fixture(scope="module")
def vivid(stock: assets.Assets) -> assets.Assets:
    """Objects on textures that show every motion and do not alias: blobs of colour, 16 across."""
    coarse = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    edge = (assets.TEXTURE_PX, assets.TEXTURE_PX)
    return replace(stock, textures=np.stack([cv2.resize(c, edge, interpolation=cv2.INTER_CUBIC) for c in coarse]))


def median_error(first: np.ndarray, second: np.ndarray, flow: np.ndarray, seen: np.ndarray | bool = True) -> float:
    fetched, inside = warped(second, flow)
    return float(np.median(np.abs(fetched.astype(np.float32) - first)[inside & seen]))


def still_seen(world: raycast.World, atlas: raycast.Atlas, flow: np.ndarray) -> np.ndarray:
    """Where the way ends on the solid that it began on."""
    size, cameras = len(flow), world.cameras
    here, there = (
        raycast.intersect(solids, camera.centre, camera.rays(size), atlas).argmin(1).reshape(size, size).numpy()
        for solids, camera in zip((world.solids, world.moved), cameras, strict=True)
    )
    at = np.stack(np.meshgrid(np.arange(size), np.arange(size)), -1)
    x, y = np.moveaxis((at + flow).round().astype(int).clip(0, size - 1), -1, 0)
    return there[y, x] == here


def test_the_second_frame_of_a_solid_world_fetched_along_the_flow_is_the_first(vivid: assets.Assets) -> None:
    """Of worlds that move by more than two pixels and look different for it."""
    rng: Any = Noiseless(11)
    atlas = raycast.Atlas.of(vivid, rng)
    followed, ignored = [], []
    for _ in range(18):
        world = worlds.random_world(atlas, rng, 96)
        scene = raycast.cast(world, atlas, rng, 96)
        seen = still_seen(world, atlas, scene.flow)
        stays = median_error(scene.first, scene.second, np.zeros_like(scene.flow), seen)
        if seen.mean() > 0.3 and np.median(np.linalg.norm(scene.flow, axis=-1)) > 2 and stays > 4:
            followed.append(median_error(scene.first, scene.second, scene.flow, seen))
            ignored.append(stays)
    assert len(followed) >= 6
    assert np.quantile(followed, 0.8) <= 4  # in a few worlds the second camera ends up inside a solid
    assert np.median(followed) < 0.2 * np.median(ignored)


def test_the_second_frame_of_layers_fetched_along_the_flow_is_the_first(vivid: assets.Assets) -> None:
    rng: Any = Noiseless(11)
    followed, ignored = [], []
    for _ in range(16):
        pair = layered.flow_pair(vivid, rng, 96)
        stays = median_error(pair.first, pair.second, np.zeros_like(pair.flow))
        if np.median(np.linalg.norm(pair.flow, axis=-1)) > 2 and stays > 4:
            followed.append(median_error(pair.first, pair.second, pair.flow))
            ignored.append(stays)
    assert len(followed) >= 6
    assert max(followed) <= 6
    assert np.median(followed) < 0.2 * np.median(ignored)


def test_what_is_visible_of_an_object_is_part_of_its_whole_and_looks_like_it(shards: Path) -> None:
    for kind, picture in (("solid", "first"), ("layered", "picture")):
        fields = {file.stem: np.load(file) for file in (shards / f"{kind}-00000").glob("*.npy")}
        has_object = fields.get("has_object", np.ones(len(fields["whole"]), bool))
        assert has_object.any()
        assert not fields["whole"][~has_object].any()
        for row in np.flatnonzero(has_object):
            visible, whole = fields["visible"][row], fields["whole"][row]
            assert not (visible & ~whole).any()
            assert visible.sum() > 0.25 * whole.sum()
            shown, alone = (fields[name][row][visible].astype(float) for name in (picture, "whole_rgb"))
            assert np.median(np.abs(shown - alone)) < 10


def test_most_objects_are_hidden_in_part(stock: assets.Assets) -> None:
    rng = np.random.default_rng(5)
    scenes = [layered.hidden_object(stock, rng, SIZE) for _ in range(20)]
    shares = np.array([s.visible.sum() / s.whole.sum() for s in scenes])
    assert (shares < 0.97).mean() > 0.5
    assert (shares > 0.25).all()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.npy"))}


def command(out: Path, kind: str, *more: str) -> None:
    make.main([str(out), "--kind", kind, "--size", str(SIZE), *more])


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("kind", ["solid", "layered"])
def test_a_shard_depends_on_its_seed_and_number_alone(tmp_path: Path, kind: str) -> None:
    command(tmp_path / "one", kind, "--shards", "2")
    command(tmp_path / "two", kind, "--shards", "1", "--first", "1")
    command(tmp_path / "other", kind, "--shards", "1", "--first", "1", "--seed", "7")
    one, two, other = (files_of(tmp_path / name / f"{kind}-00001") for name in ("one", "two", "other"))
    assert one == two
    assert one["first.npy"] != other["first.npy"]
    assert one["first.npy"] != files_of(tmp_path / "one" / f"{kind}-00000")["first.npy"]


@pytest.mark.usefixtures("small_shards")
def test_the_shards_hold_what_the_table_says(tmp_path: Path) -> None:
    for kind in make.KINDS:
        command(tmp_path, kind, "--shards", "1")
    fields = {f"{p.parent.name[:-6]}.{p.stem}": np.load(p) for p in tmp_path.rglob("*.npy")}
    n, s = 2, SIZE
    picture, mask, flow = ((n, s, s, 3), "uint8"), ((n, s, s), "bool"), ((n, s, s, 2), "float16")
    shared = {"first": picture, "second": picture, "flow": flow, "visible": mask, "whole": mask, "whole_rgb": picture}
    solid = shared | {"depth": ((n, s, s), "float16"), "has_object": ((n,), "bool")}
    table = {"solid": solid, "layered": shared | {"picture": picture}}
    expected = {f"{kind}.{name}": value for kind, columns in table.items() for name, value in columns.items()}
    assert {name: (array.shape, str(array.dtype)) for name, array in fields.items()} == expected
    assert np.isfinite(fields["solid.depth"]).all()
    assert (fields["solid.depth"] > 0).all()


@pytest.mark.usefixtures("small_shards")
def test_an_existing_shard_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = tmp_path / "layered-00000"
    shard.mkdir()
    (shard / "first.npy").write_bytes(b"precious")
    with caplog.at_level("INFO"):
        command(tmp_path, "layered", "--shards", "2")
    assert files_of(shard) == {"first.npy": b"precious"}
    assert (tmp_path / "layered-00001").is_dir()
    assert "layered: 1/2 shards, already there" in caplog.text


@pytest.mark.usefixtures("small_shards")
def test_a_shard_cut_short_is_not_a_shard_and_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, written = np.save, []

    def full_disk(file: Path, array: np.ndarray) -> None:
        written.append(file)
        if len(written) == 3:
            raise OSError("no space left")
        save(file, array)

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        command(tmp_path, "layered", "--shards", "1")
    assert [entry.name for entry in tmp_path.iterdir()] == [".layered-00000.part"]
    with pytest.raises(FileNotFoundError, match=r"training\.scenes\.make"):
        Scenes(tmp_path)
    command(tmp_path, "layered", "--shards", "1")
    assert [entry.name for entry in tmp_path.iterdir()] == ["layered-00000"]
    assert len(files_of(tmp_path)) == 7


def test_workers_share_the_shards_out() -> None:
    assert sorted(make.write_shards(float, range(5), workers=2)) == [0, 1, 2, 3, 4]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    cv2.imwrite(str(folder / "deep" / "red.png"), np.full((40, 60, 3), (0, 0, 255), np.uint8))
    (folder / "torn.jpg").write_bytes(b"not a picture")
    return folder


def test_pictures_from_folders_dress_the_scenes(photos: Path, tmp_path: Path) -> None:
    objects = tmp_path / "objects"
    objects.mkdir()
    rgba = np.zeros((50, 80, 4), np.uint8)
    rgba[10:20, 30:70] = (255, 0, 0, 255)  # BGRA: a blue bar, four times as wide as high
    cv2.imwrite(str(objects / "bar.png"), rgba)
    stock = assets.load([photos], [objects / "*.png"], np.random.default_rng(0), textures=8, stamps=3)
    red = (stock.textures == (255, 0, 0)).all((1, 2, 3))
    assert red.sum() == 6
    solid = stock.cutouts[..., 3] > 127
    assert solid.any(1).sum() == 3 * assets.CUTOUT_PX
    assert solid.any(2).sum() == 3 * assets.CUTOUT_PX // 4
    assert (stock.cutouts[solid] == (0, 0, 255, 255)).all()


def test_a_folder_of_no_use_is_refused(photos: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        assets.load([tmp_path / "nowhere"], [], rng, 4, 4)
    with pytest.raises(ValueError, match="hardly any"):
        assets.load([], [photos], rng, 4, 4)
