"""What stands beside measured numbers: the machine they are from, and the table they are shown in."""
import datetime
import os
import platform

import torch

from . import _native, doctor


def header(threads: int, device: torch.device = torch.device("cpu")) -> dict:
    """What a number means nothing without. Clocks are measured as they are, never set."""
    build, processor = _native.build_info(), doctor.cpu()
    about = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": processor["name"], "cores": os.cpu_count(), "threads": threads, "level": processor["level"],
        "load": [round(load, 2) for load in os.getloadavg()],
        "lowfat": build.get("version"), "compiler": build.get("compiler"),
        "torch": torch.__version__, "python": platform.python_version(),
    }
    if device.type == "cuda":
        gpu = (doctor.gpus() or [{}])[0]
        about |= {"gpu": torch.cuda.get_device_name(device), "driver": gpu.get("driver"), "cuda": torch.version.cuda,
                  "nvcc": build.get("cuda")}
    return about


def markdown(columns: dict[str, str], rows: list[dict]) -> str:
    """A table; columns: key of a row -> title."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(row[key]) for key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"
