"""Reading and reducing through a link of limited rate, against raw reads through the same.

On one machine S3 servers share the cores with their clients; a limit on loopback makes bytes what binds, as
they do between machines. Asked for by `--sections link` only: it needs root and `tc` (Debian: iproute2), and
slows everything else that talks over loopback meanwhile.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

from build import Source, clock, raw_read, timed_build
from data import DARK_FRAMES, servers, sky, survey_and_scene, upload
from timing import ms, spread, table

RATES = (2, 4, 8)  # Gbit/s


@contextlib.contextmanager
def limited(rate):
    """Limit loopback to `rate` Gbit/s."""
    device = ["dev", "lo", "root"]
    shape = ["tbf", "rate", f"{rate}gbit", "burst", "4mb", "latency", "100ms"]
    subprocess.run(["tc", "qdisc", "add", *device, *shape], check=True)
    try:
        yield
    finally:
        subprocess.run(["tc", "qdisc", "del", *device], check=True)


def run(cache: Path, *, repeats: int, quick: bool, servers_wanted):
    from tessbkg.dataset import Options
    from tessbkg.ffi import FrameStatus
    from tessbkg.tasks import prepared, reduce_frames

    n = 32 if quick else 64
    root, _ = sky(cache, "orbit", n)
    _, survey, _ = survey_and_scene(root, Options(dark_frames=DARK_FRAMES))
    survey = survey[survey["status"] == FrameStatus.GOOD].reset_index(drop=True)
    figures, rows = {}, []
    with ExitStack() as stack:
        tmp = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tessbkg-bench-", dir=cache)))
        running = stack.enter_context(servers(tmp, servers_wanted))
        for name, server in running.items():
            url = upload(server, root, "ffis")
            source = Source(name, url, server.options(anon=True), survey, root)
            job, _ = timed_build(source, tmp, Options().statistic, None, DARK_FRAMES)
            stored, plan = prepared(job)
            calls = {
                "raw": (lambda s=source: raw_read(s.urls, s.ends, s.options), len(survey)),
                "ours": (lambda j=job, t=stored, p=plan: reduce_frames(j, t, p), len(survey)),
            }
            for rate in RATES:
                with limited(rate):
                    found = clock(calls, max(2, repeats // 2))
                one = {who: spread([each["seconds"] for each in values]) for who, values in found.items()}
                raw, ours = (one[who]["median"] for who in ("raw", "ours"))
                figures[f"{name}, {rate} Gbit/s"] = one
                rows.append((f"{name}, {rate} Gbit/s", f"{100 * raw / ours:.0f} %", ms(raw), ms(ours)))
    head = ("", "of the raw byte rate", "raw, ms a frame", "read and reduced, ms a frame")
    note = "One process. What Ceph sends crosses loopback twice: from its disks to its gateway, then to us."
    return figures, [table(f"{len(survey)} frames through a link of limited rate", head, rows, note)]
