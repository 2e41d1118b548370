"""The command doctor: what is installed, what is missing and for what; imports nothing heavy."""

import importlib.metadata
import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from moe_locality.commands.output import Result, table
from moe_locality.compat import nvidia_apex_state

WANTED = (
    ("numpy", "1.26", "everything", None),
    ("scipy", "1.11", "placement", None),
    ("numba", "0.60", "placement", None),
    ("pyarrow", "15", "traces", None),
    ("torch", "2.10", "recording and running", "deepspeed"),
    ("deepspeed", "0.19.4", "running", "deepspeed"),
    ("transformers", "5.0", "Hugging Face models", "hf"),
    ("accelerate", "1.0", "expert parallelism of Hugging Face models", "hf"),
    ("matplotlib", "3.8", "reports", "report"),
    ("wandb", "0.20", "tracking", "wandb"),
    ("mpi4py", "4", "clusters under MPI", "mpi"),
    ("mtkahypar", "1.7", "the hypergraph baseline", "solver"),
    ("triton", "3", "kernels on a GPU", None),
)
COMPILERS = ("nvcc", "g++", "ninja", "mpirun", "pdsh")


def doctor() -> Result:
    """Show what is installed here and what is missing for what."""
    packages = {wanted[0]: _package(*wanted) for wanted in WANTED}
    apex_state, apex_words = nvidia_apex_state()
    payload = {
        "command": "doctor",
        "moe_locality": _version("moe-locality"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "front_ends": _front_ends({name: p["version"] for name, p in packages.items()}),
        "apex": {"state": apex_state, "detail": apex_words},
        "kernels": _backends(),
        "tools": {name: _tool(name) for name in COMPILERS},
        "problems": [p["problem"] for p in packages.values() if p["problem"]],
    }
    return Result(payload=payload, show=lambda console: _show(console, payload))


def _show(console: Any, found: dict[str, Any]) -> None:
    console.print(f"moe_locality {found['moe_locality']}, Python {found['python']}")
    rows = [
        (
            name,
            p["version"] or ("missing" if p["problem"] else "not installed"),
            p["needed_for"] if p["version"] or p["problem"] else f"optional: {p['needed_for']}",
            p["problem"] or p["install"] or "",
        )
        for name, p in found["packages"].items()
    ]
    rows.append(("NVIDIA apex", found["apex"]["state"], "optional", found["apex"]["detail"]))
    console.print(table("", ("package", "found", "for", "what to do"), rows))
    for title, columns, part in (
        ("What runs through our exchange", ("models of", "state"), "front_ends"),
        ("Kernel backends", ("backend", "state"), "kernels"),
        ("Tools", ("tool", "found"), "tools"),
    ):
        rows = [(name, words or "not on PATH") for name, words in found[part].items()]
        console.print(table(title, columns, rows))
    count = len(found["problems"])
    console.print("Everything fits." if not count else f"{count} thing(s) to look at, see above.")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(name: str, least: str, purpose: str, extra: str | None) -> dict[str, Any]:
    found, problem = _version(name), None
    if found is not None and _numbers(found) < _numbers(least):
        problem = f"found {name} {found}, expected at least {least}: pip install -U {name}"
    elif found is None and extra is None and name != "triton":
        problem = f"found no {name}, which moe-locality needs: install moe-locality again"
    install = None if found or extra is None else f"pip install 'moe-locality[{extra}]'"
    return {"version": found, "needed_for": purpose, "problem": problem, "install": install}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _front_ends(versions: dict[str, str | None]) -> dict[str, str]:
    """Say whose models can run here, or what is missing; looks at versions and files only."""
    stock = _lacking(versions, torch="2.10", deepspeed="0.19.4")
    auto_ep = stock or _lacking(versions, transformers="5.0")
    if not auto_ep:
        spec = importlib.util.find_spec("deepspeed")  # which does not import it
        folders = spec.submodule_search_locations if spec is not None else None
        if not any(Path(at, "module_inject/auto_ep_layer.py").is_file() for at in folders or ()):
            auto_ep = f"deepspeed {versions['deepspeed']} has no AutoEP: pip install -U deepspeed"
    spread = _lacking(versions, torch="2.10", transformers="5.23", accelerate="1.0")
    return {
        "DeepSpeed MoE": stock or "available: moe_locality.initialize",
        "DeepSpeed AutoEP": auto_ep or "available: moe_locality.initialize",
        "transformers": spread or "available: moe_locality.register",
    }


def _lacking(versions: dict[str, str | None], **least: str) -> str:
    """Return what of these packages is missing or too old, in words; empty where nothing is."""
    short = [
        f"{name} {needed}" + (f" (found {versions[name]})" if versions[name] else "")
        for name, needed in least.items()
        if _numbers(versions[name] or "") < _numbers(needed)
    ]
    extra = "hf" if "transformers" in least else "deepspeed"
    return f"needs {', '.join(short)}: pip install -U 'moe-locality[{extra}]'" if short else ""


def _backends() -> dict[str, str]:
    """Ask the front of the kernels, in a process of its own: it imports torch."""
    if _version("torch") is None:
        return {"reference": "needs torch"}
    code = (
        "import json, torch\n"
        "from moe_locality.errors import BackendUnavailable\n"
        "from moe_locality.kernels import ops\n"
        "found = {}\n"
        "for name in ('reference', 'triton', 'cuda'):\n"
        "    try: ops.check_backend(name); found[name] = 'available'\n"
        "    except BackendUnavailable as error: found[name] = str(error)\n"
        "found['device'] = torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'\n"
        "print(json.dumps(found))\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
        )
    except subprocess.SubprocessError as error:
        lines = str(getattr(error, "stderr", "") or error).strip().splitlines()
        return {"kernels": f"cannot be asked: {lines[-1] if lines else error}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def _tool(name: str) -> str | None:
    """Return what the tool says about its version, or None where it is not there."""
    path = shutil.which(name)
    if path is None:
        return None
    flag = "-V" if name == "pdsh" else "--version"
    try:
        done = subprocess.run([path, flag], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return path
    lines = (done.stdout or done.stderr).strip().splitlines()
    return next((line for line in lines if "release" in line), (lines or [path])[0]).strip()
