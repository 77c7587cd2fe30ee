"""The machine-code gate: what a kernel was compiled to is what its author meant, on every architecture of the wheel."""
from dataclasses import replace

import pytest
from sass.expected import KERNELS, Expected, expected_of, faults
from sass.machine_code import ARCHS, ROOT, Instruction, Kernel, compile_source, disassembly, nvcc, nvdisasm

SOURCES = sorted(str(path.relative_to(ROOT / "csrc")) for path in (ROOT / "csrc").glob("*/*.cu"))

needs_tools = [pytest.mark.skipif(not nvcc(), reason="no nvcc on the path"),
               pytest.mark.skipif(not nvdisasm(), reason="no nvdisasm: pip install nvidia-cuda-nvdisasm")]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """compile_source, each source and architecture once."""
    folder, done = tmp_path_factory.mktemp("cubin"), {}

    def get(source: str, arch: str):
        if (source, arch) not in done:
            done[source, arch] = compile_source(ROOT / "csrc" / source, arch, folder / f"{len(done)}.cubin")
        return done[source, arch]

    return get


class TestCompiled:
    pytestmark = [*needs_tools, pytest.mark.timeout(300), pytest.mark.xdist_group("sass")]

    @pytest.mark.parametrize("arch", ARCHS)
    @pytest.mark.parametrize("source", SOURCES)
    def test_machine_code_is_as_expected(self, source, arch, compiled):
        kernels, warnings = compiled(source, arch)
        assert kernels or not any(one.source == source and arch in one.archs for one in KERNELS)
        found = [f"warning: {line}" for line in warnings]
        for kernel in kernels.values():
            expected = expected_of(source, kernel, arch)
            words = faults(kernel, expected) if expected else ["not described by one line of expected.KERNELS"]
            found += [f"{kernel.name}: {fault}" for fault in words]
        assert not found, f"{source} for {arch}:\n" + "\n".join(found)

    @pytest.mark.parametrize("expected", KERNELS, ids=lambda one: f"{one.source} {one.instances}")
    def test_no_line_speaks_of_a_kernel_that_is_gone(self, expected, compiled):
        for arch in expected.archs:
            kernels, _ = compiled(expected.source, arch)
            assert any(expected_of(expected.source, kernel, arch) is expected for kernel in kernels.values())


LISTING = """
	.section	.text._Z4goodv,"ax",@progbits
        /*0000*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 LDG.E.128 R8, [R2.64+0x10] ;
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0040*/               @P1 EXIT ;
	.section	.nv.info,"",@"SHT_CUDA_INFO"
"""
GOOD = Expected("x.cu", "good", registers=128, tensor_core="HMMA.16816.F32.BF16", weight_loads=2, before_barrier=2)


def kernel(*, registers=100, spill_bytes=0, change=lambda code: code) -> Kernel:
    return Kernel("_Z4goodv", "good()", registers=registers, spill_bytes=spill_bytes,
                  instructions=change(disassembly(LISTING)["_Z4goodv"]))


def test_a_listing_is_read_with_predicates_and_without_other_sections():
    assert [one.opcode for one in kernel().instructions] == [
        "LDG.E.128.CONSTANT", "LDG.E.128", "BAR.SYNC.DEFER_BLOCKING", "HMMA.16816.F32.BF16", "EXIT"]
    assert faults(kernel(), GOOD) == []


@pytest.mark.parametrize("fault, changed", [
    ("bytes spilled", kernel(spill_bytes=8)),
    ("129 registers, allowed 128", kernel(registers=129)),
    ("accesses to local memory", kernel(change=lambda code: [*code, Instruction("STL", "[R1], R2")])),
    ("no HMMA.16816.F32.BF16", kernel(change=lambda code: [*code[:3], Instruction("HMMA.16816.F32", ""), *code[4:]])),
    ("1 loads before the first barrier, expected 2", kernel(change=lambda code: [code[0], code[2], code[1], *code[3:]])),
    ("1 loads of 128 bits", kernel(change=lambda code: code[1:])),
    ("loads of single elements", kernel(change=lambda code: [*code, Instruction("LDG.E.U16", "R1, [R2]")])),
    ("2 FFMA beside 1", kernel(change=lambda code: [*code, *[Instruction("FFMA", "R1, R2, R3, R4")] * 2])),
    ("1 memory fences, expected 0", kernel(change=lambda code: [*code, Instruction("MEMBAR.SC.GPU", "")])),
    ("1 fences of the copy engine, expected 0", kernel(change=lambda code: [*code, Instruction("FENCE.VIEW.ASYNC.G", "")])),
])
def test_the_gate_finds(fault, changed):
    # each is one planted fault in machine code that passes
    assert any(fault in words for words in faults(changed, GOOD))


TWO_WARPS = """
	.section	.text._Z4goodv,"ax",@progbits
        /*0000*/              @!P0 BRA `(.L_x_1) ;
        /*0010*/                   ACQBULK ;
        /*0020*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0030*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0040*/                   UTMALDG.2D [UR8], [UR6] ;
.L_x_2:
        /*0050*/                   EXIT ;
"""


def test_the_gate_finds_the_way_of_a_warp_that_does_not_wait():
    warps = Expected("x.cu", "good", registers=128, tile_loads=2, early_tile_loads=1)
    wait = "        /*0000*/                   ACQBULK ;\n"
    late = TWO_WARPS.replace("        /*0000*/", wait + "        /*0000*/", 1)  # all wait
    unasked = TWO_WARPS.replace(wait.replace("0000", "0010"), "")  # nobody does
    found = [faults(Kernel("_Z4goodv", "good()", instructions=disassembly(listing)["_Z4goodv"]), warps)
             for listing in (TWO_WARPS, late, unasked)]
    assert found == [[], ["0 loads of tiles before the kernel before has ended, expected 1"],
                     ["2 loads of tiles before the kernel before has ended, expected 1"]]


def test_the_gate_counts_copies_in_front_of_the_barrier():
    early = kernel(change=lambda code: [Instruction("LDGSTS.E.BYPASS.128", ""), *code])
    late = kernel(change=lambda code: [*code, Instruction("LDGSTS.E.BYPASS.128", "")])
    assert faults(early, replace(GOOD, copies_before_barrier=1)) == []
    assert faults(late, replace(GOOD, copies_before_barrier=1)) == ["0 copies before the first barrier, expected 1"]
