"""The command line: `tessbkg ...`."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

import tessbkg
from tessbkg.errors import CatalogError, StoreMismatchError, TessbkgError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Numbers(click.ParamType[list[int]]):
    """A list of numbers and ranges: `3`, `1-5,7`, `all`."""

    name = "numbers"

    def __init__(self, high: int, *, every: bool = True) -> None:
        self.high, self.every = high, every

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Parse one argument."""
        if isinstance(value, list):
            return value
        if value == "all" and self.every:
            return list(range(1, self.high + 1))
        numbers: set[int] = set()
        for part in str(value).split(","):
            first, dash, last = part.partition("-")
            if not first.isdecimal() or (dash and not last.isdecimal()):
                self._refuse(value, param, ctx)
            begin, end = int(first), int(last or first)
            if not 1 <= begin <= end <= self.high:
                self._refuse(value, param, ctx)
            numbers.update(range(begin, end + 1))
        return sorted(numbers)

    def _refuse(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> None:
        every = ", or 'all'" if self.every else ""
        self.fail(
            f"{value!r}: allowed are numbers from 1 to {self.high}, such as 3 or 1-2,4{every}", param, ctx
        )


class FrameSlice(click.ParamType[slice]):
    """A slice of frames in order of time: `START:STOP[:STEP]`."""

    name = "START:STOP[:STEP]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> slice:
        """Parse one argument."""
        if isinstance(value, slice):
            return value
        try:
            parts = [int(part) if part else None for part in value.split(":")]
        except ValueError:
            parts = []
        if (
            not 2 <= len(parts) <= 3
            or any(part is not None and part < 0 for part in parts[:2])
            or (parts[2:] in ([0], []) and len(parts) == 3)
        ):
            self.fail(
                f"{value!r}: allowed is START:STOP or START:STOP:STEP, such as 0:100 or ::10", param, ctx
            )
        return slice(*parts)


class Endpoint(click.ParamType[str]):
    """Address of an S3 server: `http://HOST:PORT`, without credentials."""

    name = "URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check one argument."""
        from tessbkg.storage import check_url  # noqa: PLC0415 (slow to import)

        text = str(value)
        try:
            check_url(text)
            address = urlsplit(text)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if address.scheme not in {"http", "https"} or not address.hostname:
            self.fail(f"{text!r}: allowed is http://HOST:PORT or https://HOST", param, ctx)
        return text


class OutFile(click.Path):
    """A file to write: in a folder that is there, with one of some endings; or a URL, where that may be."""

    def __init__(self, *endings: str, urls: bool = False) -> None:
        super().__init__(dir_okay=False, path_type=Path)
        self.endings, self.urls = endings, urls

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check one argument."""
        if self.urls and "://" in str(value):
            return str(value)
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if self.endings and path.suffix.lower() not in self.endings:
            self.fail(f"{str(path)!r}: the name must end in {' or '.join(self.endings)}", param, ctx)
        if not path.parent.is_dir():
            self.fail(f"{str(path)!r}: there is no folder {str(path.parent)!r}", param, ctx)
        return path


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[Path]:
    """Give the name of a file to write, which takes the place of `out` when it is whole.

    Raises
    ------
    OSError
        Naming `out`.
    """
    part = out.with_name(f".{os.getpid()}-{out.name}")
    try:
        yield part
        part.replace(out)
    except OSError as error:
        raise OSError(f"{out}: cannot write: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def identity_options(function: Any) -> Any:
    """Add the options that say which CCDs."""
    for option in (
        click.option("--ccd", type=Numbers(4), default="all", show_default=True, help="CCDs: 4, 1-2,4, all."),
        click.option(
            "--camera", type=Numbers(4), default="all", show_default=True, help="Cameras: 1, 1-2, all."
        ),
        click.option(
            "--sector", type=Numbers(9999, every=False), required=True, help="Sectors: 1, 1-5,7, 1751."
        ),
    ):
        function = option(function)
    return function


def source_options(function: Any) -> Any:
    """Add the options that say where FFIs are."""
    for option in (
        click.option(
            "--anon/--no-anon", default=None, help="Read S3 without or with credentials. [default: --anon]"
        ),
        click.option("--endpoint-url", type=Endpoint(), help="S3 server of the source, if not Amazon's."),
        click.option(
            "--root", metavar="URL", default=None, help="Folder that holds ffi/. [default: the public bucket]"
        ),
    ):
        function = option(function)
    return function


def _storage(endpoint_url: str | None, anon: bool | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if endpoint_url is not None:
        options["endpoint_url"] = endpoint_url
    if anon is not None:
        options["anon"] = anon
    return options


def store_options(function: Any) -> Any:
    """Add the option of the store's server."""
    return click.option(
        "--store-endpoint-url", type=Endpoint(), help="S3 server of the store, if not Amazon's."
    )(function)


def which_options(function: Any) -> Any:
    """Add the argument STORE and the options that pick CCDs of it."""
    for name, high in (("ccd", 4), ("camera", 4), ("sector", 9999)):
        which = f"Only this {name}. [default: all]"
        function = click.option(f"--{name}", type=click.IntRange(1, high), help=which)(function)
    return click.argument("store")(store_options(function))


def _only(store: str, store_options: dict[str, Any], **which: int | None) -> dict[str, Any]:
    """Give the one CCD of a store that the options leave."""
    from tessbkg.store import groups, select  # noqa: PLC0415 (slow to import)

    found = select(groups(store, store_options), store, **which)
    if len(found) > 1:
        raise click.UsageError(
            f"{store} has {len(found)} such CCDs, {found[0]} to {found[-1]}: give --sector, --camera, --ccd"
        )
    return asdict(found[0])


binned_option = click.option("--binned", is_flag=True, help="The averages in time (build --bin-hours).")


def reduction_options(function: Any) -> Any:
    """Add the options of the reduction."""
    for option in (
        click.option(
            "--shard-frames",
            default=64,
            show_default=True,
            type=click.IntRange(1, 4096),
            help="Frames of a shard: the unit of work and of storage.",
        ),
        click.option(
            "--bin-hours",
            type=click.FloatRange(min=0, min_open=True),
            metavar="HOURS",
            help="Write averages in time of this length too.",
        ),
        click.option("--frames", type=FrameSlice(), help="Only these frames, in order of time."),
        click.option(
            "--ephemeris",
            default="table",
            show_default=True,
            help="Where TESS was: table, horizons, a SPICE kernel or a TESSVectors file.",
        ),
        click.option(
            "--angles/--no-angles",
            default=True,
            show_default=True,
            help="Add the angles of Earth, Moon and Sun.",
        ),
        click.option(
            "--drop-quality",
            type=click.IntRange(0, 65535),
            help="Reject frames with any of these bits of DQUALITY. [default: 16447]",
        ),
        click.option(
            "--dark-frames",
            default=12,
            show_default=True,
            type=click.IntRange(1, 32),
            help="Frames that the static scene is made of.",
        ),
        click.option(
            "--errors",
            type=click.Choice(["model", "uncert"]),
            default="model",
            show_default=True,
            help="Error bars by the noise law, or by the uncertainty images (twice the bytes).",
        ),
        click.option(
            "--statistic",
            type=click.Choice(["whole", "median", "mean", "clipped", "rolling", "sparse"]),
            default="whole",
            show_default=True,
            help="What a bin's value is.",
        ),
        click.option(
            "--bin",
            "bin_",
            default=16,
            show_default=True,
            type=int,
            help="Pixels along the side of a bin: a divisor of 2048.",
        ),
    ):
        function = option(function)
    return function


class Commands(click.Group):
    """The group of commands; turns errors into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command: exit code 2 for a wrong argument, 1 for a failed job."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _warn
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except (CatalogError, StoreMismatchError) as error:
            self._end(ctx, error, 2)
        except TessbkgError as error:  # some are ValueErrors too
            self._end(ctx, error, 1)
        except ValueError as error:
            if "checksum do not match" in str(error):  # of Zarr, which reads when values are asked for
                self._end(ctx, error, 1, "the store is damaged, tessbkg check tells where: ")
            self._end(ctx, error, 2)
        except BrokenPipeError:
            raise
        except OSError as error:
            self._end(ctx, error, 1)
        except Exception as error:  # noqa: BLE001 (the end of a job: one line, whatever it was)
            self._end(ctx, error, 1, f"{type(error).__name__}: ")

    @staticmethod
    def _end(ctx: click.Context, error: Exception, code: int, kind: str = "") -> None:
        if ctx.params.get("debug"):
            raise error
        click.echo(f"tessbkg: {kind}{' '.join(str(error).split())}", err=True)
        ctx.exit(code)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning as one line."""
    click.echo(f"tessbkg: warning: {message}", err=True)


GRACE_SECONDS = 8.0
"""Time for a cluster to close after a signal."""


class _Stopped(BaseException):
    """SIGINT or SIGTERM arrived."""


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """End within seconds on SIGINT and SIGTERM, saying how to go on.

    The process ends without waiting for threads: one may be in a read that stalls.
    """
    received: list[int] = []

    def stop(number: int, _frame: object) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        logging.disable()  # what a cluster says when its connections end
        command = shlex.join(["tessbkg", *sys.argv[1:]])
        reason = f"stopped by {signal.Signals(number).name}; what is written stays"
        os.write(2, f"\ntessbkg: {reason}. To go on:\n  {command}\n".encode())
        timer = threading.Timer(GRACE_SECONDS, os._exit, [128 + number])
        timer.daemon = True
        timer.start()
        raise _Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except _Stopped:
        _exit(received[0])
    except BaseException:
        if received:  # something in between made another error of it
            _exit(received[0])
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(number: int) -> None:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(128 + number)


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(tessbkg.__version__, prog_name="tessbkg")
@click.option("--debug", is_flag=True, help="Show tracebacks and what is logged.")
def main(*, debug: bool) -> None:
    """Turn TESS Full Frame Images into a Zarr store of their scattered light."""
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(levelname)s %(message)s")


def _root(root: str | None) -> str:
    from tessbkg.catalog import ROOT  # noqa: PLC0415 (slow to import)

    return root or ROOT


@main.command("list")
@identity_options
@source_options
@click.option("--urls", is_flag=True, help="Print the URL of every frame.")
def list_command(
    *,
    sector: list[int],
    camera: list[int],
    ccd: list[int],
    root: str | None,
    endpoint_url: str | None,
    anon: bool | None,
    urls: bool,
) -> None:
    """List the frames there are.

    \b
    Example:
      tessbkg list --sector 1 --camera 1 --ccd 4
    """
    frames = tessbkg.list_ffis(
        sector=sector, camera=camera, ccd=ccd, root=_root(root), storage_options=_storage(endpoint_url, anon)
    )
    if urls:
        click.echo("\n".join(frames["url"]))
        return
    click.echo("sector camera ccd  frames      first TJD       last TJD         GB")
    for (s, c, k), part in frames.groupby(["sector", "camera", "ccd"]):
        first, last = part["start"].iloc[[0, -1]]
        size = part["size"].clip(lower=0).sum() / 1e9
        click.echo(f"{s:6d} {c:6d} {k:3d} {len(part):7,d} {first:14.4f} {last:14.4f} {size:10.2f}")


def _plans(
    out: str,
    *,
    sector: list[int],
    camera: list[int],
    ccd: list[int],
    root: str | None,
    endpoint_url: str | None,
    anon: bool | None,
    store_endpoint_url: str | None,
    bin_: int,
    statistic: str,
    errors: str,
    dark_frames: int,
    drop_quality: int | None,
    angles: bool,
    ephemeris: str,
    **rest: Any,
) -> Iterator[Any]:
    """Plan every CCD asked for."""
    from tessbkg.ccd import DROP_QUALITY  # noqa: PLC0415
    from tessbkg.dataset import Options  # noqa: PLC0415

    dropped = DROP_QUALITY if drop_quality is None else drop_quality
    options = Options(bin_, statistic, errors, dark_frames, dropped, angles, ephemeris)
    source = _storage(endpoint_url, anon)
    for one in sector:
        frames = tessbkg.list_ffis(
            sector=one, camera=camera, ccd=ccd, root=_root(root), storage_options=source
        )
        for _, part in frames.groupby(["camera", "ccd"]):
            yield tessbkg.plan_build(
                out,
                files=part.reset_index(drop=True),
                options=options,
                storage_options=source,
                store_options=_storage(store_endpoint_url, None),
                **rest,
            )


@main.command("plan")
@click.argument("out")
@identity_options
@source_options
@store_options
@reduction_options
def plan_command(**arguments: Any) -> None:
    """Say what a build into OUT would read and do, without doing it.

    \b
    Example:
      tessbkg plan bkg.zarr --sector 1 --camera 1 --ccd 4
    """
    for i, plan in enumerate(_plans(**arguments)):
        click.echo(("\n" if i else "") + plan.explain())


@main.command("build")
@click.argument("out")
@identity_options
@source_options
@store_options
@reduction_options
@click.option("--workers", type=click.IntRange(1, 1024), help="Start a cluster of this many processes here.")
@click.option(
    "--scheduler", metavar="ADDR", help="Use the Dask cluster at this address, such as tcp://host:8786."
)
@click.option(
    "--on-error",
    type=click.Choice(["flag", "raise"]),
    default="flag",
    show_default=True,
    help="What an unreadable frame does: get a status, or stop the job.",
)
@click.option("--overwrite", is_flag=True, help="Delete what the store has of these CCDs and start over.")
@click.option(
    "--retry-failed", is_flag=True, help="Do shards with missing, unreadable or broken frames again."
)
def build_command(
    *, workers: int | None, scheduler: str | None, overwrite: bool, retry_failed: bool, **arguments: Any
) -> None:
    """Build the light of CCDs into the store OUT, or go on with it.

    \b
    Examples:
      tessbkg build bkg.zarr --sector 1 --camera 1 --ccd 4 --workers 2
      tessbkg build s3://me/bkg.zarr --sector 1-3 --scheduler tcp://10.0.0.1:8786
    """
    from tessbkg.jobs import run_build  # noqa: PLC0415

    if workers and scheduler:
        raise click.UsageError("--workers and --scheduler exclude each other")
    with _stoppable(), _cluster(workers, scheduler) as client:
        for plan in _plans(overwrite=overwrite, **arguments):
            with _progress(str(plan.job.ccd)) as progress:
                report = run_build(
                    plan, client=client, overwrite=overwrite, retry_failed=retry_failed, progress=progress
                )
            click.echo(report.summary())


@contextlib.contextmanager
def _cluster(workers: int | None, scheduler: str | None) -> Iterator[Any]:
    if workers or scheduler:
        import distributed  # noqa: F401, PLC0415 (which sets its own level of logging)

        # its news of every connection would drown ours
        logging.getLogger("distributed").setLevel(logging.getLogger().level)
    if workers:
        from tessbkg.jobs import local_cluster  # noqa: PLC0415

        with local_cluster(workers) as client:
            click.echo(f"dashboard: {client.dashboard_link}", err=True)
            yield client
    elif scheduler:
        from distributed import Client  # noqa: PLC0415

        try:
            client = Client(scheduler, timeout=30)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise click.BadParameter(
                f"no Dask scheduler at {scheduler!r}: {reason}; an address looks like tcp://host:8786",
                param_hint="--scheduler",
            ) from error
        with client:
            yield client
    else:
        yield None


@contextlib.contextmanager
def _progress(label: str) -> Iterator[Any]:
    """Show a bar for each step on a terminal, a line for each step elsewhere."""
    bars: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:

        def progress(step: str, done: int, total: int) -> None:
            if not sys.stderr.isatty():
                if step not in bars:
                    bars[step] = None
                    click.echo(f"{label}: {step}, {total} tasks, {done} done", err=True)
                return
            if step not in bars:
                bars[step] = stack.enter_context(
                    click.progressbar(
                        length=total, label=f"{label}: {step:8s}", file=sys.stderr, show_pos=True
                    )
                )
            bars[step].update(done - bars[step].pos)

        yield progress


@main.command("info")
@which_options
def info_command(*, store: str, store_endpoint_url: str | None, **which: Any) -> None:
    """Say what a store holds: its sectors, cameras and CCDs.

    Of a single CCD, the details.

    \b
    Examples:
      tessbkg info bkg.zarr
      tessbkg info bkg.zarr --sector 1 --camera 1 --ccd 4
    """
    from tessbkg.info import info  # noqa: PLC0415

    click.echo(info(store, store_options=_storage(store_endpoint_url, None), **which))


@main.command("plot")
@which_options
@click.argument("out", type=OutFile(".png", ".pdf", ".svg"))
@click.option(
    "--kind",
    type=click.Choice(["level", "frame", "focal-plane"]),
    default="level",
    show_default=True,
    help="Light over time of a CCD; scene, mask and light of one frame of it; one frame of all CCDs.",
)
@click.option("--frame", type=click.IntRange(0), help="Number of the frame. [default: the brightest]")
@click.option("--variable", help="Of the focal plane. [default: scattered_light]")
def plot_command(
    *, store: str, out: Path, kind: str, store_endpoint_url: str | None, variable: str | None, **which: Any
) -> None:
    """Draw light over time, a frame, or the focal plane into OUT.

    OUT ends in .png, .pdf or .svg. Where the store has several CCDs, say which.

    \b
    Examples:
      tessbkg plot bkg.zarr light.png
      tessbkg plot bkg.zarr frame.png --kind frame --sector 1 --camera 1 --ccd 4
      tessbkg plot bkg.zarr sky.png --kind focal-plane --variable earth_angle --sector 1
    """
    from tessbkg.page import draw_focal_plane, draw_frame  # noqa: PLC0415
    from tessbkg.plot import plot_light_curve  # noqa: PLC0415

    options, frame = _storage(store_endpoint_url, None), which.pop("frame")
    if variable and kind != "focal-plane":
        raise click.UsageError("--variable goes with --kind focal-plane only")
    if frame is not None and kind == "level":
        raise click.UsageError("--frame goes with --kind frame or focal-plane only")
    if kind == "focal-plane":
        shown = variable or "scattered_light"
        figure = draw_focal_plane(store, shown, frame=frame, store_options=options, **which)
    elif kind == "frame":
        figure = draw_frame(store, frame=frame, store_options=options, **_only(store, options, **which))
    else:
        figure = plot_light_curve(
            tessbkg.open_background(store, store_options=options, **_only(store, options, **which))
        )
    with _writing(out) as part:
        figure.savefig(part)
    click.echo(out)


@main.command("animate")
@which_options
@click.argument("out", type=OutFile(".gif", ".html", ".mp4"))
@binned_option
@click.option("--variable", default="scattered_light", show_default=True, help="Any on (time, y, x).")
@click.option("--fps", default=8, show_default=True, type=click.IntRange(1, 60), help="Frames a second.")
def animate_command(
    *,
    store: str,
    out: Path,
    variable: str,
    fps: int,
    binned: bool,
    store_endpoint_url: str | None,
    **which: Any,
) -> None:
    """Animate the light, its error or an angle of a CCD into OUT.

    OUT ends in .gif, .html or .mp4. Where the store has several CCDs, say which.

    \b
    Examples:
      tessbkg animate bkg.zarr light.gif
      tessbkg animate bkg.zarr earth.html --variable earth_angle --sector 1 --camera 1 --ccd 4
    """
    from tessbkg.plot import animate  # noqa: PLC0415

    options = _storage(store_endpoint_url, None)
    ds = tessbkg.open_background(
        store, binned=binned, store_options=options, **_only(store, options, **which)
    )
    with _writing(out) as part:
        animate(ds, part, variable=variable, fps=fps)
    click.echo(out)


@main.command("check")
@which_options
@click.option("--deep", is_flag=True, help="Reduce a sample of frames again from the source and compare.")
@click.option(
    "--sample", default=8, show_default=True, type=click.IntRange(1), help="Frames a CCD of --deep."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the sample.")
@click.option("--anon/--no-anon", default=None, help="Read the source on S3 without or with credentials.")
@click.option("--endpoint-url", type=Endpoint(), help="S3 server of the source, if not Amazon's.")
def check_command(
    *, store: str, endpoint_url: str | None, anon: bool | None, store_endpoint_url: str | None, **what: Any
) -> None:
    """Read every byte of STORE and list what is wrong.

    The exit code is 1 if something is.

    \b
    Example:
      tessbkg check bkg.zarr --deep
    """
    from tessbkg.check import check  # noqa: PLC0415

    findings = check(
        store,
        storage_options=_storage(endpoint_url, anon),
        store_options=_storage(store_endpoint_url, None),
        **what,
    )
    for finding in findings:
        click.echo(str(finding))
    if findings:
        count = f"{len(findings)} finding{'s' if len(findings) > 1 else ''}"
        click.echo(f"tessbkg: {count} in {store}; the README's 'How to verify' says how to mend", err=True)
        raise click.exceptions.Exit(1)
    click.echo(f"{store}: nothing is wrong")


@main.command("report")
@which_options
@click.argument("out", type=OutFile())
def report_command(*, store: str, out: Path, store_endpoint_url: str | None, **which: Any) -> None:
    """Write an HTML page about a built CCD, with pictures, into OUT.

    \b
    Example:
      tessbkg report bkg.zarr s0001-1-4.html --sector 1 --camera 1 --ccd 4
    """
    from tessbkg.page import quality_page  # noqa: PLC0415

    options = _storage(store_endpoint_url, None)
    page = quality_page(store, store_options=options, **_only(store, options, **which))
    with _writing(out) as part:
        part.write_text(page, encoding="utf-8")
    click.echo(out)


@main.command("simulate")
@click.argument("url")
@identity_options
@click.option("--frames", default=24, show_default=True, type=click.IntRange(1), help="Frames a CCD.")
@click.option(
    "--size", default=2048, show_default=True, type=click.IntRange(16, 2048), help="Science rows and columns."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option(
    "--kind",
    default="orbit",
    show_default=True,
    help="Kind of scene: orbit, smooth, glint, crowded, moon, drift, few_dark.",
)
@click.option("--endpoint-url", type=Endpoint(), help="S3 server to write to, if not Amazon's.")
def simulate_command(
    *,
    url: str,
    sector: list[int],
    camera: list[int],
    ccd: list[int],
    frames: int,
    size: int,
    seed: int,
    kind: str,
    endpoint_url: str | None,
) -> None:
    """Write synthetic FFIs with a known truth below URL.

    \b
    Example:
      tessbkg simulate sky --sector 1 --camera 1 --ccd 4
    """
    from tessbkg.simulate import simulate  # noqa: PLC0415

    for s in sector:
        for c in camera:
            for k in ccd:
                truth = simulate(
                    url,
                    sector=s,
                    camera=c,
                    ccd=k,
                    frames=frames,
                    shape=(size, size),
                    seed=seed,
                    kind=kind,
                    storage_options=_storage(endpoint_url, None),
                )
                click.echo(f"sector {s} camera {c} CCD {k}: {truth.sizes['time']} frames below {url}")


@main.command("demo")
@click.option(
    "--out",
    default="tessbkg-demo",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the store and the pictures.",
)
@click.option("--frames", default=24, show_default=True, type=click.IntRange(4, 200))
def demo_command(*, out: Path, frames: int) -> None:
    """Simulate frames, build their store, compare with the truth.

    Draws pictures, too; needs no network, no account and about a minute.

    \b
    Example:
      tessbkg demo --out tessbkg-demo
    """
    import tempfile  # noqa: PLC0415

    from tessbkg.ccd import CCD  # noqa: PLC0415
    from tessbkg.demo import compare, draw  # noqa: PLC0415
    from tessbkg.simulate import simulate  # noqa: PLC0415

    ccd = CCD(1, 1, 4)
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    store = str(out / "bkg.zarr")
    with tempfile.TemporaryDirectory(prefix="tessbkg-") as folder:
        click.echo(f"1. simulate {frames} frames of 2048 x 2048 pixels in {folder}")
        simulate(folder, frames=frames, **asdict(ccd))
        click.echo(f"2. build {store}")
        with _progress("sector 1 camera 1 CCD 4") as progress:
            report = tessbkg.build(
                store,
                root=folder,
                dark_frames=min(8, frames // 2),
                overwrite=True,
                progress=progress,
                **asdict(ccd),
            )
        click.echo(report.summary())
        click.echo("3. compare with the truth")
        click.echo(compare(store, folder, ccd))
        click.echo("4. draw")
        for path in draw(store, folder, out, ccd):
            click.echo(f"   {path}")
    click.echo(f"\nDone in {time.perf_counter() - began:.0f} s. Open the store:\n")
    click.echo(
        f"   >>> import xarray\n   >>> xarray.open_zarr({store!r}, group={ccd.group!r}, consolidated=False)\n"
    )
    click.echo(
        "Real data, straight from the public bucket (network, no account); see first what it would read:\n"
    )
    click.echo("   tessbkg plan bkg.zarr --sector 1 --camera 1 --ccd 4")
    click.echo("   tessbkg build bkg.zarr --sector 1 --camera 1 --ccd 4 --frames 0:200 --workers 2")


@main.command("export")
@which_options
@click.argument("out", type=OutFile(urls=True))
@binned_option
@click.option(
    "--format",
    "format_",
    type=click.Choice(["npz", "fits", "netcdf"]),
    help="npz and fits as of tess-backml. [default: as the name of OUT says]",
)
def export_command(
    *,
    store: str,
    out: Path | str,
    format_: str | None,
    binned: bool,
    store_endpoint_url: str | None,
    **which: Any,
) -> None:
    """Write the light of one CCD as npz, FITS or NetCDF file OUT.

    OUT is a path or a URL.

    \b
    Examples:
      tessbkg export bkg.zarr s1-1-4.fits --sector 1 --camera 1 --ccd 4
      tessbkg export s3://me/bkg.zarr s3://me/s1-1-4.npz --sector 1 --camera 1 --ccd 4
    """
    from tessbkg.exports import export  # noqa: PLC0415

    known = {".npz": "npz", ".fits": "fits", ".nc": "netcdf"}
    form: Any = format_ or known.get(Path(out).suffix)
    if form is None:
        raise click.UsageError(
            f"--format is needed: the name {str(out)!r} ends in none of {', '.join(known)}"
        )
    options = _storage(store_endpoint_url, None)
    ds = tessbkg.open_background(
        store, binned=binned, store_options=options, **_only(store, options, **which)
    )
    with _writing(out) if isinstance(out, Path) else contextlib.nullcontext(out) as part:
        export(ds, part, format=form, store_options=options)
    click.echo(f"{out}: {form} of {ds.attrs['title']}")
