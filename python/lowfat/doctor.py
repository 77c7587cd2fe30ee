"""What `lowfat doctor` knows: facts about this installation and machine, and what to do about each problem."""
import os
import platform
import re
import subprocess
from importlib import metadata

import torch

from . import _native

# The oldest driver that runs programs of a CUDA major version (NVIDIA's compatibility table); the runtime is linked in.
OLDEST_DRIVER = {12: 525, 13: 580}


def facts() -> dict:
    """Everything as plain JSON; `gpus` is what the driver sees, `cuda` what torch can use."""
    return {
        "versions": versions(),
        "needs": needs(),
        "library": str(_native.library_path) if _native.library_path else None,
        "why_not": _native.why_not,
        "kernels": _native.kernels(),
        "build": _native.build_info(),
        "cpu": cpu(),
        "gpus": gpus(),
        "cuda": cuda(),
        "environment": {name: os.environ[name] for name in sorted(os.environ)
                        if name.startswith("LOWFAT_") or name == "CUDA_VISIBLE_DEVICES"},
    }


def versions() -> dict[str, str | None]:
    """Installed versions; None where a package is missing. Read from metadata: nothing is imported."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("lowfat", *needs()):
        if name not in found:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = None
    return found


def needs() -> dict[str, str]:
    """Oldest versions this lowfat was declared to work with, "" for any; empty when lowfat runs from a source tree."""
    try:
        lines = metadata.requires("lowfat") or []
    except metadata.PackageNotFoundError:
        return {}
    plain = [line for line in lines if "extra" not in line]
    return {re.match(r"[\w.-]+", line)[0]: (re.search(r">=\s*([\d.]+)", line) or ["", ""])[1] for line in plain}


def cpu() -> dict:
    """The processor's name, the instruction set level of our kernels, and torch's threads."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return {"name": name, "level": _native.cpu_level(), "threads": torch.get_num_threads()}


def gpus() -> list[dict] | None:
    """The GPUs that the driver sees, whatever torch can do; None where there is no driver."""
    fields = ("name", "driver", "arch", "memory")
    query = "--query-gpu=name,driver_version,compute_cap,memory.total"
    try:
        done = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    return [dict(zip(fields, line.split(", "), strict=False)) for line in done.stdout.splitlines()]


def cuda() -> dict:
    """The CUDA that torch was built with, and the devices it can use; `fault` where asking one of them failed."""
    found = {"built": torch.version.cuda, "devices": [], "fault": None}
    if not torch.cuda.is_available():
        return found
    try:
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            torch.cuda.synchronize(index)
            arch = about.major * 10 + about.minor
            found["devices"].append({"name": about.name, "arch": arch, "memory": about.total_memory})
    except RuntimeError as error:
        found["fault"] = str(error).splitlines()[0]
    return found


def summary(known: dict) -> str:
    """One sentence: what runs here, what is compiled and cannot be used, why, and what would change that."""
    if not known["library"]:
        return "Every op runs its plain torch reference here: correct, and slower than the kernels."
    sentence = f"The CPU runs lowfat's {known['cpu']['level']} kernels"
    devices, built, fault = (known["cuda"][key] for key in ("devices", "built", "fault"))
    archs = known["build"]["cuda_archs"]
    unused = f"{sentence}; the CUDA kernels are compiled, have never run on a GPU, and cannot be used here"
    if archs and (fault or known["gpus"] and not devices):  # there is a GPU: the cause is among the problems
        return f"{unused} before the problem named in the advice is solved."
    able = [device["name"] for device in devices if runs_on(archs, device["arch"])]
    if able:
        return f"{sentence}, {', '.join(able)} the CUDA kernels, which have never run on a GPU before."
    if devices:
        return f"{sentence}; on {', '.join(device['name'] for device in devices)} every op runs its plain torch reference."
    if not archs:
        return f"{sentence}."
    if built:
        why, change = "torch sees no GPU", "a machine with an NVIDIA GPU and its driver"
    else:
        why = f"this torch, {known['versions']['torch']}, is built without CUDA"
        change = "a CUDA build of torch (https://pytorch.org/get-started) and an NVIDIA GPU; lowfat itself stays as it is"
    return f"{unused} because {why}: to use them you need {change}."


def advice(known: dict) -> list[str]:
    """What to do about what is wrong in these facts, one sentence or two for each problem; empty when nothing is."""
    return [*_library(known), *_versions(known), *_cpu(known), *_gpu(known)]


def _library(known):
    if known["why_not"] == "LOWFAT_DISABLE_KERNELS=1":
        yield "kernels are switched off by LOWFAT_DISABLE_KERNELS=1: unset it to use them"
    elif known["library"] is None:
        yield (f"no kernels, every op runs its plain torch reference: {known['why_not']}. Install lowfat again with a C++17 "
               "compiler at hand: pip install --force-reinstall --no-deps lowfat")
    elif known["versions"]["lowfat"] not in (None, known["build"]["version"]):
        yield (f"the compiled library is of lowfat {known['build']['version']}, the Python code of "
               f"{known['versions']['lowfat']}: install lowfat again")


def _versions(known):
    for name, oldest in known["needs"].items():
        found = known["versions"][name]
        if found is None:
            yield f"{name} is not installed: pip install '{name}{'>=' + oldest if oldest else ''}'"
        elif oldest and _numbers(found) < _numbers(oldest):
            yield f"{name} is {found}, lowfat needs {oldest} or newer: pip install -U {name}"


def _cpu(known):
    level, asked = known["cpu"]["level"], known["environment"].get("LOWFAT_CPU_LEVEL")
    if asked and level == asked:
        yield f"CPU kernels are held at {level} by LOWFAT_CPU_LEVEL: unset it to use the best this processor has"
    elif asked and level:
        yield f"LOWFAT_CPU_LEVEL asks for {asked}, this processor has {level} at most: unset it"
    elif level == "scalar" and known["build"] and platform.machine() in ("x86_64", "AMD64"):
        yield "this processor has no AVX2 and FMA: low-rank products go to torch wherever it is faster"


def _gpu(known):
    seen, torch_cuda, build = known["gpus"] or [], known["cuda"], known["build"]
    if torch_cuda["fault"]:
        yield f"the device reported an error earlier ({torch_cuda['fault']}): restart the process"
    if seen and not torch_cuda["built"]:
        again = "" if build and build["cuda"] else ", then lowfat again with nvcc on PATH"
        yield (f"{seen[0]['name']} is here, and this torch has no CUDA: install a CUDA build of torch "
               f"(https://pytorch.org/get-started){again}")
        return
    if seen and not torch_cuda["devices"] and not torch_cuda["fault"]:
        yield _why_hidden(known, seen[0])
        return
    if not torch_cuda["devices"]:
        return
    if build and not build["cuda"]:
        yield ("lowfat was built without CUDA kernels, GPU ops run their references: install the CUDA toolkit (nvcc on "
               "PATH), then pip install --force-reinstall --no-deps lowfat")
    elif build:
        driver, oldest = seen[0]["driver"] if seen else None, OLDEST_DRIVER.get(_numbers(build["cuda"])[0])
        if driver and oldest and _numbers(driver)[0] < oldest:
            yield f"the driver is {driver}, kernels built with CUDA {build['cuda']} need {oldest} or newer: update it"
        for device in torch_cuda["devices"]:
            if not runs_on(build["cuda_archs"], device["arch"]):
                yield (f"built for {', '.join(build['cuda_archs'])}; {device['name']} is sm_{device['arch']}: build with "
                       f"LOWFAT_CUDA_ARCHS={device['arch']}-real")
        yield "the CUDA kernels of this version have not run on a GPU yet: compare with the CPU before relying on them"


def _why_hidden(known, gpu):
    hidden = known["environment"].get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return f"CUDA_VISIBLE_DEVICES={hidden!r} hides {gpu['name']} from torch: unset it"
    oldest = OLDEST_DRIVER.get(_numbers(known["cuda"]["built"])[0])
    driver, built = gpu["driver"], known["cuda"]["built"]
    if oldest and _numbers(driver)[0] < oldest:
        return f"the driver is {driver}, this torch (CUDA {built}) needs {oldest} or newer: update it"
    return f"torch does not see {gpu['name']} (driver {driver}, torch's CUDA {built}): see `nvidia-smi`"


def runs_on(archs: list[str], device: int) -> bool:
    """Whether code built for these targets runs on compute capability `device` (80 for 8.0).

    Machine code runs on its own major version from its minor on, sm_90a on 9.0 alone, PTX on everything newer."""
    for arch in archs:
        kind, number, exact = re.fullmatch(r"(sm|compute)_(\d+)(a?)", arch).groups()
        number = int(number)
        if number == device or not exact and number < device and (kind == "compute" or number // 10 == device // 10):
            return True
    return False


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
