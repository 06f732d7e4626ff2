"""Pictures are drawn, on data that a user has; what they look like was looked at."""

import importlib.util
import shutil

import numpy as np
import pytest
import xarray as xr

import tessbkg
from tessbkg.plot import animate, plot_focal_plane, plot_light_curve, plot_reduction
from tessbkg.scene import Mask, make_scene


@pytest.fixture
def light():
    time = np.r_[np.arange(5.0), 20 + np.arange(5.0)] / 10
    cube = np.random.default_rng(0).gamma(1, 10, (10, 8, 8)).astype("f4")
    cube[3] = np.nan
    return xr.Dataset(
        {
            "scattered_light": (("time", "y", "x"), cube, {"units": "electron s-1"}),
            "frame_status": ("time", np.where(np.arange(10) == 3, 4, 0).astype("u1")),
            "earth_boresight_angle": ("time", np.linspace(30, 90, 10)),
        },
        {
            "time": time,
            "cadence": ("time", np.arange(100, 110)),
            "quality": ("time", np.where(np.arange(10) == 3, 32, 2048)),
            "y": np.arange(8) * 16 + 7.5,
            "x": np.arange(8) * 16 + 7.5,
        },
        {"title": "a CCD"},
    )


def test_light_curve_leaves_gaps_empty(light):
    axes = plot_light_curve(light).axes
    lines = [line for line in axes[0].lines if len(line.get_xdata()) > 2]
    drawn = [line.get_xdata() for line in lines if line.get_transform() == axes[0].transData]
    assert [len(x) for x in drawn] == [5, 5]
    assert {text.get_text() for text in axes[0].get_legend().get_texts()} == {"stray light", "momentum dump"}


def test_light_curve_of_a_few_frames_a_day_knows_the_downlink(light):
    time = np.r_[np.arange(5.0), 7 + np.arange(5.0)]
    lines = plot_light_curve(light.assign_coords(time=time)).axes[0].lines
    assert [list(line.get_xdata()) for line in lines[:2]] == [list(time[:5]), list(time[5:])]


def test_reduction_has_units_on_every_bar():
    frame = np.random.default_rng(1).normal(100, 1, (64, 64)).astype("f4")
    scene = make_scene(frame[None].copy(), (7e-4, 0.02))
    scene.mask[:4] |= np.uint8(Mask.STRAP)
    figure = plot_reduction(frame + 5, scene, np.full((4, 4), 5, "f4"), title="a frame")
    labels = [axes.get_ylabel() for axes in figure.axes[4:]]
    assert sum("e$^-$ s$^{-1}$" in label for label in labels) == 3


@pytest.mark.parametrize("kind", ["gif", "html", "mp4"])
def test_animation_shows_every_good_frame(light, tmp_path, kind):
    from PIL import Image

    path = tmp_path / f"light.{kind}"
    if kind == "mp4" and not (shutil.which("ffmpeg") or importlib.util.find_spec("imageio_ffmpeg")):
        with pytest.raises(FileNotFoundError, match="pip install imageio-ffmpeg"):
            animate(light, path)
        return
    animate(light, path)
    if kind == "gif":
        with Image.open(path) as image:
            assert image.n_frames == 9
    elif kind == "mp4":
        assert path.read_bytes()[4:8] == b"ftyp"
    else:
        page = path.read_text()
        assert page.count("data:image/png;base64") >= 9
        assert "https:" not in page  # neither fonts nor scripts from the network
        assert "fa-" not in page


def test_animation_refuses(light, tmp_path):
    with pytest.raises(ValueError, match="scattered_light"):
        animate(light, tmp_path / "x.gif", variable="earth_angel")
    with pytest.raises(ValueError, match=r"\.gif, \.html or \.mp4"):
        animate(light, tmp_path / "x.avi")
    with pytest.raises(ValueError, match="no good frame"):
        animate(light.assign(frame_status=light.frame_status * 0 + 4), tmp_path / "x.gif")


def test_focal_plane_puts_ccds_where_they_are():
    row, column = ("y", np.linspace(1, 2048, 5)), ("x", np.linspace(45, 2092, 5))
    ccds = [
        tessbkg.angles(
            xr.Dataset(
                coords={"time": [1340.0], "row": row, "column": column},
                attrs={"sector": 1, "camera": camera, "ccd": ccd},
            )
        ).isel(time=0)
        for camera in (1, 4)
        for ccd in (1, 2, 3, 4)
    ]
    axes = plot_focal_plane(ccds, "earth_angle").axes[0]
    where = {text.get_text(): text.get_position() for text in axes.texts}
    # Cameras fan out along X; in the spacecraft's frame cameras 1 and 2 are turned by 180 degrees.
    assert all(where[f"1.{ccd}"][0] < -24 and where[f"4.{ccd}"][0] > 24 for ccd in (1, 2, 3, 4))
    assert where["4.1"][1] > 0 > where["4.2"][1]
    assert where["1.2"][1] > 0 > where["1.1"][1]
    with pytest.raises(ValueError, match="no 'light'"):
        plot_focal_plane(ccds, "light")
    with pytest.raises(ValueError, match="empty"):
        plot_focal_plane([])
