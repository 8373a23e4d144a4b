"""The procedural data set: exact labels, identities that stay, files that come out the same, and its command."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import run_command

from sca_kernels import LabelMap
from scam_models.data import PRESETS, FigureSeeds, LabelledImages, check, make_data, read_identities
from scam_models.data.figures import Appearance, Background, Pose, draw
from scam_models.data.figures.textures import Texture
from scam_models.errors import InputError

TINY = PRESETS["tiny"]
BACKGROUND, SKIN, HAIR, TOP, BOTTOM, SHOES = range(6)
PEOPLE = range(24)


def test_everyone_has_all_parts_in_their_order() -> None:
    for seed in PEOPLE:
        labels = FigureSeeds(seed, seed, seed).draw(64, 64).labels
        assert labels.unique().tolist() == [0, 1, 2, 3, 4, 5]
        rows = torch.arange(64.0).unsqueeze(1).expand(64, 64)
        hair, top, bottom, shoes = (rows[labels == label].mean() for label in (HAIR, TOP, BOTTOM, SHOES))
        assert hair < top < bottom < shoes
        shares = torch.bincount(labels.flatten(), minlength=6) / labels.numel()
        assert 0.7 < shares[BACKGROUND] < 0.92 and shares[TOP] > 0.02 and shares[1:].min() > 0.001


def test_labels_do_not_depend_on_identity_beyond_clothes_and_hair() -> None:
    person = Appearance.from_seed(0)
    other = replace(person, skin=(0, 0, 0), hair=(1, 0, 0), shoes=(0, 1, 0), top=(person.bottom,), bottom=person.top[0])
    pose, background = Pose.from_seed(1), Background.from_seed(2)
    one, two = draw(person, pose, background, 64, 64), draw(other, pose, background, 64, 64)
    assert torch.equal(one.labels, two.labels)
    is_background = one.labels == BACKGROUND
    assert (one.image != two.image).any(0)[~is_background].float().mean() > 0.8
    # Pixels in the midst of the background show nothing of the person.
    inside = torch.nn.functional.max_pool2d((~is_background).float()[None], 3, stride=1, padding=1)[0] == 0
    assert torch.equal(one.image[:, inside], two.image[:, inside]) and inside.float().mean() > 0.5


def test_labels_are_exact() -> None:
    """Drawn three times as large, the pixels in the middle of each are those of the small map."""
    seeds = FigureSeeds(5, 6, 7)
    small, large = seeds.draw(48, 32), seeds.draw(144, 96)
    assert torch.equal(small.labels, large.labels[1::3, 1::3])
    assert torch.equal(small.cloth, large.cloth[1::3, 1::3])
    torch.testing.assert_close(small.image, torch.nn.functional.avg_pool2d(large.image, 3), atol=0.2, rtol=0)


def test_two_kinds_of_cloth() -> None:
    people = [Appearance.from_seed(seed) for seed in PEOPLE]
    assert {len(person.top) for person in people} == {1, 2}
    for seed, person in enumerate(people):
        drawing = FigureSeeds(seed, 0, 0).draw(128, 128)
        assert torch.equal(drawing.cloth > 0, drawing.labels == TOP)
        first, second = ((drawing.cloth == kind).sum() for kind in (1, 2))
        assert (second > 0) == (len(person.top) == 2)
        if len(person.top) == 2:
            assert min(first, second) > 0.15 * (first + second)
            means = [drawing.image[:, drawing.cloth == kind].mean(1) for kind in (1, 2)]
            spread = drawing.image[:, drawing.cloth > 0].std(1).norm()
            assert (means[0] - means[1]).norm() > 0.1 * spread


@pytest.mark.parametrize(
    "pattern", ["plain", "stripes", "checks", "dots", "zigzag", "plaid", "bricks", "planks", "waves", "clouds"]
)
def test_textures(pattern: str) -> None:
    y, x = torch.meshgrid(torch.linspace(0, 1, 96), torch.linspace(-1, 1, 96), indexing="ij")
    texture = Texture(pattern, (0.1, 0.2, 0.3), (0.9, 0.8, 0.7), period=0.2, angle=0.3, seed=1)
    colours = texture.colours(x, y)
    assert colours.shape == (96, 96, 3) and colours.min() >= 0.1 - 1e-6 and colours.max() <= 0.9 + 1e-6
    assert (colours.std() > 0.1) == (pattern != "plain") or pattern == "clouds"
    if pattern not in ("bricks", "planks", "clouds"):  # which are random, and repeat after many periods
        moved = replace(texture, angle=0.0)
        torch.testing.assert_close(moved.colours(x, y), moved.colours(x + 0.8, y), atol=0.9, rtol=0)
        assert (moved.colours(x, y) - moved.colours(x + 0.8, y)).abs().mean() < 0.02


def test_files(tmp_path: Path) -> None:
    make_data(tmp_path / "data", height=48, width=32, identities=3, test_identities=2, pictures=2, seed=4)
    assert check(tmp_path / "data", TINY) == []
    for split, people in (("train", 3), ("test", 2)):
        data = LabelledImages(tmp_path / "data", split, replace(TINY, height=48, width=32))
        identities = read_identities(tmp_path / "data", split)
        assert data.names == list(identities) and len({seeds.identity for seeds in identities.values()}) == people
        assert len({seeds.background for seeds in identities.values()}) == len(data) == 2 * people
        for image, labels, name in (data[index] for index in range(len(data))):
            drawing = identities[name].draw(48, 32)
            torch.testing.assert_close((image + 1) / 2, drawing.image, atol=1 / 255, rtol=0)
            assert torch.equal(labels, drawing.labels)
            cloth = LabelMap.from_png(tmp_path / "data" / split / "cloth" / f"{name}.png", 3).labels
            assert torch.equal(cloth[0], drawing.cloth.int())
    seen = [
        {seeds.identity for seeds in read_identities(tmp_path / "data", split).values()} for split in ("train", "test")
    ]
    assert not seen[0] & seen[1]


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    def files(name: str, seed: int) -> dict[str, bytes]:
        folder = tmp_path / name
        make_data(folder, height=32, width=32, identities=1, test_identities=1, pictures=1, seed=seed)
        return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.*"))}

    one, same, other = files("one", 0), files("same", 0), files("other", 1)
    assert one == same and one.keys() == other.keys() and len(one) == 8
    assert all(one[name] != other[name] for name in one)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--size", "40x32", "--identities", "2", "--test-identities", "1", "--pictures", "1", "--seed", "3")
    assert run_command("make-data", str(tmp_path / "data"), *sizes) == 0
    assert re.fullmatch(r".*/data: 2 pictures to train on, 1 to test on\n", capsys.readouterr().out)
    assert run_command("check", str(tmp_path / "data")) == 0
    capsys.readouterr()
    assert run_command("make-data", str(tmp_path / "data")) == 1
    assert re.fullmatch(r"error: .*/data: is not empty; name a new folder\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--size", "16"), "error: height: expected 32 to 1024 pixels, got 16\n"),
        (("--size", "64x"), "error: --size 64x: expected height x width, such as 128x96, or one number for both\n"),
        (("--pictures", "0"), "error: pictures: expected 1 to 999, got 0\n"),
    ],
)
def test_command_with_bad_arguments(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("make-data", str(tmp_path / "data"), *arguments) == 1
    assert capsys.readouterr().err == message and not (tmp_path / "data").exists()


def test_a_folder_without_identities(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"identities\.json: no such file; 'scam make-data' writes it"):
        read_identities(tmp_path, "train")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "identities.json").write_text('{"0000-00": 3}')
    with pytest.raises(InputError, match="does not name the seeds of each picture"):
        read_identities(tmp_path, "train")
