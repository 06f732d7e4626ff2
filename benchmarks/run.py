"""Measure tessbkg against other ways of doing the same; print tables, keep figures as JSON.

    python benchmarks/run.py                       everything, about 25 minutes on 2 cores
    python benchmarks/run.py --quick               a look at everything, about 5 minutes
    python benchmarks/run.py --sections kernel,scale --repeats 9
    python benchmarks/run.py --sections link       through a slow link, as root (see link.py)

Needs `pip install tessbkg[test] bottleneck photutils scikit-image`, no network but for the first run of the
sections `accuracy`, `build` and `targets`, which install tess-backml into an environment of its own
(`--prior-python` names one that is there). Figures mean something on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # one core is one core

from data import environment, write_json

SECTIONS = ("kernel", "accuracy", "build", "reads", "targets", "scale", "startup")
UNASKED = ("link",)  # what is not done unless it is named
PRIOR = "tess-backml==0.3.3"


def prior_python(cache: Path, given: str | None) -> str | None:
    """Give the Python that has tess-backml; make its environment when there is none."""
    if given:
        return given
    python = cache / "prior" / "bin" / "python"
    if not python.exists():
        print(f"  installing {PRIOR} into {cache / 'prior'} ...", flush=True)
        try:
            subprocess.run([sys.executable, "-m", "venv", str(cache / "prior")], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "-q", PRIOR, "numpy<2.3"], check=True)
        except subprocess.CalledProcessError as error:
            print(f"  no comparison with {PRIOR}: {error}")
            python.unlink(missing_ok=True)
            return None
    return str(python)


def machine():
    """Say what this was measured on."""
    from importlib.metadata import version

    model = (
        next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if "model name" in line
            ),
            platform.processor(),
        )
        if Path("/proc/cpuinfo").exists()
        else platform.processor()
    )
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": model,
        "cores": os.cpu_count(),
        "load before": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("tessbkg", "numpy", "zarr", "xarray", "dask", "s3fs")},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer frames and repeats")
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--repeats", type=int, help="rounds of each measurement (default 7, quick 3)")
    parser.add_argument("--out", type=Path, default=Path("results.json"))
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "tessbkg-benchmarks")
    parser.add_argument("--servers", default="ministack,ceph", help="S3 servers to use")
    parser.add_argument("--prior-python", help="Python of an environment that has tess-backml 0.3.3")
    arguments = parser.parse_args()
    wanted = arguments.sections.split(",")
    every = (*SECTIONS, *UNASKED)
    if unknown := set(wanted) - set(every):
        parser.error(f"unknown section {sorted(unknown)[0]!r}: allowed are {', '.join(every)}")
    environment()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    repeats = arguments.repeats or (3 if arguments.quick else 7)
    results = {"machine": machine(), "quick": arguments.quick, "repeats": repeats}
    tables = []
    for name in every:
        if name not in wanted:
            continue
        print(f"{name} ...", flush=True)
        began = time.perf_counter()
        options = {}
        if name in {"accuracy", "build", "targets"}:
            options["prior"] = prior_python(arguments.cache, arguments.prior_python)
        if name in {"build", "reads", "link"}:
            options["servers_wanted"] = tuple(arguments.servers.split(","))
        figures, printed = __import__(name).run(
            arguments.cache, repeats=repeats, quick=arguments.quick, **options
        )
        results[name] = {**figures, "seconds": time.perf_counter() - began}
        tables += printed
        write_json(arguments.out, results)
        print(f"  {time.perf_counter() - began:.0f} s", flush=True)
    about = results["machine"]
    head = (
        f"Measured by `python benchmarks/run.py` on {about['cores']} cores ({about['processor']}), "
        f"Python {about['python']}, medians of {repeats} interleaved rounds"
        f"{', quick run' if arguments.quick else ''}.\n"
    )
    text = "\n".join([head, *tables])
    arguments.out.with_suffix(".md").write_text(text)
    print("\n" + text)


if __name__ == "__main__":
    main()
