"""What nvcc and ptxas made of a .cu file: each kernel's resources and its instructions, for one architecture."""
from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
ARCHS = {"sm_80": "compute_80", "sm_90a": "compute_90a"}  # machine code that the wheel carries, and what it is made from
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG"]  # as CMake's Release build
WARNINGS = ["-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers: LDG.E.128.CONSTANT
    operands: str
    is_conditional: bool = False

    def __str__(self) -> str:
        return f"{self.opcode} {self.operands}"


@dataclass
class Kernel:
    symbol: str
    name: str  # demangled
    registers: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0
    smem_bytes: int = 0  # static
    instructions: list[Instruction] = field(default_factory=list)

    def find(self, pattern: str) -> list[int]:
        """Positions of the instructions whose opcode matches from its start."""
        return [i for i, one in enumerate(self.instructions) if re.match(pattern, one.opcode)]

    def reached_without(self, pattern: str) -> set[int]:
        """Positions to which some way leads from the start that does not pass an instruction of this opcode."""
        labels = {one.opcode: i for i, one in enumerate(self.instructions) if one.opcode.startswith(".L")}
        reached, ways = set(), [0]
        while ways:
            i = ways.pop()
            if i in reached or i >= len(self.instructions) or re.match(pattern, self.instructions[i].opcode):
                continue
            reached.add(i)
            one = self.instructions[i]
            is_branch, target = one.opcode.startswith("BRA"), re.search(r"`\((\S+)\)", one.operands)
            if is_branch and target:
                ways.append(labels[target[1]])
            if one.is_conditional or not (is_branch or one.opcode == "EXIT"):
                ways.append(i + 1)
        return reached


def nvcc() -> str | None:
    return shutil.which("nvcc")


def nvdisasm() -> str | None:
    """Of the wheel nvidia-cuda-nvdisasm, or of a full CUDA toolkit, or of the triton wheel."""
    site = Path(sysconfig.get_path("purelib"))
    found = [*sorted(site.glob("nvidia/cu*/bin/nvdisasm")), site / "triton/backends/nvidia/bin/nvdisasm"]
    return next((str(path) for path in found if path.exists()), shutil.which("nvdisasm"))


def compile_source(source: Path, arch: str, out: Path) -> tuple[dict[str, Kernel], list[str]]:
    """The kernels of a source by symbol, and the warnings of the compiler."""
    report = compiler_report(source, arch, out)
    kernels = resources(report)
    listing = subprocess.run([nvdisasm(), "-c", str(out)], check=True, capture_output=True, text=True).stdout
    for symbol, instructions in disassembly(listing).items():
        if symbol in kernels:
            kernels[symbol].instructions = instructions
    return kernels, [line for line in report.splitlines() if "warning" in line.lower()]


def symbols(source: Path, arch: str, out: Path) -> set[str]:
    """The mangled names of a source's kernels."""
    return set(resources(compiler_report(source, arch, out)))


def compiler_report(source: Path, arch: str, out: Path) -> str:
    done = subprocess.run([nvcc(), *FLAGS, *WARNINGS, f"-gencode=arch={ARCHS[arch]},code={arch}", "-I", str(ROOT / "csrc"),
                           "-cubin", "-o", str(out), str(source)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile for {arch}:\n{done.stderr}")
    return done.stderr


def resources(report: str) -> dict[str, Kernel]:
    """From what ptxas -v says."""
    kernels: dict[str, Kernel] = {}
    now = None
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for", line):
            now = kernels[found[1]] = Kernel(found[1], demangled(found[1]))
        elif now and (found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)):
            now.stack_bytes, now.spill_bytes = int(found[1]), int(found[2]) + int(found[3])
        elif now and (found := re.search(r"Used (\d+) registers", line)):
            now.registers = int(found[1])
            smem = re.search(r"(\d+) bytes smem", line)
            now.smem_bytes = int(smem[1]) if smem else 0
    return kernels


def disassembly(listing: str) -> dict[str, list[Instruction]]:
    """{symbol: instructions} of what nvdisasm -c prints; a label is one without operands, .L_x_1."""
    found: dict[str, list[Instruction]] = {}
    now: list[Instruction] = []
    for line in listing.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line):
            now = found.setdefault(section[1], [])
        elif label := re.match(r"\s*(\.L_\w+):", line):
            now.append(Instruction(label[1], ""))
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
            in_operands = code[2].startswith("BRA") and not code[3].startswith("`")  # BRA P0, `(.L_x_1)
            now.append(Instruction(code[2], code[3], bool(code[1]) or in_operands))
    return found


def demangled(symbol: str) -> str:
    if not shutil.which("c++filt"):
        return symbol
    return subprocess.run(["c++filt", symbol], check=True, capture_output=True, text=True).stdout.strip()
